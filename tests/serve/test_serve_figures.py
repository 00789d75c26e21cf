"""The serving figures' one command, small, on the CPU; its comparison with the goals; the cost of constraints."""

import json

import pytest

from benchmarks.serve_figures import compare, main


def summary(tok_s=20_000.0, ttft=100.0, itl=20.0):
    times = {"ttft_ms": {"p50": ttft, "p99": ttft}, "itl_ms": {"p50": itl, "p99": itl}}
    return {"output_tok_s": tok_s, **times}


GOOD = {"burst": summary(), "poisson": summary(), "shared": summary(ttft=10.0), "shared, cache off": summary(ttft=51.0)}


def test_every_goal_can_be_met_and_missed():
    assert [line.split()[0] for line in compare(GOOD)] == ["met"] * 4
    bad = {**GOOD, "burst": summary(tok_s=12_000), "poisson": summary(ttft=251, itl=26), "shared": summary(ttft=11)}
    assert [line.split()[0] for line in compare(bad)] == ["MISSED"] * 4


def test_a_load_that_failed_is_a_goal_missed():
    assert [line.split()[0] for line in compare({})] == ["MISSED"] * 4


@pytest.mark.slow
def test_the_whole_of_it_small(compiled, tmp_path, capsys):
    rows, costs = tmp_path / "load.jsonl", tmp_path / "constrained.jsonl"
    flags = ["--scale", "0.02", "--max-sequences", "8", "--append", str(rows), "--append-constrained", str(costs)]
    assert main([str(compiled(128)), *flags]) == 0
    labels = [json.loads(line)["label"].partition(": ")[2] for line in rows.read_text().splitlines()]
    assert labels == ["burst", "poisson", "shared", "shared, cache off"]
    [cost] = [json.loads(line) for line in costs.read_text().splitlines()]
    assert cost["batch"] == 8
    assert cost["constrained_ms"] > 0
    assert "TTFT p99 ms, Poisson" in capsys.readouterr().out
