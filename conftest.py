"""Settings of every test run."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase
from jaxtyping import install_import_hook

ROOT = Path(__file__).parent

# Most of a test's time is compilation, and many tests compile the same small programs: keep them on disk.
# Set in the environment, so that the processes which tests start share it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The models are small, and JAX computes on all cores beside: several threads of torch wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test finds what another one, or its user, has tokenized.
os.environ["HYLORADA_CACHE"] = "off"
# Several test processes share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# The shapes and dtypes that the mathematics states are checked at every call that a test makes.
install_import_hook("hylorada_jax.math", "beartype.beartype")

# Every run of the suite tries the same draws. `--hypothesis-profile search` looks for new ones, and keeps in
# the repository those that fail: what it finds becomes an edge case in parity_tests/layers.py.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "search",
    deadline=None,
    max_examples=300,
    print_blob=True,
    database=DirectoryBasedExampleDatabase(ROOT / "parity_tests" / "found"),
)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def bucket():
    """The bucket ``gs://bucket``, served by this process; those who read it keep its address for good."""
    if importlib.util.find_spec("gcsfs") is None:
        pytest.skip("gcsfs is not installed")
    import fsspec

    from parity_tests.bucket_server import serving

    with serving() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.config.set_conf_env(fsspec.config.conf)  # which it has read when it was imported
        yield bucket


@pytest.fixture(scope="session")
def on_devices():
    """count → the environment of a process of this package, for which the CPU is so many devices."""

    def variables(count, **more):
        return os.environ | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}",
            "JAX_PLATFORMS": "cpu",
            # A collective of theirs holds a thread until all have come: with one for each device, two of them
            # that begin in another order wait for ever.
            "NPROC": str(8 * count),
            "PYTHONPATH": str(ROOT),
            **more,
        }

    return variables


@pytest.fixture(scope="session")
def run_on_devices(on_devices):
    """(count, program, arguments) → what a program prints in such a process, which must end well."""

    def run(count, program, *arguments, **more):
        command = [sys.executable, "-c", program, *map(str, arguments)]
        for _ in range(3):
            ended = subprocess.run(command, env=on_devices(count, **more), capture_output=True, text=True)
            # XLA's threads for the CPU may, if seldom, each hold a collective that another one waits for. It
            # then ends the process, whatever was being computed.
            if ended.returncode == 0 or "may be stuck" not in ended.stderr:
                break
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model directory as a user has it: config, weights, and a tokenizer of bytes."""
    import jax
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    from hylorada_jax.models.causal_lm import param_shapes
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.models.loading import _slots
    from hylorada_jax.models.stacks import layer_numbers

    hf = {
        "model_type": "llama", "vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 24, "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(hf))
    rng = np.random.default_rng(0)
    tensors = {}
    config = DecoderConfig.from_hf(hf)
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(config)):
        for name, slot in _slots(tuple(key.key for key in leaf_path), leaf.shape, layer_numbers(config)):
            shape = leaf.shape[len(slot.at) :]
            tensors[name] = rng.normal(0, 0.3, shape[::-1] if slot.transpose else shape).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (path / "texts.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return path


@pytest.fixture(scope="module")
def chatting(tiny, tmp_path_factory):
    """The model with a chat template."""
    from tokenizers import Tokenizer, decoders

    path = tmp_path_factory.mktemp("chatting")
    shutil.copytree(tiny, path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    settings = {"eos_token": "<end>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def base():
    """A decoder of one layer, for what reads a whole model's logits."""
    import jax

    from hylorada_jax.evaluation.perplexity_test import SHAPE
    from hylorada_jax.models.causal_lm import CausalLM
    from hylorada_jax.models.decoder_config import DecoderConfig

    return CausalLM.from_config(DecoderConfig.from_hf(SHAPE), jax.random.key(0))


# Models of tunix, which takes part in `make test-current` alone.
collect_ignore = [] if importlib.util.find_spec("tunix") else ["hylorada_jax/nnx/tunix_test.py"]

# Fifteen seconds or more each: whole models, most of it compilation. `make test-quick` leaves them out.
SLOW_FILES = (
    "adapter_bank_test", "adapting_test", "cli/chat_test", "cli_test", "decoder_test",
    "merged_test", "mesh_test", "models/mixture_test", "model_test",
    "cli/plan_test", "run_directory_test", "step_test", "surgery_test",
    "test_config_layouts", "test_decoder", "test_evaluation", "test_files", "test_fixtures", "test_fuzz",
    "test_loading", "test_longlora", "test_models", "test_nnx", "test_peft",
    "test_peft_files", "test_peft_settings", "test_precision", "test_trajectories", "trainer_test",
)  # fmt: skip


# Half a minute or more each: benchmarks, what runs whole or in several processes, and what
# transformers 4.57 alone has. `make test-apart`.
APART_FILES = (
    "best_test", "cli/mesh_test", "cli/template_test", "hf", "memory_test", "nesting_test",
    "optimize_hylorada_test", "placed_test", "recall_test", "run_benchmark_test", "scaling_test",
    "several_processes_test", "step_time_test", "test_hf_flax_faults", "time_series_test", "wandb_run_test",
)  # fmt: skip

# What a user does, from loading a model to merging its adapter: `make test-current` runs these and tests
# that are marked so.
MAIN_JOB_FILES = ("adapting_test", "model_test")


def pytest_collection_modifyitems(items):
    """Marks the tests of these files."""
    for item in items:
        stem, directory = item.path.stem, item.path.parent.name
        names = {stem, directory, f"{directory}/{stem}"}
        if names & {*SLOW_FILES}:
            item.add_marker(pytest.mark.slow)
        if names & {*APART_FILES}:
            item.add_marker(pytest.mark.apart)
        if stem in MAIN_JOB_FILES:
            item.add_marker(pytest.mark.main_job)


@contextlib.contextmanager
def _skipped_without_flax_classes():
    """A model that only Hugging Face's Flax classes can run is not tested where transformers has none."""
    from hylorada_jax.errors import ModelError

    try:
        yield
    except ModelError as error:
        if "FlaxPreTrainedModel" in str(error.__cause__):
            pytest.skip(str(error.__cause__))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with _skipped_without_flax_classes():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup():
    with _skipped_without_flax_classes():
        return (yield)


@pytest.hookimpl(tryfirst=True)  # before the fixtures of a module, which compute too
def pytest_runtest_setup(item):
    """Parity tests compute at full precision on every platform; what measures rounding compiles as users do.

    Most programs of a test run once, on a CPU: what LLVM's optimiser takes it never gives back.
    """
    import jax

    parity = "parity_tests" in item.path.parts
    quick = jax.default_backend() == "cpu" and not item.get_closest_marker("optimized")
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quick)  # of the processes that a test starts
    jax.config.update("jax_disable_most_optimizations", quick)
    jax.config.update("jax_default_matmul_precision", "highest" if parity else None)


def pytest_runtest_teardown(item, nextitem):
    """What a file has compiled, no other runs: kept, it came to 8 GB a process."""
    import jax

    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "gpu", "tpu"), help="the platform that JAX must compute on")


def pytest_configure(config):
    if not (device := config.getoption("--device")):
        return
    import jax

    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != device:
        raise pytest.UsageError(
            f"--device {device} needs JAX to have one; received: its default is {jax.default_backend()!r}. "
            "Install jax for that platform, and do not set JAX_PLATFORMS to another."
        )
