"""Laws: what is restored is bit-equal to what was saved at some step, whatever happened to the files."""

import os
import resource
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.io.files import any_path
from hylorada_jax.io.reading import MAX_JSON_BYTES
from hylorada_jax.training.checkpoint import Checkpoints
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer
from hylorada_jax.training.step import init_state


def state_at(step, seed=5):
    """A state that differs in every leaf from that of any other step."""
    names = {"lora_A": (3, 500), "lora_B": (500, 3), "magnitude": (7,), "magnitude_gate": ()}
    rng = np.random.default_rng(step)
    adapters = {
        "q": {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in names.items()}
    }
    optimizer = make_optimizer(adapters, TrainingConfig(output="run", steps=9), HyLoRADAConfig())
    state = init_state(adapters, optimizer, seed)
    _, opt_state = optimizer.update(adapters, state.opt_state, adapters)
    return state._replace(step=jnp.int32(step), opt_state=opt_state)


def save(directory, *steps, keep=3):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_at(step), data={"next_index": step * 10})


def restore(directory):
    with Checkpoints(directory, 3) as checkpoints:
        return checkpoints.restore(state_at(0))


def assert_is_step(restored, step):
    state, data = restored
    assert data == {"next_index": step * 10}

    def assert_equal(ours, theirs):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)

    jax.tree.map(assert_equal, state, state_at(step))


def test_the_newest_state_comes_back_bit_equal_and_old_ones_go(tmp_path):
    save(tmp_path / "c", 1, 2, 3, keep=2)
    assert Checkpoints(tmp_path / "c", 2).steps == [2, 3]
    assert_is_step(restore(tmp_path / "c"), 3)


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "c") is None


