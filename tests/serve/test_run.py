"""llmopt run: prompts, chats, files of requests; bad input is one line and leaves nothing."""

import io
import json
import re
import sys

import pytest

from llmopt.cli.main import run
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import SamplingParams
from llmopt.runtime.session import open_session
from llmopt.target import LoadOptions


@pytest.fixture(scope="module")
def artifact(compiled):
    """The embedded model for onnxruntime, context 128."""
    return compiled(128)


@pytest.fixture(scope="module")
def answers(artifact):
    """``answers(prompt, count)`` → the greedy completion."""
    with open_session(artifact, LoadOptions(max_sequences=1)) as session:
        yield lambda prompt, count: session.engine.generate(
            [prompt], GenerationParams(SamplingParams(temperature=0), max_tokens=count)
        )[0]


@pytest.fixture
def stdin(monkeypatch):
    """Replaces standard input by bytes."""

    def put(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


@pytest.fixture
def llmopt(artifact, capsys):
    """Runs ``llmopt run ARTIFACT …``; returns exit code, stdout, stderr."""

    def go(*arguments):
        capsys.readouterr()
        code = run(["run", str(artifact), *map(str, arguments)])
        return code, *capsys.readouterr()

    return go


def chat_prompt(*turns):
    """What the embedded model's template makes of user and assistant turns."""
    names = ["<|user|>", "<|assistant|>"]
    return "".join(f"{names[i % 2]}{turn}\n" for i, turn in enumerate(turns)) + "<|assistant|>"


def test_a_prompt(llmopt, answers):
    assert llmopt("-p", "Call me", "--max-tokens", 9) == (0, answers("Call me", 9).text + "\n", "")


def test_a_prompt_on_standard_input(llmopt, answers, stdin):
    stdin("Call me naïve".encode())
    assert llmopt("--max-tokens", 5)[1] == answers("Call me naïve", 5).text + "\n"


def test_json(llmopt, answers):
    code, out, _ = llmopt("-p", "Call me", "--max-tokens", 9, "--json")
    expected = answers("Call me", 9)
    assert json.loads(out) == {
        "text": expected.text,
        "tokens": list(expected.tokens),
        "finish_reason": "length",
        "usage": {"prompt_tokens": expected.prompt_tokens, "completion_tokens": 9},
    }
    assert code == 0


def test_sampling_flags_reach_the_sampler(llmopt, answers):
    flags = ("-p", "Call me", "--max-tokens", 12, "--temperature", 30, "--seed", 5)
    drawn = llmopt(*flags)
    assert drawn == llmopt(*flags)
    greedy = answers("Call me", 12).text + "\n"
    assert drawn[1] != greedy
    assert drawn[1] != llmopt(*flags[:-1], 6)[1]
    for cold in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)):
        assert llmopt(*flags, *cold)[1] == greedy
    stop = answers("Call me", 12).text[5:8]
    assert llmopt("-p", "Call me", "--max-tokens", 12, "--stop", stop)[1] == greedy[: greedy.index(stop)] + "\n"
    for penalty in ("--repetition-penalty", "--presence-penalty", "--frequency-penalty"):
        assert llmopt("-p", "Call me", "--max-tokens", 60, penalty, 2)[1] != answers("Call me", 60).text + "\n"


def test_a_chat_remembers_its_turns(llmopt, answers, stdin):
    stdin(b"Hi\n\nWho?\n")
    first = answers(chat_prompt("Hi"), 6).text
    second = answers(chat_prompt("Hi", first, "Who?"), 6).text
    assert llmopt("--chat", "--max-tokens", 6) == (0, f"{first}\n{second}\n", "")


def test_one_chat_message_with_a_system_message(llmopt, answers):
    code, out, _ = llmopt("--chat", "-p", "Hi", "--system", "Be brief.", "--max-tokens", 6)
    assert (code, out) == (0, answers("<|assistant|>Be brief.\n" + chat_prompt("Hi"), 6).text + "\n")


