"""Raw files from public sources.

NOT VERIFIED ONLINE: these fetchers were written from the services' documentation and tested against small stored
answers; no request of theirs has met the real services yet. Each answer is checked by content before it is kept.
"""
