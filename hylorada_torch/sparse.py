"""The sparse adapter after an MLP block, and the gate that leaves a few of its units on."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylorada_jax.config import check_dropout
from hylorada_jax.errors import ConfigError
from hylorada_torch.settings import floor_of


def topk_mask(gate_scores: Tensor, topk_ratio: float, temperature: float) -> Tensor:
    """1 on the k largest scores, else 0; differentiated as if it were n·softmax(gate_scores/τ).

    k = max(1, ⌊ratio·n⌋); of equal scores the first ones count as larger

    Args:
        gate_scores: [n].
        topk_ratio: the part of the units that stays on.
        temperature: τ.

    Returns:
        [n] in the dtype of the scores.

    Example:
        >>> topk_mask(torch.tensor([0.1, 0.3, 0.2]), topk_ratio=0.7, temperature=1.0)
        tensor([0., 1., 1.])

    Reference:
        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013 (the
        straight-through estimator); method.md §4.
    """
    n = len(gate_scores)
    k = max(1, floor_of(topk_ratio, n))
    mask = torch.zeros_like(gate_scores)
    mask[gate_scores.argsort(descending=True, stable=True)[:k]] = 1
    soft = n * torch.softmax(gate_scores / temperature, dim=0)
    return mask + (soft - soft.detach())


def _check(adapter_dim: int, topk_ratio: float, temperature: float, hidden_size: int = 1) -> None:
    for holds, rule, value in (
        (hidden_size >= 1, "hidden_size must be ≥ 1.", hidden_size),
        (adapter_dim >= 1, "adapter_dim must be ≥ 1.", adapter_dim),
        (0 < topk_ratio <= 1, "topk_ratio must be in (0, 1].", topk_ratio),
        (temperature > 0, "temperature must be > 0.", temperature),
    ):
        if not holds:
            raise ConfigError(rule, value, "Correct this setting.")


class TopKGate(nn.Module):
    """Which of an adapter's units are on: the k with the largest learned scores.

    Trainable: ``gate_scores`` [adapter_dim] ~ N(0, 0.02²).

    Args:
        adapter_dim: units.
        topk_ratio: the part of them that stays on; at least one does.
        temperature: τ of the straight-through gradient.
        generator: source of the random initial scores; torch's global one if None.
        dtype: of the parameter.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> TopKGate(adapter_dim=10, topk_ratio=0.3)().sum().item()
        3.0

    Reference:
        method.md §4.
    """

    def __init__(
        self,
        adapter_dim: int = 128,
        topk_ratio: float = 0.1,
        temperature: float = 1.0,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check(adapter_dim, topk_ratio, temperature)
        self.topk_ratio, self.temperature = topk_ratio, temperature
        self.gate_scores = nn.Parameter(torch.empty(adapter_dim, dtype=dtype))
        nn.init.normal_(self.gate_scores, std=0.02, generator=generator)

    def forward(self) -> Tensor:
        """The mask [adapter_dim] of ones and zeros."""
        return topk_mask(self.gate_scores, self.topk_ratio, self.temperature)


class SparseAdapter(nn.Module):
    """A bottleneck after an MLP block, with a learned gate that leaves few of its units on.

    out = h + up(dropout(gelu(down(h) ⊙ mask))), gelu exact, mask of `topk_mask`

    Trainable: ``down`` [adapter_dim, hidden_size] Kaiming-uniform(a=√5), ``up`` [hidden_size, adapter_dim]
    zeros, ``gate_scores`` [adapter_dim] ~ N(0, 0.02²).

    Args:
        hidden_size: features of h.
        adapter_dim: units.
        topk_ratio: the part of them that stays on; at least one does.
        temperature: τ of the gate's straight-through gradient.
        dropout: probability in [0, 1) of dropping a unit in training.
        generator: source of the random initial values; torch's global one if None.
        dtype: of the parameters.

    Raises:
        ConfigError: a setting is out of range.

    Example:
        >>> h = torch.randn(1, 5, 8)
        >>> torch.equal(SparseAdapter(hidden_size=8, adapter_dim=16)(h), h)  # up is zero
        True

    Reference:
        method.md §4.
    """

    def __init__(
        self,
        hidden_size: int,
        adapter_dim: int = 128,
        topk_ratio: float = 0.1,
        temperature: float = 1.0,
        dropout: float = 0.0,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check(adapter_dim, topk_ratio, temperature, hidden_size)
        check_dropout(dropout)
        self.topk_ratio, self.temperature = topk_ratio, temperature
        self.down = nn.Parameter(torch.empty(adapter_dim, hidden_size, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(hidden_size, adapter_dim, dtype=dtype))
        self.gate_scores = nn.Parameter(torch.empty(adapter_dim, dtype=dtype))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)
        nn.init.normal_(self.gate_scores, std=0.02, generator=generator)

    def forward(self, h: Tensor) -> Tensor:
        """The adapted output [..., hidden_size] of the MLP's output h, in its dtype.

        Raises:
            ConfigError: h has another width.
        """
        if h.shape[-1:] != self.up.shape[:1]:
            raise ConfigError(
                f"SparseAdapter: h is [..., {len(self.up)}].",
                tuple(h.shape),
                "Give the width of the MLP block's output as hidden_size.",
            )
        mask = topk_mask(self.gate_scores, self.topk_ratio, self.temperature)
        active = F.gelu(F.linear(h.to(self.down.dtype), self.down) * mask)
        return (h + F.linear(self.dropout(active), self.up)).to(h.dtype)
