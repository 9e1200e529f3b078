"""Adapters of strangers: each mutation of a small valid one ends at once in an error of ours."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save

from hylorada_jax import __version__
from hylorada_jax.adapter_bank import AdapterBank
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, HyLoRADAError
from hylorada_jax.exchange.merged import write_merged
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.loading import empty_model
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME, render, write_adapter
from hylorada_jax.saved.opening import identity, open_on
from hylorada_jax.saved.saved_adapter import MAX_CONFIG_BYTES, SavedAdapter, open_adapter
from hylorada_jax.surgery.layout import tensor_shapes
from hylorada_jax.surgery.modules import modules_of
from hylorada_jax.surgery.plan import plan

CONFIG = HyLoRADAConfig(method="hylorada", lora_rank=2, sparse_enabled=True, sparse_adapter_dim=3)
NAME = "model.layers.0.self_attn.q_proj.lora_A"
DEEP = "[" * 300 + "]" * 300  # more than repr shows, and less than a file may have


@pytest.fixture(autouse=True)
def soon():
    """A test that hangs fails."""

    def stop(*_):
        pytest.fail("it took more than 30 s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's directory, which holds its config alone."""
    place = tmp_path_factory.mktemp("base")
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (place / "config.json").write_text(json.dumps({"model_type": "llama", "intermediate_size": 6, **sizes}))
    return place


@pytest.fixture(scope="module")
def base(model):
    return as_base(empty_model(model))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    modules = modules_of(base)
    shapes = tensor_shapes(plan(modules, CONFIG))
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    place = tmp_path_factory.mktemp("adapter")
    write_adapter(place, tensors, CONFIG, identity(base, modules))
    return place


