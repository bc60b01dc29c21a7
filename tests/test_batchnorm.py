"""BatchNorm's running statistics in the mesh: those of all data together, computed here directly."""

import numpy as np
import pytest
import torch
from torch.nn import BatchNorm1d

import mesh
from mesh.batchnorm import refresh
from mesh.errors import UsageError
from mesh.tensors import Tensors

FEATURES = 5
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-5}


def norm_of(data, dtype=torch.float32):
    """A layer whose statistics are those of `data` (rows, FEATURES)."""
    layer = BatchNorm1d(FEATURES, dtype=dtype)
    layer.running_mean.copy_(data.mean(0))
    layer.running_var.copy_(data.var(0, unbiased=False))
    return layer


def data_of(rng, rows):
    """Every feature about another mean, with another spread."""
    shift, scale = rng.normal(size=FEATURES) * 3, rng.uniform(0.1, 2.0, size=FEATURES)
    return torch.tensor(rng.normal(size=(rows, FEATURES)) * scale + shift)


def buffers(tensors):
    return [np.empty(tensors.entries, dtype=np.float32) for _ in range(2)]


def attached(layer):
    """(tensors, posted, offered) of a training that has just begun alone."""
    tensors = Tensors(layer)
    posted, offered = buffers(tensors)
    tensors.fill(posted)
    offered[:] = posted
    return tensors, posted, offered


def assert_statistics_of(layer, data):
    tolerance = TOLERANCE[layer.running_mean.dtype]
    mean, variance = data.mean(0), data.var(0, unbiased=False)
    spread = variance.sqrt()
    assert ((layer.running_mean.double() - mean).abs() <= tolerance * (mean.abs() + spread)).all()
    allowed = tolerance * (variance + mean.square())
    assert ((layer.running_var.double() - variance).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(60, 60), (30, 90)])
def test_two_nodes_average_to_the_statistics_of_their_data_together(dtype, rows):
    """Weights are as the rows: what each node has of the data."""
    rng = np.random.default_rng(1)
    own = [data_of(rng, count) for count in rows]
    layers = [norm_of(data, dtype) for data in own]
    trainings = [attached(layer) for layer in layers]
    mean = sum(count * posted for count, (_, posted, _) in zip(rows, trainings, strict=True))
    for tensors, posted, offered in trainings:
        offered[:] = mean / sum(rows)
        tensors.merge(posted, offered)
    for layer in layers:
        assert_statistics_of(layer, torch.cat(own))


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_weights_bring_the_donors_statistics_and_what_is_restored_is_exact(dtype):
    rng = np.random.default_rng(2)
    data = data_of(rng, 50)
    _, flat, _ = attached(norm_of(data, dtype))
    layer = norm_of(data_of(rng, 50), dtype)
    layer.num_batches_tracked.fill_(7)
    tensors = Tensors(layer)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    kept = tensors.copies()
    tensors.load(flat)
    assert_statistics_of(layer, data)
    assert int(layer.num_batches_tracked) == 7, "integers stay local"
    layer.num_batches_tracked.fill_(0)
    tensors.restore(kept)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_progress_of_running_statistics_is_neither_lost_nor_counted_twice(dtype):
    """Batches go on between hand-overs, as the mesh moves both moments by known amounts."""
    rng = np.random.default_rng(3)
    layer = norm_of(data_of(rng, 50), dtype)
    tensors, posted, offered = attached(layer)
    replica = posted.astype(np.float64)
    expected = [m.clone() for m in moments(layer)]
    for k in range(20):
        if k % 3 == 0:
            tensors.merge(posted, offered)  # patience: before any step is made
        before = moments(layer)
        with torch.no_grad():
            layer.train()(data_of(rng, 8).to(dtype))
        for total, now, then in zip(expected, moments(layer), before, strict=True):
            total += now - then
        if k % 3 == 0:
            tensors.collect(posted)
        else:
            tensors.merge(posted, offered)
        replica += posted.astype(np.float64) - offered
        added = 0.01 * (k % 2)
        replica += added
        for total in expected:
            total += added
        offered[:] = replica
    tensors.merge(posted, offered)
    tolerance = TOLERANCE[dtype]
    for total, now in zip(expected, moments(layer), strict=True):
        assert torch.allclose(now, total, rtol=tolerance, atol=tolerance)
    start = tensors.entries - 2 * FEATURES
    flat = torch.cat(expected).numpy()
    assert np.allclose(posted[start:], flat, rtol=1e-5, atol=1e-5), (
        "posted holds what rounding drops"
    )


def moments(layer):
    mean = layer.running_mean.double().clone()
    return mean, layer.running_var.double() + mean.square()


def test_a_mesh_at_rest_leaves_statistics_alone_even_of_a_constant_input():
    layer = BatchNorm1d(3)
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, 250.0]))
    layer.running_var.copy_(torch.tensor([0.0, 0.0, 0.0]))
    tensors, posted, offered = attached(layer)
    for _ in range(50):
        tensors.merge(posted, offered)
        offered[:] = posted
    assert layer.running_mean.tolist() == [0.0, 1.0, 250.0]
    floors = torch.tensor([1e-10, 2.0**-22, 250.0**2 * 2.0**-22])
    assert torch.allclose(layer.running_var, floors, rtol=1e-3)


