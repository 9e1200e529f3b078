"""Would the parity tests notice? Every fault of the table must make one of them fail.

python -m parity_tests.mutate [--only NAME ...] [--jobs 2] [--output FILE.json]
"""

import contextlib
import dataclasses
import io
import multiprocessing
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Literal

import hypothesis
import pytest
import tyro

import conftest  # noqa: F401 - says in the environment where jax keeps compiled programs
from hylorada_jax.io.files import write_json
from parity_tests.environment import environment
from parity_tests.faults import FAULTS, Fault

# What takes seconds to import, and has no fault: the process that all runs are forked from imports it once.
PRELOADED = [
    "flax.linen",
    "optax",
    "torch",
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("bert", "gpt2", "llama", "qwen2", "t5")),
]
# These say that the edited text is not a program: such a fault would be caught by anything.
NO_PROGRAM = ("NameError", "UnboundLocalError", "AttributeError", "ImportError", "SyntaxError")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
        verdict: caught, survived, or broken: the tests could not judge it.
        tests: the first tests that failed.
        message: what the first of them said; of a broken fault, why.
        seconds: how long it took.
    """

    verdict: Literal["caught", "survived", "broken"]
    tests: tuple[str, ...]
    message: str
    seconds: float


def main(*, only: tuple[str, ...] = (), jobs: int = 2, output: Path | None = None) -> None:
    """Puts one fault after another into the code, in memory, and runs the parity tests of its place.

    The tests are run without a fault first: where one fails, the table would mean nothing. The exit status is
    1 where a fault is not caught.

    Args:
        only: names of faults; all by default.
        jobs: processes at a time.
        output: a JSON file for the table.
    """
    if unknown := set(only) - set(FAULTS):
        sys.exit(f"no such fault: {', '.join(unknown)}\nthere are: {', '.join(FAULTS)}")
    faults = [FAULTS[name] for name in only or FAULTS]
    selections = sorted({fault.tests for fault in faults})
    for tests, outcome in zip(
        selections, run_all([(tests, None) for tests in selections], jobs), strict=True
    ):
        if outcome.verdict != "survived":
            sys.exit(f"not green without a fault: {' '.join(tests)}\n{outcome.message}")
    print(f"{len(selections)} selections of tests are green without a fault", flush=True)
    outcomes = {}
    for fault, outcome in zip(faults, run_all([(fault.tests, fault) for fault in faults], jobs), strict=True):
        outcomes[fault.name] = outcome
        verdict = f"by {len(outcome.tests)}" if outcome.tests else outcome.verdict.upper()
        first = outcome.tests[0] if outcome.tests else outcome.message
        print(f"{fault.name:<42} {verdict:<8} {outcome.seconds:3.0f} s  {first}", flush=True)
    missed = [name for name, outcome in outcomes.items() if outcome.verdict != "caught"]
    print(f"{len(outcomes) - len(missed)} of {len(outcomes)} faults are caught", *missed, sep="\n")
    if output is not None:
        table = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
        record = {"command": "python -m parity_tests.mutate", **environment(), "faults": table}
        write_json(output, record)
    sys.exit(bool(missed))


def run_all(runs: Iterable[tuple[tuple[str, ...], Fault | None]], jobs: int) -> Iterator[Outcome]:
    """The outcomes of runs of pytest, each in a fresh process, in order.

    Args:
        runs: arguments of pytest that select tests, and what is put into the code; None: it is as it is.
        jobs: processes at a time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(jobs, context, max_tasks_per_child=1) as pool:
        yield from pool.map(_run, *zip(*runs, strict=True))


def _run(tests: tuple[str, ...], fault: Fault | None) -> Outcome:
    start, watch, text = time.monotonic(), _Watch(), io.StringIO()
    if fault is not None:
        _install(fault)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = pytest.main([*tests, "-p", "no:cacheprovider", "--maxfail=3"], plugins=[watch])
    seconds, message = time.monotonic() - start, next(iter(watch.failures.values()), "")
    if status == pytest.ExitCode.OK:
        return Outcome("survived", (), "", seconds)
    if status != pytest.ExitCode.TESTS_FAILED or message.startswith(NO_PROGRAM):
        return Outcome("broken", (), message or text.getvalue()[-500:], seconds)
    return Outcome("caught", tuple(watch.failures), message, seconds)


def _install(fault: Fault) -> None:
    """Edits the source of the fault's module as it is loaded; nothing on disk changes."""
    load = SourceFileLoader.get_code

    # At the loader and not as a finder: the hook that checks shapes at run time has a loader of its own, and
    # that inherits this. At the code and not at the source: code is also kept on disk, and looked up there.
    def get_code(self: SourceFileLoader, name: str) -> object:
        if name != fault.module:
            return load(self, name)
        return self.source_to_code(fault.edited().encode(), self.path)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]


class _Watch:
    """A pytest plugin: keeps what failed. Examples of hypothesis are neither shrunk nor kept."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}

    def pytest_sessionstart(self) -> None:
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile(
            "fault", hypothesis.settings(), phases=phases, database=None, report_multiple_bugs=False
        )
        hypothesis.settings.load_profile("fault")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures[report.nodeid] = str(crash.message if crash else report.longrepr).split("\n")[0]


if __name__ == "__main__":
    tyro.cli(main)
