from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers

from hylorada_jax.errors import ConfigError, DataError, ModelError, NonFiniteError  # noqa: E402
from hylorada_jax.models.hf.base import HFFlaxModel  # noqa: E402
from hylorada_jax.surgery.modules import find_modules  # noqa: E402

# A tiny model of every family whose logits are hidden states times an embedding, by its own config's names.
TINY = {"vocab_size": 50, "max_position_embeddings": 32}
GPT2 = TINY | {"n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = TINY | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BART = TINY | {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
FAMILIES = {
    "GPT2LMHeadModel": transformers.GPT2Config(**GPT2),
    "GPT2LMHeadModel untied": transformers.GPT2Config(**GPT2, tie_word_embeddings=False),
    "GPTNeoForCausalLM": transformers.GPTNeoConfig(
        **TINY, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ),
    "BloomForCausalLM": transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2),
    "OPTForCausalLM": transformers.OPTConfig(
        **TINY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    ),
    "OPTForCausalLM projected": transformers.OPTConfig(
        **TINY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=8
    ),
    "XGLMForCausalLM": transformers.XGLMConfig(
        **TINY, d_model=16, num_layers=2, attention_heads=2, ffn_dim=24
    ),
    "LlamaForCausalLM": transformers.LlamaConfig(**LLAMA, num_key_value_heads=1),
    "MistralForCausalLM": transformers.MistralConfig(**LLAMA, num_key_value_heads=1, sliding_window=32),
    "GemmaForCausalLM": transformers.GemmaConfig(**LLAMA, num_key_value_heads=1, head_dim=12),
}
IDS = jnp.array(np.random.default_rng(0).integers(3, 50, (2, 7)))


