import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import subjaxprs
from jax.interpreters.partial_eval import dce_jaxpr

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math import attention
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.layer_loops import REMAT_POLICIES
from hylorada_jax.planning.programs import base_of_shapes, model_of_shapes

RANK, LAYERS, ROWS, LENGTH = 2, 3, 2, 23
DENSE = {
    "model_type": "qwen2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {
    **DENSE, "model_type": "qwen3_moe",
    "moe_intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip
ATTENTION = {"q": 64, "k": 32, "v": 32, "o": 32}
# Of a row for each of a token's two experts.
WIDTHS = {
    "qwen2": {**ATTENTION, "gate": 48, "up": 48, "down": 32},
    "qwen3_moe": {**ATTENTION, "router": 5, "gate": 2 * 12, "up": 2 * 12, "down": 2 * 32},
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def of(remat, method, shape, base_dtype=None, batch=(ROWS, LENGTH), **options):
    config = HyLoRADAConfig(method=method, lora_rank=RANK, lora_dropout=0.1, **options)
    model = model_of_shapes(base_of_shapes(DecoderConfig.from_hf(shape), base_dtype), config)
    model = model.with_remat(remat)
    arguments = model.adapters, model.frozen, jax.ShapeDtypeStruct(batch, jnp.int32)

    def loss(adapters, frozen, ids):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(adapters, ids, frozen=frozen, train=True, rngs=rngs).logits.sum()

    return loss, arguments


def kept(loss, arguments):
    """How many numbers of each token every layer keeps, array by array, and the bytes of all of them."""
    tokens = LAYERS * arguments[-1].size
    pull = jax.eval_shape(lambda adapters, *more: jax.vjp(lambda a: loss(a, *more), adapters)[1], *arguments)
    arrays = [
        leaf for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (LAYERS,) and leaf.size % tokens == 0
    ]
    widths = sorted(leaf.size // tokens for leaf in arrays)
    return widths, sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)


def counted(counts, loss, arguments):
    """How many operations of the gradient's program are such."""

    def count(jaxpr):
        jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as compilers do, but for a kernel
        read = {id(v) for v in [*jaxpr.outvars, *(v for each in jaxpr.eqns for v in each.invars)]}
        live = [
            e
            for e in jaxpr.eqns
            if e.primitive.name != "pallas_call" or not read.isdisjoint(map(id, e.outvars))
        ]
        return sum(map(counts, live)) + sum(map(count, subjaxprs(jaxpr.replace(eqns=live))))

    return count(jax.make_jaxpr(jax.grad(loss))(*arguments).jaxpr)


def products_with_weights(loss, arguments):
    """How many products of the gradient's program read a linear layer's kernel, of the base."""
    kernels = {
        leaf.shape[-2:]
        for path, leaf in jax.tree_util.tree_leaves_with_path(arguments[1])
        if "_proj" in jax.tree_util.keystr(path) and min(leaf.shape[-2:], default=0) > RANK
    }
    kernels |= {shape[::-1] for shape in kernels}

    def reads_one(each):
        return "dot" in each.primitive.name and any(v.aval.shape[-2:] in kernels for v in each.invars)

    return counted(reads_one, loss, arguments)


@pytest.mark.parametrize(
    ("method", "targets", "shape", "base_dtype"),
    [
        ("lora", ("q_proj", "v_proj"), DENSE, None),
        ("lora", ALL, DENSE, None),
        ("dora", ALL, DENSE, "int8"),
        ("hylorada_v1", ALL, EXPERTS, None),
    ],
    ids=["lora-some", "lora", "dora-int8", "hylorada_v1-experts"],
)
def test_dots_keeps_what_each_linear_layer_gives_once(method, targets, shape, base_dtype):
    found, products = {}, {}
    for remat in REMAT_POLICIES:
        given = of(remat, method, shape, base_dtype, target_modules=targets)
        found[remat], products[remat] = kept(*given), products_with_weights(*given)
    widths = dict(WIDTHS[shape["model_type"]])
    if targets is ALL:
        widths["attention"] = 64  # o's adapter reads it; where all logits are there, attention does not
    if shape is DENSE and method == "lora":
        del widths["down"]  # it is added to the stream, and neither derivative reads it
    stream = 32
    assert found["full"][0] == [stream]
    assert found["dots"][0] == sorted([stream, *widths.values()])
    in_bfloat16 = 2 * LAYERS * ROWS * LENGTH * (stream + sum(widths.values()))
    assert found["dots"][1] == in_bfloat16 < 0.7 * found["none"][1]
    assert products["dots"] == products["none"] < products["full"]


@pytest.mark.parametrize("name", ["splash", "distance", "blockwise"])
def test_dots_keeps_what_attention_gives(name, monkeypatch):
    # Nothing is compiled or run, so the kernels for TPUs can be traced here.
    chosen = attention.IMPLEMENTATIONS[name]._replace(suits=lambda query, key: True)
    monkeypatch.setattr(attention, "IMPLEMENTATIONS", {name: chosen})
    found, exponentials = {}, {}
    for remat in ("none", "dots"):
        given = of(remat, "lora", DENSE, batch=(7, 256), target_modules=ALL)
        found[remat], _ = kept(*given)
        exponentials[remat] = counted(lambda each: each.primitive.name == "exp", *given)
    widths = [32, *WIDTHS["qwen2"].values(), 64]
    widths.remove(32)  # down's, as above
    sums = [4] if name != "blockwise" else [1, 4]  # by head; and whether a query sees a key
    assert found["dots"] == sorted([*widths, *sums])
    assert exponentials["dots"] == exponentials["none"]
