"""Law: an output that cannot be written, or is somebody's own, is reported before anything is read."""

from pathlib import Path

import pytest

from hylorada_jax.cli.cli_test import run
from hylorada_jax.io.files_test import plant
from hylorada_jax.training.run_directory_test import snapshot

# Nothing of it is there: whatever is read before the output is checked gives another error.
COMMANDS = {
    "finetune": ("--model", "./missing", "--data", "missing.txt"),
    "finetune --overwrite": ("--model", "./missing", "--data", "missing.txt"),
    "finetune --resume": ("--model", "./missing", "--data", "missing.txt"),
    "merge": ("--adapter", "missing", "--model", "./missing"),
    "inspect": ("--adapter", "missing", "--model", "./missing"),
    "export-peft": ("--adapter", "missing", "--model", "./missing"),
    "import-peft": ("--adapter", "missing", "--model", "./missing"),
    "generate": ("--model", "./missing", "--messages", "missing.jsonl"),
    "parity": ("--only", "missing"),
    "parity --overwrite": ("--only", "missing"),
}


def refused(command, output, monkeypatch, capsys):
    """The error, after which all is as it was."""
    name, *options = command.split()
    if name == "parity":  # without torch it says that first
        pytest.importorskip("torch")
    before = snapshot(Path.cwd())
    status, out, err = run(monkeypatch, capsys, name, *options, "--output", output, *COMMANDS[command])
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "remedy" in err
    assert snapshot(Path.cwd()) == before
    return err


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with what is in the way of an output."""
    monkeypatch.chdir(tmp_path)
    (place := tmp_path / "place").mkdir()
    plant(place)
    return place


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["file", "file/below/it", "link to nothing", "loop", "x" * 256, "pipe"])
def test_an_output_that_cannot_be_written(place, command, name, monkeypatch, capsys):
    if command.startswith(("parity", "generate")):
        name += "/output.json"
    error = refused(command, place / name, monkeypatch, capsys)
    assert "The output must be a directory" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_leading_tilde_is_the_users_home(place, command, monkeypatch, capsys):
    """As in --output=~/runs, which a shell leaves as it is."""
    monkeypatch.setenv("HOME", str(place))
    name = "~/file/output.json" if command.startswith(("parity", "generate")) else "~/file"
    error = refused(command, name, monkeypatch, capsys)
    assert f"{place / 'file'}" in error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_is_no_output(place, command, monkeypatch, capsys):
    """Else it would be a directory "s3:" beside the user's own."""
    assert "received: s3://bucket" in refused(command, "s3://bucket/run.json", monkeypatch, capsys)


@pytest.mark.parametrize("command", ["merge", "inspect", "generate", "parity"])
def test_in_a_bucket_are_runs_and_adapters_alone(place, command, monkeypatch, capsys):
    assert "received: gs://bucket" in refused(command, "gs://bucket/run.json", monkeypatch, capsys)


@pytest.mark.parametrize("command", ["finetune", "finetune --overwrite", "finetune --resume"])
def test_a_home_directory_with_a_users_own_work_is_no_run(place, command, monkeypatch, capsys):
    home = place / "home"
    for name in ("checkpoints/best", "adapter", "tensorboard"):
        (home / name).mkdir(parents=True)
    for name in ("checkpoints/best/model.bin", "adapter/adapter_config.json", "loss.png", "thesis.md"):
        (home / name).write_text("mine")
    error = refused(command, home, monkeypatch, capsys)
    assert "holds adapter (a directory), checkpoints (a directory), tensorboard" in error
    assert "no run.json" in error


@pytest.mark.parametrize(("command", "found"), [
    ("merge", "a new or an empty directory"), ("export-peft", "not overwritten unless asked to"),
    ("import-peft", "not overwritten unless asked to"),
])  # fmt: skip
def test_an_adapter_is_not_overwritten_even_by_way_of_a_link(place, command, found, monkeypatch, capsys):
    (place / "output").mkdir()
    (place / "output" / "adapter_config.json").symlink_to(place / "nothing")
    error = refused(command, place / "output", monkeypatch, capsys)
    assert found in error
    assert "overwrite=True" not in error  # which neither these commands have nor export_peft


@pytest.mark.parametrize("command", ["generate", "parity --overwrite"])
@pytest.mark.parametrize(("name", "found"), [
    ("directory", "which is none"), ("pipe", "which is none"), ("link to a pipe", "which is none"),
    ("x" * 256, "File name too long"), ("missing/output.json", "directory that exists"),
])  # fmt: skip
def test_a_file_that_cannot_be_written(place, command, name, found, monkeypatch, capsys):
    (place / "directory").mkdir()
    (place / "link to a pipe").symlink_to(place / "pipe")
    assert found in refused(command, place / name, monkeypatch, capsys)


@pytest.mark.parametrize("command", ["generate", "parity"])
@pytest.mark.parametrize("name", ["file", "link to a file", "link to nothing"])
def test_a_file_is_not_overwritten_unasked(place, command, name, monkeypatch, capsys):
    assert "not overwritten" in refused(command, place / name, monkeypatch, capsys)
