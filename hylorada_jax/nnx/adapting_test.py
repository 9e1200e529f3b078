import itertools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, ModelError, TargetError
from hylorada_jax.leaves import KINDS
from hylorada_jax.modules import linear as linen_layers
from hylorada_jax.nnx import (
    AdapterParam,
    Attention,
    adapt,
    disabled,
    load_adapter,
    merge,
    register_einsum,
    save_adapter,
    tokens,
    unload,
)

WRT = nnx.DiffState(0, AdapterParam)


@register_einsum
class Foreign(nnx.Module):
    """An einsum of somebody's own."""

    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.bias = False  # a setting of its own
        self.w = nnx.Param(jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


@register_einsum
class Unlike(nnx.Module):
    """Which holds its kernel or its equation elsewhere than it is registered by."""

    def __init__(self, **attributes):
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, x):
        return x


def some_bias(layer):
    """The layer, with a bias that is not zero where it has one."""
    if isinstance(getattr(layer, "bias", None), nnx.Variable):
        layer.bias.set_value(jnp.linspace(-1.0, 2.0, layer.bias.size).reshape(layer.bias.shape))
    return layer


# (layer, shape of x)
LAYERS = {
    "Linear": (lambda r: nnx.Linear(6, 5, rngs=r), (2, 3, 6)),
    "Linear of a row": (lambda r: nnx.Linear(6, 5, use_bias=False, rngs=r), (6,)),
    "LinearGeneral, heads": (lambda r: nnx.LinearGeneral(6, (2, 4), rngs=r), (2, 3, 6)),
    "LinearGeneral, out": (lambda r: nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=r), (2, 3, 2, 4)),
    "LinearGeneral, apart": (lambda r: nnx.LinearGeneral((3, 4), (2, 5), axis=(1, -1), rngs=r), (2, 3, 6, 4)),
    "Einsum": (lambda r: nnx.Einsum("nta,hab->nthb", (8, 6, 4), (8, 4), rngs=r), (2, 3, 6)),
    "Einsum, dots": (lambda r: nnx.Einsum("...nh,nhd->...d", (2, 4, 6), (6,), rngs=r), (2, 3, 2, 4)),
    "Einsum, out in front": (lambda r: nnx.Einsum("bsd,ckdh->cbskh", (2, 3, 6, 4), rngs=r), (2, 3, 6)),
    "foreign": (lambda r: Foreign("BTNH,NHD->BTD", (2, 4, 6), rngs=r), (2, 3, 2, 4)),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": True},
    "dora": {},
    "hylorada_v1": {},
    "hylorada_v1, with the bias": {"magnitude_scales_bias": True},
    "sparse": {"sparse_adapter_dim": 7, "sparse_topk_ratio": 0.5},
}
# The layer decides how x and the kernel become matrices, the method what is done with these.
PAIRS = [*((layer, "hylorada_v1") for layer in LAYERS), *(("Einsum", method) for method in METHODS)]
PAIRS.remove(("Einsum", "hylorada_v1"))


def config_of(method, **settings):
    targets: dict[str, Any] = {} if method == "sparse" else {"target_modules": "all-linear"}
    return HyLoRADAConfig(
        method=method.partition(",")[0], lora_rank=2, **targets, **METHODS.get(method, {}), **settings
    )


class Net(nnx.Module):
    """One layer, at a path that a sparse adapter knows as an MLP's last."""

    def __init__(self, layer):
        self.mlp = nnx.Dict(down_proj=layer)

    def __call__(self, x):
        layer = self.mlp.down_proj
        return layer(x=x) if isinstance(layer, Foreign) else layer(x)


def made(layer):
    make, shape = LAYERS[layer]
    return Net(some_bias(make(nnx.Rngs(0)))), jax.random.normal(jax.random.key(1), shape)


def moved(model, seed=2):
    """The model, its adapter leaves moved off their start."""
    rng, state = np.random.default_rng(seed), nnx.state(model, AdapterParam)
    move = lambda leaf: jnp.asarray(np.asarray(leaf) + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)
    nnx.update(model, jax.tree.map(move, state))
    return model


