"""The surgery on stacked and unstacked modules, against plain formulas in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.surgery import build, layout
from hylorada_jax.surgery.collapse import expand
from hylorada_jax.surgery.intercept import adapt
from hylorada_jax.surgery.merge import merge
from hylorada_jax.surgery.modules import find_modules
from hylorada_jax.surgery.plan import count_parameters, plan
from hylorada_jax.surgery.resolve import resolve

DEPTH, WIDTH = 4, 6


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH, name="down")(jnp.tanh(nn.Dense(9, name="up", use_bias=False)(x))), None


class Stack(nn.Module):
    """Blocks under scan and remat, then a plain layer; neither knows of adapters."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0, "hylorada": 0},
            split_rngs={"params": True, "dropout": True},
            length=DEPTH,
        )
        return nn.Dense(3, name="out")(scan(name="layers")(x, None)[0])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(config, seed=0, scale=0.3):
    """A stack, its sites, and adapters moved away from their start (padding left at zero)."""
    rng = np.random.default_rng(seed)
    net, x = Stack(), jnp.asarray(rng.normal(size=(5, WIDTH)))
    init = lambda key: net.init(key, x)["params"]
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)
    sites = plan(find_modules(init), config)
    constants = build.build_constants(sites, params, config)
    adapters = build.build_adapters(sites, constants, params, config)
    flat = layout.flatten(sites, adapters)
    moved = {name: leaf + scale * rng.normal(size=leaf.shape) for name, leaf in flat.items()}
    return net, x, params, sites, constants, adapters, layout.unflatten(sites, moved), moved


def run(net, x, params, resolved, config):
    with adapt(resolved, config):
        return net.apply({"params": params, "hylorada": resolved}, x)


def column_scale(W, leaves, s, kind):
    """c by its definition, with B·A formed."""
    sigmoid = lambda t: 1 / (1 + np.exp(-t))
    norm = np.linalg.norm(W + s * leaves["lora_B"] @ leaves["lora_A"], axis=1)
    if kind == "lora":
        return np.ones(len(W))
    if kind == "dora":
        return leaves["magnitude"] / norm
    g, beta = sigmoid(leaves["magnitude_gate"]), sigmoid(leaves["residual_weight"])
    m = g * leaves["magnitude"] + (1 - g) * np.linalg.norm(W, axis=1)
    return (1 - beta) * m / norm + beta


def reference(x, params, tensors, config, ranks):
    """The stack, one layer after another, each by y = (x Wᵀ + s x Aᵀ Bᵀ)·c + bias."""

    def dense(x, name, leaves, layer=None):
        pick = lambda leaf: np.asarray(leaf if layer is None else leaf[layer])
        W, bias = pick(leaves["kernel"]).T, pick(leaves["bias"]) if "bias" in leaves else 0.0
        own = {
            key.rsplit(".", 1)[1]: value for key, value in tensors.items() if key.rsplit(".", 1)[0] == name
        }
        if not own:
            return x @ W.T + bias
        s = config.scale(ranks[name], config.lora_alpha * ranks[name] / config.lora_rank)
        c = column_scale(W, own, s, config.linear)
        if config.magnitude_scales_bias:
            return (x @ W.T + bias + s * x @ own["lora_A"].T @ own["lora_B"].T) * c
        return (x @ W.T + s * x @ own["lora_A"].T @ own["lora_B"].T) * c + bias

    x = np.asarray(x)
    for i in range(DEPTH):
        up = np.tanh(dense(x, f"layers.{i}.up", params["layers"]["up"], i))
        x = x + dense(up, f"layers.{i}.down", params["layers"]["down"], i)
    return dense(x, "out", params["out"])


