"""QuasiGlobalSGD against the equations of Lin et al. 2021, written once more in numpy."""

import copy

import numpy as np
import pytest
import torch

import mesh

SHAPES = ((3, 2), (4,))


class Reference:
    """One parameter: v = b m + g; x -= lr (g + b v); at a mixing, k steps after the last,
    m = mu^k m + (1 - mu^k)(a - x)/sum lr, or where steps are not counted, with k = 1."""

    def __init__(self, x, *, momentum=0.9, mu=0.9, decay=0.0):
        self.x = x.detach().double().numpy().copy()
        self.m = np.zeros_like(self.x)
        self.a = self.x.copy()
        self.momentum, self.mu, self.decay = momentum, mu, decay
        self.lr_sum = 0.0
        self.steps = 0

    def step(self, g, lr):
        g = g + self.decay * self.x
        v = self.momentum * self.m + g
        self.x = self.x - lr * (g + self.momentum * v)
        self.lr_sum += lr
        self.steps += 1

    def mix(self, moved_by, *, counts):
        self.x = self.x + moved_by
        if self.lr_sum > 0:
            kept = self.mu ** (self.steps if counts else 1)
            self.m = kept * self.m + (1 - kept) * (self.a - self.x) / self.lr_sum
        self.a = self.x.copy()
        self.lr_sum, self.steps = 0.0, 0


def parameters(rng, dtype=torch.float64):
    return [torch.nn.Parameter(torch.tensor(rng.normal(size=s), dtype=dtype)) for s in SHAPES]


def step(optimizer, values, rng):
    """One step on random gradients; returns them."""
    gradients = [rng.normal(size=s) for s in SHAPES]
    for parameter, g in zip(values, gradients, strict=True):
        parameter.grad = torch.tensor(g, dtype=parameter.dtype)
    optimizer.step()
    return [p.grad.double().numpy() for p in values]


