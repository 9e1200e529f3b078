import math

import numpy as np
import pytest
import torch

from hylorada_jax.errors import ConfigError, DataError
from hylorada_torch.conftest import randomize
from hylorada_torch.position import structure_buckets
from hylorada_torch.structure import StructureEncoder, TemporalStructureEncoder

KINDS = (StructureEncoder, TemporalStructureEncoder)


def random_encoder(kind, **options):
    encoder = kind(5, encoding_dim=6, max_structure_types=4, dtype=torch.float64, **options)
    randomize(encoder.parameters())
    return encoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seq_len", "buckets"), [(None, 64), (4000, 10)])
def test_the_prior_is_the_formula_of_method_md(kind, seq_len, buckets):
    encoder = random_encoder(kind, num_buckets=buckets)
    leaf = {name: value.detach().numpy() for name, value in encoder.named_parameters()}
    positions, ids = (
        torch.tensor([[0.0, 7.75, 2500.5], [1.0, 2.0, 3.0]]),
        torch.tensor([[0, 3, 9], [-2, 1, 2]]),
    )
    got = encoder(positions, ids, seq_len).detach().numpy()
    for b, t in np.ndindex(2, 3):
        p = positions[b, t].item()
        e = leaf["bucket_embeddings"][
            structure_buckets(np.array(math.floor(p) - (seq_len or 3) // 2), buckets)
        ]
        angles = [p * abs(leaf["freq_scale"][i]) * 10000 ** (-i / 3) for i in range(3)]
        e = e + np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        e = e + leaf["structure_embeddings"][min(max(ids[b, t].item(), 0), 3)]
        if kind is TemporalStructureEncoder:
            angles = [2 * math.pi * p / abs(period) for period in leaf["periods"]]
            waves = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
            e = e + leaf["period_weight"] @ waves
        normal = (e - e.mean()) / math.sqrt(e.var() + 1e-5) * leaf["norm_weight"] + leaf["norm_bias"]
        prior = leaf["proj_weight"] @ normal / (1 + math.exp(-leaf["gate"]))
        # Float64; the sine of an angle of some thousands loses three digits.
        np.testing.assert_allclose(got[b, t], prior, rtol=1e-11, atol=1e-11)


def test_the_initial_values_are_those_of_the_table():
    encoder = TemporalStructureEncoder(32)
    leaf = dict(encoder.named_parameters())
    assert {name: tuple(value.shape) for name, value in leaf.items()} == {
        "bucket_embeddings": (129, 32),
        "structure_embeddings": (64, 32),
        "freq_scale": (16,),
        "norm_weight": (32,),
        "norm_bias": (32,),
        "proj_weight": (32, 32),
        "gate": (),
        "periods": (4,),
        "period_weight": (32, 8),
    }
    for name in ("freq_scale", "norm_weight"):
        assert torch.equal(leaf[name], torch.ones_like(leaf[name]))
    for name in ("norm_bias", "gate"):
        assert not leaf[name].any()
    assert leaf["periods"].tolist() == [24, 168, 720, 8760]
    # Thousands of normal draws: their deviation is within 10% of its own; of uniform ones: near the bound.
    for name in ("bucket_embeddings", "structure_embeddings"):
        assert leaf[name].std().item() == pytest.approx(0.02, rel=0.1)
    for name, fan_in in (("proj_weight", 32), ("period_weight", 8)):
        assert 0.9 / math.sqrt(fan_in) < leaf[name].abs().max() <= 1 / math.sqrt(fan_in)
    # 129·32 + 64·32 + 16 + 2·32 + 32·32 + 1, the count of method.md §5.
    assert sum(value.numel() for value in StructureEncoder(32).parameters()) == 7_281
    named = [name for name in leaf if not name.startswith("period")]
    assert [name for name, _ in StructureEncoder(32).named_parameters()] == named


@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_gets_a_gradient(kind):
    encoder = random_encoder(kind)
    encoder(torch.tensor([[0, 5, 9]]), torch.tensor([[0, 1, 2]])).square().sum().backward()
    assert all(parameter.grad.any() for parameter in encoder.parameters())


def test_position_tensors():
    for kind in KINDS:
        assert kind().get_position_tensor(2, 3).tolist() == [[0, 1, 2]] * 2
        assert kind().get_position_tensor(2, 3, "meta").is_meta


def test_what_does_not_fit_is_refused():
    encoder, positions = StructureEncoder(), torch.arange(4)[None]
    for ids in (torch.zeros(4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4)):
        with pytest.raises(DataError, match="structure_ids"):
            encoder(positions, ids)
    for wrong in (positions[0], positions - 1):
        with pytest.raises(DataError, match="osition"):
            encoder(wrong)
    with pytest.raises(ConfigError, match="even"):
        StructureEncoder(encoding_dim=5)
    for number in (0, 5):
        with pytest.raises(ConfigError, match="num_periods"):
            TemporalStructureEncoder(num_periods=number)
