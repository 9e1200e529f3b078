"""Networks of one's own under flax's transforms and options: what adapters do there, or why they cannot."""

import dataclasses
import warnings
from functools import partial

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


def prepare(network, x=X, config=V1):
    """sites, params, fresh adapters, and the function that resolves adapters."""
    init = lambda key: network.init(key, x)["params"]
    sites, params = plan(find_modules(init), config), jax.jit(init)(jax.random.key(0))
    constants = build.build_constants(sites, params, config)

    def resolved(adapters):
        return resolve(sites, adapters, params, constants, config)

    return sites, params, build.build_adapters(sites, constants, params, config), resolved


def attach(network, x=X, config=V1):
    """params, fresh adapters, and functions of adapters: the network's output with them, and merged."""
    sites, params, fresh, resolved = prepare(network, x, config)

    def adapted(adapters):
        leaves = resolved(adapters)
        with adapt(leaves, config):
            return network.apply({"params": params, "hylorada": leaves}, x)

    def merged(adapters):
        return network.apply({"params": merge(sites, resolved(adapters), params, config)}, x)

    return params, fresh, adapted, merged


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
], ids=["name", "axis"])  # fmt: skip
def test_stacked_layers_that_cannot_be_told_apart_are_refused(name, axes):
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Block, split_rngs={"params": True}, length=3, **axes)
            return scan(name=name)(x, None)[0]

    with pytest.raises(
        ConfigError, match=rf"submodule named layers[\s\S]*{name}\.fc reads a kernel \(4, 4\)"
    ):
        find_modules(lambda key: Scanned().init(key, X)["params"])


