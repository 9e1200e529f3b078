"""Networks of one's own under flax's transforms and options: what adapters do there, or why they cannot."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.surgery import build
from hylorada_jax.surgery.intercept import adapt
from hylorada_jax.surgery.merge import merge
from hylorada_jax.surgery.modules import find_modules
from hylorada_jax.surgery.plan import plan
from hylorada_jax.surgery.resolve import resolve

WIDTH = 4
# An orthogonal A would be compiled for each shape.
V1 = HyLoRADAConfig(method="hylorada_v1", lora_rank=2, target_modules="all-linear", lora_A_init="kaiming")
LORA = HyLoRADAConfig(method="lora", lora_rank=2, target_modules="all-linear")
SPARSE = HyLoRADAConfig(method="sparse", sparse_adapter_dim=3)
X = jax.random.normal(jax.random.key(1), (2, 3, WIDTH))


def attach(network, x=X, config=V1):
    """params, fresh adapters, and functions of adapters: the network's output with them, and merged."""
    init = lambda key: network.init(key, x)["params"]
    sites, params = plan(find_modules(init), config), jax.jit(init)(jax.random.key(0))
    constants = build.build_constants(sites, params, config)

    def resolved(adapters):
        return resolve(sites, adapters, params, constants, config)

    def adapted(adapters):
        leaves = resolved(adapters)
        with adapt(leaves, config):
            return network.apply({"params": params, "hylorada": leaves}, x)

    def merged(adapters):
        return network.apply({"params": merge(sites, resolved(adapters), params, config)}, x)

    return params, build.build_adapters(sites, constants, params, config), adapted, merged


def moved(adapters):
    return jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(7), leaf.shape), adapters)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(WIDTH, name="fc")(jnp.tanh(x)), None


class Projection(nn.Module):
    """A layer that a sparse adapter knows as an MLP's last."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH, name="fc2")(x)


class Lifted(nn.Module):
    """A layer under one of flax's transforms, which hands on these collections."""

    transform: str
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        axes, split = dict.fromkeys(self.names, 0), {"params": True}
        if self.transform == "scan":
            return nn.scan(Block, variable_axes=axes, split_rngs=split, length=3)(name="layers")(x, None)[0]
        if self.transform == "vmap":
            several = nn.vmap(nn.Dense, variable_axes=axes, split_rngs=split, in_axes=None, axis_size=3)
            return several(WIDTH, name="layers")(x)
        return nn.RNN(nn.SimpleCell(WIDTH), variable_broadcast=self.names)(x)


@pytest.mark.parametrize("transform", ["scan", "vmap", "rnn"])
def test_a_transform_that_drops_the_adapters_is_refused(transform):
    _, fresh, adapted, _ = attach(Lifted(transform, ("params",)), config=LORA)
    with pytest.raises(ModelError, match=r"was called without it[\s\S]*variable_axes"):
        jax.eval_shape(adapted, fresh)


@pytest.mark.parametrize("config", [LORA, SPARSE], ids=["lora", "sparse"])
def test_adapters_that_are_not_resolved_are_refused(config):
    params, fresh, _, _ = attach(Projection(), config=config)
    with adapt(fresh, config), pytest.raises(ModelError, match=r"of fc2[\s\S]*what resolve"):
        Projection().apply({"params": params, "hylorada": fresh}, X)


def test_a_recurrent_network_is_adapted_and_merged():
    _, fresh, adapted, merged = attach(Lifted("rnn", ("params", "hylorada")))
    adapters = moved(fresh)
    y, expected = jax.jit(lambda: (adapted(adapters), merged(adapters)))()
    # float32, some roundings of numbers of about 10.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "axes"), [
    ("blocks", {"variable_axes": {"params": 0}}),
    ("layers", {"variable_axes": {"params": 1}}),
    ("layers", {"variable_broadcast": "params"}),
], ids=["name", "axis", "shared"])  # fmt: skip
def test_stacked_layers_that_cannot_be_told_apart_are_refused(name, axes):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, split_rngs={"params": "variable_axes" in axes}, length=3, **axes)
            return scan(name=name)(x, None)[0]

    with pytest.raises(
        ConfigError, match=rf"submodule named layers[\s\S]*{name}\.fc reads a kernel \(4, 4\)"
    ):
        find_modules(lambda key: Scanned().init(key, X)["params"])


