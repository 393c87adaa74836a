"""Compression by recipe: the file, its steps, and the run that keeps what is done."""
