"""Damaged files against every reader: each case ends in our error or in a right result, within its limits.

A case that fails is named by its reader and seed, with the command that repeats it.
"""

import sys
import time

import pytest

from hylorada_jax.errors import DataError
from parity_tests.fuzz import cases, worker
from parity_tests.fuzz.cases import Workshop, cases_of
from parity_tests.fuzz.readers import READERS

CASES = 35


@pytest.fixture(scope="module")
def workshop():
    with Workshop() as workshop:
        yield workshop


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_costs_its_user_an_error_or_nothing(reader, workshop):
    whole = workshop.ask(reader, None)
    assert whole.end == "result", whole
    found = [workshop.ask(reader, seed) for seed in cases_of(reader, CASES)]
    wrong = [str(outcome) for outcome in found if outcome.end == "wrong"]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(found)} cases", *wrong])
    assert {outcome.end for outcome in found} >= {"refused"}


def _bug(path):
    return dict[str, str]()["absent"]


def _stranger(path):
    return (path.parent / "private.json").read_text()


def _vandal(path):
    (path.parent / "notes.txt").write_text("mine")


def _glutton(path):
    return len(bytearray(b"x" * 400 * 2**20))


def _sloth(path):
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


def _babbler(path):
    error = DataError("A rule", "", "")
    error.args = ("\x1b[2J",)
    raise error


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (_bug, "KeyError in test_fuzz.py"),
        (_stranger, "a private file was read"),
        (_vandal, "a file outside the output was changed"),
        (_glutton, "MiB"),
        (lambda path: bytes(2**40), "MemoryError"),
        (_sloth, "0.3 s"),
        (_babbler, "a message of"),
    ],
)
def test_what_a_reader_may_not_do_is_noticed(read, said, monkeypatch):
    monkeypatch.setattr(worker, "MAX_SECONDS", 0.2)
    monkeypatch.setitem(READERS, "documents", READERS["documents"]._replace(read=read, follows=False))
    outcome = worker.case("documents", 0, lambda how: None)
    assert outcome["end"] == "wrong"
    assert said in outcome["said"]


def test_a_case_that_hangs_or_kills_its_process_is_named_and_the_next_one_runs(monkeypatch):
    monkeypatch.setattr(cases, "PROGRAM", [sys.executable, "-c", _FATAL])
    monkeypatch.setattr(cases, "PATIENCE", 0.5)
    with Workshop() as workshop:
        ends = [workshop.ask("documents", seed) for seed in (1, 2, 3)]
    assert [outcome.said for outcome in ends] == ["no end after 0.5 s", "the process died with 3", ""]
    assert "documents --first 1 --cases 1" in str(ends[0])


_FATAL = """
import json, sys, time
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    print(json.dumps("how"), flush=True)
    if line.endswith(" 1\\n"):
        time.sleep(60)
    if line.endswith(" 2\\n"):
        sys.exit(3)
    print(json.dumps({"end": "refused", "said": ""}), flush=True)
"""
