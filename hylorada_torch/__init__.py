"""HyLoRADA in PyTorch: the method written to be read, the reference that hylorada_jax is compared with."""

from hylorada_jax.config import HyLoRADAConfig
from hylorada_torch.linear import DoRALinear, HyLoRADALinear, LoRALinear
from hylorada_torch.model import HyLoRADAModel
from hylorada_torch.optimizer import clip_by_global_norm, make_optimizer, parameter_groups
from hylorada_torch.surgery import AdaptedLinear, attach_adapters

__all__ = [
    "AdaptedLinear",
    "DoRALinear",
    "HyLoRADAConfig",
    "HyLoRADALinear",
    "HyLoRADAModel",
    "LoRALinear",
    "attach_adapters",
    "clip_by_global_norm",
    "make_optimizer",
    "parameter_groups",
]
