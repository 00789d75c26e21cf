"""A short soak, and that the verdict of a soak can be a bad one."""

import asyncio
from dataclasses import replace

import pytest

from benchmarks.soak import Rest, gauges, judge, main, within
from benchmarks.soak_requests import Outcome
from benchmarks.soak_watch import Seen
from llmopt.cli.main import run

GOOD = [Outcome("whole", "answered"), Outcome("refused", "refused"), Outcome("left", "left"), Outcome("whole", "shed")]


WARM = Rest({"active_requests": 0}, [100, 100])


def seen(health=5.0, statuses=()):
    """What a watcher saw: steady, but for what is asked for."""
    return Seen([health] * 80, list(statuses), [[110, 100]] * 80, [0.1] * 80)


def end(engine=100, **held):
    """What was left at the end."""
    return Rest(held, [102, engine])


@pytest.mark.slow
def test_500_requests(embedded_model, tmp_path, capsys):
    artifact = tmp_path / "fp32"
    arguments = [
        "compile",
        str(embedded_model),
        "-r",
        "fp32-cpu",
        "-o",
        str(artifact),
        "--max-context",
        "128",
        "--json",
    ]
    assert run(arguments) == 0
    # machines that run tests are busy: the bound of 50 ms is for a machine of its own
    flags = ["--requests", "500", "--clients", "32", "--health-ms", "1000", "--shared-machine", "--kill-engine"]
    code = main([str(artifact), *flags])
    assert code == 0, capsys.readouterr().err


def test_a_clean_run_has_no_problems():
    figures, problems = judge(GOOD, seen(), WARM, end(active_requests=0))
    assert problems == []
    assert figures["ends"] == {"answered": 1, "left": 1, "refused": 1, "shed": 1}


@pytest.mark.parametrize("ended", ["lost", "hung", "wrong"])
def test_a_request_that_does_not_end_well_is_a_problem(ended):
    assert judge([*GOOD, Outcome("whole", ended, "why")], seen(), WARM, end())[1] == [f"whole {ended}: why"]


@pytest.mark.parametrize(
    ("saw", "left", "problem"),
    [
        (seen(), end(104), "memory of the engine process grew by 4.0%"),
        (seen(health=60), end(), "p99 of /health is 60.0 ms, over 50 (a timer here is 0.1 ms late)"),
        (seen(statuses=[503]), end(), "/health answered 503"),
        (seen(), end(llmopt_kv_blocks_used=3), "llmopt_kv_blocks_used is 3 at the end"),
    ],
)
def test_what_a_soak_looks_for(saw, left, problem):
    assert judge(GOOD, saw, WARM, left)[1] == [problem]


def test_a_shared_machine_gets_what_its_timers_are_late():
    late = replace(seen(health=1200), lag=[300.0] * 80)
    assert judge(GOOD, late, WARM, end(), 1000, shared=True)[1] == []
    assert judge(GOOD, late, WARM, end(), 1000)[1] == [
        "p99 of /health is 1200.0 ms, over 1000 (a timer here is 300.0 ms late)"
    ]
    assert judge(GOOD, replace(late, lag=[199.0] * 80), WARM, end(), 1000, shared=True)[1]


def test_a_death_nobody_hears_of_is_late():
    assert asyncio.run(within(0.2, lambda: True))
    assert not asyncio.run(within(0.2, lambda: False))


def test_gauges():
    text = "# TYPE llmopt_requests_running gauge\nllmopt_requests_running 2\nllmopt_kv_blocks_used 7\nother 1\n"
    assert gauges(text) == {"llmopt_requests_running": 2, "llmopt_kv_blocks_used": 7}