def test_a_saved_state_is_a_copy(tmp_path):
    state = state_at(1)
    consume = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        checkpoints.save(state, data={"next_index": 10})
        jax.block_until_ready(consume(state))
    assert_is_step(restore(tmp_path / "c"), 1)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_damage_to_any_file_is_noticed_or_harmless(tmp_path):
    """Each file of the newest checkpoint in turn is cut, altered and deleted."""
    directory = tmp_path / "run" / "c"
    save(directory, 1, 2)
    files = [path for path in (directory / "2").rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    fell_back = 0
    for path, content in contents.items():
        middle = len(content) // 2
        altered = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        for damaged in (content[:middle], altered, None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                restored = restore(directory)
            if (directory / "2").exists():  # not needed to read the state
                assert_is_step(restored, 2)
                path.write_bytes(content)
                continue
            fell_back += 1
            assert_is_step(restored, 1)
            assert any("step 2 is damaged" in str(w.message) for w in caught)
            (aside,) = (tmp_path / "run" / "damaged_checkpoints").iterdir()
            (aside).rename(directory / "2")
            path.write_bytes(content)
    # At least the arrays, the tree's description and the data position, in all three ways.
    assert fell_back >= 9


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    save(directory := tmp_path_factory.mktemp("run") / "c", 1, 2)
    return directory


def in_place(path, make):
    path.unlink()
    make(path)


@pytest.mark.parametrize("damage", [
    lambda step: (step / "run" / "metadata").write_text("[" * 10**5),
    lambda step: (step / "run" / "metadata").write_text("[]"),
    lambda step: (step / "run" / "metadata").write_text('{"digest": ""}'),
    lambda step: (step / "run" / "metadata").write_text('{"data": {"next_index": 20}, "digest": []}'),
    lambda step: (path := step / "run" / "metadata").write_text(path.read_text().replace("20", "30")),
    lambda step: (path := step / "run" / "metadata").write_text(path.read_text().replace("20", '"20"')),
    lambda step: os.truncate(step / "state" / "_METADATA", 10**12),
    lambda step: in_place(step / "run" / "metadata", os.mkfifo),
    lambda step: in_place(step / "state" / "_METADATA", lambda path: path.symlink_to("nothing")),
    lambda step: in_place(step / "state" / "manifest.ocdbt", os.mkdir),
])  # fmt: skip
def test_what_would_hang_or_mislead_is_damage(tmp_path, two_steps, damage):
    shutil.copytree(two_steps, tmp_path / "c")
    damage(tmp_path / "c" / "2")
    with pytest.warns(UserWarning, match="step 2 is damaged"):
        assert_is_step(restore(tmp_path / "c"), 1)


def test_names_that_are_no_step_are_left_alone(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path / "c")
    names = ["notes", "²", "٣", "007", "-1", "1.5", "2 (copy)"]
    for name in names:
        (tmp_path / "c" / name).mkdir()
    assert Checkpoints(tmp_path / "c", 3).steps == [1, 2]
    assert_is_step(restore(tmp_path / "c"), 2)
    save(tmp_path / "c", 3)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"1", "2", "3", *names}


def test_a_checkpoint_that_orbax_leaves_out_is_an_error(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path / "c")
    with pytest.raises(CheckpointError, match="step 1 is not later"):
        save(tmp_path / "c", 1)
    assert Checkpoints(tmp_path / "c", 3).steps == [1, 2]


def test_damaged_steps_are_moved_onto_nothing(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path / "c")
    (tmp_path / "c" / "2" / "run" / "metadata").unlink()
    (tmp_path / "damaged_checkpoints").mkdir()
    (tmp_path / "damaged_checkpoints" / "2").symlink_to(tmp_path / "nothing")
    with pytest.warns(UserWarning, match="2_again"):
        assert_is_step(restore(tmp_path / "c"), 1)
    assert (tmp_path / "damaged_checkpoints" / "2").is_symlink()


def test_in_a_bucket_what_is_damaged_is_set_aside_and_what_is_incomplete_is_none(bucket):
    place = any_path("gs://bucket/c")
    save(place / "checkpoints", 2, 3, 4)
    objects = bucket.objects
    del objects["c/checkpoints/4/commit_success.txt"]
    objects["c/checkpoints/3/run/metadata"] = b"0" * (MAX_JSON_BYTES + 1)
    with pytest.warns(
        UserWarning, match=r"step 3 is damaged .*larger .*moved to gs://bucket/c/damaged_checkpoints/3"
    ):
        assert_is_step(restore(place / "checkpoints"), 2)
    assert "c/damaged_checkpoints/3/run/metadata" in objects
    assert {name.split("/")[2] for name in objects if name.startswith("c/checkpoints/")} == {"2"}


def test_a_step_set_aside_can_be_saved_again(tmp_path):
    save(tmp_path / "c", 1, 2)
    for path in (tmp_path / "c" / "2").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        with pytest.warns(UserWarning, match="step 2 is damaged"):
            assert_is_step(checkpoints.restore(state_at(0)), 1)
        checkpoints.save(state_at(2), data={"next_index": 20})
    assert_is_step(restore(tmp_path / "c"), 2)


def test_when_all_are_damaged_each_is_named_and_none_is_touched(tmp_path):
    save(tmp_path / "c", 1, 2)
    for step in ("1", "2"):
        (tmp_path / "c" / step / "run" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match=r"step 2: .*step 1: "):
        restore(tmp_path / "c")
    assert Checkpoints(tmp_path / "c", 3).steps == [1, 2]


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    save(tmp_path / "c", 1)
    with (
        Checkpoints(tmp_path / "c", 3) as checkpoints,
        pytest.raises(CheckpointError, match=r"seed is 5.* 6"),
    ):
        checkpoints.restore(state_at(0, seed=6))


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_last_good_step(tmp_path):
    # The kernel lets no file grow past the limit, in Python and in tensorstore alike: a real failed write.
    save(tmp_path / "c", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path / "c", 3)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(CheckpointError, match=r"too large(.|\n)*checkpoint of step 1"), checkpoints:
            checkpoints.save(state_at(2), data={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_is_step(restore(tmp_path / "c"), 1)
    save(tmp_path / "c", 2)  # with room again, the same step can be written
    assert_is_step(restore(tmp_path / "c"), 2)
