"""Conversations as text: a model's chat template in jinja2, rendered as transformers renders it."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hylorada_jax.errors import DataError
from hylorada_jax.io.files import any_path
from hylorada_jax.io.reading import read_bounded
from hylorada_jax.models.template_process import Rendered, run_template
from hylorada_jax.text import cut

TEMPLATE_NAME = "chat_template.jinja"
"""The file of a template beside a tokenizer's, as transformers names it."""
MORE_TEMPLATES = "additional_chat_templates/*.jinja"
"""Those of further templates, by whose names they are called."""
MAX_TEMPLATE = 2**18
"""The characters of a template: ten times the longest that is known."""
OF_THE_CONVERSATION = ("messages", "tools", "add_generation_prompt")
"""The variables of a template that each rendering has from its conversation, whatever is given beside it."""
# Most of a template's variables are of these types, and each turn of a conversation brings them again.
_SIMPLE = {str, bool, float, type(None)}
# Where models' templates look for a turn's reasoning; the first is the newest name.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Request(NamedTuple):
    """A conversation to render.

    Attributes:
        messages: [{"role": "user", "content": "…"}, …]; a value of None counts as absent.
        variables: what else the template knows.
        tools: JSON schemas of what the assistant may call.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]] | None = None


def render(template: str | Mapping[str, str] | None, request: Request) -> str:
    """The text of a conversation: :func:`render_each` of one.

    Args:
        template: the model's, or its templates by name.
        request: the conversation.

    Returns:
        The text.

    Raises:
        DataError: there is no such template, there are no messages, they hold what JSON does not have, the
            template refuses them, or it exceeds a limit.

    Example:
        >>> render("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}",
        ...        Request([{"role": "user", "content": "Hi"}], {}))
        '[user] Hi'
    """
    (found,) = render_each(template, [request])
    if isinstance(found, DataError):
        raise found
    return found.text


def render_each(
    template: str | Mapping[str, str] | None, requests: Sequence[Request]
) -> list[Rendered | DataError]:
    """The texts of conversations, and what of them the template says an assistant wrote.

    The template may be of any origin: it is rendered in a process of its own, with limits.

    Args:
        template: the model's, or its templates by name: "tool_use" is taken where there are tools, else
            "default".
        requests: the conversations.

    Returns:
        For each, what is rendered or the error: there are no messages, they hold what JSON does not have,
        the template refuses them, or it exceeds a limit.

    Raises:
        DataError: there is no such template.

    Source: transformers 5.24, ``utils/chat_template_utils.py``.
    """
    found: list[Rendered | DataError | None] = [None] * len(requests)
    by_source: dict[str, dict[int, dict[str, Any]]] = {}
    checked: dict[int, tuple[Any, dict[str, Any]]] = {}
    sources: dict[bool, str] = {}
    for number, request in enumerate(requests):
        if (has_tools := request.tools is not None) not in sources:
            sources[has_tools] = _choose(template, request.tools)
        source = sources[has_tools]
        try:
            by_source.setdefault(source, {})[number] = _variables(request, checked)
        except DataError as error:
            found[number] = error
    for source, given in by_source.items():
        for number, result in zip(given, run_template(source, [*given.values()]), strict=True):
            if isinstance(result, DataError):
                result = result.at(_short([message.get("role") for message in requests[number].messages]))
            found[number] = result
    return [result for result in found if result is not None]


def not_beside(variables: Mapping[str, Any]) -> str:
    """The names of those variables that a template has from the conversation itself.

    Args:
        variables: to be given beside the messages.

    Returns:
        The names; "" where there are none.

    Example:
        >>> not_beside({"enable_thinking": False, "tools": []})
        'tools'

    Source: transformers 5.24, ``apply_chat_template``, for which each is an argument of its own.
    """
    return ", ".join(name for name in OF_THE_CONVERSATION if name in variables)


def read_template(file: str | Path) -> str:
    """A chat template of the user's own.

    Args:
        file: of jinja, in UTF-8.

    Raises:
        DataError: it cannot be read, is too long, or is not jinja.
    """
    rule, remedy = "A chat template must be a file of jinja, in UTF-8.", "Correct it, or give another file."
    content = read_bounded(any_path(file), rule, DataError, remedy, limit=4 * MAX_TEMPLATE)
    try:
        source = _choose(content.decode("utf-8-sig"), None)
    except UnicodeDecodeError as error:
        raise DataError(rule, f"{file}: {error}", remedy) from error
    (found,) = run_template(source, [{}])  # most of them miss the messages
    if isinstance(found, DataError) and str(found.received).startswith("TemplateSyntaxError"):
        raise DataError(rule, f"{file}: {found.received}", remedy)
    return source


def marks_generation(template: str | Mapping[str, str] | None, tools: Any = None) -> bool:
    """Whether a template says itself what an assistant writes, by the block ``{% generation %}``.

    Args:
        template: the model's, or its templates by name.
        tools: with which it would be rendered.

    Raises:
        DataError: there is no such template.

    Example:
        >>> marks_generation("{% generation %}{{ messages[0].content }}{% endgeneration %}")
        True
    """
    return _marks(_choose(template, tools))


@functools.lru_cache(maxsize=16)  # asked for every conversation
def _marks(source: str) -> bool:
    said = re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)  # a comment may speak of it
    return re.search(r"\{%[-+]?\s*generation\b", said) is not None


def _variables(request: Request, checked: dict[int, tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """All that the template knows, in JSON's types.

    Args:
        request: the conversation.
        checked: by its id each message, and as it goes to the template. A conversation is rendered at each
            of its turns.
    """
    messages = request.messages
    if not _is_conversation(messages):
        raise DataError(
            "A conversation must be a sequence of messages, each a mapping with a role and a content.",
            _short(messages),
            'Give at least one: [{"role": "user", "content": "…"}].',
        )
    given = {"documents": None, **request.variables, "tools": request.tools}
    sent = []
    try:
        for number, message in enumerate(messages):
            if id(message) not in checked:
                checked[id(message)] = message, _plain(_message(message), f"messages[{number}]")
            sent.append(checked[id(message)][1])
        plain = {n: value if type(value) in _SIMPLE else _plain(value, n) for n, value in given.items()}
    except RecursionError as error:
        raise _not_json("a message", "a mapping or list that is nested too deeply") from error
    return plain | {"messages": sent}


def _is_conversation(messages: Any) -> bool:
    is_sequence = isinstance(messages, Sequence) and len(messages) > 0
    return is_sequence and all(isinstance(message, Mapping) for message in messages)


def _choose(template: Any, tools: Any) -> str:
    names = {"default": template} if isinstance(template, str) else template or {}
    if not isinstance(names, Mapping) or not all(isinstance(x, str) for x in (*names, *names.values())):
        raise DataError("A chat template must be text.", _short(template), "Download the tokenizer again.")
    name = "tool_use" if tools is not None and "tool_use" in names else "default"
    if name not in names:
        raise DataError(
            "A conversation needs a model with a chat template.",
            f"a tokenizer with templates {', '.join(names)[:200]}, and no default"
            if names
            else "a tokenizer without one",
            "Use an instruction-tuned model, give a template (--chat-template), or plain text.",
        )
    if len(names[name]) > MAX_TEMPLATE:
        raise DataError(
            f"A chat template must have at most {MAX_TEMPLATE:,} characters.",
            f"one of {len(names[name]):,}",
            "Download the tokenizer again.",
        )
    return names[name]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _plain(value: Any, place: str) -> Any:
    """The value in JSON's types, as which it goes to the process that renders it."""
    if value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, int):
        if value.bit_length() > 10_000:  # more digits than Python writes
            raise _not_json(place, f"an integer of {value.bit_length():,} bits")
        return value
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise _not_json(place, f"the key {_short(odd[0])}")
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise _not_json(place, f"a {type(value).__name__}")


def _not_json(place: str, received: str) -> DataError:
    return DataError(
        "What a chat template is given must be of JSON's types: text, numbers, lists, mappings from text.",
        f"{place}: {received}",
        "Convert it first, an array with .tolist(), a date with .isoformat().",
    )


def _short(value: Any) -> str:
    return cut(repr(value), 200)
