"""gossipmesh: several machines on a LAN train one PyTorch model together, with no server.

    with mesh.join(model, optimizer, run="digits") as node:
        for x, y in loader:
            ...
            node.step(loss=loss.item(), samples=len(x))

Importing mesh imports neither torch nor trio; each name below is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh.attachment import Statistics
    from mesh.checkpoint import CheckpointInfo, load
    from mesh.client import RunningNode, ask, find_node, question, running_nodes
    from mesh.diagnosis import earlier_peers, look_around
    from mesh.errors import (
        IdentityError,
        MeshError,
        NodeNotRunning,
        NodeRefused,
        NodeTimeout,
        PeersMissing,
        ScriptFailed,
        UsageError,
    )
    from mesh.identity import (
        Identity,
        check_identity,
        create_mesh,
        is_member,
        join_mesh,
        leave_mesh,
        read_token,
        rename,
    )
    from mesh.launch import NodeProcess, make_mesh_if_none, start_node
    from mesh.learning import simulate
    from mesh.learning_report import LearningReport
    from mesh.momentum import QuasiGlobalSGD
    from mesh.places import state_directory
    from mesh.process import run_node
    from mesh.pulled import PulledModel, PullProgress, pull_model
    from mesh.settings import NodeSettings, parse_address
    from mesh.simulated_script import simulate_script
    from mesh.simulation import SimulationReport, simulate_faults
    from mesh.surroundings import Announcement, Interface, Outcome, Surroundings
    from mesh.training import JoinedNode, join

__version__ = "0.1.0"

_HOMES = {
    "join": "training",
    "JoinedNode": "training",
    "Statistics": "attachment",
    "NodeSettings": "settings",
    "parse_address": "settings",
    "state_directory": "places",
    "create_mesh": "identity",
    "join_mesh": "identity",
    "leave_mesh": "identity",
    "is_member": "identity",
    "load": "checkpoint",
    "CheckpointInfo": "checkpoint",
    "QuasiGlobalSGD": "momentum",
    "read_token": "identity",
    "rename": "identity",
    "check_identity": "identity",
    "Identity": "identity",
    "earlier_peers": "diagnosis",
    "look_around": "diagnosis",
    "Announcement": "surroundings",
    "Interface": "surroundings",
    "Outcome": "surroundings",
    "Surroundings": "surroundings",
    "ask": "client",
    "find_node": "client",
    "question": "client",
    "running_nodes": "client",
    "RunningNode": "client",
    "make_mesh_if_none": "launch",
    "start_node": "launch",
    "NodeProcess": "launch",
    "run_node": "process",
    "simulate": "learning",
    "simulate_script": "simulated_script",
    "LearningReport": "learning_report",
    "simulate_faults": "simulation",
    "pull_model": "pulled",
    "PulledModel": "pulled",
    "PullProgress": "pulled",
    "SimulationReport": "simulation",
    "MeshError": "errors",
    "UsageError": "errors",
    "NodeNotRunning": "errors",
    "NodeRefused": "errors",
    "NodeTimeout": "errors",
    "IdentityError": "errors",
    "PeersMissing": "errors",
    "ScriptFailed": "errors",
}

__all__ = [
    "Announcement",
    "CheckpointInfo",
    "Identity",
    "IdentityError",
    "Interface",
    "JoinedNode",
    "LearningReport",
    "MeshError",
    "NodeNotRunning",
    "NodeProcess",
    "NodeRefused",
    "NodeSettings",
    "NodeTimeout",
    "Outcome",
    "PeersMissing",
    "PullProgress",
    "PulledModel",
    "QuasiGlobalSGD",
    "RunningNode",
    "ScriptFailed",
    "SimulationReport",
    "Statistics",
    "Surroundings",
    "UsageError",
    "ask",
    "check_identity",
    "create_mesh",
    "earlier_peers",
    "find_node",
    "is_member",
    "join",
    "join_mesh",
    "leave_mesh",
    "load",
    "look_around",
    "make_mesh_if_none",
    "parse_address",
    "pull_model",
    "question",
    "read_token",
    "rename",
    "run_node",
    "running_nodes",
    "simulate",
    "simulate_faults",
    "simulate_script",
    "start_node",
    "state_directory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mesh' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mesh.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
