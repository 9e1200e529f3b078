"""The network: announced before it is contacted, and left alone offline."""

import json
import socket
import sys

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

import hylorada_jax
from hylorada_jax import terminal
from hylorada_jax.cli.cli_test import run
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.errors import DataError, HyLoRADAError, ModelError
from hylorada_jax.exchange.peft_files_test import write
from hylorada_jax.io import hub
from hylorada_jax.models.loading import empty_model
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.saved.adapter_files import write_adapter
from hylorada_jax.saved.base_identity import base_identity


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """The hosts whose address was asked for, by which no code gets on; the cache is empty."""
    hosts: list[str] = []

    def refuse(host, *_, **__):
        hosts.append(host)
        pytest.fail("the network was contacted")  # no Exception, which someone could catch

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(terminal, "_said", set())
    return hosts


def adapter_of(place, name):
    """An adapter that names this base model."""
    base = base_identity(name, None, [])
    write_adapter(place / "adapter", {"a": np.ones(1, np.float32)}, HyLoRADAConfig(), base)


COMMANDS = {
    "finetune": ("finetune", "--model", "owner/name", "--output", "out", "--data", "texts.txt"),
    "evaluate": ("evaluate", "--model", "owner/name", "--data", "texts.txt"),
    "evaluate, a dataset": ("evaluate", "--data", "owner/name"),
    "generate": ("generate", "--model", "owner/name", "--prompt", "a"),
    "generate, an adapter": ("generate", "--adapter", "adapter", "--prompt", "a"),
    "evaluate, an adapter": ("evaluate", "--adapter", "adapter", "--data", "texts.txt"),
    "chat, an adapter": ("chat", "--adapter", "adapter"),
    "finetune, an adapter": ("finetune", "--start-from", "adapter", "--data", "texts.txt", "--output", "out"),
    "params": ("params", "--model", "owner/name"),
    "merge": ("merge", "--adapter", "adapter", "--output", "out"),
    "merge, a model": ("merge", "--adapter", "adapter", "--output", "out", "--model", "owner/name"),
    "export-peft": ("export-peft", "--adapter", "adapter", "--output", "out"),
    "import-peft": ("import-peft", "--adapter", "peft", "--output", "out", "--model", "owner/name"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_offline_a_command_contacts_nothing_and_says_how_to_fetch(
    command, tried, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("some text\n" * 20)
    (tmp_path / "peft").mkdir()
    write(tmp_path / "peft")
    adapter_of(tmp_path, "owner/name")
    with pytest.raises(pytest.fail.Exception):  # what follows could be contacted
        run(monkeypatch, capsys, *COMMANDS[command])
    tried.clear()
    for arguments, environment in ((("--offline",), ""), ((), "1")):
        monkeypatch.setenv("HF_HUB_OFFLINE", environment)
        status, _, said = run(monkeypatch, capsys, *COMMANDS[command], *arguments)
        assert (status, tried) == (2, []), said
        assert "Offline, a" in said
        assert "hf download" in said
        assert "owner/name" in said
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub.is_offline()  # --offline was the one command's
    assert not (tmp_path / "out").exists()


def test_offline_a_cached_model_is_read(tried, tmp_path):
    """In the layout of huggingface_hub's cache, read by the library itself."""
    cached = tmp_path / "cache" / "models--owner--name"
    (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "llama", "intermediate_size": 6, **sizes}
    (cached / "snapshots" / ("a" * 40) / "config.json").write_text(json.dumps(config))
    with hylorada_jax.offline():
        assert empty_model("owner/name").config.hidden_size == 8
        with pytest.raises(ModelError, match=r"as \*.safetensors"):
            hylorada_jax.load_model("owner/name")
        with pytest.raises(HyLoRADAError, match="tokenizer"):
            load_tokenizer("owner/name")
        with pytest.raises(DataError, match="Offline"):
            load_documents("owner/name")
    assert not tried


def test_a_repository_is_named_once_before_it_is_contacted(tried, monkeypatch, capsys):
    said = []

    def contact(name, **_):
        said.append(capsys.readouterr().err)
        raise LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", contact)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for _ in range(2):
        with pytest.raises(ModelError, match="Go online once"):
            find_source("owner/name")
        with pytest.raises(DataError):
            load_documents("owner/name")
    named = [f"{kind} owner/name: from the Hugging Face Hub\n" for kind in ("model", "dataset")]
    assert said == [*named, "", ""]


OF_ADAPTERS = ["merge", "export-peft", *(name for name in COMMANDS if name.endswith(", an adapter"))]


@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_a_base_model_that_an_adapter_names_is_announced(command, tried, tmp_path, monkeypatch, capsys):
    said = []

    def contact(name, **_):
        said.append(capsys.readouterr().err)
        raise LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", contact)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("some text\n" * 20)
    adapter_of(tmp_path, "owner/name")
    run(monkeypatch, capsys, *COMMANDS[command])
    assert said[0].startswith("base model from the adapter: owner/name, from the Hugging Face Hub\n")


@pytest.mark.parametrize("command", OF_ADAPTERS)
def test_a_base_model_that_is_elsewhere_is_asked_for(command, tried, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("some text\n" * 20)
    adapter_of(tmp_path, "./bases/tiny")
    status, _, said = run(monkeypatch, capsys, *COMMANDS[command])
    assert (status, tried) == (2, [])
    assert "received: './bases/tiny': no such directory or file" in said
    assert "remedy:   Give the base model by --model.\n" in said


NAMES = {
    "a path": "../../nothing",
    "a directory": "/etc",
    "an address": "https://example.org/owner/name",
    "a line more": "owner/name\n",
    "escapes": "\x1b[31mowner/name",
    "a null": "owner/name\0",
    "what the Hub refuses": "owner/na--me..",
    "too long for the Hub": "owner/" + "x" * 200,
    "empty": "",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_is_no_model_contacts_nothing(name, tried, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter_of(tmp_path, name)
    status, _, said = run(monkeypatch, capsys, *COMMANDS["merge"])
    assert (status, tried) == (2, [])
    assert "remedy" in said
    assert "\x1b" not in said
    assert "\0" not in said
    assert not (tmp_path / "out").exists()
