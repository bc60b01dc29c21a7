"""What tests of the shell look at: a terminal whose screen is read, and a node that only answers.

Rules: 1. A wait is for what the screen shows, with a deadline. 2. What the program leaves behind on
the terminal can be compared with what was there before.
"""

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time

import pyte

from tests.helpers import DEADLINE_S, REPOSITORY


class Terminal:
    """A program in a pseudo-terminal: a command of `mesh`, or what `program` names."""

    def __init__(self, *command, program=(), columns=80, lines=24, **environment):
        self._master, self._slave = pty.openpty()
        self._size(columns, lines)
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.said = b""
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [*(program or (sys.executable, "-m", "nodes.cli")), *map(str, command)],
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "TERM": "xterm-256color",
                **environment,
            },
            start_new_session=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    def _size(self, columns, lines):
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns, lines):
        self._size(columns, lines)
        self.screen.resize(lines, columns)

    def press(self, keys):
        os.write(self._master, keys.encode())

    def look(self, seconds=0.0):
        """Takes in what was written so far."""
        while select.select([self._master], [], [], seconds)[0]:
            data = os.read(self._master, 65536)
            self.said += data
            self._stream.feed(data)
            seconds = 0.0

    @property
    def lines(self):
        return [line.rstrip() for line in self.screen.display]

    def until(self, condition, what):
        """Waits until condition(lines of the screen) is true; returns the lines."""
        end = time.monotonic() + DEADLINE_S
        while not condition(self.lines):
            assert time.monotonic() < end, f"{what}; the screen:\n" + "\n".join(self.lines)
            self.look(0.05)
        return self.lines

    def shows(self, text):
        return self.until(lambda lines: text in "\n".join(lines), f"waited for {text!r}")

    def exit_code(self):
        """Reads on until the program has ended."""
        end = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < end, "it does not end; the screen:\n" + "\n".join(self.lines)
            self.look(0.02)
        self.look()
        return self.process.returncode

    def stopped(self):
        """Whether the program was stopped as by Ctrl-Z."""
        self.look(0.02)
        pid, status = os.waitpid(self.process.pid, os.WNOHANG | os.WUNTRACED)
        return bool(pid) and os.WIFSTOPPED(status)

    def is_as_before(self):
        """Line discipline, cursor and screen are what they were."""
        assert termios.tcgetattr(self._slave) == self.before
        for on, off in ((b"\x1b[?1049h", b"\x1b[?1049l"), (b"\x1b[?25l", b"\x1b[?25h")):
            assert self.said.rfind(off) > self.said.rfind(on) > -1


class StandIn:
    """Answers questions at a node's local socket with what `answers` says: op -> function."""

    def __init__(self, state, answers, node="k7f3q2mzk7f3q2mz", name="studio"):
        self.state, self.answers = state, answers
        self.hung = False
        state.mkdir(parents=True, exist_ok=True)
        control = str(state / "control.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(control)
        self._listener.listen(16)
        about = {"node": node, "name": name, "pid": os.getpid(), "control": control}
        (state / "node.json").write_text(json.dumps(about))
        threading.Thread(target=self._serve, daemon=True).start()

    def list_among_nodes(self, runtime):
        """So that it is found without naming its state directory."""
        folder = runtime / "gossipmesh"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "stand-in.json").write_text(json.dumps({"state": str(self.state)}))

    def close(self):
        # close() alone would not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with (
            contextlib.suppress(OSError, ValueError),
            connection,
            connection.makefile("rwb") as lines,
        ):
            for line in lines:
                request = json.loads(line)
                if not self.hung:
                    answer = {"ok": True, **self.answers[request["op"]](request)}
                    lines.write(json.dumps(answer).encode() + b"\n")
                    lines.flush()


def stop(process):
    process.send_signal(signal.SIGSTOP)


def large_mesh(nodes, *, dead=(), idle=(), names=None):
    """Answers of a node that knows so many; figures differ from node to node and move on."""
    looks = iter(range(10**9))

    def runs(rank, at):
        return [
            {
                "run": "digits",
                "schema": "aa",
                "started": True,
                "exchanged": True,
                "step": 1000 * rank + at,
                "loss": 1 / (1 + rank + at),
                "drift": 0.01 * rank,
                "samples_s": 600.0 + rank,
                "in_bytes_s": 1.2e6,
                "out_bytes_s": 1.1e6,
                "age_s": 0.0,
            }
        ]

    def node_of(rank):
        return (names or {}).get(rank, f"node-{rank:03}")

    def status(request):
        return {
            "schema": "mesh.status/1",
            "node": {
                "id": "k7f3q2mzk7f3q2mz",
                "name": "studio",
                "version": "0.1.0",
                "protocol": 6,
                "uptime_s": 8040.0,
            },
            "mesh": {"id": "lab42xyz"},
            "health": [],
        }

    def peers(request):
        at = next(looks)
        return {
            "schema": "mesh.peers/1",
            "node": {
                "id": "k7f3q2mzk7f3q2mz",
                "name": "studio",
                "addresses": ["192.168.1.0:7710"],
                "load": 0.4,
                "cpu": 0.4,
                "runs": runs(0, at),
            },
            "peers": [
                {
                    "id": f"id{rank:014}",
                    "name": node_of(rank),
                    "state": "dead" if rank in dead else "alive",
                    "reason": "connection refused" if rank in dead else None,
                    "addresses": [f"192.168.1.{rank}:7710"],
                    "via": "mdns",
                    "rtt_s": 0.0008,
                    "seen_s": 0.4,
                    "incarnation": "1",
                    "load": 0.4,
                    "cpu": 0.4,
                    "runs": [] if rank in dead or rank in idle else runs(rank, at),
                }
                for rank in range(1, nodes)
            ],
            "unreached": [],
        }

    def history(request):
        return {
            "schema": "mesh.history/1",
            "node": {"id": "k7f3q2mzk7f3q2mz", "name": "studio"},
            "time": 1e9,
            "uptime_s": 8040.0,
            "columns": ["uptime_s", "step", "loss", "drift"],
            "runs": [
                {
                    "run": "digits",
                    "interval_s": 1.0,
                    "points": [[8000.0 + k, k - 40, 1 / (1 + k), 0.01 * k] for k in range(40)],
                }
            ],
        }

    return {"status": status, "peers": peers, "history": history}
