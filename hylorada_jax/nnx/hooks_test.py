import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, ModelError
from hylorada_jax.math.groups import attend
from hylorada_jax.modules.attention import PositionalDAA, ShiftedSparseAttention
from hylorada_jax.nnx import (
    Attention,
    AttentionScores,
    adapt,
    disabled,
    hooks,
    load_adapter,
    save_adapter,
    tokens,
    unload,
)
from hylorada_jax.nnx.adapting_test import WRT, moved, output

FULL = HyLoRADAConfig(lora_rank=2, target_modules="all-linear")
DAA = HyLoRADAConfig(
    method="lora", lora_rank=2, target_modules="all-linear", daa_enabled=True, daa_position_bias=True
)
S2 = HyLoRADAConfig(method="longlora", target_modules="all-linear", train_embeddings=False, train_norms=False)
POSITIONS = jnp.array([[0, 1, 2, 0, 1], [7, 8, 9, 10, 40]])


def attended(scores, value):
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class SelfAttention(nnx.Module):
    """Attention of a model's own, whose scores are open in one of both ways."""

    def __init__(self, hook, rngs):
        self.qkv = nnx.LinearGeneral(6, (3, 2, 4), use_bias=False, rngs=rngs)
        self.hook = hook(2)

    def __call__(self, x):
        query, key, value = jnp.moveaxis(self.qkv(x), 2, 0)
        if isinstance(self.hook, Attention):
            return self.hook(query, key, value)
        return attended(self.hook(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2), value)


class Net(nnx.Module):
    def __init__(self, hook, rngs):
        self.attn = SelfAttention(hook, rngs)

    def __call__(self, x, positions=None):
        return self.attn(x)


class Prefixed(Net):
    """Attention over one token more than the model is called with."""

    def __call__(self, x, positions=None):
        return self.attn(jnp.pad(x, [(0, 0), (1, 0), (0, 0)]))


class Encoder(nnx.Module):
    """A model with a second way in, beside its own call."""

    def __init__(self, attention):
        self.attn = attention

    def encode(self, x):
        return self.attn(x)

    def __call__(self, x):
        return self.encode(x)


class Telling(Net):
    """Which gives its tokens' positions in its own call, where its layers know others already."""

    def __call__(self, x, positions=None):
        with tokens(POSITIONS):
            return self.attn(x)


def summed(y):
    return jnp.sum(jnp.sin(y)), y


@pytest.mark.parametrize("hook", [Attention, AttentionScores])
def test_direct_adaptation_is_linens_layer_and_nothing_changes_before(hook):
    with jax.enable_x64(True):
        net, x = Net(hook, nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 5, 6), jnp.float64)
        nnx.update(net, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(net)))
        before = output(net, x)
        adapt(net, DAA, nnx.Rngs(1))
        np.testing.assert_allclose(output(net, x), before, rtol=1e-12, atol=1e-12)
        moved(net)
        leaves = {name: getattr(net.attn.hook, name)[...] for name in ("alpha", "beta", "position_bias")}

        def by_linen(leaves):
            query, key, value = jnp.moveaxis(net.attn.qkv(x), 2, 0)
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2
            scores = PositionalDAA(2).apply({"params": leaves}, scores, POSITIONS, POSITIONS)
            return attended(scores, value)

        # One program for each side, and not one for each operation.
        ours = nnx.jit(nnx.value_and_grad(lambda net: summed(net(x, POSITIONS)), argnums=WRT, has_aux=True))
        theirs = jax.jit(jax.value_and_grad(lambda leaves: summed(by_linen(leaves)), has_aux=True))
        ((_, found), gradient), ((_, attention), expected) = ours(net), theirs(leaves)
        np.testing.assert_allclose(found, attention, rtol=1e-10, atol=1e-10)
        for name, value in expected.items():
            np.testing.assert_allclose(gradient["attn"]["hook"][name][...], value, rtol=1e-10, atol=1e-10)
        with disabled(net):
            np.testing.assert_array_equal(output(net, x), before)
        np.testing.assert_array_equal(output(unload(net), x), before)


