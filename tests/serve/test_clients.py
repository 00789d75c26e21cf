"""Clients nobody adapted, against a compiled artifact: openai (sync, async), LangChain's OpenAI class, plain httpx."""

import asyncio
import json
import re
import sys
from typing import Literal

import httpx
import pytest
from pydantic import BaseModel, Field

from tests.serve.conftest import running

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "A forecast", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


class Answer(BaseModel):
    """A schema the model's answer must follow."""

    verdict: Literal["yes", "no"]
    score: int = Field(ge=0, le=100)


@pytest.fixture(scope="module")
def server(root, compiled):
    """llmopt serve over the embedded model."""
    path = compiled(512)
    command = [sys.executable, "-m", "llmopt.cli.main", "serve", str(path), "--port", "0", "--threads", "1"]
    with running([*command, "--served-model-name", "tiny", "--log", "off"], root) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def check_call(call):
    """A call to ``weather`` whose arguments follow their schema."""
    assert call.function.name == "weather"
    found = json.loads(call.function.arguments)
    assert set(found) == {"city", "unit", "days"}
    assert len(found["city"]) <= 8
    assert found["unit"] in ("C", "F")
    assert 1 <= found["days"] <= 9


def ask(client, **fields):
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **{"max_tokens": 300, "seed": 1, **fields})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_that_must_be_made(client, choice):
    answer = ask(client, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False).choices[0]
    [call] = answer.message.tool_calls
    check_call(call)
    assert answer.message.content is None
    assert call.id.startswith("call_")
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_calls_in_a_stream(client):
    fields = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(client, **fields).choices[0].message.tool_calls[0].function
    chunks = list(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens > 10
    pieces = [piece for c in chunks[:-1] for piece in c.choices[0].delta.tool_calls or []]
    assert (pieces[0].function.name, pieces[0].index) == (whole.name, 0)
    assert pieces[0].id
    assert all(p.id is None and p.function.name is None for p in pieces[1:])
    assert len(pieces) > 5
    assert "".join(p.function.arguments for p in pieces) == whole.arguments
    assert not any(c.choices[0].delta.content for c in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason == "tool_calls"


def test_the_stream_helper_of_the_client(client):
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, tools=[openai.pydantic_function_tool(Answer)], tool_choice="required", seed=3,
        parallel_tool_calls=False, max_tokens=300,
    ) as stream:  # fmt: skip
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Answer)


def test_strict_tools_constrain_calls_of_the_models_own_choice(client):
    """Free text, or a call that follows its schema: biased towards the call, it must be one."""
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    answer = ask(client, tools=[strict, CLOCK], tool_choice="auto", max_tokens=40, temperature=0.5).choices[0]
    assert answer.message.content or answer.message.tool_calls
    assert answer.finish_reason in ("stop", "length", "tool_calls")


def test_a_conversation_with_calls(client):
    called = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=8)
    assert answer.usage.completion_tokens == 8 or answer.choices[0].finish_reason == "stop"
    again = client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, answer.choices[0].message, *MESSAGES], max_tokens=4
    )
    assert again.choices[0].message.role == "assistant"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_structured_outputs(client, seed):
    parsed = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Answer, max_tokens=300, seed=seed
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_a_json_object(client):
    found = ask(client, response_format={"type": "json_object"}, seed=5, temperature=0.3, n=3)
    for choice in found.choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[A-F]{2}-[0-9]{3}"}, "[A-F]{2}-[0-9]{3}"),
        ({"choice": ["red", 'gr"een', "blau\n"]}, "red|gr\"een|blau\n"),
        ({"grammar": 'start: "a" (b | "c")+\nb: /[0-9]/\n', }, "a[0-9c]+"),
        ({"json": {"enum": ["x", 5]}}, '"x"|5'),
    ],
)  # fmt: skip
def test_what_openai_has_no_field_for(client, wanted, pattern):
    found = ask(client, extra_body={"structured_outputs": wanted}, max_tokens=20, temperature=2, n=4)
    for choice in found.choices:
        assert re.fullmatch(pattern, choice.message.content), choice.message.content
        assert choice.finish_reason == "stop" or wanted.get("grammar")
    text = client.completions.create(
        model="tiny", prompt="x", max_tokens=20, extra_body={"structured_outputs": wanted}
    ).choices[0].text  # fmt: skip
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nope"}}}},
         "response_format", "Invalid type: nope"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
         "response_format", "Unimplemented keys"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs", "invalid regular expression"),
        ({"extra_body": {"structured_outputs": {"json": "{"}}}, "structured_outputs", "is not JSON"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
          "tool_choice": "required"}, "tools", "invalid grammar"),
    ],
)  # fmt: skip
def test_bad_schemas_are_400(client, fields, param, message):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            ask(client, **fields, stream=stream)
        assert caught.value.body["param"] == param


def test_log_probabilities_of_constrained_tokens(client):
    choice = ask(
        client, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}}, logprobs=True, top_logprobs=3
    ).choices[0]
    assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
    assert all(len(t.top_logprobs) == 3 for t in choice.logprobs.content)


def test_the_async_client_side_by_side(server):
    async def one(client, seed):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=300, seed=seed, stream=True, tools=[WEATHER],
            tool_choice="required", parallel_tool_calls=False,
        )  # fmt: skip
        pieces = [p async for c in stream for p in c.choices[0].delta.tool_calls or []]
        return "".join(p.function.arguments for p in pieces)

    async def talk():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, seed) for seed in range(12)))
            alone = [await one(client, seed) for seed in range(3)]
        return together, alone

    together, alone = asyncio.run(talk())
    assert together[:3] == alone
    assert len(set(together)) > 6
    for arguments in together:
        assert json.loads(arguments)["unit"] in "CF"


def test_plain_httpx(server):
    with httpx.Client(base_url=server.url, timeout=30) as http:
        body = {"prompt": "Once", "max_tokens": 5, "stream": True, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert response.headers["content-type"].startswith("text/event-stream")
        assert lines[-1] == "[DONE]"
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        assert text == http.post("/v1/completions", json={**body, "stream": False}).json()["choices"][0]["text"]
        deep = http.get("/health/deep").json()
        assert (deep["status"], deep["compared"]) == ("ok", 1)


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model="tiny", max_tokens=200, seed=2)
    message = chat.invoke("Hello")
    assert message.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == message.content
    called = chat.bind_tools([WEATHER], tool_choice="required", parallel_tool_calls=False).invoke("Weather?")
    [call] = called.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["unit"] in "CF"
    for method in ("json_schema", "function_calling"):
        found = chat.with_structured_output(Answer, method=method).invoke("Yes or no?")
        assert isinstance(found, Answer)
    texts = asyncio.run(chat.abatch(["a", "b", "c"]))
    assert len(texts) == 3
