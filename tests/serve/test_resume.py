"""A file of requests, killed anywhere: the next run goes on, and every answer is there once."""

import json
import os
import random
import subprocess
import sys
import time

import pytest

from llmopt.errors import ConfigError, ExecutorError, ResourceError
from llmopt.serve import journal as journals
from llmopt.serve.journal import open_journal
from tests.serve.batch_process import answer_file


def write_requests(path, count):
    """``count`` requests, every third in the batch form, one of them refused."""
    lines = []
    for i in range(count):
        body = {"prompt": [i + 3, 5, 7], "max_tokens": 2 + i % 5}
        if i % 3 == 0:
            wrong = {"temperatur": 1} if i == 6 else {}
            body = {"custom_id": f"r{i}", "url": "/v1/completions", "body": {**body, "temperature": 0, **wrong}}
        lines.append(json.dumps(body))
    path.write_text("\n\n".join(lines) + "\n")


def answers(path):
    """The output without what is drawn anew each time: ids and the clock."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for answer in found:
        answer.pop("id", None)
        response = answer.get("response", {})
        response.pop("request_id", None)
        response.get("body", {}).pop("id", None)
        response.get("body", {}).pop("created", None)
    return found


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    write_requests(path, 10)
    return path


@pytest.fixture
def whole(embedded_model, source, tmp_path):
    """The answers of a run nobody disturbed."""
    assert answer_file(embedded_model, source, tmp_path / "whole.jsonl") == (0, 1)
    return answers(tmp_path / "whole.jsonl")


def files(folder):
    """Names and contents of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def states(monkeypatch, embedded_model, source, tmp_path):
    """What a kill can leave: the folder of the output after every change to it, and with its last write cut."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "out.jsonl").write_text("old\n")
    found = []

    def note(*_):
        found.append(files(folder))

    def watched(owner, name):
        before = getattr(owner, name)

        def watching(*arguments, **options):
            note()
            result = before(*arguments, **options)
            note()
            return result

        monkeypatch.setattr(owner, name, watching)

    watched(journals.Journal, "add")
    watched(journals.Journal, "load")
    watched(journals.os, "fsync")
    for name in ("replace", "unlink"):
        watched(journals.Path, name)
    answer_file(embedded_model, source, folder / "out.jsonl")
    monkeypatch.undo()
    distinct = {json.dumps({k: v.decode() for k, v in state.items()}): state for state in found}
    return list(distinct.values())


def torn(state, seed):
    """The state with the end of the journal missing."""
    draw = random.Random(seed)
    data = state["out.jsonl.partial"]
    start = data[:-1].rfind(b"\n") + 1
    return {**state, "out.jsonl.partial": data[: draw.randrange(start, len(data))]}


def test_killed_after_any_change(embedded_model, source, whole, states, tmp_path):
    cut = [torn(state, i) for i, state in enumerate(states) if state.get("out.jsonl.partial")]
    assert len(states) >= 10
    resumed = []
    for number, state in enumerate([*states, *cut]):
        folder = tmp_path / f"state{number}"
        folder.mkdir()
        for name, data in state.items():
            (folder / name).write_bytes(data)
        assert state["out.jsonl"] == b"old\n" or len(answers(folder / "out.jsonl")) == 10  # never half an output
        resumed.append(answer_file(embedded_model, source, folder / "out.jsonl")[0])
        assert answers(folder / "out.jsonl") == whole
        assert set(files(folder)) == {"out.jsonl"}
    assert set(resumed) == set(range(11))


def test_zeros_at_the_end_of_the_journal_are_dropped(embedded_model, source, whole, states, tmp_path):
    """What some file systems leave after a power failure."""
    state = next(s for s in states if s.get("out.jsonl.partial", b"").count(b"\n") == 5)
    target = tmp_path / "zeros.jsonl"
    target.with_name("zeros.jsonl.partial").write_bytes(state["out.jsonl.partial"] + bytes(100) + b"\n" + bytes(9))
    assert answer_file(embedded_model, source, target)[0] == 4
    assert answers(target) == whole


def test_a_changed_file_is_not_resumed(embedded_model, source, states, tmp_path):
    target = tmp_path / "changed.jsonl"
    state = next(s for s in states if s.get("out.jsonl.partial", b"").count(b"\n") == 5)
    target.with_name("changed.jsonl.partial").write_bytes(state["out.jsonl.partial"])
    write_requests(source, 11)
    with pytest.raises(ConfigError, match="results of another run"):
        answer_file(embedded_model, source, target)
    assert not target.exists()


def test_a_full_disk_at_the_end_leaves_the_answers(embedded_model, source, whole, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    with monkeypatch.context() as patch:

        def full(self, other):
            raise OSError(28, "No space left on device")

        patch.setattr(journals.Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            answer_file(embedded_model, source, target)
    assert target.read_text() == "old\n"
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "whole.jsonl", "out.jsonl", "out.jsonl.partial"}
    assert answer_file(embedded_model, source, target) == (10, 0)
    assert answers(target) == whole


def test_two_processes_cannot_write_one_output(embedded_model, source, tmp_path):
    target = tmp_path / "out.jsonl"
    with open_journal(target, {}), pytest.raises(ResourceError, match="another process"):
        answer_file(embedded_model, source, target)


def test_an_executor_that_dies_loses_nothing(embedded_model, source, whole, tmp_path, monkeypatch):
    from tests.serve import batch_process

    target = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        init = batch_process.FakeExecutor.__init__
        patch.setattr(batch_process.FakeExecutor, "__init__", lambda self, *a: init(self, *a, 6))
        with pytest.raises(ExecutorError, match="the device is gone"):
            answer_file(embedded_model, source, target)
    assert not target.exists()
    resumed, _ = answer_file(embedded_model, source, target)
    assert resumed > 0
    assert answers(target) == whole


def logged(log):
    """Lines of a log that may not be there yet."""
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.slow
def test_kill_dash_9(embedded_model, root, tmp_path):
    """Real processes, killed after random numbers of requests until one comes through."""
    source, target, log = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "log"
    write_requests(source, 60)
    answer_file(embedded_model, source, tmp_path / "whole.jsonl")
    command = [sys.executable, "-m", "tests.serve.batch_process", embedded_model, source, target, log, "0.01"]
    draw, kills = random.Random(5), 0
    for _ in range(40):
        process = subprocess.Popen(
            list(map(str, command)), cwd=root, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
        )
        process.stdout.readline()
        wanted = logged(log) + draw.randint(0, 12)
        while process.poll() is None and logged(log) < wanted:
            time.sleep(0.001)
        alive = process.poll() is None
        if alive and kills < 6:
            process.kill()
            kills += 1
        assert process.wait(30) in (0, -9)
        process.stdout.close()
        if target.exists():  # it may have been killed on its way out, with all done
            break
    assert kills >= 3
    assert answers(target) == answers(tmp_path / "whole.jsonl")
    # what ran when a kill came is redone, never what was answered: 4 run at once, and 4 may have ended in that step
    assert 59 <= logged(log) <= 59 + 8 * kills
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "log", "out.jsonl", "whole.jsonl"]
