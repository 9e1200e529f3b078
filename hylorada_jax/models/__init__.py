"""Base models: our decoder for the Llama family, and HF's Flax models behind the same face."""
