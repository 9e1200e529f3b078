"""Oracle: the records themselves, and the probe run by hand."""

import json
import math
import shutil
from typing import Any

import pytest

from benchmarks import recall, trial
from hylorada_jax.errors import CheckpointError, ConfigError, DataError
from hylorada_jax.evaluation.retrieval import evaluate_retrieval
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def long_rows(tiny, tmp_path_factory):
    """The model, whose tokens are bytes, with room for a context."""
    directory = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(tiny, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return directory


def test_methods_are_trained_and_tested_on_the_same_contexts(long_rows, tmp_path, monkeypatch):
    options: dict[str, Any] = {
        "model": str(long_rows), "methods": ("hylorada_v1", "with the position gate"), "steps": 2,
        "train_lengths": (1024,), "test_lengths": (1024,), "samples": 1, "seeds": (0,),
    }  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("<!-- results:recall -->\n<!-- end -->\n")
    recall.main(output=tmp_path, page=page, **options)
    records = {
        record["settings"]["method"]: record
        for record in map(json.loads, (path.read_text() for path in (tmp_path / "recall").glob("*.json")))
    }
    assert set(records) == {"base", *options["methods"]}
    probed = evaluate_retrieval(
        load_model(str(long_rows)), load_tokenizer(str(long_rows)), seq_len=1024, samples=1, facts=10
    )
    found = records["base"]["result"]["lengths"]["1024"]["losses"]
    assert [loss for [loss] in found] == pytest.approx([loss for [loss] in probed.losses], abs=1e-3)
    first = [records[name]["result"]["losses"][0] for name in options["methods"]]
    assert first[0] == pytest.approx(first[1], abs=1e-4)  # an adapter starts as the identity

    without, gated = (records[name]["result"]["lengths"]["1024"]["losses"] for name in options["methods"])
    without, gated = ([loss for [loss] in losses] for losses in (without, gated))
    effect = math.exp(sum(gated) / 10) - math.exp(sum(without) / 10)
    row = next(line for line in page.read_text().splitlines() if line.startswith("| with the position gate"))
    assert float(row.split("|")[3].split()[0]) == pytest.approx(effect, abs=0.006)
    assert (tmp_path / "recall" / "accuracy.png").stat().st_size > 5_000
    for record in records.values():
        record["settings"]["seed"] = 0 if record["settings"]["method"] == "base" else 1
    assert ". Of one seed." in recall.table([*records.values()])  # the base has none
    records["base"]["environment"] |= {"commit": "0123", "cpu": "Another"}  # it was run before the others
    devices, commits = recall.table([*records.values()]).split(" On ")[1].split(". Commits ")
    assert " and " in devices
    assert "Another" in devices
    assert commits.startswith("0123, ")

    monkeypatch.setattr(trial.Runner, "train", None)  # what is there is not done again
    recall.main(output=tmp_path, **options)
    with pytest.raises(CheckpointError, match="steps 2, now 3"):
        recall.main(output=tmp_path, **options | {"steps": 3})


def test_bad_input_is_refused_before_a_model_is_loaded(long_rows, tmp_path):
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"methods": ("hylorada_v3",)}, ConfigError, "hylorada_v3"),
        ({"seeds": ()}, ConfigError, "seeds"),
        ({"test_lengths": (128,)}, DataError, "seq_len 128"),
    )
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            recall.main(output=tmp_path, **{"model": str(long_rows)} | options)
    assert not (tmp_path / "recall").exists()
