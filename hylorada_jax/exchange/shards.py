"""A new checkpoint directory, whole or not at all, and safetensors files written tensor by tensor.

The safetensors library writes only what is in memory all at once.

Reference: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np

from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.files import refuse_unusable, temporary_name

MAX_SHARD_BYTES = 5 * 10**9  # transformers' own limit
# The format's names of what a weight can be.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor to write.

    Attributes:
        name: in the file.
        shape: of the whole.
        dtype: float64, float32, float16 or bfloat16.
        pieces: gives the values in that dtype, in C order, cut wherever it likes; asked once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def refuse_taken(directory: Path) -> None:
    """Raises a CheckpointError where :func:`new_directory` would overwrite something, or could not write."""
    refuse_unusable(directory)
    if directory.is_dir():
        if any(directory.iterdir()):
            raise CheckpointError(
                "The output must be a new or an empty directory.", directory, "Choose another directory."
            )
        refuse_unusable(directory.resolve().parent)  # where the directory is made that takes its place
        if os.path.ismount(directory) or directory.samefile(os.curdir):
            raise CheckpointError(
                "The output directory is replaced, which a mount point and the working directory cannot be.",
                directory,
                f"Choose a new directory in it, such as {directory / 'new'}.",
            )


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory that appears whole when the block ends, and not at all when it fails or is interrupted.

    Args:
        directory: new or empty; a link to an empty directory stays one.

    Yields:
        Where to write: a directory beside it, renamed at the end.

    Raises:
        CheckpointError: something is there already, or it cannot be written, as on a full disk.
    """
    refuse_taken(directory)
    directory = directory.resolve()
    temporary = directory.with_name(temporary_name())
    try:
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _put(temporary, directory)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except BrokenPipeError:  # of what the block prints
        raise
    except OSError as error:
        raise CheckpointError(
            "The output directory must be writable, and the disk must have room for what is written.",
            f"{directory}: {error}",
            "Free some space, or choose another directory.",
        ) from error


def _put(temporary: Path, directory: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        temporary.rename(directory)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            refuse_taken(directory)  # by what came there in the meantime, as of the same command run twice
        raise


def write_shards(
    directory: Path, tensors: Sequence[Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes tensors as transformers names its files: one, or several and their index.

    Args:
        directory: exists.
        tensors: in the order that fills the shards.
        max_shard_bytes: of a file; a tensor that is larger has a file of its own.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import load_file
        >>> ones = Tensor("x", (2, 3), np.dtype(np.float32), lambda: [np.ones(6, np.float32)])
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_shards(Path(place), [ones])
        ...     load_file(Path(place) / "model.safetensors")["x"].shape
        (2, 3)
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import

    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(directory / file, [named[name] for name in names])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, "utf-8")


def _write_file(path: Path, tensors: Sequence[Tensor]) -> None:
    # The widest first, as the library does it, so that every tensor is aligned to its own numbers.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        code = _CODES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            _write_tensor(file, tensor)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    start = file.tell()
    for piece in tensor.pieces():
        assert piece.dtype == tensor.dtype, (tensor.name, piece.dtype)
        # Through bytes, for bfloat16 has no buffer protocol.
        file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    assert file.tell() - start == tensor.size, tensor.name
