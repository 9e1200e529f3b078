"""The text part of multimodal checkpoints, against transformers' torch models of the whole ones."""

import functools
import json
import tempfile
from pathlib import Path
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
from hylorada_jax.io import hub
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


def whole(model_type: str, text_tied: bool | None = None, whole_tied: bool | None = None) -> Any:
    """A multimodal torch model around the registered text model; None: as transformers has it by itself."""
    text = FAMILIES["gemma3_text" if model_type == "gemma3" else "mistral"]().config
    if text_tied is not None:
        text.tie_word_embeddings = text_tied
    said = {"text_config": text} | ({} if whole_tied is None else {"tie_word_embeddings": whole_tied})
    if model_type == "gemma3":
        config = transformers.Gemma3Config(**said, vision_config=VISION, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    config = transformers.Mistral3Config(**said, vision_config=VISION | {"head_dim": 4})
    return transformers.Mistral3ForConditionalGeneration(config)


@functools.cache
def saved(model_type: str, original: bool = True) -> tempfile.TemporaryDirectory[str]:
    """Its files, under the names that the Hub's have, or under those of its modules."""
    torch.manual_seed(0)
    directory = tempfile.TemporaryDirectory()
    untied = {"mistral3": False, "gemma3": None}[model_type]
    model = randomise(whole(model_type, whole_tied=untied)).to(torch.float64)
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


def check_head(files: Path, theirs: Any) -> None:
    """Asserts that our head and embedding are torch's, which are one or two."""
    model = load_model(files)
    embedding, head = theirs.get_input_embeddings().weight, theirs.lm_head.weight
    assert model.config.tie_word_embeddings == (embedding is head)
    assert empty_model(files).config == model.config
    owners = {"lm_head": head} if embedding is not head else {}
    for owner, weight in {"embed_tokens": embedding, **owners}.items():
        params = model.params["model"][owner] if owner == "embed_tokens" else model.params[owner]
        np.testing.assert_array_equal(params["embedding"], weight.detach().numpy())


@pytest.mark.parametrize("whole_tied", [None, True, False])
@pytest.mark.parametrize("text_tied", [None, True, False])
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_a_head_is_tied_as_in_the_model_that_was_saved(model_type, text_tied, whole_tied, tmp_path):
    """Transformers 4 goes by text_config's key, and 5 by that of the whole, which it always writes."""
    theirs = randomise(whole(model_type, text_tied, whole_tied))
    theirs.save_pretrained(tmp_path)
    check_head(tmp_path, theirs)


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_a_head_of_its_own_stays_so_where_the_other_version_saves_it_again(model_type, tmp_path):
    """Transformers 4 says nothing of an untied head outside of text_config; 5 then adds that it is tied."""
    first, second = tmp_path / "first", tmp_path / "second"
    randomise(whole(model_type, text_tied=False, whole_tied=False)).save_pretrained(first)
    config = json.loads((first / "config.json").read_text())
    del config["tie_word_embeddings"]
    (first / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForImageTextToText.from_pretrained(first)
    again.save_pretrained(second)
    for changes in ({}, {"tie_word_embeddings": True}):  # the latter as 5 writes it, whichever is here
        config = json.loads((second / "config.json").read_text()) | changes
        (second / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoModelForImageTextToText.from_pretrained(second)
        assert theirs.lm_head.weight is not theirs.get_input_embeddings().weight
        check_head(second, theirs)


def test_weights_that_are_fetched_later_say_whether_a_head_is_tied(tmp_path, monkeypatch):
    """Of a model on the Hub the config is there first."""
    config, complete = tmp_path / "config", tmp_path / "complete"
    theirs = randomise(whole("gemma3"))
    theirs.save_pretrained(complete)
    said = json.loads((complete / "config.json").read_text()) | {"tie_word_embeddings": False}
    (complete / "config.json").write_text(json.dumps(said))
    config.mkdir()
    (config / "config.json").write_text(json.dumps(said))
    places = {False: config, True: complete}
    monkeypatch.setattr(hub, "fetch", lambda name, patterns: places["model.safetensors" in patterns])
    assert not empty_model("org/name").config.tie_word_embeddings
    assert load_model("org/name").config.tie_word_embeddings


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
    ({"tie_word_embeddings": []}, "tie_word_embeddings"),
    ({"text_config": {"tie_word_embeddings": 0}}, "tie_word_embeddings"),
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
