import ast
import gzip
import inspect
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hylorada_jax.data.corpus import (
    PYTHON_DOCSTRINGS,
    PYTHON_STDLIB,
    Split,
    divide,
    load_documents,
    trained_on,
)
from hylorada_jax.data.examples import Conversation, Document, Example
from hylorada_jax.errors import ConfigError, DataError


def load_texts(source: str | Path, split: Split = "all") -> list[Document]:
    return load_documents(source, split, form="text")


def write_jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return path


def test_standard_library_is_divided_by_file_without_overlap():
    train, held_out, both = (load_texts(PYTHON_STDLIB, split) for split in ("train", "eval", "all"))
    names = [{document.name for document in side} for side in (train, held_out, both)]
    assert names[0] | names[1] == names[2]
    assert not names[0] & names[1]
    assert not {document.text for document in train} & {document.text for document in held_out}
    assert "argparse.py" in names[2]
    assert not any(
        part in name.split("/") for name in names[2] for part in ("test", "site-packages", "encodings")
    )
    # 5 % of some 500 files by hash: five standard deviations of the binomial are 5 percentage points.
    assert 0 < len(held_out) / len(both) < 0.1


def test_documents_come_from_files_globs_and_jsonl(tmp_path):
    for name in ("b.txt", "a.txt", "blank.txt"):
        (tmp_path / name).write_text("" if name == "blank.txt" else f"text of {name}")
    assert [d.text for d in load_texts(tmp_path / "b.txt")] == ["text of b.txt"]
    assert [d.text for d in load_texts(f"{tmp_path}/*.txt")] == ["text of a.txt", "text of b.txt"]
    jsonl = write_jsonl(tmp_path / "c.jsonl", ["one", "", "two"])
    assert load_documents(jsonl) == [(f"{jsonl}:1", "one"), (f"{jsonl}:3", "two")]


def test_copies_of_one_text_stay_on_one_side_and_the_side_ignores_order(tmp_path):
    texts = [f"record {i}" for i in range(200)]
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts + texts)
    train, held_out = ({d.text for d in load_texts(jsonl, split)} for split in ("train", "eval"))
    assert not train & held_out
    assert train | held_out == set(texts)
    backwards = write_jsonl(tmp_path / "b.jsonl", texts[::-1])
    assert {d.text for d in load_texts(backwards, "eval")} == held_out


def test_a_conversation_stays_on_one_side_whichever_of_its_answers_counts():
    """As OpenAI's `weight` is used: a row for each of the answers."""

    def row(number: int, counts: int) -> dict[str, Any]:
        said: list[Any] = [
            {"role": "user", "content": f"{number}?"},
            {"role": "assistant", "content": "!"},
        ] * 2
        said[2 * counts + 1] = {**said[2 * counts + 1], "weight": 0}
        return {"messages": said, "chat_template_kwargs": {"enable_thinking": bool(counts)}}

    rows = [row(number, counts) for number in range(100) for counts in (0, 1)]
    train, held_out = (
        {str(chat.messages) for chat in load_documents(rows, side) if isinstance(chat, Conversation)}
        for side in ("train", "eval")
    )
    assert not train & held_out
    assert len(train | held_out) == 100
    assert trained_on(load_documents(rows[::2]), load_documents(rows[1::2])) == 100


def test_what_one_source_holds_out_no_other_is_trained_on():
    """Small sources hold out the row of the smallest hash, which is another one where that is missing."""

    def source(texts) -> tuple[list[Example], str]:
        return [Document(f"{len(texts)} texts", text) for text in texts], f"{len(texts)} texts"

    ((_, (first,)),) = divide([source("abcdefgh")])
    rest = [text for text in "abcdefgh" if text != first[1]]
    ((_, (second,)),) = divide([source(rest)])
    (train, held_out), (other, also) = divide([source("abcdefgh"), source(rest)])
    assert [d[1] for d in held_out + also] == [first[1], second[1]]
    assert {d[1] for d in train + other} == {*rest} - {second[1]}
    with pytest.raises(DataError, match=r"held out of another one[\s\S]*2 texts"):
        divide([source(rest), source([first[1], second[1]])])


