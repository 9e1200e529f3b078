"""LongLoRA's shifted sparse attention against its definition: for every head, a mask over whole rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math.attention import DAA
from hylorada_jax.math.groups import attend, shifted_patterns
from hylorada_jax.math.position_test import relative_bucket
from hylorada_jax.modules.attention import ShiftedSparseAttention
from hylorada_torch.attention import PositionalDAA, same_group
from hylorada_torch.attention import attend as attend_in_torch
from parity_tests.measure import precision
from parity_tests.models import CONFIGS, build, measuring, torch_results
from parity_tests.test_peft import check as check_model
from parity_tests.test_peft import peft_model
from parity_tests.tolerances import LAYER, relative_error


def seen_keys(heads, group, shift, documents, valid, window=None):
    """True where a head's query sees a key: bool [batch, heads, query, key].

    Both are in one group: those of the first heads begin at 0, G, 2G …, those of the last heads//2 at 0,
    shift, shift + G …. And the key is not later, of the query's document, no padding, and inside the window.
    """
    slots = np.arange(documents.shape[1])
    query, key = slots[:, None], slots[None, :]
    mask = (documents[:, None, :, None] == documents[:, None, None, :]) & valid[:, None, None, :]
    mask = mask & (key <= query) & (window is None or query - key < window)
    starts = [group] * (heads - heads // 2) + [shift] * (heads // 2)  # of a head's second group
    number = np.array([[len(range(start, slot + 1, group)) for slot in slots] for start in starts])
    mask = mask & (number[:, :, None] == number[:, None, :])
    blind = ~mask.any(-1, keepdims=True)  # padding that sees nothing, whose output means nothing
    return mask | (blind & (query == key))


def positions_in(documents):
    """Those of all tokens: they begin again with every document."""
    return np.array([[np.sum(row[:slot] == row[slot]) for slot in range(len(row))] for row in documents])


# The layer


QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Two rows of tokens, how they are attended to, and what random numbers they hold."""

    length: int
    kv_heads: int
    repeats: int
    group: int
    shift: int
    packed: bool = False
    padded: bool = False
    adapted: bool = False  # by PositionalDAA
    per_head: bool = True
    seed: int = 0

    @property
    def heads(self):
        return self.kv_heads * self.repeats

    @property
    def of_daa(self):
        return ("alpha", "beta", "position_bias") if self.adapted else ()

    def draw(self):
        """(documents, valid, positions, what is differentiated, cotangent)."""
        rng, tokens = np.random.default_rng(self.seed), (2, self.length)
        documents = np.sort(rng.integers(1, 4, tokens), axis=1) if self.packed else np.ones(tokens, int)
        valid = rng.random(tokens) < (0.8 if self.padded else 1)
        shapes: dict[str, Any] = {
            name: (*tokens, count, 4)
            for name, count in zip(QKV, (self.heads, self.kv_heads, self.kv_heads), strict=True)
        }
        columns = self.heads if self.per_head else 1
        shapes |= {name: (64, columns) if name == "position_bias" else (columns,) for name in self.of_daa}
        numbers = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        cotangent = rng.normal(size=shapes["query"]) * valid[:, :, None, None]
        return documents, valid, positions_in(documents), numbers, cotangent


@settings(max_examples=25)
@given(
    st.builds(
        lambda group, place, **facts: Rows(group=group, shift=1 + place % (group - 1), **facts),
        length=st.integers(1, 17),
        kv_heads=st.integers(1, 3),
        repeats=st.integers(2, 3),
        group=st.integers(2, 8),
        place=st.integers(0, 6),
        packed=st.booleans(),
        padded=st.booleans(),
        adapted=st.booleans(),
        per_head=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
    )
)
def test_the_reference(rows):
    check(pulled_back(rows, by_reference), rows, "float64")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "rows",
    [
        # Odd lengths; the halves of three heads that share their keys cut between 1 and 2.
        Rows(11, kv_heads=1, repeats=3, group=4, shift=2, packed=True, padded=True),
        Rows(13, kv_heads=2, repeats=2, group=6, shift=1, packed=True, padded=True, adapted=True),
        Rows(9, kv_heads=1, repeats=2, group=3, shift=2, padded=True, adapted=True, per_head=False),
        Rows(5, kv_heads=2, repeats=1, group=16, shift=4, packed=True),  # less than a group
    ],
    ids=str,
)
def test_jax(rows, dtype):
    documents, valid, positions, numbers, cotangent = rows.draw()

    def attended(numbers):
        q, k, v = (numbers[name] for name in QKV)
        if rows.adapted:
            patterns = shifted_patterns(
                jnp.asarray(positions),
                rows.group,
                rows.shift,
                key_valid=jnp.asarray(valid),
                segment_ids=jnp.asarray(documents),
            )
            return attend(q, k, v, patterns, DAA(**{name: numbers[name] for name in rows.of_daa}))
        layer = ShiftedSparseAttention(rows.group, rows.shift / rows.group)
        return layer.apply({}, q, k, v, positions, documents, valid)

    @jax.jit
    def run(numbers, cotangent):
        y, pull_back = jax.vjp(attended, numbers)
        return {"y": y * (cotangent != 0), **pull_back(cotangent)[0]}

    with precision(dtype):
        numbers, cotangent = jax.tree.map(lambda value: jnp.asarray(value, dtype), (numbers, cotangent))
        check(run(numbers, cotangent), rows, dtype)


