"""OLMo 2: norms behind attention and MLP, and over all queries and all keys together."""

from hylorada_jax.models.bounds import Epsilon, Tokens, Vocabulary
from hylorada_jax.models.families.family import BEHIND, GGUF, QK_NORMS, Decoder, Family, Keys, Options, alike


class Olmo2Keys(Keys, frozen=True, kw_only=True):
    """With transformers' defaults for OLMo 2."""

    vocab_size: Vocabulary = 50304
    rms_norm_eps: Epsilon = 1e-5
    eos_token_id: Tokens = 50279


def options(keys: Olmo2Keys) -> Options:
    """Biases in attention where the config says so, and no window."""
    window, layers = alike(keys, None, "olmo2")
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        qk_norm=True,
        qk_norm_whole=True,
        norms="after",
        norm_rounded_last=True,
        sliding_window=window,
        sliding_layers=layers,
    )


FAMILIES = [
    Family(
        model_type="olmo2",
        tokenizer="GPT2Tokenizer",
        decoder=Decoder(
            causal_lm="Olmo2ForCausalLM",
            keys=Olmo2Keys,
            options=options,
            gguf=GGUF(
                architecture="olmo2",
                tensors={**BEHIND, **QK_NORMS},
            ),
        ),
    )
]
