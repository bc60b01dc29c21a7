"""Checkpoints: everything comes back exactly, whatever was killed when, and bad files change nothing."""

import contextlib
import copy
import errno
import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import safetensors.torch
import torch

import mesh
from mesh.checkpoint import load_generation, snapshot
from mesh.generations import generation_path, read_generation, write_generation
from mesh.simulated_disk import SimulatedDisk, fails_at
from tests.helpers import REPOSITORY, until

FIGURES = {
    "run": "toy",
    "step": 7,
    "mesh_step": 9,
    "samples": 112,
    "strategy": "pair",
    "exchanged": True,
}
PATH = Path("/checkpoints/toy.json")


def save(path, model, optimizer=None, **figures):
    write_generation(generation_path(path), *snapshot(model, optimizer, **{**FIGURES, **figures}))


def train(model, optimizer, rows, steps=3):
    """What any training does; returns nothing that is not in model and optimizer."""
    for k in range(steps):

        def closure(k=k):
            optimizer.zero_grad()
            loss = model(rows + k).pow(2).sum()
            loss.backward()
            return loss

        if isinstance(optimizer, mesh.QuasiGlobalSGD):
            optimizer.mixed()
        optimizer.step(closure)


# ----------------------------------------------------------------------------------- what comes back

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
} | {"QuasiGlobalSGD": mesh.QuasiGlobalSGD}
SETTINGS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True, "lr": torch.tensor(1e-3)},
    "RMSprop": {"centered": True, "momentum": 0.5},
}


class Matrix(torch.nn.Module):
    """One parameter, of two dimensions: every optimizer takes it. LBFGS wants it contiguous."""

    def __init__(self, contiguous):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 3) if contiguous else torch.randn(3, 4).t())

    def forward(self, rows):
        return rows @ self.weight


class Rows(torch.nn.Module):
    """Sparse gradients, for SparseAdam."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(4, 3, sparse=True)

    def forward(self, rows):
        return self.table(rows.long().flatten() % 4)


@pytest.mark.parametrize("name", [*sorted(set(OPTIMIZERS) - {"Optimizer"}), "low"])
def test_every_optimizer_of_torch_goes_on_bit_by_bit(name, tmp_path):
    def make():
        model = Rows() if name == "SparseAdam" else Matrix(name == "LBFGS")
        if name == "low":
            return model.bfloat16(), mesh.QuasiGlobalSGD(model.parameters(), 1e-3)
        return model, OPTIMIZERS[name](model.parameters(), **SETTINGS.get(name, {"lr": 1e-3}))

    torch.manual_seed(1)
    rows = torch.randn(5, 4).abs().to(torch.bfloat16 if name == "low" else torch.float32)
    (model, optimizer), (other, fresh) = make(), make()
    train(model, optimizer, rows)
    save(tmp_path / "toy", model, optimizer)
    train(other, fresh, rows, 1)  # a state of its own, which has to go
    info = mesh.load(tmp_path / "toy", other, fresh)
    assert info.optimizer == type(optimizer).__name__
    assert [(g, type(v)) for g, v in fresh.param_groups[0].items() if g != "params"] == [
        (g, type(v)) for g, v in optimizer.param_groups[0].items() if g != "params"
    ]
    assert described(fresh, other) == described(optimizer, model)
    for one, its in ((model, optimizer), (other, fresh)):
        train(one, its, rows)
    assert torch.equal(next(model.parameters()), next(other.parameters()))
    assert next(other.parameters()).stride() == next(model.parameters()).stride()


class Factored(torch.optim.Optimizer):
    """As Adafactor: large parameters have rows and columns, small ones every entry."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "dtype": torch.bfloat16})

    @torch.no_grad()
    def step(self, closure):
        torch.enable_grad()(closure)()
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if min(parameter.shape) > 10:
                state.setdefault("row", parameter.mean(0))
            else:
                state.setdefault("each", torch.ones_like(parameter))
            parameter.sub_(0.1 * parameter.grad)


