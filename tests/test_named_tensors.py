"""Which tensors of a model are averaged: each number once, under the model's own names, or a refusal."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mesh
from mesh.checkpoint import load, snapshot
from mesh.errors import UsageError
from mesh.generations import generation_path, write_generation
from mesh.shared import HandOverMemory
from mesh.tensors import Tensors


def moved_by_one(model):
    """By how much a hand-over moves each parameter that is to move by 1."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = Tensors(model)
    posted = np.zeros(averaged.entries, np.float32)
    averaged.fill(posted)
    averaged.merge(posted, posted + 1)
    averaged.collect(posted)
    after = np.zeros_like(posted)
    averaged.fill(after)
    np.testing.assert_array_equal(posted, after)
    return {
        name: (value - before[name]).round(decimals=4).unique()
        for name, value in model.state_dict().items()
    }


def autoencoder(tie):
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False))
    tie(model)
    return model


@pytest.mark.parametrize(
    "tie",
    [
        lambda m: setattr(m[1], "weight", nn.Parameter(m[0].weight.t())),
        lambda m: setattr(m[1].weight, "data", m[0].weight.data.t()),
        lambda m: m.register_buffer("flat", m[0].weight.data.view(-1)),
        lambda m: m.register_buffer("cube", m[0].weight.data.view(3, 1, 5).transpose(0, 2)),
    ],
    ids=["transposed parameter", "transposed data", "flat view", "turned view"],
)
def test_numbers_that_two_tensors_show_are_averaged_once(tie):
    model = autoencoder(tie)
    assert all(step.tolist() == [1.0] for step in moved_by_one(model).values())


def test_columns_of_one_matrix_share_nothing():
    """They lie between each other in memory."""
    whole = torch.randn(6, 8)
    model = nn.Module()
    model.left, model.right = nn.Parameter(whole[:, :3]), nn.Parameter(whole[:, 3:])
    model.more = nn.LSTM(3, 4, 2)  # whose weights lie in one storage, one after the other
    assert all(step.tolist() == [1.0] for step in moved_by_one(model).values())


def part_of_another(model):
    model.register_buffer("first", model.weight.data[0])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (part_of_another, "first and weight share a part of their numbers"),
        (lambda m: m.register_buffer("b", torch.ones(1, 4).expand(3, 4)), "b is expanded.*clone"),
        (
            lambda m: m.register_buffer("b", torch.eye(4).to_sparse()),
            "b is sparse.*persistent=False",
        ),
        (lambda m: m.add_module("lazy", nn.LazyLinear(4)), "lazy.weight has no shape yet"),
        (
            lambda m: m.add_module("far", nn.Linear(4, 4, device="meta")),
            "far.weight has no numbers",
        ),
        (
            lambda m: m.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4)),
            "mask has entries of -inf.*persistent=False",
        ),
        (
            lambda m: m.register_buffer("mask", torch.full((2,), torch.finfo(torch.float32).min)),
            "mask has entries of -3.4",
        ),
        (lambda m: m.weight.data.fill_(float("nan")), "weight has entries of NaN"),
    ],
)
def test_what_cannot_be_averaged_is_refused_by_its_name(spoil, says):
    model = nn.Linear(4, 4)
    spoil(model)
    with pytest.raises(UsageError, match=says):
        Tensors(model).check_finite()


