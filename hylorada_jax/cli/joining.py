"""The command line's options that make a process one of several."""

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from hylorada_jax.cli.flags import flag_of
from hylorada_jax.errors import ConfigError
from hylorada_jax.terminal import keep_quiet


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Which of several processes this is.

    Args:
        coordinator: HOST:PORT of process 0, a free port that the others can reach. On a TPU slice, on GKE,
            under Slurm's srun and Open MPI's mpirun, processes find each other without it.
        num_processes: how many there are; with --coordinator.
        process_id: which of them this is, from 0; with --coordinator.
        join_timeout: seconds within which all must be there.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_timeout: int = 300

    def join(self, settings: Mapping[str, Any]) -> None:
        """Joins the others, if there are any; all but the first then print no results and no warnings.

        Args:
            settings: the command's options by name, which all must have been given alike, but for these.

        Raises:
            ConfigError: the options are no place among so many, the others are not there in time, or have
                other code or settings.
        """
        given = (self.coordinator, self.num_processes, self.process_id)
        count, number = self.num_processes or 1, self.process_id or 0
        place = self.coordinator or ""
        complete = None not in given and re.fullmatch(r"\S+:[0-9]{1,5}", place) and 0 <= number < count
        if self.join_timeout < 1 or not (complete or given == (None, None, None)):
            options = [f"{flag_of(f.name)} {getattr(self, f.name)}" for f in dataclasses.fields(self)]
            raise ConfigError(
                "A process must have a coordinator HOST:PORT, a number of processes, and its own below that.",
                " ".join(options),
                "Write --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0, or none of them.",
            )

        from hylorada_jax.placement import processes

        processes.join(place, count, number, timeout=self.join_timeout)
        if not processes.are_several():
            return
        if not processes.is_first():
            warnings.simplefilter("ignore")
            keep_quiet()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the libraries' output too
        others = {name: value for name, value in settings.items() if value is not self}
        processes.agree({n: vars(v) if dataclasses.is_dataclass(v) else v for n, v in others.items()})


# A group of the help, without a prefix: --coordinator, not --processes.coordinator.
Processes = Annotated[tyro.conf.OmitArgPrefixes[ProcessOptions], tyro.conf.arg(name="process")]
ALONE = ProcessOptions()
