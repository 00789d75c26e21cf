"""The budget solver: every point of its front is the best of its size, against brute force."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from llmopt.calibration.budget import Option, choose, hull, pareto, total

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
    best = choose(front, float(budget), None)
    if best is None:
        assert min(sum(o.size for o in choice) for choice in product(*found)) > budget
    else:
        assert best.size <= budget
        assert all(p.size > budget for p in front if p.loss < best.loss)
    within = choose(front, None, float(budget))
    assert within is None or (within.loss <= budget and all(p.loss > budget for p in front if p.size < within.size))


def test_a_hull_leaves_out_what_a_mixture_beats() -> None:
    options = [Option("a", 1, 10), Option("b", 2, 9.5), Option("c", 3, 1), Option("d", 4, 1)]
    assert [options[i].label for i in hull(options)] == ["a", "c"]


def test_both_budgets_must_hold() -> None:
    front = pareto([[Option("a", 1, 10), Option("b", 5, 1)]])
    assert choose(front, 5, 1) == front[1]
    assert choose(front, 4, 1) is None
    assert choose(front, 4, 10) == front[0]
