"""Hugging Face's Flax models: all that is tied to transformers 4.57, the last version that has them.

The package can be taken out whole. Two places import it, when such a model is at hand: ``models.loading``,
which reads one by name, and ``models.wrapped``, to which a user brings one.
"""
