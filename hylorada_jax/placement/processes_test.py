"""Laws of several processes: two real ones of two devices each, on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.placement import processes
from hylorada_jax.placement.placement import Placement, parse_mesh
from hylorada_jax.placement.processes import agree, everywhere, is_first, join, on_first, whole
from hylorada_jax.placement.shards import in_use, own_rows, shard_rows

MESHES = {"data=4": (4, 4), "fsdp=2,tensor=2": (4, 4), "tensor=4": (8, 8), "data=2,fsdp=2": (4, 4)}
"""How many of eight rows each of the processes computes."""
TREE = {"q_proj": {"kernel": np.arange(32.0).reshape(8, 4)}, "bias": np.arange(3.0)}


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def refused(action, *arguments):
    try:
        action(*arguments)
    except (ConfigError, CheckpointError) as error:
        return str(error)
    return None


def fail():
    raise CheckpointError("A disk must have room.", "none", "Free some.")


def facts(mesh):
    """What one process finds on a mesh: its rows, and whether a batch and a tree come back whole."""
    placement, batch = Placement(parse_mesh(mesh)), np.arange(16.0).reshape(8, 2)
    rows, tree = own_rows(placement.mesh, 8), placement.put(TREE)
    with in_use(tree):
        shards = shard_rows({"x": batch[rows]})["x"]
    elsewhere = Placement(parse_mesh("fsdp=4")).put(tree)
    back = [whole(shards), *map(whole, jax.tree.leaves((tree, elsewhere)))]
    expected = [batch, *jax.tree.leaves((TREE, TREE))]
    held = {
        range(8)[index[0] if index else slice(None)]
        for index in NamedSharding(placement.mesh, PartitionSpec(("data", "fsdp")))
        .addressable_devices_indices_map((8,))
        .values()
    }
    same = all(np.array_equal(x, y) for x, y in zip(back, expected, strict=True))
    return {"rows": rows, "same": same, "held": sorted({row for part in held for row in part})}


def measure(port, number):
    """What a process finds, as JSON on stderr's first line; then the first one is killed."""
    join(f"localhost:{port}", 2, int(number), timeout=60)
    found = {
        "meshes": {mesh: facts(mesh) for mesh in MESHES},
        "told": everywhere("x" * (1 + 5 * int(number))),
        "first": on_first(lambda: f"of {number}"),
        "failed": refused(on_first, fail),
        "same": refused(agree, {"a": {"b": 1}}),
        "different": refused(agree, {"a": {"b": int(number), "c": 2}}),
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    everywhere(None)
    if is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    everywhere(None)
    signal.pause()  # jax ends it


def measured_by_two(module, on_devices):
    """What a module's ``measure(port, number)`` says of each of two processes of two devices.

    Returns:
        The JSON objects, what both wrote to stderr, and how they ended.
    """
    program = f"import sys\nfrom {module} import measure\nmeasure(*sys.argv[1:])"
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, port, number],
            env=on_devices(2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    lines = [next((line for line in text.splitlines() if line.startswith("{")), text) for text in said]
    return [json.loads(line) for line in lines], said, [process.returncode for process in started]


@pytest.fixture(scope="module")
def found(on_devices):
    measured, said, codes = measured_by_two(__name__, on_devices)
    return measured, said[1], codes[1]


@pytest.mark.parametrize("mesh", MESHES)
def test_each_process_has_the_rows_and_the_parts_of_its_devices(mesh, found):
    both = [process["meshes"][mesh] for process in found[0]]
    assert [len(process["rows"]) for process in both] == [*MESHES[mesh]]
    assert {row for process in both for row in process["rows"]} == {*range(8)}
    for process in both:
        assert process["rows"] == process["held"]
        assert process["same"]


def test_what_one_tells_all_know(found):
    for process in found[0]:
        assert process["told"] == ["x", "x" * 6]
        assert process["first"] == "of 0"
        assert "A disk must have room." in process["failed"]
        assert process["same"] is None
        assert "a.b: 0 in process 0, 1 in process 1\n" in process["different"]


def test_a_process_that_loses_another_ends_and_says_so(found):
    _, said, status = found
    assert status != 0
    assert said.splitlines()[-3] == "error: All processes of a run must go on until it ends."


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "method"),
    [
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, "slurm"),
        (SLURM | {"SLURM_NTASKS": "2"}, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({}, None),
    ],
    ids=["srun", "old srun", "one task", "a shell", "mpirun", "one rank", "a pod", "alone"],
)
def test_only_where_there_are_several_a_process_joins(variables, method, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: joined.append(options))
    monkeypatch.setattr(processes._note, "leave", joined.append)
    join()
    assert [joined[0]["cluster_detection_method"], joined[1]] == [method, 1] if method else joined == []
