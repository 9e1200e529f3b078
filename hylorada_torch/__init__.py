"""HyLoRADA in PyTorch: the method written to be read, the reference that hylorada_jax is compared with."""

from hylorada_jax.config import HyLoRADAConfig
from hylorada_torch.attention import DirectAttentionAdapter, PositionalDAA, ShiftedSparseAttention
from hylorada_torch.evaluation import evaluate_lost_in_the_middle, evaluate_perplexity
from hylorada_torch.linear import (
    DoRALinear,
    HyLoRADALinear,
    HyLoRADAUnified,
    HyLoRADAv2Linear,
    LoRALinear,
)
from hylorada_torch.model import HyLoRADAModel
from hylorada_torch.optimizer import clip_by_global_norm, make_optimizer, parameter_groups
from hylorada_torch.position import PositionBias
from hylorada_torch.sparse import SparseAdapter, TopKGate
from hylorada_torch.structure import StructureEncoder, TemporalStructureEncoder
from hylorada_torch.surgery import AdaptedLinear, attach_adapters

__all__ = [
    "AdaptedLinear",
    "DirectAttentionAdapter",
    "DoRALinear",
    "HyLoRADAConfig",
    "HyLoRADALinear",
    "HyLoRADAModel",
    "HyLoRADAUnified",
    "HyLoRADAv2Linear",
    "LoRALinear",
    "PositionBias",
    "PositionalDAA",
    "ShiftedSparseAttention",
    "SparseAdapter",
    "StructureEncoder",
    "TemporalStructureEncoder",
    "TopKGate",
    "attach_adapters",
    "clip_by_global_norm",
    "evaluate_lost_in_the_middle",
    "evaluate_perplexity",
    "make_optimizer",
    "parameter_groups",
]
