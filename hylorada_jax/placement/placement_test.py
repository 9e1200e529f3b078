"""Oracle: the table of rules, written out for one model."""

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM, param_shapes
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.placed import fitted
from hylorada_jax.placement.axes import AXES, mesh_sizes
from hylorada_jax.placement.placement import RULES, Placement, check_processes, parse_mesh, specs_of
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer
from hylorada_jax.training.step import init_state

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    base = CausalLM.from_config(DecoderConfig.from_hf(SHAPE), jax.random.key(0))
    config = HyLoRADAConfig(method="hylorada", lora_rank=8, sparse_enabled=True, sparse_adapter_dim=8)
    return HyLoRADAModel(base, config)


@pytest.mark.parametrize(
    "rows",
    [
        [[0, 0], [0, 1], [1, 1]],  # two processes of three devices, tensor=2
        [[0], [0], [1]],
        [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 2]],
    ],
)
def test_processes_that_share_some_of_their_rows_are_refused(rows):
    with pytest.raises(ConfigError, match=r"part 1: processes \[0"):
        check_processes(rows)
    check_processes([[process] for process in (0, 0, 1, 1)])
    check_processes([[0, 1], [0, 1], [2, 3], [2, 3]])


def specs(tree):
    """{end of a path: spec}, of the first layers that have it."""
    return {"/".join(path[-2:]): spec for path, spec in flatten_dict(specs_of(tree, RULES, SIZES)).items()}


def test_weights_are_cut_by_their_role_and_never_along_depth(model):
    into, out_of = P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp")
    assert specs(model.base.params) == {
        "embed_tokens/embedding": P("tensor", "fsdp"),
        "lm_head/embedding": P("tensor", "fsdp"),
        **{f"{name}_proj/kernel": into for name in ("q", "k", "v", "gate", "up")},
        **{f"{name}_proj/kernel": out_of for name in ("o", "down")},
        **dict.fromkeys(
            ["input_layernorm/scale", "post_attention_layernorm/scale", "norm/scale"],
            P(),
        ),
    }


def test_where_heads_are_not_known_none_is_cut():
    kernels = {f"{name}_proj": {"kernel": jax.ShapeDtypeStruct((8, 8), "float32")} for name in "qkv"}
    rules = fitted(Placement(parse_mesh()), object()).rules  # as of Hugging Face's BART and OPT
    assert specs_of(kernels, rules, SIZES) == {name: {"kernel": P("fsdp")} for name in kernels}


def test_gemma4s_tables_are_cut_as_embeddings_and_the_layers_around_them_along_their_inputs():
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8}
    shape |= {"vocab_size": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 8}
    config = DecoderConfig.from_hf(shape | {"model_type": "gemma4_text", "num_hidden_layers": 2})
    found = specs(param_shapes(config, "float32"))
    assert found["embed_tokens_per_layer/embedding"] == P("tensor", "fsdp")
    around = {path: spec for path, spec in found.items() if "per_layer_" in path and "kernel" in path}
    assert len(around) == 3
    assert {axis for spec in around.values() for axis in spec} == {None, "fsdp"}


def test_adapters_are_cut_by_rules_of_their_own(model):
    last, first = P(None, None, "fsdp"), P(None, "fsdp")
    cut = {"lora_A": last, "lora_B": first, "down": last, "up": first}
    for path, spec in specs(model.adapters).items():
        assert spec == cut.get(path.split("/")[-1], P()), path
    assert cut.keys() < {path.split("/")[-1] for path in specs(model.adapters)}


def test_an_optimizers_state_lies_as_its_leaf(model):
    optimizer = make_optimizer(model.adapters, TrainingConfig(output="run"), model.config)
    state = specs_of(init_state(model.adapters, optimizer), RULES, SIZES)
    of_leaf = jax.tree.leaves(state.adapters)
    moments = [
        (path, spec)
        for path, spec in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if any(getattr(key, "name", None) in ("mu", "nu") for key in path)
    ]
    assert len(moments) == 2 * len(of_leaf)
    assert sorted(map(str, of_leaf * 2)) == sorted(str(spec) for _, spec in moments)


def test_what_does_not_divide_stays_whole_and_is_listed():
    tree = {
        "q_proj": {
            "kernel": jax.ShapeDtypeStruct((6, 8), "float32"),
            "lora_A": jax.ShapeDtypeStruct((2, 10), "float32"),
        }
    }
    assert specs(tree) == {"q_proj/kernel": P(None, "tensor"), "q_proj/lora_A": P()}


@pytest.mark.parametrize(
    "rule",
    [
        ("kernel", (None, "fsdp", None)),  # the depth of stacked layers, it may be
        ("kernel", ("model", None)),
        ("kernel", ("fsdp", "fsdp")),
        ("kernel", (("data", "fsdp"), "data")),
        ("kernel", "fsdp"),
        ("(kernel", ("fsdp", None)),
        ("kernel", 1),
        ("kernel",),
        None,
    ],
)
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(ConfigError, match="stacked layers are never cut"):
        Placement(parse_mesh(), (*RULES, rule))
    Placement(parse_mesh(), ((".*", (("data", "fsdp"), "tensor")), *RULES))


def test_a_mesh_of_explicit_axes_is_refused():
    with pytest.raises(ConfigError, match=r"fsdp of AxisType\.Explicit(.|\n)*parse_mesh"):
        Placement(jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 3))


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", {"data": 16, "fsdp": 1, "tensor": 1}),
        ("fsdp=8,tensor=2", {"data": 1, "fsdp": 8, "tensor": 2}),
        (" tensor = 4 ", {"data": 4, "fsdp": 1, "tensor": 4}),
        ("data=2,fsdp=8", {"data": 2, "fsdp": 8, "tensor": 1}),
    ],
)
def test_what_is_left_of_the_devices_goes_to_data(text, sizes):
    assert mesh_sizes(text, 16) == sizes


@pytest.mark.parametrize(
    "text",
    ["fsdp", "fsdp=", "fsdp=0", "fsdp=-2", "fsdp=2,fsdp=2", "model=2", "fsdp=2.5", "fsdp=2,", "=", "fsdp=²"],
)
def test_a_mesh_that_is_none_is_refused_with_the_settings(text):
    with pytest.raises(ConfigError, match="sizes of the axes data, fsdp, tensor"):
        TrainingConfig(output="run", mesh=text)


@pytest.mark.parametrize("text", ["fsdp=3", "fsdp=32", "data=2,fsdp=4"])
def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused(text):
    with pytest.raises(ConfigError, match="on 16 devices"):
        mesh_sizes(text, 16)


def test_on_the_only_device_nothing_is_copied(model):
    kernel = lambda tree: tree["model"]["embed_tokens"]["embedding"]
    put = Placement(parse_mesh()).put(model.base.params)
    assert kernel(put).unsafe_buffer_pointer() == kernel(model.base.params).unsafe_buffer_pointer()


@pytest.mark.parametrize(("batch", "microbatches"), [(4, 1), (8, 2), (12, 3)])
def test_rows_that_do_not_divide_are_refused_with_what_would_do(batch, microbatches):
    placement: Any = SimpleNamespace(rows=8)
    check = functools.partial(Placement.check_rows, placement)
    with pytest.raises(ConfigError, match="must divide batch_size / microbatches") as error:
        check(batch, microbatches)
    multiple = int(re.findall(r"multiple of (\d+)", error.value.remedy)[0])
    check(multiple, microbatches)
    try:
        check(batch, 1)
        does = True
    except ConfigError:
        does = False
    assert ("fewer microbatches" in error.value.remedy) == does
