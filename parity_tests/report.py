"""What ``hylorada parity`` prints and writes: the suite's measurements on the default device."""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hylorada_jax.io.files import write_json
from parity_tests import models
from parity_tests.environment import environment
from parity_tests.families import FAMILIES, NEW, runs_in_jax
from parity_tests.layers import LAYERS
from parity_tests.measure import DTYPES, measure_layer, measured_in

# error and budget of "forward" and of "gradient"
Measured = Mapping[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: the layer, or the model family and its config.
        direction: "forward" or "gradient".
        dtype: of the base's weights and of the hidden states.
        error: the worst error, of the case nearest to its budget, as a part of the largest value.
        budget: what that case allows.
        case: which case it was.
    """

    name: str
    direction: str
    dtype: str
    error: float
    budget: float
    case: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget; an error that is not a number is not."""
        return self.error <= self.budget


class Subject(NamedTuple):
    """What rows are measured of: a layer or a model in one precision."""

    name: str
    dtype: str
    cases: Mapping[str, Callable[[], Measured]]


def subjects(patterns: Iterable[str] = ("*",), *, whole_models: bool = True) -> list[Subject]:
    """What there is to measure.

    Args:
        patterns: of names, with ``*`` for anything; one that matches suffices.
        whole_models: the registered models too, besides the layers.
    """
    found = [
        Subject(
            name,
            dtype,
            {edge: functools.partial(measure_layer, name, draw, dtype) for edge, draw in layer.edges.items()},
        )
        for name, layer in LAYERS.items()
        for dtype in DTYPES
        if measured_in(layer.case(next(iter(layer.edges.values()))), dtype)
    ]
    found += [
        Subject(
            f"{family}, {config}",
            dtype,
            {"random": functools.partial(models.measure_model, family, config, dtype)},
        )
        for family, config in (models.MATRIX if whole_models else ())
        if runs_in_jax(family)
        for dtype in (DTYPES if (family, config) in models.FULLEST else ("float64",))
    ]
    patterns = tuple(patterns)
    return [subject for subject in found if any(fnmatch.fnmatch(subject.name, p) for p in patterns)]


def left_out() -> list[str]:
    """The families of models that cannot be measured with the installed transformers."""
    return [family for family in dict.fromkeys((*FAMILIES, *NEW)) if not runs_in_jax(family)]


def measure(subject: Subject) -> Iterator[Row]:
    """The rows of one subject: in each direction, the case nearest to its budget, or furthest beyond."""
    measured = {case: _run(run) for case, run in subject.cases.items()}
    for direction in ("forward", "gradient"):
        found = {case: result[direction] for case, result in measured.items()}
        case, (error, budget) = max(found.items(), key=lambda item: item[1][0] / item[1][1])
        if math.isinf(error):  # not finite, or no result at all
            case = f"{case}: {measured[case].get('reason', 'a value is not finite')}"
        yield Row(subject.name, direction, subject.dtype, error, budget, case)


def _run(run: Callable[[], Measured]) -> dict[str, Any]:
    """The measurement; where the platform cannot compute it, an infinite error and the reason."""
    try:
        return dict(run())
    except jax.errors.JaxRuntimeError as error:
        nothing = (math.inf, 1.0)
        return {"forward": nothing, "gradient": nothing, "reason": str(error).splitlines()[0]}


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one to a line."""
    lines = [f"{'':34} {'':9} {'':9} {'worst error':>11} {'budget':>8}"]
    lines += [
        f"{row.name:34} {row.direction:9} {row.dtype:9} {row.error:11.1e} {row.budget:8.1e}"
        + ("  ok" if row.passed else f"  FAILED ({row.case})")
        for row in rows
    ]
    return "\n".join(lines)


def write(rows: Iterable[Row], path: Path, command: str) -> None:
    """Writes the rows as JSON, with what belongs beside them."""
    record: dict[str, Any] = {"command": command, **environment()}
    finite = lambda value: value if math.isfinite(value) else None  # JSON has no infinity
    record["rows"] = [
        dataclasses.asdict(row) | {"error": finite(row.error), "passed": row.passed} for row in rows
    ]
    write_json(path, record)
