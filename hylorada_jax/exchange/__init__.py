"""Adapters leave for other libraries, merged into a checkpoint or as PEFT's, and come back."""
