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


def test_the_table_has_the_differences_of_the_runs(tiny, tmp_path, monkeypatch):
    source = "def f(x):\n    if x:\n        return [x, (1, {2: [3]})]\n"
    some = [Document(f"{n}.py", source.replace("f", f"f{n}") * 9) for n in range(3)]
    monkeypatch.setattr(corpus, "load_documents", lambda *source: some)
    monkeypatch.setattr(nesting, "METHODS", (nesting.WITHOUT, nesting.READING))
    options: dict[str, Any] = {"model": str(tiny), "steps": 2, "seq_len": 64, "seeds": (0,)} | {
        "shallow": 1,
        "deep": 2,
    }
    page = tmp_path / "page.md"
    page.write_text("<!-- results:nesting -->\n<!-- end -->\n")
    nesting.main(output=tmp_path, page=page, **options)
    records = [json.loads(path.read_text()) for path in (tmp_path / "nesting").glob("*.json")]
    assert len(records) == 1 + 2
    perplexities: dict[str, list[float]] = {}
    for record in records:
        total, tokens = map(sum, zip(*record["result"]["deep"], strict=True))
        perplexities.setdefault(record["settings"]["method"], []).append(math.exp(total / tokens))
    row = next(
        line.split("|") for line in page.read_text().splitlines() if line.startswith(f"| {nesting.READING} |")
    )
    effect = np.mean(perplexities[nesting.READING]) - np.mean(perplexities[nesting.WITHOUT])
    assert float(row[5].split()[0]) == pytest.approx(effect, abs=6e-4)
    some[:] = [Document(f"{n}.py", source.replace("f", f"g{n}") * 9) for n in range(3)]
    with pytest.raises(CheckpointError, match="sha256"):
        nesting.main(output=tmp_path, **options)
    with pytest.raises(ConfigError, match="shallow 1, deep 1"):
        nesting.main(output=tmp_path, **options | {"deep": 1})
    with pytest.raises(ConfigError, match="deep 50"):
        nesting.main(output=tmp_path, **options | {"deep": 50})
