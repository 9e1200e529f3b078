"""A stranger's directory may link to anything; what is read lies in it, or in the Hub's cache."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from hylorada_jax.errors import ModelError
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.inside import file_inside, files_inside
from hylorada_jax.models.source import SMALL_FILES, find_source

INDEX = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
FILES = {
    "config.json": json.dumps({"model_type": "llama"}),
    "generation_config.json": json.dumps({"eos_token_id": 7}),
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/rag.jinja": "{{ messages }}",
    "model.safetensors.index.json": json.dumps(INDEX),
    "model-1.safetensors": "",
    "model-2.safetensors": "",
}


def make_directory(path: Path) -> Path:
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


def read(path: Path) -> set[str]:
    """Reads all that the loader and merging read, and gives its names."""
    source = find_source(path)
    end_tokens(source)
    files = [*source.weights, *files_inside(path, *SMALL_FILES)]
    return {"config.json", "model.safetensors.index.json", *(str(file.relative_to(path)) for file in files)}


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leads_outside_is_refused(tmp_path, name, relative):
    path, private = make_directory(tmp_path / "m"), tmp_path / "private"
    private.write_text(FILES[name])
    assert read(path) == FILES.keys()
    (path / name).unlink()
    up = Path(*[".."] * (1 + name.count("/")))
    (path / name).symlink_to(up / "private" if relative else private)
    with pytest.raises(ModelError, match=f"must lie in its directory[\\s\\S]*{name}, which is .*private"):
        read(path)


def test_a_directory_that_leads_outside_is_refused(tmp_path):
    path, private = make_directory(tmp_path / "m"), tmp_path / "private"
    shutil.move(path / "additional_chat_templates", private)
    (path / "additional_chat_templates").symlink_to(private)
    with pytest.raises(ModelError, match=r"rag\.jinja"):
        read(path)


def test_a_link_to_a_gguf_or_to_weights_of_another_name_is_refused(tmp_path):
    (tmp_path / "private").write_bytes(b"GGUF")
    for name in ("m.gguf", "other.safetensors"):
        path = tmp_path / name.replace(".", "-")
        path.mkdir()
        (path / name).symlink_to(tmp_path / "private")
        if name == "other.safetensors":
            (path / "config.json").write_text("{}")
        with pytest.raises(ModelError, match="must lie in its directory"):
            find_source(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model-2.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch, kind, name):
    path = make_directory(tmp_path / "m")
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "socket":
        monkeypatch.chdir(path)  # a socket's path must be short
        socket.socket(socket.AF_UNIX).bind(name)
    else:
        (path / name).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match=name):
        read(path)


def test_links_within_and_a_link_to_the_directory_are_followed(tmp_path):
    path = make_directory(tmp_path / "m")
    (path / "config.json").rename(path / "other.json")
    (path / "config.json").symlink_to("other.json")
    (tmp_path / "alias").symlink_to(path)
    for place in (path, tmp_path / "alias"):
        assert read(place) == FILES.keys()


@pytest.mark.parametrize("home", ["the Hub's cache", "another cache"])
def test_snapshots_link_into_the_cache(tmp_path, monkeypatch, home):
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(tmp_path / ("hub" if home == "the Hub's cache" else "x"))
    )
    snapshot = make_directory(tmp_path / "hub" / "models--org--name" / "snapshots" / ("a" * 40))
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, name in enumerate(FILES):
        (snapshot / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    (tmp_path / "alias").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "alias"):
        assert read(place) == FILES.keys()
    # A directory of one's own that links into the cache, as huggingface_hub once made them.
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").symlink_to(snapshot / "config.json")
    if home == "the Hub's cache":
        assert file_inside(tmp_path / "own", "config.json")
    else:
        with pytest.raises(ModelError, match="must lie in its directory"):
            file_inside(tmp_path / "own", "config.json")


@pytest.mark.parametrize("name", ["../private", "sub/../../private"])
def test_a_name_that_leads_outside_is_refused(tmp_path, name):
    (tmp_path / "private").write_text("")
    (tmp_path / "m" / "sub").mkdir(parents=True)
    for path in (name, tmp_path / "private"):
        with pytest.raises(ModelError, match="must lie in its directory"):
            file_inside(tmp_path / "m", path)


def test_what_is_not_there_is_none(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("absent", "loop", "dangling", "x" * 10_000, "nul\0", "."):
        assert file_inside(tmp_path, name) is None
