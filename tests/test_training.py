"""mesh.join() as a training script uses it: this process trains, real node processes average."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import mesh

RUN = "toy"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """State directories of members of one mesh; a host registry that is nobody else's."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    token = mesh.create_mesh(tmp_path / "a", "a")
    mesh.join_mesh(tmp_path / "b", token, "b")
    return [mesh.NodeSettings(state=tmp_path / name, interfaces=("lo",)) for name in ("a", "b")]


def make(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2, dtype=dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def train(node, model, optimizer, steps=1, target=0.0):
    for _ in range(steps):
        dtype = next(model.parameters()).dtype
        loss = (model(torch.ones(4, 3, dtype=dtype)) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        node.step(loss=loss.item(), samples=4)


@contextlib.contextmanager
def joined(settings, seed, model=None, **options):
    """(node, model, optimizer) of one training."""
    if model is None:
        model, optimizer = make(seed)
    else:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    options = {"run": RUN, "every": 2, "sync_timeout": 0.3, **options}
    with mesh.join(model, optimizer, settings=settings, **options) as node:
        yield node, model, optimizer


def until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def is_running(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


# ------------------------------------------------------------------------------------- the main way


def test_two_trainings_become_one_model_and_their_nodes_end_with_them(places):
    a, b = places
    with joined(a, 1) as (first, x, ox), joined(b, 2, sync_timeout=5) as (second, y, oy):
        assert (first.statistics().began, second.statistics().began) == ("alone", "donor")
        assert torch.equal(weights(x), weights(y)), "the second begins with the first's weights"
        assert first.wait_for_peers(1, timeout=5)
        assert second.wait_for_peers(1, timeout=5)
        for _ in range(10):
            train(first, x, ox, 2, target=1.0)
            train(second, y, oy, 2, target=-1.0)
        pids = [mesh.find_node(str(s.state)).pid for s in places]

        def meet():
            """One exchange each way and no step: the replicas are one."""
            with first.averaged(), second.averaged():
                pass
            with first.averaged(), second.averaged():
                return torch.allclose(weights(x), weights(y), atol=1e-6)

        until(meet)
        figures = first.statistics()
        assert figures.attached
        assert figures.step == 20
        assert figures.samples == 80
        assert abs(figures.mesh_step - 20) <= 4, "the mean of 20 and 20, but for what is not posted"
        assert figures.exchanges + figures.answered > 0
        assert figures.bytes_sent > 0
    assert not any(is_running(pid) for pid in pids)


def test_with_patience_every_boundary_ends_in_the_average_of_both(places):
    a, b = places
    with (
        joined(a, 1, every=1, patience=5.0) as (first, x, _),
        joined(b, 2, every=1, patience=5.0) as (second, y, _),
    ):
        assert first.wait_for_peers(1, timeout=5)
        assert second.wait_for_peers(1, timeout=5)
        with torch.no_grad():
            x.bias += 4.0
        first.step()
        second.step()
        assert torch.allclose(weights(x), weights(y), atol=1e-5)
        assert abs(y.bias[0].item() - x.bias[0].item()) < 1e-5


def test_the_averaged_block_gives_the_live_weights_back_exactly_even_after_an_error(places):
    with joined(places[0], 1) as (node, model, optimizer):
        train(node, model, optimizer, 3, target=5.0)
        live = weights(model).clone()
        with node.averaged():
            model.weight.data.fill_(7.0)
        assert torch.equal(weights(model), live)
        with pytest.raises(ZeroDivisionError), node.averaged():
            1 / 0  # noqa: B018
        assert torch.equal(weights(model), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_training_alone_is_what_it_would_be_without_a_mesh_to_the_bit(places, dtype):
    def trained(node, model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        chance = torch.Generator().manual_seed(3)
        for _ in range(60):
            data = torch.randn(8, 3, generator=chance).to(dtype)
            loss = (model(data) - data[:, :2].sin()).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if node is not None:
                node.step()
                time.sleep(0.001)  # so that offers come back
        return weights(model)

    with joined(places[0], 1, model=make(1, dtype)[0], every=2) as (node, model, _):
        came = trained(node, model)
        assert node.statistics().step == 60
    assert torch.equal(came, trained(None, make(1, dtype)[0]))


def test_ctrl_c_in_the_middle_of_a_hand_over_counts_nothing_twice(places, monkeypatch):
    """A notebook's user interrupts a cell, and goes on with the same model in the next one."""
    a, b = places
    with joined(a, 1, every=1) as (first, x, _), joined(b, 2, every=1) as (second, y, _):
        second.wait_for_peers(1, timeout=5)
        expected = weights(x).clone()
        expected[-2:] += 2.0
        with torch.no_grad():
            y.bias += 4.0
        add = torch.Tensor.add_
        caught = 0

        def interrupted(tensor, *args, **kwargs):
            """Half of what a training lacks is in its model."""
            before = tensor.clone()
            add(tensor, *args, **kwargs)
            if (tensor - before).abs().max() > 0.1:
                monkeypatch.setattr(torch.Tensor, "add_", add)
                os.kill(os.getpid(), signal.SIGINT)
            return tensor

        monkeypatch.setattr(torch.Tensor, "add_", interrupted)

        def both_step():
            nonlocal caught
            for node in (first, second):
                try:
                    node.step()
                except KeyboardInterrupt:
                    caught += 1
            return caught and torch.allclose(weights(x), weights(y), atol=1e-5)

        until(both_step)
        for _ in range(10):  # what was left half done comes to light
            both_step()
            time.sleep(0.01)
        until(both_step)
        assert caught == 1
        assert torch.allclose(weights(x), expected, atol=1e-5)


def test_alone_it_starts_after_sync_timeout_and_says_so(places, caplog):
    with caplog.at_level(logging.WARNING, "mesh"), joined(places[0], 1) as (node, x, ox):
        assert "nobody else trains run 'toy' yet: starting alone" in caplog.text
        train(node, x, ox, 10)
        with node.averaged():
            assert torch.isfinite(weights(x)).all()
        with pytest.raises(mesh.PeersMissing, match="0 of 1 peers train run 'toy'"):
            node.wait_for_peers(1, timeout=0.2)


# ------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_models_of_every_floating_type_average(places, dtype):
    a, b = places
    x, y = make(1, dtype)[0], make(2, dtype)[0]
    options = {"every": 1, "patience": 5.0}
    with joined(a, 1, x, **options) as (first, _, _), joined(b, 2, y, **options) as (second, _, _):
        second.wait_for_peers(1, timeout=5)
        # float64 travels as float32; the first keeps the bits that its own weights had beyond it.
        assert torch.allclose(weights(x), weights(y), rtol=1e-6)
        start = weights(x).clone()
        with torch.no_grad():
            x.bias += 2.0
        first.step()
        second.step()
        assert torch.allclose(weights(y), weights(x), atol=0.02)
        assert torch.allclose(weights(y)[-2:], start[-2:] + 1.0, atol=0.02)


class Odd(torch.nn.Module):
    """Tied weights, a frozen parameter, buffers of all kinds."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("passing", torch.randn(2), persistent=False)

    def forward(self, rows):
        return self.head(self.norm(self.embedding(rows)))


def test_tied_weights_travel_once_and_integer_and_bool_buffers_never(places):
    a, b = places
    x, y = Odd(1), Odd(2)
    masks = x.mask.clone(), y.mask.clone()
    with joined(a, 1, x) as (first, _, _), joined(b, 2, y, sync_timeout=5) as (second, _, _):
        second.wait_for_peers(1, timeout=5)
        status = mesh.ask(mesh.find_node(str(a.state)), "status")
        assert status["runs"][0]["entries"] == 20 + 3 + 4 * 4, "embedding, frozen, batch norm"
        assert y.head.weight is y.embedding.weight
        assert torch.equal(x.frozen, y.frozen)
        assert torch.equal(x.norm.running_mean, y.norm.running_mean)
        assert not torch.equal(x.passing, y.passing)
        x.norm.num_batches_tracked += 7
        for _ in range(4):
            first.step()
            second.step()
        with first.averaged(), second.averaged():
            pass
        assert int(x.norm.num_batches_tracked) == 7
        assert int(y.norm.num_batches_tracked) == 0
        assert torch.equal(x.mask, masks[0])
        assert torch.equal(y.mask, masks[1])


def test_a_model_that_is_not_contiguous_is_averaged_in_place(places):
    a, b = places
    x, y = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for model in (x, y):
        model.weight = torch.nn.Parameter(model.weight.detach().t().contiguous().t())
    with joined(a, 1, x), joined(b, 2, y, sync_timeout=5):
        assert not y.weight.is_contiguous()
        assert torch.equal(x.weight, y.weight)


# ------------------------------------------------------------------------------------------ errors


def long_named(length):
    model = torch.nn.Linear(1, 1, bias=False)
    return torch.nn.ModuleDict({"x" * (length - len(".weight")): model})


def test_a_step_within_averaged_is_a_mistake_and_changes_nothing(places):
    with joined(places[0], 1) as (node, model, _):
        live = weights(model).clone()
        with pytest.raises(mesh.UsageError, match=r"step\(\) within averaged"), node.averaged():
            node.step()
        with node.averaged(), node.averaged():
            pass
        assert torch.equal(weights(model), live)
        node.step()
        assert node.steps == 1


def test_a_forked_child_cannot_end_or_use_the_training_of_its_parent(places):
    """It leaves its copy of the `with` block, as sys.exit() in a worker does."""
    with joined(places[0], 1) as (node, model, optimizer):
        child = os.fork()
        if not child:
            try:
                node.step()
            except mesh.UsageError as error:
                node.close()
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        train(node, model, optimizer, 4)
        assert node.statistics().attached


def test_join_within_inference_mode_leaves_nothing_that_training_cannot_change(places):
    model, _ = make(1)
    optimizer = mesh.QuasiGlobalSGD(model.parameters(), lr=0.1)
    with torch.inference_mode():
        node = mesh.join(model, optimizer, run=RUN, every=2, sync_timeout=0.1, settings=places[0])
    with node:
        for _ in range(20):
            train(node, model, optimizer)
            time.sleep(0.002)
        assert node.statistics().attached


def test_mistakes_are_told_at_once_and_say_what_to_do(places):
    settings = places[0]
    model, optimizer = make(1)
    for bad, message in [
        (lambda: mesh.join(torch.nn.ReLU(), settings=settings), "no floating-point parameters"),
        (lambda: mesh.join(model, every=0, settings=settings), "every=0"),
        (lambda: mesh.join(model, weight=0.0, settings=settings), "weight=0"),
        (lambda: mesh.join(model, patience=float("nan"), settings=settings), "patience=nan"),
        (lambda: mesh.join(make(2)[0], optimizer, settings=settings), "make it from model.param"),
        (
            lambda: mesh.join(torch.nn.Linear(2, 2, dtype=torch.complex64), settings=settings),
            "complex.*persistent=False",
        ),
        (
            lambda: mesh.join(torch.nn.Linear(2, 2).to(torch.float8_e5m2), settings=settings),
            "float8",
        ),
        (lambda: mesh.join(long_named(300), settings=settings), "300 characters: 256 at most"),
    ]:
        with pytest.raises(mesh.UsageError, match=message):
            bad()
    assert mesh.running_nodes() == [], "nothing was started for a mistake"


def test_weights_that_are_not_finite_are_refused_at_the_door(places):
    model, _ = make(1)
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(mesh.UsageError, match="weight has entries of"), joined(places[0], 1, model):
        pass
    assert mesh.running_nodes() == []


def test_a_model_that_changed_is_refused_at_the_next_boundary(places):
    with joined(places[0], 1, every=1) as (node, model, _):
        node.step()
        model.weight.data = torch.zeros(5, 3)
        with pytest.raises(mesh.UsageError, match=r"weight was \(2, 3\), is \(5, 3\)"):
            node.step()
        model.weight = torch.nn.Parameter(torch.zeros(2, 3))
        with pytest.raises(mesh.UsageError, match="weight was replaced"):
            node.step()
        del model.weight
        with pytest.raises(mesh.UsageError, match="weight is gone"):
            node.step()


def test_two_trainings_of_one_run_on_one_node_are_refused(places):
    with joined(places[0], 1), pytest.raises(mesh.UsageError, match="another run= name"):
        mesh.join(make(2)[0], run=RUN, settings=places[0])


def test_two_runs_of_different_names_share_one_node(places):
    with (
        joined(places[0], 1) as (first, x, ox),
        joined(places[0], 2, run="other") as (second, y, oy),
    ):
        train(first, x, ox, 4)
        train(second, y, oy, 4)
        runs = mesh.ask(mesh.find_node(str(places[0].state)), "status")["runs"]
        assert sorted(run["run"] for run in runs) == ["other", "toy"]


def test_use_after_close_says_where_calls_belong(places):
    with joined(places[0], 1) as (node, _, _):
        pass
    node.close()
    for use in (node.step, node.wait_for_peers, lambda: node.averaged().__enter__()):
        with pytest.raises(mesh.UsageError, match="inside the `with` block"):
            use()


# ------------------------------------------------------------------------------------------ deaths


def test_a_training_whose_node_dies_goes_on_and_attaches_again(places, caplog):
    settings = places[0]
    held = mesh.start_node(settings)
    with joined(settings, 1) as (node, model, optimizer):
        train(node, model, optimizer, 4)
        os.kill(held.running.pid, signal.SIGKILL)
        held.stop()
        with caplog.at_level(logging.WARNING, "mesh"):
            train(node, model, optimizer, 50)
        assert caplog.text.count("training goes on alone") == 1
        assert not node.statistics().attached
        assert node.mesh_step == 54, "it counts on by itself"
        before = weights(model).clone()
        with node.averaged():
            assert torch.equal(weights(model), before)
        again = mesh.start_node(settings)
        try:

            def attached():
                train(node, model, optimizer, 2)
                return node.statistics().attached

            until(attached, 15)
            status = mesh.ask(again.running, "status")
            assert status["runs"][0]["began"] == "again"
            assert node.mesh_step == node.statistics().step, "what it had is counted once"
        finally:
            node.close()
            again.stop()


def test_a_stopped_node_never_makes_a_step_wait(places):
    held = mesh.start_node(places[0])
    try:
        with joined(places[0], 1, every=2) as (node, model, optimizer):
            train(node, model, optimizer, 4)
            os.kill(held.running.pid, signal.SIGSTOP)
            began = time.monotonic()
            train(node, model, optimizer, 200)
            waited = time.monotonic() - began
            os.kill(held.running.pid, signal.SIGCONT)
            assert waited < 1.5, "200 steps of microseconds, and not one wait of LOCAL_S = 2 s"
            train(node, model, optimizer, 4)
            assert node.statistics().attached
    finally:
        held.stop()


SCRIPT = """
import os, sys, time, torch, mesh
from pathlib import Path
model = torch.nn.Linear(3, 2)
settings = mesh.NodeSettings(state=Path(sys.argv[1]))
with mesh.join(model, run="toy", every=1, sync_timeout=0.1, settings=settings) as node:
    while True:
        node.step(loss=1.0, samples=1)
        time.sleep(0.001)
"""


FORKS = SCRIPT.replace(
    "    while True:",
    """    worker = os.fork()
    if not worker:
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    while True:""",
)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which process connected")
def test_a_training_that_was_killed_makes_way_for_its_restart_while_a_forked_worker_lives(places):
    """A worker of a data loader holds what its parent held."""
    held = mesh.start_node(places[0])
    training = subprocess.Popen(
        [sys.executable, "-c", FORKS, str(places[0].state)], stdout=subprocess.PIPE, text=True
    )
    worker = int(training.stdout.readline())
    try:
        with pytest.raises(mesh.UsageError, match=f"being trained on this node.*{training.pid}"):
            mesh.join(*make(1), run=RUN, settings=places[0])
        training.kill()
        os.waitid(os.P_PID, training.pid, os.WEXITED | os.WNOWAIT)  # its exit code is still there
        with joined(places[0], 1) as (node, model, optimizer):
            assert is_running(worker)
            train(node, model, optimizer, 4)
            assert node.statistics().attached
    finally:
        os.kill(worker, signal.SIGKILL)
        training.kill()
        training.wait()
        training.stdout.close()
        held.stop()


def test_a_training_that_finds_a_node_about_to_end_starts_the_next_one(places):
    """Two short programs, one after the other: the node ends with the first."""
    for _ in range(2):
        ending = mesh.start_node(places[0])
        os.kill(ending.running.pid, signal.SIGTERM)
        with joined(places[0], 1) as (node, model, optimizer):
            train(node, model, optimizer, 4)
            assert node.statistics().attached
            assert mesh.find_node(str(places[0].state)).pid != ending.running.pid
        ending.stop()


def test_a_node_whose_training_is_killed_drops_its_run_and_stays(places):
    held = mesh.start_node(places[0])
    try:
        command = [sys.executable, "-c", SCRIPT, str(places[0].state)]
        training = subprocess.Popen(command)
        until(lambda: any(r["step"] > 5 for r in mesh.ask(held.running, "status")["runs"]), 30)
        training.kill()
        training.wait()
        until(lambda: mesh.ask(held.running, "status")["runs"] == [])
        [ending] = mesh.ask(held.running, "status")["exits"]
        assert (ending["run"], ending["pid"], ending["code"]) == ("toy", training.pid, None)
        with joined(places[0], 1) as (node, model, optimizer):
            train(node, model, optimizer, 2)
    finally:
        held.stop()


def test_a_training_that_diverges_does_not_poison_the_mesh(places, caplog):
    a, b = places
    with joined(a, 1, every=1) as (first, x, ox), joined(b, 2, every=1) as (second, y, oy):
        second.wait_for_peers(1, timeout=5)
        train(first, x, ox, 4)
        train(second, y, oy, 4)
        with torch.no_grad():
            x.weight[0, 0] = float("nan")
        with caplog.at_level(logging.WARNING, "mesh"):
            for _ in range(50):
                first.step(loss=float("nan"))
                time.sleep(0.002)
        assert "weight is not finite at step" in caplog.text
        with first.averaged():
            assert torch.isfinite(weights(x)).all(), "the mesh's weights are still good"
        with second.averaged():
            assert torch.isfinite(weights(y)).all()
        health = mesh.ask(mesh.find_node(str(a.state)), "status")["health"]
        assert any("diverged" in line for line in health)
