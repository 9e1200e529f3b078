"""Several processes that compute as one: how they meet, what they tell each other, and how they part."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from hylorada_jax.errors import ConfigError, HyLoRADAError

_HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""
_LAST_WORDS = 5.0
"""Seconds for which the first process waits before it ends with an error: with it, jax ends all others."""
_RULE = "All processes of a run must go on until it ends."
_REMEDY = "Read what the others have printed; a run goes on with resume (--resume)."


def join(coordinator: str = "", count: int = 1, number: int = 0, *, timeout: int = 300) -> None:
    """Makes this process one of several whose devices are one mesh; nothing where it is alone.

    Call it before anything that asks jax for a device. Where the environment says that there are several
    processes (a TPU slice, GKE, Slurm's srun, Open MPI), it also says which of them this is.

    Args:
        coordinator: HOST:PORT of process 0, which the others can reach; "" asks the environment.
        count: of the processes, where there is a coordinator.
        number: of this one, 0 … count - 1.
        timeout: seconds until all must be there.

    Raises:
        ConfigError: they do not meet in time, or the coordinator's port is taken.
    """
    settings: dict[str, Any]
    if coordinator:
        settings = {"coordinator_address": coordinator, "num_processes": count, "process_id": number}
    elif (cluster := _cluster()) is not None:
        settings, number = {"cluster_detection_method": cluster.name}, cluster.get_process_id()
    else:
        return
    failed: list[Exception] = []

    def meet() -> None:
        try:
            # Of more time than ours: where jax's is up, it aborts the process.
            jax.distributed.initialize(
                **settings, initialization_timeout=timeout + 60, heartbeat_timeout_seconds=_HEARTBEAT
            )
        except Exception as error:  # of sockets, or of the cluster's environment
            failed.append(error)

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(timeout)
    if failed or thread.is_alive():
        raise ConfigError(
            f"The processes of a run must meet within {timeout} seconds.",
            f"process {number}, {settings}: {failed[0] if failed else 'not all were there'}",
            "Start all of them, each with its own number and one coordinator: a free port of process 0 that "
            "the others can reach.",
        )
    _note.leave(number)


def _cluster() -> Any:
    """The environment in which jax finds several processes; None where this one is alone."""
    # jax has no public way to ask before it joins.
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster, OmpiCluster, SlurmCluster

    for kind in (GceTpuCluster, GkeTpuCluster, SlurmCluster, OmpiCluster):
        if kind.is_env_present():
            count = kind.get_process_count()
            if kind is SlurmCluster:  # a shell is a step of one task, in an allocation of several
                count = min(count, int(os.environ.get("SLURM_STEP_NUM_TASKS", count)))
            return kind if count > 1 else None
    return None


def are_several() -> bool:
    """Whether there are other processes, or will be; asks no device."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that prints and writes files."""
    return jax.process_index() == 0


def everywhere(value: Any) -> list[Any]:
    """The values that all processes give, in their order; each must call it, and waits for the others.

    Args:
        value: anything that pickle takes.

    Example:
        >>> everywhere("alone")
        ['alone']
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(content)))
    rows = multihost_utils.process_allgather(np.pad(content, (0, lengths.max() - len(content))))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def on_first(action: Callable[[], Any]) -> Any:
    """What an action gives that the first process alone takes; an error of it is raised in all."""
    result: Any = None
    if is_first():
        try:
            result = action()
        except (HyLoRADAError, OSError) as error:
            result = error
    (result, *_) = everywhere(result)
    if isinstance(result, Exception):
        raise result
    return result


def agree(settings: Mapping[str, Any]) -> None:
    """Refuses, in every process, code or settings that are not the same in all of them; a ConfigError.

    Args:
        settings: nested dictionaries of types that compare.
    """
    if jax.process_count() == 1:
        return
    first, *others = everywhere(flatten_dict({"code": _code(), **settings}, sep="."))
    differing = [
        f"{name}: {first.get(name)} in process 0, {other.get(name)} in process {number}"
        for number, other in enumerate(others, start=1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if differing:
        raise ConfigError(
            "All processes of a run must have the same code, settings and data.",
            "; ".join(differing),
            "Start all of them by the same command, with the same installation.",
        )


@functools.cache
def source_sha256() -> str:
    """The hash of the package's own code, by which one version of it is told from another."""
    package = Path(__file__).parents[1]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()


def _code() -> str:
    return f"jax {jax.__version__}, hylorada {source_sha256()[:16]}"


def whole(x: Any) -> np.ndarray:
    """An array on the host, whatever process its parts lie in; all of them must call it."""
    return np.asarray(x if not isinstance(x, jax.Array) or lies_here(x) else replicated(x))


def lies_here(x: jax.Array) -> bool:
    """Whether this process can read all of an array without the others."""
    return x.is_fully_addressable or x.is_fully_replicated


def replicated(x: jax.Array) -> jax.Array:
    """An array of a mesh with a copy on every device; all processes must call it, in one order."""
    place: Any = x.sharding
    return jax.jit(_itself, out_shardings=NamedSharding(place.mesh, PartitionSpec()))(x)


def _itself(x: jax.Array) -> jax.Array:
    return x  # by name, so that jax knows it again and compiles once for each shape


def lost_another(error: Exception) -> str | None:
    """What to say of an error that jax raises where another process has ended; None of any other."""
    if not (are_several() and isinstance(error, jax.errors.JaxRuntimeError)):
        return None
    return _lost(error)


def _lost(what: object) -> str:
    return f"error: {HyLoRADAError(_RULE, what, _REMEDY)}"


def end_at_once(status: int) -> None:
    """Ends one of several processes that has failed; returns where it is alone.

    Python's own way out would wait for the others, which wait for this one.
    """
    if not are_several():
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    _note.goodbye()
    if _note.number == 0:
        time.sleep(_LAST_WORDS)
    os._exit(status)


class _Note:
    """What is said where this process ends before its time: jax aborts it where it has lost another.

    It is left with a child, which says it when this end of a pipe is closed without a word.
    """

    number: int | None = None
    _child: subprocess.Popen[bytes] | None = None

    def leave(self, number: int) -> None:
        """Leaves it, for the process of this number."""
        self.number = number
        text = _lost(f"process {number} has ended before its time; see above")
        program = 'trap "" INT TERM; read -r word || printf "%s\\n" "$0" >&2'
        self._child = subprocess.Popen(["sh", "-c", program, text], stdin=subprocess.PIPE)
        atexit.register(self._leave_well)

    def _leave_well(self) -> None:
        # After an exception that nobody caught, jax waits for the others, and may abort at that.
        if not hasattr(sys, "last_value"):
            self.goodbye()

    def goodbye(self) -> None:
        """Takes it back."""
        if self._child is not None:
            self._child.communicate(b"\n")
            self._child = None


_note = _Note()
