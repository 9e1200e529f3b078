import json
from pathlib import Path

import pytest

from benchmarks import base_dtypes
from benchmarks.base_dtypes import BASES, main, table
from hylorada_jax.errors import ConfigError, HyLoRADAError

ROOT = Path(base_dtypes.__file__).parents[1]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def llama(worded_llama):
    return worded_llama(**SHAPE)


@pytest.mark.apart
def test_every_base_is_tuned_on_the_same_rows(llama, tmp_path, capsys):
    pytest.importorskip("qwix")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results:base-dtypes -->\n<!-- end -->\nafter")
    sizes = {"steps": 3, "batch_size": 1, "seq_len": 32, "eval_tokens": 256}
    main(output=tmp_path / "results", page=page, model=llama, **sizes)
    (file,) = (tmp_path / "results").glob("base-dtypes-*.json")
    record = json.loads(file.read_text())
    text = table(record)
    assert text in capsys.readouterr().out
    assert page.read_text() == f"before\n<!-- results:base-dtypes -->\n{text}<!-- end -->\nafter"
    found = record["bases"]
    assert list(found) == list(BASES)
    first = found["bfloat16"]
    for name, one in found.items():
        assert len(one["losses"]) == 3
        assert len(one["seconds"]) == 2
        # What they are rounded to is near, and is not the same; an adapter starts as its base.
        assert (one["losses"][0] == first["losses"][0]) == (name == "bfloat16")
        assert one["losses"][0] == pytest.approx(first["losses"][0], rel=0.02)
        assert one["after"] != one["before"] == pytest.approx(first["before"], rel=0.1)
    assert first["paired_ratio"] == 1


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path):
    pytest.importorskip("qwix")
    with pytest.raises(HyLoRADAError, match="steps must be"):
        main(output=tmp_path / "results", steps=1)
    with pytest.raises(ConfigError, match="no such file"):
        main(output=tmp_path / "results", page=tmp_path / "nowhere.md")
    assert not (tmp_path / "results").exists()


def test_the_page_has_the_table_of_the_recorded_run():
    record = json.loads((ROOT / "benchmarks/results/base-dtypes-cpu.json").read_text())
    page = (ROOT / "docs/models.md").read_text("utf-8")
    assert f"<!-- results:base-dtypes -->\n{table(record)}<!-- end -->" in page
