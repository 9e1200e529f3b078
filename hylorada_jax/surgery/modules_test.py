"""Modules are known by their classes: flax's, subclasses, registered ones, and no look-alikes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, TargetError
from hylorada_jax.models.module_kinds import register_linear
from hylorada_jax.surgery import build, layout
from hylorada_jax.surgery.intercept import adapt
from hylorada_jax.surgery.merge import merge
from hylorada_jax.surgery.modules import find_modules
from hylorada_jax.surgery.plan import plan
from hylorada_jax.surgery.resolve import resolve

DEPTH, WIDTH = 2, 6
NORMAL = nn.initializers.normal(1.0)


class Narrow(nn.Dense):
    """A subclass that computes what its class does."""


class Doubled(nn.Dense):
    """A subclass that does more around it."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


@register_linear
class InOut(nn.Module):
    """The least that a linear layer is."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", NORMAL, (x.shape[-1], WIDTH))


class OutIn(nn.Module):
    """A linear layer in the other orientation."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", NORMAL, (self.features, x.shape[-1]))
        return x @ kernel.T + self.param("bias", NORMAL, (self.features,))


register_linear(OutIn, out_in=True)


class Dense(nn.Module):
    """Its name and its parameter are nn.Dense's, and what it computes is not."""

    @nn.compact
    def __call__(self, x):
        return jnp.sin(x @ self.param("kernel", NORMAL, (x.shape[-1], WIDTH)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.remat(OutIn)(9, name="up")(x)
        return x + Narrow(WIDTH, use_bias=False, name="down")(jnp.tanh(hidden)), None


class Network(nn.Module):
    """Registered layers and subclasses, stacked and not, and a layer that looks like one."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "hylorada": 0}
        scan = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=DEPTH)
        x = InOut(name="mix")(Dense(name="alike")(scan(name="layers")(x, None)[0]))
        return Doubled(3, name="out")(inputs=x)


def plain(tensors, params, x, config):
    """The network written out, with every W + s·B A formed."""

    def layer(x, name, W, bias=0.0):
        own = {leaf: tensors[f"{name}.{leaf}"] for leaf in LEAVES}
        V = W + config.scale(config.lora_rank, config.lora_alpha) * own["lora_B"] @ own["lora_A"]
        g, beta = jax.nn.sigmoid(own["magnitude_gate"]), jax.nn.sigmoid(own["residual_weight"])
        m = g * own["magnitude"] + (1 - g) * jnp.linalg.norm(W, axis=1)
        return x @ V.T * ((1 - beta) * m / jnp.linalg.norm(V, axis=1) + beta) + bias

    up, down = params["layers"]["up"], params["layers"]["down"]
    for i in range(DEPTH):
        hidden = layer(x, f"layers.{i}.up", up["kernel"][i], up["bias"][i])
        x = x + layer(jnp.tanh(hidden), f"layers.{i}.down", down["kernel"][i].T)
    x = layer(jnp.sin(x @ params["alike"]["kernel"]), "mix", params["mix"]["kernel"].T)
    return 2 * layer(x, "out", params["out"]["kernel"].T, params["out"]["bias"])


LEAVES = ("lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight")
NAMES = [*(f"layers.{i}.{name}" for name in ("down", "up") for i in range(DEPTH)), "mix", "out"]


def test_every_linear_class_is_adapted_merged_and_trained_as_the_formula_says():
    with jax.enable_x64(True):
        config = HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules="all-linear")
        rng, network = np.random.default_rng(0), Network()
        x = jnp.asarray(rng.normal(size=(5, WIDTH)))
        init = lambda key: network.init(key, x)["params"]
        modules = find_modules(init)
        assert modules.linear_names == NAMES
        draw = lambda shape: np.asarray(0.4 * rng.normal(size=shape))
        shapes = jax.eval_shape(init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape)), shapes)
        sites = plan(modules, config)
        constants = build.build_constants(sites, params, config)
        tensors = {name: draw(shape) for name, shape in layout.tensor_shapes(sites).items()}

        def adapted(adapters):
            resolved = resolve(sites, adapters, params, constants, config)
            with adapt(resolved, config):
                y = network.apply({"params": params, "hylorada": resolved}, x)
            return y, network.apply({"params": merge(sites, resolved, params, config)}, x)

        def loss(tree, function):
            outputs = function(tree)
            return jnp.sum(outputs[0] ** 2), outputs

        derive = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        (_, outputs), gradient = derive(layout.unflatten(sites, tensors), adapted)
        (_, expected), gradients = derive(tensors, lambda tree: [plain(tree, params, x, config)])
        # float64 throughout: only the order of summation differs.
        for y in outputs:
            np.testing.assert_allclose(y, expected[0], rtol=1e-11, atol=1e-11)
        for name, leaf in layout.flatten(sites, gradient).items():
            np.testing.assert_allclose(leaf, gradients[name], rtol=1e-10, atol=1e-11, err_msg=name)


def find(*layers):
    """What is found in a row of layers, called one after another."""

    class Row(nn.Module):
        @nn.compact
        def __call__(self, x):
            for number, make in enumerate(layers):
                x = make(name=f"layer{number}")(x)
            return x

    return find_modules(lambda key: Row().init(key, jnp.ones((2, WIDTH)))["params"])


def test_all_linear_says_what_it_leaves_out_by_its_name_and_that_can_be_named():
    class Scored(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="score")(nn.Dense(WIDTH, name="fc")(x))

    modules = find_modules(lambda key: Scored().init(key, jnp.ones((2, WIDTH)))["params"])
    with pytest.warns(UserWarning, match="all-linear leaves out score: by their names"):
        (site,) = plan(modules, HyLoRADAConfig(method="lora", target_modules="all-linear"))
    assert site.names == ("fc",)
    sites = plan(modules, HyLoRADAConfig(method="lora", target_modules=("all-linear", "score")))
    assert [site.names for site in sites] == [("fc",), ("score",)]


def test_where_no_layer_is_known_the_error_names_what_there_is():
    modules = find(functools.partial(nn.Einsum, (WIDTH, 4), "nd,do->no"))
    with pytest.raises(TargetError, match=r"without any; it has layer0 \(Einsum\)"):
        plan(modules, HyLoRADAConfig(method="lora", target_modules="all-linear"))


@pytest.mark.parametrize("network", [nn.Dense(3), nn.Sequential([nn.Dense(3), nn.BatchNorm(True)])])
def test_an_initialisation_that_gives_all_collections_is_refused(network):
    with pytest.raises(ConfigError, match=r"the collections [\s\S]*\[\"params\"\]"):
        find_modules(lambda key: network.init(key, jnp.ones((2, WIDTH))))


def test_a_layer_that_looks_like_a_linear_one_is_no_target():
    with pytest.raises(TargetError, match="layer0"):
        plan(find(Dense, InOut), HyLoRADAConfig(method="lora", target_modules="layer0"))


class Offset(nn.Embed):
    """As in HF's OPT: the table begins with rows of another use."""

    def __call__(self, inputs):
        return super().__call__(inputs + 2)


class Norm(nn.LayerNorm):
    pass


def test_subclasses_of_embeddings_and_norms_count_and_train():
    network, ids = nn.Sequential([Offset(7, 4), Norm()]), jnp.array([[0, 3]])
    init = lambda key: network.init(key, ids)["params"]
    modules, params = find_modules(init), init(jax.random.key(0))
    assert [module.path for module in (*modules.embeddings, *modules.norms)] == [("layers_0",), ("layers_1",)]
    with adapt(params, HyLoRADAConfig(method="lora"), dtype=jnp.bfloat16):
        y = network.apply({"params": params, "hylorada": params}, ids)
    # What trains is float32, and what it gives is rounded to the base's dtype.
    rows = params["layers_0"]["embedding"][ids + 2].astype(jnp.bfloat16)
    normed = nn.LayerNorm().apply({"params": params["layers_1"]}, rows)
    assert (y.dtype, normed.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(y, normed.astype(jnp.bfloat16))


@register_linear
class Misnamed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("weight", NORMAL, (x.shape[-1], WIDTH))


@register_linear
class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return InOut(name="inner")(x)


@register_linear
class Cube(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", NORMAL, (1, x.shape[-1], WIDTH))


@pytest.mark.parametrize("cls", [Misnamed, Deep, Cube])
def test_a_registered_layer_without_a_matrix_named_kernel_is_refused(cls):
    with pytest.raises(ConfigError, match=f"named kernel[\\s\\S]*{cls.__name__} at layer0"):
        find(cls)


class Uncalled(nn.Module):
    def project(self, x):
        return x


@pytest.mark.parametrize(
    "cls", [nn.Dense(3), Uncalled, dict, jnp.dot], ids=["module", "uncalled", "dict", "function"]
)
def test_what_is_no_class_of_callable_modules_is_not_registered(cls):
    with pytest.raises(ConfigError, match=r"class of Linen modules with a __call__"):
        register_linear(cls)


def test_a_class_is_registered_once_as_one_thing():
    assert register_linear(OutIn, out_in=True) is OutIn
    with pytest.raises(ConfigError, match="OutIn"):
        register_linear(OutIn)
    with pytest.raises(ConfigError, match="Embed"):
        register_linear(nn.Embed)