CONFIGS = [
    HyLoRADAConfig(method="lora", lora_rank=3, target_modules="all-linear"),
    HyLoRADAConfig(
        method="lora", lora_rank=3, target_modules=("up", "out"), use_rslora=True, rank_strategy="decreasing"
    ),
    HyLoRADAConfig(method="dora", lora_rank=8, target_modules="all-linear"),
    HyLoRADAConfig(
        method="hylorada_v1", lora_rank=4, target_modules="all-linear", rank_strategy="importance"
    ),
    HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules=(r"layers\.[02]\.down", "out")),
    HyLoRADAConfig(
        method="hylorada_v1", lora_rank=2, target_modules="all-linear", magnitude_scales_bias=True
    ),
]


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.method}-{c.rank_strategy}-{'-'.join(c.target_modules)}"
)
def test_adapted_merged_and_counted_as_the_formula_says(config):
    net, x, params, sites, constants, fresh, adapters, tensors = make(config)
    ranks = {name: rank for site in sites for name, rank in zip(site.names, site.ranks, strict=True)}

    def outputs(params, adapters, fresh):
        resolved = resolve(sites, adapters, params, constants, config)
        start = resolve(sites, fresh, params, constants, config)
        merged = merge(sites, resolved, params, config)
        adapted = [run(net, x, params, tree, config) for tree in (resolved, start)]
        return *adapted, *(net.apply({"params": tree}, x) for tree in (merged, params))

    y, start, merged, base = jax.jit(outputs)(params, adapters, fresh)
    # float64 throughout: only the order of summation differs.
    np.testing.assert_allclose(y, reference(x, params, tensors, config, ranks), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(merged, y, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(start, base, rtol=1e-12, atol=1e-12)

    count = sum(leaf.size for leaf in layout.flatten(sites, adapters).values())
    assert count == count_parameters(sites)
    shapes = {name: leaf.shape for name, leaf in tensors.items()}
    assert shapes == layout.tensor_shapes(sites)


@pytest.mark.parametrize("config", CONFIGS[:4:3], ids=lambda c: c.method)
def test_remat_leaves_the_gradients_unchanged_and_padding_gets_none(config):
    net, x, params, sites, constants, _, adapters, _ = make(config)

    def loss(adapters, net):
        return jnp.sum(run(net, x, params, resolve(sites, adapters, params, constants, config), config) ** 2)

    derive = jax.jit(jax.grad(loss), static_argnums=1)
    gradient, again = (derive(adapters, n) for n in (net, Stack(remat=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), gradient, again)
    for site in sites:
        if site.linear.stacked and len(set(site.ranks)) > 1:
            leaves = gradient["layers"][site.linear.path[-1]]
            for i, rank in enumerate(site.ranks):
                assert np.all(leaves["lora_A"][i, rank:] == 0)
                assert np.all(leaves["lora_B"][i, :, rank:] == 0)
                assert np.any(leaves["lora_A"][i, :rank] != 0)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_tree_to_tensors_to_tree_is_the_identity(config):
    _, _, _, sites, _, fresh, adapters, _ = make(config)
    for tree in (fresh, adapters):
        again = layout.unflatten(sites, layout.flatten(sites, tree))
        assert set(_paths(again)) == set(_paths(tree))
        jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_a_leaf_is_cut_along_its_rank_alone():
    _, _, _, sites, _, _, adapters, _ = make(CONFIGS[0])
    for change in (lambda leaf: jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, 1)]), lambda leaf: leaf[0]):
        with pytest.raises(ModelError, match="stack pads its rank alone"):
            layout.flatten(sites[-1:], jax.tree.map(change, adapters))


def _paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_a_layers_start_does_not_depend_on_the_other_targets():
    narrow = make(HyLoRADAConfig(use_hylorada=True, lora_rank=2, target_modules=r"layers\.2\.up"))[5]
    wide = make(HyLoRADAConfig(use_hylorada=True, lora_rank=2, target_modules="all-linear"))[5]
    np.testing.assert_array_equal(narrow["layers"]["up"]["lora_A"][0], wide["layers"]["up"]["lora_A"][2])
    assert np.any(wide["layers"]["up"]["lora_A"][1] != wide["layers"]["up"]["lora_A"][2])


