"""Base models: our decoder for the Llama family, and Hugging Face's Flax models, behind one protocol."""
