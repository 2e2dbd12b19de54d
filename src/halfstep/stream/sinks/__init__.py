"""Where results go: files, each a plain writer of one whole file, and live consumers, for whom nothing is kept."""
