"""Oracles: what Python's own json and csv write is read back; a fault in a file is named by its place."""

import csv
import datetime
import gzip
import json
import os
import sys
from pathlib import Path

import pytest

from hylorada_jax.data import rows
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.data.examples import Conversation, Document
from hylorada_jax.data.rows import read_rows
from hylorada_jax.errors import DataError

TEXTS = ["one", 'a "quoted", word', "two\nlines\r\nof text", "é 漢 😀", "x" * 200_000]
BOM = "\ufeff"


def as_lines(texts):
    return "".join(json.dumps({"n": 1, "text": text}) + "\n\n" for text in texts)


def as_array(texts):
    return json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False)


def write_csv(path, texts, **form):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, **form).writerows([["n", "text"], *([1, text] for text in texts)])


def texts_of(path):
    return [document.text for document in load_documents(path, form="text")]


@pytest.mark.parametrize("mark", ["", BOM])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_lines),
        ("upper.JSONL", as_lines),
        ("a.ndjson", as_lines),
        ("lines.json", as_lines),
        ("array.json", as_array),
        ("Array.Json", as_array),
    ],
)
def test_rows_of_json_are_documents_under_every_name(tmp_path, name, write, mark):
    (tmp_path / name).write_text(mark + write(TEXTS), encoding="utf-8")
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.csv", {}),
        ("A.CSV", {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}),
        ("a.tsv", {"delimiter": "\t"}),
    ],
)
def test_rows_of_csv_are_documents(tmp_path, name, form):
    write_csv(tmp_path / name, TEXTS, **form)
    limit = csv.field_size_limit()
    assert texts_of(tmp_path / name) == TEXTS
    assert csv.field_size_limit() == limit


def test_a_document_is_named_by_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": null}\n{"text": "two"}\n')
    (tmp_path / "a.csv").write_text('text\n"one\nand a half"\n\n \ntwo\n')
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": " "}, {"text": "two"}]')
    (tmp_path / "one.json").write_text('{\n  "text": "one"\n}\n')
    names = [
        document.name.removeprefix(f"{tmp_path}/")
        for name in ("a.jsonl", "a.csv", "a.json", "one.json")
        for document in load_documents(tmp_path / name)
    ]
    assert names == ["a.jsonl:1", "a.jsonl:4", "a.csv:2", "a.csv:6", "a.json[0]", "a.json[2]", "one.json[0]"]


def test_a_lone_surrogate_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "cut emoji \ud83d"}) + '\n{"text": "\\udc00, whole \\ud83d\\ude00"}'
    )
    documents = load_documents(tmp_path / "a.jsonl", form="text")
    assert [document.text for document in documents] == ["cut emoji \ufffd", "\ufffd, whole 😀"]
    for split in ("train", "eval"):  # which hash the text
        assert len(load_documents(tmp_path / "a.jsonl", split)) == 1


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa text")
    assert texts_of(tmp_path / "a.txt") == ["a text"]


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.ndjson", "a.json", "a.csv", "header.csv", "array.json", "a.md"]
)
def test_files_without_a_text_are_refused_together_and_passed_over_among_others(tmp_path, name):
    (tmp_path / name).write_text({"header.csv": "n,text\n", "array.json": "[]"}.get(name, BOM + " \n"))
    with pytest.raises(DataError, match="text in it"):
        load_documents(tmp_path / name)
    (tmp_path / "b.txt").write_text("b")
    assert [document.text for document in load_documents(f"{tmp_path}/*", form="text")] == ["b"]


def packed(content):
    return gzip.compress(content, mtime=0)  # a test's name holds the content, the same in every process