@pytest.mark.parametrize("counts", [False, True])
def test_every_step_and_mixing_is_what_the_equations_say(counts):
    """Two groups of different settings, rates that change at every step, mixings of uneven spacing,
    one after steps at rate 0 only, and two in a row."""
    rng = np.random.default_rng(1)
    values = parameters(rng)
    settings = {"momentum": 0.8, "mu": 0.7, "weight_decay": 0.05}
    optimizer = mesh.QuasiGlobalSGD([{"params": [values[0]]}, {"params": [values[1]], **settings}])
    references = [
        Reference(values[0]),
        Reference(values[1], momentum=0.8, mu=0.7, decay=0.05),
    ]
    schedule = [*[0.1 / (k + 1) for k in range(10)], 0.0, 0.0, *[0.05] * 8]
    mixings = {1, 2, 7, 10, 12, 16}
    for k, lr in enumerate(schedule):
        for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = lr * factor
        gradients = step(optimizer, values, rng)
        for reference, g, factor in zip(references, gradients, (1.0, 0.5), strict=True):
            reference.step(g, lr * factor)
        if k + 1 in mixings:
            for parameter, reference in zip(values, references, strict=True):
                moved_by = 0.01 * rng.normal(size=parameter.shape)
                with torch.no_grad():
                    parameter += torch.tensor(moved_by)
                made = reference.steps
                reference.mix(moved_by, counts=counts)
            optimizer.mixed(*([made] if counts else []))
            if k == 6:
                optimizer.mixed()
        for parameter, reference in zip(values, references, strict=True):
            np.testing.assert_allclose(parameter.detach(), reference.x, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(
                optimizer.state[parameter]["m"], reference.m, rtol=1e-10, atol=1e-13
            )


def test_alone_a_step_is_that_of_sgd_with_a_larger_rate():
    rng = np.random.default_rng(2)
    values = parameters(rng)
    twins = copy.deepcopy(values)
    own = mesh.QuasiGlobalSGD(values, lr=0.1, weight_decay=0.01)
    sgd = torch.optim.SGD(twins, lr=0.19, weight_decay=0.01)
    for _ in range(5):
        step(own, values, rng)
        for parameter, twin in zip(values, twins, strict=True):
            twin.grad = parameter.grad.clone()
        sgd.step()
    for parameter, twin in zip(values, twins, strict=True):
        assert torch.allclose(parameter, twin, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_low_precision_are_rounded_once_a_step_and_keep_a_float32_momentum(dtype):
    rng = np.random.default_rng(3)
    values = parameters(rng, dtype)
    optimizer = mesh.QuasiGlobalSGD(values, lr=0.1)
    references = [Reference(p) for p in values]
    for k in range(6):
        for reference, g in zip(references, step(optimizer, values, rng), strict=True):
            reference.step(g, 0.1)
        for parameter, reference in zip(values, references, strict=True):
            rounded = torch.tensor(reference.x).float().to(dtype)
            off = (parameter.detach().double() - rounded.double()).abs()
            assert (off <= torch.finfo(dtype).eps * rounded.double().abs()).all()
            reference.x = parameter.detach().double().numpy().copy()
            assert optimizer.state[parameter]["m"].dtype == torch.float32
        if k % 2:
            optimizer.mixed()
            for parameter, reference in zip(values, references, strict=True):
                reference.mix(0.0, counts=False)
                np.testing.assert_allclose(
                    optimizer.state[parameter]["m"], reference.m, rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_restored_state_goes_on_exactly(dtype):
    rng = np.random.default_rng(4)
    values = parameters(rng, dtype)
    optimizer = mesh.QuasiGlobalSGD(values, lr=0.1)
    step(optimizer, values, rng)
    optimizer.mixed()
    step(optimizer, values, rng)
    twins = copy.deepcopy(values)
    other = mesh.QuasiGlobalSGD(twins, lr=0.5, mu=0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ends = []
    for one, parameter_list in ((optimizer, values), (other, twins)):
        again = np.random.default_rng(5)
        one.mixed()
        step(one, parameter_list, again)
        ends.append([p.detach() for p in parameter_list])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_anchor_makes_momentum_forget_how_the_weights_came_there():
    value = torch.nn.Parameter(torch.zeros(2))
    optimizer = mesh.QuasiGlobalSGD([value], lr=0.1)
    value.grad = torch.ones(2)
    optimizer.step()
    with torch.no_grad():
        value.fill_(1000.0)  # a donor's weights
    optimizer.anchor()
    optimizer.mixed()
    assert torch.equal(optimizer.state[value]["m"], torch.zeros(2))
    optimizer.step()
    optimizer.mixed()
    assert torch.allclose(optimizer.state[value]["m"], torch.full((2,), 0.19), atol=1e-3)


def test_a_closure_a_frozen_parameter_and_bad_settings():
    used, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), False)
    optimizer = mesh.QuasiGlobalSGD([used, frozen], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = used.pow(2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    optimizer.mixed()
    assert torch.equal(frozen, torch.ones(2))
    for bad in ({"lr": -1.0}, {"momentum": 1.0}, {"mu": 1.0}, {"weight_decay": float("nan")}):
        with pytest.raises(mesh.UsageError, match=next(iter(bad))):
            mesh.QuasiGlobalSGD([used], **bad)


def test_a_parameter_that_is_frozen_on_the_way_counts_each_of_its_moves_once():
    """The mesh still moves it: momentum shrinks by mu at each mixing, and takes up (a - x) / lr."""
    rng = np.random.default_rng(3)
    values = parameters(rng)
    optimizer = mesh.QuasiGlobalSGD(values, lr=0.1)
    reference = Reference(values[0])
    [gradient, _] = step(optimizer, values, rng)
    reference.step(gradient, 0.1)
    values[0].requires_grad_(False)
    for move in (0.5, 0.25, 0.0, 0.0):
        values[1].grad = torch.zeros_like(values[1])
        values[0].grad = None
        optimizer.step()
        with torch.no_grad():
            values[0].add_(move)
        reference.lr_sum = optimizer.param_groups[0]["lr_sum"]
        reference.mix(move, counts=False)
        optimizer.mixed()
        np.testing.assert_allclose(optimizer.state[values[0]]["m"].numpy(), reference.m, rtol=1e-9)
