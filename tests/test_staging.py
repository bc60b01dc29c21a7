"""Tensors that the CPU cannot compute with where they lie: averaged as those that it can, to the bit.

Without an accelerator the way there and back is tested with tensors in memory that count as elsewhere;
what only CUDA has (streams, page-locked memory, work that is still queued) needs a GPU.
"""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from mesh import tensors
from mesh.staging import Staging
from mesh.tensors import Tensors

CUDA = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
)
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(params=["memory, as if elsewhere", CUDA], name="device")
def device_elsewhere(request, monkeypatch):
    """Where a model lies whose tensors go through copies."""
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setattr(tensors, "elsewhere", lambda tensor: tensor.device.type != "meta")
    return torch.device("cpu")


class Odd(torch.nn.Module):
    """Every kind of tensor: dense, of odd strides, of other types, empty, tied, and BatchNorm's."""

    def __init__(self, dtype):
        super().__init__()
        self.dense = torch.nn.Linear(7, 5, dtype=dtype)
        self.images = torch.nn.Conv2d(3, 4, 2, dtype=dtype).to(memory_format=torch.channels_last)
        self.turned = torch.nn.Parameter(torch.randn(3, 4, dtype=dtype).T)
        self.spread = torch.nn.Parameter(torch.randn(6, 8, dtype=dtype)[::2, ::3])
        self.wide = torch.nn.Parameter(torch.randn(300, 1000, dtype=torch.float32))
        self.empty = torch.nn.Parameter(torch.empty(0, 3, dtype=dtype))
        self.tied = self.dense.weight
        self.normal = torch.nn.BatchNorm1d(5)
        self.register_buffer("scale", torch.tensor(0.5, dtype=dtype))


