"""Every setting of peft's LoraConfig: read with peft's own logits, or refused with a remedy that works."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from hylorada_jax.errors import CheckpointError, ConfigError, HyLoRADAError
from hylorada_jax.exchange import peft_files
from hylorada_jax.exchange.peft_import import import_peft
from hylorada_jax.models.loading import load_model
from hylorada_jax.saved.adapter_files import CONFIG_NAME
from parity_tests.families import all_in_float64, jax_base, measuring, torch_base
from parity_tests.models import draw_inputs, torch_inputs
from parity_tests.test_peft_files import change, jax_logits
from parity_tests.tolerances import relative_error

# Of logits, relative, in float32: PiSSA, OLoRA and MiCA start from it alone.
LOGITS = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def base_of(family: str, rows: int | None = None) -> Any:
    """A fresh torch model in float32, perhaps with a vocabulary of another size."""
    with all_in_float64():
        base = torch_base(family, "float32")
    base = base.float()
    if rows is not None:
        base.resize_token_embeddings(rows)
    return base


def trained(family: str, *touched: str, rows: int | None = None, **options: Any) -> Any:
    """A peft model with random numbers in all that it trains, and in the parameters whose names are given."""
    torch.manual_seed(3)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}
    return randomise(get_peft_model(base_of(family, rows), LoraConfig(**settings)).eval(), *touched)


def randomise(model: Any, *touched: str) -> Any:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or any(part in name for part in touched):
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def logits(model: Any, family: str) -> np.ndarray:
    inputs = torch_inputs(draw_inputs(family))
    labels = inputs.pop("labels")
    with torch.no_grad():
        return model(**inputs).logits[labels >= 0].numpy()


def assert_read(family: str, adapter: Path, expected: np.ndarray, base: Any = None) -> Any:
    with measuring("float32"):
        model = import_peft(jax_base(family, "float32") if base is None else base, adapter)
        assert relative_error(jax_logits(model, family), expected) <= LOGITS
    return model


def refusal(family: str, adapter: Path) -> HyLoRADAError:
    with measuring("float32"), pytest.raises((CheckpointError, ConfigError)) as caught:
        import_peft(jax_base(family, "float32"), adapter)
    return caught.value


READ: dict[str, dict[str, Any]] = {
    **{
        f"start {start}": {"init_lora_weights": start}
        for start in (True, False, "Gaussian", "orthogonal", "mica")
    },
    "velora": {"velora_config": VeloraConfig(num_groups=2)},
    "excluded": {"exclude_modules": ["v_proj"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 1},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "embeddings, tying asked for": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("case", READ)
def test_what_our_adapters_can_express_is_read(case, tmp_path):
    model = trained("llama", **READ[case])
    model.save_pretrained(tmp_path)
    change(tmp_path, **dict.fromkeys(("loftq_config", "rank_pattern", "lora_dropout", "bias")))
    assert_read("llama", tmp_path, logits(model, "llama"))


def test_norms_named_by_their_ending_train_also_from_where_they_are(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])
    model = get_peft_model(base_of("llama"), config).eval()
    model.save_pretrained(tmp_path)
    assert assert_read("llama", tmp_path, logits(model, "llama")).config.train_norms


@pytest.mark.parametrize("adjusted", [True, False])
def test_eva_is_read_with_the_ranks_it_has_given_out(adjusted, tmp_path):
    eva = EvaConfig(rho=2.0, adjust_scaling_factors=adjusted)
    targets = ["q_proj", "o_proj", "down_proj"]
    model = trained("llama", target_modules=targets, init_lora_weights="eva", eva_config=eva)
    ids = torch.from_numpy(draw_inputs("llama")["input_ids"]).long()
    initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 20)
    randomise(model).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert settings["init_lora_weights"] == "eva"
    assert settings["eva_config"]["rho"] == 2.0
    assert settings["rank_pattern"]
    assert_read("llama", tmp_path, logits(model, "llama"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_taken_out_of_the_base_is_refused_and_reads_once_converted(start, tmp_path):
    torch.manual_seed(3)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "init_lora_weights": start}
    model = get_peft_model(base_of("llama"), LoraConfig(**options)).eval()
    model.save_pretrained(tmp_path / "before")
    randomise(model).save_pretrained(tmp_path / "after")
    error = refusal("llama", tmp_path / "after")
    assert f"init_lora_weights='{start}'" in str(error)
    assert "path_initial_model_for_weight_conversion" in error.remedy
    expected = logits(model, "llama")
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before")
    )
    assert_read("llama", tmp_path / "converted", expected)
    assert merges(model, expected)


# Of these peft merges a model that computes the same, and of the next none.
MERGEABLE: dict[str, dict[str, Any]] = {
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "trainable_token_indices": {"trainable_token_indices": [1, 65]},
    "kasa_config": {"kasa_config": KasaConfig()},
    "monteclora_config": {"monteclora_config": MontecloraConfig()},
    "use_bdlora": {"use_bdlora": BdLoraConfig(["q_proj"], ["v_proj"], nblocks=2)},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
}
UNMERGEABLE: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
}


@pytest.mark.parametrize("setting", [*MERGEABLE, *UNMERGEABLE])
def test_what_our_adapters_cannot_express_is_refused_by_name_with_a_remedy(setting, tmp_path):
    model = trained("llama", **(MERGEABLE | UNMERGEABLE)[setting])
    model.save_pretrained(tmp_path)
    error = refusal("llama", tmp_path)
    assert setting in str(error)
    expected = logits(model, "llama")
    assert ("merge_and_unload" in error.remedy) == (setting in MERGEABLE)
    assert merges(model, expected) == (setting in MERGEABLE)
    assert "without" in error.remedy


def merges(model: Any, expected: np.ndarray) -> bool:
    """Whether peft merges the model, and into one that computes the same."""
    try:
        return relative_error(logits(model.merge_and_unload(), "llama"), expected) <= LOGITS
    except NotImplementedError:
        return False


def test_an_adapted_embedding_is_refused(tmp_path):
    model = trained("llama", target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path)  # with embed_tokens.base_layer.weight, by itself
    error = refusal("llama", tmp_path)
    assert "lora_embedding_A" in str(error)
    assert merges(model, logits(model, "llama"))


REFUSED_STARTS = {
    "corda": {},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "lora_ga": {},
    "of next year": {},
}


@pytest.mark.parametrize("start", REFUSED_STARTS)
def test_other_starts_are_refused_by_name(start, tmp_path):
    trained("llama").save_pretrained(tmp_path)
    change(tmp_path, init_lora_weights=start, **REFUSED_STARTS[start])
    error = refusal("llama", tmp_path)
    assert f"received: init_lora_weights='{start}'\n" in str(error)
    assert "merge_and_unload" in error.remedy


def test_every_setting_of_pefts_has_been_decided():
    read = peft_files._Settings.__struct_fields__
    known = {*read, *peft_files._IDLE, *peft_files._UNMERGEABLE, *MERGEABLE}
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


# Both embeddings, as peft saves them by itself: the names that are touched, the options, the base's rows, and
# whether they read as embeddings to train on; None where the head must go into a base first.
EMBEDDINGS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], int | None, bool | None]] = {
    "untouched": ("llama", (), {}, None, False),
    "untouched, tied": ("qwen2", (), {}, None, False),
    "the input trained": ("llama", ("embed_tokens",), {}, None, True),
    "the head trained": ("llama", ("lm_head",), {}, None, None),
    "the head of modules_to_save": ("llama", (), {"modules_to_save": ["lm_head"]}, None, None),
    "both of modules_to_save": ("llama", (), {"modules_to_save": ["embed_tokens", "lm_head"]}, None, None),
    "a larger vocabulary": ("llama", ("embed_tokens", "lm_head"), {}, 140, None),
    "a larger vocabulary, tied": ("qwen2", ("embed_tokens",), {}, 140, None),
    "the input alone of a tied pair": ("qwen2", (), {"modules_to_save": ["embed_tokens"]}, None, None),
    "some norms": ("llama", (), {"modules_to_save": ["input_layernorm"]}, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_both_embeddings_are_read_or_the_remedy_works(case, tmp_path):
    family, touched, options, rows, trains = EMBEDDINGS[case]
    model = trained(family, *touched, rows=rows, **options)
    expected, adapter = logits(model, family), tmp_path / "adapter"
    model.save_pretrained(adapter, save_embedding_layers=True if "modules_to_save" not in options else "auto")
    if trains is not None:
        assert assert_read(family, adapter, expected).config.train_embeddings == trains
        return
    error = refusal(family, adapter)
    assert "unload()" in error.remedy
    assert ("tie_word_embeddings = False" in error.remedy) == (case == "the input alone of a tied pair")
    assert (f"resize_token_embeddings({rows})" in error.remedy) == (rows is not None)
    base = PeftModel.from_pretrained(base_of(family, rows), adapter).unload()
    if "tie_word_embeddings" in error.remedy:
        base.config.tie_word_embeddings = False
    base.save_pretrained(tmp_path / "base")
    with measuring("float32"):
        assert_read(family, adapter, expected, load_model(tmp_path / "base"))
