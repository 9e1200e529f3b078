"""On a mesh a model has the outputs, the gradients and the places that it has on one device or had before."""

ON_FOUR_DEVICES = """
import contextlib, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from hylorada_jax import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.nnx import AdapterParam, Attention, AttentionScores, adapt
from hylorada_jax.nnx import load_adapter, merge, resolve, save_adapter, tokens

class Net(nnx.Module):
    def __init__(self, hook, rngs):
        self.query, self.key, self.value = (nnx.LinearGeneral(8, (4, 2), rngs=rngs) for _ in range(3))
        self.hook = hook(4)

    def __call__(self, x):
        query, key, value = (layer(x) for layer in (self.query, self.key, self.value))
        if isinstance(self.hook, Attention):
            return self.hook(query, key, value)
        scores = self.hook(jnp.einsum("bqhd,bkhd->bhqk", query, key))
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), value)

def adapted(net, method="hylorada"):
    return adapt(net, HyLoRADAConfig(method=method, lora_rank=2, target_modules="all-linear"), nnx.Rngs(2))

def place(a, *spec):
    return jax.device_put(a, NamedSharding(mesh, P(*(None,) * (a.ndim - len(spec)), *spec)))

loss = lambda net, x: jnp.sum(net(x) ** 2)
gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam)))
x = jax.random.normal(jax.random.key(1), (2, 6, 8))
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
for hook in (Attention, AttentionScores):
    net = Net(hook, nnx.Rngs(0))
    expected = gradient(adapted(nnx.clone(net)), x)
    with jax.set_mesh(mesh):
        nnx.update(net, jax.tree.map(lambda a: place(a, "model", None), nnx.state(net)))
        found = gradient(adapted(net), place(x, "data", None, None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)

class Placed(nnx.Module):  # whose call has the positions, which are cut as the rows are
    def __init__(self, rngs):
        self.query, self.key, self.value = (nnx.LinearGeneral(8, (2, 4), rngs=rngs) for _ in range(3))
        self.attention = Attention(2)

    def __call__(self, x, positions):
        return self.attention(*(layer(x) for layer in (self.query, self.key, self.value)))

def loss_of(net, x, positions):
    with tokens(structure_ids=positions % 5) if net.encoded else contextlib.nullcontext():
        return jnp.sum(net(x, positions) ** 2)

gradient_of = nnx.jit(nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, AdapterParam)))
positions = jnp.array([[0, 1, 2, 0, 1, 900], [0, 1, 2, 3, 4, 5]])
for method in ("hylorada", "hylorada_v2", "longlora"):
    found = []
    for cut in (lambda a: a, lambda a: place(a, "data", *(None,) * (a.ndim - 1))):
        with jax.set_mesh(mesh) if found else contextlib.nullcontext():
            config = HyLoRADAConfig(
                method=method, lora_rank=2, target_modules="all-linear", s2_group_size=4, train_norms=False,
                train_embeddings=False,
            )
            net = adapt(Placed(nnx.Rngs(0)), config, nnx.Rngs(2))
            net.encoded = method == "hylorada_v2"
            nnx.update(net, jax.tree.map(lambda leaf: leaf + 0.1, nnx.state(net, AdapterParam)))
            found.append(gradient_of(net, cut(x), cut(positions)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)

class MLP(nnx.Module):  # of which the first layer has its outputs cut, the second its inputs
    def __init__(self):
        self.up, self.down = (nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in ((8, 16), (16, 8)))

    def __call__(self, x, **out):
        return self.down(jax.nn.relu(self.up(x)), **out)

def moved(net):
    net = adapted(net, "hylorada_v1")
    nnx.update(net, jax.tree.map(lambda leaf: leaf + 0.1, nnx.state(net, AdapterParam)))
    return net

def cut():
    net = MLP()
    for layer, rows, columns in ((net.up, None, "model"), (net.down, "model", None)):
        layer.kernel.set_value(place(layer.kernel[...], rows, columns))
        layer.bias.set_value(place(layer.bias[...], columns))
    return net

expected = moved(MLP())(x)
with jax.set_mesh(mesh):
    save_adapter(net := moved(cut()), sys.argv[1])
    # Merging is last, for it is done in place.
    makers = lambda: net, lambda: resolve(net), lambda: load_adapter(cut(), sys.argv[1]), lambda: merge(net)
    for made in makers:
        found = made()(place(x, "data", None, None), out_sharding=P("data", None, None))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

# An auto mesh cuts within a fused kernel too.
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
fused = nnx.Sequential(nnx.LinearGeneral(8, (3, 2, 4), rngs=nnx.Rngs(0)))
layer = fused.layers[0]
for leaf in (layer.kernel, layer.bias):
    leaf.set_value(place(leaf[...], "model", None))
cuts = lambda: [leaf[...].sharding.spec for leaf in (layer.kernel, layer.bias)]
config = HyLoRADAConfig(method="dora", target_modules="all-linear", magnitude_scales_bias=True)
before = cuts(), merge(adapt(fused, config, nnx.Rngs(2))) and cuts()
assert before[0] == before[1] == [P(None, None, "model", None), P(None, "model", None)], before

mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
    fused = nnx.List([nnx.LinearGeneral(8, (3, 2, 4), use_bias=False, rngs=nnx.Rngs(0))])
    fused[0].kernel.set_value(place(fused[0].kernel[...], "model", None))
    try:
        adapted(nnx.Sequential(*fused), "lora")
    except ModelError as error:
        print(error)
"""


def test_what_the_mesh_cuts_is_adapted_unless_it_is_within_a_fused_kernel(run_on_devices, tmp_path):
    said = run_on_devices(4, ON_FOUR_DEVICES, tmp_path / "adapter")
    assert "layers.0, float32[8,3,2@model,4]" in said