def test_a_file_of_requests(llmopt, answers, tmp_path):
    lines = [
        {"prompt": "Call me", "max_tokens": 4},
        {"messages": [{"role": "user", "content": "Hi"}], "custom_id": "b"},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions",
         "body": {"prompt": ["Call me", "Hi"], "max_tokens": 5, "temperature": 0, "n": 2}},
        {"custom_id": "d", "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 3, "temperature": 0}},
    ]  # fmt: skip
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(json.dumps(line) for line in lines))
    for sequences in (1, 4):
        code, out, _ = llmopt("--input", source, "--output", target, "--max-tokens", 7, "--max-sequences", sequences)
        assert (code, out) == (0, "")
        plain, chat, batch, batch_chat = map(json.loads, target.read_text().splitlines())
        expected = answers("Call me", 4)
        assert plain["text"] == expected.text
        assert plain["tokens"] == list(expected.tokens)
        assert chat["text"] == answers(chat_prompt("Hi"), 7).text
        assert chat["custom_id"] == "b"
        assert batch["custom_id"] == "c"
        assert batch["response"]["status_code"] == 200
        texts = [c["text"] for c in batch["response"]["body"]["choices"]]
        assert texts == [answers(p, 5).text for p in ("Call me", "Hi") for _ in range(2)]
        assert batch["response"]["body"]["usage"]["completion_tokens"] == 20
        message = batch_chat["response"]["body"]["choices"][0]["message"]["content"]
        assert message == answers(chat_prompt("Hi"), 3).text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert llmopt("--input", source)[1].count("\n") == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "line 3: invalid UTF-8: byte 0xff at column 13"),
        (b"{nope", "line 3: not JSON"),
        (b"[1]", "line 3: expected a JSON object"),
        (b'{"prompt": ""}', "line 3: the prompt is empty"),
        (b'{"prompt": [' + b"1," * 200 + b"1]}", "line 3: the prompt has 201 tokens and the context is 128"),
        (b'{"prompt": "a", "temperatur": 1}', "line 3: unknown field 'temperatur' (did you mean temperature?)"),
        (b'{"prompt": "a", "temperature": -1}', "line 3: temperature must be at least 0"),
        (b'{"prompt": "a", "stream": true}', "line 3: a file of requests cannot stream"),
        (b'{"prompt": "a", "n": 2}', "line 3: several answers to one line need the batch form"),
        (
            b'{"messages": [], "tools": [{"type": "function", "function": {"name": "f"}}]}',
            "line 3: tool calls need the batch",
        ),
        (b'{"custom_id": "x", "url": "/v1/embeddings", "body": {}}', "line 3: cannot POST to /v1/embeddings"),
        (b'{"custom_id": "x", "url": "/v1/completions"}', "line 3: the body must be a JSON object"),
        (b'{"url": "/v1/completions", "body": {}}', "line 3: the batch form needs a custom_id"),
        (b'{"custom_id": "x", "url": "/v1/completions", "body": {}, "boby": 1}', "line 3: unknown field 'boby' beside"),
        (
            b'{"prompt": "a", "custom_id": "x"}\n{"prompt": "a", "custom_id": "x"}',
            "line 4: custom_id 'x' is that of line 3",
        ),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(llmopt, tmp_path, line, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    code, out, err = llmopt("--input", source, "--output", target)
    assert (code, out) == (11, "")
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_output_that_exists_survives_a_failure_and_the_rest_is_done_later(llmopt, tmp_path, monkeypatch):
    from llmopt.serve import journal

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    target.write_text("old")
    command = ("--input", source, "--output", target, "--max-tokens", 2, "--max-sequences", 1)
    with monkeypatch.context() as patch:
        add, calls = journal.Journal.add, []

        def failing(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return add(*arguments)

        patch.setattr(journal.Journal, "add", failing)
        code, _, err = llmopt(*command)
    assert code == 10
    assert "No space left" in err
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.partial"]
    assert "holds the results of another run" in llmopt(*command, "--temperature", 1)[2]
    assert llmopt(*command) == (0, "", "resumed: 1 of 2 requests had been answered before\n")
    assert target.read_text() == llmopt(*command[:2], *command[4:])[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_the_api_would_refuse_is_answered_in_its_line(llmopt, answers, tmp_path):
    source = tmp_path / "in.jsonl"
    bodies = [
        {"prompt": "a", "temperatur": 1},
        {"prompt": "a", "stream": True},
        {"prompt": [1] * 201},
        {"prompt": "a", "model": "gpt"},
        {"prompt": [1 << 40], "echo": True},
        {
            "prompt": "a",
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}},
        },
        {"prompt": "Call me", "model": "whale", "max_tokens": 3, "temperature": 0},
    ]
    lines = [{"custom_id": str(i), "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)]
    source.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = llmopt("--input", source, "--served-model-name", "whale")
    assert (code, err) == (0, "6 of 7 requests were refused: their lines say why\n")
    found = [json.loads(line) for line in out.splitlines()]
    assert [f["custom_id"] for f in found] == list("0123456")
    assert [f["response"]["status_code"] for f in found] == [400, 400, 400, 404, 400, 400, 200]
    assert [f["response"]["body"]["error"]["param"] for f in found[:2]] == ["temperatur", "stream"]
    assert "201 tokens" in found[2]["response"]["body"]["error"]["message"]
    assert found[6]["response"]["body"]["choices"][0]["text"] == answers("Call me", 3).text


def test_a_line_may_ask_for_a_form(llmopt, tmp_path):
    source = tmp_path / "in.jsonl"
    form = {"regex": "(yes|no), [0-9]{3}"}
    body = {"messages": [{"role": "user", "content": "Hi"}], "structured_outputs": form, "max_tokens": 60, "seed": 1}
    lines = [{**body, "custom_id": "plain"}, {"custom_id": "batch", "url": "/v1/chat/completions", "body": body}]
    source.write_text("\n".join(map(json.dumps, lines)))
    code, out, err = llmopt("--input", source)
    assert (code, err) == (0, "")
    plain, batch = map(json.loads, out.splitlines())
    message = batch["response"]["body"]["choices"][0]["message"]
    for text in (plain["text"], message["content"]):
        assert re.fullmatch(form["regex"], text)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", ""], 11, "the prompt is empty"),
        (["-p", "word " * 200], 11, "tokens and the context is 128"),
        (["-p", "a", "--temperature", "-1"], 11, "temperature must be at least 0"),
        (["-p", "a", "--max-tokens", "0"], 11, "max_tokens must be at least 1"),
        (["--input", "/nowhere.jsonl"], 11, "/nowhere.jsonl: cannot read: No such file"),
        (["--input", "/dev/null"], 11, "the file holds no requests"),
        (["--input", "x", "-p", "a"], 2, "--input goes without --prompt"),
        (["--output", "x"], 2, "--output needs --input"),
        (["--input", "x", "--output", "./x"], 2, "--output is the --input file"),
        (["--served-model-name", "x", "-p", "a"], 2, "--served-model-name needs --input"),
        (["--system", "x", "-p", "a"], 2, "--system needs --chat"),
        (["-p", "a", "--weights", "/tmp"], 9, "weights"),
        (["-p", "a", "--device", "cuda"], 10, ""),
    ],
)
def test_errors_are_one_line_with_their_code(llmopt, arguments, code, message):
    found, out, err = llmopt(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert err.startswith("error:")
    assert err.count("\n") == 1


def test_standard_input_that_is_not_utf8_is_named(llmopt, stdin):
    stdin(b"one\ntwo \xff")
    code, _, err = llmopt()
    assert (code, err) == (11, "error: standard input line 2: invalid UTF-8: byte 0xff\n")


def test_a_prompt_as_long_as_the_context_allows(llmopt, answers):
    code, out, _ = llmopt("-p", "Call me", "--max-context", 8, "--json")
    body = json.loads(out)
    assert code == 0
    assert body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"] == 8
    assert body["finish_reason"] == "length"
