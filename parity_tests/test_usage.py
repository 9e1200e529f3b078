"""The usage that the method's documents print runs as written, in both packages; JAX without the device."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import hylorada_jax
import hylorada_torch

USAGE = """
encoder = StructureEncoder(hidden_size=32)
positions = encoder.get_position_tensor(batch_size, seq_len, device)
structure_prior = encoder(positions)                                  # [batch, seq, 32]
adapter = HyLoRADAv2Linear(in_features=768, out_features=768, structure_dim=32)
output = adapter(x, base_output, base_weight, structure_prior)
temporal = TemporalStructureEncoder(hidden_size=32, num_periods=4)
v1 = HyLoRADALinear(in_features, out_features, rank=8, alpha=16.0)
unified = HyLoRADAUnified(in_features, out_features, rank=8, alpha=16.0, dropout=0.0, position_bias=None)
bias = PositionBias(num_buckets=64)
"""
# What a reader does next with the layers that the documents only make.
NEXT = """
temporal_prior = temporal(temporal.get_position_tensor(batch_size, seq_len, device))
outputs = [output, *(layer(x, base_output, base_weight) for layer in (
    v1, unified, LoRALinear(in_features, out_features, rank=8, alpha=16.0, dropout=0.0),
    DoRALinear(in_features, out_features, rank=8, alpha=16.0, dropout=0.0)))]
biased = HyLoRADAUnified(in_features, out_features, position_bias=bias)
outputs.append(biased(x, base_output, base_weight, positions))
"""
BATCH, SEQ, WIDTH = 2, 5, 768
X, WEIGHT = (np.random.default_rng(0).normal(size=shape) for shape in ((BATCH, SEQ, WIDTH), (WIDTH, WIDTH)))


def executed(package, device, array):
    """The names that the usage defines, with the names of the package, inputs by `array`, and the device."""
    usage = USAGE + NEXT if device else (USAGE + NEXT).replace(", device)", ")")
    scope = {name: getattr(package, name) for name in package.__all__}
    scope |= {"batch_size": BATCH, "seq_len": SEQ, "device": device, "base_weight": array(WEIGHT)}
    scope |= {"x": array(X), "base_output": array(X @ WEIGHT.T), "in_features": WIDTH, "out_features": WIDTH}
    exec(usage, scope)
    return scope


RESULTS = ("positions", "structure_prior", "temporal_prior", "outputs")


def torch_usage():
    """(results, parameters of each layer, without those of a layer in it)."""
    scope = executed(hylorada_torch, torch.device("cpu"), lambda values: torch.tensor(values).float())
    layers = {name: value for name, value in scope.items() if isinstance(value, torch.nn.Module)}
    counts = {name: sum(p.numel() for p in layer.parameters(recurse=False)) for name, layer in layers.items()}
    return jax.tree.map(lambda value: value.detach().numpy(), {name: scope[name] for name in RESULTS}), counts


class Network(nn.Module):
    """Linen modules are made and called inside of one."""

    @nn.compact
    def __call__(self):
        scope = executed(hylorada_jax, None, lambda values: jnp.asarray(values, jnp.float32))
        named = {value.name: name for name, value in scope.items() if isinstance(value, nn.Module)}
        self.sow("names", "named", named)
        return {name: scope[name] for name in RESULTS}


def jax_usage():
    """The same."""
    results, variables = Network().init_with_output(jax.random.key(0))
    (named,) = variables["names"]["named"]
    counts = {
        named[layer]: sum(leaf.size for leaf in jax.tree.leaves(leaves))
        for layer, leaves in variables["params"].items()
        if layer in named
    }
    return results, counts


@pytest.mark.parametrize("usage", [torch_usage, jax_usage])
def test_the_documents_usage(usage):
    results, counts = usage()
    np.testing.assert_array_equal(results["positions"], [range(SEQ)] * BATCH)
    assert results["structure_prior"].shape == results["temporal_prior"].shape == (BATCH, SEQ, 32)
    assert len(results["outputs"]) == 6
    for output in results["outputs"]:
        # A fresh layer is the identity; c is m₀/‖W‖, a float32 root of a sum divided by another.
        np.testing.assert_allclose(output, X @ WEIGHT.T, rtol=1e-6, atol=1e-6)
    expected = {"encoder": 7_281, "temporal": 7_541, "bias": 64}
    expected |= {"adapter": 13_090, "v1": 13_058, "unified": 13_059, "biased": 13_059}
    assert counts == expected
