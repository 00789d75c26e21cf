"""From a request to the token ids of its prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.errors import ApiError
from llmopt.serve.fields import Tool
from llmopt.serve.limits import Limits
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest
from llmopt.serve.tools import ToolFormat, detect_format

HEAD = 16
"""Characters for each token of the context: what they hold says whether a longer text can fit."""
MAX_ID = 1 << 32
"""Tokenizers count in 32 bits: a larger id belongs to no vocabulary."""


def request_prompts(
    request: GenerationRequest,
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    form: ToolFormat | None,
    limits: Limits,
    context: int,
) -> list[tuple[list[int], str]]:
    """Token ids of each prompt, and the text to echo before its answer.

    A conversation goes through the chat template, which writes the special tokens itself. ``form``: of the model's
    tool calls, if not the one its template teaches. Raises ApiError when there is no template, a prompt is empty or
    too long, one to echo holds an id no vocabulary has, or more choices are asked for than the limits allow.
    """
    if isinstance(request, ChatRequest):
        limits.check_choices(request.choices)
        text = chat_prompt(request, chat, form or detect_format(None if chat is None else chat.source))
        return [(_encoded(text, tokenizer, context, "messages", special=False), "")]
    assert isinstance(request, CompletionRequest)
    asked = request.prompts()
    limits.check_choices(len(asked) * request.choices)
    prompts = []
    for prompt in asked:
        ids = _encoded(prompt, tokenizer, context, "prompt") if isinstance(prompt, str) else prompt
        if prompt == "" or not ids:
            raise ApiError("the prompt is empty", param="prompt")
        if len(ids) >= context:
            raise _too_long(str(len(ids)), context, "prompt")
        prompts.append((ids, _echo(prompt, tokenizer) if request.echo else ""))
    return prompts


def _encoded(text: str, tokenizer: Tokenizer, context: int, param: str, *, special: bool = True) -> list[int]:
    """Token ids of a text that fits. One whose head alone holds twice the context is not read to its end (whatever a
    cut does to the tokens around it): 10 MB of text take seconds and 1.5 GB."""
    head = text[: HEAD * context]
    if len(head) < len(text) and len(tokenizer.encode(head, special=special)) > 2 * context:
        raise _too_long(f"more than {context}", context, param)
    ids = tokenizer.encode(text, special=special)
    if len(ids) >= context:
        raise _too_long(str(len(ids)), context, param)
    return ids


def _too_long(tokens: str, context: int, param: str) -> ApiError:
    """The error of a prompt that leaves no room for an answer, with the code that clients of OpenAI's know."""
    what = f"the prompt has {tokens} tokens and the context is {context}: at most {context - 1} leave room for one new"
    return ApiError(what, param=param, code="context_length_exceeded")


def _echo(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    """The text of a prompt."""
    if isinstance(prompt, str):
        return prompt
    if (wrong := next((i for i in prompt if not 0 <= i < MAX_ID), None)) is not None:
        raise ApiError(f"the prompt holds the token id {wrong}", param="prompt")
    return tokenizer.decode(prompt)


def chat_prompt(request: ChatRequest, chat: ChatTemplate | None, form: ToolFormat) -> str:
    """The text of a conversation. A template that says nothing of tools gets them in a system message in front."""
    if chat is None:
        raise ApiError("this model has no chat template: use completions", param="messages")
    messages, tools = [message.plain() for message in request.messages], request.callable_tools
    if tools and not chat.takes_tools:
        messages.insert(0, {"role": "system", "content": tools_text(tools, form)})
    return chat.render(messages, tools=[tool.plain() for tool in tools], variables=request.chat_template_kwargs)


def tools_text(tools: Sequence[Tool], form: ToolFormat) -> str:
    """What to tell a model about its tools when its template does not."""
    listed = "\n".join(json.dumps(tool.plain()["function"], ensure_ascii=False) for tool in tools)
    return f"You can call these functions:\n{listed}\nTo call one, answer with:\n{form.example()}"