SEGMENTS = jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
VALID = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]], bool)
ALIKE = SEGMENTS[:, :, None] == SEGMENTS[:, None]


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"segment_ids": SEGMENTS}, ALIKE),
        ({"key_valid": VALID}, VALID[:, None]),
        ({"window": 2}, jnp.triu(jnp.ones((5, 5), bool), -1)),
        ({"window": 1}, jnp.eye(5, dtype=bool)),
        ({"scale": 0.3}, True),
        ({"soft_cap": 0.7}, True),
    ],
    ids=["documents", "padding", "window", "itself", "scale", "soft cap"],
)
def test_attention_sees_what_its_call_says(options, seen):
    with jax.enable_x64(True):
        query, key, value = jax.random.normal(jax.random.key(2), (3, 2, 5, 2, 4), jnp.float64)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * options.get("scale", 0.5)
        if cap := options.get("soft_cap"):
            scores = cap * jnp.tanh(scores / cap)
        expected = attended(jnp.where(jnp.broadcast_to(seen, (2, 5, 5))[:, None], scores, -jnp.inf), value)
        found = Attention(2)(query, key, value, **options)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_groups_see_no_padding_and_no_other_document():
    net = adapt(Net(Attention, nnx.Rngs(0)), dataclasses.replace(S2, s2_group_size=4), nnx.Rngs(0))
    net.train()
    heads = jax.random.normal(jax.random.key(2), (3, 2, 5, 2, 4))
    options = {"segment_ids": SEGMENTS, "key_valid": VALID}
    expected = ShiftedSparseAttention(4).apply({}, *heads, **options)
    np.testing.assert_allclose(net.attn.hook(*heads, **options), expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(net.attn.hook(*heads), expected, atol=0.01)


def test_groups_are_no_part_of_inference(tmp_path):
    x = jax.random.normal(jax.random.key(2), (1, 16, 6))
    base = Net(Attention, nnx.Rngs(0))
    expected = output(base, x)
    net = adapt(nnx.clone(base), S2, nnx.Rngs(1))
    save_adapter(net, tmp_path)
    assert not np.allclose(output(net, x), expected, atol=0.01)
    loaded = load_adapter(base, tmp_path)
    np.testing.assert_allclose(output(loaded, x), expected, rtol=1e-5, atol=1e-6)
    loaded.train()
    np.testing.assert_array_equal(output(loaded, x), output(net, x))


def multi_head(**options):
    return nnx.MultiHeadAttention(2, 6, qkv_features=8, rngs=nnx.Rngs(0), **options)


def test_flaxs_attention_is_adapted_in_rows_and_token_by_token():
    net, x = multi_head(decode=False), jax.random.normal(jax.random.key(1), (2, 5, 6))
    net = moved(adapt(net, DAA, nnx.Rngs(1)))
    leaves = {name: getattr(net, name)[...] for name in ("alpha", "beta", "position_bias")}

    @nnx.jit
    def by_hand(net, x):
        query, key, value = (project(x) for project in (net.query, net.key, net.value))
        scores = PositionalDAA(2).apply({"params": leaves}, jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2)
        return net.out(attended(scores, value))

    rows = nnx.jit(lambda net, x: net(x, is_causal=True))(net, x)
    np.testing.assert_allclose(rows, by_hand(net, x), rtol=1e-5, atol=1e-5)
    net.init_cache(x.shape)
    one = nnx.jit(lambda net, x: net(x, decode=True))
    np.testing.assert_allclose(
        jnp.concatenate([one(net, x[:, i : i + 1]) for i in range(5)], 1), rows, rtol=1e-5, atol=1e-5
    )
    net = moved(adapt(multi_head(decode=False), DAA, nnx.Rngs(1)))
    thrice = nnx.jit(lambda net, q, k, v: net(q, k, v, is_causal=True))(net, x, x, x)
    np.testing.assert_allclose(thrice, rows, rtol=1e-5, atol=1e-5)
    for call in (lambda net: net(x, x + 1), nnx.jit(lambda net: net(x, x[:, 1:]))):
        with pytest.raises(ModelError, match="self-attention"):
            call(net)


class Words(nnx.Module):
    """A model whose layers are scanned; whose call takes positions, or not."""

    def __init__(self, depth=2, rngs=None):
        rngs = nnx.Rngs(0)
        self.layers = nnx.vmap(lambda rngs: Net(Attention, rngs), in_axes=0, out_axes=0)(rngs.split(depth))
        self.out = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x, positions=None):
        run = nnx.remat(lambda x, block: x + self.out(block(x).reshape(*x.shape[:2], 8)))
        return nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class Mixin:
    """As a library may put in front of nnx.Module."""


