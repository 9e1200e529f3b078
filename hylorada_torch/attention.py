"""Attention with adapted logits (DAA), and with half of its heads in shifted groups (S²-Attn)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.shapes import check_attention
from hylorada_torch.position import BUCKETS, check_positions, default_positions, relative_buckets
from hylorada_torch.settings import s2_groups


class DirectAttentionAdapter(nn.Module):
    """Scales and shifts the logits of attention, head by head.

    S' = α·S + β

    β adds the same to every logit of a row, which the softmax does not see: alone it changes nothing. It is
    kept because the method names it; its gradient is zero up to rounding.

    Trainable: ``alpha`` [num_heads], ones, and ``beta`` [num_heads], zeros; one of each with per_head=False.

    Args:
        num_heads: query heads of the attention.
        per_head: one α and β per head.
        dtype: of the parameters.

    Raises:
        ConfigError: num_heads is below 1.

    Example:
        >>> scores = torch.ones(1, 2, 3, 3)
        >>> torch.equal(DirectAttentionAdapter(num_heads=2)(scores), scores)
        True

    Reference:
        method.md §3.
    """

    def __init__(self, num_heads: int, per_head: bool = True, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if num_heads < 1:
            raise ConfigError("num_heads must be ≥ 1.", num_heads, "Give the number of query heads.")
        self.num_heads = num_heads
        self.alpha = nn.Parameter(torch.ones(num_heads if per_head else 1, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros_like(self.alpha))

    def forward(self, scores: Tensor, *, soft_cap: float | None = None) -> Tensor:
        """S' of S = q kᵀ/√head_dim [batch, heads, query, key], before the mask.

        Args:
            scores: S.
            soft_cap: bound of α·S, where the model has one for its logits.

        Returns:
            [batch, heads, query, key], in the scores' dtype.

        Raises:
            ConfigError: the scores have another number of heads.
        """
        return self._adapted(scores, soft_cap).to(scores.dtype)

    def _adapted(self, scores: Tensor, soft_cap: float | None) -> Tensor:
        """cap(α·S) + β, at least as wide as the parameters."""
        if scores.ndim != 4 or scores.shape[1] != self.num_heads:
            raise ConfigError(
                f"{type(self).__name__}: scores are [batch, num_heads, query, key].",
                f"scores {tuple(scores.shape)}, num_heads={self.num_heads}",
                "Give num_heads the number of query heads.",
            )
        return capped(self.alpha[:, None, None] * scores, soft_cap) + self.beta[:, None, None]


class PositionalDAA(DirectAttentionAdapter):
    """DAA with a bias for each distance between query and key.

    S' = α·S + β + position_bias[bucket(q − k), head]

    Trainable: DAA's, and ``position_bias`` [64, num_heads], zeros; [64, 1] with per_head=False.

    Args:
        num_heads: query heads of the attention.
        per_head: one α, β and bias table per head.
        dtype: of the parameters.

    Raises:
        ConfigError: num_heads is below 1.

    Example:
        >>> scores = torch.ones(1, 2, 3, 3)
        >>> torch.equal(PositionalDAA(num_heads=2)(scores), scores)
        True

    Reference:
        method.md §§2–3; Raffel et al., "T5", 2020, §2.1.
    """

    def __init__(self, num_heads: int, per_head: bool = True, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(num_heads, per_head, dtype=dtype)
        self.position_bias = nn.Parameter(torch.zeros(BUCKETS, len(self.alpha), dtype=dtype))

    def forward(
        self,
        scores: Tensor,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        *,
        soft_cap: float | None = None,
    ) -> Tensor:
        """S' of S.

        Args:
            scores: [batch, heads, query, key], q kᵀ/√head_dim, before the mask.
            query_positions: [batch, query] position ids; 0, 1, 2 … when both are None, in self-attention.
            key_positions: [batch, key] position ids.
            soft_cap: bound of α·S, where the model has one for its logits.

        Returns:
            [batch, heads, query, key], in the scores' dtype.

        Raises:
            ConfigError: the scores have another number of heads.
            DataError: positions are negative, have another shape, or are missing where queries and keys are
                not the same tokens.
        """
        adapted = self._adapted(scores, soft_cap)
        batch, _, queries, keys = scores.shape
        if query_positions is None and key_positions is None and queries == keys:
            query_positions = key_positions = default_positions(batch, keys)
        if query_positions is None or key_positions is None:
            raise DataError(
                "PositionalDAA needs the positions of queries and keys, or of neither in self-attention.",
                f"{queries} queries, {keys} keys, positions of {'no' if query_positions is None else 'the'} "
                f"queries and {'no' if key_positions is None else 'the'} keys",
                "Pass both; with a KV cache the queries stand after the keys of earlier tokens.",
            )
        check_positions(query_positions, batch, queries)
        check_positions(key_positions, batch, keys)
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        buckets = torch.from_numpy(relative_buckets(distance.numpy(force=True)))
        return (adapted + self.position_bias[buckets].permute(0, 3, 1, 2)).to(scores.dtype)


def capped(scores: Tensor, soft_cap: float | None) -> Tensor:
    """cap · tanh(scores / cap); the scores themselves when cap is None (Gemma Team, "Gemma 2", 2024, §2)."""
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None = None,
    *,
    daa: DirectAttentionAdapter | None = None,
    positions: tuple[Tensor | None, Tensor | None] = (None, None),
    bias: Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, its logits adapted.

        softmax(DAA(scale · q kᵀ) + bias, where visible) v      query head h reads key head ⌊h·kv_heads/heads⌋
        DAA(S) = cap · tanh(α·S / cap) + β + position_bias[bucket(q − k)]

    With sinks, a row of the softmax has the logit z + β more, whose value is zero.

    Args:
        query: [batch, heads, query, head_dim].
        key: [batch, kv_heads, key, head_dim]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, key, head_dim].
        visible: bool, broadcastable to [batch, heads, query, key]: which keys a query sees; all when None. A
            query that sees none takes the mean of all values, or with sinks zeros.
        daa: the layer's adapter.
        positions: position ids [batch, query] and [batch, key], for a `PositionalDAA`.
        bias: broadcastable to [batch, heads, query, key], added as it is.
        scale: 1/√head_dim when None.
        soft_cap: bound of the logits before anything is added to them; none when None.
        sinks: z of every query head [heads]; none when None.
        dropout: probability of dropping an attention weight.

    Returns:
        [batch, heads, query, head_dim] in query's dtype; logits and softmax are in float32 at least.

    Reference:
        Vaswani et al., "Attention Is All You Need", 2017, §3.2.1; Ainslie et al., "GQA", 2023, §2.2; OpenAI,
        "gpt-oss-120b & gpt-oss-20b Model Card", 2025, §2.2.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * query.to(wide) @ key.to(wide).mT
    if isinstance(daa, PositionalDAA):
        scores = daa(scores, *positions, soft_cap=soft_cap)
    elif daa is not None:
        scores = daa(scores, soft_cap=soft_cap)
    else:
        scores = capped(scores, soft_cap)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        # A finite number: a row that sees no key (padding) is then uniform, and not 0/0.
        scores = scores.masked_fill(~visible, torch.finfo(wide).min)
    if sinks is not None:
        sinks = sinks.to(wide) if daa is None else sinks.to(wide) + daa.beta
        column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    weights = F.dropout(weights.to(value.dtype), dropout)
    return (weights @ value).to(query.dtype)


def same_group(heads: int, seq: int, group_size: int, shift: int) -> Tensor:
    """Which tokens share a group, head by head.

    The first heads have groups [0, G), [G, 2G) …; the last heads//2 have [0, shift), [shift, shift + G) ….

    Args:
        heads: query heads, at least 2.
        seq: tokens per row, any number.
        group_size: G.
        shift: in tokens, 0 < shift < G.

    Returns:
        bool [heads, seq, seq].

    Raises:
        ConfigError: there is one head, which cannot be halved.

    Example:
        >>> same_group(2, 4, group_size=2, shift=1).int().tolist()[1]
        [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]

    Reference:
        Chen et al., "LongLoRA", 2024, §3.2. There the tokens are rolled, so that the first ones share a group
        with the last ones; here nothing wraps around.
    """
    if heads < 2:
        raise ConfigError(
            "Shifted sparse attention halves the heads of a layer.", f"{heads} head", "Use full attention."
        )
    slots = torch.arange(seq)
    plain, shifted = slots // group_size, (slots - shift) // group_size
    group = torch.stack([plain] * (heads - heads // 2) + [shifted] * (heads // 2))
    return group[:, :, None] == group[:, None, :]


class ShiftedSparseAttention(nn.Module):
    """Causal attention inside groups of tokens; half of the heads see shifted groups (S²-Attn).

    A query sees the keys of its group that are not later, of its own document, and no padding.

    Args:
        group_size: G, tokens per group.
        shift_ratio: the last half of the heads see groups shifted by this part of G, in (0, 1).

    Raises:
        ConfigError: shift_ratio·group_size is not a whole number of tokens, at least one.

    Example:
        >>> q = torch.randn(1, 10, 4, 8); kv = torch.randn(1, 10, 2, 8)
        >>> ShiftedSparseAttention(group_size=4)(q, kv, kv).shape
        torch.Size([1, 10, 4, 8])

    Reference:
        Chen et al., "LongLoRA", 2024, §3.2; method.md §6.
    """

    def __init__(self, group_size: int, shift_ratio: float = 0.5) -> None:
        super().__init__()
        config = HyLoRADAConfig(method="longlora", s2_group_size=group_size, s2_shift_ratio=shift_ratio)
        self.group_size, self.shift = s2_groups(config, group_size)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [batch, seq, heads, head_dim].
            key: [batch, seq, kv_heads, head_dim]; query head h reads key head ⌊h·kv_heads/heads⌋.
            value: [batch, seq, kv_heads, head_dim].
            positions: [batch, seq] position ids, which only DAA would read; groups and causality go by the
                place in the row.
            segment_ids: [batch, seq], the document of every token.
            key_valid: [batch, seq], False for padding.

        Returns:
            [batch, seq, heads, head_dim] in query's dtype.

        Raises:
            ConfigError: there is one head, which cannot be halved, or heads is no multiple of kv_heads.
            DataError: an argument has another shape, or positions are negative.
        """
        check_attention(query, key, value, segment_ids=segment_ids, key_valid=key_valid)
        batch, seq, heads, _ = query.shape
        visible = same_group(heads, seq, self.group_size, self.shift).tril().to(query.device)
        if positions is not None:
            check_positions(positions, batch, seq)
        if segment_ids is not None:
            visible = visible & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
        if key_valid is not None:
            visible = visible & key_valid[:, None, None, :].bool()
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(query, key, value, visible).transpose(1, 2)
