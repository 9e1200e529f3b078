import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError
from hylorada_jax.models.causal_lm import CausalLM, init_params
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.decoder_layer import MLP, norm
from hylorada_jax.models.layer_loops import REMAT_POLICIES

TINY = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": True,
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "initializer_range": 0.2,
}
IDS = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 24)), jnp.int32)


def model(remat="none", dtype=jnp.float32, **change):
    config = DecoderConfig.from_hf({**TINY, **change})
    return CausalLM.from_config(config, jax.random.key(0), dtype=dtype, remat=remat)


def loss(base, variables):
    logits = base.forward(variables, IDS[:, :-1]).logits
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), IDS[:, 1:, None], -1).mean()


def gradient(base):
    return jax.jit(jax.grad(lambda params: loss(base, {"params": params})))


def test_a_later_token_never_moves_an_earlier_logit():
    base = model()
    first = base(IDS).logits
    for t in (1, 11, 23):
        changed = base(IDS.at[:, t:].set((IDS[:, t:] + 1) % 61)).logits
        # Bit-equal: the same program, and masked keys have weight exactly 0.
        np.testing.assert_array_equal(changed[:, :t], first[:, :t])
        assert (changed[:, t] != first[:, t]).any()


# Every third layer has a mixture of experts.
MIXED = {
    "model_type": "qwen3_moe", "layer_types": None, "moe_intermediate_size": 12, "num_experts": 2,
    "num_experts_per_tok": 2, "decoder_sparse_step": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "depths"), [({"layer_types": None, "max_window_layers": 1}, (2, 14)), (MIXED, (9, 15))]
)
def test_program_size_is_flat_in_depth(change, depths):
    sizes = set()
    for depth in depths:
        base = model(remat="dots", num_hidden_layers=depth, **change)
        lowered = gradient(base).lower(base.params).as_text()
        sizes.add((lowered.count("\n"), lowered.count("dot_general")))
    assert len(sizes) == 1


def test_remat_policies_save_memory_and_give_equal_gradients():
    gradients, memory = {}, {}
    for remat in REMAT_POLICIES:
        base = model(remat, layer_types=None, use_sliding_window=False)
        compiled = gradient(base).lower(base.params).compile()
        gradients[remat] = compiled(base.params)
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["full"] < memory["dots"] < memory["none"]
    for remat in ("full", "dots"):
        jax.tree.map(
            # float32 sums that XLA may fuse otherwise; the gradients are of order 0.1.
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            gradients[remat],
            gradients["none"],
        )


def test_unknown_remat_policy_is_refused():
    with pytest.raises(ConfigError, match="everything"):
        model(remat="everything")(IDS)


def test_intercepted_dense_layers_see_their_layer_of_a_stacked_collection():
    """Adding x·Δ from outside equals adding Δ to the kernel, forward and backward, under scan and remat."""
    base = model("dots")
    kernel = base.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    delta = jax.random.normal(jax.random.key(1), kernel.shape) * 0.1

    def add(next_call, args, kwargs, context):
        out = next_call(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.module.has_variable("hylorada", "delta"):
            out = out + args[0] @ context.module.get_variable("hylorada", "delta")
        return out

    def adapted(delta):
        tree = {"model": {"layers": {"mlp": {"up_proj": {"delta": delta}}}}}
        with nn.intercept_methods(add):
            return loss(base, {"params": base.params, "hylorada": tree})

    def merged(delta):
        params = jax.tree.map(lambda leaf: leaf, base.params)
        params["model"]["layers"]["mlp"]["up_proj"]["kernel"] = kernel + delta
        return loss(base, {"params": params})

    value, slope = jax.jit(jax.value_and_grad(adapted))(delta)
    expected, expected_slope = jax.jit(jax.value_and_grad(merged))(delta)
    # float32: x·W + x·Δ against x·(W + Δ), four layers deep.
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-3, atol=1e-6)


def test_bfloat16_stays_near_float32_and_gives_float32_logits():
    exact, rounded = model(), model(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(rounded.params)} == {jnp.dtype(jnp.bfloat16)}
    exact = exact.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded.params))
    logits = rounded(IDS).logits
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - exact(IDS).logits)
    # bfloat16 keeps 8 bits; four layers of rounding on logits of order 1.
    assert difference.mean() < 0.02 * np.abs(logits).mean()


def test_float64_is_not_rounded_to_float32():
    with jax.enable_x64(True):
        config = DecoderConfig.from_hf({**TINY, "layer_types": None})
        params = init_params(config, jax.random.key(0), jnp.float64)
        nudged = jax.tree.map(lambda leaf: leaf * (1 + 1e-12), params)
        inputs = (IDS, jnp.broadcast_to(jnp.arange(24), IDS.shape))
        apply = jax.jit(DecoderLM(config).apply)
        logits, moved = (apply({"params": p}, *inputs) for p in (params, nudged))
        assert logits.dtype == jnp.float64
        # A float32 anywhere would round the nudge to 0 or to 1e-7.
        assert 0 < np.abs(logits - moved).max() < 1e-9


def test_padding_gives_finite_logits_and_gradients():
    base = model()
    pad = jnp.zeros((1, 7), jnp.int32)
    ids = jnp.concatenate([jnp.concatenate([pad, IDS[:1]], 1), jnp.concatenate([IDS[1:], pad], 1)])

    def padded_loss(params):
        logits = base.forward({"params": params}, ids, attention_mask=jnp.sign(ids)).logits
        return jnp.square(logits).sum()  # padding too

    value, slopes = jax.jit(jax.value_and_grad(padded_loss))(base.params)
    assert all(jnp.isfinite(leaf).all() for leaf in (value, *jax.tree.leaves(slopes)))


@pytest.mark.parametrize(("family", "said"), [("gemma2", {}), ("granite", {"embedding_multiplier": 2.7})])
def test_embeddings_are_scaled_in_bfloat16_as_in_torch(family, said):
    """Gemma's scale is a tensor in the model's dtype, Granite's a number of Python's."""
    torch = pytest.importorskip("torch")
    sizes = {"vocab_size": 64, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DecoderConfig.from_hf(
        {"model_type": family, "hidden_size": 20, "num_key_value_heads": 1, "head_dim": 4, **sizes, **said}
    )
    # Without its kernels the model is its embeddings and its last norm.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key == "kernel" else leaf,
        init_params(config, jax.random.key(0), jnp.bfloat16),
    )
    base = CausalLM(DecoderLM(config), params, config, "tiny")
    table = torch.tensor(np.asarray(params["model"]["embed_tokens"]["embedding"], np.float32)).bfloat16()
    scale = {"gemma2": torch.tensor(20**0.5, dtype=torch.bfloat16), "granite": 2.7}[family]
    scaled = jnp.asarray((table * scale).float().numpy(), jnp.bfloat16)
    expected = norm(config).apply({"params": params["model"]["norm"]}, scaled[None])
    found = base.hidden({"params": params}, jnp.arange(64)[None])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("module", "width", "count"),
    [(lambda config: MLP(config, 48), 48, 2), (norm, 32, 1)],
    ids=["MLP", "norm"],
)
def test_without_remat_only_inputs_of_what_is_elementwise_are_kept(module, width, count):
    """Gate and up for the activation, x for a norm; in the model's dtype."""
    layer = module(DecoderConfig.from_hf(TINY))
    x = jnp.ones((2, 24, 32), jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), layer.init(jax.random.key(0), x))
    _, pull = jax.vjp(lambda x: layer.apply(params, x), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if jnp.shape(leaf) == (2, 24, width)]
    assert [leaf.dtype for leaf in kept] == [x.dtype] * count
