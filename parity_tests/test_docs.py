"""The documents' code runs as written, and does what the text around it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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


@pytest.mark.slow
def test_the_readmes_lines_train_a_real_model_and_a_bank_holds_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for code in [*blocks("README.md"), *blocks("docs/adapters.md")]:
        exec(code, scope)
    assert scope["logits"].shape[0] == 3
    assert scope["result"].perplexity_after < scope["result"].perplexity_before
    assert (tmp_path / "runs/readme/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
