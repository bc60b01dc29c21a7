"""mesh.simulate and `mesh sim SCRIPT`: real trainings on virtual nodes, each decided by its seed."""

import json
import random
import signal
import sys
import textwrap
import threading

import jsonschema
import numpy as np
import pytest
import torch

import mesh
from mesh.baton import Program, Stopped
from mesh.codec import Float32
from mesh.conditions import Conditions
from mesh.learning_report import Curve
from mesh.replica import Replica
from mesh.virtual_node import FlippedReplica
from nodes import cli
from tests.helpers import REPOSITORY

CLASSES, INPUTS = 4, 8
DIGITS = REPOSITORY / "examples" / "digits.py"


def points(count, seed):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=made)
    rule = torch.randn(INPUTS, CLASSES, generator=torch.Generator().manual_seed(0))
    return x, (x @ rule).argmax(1)


X, Y = points(800, 1)
TEST_X, TEST_Y = points(400, 2)


def build(rank):
    model = torch.nn.Linear(INPUTS, CLASSES)
    return model, torch.optim.SGD(model.parameters(), lr=0.3), torch.nn.functional.cross_entropy


def one_class_each(rank):
    mine = (rank - 1) % CLASSES == Y
    while True:
        chosen = torch.randint(int(mine.sum()), (8,))
        yield X[mine][chosen], Y[mine][chosen]


def all_classes(rank):
    while True:
        chosen = torch.randint(len(X), (8,))
        yield X[chosen], Y[chosen]


def accuracy(model):
    return (model(TEST_X).argmax(1) == TEST_Y).double().mean().item()


def lab(loader=one_class_each, **changes):
    about = {"nodes": 4, "every": 4, "steps": 40, "evaluate": accuracy}
    return mesh.simulate(build, loader, **{**about, **changes})


# ------------------------------------------------------------------------------------ what is found


def test_looking_on_the_way_leaves_each_layer_in_its_mode():
    """A BatchNorm that is kept in eval() is not trained because somebody looked."""
    modes = set()

    def build(rank):
        model = torch.nn.Sequential(torch.nn.Linear(INPUTS, CLASSES), torch.nn.BatchNorm1d(CLASSES))
        model[1].eval()
        return (
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda out, y: (
                modes.add(model[1].training) or torch.nn.functional.cross_entropy(out, y)
            ),
        )

    def evaluate(model):
        model.eval()
        found = accuracy(model)
        model.train()
        return found

    mesh.simulate(
        build, all_classes, nodes=2, every=2, steps=6, evaluate=evaluate, evaluate_every=2
    )
    assert modes == {False}


def test_one_seed_gives_one_report_to_the_bit_and_leaves_the_process_as_it_was():
    hard = {
        "loss_of_connections": 0.2,
        "replaced": 0.5,
        "speeds": (1, 2, 5, 10),
        "codec": "int8",
        "evaluate_every": 8,
        "steps": 24,
    }
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    random.seed(5)
    first = lab(**hard)
    after = torch.rand(1).item(), random.random()
    torch.manual_seed(6)
    again = lab(**hard)
    assert first == again
    assert len(first.looks) >= 3
    for name, values in first.weights.items():
        np.testing.assert_array_equal(values, again.weights[name])
    assert lab(**hard, seed=2).digest != first.digest
    torch.manual_seed(5)
    random.seed(5)
    assert after == (torch.rand(1).item(), random.random()), "a laboratory drew from our chance"
    assert torch.get_num_threads() == threads
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_machines_with_one_class_each_learn_all_classes_together_and_not_alone():
    together, alone = lab(), lab(strategy="alone")
    assert together.accuracy.averaged > 0.8
    assert together.accuracy.worst > 0.7
    assert alone.accuracy.mean < 0.45
    assert together.drift < alone.drift / 10
    assert alone.transfers == 0
    assert together.transfers > 20  # a begun and an answered exchange for each of 10 hand-overs
    assert [history.steps for history in together.histories] == [40] * 4
    assert all(len(history.losses) == 40 for history in together.histories)
    # Ten hand-overs each, first weights, averaged() and close().
    assert 40 <= sum(h.exchanges for h in together.histories) <= 56


