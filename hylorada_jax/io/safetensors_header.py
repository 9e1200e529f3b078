"""What a safetensors file says of its tensors, before any of them is read."""

from pathlib import Path

from safetensors import SafetensorError, deserialize, safe_open

from hylorada_jax.errors import HyLoRADAError
from hylorada_jax.io import bucket
from hylorada_jax.io.reading import unread

# A quarter of a million tensors: an adapter on all experts of a large mixture has tens of thousands.
_MAX_HEADER_BYTES = 2**25


def read_header(
    path: Path, rule: str, error: type[HyLoRADAError], remedy: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of every tensor in a file.

    safetensors checks that dtypes are known, and that shapes, offsets and the file's size agree without gaps.

    Args:
        path: of a regular file, a link to one, or a file in a bucket, which is read whole.
        rule: what the file must be, for the error.
        error: the class of the error.
        remedy: for the error.

    Returns:
        {name: (safetensors' name of the dtype, as "F32", shape)}.

    Raises:
        HyLoRADAError: of the class given: it cannot be read, or is not a complete safetensors file.
    """
    try:
        with bucket.answering(path):
            if not path.is_file():  # a directory, a pipe that never ends
                raise error(rule, f"{path}: no such file", remedy)
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                received = f"{path}: a header of {length:,} bytes, more than {_MAX_HEADER_BYTES:,}"
                raise error(rule, received, remedy)
            if bucket.is_in_bucket(path):
                read = deserialize(path.read_bytes())
                return {name: (piece["dtype"], tuple(piece["shape"])) for name, piece in read}
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except (SafetensorError, OSError, ValueError, MemoryError) as cause:  # the last, of no address space
        if isinstance(cause, HyLoRADAError):
            raise
        raise error(rule, *unread(path, cause, remedy)) from cause
