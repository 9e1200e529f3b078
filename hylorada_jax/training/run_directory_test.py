"""Law: a run's own files are overwritten when that is asked for, and nothing else ever is."""

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.io import bucket as of_bucket
from hylorada_jax.io.files import any_path
from hylorada_jax.training import run_directory as module
from hylorada_jax.training.checkpoint_test import restore, save
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.identity import defaults
from hylorada_jax.training.run_directory import RunDirectory

IDENTITY = {"model": "m", "adapter": {"targets": ("q", "v"), "rank": 8}}
FLAGS = {"neither": {}, "resume": {"resume": True}, "overwrite": {"overwrite": True}}


def opened(path, identity=IDENTITY, recorded=None, **how):
    directory = RunDirectory(path)
    directory.open(
        identity, recorded or {"jax": "1", "model": "m"}, **{"resume": False, "overwrite": False} | how
    )
    return directory


def snapshot(*places):
    """All that is there, and what it is: a file's bytes, where a link leads."""

    def found(path):
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() and path.stat().st_size < 2**20 else path.lstat().st_mode

    return {path: found(path) for place in places for path in [place, *place.rglob("*")]}


def refused(path, match, *untouched, **how):
    before = snapshot(path, *untouched)
    with pytest.raises(CheckpointError, match=match) as error:
        opened(path, **how)
    assert snapshot(path, *untouched) == before
    return str(error.value)


def a_run(path):
    """A run with all that one can leave, some of it by a kill."""
    run = opened(path)
    for name in (
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/.hylorada-0123456789abcdef", "metrics.jsonl", "loss.png", "nonfinite_batch.npz",
        "recipe.json",
        "checkpoints/2/_CHECKPOINT_METADATA", "checkpoints/2/run/metadata", "checkpoints/2/state/_METADATA",
        f"checkpoints/2/state/ocdbt.process_0/d/{'0f' * 16}", "checkpoints/2/state/manifest.ocdbt",
        "checkpoints/4.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/ocdbt.process_0/d/manifest.ocdbt.__lock",
        "damaged_checkpoints/3/run/metadata", "damaged_checkpoints/3_again/commit_success.txt",
        "tensorboard/events.out.tfevents.1764200000.123456.77",
    ):  # fmt: skip
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return run


@pytest.fixture
def outside(tmp_path):
    """What is a user's own, elsewhere."""
    place = tmp_path / "outside"
    (place / "2").mkdir(parents=True)
    (place / "2" / "notes.txt").write_text("mine")
    return place


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


def test_a_setting_that_a_run_does_not_have_yet_is_its_default(tmp_path):
    adapter = HyLoRADAConfig(method="dora")
    unset = defaults(adapter)
    given = {"adapter": adapter.to_dict(), "training": TrainingConfig(output="a").fingerprint()}
    run = opened(tmp_path, given)
    record = json.loads(run.run.read_text())
    for part, settings in given.items():
        for name in settings:
            fewer = {key: value for key, value in settings.items() if key != name}
            run.run.write_text(json.dumps(record | {"identity": given | {part: fewer}}))
            opened(tmp_path, given, defaults=unset, resume=True)
            with pytest.raises(CheckpointError, match=rf"{part}\.{name}: .* other now"):
                opened(tmp_path, given | {part: fewer | {name: "other"}}, defaults=unset, resume=True)