@pytest.fixture
def saved(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def rewrite(saved, weights=None, **changes):
    """Changes the adapter, under right checksums; ... leaves a key out, and dicts are merged."""
    body = json.loads((saved / CONFIG_NAME).read_text())
    body.pop("sha256")
    if weights is not None:
        (saved / WEIGHTS_NAME).write_bytes(weights)
        body["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    for key, value in changes.items():
        body[key] = without(body[key] | value) if isinstance(value, dict) else value
    (saved / CONFIG_NAME).write_bytes(render(without(body)))


def without(changed):
    return {key: value for key, value in changed.items() if value is not ...}


def read(saved, base):
    return open_on(base, saved).saved.tensors()


def refused(saved, base, said):
    with pytest.raises(HyLoRADAError) as error:
        read(saved, base)
    assert all(part in str(error.value) for part in said), str(error.value)
    assert len(str(error.value)) < 3000
    assert error.value.remedy


# (what is changed, what the error says)
CHANGES: list[tuple[dict[str, Any], str]] = [
    *(({key: ...}, key) for key in ("format", "format_version", "base_model", "config", "weights_sha256")),
    *(({key: None}, key) for key in ("format", "base_model", "config", "weights_sha256")),
    *(({key: [1]}, key) for key in ("format", "base_model", "config", "weights_sha256")),
    ({"format": "another"}, "format: 'another'"),
    ({"format_version": True}, "format_version: True"),
    ({"format_version": 1.0}, "format_version: 1.0"),
    ({"format_version": 99}, "99"),
    ({"format_version": None}, "None"),
    ({"format_version": json.loads(DEEP)}, "[[["),
    ({"hylorada_version": 1}, "hylorada_version: 1"),
    ({"hylorada_version": None}, "hylorada_version: None"),
    ({"weights_sha256": "0"}, "weights_sha256: '0'"),
    ({"next_year": 1}, "next_year"),
    ({"\ud83d": 1}, "ud83d"),
    ({"weights_sha256": "\ud83d"}, "ud83d"),
    ({"base_model": {"model_type": "\ud83d"}}, "ud83d"),
    ({"config": {"\ud83d": 1}}, "ud83d"),
    ({"config": {"target_modules": ["\ud83d"]}}, "ud83d"),
    ({"base_model": {"name": 5}}, "base_model.name: 5"),
    ({"base_model": {"name": "x" * 4097}}, "base_model.name: 'xxx"),
    ({"base_model": {"name": ...}}, "name"),
    ({"base_model": {"model_type": ["llama"]}}, "base_model.model_type: ['llama']"),
    ({"base_model": {"model_type": "gpt2"}}, "model_type: adapter 'gpt2', model 'llama'"),
    ({"base_model": {"layers_sha256": None}}, "base_model.layers_sha256: None"),
    ({"base_model": {"config_sha256": "0" * 64}}, "config_sha256"),
    ({"base_model": {"config_sha256": ...}}, "config_sha256"),
    ({"base_model": {"weights_sha256": 7}}, "base_model.weights_sha256: 7"),
    ({"base_model": {"revision": "main"}}, "revision"),
    *(
        ({"config": {key: 2**16 + 1}}, f"{key} must be an integer from 1 to 65,536")
        for key in ("lora_rank", "sparse_adapter_dim", "structure_dim", "s2_group_size")
    ),
    ({"config": {"sparse_adapter_dim": 10**7}}, "received: 10000000"),
    ({"config": {"lora_rank": 10**400}}, "lora_rank"),
    ({"config": {"lora_rank": True}}, "received: True"),
    ({"config": {"lora_rank": None}}, "received: None"),
    ({"config": {"lora_alpha": float("nan")}}, "lora_alpha must be"),
    ({"config": {"lora_alpha": float("inf")}}, "received: inf"),
    ({"config": {"lora_alpha": 10**400}}, "lora_alpha must be"),
    ({"config": {"method": ["lora"]}}, "received: ['lora']"),
    ({"config": {"method": {}}}, "method must be"),
    ({"config": {"lora_rnk": 3}}, "'lora_rnk': 3"),
    ({"config": {f"key {i}" * 50: i for i in range(1000)}}, "Every key must be a setting"),
    ({"config": {"target_modules": {"q_proj": 1}}}, "target_modules must be"),
    ({"config": {"target_modules": ["q_proj"] * 2001}}, "2,001 of 12,006"),
    ({"config": {"target_modules": ["q" * 100_001]}}, "1 of 100,001"),
    ({"config": {"exclude_modules": 5}}, "exclude_modules must be"),
    ({"config": {"rank_pattern": {"q_proj": 2**16 + 1}}}, "{'q_proj': 65537}"),
    ({"config": {"rank_pattern": {"q_proj": True}}}, "{'q_proj': True}"),
    ({"config": {"rank_pattern": {f"q{i}": 1 for i in range(2001)}}}, "rank_pattern must be at most 2,000"),
    ({"config": {"alpha_pattern": {"q_proj": 10**400}}}, "alpha_pattern must map"),
    ({"config": {"lora_dropout": json.loads(DEEP)}}, "[[["),
    # Sizes that a setting may have, and the tensors do not.
    ({"config": {"lora_rank": 2**16}}, "(65536, 8)"),
    ({"config": {"rank_pattern": {"q_proj": 2**16}}}, "(65536, 8)"),
    ({"config": {"sparse_adapter_dim": 2**16}}, "65536"),
    ({"config": {"daa_per_head": False}}, "(2,) for (1,)"),
    ({"config": {"train_embeddings": True}}, "missing model.embed_tokens.weight"),
    ({"config": {"sparse_enabled": False}}, "unexpected model.layers.0.mlp.down_proj.down"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), CHANGES, ids=range(len(CHANGES)))
def test_a_config_of_other_types_or_sizes_is_refused_by_key_and_value(changes, said, saved, base):
    rewrite(saved, **changes)
    refused(saved, base, [said])


def test_an_adapter_says_which_version_wrote_it_and_need_not(saved, base):
    assert json.loads((saved / CONFIG_NAME).read_text())["hylorada_version"] == __version__
    before = read(saved, base)
    rewrite(saved, hylorada_version=...)
    assert read(saved, base).keys() == before.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"quantized": "nf4"}},
        {"config": {"method": "hylorada_v3"}},
        {"config": {"lora_alpha": "auto"}},
        {"next_year": 1},
        {"base_model": {"revision": "main"}},
        {"weights_sha256": "blake3:0"},
    ],
    ids=str,
)
def test_what_only_a_newer_version_knows_is_said_to_be_of_one(changes, saved, base):
    rewrite(saved, hylorada_version="10.0.0.dev1", **changes)
    upgrade = "Upgrade hylorada, for it was written by a newer version: '10.0.0.dev1' wrote it, and this is"
    refused(saved, base, [upgrade, repr(__version__)])
    for version in (__version__, "0.0.9", "", "no version"):  # then who knows
        rewrite(saved, hylorada_version=version)
        refused(saved, base, [f"If a newer version wrote it, upgrade hylorada: {version!r} wrote it"])
    rewrite(saved, hylorada_version=...)
    refused(saved, base, ["upgrade hylorada: one that it does not name wrote it", __version__])


