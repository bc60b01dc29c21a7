"""Real processes for tests: nodes on loopback, the `mesh` command, a member that breaks rules.

Rules: 1. Every node listens on `lo` only and asks nobody else: no packet leaves this machine.
2. HOME and XDG_RUNTIME_DIR are the test's own, so nodes of other tests are never found. 3. Nothing
sleeps for a fixed time: until() waits for a condition, with a deadline. 4. Only processes that were
started here are ever signalled.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from mesh import wire
from mesh.client import LocalSocket, ask, node_of_state
from mesh.core.messages import (
    PROTOCOL,
    ExchangeOpened,
    Fragment,
    Hello,
    Member,
    Members,
    NodeId,
    OpenExchange,
    Purpose,
    SchemaEntry,
    State,
)
from mesh.core.schema import digest
from mesh.errors import MeshError
from mesh.identity import create_mesh, join_mesh, load
from mesh.shared import HandOverMemory

REPOSITORY = Path(__file__).parent.parent
QUIET = ("--interface", "lo", "--no-mdns")
"""Flags of every node that a test starts."""

DEADLINE_S = 20.0
"""Far above what anything here takes on two busy cores; reached only by a failure."""


def until(condition, what, deadline_s=DEADLINE_S):
    """Waits until `condition()` is true, and returns what it returned."""
    end = time.monotonic() + deadline_s
    while not (result := condition()):
        assert time.monotonic() < end, f"waited {deadline_s} s in vain: {what}"
        time.sleep(0.01)
    return result


def free_port():
    """A port of loopback on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


class Host:
    """A machine of its own, as far as gossipmesh can tell: home, runtime directory, nodes."""

    def __init__(self):
        # Short, because a local socket's path has room for about a hundred bytes.
        self.root = Path(tempfile.mkdtemp(prefix="mesh-"))
        self.runtime = self.root / "run"
        self.runtime.mkdir(mode=0o700)
        inherited = ("MESH_", "XDG_", "PYTHON")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(inherited)},
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(self.root),
            "XDG_RUNTIME_DIR": str(self.runtime),
        }
        self._nodes = []

    def state(self, name):
        return self.root / name

    def member(self, name, token=None):
        """A state directory in a mesh: the token's, or one that it makes; returns the token."""
        if token is None:
            return create_mesh(self.state(name), name)
        join_mesh(self.state(name), token, name)
        return token

    def mesh(self, *arguments, timeout=DEADLINE_S, **environment):
        """One `mesh` command, run to its end."""
        return subprocess.run(
            self.command(*arguments),
            env={**self.environment, **environment},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def command(self, *arguments):
        return [sys.executable, "-m", "nodes.cli", *map(str, arguments)]

    def up(self, name, *flags):
        """`mesh up` for a state directory, once it answers."""
        node = self._start(name, *flags)
        node.wait_until_up()
        return node

    def up_together(self, first, second):
        """Two nodes of one mesh, once they know each other."""
        self.member(second, self.member(first))
        port = free_port()
        nodes = (
            self._start(first, "--port", port),
            self._start(second, "--peer", f"127.0.0.1:{port}"),
        )
        for node in nodes:
            node.wait_until_up()
        for node in nodes:
            until(lambda: node.status()["peers"]["alive"] == 1, "they know each other")  # noqa: B023
        return nodes

    def _start(self, name, *flags):
        node = RealNode(self, name, flags)
        self._nodes.append(node)
        return node

    def leftovers(self):
        """Files of running nodes that are still on this host."""
        names = ("node.json", "control.sock")
        found = [p for p in self.root.rglob("*") if p.name in names or self.runtime in p.parents]
        return [p for p in found if not p.is_dir()]

    def close(self):
        for node in self._nodes:
            node.kill()
        for left in self.root.rglob("node.json"):
            # One that `mesh run` started and a failed test forgot: ask it to go.
            with contextlib.suppress(MeshError):
                ask(node_of_state(left.parent), "leave")
        shutil.rmtree(self.root, ignore_errors=True)


class RealNode:
    """A node process that `mesh up` runs."""

    def __init__(self, host, name, flags=()):
        self.name = name
        self.state = host.state(name)
        self._log = host.root / f"{name}.log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                host.command("up", "--state", self.state, *QUIET, *flags),
                env=host.environment,
                cwd=host.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self):
        return self._process.pid

    @property
    def said(self):
        return self._log.read_text(errors="replace")

    def wait_until_up(self):
        until(lambda: self.answers() or self._process.poll() is not None, f"{self.name} is up")
        assert self.lives(), self.said

    def lives(self):
        return self._process.poll() is None

    def answers(self):
        with contextlib.suppress(MeshError):
            return node_of_state(self.state).pid == self.pid and bool(self.status())
        return False

    def status(self):
        assert self.lives(), self.said
        return ask(node_of_state(self.state), "status")

    def peers(self):
        return ask(node_of_state(self.state), "peers")["peers"]

    def refused(self, kind):
        return self.status()["refused"].get(kind, 0)

    @property
    def control(self):
        return node_of_state(self.state).control

    @property
    def id(self):
        return NodeId(self.status()["node"]["id"])

    @property
    def port(self):
        return int(self.status()["node"]["addresses"][0].rpartition(":")[2])

    def resident_bytes(self):
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number=signal.SIGTERM):
        """Sends the signal; returns the exit code."""
        self._process.send_signal(number)
        return self.exit_code()

    def exit_code(self):
        """Of a node that is about to end."""
        return self._process.wait(DEADLINE_S)

    def kill(self):
        """SIGKILL; harmless for a process that has ended."""
        self._process.kill()
        self._process.wait()


