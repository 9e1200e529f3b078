"""HyLoRADA in JAX: parameter-efficient fine-tuning of Flax models.

The public names are listed in ``__init__.pyi`` and loaded on first use, so that the configuration can be
read without importing jax.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