def test_a_network_within_nn_jit_is_refused():
    """Flax would answer a call in training by what it cached in evaluation."""
    block = nn.jit(Block)

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, name="head")(block(name="block")(x)[0])

    init = lambda key: Jitted().init(key, X)["params"]
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"nn\.jit[\s\S]*received: block\.fc\n"):
            find_modules(init)
        jax.eval_shape(init, jax.random.key(0))


def test_a_function_that_was_compiled_without_adapters_is_compiled_anew_within_the_context():
    network = nn.Dense(WIDTH, use_bias=False)
    params = network.init(jax.random.key(0), X)["params"]
    leaves = {
        "lora_A": jnp.ones((1, WIDTH)),
        "scaled_B": jnp.ones((WIDTH, 1)),
        "dropout_rate": jnp.array(0.5),
    }
    given, rngs = {"params": params, "hylorada": leaves}, {"dropout": jax.random.key(1)}
    compiled = jax.jit(network.apply)
    base = compiled(given, X, rngs=rngs)
    for train in (True, False):
        with adapt(leaves, LORA, train=train):
            got, expected = compiled(given, X, rngs=rngs), network.apply(given, X, rngs=rngs)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert float(jnp.abs(got - base).max()) > 0.1
    np.testing.assert_array_equal(compiled(given, X, rngs=rngs), base)


def test_parameters_in_boxes_are_refused():
    network = nn.Dense(WIDTH, kernel_init=nn.with_partitioning(nn.initializers.zeros, (None, "tensor")))
    init = lambda key: network.init(key, X)["params"]
    with pytest.raises(ConfigError, match=r"meta\.unbox"):
        find_modules(init)
    assert find_modules(lambda key: nn.meta.unbox(init(key))).linear_names == [""]


def test_adapters_of_another_rank_are_refused():
    network = nn.Dense(WIDTH, name="fc")
    _, _, adapted, _ = attach(network, config=LORA)
    _, adapters, _, _ = attach(network, config=dataclasses.replace(LORA, lora_rank=3, lora_alpha=24))
    with pytest.raises(ModelError, match="rank 3, where the model has 2"):
        adapted(adapters)


def test_a_module_with_the_name_of_our_leaves_is_refused():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, name="position_bias")(nn.Dense(WIDTH, name="fc")(x))

    modules = find_modules(lambda key: Net().init(key, X)["params"])
    with pytest.raises(ModelError, match="another name"):
        plan(modules, LORA)


def test_nn_jit_around_what_has_no_adapters_is_allowed_and_so_is_a_jitted_init():
    convolution = nn.jit(nn.Conv)

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(WIDTH, name="head")(convolution(WIDTH, (1,), name="block")(x))

    init = jax.jit(lambda key: Jitted().init(key, X)["params"])
    for _ in range(2):
        assert find_modules(init).linear_names == ["head"]


def test_dropout_under_a_scan_that_hands_on_no_random_numbers_is_refused():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "hylorada": 0}
            scan = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    config = dataclasses.replace(LORA, lora_dropout=0.5)
    init = lambda key: Scanned().init(key, X)["params"]
    sites, params = plan(find_modules(init), config), jax.jit(init)(jax.random.key(0))
    constants = build.build_constants(sites, params, config)
    adapters = build.build_adapters(sites, constants, params, config)
    leaves = resolve(sites, adapters, params, constants, config)
    variables, rngs = {"params": params, "hylorada": leaves}, {"dropout": jax.random.key(1)}
    said = r"'dropout' in training[\s\S]*layers\.fc[\s\S]*split_rngs"
    with adapt(leaves, config, train=True), pytest.raises(ModelError, match=said):
        Scanned().apply(variables, X, rngs=rngs)