def by_reference(rows, documents, valid, positions, numbers):
    q, k, v = (numbers[name] for name in QKV)
    if not rows.adapted:
        layer = hylorada_torch.ShiftedSparseAttention(rows.group, rows.shift / rows.group)
        return layer(q, k, v, positions, documents, valid)
    adapter = PositionalDAA(rows.heads, rows.per_head, dtype=torch.float64)
    for name in rows.of_daa:
        delattr(adapter, name)  # a parameter, in whose place a tensor that is differentiated may stand
        setattr(adapter, name, numbers[name])
    together = same_group(rows.heads, rows.length, rows.group, rows.shift).tril()
    seen = together & (documents[:, None, :, None] == documents[:, None, None]) & valid[:, None, None]
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return attend_in_torch(q, k, v, seen, daa=adapter, positions=(positions, positions)).transpose(1, 2)


def by_definition(rows, documents, valid, positions, numbers):
    """Plain attention of every query head to all keys of the row, but for those that the mask hides."""
    q, k, v = (numbers[name] for name in QKV)
    mask = torch.tensor(seen_keys(rows.heads, rows.group, rows.shift, documents.numpy(), valid.numpy()))
    of = np.arange(rows.heads) // rows.repeats
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, of]) / 2
    if rows.adapted:
        alpha, beta, table = (numbers[name] for name in rows.of_daa)
        distance = positions[:, :, None] - positions[:, None, :]
        buckets = np.vectorize(relative_bucket, otypes=[int])(distance.numpy())
        bias = table[buckets].permute(0, 3, 1, 2)
        logits = alpha[:, None, None] * logits + beta[:, None, None] + bias
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v[:, :, of])


def pulled_back(rows, function):
    """The output, where it means something, and all gradients of a function in torch."""
    *constants, numbers, cotangent = rows.draw()
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in numbers.items()}
    y = function(rows, *map(torch.tensor, constants), leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.tensor(cotangent))
    results = {name: gradient.numpy() for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach().numpy() * (cotangent != 0), **results}


def check(got, rows, dtype):
    expected = pulled_back(rows, by_definition)
    assert set(got) == set(expected)
    errors = {name: relative_error(got[name], value) for name, value in expected.items() if name != "beta"}
    if rows.adapted:  # the softmax does not see β: its gradient is zero, up to rounding of terms like α's
        errors["beta"] = np.abs(got["beta"]).max() / np.abs(expected["alpha"]).max()
    assert max(errors.values()) <= LAYER[dtype], errors


# Whole models in training mode

PACKED = HyLoRADAConfig(method="longlora", lora_rank=3, s2_group_size=6, s2_shift_ratio=1 / 3)
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, Any] = {
    # Padding in front; as many key-value heads as heads.
    "gpt2": (CONFIGS["longlora"], np.array([[1] * 9, [0] * 2 + [1] * 7]), ["c_attn", "attn.c_proj"]),
    # Padding behind; three heads that share their keys.
    "qwen2": (CONFIGS["longlora"], np.array([[1] * 9, [1] * 6 + [0] * 3]), QKVO),
    # Packed documents, and a window of 5 keys in groups of 6.
    "mistral": (PACKED, np.array([[1] * 9, [1] * 4 + [2] * 4 + [0]]), QKVO),
}


@pytest.mark.parametrize("family", CASES)
def test_whole_model(family):
    """Against transformers' own model with a mask for every head, peft's LoRA in it."""
    config, documents, targets = CASES[family]
    packed = documents.max() > 1
    with measuring("float64"):
        pair = build(family, config, "float64")
        tokens = {"input_ids": pair.inputs["input_ids"]}
        tokens["labels"] = np.where(documents > 0, pair.inputs["labels"].clip(0), -1)
        pair.inputs = tokens | {"segment_ids" if packed else "attention_mask": documents.astype(np.int32)}
        got = pair.got()
    base: Any = pair.reference.base_model.config
    window = base.sliding_window if family == "mistral" else None  # Qwen2's is as wide as a group
    group = int(config.s2_group_size)
    shift = round(group * config.s2_shift_ratio)
    mask: Any = torch.tensor(
        seen_keys(base.num_attention_heads, group, shift, documents, documents > 0, window)
    )
    if family == "qwen2":  # whose two kinds of layers have a mask each
        mask = {"full_attention": mask, "sliding_attention": mask}
    positions = torch.tensor(positions_in(documents))
    peft, leaves = peft_model(family, pair.reference, targets)
    masked: Any = functools.partial(peft, attention_mask=mask, position_ids=positions)
    expected = torch_results(masked, tokens, leaves)
    check_model(got, expected)

    # The reference has no segments: its mask says what a head of the ordinary model sees.
    length = documents.shape[1]
    whole = seen_keys(1, length, length - 1, documents, documents > 0, window) if packed else documents
    options = {"attention_mask": torch.tensor(whole), "position_ids": positions}
    reference: Any = functools.partial(pair.reference.train(), **options)
    check_model(torch_results(reference, tokens, pair.reference.adapters()), expected)