def test_a_text_whose_end_is_held_out_is_trained_on_in_no_other_source():
    lines = {name: "".join(f"{name} {i}\n" for i in range(99)) for name in "abcdefgh"}

    def source(names: Iterable[str]) -> tuple[list[Example], str]:
        return [Document(name, lines[name]) for name in names], "".join(names)

    ((_, (held,)),) = divide([source(lines)])
    one = next(name for name in lines if name != held.name)
    (train, held_out), (other, also) = divide([source([one]), source(lines)])
    assert "".join(d.text for d in train + held_out if isinstance(d, Document)) == lines[one]
    assert also == [held]
    assert {d.name for d in other} == {*lines} - {one, held.name}
    with pytest.raises(DataError, match=f"held out of another one[\\s\\S]*{held.name}"):
        divide([source([held.name]), source(lines)])  # its head


@pytest.mark.parametrize("texts", [["x", "y"], ["x", "y", "z"], [f"line {i}\n" * 50 for i in range(4)]])
def test_neither_side_is_empty(tmp_path, texts):
    jsonl = write_jsonl(tmp_path / "a.jsonl", texts)
    sides = [[d.text for d in load_texts(jsonl, split)] for split in ("train", "eval")]
    assert all(sides)
    assert sorted(sides[0] + sides[1]) == sorted(texts)