class Unaware(Mixin, Words):
    """Which is called with its batch alone."""

    def __call__(self, x):  # type: ignore[override]
        return super().__call__(x)


X = jax.random.normal(jax.random.key(1), (2, 5, 6))
run = nnx.jit(lambda net, x, positions: net(x, positions))


@nnx.jit
def within(net, x, positions):
    with tokens(positions):
        return net(x)


def test_positions_are_those_of_the_call_or_of_the_context(tmp_path):
    net = moved(adapt(Words(), FULL, nnx.Rngs(1)))
    save_adapter(net, tmp_path)
    unaware = load_adapter(Unaware(), tmp_path)
    counted, given = run(net, X, None), run(net, X, POSITIONS)
    assert float(jnp.abs(given - counted).max()) > 1e-3
    np.testing.assert_array_equal(output(unaware, X), counted)
    np.testing.assert_allclose(within(unaware, X, POSITIONS), given, rtol=1e-6, atol=1e-6)
    # Around a compiled function too: it is compiled anew, and does not answer for other positions.
    for positions, expected in ((POSITIONS, given), (jnp.arange(5), counted)):
        with tokens(positions):
            np.testing.assert_allclose(output(unaware, X), expected, rtol=1e-6, atol=1e-6)
    gradient = nnx.jit(nnx.grad(lambda net: jnp.sum(net(X, POSITIONS) ** 2), argnums=WRT))(net)
    silent = [path for path, leaf in nnx.to_flat_state(gradient) if not jnp.any(leaf[...])]
    assert {path[-1] for path in silent} <= {"beta"}


ATTENDING = {
    "Attention": lambda: SelfAttention(Attention, nnx.Rngs(0)),
    "AttentionScores": lambda: SelfAttention(AttentionScores, nnx.Rngs(0)),
    "MultiHeadAttention": lambda: multi_head(decode=False),
}


@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[1:], POSITIONS[1]], ids=["rows", "row", "places"])
@pytest.mark.parametrize("attention", ATTENDING)
def test_tokens_reach_attention_that_is_called_beside_the_models_own_call(attention, positions):
    net = moved(adapt(Encoder(ATTENDING[attention]()), DAA, nnx.Rngs(1)))
    for call in (net.encode, net.attn):
        counted = call(X)
        with tokens(positions):
            expected = net(X)
            np.testing.assert_allclose(call(X), expected, rtol=1e-6, atol=1e-6)
        assert float(jnp.abs(expected - counted).max()) > 1e-3
        with pytest.raises(DataError, match=r"attention over \(2, 5\)"), tokens(jnp.arange(6)):
            call(X)


def test_tokens_reach_flaxs_attention_of_one_row_without_an_axis_of_rows():
    net = moved(adapt(Encoder(multi_head(decode=False)), DAA, nnx.Rngs(1)))
    for positions in (POSITIONS[1], POSITIONS[1:]):
        with tokens(positions):
            np.testing.assert_allclose(net.attn(X[0]), net(X[:1])[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match=r"positions \(2, 5\)"), tokens(POSITIONS):
        net.attn(X[0])


def test_members_of_an_ensemble_share_the_models_position_bias():
    """As docs/nnx.md says: what serves a whole model has no axis of members."""
    make = nnx.vmap(lambda rngs: Net(Attention, rngs), in_axes=0, out_axes=0)
    net = moved(adapt(make(nnx.Rngs(0).split(3)), FULL, nnx.Rngs(1)))
    shared = lambda path, leaf: path[0] in ("position_bias", "structure_encoder")
    axes = nnx.StateAxes({shared: None, ...: 0})
    together = nnx.jit(nnx.vmap(lambda net, x, p: net(x, p), in_axes=(axes, None, None)))(net, X, POSITIONS)
    graph, one, own = nnx.split(net, shared, ...)
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(one)) == {"position_bias": (64,)}
    for i in range(3):
        member = nnx.merge(graph, one, jax.tree.map(lambda leaf, i=i: leaf[i], own))
        np.testing.assert_allclose(together[i], run(member, X, POSITIONS), rtol=1e-5, atol=1e-6)