class NumpyTraining:
    """A training without torch: attaches to a node and holds the two buffers."""

    def __init__(self, node, values, run="digits", *, exchanged=True, entries=None):
        """`exchanged`: it says that it met others before, so that peers average with it."""
        self.run = run
        self.entries = entries or (
            SchemaEntry(name="weight", shape=(len(values),), dtype="float32"),
        )
        self.schema = digest(self.entries)
        self.link = LocalSocket(node.control)
        answer = self.link.request(
            op="attach",
            run=run,
            schema=[[e.name, list(e.shape), e.dtype] for e in self.entries],
            weight=1.0,
            every=8,
            sync_timeout_s=0.0,
            pid=os.getpid(),
            script="numpy_training.py",
            started=exchanged,
            exchanged=exchanged,
        )
        self.memory = HandOverMemory(self.link.descriptors.pop(), answer["entries"])
        self.memory.posted[:] = values
        self.link.send(op="begin")
        assert self.link.receive()["event"] == "begun"

    def close(self):
        self.link.close()
        self.memory.close()


def opening(run, schema, **changes):
    """A request for an exchange as an honest member makes it, but for the changes."""
    fields = {
        "exchange": 1,
        "run": run,
        "schema": schema,
        "weight": 1.0,
        "start": 0,
        "pull": False,
        "started": True,
        "exchanged": True,
        "progress": 0,
        "codec": "f32",
    }
    return OpenExchange(**{**fields, **changes})


class BadMember:
    """A member with a valid certificate that says what it likes, over blocking sockets."""

    def __init__(self, state):
        self.identity = load(state)
        self.id = self.identity.node
        self._context = self.identity.context(server=False)
        self._incarnation = itertools.count(1)
        self._exchange = itertools.count(1)
        self.offer = f"aes:{os.urandom(32).hex()}"

    def connect(self, port):
        """TLS, and nothing said yet."""
        connection = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Wire(self._context.wrap_socket(connection))

    def accept(self, listener):
        """TLS with somebody who dialled `listener`, and nothing said yet."""
        connection, _ = listener.accept()
        connection.settimeout(DEADLINE_S)
        return Wire(self.identity.context(server=True).wrap_socket(connection, server_side=True))

    def trusting_anybody(self):
        """For a stranger: it shows its certificate to a node of another mesh."""
        self._context.verify_mode = ssl.CERT_NONE
        return self

    def hello(self, purpose=Purpose.CONTROL, *, protocol=PROTOCOL, **row):
        fields = {
            "node": self.id,
            "name": self.identity.name,
            "incarnation": next(self._incarnation),
            "state": State.ALIVE,
            "addresses": (),
            "runs": (),
        }
        member = Member(**{**fields, **row})
        return Hello(
            protocol=protocol,
            name=member.name,
            purpose=purpose,
            member=member,
            instance=1,
            age_ms=0,
            offer=self.offer,
        )

    def farewell(self):
        """A row that says that this member leaves, so that nobody looks for it."""
        return Members(members=(self.hello(state=State.LEFT).member,))

    def greeted(self, port, purpose=Purpose.CONTROL, **row):
        """A connection on which both sides said Hello."""
        connection = self.connect(port)
        connection.say(self.hello(purpose, **row))
        hello = connection.hear()
        assert isinstance(hello, Hello)
        if purpose is Purpose.BULK:
            connection.seal(self.offer, hello.offer)
        return connection

    def opening(self, training, **changes):
        own = {"run": training.run, "schema": training.schema, "exchange": next(self._exchange)}
        return opening(**{**own, **changes})

    def pull(self, port, training):
        """The weights of the node's replica, float32 (entries,): a pull changes nothing there.

        A member that answers no probe is called dead sooner or later, and what it has under way ends:
        then it asks again.
        """
        with contextlib.suppress(ConnectionError):
            return self._pull(port, training)
        return self._pull(port, training)

    def _pull(self, port, training):
        opening = self.opening(training, weight=0.0, pull=True)
        parts = []
        with self.greeted(port, Purpose.BULK) as connection:
            connection.say(opening)
            assert isinstance(connection.hear(), ExchangeOpened)
            while sum(map(len, parts)) < training.entries[0].shape[0]:
                index = len(parts)
                connection.say(Fragment(exchange=opening.exchange, index=index, received=index))
                _, body = connection.hear_with_body()
                parts.append(np.frombuffer(body, dtype=np.float32))
        return np.concatenate(parts)


