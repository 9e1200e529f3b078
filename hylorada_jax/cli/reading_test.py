"""Sources and their weights, as they are given on the command line."""

import json

import pytest

from hylorada_jax.cli.reading import AS_IT_IS, sources_of
from hylorada_jax.data.corpus import load_documents, trained_on
from hylorada_jax.errors import ConfigError


def test_a_number_behind_the_last_equals_sign_is_a_weight_unless_a_file_has_the_whole_name(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there=2").write_text("a")
    for given, expected in {
        ("a.jsonl",): [("a.jsonl", None)],
        ("a.jsonl=0.7", "owner/name=3e-1"): [("a.jsonl", 0.7), ("owner/name", 0.3)],
        ("lr=1/*.txt", "lr=1/a.txt"): [("lr=1/*.txt", None), ("lr=1/a.txt", None)],
        ("lr=1/*.txt=2",): [("lr=1/*.txt", 2)],
        ("there=2", "=2"): [("there=2", None), ("=2", None)],
        ("there=2=3", "absent=3"): [("there=2", 3), ("absent", 3)],
    }.items():
        assert [(source.name, source.weight) for source in sources_of(given)] == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "must have a source"),
        (("a=1", "b"), "all must have a weight, or none[\\s\\S]*a=1 b"),
        (("a=0",), "positive"),
        (("a=1", "b=-2"), "positive[\\s\\S]*-2"),
        (("a=nan",), "positive"),
        (("a=inf",), "positive"),
        (("a=1e-300", "b=1e300"), "ratios"),
    ],
)
def test_sources_without_a_sensible_weight_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        sources_of(given)


def test_a_split_is_of_the_hub_datasets_that_name_none(tmp_path, monkeypatch):
    """A file of a name like theirs is none of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "guide.md").write_text("a")
    given = ["docs/guide.md=1", "owner/name=1", "owner/name:en=2", "owner/name::test=1"]
    expected = ["docs/guide.md", "owner/name::train[:9]", "owner/name:en:train[:9]", "owner/name::test"]
    assert [source.name for source in sources_of(given, split="train[:9]")] == expected
    with pytest.raises(ConfigError, match=r"one of a Hub dataset[\s\S]*--split train\[:9\] for docs/guide"):
        sources_of(["docs/guide.md"], split="train[:9]")


def test_what_is_not_trained_on_has_no_weights():
    assert sources_of(["a", "b"], weights=False)
    with pytest.raises(ConfigError, match="Leave the weights out"):
        sources_of(["a=1", "b=2"], weights=False)


def test_what_is_held_out_of_the_embedded_data_no_run_trains_on():
    """`evaluate` measures it by the name of the data."""
    stdlib = sources_of(["python-stdlib"])
    trained, given = AS_IT_IS.load_both(stdlib, stdlib)
    held_out = load_documents("python-stdlib", "eval")
    assert given.held_out == held_out
    assert trained_on(held_out, trained.train) == 0


def test_held_out_rows_that_are_trained_on_too_are_counted(tmp_path, recwarn):
    for name, texts in {"train": "abcd", "both": "acx", "apart": "xy"}.items():
        lines = (json.dumps({"text": text, "id": name}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    train, both, apart = (sources_of([str(tmp_path / f"{n}.jsonl")]) for n in ("train", "both", "apart"))
    AS_IT_IS.load_both(train, apart)
    assert not recwarn
    with pytest.warns(UserWarning, match="2 of 5 held-out rows are trained on too"):
        AS_IT_IS.load_both(train, [*apart, *both])