class Attending(nnx.Module):
    """The page's, whose attention is an attribute of the model's own."""

    def __init__(self, rngs):
        self.qkv, self.attention = nnx.LinearGeneral(6, (3, 2, 3), rngs=rngs), Attention(2)

    def __call__(self, x):
        return self.attention(*jnp.moveaxis(self.qkv(x), 2, 0))


def test_members_of_an_ensemble_have_attentions_of_their_own():
    make = nnx.vmap(lambda rngs: Attending(rngs), in_axes=0, out_axes=0)
    config = HyLoRADAConfig(method="lorada", lora_rank=2, target_modules="all-linear")
    net = moved(adapt(make(nnx.Rngs(0).split(3)), config, nnx.Rngs(1)))
    together = nnx.vmap(lambda net, x: net(x), in_axes=(0, None))(net, X)
    graph, own = nnx.split(net)
    assert own["attention"]["alpha"].shape == (3, 2)
    for i in range(3):
        member = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], own))
        np.testing.assert_allclose(together[i], member(X), rtol=1e-5, atol=1e-6)


traces: list[None] = []


@nnx.jit
def inside(layer, x):
    traces.append(None)
    return layer(x)


class Compiling(nnx.Module):
    """Which compiles a part of itself: the tokens are constants of the program."""

    def __init__(self):
        self.layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return inside(self.layer, x)


def test_positions_that_nobody_gives_are_known_to_count_up(monkeypatch):
    """By which the kernels for TPUs know how far apart two tokens are."""
    asked = mock.Mock(side_effect=attend)
    monkeypatch.setattr(hooks, "attend", asked)
    net, unaware = adapt(Words(depth=1), FULL, nnx.Rngs(1)), adapt(Unaware(depth=1), FULL, nnx.Rngs(1))
    for call, counted in (
        (lambda: net(X), True),
        (lambda: net(X, POSITIONS), False),
        (lambda: within(unaware, X, POSITIONS), False),
        (lambda: Attention(2)(HEADS, HEADS, HEADS), True),
    ):
        asked.reset_mock()
        call()
        assert {p.counted for args, _ in asked.call_args_list for p in args[3]} == {counted}


def test_a_window_of_1_gives_every_token_its_own_value():
    query, value = jax.random.normal(jax.random.key(2), (2, 2, 5, 4, 3))
    shared = value[:, :, :2]
    found = Attention(4)(query, shared, shared, window=1)
    np.testing.assert_allclose(found, jnp.repeat(shared, 2, axis=2), rtol=1e-6)
    traced = jax.jit(lambda window: Attention(4)(query, shared, shared, window=window))(1)
    np.testing.assert_allclose(traced, found, rtol=1e-6)


@pytest.mark.parametrize("hook", [Attention, AttentionScores])
def test_positions_that_somebody_gives_are_never_left_out(hook):
    net = adapt(Prefixed(hook, nnx.Rngs(0)), DAA, nnx.Rngs(1))
    assert net(X).shape == (2, 6, 2, 4)  # nobody gives any: they count in attention too
    with pytest.raises(DataError, match=r"positions \(2, 5\), attention over \(2, 6\)"):
        net(X, POSITIONS)


