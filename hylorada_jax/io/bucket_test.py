"""Laws of paths in a bucket: what pathlib's do, and what a bucket refuses is an error that says so."""

import importlib.util
from pathlib import Path

import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.io import bucket as of_bucket
from hylorada_jax.io.files import any_path, kind_of, refuse_unusable, remove, write_whole
from hylorada_jax.saved.adapter_files import refuse_existing, write_adapter
from hylorada_jax.saved.adapter_files_test import BASE, TENSORS
from hylorada_jax.saved.saved_adapter import open_adapter


def test_a_url_is_known_with_the_slash_that_a_path_takes_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("gs://bucket/run", Path("gs://bucket/run"), "gs:/bucket/run"):
        assert of_bucket.url_of(text) == "gs://bucket/run"
    for text in ("runs/gs://a", "C:/runs", "gs:", "~/a", "lr=1:/a"):
        assert of_bucket.url_of(text) is None
    (tmp_path / "gs:").mkdir()
    assert any_path("gs://bucket/run") == Path("gs:/bucket/run")


def test_without_gcsfs_the_remedy_is_its_installation(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no package gcsfs[\s\S]*hylorada\[gcs\]"):
        any_path("gs://bucket/run")


def test_files_are_written_seen_moved_and_deleted(bucket):
    place = any_path("gs://bucket/files")
    assert (kind_of(place), of_bucket.files(place)) == (None, {})
    for content in (b"", b"old", b"a new one"):
        write_whole(place / "a" / "b.txt", content)
        assert bucket.objects["files/a/b.txt"] == (place / "a" / "b.txt").read_bytes() == content
    assert [kind_of(path) for path in (place, place / "a", place / "a" / "b.txt", place / "a" / "b")] == [
        "directory", "directory", "file", None,
    ]  # fmt: skip
    assert of_bucket.files(place) == {place / "a" / "b.txt": 9}
    of_bucket.move(place / "a", place / "c")
    assert of_bucket.files(place) == {place / "c" / "b.txt": 9}
    with pytest.raises(OSError, match="not empty"):
        remove(place / "c")
    for path in (place / "c" / "b.txt", place / "c"):  # which is gone with what was in it
        remove(path)
    assert kind_of(place) is None


def test_what_cannot_be_written_to_is_refused_and_nothing_is_left(bucket, monkeypatch):
    write_whole(any_path("gs://bucket/taken"), b"mine")
    before = dict(bucket.objects)
    refuse_unusable(any_path("gs://bucket/free"), in_bucket=True)
    for path, found in [
        ("gs://bucket/taken", "Not a directory"),
        ("gs://missing/run", "missing"),
        ("gs://bucket/lr=[1]/*", "letters, digits"),
        ("gs://bucket", "letters, digits"),
        ("s3://bucket/run", "s3://bucket/run"),
    ]:
        with pytest.raises((CheckpointError, ConfigError), match=found.replace("[", r"\[")):
            refuse_unusable(any_path(path), in_bucket=True)
    with pytest.raises(CheckpointError, match=r"gs://bucket/run[\s\S]*gcsfuse"):
        refuse_unusable(any_path("gs://bucket/run"))
    monkeypatch.setattr(bucket, "read_only", True)
    with pytest.raises(CheckpointError, match=r"storage\.objects\.create[\s\S]*gcloud"):
        refuse_unusable(any_path("gs://bucket/free"), in_bucket=True)
    assert bucket.objects == before


def test_an_adapter_is_written_once_and_read_whole(bucket):
    place = "gs://bucket/adapter"
    refuse_existing(place)
    write_adapter(place, TENSORS, HyLoRADAConfig(), BASE)
    with pytest.raises(CheckpointError, match="overwrit"):
        write_adapter(Path(place), TENSORS, HyLoRADAConfig(), BASE)
    opened = open_adapter(Path(place))
    assert (opened.config, opened.base) == (HyLoRADAConfig(), BASE)
    assert {name: tensor.tobytes() for name, tensor in opened.tensors().items()} == {
        name: tensor.tobytes() for name, tensor in TENSORS.items()
    }
    bucket.objects["adapter/adapter_model.safetensors"] = b"cut"
    with pytest.raises(CheckpointError, match=r"gs://bucket/adapter/adapter_model\.safetensors"):
        open_adapter(place)
    with pytest.raises(CheckpointError, match=r"gs://bucket/none/adapter_config\.json: no such file"):
        open_adapter("gs://bucket/none")