def test_what_a_run_merely_ran_on_may_differ_and_is_told(tmp_path, recwarn):
    opened(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    opened(tmp_path, recorded={"jax": "1", "model": "moved/m"}, resume=True)
    assert not recwarn
    with pytest.warns(UserWarning, match="jax 1, now 2"):
        opened(tmp_path, recorded={"jax": "2", "model": "m"}, resume=True)
    assert (tmp_path / "run.json").read_bytes() == before


def test_overwriting_deletes_the_run_and_nothing_beside_it(tmp_path, outside):
    run = a_run(tmp_path / "run")
    refused(run.path, r"--resume.*--overwrite")
    (run.path / "notes.txt").write_text("mine")
    (run.path / "data").symlink_to(outside)
    (run.path / ".hylorada-0123456789abcdef").write_text(
        "as a kill leaves it, and as anybody may call a file"
    )
    before = snapshot(outside)
    (tmp_path / "link").symlink_to(run.path)  # a user's own way to say where runs are
    opened(tmp_path / "link", {"another": "run"}, overwrite=True)
    names = {path.name for path in run.path.iterdir()}
    assert names == {"run.json", "notes.txt", "data", ".hylorada-0123456789abcdef"}
    assert snapshot(outside) == before
    assert (tmp_path / "link").is_symlink()
    opened(run.path, {"another": "run"}, resume=True)


def test_all_that_orbax_writes_is_a_runs(tmp_path):
    run = opened(tmp_path / "run")
    save(run.checkpoints, 1, 2)
    shutil.copytree(run.checkpoints / "2", run.checkpoints / "3")
    (run.checkpoints / "3" / "run" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        restore(run.checkpoints)
    assert {path.name for path in run.path.iterdir()} == {"run.json", "checkpoints", "damaged_checkpoints"}
    opened(run.path, overwrite=True)
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


KINDS = {
    "file": lambda place, _: place.write_text("mine"),
    "directory": lambda place, _: (place / "2").mkdir(parents=True),
    "link": lambda place, outside: place.symlink_to(outside),
    "link to nothing": lambda place, outside: place.symlink_to(outside / "nothing"),
    "special file": lambda place, _: os.mkfifo(place),
}
NAMES = ("adapter", "checkpoints", "damaged_checkpoints", "tensorboard", "metrics.jsonl", "loss.png")


@pytest.mark.parametrize("how", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "nonfinite_batch.npz"])
def test_what_no_run_wrote_is_in_the_way(tmp_path, outside, name, kind, how):
    home = tmp_path / "home"
    home.mkdir()
    (home / "notes.txt").write_text("mine")
    KINDS[kind](home / name, outside)
    message = refused(home, rf"{name} \(a {kind.split(' to')[0]}\), and no run\.json", outside, **how)
    assert "Move that away" in message


@pytest.mark.parametrize("how", [FLAGS["resume"], FLAGS["overwrite"]], ids=["resume", "overwrite"])
@pytest.mark.parametrize(("name", "kind"), [
    ("adapter", "link"), ("checkpoints", "link to nothing"), ("damaged_checkpoints", "link"),
    ("tensorboard", "file"), ("metrics.jsonl", "link"), ("metrics.jsonl", "special file"),
    ("loss.png", "directory"), ("loss.png", "link to nothing"), ("nonfinite_batch.npz", "link"),
    ("run.json", "link"), ("run.json", "link to nothing"), ("run.json", "directory"),
    ("run.json", "special file"), ("run.json.deleted", "file"), ("run.json.deleted", "link"),
    ("run.json.deleted", "directory"),
])  # fmt: skip
def test_what_was_put_in_the_place_of_a_runs_own_is_in_the_way(tmp_path, outside, name, kind, how):
    run = a_run(tmp_path / "run")
    place = run.path / name
    if place.is_dir():
        shutil.rmtree(place)
    elif place.exists():
        shutil.move(place, outside / "2")
    KINDS[kind](place, outside)
    refused(run.path, name, outside, **how)


@pytest.mark.parametrize(("name", "kind"), [
    ("adapter/README.md", "file"), ("adapter/adapter_config.json", "link"), ("adapter/versions", "directory"),
    ("adapter/adapter_config.json", "directory"), ("checkpoints/notes.txt", "file"),
    ("checkpoints/best", "link"), ("checkpoints/7", "file"), ("checkpoints/7", "link"),
    ("checkpoints/2/notes.txt", "file"),
    ("checkpoints/2/data", "directory"), ("checkpoints/2/state/d", "link"), ("checkpoints/²", "directory"),
    ("checkpoints/2/run/metadata\n", "file"), ("checkpoints/5.orbax-checkpoint-tmp", "link to nothing"),
    ("damaged_checkpoints/what I found.md", "file"), ("tensorboard/other run", "directory"),
    ("tensorboard/events.out.tfevents.1", "link"), ("adapter/adapter_model.safetensors", "special file"),
])  # fmt: skip
def test_what_a_user_put_into_a_runs_directories_is_not_deleted_and_can_stay(tmp_path, outside, name, kind):
    run = a_run(tmp_path / "run")
    (run.path / name).unlink(missing_ok=True)
    KINDS[kind](run.path / name, outside)
    refused(run.path, name.rstrip(), outside, overwrite=True)
    opened(run.path, resume=True)


@pytest.mark.parametrize(
    "writes", [[], ["metrics.jsonl", "../outside"], ["../outside", "/", "..", "", "notes.txt"]]
)
def test_a_list_can_take_nothing_but_a_runs_own_names(tmp_path, outside, writes):
    run = opened(tmp_path / "run")
    record = json.loads(run.run.read_text())
    assert {*NAMES} < {*record["writes"]}
    run.run.write_text(json.dumps(record | {"writes": writes}))
    (run.path / "notes.txt").write_text("mine")
    (run.path / "adapter").mkdir()
    for how in ({"resume": True}, {"overwrite": True}):
        refused(run.path, r"adapter \(a directory\)\n", outside, **how)
    (run.path / "adapter").rmdir()
    before = snapshot(outside)
    opened(run.path, overwrite=True)
    assert snapshot(outside) == before
    assert {path.name for path in run.path.iterdir()} == {"run.json", "notes.txt"}


def changed(**changes):
    """run.json with other values; None takes a key out."""

    def write(content):
        body = json.loads(content) | changes
        return json.dumps({key: value for key, value in body.items() if value is not None}).encode()

    return write


@pytest.mark.parametrize("damage", [
    lambda _: b"", lambda _: b"{", lambda _: b"[]", lambda _: b"{}", lambda _: b"\xff", lambda _: b"null",
    lambda content: content[: len(content) // 2], lambda content: content + b" " * 2**24,
    lambda content: content.replace(b'"m"', b"[" * 10**5),
    lambda content: content.replace(b'"m"', b"9" * 5000),
    changed(format=None), changed(format="run"), changed(format_version=2), changed(format_version="1"),
    changed(writes=None), changed(writes="adapter"), changed(writes=[1]), changed(writes={"adapter": 1}),
    changed(identity=None), changed(identity=[]), changed(identity="m"), changed(recorded=3),
    changed(recorded=None), changed(**{"\ud800": 1}),
])  # fmt: skip
def test_a_damaged_run_file_is_an_error_and_marks_no_run(tmp_path, damage):
    run = a_run(tmp_path)
    run.run.write_bytes(damage(run.run.read_bytes()))
    for how in FLAGS.values():
        assert len(refused(tmp_path, r"run\.json", **how).replace(str(tmp_path), "")) < 500


def test_a_lost_run_file_is_an_error(tmp_path):
    a_run(tmp_path).run.unlink()
    for how in FLAGS.values():
        refused(tmp_path, r"checkpoints \(a directory\), .*no run\.json", **how)


@pytest.mark.parametrize("deep", [b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_a_deep_identity_is_another_one(tmp_path, deep):
    run = opened(tmp_path)
    run.run.write_bytes(run.run.read_bytes().replace(b'"m"', deep))
    refused(tmp_path, "started with", resume=True)


def stop_after(steps, monkeypatch):
    """Lets so many changes of a directory happen, and then none, as a kill does."""
    left = iter(range(steps))

    def stopping(change):
        def step(*arguments, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return step

    for name in ("unlink", "rmdir", "rename", "replace"):
        monkeypatch.setattr(Path, name, stopping(getattr(Path, name)))


def test_a_deletion_that_is_cut_short_says_so_and_can_be_finished(tmp_path, monkeypatch):
    for steps in range(100):
        run = a_run(tmp_path / str(steps))
        (run.path / "notes.txt").write_text("mine")
        before = snapshot(run.path)
        with monkeypatch.context() as patched:
            stop_after(steps, patched)
            try:
                opened(run.path, overwrite=True)
            except KeyboardInterrupt:
                pass
            else:
                break
        if steps == 0:
            assert snapshot(run.path) == before
            opened(run.path, resume=True)
        elif run.deleted_run.exists():
            assert not run.run.exists()
            left = {path.name for path in run.path.iterdir()} - {"run.json.deleted", "notes.txt"}
            assert not left or "recipe.json" in left  # the run's own, by which it may be started again
            refused(run.path, r"cut short[\s\S]*--overwrite", resume=True)
            refused(run.path, "overwritten unasked")
        else:  # all of it is deleted, and the new run has not begun
            assert not {"adapter", "checkpoints"} & {path.name for path in run.path.iterdir()}
        opened(run.path, overwrite=True)
        left = {path.name for path in run.path.iterdir() if not path.name.startswith(".hylorada-")}
        assert left == {"run.json", "notes.txt"}
        assert (run.path / "notes.txt").read_text() == "mine"
    assert steps > 30


def overwriting(path, *inputs):
    RunDirectory(path).refuse_unless(resume=False, overwrite=True, inputs=iter(inputs))


@pytest.mark.parametrize("name", [
    "adapter", "adapter/adapter_config.json", "checkpoints/2/run/metadata", "metrics.jsonl",
    "recipe.json", "run.json",
])  # fmt: skip
def test_what_the_new_run_reads_is_not_deleted(tmp_path, outside, name, monkeypatch):
    run = a_run(tmp_path / "runs" / "a")
    monkeypatch.chdir(run.path)
    (run.path / "notes.txt").write_text("mine")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "run").symlink_to(run.path)
    (tmp_path / "links" / "input").symlink_to(run.path / name)
    before = snapshot(tmp_path)
    for path in (run.path, tmp_path / "links" / "run", "../a"):
        for read in (
            run.path / name,
            Path(name),
            tmp_path / "links" / "run" / name,
            tmp_path / "links" / "input",
        ):
            with pytest.raises(CheckpointError, match="one that reads its files") as error:
                overwriting(path, outside, read)
            assert str(read) in str(error.value)
            assert str(outside) not in str(error.value)
    assert snapshot(tmp_path) == before


def test_what_the_new_run_reads_beside_a_run_stays_and_is_no_hindrance(tmp_path, outside):
    run = a_run(tmp_path / "run")
    (run.path / "notes.txt").write_text("mine")
    copy = shutil.copytree(run.adapter, outside / "adapter")
    os.link(run.metrics, outside / "metrics.jsonl")  # its content stays when the run's own name is deleted
    kept = (run.path, run.path / "notes.txt", copy, outside / "metrics.jsonl", outside / "none", Path("\0"))
    overwriting(run.path, *kept, any_path("gpt2"))
    RunDirectory(run.path).refuse_unless(resume=True, overwrite=False, inputs=[run.adapter])
    overwriting(tmp_path / "new", run.adapter)


# Takes the lock as any program may, says so, and keeps it until it is killed or told to end.
HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_a_directory_is_another_processs_until_that_ends_however_it_does(tmp_path, end):
    run = a_run(tmp_path / "it's a run")
    (tmp_path / "link").symlink_to(run.path)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        before = snapshot(run.path)
        for path in (run.path, tmp_path / "link"):
            for how in FLAGS.values():
                with pytest.raises(CheckpointError, match="one trainer at a time") as error:
                    RunDirectory(path).refuse_unless(resume="resume" in how, overwrite="overwrite" in how)
                assert str(path) in str(error.value)
            with pytest.raises(CheckpointError, match="one trainer at a time"), RunDirectory(path).alone():
                pass
        assert "lsof" in error.value.remedy
        assert snapshot(run.path) == before
    finally:
        getattr(child, end)()
        child.communicate()
    RunDirectory(run.path).refuse_unless(resume=True, overwrite=False)
    with RunDirectory(tmp_path / "link").alone():
        opened(run.path, overwrite=True)  # by the one that is in it


class Ended(BaseException):
    """As KeyboardInterrupt, by which pytest would end."""


def test_a_directory_is_free_again_however_the_block_ends(tmp_path):
    for error in (None, OSError, BlockingIOError, CheckpointError("", "", ""), Ended):
        with contextlib.suppress(OSError, CheckpointError, Ended), RunDirectory(tmp_path / "run").alone():
            with pytest.raises(CheckpointError, match="one trainer at a time"):
                RunDirectory(tmp_path / "run").refuse_unless(resume=True, overwrite=False)
            if error is not None:
                raise error
    assert not list((tmp_path / "run").iterdir())  # no file of a lock
    opened(tmp_path / "run")


@pytest.mark.parametrize("system", ["Windows", "NFS"])
def test_where_there_are_no_locks_one_goes_on_without(tmp_path, monkeypatch, system):
    def refusing(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patched:
        if system == "Windows":
            patched.setattr(module, "fcntl", None)
        else:
            patched.setattr(module.fcntl, "flock", refusing)
        for _ in range(2):
            with RunDirectory(tmp_path).alone():
                opened(tmp_path, resume=True)
                RunDirectory(tmp_path).refuse_unless(resume=True, overwrite=False)


def test_in_a_bucket_too_a_deletion_takes_the_run_alone_and_can_be_finished(bucket, monkeypatch):
    changes = {name: getattr(of_bucket, name) for name in ("write", "remove")}
    mine = {"notes.txt": b"mine", "adapter.txt": b"mine"}

    def within(place):
        head = f"{place}/".removeprefix("gs://bucket/")
        found = {
            name.removeprefix(head): what for name, what in bucket.objects.items() if name.startswith(head)
        }
        return {name: what for name, what in found.items() if not name.startswith(".hylorada-")}

    for steps in range(2, 100):  # two are to see whether one can write
        run = opened(place := any_path(f"gs://bucket/deleted/{steps}"))
        for name in ("adapter/adapter_config.json", "checkpoints/2/run/metadata"):
            changes["write"](place / name, b"the run's")
        for name, content in mine.items():
            changes["write"](place / name, content)
        before, left = within(place), iter(range(steps))

        def stopping(name, *arguments, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            changes[name](*arguments)

        with monkeypatch.context() as patched:
            for name in changes:
                patched.setattr(of_bucket, name, functools.partial(stopping, name))
            try:
                opened(place, overwrite=True)
            except KeyboardInterrupt:
                pass
            else:
                break
        if "run.json.deleted" in within(place):
            with pytest.raises(CheckpointError, match="cut short"):
                opened(place, resume=True)
        elif within(place) == before:
            opened(place, resume=True)
        opened(place, overwrite=True)
        assert within(place).keys() == {"run.json", *mine}
    run = opened(place, overwrite=True)
    changes["write"](run.adapter / "adapter_config.json", b"the run's")
    for read in (run.adapter, run.adapter / "adapter_config.json", any_path(f"{place}/adapter/")):
        with run.alone(), pytest.raises(CheckpointError, match="one that reads its files"):
            overwriting(place, read)
    overwriting(place, any_path(f"{place}2/adapter"), place / "notes.txt", Path("adapter"))
    opened(place, overwrite=True)
    assert steps == 10  # run.json under its other name, all files and directories, the new run.json
    monkeypatch.setattr(bucket, "hidden", True)
    with pytest.raises(CheckpointError, match=r"storage\.buckets\.get access"):
        opened(place, resume=True)
    monkeypatch.setattr(bucket, "hidden", False)
    changes["write"](run.adapter / "thesis.md", b"mine")
    for how, found in (
        (FLAGS["neither"], "overwritten unasked"),
        (FLAGS["overwrite"], r"adapter/thesis\.md"),
    ):
        with pytest.raises(CheckpointError, match=found):
            opened(place, **how)
    assert within(place).keys() == {"run.json", "adapter/thesis.md", *mine}
