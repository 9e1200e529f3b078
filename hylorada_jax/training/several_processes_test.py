"""Oracle of a run of two processes: the run of one on as many devices, and the run that nobody killed."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from hylorada_jax.placement.processes_test import free_port
from hylorada_jax.training.report import read_metrics

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def command(tmp_path_factory, on_devices, tiny):
    """(devices, command, options) → a process that reads the tiny model and, without others, these texts."""
    texts = tmp_path_factory.mktemp("data") / "texts.txt"
    texts.write_text("".join(f"{n} brown foxes jump over {n * n} lazy dogs\n" for n in range(120)))

    def command(devices, name, *options, cwd=None):
        words = [sys.executable, "-m", "hylorada_jax", name, "--model", tiny]
        words += [] if "--data" in options else ["--data", texts]
        return subprocess.Popen(
            [*map(str, words), *map(str, options), "--seq-len", "16"],
            env=on_devices(devices, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
        )

    return command


@pytest.fixture(scope="module")
def start(command):
    """(devices, output, options) → a process that trains."""
    common = ["--steps", 24, "--checkpoint-every", 4, "--learning-rate", 1e-4, "--dropout", 0.1]
    # Leaves so large that a checkpoint has them in the files of the process that holds them.
    common += ["--eval-every", 12, "--eval-tokens", 64, "--prompt=", "--rank", 64]
    return lambda devices, *rest: command(devices, "finetune", *common, "--output", *rest)


def pair(start, *options, second=()):
    """Two processes of two devices each."""
    meeting = ("--mesh", "fsdp=4", "--coordinator", f"localhost:{free_port()}", "--num-processes", 2)
    return [
        start(2, *options, *meeting, "--process-id", number, *own) for number, own in enumerate(((), second))
    ]


def ended(*started):
    """What each has printed, once it has ended well."""
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    return [printed for printed, _ in said]


def furthest(one, other):
    """How far apart two runs' adapters are."""
    ours, theirs = (load_file(run / ADAPTER) for run in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


@pytest.fixture(scope="module")
def whole_run(start, tmp_path_factory):
    """A run of two processes that nothing disturbs, and what they printed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    return output, ended(*pair(start, output))


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory):
    """A run whose second process was killed, and how the first one ended."""
    output = tmp_path_factory.mktemp("killed") / "run"
    first, second = pair(start, output)
    while not (output / "checkpoints" / "8").exists():
        assert second.poll() is None, second.communicate()
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    _, said = first.communicate(timeout=60)
    second.communicate()
    return output, first.returncode, said


def test_when_one_is_killed_the_other_ends_and_both_go_on_with_the_same_bits(start, killed, whole_run):
    """From the checkpoint before the newest, of which what only the second reads is damaged."""
    output, status, said = killed
    assert whole_run[1][0].splitlines()[-3].startswith("adapter ")
    assert "adapter" not in whole_run[1][1]
    assert status != 0  # by itself, or where a checkpoint was under way by jax
    assert said.splitlines()[-3] == "error: All processes of a run must go on until it ends."
    assert not (output / "adapter").exists()
    shutil.copytree(output, output.parent / "copy")  # for the next test
    newest = max((output / "checkpoints").iterdir(), key=lambda step: int(step.name))
    for part in (newest / "state" / "ocdbt.process_1" / "d").iterdir():
        part.write_bytes(part.read_bytes()[:7])
    ended(*pair(start, output, "--resume"))
    assert (output / "damaged_checkpoints" / newest.name).is_dir()
    assert (output / ADAPTER).read_bytes() == (whole_run[0] / ADAPTER).read_bytes()


def test_one_process_goes_on_on_another_mesh(start, killed, whole_run):
    alone = killed[0].parent / "copy"
    ended(start(4, alone, "--resume", "--mesh", "fsdp=2,tensor=2"))
    # Sums of float32 in another order; the steps have changed the adapter by 1e-3.
    assert furthest(alone, whole_run[0]) < 1e-6
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (alone, whole_run[0]))
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - {"tokens_per_second"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_two_processes_evaluate_as_one(command, whole_run):
    def evaluating(devices, *options):
        adapter = whole_run[0] / "adapter"
        return command(devices, "evaluate", "--adapter", adapter, "--max-tokens", 300, "--json", *options)

    processes = pair(evaluating, "--verbose")
    (first, remarks), (second, others) = [process.communicate(timeout=300) for process in processes]
    (alone,) = ended(evaluating(1))
    assert [process.returncode for process in processes] == [0, 0], (remarks, others)
    assert second == ""
    assert "leaves that it does not divide" in remarks
    assert "leaves that it does not divide" not in others
    ours, theirs = json.loads(first.splitlines()[-1]), json.loads(alone)  # gloo says that it has connected
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-6)  # sums in another order
    assert ours["tokens"] == theirs["tokens"]
    for process in pair(evaluating, second=("--stride", 4)):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "stride: None in process 0, 4 in process 1" in said


def test_other_texts_under_the_same_name_are_refused_by_each_before_they_are_measured(command, tmp_path):
    """Of one as many rows as of the other, for which a batch would be put together of both."""
    for number, word in enumerate(("fox", "fish")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "t.txt").write_text(f"the {word} jumps over lazy dogs\n" * 8)

    def evaluating(devices, *options):
        number = options[options.index("--process-id") + 1]
        return command(devices, "evaluate", "--data", "t.txt", *options, cwd=tmp_path / str(number))

    for process in pair(evaluating):
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "rows: " in said
        assert "in process 0" in said


def test_other_settings_are_refused_by_each_before_the_weights_are_read(start, tmp_path):
    started = pair(start, tmp_path / "run", second=("--rank", 8))
    for process in started:
        printed, said = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "rank: 64 in process 0, 8 in process 1" in said
        assert "data " not in printed
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_does_not_answer_ends_in_time(start, tmp_path):
    begun = time.monotonic()
    nowhere = ("--coordinator", f"localhost:{free_port()}", "--num-processes", 2, "--process-id", 1)
    process = start(1, tmp_path / "run", *nowhere, "--join-timeout", 2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: The processes of a run must meet within 2 seconds.\n" in said
    assert time.monotonic() - begun < 60