def test_a_norm_that_trains_keeps_its_mask():
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(name="norm")(nn.Dense(WIDTH, name="fc")(x), mask=jnp.arange(WIDTH) < 3)

    config = dataclasses.replace(V1, train_norms=True)
    params, adapters, adapted, _ = attach(Masked(), config=config)
    expected = Masked().apply({"params": params}, X)
    np.testing.assert_allclose(adapted(adapters), expected, rtol=1e-5, atol=1e-6)  # float32
    assert np.abs(expected - nn.LayerNorm().apply({"params": params["norm"]}, X)).max() > 0.1


class Tied(nn.Module):
    """Embeddings that are the output head too, and a norm."""

    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.table = nn.Embed(7, WIDTH, param_dtype=self.dtype)
        self.norm, self.fc = nn.LayerNorm(param_dtype=self.dtype), nn.Dense(WIDTH, param_dtype=self.dtype)

    def __call__(self, ids):
        return self.table.attend(self.fc(self.norm(self.table(ids))))


IDS = jnp.array([[0, 3, 5], [2, 2, 6]])
NORMS = dataclasses.replace(V1, train_norms=True)
UNFROZEN = dataclasses.replace(NORMS, train_embeddings=True)


def test_embeddings_and_norms_train_beside_the_bases_parameters():
    params, fresh, adapted, merged = attach(Tied(), IDS, UNFROZEN)
    adapters = moved(fresh)

    def loss(function, adapters):
        y = function(adapters)
        return jnp.sum(y**2), y

    derive = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    ((_, y), gradient), ((_, expected), through_merged) = (derive(f, adapters) for f in (adapted, merged))
    # float32: the order of summation differs.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for name in ("table", "norm"):
        assert set(gradient[name]) == set(params[name])
        for leaf, value in gradient[name].items():
            largest = np.abs(through_merged[name][leaf]).max()
            np.testing.assert_allclose(value, through_merged[name][leaf], rtol=1e-4, atol=1e-5 * largest)


class Norms(nn.Module):
    """A norm of each class and dtype, on the same x."""

    @nn.compact
    def __call__(self, x):
        make = [nn.LayerNorm, nn.RMSNorm]
        norms = [cls(param_dtype=dtype) for cls in make for dtype in (jnp.float32, jnp.bfloat16)]
        return [nn.Dense(WIDTH, name="fc")(x), *(norm(x) for norm in norms)]


def test_a_norm_that_trains_has_the_bases_dtype_and_numbers():
    x = X.astype(jnp.bfloat16)
    params, fresh, adapted, _ = attach(Norms(), x, NORMS)
    expected = jax.jit(lambda: Norms().apply({"params": params}, x))()
    assert [y.dtype for y in expected[1:]] == 2 * [jnp.float32, jnp.bfloat16]
    for y, of_base in zip(jax.jit(adapted)(fresh)[1:], expected[1:], strict=True):
        assert y.dtype == of_base.dtype
        np.testing.assert_array_equal(y, of_base)


def coarse(x, kernel, dimensions, precision=None):
    """A product of one's own, which rounds the kernel: W is another matrix, and y has another dtype."""
    return jax.lax.dot_general(x, jnp.round(kernel * 4) / 4, dimensions).astype(jnp.float32)


class Coarse(nn.Module):
    """The same as a module, as those of fp8 are."""

    @nn.compact
    def __call__(self, *arguments, **options):
        return coarse(*arguments, **options)


def half(*arrays, dtype=None):
    return [None if array is None else array.astype(jnp.float16) for array in arrays]


