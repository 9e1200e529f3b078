"""Encoders of what the domain knows about a token's place: the prior that HyLoRADAv2Linear reads."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylorada_jax.errors import ConfigError, DataError
from hylorada_torch.position import BUCKETS, check_positions, structure_buckets

# A day, a week, a month and a year in hours: the periods start here.
PERIODS = (24.0, 168.0, 720.0, 8760.0)


class StructureEncoder(nn.Module):
    """A prior for every token, from its position and its structure id.

    e = bucket_embeddings[bucket] + [sin θ, cos θ] (+ structure_embeddings[clip(structure_id)])
    θ_i = position · |freq_scale_i| · 10000^(−i/(D/2)),  i = 0 … D/2−1
    prior = σ(gate) · proj(LayerNorm(e))

    Trainable: ``bucket_embeddings`` [2N + 1, D] and ``structure_embeddings`` [max_structure_types, D], both
    N(0, 0.02²); ``freq_scale`` [D/2], ones; ``norm_weight`` and ``norm_bias`` [D], ones and zeros;
    ``proj_weight`` [hidden_size, D], Kaiming-uniform(a=√5); the scalar ``gate``, 0: 7,281 numbers at
    the defaults. The projection does not start at zero, because scale_from_structure, which it is multiplied
    by, does: neither would ever get a gradient.

    Args:
        hidden_size: width of the prior; the structure_dim of the layers.
        encoding_dim: D, even.
        num_buckets: N, buckets on either side of the middle of a sequence, at least 2.
        max_structure_types: structure ids from 0 on that are told apart; others take the nearest.
        generator: source of the random initial values; torch's global one if None.
        dtype: of the parameters.

    Raises:
        ConfigError: a size is below 1, or D is odd.

    Example:
        >>> positions = torch.arange(6)[None]
        >>> StructureEncoder(hidden_size=4)(positions, structure_ids=torch.zeros_like(positions)).shape
        torch.Size([1, 6, 4])

    Reference:
        method.md §5; the sinusoids are Vaswani et al., "Attention Is All You Need", 2017, §3.5.
    """

    def __init__(
        self,
        hidden_size: int = 32,
        encoding_dim: int = 32,
        num_buckets: int = BUCKETS,
        max_structure_types: int = 64,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if min(hidden_size, encoding_dim, num_buckets - 1, max_structure_types) < 1 or encoding_dim % 2:
            raise ConfigError(
                "hidden_size and max_structure_types must be ≥ 1, num_buckets ≥ 2, encoding_dim even, ≥ 2.",
                f"{hidden_size}, {max_structure_types}, {num_buckets}, {encoding_dim}",
                "Correct these settings.",
            )
        D = encoding_dim

        def parameter(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value.to(dtype))

        self.bucket_embeddings = parameter(0.02 * torch.randn(2 * num_buckets + 1, D, generator=generator))
        self.structure_embeddings = parameter(0.02 * torch.randn(max_structure_types, D, generator=generator))
        self.freq_scale = parameter(torch.ones(D // 2))
        self.norm_weight = parameter(torch.ones(D))
        self.norm_bias = parameter(torch.zeros(D))
        self.proj_weight = parameter(torch.empty(hidden_size, D))
        self.gate = parameter(torch.tensor(0.0))
        nn.init.kaiming_uniform_(self.proj_weight, a=math.sqrt(5), generator=generator)

    def forward(
        self, positions: Tensor, structure_ids: Tensor | None = None, seq_len: int | None = None
    ) -> Tensor:
        """The prior.

        Args:
            positions: [batch, seq], integers, or floats (hours of the calendar), whose bucket is that of ⌊p⌋.
            structure_ids: [batch, seq] integers, what the domain knows of each token.
            seq_len: the length whose middle buckets are counted from; the row's own when None.

        Returns:
            [batch, seq, hidden_size].

        Raises:
            DataError: a shape or dtype is another, or an integer position is negative.
        """
        _check_inputs(positions, structure_ids)
        middle = (positions.shape[1] if seq_len is None else seq_len) // 2
        offset = positions.floor().long() - middle
        buckets = structure_buckets(offset.numpy(force=True), len(self.bucket_embeddings) // 2)
        e = self.bucket_embeddings[torch.from_numpy(buckets)]
        e = e + self.sinusoids(positions[..., None].to(e.dtype))
        if structure_ids is not None:
            e = e + self.structure_embeddings[structure_ids.clamp(0, len(self.structure_embeddings) - 1)]
        e = F.layer_norm(e, e.shape[-1:], self.norm_weight, self.norm_bias, eps=1e-5)
        return torch.sigmoid(self.gate) * F.linear(e, self.proj_weight)

    def sinusoids(self, positions: Tensor) -> Tensor:
        """[sin θ, cos θ] [batch, seq, D] of positions [batch, seq, 1]."""
        half = len(self.freq_scale)
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        theta = positions * (self.freq_scale.abs() * frequencies.to(positions))
        return torch.cat([theta.sin(), theta.cos()], dim=-1)

    def get_position_tensor(
        self, batch_size: int, seq_len: int, device: torch.device | str | None = None
    ) -> Tensor:
        """The positions of rows that are counted from 0.

        Args:
            batch_size: rows.
            seq_len: tokens per row.
            device: of the result; torch's default if None.

        Returns:
            [batch_size, seq_len] int64: 0, 1, 2, … in every row.

        Example:
            >>> StructureEncoder().get_position_tensor(2, 3).tolist()
            [[0, 1, 2], [0, 1, 2]]
        """
        return torch.arange(seq_len, device=device).expand(batch_size, seq_len)


class TemporalStructureEncoder(StructureEncoder):
    """A structure encoder that knows periods: of a day, a week, a month, a year, if a position is an hour.

    e as in `StructureEncoder` + period_proj([sin φ, cos φ]),  φ_j = 2π·position/|period_j|

    Trainable: StructureEncoder's, ``periods`` [num_periods], 24, 168, 720 and 8760 at the start, and
    ``period_weight`` [D, 2·num_periods], Kaiming-uniform(a=√5).

    Args:
        hidden_size: width of the prior.
        encoding_dim: D, even.
        num_buckets: N, buckets on either side of the middle of a sequence, at least 2.
        max_structure_types: structure ids told apart.
        num_periods: how many of the four periods, the shortest first.
        generator: source of the random initial values; torch's global one if None.
        dtype: of the parameters.

    Raises:
        ConfigError: as `StructureEncoder`, or num_periods is not 1, 2, 3 or 4.

    Example:
        >>> encoder = TemporalStructureEncoder(hidden_size=4)
        >>> encoder(encoder.get_position_tensor(1, 6)).shape
        torch.Size([1, 6, 4])

    Reference:
        method.md §5.
    """

    def __init__(
        self,
        hidden_size: int = 32,
        encoding_dim: int = 32,
        num_buckets: int = BUCKETS,
        max_structure_types: int = 64,
        num_periods: int = 4,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(
            hidden_size, encoding_dim, num_buckets, max_structure_types, generator=generator, dtype=dtype
        )
        if not 1 <= num_periods <= len(PERIODS):
            raise ConfigError(
                f"num_periods must be 1 to {len(PERIODS)}.", num_periods, f"They are of {PERIODS}."
            )
        self.periods = nn.Parameter(torch.tensor(PERIODS[:num_periods], dtype=dtype))
        self.period_weight = nn.Parameter(torch.empty(encoding_dim, 2 * num_periods, dtype=dtype))
        nn.init.kaiming_uniform_(self.period_weight, a=math.sqrt(5), generator=generator)

    def sinusoids(self, positions: Tensor) -> Tensor:
        """[sin θ, cos θ] + period_proj([sin φ, cos φ]) [batch, seq, D] of positions [batch, seq, 1]."""
        phi = 2 * math.pi * positions / self.periods.abs()
        periodic = torch.cat([phi.sin(), phi.cos()], dim=-1)
        return super().sinusoids(positions) + F.linear(periodic, self.period_weight)


def _check_inputs(positions: Tensor, structure_ids: Tensor | None) -> None:
    if positions.ndim != 2:
        raise DataError(
            "An encoder's positions are [batch, seq].", tuple(positions.shape), "Give one for every token."
        )
    if not positions.is_floating_point():
        check_positions(positions, *positions.shape)
    if structure_ids is None:
        return
    if structure_ids.shape != positions.shape or structure_ids.is_floating_point():
        raise DataError(
            "structure_ids are integers of the positions' shape [batch, seq].",
            f"{structure_ids.dtype} {tuple(structure_ids.shape)} for positions {tuple(positions.shape)}",
            "Give one structure id for every token.",
        )
