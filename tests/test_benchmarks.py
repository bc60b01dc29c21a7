"""The benchmarks run and say what they should; what they measure is nobody's concern here."""

import json
from random import Random

import numpy as np
import pytest

from benchmarks import growing_meshes as ways
from benchmarks import growth
from benchmarks.figures import Figure, present, table
from benchmarks.learning_rows import Climb
from mesh.virtual_time import run_seeded


def test_growth_prints_one_json_object_with_a_row_for_each_way_size_and_stage(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["growth", "--quick", "--json"])
    assert growth.main() == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == "mesh.benchmark.growth/1"
    found = {(row["way"], row["machines"], row["stage"]) for row in report["rows"]}
    sizes = growth.SIZES_QUICK
    assert found == {(way, n, stage) for way in growth.WAYS for n in sizes for stage in ways.STAGES}


@pytest.mark.parametrize("way", [ways.ring, ways.server])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_ring_and_server_give_everybody_the_exact_mean(way, count, monkeypatch):
    seen = []
    monkeypatch.setattr(ways, "spreads", lambda models: seen.extend(models) or (0.0, 0.0))
    run_seeded(way, 1, count)
    rng = Random(1)
    rng.random()  # the network's
    mean = np.mean(ways.first_models(count, rng), axis=0)
    assert len(seen) == count
    for model in seen:
        np.testing.assert_allclose(model, mean, atol=1e-5)


def test_a_machine_sends_and_receives_what_each_way_needs_by_arithmetic():
    count, models = 8, {}
    for way in (ways.ring, ways.server):
        cost = run_seeded(way, 1, count)["round"]
        models[way] = cost.bytes_each / ways.MODEL_BYTES, cost.bytes_busiest / ways.MODEL_BYTES
    assert models[ways.ring] == pytest.approx((4 * (count - 1) / count,) * 2)
    assert models[ways.server] == pytest.approx((2, 2 * count))


def test_a_card_carries_no_more_than_its_bandwidth_however_many_connections_it_has():
    cost = run_seeded(ways.server, 1, 8)["round"]
    assert cost.seconds >= 2 * 8 * ways.MODEL_BYTES / ways.BYTES_PER_S


def test_a_goal_that_was_missed_is_said_and_ends_with_1(capsys):
    figure = Figure(name="a", value=2.0, unit="ms", goal=1.0)
    flags = growth.parser("growth", "").parse_args(["--json"])
    assert present("growth", [figure], flags) == 1
    assert json.loads(capsys.readouterr().out)["figures"][0]["kept"] is False
    assert "MISSED" in table([figure])


@pytest.mark.parametrize(
    ("losses", "asked", "chosen"),
    [
        (
            [9, 8, 5, 3, 2, 4, 9],
            [3, 4, 5],
            3,
        ),  # the rate above the best is worse than the one below
        ([9, 8, 7, 6, 2, 5, 9], [3, 4, 5], 4),
        ([9, 4, 2, 3, 8, 9, 9], [3, 4, 2, 1], 2),
        ([9, 8, 7, 6, 5, 4, 3], [3, 4, 5, 6], 5),  # beyond the largest nothing is known
        ([9, 8, 7, 6, float("inf"), 9, 9], [3, 4, 2], 2),
    ],
)
def test_tuning_climbs_to_the_best_rate_whose_neighbour_above_is_still_good(losses, asked, chosen):
    climb, tried = Climb(len(losses), begin_at=3), []
    while (at := climb.asks()) is not None:
        tried.append(at)
        climb.losses[at] = losses[at]
    assert (tried, climb.chosen) == (asked, chosen)
