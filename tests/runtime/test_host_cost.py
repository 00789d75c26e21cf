"""The host's time for a step stays within its budget, ends and admissions included."""

import pytest

from benchmarks.host_cost import arguments, measure


@pytest.mark.parametrize(("batch", "budget_ms"), [(64, 0.4), (256, 1.5)])
def test_host_time_of_a_step(batch, budget_ms):
    rows = [measure(batch, 100, arguments(["--waiting", "50", "--tenants", "10"])) for _ in range(2)]
    assert min(row["cpu_ms"] + row["wire_ms"] for row in rows) <= budget_ms
    assert min(row["rows_mean"] for row in rows) > 0.9 * batch