def test_an_optimizer_of_somebody_elses_is_taken_at_its_word(tmp_path):
    models = [torch.nn.Linear(20, 20, bias=False) for _ in range(2)]
    optimizers = [Factored(model.parameters()) for model in models]
    train(models[0], optimizers[0], torch.ones(1, 20), 1)
    save(tmp_path / "toy", models[0], optimizers[0])
    mesh.load(tmp_path / "toy", models[1], optimizers[1])
    kept, came = (o.state[m.weight]["row"] for m, o in zip(models, optimizers, strict=True))
    assert torch.equal(kept, came)
    assert optimizers[1].param_groups[0]["dtype"] is torch.bfloat16


def test_settings_that_the_file_does_not_know_stay_the_optimizers_own(tmp_path):
    """A schedule that was added since, or a newer torch."""
    model = torch.nn.Linear(2, 2)
    save(tmp_path / "toy", model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    mesh.load(tmp_path / "toy", model, optimizer)
    [group] = optimizer.param_groups
    assert (group["lr"], group["initial_lr"]) == (0.1, 0.3)


def described(optimizer, model):
    """Type and order in memory of each tensor of the optimizer's state."""
    [state] = [optimizer.state[p] for p in model.parameters()]
    tensors = [(name, t) for name, t in state.items() if isinstance(t, torch.Tensor)]
    return [(name, t.dtype, t.shape, t.stride()) for name, t in tensors]


class Odd(torch.nn.Module):
    """Tied weights, buffers of all kinds, low precision, nothing at all, and a state of its own."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = torch.nn.Embedding(5, 4)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.low = torch.nn.Parameter(torch.randn(3, 2).to(torch.bfloat16).t())
        self.norm = torch.nn.BatchNorm1d(4)
        self.norm.num_batches_tracked.fill_(seed)
        self.register_buffer("mask", torch.rand(4) > 0.5)
        self.register_buffer("scale", torch.tensor(float("inf") if seed == 1 else 0.0).double())
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("part", torch.arange(100 * seed)[seed : seed + 2])
        self.own = {"epoch": seed, "best": (float("nan"), None), "seen": torch.arange(seed, 4)}

    def get_extra_state(self):
        return self.own

    def set_extra_state(self, state):
        self.own = state


def test_every_entry_of_a_model_comes_back_in_place(tmp_path):
    model, other = Odd(1), Odd(2)
    kept = dict(other.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    save(tmp_path / "toy.json", model, optimizer)
    assert mesh.load(tmp_path / "toy", other) == mesh.CheckpointInfo(**FIGURES, optimizer="AdamW")
    values = other.state_dict()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(values[name], tensor), name
            assert values[name].dtype == tensor.dtype
    assert other.head.weight is other.embedding.weight
    assert all(kept[name] is p for name, p in other.named_parameters()), "filled, not replaced"
    assert other.own["epoch"] == 1
    assert torch.equal(other.own["seen"], torch.arange(1, 4))
    assert str(other.own["best"]) == "(nan, None)"
    [tensors] = tmp_path.glob("*.safetensors")
    names = safetensors.torch.load_file(tensors)
    assert "model.embedding.weight" in names
    assert "model.head.weight" not in names, "tied weights are saved once"


def test_a_rate_that_a_schedule_changed_and_groups_come_back():
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()
    disk = SimulatedDisk(Random(1))
    write_generation(PATH, *snapshot(model, optimizer, **FIGURES), disk)
    fresh = torch.optim.SGD(copy.deepcopy(groups), lr=0.7, momentum=0.2)
    load_generation(PATH, model, fresh, disk)
    assert [group["lr"] for group in fresh.param_groups] == [0.05, 0.25]
    assert [group["initial_lr"] for group in fresh.param_groups] == [0.1, 0.5]


def test_a_name_may_have_a_suffix_and_a_directory_is_none(tmp_path):
    for name in ("toy", "toy.json", "toy.safetensors"):
        assert generation_path(tmp_path / name) == tmp_path / "toy.json"
    assert generation_path("v1.5").name == "v1.5.json"
    with pytest.raises(mesh.UsageError, match="is a directory: name a checkpoint in it"):
        generation_path(tmp_path)


# ------------------------------------------------------------------------ full disks, kills, power cuts


class Killed(BaseException):
    """The process ends here, between two operations."""


def filled(value):
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def put(disk, value):
    write_generation(PATH, *snapshot(filled(value), None, **{**FIGURES, "step": value}), disk)


def whole(disk):
    """The step of the checkpoint, which its weights have to agree with."""
    model = filled(-1)
    step = load_generation(PATH, model, None, disk).step
    assert {v for p in model.parameters() for v in p.flatten().tolist()} == {float(step)}
    return step


OPERATIONS = 8
"""A save's: write, sync, rename, sync_directory for each of two files; then what is old is removed."""


@pytest.mark.parametrize("call", range(OPERATIONS))
def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(call):
    disk = SimulatedDisk(Random(call))
    put(disk, 1)
    disk.faults = fails_at(call, errno.ENOSPC)
    with pytest.raises(mesh.MeshError, match="No space left"):
        put(disk, 2)
    assert whole(disk) == (2 if call == OPERATIONS - 1 else 1)
    disk.faults = None
    put(disk, 3)
    assert whole(disk) == 3
    assert len(disk.names()) == 2, "nothing half-written stays"


@pytest.mark.parametrize("call", range(OPERATIONS + 3))
@pytest.mark.parametrize("power", [True, False])
def test_a_kill_or_a_power_cut_at_any_point_leaves_one_whole_checkpoint(call, power):
    for seed in range(10):
        disk = SimulatedDisk(Random(seed))
        put(disk, 1)
        calls = 0

        def dies(_, disk=disk):
            nonlocal calls
            calls += 1
            if calls > call:
                disk.faults = None
                raise Killed

        disk.faults = dies
        with contextlib.suppress(Killed):
            put(disk, 2)
        disk.faults = None
        if power:
            disk.crash()
        assert whole(disk) in (1, 2)
        if call >= OPERATIONS:
            assert whole(disk) == 2, "once save returned, it is the new one"
        put(disk, 3)
        assert whole(disk) == 3
        left = [path.name for path in disk.names() if not path.name.startswith(".")]
        assert len(left) == 2, "older generations are gone"


ENTRIES = 64 * 64 + 64
SAVER = """
import json, sys
from array import array
from pathlib import Path
from mesh.generations import write_generation
path, about, header = Path(sys.argv[1]), json.loads(sys.argv[2]), bytes.fromhex(sys.argv[3])
while True:
    about["step"] += 1
    numbers = array("f", [about["step"]]) * int(sys.argv[4])
    write_generation(path, about, header + numbers.tobytes())
"""
"""A training that saves in a loop; without torch, whose import takes longer than all kills here."""


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    rng, last = random.Random(1), 0
    path = tmp_path / "toy.json"
    model = torch.nn.Linear(64, 64)
    about, tensors = snapshot(model, None, **{**FIGURES, "step": 0})
    header = tensors[: -4 * ENTRIES].hex()
    for _ in range(12):
        text = json.dumps({**about, "step": last})
        saver = subprocess.Popen(
            [sys.executable, "-S", "-c", SAVER, path, text, header, str(ENTRIES)], cwd=REPOSITORY
        )
        try:
            until(lambda before=last: step_of(path) > before, "a checkpoint")
            end = time.monotonic() + rng.uniform(0, 0.02)
            while time.monotonic() < end:
                step_of(path)  # who reads meanwhile finds a whole one, too
        finally:
            saver.kill()
            saver.wait()
        last = mesh.load(path, model).step
        assert {v for p in model.parameters() for v in p.flatten().tolist()} == {float(last)}
    save(path, model)
    assert len(list(tmp_path.iterdir())) == 2, "what the kills left half-written is gone"


def step_of(path):
    written = generation_path(path).exists()
    return read_generation(generation_path(path))[0]["step"] if written else 0


# ---------------------------------------------------------------------------------------- bad files


def changed(path, change):
    """The JSON after `change(about)`; what it returns takes its place."""
    about = json.loads(path.read_bytes())
    about = change(about) or about
    path.write_text(json.dumps(about))


def tensors_changed(path, data):
    """Other tensors, with a JSON that says that they are right."""
    about = json.loads(path.read_bytes())
    new = hashlib.sha256(data).hexdigest()
    about["tensors"] = {"file": f"toy-{new[:16]}.safetensors", "sha256": new, "bytes": len(data)}
    (path.parent / about["tensors"]["file"]).write_bytes(data)
    path.write_text(json.dumps(about))


def put_in(about, *keys, value):
    for key in keys[:-1]:
        about = about[key]
    about[keys[-1]] = value


def setting(*keys, value):
    return lambda path: changed(path, lambda about: put_in(about, *keys, value=value))


def other_tensors(**tensors):
    return lambda path: tensors_changed(path, safetensors.torch.save(tensors))


HEADER = b'{"model.weight":{"dtype":"F32","shape":[9999,9999],"data_offsets":[0,4]}}'
GROUP = ("optimizer", "state", "dict", "param_groups", 0, "dict")
MOMENTS = ("optimizer", "state", "dict", "state", "pairs", 0, 1, "dict")
BIAS_MOMENT = "optimizer.state.1.exp_avg"
BAD_FILES = {
    "no file": (lambda p: p.unlink(), "there is no checkpoint"),
    "an empty file": (lambda p: p.write_bytes(b""), "is no checkpoint"),
    "half a JSON": (lambda p: p.write_bytes(p.read_bytes()[:200]), "is no checkpoint"),
    "no JSON": (lambda p: p.write_bytes(b"\x80\x04\x95pickle"), "is no checkpoint"),
    "a JSON without end": (lambda p: p.write_bytes(b"[" * 100_000), "is no checkpoint"),
    "a list": (lambda p: changed(p, lambda _: [1]), "is no checkpoint"),
    "another version": (setting("format", value="mesh.checkpoint/9"), "with the version"),
    "no tensors": (setting("tensors", value=None), "names no tensors"),
    "tensors elsewhere": (setting("tensors", "file", value="../../etc/passwd"), "names no tensors"),
    "tensors of another": (
        setting("tensors", "file", value="other-0123456789abcdef.safetensors"),
        "names no tensors",
    ),
    "tensors that are gone": (
        lambda p: next(p.parent.glob("*.safetensors")).unlink(),
        "there is no checkpoint",
    ),
    "half of the tensors": (
        lambda p: (t := next(p.parent.glob("*.safetensors"))).write_bytes(t.read_bytes()[:-9]),
        "is not what",
    ),
    "a step below 0": (setting("step", value=-1), "step is -1"),
    "a step that is a text": (setting("step", value="7"), "step is 7"),
    "samples beyond all": (setting("samples", value=2**80), "samples is"),
    "no run": (setting("run", value=None), "run, strategy or optimizer"),
    "tensors that are noise": (lambda p: tensors_changed(p, b"noise" * 9), "can be read"),
    "a header that lies": (
        lambda p: tensors_changed(p, len(HEADER).to_bytes(8, "little") + HEADER + b"1234"),
        "can be read",
    ),
    "other layers": (other_tensors(**{"model.fc": torch.ones(2)}), "layer weight is only in this"),
    "another shape": (
        other_tensors(**{"model.weight": torch.ones(3, 2), "model.bias": torch.ones(2)}),
        "layer weight is 2x2 float32 here, 3x2 float32 there",
    ),
    "another type": (
        other_tensors(**{"model.weight": torch.ones(2, 2).half(), "model.bias": torch.ones(2)}),
        "layer weight is 2x2 float32 here, 2x2 float16 there",
    ),
    "one layer more": (
        other_tensors(
            **{f"model.{n}": torch.ones(s) for n, s in (("weight", (2, 2)), ("bias", 2), ("c", 1))}
        ),
        "layer c is only in the file",
    ),
    "other ties": (setting("model", "tied", value={"bias": "weight"}), "tied"),
    "no model": (setting("model", value=3), "can be read"),
    "another optimizer": (setting("optimizer", "class", value="SGD"), "its optimizer is SGD"),
    "no optimizer": (setting("optimizer", value=None), "without an optimizer"),
    "no state": (setting("optimizer", "state", value={"dict": {}}), "can be read"),
    "a state of nobody": (
        setting("optimizer", "state", "dict", "state", value={"pairs": [[5, {"dict": {}}]]}),
        "not there",
    ),
    "a state that is a number": (
        setting("optimizer", "state", "dict", "state", value={"pairs": [[0, 1.5]]}),
        "is no table",
    ),
    "an unknown mark": (
        setting("optimizer", "state", "dict", "state", value={"call": "os.system"}),
        "no value of a checkpoint",
    ),
    "a tensor of the model's": (setting(*GROUP, "lr", value={"tensor": "model.bias"}), "no value"),
    "a rate that is a text": (setting(*GROUP, "lr", value="fast"), "the optimizer's lr is fast"),
    "no rate": (
        lambda p: changed(p, lambda a: drop(a, *GROUP, "lr")),
        "the optimizer's lr is None",
    ),
    "other parameters": (setting(*GROUP, "params", value=[0]), "grouped otherwise"),
    "a moment of another layer": (
        setting(*MOMENTS, "exp_avg", value={"tensor": BIAS_MOMENT}),
        r"exp_avg of parameter 0 is \[2\]: it has the shape \[2, 2\]",
    ),
    "a moment that is a number": (
        setting(*MOMENTS, "exp_avg_sq", value=0.5),
        r"exp_avg_sq of parameter 0 is 0.5: it has the shape \[2, 2\]",
    ),
    "a moment that is missing": (
        lambda p: changed(p, lambda a: drop(a, *MOMENTS, "exp_avg")),
        "exp_avg of parameter 0 is missing",
    ),
    "many counts of steps": (
        setting(*MOMENTS, "step", value={"tensor": BIAS_MOMENT}),
        "step of parameter 0 holds 2 numbers",
    ),
    "a count of steps that is a text": (
        setting(*MOMENTS, "step", value="first"),
        "step of parameter 0 is first, no number",
    ),
}


def drop(about, *keys):
    for key in keys[:-1]:
        about = about[key]
    del about[keys[-1]]


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_told_and_changes_nothing(name, tmp_path):
    spoil, message = BAD_FILES[name]
    torch.manual_seed(1)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, torch.ones(1, 2), 1)
    save(tmp_path / "toy", model, optimizer)
    spoil(tmp_path / "toy.json")
    train(model, optimizer, torch.ones(1, 2), 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(mesh.UsageError, match=message) as caught:
        mesh.load(tmp_path / "toy", model, optimizer)
    assert str(tmp_path / "toy") in str(caught.value)
    assert str((model.state_dict(), optimizer.state_dict())) == str(before)


def test_what_cannot_be_saved_without_pickle_is_told(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["schedule"] = train
    with pytest.raises(mesh.UsageError, match=r"schedule is function: only numbers"):
        save(tmp_path / "toy", model, optimizer)
    with pytest.raises(mesh.UsageError, match=r"model.weight is .*complex64: it cannot be saved"):
        save(tmp_path / "toy", torch.nn.Linear(2, 2, dtype=torch.complex64))
    assert list(tmp_path.iterdir()) == []
