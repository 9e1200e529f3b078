"""The command that trains an adapter."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from hylorada_jax.cli.adapter import DEFAULTS, Adapter, AdapterOptions
from hylorada_jax.cli.flags import flag_of, in_flags
from hylorada_jax.cli.joining import ALONE, Processes
from hylorada_jax.cli.reading import AS_IT_IS, Reading, Source, sources_of
from hylorada_jax.cli.recipe import recipe_of
from hylorada_jax.cli.sample import sample_of, samples
from hylorada_jax.cli.shared import (
    BaseDtype,
    Dtype,
    GivenStructure,
    base_of,
    check_whole,
    loaded,
    method_of,
    puts_offline,
    structure_of,
    tell_undivided,
    template_of,
    tokenizer_of,
    unloaded,
    warn_of_length,
    weights_in,
)
from hylorada_jax.data.corpus import PYTHON_STDLIB, files_of
from hylorada_jax.data.examples import Conversation
from hylorada_jax.errors import ConfigError
from hylorada_jax.io.files import any_path, user_path
from hylorada_jax.terminal import one_line, show
from hylorada_jax.training.config import TrainingConfig

if TYPE_CHECKING:
    from hylorada_jax.saved.saved_adapter import SavedAdapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(TrainingConfig):
    """The settings as they are given: none is refused while tyro parses, which words errors its own way."""

    def __post_init__(self) -> None:
        pass

    def build(self) -> TrainingConfig:
        """The settings; a ConfigError calls those that are refused by their options."""
        try:
            return TrainingConfig(**vars(self))
        except ConfigError as error:
            raise in_flags(error, {name: flag_of(name) for name in vars(self)}) from None


# A group of the help, without a prefix: --steps, not --training.steps.
Training = tyro.conf.OmitArgPrefixes[TrainingOptions]


@puts_offline
def finetune(
    *,
    training: Training,
    model: str | None = None,
    data: tuple[str, ...] = (PYTHON_STDLIB,),
    eval_data: tuple[str, ...] = (),
    reading: Reading = AS_IT_IS,
    adapter: Adapter = DEFAULTS,
    start_from: Path | None = None,
    structure: GivenStructure | None = None,
    chat_template: Path | None = None,
    dtype: Dtype = "float32",
    base_dtype: BaseDtype | None = None,
    prompt: str = 'def read_lines(path):\n    """',
    offline: bool = False,
    verbose: bool = False,
    recipe: Path | None = None,
    processes: Processes = ALONE,
) -> None:
    """Fine-tune a language model: its weights stay frozen, an adapter is trained.

    Writes to the output directory: adapter/ (adapter_config.json, adapter_model.safetensors), checkpoints/,
    metrics.jsonl, loss.png, run.json, and recipe.json, which repeats the run.

    Args:
        training: Steps, batches, rates, evaluation, and the run's directory.
        model: smollm2-135m (the packaged weights), a directory, a .gguf file, or a Hub name [that of
            start_from; without one, smollm2-135m].
        data: python-stdlib or python-docstrings (embedded), a file, a glob, or a Hub dataset: texts, prompts
            with completions, or conversations, by the columns of .jsonl, .json, .csv and .parquet files.
            Several form one data set; with weights, as in chats.jsonl=0.7 "docs/*.md=0.3", each gets that
            share of the batches' rows.
        eval_data: held-out data, of the embedded data its held-out part; by default about 5 % of the data is
            held out, by document.
        reading: How data files are read, and which tokens are scored.
        adapter: The method and its settings.
        start_from: directory of an adapter to continue training; the new one has its settings.
        structure: the structure that hylorada_v2 reads: code, each token's nesting depth in Python source; it
            is saved with the adapter [that of start_from; without one, none].
        chat_template: a Jinja file in place of the model's template; it is saved with the adapter.
        dtype: dtype of the frozen weights and the computation; the adapter is float32.
        base_dtype: quantise the frozen linear layers to int8 or nf4, for a half or a quarter of bfloat16's
            memory; with +head, an untied output head too.
        prompt: text to continue, or to answer in a chat with the system message and the tools of the first
            conversation, before and after training; empty for none.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
        verbose: list on stderr the parameters that the mesh does not divide evenly and so replicates.
        recipe: a .json or .yaml file of these options by name; options given beside it take precedence.
        processes: For runs of several processes, started with the same options except for --process-id.
    """
    given = {**locals()}
    from hylorada_jax.training.run_directory import RunDirectory

    config = training.build()
    sources = sources_of(data, split=reading.split)
    own = sources_of(eval_data, weights=False) if eval_data else []
    saved = None if start_from is None else _opened(start_from, adapter)
    model = base_of(saved, model)
    settings = adapter.build() if saved is None else saved.config
    read = structure_of(structure, saved, settings)
    template = template_of(chat_template, saved)
    inputs = _inputs(model, [*sources, *own], start_from, [chat_template, adapter.config])
    RunDirectory(config.output).refuse_unless(resume=config.resume, overwrite=config.overwrite, inputs=inputs)
    options = {"model": model, "data": data, "eval_data": eval_data, "start_from": start_from}
    options |= {"structure": structure, "dtype": dtype, "base_dtype": base_dtype, "prompt": prompt}
    options |= {"chat_template": chat_template}
    repeats = recipe_of(config, adapter, reading, **options)
    processes.join(given)

    from hylorada_jax.models.base_model import vocab_size
    from hylorada_jax.models.placed import default_mesh
    from hylorada_jax.surgery.fit import fit
    from hylorada_jax.training.checks import check_data, check_groups, check_training
    from hylorada_jax.training.memory import device_memory
    from hylorada_jax.training.trainer import HyLoRADATrainer

    # All that the config can tell is reported before data and weights are read.
    weights = weights_in(dtype, base_dtype)
    empty = unloaded(model, weights)
    if saved is None:
        fit(empty, settings)
    else:
        check_whole(saved, empty)
    mesh, why = (config.mesh, "") if config.mesh else default_mesh(empty, device_memory())
    config = dataclasses.replace(config, mesh=mesh)
    placement = check_training(empty, config)
    check_groups(settings, config.seq_len)
    warn_of_length(empty, config.seq_len)
    sources = reading.load_both(sources, own)

    from hylorada_jax.model import HyLoRADAModel

    tokenizer = tokenizer_of(model, template)
    train, held_out = reading.prepare_both(sources, tokenizer, config.seq_len, read)
    what = f"held-out perplexity{reading.counted(sources)}"
    firsts = [row for source in sources for row in source.train[:1] if isinstance(row, Conversation)]
    sample = sample_of(prompt, tokenizer, read, firsts[0] if firsts else None) if prompt else None
    del sources  # in training they are tokens alone
    check_data(train, held_out, vocab_size(empty), settings, config)
    base = loaded(model, None, weights, placement if mesh else None)
    if saved is None:
        adapted = HyLoRADAModel(base, settings, config.seed)
    else:
        adapted = HyLoRADAModel.from_pretrained(base, saved)
    adapted.chat_template, adapted.structure = template, read
    trainer = HyLoRADATrainer(adapted, train, held_out, config, recipe=repeats)
    print(f"model    {one_line(model)}, {weights}")
    print(f"method   {method_of(settings)}: ", end="")
    adapted.print_trainable_parameters()
    if why:
        print(f"mesh     {why}")
    print(f"memory   {trainer.choice}")
    if verbose:
        tell_undivided(placement, adapted)

    start = adapted.adapters
    result = trainer.train()
    figures = (result.perplexity_before, result.perplexity_after)
    before, after = ("unknown" if figure is None else f"{figure:.3f}" for figure in figures)  # a log was lost
    print(f"{what}  before {before}  after {after}")
    if sample:
        before, after = samples(adapted, start, sample, tokenizer)
        show(f"\n--- sample, before ---\n{before}")
        show(f"\n--- sample, after ----\n{after}\n")
    if config.keep == "best":
        print(f"kept     step {result.kept} of {result.steps}, the best on the held-out data")
    for name, place in (("adapter", result.adapter), ("metrics", result.metrics), ("plot", result.loss_plot)):
        print(f"{name:<8} {one_line(place)}")


def _inputs(
    model: str, data: Sequence[Source], start_from: Path | None, files: Sequence[Path | None]
) -> Iterator[Path]:
    """What a run reads, and would lose if it lay in the run that is overwritten.

    A recipe does not count: it is read by now, and what it says is written again in the place of the
    recipe.json that is overwritten. So a run is repeated in its own directory.
    """
    from hylorada_jax.saved.adapter_files import CONFIG_NAME, WEIGHTS_NAME

    yield user_path(model)
    for source in data:
        yield from files_of(source.name)
    if start_from is not None:
        directory = any_path(start_from)
        yield from (directory, directory / CONFIG_NAME, directory / WEIGHTS_NAME)  # each may be a link
    yield from (user_path(file) for file in files if file is not None)


def _opened(adapter: Path, given: AdapterOptions) -> "SavedAdapter":
    """A saved adapter, beside whose settings no other are given."""
    from hylorada_jax.saved.saved_adapter import open_adapter

    if named := [flag_of(name) for name, value in vars(given).items() if value is not None]:
        raise ConfigError(
            "An adapter that is trained on keeps its settings.",
            f"--start-from {adapter} {' '.join(named)}",
            "Give one.",
        )
    return open_adapter(adapter)
