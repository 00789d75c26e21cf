"""Conversations with tools, from the request to the prompt and from the tokens to the message."""

import json

import pytest

from llmopt.runtime.chat import ChatTemplate
from llmopt.runtime.protocol import Sampled
from llmopt.runtime.stream import Delta
from llmopt.serve.errors import ApiError
from llmopt.serve.prompts import chat_prompt
from llmopt.serve.requests import ChatRequest, parse_request
from llmopt.serve.responses import ChatWriter
from llmopt.serve.tools import tool_format

TEMPLATE = (
    "{%- if tools %}TOOLS {{ tools | tojson }}{{ '\n' }}{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{%- for c in m.tool_calls or [] %} CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{%- if m.tool_call_id %} FOR {{ m.tool_call_id }}{% endif %}{{ '\n' }}{% endfor %}{{ mood }}"
)
TOOL = {"type": "function", "function": {"name": "f", "description": "does", "parameters": {"type": "object"}}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
CONVERSATION = [
    {"role": "developer", "content": "Be."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "content": "9", "tool_call_id": "c1"},
]


def prompt(template=TEMPLATE, **fields):
    request = parse_request(ChatRequest, {"messages": CONVERSATION, "tools": [TOOL], **fields})
    return chat_prompt(request, ChatTemplate(template, {}), tool_format("hermes"))


def test_tools_and_calls_reach_the_template():
    assert prompt(chat_template_kwargs={"mood": "gay"}).splitlines() == [
        "TOOLS " + json.dumps([TOOL]),
        "system: Be.",
        "user: Hi",
        'assistant:  CALL f {"x": [1]}',
        "tool: 9 FOR c1",
        "gay",
    ]


def test_tools_that_may_not_be_called_are_not_shown():
    assert "TOOLS" not in prompt(tool_choice="none")


def test_a_template_without_tools_gets_them_in_a_message():
    text = prompt("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert text.startswith("system: You can call these functions:\n")
    assert json.dumps(TOOL["function"]) in text
    assert "<tool_call>" in text


def test_without_a_template_there_is_no_chat():
    request = parse_request(ChatRequest, {"messages": CONVERSATION})
    with pytest.raises(ApiError, match="no chat template"):
        chat_prompt(request, None, tool_format("hermes"))


TEXT = (
    'Let me see. <tool_call>\n{"name": "f", "arguments": {"x": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g"}\n</tool_call>'
)


def deltas(text, reason="stop", size=3):
    """A text as it comes, ended by an end-of-sequence token."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = [Delta(piece, (Sampled(5, -1.0),)) for piece in pieces]
    return [*found, Delta("", (Sampled(1, -1.0),), reason, 1 if reason == "stop" else None)]


def writer(tokenizer, *, form="hermes", forced=False, logprobs=False):
    chosen = None if form is None else tool_format(form)
    return ChatWriter(0, tokenizer, logprobs=logprobs, form=chosen, forced=forced)


def assemble(chunks):
    """A message as a client puts it together."""
    content, calls = "", []
    for delta in (c["delta"] for c in chunks):
        content += delta.get("content") or ""
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] == len(calls)
                calls.append([piece["function"]["name"], ""])
            calls[piece["index"]][1] += piece["function"]["arguments"]
    return content, calls


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_calls_of_the_models_own_choice(tokenizer, reason):
    message = (choice := writer(tokenizer).whole(deltas(TEXT, reason)))["message"]
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in message["tool_calls"]]
    assert (message["content"], calls) == ("Let me see.", [["f", '{"x": [1, 2]}'], ["g", ""]])
    assert len({c["id"] for c in message["tool_calls"]}) == 2
    assert choice["finish_reason"] == ("tool_calls" if reason == "stop" else "length")
    stream = writer(tokenizer)
    chunks = [c for d in deltas(TEXT, reason) if (c := stream.chunk(d))]
    assert assemble(chunks) == (message["content"], calls)
    assert [c["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]


def test_a_forced_call_ends_by_stop(tokenizer):
    assert writer(tokenizer, forced=True).whole(deltas(TEXT))["finish_reason"] == "stop"


def test_without_tools_a_call_is_text(tokenizer):
    choice = writer(tokenizer, form=None).whole(deltas(TEXT))
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_log_probabilities_come_with_calls(tokenizer):
    stream, parts = writer(tokenizer, logprobs=True), deltas(TEXT)
    reports = [c["logprobs"] for d in parts if (c := stream.chunk(d))]
    assert sum(len(r["content"]) for r in reports if r) == len(parts) - 1
