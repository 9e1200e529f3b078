"""Data parallelism: rows are divided over the devices, everything else is on each of them."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def replicate(tree: Any) -> Any:
    """A tree with every leaf on every device; on a single device nothing is copied."""
    return jax.device_put(tree, replicated())


def replicated() -> NamedSharding:
    """The sharding of a leaf that every device has whole."""
    return NamedSharding(_mesh(), PartitionSpec())


def shard_rows(batch: Any) -> Any:
    """A batch with its rows divided over the devices, which must divide their number."""
    return jax.device_put(batch, NamedSharding(_mesh(), PartitionSpec("data")))


def in_use() -> contextlib.AbstractContextManager[Any]:
    """A context in which attention's kernels know of several devices: no compiler divides them by itself."""
    return jax.set_mesh(_mesh()) if jax.device_count() > 1 else contextlib.nullcontext()


def row_groups(rows: int) -> int:
    """Into how many groups the rows of a batch fall, none of which is divided over devices.

    Example:
        >>> row_groups(1)
        1
    """
    # A program for devices that are not here is made in the context of their mesh.
    mesh = jax.sharding.get_abstract_mesh()
    return math.gcd(rows, jax.device_count() if mesh.empty else mesh.size)


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",))
