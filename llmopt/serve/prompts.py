"""From a request to the token ids of its prompts."""

from __future__ import annotations

from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.tokenizer import Tokenizer
from llmopt.serve.errors import ApiError
from llmopt.serve.requests import ChatRequest, CompletionRequest, GenerationRequest


def request_prompts(
    request: GenerationRequest, tokenizer: Tokenizer, chat: ChatTemplate | None
) -> list[tuple[list[int], str]]:
    """Token ids of each prompt, and the text to echo before its answer.

    A conversation goes through the chat template, which writes the special tokens itself. Raises ApiError when
    there is no template or a prompt is empty.
    """
    if isinstance(request, ChatRequest):
        if chat is None:
            raise ApiError("this model has no chat template: use completions", param="messages")
        text = chat.render([message.plain() for message in request.messages])
        return [(tokenizer.encode(text, special=False), "")]
    assert isinstance(request, CompletionRequest)
    prompts = []
    for prompt in request.prompts():
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if prompt == "" or not ids:
            raise ApiError("the prompt is empty", param="prompt")
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        prompts.append((ids, text if request.echo else ""))
    return prompts
