"""Fuzzed bodies: whatever comes is answered, never by a 5xx, and the server's standard error stays empty."""

import json
import os
import signal

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.serve.requests import ChatRequest, CompletionRequest
from llmopt.serve.tokens import DetokenizeRequest, TokenizeRequest

EXAMPLES = int(os.environ.get("LLMOPT_FUZZ", "150"))
"""Bodies; 10,000 are tried by hand."""
TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(["\ud800", "\x00", "user", "json_schema", "a" * 300])
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**64, 1e308, True])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}}
LIKELY = {
    "messages": [{"role": "user", "content": "Hi"}],
    "tools": [TOOL],
    "tool_choice": "required",
    "response_format": SCHEMA,
    "structured_outputs": {"regex": "a|b"},
    "stream": True,
    "logprobs": 2,
    "stop": ["a"],
    "n": 2,
    "tokens": [1, 2],
}
"""Values that get further than chance would."""
MODELS = {
    "/v1/completions": (CompletionRequest, {"prompt": "Hi", "max_tokens": 2}),
    "/v1/chat/completions": (ChatRequest, {"messages": LIKELY["messages"], "max_tokens": 2}),
    "/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}


@st.composite
def bodies(draw):
    """A path and a body that is nearly right."""
    path = draw(st.sampled_from(sorted(MODELS)))
    model, base = MODELS[path]
    body = dict(base)
    for name in draw(st.lists(st.sampled_from(sorted(model.model_fields)), max_size=4)):
        choices = [VALUES, st.just(LIKELY[name])] if name in LIKELY else [VALUES]
        body[name] = draw(st.one_of(choices))
        if isinstance(body[name], dict) and body[name] and draw(st.booleans()):
            changed = draw(st.sampled_from(sorted(body[name])))
            body[name] = {**body[name], changed: draw(VALUES)}
    if draw(st.integers(0, 9)) == 0:
        body[draw(TEXT)] = draw(VALUES)
    return path, json.dumps(body).encode()


RAW = st.tuples(st.sampled_from(sorted(MODELS)), st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v).encode()))


@pytest.fixture(scope="module")
def strict_server(server):
    """A server that must have said nothing by its end."""
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == (0, "")


@pytest.mark.slow
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=bodies() | RAW)
def test_every_body_has_an_answer(strict_server, case):
    path, body = case
    response = httpx.post(strict_server.url + path, content=body, timeout=30)
    assert response.status_code in (200, 400, 404, 413), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("opening", [b"[", b'{"prompt":', b'{"tools":[{"function":{"parameters":', b'{"a":['])
@pytest.mark.parametrize("depth", [400, 900, 50_000])
def test_deep_bodies(strict_server, opening, depth):
    closing = {b"[": b"]", b'{"prompt":': b"}"}.get(opening)
    body = opening * depth + (b"1" + closing * depth if closing else b"")
    assert httpx.post(f"{strict_server.url}/v1/completions", content=body).status_code == 400


def test_a_deep_schema(strict_server):
    schema = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    body = {
        "prompt": "a",
        "max_tokens": 2,
        "response_format": {**SCHEMA, "json_schema": {"name": "a", "schema": schema}},
    }
    assert httpx.post(f"{strict_server.url}/v1/completions", json=body).status_code == 400


def test_a_million_wrong_elements_are_one_error(strict_server):
    body = {"prompt": ["a", 1] * 500_000}
    response = httpx.post(f"{strict_server.url}/v1/completions", json=body, timeout=20)
    assert response.status_code == 400
    assert len(response.content) < 2000
    assert response.elapsed.total_seconds() < 10