def test_a_buffer_that_forward_makes_anew_is_followed():
    class Ema(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("ema", torch.zeros(2))

        def forward(self, x):
            self.ema = 0.9 * self.ema + 0.1 * x.mean(0).detach()
            return self.norm(self.layer(x))

    model = Ema()
    averaged = Tensors(model)
    posted = np.zeros(averaged.entries, np.float32)
    averaged.fill(posted)
    for _ in range(3):
        model(torch.ones(4, 2))
        averaged.check()
        averaged.collect(posted)
        now = np.zeros_like(posted)
        averaged.fill(now)
        np.testing.assert_allclose(posted, now, atol=1e-6)
    expected = model.ema + 1
    averaged.merge(posted, posted + 1)
    torch.testing.assert_close(model.ema, expected)
    model.ema = torch.zeros(3)
    with pytest.raises(UsageError, match="ema was replaced"):
        averaged.check()


def shorter(model):
    model[1].bias.data = torch.zeros(1)


def half(model):
    model[1].weight.data = model[1].weight.data.half()


def tied_by_its_storage(model):
    model[1].weight.data = model[0].weight.data


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(2, 2))),
            "0.weight was replaced",
        ),
        (lambda m: setattr(m[0], "bias", None), "0.bias is gone"),
        (lambda m: m.append(nn.Linear(2, 2)), "2.weight was added"),
        (lambda m: m.register_buffer("scale", torch.ones(1)), "scale was added"),
        (shorter, "1.bias was .2,., is .1,."),
        (half, "1.weight was torch.float32, is torch.float16"),
        (tied_by_its_storage, "1.weight is gone"),
        (lambda m: setattr(m.count, "data", torch.zeros(1)), "count was added"),
    ],
)
def test_each_change_of_a_model_is_noticed_that_was_found_good_before(spoil, says):
    """Nothing is looked at anew while the state dict is what it was: what assigning changes counts too."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("count", torch.zeros(1, dtype=torch.int64))
    model.register_buffer("graph", torch.eye(2, dtype=torch.int64).to_sparse())
    averaged = Tensors(model)
    averaged.check()
    model[0].weight.data = torch.ones(2, 2)  # as .to() and vector_to_parameters() do
    averaged.check()
    averaged.check()
    posted = np.zeros(averaged.entries, np.float32)
    averaged.collect(posted)
    assert posted[:4].tolist() == [1.0] * 4, "what the model holds now"
    spoil(model)
    with pytest.raises(UsageError, match=says):
        averaged.check()


def test_another_model_in_the_same_wrapper_is_noticed():
    wrapper = nn.DataParallel(nn.Linear(2, 2))
    averaged = Tensors(wrapper)
    averaged.check()
    wrapper.module = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="weight was replaced"):
        averaged.check()


def test_the_memory_of_a_session_goes_with_it():
    """A node that comes back brings other memory: the model must not keep the first mapped."""
    averaged = Tensors(nn.Linear(2, 2))
    memory = HandOverMemory.create(averaged.entries)
    mapping = weakref.ref(memory._map)
    for _ in range(2):
        averaged.collect(memory.posted)
        averaged.merge(memory.posted, memory.offered)
    memory.close()
    del memory
    gc.collect()
    assert mapping() is None
    assert not averaged._kept_parts


def wrapped():
    """(the model, the same in a wrapper) of every wrapper that changes names."""
    whole, inner, parallel = (nn.Sequential(nn.Linear(3, 2), nn.Tanh()) for _ in range(3))
    yield whole, torch.compile(whole, backend="eager")
    compiled = nn.Sequential(torch.compile(inner[0], backend="eager"), nn.Tanh())
    yield inner, compiled
    yield parallel, nn.DataParallel(parallel)
    yield parallel, torch.compile(nn.DataParallel(parallel), backend="eager")


def test_a_wrapper_changes_neither_the_schema_nor_the_checkpoint(tmp_path):
    """One machine compiles its model, another does not: they average, and load each other's files."""
    figures = {"step": 1, "mesh_step": 1, "samples": 1, "strategy": "pair", "exchanged": True}
    for plain, wrapper in wrapped():
        assert Tensors(wrapper).schema() == Tensors(plain).schema()
        for saved, loaded in ((plain, wrapper), (wrapper, plain)):
            path = generation_path(tmp_path / "c")
            write_generation(path, *snapshot(saved, None, run="r", **figures))
            wanted = plain[0].weight.clone()
            with torch.no_grad():
                plain[0].weight.zero_()
            load(tmp_path / "c", loaded)
            assert torch.equal(plain[0].weight, wanted)
            assert not torch.equal(wanted, torch.zeros(2, 3))
            with torch.no_grad():
                plain[0].weight.copy_(wanted)


@pytest.mark.parametrize("normalised", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_spectral_norm_divides_by_what_its_weight_stretches(normalised):
    """Two replicas whose u and v point elsewhere: their mean is shorter than 1, and is made 1 again."""
    torch.manual_seed(3)
    model = nn.Sequential(normalised(nn.Linear(6, 4)), normalised(nn.Conv2d(2, 3, 2)))
    averaged = Tensors(model)
    posted, other = (np.zeros(averaged.entries, np.float32) for _ in range(2))
    averaged.fill(posted)
    vectors = [b for name, b in model.named_buffers() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 4
    before = [vector.clone() for vector in vectors]
    for vector in vectors:
        vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))
    averaged.fill(other)
    expected = [nn.functional.normalize(a + b, dim=0) for a, b in zip(before, vectors, strict=True)]
    mean = (posted + other) / 2
    for bring_in in (averaged.load, lambda mean: averaged.merge(posted, mean)):
        for vector, start in zip(vectors, before, strict=True):
            vector.copy_(start)
        bring_in(mean)
        for vector, wanted in zip(vectors, expected, strict=True):
            torch.testing.assert_close(vector, wanted)


def test_arguments_of_another_kind_are_refused_in_words():
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for bad, says in (
        (lambda: mesh.join(model.parameters()), "a torch.nn.Module, and not a generator"),
        (lambda: mesh.join(model, [sgd, sgd]), "one torch.optim.Optimizer, and not a list"),
        (lambda: mesh.join(model, run=1.5), "run=1.5: a name"),
        (lambda: mesh.join(model, patience=None), "patience=None: a number"),
        (lambda: mesh.join(model, every=True), "every=True: a whole number"),
        (lambda: mesh.join(model, every=np.float64(2.0)), "every="),
    ):
        with pytest.raises(UsageError, match=says):
            bad()