def loss(model, x):
    y = model(x)
    return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape)))


# One program for each, and not one for each operation.
output = nnx.jit(lambda model, x: model(x))
gradients = nnx.jit(lambda model, x: nnx.grad(loss, argnums=WRT)(model, x))


@pytest.mark.parametrize(("layer", "method"), PAIRS)
def test_a_fresh_adapter_changes_nothing_every_leaf_learns_and_merged_is_unmerged(layer, method):
    with jax.enable_x64(True):
        net, x = made(layer)
        nnx.update(net, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), nnx.state(net)))
        x = x.astype(jnp.float64)
        before, cls, structure = output(net, x), type(net.mlp.down_proj), nnx.state(net)
        assert adapt(net, config_of(method), nnx.Rngs(3)) is net
        np.testing.assert_allclose(output(net, x), before, rtol=1e-12, atol=1e-12)
        gradient = gradients(moved(net), x)
        # Of the layer's own variables there is no gradient; of each of the adapter's there is one.
        expected = ("down", "up", "gate_scores") if method == "sparse" else KINDS[config_of(method).linear]
        assert set(gradient["mlp"]["down_proj"]) == set(expected)
        assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
        adapted = output(net, x)
        with disabled(net):
            np.testing.assert_array_equal(output(net, x), before)
        np.testing.assert_array_equal(output(net, x), adapted)
        if method != "sparse":
            np.testing.assert_allclose(output(merge(net), x), adapted, rtol=1e-12, atol=1e-12)
            assert type(net.mlp.down_proj) is cls
            assert str(jax.tree.structure(nnx.state(net))) == str(jax.tree.structure(structure))


