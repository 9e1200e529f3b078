"""Laws: what is restored is bit-equal to what was saved at some step, whatever happened to the files."""

import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
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
    optimizer = make_optimizer(adapters, TrainingConfig(output_dir="run", steps=9), HyLoRADAConfig())
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


def test_damage_of_any_kind_is_noticed(tmp_path):
    """The newest checkpoint cut at every kind of place, altered in every part, or no file of ours at all."""
    directory = tmp_path / "run" / "c"
    save(directory, 1, 2)
    newest = directory / "2.safetensors"
    whole = newest.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    # In the header's length, a tensor's name, the position in the data, the tensors' first and last byte.
    places = (0, whole.index(b"lora_A"), whole.index(b"next_index") + 3, header, len(whole) - 1)
    altered = [whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :] for at in places]
    cut = [whole[:length] for length in (0, 4, header - 3, header, len(whole) - 1)]
    for damaged in (*altered, *cut, b"\0" * len(whole), whole + b"\0"):
        newest.write_bytes(damaged)
        with pytest.warns(UserWarning, match="step 2 is damaged"):
            assert_is_step(restore(directory), 1)
        (aside,) = (tmp_path / "run" / "damaged_checkpoints").iterdir()
        assert aside.read_bytes() == damaged
        aside.unlink()
    newest.write_bytes(whole)
    assert_is_step(restore(directory), 2)


def test_what_a_killed_writer_leaves_is_no_checkpoint(tmp_path):
    save(tmp_path / "c", 1)
    whole = (tmp_path / "c" / "1.safetensors").read_bytes()
    (tmp_path / "c" / ".2.safetensors.123").write_bytes(whole[:-5])
    assert_is_step(restore(tmp_path / "c"), 1)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1.safetensors"]


def test_a_checkpoint_of_another_tree_is_refused_with_what_differs(tmp_path):
    save(tmp_path / "c", 1)
    like = state_at(0)
    like.adapters["q"]["extra"] = jnp.zeros(3)
    with Checkpoints(tmp_path / "c", 3) as checkpoints, pytest.raises(CheckpointError, match="extra"):
        checkpoints.restore(like)


def test_a_step_set_aside_can_be_saved_again(tmp_path):
    save(tmp_path / "c", 1, 2)
    os.truncate(tmp_path / "c" / "2.safetensors", 700)
    with Checkpoints(tmp_path / "c", 3) as checkpoints:
        with pytest.warns(UserWarning, match="step 2 is damaged"):
            assert_is_step(checkpoints.restore(state_at(0)), 1)
        checkpoints.save(state_at(2), data={"next_index": 20})
    assert_is_step(restore(tmp_path / "c"), 2)


def test_when_all_are_damaged_each_is_named_and_none_is_touched(tmp_path):
    save(tmp_path / "c", 1, 2)
    for step in ("1", "2"):
        (tmp_path / "c" / f"{step}.safetensors").write_text("{")
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
