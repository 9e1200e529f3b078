"""The command that continues a prompt, or answers conversations."""

from pathlib import Path
from typing import Any

from hylorada_jax.cli.answer_rows import answers, asked, ends_of, is_cut, tell_cut, write
from hylorada_jax.cli.prompts import chat_of, chats_of, prompt_of, with_answer
from hylorada_jax.cli.sampling import ANSWER_TOKENS, AS_IT_IS, PROMPT_TOKENS, Sampling, new_tokens
from hylorada_jax.cli.shared import (
    BaseDtype,
    Dtype,
    GivenStructure,
    base_of,
    check_adapter,
    context_of,
    generating,
    loaded,
    output_file,
    placement_for,
    puts_offline,
    template_of,
    tokenizer_of,
    variables_of,
    warn_of_length,
    weights_in,
)
from hylorada_jax.data.answered import answer_text
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.seeds import check_seed
from hylorada_jax.terminal import show


@puts_offline
def generate(
    *,
    prompt: str | None = None,
    messages: str | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    sampling: Sampling = AS_IT_IS,
    chat: bool = False,
    chat_template: Path | None = None,
    chat_template_kwargs: str | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    structure: GivenStructure | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    base_dtype: BaseDtype | None = None,
    mesh: str = "",
    verbose: bool = False,
    offline: bool = False,
) -> None:
    """Continue a prompt, or answer conversations.

    Args:
        prompt: the text to continue.
        messages: a file of conversations, as in finetune, to answer in place of a prompt; a final answer in
            one is removed first.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name [the adapter's
            own; without one, smollm2-135m].
        adapter: directory of a trained adapter.
        sampling: How tokens are chosen [the most likely, up to 64; in a chat the model's own settings say it,
            up to 1024 where they set no limit].
        chat: send the prompt as a user's message, through the model's chat template.
        chat_template: a Jinja file in place of the model's or the adapter's template, for --chat or messages.
        chat_template_kwargs: what the template is given beside the messages, as a JSON object such as
            {"enable_thinking": false}; a row's own take precedence.
        output: a new JSON Lines file for the answered conversations [they are printed].
        batch_size: conversations at a time.
        structure: the structure that a hylorada_v2 adapter reads of the prompt: code, or none [that of its
            training]. Each new token has that of the prompt's last.
        seed: seed of the sampling, in [0, 2³²).
        dtype: dtype of the weights and the computation.
        base_dtype: quantise the linear layers to int8 or nf4, with +head the output head too, as for the
            adapter's training.
        mesh: the devices as data × fsdp × tensor, such as tensor=2 [one device if the model leaves half of
            its memory free, else a shard on each].
        verbose: list on stderr the parameters that the mesh does not divide evenly and so replicates.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    if (prompt is None) == (messages is None):
        raise ConfigError(
            "Either a prompt or messages must be given.",
            "neither" if prompt is None else "both",
            "Give --prompt, or --messages.",
        )
    if output is not None:
        if messages is None:
            rule = "Answers to messages are written to a file."
            raise ConfigError(rule, f"--output {output} for a prompt", "Leave --output out.")
        output = output_file(output)
    for option, value in (("", chat_template), ("-kwargs", chat_template_kwargs)):
        if value is not None and not chat and messages is None:
            rule = "A chat template is of a conversation."
            received = f"--chat-template{option} {value} for a prompt that is continued"
            raise ConfigError(rule, received, "Give --chat too, or leave it out.")

    from hylorada_jax.data.packing import check_windows

    check_windows(1, batch_size=batch_size)
    check_seed(seed)
    saved, read = check_adapter(adapter, structure)
    template, variables = template_of(chat_template, saved), variables_of(chat_template_kwargs)
    chats = None if messages is None else asked(messages, variables)

    import jax

    from hylorada_jax.models.base_model import answer_begins, check_room, longest_row
    from hylorada_jax.models.ids import check_prompts
    from hylorada_jax.models.sampling import check_settings

    weights = weights_in(dtype, base_dtype)
    model = base_of(saved, model)
    base = generating(model, weights, saved)
    placement = placement_for(base, mesh)
    tokenizer = tokenizer_of(model, template)
    if chats is None:
        assert prompt is not None
        if chat:
            asks = [{"role": "user", "content": prompt}]
            ids, depths = chat_of(asks, tokenizer, read, variables)
            ends = tokenizer.chat_ends(asks, variables=variables)
        else:
            ids, depths = prompt_of(prompt, tokenizer, read)
            ends = tokenizer.end_token_ids
        if not ids:
            raise DataError("A prompt must have at least one token.", repr(prompt), "Give some text.")
        prompts, structure_ids = [ids], None if depths is None else [depths]
    else:
        prompts, structure_ids = chats_of(chats, tokenizer, read)
        ends = ends_of(chats, tokenizer)

    chat = chat or chats is not None
    rng = jax.random.key(seed)
    longest = max(map(len, prompts))
    most = ANSWER_TOKENS if chat else PROMPT_TOKENS
    least = PROMPT_TOKENS if base.position_limit is None else 1
    room = new_tokens(most, answer_begins(base, longest), context_of(base), least)
    settings: dict[str, Any] = sampling.settings(model if chat else None, room)
    check_settings(prompts, rng=rng, **settings)
    check_prompts(prompts, base.token_limit)
    check_room(base, prompts, settings["max_new_tokens"])
    warn_of_length(base, longest_row(base, longest, settings["max_new_tokens"]))
    settings["eos_token_id"] = ends or None
    inputs = {} if structure_ids is None else {"structure_ids": structure_ids}
    generator = loaded(model, saved, weights, placement, verbose=verbose)
    if chats is not None:
        write(chats, answers(generator, prompts, inputs, tokenizer, batch_size, rng, **settings), output)
        return
    (tokens,) = generator.generate(prompts, rng=rng, **inputs, **settings)
    if chat:
        show(answer_text(tokenizer, prompts[0], tokens, ends))
        tell_cut(is_cut(tokens, settings), 1, settings)
    else:
        show(with_answer(prompt or "", tokenizer, prompts[0], tokens))
