import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hylorada_jax.errors import ConfigError, DataError
from hylorada_torch.attention import (
    DirectAttentionAdapter,
    PositionalDAA,
    ShiftedSparseAttention,
    attend,
    same_group,
)
from hylorada_torch.conftest import randomize
from hylorada_torch.position import relative_buckets

# Float64 sums of a few products of order 1, in two orders.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_adapter(kind, heads, per_head=True):
    daa = kind(heads, per_head, dtype=torch.float64)
    randomize(daa.parameters())
    return daa


@pytest.mark.parametrize("per_head", [True, False])
def test_positional_daa_is_the_formula_entry_by_entry(per_head):
    daa, scores = random_adapter(PositionalDAA, 3, per_head), random(2, 3, 4, 5)
    assert daa.position_bias.shape == (64, 3 if per_head else 1)
    q, k = torch.tensor([[0, 7, 40, 2000], [5, 5, 5, 5]]), torch.tensor([[3, 0, 41, 9, 1], [0, 1, 5, 9, 300]])
    got = daa(scores, q, k)
    for b, h, i, j in itertools.product(range(2), range(3), range(4), range(5)):
        column = h if per_head else 0
        bucket = int(relative_buckets((q[b, i] - k[b, j]).numpy()))
        expected = daa.alpha[column] * scores[b, h, i, j] + daa.beta[column]
        assert_close(got[b, h, i, j], expected + daa.position_bias[bucket, column])
    arange = torch.arange(4).expand(2, 4)
    assert torch.equal(daa(scores[..., :4]), daa(scores[..., :4], arange, arange))
    for given in ((), (q,), (None, k)):
        with pytest.raises(DataError, match="both"):
            daa(scores, *given)


@pytest.mark.parametrize("kind", [DirectAttentionAdapter, PositionalDAA])
def test_a_fresh_adapter_changes_nothing_and_another_number_of_heads_is_refused(kind):
    assert torch.equal(kind(3)(random(1, 3, 4, 4)), random(1, 3, 4, 4))
    for heads, per_head in ((5, True), (5, False), (1, True)):
        with pytest.raises(ConfigError, match=rf"scores \(1, 4, 3, 3\), num_heads={heads}"):
            kind(heads, per_head)(random(1, 4, 3, 3))
    with pytest.raises(ConfigError, match=r"\[batch, num_heads, query, key\]"):
        kind(4)(random(4, 3, 3))


def test_beta_alone_changes_nothing():
    query, key, value = (random(2, 3, 4, 8, seed=seed) for seed in range(3))
    daa = DirectAttentionAdapter(3, dtype=torch.float64)
    with torch.no_grad():
        daa.beta.copy_(torch.tensor([-3.0, 0.5, 7.0]))
    attended = attend(query, key, value, daa=daa)
    assert_close(attended, attend(query, key, value))
    alpha, beta = torch.autograd.grad(attended.square().sum(), (daa.alpha, daa.beta))
    assert beta.abs().max() < 1e-13 < alpha.abs().max()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_is_torch_s(heads, kv_heads):
    query, key, value = (
        random(2, heads, 4, 8),
        random(2, kv_heads, 6, 8, seed=1),
        random(2, kv_heads, 6, 8, seed=2),
    )
    visible = random(2, 1, 4, 6, seed=3) > -1
    bias = random(1, heads, 4, 6, seed=4)
    mask = bias.masked_fill(~visible, -torch.inf)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    assert_close(attend(query, key, value, visible, bias=bias, scale=0.3), expected)
    half = attend(*(tensor.bfloat16() for tensor in (query, key, value)))
    assert half.dtype == torch.bfloat16


def groups_of(head, heads, seq, group_size, shift):
    """The groups that a head sees, as ranges of slots, counted out."""
    starts = tuple(range(0, seq, group_size))
    if head >= heads - heads // 2:
        starts = (0, *range(shift, seq, group_size))
    return [range(start, end) for start, end in zip(starts, (*starts[1:], seq), strict=True)]


@pytest.mark.parametrize(
    ("seq", "group_size", "shift"), [(8, 4, 2), (11, 4, 2), (3, 8, 2), (9, 3, 1), (1, 2, 1)]
)
@pytest.mark.parametrize("heads", [2, 3])
def test_groups_are_those_counted_out(heads, seq, group_size, shift):
    together = same_group(heads, seq, group_size, shift)
    for head in range(heads):
        expected = np.zeros((seq, seq), bool)
        for group in groups_of(head, heads, seq, group_size, shift):
            expected[np.ix_(group, group)] = True
        np.testing.assert_array_equal(together[head], expected)


def test_the_receptive_field_of_s2():
    seq, heads = 10, 2
    segments = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
    attention = ShiftedSparseAttention(group_size=4)
    inputs = [random(1, seq, heads, 4, seed=seed) for seed in range(3)]
    before = attention(*inputs, segment_ids=segments)
    reached = torch.zeros(heads, seq, seq, dtype=torch.bool)
    for token in range(seq):
        changed = [tensor.clone() for tensor in inputs]
        for tensor in changed:
            tensor[:, token] += 1
        moved = (attention(*changed, segment_ids=segments) != before).any(dim=-1)
        reached[:, :, token] = moved[0].T
    expected: list[list[list[bool]]] = [[], []]
    for head, cuts in enumerate(((4, 5, 8, 9), (2, 5, 6, 9))):  # where a group or a document begins
        for query in range(seq):
            start = max(cut for cut in (0, *cuts) if cut <= query)
            expected[head].append([start <= key <= query for key in range(seq)])
    assert reached.tolist() == expected


def test_padding_is_not_seen():
    seq = 7
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 0]])
    attention = ShiftedSparseAttention(group_size=4)
    query, key, value = (random(1, seq, 2, 4, seed=seed) for seed in range(3))
    before = attention(query, key, value, key_valid=valid)
    assert torch.isfinite(before).all()
    other = (torch.where(valid[..., None, None] == 1, tensor, tensor + 1) for tensor in (key, value))
    real = valid[0] == 1
    assert torch.equal(attention(query, *other, key_valid=valid)[:, real], before[:, real])


def test_what_does_not_fit_is_refused():
    tensor = random(1, 6, 2, 4)
    with pytest.raises(ConfigError, match="multiple of 4"):
        ShiftedSparseAttention(6, 0.25)
    with pytest.raises(ConfigError, match="1 head"):
        ShiftedSparseAttention(4)(*[tensor[:, :, :1]] * 3)
    for name in ("segment_ids", "key_valid"):
        with pytest.raises(DataError, match=name):
            ShiftedSparseAttention(4)(tensor, tensor, tensor, **{name: torch.ones(1, 5)})
    with pytest.raises(DataError, match="-1"):
        ShiftedSparseAttention(4)(tensor, tensor, tensor, torch.full((1, 6), -1))
    with pytest.raises(ConfigError, match="num_heads"):
        DirectAttentionAdapter(0)
