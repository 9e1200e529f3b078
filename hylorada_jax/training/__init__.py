"""Optimizer, step, checkpoints and the trainer."""
