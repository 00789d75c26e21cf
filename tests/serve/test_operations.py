"""Operations: keys, limits, ids and logs, metrics, health, full queues, deadlines, engines that are stuck."""

import asyncio
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families

from llmopt.errors import ConfigError, ExecutorError
from llmopt.runtime.core import TokenOutput
from llmopt.runtime.protocol import Sampled
from llmopt.serve.errors import ApiError
from llmopt.serve.health import Canary, DeepHealth
from llmopt.serve.metrics import FIRST_TOKEN, Buckets
from llmopt.serve.security import load_keys
from llmopt.serve.tokens import tokenize
from tests.serve.conftest import CLIENT, until

BODY = {"prompt": "Hi", "temperature": 0, "max_tokens": 5}


def post(server, body=BODY, path="/v1/completions", **options):
    return CLIENT.post(server.url + path, json=body, **options)


def values(server):
    """Samples of /metrics: value by name and labels."""
    text = CLIENT.get(f"{server.url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *s.labels.values()): s.value for s in samples}


def test_api_keys(start):
    server = start(keys={"s3cret": "ann", "other": "bob"}, log=True)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
        for path in ("/v1/completions", "/tokenize"):
            response = post(server, path=path, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert post(server, headers={"authorization": "Bearer s3cret"}).status_code == 200
    for path in ("/health", "/metrics", "/version"):
        assert httpx.get(server.url + path).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    code, log = server.wait()
    assert code == 0
    assert "s3cret" not in log
    answered = [line for line in map(json.loads, log.splitlines()) if line.get("tenant")]
    assert [(line["tenant"], line["status"]) for line in answered] == [("ann", 200)]


def test_keys_of_files_and_of_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nann k1\nk2  # no name\n\n")
    keys = load_keys(file, {"LLMOPT_API_KEYS": "k3,k4"})
    assert len(keys) == 4
    assert keys.tenant("Bearer k1") == "ann"
    assert keys.tenant("bearer k2").startswith("key-")
    assert keys.tenant("Bearer k3") != keys.tenant("Bearer k4")
    assert load_keys(None, {}).tenant(None) == ""
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        load_keys(file, {})
    with pytest.raises(ConfigError, match="cannot read"):
        load_keys(tmp_path / "none", {})


def test_request_ids_and_logs(start):
    server = start(log=True)
    assert post(server, headers={"x-request-id": "my-1"}).headers["x-request-id"] == "my-1"
    made = post(server, headers={"x-request-id": 'a b"}'}).headers["x-request-id"]
    assert len(made) == 32
    stream = post(server, {**BODY, "stream": True, "temperature": -1})
    assert stream.status_code == 400
    server.process.send_signal(signal.SIGTERM)
    _, log = server.wait()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["event"] for line in lines] == ["serving", "request", "request", "request", "draining", "stopped"]
    first = lines[1]
    assert (first["id"], first["method"], first["path"], first["status"]) == ("my-1", "POST", "/v1/completions", 200)
    assert first["completion_tokens"] == 5
    assert lines[2]["id"] == made
    assert lines[3]["status"] == 400


def test_other_sites_may_not_use_it_unless_told(start):
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    closed, opened = start(), start(origins=["https://a.example"])
    assert "access-control-allow-origin" not in post(closed, headers=headers).headers
    assert post(opened, headers=headers).headers["access-control-allow-origin"] == "https://a.example"
    allowed = httpx.options(f"{opened.url}/v1/completions", headers=headers)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    other = post(opened, headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_limits(start):
    server = start(limits={"body_bytes": 1000, "choices": 2, "output_tokens": 6})
    assert post(server, {**BODY, "prompt": "a" * 1000}).status_code == 413
    assert post(server, {**BODY, "n": 3}).status_code == 400
    over = post(server, {**BODY, "max_tokens": 7}).json()["error"]
    assert (over["param"], over["message"]) == ("max_tokens", "max_tokens is 7, this server allows 6")
    chat = post(server, {"messages": [{"role": "user", "content": "Hi"}]}, "/v1/chat/completions").json()
    assert chat["usage"]["completion_tokens"] == 6


@given(st.lists(st.floats(0, 10), max_size=40))
def test_buckets_are_prometheus_clients(found):
    theirs, ours = Histogram("h", "h", buckets=FIRST_TOKEN, registry=None), Buckets(FIRST_TOKEN)
    for value in [*found, *FIRST_TOKEN]:
        theirs.observe(value)
        ours.observe(value)
    expected = {(s.name, s.labels.get("le")): s.value for m in theirs.collect() for s in m.samples}
    counted = {(s.name, s.labels.get("le")): s.value for s in ours.family("h", "h").samples}
    assert counted == {key: value for key, value in expected.items() if key[0] != "h_created"}


def test_metrics_count_what_clients_saw(start):
    server = start()
    before = values(server)
    assert before[("llmopt_engine_up",)] == 1
    usage = [
        post(server, {**BODY, "n": 2}).json()["usage"],
        post(server, {**BODY, "stop_token_ids": [3]}).json()["usage"],
    ]
    post(server, {**BODY, "temperature": -1})
    found = values(server)
    tokens = sum(u["completion_tokens"] for u in usage)
    assert found[("llmopt_generation_tokens_total",)] == tokens
    assert found[("llmopt_prompt_tokens_total",)] == 3 * usage[0]["prompt_tokens"]
    assert found[("llmopt_requests_total", "length")] == 3
    assert found[("llmopt_queue_time_seconds_count",)] == found[("llmopt_time_to_first_token_seconds_count",)] == 3
    assert 0 <= found[("llmopt_queue_time_seconds_sum",)] <= found[("llmopt_time_to_first_token_seconds_sum",)]
    assert found[("llmopt_inter_token_latency_seconds_count",)] == tokens - 3
    assert found[("llmopt_http_requests_total", "/v1/completions", "200")] == 2
    assert found[("llmopt_http_requests_total", "/v1/completions", "400")] == 1
    end = time.monotonic() + 30
    while values(server)[("llmopt_kv_blocks",)] != 120:  # the engine's values come once a second
        assert time.monotonic() < end
        time.sleep(0.1)


def test_tokens(server, tokenizer):
    ids = tokenizer.encode("Once upon a time")
    found = post(server, {"prompt": "Once upon a time", "return_token_strs": True}, "/tokenize").json()
    assert (found["tokens"], found["count"], found["max_model_len"]) == (ids, len(ids), 96)
    assert "".join(found["token_strs"]) == "Once upon a time"
    assert post(server, {"tokens": ids}, "/detokenize").json() == {"prompt": "Once upon a time"}
    chat = post(server, {"messages": [{"role": "user", "content": "Hi"}]}, "/tokenize").json()["tokens"]
    assert tokenizer.decode(chat, skip_special=False) == "<|user|>Hi\n<|assistant|>"
    for path, body, what in (
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", [1], "JSON object"),
        ("/detokenize", {"tokens": [4096]}, "token 4096 is not in"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [1], "x": 1}, "x: Extra inputs"),
    ):
        response = post(server, body, path)
        assert response.status_code == 400
        assert what in response.json()["error"]["message"]


def test_a_text_too_long_to_tokenize_is_refused_before_it_is(server):
    most = 1 << 20
    assert post(server, {"prompt": "a" * most}, "/tokenize").status_code == 200
    for body, param, count in (
        ({"prompt": "a" * (most + 1)}, "prompt", most + 1),
        ({"messages": [{"role": "user", "content": "a" * most}]}, "messages", most + len("<|user|>\n<|assistant|>")),
    ):
        response = post(server, body, "/tokenize")
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (413, "text_too_long", param)
        assert f"{count} characters" in error["message"]


def test_a_long_context_may_be_tokenized_whole():
    model = SimpleNamespace(
        engine=SimpleNamespace(context=1 << 17), tokenizer=SimpleNamespace(encode=lambda *_, **__: [])
    )
    assert tokenize({"prompt": "a" * (1 << 21)}, model)["count"] == 0
    with pytest.raises(ApiError, match="/tokenize takes 2097152 at most"):
        tokenize({"prompt": "a" * ((1 << 21) + 1)}, model)


class Source:
    """Answers every prompt with the same tokens."""

    def __init__(self, tokens, delay=0.0):
        self.tokens, self.delay, self.runs = tokens, delay, 0

    async def generate(self, prompt, params):
        self.runs += 1
        for token in self.tokens[: params.max_tokens]:
            await asyncio.sleep(self.delay)
            yield TokenOutput(1, Sampled(token))


GOLDEN = {"prompt": [5, 6], "tokens": [7, 8, 9], "margins": [3.0, 2.5, 0.1]}


def test_the_canary_compares_what_is_certain():
    canary = Canary.of([{**GOLDEN, "margins": [0.1, 9, 9]}, GOLDEN], 90)
    assert canary == Canary((5, 6), (7, 8))
    assert Canary.of([GOLDEN], 3) == Canary((0,), ())

    async def talk():
        source = Source([7, 8, 1])
        deep = DeepHealth(source, canary)
        found = await asyncio.gather(*(deep.check() for _ in range(5)))
        assert source.runs == 1
        assert found[0]["compared"] == 2
        with pytest.raises(ExecutorError, match=r"canary's tokens are \[7, 1\]"):
            await DeepHealth(Source([7, 1]), canary).check()
        with pytest.raises(ExecutorError, match=r"no answer to the canary within 0\.1 seconds"):
            await DeepHealth(Source([7, 8], delay=1), canary, patience=0.1).check()

    asyncio.run(talk())


def test_deep_health_runs_the_engine(server):
    before = values(server)[("llmopt_generation_tokens_total",)]
    assert CLIENT.get(f"{server.url}/health/deep").json()["status"] == "ok"
    assert values(server)[("llmopt_generation_tokens_total",)] == before  # the canary is nobody's request


def together(server, count, body):
    """Responses of as many requests at once."""
    found = [None] * count

    def one(i):
        found[i] = post(server, body)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429(start, stream):
    server = start({"sleep": 0.05, "queue": {"max_waiting": 2}})
    found = together(server, 16, {**BODY, "max_tokens": 20, "stream": stream})
    codes = [r.status_code for r in found]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 2
    for response in found:
        if response.status_code == 429:
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert response.json()["error"]["code"] == "rate_limit_exceeded"
            assert int(response.headers["retry-after"]) >= 1
    assert post(server).status_code == 200


def test_a_missed_deadline_is_504(start):
    server = start({"sleep": 0.1}, limits={"seconds": 2.0})
    response = post(server, {**BODY, "max_tokens": 80})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert post(server, {**BODY, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("how", ["stopped process", "step without end"])
def test_a_stuck_engine_is_503_and_ends_the_server(start, how):
    server = start({"sleep": 1000} if how == "step without end" else {"sleep": 0.05}, stuck_seconds=1.0)
    found = []
    thread = threading.Thread(target=lambda: found.append(post(server, {**BODY, "max_tokens": 80})))
    thread.start()
    engine = server.engine_pid()
    if how == "stopped process":
        until(lambda: CLIENT.get(f"{server.url}/health").json()["active_requests"])
        os.kill(engine, signal.SIGSTOP)
    begun = time.monotonic()
    thread.join(20)
    assert time.monotonic() - begun < 15  # the step takes a thousand seconds
    assert found[0].status_code == 503
    assert "it is stuck" in found[0].json()["error"]["message"]
    assert "retry-after" in found[0].headers
    assert CLIENT.get(f"{server.url}/health").status_code == 503
    assert CLIENT.get(f"{server.url}/health/deep").status_code == 503
    code, errors = server.wait()
    assert code == 12
    assert "it is stuck" in errors


def test_a_slow_engine_is_not_stuck(start):
    server = start({"sleep": 0.8}, stuck_seconds=3.0)
    assert post(server, {**BODY, "max_tokens": 4}).status_code == 200
