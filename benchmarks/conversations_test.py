import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import conversations
from benchmarks.contenders import chats
from benchmarks.conversations import main, same_tokens, summary, table
from hylorada_jax.errors import ConfigError, HyLoRADAError

ROOT = Path(conversations.__file__).parents[1]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def llama(worded_llama):
    return worded_llama(**SHAPE)


@pytest.mark.apart
def test_the_command_measures_both_sides_at_the_same_tokens_and_losses(llama, tmp_path):
    for package in conversations.PACKAGES:
        pytest.importorskip(package)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results:conversations -->\n<!-- end -->\nafter")
    sizes = [
        "--conversations",
        "70",
        "--batch-size",
        "2",
        "--seq-len",
        "256",
        "--rounds",
        "1",
        "--methods",
        "dora",
        "--threads",
        "1",
    ]
    script, output = ROOT / "benchmarks/conversations.py", tmp_path / "results"
    run = subprocess.run(
        [sys.executable, script, *sizes, "--model", llama, "--output", output, "--page", page],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (file,) = output.glob("conversations-*.json")
    record = json.loads(file.read_text())
    assert page.read_text() == f"before\n<!-- results:conversations -->\n{table(record)}<!-- end -->\nafter"
    prepared, steps = record["preparation"], record["step"]
    assert len({(one["tokens"], one["scored"]) for one in prepared.values()}) == 1
    assert all(one["conversations_per_second"] > 0 for one in prepared.values())
    assert prepared["ours"]["paired_ratio"] == steps["dora"]["paired_ratio"] == 1
    ours, theirs = steps["dora"], steps["trl dora"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-4)
    assert ours["trainable_parameters"] == theirs["trainable_parameters"] > 0
    assert ours["tokens"] == theirs["tokens"]
    # Packed, both have all the conversations at once.
    packed = steps["dora, packed"]["tokens"], steps["trl dora, packed"]["tokens"]
    assert packed == ([sum(ours["tokens"])],) * 2
    assert all(one["last_loss"] < one["first_loss"] for one in steps.values() if len(one["tokens"]) == 1)


def test_different_tokens_are_refused_and_named():
    one = {"digest": "a", "tokens": 10, "scored": 4}
    same_tokens({"ours": one, "trl": dict(one)})
    with pytest.raises(HyLoRADAError, match="ours 10, scored 4, trl 11, scored 4"):
        same_tokens({"ours": one, "trl": {"digest": "b", "tokens": 11, "scored": 4}})


def test_each_round_is_compared(monkeypatch):
    rounds = iter(["a"] * len(chats.PREPARATIONS) + ["a", "b"] * len(chats.PREPARATIONS))
    monkeypatch.setattr(
        conversations,
        "in_own_process",
        lambda *_: {"digest": next(rounds), "tokens": 10, "scored": 4, "seconds": 1.0},
    )
    with pytest.raises(HyLoRADAError, match="same tokens"):
        conversations.measure_preparation("a model", 8, [], 1, rounds=2)


def test_ratios_are_taken_within_rounds():
    assert summary([2.0, 40.0, 2.0], [1.0, 10.0, 1.0])["paired_ratio"] == 2


def test_what_is_not_installed_is_said_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(conversations, "PACKAGES", ("trl_that_nobody_has",))
    with pytest.raises(ConfigError, match=r"no package trl_that_nobody_has\n.*pip install"):
        main(output=tmp_path / "results")
    monkeypatch.setattr(conversations, "PACKAGES", ())
    with pytest.raises(HyLoRADAError, match="conversations must be"):
        main(output=tmp_path / "results", conversations=0)
    for page, said in (
        (tmp_path / "nowhere.md", "no such file"),
        (ROOT / "README.md", "results:conversations"),
    ):
        with pytest.raises(ConfigError, match=said):
            main(output=tmp_path / "results", page=page)
    assert not (tmp_path / "results").exists()


def test_the_page_has_the_table_of_the_recorded_run():
    file = ROOT / "benchmarks/results/conversations-cpu.json"
    expected = table(json.loads(file.read_text())) if file.exists() else "Not recorded yet.\n"
    page = (ROOT / "docs/results.md").read_text("utf-8")
    assert f"<!-- results:conversations -->\n{expected}<!-- end -->" in page
