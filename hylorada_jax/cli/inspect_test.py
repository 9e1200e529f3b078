"""Laws: the text says what the JSON does, and plots are drawn of whatever an adapter has."""

import json
from pathlib import Path

import pytest

from hylorada_jax.cli.cli_test import run
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.saved.inspection import inspect_adapter
from hylorada_jax.saved.saved_adapter import open_adapter

FIXTURES = Path(__file__).parents[2] / "parity_tests" / "fixtures"
ADAPTERS = sorted(path.parent for path in FIXTURES.glob("*/adapter_config.json"))


@pytest.mark.parametrize("adapter", ADAPTERS, ids=[path.name for path in ADAPTERS])
def test_an_adapter_is_shown_as_table_json_and_plots(adapter, tmp_path, monkeypatch, capsys):
    output = tmp_path / "shown"
    status, out, _ = run(monkeypatch, capsys, "inspect", "--adapter", adapter, "--output", output, "--json")
    found = json.loads(out)
    assert status == 0
    assert found == json.loads((output / "inspection.json").read_text())
    assert found == json.loads(json.dumps(inspect_adapter(open_adapter(adapter))))
    assert (output / "plots.png").stat().st_size > 1_000
    _, text, _ = run(monkeypatch, capsys, "inspect", "--adapter", adapter)
    assert text.startswith(f"{found['method']}, trained on tiny\n")
    for key, line in (
        ("attention", "attention α"),
        ("position_factor", "position factor"),
        ("sparse", "units on"),
    ):
        assert (line in text) == (key in found)
    for layer in found["linear"]:
        assert f"\n{layer['name'].rpartition('.')[2]} " in text


@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_beside_its_base_an_adapter_has_column_scales_too(tiny, tmp_path, monkeypatch, capsys, base_dtype):
    base = load_model(tiny, base_dtype=base_dtype)
    model = HyLoRADAModel(base, HyLoRADAConfig(method="dora", lora_rank=2))
    model.save_pretrained(tmp_path / "fresh")
    options = ("inspect", "--adapter", tmp_path / "fresh", "--model", tiny)
    found = json.loads(run(monkeypatch, capsys, *options, "--json")[1])
    for layer in found["linear"]:
        assert layer["column_scale"] == pytest.approx([1, 1], rel=1e-6)  # float32
        assert layer["relative_norm"] == 0
    assert "‖sBA‖/‖W‖" in run(monkeypatch, capsys, *options)[1]
    status, _, err = run(monkeypatch, capsys, "inspect", "--adapter", ADAPTERS[0], "--model", tiny)
    assert status == 2
    assert "remedy" in err
