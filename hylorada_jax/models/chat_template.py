"""Conversations as text: a model's chat template in jinja2, rendered as transformers renders it."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hylorada_jax.errors import DataError

# Under which of these a model's template looks for a turn's reasoning differs; the first is the newest name.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """The block {% generation %}: it marks what an assistant wrote, and renders as what stands in it."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def render(
    template: str | Mapping[str, str] | None,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        template: the model's, or its templates by name: "tool_use" is taken where there are tools, else
            "default".
        messages: [{"role": "user", "content": "…"}, …]; a value of None counts as absent.
        variables: what else the template knows.
        tools: JSON schemas of what the assistant may call.

    Returns:
        The text.

    Raises:
        DataError: there is no such template, there are no messages, or the template refuses them.

    Example:
        >>> render("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
        ...        [{"role": "user", "content": "Hi"}], {})
        '[user] Hi'

    Source: transformers 5.24, ``utils/chat_template_utils.py``.
    """
    source = _choose(template, tools)
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(
            "A conversation must be a sequence of messages, each a mapping with a role and a content.",
            repr(messages),
            'Give at least one: [{"role": "user", "content": "…"}].',
        )
    try:
        given = {"documents": None, **variables, "messages": [*map(_message, messages)], "tools": tools}
        return _compiled(source).render(given)
    except Exception as error:  # the template is code, and may raise anything
        roles = [message.get("role") for message in messages]
        raise DataError(
            "The messages must be what the model's chat template accepts.",
            f"{roles}: {type(error).__name__}: {error}",
            "Check the roles, their order, and that each message has a content.",
        ) from error


def _choose(template: str | Mapping[str, str] | None, tools: Any) -> str:
    if isinstance(template, str):
        return template
    names = template or {}
    name = "tool_use" if tools is not None and "tool_use" in names else "default"
    if name not in names:
        raise DataError(
            "A conversation needs a model with a chat template.",
            f"a tokenizer with templates {', '.join(names)}, and no default"
            if names
            else "a tokenizer without one",
            "Use an instruction-tuned model, or give plain text.",
        )
    return names[name]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    # The sandbox, because the template is code that comes with the model.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes what HTML would read.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