class Records:
    """Bulk records over a blocking socket, written once more from docs/security.md."""

    def __init__(self, connection, own, peers):
        """`own` and `peers`: what the two ends offered each other, cipher:key."""
        (one, sends), (other, receives) = own.split(":"), peers.split(":")
        cipher = AESGCM if one == other == "aes" else ChaCha20Poly1305
        self.bare = connection
        self._out, self._in = cipher(bytes.fromhex(sends)), cipher(bytes.fromhex(receives))
        self._sent = self._received = 0
        self._opened = b""
        self.setsockopt, self.close = connection.setsockopt, connection.close

    def record(self, data):
        """The next record."""
        length = (len(data) + 16).to_bytes(4, "big")
        nonce = self._sent.to_bytes(12, "big")
        self._sent += 1
        return length + self._out.encrypt(nonce, data, length)

    def sendall(self, data):
        for start in range(0, len(data), 1 << 20):
            self.bare.sendall(self.record(bytes(data[start : start + (1 << 20)])))

    def recv(self, limit):
        if not self._opened:
            head = self._exactly(4)
            if not head:
                return b""
            body = self._exactly(length := int.from_bytes(head, "big"))
            if len(body) < length:
                raise ConnectionResetError("closed by the node in the middle of a record")
            nonce = self._received.to_bytes(12, "big")
            self._received += 1
            self._opened = self._in.decrypt(nonce, body, head)
        data, self._opened = self._opened[:limit], self._opened[limit:]
        return data

    def _exactly(self, length):
        data = b""
        while len(data) < length and (piece := self.bare.recv(length - len(data))):
            data += piece
        return data


class Wire:
    """Frames over one blocking TLS connection; bulk frames over records in its place."""

    def __init__(self, connection):
        self._connection = connection

    def seal(self, own, peers):
        """Behind the Hellos of a bulk connection."""
        assert not self._connection.pending()
        timeout = self._connection.gettimeout()
        bare = socket.socket(fileno=self._connection.detach())
        bare.settimeout(timeout)
        self._connection = Records(bare, own, peers)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def say(self, message, body=b""):
        self.push(wire.encode(message, len(body)) + bytes(body))

    def push(self, data):
        self._connection.sendall(data)

    def hear(self):
        return self.hear_with_body()[0]

    def hear_with_body(self):
        header_bytes, body_bytes = wire.parse_prefix(self._exactly(wire.PREFIX_BYTES))
        return wire.decode(self._exactly(header_bytes)), self._exactly(body_bytes)

    def hear_record(self):
        """The next record of a bulk connection, whatever frames it holds."""
        return self._connection.recv(1 << 20)

    def hear_until_closed(self):
        """Every message up to the end of the connection, which has to come."""
        messages = []
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while True:
                messages.append(self.hear())
        return messages

    def hear_until(self, wanted):
        """Messages up to one that is wanted, or the end of the connection."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while not wanted(self.hear()):
                pass

    def drop_until_closed(self):
        """Reads whatever comes up to the end of the connection, which has to come."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while self._connection.recv(1 << 20):
                pass
        self.close()

    def stall(self):
        """From now on this end reads nothing."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

    def _exactly(self, length):
        data = bytearray()
        while len(data) < length:
            if not (piece := self._connection.recv(length - len(data))):
                raise ConnectionResetError("closed by the node")
            data += piece
        return bytes(data)

    def close(self):
        self._connection.close()


def parsed(completed):
    """The JSON object that a command printed."""
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)
