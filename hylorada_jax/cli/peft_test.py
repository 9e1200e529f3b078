"""The exchange with PEFT on the command line."""

import re

from hylorada_jax.cli.cli_test import run
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from hylorada_jax.saved.saved_adapter import open_adapter


def test_an_adapter_goes_to_a_bucket_and_back_by_the_addresses_that_are_printed(
    tiny, bucket, tmp_path, monkeypatch, capsys
):
    own, theirs, back = tmp_path / "own", "gs://bucket/cli/peft", "gs://bucket/cli/back"
    HyLoRADAModel(load_model(tiny), HyLoRADAConfig(method="hylorada_v1", lora_rank=2)).save_pretrained(own)
    found = run(monkeypatch, capsys, "export-peft", "--adapter", own, "--output", theirs)
    assert found[:2] == (0, f"{theirs}\n")
    found = run(monkeypatch, capsys, "import-peft", "--model", tiny, "--adapter", theirs, "--output", back)
    assert found[:2] == (0, f"{back}\n")
    assert open_adapter(back).shapes.keys() < open_adapter(own).shapes.keys()  # DoRA has no gates


def test_what_an_adapter_does_not_have_is_not_reported_as_dropped(tiny, tmp_path, monkeypatch, capsys):
    HyLoRADAModel(load_model(tiny), HyLoRADAConfig(lora_rank=2)).save_pretrained(tmp_path / "own")
    taken = ("--adapter", tmp_path / "own", "--output", tmp_path / "peft", "--sample", "the")
    dropped = ("--drop", "structure", "daa", "position_bias")
    status, _, err = run(monkeypatch, capsys, "export-peft", *taken, *dropped)
    assert status == 0
    assert re.findall("dropped (.*?):", err) == ["daa", "position_bias"]
