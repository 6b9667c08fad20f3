"""What users of the original system bring with them: names of its constructors, and its batch."""