def test_a_newer_format_is_of_a_newer_version_whoever_wrote_it(saved, base):
    rewrite(saved, format_version=2)
    refused(saved, base, [f"Upgrade hylorada, for it was written by a newer version: {__version__!r}"])
    rewrite(saved, format_version=0)
    refused(saved, base, ["Load it with the version of hylorada that wrote it. If a newer"])


def test_what_was_altered_is_not_taken_for_a_newer_versions(saved, base):
    content = (saved / CONFIG_NAME).read_text()
    (saved / CONFIG_NAME).write_text(content.replace("lora_rank", "lora_rang"))
    refused(saved, base, ["checksum differs", "copy it again"])


CONFIG_FILES = {
    "empty": b"",
    "a list": b"[]",
    "no JSON": b"{",
    "no UTF-8": b'{"format": "\xff"}',
    "NaN alone": b"NaN",
    "deeper than is read": b"[" * 100_000,
    "as deep as is read": b'{"config": ' + b"[" * 900 + b"]" * 900 + b"}",
    "digits without end": b'{"format_version": ' + b"9" * 5000 + b"}",
    "too large": b" " * (MAX_CONFIG_BYTES + 1),
}


@pytest.mark.parametrize("content", CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_config_that_is_no_object_is_refused(content, saved, base):
    (saved / CONFIG_NAME).write_bytes(content)
    refused(saved, base, [CONFIG_NAME])


def safetensors(header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape=(2, 8), offsets=(0, 64), dtype="F32"):
    return {NAME: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


WEIGHTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", WEIGHTS_NAME),
    "seven bytes": (b"\0" * 7, WEIGHTS_NAME),
    "no header": (b"\0" * 8, WEIGHTS_NAME),
    "a header without end": ((2**63).to_bytes(8, "little"), "9,223,372,036,854,775,808 bytes"),
    "a header past the end": ((1000).to_bytes(8, "little") + b"{}", WEIGHTS_NAME),
    "a large header": ((2**25 + 1).to_bytes(8, "little") + b"{}", "a header of 33,554,433 bytes"),
    "a header of junk": (safetensors(b"\xff" * 16), WEIGHTS_NAME),
    "a list": (safetensors([]), WEIGHTS_NAME),
    "a tensor that is null": (safetensors({NAME: None}), WEIGHTS_NAME),
    "deep": (safetensors(DEEP.encode()), WEIGHTS_NAME),
    "cut": (safetensors(tensor(), b"\0" * 63), WEIGHTS_NAME),
    "bytes behind": (safetensors(tensor(), b"\0" * 65), WEIGHTS_NAME),
    "overlapping": (safetensors(tensor() | {"b": tensor()[NAME]}), WEIGHTS_NAME),
    "backwards": (safetensors(tensor(offsets=(64, 0))), WEIGHTS_NAME),
    "offsets below zero": (safetensors(tensor(offsets=(-64, 0))), WEIGHTS_NAME),
    "offsets without end": (safetensors(tensor(offsets=(0, 2**64))), WEIGHTS_NAME),
    "another size than the offsets": (safetensors(tensor(shape=(2, 7))), WEIGHTS_NAME),
    "sizes that wrap": (safetensors(tensor(shape=(2**32, 2**32), offsets=(0, 0)), b""), WEIGHTS_NAME),
    "a size below zero": (safetensors(tensor(shape=(-2, -8))), WEIGHTS_NAME),
    "a size of 2.5": (safetensors(tensor(shape=(2.5, 8))), WEIGHTS_NAME),
    "an unknown dtype": (safetensors(tensor(dtype="X")), WEIGHTS_NAME),
    "float8": (safetensors(tensor((8, 8), dtype="F8_E4M3")), f"{NAME} F8_E4M3"),
    "bfloat16": (safetensors(tensor((4, 8), dtype="BF16")), f"{NAME} BF16"),
    "integers": (safetensors(tensor(dtype="I32")), f"{NAME} I32"),
    "zero rows": (safetensors(tensor((0, 8), (0, 0)), b""), f"{NAME} (0, 8) for (2, 8)"),
    "transposed": (safetensors(tensor((8, 2))), f"{NAME} (8, 2) for (2, 8)"),
    "one alone": (safetensors(tensor()), "missing"),
    "a long name": (safetensors({"x" * 100_000: tensor()[NAME]}), "xxx…"),
}


@pytest.mark.parametrize(("content", "said"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_damaged_or_of_other_shapes_are_refused(content, said, saved, base):
    rewrite(saved, weights=content)
    refused(saved, base, [said])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value, saved, base):
    tensors = read(saved, base)
    tensors[NAME] = tensors[NAME].copy()
    tensors[NAME][1, 2] = value
    rewrite(saved, weights=save(tensors))
    refused(saved, base, ["finite", NAME])


def pipe(path: Path, place: Path) -> None:
    os.mkfifo(path)


def link_to_pipe(path: Path, place: Path) -> None:
    os.mkfifo(place / "pipe")
    path.symlink_to(place / "pipe")


# (what is put there, what the error says)
FILES = {
    "missing": (lambda path, place: None, "two files"),
    "a pipe": (pipe, "regular files"),
    "a link to a pipe": (link_to_pipe, "which is "),
    "a directory": (lambda path, place: path.mkdir(), "two files"),
    "a device": (lambda path, place: path.symlink_to("/dev/zero"), "which is /dev/zero"),
    "a link to nothing": (lambda path, place: path.symlink_to(place / "nothing"), "two files"),
    "a link to itself": (lambda path, place: path.symlink_to(path), "two files"),
}


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize(("put", "said"), FILES.values(), ids=FILES)
def test_what_is_no_file_is_refused(put, said, name, saved, base, tmp_path):
    (saved / name).unlink()
    put(saved / name, tmp_path)
    refused(saved, base, [said, name])


def test_a_runs_directory_leads_to_its_adapter(saved, base, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    saved.rename(run / "adapter")
    with pytest.raises(CheckpointError, match="directory of a run") as error:
        open_adapter(run)
    open_adapter(Path(error.value.remedy.rstrip(".").rpartition(", ")[2]))


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/dev/null"])
def test_a_path_that_is_no_directory_is_refused(path, base):
    refused(path, base, ["two files"])


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_link_to_a_file_is_read_within_the_directory_alone(name, saved, base, tmp_path):
    """A stranger's that leads out would have merge and export-peft write a private adapter's weights."""
    (saved / name).rename(saved / "elsewhere")
    (saved / name).symlink_to("elsewhere")
    assert read(saved, base)[NAME].shape == (2, 8)
    (tmp_path / "alias").symlink_to(saved)
    assert read(tmp_path / "alias", base)[NAME].shape == (2, 8)
    (saved / "elsewhere").rename(tmp_path / "private")
    (saved / name).unlink()
    (saved / name).symlink_to("../private")
    refused(saved, base, ["must lie in its directory", str(saved / name), str(tmp_path / "private")])


def test_an_adapter_in_a_cache_is_read_through_its_links(saved, base, tmp_path):
    cached = tmp_path / "models--org--name"
    snapshot, blobs = cached / "snapshots" / ("a" * 40), cached / "blobs"
    (snapshot / "adapter").mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (saved / name).rename(blobs / name)
        (snapshot / "adapter" / name).symlink_to(Path("../../../blobs", name))
    assert read(snapshot / "adapter", base)[NAME].shape == (2, 8)


@pytest.fixture
def vast(saved):
    """An adapter whose only tensor has 8 GiB, and takes no place on the disk."""
    header = tensor((2**28, 8), (0, 2**33))
    (saved / WEIGHTS_NAME).write_bytes(safetensors(header, b""))
    os.truncate(saved / WEIGHTS_NAME, (saved / WEIGHTS_NAME).stat().st_size + 2**33)
    return saved


# Also the order: of an adapter of another base, nothing else is read.
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"\(268435456, 8\) for \(2, 8\)"),
        ({"base_model": {"config_sha256": "0" * 64}}, "fits only the base model"),
        ({"base_model": {"model_type": "gpt2"}, "config": {"target_modules": ["c_attn"]}}, "'gpt2', model"),
    ],
    ids=["tensors", "base", "base and plan"],
)
def test_no_path_reads_tensors_that_do_not_fit(changes, said, vast, model, base, tmp_path, monkeypatch):
    rewrite(vast, **changes)
    trained = HyLoRADAModel(CausalLM.from_config(base.config, jax.random.key(0)), CONFIG)
    monkeypatch.setattr(SavedAdapter, "tensors", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(HyLoRADAModel, "_set_up", lambda *_: pytest.fail("built"))
    for load in (
        lambda: HyLoRADAModel.from_pretrained(trained.base, vast),
        lambda: AdapterBank(trained).load("vast", vast),
        lambda: write_merged(model, vast, tmp_path / "merged"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load()
    assert not (tmp_path / "merged").exists()
