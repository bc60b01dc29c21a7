"""Dialling one peer's addresses: what a refusal is worth, what is said, what is left behind."""

import pytest
import trio
import trio.testing

from mesh import wire
from mesh.core.address import Address
from mesh.core.messages import PROTOCOL, Hello, Member, NodeId, Purpose, State
from mesh.errors import ConnectionRefused, StreamLost
from mesh.links import dial

ME, PEER = NodeId("m" * 16), NodeId("p" * 16)
HOME, DOCKER = Address("192.168.1.5", 7710), Address("172.17.0.1", 7710)


def hello(node=ME, age_ms=0):
    member = Member(
        node=node, name="n", incarnation=1, state=State.ALIVE, addresses=(), runs=(), accusers=()
    )
    return Hello(
        protocol=PROTOCOL,
        name="n",
        purpose=Purpose.CONTROL,
        member=member,
        instance=1,
        age_ms=age_ms,
    )


class Line:
    """A stream whose other end has said its Hello."""

    def __init__(self, *, closes_in_s=0.0):
        self.peer, self.host, self.offer = PEER, HOME.host, ""
        self.sent = b""
        self.closed = False
        self._said = wire.encode(hello(PEER))
        self._closes_in_s = closes_in_s

    async def send_all(self, data, timeout_s=None):
        await trio.lowlevel.checkpoint()
        self.sent += bytes(data)

    async def receive_into(self, view, timeout_s=None, *, worth=1):
        await trio.lowlevel.checkpoint()
        if not self._said:
            await trio.sleep_forever()
        size = min(len(view), len(self._said))
        view[:size], self._said = self._said[:size], self._said[size:]
        return size

    async def aclose(self):
        self.closed = True
        with trio.CancelScope(shield=True):
            await trio.sleep(self._closes_in_s)


class Paths:
    """A transport that does at each address what it is told: (seconds, stream or error)."""

    def __init__(self, **what):
        self._what = what

    async def connect(self, address):
        after_s, outcome = self._what["docker" if address == DOCKER else "home"]
        await trio.sleep(after_s)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def in_virtual_time(function):
    return trio.run(function, clock=trio.testing.MockClock(autojump_threshold=0))


REFUSED, TIMED_OUT = ConnectionRefused("refused"), StreamLost("no answer")


@pytest.mark.parametrize(
    ("proved_host", "home", "docker", "refused"),
    [
        (HOME.host, REFUSED, TIMED_OUT, True),
        (HOME.host, TIMED_OUT, REFUSED, False),
        ("", TIMED_OUT, REFUSED, False),
        ("", REFUSED, REFUSED, True),
        ("10.0.0.1", TIMED_OUT, REFUSED, False),
    ],
)
def test_only_a_refusal_where_the_peer_was_is_a_refusal(proved_host, home, docker, refused):
    async def main():
        paths = Paths(home=(0.01, home), docker=(0.01, docker))
        with pytest.raises(StreamLost) as failure:
            await dial(paths, (DOCKER, HOME), hello, proved_host=proved_host)
        assert isinstance(failure.value, ConnectionRefused) is refused

    in_virtual_time(main)


def test_the_age_that_is_told_is_that_of_the_moment_and_not_of_before_the_dial():
    async def main():
        began, line = trio.current_time(), Line()
        paths = Paths(home=(4.0, line))
        await dial(paths, (HOME,), lambda: hello(age_ms=int(1000 * (trio.current_time() - began))))
        said = wire.decode(line.sent[wire.PREFIX_BYTES :])
        assert said.age_ms >= 4000

    in_virtual_time(main)


def test_a_dial_that_is_broken_off_just_as_it_succeeds_leaves_no_connection_behind():
    """While the slower of two connections is being closed."""

    async def main():
        first, second = Line(), Line(closes_in_s=1.0)
        second._said = b""  # it never greets
        paths = Paths(home=(0.5, first), docker=(0.0, second))
        with trio.move_on_after(0.7) as scope:
            await dial(paths, (DOCKER, HOME), hello)
        assert scope.cancelled_caught
        assert first.closed
        assert second.closed

    in_virtual_time(main)