def tiny(name: str):
    return getattr(transformers, "Flax" + name.split()[0])(FAMILIES[name], seed=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_the_models_own_call_and_hidden_times_head_is_its_logits(name):
    model = tiny(name)
    ours = HFFlaxModel.wrap(model)
    mask = jnp.ones_like(IDS).at[0, 5:].set(0)
    expected = model(IDS, attention_mask=mask).logits
    variables = {"params": ours.params}
    forward = jax.jit(lambda v: ours.forward(v, IDS, attention_mask=mask).logits)
    hidden = jax.jit(lambda v: ours.hidden(v, IDS, attention_mask=mask) @ ours.head(v).T)
    # float32 with logits of order 1; jit and the transposed head round differently from HF's eager call.
    for logits in (forward(variables), hidden(variables), ours(IDS, attention_mask=mask).logits):
        # Padding's own logits mean nothing, and depend on where it is said to stand.
        np.testing.assert_allclose(logits[mask > 0], expected[mask > 0], atol=2e-6, rtol=2e-6)


def test_position_ids_reach_the_model():
    model = tiny("GPT2LMHeadModel")
    positions = jnp.arange(7)[None] + jnp.array([[3], [9]])
    expected = model(IDS, position_ids=positions).logits
    # float32 with logits of order 1; our attention sums in another order than HF's.
    np.testing.assert_allclose(
        HFFlaxModel.wrap(model)(IDS, position_ids=positions).logits, expected, atol=2e-6, rtol=2e-6
    )
    assert np.abs(model(IDS).logits - expected).max() > 1e-3


def test_hidden_computes_no_logits():
    # A vocabulary so large that its logits would dominate the work.
    config = transformers.GPT2Config(vocab_size=50000, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ours = HFFlaxModel.wrap(transformers.FlaxGPT2LMHeadModel(config))

    def flops(function):
        return jax.jit(function).lower({"params": ours.params}, IDS).compile().cost_analysis()["flops"]  # type: ignore[index]

    assert flops(ours.hidden) < flops(lambda v, ids: ours.forward(v, ids).logits) / 50


def test_the_weights_are_an_argument_and_shared():
    model = tiny("GPT2LMHeadModel")
    ours = HFFlaxModel.wrap(model)
    assert ours.params is model.params
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    other = ours.with_params(doubled)
    assert type(other) is type(model)
    # float32; doubled weights make logits of order 10.
    np.testing.assert_allclose(
        ours.forward({"params": doubled}, IDS).logits, other(IDS).logits, atol=2e-5, rtol=2e-5
    )
    assert model.params["transformer"]["wte"]["embedding"] is ours.params["transformer"]["wte"]["embedding"]
    shapes = jax.eval_shape(ours.init_params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, model.params)


def test_other_collections_and_rngs_reach_the_modules():
    import flax.linen as nn

    ours = HFFlaxModel.wrap(tiny("GPT2LMHeadModel"))
    seen = []

    def interceptor(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.has_variable("extra", "shift"):
            seen.append(context.module.path)
            return (
                out
                + context.module.get_variable("extra", "shift")
                + 0 * context.module.make_rng("dropout")[0]
            )
        return out

    path = ("transformer", "h", "1", "mlp", "c_fc")
    shift = jnp.ones(64)
    tree: dict = {"shift": shift}
    for key in reversed(path):
        tree = {key: tree}
    rngs = {"dropout": jax.random.PRNGKey(0)}
    with nn.intercept_methods(interceptor):
        shifted = ours.forward({"params": ours.params, "extra": tree}, IDS, rngs=rngs).logits
    # The oracle: the same shift in the layer's own bias. float32, logits of order 1.
    params = jax.tree.map(lambda leaf: leaf, ours.params)
    params["transformer"]["h"]["1"]["mlp"]["c_fc"]["bias"] += shift
    np.testing.assert_allclose(shifted, ours.forward({"params": params}, IDS).logits, atol=1e-6)
    assert seen == [path]


def test_families_without_a_plain_head_still_run():
    bert = transformers.BertConfig(
        **TINY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = transformers.FlaxBertForMaskedLM(bert)
    ours = HFFlaxModel.wrap(model)
    np.testing.assert_allclose(ours(IDS).logits, model(IDS).logits, atol=2e-6, rtol=2e-6)
    with pytest.raises(ModelError, match=r"received: FlaxBertForMaskedLM"):
        ours.hidden({"params": ours.params}, IDS)
    with pytest.raises(ModelError, match=r"from left to right[\s\S]*FlaxBertForMaskedLM"):
        ours.generate([[1]], max_new_tokens=2)

    bart = transformers.BartConfig(**BART)
    model = transformers.FlaxBartForConditionalGeneration(bart)
    ours = HFFlaxModel.wrap(model)
    logits = ours.forward({"params": ours.params}, IDS, decoder_input_ids=IDS[:, :3]).logits
    expected = model(IDS, decoder_input_ids=IDS[:, :3]).logits
    np.testing.assert_allclose(logits, expected, atol=2e-6, rtol=2e-6)
    with pytest.raises(ModelError, match="FlaxGPT2Model"):
        HFFlaxModel.wrap(transformers.FlaxGPT2Model(FAMILIES["GPT2LMHeadModel"])).head({})


def test_what_cannot_be_done_is_refused():
    ours = HFFlaxModel.wrap(tiny("GPTNeoForCausalLM"))
    with pytest.raises(ConfigError, match="Packed documents"):
        ours(IDS, segment_ids=jnp.ones_like(IDS))
    with pytest.raises(ModelError, match=r"received: groups=\(4, 2\) for FlaxGPTNeoForCausalLM"):
        ours.forward({"params": ours.params}, IDS, groups=(4, 2))
    assert not ours.supports_segments
    assert not ours.supports_groups
    empty = transformers.FlaxGPT2LMHeadModel(FAMILIES["GPT2LMHeadModel"], _do_init=False)
    with pytest.raises(ModelError, match="_do_init"):
        HFFlaxModel.wrap(empty)
    tied = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"tie_word_embeddings[\s\S]*hylorada_jax\.load_model"):
        HFFlaxModel.wrap(transformers.FlaxLlamaForCausalLM(tied))


def test_the_name_is_where_it_came_from_or_the_class():
    model = tiny("GPT2LMHeadModel")
    assert HFFlaxModel.wrap(model).name == "FlaxGPT2LMHeadModel"
    config = transformers.GPT2Config(**GPT2, name_or_path="org/name")
    assert HFFlaxModel.wrap(transformers.FlaxGPT2LMHeadModel(config)).name == "org/name"


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM"])
def test_positions_beyond_the_table_are_refused(name):
    ours = HFFlaxModel.wrap(tiny(name))
    assert ours.position_limit == 32
    ours(jnp.zeros((1, 32), jnp.int32))
    with pytest.raises(DataError, match=r"below 32[\s\S]*received: 33 tokens"):
        jax.eval_shape(ours, jnp.zeros((1, 33), jnp.int32))
    with pytest.raises(DataError, match=r"received: 33 tokens"):
        ours.generate([[1] * 30, [1]], max_new_tokens=3)


def test_position_ids_that_the_model_does_not_have_are_refused():
    ours = HFFlaxModel.wrap(tiny("GPT2LMHeadModel"))
    first = jnp.zeros_like(IDS)
    with pytest.raises(DataError, match="received: a position of 32"):
        ours(IDS, position_ids=first.at[1, 2].set(32))
    with pytest.raises(DataError, match="a position of -1"):
        ours(IDS, position_ids=first.at[1, 2].set(-1))
    with pytest.raises(DataError, match=r"shape \(1, 7\) for tokens \(2, 7\)"):
        ours(IDS, position_ids=first[:1])
    assert HFFlaxModel.wrap(tiny("BloomForCausalLM")).position_limit is None


def test_generation_of_an_encoder_decoder_gives_the_answer_without_the_start_token():
    config = transformers.BartConfig(
        **BART,
        init_std=0.3,
        forced_eos_token_id=None,
    )
    model = transformers.FlaxBartForConditionalGeneration(config, seed=3)
    prompts = [[5, 9, 11, 7], [8, 3]]
    answers = HFFlaxModel.wrap(model).generate(prompts, max_new_tokens=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        fed = jnp.array([[config.decoder_start_token_id, *answer[:-1]]])
        logits = model(jnp.array([prompt]), decoder_input_ids=fed).logits
        assert answer == logits[0].argmax(axis=-1).tolist()
    assert answers[0] != answers[1]


def test_logits_of_a_bfloat16_model_are_not_rounded():
    model = tiny("GPT2LMHeadModel")
    model = type(model)(model.config, dtype=jnp.bfloat16)
    model.params = model.to_bf16(model.params)
    ours = HFFlaxModel.wrap(model)
    variables = {"params": ours.params}
    hidden, head = (np.asarray(x, np.float64) for x in (ours.hidden(variables, IDS), ours.head(variables)))
    logits = ours(IDS).logits
    assert logits.dtype == jnp.float32
    # One product of bfloat16 operands, exact in float32 but for the order of a sum of a few terms.
    np.testing.assert_allclose(logits, hidden @ head.T, rtol=0, atol=1e-6 * np.abs(hidden @ head.T).max())


def test_sampling_in_the_limit_is_greedy():
    ours, prompts = HFFlaxModel.wrap(tiny("GPT2LMHeadModel")), [[5, 9, 11], [8, 3]]
    greedy = ours.generate(prompts, max_new_tokens=4)
    key = jax.random.key(1)
    assert ours.generate(prompts, max_new_tokens=4, temperature=1e-38, top_p=1e-38, rng=key) == greedy


def test_a_repetition_penalty_counts_the_prompt_and_no_padding():
    ours, prompts, penalty = HFFlaxModel.wrap(tiny("GPT2LMHeadModel")), [[5, 9, 11], [8]], 3.0
    forward, expected = jax.jit(lambda ids: ours.forward({"params": ours.params}, ids).logits), []
    for prompt in prompts:
        row = [*prompt]
        for _ in range(4):
            logits = np.array(forward(jnp.array([row + [0] * (8 - len(row))]))[0, len(row) - 1])
            there = [*set(row)]
            logits[there] *= np.where(logits[there] < 0, penalty, 1 / penalty)
            row.append(int(logits.argmax()))
        expected.append(row[len(prompt) :])
    assert ours.generate(prompts, max_new_tokens=4, repetition_penalty=penalty, eos_token_id=()) == expected


def test_all_tokens_are_sampled_where_nothing_is_filtered():
    config = transformers.GPT2Config(**GPT2 | {"vocab_size": 80})
    ours = HFFlaxModel.wrap(transformers.FlaxGPT2LMHeadModel(config, seed=1))
    settings: dict[str, Any] = {"max_new_tokens": 1, "temperature": 1e6, "rng": jax.random.key(0)}
    drawn = {row[0] for row in ours.generate([[5]] * 2000, eos_token_id=(), **settings)}
    assert len(drawn) == 80  # Hugging Face's default is the 50 most likely
    few = {row[0] for row in ours.generate([[5]] * 2000, eos_token_id=(), min_p=0.9999999, **settings)}
    assert 0 < len(few) < 80


@pytest.mark.parametrize(("value", "sampled", "ends"), [(np.nan, False, ()), (np.inf, True, (49,))])
def test_logits_that_are_not_finite_end_generation(value, sampled, ends):
    model = tiny("GPT2LMHeadModel")
    table = model.params["transformer"]["wpe"]
    table["embedding"] = table["embedding"].at[5].set(value)
    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 5, "top_p": 0.9} if sampled else {}
    # After position 5 a prompt of two tokens has five new ones, and one of three tokens has four.
    with pytest.raises(NonFiniteError, match="at new token 4 of prompt 2"):
        HFFlaxModel.wrap(model).generate(
            [[4, 5], [6, 7, 8]], max_new_tokens=8, eos_token_id=ends, rng=jax.random.key(0), **settings
        )


def test_adapters_find_the_layers_of_hugging_faces_own_classes():
    gpt2, opt = (
        find_modules(HFFlaxModel.wrap(tiny(name)).init_params)
        for name in ("GPT2LMHeadModel", "OPTForCausalLM")
    )
    assert {module.kernel_is_out_in for module in gpt2.linears} == {True}
    assert len(gpt2.linears) == 4 * len(gpt2.attentions) == 8
    # OPT's table of positions is a subclass of nn.Embed that reads from its third row on.
    assert [module.path[-1] for module in opt.embeddings] == ["embed_positions", "embed_tokens"]
