"""`mesh pull`: the current model of a run, as a file. Any machine of the mesh can ask."""

import json
from pathlib import Path

import mesh
from nodes import render, text


def run(node: mesh.RunningNode, name: str, path: Path, peers: int, *, as_json: bool) -> int:
    """Pulls and writes; returns the exit code. Raises MeshError."""
    with render.bar() as draw:

        def progress(now: mesh.PullProgress) -> None:
            which = min(now.averaged + 1, now.wanted)
            said = f"{name}: node {which} of {now.wanted}: {now.source or 'looking'}"
            draw(said, now.received_bytes, now.expected_bytes)

        draw(f"{name}: asking who has it", 0, 0)
        model = mesh.pull_model(node, name, peers, progress)
    size = model.save(path)
    if as_json:
        print(json.dumps(_report(model, path, size)))
        return 0
    for line in model.lost:
        render.say(f"mesh: left out {line}")
    if model.left_out:
        render.say(
            f"mesh: left out, their layers or strategies differ: {', '.join(model.left_out)}"
        )
    nodes = f"{model.averaged} node{'s' * (model.averaged > 1)}"
    print(
        f"{path}: {len(model.schema)} tensors, {text.size(size)}, the mean of {nodes} "
        f"({', '.join(model.sources)}) at mesh step {model.mesh_step:,}"
    )
    return 0


def _report(model: mesh.PulledModel, path: Path, size: int) -> dict[str, object]:
    """`mesh.pull/1`."""
    return {
        "schema": "mesh.pull/1",
        "run": model.run,
        "path": str(path),
        "bytes": size,
        "tensors": len(model.schema),
        "entries": len(model.values),
        "mesh_step": model.mesh_step,
        "averaged": model.averaged,
        "sources": model.sources,
        "lost": model.lost,
        "left_out": model.left_out,
    }
