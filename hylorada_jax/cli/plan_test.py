"""What `hylorada plan` refuses before it compiles, and what it says of this machine."""

import contextlib
import json
import shlex
import sys
from unittest import mock

import pytest

from hylorada_jax.cli.main import main

SHAPE = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))

    def run(options):
        words = ["hylorada", "plan", "--model", str(tmp_path), *shlex.split(options)]
        monkeypatch.setattr(sys, "argv", words)
        status: object = 0
        try:
            main()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--topology v7:2x2", "received: 'v7:2x2'"),
        ("--topology v5e:2x2x2", "received: 'v5e:2x2x2'"),
        ("--topology v5e:2x2 --mesh fsdp=3", "mesh 'fsdp=3' on 4 devices"),
        ("--topology v5e:2x4 --mesh fsdp=8 tensor=8", "tensor=8, 4 heads"),
        ("--topology v5e:2x2 --mesh model=4", "sizes of the axes"),
        ("--topology v5e:2x2 --method qlora", "invalid choice"),
        ("--topology v5e:2x2 --targets nothing", "nothing"),
        ("--topology v5e:2x2 --seq-len 1", "--seq-len must be at least 2"),
        ("--topology v5e:2x2 --rows 1 0", "--rows must be at least 1"),
        ("--topology v5e:2x2 --model no/such/place", "no such directory"),
        ("--topology v5e:2x2 --mesh fsdp=4", "needs the package libtpu"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(
    options, said, command, monkeypatch, tmp_path
):
    monkeypatch.setattr("hylorada_jax.planning.libtpu.sys.prefix", str(tmp_path))
    monkeypatch.setattr("hylorada_jax.planning.programs.figures_of", None)
    status, out, err = command(options)
    assert status == 2
    assert said in " ".join(err.split())
    assert not out


def test_another_kind_of_model_is_refused(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    status, _, err = command("--topology v5e:2x2")
    assert (status, "models of our decoder" in err) == (2, True)


@pytest.mark.parametrize(("chips", "mesh"), [("2x2", "data=4"), ("1x1", "")])
def test_copies_on_several_chips_are_named_in_the_command(chips, mesh, command, monkeypatch):
    """Without --mesh, finetune may cut the weights instead."""
    planned = mock.Mock(return_value=())
    monkeypatch.setattr("hylorada_jax.planning.plan.plan", planned)
    monkeypatch.setattr("hylorada_jax.planning.compiling.for_topology", lambda *_: contextlib.nullcontext())
    assert command(f"--topology v5e:{chips} --mesh ''")[0] == 0
    assert planned.call_args.kwargs["meshes"] == [mesh]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("1x1", "try --base-dtype nf4, shorter rows (--seq-len) or more chips"),
        ("1x1 --remat dots --base-dtype int8", "try --remat full, shorter rows (--seq-len) or more chips"),
        ("2x2 --base-dtype nf4", "try more heads' shares (tensor in --mesh), shorter rows"),
    ],
)
def test_where_nothing_fits_what_was_not_tried_is_named(options, said, command, monkeypatch):
    monkeypatch.setattr("hylorada_jax.planning.plan.plan", lambda *_, **__: ())
    monkeypatch.setattr("hylorada_jax.planning.compiling.for_topology", lambda *_: contextlib.nullcontext())
    assert said in command(f"--topology v5e:{options}")[1]


def test_a_directory_of_a_shapes_name_is_the_users_model(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-8b").symlink_to(tmp_path)
    planned = mock.Mock(return_value=())
    monkeypatch.setattr("hylorada_jax.planning.plan.plan", planned)
    monkeypatch.setattr("hylorada_jax.planning.compiling.for_topology", lambda *_: contextlib.nullcontext())
    assert command("--topology v5e:1x1 --model llama-8b")[0] == 0
    assert planned.call_args.args[0].config.hidden_size == SHAPE["hidden_size"]


@pytest.mark.apart
def test_the_devices_here_are_planned_for(command, tmp_path):
    status, out, _ = command("--topology here --seq-len 16 --rank 2 --no-lora-plus --remat full none --json")
    assert status == 0
    record = json.loads(out)
    assert [row["remat"] for row in record["rows"]] == ["full", "none"]
    for row in record["rows"]:
        assert row["argument_bytes"] < row["needed_bytes"]
    words = shlex.split(record["best"])
    assert words[:2] == ["hylorada", "finetune"]
    assert words[4:6] == ["--output", f"runs/{tmp_path.name}"]
    assert " ".join(words[6:]) == (
        "--rank 2 --no-lora-plus --remat none --batch-size 1 --seq-len 16 --dtype bfloat16"
    )
    status, out, _ = command("--topology here --seq-len 16 --remat full")
    header, line, *_ = out.splitlines()
    assert header.split()[:3] == ["mesh", "remat", "rows"]
    assert line.split()[:4] == ["one", "chip", "full", "1"]
