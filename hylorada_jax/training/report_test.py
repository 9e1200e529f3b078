import json
import math
import os

import numpy as np
import pytest

from hylorada_jax.errors import CheckpointError
from hylorada_jax.training import report
from hylorada_jax.training.report import MetricsLog, Speed, plot_losses, read_metrics


def test_lines_up_to_the_resumed_step_stay_and_later_ones_go(tmp_path):
    path, board = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    with MetricsLog(path, board, last_step=0) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": step / 3})
        log.write({"step": 3, "eval_loss": 2.0, "eval_perplexity": 7.4})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    with MetricsLog(path, board, last_step=2) as log:
        assert log.evaluation_at(3) is None
        evaluation = {"step": 3, "eval_loss": 3.0, "eval_perplexity": 20.1}
        log.write(evaluation)
        assert log.evaluation_at(3) == evaluation
    expected = [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}, evaluation]
    assert read_metrics(path) == expected


def test_an_infinite_number_is_written_as_json_and_read_again(tmp_path):
    line = {"step": 1, "eval_loss": 800.0, "eval_perplexity": math.inf}
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board", last_step=0) as log:
        log.write(line)
    written = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == line | {"eval_perplexity": None}
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board", last_step=1) as log:
        assert log.evaluations == [line]
    assert (tmp_path / "metrics.jsonl").read_text() == written


def test_the_bests_are_those_of_less_than_any_before(tmp_path):
    rng = np.random.default_rng(0)
    for losses in (rng.integers(0, 4, (20, 6)) / 3).tolist():
        with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board", last_step=-1) as log:
            for step, loss in enumerate(losses):
                log.write({"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss)})
                log.write({"step": step, "loss": 0.0})
            expected = [
                step for step, loss in enumerate(losses) if loss < min(losses[:step], default=math.inf)
            ]
            assert [record["step"] for record in log.bests] == expected


def test_a_damaged_line_is_an_error_of_ours(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n{"st\xff\n{"step": 3, "loss": 1}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("line", [
    b"3", b"null", b"[]", b"{}", b'{"step": 1}', b'{"loss": 1}', b'{"step": -1, "loss": 1}', b"[" * 10**4,
    b'{"step": "1", "loss": 1}', b'{"step": 1.5, "loss": 1}', b'{"step": true, "loss": 1}', b" " * 2**17,
    b'{"step": 1, "loss": "1"}', b'{"step": 1, "loss": null}', b'{"step": 1, "loss": [1]}', b"9" * 5000,
    b'{"step": 1, "loss": 1, "\\ud800": 1}', b'{"step": 1, "loss": NaN}',
    b'{"step": 1, "loss": Infinity}', b'{"step": 1, "loss": 1e308}',
    b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", b'{"step": 1, "eval_loss": 1}',
    b'{"step": 1, "eval_loss": "1", "eval_perplexity": 1}',
    b'{"step": 1, "eval_loss": 1, "eval_perplexity": 1, "loss": "1"}',
    b'{"step": 1, "eval_loss": 1, "eval_perplexity": {}}',
])  # fmt: skip
def test_a_line_that_no_run_wrote_is_an_error_of_ours(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n' + line + b"\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl") as error:
        MetricsLog(path, tmp_path / "board", last_step=5)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_metrics_that_are_no_file_are_an_error_of_ours(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="not a file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_is_drawn_of_any_lines_that_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for loss in ("0", "-1e-9", "3.4e38", "-3.4e38", "12345678901234567890123456789"):
        path.write_text(f'{{"step": 1, "loss": {loss}}}\n{{"step": 2, "loss": 3}}\n')
        plot_losses(read_metrics(path), tmp_path / "loss.png")


@pytest.mark.parametrize("flag", [os.O_APPEND, os.O_EXCL])
@pytest.mark.parametrize("leads_to", ["private", "nothing"])
def test_what_is_written_as_a_run_goes_on_is_written_through_no_link(tmp_path, flag, leads_to):
    (tmp_path / "private").write_text("mine")
    (tmp_path / "planted").symlink_to(tmp_path / leads_to)
    with pytest.raises(OSError, match=r"symbolic links|File exists"):
        report._Appending(tmp_path / "planted", flag)
    assert (tmp_path / "private").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"private", "planted"}


def test_speed_is_tokens_over_time_since_the_restart(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 10.0, 12.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    speed = Speed()
    assert (speed.add(100), speed.add(300)) == (100.0, 200.0)
    speed.restart()
    assert speed.add(50) == 25.0


def test_the_running_mean_starts_without_bias_and_follows():
    mean = report._running_mean([5.0] * 50 + [1.0] * 50)
    assert mean[:50] == pytest.approx([5.0] * 50)
    assert mean[-1] == pytest.approx(1.0, abs=1e-3)  # (1 − 1/5)^50 of the step is left


@pytest.mark.parametrize("records", [[{"step": 1, "loss": 2.0}], [{"step": 0, "eval_loss": 1.0}]])
def test_a_plot_of_little_is_still_a_png(tmp_path, records):
    plot_losses(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_has_every_value(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board", last_step=0) as log:
        log.write({"step": 7, "loss": 0.5, "learning_rate": 1e-3})
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "loss"]
    (loss,) = events.Scalars("loss")
    assert (loss.step, loss.value) == (7, 0.5)


def test_without_tensorboard_nothing_is_written_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.summary.writer.record_writer", None)
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "board", last_step=0) as log:
        log.write({"step": 1, "loss": math.pi})
    assert not (tmp_path / "board").exists()