DEEP, LONG = "[" * 100_000 + "]" * 100_000, "9" * 5000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("deep.jsonl", '{"text": "a"}\n{"text": "b", "x": ' + DEEP + "}", "deep.jsonl:2: it is nested"),
        ("long.jsonl", '{"text": "a"}\n{"text": "b", "x": ' + LONG + "}", "long.jsonl:2: Exceeds the limit"),
        ("deep.json", '[{"text": "a", "x": ' + DEEP + "}]", "deep.json: it is nested"),
        ("long.json", '[{"text": "a", "x": ' + LONG + "}]", "long.json: Exceeds the limit"),
        ("lines.json", '{"text": "a"}\n{"text": \n', "lines.json:2: Expecting value"),
        ("cut.json", '[{"text": "a"},\n{"text"', "cut.json: Expecting ':' delimiter: line 2"),
        ("word.jsonl", '{"text": "a"}\nword\n', "word.jsonl:2: Expecting value in column 1"),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b"\n', "cut.jsonl:2: Expecting ',' delimiter in column 13"),
        ("list.jsonl", '["a"]\n', "list.jsonl:1: a list"),
        ("words.json", '["a"]\n', "words.json[0]: a str"),
        ("number.jsonl", '{"text": 5}\n', "number.jsonl:1: 5 of type int"),
        ("renamed.jsonl", '{"text": "a"}\n{"body": "a", "n": 1}\n', "renamed.jsonl:2: columns body, n"),
        ("data.json", '{"data": [{"text": "a"}]}', "data.json[0]: columns data"),
        ("renamed.csv", "id,body\n1,a\n", "renamed.csv:2: columns id, body"),
        ("headless.csv", f"1,{'word ' * 50}\n2,b\n", "headless.csv:2: columns 1, word word"),
        ("semicolon.csv", "id;text\n1;a\n", "semicolon.csv:2: columns id;text"),
        ("twice.csv", "text,text\na,b\n", "twice.csv: columns text, text"),
        ("comma.csv", 'n,text\n1,"a\nb"\n2,a, b\n', "comma.csv:4: 3 fields"),
        ("short.csv", "n,text\n1\n", "short.csv:2: 1 fields"),
        ("open.csv", 'n,text\n1,a\n2,"open\n3,b\n', "open.csv:3: unexpected end"),
        ("latin.csv", "n,text\n1,a\n2,é\n".encode("latin-1"), "latin.csv:3"),
        ("latin.txt", "a\né\n".encode("latin-1"), "latin.txt:2"),
        ("utf16.jsonl", '{"text": "a"}\n'.encode("utf-16"), "utf16.jsonl:1"),
        ("cut.jsonl.gz", packed(b'{"text": "a"}\n' * 9)[:-9], "cut.jsonl.gz: Compressed file ended"),
        ("not.json.gz", b"{}", "not.json.gz: Not a gzipped file"),
        ("broken.csv.gz", packed(b"text\na\n")[:10] + b"\xff" * 20, "broken.csv.gz: Error -3"),
        ("word.jsonl.gz", packed(b'{"text": "a"}\nword\n'), "word.jsonl.gz:2"),
        ("latin.txt.gz", packed("a\né\n".encode("latin-1")), "latin.txt.gz:2"),
        ("a.parquet.gz", b"", "gunzip -k"),
        ("a.jsonl.bz2", b"BZ", "bunzip2 -k"),
        ("a.csv.ZIP", b"PK", "unzip"),
    ],
)
def test_what_cannot_be_read_is_named_by_its_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        load_documents(tmp_path / name)
    assert said in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x" * 101, "a.txt: 101"),
        ("a.json", '["' + "x" * 100 + '"]', "a.json: 104"),
        ("a.jsonl", '{"text": "a"}\n' + "x" * 101, "a.jsonl:2"),
        ("a.csv", "text\na\n" + "x" * 101 + "\nb\n", "a.csv:3"),
        ("open.csv", 'text\na\n"' + "x\n" * 60, "open.csv:3: field larger than"),
    ],
)
def test_no_line_and_no_file_that_is_one_piece_exhausts_the_memory(
    tmp_path, monkeypatch, name, content, said
):
    (tmp_path / name).write_text(content)
    monkeypatch.setattr(rows, "_LIMIT", 100)
    monkeypatch.setattr(rows, "_WHOLE", 100)
    with pytest.raises(DataError) as error:
        load_documents(tmp_path / name)
    assert said in str(error.value)
    (tmp_path / "long.jsonl").write_text(as_lines(["short"] * 100))  # no limit to what has many lines
    assert len(load_documents(tmp_path / "long.jsonl")) == 100


def test_the_line_that_is_not_utf_8_is_found_behind_many_parts(tmp_path):
    good = ("é" * 1000 + "\n") * 1500  # 3 MB, whose parts are cut inside characters
    (tmp_path / "a.txt").write_bytes(good.encode() + b"a \xff\n")
    with pytest.raises(DataError, match=r"a\.txt:1501: invalid start byte"):
        load_documents(tmp_path / "a.txt")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "directory.csv").mkdir()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "absent")
    for path in (*sorted(tmp_path.iterdir()), Path(os.devnull), Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(DataError):
            list(read_rows(path))
        with pytest.raises(DataError):
            load_documents(path)
    with pytest.raises(DataError, match="match at least one"):
        load_documents(f"{tmp_path}/*")


def test_an_absent_file_is_not_looked_for_on_the_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("looked there"))
    for name in ("data/train.csv", "data/train.JSON", "data/train.jsonl.gz", "x" * 300, "~nobody/x"):
        with pytest.raises(DataError, match=name.removeprefix("~nobody")):
            load_documents(name)


