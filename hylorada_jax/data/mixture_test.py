import math
from typing import Any

import pytest

from hylorada_jax.data.mixture import Mixture
from hylorada_jax.errors import ConfigError


@pytest.mark.parametrize("weights", [(), (0,), (1, -1), (math.nan,), (1, math.inf), ("1",), (True,)], ids=str)
def test_a_weight_that_gives_no_share_is_refused(weights):
    with pytest.raises(ConfigError, match="weight that is a positive number"):
        Mixture([([[1, 2]], weight) for weight in weights])


def test_documents_may_come_from_an_iterator():
    once: Any = iter([[1, 2], [3, 4]])
    mixture = Mixture([(once, 1)])
    assert mixture.documents == mixture.documents == [[1, 2], [3, 4]]


@pytest.mark.parametrize("weights", [(1e-320, 1), (1e-320, 1e-320), (1e-9, 1e300)], ids=str)
def test_weights_whose_ratios_no_float_holds_are_refused(weights):
    with pytest.raises(ConfigError, match="ratios that a float can hold"):
        Mixture([([[1, 2]], weight) for weight in weights])
