"""Chat templates render as transformers renders them, and what they raise becomes our error."""

import copy
import datetime
import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from jinja2.defaults import DEFAULT_FILTERS
from tokenizers import models

from hylorada_jax.cli.shared import variables_of
from hylorada_jax.data.columns import OtherNames
from hylorada_jax.data.examples import Conversation
from hylorada_jax.data.formats import read_row
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.models.tokenizer import Tokenizer, load_tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Sei höflich <&>"},
    {"role": "user", "content": "Grüße, 你好!"},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": "ü"}}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# name: (template, arguments beside the messages)
TEMPLATES: dict[str, tuple] = {
    "tojson": ("{{ messages | tojson }}",),
    "tojson, escaped": ("{{ messages | tojson(ensure_ascii=True) }}",),
    "tojson, unescaped": ("{{ messages | tojson(ensure_ascii=False) }}",),
    "tojson, indented": ("{{ messages | tojson(indent=2) }}",),
    "tojson, by place": ("{{ messages | tojson(True, 1) }}",),
    "tojson, compact": ("{{ messages | tojson(separators=(',', ':')) }}",),
    "tojson, sorted": ("{{ messages | tojson(sort_keys=True) }}",),
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}\n{% generation %}\n  {{ m.content }}"
        "{{ eos_token }}\n{% endgeneration %}\n{% else %}[{{ m.role }}]"
        "{{ m.content }}{% endif %}{% endfor %}",
    ),
    "generation with names": (
        "{% set n = namespace(k=0) %}{% for m in messages %}{%- generation -%}{% set x = loop.index %}"
        "{% set n.k = n.k + x %}{{ x }}{%- endgeneration -%}{{ x is defined }}{% endfor %}{{ n.k }}",
    ),
    "no tools": ("{{ tools is not none }} {{ documents is none }} {{ tools is defined }}",),
    "tools": ("{{ tools | tojson }}{{ documents is none }}", {"tools": TOOLS}),
    "documents": (
        "{% for d in documents %}{{ d.title }}{% endfor %}",
        {"documents": [{"title": "a", "text": "b"}]},
    ),
    "variables": ("{{ enable_thinking }}{{ bos_token }}", {"enable_thinking": False, "bos_token": "!"}),
    "absent names": ("{{ pad_token is defined }}{{ nothing }}{{ nothing is defined }}",),
    "day": ("{{ strftime_now('%Y') }}",),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}"
        "{% break %}{% endfor %}",
    ),
    "blocks trimmed": ("  {% if true %}\n  a\n  {% endif %}\n  b\n",),
    "macro": ("{% macro f(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",),
    "prompt": ("{{ bos_token }}{% if add_generation_prompt %}[assistant]{% endif %}",),
    "no prompt": ("{% if not add_generation_prompt %}-{% endif %}", {"add_generation_prompt": False}),
    "by name": ({"default": "d", "rag": "r"},),
    "by name, tools": ({"default": "d", "tool_use": "t {{ tools | length }}"}, {"tools": TOOLS}),
    "by name, no tools": ({"default": "d", "tool_use": "t"},),
    "by name, tools without their own": ({"default": "d {{ tools | length }}"}, {"tools": TOOLS}),
}
FAILING = {
    "arithmetic": "{{ 1 / 0 }}",
    "type": "{{ 1 + 'a' }}",
    "key": "{{ messages[0]['nothing'].more }}",
    "index": "{{ [][3].x }}",
    "value": "{{ 'a'.index('b') }}",
    "unknown filter": "{{ 1 | nothing }}",
    "syntax": "{% if %}",
    "unclosed": "{% generation %}",
    "not for JSON": "{{ range(3) | tojson }}",
    "deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "refused": "{{ raise_exception('roles must alternate') }}",
    "unsafe": "{{ messages.append(1) }}",
}


def tokenizer():
    return tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}))