OWN = {
    "product": {"dot_general": coarse, "promote_dtype": half},
    "module": {"dot_general_cls": Coarse},
    "dtype": {"promote_dtype": half},
}


@pytest.mark.parametrize("options", OWN.values(), ids=OWN)
def test_a_dense_keeps_its_own_product_and_dtype(options):
    network = nn.Sequential([nn.Dense(5, bias_init=nn.initializers.normal(), **options)])
    for scales_bias in (False, True):
        params, fresh, adapted, _ = attach(
            network, config=dataclasses.replace(V1, magnitude_scales_bias=scales_bias)
        )
        both = jax.jit(lambda: (adapted(fresh), network.apply({"params": params}, X)))  # noqa: B023
        y, expected = both()
        assert y.dtype == expected.dtype
        # A fresh adapter is the identity: c is 1 to a rounding of float32.
        np.testing.assert_allclose(y, expected, rtol=2 * np.finfo(y.dtype).eps, atol=1e-7)

    _, fresh, adapted, _ = attach(network, config=dataclasses.replace(LORA, lora_alpha=LORA.lora_rank))
    leaves = (adapters := moved(fresh))["layers_0"]
    update = X @ leaves["lora_A"].T @ leaves["lora_B"].T
    # Products in float16 lose a part in 2¹¹ each.
    np.testing.assert_allclose(jax.jit(adapted)(adapters) - expected, update, rtol=0, atol=4e-3)


class Several(nn.Module):
    """Linear layers over several axes: those of an attention, and stacked ones that sum over no last ones."""

    @nn.compact
    def __call__(self, x):
        normal, axes = nn.initializers.normal(), {"params": 0, "hylorada": 0}
        attention = nn.MultiHeadDotProductAttention(2, bias_init=normal, param_dtype=float, name="attention")
        stacked = nn.vmap(
            nn.DenseGeneral, variable_axes=axes, split_rngs={"params": True}, axis_size=2, in_axes=None
        )
        return stacked((2, 5), axis=(-1, 1), bias_init=normal, param_dtype=float, name="layers")(attention(x))


@pytest.mark.parametrize("scales_bias", [False, True])
def test_linear_layers_over_several_axes_are_adapted_and_merged(scales_bias):
    with jax.enable_x64(True):
        config = dataclasses.replace(V1, magnitude_scales_bias=scales_bias)
        x = X.astype(float)
        params, fresh, adapted, merged = attach(Several(), x, config)
        assert set(fresh["attention"]) == {"query", "key", "value", "out"}
        a, b = (fresh["layers"][name].shape for name in ("lora_A", "lora_B"))
        assert (a, b) == ((2, 2, WIDTH * 3), (2, 2 * 5, 2))
        adapters = moved(fresh)
        got, expected, start, base = jax.jit(
            lambda: (
                adapted(adapters),
                merged(adapters),
                adapted(fresh),
                Several().apply({"params": params}, x),
            )
        )()
    # float64: only the order of summation differs.
    np.testing.assert_allclose(start, base, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)
    assert np.abs(got - base).max() > 0.1


def test_all_linear_names_what_it_leaves_out():
    class Others(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral(WIDTH, batch_dims=(0,), name="own")(nn.Conv(WIDTH, (2,), name="conv")(x))
            x = nn.Einsum((WIDTH, WIDTH), "btd,de->bte", name="product")(x)
            return nn.Dense(WIDTH, name="fc")(nn.WeightNorm(nn.Dense(WIDTH, name="unit"))(x))

    modules = find_modules(lambda key: Others().init(key, X)["params"])
    assert modules.linear_names == ["fc"]
    with pytest.warns(
        UserWarning, match=r"conv \(Conv\), own \(DenseGeneral\), product \(Einsum\), unit \(WeightNorm\)"
    ):
        plan(modules, V1)
    with warnings.catch_warnings(action="error"):
        plan(modules, dataclasses.replace(V1, target_modules="fc"))
