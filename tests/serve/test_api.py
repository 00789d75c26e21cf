"""The HTTP API over a fake engine: answers equal the oracle's, streams add up, errors are OpenAI's."""

import json
import math
import re

import pytest

from llmopt import __version__
from tests.runtime.fake import oracle
from tests.serve.fake_engine import CONTEXT, PLAN, VOCAB

GREEDY = {"temperature": 0, "max_tokens": 12}


def expected(tokenizer, prompt, count=12):
    """Greedy tokens of a prompt."""
    return oracle(tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, count, PLAN, VOCAB)


def events(response):
    """Decoded server-sent events; the last one must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def post(api, path, **body):
    """A request that must succeed."""
    response = api.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def test_a_completion(api, tokenizer):
    body = post(api, "/v1/completions", prompt="Once upon", **GREEDY).json()
    tokens = expected(tokenizer, "Once upon")
    assert body["object"] == "text_completion"
    assert body["model"] == "fake"
    assert body["choices"] == [
        {"index": 0, "text": tokenizer.decode(tokens), "logprobs": None, "finish_reason": "length"}
    ]
    prompt = len(tokenizer.encode("Once upon"))
    assert counts(body) == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}


def counts(body):
    """The usage but for what the prefix cache had, which depends on the requests before."""
    return {key: value for key, value in body["usage"].items() if key != "prompt_tokens_details"}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_usage_says_what_the_prefix_cache_had(api, path, stream, n):
    text = "one two three four five six seven"
    asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}

    def cached(salt):
        response = post(api, path, **asked, **GREEDY, n=n, cache_salt=f"{path}{stream}{n}{salt}")
        usage = events(response)[-1]["usage"] if stream else response.json()["usage"]
        assert set(usage["prompt_tokens_details"]) == {"cached_tokens"}
        return usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    first, second, other = cached("a"), cached("a"), cached("b")
    assert (first[0], other[0]) == (0, 0)
    assert second == (first[1] - 1, first[1])


def test_the_default_of_a_completion_is_16_tokens(api):
    assert post(api, "/v1/completions", prompt="a", temperature=0).json()["usage"]["completion_tokens"] == 16


def test_a_chat_completion(api, tokenizer):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    body = post(api, "/v1/chat/completions", messages=messages, **GREEDY).json()
    rendered = "<|assistant|>Be.\n<|user|>Hi\n<|assistant|>"
    tokens = oracle(tokenizer.encode(rendered, special=False), 12, PLAN, VOCAB)
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": tokenizer.decode(tokens), "refusal": None}
    assert body["object"] == "chat.completion"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_adds_up_to_the_whole(api, path, n):
    chat = "chat" in path
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Hi", "echo": True}
    fields = {**prompt, "n": n, "temperature": 1.5, "seed": 4, "max_tokens": 10}
    whole = post(api, path, **fields).json()
    chunks = events(post(api, path, **fields, stream=True, stream_options={"include_usage": True}))
    last = chunks.pop()
    assert last["choices"] == []
    assert counts(last) == counts(whole)
    assert all(c["usage"] is None for c in chunks)
    assert len({c["id"] for c in [*chunks, last]}) == 1
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        texts = [c["delta"].get("content", "") if chat else c["text"] for c in mine]
        assert "".join(texts) == (choice["message"]["content"] if chat else choice["text"])
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
        if chat:
            assert mine[0]["delta"]["role"] == "assistant"
    assert len(whole["choices"]) == n


def test_seeds_repeat_and_choices_differ(api):
    fields = {"prompt": "Hi", "n": 3, "temperature": 50.0, "seed": 4, "max_tokens": 10}
    texts = [[c["text"] for c in post(api, "/v1/completions", **fields).json()["choices"]] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    alone = post(api, "/v1/completions", **{**fields, "n": 1}).json()["choices"][0]["text"]
    assert alone == texts[0][0]


@pytest.mark.parametrize("make", [lambda t: ["Hi", "Once"], lambda t: [t.encode("Hi"), t.encode("Once")]])
def test_several_prompts(api, tokenizer, make):
    body = post(api, "/v1/completions", prompt=make(tokenizer), n=2, **GREEDY).json()
    texts = [tokenizer.decode(expected(tokenizer, p)) for p in ("Hi", "Once") for _ in range(2)]
    assert [c["text"] for c in body["choices"]] == texts
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]


def test_one_prompt_of_token_ids_with_echo(api, tokenizer):
    ids = tokenizer.encode("Once upon")
    body = post(api, "/v1/completions", prompt=ids, echo=True, **GREEDY).json()
    assert body["choices"][0]["text"] == "Once upon" + tokenizer.decode(expected(tokenizer, ids))


def test_a_stop_string_ends_the_text(api, tokenizer):
    text = tokenizer.decode(expected(tokenizer, "Hi", 12))
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = text[: text.index(stop)]
    body = post(api, "/v1/completions", prompt="Hi", stop=stop, **GREEDY).json()
    assert body["choices"][0] == {"index": 0, "text": cut, "logprobs": None, "finish_reason": "stop"}
    assert body["usage"]["completion_tokens"] < 12
    chunks = events(post(api, "/v1/completions", prompt="Hi", stop=[stop, "\x00"], stream=True, **GREEDY))
    assert "".join(c["choices"][0]["text"] for c in chunks) == cut


def test_a_stop_token_ends_the_text(api, tokenizer):
    tokens = expected(tokenizer, "Hi", 12)
    body = post(api, "/v1/completions", prompt="Hi", stop_token_ids=[tokens[5]], logprobs=0, **GREEDY).json()
    assert body["choices"][0]["text"] == tokenizer.decode(tokens[: tokens.index(tokens[5])])
    assert body["choices"][0]["finish_reason"] == "stop"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == tokens.index(tokens[5])


def test_log_probabilities_of_a_chat(api, tokenizer):
    fields = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 2, **GREEDY}
    body = post(api, "/v1/chat/completions", **fields).json()
    content = body["choices"][0]["logprobs"]["content"]
    said = b"".join(bytes(t["bytes"]) for t in content)
    assert said.decode("utf-8", "replace") == body["choices"][0]["message"]["content"]
    assert all(len(t["top_logprobs"]) == 2 for t in content)
    assert all(t["top_logprobs"][0]["logprob"] == t["logprob"] < 0 for t in content)
    chunks = events(post(api, "/v1/chat/completions", **fields, stream=True))
    reports = [c["choices"][0]["logprobs"] for c in chunks]
    assert [t for r in reports if r for t in r["content"]] == content


def test_log_probabilities_of_a_completion(api, tokenizer):
    body = post(api, "/v1/completions", prompt="Hi", logprobs=3, **GREEDY).json()
    report = body["choices"][0]["logprobs"]
    assert len(report["tokens"]) == len(report["token_logprobs"]) == len(report["top_logprobs"]) == 12
    assert report["text_offset"][0] == 0
    check_offsets(body["choices"][0]["text"], report)


def check_offsets(text, report):
    """Every token that is text by itself stands at its offset, or behind the replacement of a cut character."""
    whole = [(o, t) for o, t in zip(report["text_offset"], report["tokens"]) if not t.startswith("bytes:")]
    assert len(whole) > 5
    assert all(text[o:].startswith((t, "\ufffd" + t)) for o, t in whole)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_has_log_probabilities(api, tokenizer, stream):
    ids = [*tokenizer.encode("Once upon a time"), 7, 8, 9]
    fields = {"prompt": ids, "echo": True, "logprobs": 2, **GREEDY}
    if stream:
        choices = [c["choices"][0] for c in events(post(api, "/v1/completions", **fields, stream=True))]
    else:
        choices = post(api, "/v1/completions", **fields).json()["choices"]
    text = "".join(c["text"] for c in choices)
    assert text == tokenizer.decode(ids) + tokenizer.decode(expected(tokenizer, ids))
    reports = [c["logprobs"] for c in choices if c["logprobs"]]
    report = {name: [v for r in reports for v in r[name]] for name in reports[0]}
    assert report["token_logprobs"][0] is report["top_logprobs"][0] is None
    likely = math.log(3 / (VOCAB + 2))  # what the fake engine gives to the id after the last one
    for i, logprob in enumerate(report["token_logprobs"][1 : len(ids)], 1):
        assert logprob == pytest.approx(likely if ids[i] == ids[i - 1] + 1 else likely - math.log(3), abs=1e-4)
    check_offsets(text, report)


def test_a_prompt_is_scored_without_generating(api, tokenizer):
    body = post(api, "/v1/completions", prompt=[5, 6], echo=True, logprobs=0, max_tokens=0).json()
    [choice] = body["choices"]
    assert choice["text"] == tokenizer.decode([5, 6])
    assert len(choice["logprobs"]["tokens"]) == 2
    assert counts(body) == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_prompt_log_probabilities_of_a_chat(api, tokenizer):
    body = post(api, "/v1/chat/completions", **CHAT, prompt_logprobs=1, max_tokens=1).json()
    first, *rest = body["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(rest) == body["usage"]["prompt_tokens"] - 1
    assert all(entry["logprob"] < 0 for position in rest for entry in position.values())
    assert all(1 <= len(position) <= 2 for position in rest)


def test_logit_bias_and_the_extensions_reach_the_sampler(api, tokenizer):
    token = tokenizer.encode("the")[0]
    body = post(api, "/v1/completions", prompt="Hi", logit_bias={str(token): 100}, **GREEDY).json()
    assert body["choices"][0]["text"] == tokenizer.decode([token] * 12)
    hot = {"prompt": "Hi", "temperature": 50.0, "seed": 1, "max_tokens": 12}
    greedy = tokenizer.decode(expected(tokenizer, "Hi"))
    assert post(api, "/v1/completions", **hot).json()["choices"][0]["text"] != greedy
    for cold in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert post(api, "/v1/completions", **hot, **cold).json()["choices"][0]["text"] == greedy


def test_models_health_and_version(api):
    card = api.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("fake", "model", CONTEXT)
    assert api.get("/v1/models/fake").json() == card
    assert api.get("/health").json() == {"status": "ok", "active_requests": 0}
    assert api.get("/version").json() == {"version": __version__}


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        ("completions", {}, 400, "prompt", "prompt is required"),
        ("completions", {"prompt": ""}, 400, "prompt", "the prompt is empty"),
        ("completions", {"prompt": []}, 400, "prompt", "the prompt is empty"),
        ("completions", {"prompt": [[]]}, 400, "prompt", "the prompt is empty"),
        ("completions", {"prompt": 5}, 400, "prompt", "prompt: Input should be a valid string"),
        ("completions", {"prompt": [1] * 200}, 400, "prompt", "has 200 tokens and the context is 96"),
        ("completions", {"prompt": "word " * 9000}, 400, "prompt", "more than 96 tokens and the context is 96"),
        ("completions", {"prompt": [99999]}, 400, None, "prompt token 99999"),
        ("completions", {"prompt": "a", "temperatur": 1}, 400, "temperatur", "did you mean temperature?"),
        ("completions", {"prompt": "a", "temperature": "1"}, 400, "temperature", "valid number"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, None, "temperature must be at least 0"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, None, "max_tokens must be at least 1"),
        ("completions", {"prompt": "a", "n": 0}, 400, "n", "greater than or equal to 1"),
        ("completions", {"prompt": "a", "logprobs": 21}, 400, None, "logprobs must be in"),
        ("completions", {"prompt": "a", "guided_regex": "a"}, 400, "guided_regex", "use structured_outputs"),
        ("completions", {"prompt": "a", "logprobs": 21, "echo": True}, 400, None, "logprobs must be in"),
        ("completions", {"prompt": "a", "priority": 1 << 40}, 400, None, "priority must be in"),
        ("completions", {"prompt": ["a"] * 50, "n": 3}, 400, "n", "asks for 150 choices, this server allows 128"),
        ("completions", {"prompt": "a", "structured_outputs": {}}, 400, "structured_outputs", "give one of json"),
        ("completions", {"prompt": "a", "suffix": "x"}, 400, "suffix", "suffix is not supported"),
        ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "best_of is not supported"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "must be token ids"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 101}}, 400, None, "must be in [-100, 100]"),
        ("completions", {"prompt": "a", "top_k": -2}, 400, "top_k", "top_k must be"),
        ("completions", {"prompt": "a", "stop": ["a"] * 17}, 400, None, "at most 16"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "stream_options", "needs stream"),
        ("completions", {"prompt": "a", "model": "other"}, 404, "model", "'other' does not exist"),
        ("chat/completions", {}, 400, "messages", "messages is required"),
        ("chat/completions", {"messages": []}, 400, None, "no messages"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "messages.0.role: "),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "tools.0.function is required"),
        ("chat/completions", {**CHAT, "tools": [TOOL, TOOL]}, 400, "tools", "two tools have the same name"),
        ("chat/completions", {**CHAT, "tool_choice": "required"}, 400, "tool_choice", "needs tools"),
        (
            "chat/completions",
            {**CHAT, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            400,
            "tool_choice",
            "there is no tool 'g'",
        ),
        ("chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "response_format", "json_schema"),
        ("chat/completions", {**CHAT, "functions": [{}]}, 400, "functions", "use tools"),
        (
            "chat/completions",
            {**CHAT, "chat_template_kwargs": {"messages": []}},
            400,
            "chat_template_kwargs",
            "may not set messages",
        ),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            None,
            "'image_url' is not supported",
        ),
    ],
)
def test_bad_requests(api, path, body, status, param, message):
    for stream in ({}, {"stream": True}) if "stream_options" not in body else ({},):
        response = api.post(f"/v1/{path}", json={**body, **stream})
        error = response.json()["error"]
        assert response.status_code == status
        assert message in error["message"]
        assert error["param"] == param
        assert error["type"] == ("invalid_request_error" if status == 400 else "not_found_error")
    assert api.get("/health").json()["active_requests"] == 0


def test_fields_that_ask_for_nothing_are_accepted(api):
    nothing = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "top_k": -1}
    post(api, "/v1/chat/completions", **CHAT, **GREEDY, **nothing, user="me", metadata={"a": "b"}, stop=None)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{nope", 400, "the body is not JSON"),
        (b'{"prompt": "\xff"}', 400, "the body is not UTF-8: byte 12 is 0xff"),
        (b"[1]", 400, "must be a JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"prompt": "\\ud800"}', 400, "not valid Unicode"),
        (b" " * (17 << 20), 413, "larger than"),
    ],
    ids=["json", "utf8", "list", "deep", "surrogate", "large"],
)
def test_bad_bodies(api, content, status, message):
    response = api.post("/v1/completions", content=content)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_openai_bodies(api):
    for response, status in ((api.get("/v2"), 404), (api.get("/v1/completions"), 405), (api.get("/v1/models/x"), 404)):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_without_a_template_there_is_no_chat(start):
    import httpx

    url = start({"chat": False}).url
    response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


def test_the_official_client(server, tokenizer):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["fake"]
    text = tokenizer.decode(expected(tokenizer, "Hi"))
    done = client.completions.create(model="fake", prompt="Hi", temperature=0, max_tokens=12, logprobs=1)
    assert done.choices[0].text == text
    assert done.choices[0].logprobs.tokens
    chat = client.chat.completions.create(model="fake", **CHAT, temperature=0, max_tokens=12, logprobs=True)
    stream = client.chat.completions.create(
        model="fake",
        **CHAT,
        temperature=0,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == chat.choices[0].message.content
    assert chunks[-1].usage.total_tokens == chat.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="fake", prompt="")


def test_the_openapi_document(api):
    document = api.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(document["paths"])
    text = json.dumps(document)
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', text)):
        found = document
        for step in reference.split("/"):
            found = found[step]
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]
    assert chat["additionalProperties"] is False