class Noted(nnx.Sequential):
    """Two layers; the model and the second one, which no adapter is on, have attributes of their own."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        super().__init__(nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs))
        self.adaptation = self.layers[1].lora_dropout = "the author's"


@pytest.mark.parametrize("method", ["lora", "hylorada"])
def test_what_is_taken_off_while_it_is_disabled_stays_off(method):
    config = HyLoRADAConfig(method=method, lora_rank=2, target_modules="layers.0", daa_enabled=False)
    attributes = lambda net: [sorted(vars(module)) for module in (net, *net.layers)]
    x, take_off = jax.random.normal(jax.random.key(1), (1, 3, 6)), merge if method == "lora" else unload
    net = moved(adapt(Noted(), config, nnx.Rngs(1)))
    expected = net(x) if take_off is merge else Noted()(x)
    with disabled(net):
        take_off(net)
        np.testing.assert_allclose(net(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net(x), expected, rtol=1e-5, atol=1e-6)
    assert attributes(net) == attributes(Noted())
    assert [type(module) for module in (net, *net.layers)] == [Noted, nnx.Linear, nnx.Linear]
    # And what is put on anew within is on, and only that.
    adapt(net, config, nnx.Rngs(1))
    with disabled(net):
        other = HyLoRADAConfig(method="lora", lora_rank=2, target_modules="layers.1")
        net.layers[1] = nnx.Linear(6, 6, rngs=nnx.Rngs(2))
        moved(adapt(unload(net), other, nnx.Rngs(1)))
        expected = net(x)
    np.testing.assert_array_equal(net(x), expected)
    copy = nnx.clone(net)
    with disabled(net):
        within = nnx.clone(net)
    np.testing.assert_array_equal(net(x), expected)
    assert attributes(unload(within)) == attributes(unload(copy))


@pytest.mark.parametrize("method", ["lora", "dora", "hylorada_v1"])
def test_a_linear_layer_is_linens_adapter(method):
    net, x = made("Linear")
    layer = net.mlp.down_proj
    kernel, bias = layer.kernel[...], layer.bias[...]
    moved(adapt(net, config_of(method), nnx.Rngs(3)))
    names = {"lora": "LoRALinear", "dora": "DoRALinear", "hylorada_v1": "HyLoRADALinear"}
    linen_layer = getattr(linen_layers, names[method])(6, 5, rank=2, alpha=16.0)
    alpha = 16.0 * (2**0.5) if method == "lora" else 16.0 * 2 / 2
    params = {name: getattr(layer, name)[...] for name in KINDS[method]}
    linen_layer = linen_layer.clone(alpha=alpha)
    expected = linen_layer.apply({"params": params}, x, x @ kernel, kernel.T) + bias
    np.testing.assert_allclose(output(net, x), expected, rtol=1e-6, atol=1e-6)


class Blocks(nnx.Module):
    """A model of layers in a list, or of layers that are one module with an axis more."""

    def __init__(self, depth, *, stacked, rngs):
        block = lambda rngs: nnx.Dict(up=nnx.Linear(6, 8, rngs=rngs), down=nnx.Linear(8, 6, rngs=rngs))
        if stacked:
            self.layers = nnx.vmap(block, in_axes=0, out_axes=0)(rngs.split(depth))
        else:
            self.layers = nnx.List([block(rngs) for _ in range(depth)])

    def __call__(self, x):
        def run(x, block):
            return x + block.down(nnx.gelu(block.up(x)))

        if isinstance(self.layers, nnx.List):
            for block in self.layers:
                x = run(x, block)
            return x
        return nnx.scan(nnx.remat(run), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


V1: dict[str, Any] = {"method": "hylorada_v1", "lora_rank": 4}
STACKED = HyLoRADAConfig(rank_strategy="decreasing", target_modules="all-linear", **V1)


def test_stacked_layers_are_the_layers_one_after_another(tmp_path):
    stacked, listed = (Blocks(2, stacked=s, rngs=nnx.Rngs(0)) for s in (True, False))
    for i, block in enumerate(listed.layers):
        for name in ("up", "down"):
            for leaf in ("kernel", "bias"):
                getattr(block[name], leaf).set_value(getattr(stacked.layers[name], leaf)[...][i])
    x = jax.random.normal(jax.random.key(5), (2, 6))
    before = output(listed, x)
    np.testing.assert_allclose(output(adapt(stacked, STACKED, nnx.Rngs(1)), x), before, rtol=1e-5, atol=1e-6)
    save_adapter(moved(adapt(listed, STACKED, nnx.Rngs(1))), tmp_path)
    load_adapter(unload(stacked), tmp_path)
    assert stacked.layers["up"].lora_A.shape == (2, 4, 6)
    assert listed.layers[1]["up"].lora_A.shape == (2, 6)  # its own rank, by depth
    np.testing.assert_allclose(output(stacked, x), output(listed, x), rtol=1e-5, atol=1e-5)
    together, apart = (gradients(model, x)["layers"] for model in (stacked, listed))
    for i, name in itertools.product(range(2), ("up", "down")):
        for leaf, one in apart[i][name].items():
            whole = together[name][leaf][...][i]
            own = tuple(slice(n) for n in one.shape)
            np.testing.assert_allclose(whole[own], one[...], rtol=0, atol=1e-5 * float(jnp.abs(one).max()))
            # Every layer has the largest rank's shape: the rest is zero, and so is its gradient.
            assert not jnp.any(whole.at[own].set(0))
    np.testing.assert_allclose(output(merge(stacked), x), output(listed, x), rtol=1e-4, atol=1e-5)


def test_jit_remat_and_clones_compute_alike_and_compile_once():
    net, x = made("Linear")
    moved(adapt(net, config_of("hylorada_v1"), nnx.Rngs(3)))
    traced = []

    @nnx.jit
    def run(net, x):
        traced.append(1)
        return nnx.remat(lambda net, x: net(x))(net, x)

    run(net, 2 * x)
    found = run(moved(net), x)
    assert len(traced) == 1
    for same in (net, nnx.clone(net), nnx.merge(*nnx.split(net)), pickle.loads(pickle.dumps(net))):
        np.testing.assert_allclose(output(same, x), found, rtol=1e-6, atol=1e-6)


def test_a_shared_module_has_one_adapter_and_a_shared_kernel_is_not_merged():
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    twice = nnx.Sequential(layer, layer)
    adapt(twice, config_of("lora"), nnx.Rngs(1))
    assert len(jax.tree.leaves(nnx.state(twice, AdapterParam))) == 2
    assert type(merge(twice).layers[1]) is nnx.Linear
    other = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    other.kernel = layer.kernel
    tied = adapt(nnx.Sequential(layer, other), config_of("lora"), nnx.Rngs(1))
    with pytest.raises(ModelError, match=r"layers\.0\.kernel and layers\.1\.kernel"):
        merge(tied)
    own = Net(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    own.table = own.mlp.down_proj.kernel  # which the model itself may read
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.kernel and table"):
        merge(adapt(own, config_of("lora"), nnx.Rngs(1)))


class Outer(nnx.Module):
    """A model that takes anything, and hands it on."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, *arguments, **options):
        options.pop("positions", None)
        return self.inner(*arguments, **options)


