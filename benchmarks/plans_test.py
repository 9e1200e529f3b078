"""The table of what models need on several chips: its numbers are those of the records."""

from pathlib import Path

from benchmarks.plans import recorded, table

ROOT = Path(__file__).parents[1]


def test_a_table_has_what_is_needed_and_what_is_sent():
    methods = {
        "lora": {"argument_bytes": 3 * 2**29, "temp_bytes": 2**30, "sent_bytes": {"a": 2**31, "b": 2**30}},
        "hylorada": {"argument_bytes": 2**31, "temp_bytes": 2**31, "to_lora": {"temp_bytes": 2.0}},
    }
    methods["lora"]["to_lora"] = {"temp_bytes": 1.0, "sent_bytes": 1.0}
    record = {"model": "m", "base_dtype": "nf4", "topology": "v5e:2x2", "seq_len": 4096, "methods": methods}
    assert table([record]).splitlines()[2:] == [
        "| m in nf4, v5e:2x2, 4,096 tokens: lora | 1.50 | 1.00 | 1.00 | 3.0 | 1.00 |",
        "| m in nf4, v5e:2x2, 4,096 tokens: hylorada | 2.00 | 2.00 | 2.00 |  |  |",
    ]


def test_the_page_has_the_table_of_the_records():
    page = (ROOT / "docs/results.md").read_text("utf-8")
    found = table(recorded(ROOT / "benchmarks/results/plans"))
    assert f"<!-- results:plans -->\n{found}<!-- end -->" in page
