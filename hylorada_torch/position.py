"""Positions: the buckets they fall into, and the learned factor that all Unified layers share."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hylorada_jax.errors import ConfigError, DataError

BUCKETS = 64  # N
MAX_DISTANCE = 32768  # M


def position_buckets(position: NDArray, buckets: int = BUCKETS) -> NDArray:
    """The bucket of a position id: its own up to 31, then logarithmically wider ones.

        p if p < E, else E + ⌊(N−E−1)·ln(max(p−E, 1)) / ln(M−E)⌋;   E = N/2, p clamped to [0, M−1]

    Args:
        position: integers, any shape.
        buckets: N, 2 to M.

    Returns:
        Integers in [0, N), the same shape; the logarithm is taken in float64.

    Example:
        >>> position_buckets(np.array([0, 31, 33, 40, 10**6])).tolist()
        [0, 31, 32, 38, 62]

    Reference:
        method.md §2.
    """
    exact = buckets // 2
    p = np.clip(position, 0, MAX_DISTANCE - 1)
    part = np.log(np.maximum(p - exact, 1), dtype=np.float64) / np.log(MAX_DISTANCE - exact)
    return np.where(p < exact, p, exact + np.floor((buckets - exact - 1) * part).astype(np.int64))


def relative_buckets(distance: NDArray) -> NDArray:
    """The bucket of a distance q − k: the first half for k ≤ q, the second for k > q.

        a if a < X, else min(X + ⌊ln(a/X)/ln(M/X)·(H−X)⌋, H−1);  plus H where q − k < 0
        a = |q − k|,  H = N/2,  X = H/2

    Args:
        distance: integers, any shape.

    Returns:
        Integers in [0, N), the same shape.

    Example:
        >>> relative_buckets(np.array([0, 15, 100, 10**6, -1, -100])).tolist()
        [0, 15, 19, 31, 33, 51]

    Reference:
        method.md §2; Raffel et al., "T5", 2020, §2.1.
    """
    half = BUCKETS // 2
    return _log_buckets(np.abs(distance), half) + half * (distance < 0)


def structure_buckets(offset: NDArray, buckets: int = BUCKETS) -> NDArray:
    """The bucket of t = position − seq_len//2, of a table of 2N + 1 rows whose last is never read.

        (N if t ≥ 0 else 0) + (a if a < X else min(X + ⌊ln(a/X + 1e-6)/ln(M/X)·(N−X)⌋, N−1))
        a = |t|,  X = N/2

    Args:
        offset: integers, any shape.
        buckets: N, on either side of 0.

    Returns:
        Integers in [0, 2N), the same shape.

    Example:
        >>> structure_buckets(np.array([-(10**6), -40, -1, 0, 31, 40])).tolist()
        [63, 33, 1, 64, 95, 97]

    Reference:
        method.md §2.
    """
    return _log_buckets(np.abs(offset), buckets, 1e-6) + buckets * (offset >= 0)


def _log_buckets(a: NDArray, count: int, nudge: float = 0.0) -> NDArray:
    exact = count // 2
    part = np.log(np.maximum(a, exact) / exact + nudge) / np.log(MAX_DISTANCE / exact)
    return np.where(a < exact, a, np.minimum(exact + np.floor(part * (count - exact)), count - 1)).astype(int)


def check_positions(positions: Tensor, *tokens: int) -> None:
    """Refuse position ids that are not integers ≥ 0, one for every token of a shape, [batch, seq] as a rule.

    Raises:
        DataError: saying which of these.
    """
    wrong = None
    if positions.shape != tokens:
        wrong = f"shape {tuple(positions.shape)} for tokens {tokens}"
    elif positions.is_floating_point():
        wrong = f"dtype {positions.dtype}"
    elif not positions.is_meta and positions.numel() and positions.min() < 0:
        wrong = f"a position of {positions.min().item()}"
    if wrong:
        raise DataError(
            "Position ids are integers ≥ 0 of shape [batch, seq].",
            wrong,
            "Count the tokens of every document from 0; give padding 0.",
        )


def default_positions(batch: int, seq: int, attention_mask: Tensor | None = None) -> Tensor:
    """The position of every token when nobody gives any.

    Counted from the first real token with ``attention_mask`` (padding in front is 0), else from the left.

    Args:
        batch: rows.
        seq: tokens per row.
        attention_mask: [batch, seq], 1 for a token and 0 for padding.

    Returns:
        [batch, seq] int64.

    Example:
        >>> default_positions(1, 4, torch.tensor([[0, 1, 1, 1]])).tolist()
        [[0, 0, 1, 2]]
    """
    if attention_mask is None:
        return torch.arange(seq).expand(batch, seq)
    return (attention_mask.cumsum(dim=1) - 1).clamp_min(0)


class PositionBias(nn.Module):
    """How much each position turns the low-rank update up or down; one for all layers of a model.

    t = tanh(position_bias[bucket(position)])

    Trainable: ``position_bias`` [num_buckets], zeros.

    Args:
        num_buckets: N, 2 to 32768.
        dtype: of the parameter.

    Raises:
        ConfigError: num_buckets is out of range.

    Example:
        >>> PositionBias()(torch.tensor([[0, 1, 2]]))
        tensor([[0., 0., 0.]], grad_fn=<TanhBackward0>)

    Reference:
        method.md §§1–2.
    """

    def __init__(self, num_buckets: int = BUCKETS, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if not 2 <= num_buckets <= MAX_DISTANCE:
            rule = f"PositionBias: num_buckets is 2 to {MAX_DISTANCE}."
            raise ConfigError(rule, num_buckets, f"The default is {BUCKETS}.")
        self.position_bias = nn.Parameter(torch.zeros(num_buckets, dtype=dtype))

    def forward(self, positions: Tensor) -> Tensor:
        """The factor t [batch, seq] in (−1, 1) of position ids [batch, seq]."""
        buckets = torch.from_numpy(position_buckets(positions.numpy(force=True), len(self.position_bias)))
        return torch.tanh(self.position_bias[buckets])
