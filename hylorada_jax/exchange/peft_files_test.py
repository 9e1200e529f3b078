"""PEFT's files from strangers: each mutation of a small valid adapter ends at once in an error of ours."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, HyLoRADAError
from hylorada_jax.exchange.peft_files import SavedPeft, open_peft
from hylorada_jax.exchange.peft_import import check_import, import_peft
from hylorada_jax.io.files import any_path
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.saved.saved_adapter_test import CONFIG_FILES, DEEP, WEIGHTS, safetensors

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj."
TENSORS = {f"{PREFIX}lora_A.weight": np.ones((2, 8)), f"{PREFIX}lora_B.weight": np.ones((8, 2))}
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
EMBEDDING, NORM = "base_model.model.model.embed_tokens.weight", "base_model.model.model.norm.weight"


@pytest.fixture(scope="module")
def base():
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = DecoderConfig.from_hf({"model_type": "llama", "intermediate_size": 6, **sizes})
    return CausalLM.from_config(config, jax.random.key(0))


@pytest.fixture
def saved(tmp_path):
    write(tmp_path)
    return tmp_path


def write(place, tensors=TENSORS, **changes):
    settings = {key: value for key, value in (SETTINGS | changes).items() if value is not ...}
    (place / CONFIG_NAME).write_text(json.dumps(settings))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, place / WEIGHTS_NAME)


def refused(saved, base, *said):
    with pytest.raises(HyLoRADAError) as error:
        import_peft(base, saved)
    assert all(part in str(error.value) for part in said), str(error.value)
    assert len(str(error.value)) < 3000
    assert error.value.remedy


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_an_adapter_in_a_bucket_is_read_as_one_here(template, saved, base, bucket):
    if template is not None:
        (saved / "chat_template.jinja").write_text(template)
    url = f"gs://bucket/{'with' if template else 'without'}"
    for file in saved.iterdir():
        (any_path(url) / file.name).write_bytes(file.read_bytes())
    here, there = (import_peft(base, place) for place in (saved, url))
    assert there.chat_template == here.chat_template == template
    jax.tree.map(np.testing.assert_array_equal, there.adapters, here.adapters)


@pytest.mark.parametrize(("name", "fetched"), [("owner/lora", True), ("runs/owner/lora", False)])
def test_an_adapter_that_is_not_here_may_be_on_the_hub(name, fetched, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for opened in (open_peft, open_adapter):
        with pytest.raises(CheckpointError, match="no such file") as error:
            opened(name)
        assert ("hf download owner/lora --local-dir" in error.value.remedy) == fetched


def test_a_chat_template_beside_an_adapter_is_its_own(saved, base):
    assert import_peft(base, saved).chat_template is None
    template = saved / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    assert import_peft(base, saved).chat_template == "{{ messages[0].content }}"
    template.write_text("{{")
    refused(saved, base, "A chat template must be a file of jinja")


FILES = ["chat_template.jinja", CONFIG_NAME, WEIGHTS_NAME]
SECRET = "-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_followed_within_the_directory_alone(name, base, tmp_path):
    """A private text would stand in the adapter that is made of it, and be published with that."""
    theirs, private, ours = (tmp_path / each for each in ("theirs", "private", "ours"))
    theirs.mkdir()
    write(theirs)
    (theirs / "chat_template.jinja").write_text(SECRET)
    (theirs / name).rename(theirs / "elsewhere")
    (theirs / name).symlink_to("elsewhere")
    assert import_peft(base, theirs).chat_template == SECRET

    (theirs / "elsewhere").rename(private)
    (theirs / name).unlink()
    (theirs / name).symlink_to("../private")
    with pytest.raises(CheckpointError, match="must lie in its directory") as error:
        import_peft(base, theirs).save_pretrained(ours)
    assert str(error.value.received) == f"{theirs / name}, which is {private}"
    assert not [path for path in ours.rglob("*") if SECRET.encode() in path.read_bytes()]


def test_an_adapter_in_a_cache_is_read_through_its_links(saved, base):
    (saved / "chat_template.jinja").write_text("{{ messages[0].content }}")
    snapshot, blobs = saved / "models--org--name/snapshots" / ("a" * 40), saved / "models--org--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in FILES:
        (saved / name).rename(blobs / name)
        (snapshot / name).symlink_to(Path("../../blobs", name))
    assert import_peft(base, snapshot).chat_template == "{{ messages[0].content }}"


RANKS: tuple[Any, ...] = (None, 0, -1, True, 2.0, "2", [2], 2**16 + 1)
ALPHAS: tuple[Any, ...] = (None, 0, -1, True, "4", {}, 1e7)
RATES: tuple[Any, ...] = (1.0, -0.1, "0", True, [])
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": ...}, "peft_type None"),
    ({"peft_type": ["LORA"]}, "peft_type ['LORA']"),
    ({"peft_type": True}, "peft_type True"),
    *(({"r": r}, f"r: {r!r}") for r in RANKS),
    ({"r": 10**400}, "r: 1000"),
    ({"r": json.loads(DEEP)}, "r: [[["),
    ({"r": 3}, "q_proj: 2, not 3"),
    ({"r": 2**16}, "q_proj: 2, not 65536"),
    *(({"lora_alpha": a}, f"lora_alpha: {a!r}") for a in ALPHAS),
    ({"lora_alpha": float("nan")}, "lora_alpha: nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha: inf"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    *(({"lora_dropout": p}, f"lora_dropout: {p!r}") for p in RATES),
    ({"lora_dropout": float("nan")}, "lora_dropout: nan"),
    *(({key: "yes"}, f"{key}: 'yes'") for key in ("use_rslora", "use_dora", "fan_in_fan_out")),
    *(({key: 1}, f"{key}: 1") for key in ("use_rslora", "use_dora", "fan_in_fan_out")),
    *(({key: [1]}, f"{key}: [1]") for key in ("rank_pattern", "alpha_pattern")),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: {'q_proj': 0}"),
    ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern: {'q_proj': 2.5}"),
    ({"rank_pattern": {f"q{i}": 2 for i in range(2001)}}, "rank_pattern: {'q0': 2"),
    ({"rank_pattern": {"q" * 100_001: 2}}, "rank_pattern: {'qqq"),
    ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern: {'q_proj': True}"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: {'q_proj': nan}"),
    ({"rank_pattern": {"\ud83d": 0}}, "ud83d"),
    ({"\ud83d": 1}, "ud83d"),
    ({"modules_to_save": "norm"}, "modules_to_save: 'norm'"),
    ({"modules_to_save": [5]}, "modules_to_save[0]: 5"),
    ({"bias": 5}, "bias: 5"),
    ({"bias": "all"}, "bias='all'"),
    ({"init_lora_weights": 5}, "init_lora_weights: 5"),
    ({"a_thing_of_next_year": json.loads(DEEP)}, "a_thing_of_next_year=[[["),
    ({"x" * 100_000: 1}, "xxx…"),
    ({f"key{i}": 1 for i in range(3000)}, "key7=1 and 2992 more"),
    ({"format": "hylorada"}, "one of this library's"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), CHANGES, ids=range(len(CHANGES)))
def test_a_config_of_other_types_or_sizes_is_refused_by_key_and_value(changes, said, saved, base):
    write(saved, **changes)
    refused(saved, base, said)


@pytest.mark.parametrize("content", CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_config_that_is_no_object_is_refused(content, saved, base):
    (saved / CONFIG_NAME).write_bytes(content)
    refused(saved, base)


@pytest.mark.parametrize("content", [content for content, _ in WEIGHTS.values()], ids=WEIGHTS)
def test_weights_that_are_damaged_are_refused(content, saved, base):
    (saved / WEIGHTS_NAME).write_bytes(content)
    refused(saved, base)


A, B = (f"{PREFIX}lora_{leaf}.weight" for leaf in "AB")
FLOAT8 = np.ones((2, 8), ml_dtypes.float8_e4m3fn)
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({A: None}, "unexpected model.layers.0.self_attn.q_proj.lora_B"),
    ({A: None, B: None}, "none in"),
    ({B: None}, "missing model.layers.0.self_attn.q_proj.lora_B"),
    ({A: np.ones((2, 7))}, "lora_A (2, 7) for (2, 8)"),
    ({A: np.ones(2)}, "lora_A (2,) for (2, 8)"),
    ({A: np.ones(())}, "q_proj: 0, not 2"),
    ({A: np.ones((0, 8))}, "q_proj: 0, not 2"),
    ({B: np.ones((2, 8))}, "lora_B (2, 8) for (8, 2)"),
    ({A: np.full((2, 8), np.nan)}, "finite"),
    ({A: np.ones((2, 8), np.int32)}, f"{A} I32"),
    ({f"{PREFIX}lora_magnitude_vector": np.ones(8)}, "unexpected model.layers.0.self_attn.q_proj.magnitude"),
    ({f"{PREFIX}lora_A": np.ones((2, 8))}, "lora_A"),
    ({A.replace("layers.0", "layers.1"): np.ones((2, 8))}, "model.layers.1.self_attn.q_proj"),
    ({A.removeprefix("base_model.model."): np.ones((2, 8))}, "once"),
    ({EMBEDDING: np.ones((12, 8))}, "resize_token_embeddings(12)"),
    ({EMBEDDING: np.ones(())}, "model.embed_tokens.weight () for (11, 8)"),
    ({"base_model.model.lm_head.weight": np.ones((0, 8))}, "lm_head.weight (0, 8) for (11, 8)"),
    ({NORM: np.ones((8, 8))}, "model.norm.weight (8, 8) for (8,)"),
    ({"base_model.model.other.weight": np.ones(8)}, "other.weight"),
    ({"base_model.model..weight": np.ones(8)}, ".weight"),
    ({"x" * 100_000: np.ones(8)}, "xxx"),
]


@pytest.mark.parametrize(("changes", "said"), OTHERS, ids=range(len(OTHERS)))
def test_other_tensors_than_the_config_and_the_base_call_for_are_refused(changes, said, saved, base):
    write(saved, TENSORS | changes)
    refused(saved, base, said)


def test_float8_is_refused(saved, base):
    header = {A: {"dtype": "F8_E4M3", "shape": [2, 8], "data_offsets": [0, 16]}}
    (saved / WEIGHTS_NAME).write_bytes(safetensors(header, b"\0" * 16))
    refused(saved, base, f"{A} F8_E4M3")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_what_is_no_file_is_refused(name, saved, base):
    (saved / name).unlink()
    refused(saved, base, name)
    os.mkfifo(saved / name)
    refused(saved, base, name)
    (saved / name).unlink()
    (saved / name).mkdir()
    refused(saved, base, name)


def test_tensors_that_do_not_fit_are_not_read(saved, base, monkeypatch):
    """One of 8 GiB, which takes no place on the disk."""
    header = {A: {"dtype": "F32", "shape": [2**28, 8], "data_offsets": [0, 2**33]}}
    (saved / WEIGHTS_NAME).write_bytes(safetensors(header, b""))
    os.truncate(saved / WEIGHTS_NAME, (saved / WEIGHTS_NAME).stat().st_size + 2**33)
    monkeypatch.setattr(SavedPeft, "tensors", lambda *_: pytest.fail("read"))
    refused(saved, base, "268435456, not 2")


def test_what_peft_writes_as_null_says_nothing(saved, base):
    null = dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights"))
    write(saved, **null, lora_dropout=None, use_dora=None, layers_to_transform=None, next_year=None)
    model = import_peft(base, saved)
    assert model.config == HyLoRADAConfig(method="lora", lora_rank=2, lora_alpha=4, target_modules="q_proj")
    check_import(open_peft(saved), base, None)