def test_one_place_is_one_loop_over_all_machines_batches():
    seen = {}

    def loader(rank):
        batches = [
            (X[k::40][rank * 3 : rank * 3 + 3], Y[k::40][rank * 3 : rank * 3 + 3])
            for k in range(20)
        ]
        seen[rank] = batches
        return batches

    first = []

    def built(rank):
        model, optimizer, loss_of = build(rank)
        if rank == 1:
            first.append({name: value.clone() for name, value in model.state_dict().items()})
        return model, optimizer, loss_of

    report = mesh.simulate(built, loader, nodes=3, steps=20, strategy="one-place")
    model, optimizer, loss_of = build(0)
    model.load_state_dict(first[0])
    for batch in zip(seen[1], seen[2], seen[3], strict=True):
        x, y = (torch.cat(part) for part in zip(*batch, strict=True))
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(report.weights[name], value.numpy(), atol=1e-5)
    assert report.drift < 1e-6


def test_lost_connections_newcomers_and_slow_machines_do_not_stop_the_learning():
    report = lab(
        all_classes,
        steps=80,
        loss_of_connections=0.2,
        replaced=0.5,
        speeds=(1, 1, 1, 10),
        evaluate_every=20,
    )
    newcomers = [history for history in report.histories if history.newcomer]
    killed = [history for history in report.histories if history.killed]
    assert len(newcomers) == len(killed) == 2
    assert {h.rank for h in newcomers} == {h.rank for h in killed}
    lossy = lab(all_classes, steps=24, loss_of_connections=0.5)
    assert sum(history.broken for history in lossy.histories) > 12
    assert sum(history.exchanges for history in lossy.histories) > 6
    made = {rank: 0 for rank in range(1, 5)}
    for history in report.histories:
        made[history.rank] += history.steps
    assert max(made.values()) > 3 * min(made.values())
    assert 160 < sum(made.values()) <= 4 * 80, "what the dead would have trained is lost, no more"
    assert report.accuracy.averaged > 0.8
    steps = [look.step for look in report.looks]
    assert steps == sorted(steps)
    assert report.looks[-1].drift < 1.0


def test_an_attacker_that_flips_its_weights_ruins_plain_averaging_and_is_not_counted_itself():
    report = lab(steps=80, attackers=[2])
    assert report.accuracy.averaged < lab(steps=80).accuracy.averaged - 0.1
    assert [history.attacker for history in report.histories] == [False, True, False, False]


def test_a_flipped_replica_says_minus_w_and_believes_what_an_honest_one_would():
    rng, codec = np.random.default_rng(3), Float32()
    w, x = (rng.standard_normal(10).astype(np.float32) for _ in range(2))
    honest, lies = Replica(10), FlippedReplica(10)
    honest.weights[:] = lies.weights[:] = w
    said, told = bytearray(40), bytearray(40)

    lies.write(0, memoryview(said), codec)
    np.testing.assert_array_equal(np.frombuffer(said, np.float32), -w)
    honest.answer(0, memoryview(x.tobytes()), 0.25, memoryview(told), codec)
    lies.answer(0, memoryview(x.tobytes()), 0.25, memoryview(said), codec)
    np.testing.assert_allclose(np.frombuffer(said, np.float32), x + w, rtol=1e-6)
    np.testing.assert_allclose(lies.weights, honest.weights, atol=1e-6)

    before = lies.weights.copy()
    lies.apply(0, memoryview((-w - x).tobytes()), 0.25, codec)
    np.testing.assert_array_equal(lies.weights, before)


# ------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    "bad",
    [
        {"nodes": 0},
        {"strategy": "magic"},
        {"speeds": (1.0,)},
        {"speeds": (1.0, 0.0)},
        {"loss_of_connections": 1.0},
        {"replaced": 2.0},
        {"replaced": 0.5, "strategy": "alone"},
        {"attackers": frozenset({3})},
        {"attackers": frozenset({1, 2})},
        {"steps": 0},
        {"look_every": 0},
    ],
    ids=str,
)
def test_conditions_that_cannot_be_are_refused(bad):
    with pytest.raises(mesh.UsageError):
        Conditions(**{"nodes": 2, "seed": 1, "steps": 5, **bad})


