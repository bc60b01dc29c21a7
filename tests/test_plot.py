"""`mesh plot`: the histories of several nodes, of which some may be nonsense."""

import pytest

import mesh
from nodes import overview, plot
from nodes.overview import Trails

COLUMNS = ["uptime_s", "step", "loss", "drift"]


def history(name="a", uptime_s=100.0, points=((90.0, 8, 0.5, 0.1), (100.0, 16, 0.25, None)), run="digits"):  # fmt: skip
    return {
        "schema": "mesh.history/1",
        "node": {"id": f"id-{name}", "name": name},
        "uptime_s": uptime_s,
        "columns": COLUMNS,
        "runs": [{"run": run, "interval_s": 1.0, "points": [list(point) for point in points]}],
    }


def test_nodes_of_different_ages_are_drawn_over_one_time():
    old = history("old", 7200.0, [(0.0, 0, 2.0, 0.3), (7200.0, 900, 0.1, 0.2)])
    young = history("young", 600.0, [(0.0, 0, 2.0, 0.4), (600.0, 90, 1.0, 0.2)])
    picture = plot._curves([old, young])
    assert picture.unit == "minutes"
    assert [series.name for series in picture.loss] == ["old", "young"]
    assert [series.points for series in picture.loss] == [
        [(0.0, 2.0), (120.0, 0.1)],
        [(110.0, 2.0), (120.0, 1.0)],
    ]
    assert picture.drift[1].points == [(110.0, 0.4), (120.0, 0.2)]
    both = plot._curves([old, history("young", run="names")])
    assert [series.name for series in both.loss] == ["old digits", "young names"]


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [
        (0, "seconds"),
        (100, "seconds"),
        (200, "minutes"),
        (20_000, "hours"),
        (1e6, "days"),
    ],
)
def test_time_is_told_in_the_largest_unit_that_says_something(seconds, unit):
    points = [(0.0, 0, 1.0, 0.1), (float(seconds), 8, 1.0, 0.1)]
    assert plot._curves([history(points=points)]).unit == unit


BROKEN = {
    "no name": history() | {"node": {"id": "x"}},
    "a name that is none": history() | {"node": {"id": "x", "name": 7}},
    "no columns": history() | {"columns": []},
    "columns that are none": history() | {"columns": [["loss"], {}]},
    "an uptime that is none": history() | {"uptime_s": float("nan")},
    "runs that are none": history() | {"runs": {"digits": 1}},
    "a short point": history(points=[(1.0, 2, 3.0)]),
    "words for figures": history(points=[(1.0, 2, "low", 3.0)]),
    "no time": history(points=[(None, 2, 3.0, 3.0)]),
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_history_that_makes_no_sense_is_named_and_left_out(answer, monkeypatch):
    peers = [
        {"id": f"id-{name}", "name": name, "state": state, "runs": [{"run": "digits"}]}
        for name, state in (("bad", "alive"), ("good", "alive"), ("gone", "dead"))
    ]
    answers = {None: history("own"), "id-bad": answer, "id-good": history("good")}

    def question(op, *, state, name, **fields):
        return {"ok": True, **({"peers": peers} if op == "peers" else answers[name])}

    monkeypatch.setattr(mesh, "question", question, raising=False)
    said = []
    found = plot.histories(None, None, missed=said.append)
    assert [one["node"]["name"] for one in found] == ["own", "good"]
    assert said == ["bad is left out: its answer makes no sense here: is it of this version?"]
    trails = Trails()
    trails.seed(found)
    plot._curves(found)


def test_who_trains_nothing_now_is_asked_for_what_it_trained_but_last(monkeypatch):
    peers = [
        {"id": f"id-{name}", "name": name, "state": "alive", "runs": runs}
        for name, runs in (("rests", []), ("never", []), ("trains", [{"run": "digits"}]))
    ]
    answers = {
        None: history("own"),
        "id-rests": history("rests"),
        "id-never": history("never", points=()),
        "id-trains": history("trains"),
    }

    def question(op, *, state, name, **fields):
        return {"ok": True, **({"peers": peers} if op == "peers" else answers[name])}

    monkeypatch.setattr(mesh, "question", question, raising=False)

    def names(**fields):
        found = plot.histories(None, None, missed=pytest.fail, **fields)
        return [one["node"]["name"] for one in found]

    assert names() == names(run="digits") == ["own", "trains", "rests"]
    assert names(most=1) == ["own", "trains"], "`mesh top` of a large mesh"


def test_a_look_that_makes_no_sense_is_an_error_that_says_so():
    status = {"node": {"uptime_s": 1.0}, "mesh": {"id": "x"}, "health": []}
    node = {"id": "a", "name": "a", "load": "high", "runs": []}
    assert overview.look(status, {"node": node, "peers": []}).rows[0].load is None
    for peers in ({}, {"node": node}, {"node": node, "peers": [{}]}, {"node": [], "peers": 3}):
        with pytest.raises(mesh.MeshError, match="no sense"):
            overview.look(status, peers)


def test_the_past_comes_before_what_was_seen_here():
    row = overview.Row("id-a", "a", False, "alive", None, "digits", step=16, loss=0.25)
    trails = Trails()
    trails.follow([row])
    trails.seed([history(points=[(1.0, 8, 0.5, 0.1), (2.0, 16, 9.0, 9.0), (3.0, 24, 9.0, 9.0)])])
    trails.follow([row._replace(step=32, loss=0.1)])
    assert trails.losses(row) == [0.5, 0.25, 0.1]
