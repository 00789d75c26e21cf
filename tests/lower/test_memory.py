"""The memory planner: no two buffers that live together overlap, and aliases cost nothing."""

from hypothesis import given
from hypothesis import strategies as st

from llmopt.lower.memory import ALIGNMENT, Interval, intervals, plan_memory
from llmopt.program import Function, OpCall, Ref, TensorType

BUFFERS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10), st.integers(0, 8)), min_size=1, max_size=30).map(
    lambda rows: [Interval(f"b{i}", a, a + n, s * ALIGNMENT) for i, (a, n, s) in enumerate(rows)]
)


def overlaps(plan_offsets: dict[str, int], a: Interval, b: Interval) -> bool:
    """Do two buffers share a call and a byte?"""
    together = a.first <= b.last and b.first <= a.last
    x, y = plan_offsets[a.name], plan_offsets[b.name]
    return together and x < y + b.size and y < x + a.size


@given(BUFFERS)
def test_live_buffers_never_overlap(buffers):
    plan = plan_memory(buffers)
    assert not any(
        overlaps(plan.offsets, a, b) for i, a in enumerate(buffers) for b in buffers[:i] if a.size and b.size
    )
    peak = max(sum(b.size for b in buffers if b.first <= t <= b.last) for t in range(31))
    assert peak <= plan.total <= sum(b.size for b in buffers)


def test_overlap_is_detected():
    buffers = [Interval("a", 0, 2, 256), Interval("b", 1, 3, 256)]
    assert overlaps({"a": 0, "b": 0}, *buffers)


def chain() -> Function:
    """x -> relu -> view -> relu -> relu, each (T, 64) fp32."""
    kind = TensorType(("T", 64), "float32")
    calls = tuple(
        OpCall(op, {"self": Ref(source)}, (name,))
        for op, source, name in [
            ("aten.relu.default", "x", "a"),
            ("aten.view.default", "a", "b"),
            ("aten.relu.default", "b", "c"),
            ("aten.relu.default", "c", "d"),
        ]
    )
    return Function("step", ("x",), calls, ("d",), dict.fromkeys("xabcd", kind))


def test_views_share_and_dead_buffers_are_reused():
    found = {b.name: b for b in intervals(chain(), {"T": 4})}
    assert set(found) == {"a", "c", "d"}
    assert (found["a"].first, found["a"].last, found["a"].size) == (0, 2, 1024)
    plan = plan_memory(list(found.values()))
    assert plan.total == 2048
    assert plan.offsets["a"] == plan.offsets["d"]
