"""Connections of the simulated network: what TCP does with bytes on a bad line, in virtual time.

Each SimulatedStream holds what it has sent: `_sent`, pieces with their time of arrival, and `_stuck`,
pieces that a cut keeps back. A piece's trip: send_all -> _transmit -> _sent -> the other end's
receive_into, once its time has come. Rules: 1. Bytes of one direction arrive in order or not at all.
2. A lost connection ends between any two bytes: what had arrived may be read, the rest is gone. 3. An
end that sent what is not acknowledged for USER_TIMEOUT_S is lost, and no other end; one that sends
nothing notices nothing. 4. Whoever sends to an end that is no more is reset. 5. No task and no timer
of its own: the reader and the writer of a stream each wait for an alarm, and what happens to the
connection hastens it. 6. As over a socket, a call that need not wait lets no other task run.
7. It knows no protocol.
"""

from collections import deque
from math import inf
from typing import Final

import trio

from mesh.alarm import Alarm
from mesh.core.messages import NodeId
from mesh.errors import PeerTimeout, StreamLost
from mesh.net.simulated_medium import Medium, Process

BUFFER_BYTES: Final = 256 * 1024
"""What one direction holds before its sender waits, like a socket's buffers."""

PIECE_BYTES: Final = 64 * 1024

USER_TIMEOUT_S: Final = 5.0
"""As TCP_USER_TIMEOUT over real sockets: how long TCP tries to deliver a byte."""

RETRANSMIT_S: Final = 0.2
"""Linux's shortest retransmission timeout; it doubles with each try."""

AFTER_HEAL_S: Final = (0.2, 1.6)
"""From the end of a cut to the next try of a sender that has tried for a while."""