@pytest.mark.parametrize("later", [False, True])
def test_statistics_that_were_not_finite_for_a_while_may_be_put_right(later):
    """At once, before the next offer; or later, when an offer has been taken in meanwhile."""
    good = norm_of(data_of(np.random.default_rng(5), 50)).state_dict()
    layer = norm_of(data_of(np.random.default_rng(6), 50))
    tensors, posted, offered = attached(layer)

    def node():
        np.copyto(posted, offered, where=~np.isfinite(posted))  # as Replica.progress() does
        offered[:] = posted

    for bad in (float("nan"), float("inf")):
        layer.running_mean[0] = layer.running_var[0] = bad
        tensors.collect(posted)
        assert not np.isfinite(posted).all()
        node()
        if later:
            tensors.merge(posted, offered)
            assert not np.isfinite(posted).all()
        layer.load_state_dict(good)
        if not later:
            tensors.merge(posted, offered)
        tensors.collect(posted)
        assert np.isfinite(posted).all()
        node()
        for name in ("running_mean", "running_var"):
            assert torch.allclose(layer.state_dict()[name], good[name], rtol=1e-4), (bad, name)


def test_noise_of_a_codec_never_makes_a_variance_negative():
    layer = norm_of(data_of(np.random.default_rng(4), 50))
    tensors, posted, offered = attached(layer)
    offered -= 100.0
    tensors.merge(posted, offered)
    assert (layer.running_var > 0).all()
    assert torch.isfinite(layer.running_var).all()


def test_layers_without_statistics_and_layers_used_twice_travel_as_they_are():
    shared = BatchNorm1d(2)
    model = torch.nn.Sequential(
        shared, shared, BatchNorm1d(2, track_running_stats=False), torch.nn.GroupNorm(1, 2)
    )
    tensors = Tensors(model)
    assert tensors.has_batchnorm
    assert tensors.entries == 4 * 2 + 2 * 2 + 2 * 2
    assert not Tensors(model[2:]).has_batchnorm


# ----------------------------------------------------------------------------------------- refresh


def network():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, FEATURES), BatchNorm1d(FEATURES), torch.nn.Dropout(0.5)
    )
    return model.double()


def test_refreshed_statistics_are_those_of_the_batches_with_the_weights_as_they_are():
    rng = np.random.default_rng(5)
    model = network()
    model[2].eval()
    model[1].running_mean.fill_(9.0)
    batches = [data_of(rng, 16) for _ in range(6)]
    refresh(model, [(rows, "label") for rows in batches], 4)
    with torch.no_grad():
        outputs = [model[0](rows) for rows in batches[:4]]
    mean = sum(rows.mean(0) for rows in outputs) / 4
    assert torch.allclose(model[1].running_mean, mean)
    variance = sum(rows.var(0) for rows in outputs) / 4
    assert torch.allclose(model[1].running_var, variance)
    assert (model.training, model[2].training, model[1].momentum) == (True, False, 0.1)


def test_weights_taken_out_of_the_mesh_are_those_that_a_state_dict_has():
    """Also of InstanceNorm, whose statistics have the same names and are averaged as they are."""

    def build(rank):
        model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 6),
            torch.nn.BatchNorm1d(6),
            torch.nn.Unflatten(1, (3, 2)),
            torch.nn.InstanceNorm1d(3, track_running_stats=True),
            torch.nn.Flatten(),
        )
        return model.double(), torch.optim.SGD(model.parameters(), lr=0.01), torch.nn.MSELoss()

    def loader(rank):
        rng = np.random.default_rng(rank)
        while True:
            yield data_of(rng, 8), torch.zeros(8, 6, dtype=torch.float64)

    seen = []

    def evaluate(model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    report = mesh.simulate(build, loader, nodes=3, every=4, steps=30, evaluate=evaluate, seed=1)
    averaged = seen[-1]  # the last look is at the averaged model
    assert set(report.weights) == {name for name in averaged if "num_batches" not in name}
    for name, value in report.weights.items():
        torch.testing.assert_close(torch.tensor(value).double(), averaged[name], msg=name)


def test_a_refresh_that_fails_leaves_statistics_and_modes_as_they_were():
    model = network()
    model[1].eval()
    model[1].running_mean.fill_(3.0)

    def broken():
        yield data_of(np.random.default_rng(6), 4)
        raise OSError("the data are gone")

    for loader, error in ((broken(), OSError), ([], UsageError)):
        with pytest.raises(error):
            refresh(model, loader, 100)
        assert model[1].running_mean.tolist() == [3.0] * FEATURES
        assert (model.training, model[1].training, model[1].momentum) == (True, False, 0.1)
    refresh(torch.nn.Linear(1, 1), broken(), 100)  # nothing to refresh: nothing is read