def test_what_is_compiled_within_a_call_answers_again_for_the_same_tokens_alone():
    config = HyLoRADAConfig(lora_rank=2, target_modules="all-linear", daa_enabled=False)
    net = moved(adapt(Compiling(), config, nnx.Rngs(1)))
    first = net(X)
    np.testing.assert_array_equal(net(X), first)
    assert len(traces) == 1
    for _ in range(2):
        with tokens(POSITIONS):
            other = net(X)
    assert len(traces) == 2
    assert float(jnp.abs(other - first).max()) > 1e-3
    moved(net)
    with tokens(POSITIONS):
        np.testing.assert_allclose(net(X), within(net, X, POSITIONS), rtol=1e-5, atol=1e-6)


def test_structure_reaches_every_layer():
    config: dict[str, Any] = {"method": "hylorada_v2", "structure_dim": 4, "structure_seq_len": 5}
    net = moved(
        adapt(Unaware(), HyLoRADAConfig(lora_rank=2, target_modules="all-linear", **config), nnx.Rngs(1))
    )

    @nnx.jit
    def gradient(net, ids):
        def loss(net):
            with tokens(structure_ids=ids, structure_positions=POSITIONS + 0.5):
                return jnp.sum(net(X) ** 2)

        return nnx.value_and_grad(loss, argnums=WRT)(net)

    (plain, found), (other, _) = gradient(net, POSITIONS), gradient(net, POSITIONS + 1)
    assert abs(float(plain - other)) > 1e-4
    assert all(jnp.any(leaf[...]) for _, leaf in nnx.to_flat_state(found))
    base = output(Unaware(), X)
    np.testing.assert_array_equal(output(unload(net), X), base)
    with pytest.raises(DataError, match=r"≥ 0(.|\n)*-1"), tokens(structure_ids=POSITIONS - 1):
        net(X)


scores = lambda: Net(AttentionScores, nnx.Rngs(0))
HEADS = jnp.ones((1, 4, 2, 3))
full = lambda: adapt(Words(), FULL, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: adapt(scores(), S2, nnx.Rngs(0)), ModelError, "s2_attn_enabled"),
        (lambda: adapt(multi_head(decode=False), FULL, nnx.Rngs(0)), ModelError, "daa_position_bias"),
        (lambda: full().out(jnp.ones((2, 5, 8))), ModelError, "no adapted model"),
        (lambda: full()(X, jnp.arange(6)), DataError, "Position ids"),
        (lambda: adapt(Telling(Attention, nnx.Rngs(0)), DAA, nnx.Rngs(1))(X), ModelError, "around an"),
        (lambda: Attention(2)(HEADS[:, -1:], HEADS, HEADS), DataError, "call AttentionScores"),
        (lambda: Attention(1)(HEADS, HEADS, HEADS), ConfigError, "num_heads=1"),
        (lambda: Attention(2)(HEADS[0, 0], HEADS, HEADS), ConfigError, "num_heads=2"),
        (lambda: Attention(3)(*[HEADS[:, :, 0]] * 3), DataError, "Split the heads"),
        (lambda: Attention(3)(jnp.ones((1, 4, 3, 3)), HEADS, HEADS), ConfigError, "a multiple"),
        (lambda: Attention(2)(HEADS, HEADS, HEADS[:, :, :1]), DataError, "kv_heads"),
        (lambda: Attention(2)(HEADS, HEADS[..., :2], HEADS[..., :2]), DataError, "kv_heads"),
        (lambda: Attention(2)(*[HEADS] * 3, key_valid=jnp.ones(4, bool)), DataError, "key_valid"),
        (lambda: Attention(2)(*[HEADS] * 3, segment_ids=jnp.ones((1, 3), int)), DataError, "segment_ids"),
        (lambda: Attention(2)(*[HEADS] * 3, window=0), ConfigError, "window is ≥ 1"),
    ],
    ids=[
        "groups of scores",
        "two biases",
        "outside",
        "shape",
        "within the call",
        "cache",
        "heads",
        "one axis of heads",
        "heads not split",
        "heads shared unevenly",
        "fewer values",
        "narrower keys",
        "padding",
        "documents",
        "window",
    ],
)
def test_what_cannot_reach_its_place_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
