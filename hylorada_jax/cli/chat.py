"""The command that talks with a model."""

import contextlib
import functools
import io
import sys
from pathlib import Path

from hylorada_jax.cli.conversation import Talk, converse, opening
from hylorada_jax.cli.sampling import ANSWER_TOKENS, AS_IT_IS, Sampling
from hylorada_jax.cli.shared import (
    BaseDtype,
    Dtype,
    GivenStructure,
    base_of,
    check_adapter,
    context_of,
    generating,
    loaded,
    placement_for,
    puts_offline,
    template_of,
    tokenizer_of,
    variables_of,
    weights_in,
)
from hylorada_jax.errors import ConfigError
from hylorada_jax.seeds import check_seed
from hylorada_jax.terminal import on_terminal


@puts_offline
def chat(
    *,
    model: str | None = None,
    adapter: Path | None = None,
    sampling: Sampling = AS_IT_IS,
    max_context: int | None = None,
    chat_template: Path | None = None,
    chat_template_kwargs: str | None = None,
    structure: GivenStructure | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    base_dtype: BaseDtype | None = None,
    mesh: str = "",
    verbose: bool = False,
    offline: bool = False,
) -> None:
    """Talk with a model: each line is a message, and answers are streamed.

    /system TEXT sets the system message, /reset starts over with the same one, /help lists these, and /quit
    or the end of the input leaves. Ctrl-C stops an answer. Pipes are read
    line by line: `echo Hi. | hylorada chat`.

    Args:
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name [the adapter's
            own; without one, smollm2-135m].
        adapter: directory of a trained adapter.
        sampling: How tokens are chosen [the model's own settings; without any, the most likely, up to 1024].
        max_context: largest number of tokens in the conversation and its answer [the model's number of
            positions].
        chat_template: a Jinja file in place of the model's or the adapter's template.
        chat_template_kwargs: what the template is given beside the messages, as a JSON object such as
            {"enable_thinking": false}; as in the rows that an adapter was trained on.
        structure: the structure that a hylorada_v2 adapter reads: code, for the conversation's fenced
            blocks so far, or none [that of its training]. An answer has none while it is written.
        seed: seed of the sampling, in [0, 2³²).
        dtype: dtype of the weights and the computation.
        base_dtype: quantise the linear layers to int8 or nf4, with +head the output head too, as for the
            adapter's training.
        mesh: the devices, as in generate.
        verbose: list on stderr the parameters that the mesh does not divide evenly and so replicates.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    check_seed(seed)
    if sys.stdin is None:  # as Python has it where it is closed
        raise ConfigError("A conversation is read from stdin.", "stdin is closed", "Type it, or pipe it in.")
    saved, read = check_adapter(adapter, structure)
    template, variables = template_of(chat_template, saved), variables_of(chat_template_kwargs)

    import jax

    from hylorada_jax.models.base_model import answer_begins
    from hylorada_jax.models.sampling import check_settings

    weights = weights_in(dtype, base_dtype)
    model = base_of(saved, model)
    base = generating(model, weights, saved)
    placement = placement_for(base, mesh)
    limit = base.position_limit
    if max_context is not None and not 2 <= max_context <= (limit or max_context):
        raise ConfigError(
            "A context must hold a token of a question and one of the answer, and fit the model's positions.",
            f"--max-context {max_context}" + (f" for {limit} positions" if limit else ""),
            "Give another number, or none.",
        )
    tokenizer = tokenizer_of(model, template)
    ids = opening(tokenizer, variables)
    rng, settings = jax.random.key(seed), sampling.settings(model, max_new_tokens=ANSWER_TOKENS)
    check_settings([ids], rng=rng, **settings)
    talk = Talk(
        loaded(model, saved, weights, placement, verbose=verbose),
        tokenizer,
        read,
        max_context or context_of(base),
        rng,
        settings,
        variables,
        begins=functools.partial(answer_begins, base),
    )
    interactive = sys.stdin.isatty() and on_terminal()
    if interactive:
        with contextlib.suppress(ImportError):  # the history and the keys of a line; Windows has none
            import readline  # noqa: F401
        print("A line is a message; /help says more.")
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8
        sys.stdin.reconfigure(errors="replace")
    converse(talk, interactive=interactive)
