"""What waits for one task: bounded, in order, with a time after which that task goes on without.

An item's trip: send() or send_nowait() -> trio's memory channel -> receive(until). Rules: 1. Whoever
brings more than fits waits itself. 2. A send() that need not wait lets no other task run: who sends
again and again gives others their turn itself. 3. At most AT_ONCE items in a row are received before
others run.
"""

from typing import Final, Generic, TypeVar

import trio

from mesh.alarm import Alarm

Item = TypeVar("Item")

AT_ONCE: Final = 4
"""A turn of trio's loop between any two items cost as much as most items. An item that takes long, a page of
32 rows, takes about a millisecond."""


class Inbox(Generic[Item]):
    """Many tasks send, one receives."""

    def __init__(self, limit: int) -> None:
        self._put, self._take = trio.open_memory_channel[Item](limit)
        # Not a CancelScope around receive(): in a large simulation those were a tenth of the time.
        self._alarm = Alarm()
        self._at_once = 0

    async def send(self, item: Item) -> None:
        """Waits for room."""
        try:
            self._put.send_nowait(item)
        except trio.WouldBlock:
            await self._put.send(item)
        self._alarm.ring()

    def send_nowait(self, item: Item) -> None:
        """Raises trio.WouldBlock where there is no room."""
        self._put.send_nowait(item)
        self._alarm.ring()

    async def receive(self, until: float) -> Item | None:
        """The next item, or None once `until` is there and nothing came."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            item = self._take.receive_nowait()
        except trio.WouldBlock:
            self._at_once = 0
            await self._alarm.wait(until)
        else:
            self._at_once += 1
            if self._at_once >= AT_ONCE:
                self._at_once = 0
                await trio.lowlevel.cancel_shielded_checkpoint()
            return item
        try:
            return self._take.receive_nowait()
        except trio.WouldBlock:
            return None

    @property
    def waiting(self) -> int:
        """Items that wait, those of senders that wait for room included."""
        state = self._take._state  # statistics() makes an object: too much at each turn
        return len(state.data) + len(state.send_tasks)
