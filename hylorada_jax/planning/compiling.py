"""Who compiles: this process for its own devices, or another one for TPUs that are not there."""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ConfigError, HyLoRADAError
from hylorada_jax.planning.cases import Case, Figures
from hylorada_jax.planning.libtpu import libtpu_directory

if TYPE_CHECKING:
    from hylorada_jax.models.causal_lm import CausalLM

Compile = Callable[[Case], Figures]


@contextlib.contextmanager
def for_topology(
    topology: str,
    config: dict[str, Any],
    adapter: HyLoRADAConfig,
    seq_len: int,
    base_dtype: str | None = None,
) -> Iterator[Compile]:
    """What compiles steps of a bfloat16 base for TPUs, in a process of its own; JAX is not touched here.

    Args:
        topology: such as "v5e:2x2".
        config: the content of the base's config.json.
        adapter: what is trained.
        seq_len: tokens of a row.
        base_dtype: what the base's linear layers are kept in, where it is not bfloat16.

    Raises:
        HyLoRADAError: libtpu is not installed.
        ConfigError: from the function that is given: the compiler knows no such topology, or the case cannot
            be trained.
    """
    libtpu_directory()  # missing, it is reported before anything starts
    job = {"config": config, "adapter": adapter.to_dict(), "seq_len": seq_len, "topology": topology}
    job["base_dtype"] = base_dtype
    command = [sys.executable, "-m", "hylorada_jax.planning.worker"]
    with tempfile.TemporaryFile("w+", errors="replace") as noise:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": noise}
        with subprocess.Popen(command, text=True, **pipes) as process:

            def ask(line: dict[str, Any]) -> None:
                assert process.stdin is not None
                print(json.dumps(line), file=process.stdin, flush=True)

            def compiled(case: Case) -> Figures:
                assert process.stdout is not None
                with contextlib.suppress(BrokenPipeError):
                    ask(case._asdict())
                if answer := process.stdout.readline():
                    read = json.loads(answer)
                    if "error" in read:
                        raise ConfigError(*read["error"])
                    return Figures.of_json(read["figures"])
                process.wait()
                noise.seek(0)
                raise HyLoRADAError(
                    "The process that compiles for TPUs must not end before it has answered.",
                    f"{case} on {topology}: exit status {process.returncode}: {noise.read()[-1000:]}",
                    "See the message above; where memory was short, give one mesh (--mesh) and one remat.",
                )

            try:
                with contextlib.suppress(BrokenPipeError):
                    ask(job)
                yield compiled
            finally:
                process.kill()


@contextlib.contextmanager
def for_here(base: "CausalLM", adapter: HyLoRADAConfig, seq_len: int) -> Iterator[Compile]:
    """What compiles steps of a base of shapes for the devices of this process; as :func:`for_topology`."""
    import jax

    from hylorada_jax.planning.programs import figures_of

    yield lambda case: figures_of(base, adapter, seq_len, jax.devices(), case)
