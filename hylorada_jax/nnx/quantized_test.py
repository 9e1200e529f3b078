"""What the modules of a quantised model compute is in tunix_test.py."""

import sys
import types

import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.nnx.quantized import untouched


def test_a_qwix_that_cannot_be_kept_out_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", types.ModuleType("qwix"))
    monkeypatch.setitem(sys.modules, "qwix._src.interception", None)
    with pytest.raises(ModelError, match="interception"):
        untouched(len)
    monkeypatch.delitem(sys.modules, "qwix")
    assert untouched(len) is len
