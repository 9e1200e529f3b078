"""The command that continues a prompt, or answers conversations."""

from pathlib import Path
from typing import Any

from hylorada_jax.cli.answer_rows import answers, asked, prompts_of, refuse_existing, write
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
from hylorada_jax.data.packing import check_windows
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.structure.code import Domain
from hylorada_jax.terminal import show


@puts_offline
def generate(
    *,
    prompt: str | None = None,
    messages: str | None = None,
    model: str = PACKAGED_MODEL,
    adapter: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    chat: bool = False,
    output: Path | None = None,
    batch_size: int = 8,
    structure: Domain | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    offline: bool = False,
) -> None:
    """Continue a prompt, or answer conversations.

    Args:
        prompt: the text to continue.
        messages: a file of conversations, as finetune takes them, to answer in place of a prompt; an answer
            that ends one is left out.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name.
        adapter: directory of a trained adapter.
        max_new_tokens: at most this many tokens.
        temperature: 0 takes the most likely token; higher values sample.
        top_k: sample among the k most likely tokens.
        top_p: sample among the most likely tokens that together have this probability.
        chat: give the prompt to the model's chat template, as a user's message.
        output: a new file for the answered conversations, in JSON lines; else they are printed.
        batch_size: conversations at a time.
        structure: tell a hylorada_v2 adapter the structure of the prompt: code; new tokens continue it.
        seed: of the sampling.
        dtype: of the weights and the computation.
        offline: contact nothing: what is on the Hugging Face Hub comes from the local cache.
    """
    if (prompt is None) == (messages is None):
        raise ConfigError(
            "Either a prompt or messages must be given.",
            "neither" if prompt is None else "both",
            "Give --prompt, or --messages.",
        )
    check_windows(1, batch_size=batch_size)
    check_adapter(adapter, structure)
    if structure and messages is not None:
        raise ConfigError(
            "Structure is read of a prompt.", f"--structure {structure} --messages", "Leave --structure out."
        )
    chats = None if messages is None else asked(messages)
    if output is not None:
        refuse_existing(output)

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
    inputs: dict[str, Any] = {}
    if chats is None:
        assert prompt is not None
        ids, inputs = prompt_of(prompt, tokenizer, structure, chat=chat)
        if not ids:
            raise DataError("A prompt must have at least one token.", repr(prompt), "Give some text.")
        prompts = [ids]
    else:
        prompts = prompts_of(chats, tokenizer)

    rng = jax.random.key(seed)
    check_settings(prompts, max_new_tokens, temperature, top_k, top_p, rng)
    check_prompts(prompts, base.token_limit)
    check_range((len(prompts), max(map(len, prompts)) + max_new_tokens), limit=base.position_limit)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "eos_token_id": tokenizer.end_token_ids or None,
        **inputs,
    }
    generator = loaded(model, adapter, dtype)
    if chats is not None:
        write(chats, answers(generator, prompts, tokenizer, batch_size, rng, **settings), output)
        return
    (tokens,) = generator.generate(prompts, rng=rng, **settings)
    show(("" if chat else prompt or "") + tokenizer.decode_continuation(prompts[0], tokens))