def rendered(template, **arguments):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), chat_template=template, **TOKENS
    )
    given = {"add_generation_prompt": True, **arguments}
    # A copy, because jinja2's indent changes a list that it is given.
    return theirs.apply_chat_template(copy.deepcopy(CHAT), tokenize=False, **given)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(name):
    template, arguments = (*TEMPLATES[name], {})[:2]
    ours = Tokenizer(tokenizer(), TOKENS, template).apply_chat_template(CHAT, **arguments)
    assert ours == rendered(template, **arguments)
    assert ours


@pytest.mark.parametrize("name", FAILING)
def test_what_a_template_raises_is_our_error(name):
    with pytest.raises(Exception, match=r"."):  # transformers refuses it too
        rendered(FAILING[name])
    with pytest.raises(DataError, match="chat template accepts") as raised:
        Tokenizer(tokenizer(), TOKENS, FAILING[name]).apply_chat_template(CHAT)
    assert "remedy" in str(raised.value)


VALUES = ["'ab <i>é</i> http://x.y &amp; c\\n'", "[3, 1, 2]", "{'b': 1, 'a': [2]}", "-7.5", "messages"]
ARGUMENTS = {
    "attr": "('real')", "batch": "(2, 0)", "slice": "(2)", "groupby": "('role')", "map": "('string')",
    "round": "(1)", "replace": "('a', 'b')", "format": "(1)", "select": "('odd')", "reject": "('odd')",
    "selectattr": "('role')", "rejectattr": "('role')", "wordwrap": "(3)", "truncate": "(5)",
    "indent": "(3)", "center": "(30)", "join": "('-')",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(DEFAULT_FILTERS.keys() - {"random"}))
def test_filters_give_what_they_give_in_transformers(name):
    # Where it is rendered, nothing can be imported any more.
    for value in VALUES:
        template = f"{{% set x = {value} | {name}{ARGUMENTS.get(name, '')} %}}"
        template += "{{ x if x is string or x is not iterable else x | list }}"
        try:
            expected = rendered(template)
        except Exception:
            expected = None
        try:
            found = Tokenizer(tokenizer(), TOKENS, template).apply_chat_template(CHAT)
        except DataError:
            found = None
        assert found == expected


def test_escapes_and_methods_of_text_give_what_they_give_in_transformers():
    template = (
        r"{{ '\n\u00e9\N{BULLET}\x41' }}{{ 'ÄöÜ'.encode().hex() }}{{ 'a-b'.split('-') }}{{ 'ß'.upper() }}"
        "{{ lipsum() is string }}{{ strftime_now('%A %B %j') }}{{ '{:>8,.2f}'.format(1234.5) }}"
        "{{ '%08.3f' % 2.5 }}{{ cycler(1, 2).next() }}{{ joiner('x')() }}{{ dict(a=1) }}"
        "{{ namespace(b=2).b }}{{ range(3) | list }}"
    )
    assert Tokenizer(tokenizer(), TOKENS, template).apply_chat_template(CHAT) == rendered(template)


@pytest.mark.parametrize("messages", [[], ["hello"], [["role", "user"]], None, 5, "text", np.zeros(2)])
def test_what_is_not_a_conversation_is_refused(messages):
    with pytest.raises(DataError, match="sequence of messages"):
        Tokenizer(tokenizer(), TOKENS, "x").apply_chat_template(messages)


def test_an_absent_value_is_an_absent_key_and_reasoning_goes_by_each_of_its_names():
    # As in transformers 5; version 4 hands None on.
    made = Tokenizer(tokenizer(), TOKENS, "{{ messages[0] | tojson(sort_keys=True) }}")
    given = {"role": "assistant", "content": None, "reasoning": "r"}
    expected = {"reasoning": "r", "reasoning_content": "r", "role": "assistant", "thinking": "r"}
    assert json.loads(made.apply_chat_template([given])) == expected


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (np.zeros(3), r"messages\[0\].content: a ndarray"),
        (np.int64(3), r"messages\[0\].content: a int64"),
        (datetime.date(2024, 1, 1), r"messages\[0\].content: a date"),
        ([{"text": b"x"}], r"messages\[0\].content\[0\].text: a bytes"),
        ({"a": {0: 2}}, r"messages\[0\].content.a: the key 0"),
        ({1, 2}, "a set"),
        ([10**10_000], "an integer of 33,220 bits"),
        (CYCLE, "nested too deeply"),
    ],
)
def test_what_json_does_not_have_is_refused_with_its_place(value, place):
    with pytest.raises(DataError, match=place):
        Tokenizer(tokenizer(), TOKENS, "x").apply_chat_template([{"role": "user", "content": value}])


