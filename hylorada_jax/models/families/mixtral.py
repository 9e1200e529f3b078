"""Mixtral: Mistral, with a mixture of experts in the place of each MLP."""

from hylorada_jax.models.bounds import Epsilon, Experts, Positions
from hylorada_jax.models.families.family import Decoder, Family, Mixture, Options, alike, check_mixture
from hylorada_jax.models.families.mistral import MistralKeys


class MixtralKeys(MistralKeys, frozen=True, kw_only=True):
    """With transformers' defaults for Mixtral."""

    rms_norm_eps: Epsilon = 1e-5
    sliding_window: Positions | None = None
    num_local_experts: Experts = 8
    num_experts_per_tok: Experts = 2


def options(keys: MixtralKeys) -> Options:
    """The window, no biases, and the experts."""
    window, layers = alike(keys, keys.sliding_window, "mixtral")
    mixture = Mixture(
        experts=keys.num_local_experts,
        chosen=keys.num_experts_per_tok,
        width=keys.intermediate_size,
        name="block_sparse_moe",
        layers=("w1", "w3", "w2"),
    )
    return Options(sliding_window=window, sliding_layers=layers, mixture=check_mixture(mixture))


FAMILIES = [
    Family(
        model_type="mixtral",
        mlp_output=None,
        router="block_sparse_moe.gate",
        tokenizer="LlamaTokenizer",
        decoder=Decoder(
            causal_lm="MixtralForCausalLM", keys=MixtralKeys, options=options, rope_theta=1000000.0
        ),
    )
]
