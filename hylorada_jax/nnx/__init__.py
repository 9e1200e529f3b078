"""HyLoRADA for Flax NNX: adapters on any NNX model, and the layers as NNX modules.

Loaded on first use: the layers alone need no more than the Linen ones do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
