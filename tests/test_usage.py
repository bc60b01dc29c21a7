"""How much of a processor a node and its trainings take, from files of /proc that are made here."""

import os
import time

import pytest

from mesh.usage import PROCESSES_LIMIT, CpuMeter

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """Trainings, what /proc says of them, and the time."""

    def __init__(self, folder):
        self.folder, self.now, self.trainings = folder, 100.0, []
        self.meter = CpuMeter(lambda: self.trainings, proc=folder, clock=lambda: self.now)

    def says(self, pid, seconds, children=()):
        (self.folder / f"{pid}/task/{pid}").mkdir(parents=True, exist_ok=True)
        ticks = f"{round(seconds * TICKS)} 0"
        (self.folder / f"{pid}/stat").write_text(f"{pid} (a) b) S 1 1 1 0 -1 0 0 0 0 0 {ticks} 0 0")
        (self.folder / f"{pid}/task/{pid}/children").write_text(" ".join(map(str, children)))

    def later(self, seconds):
        self.now += seconds
        return self.meter.share()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_trainings_and_what_they_started_are_added_up_in_cores(machine):
    machine.trainings = [41, 42, 42]
    machine.says(41, 50.0)
    machine.says(42, 7.0, children=[43, os.getpid()])
    machine.says(43, 1.0)
    machine.says(os.getpid(), 1e6)
    machine.later(2)  # the first look at them: what they took before is not of this time
    machine.says(41, 56.0)
    machine.says(42, 8.0, children=[43, os.getpid()])
    machine.says(43, 2.0)
    machine.says(os.getpid(), 2e6)  # a node that a training started counts once, as itself
    assert machine.later(2) == pytest.approx(4.0, abs=0.2)
    assert machine.later(0.5) == machine.meter.share(), "no new look within a second"
    machine.trainings = []
    assert machine.later(2) == pytest.approx(0.0, abs=0.2), "one that detached counts no more"


def test_one_that_cannot_be_looked_at_makes_the_whole_unknown(machine):
    machine.trainings = [41]
    assert machine.later(2) is None
    machine.says(41, 1.0)
    machine.later(2)
    assert machine.later(2) == pytest.approx(0.0, abs=0.2)
    (machine.folder / "41/stat").write_text("41 (broken")
    assert machine.later(2) is None


def test_a_process_that_starts_others_without_end_is_not_followed_without_end(machine):
    machine.trainings = [1]
    for pid in range(1, 2 * PROCESSES_LIMIT):
        machine.says(pid, 1.0, children=[pid + 1, 1])
    machine.later(2)
    assert len(machine.meter._seconds) == PROCESSES_LIMIT


def test_the_node_itself_counts():
    now = [0.0]
    meter = CpuMeter(list, clock=lambda: now[0])
    began = time.process_time()
    while time.process_time() < began + 0.05:
        pass
    now[0] = 1.0
    assert 0.04 < meter.share() < 1.0
