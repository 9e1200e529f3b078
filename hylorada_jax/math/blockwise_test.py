"""Attention by blocks against dense attention, which has the formula's own tests."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hylorada_jax.errors import ConfigError
from hylorada_jax.math import blockwise
from hylorada_jax.math.attention import DAA, attention
from hylorada_jax.math.groups import attend, shifted_patterns
from hylorada_jax.math.pattern import Pattern

QKV, NAMES = ("query", "key", "value"), ("blockwise", "dense")


def draw(seed=0, *, batch=2, queries=37, keys=37, heads=4, kv_heads=2, head_dim=4, **facts):
    """Random leaves and cotangent; and the pattern of the facts, which name what is random in it."""
    rng = np.random.default_rng(seed)
    sizes = {"query": (queries, heads), "key": (keys, kv_heads), "value": (keys, kv_heads)}
    leaves = {name: rng.normal(size=(batch, *size, head_dim)) for name, size in sizes.items()}
    if facts.pop("daa", False):
        leaves |= {"alpha": rng.normal(size=heads), "beta": rng.normal(size=heads)}
        leaves["position_bias"] = rng.normal(size=(64, facts.pop("columns", heads)))
    if facts.pop("sinks", False):
        leaves["sinks"] = rng.normal(size=heads)
    leaves["cotangent"] = rng.normal(size=leaves["query"].shape)
    slots, start = np.arange(keys), facts.pop("start", 0)
    positions, segments, valid = np.tile(slots, (batch, 1)), None, None
    if facts.pop("documents", False):
        segments = np.sort(rng.integers(1, 4, (batch, keys)), axis=1)
        positions = np.array([[(row[:t] == row[t]).sum() for t in slots] for row in segments])
    match facts.pop("positions", None):
        case "anywhere":
            positions = rng.integers(0, 90_000, (batch, keys))
        case "far":
            positions = 500 * positions
    match facts.pop("padding", None):
        case "left":
            valid = slots >= np.array([[9], [20]])
        case "right":
            valid = slots < np.array([[9], [20]])
        case "anywhere":
            valid = rng.random((batch, keys)) < 0.5
        case "unwritten":
            valid = np.tile(slots < start + queries, (batch, 1))
    own = slice(start, start + queries)
    documents = (None, None) if segments is None else (segments[:, own], segments)
    pattern = Pattern(
        *jax.tree.map(jnp.asarray, (slots[own], slots, positions[:, own], positions, valid, *documents)),
        **facts,
    )
    return leaves, pattern


def results(leaves, pattern, dtype, implementation, soft_cap=None):
    """The output and all gradients."""

    def run(leaves):
        of_daa = [leaves[name] for name in DAA._fields if name in leaves]
        options = {"soft_cap": soft_cap, "sinks": leaves.get("sinks"), "implementation": implementation}
        query, key, value = (leaves[name].astype(dtype) for name in QKV)
        return attention(query, key, value, pattern, daa=DAA(*of_daa) if of_daa else None, **options)

    def pulled(leaves, cotangent):
        y, pull = jax.vjp(run, leaves)
        return {"y": y, **pull(cotangent.astype(y.dtype))[0]}

    leaves = jax.tree.map(jnp.asarray, leaves)
    return jax.jit(pulled)(leaves, leaves.pop("cotangent"))


def difference(got, expected):
    """The largest difference of any array, as a part of the array's largest number; β's of the others'."""
    scale = {name: np.abs(value).max() for name, value in expected.items()}
    if "beta" in scale:  # its gradient is zero: the softmax does not see it
        scale["beta"] = max(scale.values())
    return max(
        float(np.abs(np.asarray(got[name], np.float64) - value).max() / scale[name])
        for name, value in jax.tree.map(lambda x: np.asarray(x, np.float64), expected).items()
    )


