"""Memory of logits: handed out again with each step, joined without a copy where they lie together."""

import numpy as np

from llmopt.runtime.executors.onnxruntime_logits import LogitRows


def filled(rows, count, value):
    """``count`` rows that all hold a value."""
    taken = rows.take(count)
    taken[:] = value
    return taken


def test_rows_of_a_step_lie_together_and_are_handed_out_again():
    rows = LogitRows(5, 8)
    for step in range(3):
        rows.begin()
        first, second = filled(rows, 3, step), filled(rows, 1, step + 10)
        joined = rows.together([*first, *second])
        assert np.shares_memory(joined, first)
        assert joined[:, 0].tolist() == [step] * 3 + [step + 10]


def test_rows_in_another_order_or_not_all_of_them_are_copied():
    rows = LogitRows(5, 8)
    rows.begin()
    first, second = filled(rows, 2, 1), filled(rows, 1, 2)
    for chosen in ([second[0], first[0], first[1]], [first[0], second[0]]):
        joined = rows.together(chosen)
        assert np.array_equal(joined, np.stack(chosen))
        assert not any(np.shares_memory(joined, taken) for taken in (first, second))


def test_what_goes_beyond_is_made_anew():
    rows = LogitRows(5, 4)
    rows.begin()
    kept, more = filled(rows, 3, 1), filled(rows, 7, 2)
    assert more.shape == (7, 5)
    assert not np.shares_memory(kept, more)
    assert np.array_equal(rows.together([kept[0], more[6]]), np.stack([kept[0], more[6]]))
    assert kept[:, 0].tolist() == [1, 1, 1]