@pytest.mark.parametrize("method", ["lora", "hylorada_v1"])
def test_the_start_of_a_follows_the_config(method):
    def start(**settings):
        config = HyLoRADAConfig(method=method, lora_rank=2, target_modules="all-linear", **settings)
        return make(config)[5]["layers"]["up"]["lora_A"]

    orthogonal = start(lora_A_init="orthogonal", lora_A_gain=3.0)
    for a in orthogonal:
        np.testing.assert_allclose(a @ a.T, 9 * np.eye(2), atol=9e-6)  # float32
    kaiming = start(lora_A_init="kaiming", lora_A_gain=3.0)
    bound = 3 / kaiming.shape[-1] ** 0.5
    assert 0.8 * bound < np.abs(kaiming).max() <= bound
    np.testing.assert_array_equal(start(lora_A_gain=3.0), kaiming if method == "lora" else orthogonal)


def test_dropout_acts_on_the_low_rank_path_alone_and_differs_by_layer_and_key():
    config = HyLoRADAConfig(method="lora", lora_rank=3, target_modules="out", lora_dropout=0.5)
    net, x, params, sites, constants, _, adapters, _ = make(config)
    resolved = resolve(sites, adapters, params, constants, config)

    def dropped(key):
        with adapt(resolved, config, train=True):
            return net.apply({"params": params, "hylorada": resolved}, x, rngs={"dropout": key})

    samples = jax.vmap(dropped)(jax.random.split(jax.random.key(0), 4000))
    exact, base = run(net, x, params, resolved, config), net.apply({"params": params}, x)
    # The mean over masks is the output without dropout; five standard errors of the mean are allowed.
    error = 5 * samples.std(0) / np.sqrt(len(samples))
    assert np.all(np.abs(samples.mean(0) - exact) <= error)
    assert np.all(error < 0.2 * np.abs(exact - base).max())
    zero = jax.tree.map(jnp.zeros_like, resolved)
    with adapt(zero, config, train=True):
        y = net.apply({"params": params, "hylorada": zero}, x, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(y, base)


def test_the_frozen_weights_are_bfloat16_and_the_scales_are_not():
    config = HyLoRADAConfig(use_hylorada=True, lora_rank=2, target_modules="all-linear")
    net, x, params, sites, *_ = make(config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    constants = build.build_constants(sites, half, config)
    adapters = build.build_adapters(sites, constants, params, config)
    resolved = resolve(sites, adapters, half, constants, config)
    assert {leaf.dtype for leaf in jax.tree.leaves((constants, adapters, resolved))} == {jnp.dtype("float32")}
    assert run(net, x.astype(jnp.bfloat16), half, resolved, config).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(merge(sites, resolved, half, config))} == {
        jnp.dtype("bfloat16")
    }


def test_gates_at_which_no_magnitude_is_dora_are_refused():
    config = HyLoRADAConfig(
        method="hylorada_v1", target_modules="all-linear", gate_init=-800.0, residual_init=800.0
    )
    _, _, params, sites, constants, _, _, tensors = make(config)
    with pytest.raises(ConfigError, match=r"gate_init=-800\.0, residual_init=800\.0"):
        expand(sites, tensors, params, constants, config)


def test_no_weight_is_kept_for_the_gradient_of_what_is_resolved():
    config = HyLoRADAConfig(method="hylorada_v1", target_modules=("up",))
    _, _, params, sites, constants, _, adapters, _ = make(config)

    def kept(adapters, params):
        return jax.vjp(lambda adapters: resolve(sites, adapters, params, constants, config), adapters)[1]

    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(kept, adapters, params))]
    weight = params["layers"]["up"]["kernel"].shape
    # The kernels themselves, whose transposes are as large.
    assert sorted(shape for shape in shapes if np.prod(shape) == np.prod(weight)) == [weight]