@pytest.mark.parametrize(
    "text",
    ["".join(f"line {i}\n" for i in range(1000)), "x" * 500 + "\n" + "x" * 499],
    ids=["lines", "a long line"],
)
def test_a_single_file_holds_out_its_last_lines(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    (train,), (held_out,) = (load_texts(tmp_path / "a.txt", split) for split in ("train", "eval"))
    assert train.text + held_out.text == text
    assert train.text.endswith("\n") or text.count("\n") == 1  # which is not near
    assert 0.04 < len(held_out.text) / len(text) < 0.06


@pytest.mark.parametrize(
    ("source", "content", "said"),
    [
        ("absent.txt", None, "absent.txt"),
        ("*.nothing", None, "match at least one"),
        ("", None, "not a directory"),
        ("empty.txt", b" \n", "text in it"),
        ("short.txt", b"a", "hold a part"),
        ("alone.jsonl", b'{"prompt": "a", "completion": "b"}', "alone.jsonl:1 alone"),
        ("alike.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 3, "alike.jsonl:1 and 2 like it"),
    ],
)
def test_unusable_data_is_refused_by_name(tmp_path, source, content, said):
    if content is not None:
        (tmp_path / source).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_documents(str(tmp_path / source), "train")
    assert said in str(error.value)


def test_other_names_count_in_the_rows_that_have_them():
    """Of several sources, one may have the format's own."""
    columns = {"input": "context", "completion": "answer"}
    plain = {"instruction": "Add.", "input": "1 1", "output": "2"}
    for row in (plain, {"instruction": "Add.", "context": "1 1", "output": "2"}):
        with pytest.warns(UserWarning, match="no row of list has .*answer"):
            (chat,) = load_documents([row], columns=columns)
        assert isinstance(chat, Conversation)
        assert chat.messages[0]["content"] == "Add.\n\n1 1"


@pytest.mark.parametrize(
    ("given", "said"),
    [({"split": "test"}, "split must be one of train, eval, all"), ({"form": "csv"}, "form must be one of")],
)
def test_a_split_or_a_format_that_is_none_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        load_documents([{"text": "a"}, {"text": "b"}], **given)


def test_an_unreachable_hub_dataset_is_a_data_error(monkeypatch):
    import huggingface_hub

    monkeypatch.setitem(sys.modules, "datasets", None)

    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DataError, match="no route"):
        load_documents("owner/name")


def test_of_a_hub_dataset_only_the_training_files_are_read(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setitem(sys.modules, "datasets", None)
    write_jsonl(tmp_path / "train.jsonl", ["seen"])
    with gzip.open(tmp_path / "train-2.jsonl.gz", "wt") as file:
        file.write('{"text": "seen too"}')
    write_jsonl(tmp_path / "test.jsonl", ["unseen"])
    (tmp_path / "train" / "dataset_info.json").parent.mkdir()
    (tmp_path / "train" / "dataset_info.json").write_text('{"features": {}}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    assert sorted(d.text for d in load_texts("owner/name")) == ["seen", "seen too"]
    for name in ("train.jsonl", "train-2.jsonl.gz"):
        (tmp_path / name).unlink()
    write_jsonl(tmp_path / "constraints.jsonl", ["no split"])
    assert sorted(d.text for d in load_texts("owner/name")) == ["no split", "unseen"]


def test_links_that_lead_up_are_followed_once(tmp_path):
    """Two of them make 2^40 paths; a link that leads elsewhere is followed as ever."""
    (tmp_path / "data" / ".hidden").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("data/a.txt", "data/.hidden/b.txt", "data/deep/er/c.txt", "elsewhere/d.txt"):
        (tmp_path / name).write_text(name)
    for name in ("up", "over"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    expected = ["data/a.txt", "data/deep/er/c.txt", "elsewhere/d.txt"]
    for pattern in ("data/**/*.txt", "data/**", "**/*.txt", "d*/**/[acd].txt", "**/**/*.txt"):
        found = {document.text for document in load_texts(tmp_path / pattern)}
        assert sorted(found) == expected, pattern
    assert [d.text for d in load_texts(tmp_path / "data" / "**" / "er" / "*")] == [expected[1]]


def test_a_name_that_exists_wins_over_the_pattern_that_it_is(tmp_path, monkeypatch):
    """A file, or the directories that a glob begins with: lr=[1,2]/ is one, beside lr=1/."""
    monkeypatch.chdir(tmp_path)
    for name in ("lr=[1,2]/a.txt", "lr=1/b.txt", "c[d].txt", "cd.txt", "e*.txt", "ef.txt", "x/[!y].txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(name)

    def found(source):
        return [document.text for document in load_texts(source)]

    assert found("lr=[1,2]/*.txt") == found(tmp_path / "lr=[1,2]" / "**" / "*.txt") == ["lr=[1,2]/a.txt"]
    assert found("lr=[1]/*.txt") == ["lr=1/b.txt"]
    assert found("c[d].txt") == ["c[d].txt"]
    assert found("e*.txt") == ["e*.txt"]
    assert found("[ce]?.txt") == ["cd.txt", "e*.txt", "ef.txt"]
    assert found("x/[!y].txt") == ["x/[!y].txt"]


@pytest.mark.apart
def test_functions_of_the_library_are_asked_for_their_docstrings_by_module():
    train, held_out = (
        [chat for chat in load_documents(PYTHON_DOCSTRINGS, split) if isinstance(chat, Conversation)]
        for split in ("train", "eval")
    )
    modules = [{document.name.partition(":")[0] for document in side} for side in (train, held_out)]
    assert not modules[0] & modules[1]
    assert len(train) > 10 * len(held_out) > 100
    chats = {chat.name.partition(":")[0] + chat.messages[1]["content"]: chat for chat in [*train, *held_out]}
    expected = inspect.cleandoc(textwrap.dedent.__doc__ or "")
    asked = chats["textwrap.py" + expected].messages[0]["content"]
    code = asked.partition("```python\n")[2].removesuffix("\n```")
    (function,) = ast.parse(code).body
    assert isinstance(function, ast.FunctionDef)
    # Python's own: the same function, less its docstring.
    (original,) = ast.parse(inspect.getsource(textwrap.dedent)).body
    assert isinstance(original, ast.FunctionDef)
    assert [*map(ast.unparse, function.body)] == [*map(ast.unparse, original.body[1:])]
    assert "Remove any common leading whitespace" not in code
