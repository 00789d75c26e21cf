"""llmopt bench serve against llmopt's own server: the engine's pace is what it measures."""

import json

import pytest

from llmopt.cli.main import run


@pytest.fixture
def bench(capsys):
    """``bench(server, *arguments)`` → the JSON document."""

    def go(server, *arguments):
        code = run(["bench", "serve", server.url, "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return go


@pytest.mark.slow
def test_it_measures_the_steps_of_the_engine(bench, start):
    """A step takes 30 ms: so does a token, and a first token takes one step and no delay of the network."""
    server = start({"sleep": 0.03})
    found = bench(server, "--requests", 6, "--concurrency", 2, "--prompt-len", 5, "--output-len", 10, "--warmup", 2)
    assert (found["succeeded"], found["output_tokens"], found["prompt_tokens"]) == (6, 60, 30)
    assert found["model"] == "fake"
    assert 30 <= found["tpot_ms"]["p50"] < 90
    assert 30 <= found["ttft_ms"]["p50"] < 180
    assert found["peak_running"] == 2


@pytest.mark.slow
def test_chats_prefixes_and_whole_answers(bench, start):
    server = start()
    prefixes = ("--shared-prefixes", 2, "--prefix-len", 8, "--prompt-len", "uniform:2:6", "--output-len", 3)
    assert bench(server, "--requests", 8, *prefixes)["failed"] == 0
    spread = ("--arrival", "burst", "--rate", 100, "--burst-size", 2)
    chats = bench(server, "--requests", 5, "--endpoint", "chat", "--prompt-len", 3, "--output-len", 4, *spread)
    assert (chats["failed"], chats["output_tokens"]) == (0, 20)
    whole = bench(server, "--requests", 4, "--no-stream", "--prompt-len", 3, "--output-len", 4)
    assert (whole["output_tokens"], whole["ttft_ms"]) == (16, None)


@pytest.mark.slow
def test_what_the_server_refuses_is_counted(bench, start):
    """Prompts longer than the context of 96 fail with the server's words; the others succeed."""
    found = bench(start(), "--requests", 20, "--prompt-len", "uniform:60:130", "--output-len", 2, "--seed", 3)
    assert 0 < found["failed"] < 20
    assert all("the context is 96" in error for error in found["errors"])