COUNTED = {"own": True, "counted": True}
CASES = {
    "one block less than full": {"queries": 5, "keys": 5, "heads": 6, "kv_heads": 1},
    "documents, counted bias, sinks": {
        "documents": True, "daa": True, "sinks": True, "head_dim": 6, **COUNTED,
    },
    "both ways, counted bias, cap": {"causal": False, "daa": True, "columns": 1, "soft_cap": 2.0, **COUNTED},
    "padding left, window, cap, sinks": {
        "padding": "left", "window": 11, "soft_cap": 1.5, "daa": True, "sinks": True,
    },
    "padding right, shared bias": {"padding": "right", "daa": True, "columns": 1, "kv_heads": 4},
    "padding anywhere, documents, window": {"padding": "anywhere", "documents": True, "window": 5},
    "cache": {"padding": "unwritten", "queries": 11, "keys": 40, "start": 14, "daa": True},
    "cache, window, sinks": {
        "padding": "unwritten", "queries": 16, "keys": 32, "start": 8, "window": 6, "sinks": True,
    },
    "both ways, padding, bias": {"causal": False, "padding": "anywhere", "daa": True, "kv_heads": 1},
    "positions anywhere": {"positions": "anywhere", "daa": True, "soft_cap": 2.0},
    "positions far apart": {"positions": "far", "daa": True, "queries": 48, "keys": 48},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 8)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float64(case):
    case, soft_cap = dict(case), case.get("soft_cap")
    case.pop("soft_cap", None)
    with jax.enable_x64(True):
        leaves, pattern = draw(**case)
        got, expected = (
            results(dict(leaves), pattern, jnp.float64, name, soft_cap) for name in ("blockwise", "dense")
        )
        # Sums of a few dozen terms in another order.
        assert difference(got, expected) <= 1e-12


@pytest.mark.parametrize(("name", "head"), [("query", 0), ("key", 1)])
def test_no_finite_number_takes_the_place_of_nan(name, head):
    leaves, pattern = draw()
    leaves[name][0, 20, head] = np.nan
    got, expected = (results(dict(leaves), pattern, jnp.float32, how)["y"] for how in ("blockwise", "dense"))
    assert np.isnan(expected).any()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.apart
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(64, "float32"), (80, "bfloat16"), (96, "float32"), (128, "bfloat16"), (256, "bfloat16")],
)
def test_what_other_dtypes_lose(head_dim, dtype):
    leaves, pattern = draw(
        queries=27, keys=27, head_dim=head_dim, documents=True, daa=True, padding="anywhere"
    )
    leaves = {name: np.asarray(jnp.asarray(value, dtype), np.float32) for name, value in leaves.items()}
    found = {name: results(dict(leaves), pattern, dtype, name) for name in ("blockwise", "dense")}
    with jax.enable_x64(True):
        exact = results(dict(leaves), pattern, jnp.float64, "dense")
    lost = {name: difference(values, exact) for name, values in found.items()}
    assert found["blockwise"]["y"].dtype == dtype
    # Weights come back from lse, which rounds by its own size: about twice as often as dense attention's.
    assert lost["blockwise"] <= 4 * lost["dense"]


def test_a_hidden_block_is_not_visited():
    leaves, pattern = draw(queries=64, keys=64, documents=True, window=9)
    sides = blockwise.cut_pattern(pattern, 8, 8)
    visits = blockwise.find_visits(*sides, causal=True)
    mask = np.asarray(pattern.mask()[:, 0])
    for i, (first, end) in enumerate(zip(visits.first.tolist(), visits.end.tolist(), strict=True)):
        seen = np.asarray(mask[:, 8 * i : 8 * i + 8].any(axis=(0, 1))).reshape(8, 8).max(axis=1)
        assert not seen[:first].any()
        assert not seen[end:].any()
        assert end - first <= 3
    # What lies in such a block is not even read.
    leaves["key"][:, :8] = leaves["value"][:, :8] = np.nan
    got = results(leaves, pattern, jnp.float32, "blockwise")
    assert np.isfinite(got["y"][:, 32:]).all()


