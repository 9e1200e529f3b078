"""Oracle: a compiler whose figures are known, and grow in a line with the layers."""

import contextlib
import json

import pytest

from benchmarks import scaling
from hylorada_jax.planning.cases import Figures

MODEL = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What was compiled: (topology, layers, case)."""
    asked = []

    @contextlib.contextmanager
    def for_topology(topology, config, *_):
        def compiled(case):
            layers = config["num_hidden_layers"]
            asked.append((topology, layers, case))
            sent = {"all-gather": 4.0 * layers, "all-reduce": 1.0}
            return Figures(case, 1, argument_bytes=7, temp_bytes=3 * layers, flops=10.0, sent_bytes=sent)

        yield compiled

    monkeypatch.setattr(scaling, "for_topology", for_topology)
    monkeypatch.setattr(scaling, "libtpu_directory", lambda: None)
    monkeypatch.setattr(
        scaling.importlib.metadata, "distributions", lambda **_: [type("Any", (), {"version": "1"})]
    )
    monkeypatch.setitem(scaling.SHAPES, "llama-8b", MODEL)
    return asked


@pytest.mark.parametrize("fits", [True, False])
def test_programs_are_kept_and_those_of_a_model_that_does_not_fit_carried_on(
    fits, asked, monkeypatch, tmp_path
):
    monkeypatch.setattr(scaling, "leaves_room", lambda held, memory: fits)
    for _ in range(2):  # the second time there is nothing to do
        scaling.main(output=tmp_path, models=("llama-8b",), chips=(4, 16, 64))
    depths = [40] if fits else [4, 8]
    weak, strong = [("fsdp=4", 1), ("fsdp=16", 1), ("fsdp=64", 1)], [("fsdp=4", 4), ("fsdp=16,tensor=4", 1)]
    assert sorted((case.mesh, case.microbatches, layers) for _, layers, case in asked) == sorted(
        (*case, layers) for case in weak + strong for layers in depths
    )
    record = json.loads((tmp_path / "scaling.json").read_text())
    expected = {"argument_bytes": 7, "temp_bytes": 120, "flops": 10, "sent_bytes": 161}
    assert [*record["programs"].values()] == [expected] * 5
    assert (tmp_path / "scaling.png").stat().st_size > 0
