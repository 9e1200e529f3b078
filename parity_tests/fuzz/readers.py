"""Every reader of files: what it is given, what it makes of it, and the laws of a right result."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import numpy as np

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.data.examples import Document
from hylorada_jax.exchange.peft_import import import_peft
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.loading import load_model, open_weights
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from hylorada_jax.surgery.fit import fit
from hylorada_jax.training.report import MetricsLog
from hylorada_jax.training.run_directory import RunDirectory
from parity_tests.fuzz import files
from parity_tests.fuzz.mutations import File

TEXT = "a text, é 漢 <end>"


class Reader(NamedTuple):
    """A way into the library.

    Args:
        files: valid files by name, some of several forms.
        read: reads a directory of them; what it returns must be right, and name nothing private.
        damaged: which of the files are damaged; all where it is empty.
        reseal: whether checksums are set right after every other damage, as an attacker would.
        share: of the number of cases.
        follows: its files may be links to any place: a user names them, or they are nobody's base model.
    """

    files: Callable[[Random], files.Files]
    read: Callable[[Path], Any]
    damaged: tuple[str, ...] = ()
    reseal: Callable[[Path], None] | None = None
    share: float = 1.0
    follows: bool = False


def _config(path: Path) -> Any:
    source = find_source(path, config_only=True)
    config, ends = DecoderConfig.from_hf(source.config), end_tokens(source)
    hash(config)
    for name, value in vars(config).items():
        if isinstance(value, float):
            assert math.isfinite(value), name
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ):
        assert type(getattr(config, name)) is int, name
        assert 1 <= getattr(config, name) <= 2**31, name
    assert config.head_dim >= 2
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert len(config.sliding_layers) == config.num_hidden_layers
    assert config.rms_norm_eps > 0
    assert config.rope_theta > 0
    assert all(type(end) is int and end >= 0 for end in ends)
    return config


def _weights(path: Path) -> Any:
    return _tensors(open_weights(find_source(path)))


def _gguf(path: Path) -> Any:
    source = find_source(path / "model.gguf")
    DecoderConfig.from_hf(source.config)
    return _tensors(open_weights(source))


def _tensors(weights: Any) -> Any:
    for name, shape in weights.shapes.items():
        assert weights.read(name).shape == tuple(shape), name
    return dict(weights.shapes)


def _tokenizer(path: Path) -> Any:
    tokenizer = load_tokenizer(path / "model.gguf" if (path / "model.gguf").exists() else path)
    ids, offsets = tokenizer.encode_prompt(TEXT)
    assert all(0 <= start <= stop <= len(TEXT) for start, stop in offsets)
    assert all(0 <= each < 2**31 for each in (*ids, *tokenizer.end_token_ids))
    assert isinstance(tokenizer.decode(ids), str)
    return ids, tokenizer.special_tokens, tokenizer.chat_template


def _template(path: Path) -> Any:
    text = load_tokenizer(path).apply_chat_template([{"role": "user", "content": TEXT}])
    assert isinstance(text, str)
    assert len(text) < 2**26
    return text


def _adapter(path: Path) -> Any:
    return _adapted(HyLoRADAModel.from_pretrained(files.base(), path))


def _peft(path: Path) -> Any:
    return _adapted(import_peft(files.base(), path))


def _adapted(model: HyLoRADAModel) -> Any:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.adapters))
    return _settings(model.config), str(jax.tree.map(np.shape, model.adapters))


def _recipe(path: Path) -> Any:
    config = HyLoRADAConfig.load(path / "recipe.json")
    return _settings(config), len(fit(files.base(), config)[1])


def _settings(config: HyLoRADAConfig) -> Any:
    settings = config.to_dict()
    assert HyLoRADAConfig.from_dict(json.loads(json.dumps(settings))) == config
    return settings


def _documents(path: Path) -> Any:
    found = [document for file in sorted(path.iterdir()) for document in load_documents(file)]
    assert all(
        document.text.strip() and document.text.encode()
        for document in found
        if isinstance(document, Document)
    )
    return found


def _resumed(path: Path) -> Any:
    run = RunDirectory(path)
    run.open(files.IDENTITY, files.RECORDED, resume=True, overwrite=False)
    with MetricsLog(run.metrics, run.tensorboard, last_step=2) as log:
        log.write({"step": 3, "loss": 2.0})
        assert all(type(record["step"]) is int for record in log.records)
        return [dict(record) for record in log.records]


def _overwritten(path: Path) -> Any:
    (path / "mine").mkdir()
    (path / "mine" / "notes.txt").write_text("mine")
    try:
        RunDirectory(path).open(files.IDENTITY, files.RECORDED, resume=False, overwrite=True)
    finally:
        assert (path / "mine" / "notes.txt").read_text() == "mine"
    return json.loads((path / "run.json").read_text())["identity"]


def _model(path: Path) -> Any:
    if find_source(path, config_only=True).config.get("model_type") not in DECODERS:
        return None  # transformers, which reads the others, takes seconds to import
    model = load_model(path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))
    return dataclasses.astuple(model.config)


def _reseal(path: Path) -> None:
    """Sets an adapter's checksums right, where its config still is an object."""
    config = json.loads((path / CONFIG_NAME).read_bytes())
    config = files.sealed(config, (path / WEIGHTS_NAME).read_bytes())
    (path / CONFIG_NAME).write_bytes(bytes(File("json", config)))


READERS = {
    "config": Reader(files.config, _config),
    "index": Reader(files.shards, _weights, ("model.safetensors.index.json",)),
    "safetensors": Reader(files.weights, _weights, ("model.safetensors",)),
    "codes": Reader(files.codes, _weights, ("model.safetensors",)),
    "gguf": Reader(files.gguf, _gguf),
    "gguf-tokenizer": Reader(files.gguf, _tokenizer),
    "tokenizer": Reader(files.tokenizer, _tokenizer),
    "template": Reader(files.template, _template, ("chat_template.jinja",)),
    "adapter": Reader(files.adapter, _adapter, reseal=_reseal, follows=True),
    "peft": Reader(files.peft, _peft, follows=True),
    "recipe": Reader(files.recipe, _recipe, follows=True),
    "documents": Reader(files.documents, _documents, follows=True),
    "resume": Reader(files.run, _resumed),
    "overwrite": Reader(files.run, _overwritten),
    "model": Reader(files.weights, _model, share=0.25),
}
OUTPUTS = ("resume", "overwrite")
"""What writes into the directory that it reads."""
