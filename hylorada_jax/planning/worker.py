"""The process that compiles for TPUs: a line of JSON in for each case, and one out.

    {"config": …, "adapter": …, "seq_len": …, "topology": …, "base_dtype": …}    once
    {"mesh": …, "remat": …, "rows": …, "microbatches": …}    →    {"figures": …}, or
                                                                  {"error": [rule, received, remedy]}

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
    from hylorada_jax.planning.programs import base_of_shapes, figures_of, topology_devices

    job = json.loads(requests.readline())
    base = base_of_shapes(DecoderConfig.from_hf(job["config"]), job["base_dtype"])
    adapter = HyLoRADAConfig.from_dict(job["adapter"])
    for line in requests:
        answer: dict[str, Any]
        try:
            devices = topology_devices(job["topology"])
            case = Case(**json.loads(line))
            answer = {"figures": dataclasses.asdict(figures_of(base, adapter, job["seq_len"], devices, case))}
        except HyLoRADAError as error:
            answer = {"error": [str(error.rule), str(error.received), str(error.remedy)]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libtpu writes to stdout too
    main(sys.stdin, out)
