"""join(checkpoint=): a training that crashed goes on where it was, and averages with a mesh that went on."""

import contextlib
import itertools
import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import mesh
from mesh import autosave
from mesh.autosave import Autosave
from mesh.checkpoint import snapshot
from mesh.generations import read_generation, write_generation
from mesh.keeper import Keeper
from mesh.session import Session
from tests.helpers import REPOSITORY, until

FIGURES = {"run": "toy", "mesh_step": 0, "samples": 0, "strategy": "pair", "exchanged": False}


class Crash(Exception):
    """The training ends in the middle of its loop."""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two members of one mesh; a host registry that is nobody else's."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    token = mesh.create_mesh(tmp_path / "a", "a")
    mesh.join_mesh(tmp_path / "b", token, "b")
    return [mesh.NodeSettings(state=tmp_path / name, interfaces=("lo",)) for name in ("a", "b")]


def make(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return model, mesh.QuasiGlobalSGD(model.parameters(), lr=0.01)


def train(node, model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).pow(2).sum().backward()
        optimizer.step()
        node.step(samples=8)


def values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def meet(*nodes):
    """An exchange, and no step."""
    for node in nodes:
        with node.averaged():
            pass


def test_a_training_that_crashed_resumes_by_itself_and_averages_with_the_mesh(
    places, tmp_path, caplog
):
    options = {"run": "toy", "every": 2, "sync_timeout": 0.3}
    (x, ox), (y, oy) = make(1), make(2)
    path = tmp_path / "kept" / "toy.json"
    kept = {**options, "settings": places[0], "checkpoint": tmp_path / "kept"}
    with mesh.join(y, oy, settings=places[1], **options) as second:
        with (
            contextlib.suppress(Crash),
            mesh.join(x, ox, checkpoint_every=0, **kept) as first,
        ):
            assert caplog.text.count("GroupNorm survives uneven data") == 2, "once for each join"
            second.wait_for_peers(1, timeout=10)
            first.wait_for_peers(1, timeout=10)
            meet(first)

            def has_mixed():
                """join() tells the optimizer of mixings, and a checkpoint was written meanwhile."""
                train(first, x, ox, 4)
                train(second, y, oy, 4)
                return ox.state[x[0].weight]["m"].any() and path.exists()

            until(has_mixed, "a mixing")
            raise Crash
        saved, state = make(3)
        info = mesh.load(path, saved, state)
        assert info.step > 0
        assert info.samples == 8 * info.step
        assert info.exchanged
        train(second, y, oy, 8)
        theirs = mesh_weights(second, y)
        assert not torch.allclose(theirs, values(saved), atol=1e-3)
        x, ox = make(4)
        with mesh.join(x, ox, **kept) as first:
            assert (first.steps, first.statistics().samples) == (info.step, info.samples)
            assert first.statistics().began == "again"
            assert torch.equal(values(x), values(saved))
            assert int(x[1].num_batches_tracked) == info.step
            key = state.state[saved[0].weight]["m"]
            assert torch.equal(ox.state[x[0].weight]["m"], key)
            second.wait_for_peers(1, timeout=10)
            until(lambda: together(first, x, second, y), "both hold one model")
            middle = (values(saved) + theirs) / 2
            assert torch.allclose(mesh_weights(first, x), middle, atol=1e-4)
            before = {name: value.clone() for name, value in x.state_dict().items()}
            with first.averaged():
                first.refresh_batchnorm(3 * [torch.randn(8, 3)])
                assert int(x[1].num_batches_tracked) == 3
                first.save(tmp_path / "averaged")
            assert all(torch.equal(v, before[name]) for name, v in x.state_dict().items())
            assert mesh.load(tmp_path / "averaged", make(5)[0]).step == first.steps
            train(first, x, ox, 3)
        assert mesh.load(path, *make(5)).step == info.step + 3, "the last step is in the last one"


def mesh_weights(node, model):
    with node.averaged():
        return values(model).clone()


def together(first, x, second, y):
    return torch.allclose(mesh_weights(first, x), mesh_weights(second, y), atol=1e-5)


def test_what_outer_keeps_goes_into_the_checkpoint_and_back_to_the_node(places, tmp_path):
    options = {"run": "toy", "strategy": "outer", "every": 2, "sync_timeout": 0.1}
    kept = {**options, "settings": places[0], "checkpoint": tmp_path, "checkpoint_every": 0}
    path = tmp_path / "toy.json"
    x, ox = make(1)
    with contextlib.suppress(Crash), mesh.join(x, ox, **kept) as node:
        entries = node._tensors.entries
        until(lambda: train(node, x, ox, 1) or path.exists(), "a checkpoint")
        raise Crash
    about, tensors = read_generation(path)
    held = safetensors.torch.load(tensors)
    assert held["strategy.momentum"].shape == held["strategy.anchor"].shape == (entries,)
    held["strategy.momentum"] = torch.linspace(0.0, 1.0, entries)
    write_generation(path, about, safetensors.torch.save(held))
    with mesh.join(*make(2), **kept) as node:
        state = node._attachment.session.strategy_state()
        assert np.array_equal(state[1], held["strategy.momentum"])
        assert np.array_equal(state[0], held["strategy.anchor"])
    mesh.load(path, *make(3))
    held["strategy.anchor"] = torch.ones(entries + 1)
    held["strategy.momentum"] = torch.ones(entries + 1)
    write_generation(path, about, safetensors.torch.save(held))
    with pytest.raises(mesh.UsageError, match="anchor of strategy 'outer' has the shape"):
        mesh.join(*make(4), **kept)
    about["strategy"]["state"] = {"anchor": "model.0.weight"}
    write_generation(path, about, safetensors.torch.save(held))
    with pytest.raises(mesh.UsageError, match="is no state of strategy 'outer'"):
        mesh.load(path, *make(5))


@pytest.mark.parametrize("differences", [False, True])
def test_an_anchor_is_saved_as_it_was_for_a_model_that_lacks_the_offer(differences):
    posted, offered, anchor = np.float32([1, 2]), np.float32([4, 1]), np.float32([10, 10])
    kept = np.stack([anchor, np.float32([7, 7])])
    memory = SimpleNamespace(
        posted=offered - posted if differences else posted, offered=offered, kept=kept
    )
    session = Session(None, memory, None, differences=differences)
    assert np.array_equal(session.strategy_state(), kept), "the offer is in the model"
    session.fresh = True
    lacking = session.strategy_state()
    assert lacking[0].tolist() == [10 - 3, 10 + 1]
    assert lacking[1].tolist() == [7, 7]


# -------------------------------------------------------------------------------- without any node


def write(keeper, step):
    if keeper.due(None):
        keeper.step(step=step, **FIGURES)


def test_a_full_disk_is_told_once_and_again_of_the_last_checkpoint_and_the_next_is_tried(
    tmp_path, monkeypatch, caplog
):
    model, optimizer = make(1)
    keeper = Keeper(model, optimizer, Autosave(tmp_path, "toy", 0.0))
    tries, full = [], True

    def may_fail(path, about, tensors):
        tries.append(about["step"])
        if full:
            raise mesh.MeshError("cannot write toy.json: No space left on device")

    monkeypatch.setattr(autosave, "write_generation", may_fail)

    def written(step):
        write(keeper, step)
        return tries[-1:] == [step]

    with caplog.at_level(logging.WARNING, "mesh"):
        for step in (1, 2, 3):
            until(lambda step=step: written(step), "a try")
        full = False
        until(lambda: written(4), "a try")
        full = True
        until(lambda: written(5), "a try")
        keeper.finish(step=6, **FIGURES)
        assert tries[-1] == 6
    assert "device: what was learned since the checkpoint before is not saved" in caplog.text
    assert caplog.text.count("No space left on device: the checkpoint before stays") == 2
    assert caplog.text.count("checkpoints are written again") == 1


def test_checkpoints_are_as_far_apart_as_asked(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(autosave.time, "monotonic", lambda: now)
    saver = Autosave(tmp_path, "toy", 60.0)
    assert not saver.due()
    now = 161.0
    assert saver.due()
    saver.start(snapshot(*make(1), step=1, **FIGURES))
    saver.finish(None)
    assert not saver.due()
    now = 221.5
    assert saver.due()


HOLD = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print(1,flush=True); input()"


def test_two_trainings_do_not_keep_their_checkpoints_in_one_file(tmp_path):
    first = Autosave(tmp_path, "toy", 60.0)
    first.close()
    path = first.path.with_suffix(".lock")
    command = [sys.executable, "-S", "-c", HOLD, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(mesh.UsageError, match="another training of run 'toy' keeps"):
            Autosave(tmp_path, "toy", 60.0)
        Autosave(tmp_path, "another", 60.0).close()
        other.kill()
    Autosave(tmp_path, "toy", 60.0).close()


def test_a_second_training_of_one_process_is_refused_before_it_touches_anything(tmp_path):
    """A cell of a notebook that runs again: the model has gone on since the checkpoint."""
    model, optimizer = make(1)
    first = Autosave(tmp_path, "toy", 60.0)
    first.start(snapshot(model, optimizer, step=1, **FIGURES))
    first._thread.join()
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    with pytest.raises(
        mesh.UsageError, match=r"this process keeps checkpoints of run 'toy'.*close"
    ):
        mesh.join(model, optimizer, run="toy", checkpoint=tmp_path / "." / "x" / "..")
    assert (model[0].weight == 7.0).all()
    command = [sys.executable, "-S", "-c", HOLD.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB")]
    path = first.path.with_suffix(".lock")
    other = subprocess.run([*command, path], check=False, capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr, "the first still holds the file"
    first.close()
    Autosave(tmp_path, "toy", 60.0).close()


def test_what_comes_to_be_unsavable_is_told_once_and_training_goes_on(tmp_path, caplog):
    model, optimizer = make(1)
    keeper = Keeper(model, optimizer, Autosave(tmp_path, "toy", 0.0))
    keeper.step(step=1, **FIGURES)
    optimizer.param_groups[0]["lr"] = np.float32(0.25)  # a schedule of numpy's
    keeper.close()
    keeper = Keeper(model, optimizer, Autosave(tmp_path, "toy", 0.0))
    assert keeper.resumed.step == 1
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1, 3, dtype=np.float32)[1]
    keeper.step(step=2, **FIGURES)
    optimizer.param_groups[0]["note"] = print
    for step in (3, 4):
        keeper.step(step=step, **FIGURES)
    keeper.finish(step=5, **FIGURES)
    told = [record.getMessage() for record in caplog.records if "no checkpoint" in record.message]
    assert len(told) == 1
    assert "note is builtin_function_or_method" in told[0]
    del optimizer.param_groups[0]["note"]
    with contextlib.closing(Autosave(tmp_path, "toy", 0.0)) as saver:
        assert saver.resume(model, optimizer).step == 2
    assert optimizer.param_groups[0]["lr"] == 0.5

    optimizer.param_groups[0]["note"] = print
    saver = Autosave(tmp_path, "other", 0.0)
    with pytest.raises(mesh.UsageError, match="note is builtin"), contextlib.closing(saver):
        Keeper(model, optimizer, saver)


def test_a_run_of_any_name_has_a_file_and_a_file_of_another_run_is_told(tmp_path):
    names = ("toy", "a/b", "..", "a b", "äöü", "x" * 64, "_" * 64, "a_b")
    savers = [Autosave(tmp_path, name, 60.0) for name in names]
    assert len({saver.path for saver in savers}) == len(names)
    assert all(saver.path.parent == tmp_path for saver in savers)
    savers[0].finish(snapshot(*make(1), step=1, **{**FIGURES, "run": "other"}))
    with pytest.raises(mesh.UsageError, match="is of run 'other', not 'toy'"):
        savers[0].resume(*make(1))
    assert savers[1].resume(*make(1)) is None
    with pytest.raises(mesh.MeshError, match="choose another with checkpoint="):
        Autosave(savers[0].path, "toy", 60.0)


def test_a_merge_after_an_absence_says_nothing_of_momentum():
    model, optimizer = make(1)
    keeper = Keeper(model, optimizer, None)
    first, again = object(), object()
    keeper.attached(first, 0)
    made = itertools.count(1)
    weight = model[0].weight

    def momentum_after(session, moved_by):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        before = optimizer.state[weight]["m"].clone()
        with torch.no_grad():
            weight.add_(moved_by)
        keeper.merged(session, next(made))
        return float((optimizer.state[weight]["m"] - before).abs().max())

    assert 0 < momentum_after(first, 0.01) < 1
    assert momentum_after(again, 1000.0) == 0, "all that the mesh did while the node was gone"
    assert 0 < momentum_after(again, 0.01) < 1
