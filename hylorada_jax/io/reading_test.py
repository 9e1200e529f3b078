"""The shared way to read JSON: what msgspec itself cannot take is our error too."""

import msgspec
import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked


class Settings(msgspec.Struct):
    a: str = ""


@pytest.mark.parametrize("value", [{"\ud800": 1}, {"a": "\ud800", "\udc00": {}}])
def test_half_a_character_is_refused(value):
    with pytest.raises(ModelError, match="half a character"):
        checked(value, Settings, "Settings are typed", ModelError, "Correct it.")
