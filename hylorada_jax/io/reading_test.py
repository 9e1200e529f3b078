"""The shared way to read JSON: what msgspec itself cannot take is our error too."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked, read_json
from hylorada_jax.io.safetensors_header import read_header
from hylorada_jax.models.gguf_header import read_gguf


class Settings(msgspec.Struct):
    a: str = ""


@pytest.mark.parametrize("value", [{"\ud800": 1}, {"a": "\ud800", "\udc00": {}}])
def test_half_a_character_is_refused(value):
    with pytest.raises(ModelError, match="half a character"):
        checked(value, Settings, "Settings are typed", ModelError, "Correct it.")


@pytest.mark.parametrize("read", [read_json, read_header, lambda path, *_: read_gguf(path)])
def test_who_may_not_read_a_file_is_not_sent_for_another_copy(read, tmp_path, monkeypatch):
    def closed(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "file"
    path.write_bytes(b"{}")
    monkeypatch.setattr("builtins.open", closed)
    monkeypatch.setattr(Path, "open", closed)
    monkeypatch.setattr(Path, "read_bytes", closed)
    with pytest.raises(ModelError, match=r"file: Permission denied\n.*ask its owner"):
        read(path, "A file must be whole.", ModelError, "Download it again.")