def test_parquet_is_read_by_its_text_column(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "text=1").mkdir()  # which must not be taken for a part of a dataset
    path = tmp_path / "text=1" / "A.PARQUET"
    texts = ["one", None, " ", "two"]
    for column in (
        arrow.array(texts),
        arrow.array(texts, arrow.large_string()),
        arrow.array(texts).dictionary_encode(),
    ):
        parquet.write_table(arrow.table({"n": [1, 2, 3, 4], "text": column}), path, row_group_size=1)
        assert load_documents(path) == [(f"{path}[0]", "one"), (f"{path}[3]", "two")]


def test_parquet_without_texts_is_refused_by_what_it_has(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    cut = arrow.Array.from_buffers(
        arrow.string(), 2, [None, arrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), arrow.py_buffer(b"a\xff")]
    )
    for columns, said in (
        ({"text": [1, 2]}, r"\[0\]: 1 of type int"),
        ({"text": [["a"], ["b"]]}, "of type list"),
        ({"text": [b"a"]}, "of type bytes"),
        ({"text": [{"a": "b"}]}, "of type dict"),
        ({"text": arrow.nulls(2)}, "text in it"),
        ({"body": ["a"], "n": [1]}, "columns body, n"),
        ({"prompt": ["a"], "chosen": ["b"], "n": [1]}, "columns prompt, chosen, n"),
        ({"text": cut}, r"a\.parquet\[1\]: invalid start byte"),
    ):
        parquet.write_table(arrow.table(columns), path)
        with pytest.raises(DataError, match=said):
            load_documents(path)
    parquet.write_table(arrow.table({"text": ["a" * 100] * 100}), path)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-1], whole[:4] + b"\xff" * 60 + whole[64:], b"{}" * 50):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="must be whole"):
            load_documents(path)


