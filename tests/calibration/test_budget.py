"""The budget solver: every point of its front is the best of its size, against brute force."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.calibration.budget import Limit, Option, choose, hull, ms_of, pareto, size_of, solve, total, unmet


def size(most: float) -> Limit:
    return Limit("size", size_of, "bytes", float(most))


amounts = st.integers(1, 40).map(float)
layers = st.lists(
    st.lists(st.builds(Option, st.just(""), amounts, amounts), min_size=1, max_size=4), min_size=1, max_size=5
)


@given(found=layers)
@settings(max_examples=200, deadline=None)
def test_no_choice_is_smaller_and_better_than_a_point_of_the_front(found: list[list[Option]]) -> None:
    everything = [total(found, choice) for choice in product(*(range(len(options)) for options in found))]
    front = pareto(found)
    for point in front:
        assert point == total(found, point.chosen)
        assert not any(o.size <= point.size and o.loss < point.loss - 1e-9 for o in everything)
    assert front[0].size == min(o.size for o in everything)
    assert front[-1].loss == min(o.loss for o in everything)
    assert [p.size for p in front] == sorted(p.size for p in front)
    assert [p.loss for p in front] == sorted((p.loss for p in front), reverse=True)


@given(found=layers, budget=st.integers(1, 200))
@settings(max_examples=100, deadline=None)
def test_a_budget_is_kept_and_used(found: list[list[Option]], budget: int) -> None:
    front = pareto(found)
    best = choose(front, [size(budget)], None)
    if best is None:
        assert min(sum(o.size for o in choice) for choice in product(*found)) > budget
    else:
        assert best.size <= budget
        assert all(p.size > budget for p in front if p.loss < best.loss)
    within = choose(front, [], float(budget))
    assert within is None or (within.loss <= budget and all(p.loss > budget for p in front if p.size < within.size))


def test_a_hull_leaves_out_what_a_mixture_beats() -> None:
    options = [Option("a", 1, 10), Option("b", 2, 9.5), Option("c", 3, 1), Option("d", 4, 1)]
    assert [options[i].label for i in hull(options)] == ["a", "c"]


def test_both_budgets_must_hold() -> None:
    front = pareto([[Option("a", 1, 10), Option("b", 5, 1)]])
    assert choose(front, [size(5)], 1) == front[1]
    assert choose(front, [size(4)], 1) is None
    assert choose(front, [size(4)], 10) == front[0]


timed = st.lists(
    st.lists(st.builds(Option, st.just(""), amounts, amounts, amounts), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(found=timed, share=st.tuples(st.floats(0.1, 1.2), st.floats(0.1, 1.2)))
@settings(max_examples=150, deadline=None)
def test_two_budgets_hold_and_little_is_lost(found: list[list[Option]], share: tuple[float, float]) -> None:
    most = [share[0] * sum(max(o.size for o in options) for options in found)]
    most.append(share[1] * sum(max(o.ms for o in options) for options in found))
    limits = [Limit("size", size_of, "bytes", most[0]), Limit("ms", ms_of, "ms", most[1])]
    best = solve(found, limits, None)
    fits = [
        p
        for c in product(*(range(len(o)) for o in found))
        if all(m.cost(p := total(found, c)) <= m.most for m in limits)
    ]
    missed = unmet(found, limits)
    if missed is not None:
        assert not fits
        assert missed[1] > 0
        assert (
            missed[0].cost(total(found, [min(range(len(o)), key=lambda i: missed[0].cost(o[i])) for o in found]))
            > missed[0].most
        )
    if best is not None:
        assert best == total(found, best.chosen)
        assert all(limit.cost(best) <= limit.most for limit in limits)
        assert best.loss >= min(p.loss for p in fits)


def test_what_is_measured_slow_is_not_taken_for_time() -> None:
    """Fewer bytes that take longer: within a budget of time the larger form, within one of size the smaller."""
    layer = [Option("int4", 1, 1, ms=5.0, measured=True), Option("as it is", 4, 0, ms=2.0)]
    time, bytes_ = Limit("ms", ms_of, "ms", 3.0), size(2)
    assert solve([layer], [time], None) == total([layer], [1])
    assert solve([layer], [bytes_], None) == total([layer], [0])
    assert solve([layer], [bytes_, time], None) is None
    assert unmet([layer], [bytes_, time]) is None
    limit = Limit("ms", ms_of, "ms", 1.5)
    assert unmet([layer], [bytes_, limit]) == (limit, 0.5)
