"""The adapter's files: written, read, and compared with a base model."""
