"""Oracle: every expert computed on every token, in float64; those that it has not chosen weigh nothing."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.adapter_bank import AdapterBank
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError, TargetError
from hylorada_jax.math.position import position_factor
from hylorada_jax.math.structure import init_leaves, structure_prior
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.families.family import Mixture
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.loading_test import MIXTURE, edit, save_model
from hylorada_jax.models.mixture import MixtureBlock
from hylorada_jax.surgery.intercept import adapt
from hylorada_jax.trees import COLLECTION

WIDTH, RANK = 6, 2
V2 = HyLoRADAConfig(method="hylorada_v2", structure_dim=5)
BLOCK = Mixture(experts=4, chosen=2, width=5)
SHAPE = {
    "model_type": "qwen3_moe", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3,
    "moe_intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2,
}  # fmt: skip


class Net(nn.Module):
    """A block that knows its tokens' positions; the tokens are numbers already."""

    @nn.compact
    def __call__(self, input_ids, position_ids):
        x = self.param("table", nn.initializers.normal(), (9, WIDTH))[input_ids]
        return MixtureBlock(BLOCK, lambda gate, up: jnp.tanh(gate) * up, name="mlp")(x)


def plain(params, resolved, ids, positions):
    """The formula, on all tokens in a row."""
    x, block = params["table"][ids.reshape(-1)], params["mlp"]
    if "position_bias" in resolved:
        factor = position_factor(resolved["position_bias"], positions).reshape(-1)
    else:
        seq_len = V2.structure_seq_len
        prior = structure_prior(resolved["structure_encoder"], positions, None, seq_len).reshape(len(x), -1)

    def layer(name, x):  # [tokens, experts, in]
        own = resolved["mlp"]["experts"][name]
        delta = jnp.einsum("tei,eri,eor->teo", x, own["lora_A"], own["scaled_B"])
        if "position_gate" in own:
            p = 1 + own["position_gate"] * factor[:, None]
        else:
            p = 0.5 + jax.nn.sigmoid(prior @ own["scale_from_structure"].T)
        base = jnp.einsum("tei,eio->teo", x, block["experts"][name]["kernel"])
        return (base + delta * p[..., None]) * own["column_scale"]

    every = jnp.broadcast_to(x[:, None], (len(x), BLOCK.experts, WIDTH))
    y = layer("down_proj", jnp.tanh(layer("gate_proj", every)) * layer("up_proj", every))
    logits = x @ block["gate"]["kernel"]
    weights = jnp.where(logits >= jnp.sort(logits)[:, -BLOCK.chosen, None], jnp.exp(logits), 0)
    return jnp.einsum("teo,te->to", y, weights / weights.sum(-1, keepdims=True)).reshape(*ids.shape, WIDTH)


@pytest.mark.parametrize("method", ["hylorada", "hylorada_v2"])
def test_each_experts_update_depends_on_its_own_tokens(method):
    """On their positions, or on their structure priors."""
    rng = np.random.default_rng(0)
    ids, positions = jnp.asarray(rng.integers(9, size=(2, 7))), jnp.asarray(rng.integers(900, size=(2, 7)))
    with jax.enable_x64(True):
        params = jax.eval_shape(Net().init, jax.random.key(0), ids, positions)["params"]
        params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        leaves: dict[str, dict[str, jax.Array]] = {}
        for name, leaf in params["mlp"]["experts"].items():
            count, d_in, d_out = leaf["kernel"].shape
            shapes = {"lora_A": (RANK, d_in), "scaled_B": (d_out, RANK), "column_scale": (d_out,)}
            leaves[name] = {k: jnp.asarray(rng.normal(size=(count, *shape))) for k, shape in shapes.items()}
            if method == "hylorada":
                leaves[name]["position_gate"] = jnp.asarray(rng.uniform(size=count))
            else:
                scales = rng.normal(size=(count, V2.structure_dim))
                leaves[name]["scale_from_structure"] = jnp.asarray(scales)
        resolved: dict[str, Any] = {"mlp": {"experts": leaves}}
        if method == "hylorada":
            resolved["position_bias"] = jnp.asarray(rng.normal(size=64))
        else:
            encoder = init_leaves(jax.random.key(1), V2.structure_dim)
            resolved["structure_encoder"] = jax.tree.map(lambda leaf: leaf.astype("float64"), encoder)

        def ours(params, resolved):
            with adapt(resolved, HyLoRADAConfig() if method == "hylorada" else V2):
                return Net().apply({"params": params, COLLECTION: resolved}, ids, positions)

        weights = rng.normal(size=(2, 7, WIDTH))

        def results(function):
            loss = lambda *trees: jnp.sum(function(*trees) * weights)
            return jax.value_and_grad(loss, argnums=(0, 1))(params, resolved)

        expected = results(lambda params, resolved: plain(params, resolved, ids, positions))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), results(ours), expected
        )


def test_each_row_of_a_batch_has_its_own_adapter_of_each_expert():
    """And of a layer without experts."""
    base = CausalLM.from_config(DecoderConfig.from_hf(SHAPE | {"mlp_only_layers": [0]}), jax.random.key(0))
    model = HyLoRADAModel(
        base, HyLoRADAConfig(method="hylorada", lora_rank=RANK, target_modules=("all-linear",))
    )
    rng = np.random.default_rng(0)
    trees = [jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), model.adapters) for _ in range(2)]
    ids = jnp.asarray(rng.integers(40, size=(3, 6)))
    model.adapters = trees[0]
    bank = AdapterBank(model)
    bank.add("other", trees[1])
    alone = [base(ids).logits[0], bank(ids).logits[1]]
    bank.switch("other")
    alone.append(bank(ids).logits[2])
    mixed = bank(ids, [None, "default", "other"]).logits
    np.testing.assert_allclose(mixed, jnp.stack(alone), atol=1e-5)
    assert np.abs(mixed - base(ids).logits).max((1, 2))[1:].min() > 0.01


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_experts_per_tok": 6}, "6 of 5"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"output_router_logits": True}, "output_router_logits"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"num_experts": 0}, "num_experts"),
    ],
)
def test_mixtures_that_are_not_computed_are_refused(changed, said):
    with pytest.raises(ModelError, match=said):
        DecoderConfig.from_hf(SHAPE | changed)


def test_the_number_of_experts_has_the_key_of_either_transformers():
    of_5 = {key: value for key, value in SHAPE.items() if key != "num_experts"} | {"num_local_experts": 5}
    assert DecoderConfig.from_hf(of_5) == DecoderConfig.from_hf(SHAPE)


def test_a_missing_expert_is_named(tmp_path):
    missing = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    path = save_model(tmp_path / "m", **MIXTURE)
    edit(path, **{missing: None})
    with pytest.raises(ModelError, match=rf"missing \(1\): {missing}"):
        load_model(path)


def test_no_sparse_adapter_follows_an_expert():
    base = CausalLM.from_config(DecoderConfig.from_hf(SHAPE), jax.random.key(0))
    with pytest.raises(TargetError, match="sparse_enabled"):
        HyLoRADAModel(base, HyLoRADAConfig(method="lora", sparse_enabled=True))
