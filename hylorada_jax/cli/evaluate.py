"""The command that measures a model on text."""

import sys
from pathlib import Path

from hylorada_jax.cli.joining import ALONE, Processes
from hylorada_jax.cli.reading import AS_IT_IS, Reading, side_of, sources_of
from hylorada_jax.cli.shared import (
    BaseDtype,
    Dtype,
    GivenStructure,
    base_of,
    check_adapter,
    check_whole,
    loaded,
    placement_for,
    print_result,
    puts_offline,
    template_of,
    tokenizer_of,
    unloaded,
    warn_of_length,
    weights_in,
)
from hylorada_jax.data.corpus import PYTHON_STDLIB


@puts_offline
def evaluate(
    *,
    model: str | None = None,
    adapter: Path | None = None,
    data: tuple[str, ...] = (PYTHON_STDLIB,),
    reading: Reading = AS_IT_IS,
    seq_len: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
    structure: GivenStructure | None = None,
    chat_template: Path | None = None,
    dtype: Dtype = "float32",
    base_dtype: BaseDtype | None = None,
    mesh: str = "",
    check_weights: bool = False,
    verbose: bool = False,
    json: bool = False,
    offline: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Perplexity of a model, with or without an adapter, by a sliding window.

    Args:
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name [the adapter's
            own; without one, smollm2-135m].
        adapter: directory of a trained adapter.
        data: files, globs or Hub datasets, as in finetune, read in full; of the embedded data, the held-out
            part.
        reading: How data files are read, and which tokens are scored.
        seq_len: tokens per window.
        stride: tokens between windows [half a window]; no token is scored twice.
        batch_size: windows at a time.
        max_tokens: evaluate windows of about this many tokens in all, overlaps included; by default all.
        structure: the structure that a hylorada_v2 adapter reads: code, or none [that of its training].
        chat_template: a Jinja file in place of the model's or the adapter's template.
        dtype: dtype of the weights and the computation.
        base_dtype: quantise the linear layers to int8 or nf4, with +head the output head too, as for the
            adapter's training.
        mesh: the devices as data × fsdp × tensor, such as fsdp=8 [the whole model on each device if it leaves
            half of the memory free, else a shard].
        check_weights: refuse a model whose weights are not, in dtype and every bit, those of the adapter's
            training.
        verbose: list on stderr the parameters that the mesh does not divide evenly and so replicates.
        json: print one JSON object.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
        processes: For several processes, started with the same options except for --process-id.
    """
    given = {**locals()}

    from hylorada_jax.data.packing import check_windows, default_stride

    check_windows(seq_len, stride, max_tokens, batch_size)
    sources = [
        source._replace(held_out=reading.load(source.name, side_of(source, "eval")))
        for source in sources_of(data, weights=False, split=reading.split)
    ]
    weights = weights_in(dtype, base_dtype)
    saved, read = check_adapter(adapter, structure, weights=weights if check_weights else None)
    processes.join(given)

    from hylorada_jax.data.document import as_documents
    from hylorada_jax.evaluation.perplexity import evaluate_perplexity
    from hylorada_jax.models.base_model import vocab_size
    from hylorada_jax.models.positions import check_range
    from hylorada_jax.models.weights_digest import tree_digest
    from hylorada_jax.placement.processes import agree, are_several, is_first

    template = template_of(chat_template, saved)
    model = base_of(saved, model)
    base = unloaded(model, weights)
    placement = placement_for(base, mesh)
    vocab = vocab_size(base)
    check_range((batch_size, seq_len), limit=base.position_limit)
    warn_of_length(base, seq_len)
    if saved is not None:
        check_whole(saved, base)

    tokenizer, tokens = tokenizer_of(model, template), []
    for source in sources:
        if not json:
            source.announce()
        to = sys.stderr if json else None  # stdout has the one JSON object
        tokens += reading.prepare(source.held_out, tokenizer, seq_len, read, "rows", to=to)
    documents = as_documents(tokens, vocab, "evaluation", has_encoder=read is not None)
    found = loaded(model, saved, weights, placement, check_weights=check_weights, verbose=verbose)
    if are_several():
        params = found.params if saved is None else found.base.params
        agree({"adapter": saved and saved.weights_sha256, "weights": tree_digest(params)})
    measured = evaluate_perplexity(
        found,
        documents,
        seq_len=seq_len,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        progress=is_first() and not json,
    )
    result = {
        "model": model,
        "adapter": saved and str(saved.directory),
        "data": data,
        "perplexity": measured.perplexity,
        "loss": measured.loss,
        "tokens": measured.tokens,
        "seq_len": seq_len,
        "stride": stride or default_stride(seq_len),
    }
    print_result(
        result,
        json,
        f"perplexity {measured.perplexity:.4f}  (loss {measured.loss:.4f} nats, {measured.tokens:,} tokens)",
    )
