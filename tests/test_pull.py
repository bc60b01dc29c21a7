"""`mesh pull`: the current model for a machine that need not train it, and the file that it becomes."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import trio

from mesh import observer, pulled, replica
from mesh.codec import EXACT
from mesh.core.messages import SchemaEntry
from mesh.core.strategies import STRATEGIES
from mesh.errors import MeshError, UsageError
from mesh.net.simulated import Weather
from mesh.player import Player
from mesh.pulled import PulledModel
from mesh.responder import Responder
from mesh.runs import RunSpec
from mesh.shared import HandOverMemory
from mesh.tensors import Tensors
from nodes import render
from nodes.cli import main
from tests.helpers import Host, NumpyTraining, parsed
from tests.helpers import until as until_real
from tests.mesh_in_memory import memory_mesh, node_id, run_seeded, until
from tests.schemas import fits

FRAGMENT = 64
FRAGMENTS = 20
MODEL = np.arange(FRAGMENTS * FRAGMENT, dtype=np.float32)


@pytest.fixture
def small_fragments(monkeypatch):
    monkeypatch.setattr(replica, "FRAGMENT_ENTRIES", FRAGMENT)


class Asker:
    """Whoever asks a node for a model: holds what it was told, and a map of the shared memory."""

    def __init__(self):
        self.events = []
        self.values = None

    async def hear(self, event, descriptor=None):
        self.events.append(event)
        if descriptor is not None:
            self.values = HandOverMemory(os.dup(descriptor), event["entries"]).posted

    def __getitem__(self, key):
        return self.events[-1][key]


async def pull(mesh, index, nodes=3, run="toy"):
    asker = Asker()
    await mesh.nodes[index].observer.pull(run, nodes, asker.hear)
    assert asker["event"] == "pulled"
    return asker


async def trained_mesh(mesh, count, *, steps=100):
    """Nodes 1..count whose replicas met, then moved apart and rest: the mean of all is MODEL + 1."""
    players = [await mesh.attach(i, MODEL) for i in range(1, count + 1)]
    await until(lambda: all(p.begun for p in players), 30)
    await until(lambda: all(p.node.exchanged(p.run) for p in players), 30)
    for player in players:
        await player.run.offer()
        player.steps = steps
        await player.post()
    await trio.sleep(30)
    spread = np.linspace(-8, 8, count) if count > 1 else [0.0]
    for player, way in zip(players, spread, strict=True):
        await until(lambda: not player.run.initiated)  # noqa: B023
        player.node._protocol._averaging._runs["toy"]._busy = True
        player.run.replica.weights += np.float32(1 + way)
    return players


def test_an_observer_gets_the_mean_of_the_replicas_and_changes_nothing(small_fragments):
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            players = await trained_mesh(mesh, 3)
            before = [p.weights.copy() for p in players]
            answers = [p.run.counters.answered for p in players]
            model = await pull(mesh, 4)
            assert np.allclose(model.values, MODEL + 1, atol=1e-4)
            assert (model["averaged"], sorted(model["sources"])) == (3, ["n1", "n2", "n3"])
            assert model["mesh_step"] == 100
            assert model.events[0]["schema"] == [["w", [len(MODEL)], "float32"]]
            progress = [e["bytes"] for e in model.events[1:-1]]
            assert progress == sorted(progress)
            assert progress[-1] == model.events[-2]["of"] == 3 * 4 * len(MODEL)
            for player, weights, answered in zip(players, before, answers, strict=True):
                assert np.array_equal(player.weights, weights)
                assert player.run.counters.answered == answered
            await trio.sleep(1000)  # connections that idle are closed
            [single] = (await pull(mesh, 4, 1))["sources"]
            assert single in ("n1", "n2", "n3")

    run_seeded(main, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_model_of_any_strategy_is_pulled_from_afar_and_where_it_is_trained(strategy):
    """`cyclic` has fragments of its own length."""
    values = np.arange(20, dtype=np.float32)

    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            players = [Player(values * (k + 1), strategy=strategy) for k in range(2)]
            for index, player in enumerate(players, 1):
                player.began, player._met = "again", True
                await player.attach(mesh.nodes[index])
            other = Player(values, strategy="clip" if strategy == "pair" else "pair")
            await other.attach(mesh.nodes[3])
            await until(lambda: all(p.run.partners() == 1 and p.begun for p in players), 30)
            await trio.sleep(30)
            mean = sum(player.weights for player in players) / 2
            for asked in (4, 1):
                model = await pull(mesh, asked)
                assert model["averaged"] == 2, model["lost"]
                assert np.allclose(model.values, mean, rtol=1e-3, atol=1e-3)
                [left_out] = model.events[0]["left_out"]
                assert left_out.startswith("n3 (schema ")

    run_seeded(main, 1)


def test_a_machine_that_trains_the_run_counts_its_own_replica_as_one(small_fragments):
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            await trained_mesh(mesh, 3)
            model = await pull(mesh, 3)
            assert np.allclose(model.values, MODEL + 1, atol=1e-4)
            assert model["sources"][0] == "this node"
            assert model["averaged"] == 3
            own = await pull(mesh, 3, 1)
            assert own["sources"] == ["this node"]
            assert np.array_equal(own.values, MODEL + np.float32(9))

    run_seeded(main, 2)


def test_an_unknown_run_is_answered_with_those_there_are_and_one_without_weights_with_that():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            await mesh.attach(1, MODEL, run="digits", sync_timeout_s=500)
            await mesh.attach(1, MODEL, run="names", sync_timeout_s=500)
            await until(lambda: mesh.states(2))
            with pytest.raises(UsageError, match="trains run 'digit'; there are: digits, names"):
                await pull(mesh, 2, run="digit")
            with pytest.raises(MeshError, match="no weights yet"):
                await pull(mesh, 2, run="digits")
            for nodes in (0, 1000):
                with pytest.raises(UsageError, match=r"1\.\.64"):
                    await pull(mesh, 2, nodes, run="digits")

    run_seeded(main, 3)


def test_where_schemas_differ_most_nodes_have_their_way_and_the_others_are_named():
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            players = [await mesh.attach(i, MODEL + i) for i in (1, 2)]
            other = await mesh.attach(3, MODEL, shape=(FRAGMENTS, FRAGMENT))
            await until(lambda: all(p.begun for p in (*players, other)), 30)
            await until(lambda: all(p.node.exchanged(p.run) for p in players), 30)
            await trio.sleep(2)
            model = await pull(mesh, 4)
            assert sorted(model["sources"]) == ["n1", "n2"]
            [left_out] = model.events[0]["left_out"]
            assert left_out == f"n3 (schema {other.run.spec.schema}, strategy pair)"

    run_seeded(main, 4)


def test_replicas_that_never_met_are_not_averaged_and_a_pull_does_not_make_them_meet():
    async def main(rng):
        async with memory_mesh(rng) as mesh:
            for index in (1, 2, 3):
                mesh.start(index)
            for way in ((1, 2), (2, 1)):
                mesh.network.cut(*map(node_id, way))
            near, far = [await mesh.attach(i, MODEL * i, sync_timeout_s=0.1) for i in (1, 2)]
            await until(lambda: near.begun == far.begun == "alone")
            for _ in range(9):
                await far.run.offer()
                await far.post(1.0)
                await trio.sleep(0.01)
            await until(lambda: len(mesh.states(3)) == 2)
            holders = mesh.nodes[3].observer._holders
            await until(lambda: any(donor.info.progress for donor in holders("toy")), 5)
            model = await pull(mesh, 3)
            assert model["sources"] == ["n2"]
            assert np.array_equal(model.values, MODEL * 2 + 9)
            await trio.sleep(1)
            assert not far.node.exchanged(far.run), "an observer is nobody that it met"

    run_seeded(main, 5)


@pytest.mark.parametrize("at", [1, 11, FRAGMENTS + 9])
def test_a_pull_goes_on_with_others_where_a_node_is_lost_in_the_middle(at, small_fragments):
    async def main(rng):
        async with memory_mesh(rng, 4) as mesh:
            await trained_mesh(mesh, 3)
            mesh.network.weather = Weather(bytes_per_s=20e3)
            mesh.network.lose_all()
            asker, took = Asker(), []
            take = observer.Mean.take

            def count(self, index, body, into, codec):
                take(self, index, body, into, codec)
                took.append(index)

            observer.Mean.take = count
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(mesh.nodes[4].observer.pull, "toy", 3, asker.hear)
                    await until(lambda: len(took) >= at, 60)
                    now = asker.events[-1].get("source") or ""
                    lost = next(i for i in (1, 2, 3) if f"n{i}" == now)
                    mesh.network.crash(node_id(lost))
                    mesh.crash(lost)
            finally:
                observer.Mean.take = take
            assert asker["event"] == "pulled"
            assert asker["averaged"] == 2
            assert [line.partition(":")[0] for line in asker["lost"]] == [f"n{lost}"]
            assert took[: 2 * FRAGMENTS] == 2 * list(range(FRAGMENTS)), "nothing was sent twice"
            assert np.abs(asker.values - MODEL - 1).max() <= 8 + 1e-3

    run_seeded(main, at)


def test_when_nobody_gives_the_whole_model_the_reasons_are_told(monkeypatch):
    async def main(rng):
        async with memory_mesh(rng, 3) as mesh:
            await trained_mesh(mesh, 2)
            monkeypatch.setattr(Responder, "_objection", lambda self, peer, message: "not now")
            with pytest.raises(MeshError, match=r"nobody gave the whole model: n\d: not now; n\d"):
                await pull(mesh, 3)

    run_seeded(main, 6)


def test_who_asks_and_goes_away_frees_the_node_and_no_more_than_two_models_are_pulled_at_once(
    small_fragments,
):
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            [player] = await trained_mesh_of_one(mesh)
            mesh.network.weather = Weather(bytes_per_s=2e3)
            mesh.network.lose_all()
            descriptors = len(os.listdir("/proc/self/fd"))
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(mesh.nodes[2].observer.pull, "toy", 1, ignore)
                await trio.sleep(1)
                with pytest.raises(UsageError, match="being pulled"):
                    await pull(mesh, 2)
                nursery.cancel_scope.cancel()
            assert len(os.listdir("/proc/self/fd")) == descriptors
            sent = player.run.counters.bytes_sent
            await trio.sleep(20)
            assert player.run.counters.bytes_sent - sent < 4 * FRAGMENT * 10
            mesh.network.weather = Weather()
            assert np.array_equal((await pull(mesh, 2)).values, MODEL)

    async def ignore(event, descriptor=None):
        pass

    async def trained_mesh_of_one(mesh):
        player = await mesh.attach(1, MODEL)
        await until(lambda: player.begun)
        return [player]

    run_seeded(main, 7)


def test_a_schema_of_many_layers_is_asked_page_by_page_and_a_false_one_is_not_believed(monkeypatch):
    entries = tuple(SchemaEntry(name=f"l{k}", shape=(k % 3,), dtype="float32") for k in range(257))
    size = sum(k % 3 for k in range(257))

    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            spec = RunSpec(
                run="deep",
                entries=entries,
                weight=1.0,
                every=1,
                sync_timeout_s=0.0,
                pid=1,
                script="s",
                started=True,
                codec=EXACT,
            )
            posted = np.arange(size, dtype=np.float32)
            run = await mesh.nodes[1].attach(spec, posted, posted.copy(), lambda event: None)
            await until(lambda: run.how)
            model = await pull(mesh, 2, run="deep")
            assert [name for name, _, _ in model.events[0]["schema"]] == [e.name for e in entries]
            assert np.array_equal(model.values, posted)
            monkeypatch.setattr(observer, "digest", lambda entries: "0" * 16)
            with pytest.raises(MeshError, match="its layers are not those of its schema"):
                await pull(mesh, 2, run="deep")

    run_seeded(main, 8)


# --------------------------------------------------------------------------------------- the file

SCHEMA = [
    ("half", (3,), "float16"),
    ("brain", (4, 1), "bfloat16"),
    ("wide", (2, 2), "float32"),
    ("none", (0, 4), "float32"),
    ("scalar", (), "float64"),
    ("a.b_ü", (70000,), "float32"),
]


def a_model(**changes):
    sizes = [int(np.prod(shape)) for _, shape, _ in SCHEMA]
    values = np.random.default_rng(3).normal(size=sum(sizes)).astype(np.float32)
    fields = {
        "run": "digits",
        "schema": SCHEMA,
        "values": values,
        "mesh_step": 5000,
        "averaged": 3,
        "sources": ["a"],
        "lost": [],
        "left_out": [],
    }
    return PulledModel(**{**fields, **changes})


def test_the_file_holds_every_tensor_in_its_own_dtype_as_the_library_reads_it(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(pulled, "PIECE_ENTRIES", 1000)
    model, path = a_model(), tmp_path / "model.safetensors"
    assert model.save(path) == path.stat().st_size
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["run"], metadata["mesh_step"], metadata["averaged"]) == ("digits", "5000", "3")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    for name, _, dtype in SCHEMA:
        assert (8 + length + header[name]["data_offsets"][0]) % getattr(torch, dtype).itemsize == 0
    found, start = safetensors.torch.load_file(path), 0
    assert set(found) == {name for name, _, _ in SCHEMA}
    for name, shape, dtype in SCHEMA:
        flat = torch.from_numpy(model.values[start : start + int(np.prod(shape))])
        start += flat.numel()
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], flat.reshape(shape).to(getattr(torch, dtype))), name
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_or_ctrl_c_leaves_the_file_that_was_there_and_nothing_else(
    tmp_path, monkeypatch
):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MeshError, match=r"cannot write .*model\.safetensors: File too large"):
            a_model().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(pulled, "_bytes_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        a_model().save(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(MeshError, match="cannot write /dev/null/model: Not a directory"):
        a_model().save(Path("/dev/null/model"))


def interrupted(values, dtype):
    raise KeyboardInterrupt


# --------------------------------------------------------------------------------- real processes


@pytest.fixture
def host():
    host = Host()
    yield host
    host.close()


def test_a_machine_that_trains_nothing_writes_the_model_of_one_that_does(host, capsys):
    giver, asker = host.up_together("giver", "asker")
    values = np.arange(300_000, dtype=np.float32)
    training = NumpyTraining(giver, values, exchanged=False)
    training.memory.posted[:] = training.memory.offered
    training.link.send(op="post", step=5000, loss=None, samples=0)
    until_real(lambda: giver.status()["runs"][0]["mesh_step"] == 5000, "the steps are counted")
    path, pull = host.root / "m.safetensors", ("pull", "--state", asker.state, "--run")

    told = fits(parsed(host.mesh(*pull, "digits", "-o", path, "--json")), "mesh.pull/1")
    assert (told["averaged"], told["mesh_step"], told["sources"]) == (1, 5000, ["giver"])
    assert told["bytes"] == path.stat().st_size
    assert np.array_equal(safetensors.numpy.load_file(path)["weight"], values)

    for arguments, code, hint in (
        (("digit", "-o", path), 2, "there are: digits"),
        (("digits", "-o", host.root / "nowhere" / "m"), 2, "-o"),
        (("digits", "-o", host.root), 2, "-o"),
        (("digits", "-o", path, "--peers", "0"), 2, "peers"),
    ):
        assert main([*map(str, (*pull, *arguments))]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1].startswith("mesh: ")
        assert hint in err

    own = host.mesh("pull", "--state", giver.state, "--run", "digits", "-o", path)
    assert own.returncode == 0, own.stderr
    assert "1 tensors, 1.2 MB, the mean of 1 node (this node) at mesh step 5,000" in own.stdout
    assert "node 1 of 1" in own.stderr
    assert "step 5,000 (mesh 5,000)" in host.mesh("status", "--state", giver.state).stdout

    path.unlink()
    os.kill(giver.pid, signal.SIGSTOP)
    process = subprocess.Popen(
        host.command(*pull, "digits", "-o", path),
        env=host.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr.readline().startswith("digits: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.kill(giver.pid, signal.SIGCONT)
    assert not list(host.root.glob("*m.safetensors*"))
    training.close()


def test_a_batchnorms_variances_are_variances_in_the_file(host):
    """Nodes average their second moments; a state dict has what the layer has."""
    giver, asker = host.up_together("giver", "asker")
    layer = torch.nn.BatchNorm1d(3)
    layer.running_mean[:] = torch.tensor([5.0, -1.0, 0.0])
    layer.running_var[:] = torch.tensor([0.25, 4.0, 1e-3])
    tensors = Tensors(layer)
    values = np.empty(tensors.entries, np.float32)
    tensors.fill(values)
    entries = [SchemaEntry(name=n, shape=tuple(s), dtype=d) for n, s, d in tensors.schema()]
    training = NumpyTraining(giver, values, exchanged=False, entries=tuple(entries))
    path = host.root / "m.safetensors"
    host.mesh("pull", "--state", asker.state, "--run", "digits", "-o", path)
    training.close()

    pulled = torch.nn.BatchNorm1d(3)
    pulled.load_state_dict(safetensors.torch.load_file(path), strict=False)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(pulled.state_dict()[name], value, msg=name)


# --------------------------------------------------------------------------------- what is printed


def test_on_a_terminal_a_bar_shows_how_far_it_is_and_without_one_each_node_is_one_line(
    monkeypatch, capsys
):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with render.bar() as draw:
        draw("digits: node 1 of 2: [giver]", 500_000, 1_000_000)
    shown = capsys.readouterr()
    assert "digits: node 1 of 2: [giver]" in shown.err
    assert "0.5/1.0 MB" in shown.err
    assert shown.out == ""
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    with render.bar() as draw:
        for done in range(3):
            draw("digits: node 1 of 2: [giver]", done, 10)
        draw("digits: node 2 of 2: other", 5, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["digits: node 1 of 2: [giver]", "digits: node 2 of 2: other"]


def test_without_a_node_on_this_machine_it_says_how_to_start_one(tmp_path, capsys):
    assert main(["pull", "--state", str(tmp_path), "--run", "r", "-o", str(tmp_path / "m")]) == 3
    assert "mesh up" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
