"""What `hylorada chat` says to a model, what it prints of the answers, and what an interrupt does."""

import dataclasses
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time

import jax
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from hylorada_jax.cli.cli_test import run
from hylorada_jax.cli.conversation import Talk, converse
from hylorada_jax.cli.sampling import SamplingOptions
from hylorada_jax.cli.shared import variables_of
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models import generate as generation
from hylorada_jax.models.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
END = 256


def bytewise(**settings):
    """A tokenizer of bytes, and <end>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate([*alphabet, "<end>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"}, TEMPLATE, (END,), **settings)


class Scripted:
    """A model that answers what it was made to, a token at a time; it keeps what it was asked."""

    def __init__(self, *answers, before=lambda at: None):
        self.answers, self.before = [*answers], before
        self.asked: list[str] = []
        self.settings: list[dict] = []

    def stream(self, prompt, **settings):
        self.asked.append(bytewise().decode(prompt))
        self.settings.append(settings)
        answer = self.answers.pop(0)
        ids = bytewise().encode(answer) if isinstance(answer, str) else answer
        for at, token in enumerate([*ids, END]):
            self.before(at)
            yield [token]


def talk_with(model, *, context=None, tokenizer=None):
    settings = {"max_new_tokens": 50, "temperature": 0.0}
    return Talk(model, tokenizer or bytewise(), None, context, jax.random.key(0), settings)


def say(monkeypatch, talk, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    converse(talk, interactive=False)


@pytest.mark.parametrize(
    ("lines", "asked"),
    [
        (["Hi", "Ho"], ["[user]Hi[assistant]", "[user]Hi[assistant]A 0[user]Ho[assistant]"]),
        (["Hi", "/reset", "Ho"], ["[user]Hi[assistant]", "[user]Ho[assistant]"]),
        (
            ["/system Be  brief. ", "Hi", "/system", "Ho"],
            ["[system]Be  brief.[user]Hi[assistant]", "[user]Hi[assistant]A 0[user]Ho[assistant]"],
        ),
        (["", "  ", " /x ", "/quit", "Ho"], ["[user]/x[assistant]"]),
        (["Grüße 😀"], ["[user]Grüße 😀[assistant]"]),
        (["/help"], []),
        ([], []),
    ],
)
def test_the_history_goes_through_the_template(lines, asked, monkeypatch, capsys):
    model = Scripted("A 0", "A 1")
    say(monkeypatch, talk_with(model), *lines)
    assert model.asked == asked
    out = capsys.readouterr().out
    assert ("/reset" in out) if lines == ["/help"] else out == "".join(f"A {n}\n" for n in range(len(asked)))
    keys = [str(jax.random.key_data(settings["rng"])) for settings in model.settings]
    assert len(set(keys)) == len(keys) or "/reset" in lines


@pytest.mark.parametrize(
    ("answer", "pieces", "settings"),
    [
        ("aé漢😀!", ["a", "é", "漢", "😀", "!", "\n"], {}),
        # A byte that ends no character is one that is not whole, and shown when it is known to be the last.
        ([*bytewise().encode("a"), bytewise().encode("é")[0]], ["a", "\ufffd\n"], {}),
        ("Do n't , ever .", ["Don't, ", "ever.\n"], {"cleans_up": True}),
    ],
    ids=["unicode", "half a character", "by words"],
)
def test_what_is_printed_is_whole_and_not_taken_back(answer, pieces, settings, monkeypatch, capsys):
    printed = []
    model = Scripted(answer, before=lambda at: printed.append(capsys.readouterr().out))
    tokenizer = bytewise(**settings)
    say(monkeypatch, talk_with(model, tokenizer=tokenizer), "Hi")
    printed.append(capsys.readouterr().out)
    found = [piece for piece in printed if piece]
    whole = "".join(pieces)
    assert "".join(found) == whole
    if not settings:
        assert found == pieces


def test_a_terminal_obeys_no_answer_and_a_pipe_gets_it_as_it_is(monkeypatch, capsys):
    for terminal, shown in ((True, "\\x1b[2J é\u200d a\\u200d\n"), (False, "\x1b[2J é\u200d a\u200d\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        talk = talk_with(Scripted("\x1b[2J é\u200d a\u200d"))
        say(monkeypatch, talk, "Hi")
        assert capsys.readouterr().out == shown
        assert talk.messages[-1]["content"] == "\x1b[2J é\u200d a\u200d"


def test_a_conversation_that_fills_the_context_is_refused_and_goes_on_after_a_reset(monkeypatch, capsys):
    model = Scripted("abc", "d", "e")
    size = len("[user]Hi[assistant]")
    talk = talk_with(model, context=size + 5)
    with pytest.raises(DataError, match=r"into 24 tokens[\s\S]*/reset"):
        say(monkeypatch, talk, "Hi", "Ho")
    assert [m["content"] for m in talk.messages] == ["Hi", "abc"]
    assert model.settings[0]["max_new_tokens"] == 5
    say(monkeypatch, talk, "/reset", "H")
    assert [settings["max_new_tokens"] for settings in model.settings] == [5, 6]
    with pytest.raises(ConfigError, match="/resett"):
        say(monkeypatch, talk, "/resett")


_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
_A_SYSTEM = _NO_SYSTEM.replace("==", "!=", 1)


@pytest.mark.parametrize(
    ("template", "lines", "last", "remedy", "carried_out"),
    [
        # Each leaves 24 tokens to the template's 15, what is said, and the answer.
        (TEMPLATE, ["Hi"], "Ho", "Start over with /reset, which keeps", ["/reset", "Ho"]),
        (TEMPLATE, [], "x" * 9, "Write a shorter message.", ["x"]),
        (
            TEMPLATE,
            ["/system s"],
            "Ho",
            "Take the system message away with /system alone.",
            ["/system", "Ho"],
        ),
        (
            TEMPLATE,
            ["Hi", "/system s"],
            "Ho",
            "Start over with /reset, and take the system message away with /system alone.",
            ["/reset", "/system", "Ho"],
        ),
        (
            TEMPLATE,
            ["Hi", "/system s"],
            "x" * 9,
            "Start over with /reset, take the system message away with /system alone, and write a shorter",
            ["/reset", "/system", "x"],
        ),
        (TEMPLATE, ["Hi"], "x" * 9, "Start over with /reset, and write a shorter", ["/reset", "x"]),
        (_NO_SYSTEM, ["/system s"], "Ho", "Take the system message away", ["/system", "Ho"]),
        (
            _NO_SYSTEM,
            ["Hi", "/system s"],
            "Ho",
            "Start over with /reset, and take",
            ["/reset", "/system", "H"],
        ),
    ],
)
def test_the_remedy_for_a_message_that_is_not_answered_works(
    template, lines, last, remedy, carried_out, monkeypatch, capsys
):
    model = Scripted("abc", "d")
    tokenizer = dataclasses.replace(bytewise(), chat_template=template)
    talk = talk_with(model, context=24, tokenizer=tokenizer)
    say(monkeypatch, talk, *lines)
    with pytest.raises(DataError) as error:
        say(monkeypatch, talk, last)
    assert error.value.remedy.startswith(remedy)
    asked = len(model.asked)
    say(monkeypatch, talk, *carried_out)
    assert len(model.asked) == asked + 1


def test_a_context_without_room_for_any_message_says_so(monkeypatch):
    with pytest.raises(DataError, match="a larger --max-context"):
        say(monkeypatch, talk_with(Scripted(), context=9), "Hi")


def test_a_template_may_ask_for_a_system_message(chatting, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.jinja").write_text(_A_SYSTEM)
    command = ("chat", "--model", chatting, "--max-new-tokens", 3, "--chat-template", tmp_path / "own.jinja")
    for lines, said in (
        ("Hi\n", "Give a system message with /system TEXT."),
        ("/system S\nHi\n/reset\nHo\n", ""),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status, out, err = run(monkeypatch, capsys, *command)
        assert (status, said in err, bool(out)) == (2 if said else 0, True, not said), err
    (tmp_path / "own.jinja").write_text("{{ raise_exception('never') }}")
    assert "never" in run(monkeypatch, capsys, *command)[2]


@pytest.mark.parametrize(("at", "said"), [(0, None), (1, "a"), (3, "ab"), (4, "abé")])
def test_an_interrupted_answer_stays_as_far_as_it_was_said(at, said, monkeypatch, capsys):
    def interrupt(now):
        if now == at:
            raise KeyboardInterrupt

    model = Scripted("abé", "c", before=interrupt)
    talk = talk_with(model)
    say(monkeypatch, talk, "Hi")
    contents = [message["content"] for message in talk.messages]
    if at == 3:  # in the middle of a character
        assert contents == ["Hi", "ab\ufffd"]
    else:
        assert contents == ([] if said is None else ["Hi", said])
    model.before = lambda at: None
    say(monkeypatch, talk, "Ho")
    assert capsys.readouterr().out.endswith("c\n")


CHILD = """
import os, signal, sys, time
os.open(os.ttyname(0), os.O_RDWR)  # of a new session: it becomes its terminal, from which Ctrl-C comes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born deaf to it
import readline
from hylorada_jax.cli.chat_test import Scripted, talk_with
from hylorada_jax.cli.conversation import converse
talk = talk_with(Scripted("one " * 1000, "two", before=lambda at: time.sleep(0.01)))
converse(talk, interactive=True)
print("said:", [message["content"][:6] for message in talk.messages])
"""


def test_ctrl_c_on_a_terminal_stops_an_answer_or_drops_a_line_and_leaves_the_program():
    terminal, end = pytest.importorskip("pty").openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    seen = b""

    def wait_for(text, sent):
        nonlocal seen
        deadline = time.monotonic() + 300
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 10)[0]:
                seen += os.read(terminal, 4096)
            elif sent == b"\x03":  # Python's readline misses one that comes between two of its waits
                os.write(terminal, sent)
        seen = seen.partition(text)[2]

    try:
        for sent, then in (
            (b"", b"> "),
            (b"Hi\n", b"one one"),
            (b"\x03", b"> "),
            (b"dropped", b"dropped"),
            (b"\x03", b"> "),
            (b"/nothing\n", b"Put a space before a message."),
            (b"", b"> "),
            (b"Ho\n", b"two"),
            (b"", b"> "),
            (b"\x04", b"said: ['Hi', 'one on', 'Ho', 'two']"),
        ):
            os.write(terminal, sent)
            wait_for(then, sent)
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


def test_chat_streams_what_generate_says_and_compiles_once(chatting, monkeypatch, capsys):
    first, second = "say w3", "say w5"
    command = ("--model", chatting, "--max-new-tokens", 12)
    alone = run(monkeypatch, capsys, "generate", *command, "--prompt", first, "--chat")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\n/reset\n{second}\n/reset\n{first}\n"))

    def programs():
        return generation._begin._cache_size(), generation._go_on._cache_size()  # type: ignore[attr-defined]

    before = programs()
    status, out, err = run(monkeypatch, capsys, "chat", *command)
    assert status == 0, err
    assert out.startswith(alone)
    assert out.endswith(alone)
    assert out.count("\n") >= 3
    # The same bucket, and the same programs as generate's.
    assert programs() == before


def test_what_gpt_oss_thinks_is_no_part_of_what_it_said(monkeypatch, capsys):
    answer = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Ho"
    model = Scripted(answer, "!")
    talk = talk_with(model, context=1000)
    say(monkeypatch, talk, "Hi", "And?")
    assert talk.messages[1] == {"role": "assistant", "content": "Ho", "reasoning_content": "Hm"}
    assert model.asked[1] == "[user]Hi[assistant]Ho[user]And?[assistant]"
    assert capsys.readouterr().out == f"{answer}\n!\n"


def test_the_template_gets_the_variables_that_are_given(monkeypatch, capsys):
    model = Scripted("A")
    tokenizer = bytewise()
    tokenizer = dataclasses.replace(tokenizer, chat_template="{{ how }}" + TEMPLATE)
    talk = talk_with(model, tokenizer=tokenizer)
    talk.variables = variables_of('{"how": "*"}')
    say(monkeypatch, talk, "Hi")
    assert model.asked == ["*[user]Hi[assistant]"]
    for wrong in ("{", "[1]"):
        status, _, err = run(monkeypatch, capsys, "chat", "--chat-template-kwargs", wrong)
        assert (status, "must be a JSON object" in err) == (2, True)


def test_an_answer_stops_where_the_template_of_this_conversation_ends_it(monkeypatch, capsys):
    tokenizer = bytewise()
    tokenizer.backend.add_special_tokens(["<turn>", "<call>"])
    template = "{% if not mode %}{{ raise_exception('no mode') }}{% endif %}" + TEMPLATE.replace(
        "m.content }}", "m.content }}{{ '<call>' if messages[0].role == 'system' else '<turn>' }}"
    )
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    turn, call = tokenizer.encode("<turn><call>")
    assert tokenizer.chat_end_ids == (END,)  # without a mode it is not known

    class Ending(Scripted):
        def stream(self, prompt, **settings):
            self.settings.append(settings)
            yield [*tokenizer.encode(self.answers.pop(0)), turn]

    model = Ending("A", "B")
    talk = talk_with(model, tokenizer=tokenizer)
    talk.variables = {"mode": "x"}
    say(monkeypatch, talk, "Hi", "/system S", "Ho")
    assert [settings["eos_token_id"] for settings in model.settings] == [(END, turn), (END, call)]
    assert [m["content"] for m in talk.messages] == ["Hi", "A", "Ho", "B<turn>"]  # ended by another
    assert capsys.readouterr().out == "A\nB<turn>\n"


def test_a_closed_stdin_is_an_error_of_ours(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run(monkeypatch, capsys, "chat")
    assert (status, "stdin is closed" in err) == (2, True)


def test_options_that_filter_nothing_need_no_sampling():
    assert SamplingOptions(top_k=0, top_p=1.0, min_p=0.0).settings(None, 5)["temperature"] == 0


def test_the_settings_of_the_model_are_used_in_a_chat_and_options_win(
    chatting, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(chatting, tmp_path / "model")
    said = {"do_sample": True, "temperature": 3.0, "top_k": 5, "max_new_tokens": 3, "num_beams": 2}
    (model / "generation_config.json").write_text(json.dumps(said))
    common = ("generate", "--model", model, "--prompt", "say w3")

    def answered(*options):
        status, out, err = run(monkeypatch, capsys, *common, *options)
        assert status == 0, err
        return out, err

    with pytest.warns(UserWarning, match="not heeded: num_beams$") as caught:
        out, err = answered("--chat", "--seed", 1)
    assert len(caught) == 1
    assert "own settings: temperature 3, top_k 5, max_new_tokens 3\n" in err
    given = ("--temperature", 3.0, "--top-k", 5, "--max-new-tokens", 3)
    (model / "generation_config.json").unlink()
    assert answered("--chat", "--seed", 1, *given)[0] == out
    greedy = answered("--chat", "--max-new-tokens", 3)[0]
    del said["num_beams"]
    (model / "generation_config.json").write_text(json.dumps(said))
    out, err = answered("--chat", "--temperature", 0)
    assert out == greedy
    assert "own settings: max_new_tokens 3\n" in err
    assert "own settings" not in answered("--max-new-tokens", 3)[1]  # of a prompt, nothing but what is said
