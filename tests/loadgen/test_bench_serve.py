"""llmopt bench serve against a server whose times are known, and what it says when there is none."""

import json
import shutil
import ssl
import subprocess

import pytest

from benchmarks.serve_rows import serving_section
from llmopt.cli.main import run
from tests.loadgen.scripted import Scripted, serving


@pytest.fixture
def bench(capsys):
    """``bench(server, *arguments)`` → exit code, JSON document or standard error."""

    def go(server, *arguments):
        with serving(server) as url:
            code = run(["bench", "serve", url, "--json", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else err

    return go


def test_it_measures_what_the_server_does(bench, tmp_path):
    files = [tmp_path / name for name in ("o.json", "p.html", "rows.jsonl")]
    code, found = bench(
        Scripted(first=0.1, gap=0.03, tokens=6), "--requests", 8, "--prompt-len", 11, "--seed", 5,
        "--slo", "ttft=90", "--output", files[0], "--plot", files[1], "--append", files[2], "--label", "scripted",
    )  # fmt: skip
    assert code == 0
    assert (found["succeeded"], found["prompt_tokens"], found["output_tokens"]) == (8, 88, 48)
    assert 100 <= found["ttft_ms"]["p50"] < 300
    assert 29 <= found["tpot_ms"]["p50"] < 90
    assert 29 <= found["itl_ms"]["p50"] < 90
    assert 250 <= found["e2e_ms"]["p50"] < 750
    assert found["goodput_share"] == 0  # no first token within 90 ms
    assert found["tokens_per_chunk"] == 1
    records = json.loads(files[0].read_text())["records"]
    assert [len(r["chunks"]) for r in records] == [6] * 8
    row = json.loads(files[2].read_text())
    assert (row["seed"], row["label"]) == (5, "scripted")
    assert serving_section(tmp_path).count("\n| scripted | ") == 0  # a file of another name is another kind
    files[2].rename(tmp_path / "load.jsonl")
    assert serving_section(tmp_path).count("\n| scripted | ") == 1
    page = files[1].read_text()
    assert page.count("<svg") == 5
    assert "http://" not in page.replace(found["url"], "")  # nothing is fetched


def test_goodput_counts_what_meets_every_bound(bench):
    server = Scripted(first=0.05, gap=0.01)
    assert bench(server, "--requests", 4, "--slo", "ttft=2000", "--slo", "itl=2000")[1]["goodput_share"] == 1
    assert bench(server, "--requests", 4, "--slo", "ttft=2000", "--slo", "itl=1")[1]["goodput_share"] == 0


def test_the_body_asks_for_exact_lengths(bench):
    server = Scripted()
    arguments = (
        "--requests",
        3,
        "--prompt-len",
        4,
        "--output-len",
        7,
        "--body",
        '{"top_p": 0.5}',
        "--api-key",
        "k",
    )
    assert bench(server, *arguments)[0] == 0
    for body in server.bodies:
        assert body["max_tokens"] == 7
        assert (body["ignore_eos"], body["temperature"], body["top_p"], body["model"]) == (True, 0, 0.5, "scripted")
        assert body["stream_options"] == {"include_usage": True}
        assert len(body["prompt"]) == 4
    assert all("authorization: Bearer k" in head for head in server.heads)


def test_concurrency_is_bounded(bench):
    server = Scripted(first=0.02, gap=0.005)
    assert bench(server, "--requests", 12, "--concurrency", 3)[1]["peak_running"] == 3
    assert server.most == 3
    free = Scripted(first=0.05)
    assert bench(free, "--requests", 12)[0] == 0
    assert free.most == 12  # negative control: without the flag nothing is held back


@pytest.mark.parametrize("stream", [True, False])
def test_chats_and_whole_answers(bench, stream):
    arguments = ("--requests", 3, "--endpoint", "chat", *(() if stream else ("--no-stream",)))
    code, found = bench(Scripted(first=0.05), *arguments)
    assert code == 0
    assert found["output_tokens"] == 15
    # the piece that names the role is no token
    assert (found["ttft_ms"]["p50"] >= 50) if stream else (found["ttft_ms"] is None)


def test_failures_are_counted_by_what_the_server_said(bench):
    code, found = bench(Scripted(failing=3), "--requests", 9, "--concurrency", 1)
    assert code == 0
    assert (found["succeeded"], found["failed"], found["errors"]) == (6, 3, {"429: too many requests": 3})
    assert found["goodput_share"] == pytest.approx(6 / 9, abs=1e-3)


def test_a_stream_that_ends_early_is_a_failure(bench):
    code, err = bench(Scripted(cut=True), "--requests", 2)
    assert code == 12
    assert "none of 2 requests succeeded: the stream ended without [DONE]" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["http://127.0.0.1:9"], 10, "cannot reach the server"),
        (["nowhere"], 3, "write http://HOST:PORT"),
        (["http://h", "--prompt-len", "x"], 3, "--prompt-len: 'x' is not a distribution"),
        (["http://h", "--slo", "ttfs=1"], 3, "unknown bound 'ttfs'"),
        (["http://h", "--slo", "ttft"], 3, "'ttft' is no bound"),
        (["http://h", "--body", "[]"], 3, "--body: expected a JSON object"),
        (["http://h", "--input", "/nowhere"], 11, "/nowhere: cannot read"),
        (["http://h", "--rate", "0"], 2, "--rate"),
        ([], 2, "URL"),
    ],
)
def test_errors_are_one_line_with_their_code(arguments, code, message, capsys):
    assert run(["bench", "serve", *arguments]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_people_see_tables(capsys):
    with serving(Scripted(first=0.01, gap=0.001)) as url:
        assert run(["bench", "serve", url, "--requests", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line][-5:-1] == [
        "TTFT",
        "TPOT",
        "ITL",
        "end",
    ]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https_is_verified(tmp_path, monkeypatch, capsys):
    """A server whose certificate is known is measured; one nobody vouches for is not spoken to."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=127.0.0.1"
    command = [*make.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(Scripted(first=0.01, gap=0.001), tls) as url:
        assert run(["bench", "serve", url, "--requests", "2"]) == 10
        assert "certificate verify failed" in capsys.readouterr().err
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert run(["bench", "serve", url, "--requests", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["succeeded"] == 2
