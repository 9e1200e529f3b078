"""Documents: read from files, tokenized, packed into rows."""