def test_a_row_of_csv_with_wrong_quotes_may_be_skipped(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"one, a"\n"a "bad" one"\n"two\nlines"\n')
    skipped: list[DataError] = []
    documents = load_documents(tmp_path / "a.csv", skipped=skipped)
    assert documents == [
        Document(f"{tmp_path}/a.csv:2", "one, a"),
        Document(f"{tmp_path}/a.csv:4", "two\nlines"),
    ]
    (error,) = skipped
    assert "a.csv:3" in str(error)


def test_a_row_of_parquet_that_python_has_no_value_for_is_named_and_may_be_skipped(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, far = tmp_path / "a.parquet", arrow.timestamp("us")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    plain = [[{**message, "at": 0} for message in chat]]
    both = arrow.StructArray.from_arrays([arrow.array(["user"]), arrow.array(["Hi"])], names=["a", "a"])
    for at, kind, said in (
        (2**62, far, "out of range"),
        (2**62, arrow.timestamp("us", tz="UTC"), "out of range"),
        (2**30, arrow.date32(), "days=1073741824"),
    ):
        struct = arrow.struct([("role", arrow.string()), ("content", arrow.string()), ("at", kind)])
        messages = [*plain, [{**message, "at": at} for message in chat], *plain]
        parquet.write_table(arrow.table({"messages": arrow.array(messages, arrow.list_(struct))}), path)
        with pytest.raises(DataError, match=rf"a\.parquet\[1\]: .*{said}"):
            load_documents(path)
        skipped: list[DataError] = []
        documents = load_documents(path, skipped=skipped)
        assert [document.name for document in documents] == [f"{path}[0]", f"{path}[2]"]
        assert len(skipped) == 1
    parquet.write_table(arrow.table({"text": both}), path)
    with pytest.raises(DataError, match=r"a\.parquet\[0\]: .*duplicate field names"):
        load_documents(path)
    # Of columns that no format has, only the names count.
    for column in (arrow.array([2**62], far), both):
        parquet.write_table(arrow.table({"when": column, "n": [1]}), path)
        with pytest.raises(DataError, match=r"columns of a format.*\n.*a\.parquet\[0\]: columns when, n"):
            load_documents(path)


def test_a_small_parquet_file_cannot_fill_the_memory(tmp_path, monkeypatch):
    """A dictionary of one text for all rows; a page of one text; rows of nothing. Fewer are read as ever."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(rows, "_EXPANDED", 2**20)
    path = tmp_path / "a.parquet"
    for column, whole, said in (
        (["x" * 10_000] * 300, 90, r"a\.parquet\[\d+\]: 1,0"),
        (["x" * 2**21], None, "a.parquet, row group 0: 2,"),
        ([[[]] * 20_000], None, "a.parquet, row group 0: 1,280,000 bytes"),
        (arrow.nulls(20_000, arrow.string()), None, "a.parquet, row group 0: 1,280,000 bytes"),
    ):
        parquet.write_table(arrow.table({"n": [1] * len(column), "text": column}), path, compression="zstd")
        assert path.stat().st_size < 10_000
        with pytest.raises(DataError, match=said):
            load_documents(path)
        if whole:
            parquet.write_table(arrow.table({"n": [1] * whole, "text": column[:whole]}), path)
            assert len(load_documents(path)) == whole


def test_the_text_is_found_behind_nested_columns(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"n": [{"text": 1, "a": [2]}], "text": ["one"], "o": [{"b": {"c": 1}}]}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["one"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match="pip install pyarrow"):
        load_documents(tmp_path / "a.parquet")


def test_rows_are_read_of_gzip_files_and_no_small_one_fills_the_memory(tmp_path, monkeypatch):
    for name, write in (("a.jsonl.gz", as_lines), ("B.JSON.GZ", as_array), ("c.txt.gz", "".join)):
        (tmp_path / name).write_bytes(gzip.compress(write(TEXTS).encode()))
        found = texts_of(tmp_path / name)
        assert found == (TEXTS if "txt" not in name else ["".join(TEXTS).replace("\r\n", "\n")])
    monkeypatch.setattr(rows, "_EXPANDED", 2**20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(as_lines(["x" * 100] * 20_000).encode()))
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: 1,\d{3},\d{3} bytes"):
        load_documents(tmp_path / "bomb.jsonl.gz")
    for name in ("bomb.txt.gz", "bomb.json.gz"):  # read whole, and nothing beyond the limit is unpacked
        (tmp_path / name).write_bytes(gzip.compress(b"x" * 2**23))
        with pytest.raises(DataError, match=rf"{name}: 1,048,577 bytes, more than 1,048,576"):
            load_documents(tmp_path / name)


def test_conversations_are_read_of_every_kind_of_file(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    chats: list[list[dict[str, object]]] = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": str(number)}]
        for number in range(3)
    ]
    call = {"name": "f", "arguments": {"a": 1}}
    # Of one column, arrow gives every struct the fields of all.
    chats[1][1] = {"role": "assistant", "tool_calls": [call]}
    lines = [json.dumps({"messages": chat, "id": 1}) for chat in chats]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "messages"], *([1, json.dumps(chat)] for chat in chats)])
    parquet.write_table(arrow.table({"id": [1, 2, 3], "messages": chats}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        expected = [
            Conversation(chat.name, messages, [False, True])
            for chat, messages in zip(load_documents(tmp_path / name), chats, strict=True)
        ]
        assert load_documents(tmp_path / name) == expected
    # Both columns of prompt-completion may be messages, or JSON of them; and words may begin with a bracket.
    asked, answer = ([{"role": role, "content": role}] for role in ("user", "assistant"))
    pairs = [(json.dumps(asked), json.dumps(answer)), ("[1]", "[2]"), (json.dumps(asked), "[sic]")]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], *pairs])
    first, *texts = (example[1:] for example in load_documents(tmp_path / "pairs.csv"))
    assert first == load_documents([{"prompt": asked, "completion": answer}])[0][1:]
    assert texts == pairs[1:]
    # A map of arrow's is a mapping, with each key once.
    text = arrow.string()
    calls = arrow.list_(arrow.struct([("name", text), ("arguments", arrow.map_(text, text))]))
    message = arrow.struct([("role", text), ("content", text), ("tool_calls", calls)])
    for arguments in ([("city", "Rome")], [("city", "Rome"), ("city", "Oslo")]):
        called = [chats[0][0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]
        column = arrow.array([called], arrow.list_(message))
        parquet.write_table(arrow.table({"messages": column}), tmp_path / "maps.parquet")
        if len(arguments) > 1:
            with pytest.raises(DataError, match=r"maps\.parquet\[0\][\s\S]*duplicate"):
                load_documents(tmp_path / "maps.parquet")
        else:
            (chat,) = load_documents(tmp_path / "maps.parquet")
            assert isinstance(chat, Conversation)
            assert chat.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"city": "Rome"}}]
    # Metadata of a message, which JSON has no type for.
    when = datetime.datetime(2024, 1, 2, 3, 4, 5)
    dated = [[{**chat[0], "when": when, "day": when.date(), "at": when.time()}, chat[1]] for chat in chats]
    parquet.write_table(arrow.table({"messages": dated}), tmp_path / "a.parquet")
    (chat, *_) = load_documents(tmp_path / "a.parquet")
    assert isinstance(chat, Conversation)
    said = chat.messages[0]
    assert (said["when"], said["day"], said["at"]) == ("2024-01-02T03:04:05", "2024-01-02", "03:04:05")
    rows = load_documents([{"messages": chat} for chat in chats])
    assert rows == [Conversation(f"row {n}", chat, [False, True]) for n, chat in enumerate(chats)]