def test_positions_are_found_among_whatever_a_call_takes():
    layers = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    config = HyLoRADAConfig(target_modules="all-linear", daa_enabled=False)
    net = moved(adapt(Outer(layers), config, nnx.Rngs(1)))
    x, positions = jnp.ones((2, 3, 4)), jnp.array([[5, 6, 7], [0, 200, 3]])
    with tokens(positions):
        expected = net(x)
    np.testing.assert_array_equal(net(x, positions=positions), expected)
    with tokens(jnp.arange(3)):
        counted = net(x)
    np.testing.assert_array_equal(net(x), counted)
    assert np.abs(expected - counted).max() > 1e-4
    with pytest.raises(
        DataError, match=r"positions of the model's call: shape \(2, 3, 4\)[\s\S]*another name"
    ):
        net(x, positions=x)  # coordinates, perhaps


class Words(nnx.Module):
    """An embedding, a norm, a linear layer, and the embedding as the head; perhaps in a module of its own."""

    def __init__(self, dtype, *, apart=False, rngs):
        self.embed = nnx.Embed(7, 4, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(4, param_dtype=dtype, rngs=rngs)
        self.q_proj = nnx.Linear(4, 4, param_dtype=dtype, rngs=rngs)
        self.out = nnx.Embed(7, 4, param_dtype=dtype, rngs=rngs) if apart else self.embed
        self.out.embedding = self.embed.embedding

    def __call__(self, ids):
        return self.out.attend(self.norm(self.q_proj(self.embed(ids))))


def test_what_trains_is_as_wide_as_its_own_numbers():
    with jax.enable_x64(True):
        net, ids = Words(jnp.dtype("float64"), rngs=nnx.Rngs(0)), jnp.array([[1, 2, 2, 6]])
        net.norm = nnx.LayerNorm(4, param_dtype="bfloat16", rngs=nnx.Rngs(0))
        # The first leaf that is read, of the embedding or of whatever comes before it, does not decide.
        net.a_proj = nnx.Linear(4, 4, param_dtype="float32", rngs=nnx.Rngs(0))
        before = output(net, ids)
        adapt(net, HyLoRADAConfig(method="longlora", s2_attn_enabled=False, target_modules="a_proj"), RNGS())
        np.testing.assert_array_equal(output(net, ids), before, strict=True)
        assert (net.embed.embedding.dtype, net.norm.scale.dtype) == ("float64", "float32")


@pytest.mark.parametrize(("dtype", "apart"), [("float32", False), ("bfloat16", True)])
def test_embeddings_and_norms_train_themselves(dtype, apart):
    net, ids = Words(jnp.dtype(dtype), apart=apart, rngs=nnx.Rngs(0)), jnp.array([[1, 2, 2, 6]])
    before, x = output(net, ids), jnp.linspace(-1, 2, 4, dtype="float16")  # narrower than the norm's leaves
    normed = output(net.norm, x)
    config = HyLoRADAConfig(method="longlora", s2_attn_enabled=False, target_modules="q_proj")
    adapt(net, config, nnx.Rngs(1))
    after = output(net, ids)
    assert after.dtype == dtype
    np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(output(net.norm, x), normed, strict=True)
    state = nnx.state(net, AdapterParam)
    assert {name: set(node) for name, node in state.items()} == {
        "embed": {"embedding"},
        "norm": {"scale", "bias"},
        "q_proj": {"lora_A", "lora_B"},
    }
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32"}
    # A sum over 600 tokens, in which bfloat16 would stop at 256.
    total = lambda net: net.embed(jnp.full(600, 3)).astype("float32").sum()
    often = nnx.jit(nnx.grad(total, argnums=WRT))(net)
    assert often["embed"]["embedding"][3].tolist() == [600.0] * 4
    with pytest.raises(ModelError, match="trained themselves"):
        unload(net)
    merge(net)
    np.testing.assert_array_equal(output(net, ids), before)
    assert not jax.tree.leaves(nnx.state(net, AdapterParam))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))} == {dtype}


