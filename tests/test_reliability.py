"""The figures of docs/reliability.md in small: benchmarks/reliability.py with few runs."""

from dataclasses import replace

import pytest

from benchmarks.reliability import GASPING_IN_RAIN_OF_FIVE, SLOW, Line, blame, detection_s, table
from benchmarks.watched_mesh import percentile


def test_a_killed_process_is_dead_at_all_fifteen_others_within_a_second():
    found = [t for seed in range(2) for t in detection_s(seed, nodes=16, cuts=2, silent=False)]
    assert len(found) == 4
    assert percentile([last for _, last in found], 0.99) <= 1.0


def test_a_silent_member_of_five_is_dead_at_all_within_five_seconds_in_the_middle():
    found = [t for seed in range(2) for t in detection_s(seed, nodes=5, cuts=7, silent=True)]
    assert all(3.0 < first <= last for first, last in found), "sooner than any suspicion lasts"
    assert percentile([last for _, last in found], 0.50) <= 5.0


def test_nobody_who_lives_is_called_dead_where_packets_are_lost_and_one_node_stalls():
    blamed = blame(1, stalls=replace(SLOW, nodes=8), seconds=120.0)
    assert blamed.accused_slow > 0, "the stalls are felt"
    assert (blamed.dead_healthy, blamed.dead_slow) == (0, 0)


@pytest.mark.parametrize("ablation", ["", "no local health"])
def test_only_local_health_keeps_a_node_that_gasps_from_calling_the_healthy_dead(ablation):
    blamed = blame(1, stalls=GASPING_IN_RAIN_OF_FIVE, seconds=100.0, ablation=ablation)
    assert (blamed.dead_healthy > 0) is bool(ablation)


def test_a_percentile_is_one_of_the_values():
    values = [float(k) for k in range(100, 0, -1)]
    assert [percentile(values, part) for part in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]


def test_the_table_names_a_goal_that_was_missed():
    line = Line(experiment="e", setting="n=1", runs="2", figures={"p50": 1.5}, goal="<= 1 s")
    assert "MISSED" in table([replace(line, kept=False)])
    assert "MISSED" not in table([replace(line, kept=True), line])
