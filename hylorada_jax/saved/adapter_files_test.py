import errno
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.saved import adapter_files
from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME, check_base, write_adapter
from hylorada_jax.saved.base_identity import base_identity
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.surgery.layout import check_keys

TENSORS = {
    "h.0.q.lora_A": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "h.0.q.magnitude_gate": np.array(0.5, np.float32),
}
BASE = base_identity("tiny", None, [("h.0.q", 3, 3)]) | {"model_type": "llama"}


@pytest.fixture
def saved(tmp_path):
    write_adapter(tmp_path / "adapter", TENSORS, HyLoRADAConfig(), BASE)
    return tmp_path / "adapter"


def test_what_is_written_is_read_bit_for_bit(saved):
    adapter = open_adapter(saved)
    tensors = adapter.tensors()
    assert (adapter.config, adapter.base) == (HyLoRADAConfig(), BASE)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], tensor, strict=True)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_floats_are_read_as_float32_of_the_same_values(tmp_path, dtype):
    tensor = np.array([[1 / 3, -2e-7, 3e4]], dtype)
    write_adapter(tmp_path, {"a": tensor}, HyLoRADAConfig(), BASE)
    found = open_adapter(tmp_path).tensors()["a"]
    np.testing.assert_array_equal(found, tensor.astype(np.float32), strict=True)


def test_nothing_is_overwritten_unasked(saved):
    with pytest.raises(CheckpointError, match="overwrit") as error:
        write_adapter(saved, TENSORS, HyLoRADAConfig(), BASE)
    remedy = "Choose another directory, or remove this one; overwrite=True replaces the adapter."
    assert error.value.remedy == remedy
    write_adapter(saved, TENSORS, HyLoRADAConfig(lora_rank=4), BASE, overwrite=True)
    assert open_adapter(saved).config.lora_rank == 4


@pytest.mark.parametrize("written", [0, 1])
def test_a_full_disk_leaves_the_adapter_that_was_there_or_none(tmp_path, monkeypatch, written):
    write_adapter(tmp_path / "old", TENSORS, HyLoRADAConfig(), BASE)
    for name in ("old", "new"):
        room = iter(range(written))

        def until_full(descriptor, room=room):
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        changed = HyLoRADAConfig(lora_rank=4)
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", until_full)
            with pytest.raises(CheckpointError, match="No space left"):
                write_adapter(tmp_path / name, TENSORS, changed, BASE, overwrite=name == "old")
    assert open_adapter(tmp_path / "old").config == HyLoRADAConfig()
    assert not list((tmp_path / "new").iterdir())
    write_adapter(tmp_path / "new", TENSORS, HyLoRADAConfig(), BASE)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interruption_leaves_the_old_adapter_or_the_new_one(saved, monkeypatch, error, number, moment):
    new = {name: tensor + 1 for name, tensor in TENSORS.items()}
    replace, calls = Path.replace, iter(range(1, 100))

    def interrupted(self, target):
        is_now = next(calls) == number
        if is_now and moment == "before":
            raise error
        replace(self, target)
        if is_now:
            raise error

    with monkeypatch.context() as watched:
        watched.setattr(Path, "replace", interrupted)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            write_adapter(saved, new, HyLoRADAConfig(lora_rank=4), BASE, overwrite=True)
    found, is_old = open_adapter(saved), (number, moment) == (1, "before")
    assert found.config == (HyLoRADAConfig() if is_old else HyLoRADAConfig(lora_rank=4))
    for name, tensor in found.tensors().items():
        np.testing.assert_array_equal(tensor, (TENSORS if is_old else new)[name])
    assert {path.name for path in saved.iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}


def test_no_directory_is_called_as_a_bucket_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="gs://"):
            write_adapter("s3://bucket/a", TENSORS, HyLoRADAConfig(), BASE, overwrite=overwrite)
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_all_experts_of_a_large_mixture_is_read(tmp_path):
    """hylorada_v1 on every linear layer of 48 layers of 128 experts: 92,160 tensors."""
    shapes = {
        "lora_A": (1, 1),
        "lora_B": (1, 1),
        "magnitude": (1,),
        "magnitude_gate": (),
        "residual_weight": (),
    }
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.{leaf}": np.zeros(shape, np.float32)
        for layer in range(48)
        for expert in range(128)
        for name in ("gate", "up", "down")
        for leaf, shape in shapes.items()
    }
    write_adapter(tmp_path, tensors, HyLoRADAConfig(), BASE)
    assert open_adapter(tmp_path).shapes.keys() == tensors.keys()


