"""simulate(): many nodes of one training in one process, on the real protocol.

A trip: simulate() -> Conditions, checked -> Laboratory.run() -> each machine's program: build(), join(),
its steps, averaged() -> the last Look, of what each would evaluate or save -> LearningReport.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import torch

from mesh.arrays import Floats
from mesh.batchnorm import modes_kept
from mesh.codec import EXACT, check_codec
from mesh.conditions import Conditions
from mesh.dtypes import as_in_state_dict
from mesh.errors import MeshError, UsageError
from mesh.laboratory import Laboratory
from mesh.learning_report import Accuracy, LearningReport, Look, NodeHistory, digest_of
from mesh.tensors import Tensors
from mesh.training import join
from mesh.virtual_attachment import inside
from mesh.virtual_machine import Machine, flat_of, mean_of

RUN: Final = "laboratory"
FIRST_WEIGHTS_S: Final = 60.0
"""Virtual seconds in which all machines have to have met."""

Loss = Callable[[Any, Any], torch.Tensor]
Build = Callable[[int], tuple[torch.nn.Module, torch.optim.Optimizer, Loss]]
Loader = Callable[[int], Iterable[tuple[Any, Any]]]
Evaluate = Callable[[torch.nn.Module], float]


def simulate(
    build: Build,
    loader: Loader,
    *,
    nodes: int = 16,
    every: int = 8,
    steps: int = 800,
    seed: int = 1,
    strategy: str = "pair",
    codec: str = EXACT,
    weight: float | Callable[[int], float] = 1.0,
    speeds: Sequence[float] | None = None,
    loss_of_connections: float = 0.0,
    replaced: float = 0.0,
    attackers: Iterable[int] = (),
    evaluate: Evaluate | None = None,
    evaluate_every: int | None = None,
) -> LearningReport:
    """Trains on `nodes` virtual machines in this process, over a simulated network in virtual time.

    Everything is decided by `seed`: equal arguments give an equal report. Ranks count from 1.

    build: rank -> (model, optimizer, loss(model(x), y)); its chance is the machine's own. Machines
        begin with the weights of one of them, as in life.
    loader: rank -> (x, y) batches of that machine's data; begun again when it is at its end.
    every, codec: as in join().
    weight: of every node in the average, or rank -> weight.
    steps: of each machine; where speeds differ, of the machine of mean speed.
    strategy: as in join(); or "alone": nothing is averaged; or "one-place": all are averaged after
        each step, which for SGD is one machine that sees all samples.
    speeds: how fast each machine is, in any unit; faster ones make more steps, in all as many.
    loss_of_connections: share of exchanges whose connection breaks in the middle.
    replaced: share of machines that are killed on the way, each followed by a newcomer with its data.
    attackers: ranks that say their weights with the wrong sign; they do not count in what is found.
    evaluate: model -> accuracy, or any figure of which more is better; for looks every
        `evaluate_every` steps and at the end. Default: at the end only.

    Raises UsageError, and whatever the training raises.
    """
    conditions = Conditions(
        nodes=nodes,
        seed=seed,
        strategy=strategy,
        codec=check_codec(codec),
        steps=steps,
        speeds=tuple(speeds or ()),
        loss_of_connections=loss_of_connections,
        replaced=replaced,
        attackers=frozenset(attackers),
        look_every=evaluate_every if evaluate_every is not None else steps,
    )

    weight_of = weight if callable(weight) else lambda rank: weight
    work = _program(build, loader, weight_of, every)
    laboratory = Laboratory(conditions, inside(work))
    if evaluate_every is not None:
        laboratory.look = lambda laboratory: look_at(laboratory, evaluate)
    began = time.perf_counter()
    laboratory.run()
    if laboratory.error is not None:
        raise laboratory.error
    return report_on(laboratory, evaluate, time.perf_counter() - began)


def _program(
    build: Build, loader: Loader, weight_of: Callable[[int], float], every: int
) -> Callable[[Laboratory, Machine], None]:
    """What each machine does."""
    built: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def work(laboratory: Laboratory, machine: Machine) -> None:
        rank = machine.rank
        model, optimizer, loss_of = build(rank)
        if optimizer is None:
            raise UsageError(f"build({rank}) gave no optimizer")
        if model in built:
            raise UsageError(
                f"build({rank}) gave another machine's model: make a new one each time"
            )
        built.add(model)
        batches = _endless(lambda: loader(rank), rank)
        conditions = laboratory.conditions
        with join(model, optimizer, run=RUN, every=every, weight=weight_of(rank)) as node:
            if conditions.meets and not machine.newcomer:
                node.wait_for_peers(conditions.nodes - 1, timeout=FIRST_WEIGHTS_S)
                laboratory.gather(machine)
            while laboratory.goes_on(machine):
                x, y = next(batches)

                def closure() -> float:
                    optimizer.zero_grad()
                    loss = loss_of(model(x), y)  # noqa: B023 (asked within this step)
                    loss.backward()  # type: ignore[no-untyped-call]
                    return float(loss.item())

                if isinstance(optimizer, torch.optim.LBFGS):  # the one that asks more than once
                    loss = optimizer.step(closure)  # type: ignore[no-untyped-call]
                else:
                    loss = closure()
                    optimizer.step()
                node.step(loss=loss, samples=len(x))
            if conditions.meets:
                laboratory.gather(machine)  # whoever left now would be missed by the slower ones
            with node.averaged():
                laboratory.left(machine)

    return work


def _endless(
    batches: Callable[[], Iterable[tuple[Any, Any]]], rank: int
) -> Iterator[tuple[Any, Any]]:
    while True:
        empty = True
        for batch in batches():
            empty = False
            yield batch
        if empty:
            raise UsageError(f"loader({rank}) has no batch")


def report_on(laboratory: Laboratory, evaluate: Evaluate | None, wall_s: float) -> LearningReport:
    """What a laboratory found, now that it is over. Raises MeshError if nobody trained in it."""
    conditions = laboratory.conditions
    ended = [
        (machine, machine.final)
        for machine in laboratory.machines
        if machine.final is not None
        and not machine.killed
        and machine.rank not in conditions.attackers
    ]
    if not ended:
        raise MeshError("no training joined the mesh: a script has to call mesh.join()")
    mean, drift = mean_of(ended)
    accuracy = None
    models = [machine.model for machine, _ in ended if machine.model is not None]
    if evaluate is not None and models:
        found = [
            _with(model, flat, evaluate) for model, (_, flat) in zip(models, ended, strict=True)
        ]
        accuracy = Accuracy(
            mean=sum(found) / len(found),
            worst=min(found),
            averaged=_with(models[0], mean, evaluate),
        )
    last = Look(
        step=_steps(laboratory),
        virtual_s=round(laboratory.virtual_s, 6),
        drift=drift,
        accuracy=accuracy,
    )
    histories = tuple(_history(laboratory, machine) for machine in laboratory.machines)
    weights = _named(ended[0][0], mean)
    return LearningReport(
        seed=conditions.seed,
        nodes=conditions.nodes,
        strategy=conditions.strategy or "",
        entries=laboratory.entries,
        histories=histories,
        looks=(*laboratory.looks.values, last),
        weights=weights,
        digest=digest_of(weights, histories),
        virtual_s=laboratory.virtual_s,
        wall_s=wall_s,
    )


def look_at(laboratory: Laboratory, evaluate: Evaluate | None) -> Look | None:
    """At all replicas as their trainings hold them now; None before the first has begun."""
    machines = [
        machine
        for machine in laboratory.machines
        if machine.tensors is not None and machine.rank not in laboratory.conditions.attackers
    ]
    if not machines:
        return None
    mean, drift = mean_of([(machine, flat_of(machine)) for machine in machines])
    accuracy = None
    if evaluate is not None:
        found = [_evaluated(m.model, evaluate) for m in machines if m.model is not None]
        first = machines[0]
        assert first.tensors is not None
        assert first.model is not None
        kept = first.tensors.copies()
        first.tensors.load(mean)
        averaged = _evaluated(first.model, evaluate)
        first.tensors.restore(kept)
        accuracy = Accuracy(mean=sum(found) / len(found), worst=min(found), averaged=averaged)
    return Look(
        step=_steps(laboratory),
        virtual_s=round(laboratory.now(), 6),
        drift=drift,
        accuracy=accuracy,
    )


def _steps(laboratory: Laboratory) -> float:
    """Of the mesh: what the dead made counts for those that followed them."""
    return sum(machine.steps for machine in laboratory.machines) / laboratory.conditions.nodes


def _with(model: torch.nn.Module, flat: Floats, evaluate: Evaluate) -> float:
    """What `evaluate` says of the model with these weights. It keeps them."""
    Tensors(model).load(flat)
    return _evaluated(model, evaluate)


def _evaluated(model: torch.nn.Module, evaluate: Evaluate) -> float:
    with modes_kept(model), torch.no_grad():
        return float(evaluate(model))


def _named(machine: Machine, flat: Floats) -> dict[str, Floats]:
    """A flat vector by the names of the state dict, as that has them."""
    weights, start = {}, 0
    flat = flat.copy()
    for name, shape, _ in as_in_state_dict(machine.schema, flat):
        end = start + math.prod(shape)
        weights[name] = flat[start:end].reshape(shape).copy()
        start = end
    return weights


def _history(laboratory: Laboratory, machine: Machine) -> NodeHistory:
    counters = machine.node.counters if machine.node is not None else []
    return NodeHistory(
        rank=machine.rank,
        newcomer=machine.newcomer,
        killed=machine.killed,
        attacker=machine.rank in laboratory.conditions.attackers,
        steps=machine.steps,
        losses=tuple(machine.losses.values),
        bytes_sent=sum(count.bytes_sent for count in counters),
        bytes_received=sum(count.bytes_received for count in counters),
        exchanges=sum(count.completed for count in counters),
        answered=sum(count.answered for count in counters),
        broken=sum(count.resumed + count.failed for count in counters),
    )
