"""The process that compiles for TPUs: a line of JSON in for each case, and one out.

    {"config": …, "adapter": …, "seq_len": …, "topology": …, "base_dtype": …}    once
    {"mesh": …, "remat": …, "rows": …}    →    {"figures": …} or {"error": [rule, received, remedy]}

It is a process of its own because JAX, once it can import libtpu, looks for a TPU.
"""

import dataclasses
import json
import os
import sys
from typing import Any, TextIO


def main(requests: TextIO, answers: TextIO) -> None:
    """Answers until there is nothing to read."""
    from hylorada_jax.planning.libtpu import use_libtpu

    use_libtpu()
    from hylorada_jax.config import HyLoRADAConfig
    from hylorada_jax.errors import HyLoRADAError
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.planning.cases import Case
    from hylorada_jax.planning.programs import base_of_shapes, figures_of

    job = json.loads(requests.readline())
    base = base_of_shapes(DecoderConfig.from_hf(job["config"]), job["base_dtype"])
    adapter = HyLoRADAConfig.from_dict(job["adapter"])
    for line in requests:
        answer: dict[str, Any]
        try:
            devices = _devices(job["topology"])
            case = Case(**json.loads(line))
            answer = {"figures": dataclasses.asdict(figures_of(base, adapter, job["seq_len"], devices, case))}
        except HyLoRADAError as error:
            answer = {"error": [str(error.rule), str(error.received), str(error.remedy)]}
        print(json.dumps(answer), file=answers, flush=True)


def _devices(topology: str) -> list[Any]:
    from jax.errors import JaxRuntimeError
    from jax.experimental.topologies import get_topology_desc

    from hylorada_jax.errors import ConfigError
    from hylorada_jax.planning.chips import parse_topology

    try:
        # A host has four chips by default; a single one is a host's only one.
        hosts = {"chips_per_host_bounds": (1, 1, 1)} if parse_topology(topology)[1] == 1 else {}
        return get_topology_desc(platform="tpu", topology_name=topology, **hosts).devices
    except (JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            "A topology must be one that the TPU's compiler knows.",
            f"{topology}: {error}",
            "Choose one that can be rented, such as v5e:2x4, v5e:4x4 or v5p:2x2x4.",
        ) from error


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libtpu writes to stdout too
    main(sys.stdin, out)
