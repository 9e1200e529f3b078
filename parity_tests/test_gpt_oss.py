"""What gpt-oss alone has, against transformers' torch code of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import TargetError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.fused_experts import FusedMixtureBlock
from parity_tests.families import jax_base, measuring
from parity_tests.tolerances import relative_error


def test_experts_equal_transformers_beyond_their_bounds_too():
    rng = np.random.default_rng(0)
    config = GptOssConfig(hidden_size=6, intermediate_size=5, num_local_experts=4, num_experts_per_tok=2)
    theirs = GptOssMLP(config).double()
    for parameter in theirs.parameters():
        parameter.data = torch.tensor(rng.normal(size=parameter.shape) * 3)
    x = torch.tensor(rng.normal(size=(2, 7, 6)), requires_grad=True)
    expected, _ = theirs(x)
    cotangent = rng.normal(size=expected.shape)
    expected.backward(torch.tensor(cotangent))
    # Either of the two is bounded, by both signs of its bound or by the one that it has.
    gate_up = x @ theirs.experts.gate_up_proj[0] + theirs.experts.gate_up_proj_bias[0]
    assert (gate_up[..., ::2] > 7).any()
    assert (gate_up[..., ::2] < -7).any()
    assert (gate_up[..., 1::2].abs() > 7).any()

    numbers = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    experts = {name.removeprefix("experts."): value for name, value in numbers.items() if "experts." in name}
    router = {"kernel": numbers["router.weight"].T, "bias": numbers["router.bias"]}
    block = FusedMixtureBlock(Mixture(experts=4, chosen=2, width=5, router="router"), 7.0)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, {"router": router, "experts": experts})
        run = jax.jit(lambda x: block.apply({"params": params}, x))
        got, pull = jax.vjp(run, jnp.asarray(x.detach().numpy()))
        assert relative_error(np.asarray(got), expected.detach().numpy()) <= 1e-14
        assert x.grad is not None
        assert relative_error(np.asarray(pull(jnp.asarray(cotangent))[0]), x.grad.numpy()) <= 1e-14


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "router"])
def test_what_is_no_linear_layer_is_no_target(target):
    with measuring("float64"):
        config = HyLoRADAConfig(method="lora", target_modules=(target,))
        with pytest.raises(TargetError, match=rf"'{target}'\n.*self_attn\.k_proj"):
            HyLoRADAModel(jax_base("gpt_oss", "float64"), config)
