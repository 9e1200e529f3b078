"""The documents' code runs as written, and does what the text around it says."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hylorada_jax import CausalLM, HyLoRADAModel
from hylorada_jax.data.document import as_documents
from hylorada_jax.models.decoder_config import DecoderConfig
from parity_tests import tables

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("table", [tables.families, tables.weights])
def test_the_tables_of_models_are_those_of_the_code(table):
    """`python -m parity_tests.tables` prints them."""
    assert table() in (ROOT / "docs/models.md").read_text(encoding="utf-8")


def blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_an_adapter_in_a_network_of_ones_own_learns_the_change():
    scope: dict = {}
    for code in blocks("docs/own_network.md"):
        exec(code, scope)
    # The change to learn has the adapter's own form, so that nearly nothing need remain.
    assert scope["losses"][-1] < 0.01 * scope["losses"][0]
    trained = scope["variables"]["params"]
    assert {name: set(leaves) for name, leaves in trained.items() if name in ("daa", "position_bias")} == {
        "daa": {"alpha", "beta", "position_bias"},
        "position_bias": {"position_bias"},
    }
    assert all("position_scale" in trained[name] for name in "qkv")
    # The network that is adapted as it is: a fresh adapter changes nothing, and every layer can learn.
    plain = scope["network"].apply({"params": scope["frozen"]}, scope["x"])
    assert jnp.allclose(scope["output"](scope["adapters"], scope["x"]), plain, rtol=1e-5, atol=1e-6)
    assert set(scope["gradient"]) == {"up", "down"}
    assert all(jnp.any(leaves["lora_B"] != 0) for leaves in scope["gradient"].values())


def test_a_document_carries_its_structure():
    (code,) = blocks("docs/methods.md")
    scope: dict = {}
    exec(code, scope)
    names = ("series", "walk", "answer")
    documents: list[Any] = [as_documents([scope[name]], 32, "", has_encoder=True)[0] for name in names]
    # 1 May of a leap year; a star's centre is the one node that outranks its three others.
    assert documents[0].structure_positions.tolist() == [121 * 24 + 6, 121 * 24 + 7.5]
    assert documents[1].structure_ids.tolist() == [0, 48, 0]
    assert documents[2].scored.tolist() == [False, True, True]


def test_the_loop_of_ones_own_learns_its_batch_and_saves_the_adapter(tmp_path, capsys):
    train = runpy.run_path(str(ROOT / "examples/own_loop.py"))["train"]
    shape = {"model_type": "llama", "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    base = CausalLM.from_config(DecoderConfig.from_hf(shape), jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 29)
    train(base, ids, tmp_path / "run", steps=1)  # and a second time, into the same place
    losses = train(base, ids, tmp_path / "run", steps=20)
    assert losses[-1] < losses[0] - 0.1
    loaded = HyLoRADAModel.from_pretrained(base, tmp_path / "run")
    # A fresh adapter changes nothing; this one has learned something, and that was saved.
    ids = jnp.array([[1, 2, 3]])
    assert not jnp.array_equal(loaded(ids).logits, base(ids).logits)


@pytest.mark.apart
@pytest.mark.optimized
def test_the_readmes_lines_train_a_real_model_and_a_bank_holds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for code in [*blocks("README.md"), *blocks("docs/adapters.md")]:
        exec(code, scope)
    assert scope["logits"].shape[0] == 3
    # What README.md says of a call, and what adapters.md prints: a model that asks, and is answered.
    assert scope["model"]([[1, 2, 3]]).logits.shape == (1, 3, 49152)
    assert "return" in scope["continued"]
    assert "fjord" in scope["answered"]
    assert scope["result"].perplexity_after < scope["result"].perplexity_before
    assert (tmp_path / "runs/readme/adapter/adapter_model.safetensors").is_file()


@pytest.mark.apart
@pytest.mark.optimized
def test_the_readmes_line_asks_a_real_model_and_is_answered(tmp_path):
    (line,) = re.findall(r"^echo .*\| hylorada chat .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": search, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        ["bash", "-c", line], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert "fjord" in found.stdout


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")], ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("https://")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    # Files by their names, from the root or from hylorada_jax.
    files = re.findall(r"`([\w./]+\.(?:py|md|toml|txt))`", text) if page.parent == ROOT else []
    places = (ROOT, ROOT / "hylorada_jax", ROOT / "hylorada_jax/models")
    assert [name for name in files if not any((place / name).exists() for place in places)] == []


def test_every_extra_of_a_user_is_named_on_a_page():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = "".join(
        page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    )
    named = {name for group in re.findall(r"\[([\w,]+)\]\"", pages) for name in group.split(",")}
    assert set(extras["optional-dependencies"]) - named <= {"benchmarks", "test", "dev"}


@pytest.mark.apart
def test_the_lines_on_data_count_the_answers(capsys):
    *_, code = blocks("docs/data.md")  # before it, what a model wrote
    scope: dict = {}
    exec(code, scope)
    # An answer is its number and the end of the turn; of a hundred conversations about five are held out.
    documents, counts = scope["documents"], scope["counts"]
    answers = [len(scope["load_tokenizer"]("smollm2-135m").encode(str(2 * n))) + 1 for n in range(100)]
    assert counts.scored == sum(int(document.scored.sum()) for document in documents)
    assert 85 <= len(documents) == counts.rows < 100
    assert min(answers) * len(documents) <= counts.scored <= sum(answers)
    assert capsys.readouterr().out == f"{counts.scored} of {counts.tokens} tokens count\n"
