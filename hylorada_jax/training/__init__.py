"""Data, optimizer, step, checkpoints and the trainer."""
