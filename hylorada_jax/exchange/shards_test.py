import errno
import functools
import json
import os
import secrets
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from hylorada_jax.errors import CheckpointError
from hylorada_jax.exchange.shards import Tensor, new_directory, refuse_taken, write_shards

SHAPES = {"a": (3, 5), "one": (), "none": (0, 4), "größe": (7,), "big": (40, 10), "b": (2, 2, 2), "c": (9,)}
DTYPES = ("float32", "bfloat16", "float64", "float16", "bfloat16", "float32", "float16")


def tensors():
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(rng.normal(size=shape)).astype(jnp.dtype(dtype))
        for (name, shape), dtype in zip(SHAPES.items(), DTYPES, strict=True)
    }


def pieces(value):
    """Two rows at a time, not contiguous."""
    if not value.ndim:
        return [value]
    return [np.asfortranarray(value[start : start + 2]) for start in range(0, len(value), 2)]


def written(values):
    """The tensors to write."""
    return [
        Tensor(name, value.shape, value.dtype, functools.partial(pieces, value))
        for name, value in values.items()
    ]


def test_the_library_reads_what_was_written_bit_for_bit(tmp_path):
    write_shards(tmp_path, written(tensors()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == SHAPES.keys()
    for name, value in tensors().items():
        np.testing.assert_array_equal(found[name], value, strict=True)


def test_every_tensor_is_aligned_to_its_own_numbers(tmp_path):
    write_shards(tmp_path, written(tensors()))
    raw = (tmp_path / "model.safetensors").read_bytes()
    for value in tensors().values():
        places = range(0, len(raw), value.itemsize)
        assert any(raw[at : at + value.nbytes] == value.tobytes() for at in places)


@pytest.mark.parametrize("limit", [1, 100])
def test_an_index_says_which_shard_a_tensor_is_in(tmp_path, limit):
    values = tensors()
    write_shards(tmp_path, written(values), max_shard_bytes=limit)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, value in values.items():
        np.testing.assert_array_equal(load_file(tmp_path / places[name])[name], value, strict=True)
    assert len(list(tmp_path.iterdir())) == len({*places.values()}) + 1


def write_and_fail(directory, error):
    with new_directory(directory) as place:
        (place / "file").write_text("x")
        raise error


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    output = tmp_path / "new"
    output.mkdir()  # an empty one may be there
    with new_directory(output) as place:
        (place / "file").write_text("x")
        assert not list(output.iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]
    with pytest.raises(CheckpointError, match=r"empty[\s\S]*new"), new_directory(output):
        pass
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            write_and_fail(tmp_path / "other", error)
    assert (output / "file").read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    output = tmp_path / "new"
    output.mkdir()
    monkeypatch.chdir(output)
    for place in (Path(), output):
        with pytest.raises(CheckpointError, match=r"working directory[\s\S]*a new directory in it"):
            refuse_taken(place)
    monkeypatch.chdir(tmp_path)
    refuse_taken(output)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    with pytest.raises(CheckpointError, match="mount point"):
        refuse_taken(output)


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(CheckpointError, match=r"what is written\.\n.*No space left[\s\S]*Free some space"),
        new_directory(tmp_path / "new") as place,
    ):
        write_shards(place, written(tensors()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_there", [True, False])
def test_of_two_that_write_one_directory_the_second_is_refused(tmp_path, is_there):
    output = tmp_path / "new"
    if is_there:
        output.mkdir()

    def write(*names):
        with new_directory(output) as place:
            (place / "file").write_text(names[0])
            if names[1:]:
                write(*names[1:])

    with pytest.raises(CheckpointError) as error:
        write("late", "early")
    with pytest.raises(CheckpointError) as at_once:
        refuse_taken(output)
    assert str(error.value) == str(at_once.value)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {"new", "new/file"}
    assert (output / "file").read_text() == "early"


def test_a_file_that_comes_in_the_way_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="new is a file"), new_directory(tmp_path / "new"):
        (tmp_path / "new").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new").read_text() == "mine"


def test_output_that_nobody_reads_is_no_fault_of_the_directory(tmp_path):
    with pytest.raises(BrokenPipeError), new_directory(tmp_path / "new"):
        raise BrokenPipeError  # as of a progress bar
    assert not list(tmp_path.iterdir())


def test_a_directory_that_was_planted_is_neither_written_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    planted = tmp_path / f".hylorada-{'0' * 16}"
    planted.mkdir()
    (planted / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="File exists"):
        write_and_fail(tmp_path / "new", AssertionError)
    assert (planted / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [planted]


def test_a_link_to_an_empty_directory_stays_and_one_to_nothing_is_not_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_directory(tmp_path / "link") as place:
        (place / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty" / "file").read_text() == "x"
    (tmp_path / "dangling").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="leads to no directory"):
        write_and_fail(tmp_path / "dangling", AssertionError)
    assert not (tmp_path / "nothing").exists()