def test_a_chat_template_goes_with_its_adapter(saved):
    assert open_adapter(saved).chat_template is None
    template = "{{ messages[0].content }}\u2028\U0001f600\x01"
    for given in (template, "\U0001f600" * 2**18):
        write_adapter(saved, TENSORS, HyLoRADAConfig(), BASE, overwrite=True, chat_template=given)
        assert open_adapter(saved).chat_template == given
    write_adapter(saved, TENSORS, HyLoRADAConfig(), BASE, overwrite=True)
    assert open_adapter(saved).chat_template is None


@pytest.mark.parametrize(
    ("template", "said"),
    [({"default": "a", "tool_use": "b"}, "tool_use"), ("x" * (2**18 + 1), "262,145"), ("\ud83d", "UTF-8")],
    ids=["several", "long", "half a character"],
)
def test_a_chat_template_that_is_not_one_text_is_neither_written_nor_read(
    tmp_path, template, said, monkeypatch
):
    with pytest.raises(CheckpointError, match=said):
        write_adapter(tmp_path / "a", TENSORS, HyLoRADAConfig(), BASE, chat_template=template)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(adapter_files, "check_beside", lambda *_: None)  # as a stranger may write it
    write_adapter(tmp_path / "a", TENSORS, HyLoRADAConfig(), BASE, chat_template=template)
    with pytest.raises(CheckpointError, match=said):
        open_adapter(tmp_path / "a")


def test_the_structure_goes_with_its_adapter(saved):
    assert open_adapter(saved).structure is None
    write_adapter(saved, TENSORS, HyLoRADAConfig(), BASE, overwrite=True, structure="code")
    assert open_adapter(saved).structure == "code"
    with pytest.raises(CheckpointError, match=r"'hours'[\s\S]*code, or None"):
        write_adapter(saved, TENSORS, HyLoRADAConfig(), BASE, overwrite=True, structure="hours")
    assert open_adapter(saved).structure == "code"


def test_non_finite_tensors_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"finite[\s\S]*bad"):
        write_adapter(tmp_path, {"bad": np.array([np.nan])}, HyLoRADAConfig(), BASE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_adapter(saved).tensors()


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_truncations_and_bit_flips_anywhere_are_refused(saved, name):
    path, whole = saved / name, (saved / name).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[: rng.integers(len(whole))] for _ in range(50)]
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            open_adapter(saved).tensors()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.arange(3)}, "float32 or float64[\\s\\S]*a I64"),
        ({"a": np.array([1.0, np.inf])}, "finite[\\s\\S]*a"),
        ({"a": np.array([1.0, 1e300])}, "finite[\\s\\S]*a"),  # whose products have no finite values
    ],
    ids=["integers", "infinities", "beyond float32"],
)
def test_what_is_no_adapter_is_refused_with_a_checksum_that_is_right(saved, tensors, message, monkeypatch):
    monkeypatch.setattr(np, "isfinite", np.ones_like)
    write_adapter(saved, tensors, HyLoRADAConfig(), BASE, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=message):
        open_adapter(saved).tensors()


def test_another_format_version_is_refused(saved):
    body = json.loads((saved / CONFIG_NAME).read_text())
    (saved / CONFIG_NAME).write_text(json.dumps(body | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        open_adapter(saved).tensors()


def test_keys_and_bases_are_compared_both_ways():
    with pytest.raises(
        CheckpointError, match=r"missing b; unexpected c; of another shape a \(1,\) for \(2,\)"
    ):
        check_keys({"a": (1,), "c": (1,)}, {"a": (2,), "b": (1,)})
    check_base(BASE, BASE | {"name": "a copy elsewhere"})
    with pytest.raises(CheckpointError, match="model_type: adapter 'llama', model 'gpt2'"):
        check_base(BASE, BASE | {"model_type": "gpt2"})
