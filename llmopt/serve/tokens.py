"""/tokenize and /detokenize: what a prompt is made of."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmopt.serve.answer import Model
from llmopt.serve.errors import ApiError
from llmopt.serve.fields import MAX_MESSAGES, MAX_TOOLS, Many, Strict, Tool
from llmopt.serve.messages import Message
from llmopt.serve.prompts import HEAD, chat_prompt
from llmopt.serve.requests import ChatRequest, parse_strictly

MAX_TEXT = 1 << 20
"""Characters that may be tokenized whatever the context is: 155 MiB while it happens."""


class TokenizeRequest(Strict):
    """A prompt, or the messages of a chat. ``add_special_tokens``: those a text is encoded with (prompts only)."""

    model: str | None = None
    prompt: str | None = None
    messages: Many[Message] | None = Field(default=None, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = None
    tokens: Many[int]


def tokenize(body: Any, model: Model) -> dict[str, Any]:
    """Token ids, their number, and the longest context. Raises ApiError for a bad request."""
    request = parse_strictly(TokenizeRequest, body)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("give either prompt or messages", param="prompt")
    if request.messages is not None:
        chat = ChatRequest(
            messages=request.messages, tools=request.tools, chat_template_kwargs=request.chat_template_kwargs
        )
        text = _checked(chat_prompt(chat, model.chat, model.tools), model.engine.context, "messages")
        ids = model.tokenizer.encode(text, special=False)
    else:
        text = _checked(request.prompt or "", model.engine.context, "prompt")
        ids = model.tokenizer.encode(text, special=request.add_special_tokens)
    found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.engine.context}
    if request.return_token_strs:
        found["token_strs"] = [model.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return found


def _checked(text: str, context: int, param: str) -> str:
    """The text. Raises ApiError when its tokens would take the server more memory than a prompt that fits may."""
    most = max(MAX_TEXT, HEAD * context)
    if len(text) > most:
        what = f"the text has {len(text)} characters, /tokenize takes {most} at most"
        raise ApiError(what, param=param, code="text_too_long", status=413)
    return text


def detokenize(body: Any, model: Model) -> dict[str, Any]:
    """The text of token ids, special tokens included. Raises ApiError for an id outside the vocabulary."""
    request = parse_strictly(DetokenizeRequest, body)
    bad = next((i for i in request.tokens if not 0 <= i < model.engine.vocab_size), None)
    if bad is not None:
        raise ApiError(f"token {bad} is not in [0, {model.engine.vocab_size})", param="tokens")
    return {"prompt": model.tokenizer.decode(request.tokens, skip_special=False)}
