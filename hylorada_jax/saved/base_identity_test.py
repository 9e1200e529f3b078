"""A hash that lasts: what is added to a config's fields changes it only where it is on."""

import dataclasses
from typing import Any

import pytest

from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.rope_config import RopeScaling
from hylorada_jax.saved import base_identity as module
from hylorada_jax.saved.base_identity import base_identity

CONFIG = DecoderConfig.from_hf({"model_type": "llama"})


def sha256(config):
    return base_identity(None, config, [])["config_sha256"]


@pytest.mark.parametrize("name", [*module.HASHED, *module.UNHASHED])
def test_a_field_changes_the_hash_or_not(name):
    another: dict[str, Any] = {name: "another"}
    changed = dataclasses.replace(CONFIG, **another)
    assert (sha256(changed) == sha256(CONFIG)) == (name in module.UNHASHED)


@pytest.mark.parametrize("name", module.HASHED_ROPE)
def test_a_field_of_the_rotation_changes_the_hash(name):
    another: dict[str, Any] = {name: "another"}
    rope = dataclasses.replace(CONFIG.rope_scaling, **another)
    assert sha256(dataclasses.replace(CONFIG, rope_scaling=rope)) != sha256(CONFIG)


def wider(kind, **off):
    """The class with fields more, which are off."""
    fields = [(name, object, dataclasses.field(default=value)) for name, value in off.items()]
    return dataclasses.make_dataclass("Wider", fields, bases=(kind,), frozen=True, kw_only=True)


def test_a_later_field_is_hashed_only_where_it_is_on():
    before = sha256(CONFIG)
    rope = wider(RopeScaling, turns=1.0)()
    given = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    off = wider(DecoderConfig, softcap=None)(**given | {"rope_scaling": rope})
    assert sha256(off) == before
    on = [
        dataclasses.replace(off, softcap=30.0),
        dataclasses.replace(off, rope_scaling=dataclasses.replace(rope, turns=2.0)),
    ]
    assert len({before, *map(sha256, on)}) == 3
