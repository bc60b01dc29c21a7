"""mesh/inbox.py under both clocks: trio's own, where an alarm is a scope, and the simulator's."""

import pytest
import trio
from trio.testing import MockClock

from mesh.alarm import JumpClock
from mesh.inbox import AT_ONCE, Inbox


@pytest.fixture(params=["scopes", "heap"])
def clock(request):
    return MockClock(autojump_threshold=0) if request.param == "scopes" else JumpClock()


def test_what_comes_before_the_time_is_received_then_and_nothing_at_that_time(clock):
    async def main():
        inbox, heard = Inbox(4), []
        began = trio.current_time()

        async def send_later():
            await trio.sleep(1.0)
            await inbox.send("early")
            await trio.sleep(5.0)
            inbox.send_nowait("late")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_later)
            for until in (3.0, 3.0, 100.0):
                item = await inbox.receive(began + until)
                heard.append((item, round(trio.current_time() - began, 6)))
        assert heard == [("early", 1.0), (None, 3.0), ("late", 6.0)]

    trio.run(main, clock=clock)


def test_whoever_brings_more_than_fits_waits_and_nothing_is_lost_or_overtaken(clock):
    async def main():
        inbox, sent, heard = Inbox(2), [], []

        async def send_all():
            for item in range(5):
                await inbox.send(item)
                sent.append(item)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await trio.testing.wait_all_tasks_blocked()
            assert (sent, inbox.waiting) == ([0, 1], 3)
            with pytest.raises(trio.WouldBlock):
                inbox.send_nowait(9)
            while (item := await inbox.receive(trio.current_time() + 1.0)) is not None:
                heard.append(item)
        assert heard == sent == [0, 1, 2, 3, 4]

    trio.run(main, clock=clock)


def test_others_run_beside_items_that_wait_and_a_cancelled_receiver_leaves_them(clock):
    async def main():
        count = 8 * AT_ONCE
        inbox, ran = Inbox(count + 1), []

        async def beside():
            while True:
                ran.append(None)
                await trio.lowlevel.checkpoint()

        for item in range(count + 1):
            inbox.send_nowait(item)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(beside)
            for _ in range(count):
                await inbox.receive(trio.current_time())
            nursery.cancel_scope.cancel()
        assert len(ran) >= 7
        with trio.CancelScope() as scope:
            scope.cancel()
            await inbox.receive(trio.current_time())
        assert scope.cancelled_caught
        assert inbox.waiting == 1

    trio.run(main, clock=clock)
