"""Oracle of the commands on eight devices: the same commands on one of them.

The devices are a CPU's, in one process beside this one, which runs the commands; the tests judge what it
found.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from hylorada_jax.cli.main import main

MESH = ("--mesh", "fsdp=2,tensor=2", "--verbose")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
# Twice this is more than the tiny model's weights take, and this is less.
SMALL, LARGE = 50_000, 10**9


def command(*arguments, memory=None, said=""):
    """What a command prints and reports, on devices of so many bytes."""
    printed, reported = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hylorada", *map(str, arguments)]),
        mock.patch("hylorada_jax.training.memory.device_memory", return_value=memory),
        mock.patch.object(sys, "stdin", io.StringIO(said)),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(reported),
    ):
        main()
    return printed.getvalue(), reported.getvalue()


def measure(model, directory):
    """What is found on eight devices, as JSON on stdout."""
    # The trainer's own look at the memory stays: it would compile for these devices.
    import hylorada_jax.training.trainer  # noqa: F401

    texts, template = Path(directory) / "texts.txt", Path(directory) / "template.jinja"
    texts.write_text("".join(f"{n} brown foxes jump over {n * n} lazy dogs\n" for n in range(40)))
    template.write_text(TEMPLATE)
    of = ["--model", model]
    training = ["--data", texts, "--seq-len", 16, "--batch-size", 8, "--steps", 2, "--eval-tokens", 64]
    training += ["--method", "dora", "--learning-rate", 0.01, "--prompt="]
    found: dict[str, Any] = {}
    run = Path(directory) / "run"
    printed, reported = command("finetune", *of, *training, "--output", run, "--verbose", memory=SMALL)
    found["undivided"] = {"finetune": reported}
    found["announced"] = next(line for line in printed.splitlines() if line.startswith("mesh"))
    found["recorded"] = json.loads((run / "run.json").read_text())["recorded"]["mesh"]
    adapted = [*of, "--adapter", run / "adapter"]

    asked = ["--prompt", "brown", "--max-new-tokens", 6]
    talking = ["--chat-template", template, "--max-new-tokens", 6]
    evaluating = ["--data", texts, "--seq-len", 16, "--max-tokens", 200, "--json"]
    for name, mesh, memory in (("alone", (), LARGE), ("mesh", MESH, LARGE), ("cut", (), SMALL)):
        runs = {
            "evaluated": command("evaluate", *adapted, *evaluating, *mesh, memory=memory),
            "generated": command("generate", *adapted, *asked, *mesh, memory=memory),
            "said": command("chat", *adapted, *talking, *mesh, memory=memory, said="foxes\n"),
        }
        found[name] = {key: printed for key, (printed, _) in runs.items()}
        if name == "mesh":
            found["undivided"] |= {key: reported for key, (_, reported) in runs.items()}
        found[name]["announced"] = {key: "mesh fsdp=8" in reported for key, (_, reported) in runs.items()}

    command("merge", "--adapter", run / "adapter", "--output", f"{directory}/merged", *of)
    merged = ["--model", f"{directory}/merged", *evaluating]
    found["merged"] = command("evaluate", *merged, *MESH)[0]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_on_devices, tiny):
    program = f"import sys\nfrom {__name__} import measure\nmeasure(*sys.argv[1:])"
    return json.loads(run_on_devices(8, program, tiny, tmp_path_factory.mktemp("commands")))


def test_weights_are_cut_where_a_copy_would_leave_no_room_to_train(found):
    assert found["announced"].startswith("mesh     fsdp=8: the weights are cut, for a copy would take ")
    assert found["recorded"] == "fsdp=8"


def test_verbose_lists_the_leaves_that_the_mesh_does_not_divide(found):
    table = "model/embed_tokens/embedding (257, 16)"  # tied to the head; all other axes are even
    for key, reported in found["undivided"].items():
        mesh = "data=1,fsdp=8,tensor=1" if key == "finetune" else "data=2,fsdp=2,tensor=2"
        lines = ["0"] if key == "finetune" else ["1", f"  {table}, not over tensor"]
        expected = "\n".join([f"mesh {mesh}: leaves that it does not divide: {lines[0]}", *lines[1:], ""])
        assert expected in reported, key
    assert found["undivided"].keys() == {"finetune", "evaluated", "generated", "said"}


@pytest.mark.parametrize("name", ["mesh", "cut"])
def test_a_command_on_a_mesh_says_what_it_does_on_one_device(name, found):
    ours, alone = found[name], found["alone"]
    assert ours["generated"] == alone["generated"]
    assert ours["said"] == alone["said"]
    perplexities = [json.loads(each["evaluated"])["perplexity"] for each in (ours, alone)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)  # float32, sums in another order
    assert set(ours["announced"].values()) == {name == "cut"}
    assert not any(alone["announced"].values())


def test_an_adapter_of_a_mesh_is_merged(found):
    merged, adapted = (
        json.loads(each)["perplexity"] for each in (found["merged"], found["alone"]["evaluated"])
    )
    assert merged == pytest.approx(adapted, rel=1e-5)  # W + sBA, rounded to float32