def train(model, seed, device):
    """The same progress on any device: it is drawn on the CPU."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randn(parameter.shape, generator=chance)
            parameter.add_((0.01 * step).to(device, parameter.dtype))
        model.normal.running_mean.add_(torch.rand(5, generator=chance).to(device))
        model.normal.running_var.mul_(torch.rand(5, generator=chance).add(0.5).to(device))


def pieces(model):
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_model_elsewhere_is_averaged_as_one_in_memory_to_the_bit(device, dtype):
    torch.manual_seed(1)
    here = Odd(dtype)
    there = copy.deepcopy(here).to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "elsewhere", lambda tensor: not tensor.is_cpu)
        ours = Tensors(here)
        posted = np.zeros((2, ours.entries), np.float32)
        ours.fill(posted[0])  # its tensors stay where they are from here on
    theirs = Tensors(there)
    theirs.fill(posted[1])
    np.testing.assert_array_equal(posted[0], posted[1])
    for seed, what in enumerate(("merge", "collect", "merge", "merge", "collect", "merge")):
        for model, where in ((here, "cpu"), (there, device)):
            train(model, seed, where)
        offered = posted[0] + np.random.default_rng(seed).normal(size=ours.entries, scale=0.01)
        offered = offered.astype(np.float32)
        for each, flat in zip((ours, theirs), posted, strict=True):
            if what == "merge":
                each.merge(flat, offered)
            else:
                each.collect(flat)
        np.testing.assert_array_equal(posted[0], posted[1])
        came, expected = pieces(there), pieces(here)
        for name, value in expected.items():
            assert torch.equal(came[name], value), (what, name)
    for name, value in pieces(there).items():
        assert value.dtype == expected[name].dtype, name
    theirs.load(posted[0])
    ours.load(posted[0])
    assert all(torch.equal(value, pieces(here)[name]) for name, value in pieces(there).items())


def test_a_difference_is_added_elsewhere_as_it_is_merged_in_memory_to_the_bit(device):
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Conv2d(3, 4, 2)).double()
    there = copy.deepcopy(model).to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "elsewhere", lambda tensor: not tensor.is_cpu)
        ours = Tensors(model)
        posted = np.zeros(ours.entries, np.float32)
        ours.fill(posted)
        offered = np.random.default_rng(1).normal(size=ours.entries).astype(np.float32)
        difference = offered - posted
        ours.merge(posted, offered)
    theirs = Tensors(there)
    assert theirs.takes_differences
    theirs.add(difference)
    came, expected = pieces(there), pieces(model)
    assert all(torch.equal(came[name], value) for name, value in expected.items())
    for other in (Odd(torch.float32), torch.nn.Linear(2, 2, dtype=torch.bfloat16)):
        assert not Tensors(other).takes_differences, "`posted` knows more than the model"


def test_a_model_may_move_between_two_hand_overs(monkeypatch):
    """model.to() keeps the parameters, and changes where they lie: here by what counts as elsewhere."""
    model = torch.nn.Linear(3, 2)
    averaged = Tensors(model)
    posted = np.zeros(8, np.float32)
    averaged.fill(posted)
    assert averaged._staging is None
    monkeypatch.setattr(tensors, "elsewhere", lambda tensor: True)
    averaged._devices = [torch.device("meta")] * 2  # it came from another device
    for weight in (2.0, 3.0):
        model.weight.data = torch.full((2, 3), weight)  # as .to() does it, storage and all
        averaged.collect(posted)
        assert averaged._staging is not None
        assert posted[:6].tolist() == [weight] * 6
        averaged.merge(posted, posted + 1)
        assert model.weight.tolist() == [[weight + 1] * 3] * 2


def test_a_model_in_memory_loads_nothing_of_it():
    code = (
        "import sys, numpy, torch; from mesh.tensors import Tensors\n"
        "t = Tensors(torch.nn.Linear(2, 2)); t.fill(numpy.zeros(6, numpy.float32))\n"
        "print('mesh.staging' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ------------------------------------------------------------------------------- on a GPU alone


needs_cuda = CUDA.marks[0]


@needs_cuda
def test_copies_are_page_locked_and_cross_beside_each_other():
    model = torch.nn.Linear(1000, 1000, device="cuda")
    averaged = Tensors(model)
    averaged.fill(np.zeros(averaged.entries, np.float32))
    staging = averaged._staging
    assert isinstance(staging, Staging)
    assert all(staged.here.is_pinned() for staged in staging._staged)
    [streams] = staging._streams.values()
    assert len({streams.down, streams.up, torch.cuda.current_stream()}) == 3


@needs_cuda
@pytest.mark.parametrize("own", [False, True], ids=["default stream", "a stream of its own"])
def test_a_hand_over_waits_for_the_trainings_work_and_the_training_for_it(own):
    """A second of work is queued before the weights change, and they are read right after."""
    model = torch.nn.Linear(2000, 2000, bias=False, device="cuda")
    averaged = Tensors(model)
    posted = np.zeros(averaged.entries, np.float32)
    averaged.fill(posted)
    stream = torch.cuda.Stream() if own else torch.cuda.current_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for turn in range(5):
            torch.cuda._sleep(200_000_000)
            model.weight.fill_(turn)
            averaged.collect(posted)
            assert (posted == turn).all()
            torch.cuda._sleep(200_000_000)
            model.weight.fill_(turn + 10)
            averaged.merge(posted, posted + 1)  # turn + 10 + 1
            seen = model.weight.clone()
            assert (seen == turn + 11).all().item()
            assert (posted == turn + 11).all()


@needs_cuda
def test_a_training_on_a_gpu_learns_what_its_peers_learn():
    import mesh

    def build(rank):
        model = torch.nn.Linear(4, 1, device="cuda")
        return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss

    def loader(rank):
        chance = torch.Generator().manual_seed(rank)
        while True:
            x = torch.randn(16, 4, generator=chance)
            yield x.cuda(), x.sum(1, keepdim=True).cuda()

    report = mesh.simulate(
        build,
        loader,
        nodes=3,
        every=4,
        steps=200,
        evaluate=lambda model: -(model.weight - 1).abs().max().item(),
    )
    assert report.accuracy.averaged > -1e-3
