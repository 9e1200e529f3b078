"""The text part of multimodal checkpoints, against transformers' torch models of the whole ones."""

import functools
import json
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from hylorada_jax import terminal
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.exchange.merged import write_merged
from hylorada_jax.exchange.peft_export import export_peft
from hylorada_jax.exchange.peft_import import import_peft
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import empty_model, load_model
from hylorada_jax.surgery import layout
from parity_tests.families import FAMILIES, VOCAB, all_in_float64, measuring
from parity_tests.hf_weights import randomise
from parity_tests.models import SPREAD
from parity_tests.tolerances import MODEL, relative_error

VISION: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
CONFIG = HyLoRADAConfig(method="lora", lora_rank=4, rank_strategy="decreasing", train_norms=True)
IDS = np.random.default_rng(2).integers(VOCAB, size=(2, 9))


def whole(model_type: str) -> Any:
    """A multimodal torch model around the registered text model."""
    if model_type == "gemma3":
        text = FAMILIES["gemma3_text"]().config
        config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    config = transformers.Mistral3Config(
        text_config=FAMILIES["mistral"]().config, vision_config=VISION | {"head_dim": 4},
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Mistral3ForConditionalGeneration(config)


@functools.cache
def saved(model_type: str, original: bool = True) -> tempfile.TemporaryDirectory[str]:
    """Its files, under the names that the Hub's have, or under those of its modules."""
    torch.manual_seed(0)
    directory = tempfile.TemporaryDirectory()
    model = randomise(whole(model_type)).to(torch.float64)
    model.save_pretrained(directory.name, save_original_format=original)
    return directory


def torch_whole(files: str) -> Any:
    with all_in_float64():
        return transformers.AutoModelForImageTextToText.from_pretrained(files, dtype=torch.float64).eval()


def torch_logits(model: Any) -> np.ndarray:
    with all_in_float64(), torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(
    ("model_type", "original"), [("gemma3", True), ("gemma3", False), ("mistral3", True), ("mistral3", False)]
)
def test_the_text_part_is_taken_and_said(model_type, original, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_said", set())
    directory = saved(model_type, original).name
    capsys.readouterr()  # transformers 5 shows how it writes
    with measuring("float64"):
        model = load_model(directory, dtype="float64")
        got = np.asarray(model(jnp.asarray(IDS)).logits)
    text = {"gemma3": "gemma3_text", "mistral3": "mistral"}[model_type]
    assert capsys.readouterr().err == f"model {directory}: the text part alone, {text} of {model_type}\n"
    assert relative_error(got, torch_logits(torch_whole(directory))) <= MODEL["float64"]


def test_adapters_of_the_text_part_go_to_peft_and_back_and_are_merged(tmp_path):
    files = saved("gemma3").name
    with measuring("float64"):
        model = HyLoRADAModel(load_model(files, dtype="float64"), CONFIG)
        rng = np.random.default_rng(1)
        leaves = layout.flatten(model.sites, model.adapters)
        leaves = {name: leaf + SPREAD * rng.normal(size=leaf.shape) for name, leaf in leaves.items()}
        model.adapters = layout.unflatten(model.sites, leaves)
        got = np.asarray(model(jnp.asarray(IDS)).logits)
        export_peft(model, tmp_path / "peft")
        back = import_peft(model.base, tmp_path / "peft")
        for name, leaf in layout.flatten(back.sites, back.adapters).items():
            np.testing.assert_array_equal(leaf, leaves[name])
        model.save_pretrained(tmp_path / "adapter")
        write_merged(files, tmp_path / "adapter", tmp_path / "merged")
    peft = PeftModel.from_pretrained(torch_whole(files), tmp_path / "peft").double()
    assert not [name for name, _ in peft.named_modules() if "lora" in name and "language_model" not in name]
    assert relative_error(torch_logits(peft), got) <= 1e-9
    with all_in_float64():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    assert type(merged).__name__ == "Gemma3ForCausalLM"
    assert relative_error(torch_logits(merged.eval()), got) <= 1e-9


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen2_vl"}, "qwen2_vl"),
    ({"text_config": {"model_type": "ministral3"}, "model_type": "mistral3"}, "ministral3"),
    ({"text_config": 3}, "text_config"),
    ({"text_config": ...}, "text_config"),
    ({"text_config": {"final_logit_softcapping": 30.0}}, "final_logit_softcapping"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=lambda part: str(part)[:40])
def test_other_multimodal_models_are_refused_by_name(changes, named, tmp_path):
    config = {"model_type": "gemma3", "text_config": {}, "vision_config": {}} | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        empty_model(tmp_path)
    assert named in f"{caught.value.rule} {caught.value.received}"
