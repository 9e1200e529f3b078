"""The command hylorada parity: what passes, what fails, and what is said of it."""

import json
import math
import sys

import jax
import numpy as np
import transformers

from hylorada_jax.cli.main import main
from parity_tests import measure, report, tolerances
from parity_tests.families import NEW
from parity_tests.layers import LAYERS
from parity_tests.models import MATRIX


def run(monkeypatch, *arguments):
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["hylorada", "parity", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


GATE = ("--only", "topk_gate", "--no-whole-models")


def test_the_report_of_a_layer_that_agrees(tmp_path, monkeypatch, capsys):
    output = tmp_path / "parity.json"
    assert run(monkeypatch, *GATE, "--output", output) == 0
    record = json.loads(output.read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert record["platform"] == jax.default_backend()
    assert [(row["direction"], row["dtype"]) for row in record["rows"]] == [
        (direction, dtype) for dtype in ("float64", "float32") for direction in ("forward", "gradient")
    ]
    assert all(0 <= row["error"] <= row["budget"] and row["passed"] for row in record["rows"])
    assert capsys.readouterr().out.count("  ok") == len(record["rows"])


def test_an_error_beyond_its_budget_gives_status_1_and_is_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tolerances.LAYER, "float32", 1e-12)
    output = tmp_path / "parity.json"
    assert run(monkeypatch, *GATE, "--output", output) == 1
    assert "FAILED" in capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    failed = [(row["direction"], row["dtype"]) for row in rows if not row["passed"]]
    assert failed == [("gradient", "float32")]  # the gate itself is 0 or 1, without error


def test_values_that_are_not_finite_and_programs_that_do_not_run_fail(monkeypatch):
    assert tolerances.relative_error([1.0, np.nan], [1.0, 2.0]) == math.inf

    def fails(*_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no float64 here")

    monkeypatch.setattr(measure, "errors", fails)
    (subject,) = (found for found in report.subjects(["topk_gate"]) if found.dtype == "float64")
    rows = list(report.measure(subject))
    assert not any(row.passed for row in rows)
    assert "no float64 here" in report.table(rows)


def test_bad_input_is_reported_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    output = tmp_path / "parity.json"
    assert run(monkeypatch, "--only", "lorra", "--output", output) == 2
    assert "shifted_sparse_attention" in capsys.readouterr().err  # the names there are
    assert run(monkeypatch, "--output", tmp_path / "missing" / "parity.json") == 2
    output.write_text("kept")
    assert run(monkeypatch, *GATE, "--output", output) == 2
    assert output.read_text() == "kept"


def test_every_layer_and_every_model_of_the_matrix_has_rows():
    names = {subject.name for subject in report.subjects()}
    left_out = [*NEW] if hasattr(transformers, "FlaxGPT2Model") else ["gpt2", "bert", "t5"]
    assert report.left_out() == left_out
    models = {f"{family}, {config}" for family, config in MATRIX if family not in left_out}
    assert names == {*LAYERS, *models}
