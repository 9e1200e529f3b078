"""Headers as a stranger may write them: each is refused in words, at once, whatever it claims."""

import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from hylorada_jax.errors import ModelError
from hylorada_jax.models.gguf import gguf_config
from hylorada_jax.models.gguf_header import read_gguf
from hylorada_jax.models.gguf_test import KEYS, tensors, write_gguf

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(name: bytes = b"t", axes: tuple[int, ...] = (32,), kind: int = Kind.F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def header(metadata: list[bytes], table: list[bytes], data: int = 4096, **counts: int) -> bytes:
    """A file by hand, for the gguf package's writer writes no wrong one."""
    given = {"version": 3, "tensors": len(table), "keys": len(metadata)} | counts
    return b"".join([b"GGUF", struct.pack("<IQQ", *given.values()), *metadata, *table, bytes(data)])


ONE = key(b"a", U32, struct.pack("<I", 1))


def aligned(value: int) -> bytes:
    return key(b"general.alignment", U32, struct.pack("<I", value))


# What the error says: the file.
WRONG: dict[str, bytes] = {
    "version 0": header([], [], version=0),
    "version 50331648": header([], [], version=3 << 24),  # in big-endian
    "keys at byte 24 run past": header([ONE], [], keys=2**63),
    "1,000 keys at byte 24 run past": header([ONE], [], keys=1000),
    "tensors at byte 16 run past": header([ONE], [], tensors=2**40),
    "70,000 keys, more than": header([ONE], [], 2**20, keys=70_000),
    "key 'a' occurs twice": header([ONE, ONE], []),
    "tensor 't' occurs twice": header([], [tensor(), tensor(offset=128)]),
    "a value of type 13": header([key(b"a", 13, b"")], []),
    "a value of type 77": header([key(b"a", ARRAY, array(77, 1))], []),
    "array of arrays": header([key(b"a", ARRAY, array(ARRAY, 1, array(ARRAY, 1)))], []),
    "numbers at byte 49 run past": header([key(b"a", ARRAY, array(U8, 2**62))], []),
    "1,000,000 strings at byte 49": header([key(b"a", ARRAY, array(STRING, 10**6))], []),
    "bytes of a string": header([text(b"a", 2**64 - 1)], []),
    "goes on past": header([key(b"a", U64, b"")], [], 4),
    "not a power of two": header([aligned(24)], []),
    r"alignment: 0 \(Expected `int` >= 1\)": header([aligned(0)], []),
    r"alignment: '32' \(Expected `int`": header([key(b"general.alignment", STRING, text(b"32"))], []),
    r"alignment: True \(Expected `int`": header([key(b"general.alignment", BOOL, b"\x01")], []),
    r"split.count: array.* \(Expected `int`": header([key(b"split.count", ARRAY, array(U8, 2, b"ab"))], []),
    "part of 2 files": header([key(b"split.count", U8, b"\x02")], []),
    "'t' has 0 axes": header([], [tensor(axes=())]),
    "'t' has 5 axes": header([], [tensor(axes=(1,) * 5)]),
    r"has the shape \(4, 0\)": header([], [tensor(axes=(0, 4))]),
    "of type Q8_0 has the shape": header([], [tensor(axes=(33,), kind=Kind.Q8_0)]),
    "is of type 99": header([], [tensor(kind=99)]),
    "is of type 4, which is unknown": header([], [tensor(kind=4)]),  # Q4_2, which is no more
    "'t' runs past the end": header([], [tensor(axes=(2**32, 2**32))]),
    "'t' runs past the end of": header([], [tensor(axes=(2**16,) * 4)]),
    "'t' runs past the end of the": header([], [tensor(offset=2**63)]),
    "begins at 4, which is not a multiple of 32": header([], [tensor(offset=4)]),
    "begins at 32, which is not a multiple of 64": header([aligned(64)], [tensor(offset=32)]),
    "'t' runs past the beginning of 'u'": header([], [tensor(b"u", offset=96), tensor()]),
}


def refused_or_read(path: Path, read: Callable[[Path], object]) -> str:
    """The error's text, or nothing; no other error comes, and no second passes."""
    start = time.process_time()
    try:
        read(path)
        error = ""
    except ModelError as refusal:
        error = str(refusal)
    assert time.process_time() - start < 1
    return error


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_header_is_refused_in_words(said, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(WRONG[said])
    assert re.search(said, refused_or_read(path, read_gguf))


def test_a_right_header_by_the_same_hand_is_read(tmp_path):
    path = tmp_path / "m.gguf"
    bools = key(b"bools", ARRAY, array(BOOL, 3, b"\x00\x01\x01"))
    table = [tensor(b"u", (64, 2), Kind.Q8_0, 128), tensor()]
    path.write_bytes(
        header([aligned(128), bools, key(b"none", ARRAY, array(F32, 0))], table, 128 + 4 * 34 + 127)
    )
    found = read_gguf(path)
    assert found.metadata["bools"].tolist() == [False, True, True]
    assert found.metadata["none"].tolist() == []
    assert {name: (entry.shape, entry.size) for name, entry in found.tensors.items()} == {
        "u": ((2, 64), 4 * 34),
        "t": ((32,), 128),
    }


def test_a_header_has_its_bound(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(header([key(b"a", ARRAY, array(U8, 50 * 10**6))], []))
    os.truncate(path, 2**26)  # the numbers are there
    assert "50,000,000 numbers" in refused_or_read(path, read_gguf)


def test_a_file_with_any_byte_changed_or_cut_off_is_refused_or_read(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", KEYS, tensors())
    whole = path.read_bytes()
    begin = min(entry.offset for entry in read_gguf(path).tensors.values())
    cut = [whole[:length] for length in [*range(0, begin, 5), len(whole) - 128]]  # padding may end it
    changed = [
        whole[:place] + bytes([whole[place] ^ (1, 0x80, 0xFF)[place % 3]]) + whole[place + 1 :]
        for place in range(begin)
    ]
    assert not refused_or_read(path, lambda path: gguf_config(read_gguf(path)))
    for content in [*cut, *changed]:
        path.write_bytes(content)
        error = refused_or_read(path, lambda path: gguf_config(read_gguf(path)))
        assert error or len(content) == len(whole)


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "m.gguf"
    for content in (b"", b"GGU", b"PK\x03\x04" + header([], [])):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="start with the bytes GGUF"):
            read_gguf(path)
    path.unlink()
    for make in (Path.mkdir, os.mkfifo):
        other = tmp_path / f"{make.__name__}.gguf"
        make(other)
        with pytest.raises(ModelError, match="no such file"):
            read_gguf(other)
