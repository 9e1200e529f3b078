"""What the benchmarks' commands have in common."""

import pytest

from benchmarks import (
    attention_blocks,
    conversations,
    nesting,
    optimize_hylorada,
    recall,
    run_benchmark,
    step_time,
    time_series,
    tpu_compile,
    tpu_loss,
)
from hylorada_jax.errors import CheckpointError


@pytest.mark.parametrize(
    "benchmark",
    [
        attention_blocks,
        conversations,
        nesting,
        optimize_hylorada,
        recall,
        run_benchmark,
        step_time,
        time_series,
        tpu_compile,
        tpu_loss,
    ],
)
def test_an_output_that_cannot_be_written_is_reported_before_anything_is_measured(tmp_path, benchmark):
    (tmp_path / "output").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="The output must be a directory"):
        benchmark.main(output=tmp_path / "output")
    assert not (tmp_path / "nothing").exists()
