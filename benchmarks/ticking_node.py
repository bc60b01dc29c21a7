"""A deployed node with a ticker in its loop: `python -m benchmarks.ticking_node SETTINGS`.

Says one JSON line each tenth of a second: the longest gap between two ticks in it, and the most CPU
time that the loop's thread took in one. Rule: nothing of the node is replaced; the ticker starts with
the task that is the last one to start.
"""

import json
import sys
import time
from unittest.mock import patch

import trio

from mesh import process
from mesh.memory import Memory
from mesh.node import Node
from mesh.settings import NodeSettings

TICK_S = 0.001
SAY_S = 0.1


async def _tick() -> None:
    since = at = time.monotonic()
    cpu = time.thread_time()
    gap_s = cpu_s = 0.0
    while True:
        await trio.sleep(TICK_S)
        before, at = at, time.monotonic()
        cpu_before, cpu = cpu, time.thread_time()
        gap_s, cpu_s = max(gap_s, at - before), max(cpu_s, cpu - cpu_before)
        if at - since >= SAY_S:
            print(
                json.dumps({"since": since, "at": at, "gap_s": gap_s, "cpu_s": cpu_s}), flush=True
            )
            since, gap_s, cpu_s = at, 0.0, 0.0


def main() -> int:
    keep_memory = process._keep_memory

    async def keep_memory_and_tick(node: Node, memory: Memory) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tick)
            nursery.start_soon(keep_memory, node, memory)

    with patch.object(process, "_keep_memory", keep_memory_and_tick):
        return process.run_node(NodeSettings.from_json(sys.argv[1]), lifeline=True)


if __name__ == "__main__":
    sys.exit(main())