def test_an_optimizer_may_ask_for_the_loss_more_than_once():
    def with_lbfgs(rank):
        model = torch.nn.Linear(INPUTS, CLASSES)
        return (
            model,
            torch.optim.LBFGS(model.parameters(), lr=0.3),
            torch.nn.functional.cross_entropy,
        )

    report = mesh.simulate(with_lbfgs, all_classes, nodes=2, steps=60, every=4, evaluate=accuracy)
    assert report.accuracy.averaged > 0.6


def test_an_optimizer_of_ones_own_need_not_know_of_closures():
    class Plain(torch.optim.SGD):
        def step(self):
            super().step()

    def built(rank):
        model, _, loss = build(rank)
        return model, Plain(model.parameters(), lr=0.3), loss

    assert (
        mesh.simulate(built, all_classes, nodes=2, steps=40, evaluate=accuracy).accuracy.worst > 0.6
    )


def test_what_a_training_raises_comes_out_as_it_is_and_an_empty_loader_is_said():
    def broken(rank):
        yield X[:4], Y[:4]
        if rank == 2:
            raise LookupError("the disk with the data is gone")
        yield X[:4], Y[:4]

    with pytest.raises(LookupError, match="disk with the data"):
        mesh.simulate(build, broken, nodes=3, steps=5)
    model, optimizer, loss = build(1)
    with pytest.raises(mesh.UsageError, match="no optimizer"):
        mesh.simulate(lambda rank: (model, None, loss), broken, nodes=2, steps=5)
    with pytest.raises(mesh.UsageError, match="another machine's model"):
        mesh.simulate(lambda rank: (model, optimizer, loss), broken, nodes=2, steps=5)
    with pytest.raises(mesh.UsageError, match="no batch"):
        mesh.simulate(build, lambda rank: [], nodes=1, steps=5)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_ctrl_c_ends_every_program_and_nothing_of_them_stays():
    unwound = []

    def interrupted(rank):
        try:
            for k in range(100):
                if (rank, k) == (2, 3):
                    signal.raise_signal(signal.SIGINT)  # python hands it to the main thread
                yield X[:4], Y[:4]
        finally:
            unwound.append(rank)

    with pytest.raises(KeyboardInterrupt):
        mesh.simulate(build, interrupted, nodes=3, steps=50)
    assert sorted(unwound) == [1, 2, 3]
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_a_program_runs_only_while_it_holds_the_baton_and_unwinds_when_it_is_stopped():
    said = []

    def work():
        try:
            said.append(program.ask("first"))
            program.ask("second")
            said.append("never")
        except Stopped:
            said.append("stopped")
            raise

    program = Program(work, "rank 0")
    assert program.resume() == "first"
    assert said == []
    assert program.resume("answer") == "second"
    assert said == ["answer"]
    program.stop()
    assert said == ["answer", "stopped"]
    assert program.error is None
    program.stop()

    failing = Program(lambda: 1 / 0, "rank 0")
    assert failing.resume() is None
    assert isinstance(failing.error, ZeroDivisionError)
    never = Program(lambda: said.append("ran"), "rank 0")
    never.stop()
    assert "ran" not in said


def test_a_curve_is_bounded_and_keeps_its_whole_length():
    curve = Curve(8)
    for k in range(1000):
        curve.add(k)
        assert len(curve.values) <= 8
    assert curve.values == list(range(0, 1000, 128))


# ------------------------------------------------------------------------------------------ scripts

