"""`mesh version`: what is installed here, and what the running node was started from.

After an update the node goes on with the old one until it is started again; so both are said.
"""

import platform
from typing import Any

import mesh


def answer() -> dict[str, Any]:
    """`mesh.version/1`; `nodes` are those that run here, `silent` those that do not answer."""
    nodes, silent = [], []
    for running in mesh.running_nodes():
        try:
            node = mesh.ask(running, "status")["node"]
        except mesh.NodeTimeout:
            silent.append({"id": running.node, "name": running.name})
            continue
        except mesh.MeshError:  # it ended a moment ago
            continue
        nodes.append({key: node[key] for key in ("id", "name", "version", "protocol")})
    return {
        "schema": "mesh.version/1",
        "version": mesh.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "nodes": nodes,
        "silent": silent,
    }


def draw(told: dict[str, Any]) -> str:
    """As text; a node of another version is told apart."""
    lines = [f"gossipmesh {told['version']}  Python {told['python']}  {told['system']}"]
    for node in told["nodes"]:
        old = "" if node["version"] == told["version"] else "; start it again to use the new one"
        lines.append(
            f"node {node['name']} runs {node['version']} (protocol {node['protocol']}){old}"
        )
    lines += [f"node {node['name']} does not answer: is it stopped?" for node in told["silent"]]
    return "\n".join(lines)
