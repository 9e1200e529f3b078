"""The command that continues a prompt."""

from pathlib import Path
from typing import Any

from hylorada_jax.cli.shared import (
    PACKAGED_MODEL,
    Dtype,
    check_adapter,
    check_whole,
    loaded,
    prompt_of,
    puts_offline,
    unloaded,
)
from hylorada_jax.errors import DataError
from hylorada_jax.structure.code import Domain
from hylorada_jax.terminal import show


@puts_offline
def generate(
    *,
    prompt: str,
    model: str = PACKAGED_MODEL,
    adapter: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    chat: bool = False,
    structure: Domain | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    offline: bool = False,
) -> None:
    """Continue a prompt.

    Args:
        prompt: the text to continue.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        adapter: directory of a trained adapter.
        max_new_tokens: at most this many tokens.
        temperature: 0 takes the most likely token; higher values sample.
        top_k: sample among the k most likely tokens.
        top_p: sample among the most likely tokens that together have this probability.
        chat: give the prompt to the model's chat template, as a user's message.
        structure: tell a hylorada_v2 adapter the structure of the prompt: code; new tokens continue it.
        seed: of the sampling.
        dtype: of the weights and the computation.
        offline: contact nothing: what is on the Hugging Face Hub comes from the local cache.
    """
    check_adapter(adapter, structure)

    import jax

    from hylorada_jax.models.base_model import require_generation
    from hylorada_jax.models.generate import check_settings
    from hylorada_jax.models.ids import check_prompts
    from hylorada_jax.models.positions import check_range
    from hylorada_jax.models.tokenizer import load_tokenizer

    base = unloaded(model, dtype)
    require_generation(base)
    if adapter is not None:
        check_whole(adapter, base)
    tokenizer = load_tokenizer(model)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    ids, structure_ids = prompt_of(text, tokenizer, structure, chat=chat)
    if not ids:
        raise DataError("A prompt must have at least one token.", repr(prompt), "Give some text.")

    rng = jax.random.key(seed)
    check_settings([ids], max_new_tokens, temperature, top_k, top_p, rng)
    check_prompts([ids], base.token_limit)
    check_range((1, len(ids) + max_new_tokens), limit=base.position_limit)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        **structure_ids,
    }
    (tokens,) = loaded(model, adapter, dtype).generate(
        [ids], eos_token_id=tokenizer.end_token_ids or None, rng=rng, **settings
    )
    show(("" if chat else prompt) + tokenizer.decode_continuation(ids, tokens))