SCRIPT = """
import random, sys, torch, mesh
rank = int(sys.argv[1])
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def score(model):
    return -model(torch.ones(1, 2)).square().item()

if __name__ == "__main__":
    with mesh.join(model, optimizer, every=2) as node:
        print("began", rank, sys.argv[2], len(sys.modules["__main__"].__file__) > 0)
        for k in range(12):
            loss = (model(torch.randn(4, 2)) - rank).square().mean()
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            node.step(loss=loss.item(), samples=4)
            assert sys.argv[1] == str(rank), sys.argv
            END
"""


@pytest.fixture
def script(tmp_path):
    def write(end="pass"):
        path = tmp_path / "train.py"
        path.write_text(textwrap.dedent(SCRIPT).replace("END", end))
        return path

    return write


def test_a_script_is_each_machines_own_program_with_its_own_rank_chance_and_output(script):
    heard = []
    before = sys.argv, sys.stdout, sys.modules["__main__"], sys.path[:]
    about = {"nodes": 3, "evaluate": "score", "said": lambda rank, line: heard.append((rank, line))}
    arguments = ["{rank}", "of-{nodes}"]
    first = mesh.simulate_script(script(), arguments, **about)
    assert sorted(heard) == [(k, f"began {k} of-3 True") for k in (1, 2, 3)]
    assert first == mesh.simulate_script(script(), arguments, **about)
    assert before == (sys.argv, sys.stdout, sys.modules["__main__"], sys.path)
    assert [history.steps for history in first.histories] == [12, 12, 12]
    assert first.accuracy is not None
    assert len({history.losses for history in first.histories}) == 3
    together = mesh.simulate_script(script(), arguments, strategy="one-place", **about)
    assert together.drift < 1e-6


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("if rank == 2: raise LookupError('no data')", 1, "LookupError: no data"),
        ("sys.exit(7) if rank == 2 else None", 7, "ended with 7"),
        ("sys.exit('enough') if rank == 2 else None", 1, "enough"),
    ],
)
def test_a_script_that_fails_is_shown_as_its_author_knows_it(script, capsys, end, code, words):
    path = script(end)
    assert cli.main(["sim", "-n", "2", str(path), "{rank}", "x"]) == code
    said = capsys.readouterr().err
    assert words in said
    if "raise" in end:
        assert "laboratory.py" not in said
        assert f'File "{path}"' in said


def test_a_script_is_drawn_and_one_that_joins_nothing_or_is_not_there_is_refused(
    tmp_path, capsys, script, monkeypatch
):
    idle = tmp_path / "idle.py"
    idle.write_text("print('done')")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sim", "-n", "2", str(script()), "{rank}", "x"]) == 0
    said = capsys.readouterr().out
    assert {"loss, mean of all machines", "drift"} <= set(said.splitlines())
    assert "as it is" in said
    assert "one-place" in said
    assert cli.main(["sim", "-n", "2", str(idle)]) == 1
    assert "mesh.join()" in capsys.readouterr().err
    assert cli.main(["sim", str(tmp_path / "none.py")]) == 2
    assert cli.main(["sim", "--strategies", "magic", str(script()), "1", "x"]) == 2
    assert "magic" in capsys.readouterr().err
    assert cli.main(["sim", "-n", "1", "--evaluate", "nothing", str(script()), "1", "x"]) == 2


def test_mesh_sim_trains_the_digits_example_side_by_side_with_one_place(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("sklearn", reason="examples/digits.py needs scikit-learn")
    monkeypatch.chdir(tmp_path)
    flags = [
        "--evaluate",
        "evaluate",
        "--strategies",
        "pair,alone",
        "--json",
        "--out",
        "curves.png",
    ]
    shards = ["--shard", "{rank}/{nodes}", "--steps", "40"]
    assert cli.main(["sim", "-n", "2", *flags, str(DIGITS), *shards]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    schema = json.loads((REPOSITORY / "docs/schemas/mesh.learning.1.json").read_text())
    jsonschema.validate(answer, schema)
    found = answer["strategies"]
    assert list(found) == ["pair", "alone", "one-place"]
    assert found["pair"]["averaged"] > 0.6
    assert found["alone"]["mean_node"] < 0.55
    assert found["pair"]["steps"] == [40, 40]
    assert "2 | step     40  averaged" in err
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
