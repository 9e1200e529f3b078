"""Oracle: the depths themselves, and the records."""

import json
import math
from typing import Any

import numpy as np
import pytest

from benchmarks import nesting
from hylorada_jax.data import corpus
from hylorada_jax.data.examples import Document
from hylorada_jax.data.tokenization import tokenize
from hylorada_jax.errors import CheckpointError, ConfigError
from hylorada_jax.models.tokenizer import load_tokenizer


def test_only_tokens_of_the_depths_count(tiny):
    source = "def f(x):\n    if x:\n        return [x, (1, 2)]\n"
    documents = tokenize([Document("f.py", source)], load_tokenizer(str(tiny)), structure="code")
    for structure in (False, True):
        (document,) = nesting.counted(documents, 2, 3, structure=structure)
        assert document.has_structure == structure
        depths = documents[0].structure_ids
        assert depths is not None
        assert document.scored is not None
        np.testing.assert_array_equal(document.scored, [depth in (2, 3) for depth in depths])
        assert 0 < document.scored.sum() < len(document)


def perplexity(losses: Any) -> float:
    total, tokens = map(sum, zip(*losses, strict=True))
    return math.exp(total / tokens)


def test_the_table_has_the_differences_of_the_runs(tiny, tmp_path, monkeypatch):
    source = "def f(x):\n    if x:\n        return [x, (1, {2: [3]})]\n"
    some = [Document(f"{n}.py", source.replace("f", f"f{n}") * 9) for n in range(3)]
    monkeypatch.setattr(corpus, "load_documents", lambda *source: some)
    monkeypatch.setattr(nesting, "METHODS", (nesting.WITHOUT, nesting.READING))
    options: dict[str, Any] = {"model": str(tiny), "steps": 2, "seq_len": 64, "seeds": (0, 1)} | {
        "shallow": 1,
        "deep": 2,
        "learning_rates": (1e-9, 2e-3),
    }
    page = tmp_path / "page.md"
    page.write_text("<!-- results:nesting -->\n<!-- end -->\n")
    nesting.main(output=tmp_path, page=page, **options)
    records = [json.loads(path.read_text()) for path in (tmp_path / "nesting").rglob("*.json")]
    assert len(records) == 1 + 2 * (2 + 1)
    rows = [[cell.strip() for cell in line.split("|")] for line in page.read_text().splitlines()]
    perplexities: dict[str, list[float]] = {}
    for name in nesting.METHODS:
        found = {
            (record["settings"]["learning_rate"], record["settings"]["seed"]): record["result"]
            for record in records
            if record["settings"]["method"] == name
        }
        rate = min(options["learning_rates"], key=lambda rate: perplexity(found[rate, 0]["held_out"]))
        # Of two rates each is an end.
        assert [f"{rate:g} †"] == [row[2] for row in rows if row[1:2] == [name]]
        perplexities[name] = [perplexity(found[rate, seed]["deep"]) for seed in (0, 1)]
    row = next(row for row in rows if row[1:2] == [nesting.READING])
    effect = np.mean(perplexities[nesting.READING]) - np.mean(perplexities[nesting.WITHOUT])
    assert float(row[6].split()[0]) == pytest.approx(effect, abs=6e-4)
    some[:] = [Document(f"{n}.py", source.replace("f", f"g{n}") * 9) for n in range(3)]
    with pytest.raises(CheckpointError, match="sha256"):
        nesting.main(output=tmp_path, **options)
    with pytest.raises(ConfigError, match="shallow 1, deep 1"):
        nesting.main(output=tmp_path, **options | {"deep": 1})
    with pytest.raises(ConfigError, match="deep 50"):
        nesting.main(output=tmp_path, **options | {"deep": 50})
    with pytest.raises(ConfigError, match="learning_rate"):
        nesting.main(output=tmp_path / "new", **options | {"learning_rates": (2e-3, -1.0)})
    assert not (tmp_path / "new").exists()
