"""What ends a command, seen from outside: one message, and the exit status that shells know."""

import os
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest

from hylorada_jax.cli import main as module
from hylorada_jax.errors import DataError

HOSTILE = "\x1b[2J\u202e\nerror: forged"


def ends_with(error, monkeypatch, capsys):
    """(exit status, what is reported) of a command that raises an error."""

    def command():
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "file.py", 1))
        raise error

    monkeypatch.setattr(module, "_run", command)
    with pytest.raises(SystemExit) as stop:
        module.main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError(HOSTILE, HOSTILE * 1000, HOSTILE), 2),
        (OSError(5, HOSTILE, HOSTILE), 2),
        (UnicodeEncodeError("ascii", "é", 0, 1, HOSTILE), 2),
        (MemoryError(HOSTILE), 1),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes" + HOSTILE), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_ends_a_command_is_one_safe_message(error, status, monkeypatch, capsys):
    code, message = ends_with(error, monkeypatch, capsys)
    assert code == status
    assert message.startswith("warning: \\x1b[2J\\u202e\n    error: forged\n")
    assert not set(message) & set(map(chr, [*range(10), *range(11, 32), 127]))
    own = [line for line in message.split("\n") if not line.startswith("    ")]
    assert sum(line.startswith(("error: ", "interrupted")) for line in own) == 1
    assert ("\n  remedy:   " in message) == (status != 130)
    assert len(message) < 6000


def test_what_is_our_own_fault_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(module, "_run", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        module.main()


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hylorada", "--version"])
    module.main()
    assert capsys.readouterr().out == f"hylorada {version('hylorada')}\n"


INTERRUPTED = """
import enum, os, signal, sys
import hylorada_jax.__main__
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
call = enum.EnumType.__call__
def interrupting(*arguments, **options):
    if sys._getframe(1).f_code.co_name == "_call_with_frames_removed":  # from jaxlib's initialisation, in C++
        os.kill(os.getpid(), signal.SIGINT)
    return call(*arguments, **options)
enum.EnumType.__call__ = interrupting
sys.argv = ["hylorada", "params"]
hylorada_jax.__main__.main()
"""


def test_an_interrupt_while_jax_is_imported_ends_the_command_like_any_other():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_output_that_nobody_reads_ends_the_command_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hylorada_jax", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "interrupted: nobody reads the output\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("finetne", "--output", "a"), "Did you mean finetune"),
        (("finetune", "--output", "a", "--warmup-ratio", "2"), "--warmup-ratio must be in [0, 1].\n"),
        (("finetune", "--output", "a", "--keep", "best"), "remedy:   Give --eval-every too"),
        (
            ("finetune", "--output", "a", "--recipe", "run.yaml"),
            "--steps must be an integer ≥ 1.\n  received: run",
        ),
        (("params", "--daa-position-bias"), "remedy:   Set --daa too"),
        (("finetune", "--output", ""), '--output ""'),
        (("evaluate", "--data", "a.txt", "--adapter="), "or leave --adapter out"),
        (("finetune", "--output", "a", "--data", "a.txt", "--data=b.txt"), "behind one --data"),
        (
            ("export-peft", "--adapter", "a", "--output", "b", "--drop", "daa", "--drop", "sparse"),
            "one --drop",
        ),
        (
            ("finetune", "--output", "a", "--recipe", "empty.yaml"),
            'an option beside it: --data ""',
        ),
    ],
)
def test_settings_that_are_refused_are_called_by_their_options(
    arguments, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("steps: 0")
    (tmp_path / "empty.yaml").write_text('data: [""]')
    monkeypatch.setattr(sys, "argv", ["hylorada", *arguments])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
