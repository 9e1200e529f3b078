"""Datasets of the Hub: what is asked of the datasets library, and what it gives where it is installed."""

import json
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hylorada_jax
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.data.examples import Conversation, Document
from hylorada_jax.data.hub_rows import HubDataset, hub_dataset
from hylorada_jax.errors import DataError

CALL = {"name": "f", "arguments": {"a": 1}}
# Of one column, arrow gives every struct the fields of all.
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [CALL]}],
]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", HubDataset("owner/name")),
        ("owner/name:2023.en", HubDataset("owner/name", "2023.en")),
        ("owner/name:a:train[:10%]+test", HubDataset("owner/name", "a", "train[:10%]+test")),
        ("owner/name::test", HubDataset("owner/name", None, "test")),
        ("owner/name.jsonl", None),
        ("name", None),
        ("a/b/c", None),
        ("a/*", None),
        ("a/b:*.txt", None),
        ("a/b:c:*", None),
        ("a/b:c/d[12].txt", None),
        ("python-stdlib", None),
    ],
)
def test_a_dataset_is_named_with_its_configuration_and_its_split(source, expected):
    assert hub_dataset(source) == expected
    assert expected is None or hub_dataset(str(expected)) == expected


@pytest.fixture
def library(monkeypatch):
    """A stand-in for the datasets library that keeps what it is asked for, and its switches then."""
    calls: list[object] = []
    settings = SimpleNamespace(HF_HUB_OFFLINE=False, HF_UPDATE_DOWNLOAD_COUNTS=True)

    def load_dataset(*arguments, **options):
        calls.append((arguments, options, vars(settings).copy()))
        return [{"text": "a"}]

    module = SimpleNamespace(load_dataset=load_dataset, config=settings, Dataset=dict, IterableDataset=dict)
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hylorada_jax.terminal._said", set())
    return calls


def test_the_library_is_asked_for_a_configuration_and_a_split_and_runs_no_code(library, capsys):
    for source in ("owner/name", "owner/name:en", "owner/name::test[:5]"):
        assert load_documents(source) == [Document(f"{source}[0]", "a")]
    asked = [(None, "train"), ("en", "train"), (None, "test[:5]")]
    switches = {"HF_HUB_OFFLINE": False, "HF_UPDATE_DOWNLOAD_COUNTS": False}
    expected = [
        (("owner/name", config), {"split": split, "trust_remote_code": False}, switches)
        for config, split in asked
    ]
    assert library == expected
    assert capsys.readouterr().err == "dataset owner/name: from the Hugging Face Hub\n"
    with hylorada_jax.offline():
        load_documents("owner/name")
    assert library[-1][-1] == switches | {"HF_HUB_OFFLINE": True}
    assert vars(sys.modules["datasets"].config) == switches | {"HF_UPDATE_DOWNLOAD_COUNTS": True}
    assert not capsys.readouterr().err


def test_a_name_that_exists_is_not_a_dataset_of_the_hub(library, tmp_path, monkeypatch):
    """The library would take the files of that directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for source in ("owner/name", "owner/name:en"):
        with pytest.raises(DataError, match="Data must be"):
            load_documents(source)
    assert not library


@pytest.mark.parametrize("source", ["owner/name:en", "owner/name::test", "owner/name::train[:5]"])
def test_without_the_library_the_error_names_what_to_install(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'received: owner/name:[\s\S]*pip install "hylorada\[hub\]"'):
        load_documents(source)


def test_rows_of_one_split_are_asked_for():
    splits: Any = {"train": [], "test": []}
    with pytest.raises(DataError, match=r'train, test[\s\S]*dataset\["train"\]'):
        load_documents(splits)


def test_datasets_of_the_library_are_rows():
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": chat, "id": n} for n, chat in enumerate(CHATS)]
    held = datasets.Dataset.from_list(rows)
    for source in (
        held,
        datasets.IterableDataset.from_generator(lambda: iter(held)),
        held.to_iterable_dataset(),
        held.with_format("numpy"),
        held.with_format("arrow"),
        held.to_iterable_dataset().with_format("pandas"),
    ):
        found = load_documents(source)
        assert found == [Conversation(f"row {n}", chat, [False, True]) for n, chat in enumerate(CHATS)]
    texts = datasets.Dataset.from_list([{"text": "a"}, {"text": None}, {"text": "c"}])
    assert load_documents(texts) == [Document("row 0", "a"), Document("row 2", "c")]
    with pytest.raises(DataError, match=r"column text must hold text[\s\S]*row 0: 3 of type int"):
        load_documents(datasets.Dataset.from_dict({"text": [3]}))
    with pytest.raises(DataError, match=r'train[\s\S]*dataset\["train"\]'):
        load_documents(datasets.DatasetDict(train=held))


def test_offline_a_dataset_of_the_librarys_cache_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was contacted"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "files"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(9)))
    made = datasets.load_dataset("json", "en", data_files=str(tmp_path / "a.jsonl"), split="train")
    made_in = Path(made.cache_files[0]["filename"]).parent
    place = tmp_path / "owner___name" / "en" / "0.0.0" / made_in.name
    shutil.copytree(made_in, place)
    (place / "json-train.arrow").rename(place / "name-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"config_name": "en", "dataset_name": "name"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    with hylorada_jax.offline():
        assert load_documents("owner/name:en:train[2:4]") == [
            Document(f"owner/name:en:train[2:4][{n}]", f"text {n + 2}") for n in range(2)
        ]
        assert len(load_documents("owner/name")) == 9
        for source in ("owner/name::test", "owner/name:de", "owner/other"):
            with pytest.raises(DataError, match="Offline"):
                load_documents(source)