@pytest.mark.parametrize(
    "value", [(1, "a"), OrderedDict(a=1), np.float64(0.1), True, math.nan, "\ud83d", 2**60]
)
def test_what_json_has_is_rendered_as_it_was(value):
    template = "{{ messages[0].content | tojson }}"
    chat = [{"role": "user", "content": value}]
    assert Tokenizer(tokenizer(), TOKENS, template).apply_chat_template(chat) == json.dumps(
        value, ensure_ascii=False
    )


@pytest.mark.parametrize(
    "template", [5, ["x"], {"default": 5}, {"default": None}, {5: "x"}, b"x", "x" * 300_000]
)
def test_a_template_that_is_no_text_or_too_long_is_refused(template):
    with pytest.raises(DataError, match="A chat template must"):
        Tokenizer(tokenizer(), TOKENS, template).apply_chat_template(CHAT)


def test_the_day_is_today():
    made = Tokenizer(tokenizer(), TOKENS, "{{ strftime_now('%d %b %Y') }}")
    before = datetime.datetime.now()
    found = made.apply_chat_template(CHAT)
    assert found in {f"{day:%d %b %Y}" for day in (before, datetime.datetime.now())}


PLAIN = "{{ 'of the config' }}"
NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        (PLAIN, {}),
        (NAMED, {}),
        (PLAIN, {"chat_template.jinja": "of the file"}),
        (NAMED, {"chat_template.jinja": "of the file"}),
        (PLAIN, {"chat_template.jinja": "of the file", "additional_chat_templates/tool_use.jinja": "t"}),
        (None, {"chat_template.jinja": "of the file", "additional_chat_templates/rag.jinja": "r"}),
        (PLAIN, {"chat_template.json": json.dumps({"chat_template": "of a processor"})}),
    ],
)
def test_the_template_is_found_where_transformers_finds_it(config, files, tmp_path):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
        assert ours.apply_chat_template(CHAT, tools=tools) == expected


def test_templates_without_a_default_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"templates rag, and no default"):
        Tokenizer(tokenizer(), TOKENS, {"rag": "r"}).apply_chat_template(CHAT)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_what_a_conversation_says_itself_is_not_given_beside_it(name):
    value: Any = {"messages": CHAT, "tools": TOOLS, "add_generation_prompt": False}[name]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), chat_template="x")

    def call(**beside: Any) -> str:
        return theirs.apply_chat_template(
            CHAT, tools=None, add_generation_prompt=True, tokenize=False, **beside
        )

    assert call(mode=value) == "x"
    with pytest.raises(TypeError, match="multiple values"):
        call(**{name: value})
    with pytest.raises(ConfigError, match=rf"must not name messages, tools[\s\S]*received: {name}\n"):
        variables_of(json.dumps({"mode": 1, name: value}))
    row = {"messages": CHAT, "kwargs": {"mode": 1, name: value}}
    kwargs = OtherNames({"chat_template_kwargs": "kwargs"})
    with pytest.raises(DataError, match=rf"received: file:7: kwargs with {name}\n.*column tools"):
        read_row(row, "file:7", "messages", kwargs)
    # Either may say what is free, and the row its tools.
    found = read_row(row | {"kwargs": {"mode": 1}, "tools": TOOLS}, "file:7", "messages", kwargs)
    assert isinstance(found, Conversation)
    assert (found.tools, found.variables) == (TOOLS, variables_of('{"mode": 1}'))
