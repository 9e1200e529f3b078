"""The names that tests of files go through, what reads a path as the user means it, and what writes one."""

import errno
import json
import os
import secrets
import shutil
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ModelError
from hylorada_jax.exchange.merged import write_merged
from hylorada_jax.io.files import refuse_unusable, user_path, write_json, write_whole
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.saved.adapter_files import write_files
from hylorada_jax.saved.saved_adapter import base_name
from hylorada_jax.training.report import MetricsLog, plot_losses

# What glob, fnmatch, format, URLs, shells and printf would read; the longest name; bytes that are not UTF-8.
NAMES = {
    "pattern": "lr=[1e-4,2e-4]",
    "signs": "-*?[!a]{0}%s%20 #~&|'\"\\\n=,;:gs:é🦜",
    "long": "x" * 255,
    "bytes": "\udcff",
}


def test_only_a_home_directory_is_read_into_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/runs") == Path("/home/me/runs")
    for name in ("~no-such-user", "a/~", *NAMES.values()):
        assert user_path(name) == Path(name)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_of_a_model_an_adapter_and_a_merged_checkpoint(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    directory = Path(name)
    directory.mkdir()
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 4}
    config = {"model_type": "llama", "vocab_size": 5, "tie_word_embeddings": True, **shape}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(Tokenizer(models.BPE({"a": 0}, [])).to_str())
    weights = {"model.embed_tokens.weight": (5, 8), "model.norm.weight": (8,)}
    for layer, (rows, columns) in {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8),
        "self_attn.o_proj": (8, 8), "mlp.gate_proj": (4, 8), "mlp.up_proj": (4, 8), "mlp.down_proj": (8, 4),
    }.items():  # fmt: skip
        weights[f"model.layers.0.{layer}.weight"] = (rows, columns)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"model.layers.0.{norm}.weight"] = (8,)
    save_file({key: np.ones(size, np.float32) for key, size in weights.items()}, "model.safetensors")
    shutil.move("model.safetensors", directory)

    adapter, merged = Path("adapters") / name / name, Path("merged") / name
    model = HyLoRADAModel(load_model(name), HyLoRADAConfig(method="lora"))
    model.save_pretrained(adapter, weights=True)
    again = HyLoRADAModel.from_pretrained(load_model(f"./{name}/"), adapter, check_weights=True)
    jax.tree.map(np.testing.assert_array_equal, again.adapters, model.adapters)
    write_merged(base_name(adapter), adapter, merged, check_weights=True)
    fresh = load_model(merged).params
    jax.tree.map(np.testing.assert_array_equal, fresh, model.base.params)  # B starts at zero
    assert load_tokenizer(merged).encode("a") == [0]


def test_a_text_that_is_no_path_is_an_error_of_ours():
    with pytest.raises(ModelError, match="no such directory"):
        find_source("a text that was pasted by mistake " * 200)


LINE = '{"step": 9, "loss": 1.0}\n'
WRITERS = {
    "any": lambda path: write_whole(path, b"new"),
    "adapter_config.json": lambda path: write_files(path.parent, b"new", b"new"),
    "adapter_model.safetensors": lambda path: write_files(path.parent, b"new", b"new"),
    "metrics.jsonl": lambda path: MetricsLog(path, path.parent / "board", last_step=0).__exit__(*[None] * 3),
    "loss.png": lambda path: plot_losses([{"step": 1, "loss": 2.0}], path),
    "parity.json": lambda path: write_json(path, {}),
}


@pytest.mark.parametrize("leads_to", ["private", "nothing"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_link_in_the_place_of_a_file_is_replaced_and_never_followed(tmp_path, name, leads_to):
    file, private = tmp_path / "output" / name, tmp_path / "private"
    private.write_text(LINE)
    file.parent.mkdir()
    file.symlink_to(tmp_path / leads_to)
    WRITERS[name](file)
    assert file.is_file()
    assert not file.is_symlink()
    assert private.read_text() == LINE
    assert {path.name for path in tmp_path.iterdir()} == {"output", "private"}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_a_file_can_be_read_by_those_who_can_read_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to a directory", "link to a pipe"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    place, target = tmp_path / "place", tmp_path / "target"
    target.mkdir() if "directory" in kind else os.mkfifo(target)
    place.symlink_to(target) if "link" in kind else target.rename(place)
    before = place.lstat()
    with pytest.raises(OSError, match="not a file"):
        write_whole(place, b"new")
    assert place.lstat() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"place", "target"}


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_planted_temporary_file_is_neither_written_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    planted = tmp_path / f".hylorada-{'0' * 16}"
    for target in ("private", "nothing"):
        planted.symlink_to(tmp_path / target)
        (tmp_path / "private").write_text("mine")
        with pytest.raises(FileExistsError):
            write_whole(tmp_path / "file", b"new")
        assert (tmp_path / "private").read_text() == "mine"
        assert {path.name for path in tmp_path.iterdir()} == {planted.name, "private"}
        planted.unlink()


UNUSABLE = {
    "file": "is a file",
    "file/below/it": "is a file",
    "pipe": "is a special file",
    "link to nothing": "leads to no directory",
    "link to nothing/below": "leads to no directory",
    "link to a file": "leads to no directory",
    "loop": "symbolic links",
    "x" * 256: "name too long",
    f"missing/{'x' * 256}/below": "name too long",
    "/".join(["x" * 200] * 30): "name too long",
    "loop/below": "symbolic links",
    "null\0": "null",
}


def plant(place):
    """What is in the way of an output, by the names of the table."""
    (place / "file").write_text("mine")
    os.mkfifo(place / "pipe")
    (place / "link to nothing").symlink_to(place / "nothing")
    (place / "link to a file").symlink_to(place / "file")
    (place / "loop").symlink_to(place / "loop")


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_output_that_cannot_be_is_an_error_and_nothing_is_made(tmp_path, name):
    plant(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=f"(?i){UNUSABLE[name]}"):
        refuse_unusable(tmp_path / name)
    assert set(tmp_path.rglob("*")) == before


def test_an_output_in_a_closed_directory_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # the superuser may write anywhere
    for name in ("", "new", "new/er"):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: no permission [\\s\\S]*read-only"):
            refuse_unusable(tmp_path / name)


def test_an_output_that_can_be_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("directory").mkdir()
    Path("link").symlink_to("directory")
    for name in ("directory", "link", "link/new", "new/er", "new/../new", ".", "..", "", *NAMES.values()):
        refuse_unusable(Path(name))
        refuse_unusable(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"directory", "link"}
