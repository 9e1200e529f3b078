"""Many devices as one mesh: where each leaf of a model lies, and each row of a batch."""