def test_a_layer_takes_lists_as_it_did():
    net = Net(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    before = net([[1.0, 2.0]])
    np.testing.assert_array_equal(adapt(net, config_of("lora"), nnx.Rngs(1))([[1.0, 2.0]]), before)


def test_dropout_is_of_training_alone():
    net, x = made("Linear")
    moved(adapt(net, config_of("lora", lora_dropout=0.5), nnx.Rngs(3)))
    net.eval()
    np.testing.assert_array_equal(net(x), net(x))
    net.train()
    assert not jnp.array_equal(net(x), net(x))
    other, config = NET(), config_of("lora", lora_dropout=0.5)
    with pytest.raises(ConfigError, match="without dropout"):
        adapt(other, config, nnx.Rngs(params=0))
    assert adapt(other, config, nnx.Rngs(params=0, dropout=1)) is other  # it was left as it had been


def adapted(method="lora"):
    return adapt(made("Linear")[0], config_of(method), nnx.Rngs(3))


def aimed(targets):
    return HyLoRADAConfig(target_modules=targets, **V1)


class Packed(nnx.Module):
    """What a library for quantisation may put in a kernel's place."""

    shape = (6, 5)


def with_kernel(kernel):
    net = NET()
    net.mlp.down_proj.kernel = kernel
    return net


def with_numbers(dtype):
    return with_kernel(nnx.Param(jnp.ones((6, 5), dtype)))


def with_foreign_bias():
    net = made("foreign")[0]
    net.mlp.down_proj.bias = nnx.data(nnx.Param(jnp.ones(6)))
    return net


def with_attribute():
    net = NET()
    net.mlp.down_proj.lora_A = 1
    return net


class Own(Attention):
    """Attention with an attribute of its own."""

    def __init__(self):
        super().__init__(2)
        self.adaptation = 3


def with_attributes(place, **attributes):
    mlp = nnx.Dict(down_proj=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    net = Outer(nnx.Dict(mlp=mlp, attn=nnx.Dict(scores=Own())))
    for name, value in attributes.items():
        setattr(place(net), name, value)
    return net


S2 = HyLoRADAConfig(method="longlora", target_modules="down_proj", train_embeddings=False, train_norms=False)


@pytest.mark.parametrize(
    ("net", "config", "match"),
    [
        (with_attributes(lambda net: net, hylorada=3), config_of("lora"), "the model has hylorada"),
        (
            with_attributes(lambda net: net.inner.mlp.down_proj, mask=3),
            config_of("sparse"),
            r"inner\.mlp\.down_proj has mask",
        ),
        (
            with_attributes(lambda net: net.inner.mlp.down_proj, column_scale=3),
            config_of("dora"),
            r"inner\.mlp\.down_proj has column_scale",
        ),
        (with_attributes(lambda net: net), S2, r"inner\.attn has adaptation"),
    ],
    ids=["the model's", "a sparse adapter's", "a resolved one's", "attention's"],
)
def test_an_attribute_that_an_adapter_would_take_is_refused_and_stays(net, config, match):
    before = nnx.graphdef(net)
    with pytest.raises(ModelError, match=match):
        adapt(net, config, nnx.Rngs(0))
    assert nnx.graphdef(net) == before


def test_a_disabled_model_is_adapted_already():
    net = adapted()
    with disabled(net), pytest.raises(ModelError, match="adapted once"):
        adapt(net, config_of("sparse"), nnx.Rngs(0))
    assert net.hylorada.config.method == "lora"


class Doubling(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_all_linear_names_what_it_leaves_out():
    rngs = nnx.Rngs(0)
    unit = nnx.WeightNorm(nnx.Linear(4, 4, rngs=rngs), rngs=rngs)
    model = nnx.Sequential(
        Doubling(4, 4, rngs=rngs), nnx.Conv(4, 4, 1, rngs=rngs), unit, nnx.Linear(4, 4, rngs=rngs)
    )
    x = jax.random.normal(jax.random.key(1), (2, 4))
    before = model(x)
    left = r"layers\.0 \(Doubling\), layers\.1 \(Conv\), layers\.2\.layer_instance \(WeightNorm\)"
    with pytest.warns(UserWarning, match=left):
        adapt(model, config_of("dora"), rngs)
    assert model.hylorada.modules.linear_names == ["layers.3"]
    np.testing.assert_allclose(model(x), before, rtol=1e-5)


AB = "ta,ab->tb"
NET, RNGS = (lambda: made("Linear")[0]), (lambda: nnx.Rngs(0))


@pytest.mark.parametrize(
    ("model", "config", "rngs", "error", "match"),
    [
        (lambda: linen.Dense(3), aimed("all-linear"), RNGS, ModelError, "HyLoRADAModel"),
        (lambda: nnx.Conv(3, 3, 1, rngs=RNGS()), aimed("all-linear"), RNGS, ModelError, "register_einsum"),
        (NET, aimed("all-linear"), lambda: 0, ConfigError, r"nnx\.Rngs"),
        (NET, aimed("all-linear"), lambda: nnx.Rngs(dropout=0), ConfigError, "without params"),
        (NET, HyLoRADAConfig(), RNGS, ModelError, r"Attention\(num_heads\)"),
        (NET, aimed("don_proj"), RNGS, TargetError, r"Near matches: down_proj"),
        (adapted, aimed("all-linear"), RNGS, ModelError, "unload"),
        (lambda: with_kernel(Packed()), aimed("all-linear"), RNGS, ModelError, "quantised"),
        (lambda: with_numbers("int8"), aimed("all-linear"), RNGS, ModelError, r"mlp\.down_proj, int8"),
        (lambda: with_numbers("complex64"), config_of("lora"), RNGS, ModelError, "down_proj, complex64"),
        (with_foreign_bias, config_of("dora", magnitude_scales_bias=True), RNGS, ModelError, "with a bias"),
        (with_attribute, aimed("all-linear"), RNGS, ModelError, "has lora_A"),
        (lambda: Net(Unlike(w=None)), aimed("all-linear"), RNGS, ModelError, "has no einsum_str\n"),
        (lambda: Net(Unlike(einsum_str=AB)), aimed("all-linear"), RNGS, ModelError, "has no w\n"),
        (lambda: Net(Unlike(w=None, einsum_str=AB)), aimed("all-linear"), RNGS, ModelError, "without"),
        (lambda: Blocks(3, stacked=True, rngs=RNGS()), aimed(r".*\.1\.up"), RNGS, ConfigError, "together"),
    ],
    ids=[
        "Linen",
        "nothing to adapt",
        "rngs",
        "no params",
        "out of reach",
        "targets",
        "twice",
        "quantised",
        "integers",
        "complex numbers",
        "a bias of its own",
        "taken",
        "no equation",
        "no kernel",
        "none to adapt",
        "part",
    ],
)
def test_what_cannot_be_adapted_is_refused(model, config, rngs, error, match):
    with pytest.raises(error, match=match):
        adapt(model(), config, rngs())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: merge(NET()), ModelError, "adapted"),
        (lambda: merge(moved(adapted("sparse"))), ModelError, "sparse adapter"),
        (lambda: register_einsum(linen.Dense), ConfigError, "hylorada_jax.register_linear"),
        (lambda: register_einsum(Foreign, kernel="v"), ConfigError, "one thing"),
        (lambda: register_einsum(Unlike, equation="product"), ConfigError, r"\(w, einsum_str\) already"),
        (lambda: register_einsum(nnx.Embed), ConfigError, r"embedding \(embedding\) already"),
    ],
    ids=["not adapted", "sparse", "Linen's class", "another kernel", "another equation", "another role"],
)
def test_what_cannot_be_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
