"""A lock for tasks of one loop that costs nothing where it is free."""

from types import TracebackType

import trio


class Turn:
    """`async with turn:` one task at a time, in the order in which they came.

    trio.Lock lets others run whenever it is taken, which takes longer than what a small model's hand-over
    does under it; this one only where it has to wait. Whoever holds it for long gives others their turn.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()

    def locked(self) -> bool:
        return self._lock.locked()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()