class SimulatedStream:
    """One end of a connection. See mesh.net.transport.Stream."""

    peer: NodeId
    host: str
    offer = ""
    at_once_bytes = 1 << 62  # of any length
    _other: "SimulatedStream"

    def __init__(self, medium: Medium, process: Process, number: int) -> None:
        self._medium = medium
        self._process = process
        self._number = number
        self._address = process.address
        self._severed = False
        """this machine left the address that the connection was made from"""
        self._sent: deque[tuple[float, memoryview | None]] = deque()
        self._stuck: deque[memoryview | None] = deque()
        self._held = 0
        self._last_at = 0.0
        self._clear = False
        """both ways are open and both ends alive: the short way through _transmit"""
        self._choked = False
        """a piece was lost so often that it never arrives, nor anything behind it"""
        self._closed = False
        self._lost_at = inf
        self._gives_up_at = inf
        self._reader, self._writer = Alarm(), Alarm()
        process.streams[number] = self

    def join(self, other: "SimulatedStream") -> None:
        """The connection is made: this is the dialler's end, that one the listener's."""
        for end, peer in ((self, other), (other, self)):
            end._other = peer
            end.peer = peer._process.node
            end.host = peer._address.host
        self._medium.links[self._number] = self
        for end in self.ends:
            end.way_changed()

    @property
    def ends(self) -> tuple["SimulatedStream", "SimulatedStream"]:
        return self, self._other

    # ------------------------------------------------------------------------------- as a Stream

    def seal(self, offer: str) -> "SimulatedStream":
        return self

    async def send_all(
        self, data: bytes | memoryview, timeout_s: float = inf, *, head: bytes = b""
    ) -> None:
        self._medium.enter(self._process)
        view = memoryview(head + bytes(data))
        if self._process.stalled:
            await self._process.awake()
        self._check()
        while len(view):
            if self._held >= BUFFER_BYTES:
                write_by = trio.current_time() + timeout_s
                await self._writer.wait(min(self._over_at, write_by))
                await self._process.awake()
                if self._held >= BUFFER_BYTES and trio.current_time() >= write_by:
                    raise PeerTimeout(f"nothing was taken for {timeout_s:g} s")
            else:
                piece, view = view[:PIECE_BYTES], view[PIECE_BYTES:]
                self._send(piece)
            self._check()

    async def receive_into(
        self, view: memoryview, timeout_s: float = inf, *, worth: int = 1
    ) -> int:
        self._medium.enter(self._process)
        pieces = self._other._sent
        read_by = trio.current_time() + timeout_s
        while True:
            if self._process.stalled:
                await self._process.awake()
            if self._closed or self._process.gone:
                raise StreamLost("connection closed")
            now, over_at = trio.current_time(), inf if self._clear else self._over_at
            next_at = pieces[0][0] if pieces else inf
            if next_at <= now and next_at <= over_at:
                return self._take(view)
            if over_at <= now:
                raise StreamLost("connection lost")
            if read_by <= now:
                raise PeerTimeout(f"nothing came for {timeout_s:g} s")
            await self._reader.wait(min(next_at, over_at, read_by))

    async def aclose(self) -> None:
        process = self._process
        if self._closed or process.gone:
            return
        if self._medium.touched is not None:
            self._medium.touched(process.node)
        if process.stalled:
            process.closing.append(self)
        elif not process.gone:
            self.hang_up()

    # ------------------------------------------------------------------------------- what it does

    @property
    def _over_at(self) -> float:
        return min(self._lost_at, self._gives_up_at)

    def _check(self) -> None:
        if not self._clear and self._is_deaf():
            raise StreamLost("connection lost")

    def _is_deaf(self) -> bool:
        """Whether this end's kernel answers what arrives with a reset."""
        return self._closed or self._process.gone or self._over_at <= trio.current_time()

    def _way_is_open(self) -> bool:
        """From here to the other end."""
        medium, other = self._medium, self._other
        return (
            medium.open(self._process.node, other._process.node)
            and not self._severed
            and not other._severed
            and other._address not in medium.dark
        )

    def _send(self, piece: memoryview) -> None:
        mean = self._medium.weather.bytes_until_lost
        if mean is not None and self._clear:
            # Drawn for each piece: an exponential remembers nothing, so this is one draw for the
            # whole connection, and new weather holds at once.
            through = int(self._medium.rng.expovariate(1 / mean))
            if through < len(piece):
                if through:
                    self._transmit(piece[:through])
                self._other.lose_at(max(trio.current_time(), self._last_at))
                self.lose_at(trio.current_time())
                return
        self._transmit(piece)

    def _transmit(self, piece: memoryview | None) -> None:
        """Puts a piece, or the end of the stream, on its way."""
        if self._clear:
            self._deliver(piece, self._medium.delay())
            return
        forward, back = self._way_is_open(), self._other._way_is_open()
        if not forward or self._choked:
            self._keep(piece)
        elif not self._other._is_deaf():
            self._deliver(piece, self._medium.delay())
            if not back:
                self._give_up_later()
        elif not back:
            self._give_up_later()
        elif piece is not None:  # a reset
            self.lose_at(trio.current_time() + self._medium.delay() + self._medium.delay())

    def _deliver(self, piece: memoryview | None, delay_s: float) -> None:
        weather = self._medium.weather
        if weather.loss:
            late_s = self._retransmissions_s(weather.loss)
            if late_s > USER_TIMEOUT_S:
                self._choked = True
                self._clear = self._other._clear = False
                self._keep(piece)
                return
            delay_s += late_s
        at = max(trio.current_time() + delay_s, self._last_at)
        if piece is not None:
            at += len(piece) / weather.bytes_per_s
            self._held += len(piece)
        self._last_at = at
        self._sent.append((at, piece))
        self._other._reader.hasten(at)

    def _retransmissions_s(self, loss: float) -> float:
        """How much later a piece arrives for having been lost; beyond USER_TIMEOUT_S it never does."""
        late_s, pause_s = 0.0, RETRANSMIT_S
        while late_s <= USER_TIMEOUT_S and self._medium.rng.random() < loss:
            late_s += pause_s
            pause_s *= 2
        return late_s

    def _keep(self, piece: memoryview | None) -> None:
        self._stuck.append(piece)
        self._held += 0 if piece is None else len(piece)
        self._give_up_later()

    def _give_up_later(self) -> None:
        """Something is not acknowledged: unless that changes, this end is lost."""
        self._clear = False
        self._gives_up_at = min(self._gives_up_at, trio.current_time() + USER_TIMEOUT_S)
        self._hasten()

    def _hasten(self) -> None:
        for alarm in (self._reader, self._writer):
            alarm.hasten(self._over_at)

    def _take(self, view: memoryview) -> int:
        """Moves what has arrived into `view`, as far as one piece and the room there go."""
        other = self._other
        at, piece = other._sent[0]
        if piece is None:
            return 0
        count = min(len(piece), len(view))
        view[:count] = piece[:count]
        if count == len(piece):
            other._sent.popleft()
        else:
            other._sent[0] = (at, piece[count:])
        other._held -= count
        if other._held < BUFFER_BYTES:
            other._writer.hasten(trio.current_time())
        return count

    # --------------------------------------------------------------------------- what happens to it

    def hang_up(self) -> None:
        """close(): the other end reads what was sent before, then the end of the stream."""
        if not self._is_deaf():
            self._transmit(None)
        self._closed = True
        self._leave()

    def abort(self, *, silent: bool) -> None:
        """The process is gone."""
        self._stuck.clear()
        other = self._other
        if silent:
            other.way_changed()
        elif self._way_is_open() and not other._is_deaf():
            other.lose_at(trio.current_time() + self._medium.delay())
        self._leave()

    def sever(self) -> None:
        """This machine is no longer where the connection was made from."""
        self._severed = True
        for end in self.ends:
            end.way_changed()

    def lose_at(self, at: float) -> None:
        """This end learns then that the connection is lost; what arrives later is gone."""
        self._lost_at = min(self._lost_at, at)
        self._clear = self._other._clear = False
        self._hasten()

    def _leave(self) -> None:
        other = self._other
        self._clear = other._clear = False
        now = trio.current_time()
        for alarm in (self._reader, self._writer):
            alarm.hasten(now)
        self._process.streams.pop(self._number, None)
        if other._closed or other._process.gone:
            for end in self.ends:
                self._medium.links.pop(end._number, None)

    def way_changed(self) -> None:
        """A way was cut or is open again: holds back what is under way, or sends it once more."""
        forward, back = self._way_is_open(), self._other._way_is_open()
        if self._clear and forward and back:
            return
        now = trio.current_time()
        under_way = bool(self._sent) and self._sent[-1][0] > now
        if not forward and under_way:
            while self._sent and self._sent[-1][0] > now:
                self._stuck.appendleft(self._sent.pop()[1])
            self._last_at = now
            under_way = False
        in_doubt = bool(self._stuck) or (under_way and not (back and self._other._is_deaf()))
        if self._over_at <= now or self._process.gone:
            self._stuck.clear()
        elif not (forward and back):
            if in_doubt:
                self._give_up_later()
            if forward:
                self._send_again()
        elif not self._choked and (in_doubt or self._gives_up_at < inf):
            self._gives_up_at = inf
            self._send_again()
        self._clear = (
            forward
            and back
            and not (self._choked or self._other._choked)
            and not (self._is_deaf() or self._other._is_deaf())
            and self._lost_at == self._other._lost_at == inf
        )

    def _send_again(self) -> None:
        """What a cut kept back goes out at the next try of TCP."""
        if self._choked or not (self._stuck or self._other._is_deaf()):
            return
        medium = self._medium
        late_s = medium.rng.uniform(*AFTER_HEAL_S) + medium.delay()
        if self._other._is_deaf():
            if self._other._way_is_open():
                self.lose_at(trio.current_time() + late_s + medium.delay())
            return
        again, self._stuck = self._stuck, deque()
        for piece in again:
            self._held -= 0 if piece is None else len(piece)
            self._deliver(piece, late_s)
