"""What the operating system shares out: files that have one owner, folders that appear whole, a console that may go."""