def test_under_vmap_scan_and_remat():
    """Rows one by one under vmap are the rows of a batch; layers under a rematerialised scan, a loop."""
    with jax.enable_x64(True):
        leaves, pattern = draw(documents=True, padding="right", daa=True, window=13, **COUNTED)
        leaves = jax.tree.map(jnp.asarray, leaves)
        daa = DAA(*(leaves[name] for name in DAA._fields))
        qkv = [leaves[name] for name in QKV]

        def run(query, key, value, pattern, name):
            return attention(query, key, value, pattern, daa=daa, implementation=name)

        def layers(name, qkv):
            query, key, value = qkv
            layer = jax.checkpoint(lambda x, _: (jnp.tanh(run(x, key, value, pattern, name)), None))
            return jax.lax.scan(layer, query, None, length=3)[0].sum()

        expected = run(leaves["query"], leaves["key"], leaves["value"], pattern, "dense")

        def row(query, key, value, positions, valid, documents):
            facts = {"key_valid": valid[None], "segment_ids": documents[None], "window": 13, "counted": True}
            pattern = Pattern.of_rows(positions[None], **facts)
            return run(query[None], key[None], value[None], pattern, "blockwise")[0]

        facts = pattern.key_positions, pattern.key_valid, pattern.key_segments
        rows = jax.jit(jax.vmap(row))(*qkv, *facts)
        # A few roundings.
        np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-13)
        got, wanted = (jax.jit(jax.grad(layers, argnums=1), static_argnums=0)(name, qkv) for name in NAMES)
        for ours, theirs in zip(got, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_groups_of_shifted_attention():
    with jax.enable_x64(True):
        leaves, pattern = draw(queries=37, keys=37, documents=True, padding="right", daa=True)
        leaves = jax.tree.map(jnp.asarray, leaves)
        daa = DAA(*(leaves[name] for name in DAA._fields))
        facts = {"key_valid": pattern.key_valid, "segment_ids": pattern.key_segments}
        groups = shifted_patterns(pattern.key_positions, 20, 10, **facts)
        run = jax.jit(attend, static_argnames="implementation")
        got, expected = (run(*(leaves[n] for n in QKV), groups, daa, implementation=name) for name in NAMES)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.sampled_from([1, 23]),
    start=st.integers(0, 17),
    window=st.sampled_from([None, 1, 7]),
    documents=st.booleans(),
    padding=st.sampled_from([None, "anywhere", "unwritten"]),
)
def test_any_pattern(seed, queries, start, window, documents, padding):
    facts = {"start": start, "window": window, "documents": documents, "padding": padding}
    with jax.enable_x64(True):
        leaves, pattern = draw(seed, queries=queries, keys=40, **facts)
        inputs = [jnp.asarray(leaves[name]) for name in QKV]
        got, expected = (JITTED(*inputs, pattern, implementation=name) for name in ("blockwise", "dense"))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13)


JITTED = jax.jit(attention, static_argnames="implementation")


def test_memory_grows_with_the_length(monkeypatch):
    def temporary(length):
        rows, table = jnp.zeros((1, length, 4, 8)), jnp.zeros((64, 4))

        def loss(query, key, value, table):
            pattern = Pattern.of_rows(jnp.arange(length)[None])
            daa = DAA(jnp.ones(1), jnp.zeros(1), table)
            return attention(query, key, value, pattern, daa=daa, implementation="blockwise").sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        compiled = gradient.lower(rows, rows, rows, table).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    monkeypatch.setattr(blockwise, "BLOCK", 64)
    assert temporary(2048) < 2.1 * temporary(1024)


def test_what_serves_is_chosen(caplog):
    leaves, pattern = draw(queries=300, keys=300, heads=1, kv_heads=1, batch=1)
    inputs = [jnp.asarray(leaves[name], jnp.float32) for name in QKV]
    text = lambda **options: str(
        jax.make_jaxpr(lambda q, k, v: attention(q, k, v, pattern, **options))(*inputs)
    )
    assert "custom_vjp" in text()
    assert "custom_vjp" not in text(implementation="dense")
    bias = jnp.zeros((1, 1, 300, 300))
    with caplog.at_level(logging.DEBUG, "hylorada_jax"):
        assert "custom_vjp" not in text(bias=bias)
    assert "not blockwise, which has no bias of its own" in caplog.text
    with pytest.raises(ConfigError, match="take 'dense'"):
        text(bias=bias, implementation="blockwise")
    with pytest.raises(ConfigError, match="implementation must be one of splash, distance, blockwise, dense"):
        text(implementation="flash")


SHARDED = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from hylorada_jax.math import blockwise
from hylorada_jax.math.blockwise_test import QKV, difference, draw
from hylorada_jax.math.attention import DAA, attention
blockwise.BLOCK = 8
leaves, pattern = draw(batch=8, documents=True, daa=True, own=True, counted=True)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "heads"))
on = lambda *axes: lambda x: jax.device_put(np.asarray(x, np.float32) if x.dtype == float else x,
                                            NamedSharding(mesh, P(*axes)))
qkv = [on("data", None, "heads")(leaves[name]) for name in QKV]
pattern = jax.tree.map(lambda x: on("data")(x) if x.ndim == 2 else on()(x), pattern)
daa = DAA(*(on()(leaves[name]) for name in DAA._fields))
def loss(qkv, daa, name):
    return (attention(*qkv, pattern, daa=daa, implementation=name) ** 2).sum()
gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
got, expected = (gradient(qkv, daa, name) for name in ("blockwise", "dense"))
assert got[1][0][0].sharding.spec == qkv[0].sharding.spec, got[1][0][0].sharding
named = lambda loss, gradients: {"loss": loss, **dict(zip(QKV, gradients[0])), **gradients[1]._asdict()}
assert (apart := difference(named(*got), named(*expected))) <= 1e-5, apart
"""


def test_rows_and_heads_on_eight_devices(run_on_devices):
    run_on_devices(8, SHARDED)