class Shared(nn.Module):
    """One layer, three times."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_broadcast": ("params", "hylorada"), "split_rngs": {"params": False}}
        return nn.scan(Block, length=3, **axes)(name="layers")(x, None)[0]


class Embedded(nn.Module):
    """A submodule named layers, of no stack, which reads ids."""

    def setup(self):
        self.layers = nn.Sequential([nn.Embed(7, WIDTH), nn.LayerNorm(), nn.Dense(WIDTH)])

    def __call__(self, ids):
        return self.layers(ids)


@pytest.mark.parametrize(
    ("network", "names"),
    [
        (Shared(), ["layers.fc"]),
        (Embedded(), [f"layers.layers_{number}" for number in (2, 0, 1)]),
    ],
    ids=["shared", "sequential"],
)
def test_a_layer_that_reads_its_leaves_whole_is_no_stack(network, names):
    x, config = (IDS, UNFROZEN) if isinstance(network, Embedded) else (X, V1)
    modules = find_modules(lambda key: network.init(key, x)["params"])
    assert [name for site in plan(modules, config) for name in site.names] == names
    _, fresh, adapted, merged = attach(network, x, config)
    # float32, some roundings of numbers of about 10.
    np.testing.assert_allclose(adapted(moved(fresh)), merged(moved(fresh)), rtol=1e-5, atol=1e-5)


class TwiceGeneral(nn.DenseGeneral):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class TwiceDense(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


class TwiceNorm(nn.LayerNorm):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x) + self.param("offset", nn.initializers.ones, (WIDTH,))


class TwiceEmbed(nn.Embed):
    @nn.compact
    def __call__(self, ids):
        return 2 * super().__call__(ids) + self.param("offset", nn.initializers.ones, (WIDTH,))


class Subclasses(nn.Module):
    """A layer of each class that computes around ``super().__call__``."""

    @nn.compact
    def __call__(self, ids):
        x = TwiceNorm(name="norm")(TwiceEmbed(7, WIDTH, name="table")(ids))
        x = TwiceGeneral(WIDTH, name="general")(x)
        # Not jax's function, so a product of its own.
        return TwiceDense(WIDTH, name="own", dot_general=partial(jax.lax.dot_general))(x)


def test_what_a_subclass_computes_around_its_class_is_computed_once():
    params, fresh, adapted, merged = attach(Subclasses(), IDS, UNFROZEN)
    np.testing.assert_array_equal(adapted(fresh), Subclasses().apply({"params": params}, IDS))
    adapters = moved(fresh)
    # float32, some roundings of numbers of about 50.
    np.testing.assert_allclose(adapted(adapters), merged(adapters), rtol=1e-5, atol=1e-4)
    # A leaf that we do not know is no leaf that trains.
    assert {name: set(fresh[name]) for name in ("norm", "table")} == {
        "norm": {"scale", "bias"},
        "table": {"embedding"},
    }


def test_what_a_module_returns_is_captured_once_and_adapted():
    network = nn.Sequential([nn.DenseGeneral(WIDTH), nn.LayerNorm()])
    _, params, fresh, resolved = prepare(network, config=NORMS)
    leaves = resolved(moved(fresh))
    with adapt(leaves, NORMS):
        y, state = network.apply({"params": params, "hylorada": leaves}, X, capture_intermediates=True)
        within = nn.DenseGeneral(WIDTH).apply(
            {"params": params["layers_0"], "hylorada": leaves["layers_0"]}, X
        )
    captured = state["intermediates"]
    for name, expected in {"layers_0": within, "layers_1": y}.items():
        (got,) = captured[name]["__call__"]
        np.testing.assert_array_equal(got, expected)


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
    unboxed = lambda key: nn.meta.unbox(init(key))
    assert find_modules(unboxed).linear_names == [""]
    sites, key = plan(find_modules(unboxed), V1), jax.random.key(0)
    constants = build.build_constants(sites, unboxed(key), V1)
    adapters = build.build_adapters(sites, constants, unboxed(key), V1)
    for use in (
        lambda params: build.build_constants(sites, params, V1),
        lambda params: resolve(sites, adapters, params, constants, V1),
    ):
        use(unboxed(key))
        with pytest.raises(ConfigError, match=r"meta\.unbox"):
            use(init(key))


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_numbers_that_are_not_floating_are_refused(dtype):
    """As in NNX: an int8 kernel would be merged in whole numbers."""
    network = nn.Sequential(
        [nn.Dense(WIDTH), nn.Dense(WIDTH, param_dtype=dtype, kernel_init=nn.initializers.ones)]
    )
    with pytest.raises(ModelError, match=rf"floating[\s\S]*received: layers_1, {dtype}"):
        attach(network)


def test_an_embedding_of_a_single_row_gives_it_for_every_id():
    network = nn.Sequential([nn.Embed(1, WIDTH), nn.Dense(WIDTH)])
    params, fresh, adapted, _ = attach(network, IDS, UNFROZEN_ALONE)
    np.testing.assert_array_equal(adapted(fresh), network.apply({"params": params}, IDS))


class Positioned(nn.Module):
    """A model that is called with tokens, or with what they are embedded in, and their positions."""

    @nn.compact
    def __call__(self, input_ids=None, position_ids=None, inputs_embeds=None):
        x = nn.Embed(7, WIDTH, name="table")(input_ids) if inputs_embeds is None else inputs_embeds
        return nn.Dense(WIDTH, name="fc")(x)


def test_positions_come_with_tokens_or_beside_embeddings():
    network = Positioned()
    config = HyLoRADAConfig(
        lora_rank=2, target_modules="all-linear", lora_A_init="kaiming", daa_enabled=False
    )
    _, params, fresh, resolved = prepare(network, IDS, config)
    leaves = resolved(moved(fresh))

    def output(**inputs):
        with adapt(leaves, config):
            return network.apply({"params": params, "hylorada": leaves}, **inputs)

    places = jnp.array([[0, 1, 2], [9, 30, 31]])
    embedded = params["table"]["embedding"][IDS]
    expected = output(input_ids=IDS, position_ids=places)
    assert np.abs(expected - output(input_ids=IDS)).max() > 1e-3
    np.testing.assert_array_equal(output(inputs_embeds=embedded, position_ids=places), expected)
    for inputs in ({"inputs_embeds": embedded}, {"input_ids": IDS[0]}, {"input_ids": None}):
        with pytest.raises(
            ModelError, match=r"\[batch, seq\][\s\S]*received: Positioned with (neither|input_ids \(3,\))"
        ):
            output(**inputs)
    with pytest.raises(ModelError, match="called with input_ids and position_ids"), adapt(leaves, config):
        nn.Dense(WIDTH).apply({"params": params["fc"], "hylorada": leaves["fc"]}, X)


def test_one_key_serves_dropout_as_in_flax():
    config = dataclasses.replace(LORA, lora_dropout=0.5)
    network = nn.Dense(WIDTH)
    _, params, fresh, _ = prepare(network, config=config)
    leaves = {"lora_A": fresh["lora_A"], "scaled_B": jnp.ones((WIDTH, 2)), "dropout_rate": jnp.array(0.5)}

    def output(rngs):
        with adapt(leaves, config, train=True):
            return network.apply({"params": params, "hylorada": leaves}, X, rngs=rngs)

    keys = jax.random.key(0), jax.random.key(1)
    assert np.abs(output(keys[0]) - output(keys[1])).max() > 1e-3
    np.testing.assert_array_equal(output(keys[0]), output({"params": keys[0]}))


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
UNFROZEN_ALONE = dataclasses.replace(V1, train_embeddings=True)


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
