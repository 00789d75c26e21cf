"""Chat templates, rendered in a sandbox with the settings Hugging Face gives them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llmopt.errors import ArtifactError, CheckpointError, LlmoptError, RequestError
from llmopt.runtime.tokenizer import read_json, special_tokens

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"

MAX_RENDERED = 1 << 24
"""Characters a template may repeat a string to, or print: no honest conversation comes near."""

PROBE = ({"role": "user", "content": "x"},)
"""The smallest conversation every chat template can render."""


class ChatTemplate:
    """A model's chat template. Rendering sees plain data only and cannot leave the sandbox."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """``tokens``: named special tokens (``bos_token``, …). Raises ArtifactError for a syntax error."""
        self.source, self._tokens = source, dict(tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(f"bad syntax: {error.message}", where=f"chat template line {error.lineno}") from error

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a tokenizer_config.json: a string, or a list of named ones of which ``default`` counts."""
        found = config.get("chat_template")
        if isinstance(found, Sequence) and not isinstance(found, str):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        return ChatTemplate(found, special_tokens(config)) if found else None

    @property
    def takes_tools(self) -> bool:
        """Whether it says anything about tools."""
        return re.search(r"\btools\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        ``messages``: ``{"role", "content", …}``, content a string or a list of text parts. ``tools``: functions in
        OpenAI's form. ``variables``: the template's own, by name. Raises RequestError when the template refuses the
        conversation, ArtifactError when it tries to leave its sandbox.
        """
        if not messages:
            raise RequestError("the conversation has no messages")
        values = {
            **self._tokens,
            **_plain(variables or {}),
            "messages": [_plain_message(m) for m in messages],
            "tools": [_plain(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _limited(self._template.generate(values))
        except LlmoptError:
            raise
        except SecurityError as error:
            raise ArtifactError(f"it tries to leave its sandbox: {error}", where="chat template") from error
        except _Refused as error:
            raise RequestError(f"the chat template refuses this conversation: {error}") from error
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the chat template cannot render this conversation: {error}") from error

    def check(self) -> None:
        """Render a one-message conversation. Raises ArtifactError when the template tries to leave its sandbox."""
        try:
            self.render(PROBE)
        except RequestError:
            return  # it runs, and wants another conversation


def load_chat_template(files: Mapping[str, Path]) -> ChatTemplate | None:
    """The template among tokenizer files, checked: chat_template.jinja, else tokenizer_config.json's, else None.

    Raises ArtifactError when a file cannot be read, has bad syntax or holds a template that tries to escape.
    """
    config = read_json(files[CONFIG_FILE]) if CONFIG_FILE in files else {}
    if TEMPLATE_FILE in files:
        template: ChatTemplate | None = ChatTemplate(_read_text(files[TEMPLATE_FILE]), special_tokens(config))
    else:
        template = ChatTemplate.from_config(config)
    if template is not None:
        template.check()
    return template


def check_chat_template(files: Mapping[str, Path]) -> None:
    """The same for a checkpoint's files, before anything is built. Raises CheckpointError."""
    try:
        load_chat_template(files)
    except ArtifactError as error:
        raise CheckpointError(error.what, where=error.where, hint=error.hint) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read: {error}", where=path.name) from error


class _Refused(jinja2.TemplateError):
    """``raise_exception`` of a template."""


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part for training; here its body is all that counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """``namespace()`` without names that lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


class _Dict:
    """``dict`` as a template may use it: callable, with nothing else to reach."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """dict.fromkeys."""
        return dict.fromkeys(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a limit on what an operator may build."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse at once: jinja2 would let the forbidden attribute pass as an empty value until it is used."""
        raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__} is out of bounds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse powers and repetitions whose result would be huge."""
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                    _check_size(len(repeated) * times)
        if operator == "**":
            _check_size(abs(left) if abs(right) < 64 else MAX_RENDERED + 1)
        return super().call_binop(context, operator, left, right)


def _check_size(size: float) -> None:
    if size > MAX_RENDERED:
        raise SecurityError(f"a value of size {size:.0f} is too large")


def _limited(pieces: Any) -> str:
    parts, size = [], 0
    for piece in pieces:
        size += len(piece)
        _check_size(size)
        parts.append(piece)
    return "".join(parts)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    return environment


def _raise_exception(message: object) -> None:
    raise _Refused(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return plain


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of plain JSON values, its text parts joined to one string."""
    plain = _plain(message)
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = "".join(_part_text(part) for part in content)
    return plain


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RequestError(f"a message part of type {kind!r} is not supported", hint="only text is")
    return str(part["text"])
