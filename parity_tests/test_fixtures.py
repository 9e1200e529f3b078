"""Adapters that were saved once: each loads on both sides, and computes what it did."""

import json

import jax.numpy as jnp
import pytest

from hylorada_jax.config import METHODS
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.loading import load_model
from parity_tests.fixtures.make import LOGITS, PLACE, in_torch, write_base
from parity_tests.tolerances import MODEL, relative_error


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    write_base(directory)
    return directory


KEPT = [path.parent.name for path in PLACE.glob(f"*/{LOGITS}")]


@pytest.mark.parametrize("method", sorted({*METHODS, *KEPT}))
def test_an_adapter_that_was_once_saved_computes_what_it_did(method, base):
    kept = json.loads((PLACE / method / LOGITS).read_text("utf-8"))
    inputs = {name: jnp.asarray(value) for name, value in kept["inputs"].items()}
    theirs = in_torch(base, PLACE / method, kept["inputs"])
    assert relative_error(theirs, kept["logits"]) <= MODEL["float64"]
    model = HyLoRADAModel.from_pretrained(load_model(base), PLACE / method, check_weights=True)
    assert relative_error(model(**inputs).logits, kept["logits"]) <= MODEL["float32"]
