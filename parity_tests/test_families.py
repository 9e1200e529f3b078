"""What the files of models/families say of a family's names, against transformers' own torch model of it."""

import ast
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import TargetError
from hylorada_jax.models import families
from hylorada_jax.models.families import DECODERS, FAMILIES, is_encoder_decoder
from hylorada_jax.surgery.targets import is_head, mlp_outputs, select_targets, self_attentions

AUTO = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    None: transformers.AutoModelForMaskedLM,
}

# With the router that a family names.
MIXTURE = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8}


def built(model_type: str) -> Any:
    """transformers' model of a family, of a layer in every stack, shapes in the place of its weights."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("a family that transformers 4.57 lacks")
    # It derives as much from its depth that this comes first.
    first = {"num_hidden_layers": 1} if model_type.startswith("gemma4") else {}
    if model_type == "gemma4_text":
        first |= MIXTURE
    config = transformers.AutoConfig.for_model(model_type, **first)
    pair = FAMILIES[model_type].task == "SEQ_2_SEQ_LM"
    for depth in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, depth):
            setattr(config, depth, 1)
    if model_type == "gpt_neo":
        config.attention_types, config.attention_layers = [[["global"], 1]], ["global"]
    if model_type == "ministral":
        config.head_dim = 8  # without one its class fails
    if not pair and FAMILIES[model_type].cross_attention:
        config.is_decoder = config.add_cross_attention = True
    config.max_position_embeddings = 8  # sines are made one by one
    with torch.device("meta"):
        return AUTO[FAMILIES[model_type].task].from_config(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_of_transformers(model_type):
    family = FAMILIES[model_type]
    if not (family.decoder or hasattr(transformers, "FlaxPreTrainedModel")):
        pytest.skip("a family of the Flax classes of transformers 4.57, whose names these are")
    model = built(model_type)
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)]
    assert modules[family.embedding] is model.get_input_embeddings()
    assert modules[family.heads[0]] is model.get_output_embeddings()
    assert [name for name in names if is_head(name)] == [family.heads[0]]
    if family.relative_positions:
        assert any(name.endswith(f".{family.relative_positions}") for name in modules)

    # All families' names are looked for at once: those of another must find nothing else here.
    for role in "qkvo":
        own = [name for name in names if f".{name}".endswith(f".{getattr(family, role)}")]
        assert select_targets(names, HyLoRADAConfig(target_modules=(role,))) == own
    stacks = 2 if family.task == "SEQ_2_SEQ_LM" else 1
    assert len(self_attentions(names)) == stacks
    if family.mlp_output:
        outputs = mlp_outputs(names)
        assert len(outputs) == stacks
        assert all(f".{name}".endswith(f".{family.mlp_output}") for name in outputs)
    else:
        with pytest.raises(TargetError, match="sparse_enabled"):
            mlp_outputs(names)
    everything = select_targets(names, HyLoRADAConfig(target_modules=("all-linear",)))
    routers = [name for name in modules if family.router and name.endswith(f".{family.router}")]
    assert len(routers) == (stacks if family.router else 0)
    # gpt-oss's is no linear layer.
    assert {*names} - {*everything} == {*routers, family.heads[0]} & {*names}
    queries = [name for name in names if f".{name}".endswith(f".{family.q}")]
    assert {name.rpartition(".")[0] for name in queries} >= {*self_attentions(names)}
    if family.cross_attention:
        assert any(name.endswith(f".{family.cross_attention}") for name in modules)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_encoder_decoder_is_one_of_transformers(model_type):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("a family that transformers 4.57 lacks")
    config = transformers.CONFIG_MAPPING[model_type]()
    expected = bool(getattr(config, "is_encoder_decoder", False))
    assert is_encoder_decoder({"model_type": model_type}) == expected
    assert is_encoder_decoder(config.to_dict()) == expected
    for junk in ([], [5], {"a": 1}, "T5", 5):
        assert is_encoder_decoder({"model_type": model_type, "architectures": junk}) == expected


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoders_class_is_that_of_transformers(model_type):
    assert type(built(model_type)).__name__ == DECODERS[model_type].causal_lm


# Where these words name something else: llama.cpp's tokenizers; what versions of transformers wrote; the side
# from which transformers' torch BERT counts positions; the content of a config.json; modules of tunix.
ELSEWHERE = {
    "hylorada_jax/models/tokenizer_gguf.py",
    "hylorada_jax/nnx/peers.py",
    "hylorada_jax/planning/shapes.py",
    "hylorada_jax/saved/base_identity.py",
    "hylorada_torch/model.py",
}


def test_a_family_is_named_in_its_own_file_alone():
    root = Path(__file__).parents[1]
    naming = {
        path.relative_to(root).as_posix()
        for package in ("hylorada_jax", "hylorada_torch")
        for path in (root / package).rglob("*.py")
        if not path.name.endswith(("_test.py", "conftest.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in FAMILIES
    }
    assert {name for name in naming if not name.startswith("hylorada_jax/models/families/")} <= ELSEWHERE


def test_no_two_files_have_one_family():
    files = (
        import_module(f"{families.__name__}.{found.name}")
        for found in pkgutil.iter_modules(families.__path__)
    )
    assert len(FAMILIES) == sum(len(getattr(file, "FAMILIES", ())) for file in files)
