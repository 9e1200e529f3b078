import pytest

from hylorada_jax.errors import CheckpointError
from hylorada_jax.training.run_directory import RunDirectory

IDENTITY = {"model": "m", "adapter": {"targets": ("q", "v"), "rank": 8}}


def opened(path, identity=IDENTITY, recorded=None, **how):
    directory = RunDirectory(path)
    directory.open(
        identity, recorded or {"jax": "1", "model": "m"}, **{"resume": False, "overwrite": False} | how
    )
    return directory


def test_a_run_is_resumed_with_the_same_identity_only(tmp_path):
    opened(tmp_path / "run")
    opened(tmp_path / "run", resume=True)
    other = {"model": "m", "adapter": {"targets": ("q",), "rank": 8}, "new": 1}
    with pytest.raises(CheckpointError) as error:
        opened(tmp_path / "run", other, resume=True)
    assert "adapter.targets: ['q', 'v'] in" in str(error.value)
    assert "['q'] now" in str(error.value)
    assert "new: (absent)" in str(error.value)
    assert "rank" not in str(error.value)


def test_what_a_run_merely_ran_on_may_differ_and_is_told(tmp_path, recwarn):
    opened(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    opened(tmp_path, recorded={"jax": "1", "model": "moved/m"}, resume=True)
    assert not recwarn
    with pytest.warns(UserWarning, match="jax 1, now 2"):
        opened(tmp_path, recorded={"jax": "2", "model": "m"}, resume=True)
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_name_that_cannot_be_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="too long"):
        RunDirectory(tmp_path / ("x" * 256)).refuse_unless(resume=False, overwrite=False)


@pytest.mark.parametrize("name", ["run.json", "adapter", "checkpoints", "metrics.jsonl", "loss.png"])
def test_any_file_of_a_run_is_protected(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="overwrite"):
        opened(tmp_path)
    opened(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_other_files_are_no_run_and_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    opened(tmp_path)
    opened(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", b"\xff"])
def test_a_lost_or_damaged_run_file_is_an_error(tmp_path, content):
    directory = opened(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    if content is None:
        directory.run.unlink()
    else:
        directory.run.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"run\.json"):
        opened(tmp_path, resume=True)
