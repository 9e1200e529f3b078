import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError, DataError, ModelError
from hylorada_jax.models.causal_lm import CausalLM, init_params, param_shapes
from hylorada_jax.models.decoder_config import DecoderConfig

TINY = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_hidden_states_times_head(tied):
    config = DecoderConfig.from_hf({**TINY, "tie_word_embeddings": tied})
    base = CausalLM.from_config(config, jax.random.key(0))
    assert ("lm_head" in base.params) is not tied
    variables, ids = {"params": base.params}, jnp.arange(1, 11).reshape(2, 5)
    product = base.hidden(variables, ids) @ base.head(variables).T
    # float32 sums of 32 terms.
    np.testing.assert_allclose(base(ids).logits, product, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(base.forward(variables, ids).logits, product, rtol=1e-5, atol=1e-5)


def test_the_parameter_tree_is_the_one_that_adapters_and_loading_rely_on():
    config = DecoderConfig.from_hf({**TINY, "attention_bias": True})
    shapes = {
        ".".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config))
    }
    assert shapes == {
        "model.embed_tokens.embedding": (61, 32),
        "model.layers.input_layernorm.scale": (2, 32),
        "model.layers.self_attn.q_proj.kernel": (2, 32, 32),
        "model.layers.self_attn.q_proj.bias": (2, 32),
        "model.layers.self_attn.k_proj.kernel": (2, 32, 16),
        "model.layers.self_attn.k_proj.bias": (2, 16),
        "model.layers.self_attn.v_proj.kernel": (2, 32, 16),
        "model.layers.self_attn.v_proj.bias": (2, 16),
        "model.layers.self_attn.o_proj.kernel": (2, 32, 32),
        "model.layers.self_attn.o_proj.bias": (2, 32),
        "model.layers.post_attention_layernorm.scale": (2, 32),
        "model.layers.mlp.gate_proj.kernel": (2, 32, 48),
        "model.layers.mlp.up_proj.kernel": (2, 32, 48),
        "model.layers.mlp.down_proj.kernel": (2, 48, 32),
        "model.norm.scale": (32,),
        "lm_head.embedding": (61, 32),
    }


def test_random_weights_differ_by_key_and_layer():
    config = DecoderConfig.from_hf(TINY)
    kernels = [init_params(config, jax.random.key(seed))["model"]["layers"] for seed in (0, 1)]
    first, second = (tree["mlp"]["up_proj"]["kernel"] for tree in kernels)
    assert not jnp.array_equal(first, second)
    assert not jnp.array_equal(first[0], first[1])
    # 3072 normal draws: their deviation is 0.2 within 5 standard errors.
    assert float(first.std()) == pytest.approx(0.2, abs=5 * 0.2 / np.sqrt(2 * first.size))


def test_what_scales_a_layer_starts_at_one():
    """As transformers starts it: drawn around 0, it would leave nothing of what is added before it."""
    one = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_hidden_layers": 1}
    experts = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 4}
    layer = init_params(DecoderConfig.from_hf(TINY | one | experts), jax.random.key(0))["model"]["layers"]
    assert layer["layer_scalar"].tolist() == [[1.0]]
    assert layer["router"]["per_expert_scale"].tolist() == [[1.0] * 3]
    assert layer["router"]["input_scale"].tolist() == [[1.0] * 32]


def test_attention_mask_and_segments_agree_on_padding():
    base = CausalLM.from_config(DecoderConfig.from_hf(TINY), jax.random.key(0))
    ids = jnp.arange(1, 13).reshape(2, 6)
    mask = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    by_mask, by_segment = base(ids, mask).logits, base(ids, segment_ids=mask).logits
    real = np.asarray(mask > 0)
    # The same numbers in another program: float32 rounding.
    np.testing.assert_allclose(np.asarray(by_mask)[real], np.asarray(by_segment)[real], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "error"), [({"dtype": "int8"}, ModelError), ({"remat": "dot"}, ConfigError)], ids=str
)
def test_random_weights_are_of_a_dtype_and_a_policy_that_there_are(wrong, error):
    with pytest.raises(error):
        CausalLM.from_config(DecoderConfig.from_hf(TINY), jax.random.key(0), **wrong)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (6,)])
def test_an_input_has_a_value_for_each_token(shape):
    base = CausalLM.from_config(DecoderConfig.from_hf(TINY), jax.random.key(0))
    for name in ("attention_mask", "segment_ids"):
        with pytest.raises(DataError, match=rf"{name} must have one value for each token[\s\S]*\(2, 6\)"):
            base(jnp.ones((2, 6), int), **{name: jnp.ones(shape, int)})
