"""Adapter files and the base that they name; that each package reads the other's, test_models.py shows."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

import hylorada_torch
from hylorada_jax import __version__
from hylorada_jax.errors import CheckpointError
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.source import find_source
from hylorada_jax.models.weights_digest import files_digest, tree_digest
from hylorada_jax.saved.adapter_files import CONFIG_NAME
from hylorada_jax.saved.saved_adapter import SavedAdapter, open_adapter
from parity_tests.families import FAMILIES, FUSED, all_in_float64, measuring, saved, torch_base
from parity_tests.models import CONFIGS, build, errors
from parity_tests.tolerances import MODEL

WITH_REFERENCE = [family for family in FAMILIES if family not in FUSED]


# The first digits of layers_sha256 and config_sha256, as files saved under transformers 4.57 have them.
SAVED = {
    "gpt2": ("e85b7fe1a7", "5c6bb3a205"),
    "llama": ("482719cd74", "172f80e5b4"),
    "qwen2": ("dd737f4025", "72869bdd21"),
    "qwen3": ("482719cd74", "8660554ce0"),
    "mistral": ("482719cd74", "f719700427"),
    "ministral": ("482719cd74", "81bd7b5ce1"),
    "mixtral": ("8d6ea81e63", "283c49227f"),
    "qwen3_moe": ("679c97301c", "6932a92fc9"),
    "qwen2_moe": ("b4760da689", "4c1994a7a7"),
    "gpt_oss": ("decdf81e7c", "a16b0291b9"),
    "phi3": ("f1326285f3", "724c584db8"),
    "granite": ("dd737f4025", "4a193c3824"),
    "olmo2": ("dd737f4025", "5e2642d01a"),
    "smollm3": ("dd737f4025", "6e4544efbc"),
    "gemma": ("482719cd74", "6f048169ea"),
    "gemma2": ("482719cd74", "bc312b9046"),
    "gemma3_text": ("482719cd74", "301cfecdf8"),
    "gemma4_text": ("dc45377ac5", "5326fb8caf"),
    "gemma4_unified_text": ("9c628ba5e4", "44360cb94a"),
    "bert": ("a2459b37b8", "2eaa76736e"),
    "t5": ("8260522d3e", "a78a618664"),
}


@pytest.mark.parametrize("family", WITH_REFERENCE)
def test_an_adapter_knows_its_base_under_every_version_of_transformers(family):
    """To be run under 4.57 and 5; the digits are file format: where they change, saved adapters are lost."""
    identity = hylorada_torch.HyLoRADAModel(FAMILIES[family](), CONFIGS["lora"])._identity
    assert (identity["layers_sha256"][:10], identity["config_sha256"][:10]) == SAVED[family]


# Of every kind of leaf, and every way from a tensor to it; the families' own names, other tests load.
# Beside transformers 5, what it alone has, and experts, which it keeps otherwise than it writes them.
LAYOUTS = ["gpt2", "qwen2", "phi3", "gemma2", "mixtral", "gpt_oss", "bert", "t5"]
if FUSED:
    LAYOUTS = ["mixtral", "gemma4_text"]


@pytest.mark.parametrize("family", LAYOUTS)
def test_weights_have_one_digest_on_disk_and_loaded(family):
    directory = saved(family, "float32").name
    found = set()
    for dtype in (jnp.float32, jnp.bfloat16):
        digest = files_digest(find_source(directory), jnp.dtype(dtype).name)
        assert digest == tree_digest(load_model(directory, dtype=dtype).params)
        found.add(digest)
    assert len(found) == 2


def test_torch_refuses_what_is_another_models(tmp_path, monkeypatch):
    with all_in_float64():
        model = hylorada_torch.HyLoRADAModel(torch_base("llama", "float64"), CONFIGS["dora"])
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / CONFIG_NAME).read_text())["hylorada_version"] == __version__
        monkeypatch.setattr(SavedAdapter, "tensors", lambda *_: pytest.fail("read"))
        with pytest.raises(CheckpointError, match="layers_sha256"):
            hylorada_torch.HyLoRADAModel.from_pretrained(torch_base("qwen2", "float64"), tmp_path)
        changed = torch_base("llama", "float64")
        changed.config.rms_norm_eps = 0.5
        with pytest.raises(CheckpointError, match="config_sha256"):
            hylorada_torch.HyLoRADAModel.from_pretrained(changed, tmp_path)
    with pytest.raises(CheckpointError, match="overwritten"):
        model.save_pretrained(tmp_path)
    whole = (tmp_path / CONFIG_NAME).read_bytes()
    (tmp_path / CONFIG_NAME).write_bytes(whole[:-20])
    with pytest.raises(CheckpointError):
        hylorada_torch.HyLoRADAModel.from_pretrained(changed, tmp_path)


def test_ranks_and_scales_of_single_layers_are_filed(tmp_path):
    """rank_pattern and alpha_pattern, as an adapter of PEFT's can have them."""
    config = dataclasses.replace(
        CONFIGS["dora"], rank_pattern={"q_proj": 5, r".*\.1\..*": 2}, alpha_pattern={"v_proj": 7.0}
    )
    with measuring("float64"):
        pair = build("qwen2", config, "float64")
        assert max(errors(pair.got(), pair.expected()).values()) <= MODEL["float64"]
        pair.model.adapters = pair.adapters
        pair.model.save_pretrained(tmp_path)
        saved = open_adapter(tmp_path)
    assert saved.config == config
    ranks = {
        key.removeprefix("model.layers."): shape[0]
        for key, shape in saved.shapes.items()
        if key.endswith("A")
    }
    assert ranks["0.self_attn.q_proj.lora_A"] == ranks["1.self_attn.q_proj.lora_A"] == 5
    assert (ranks["0.self_attn.v_proj.lora_A"], ranks["1.self_attn.v_proj.lora_A"]) == (3, 2)
    scales = {n: s for site in pair.model.sites for n, s in zip(site.names, site.scales, strict=True)}
    assert scales["model.layers.0.self_attn.v_proj"] == 7 / 3
    assert scales["model.layers.1.self_attn.k_proj"] == 4 / 3
