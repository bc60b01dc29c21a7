"""Files on a disk that fails and loses power: what is read back was once written, whole."""

import errno
import stat
from pathlib import Path
from random import Random

import pytest

from mesh.core.address import Address
from mesh.core.membership import INCARNATION_BLOCK
from mesh.disk import RealDisk, write_whole
from mesh.errors import MeshError
from mesh.memory import Memory
from mesh.simulated_disk import SimulatedDisk, disk_error, fails_at, fails_often

STEPS = ("write", "sync", "rename", "sync_directory")
"""What write_whole asks of a disk, in order."""

YEAR_S = 365.25 * 86400
NOW_S = 1.75e9


class PowerCut(BaseException):
    """The process ends here, between two operations."""


@pytest.fixture(params=["real", "simulated"])
def disk(request):
    return RealDisk() if request.param == "real" else SimulatedDisk(Random(1))


# ------------------------------------------------------------------------ what both disks do alike


def test_a_file_holds_what_was_written_last(disk, tmp_path):
    path = tmp_path / "file"
    for data in (b"a longer text", b"short", b""):
        disk.write(path, data)
        disk.sync(path)
        assert disk.read(path) == data


def test_a_renamed_file_takes_the_place_of_another(disk, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    disk.write(old, b"1")
    disk.write(new, b"2")
    disk.rename(old, new)
    disk.sync_directory(tmp_path)
    assert disk.read(new) == b"1"
    with pytest.raises(FileNotFoundError):
        disk.read(old)


def test_what_is_not_there_cannot_be_read_synced_renamed_or_removed(disk, tmp_path):
    path = tmp_path / "file"
    disk.write(path, b"1")
    disk.remove(path)
    for operation in (disk.read, disk.sync, disk.remove, lambda p: disk.rename(p, p)):
        with pytest.raises(FileNotFoundError):
            operation(path)


def test_a_whole_write_leaves_one_file(disk, tmp_path):
    path = tmp_path / "file"
    for data in (b"1", b"22"):
        write_whole(path, data, disk)
    assert disk.read(path) == b"22"
    left = disk.names() if isinstance(disk, SimulatedDisk) else list(tmp_path.iterdir())
    assert left == [path]


def test_what_the_real_disk_makes_is_for_its_owner_only(tmp_path):
    RealDisk().write(tmp_path / "file", b"1")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


# ---------------------------------------------------------------------------------- what may be lost

FILE = Path("/state/file")


def fates(prepare, count=200):
    """Everything that a file can be after a power cut; None where it is not there."""
    found = set()
    for seed in range(count):
        disk = SimulatedDisk(Random(seed))
        prepare(disk)
        disk.crash()
        found.add(disk.read(FILE) if FILE in disk.names() else None)
    return found


def test_what_was_not_synced_is_as_it_was_as_it_would_be_empty_or_torn():
    def change(disk):
        write_whole(FILE, b"old", disk)
        disk.write(FILE, b"new")

    assert fates(change) == {b"old", b"new", b"", b"n", b"ne"}


def test_a_name_that_was_not_synced_is_as_it_was_or_as_it_would_be():
    def change(disk):
        write_whole(FILE, b"old", disk)
        other = FILE.with_name("other")
        write_whole(other, b"new", disk)
        disk.rename(other, FILE)
        assert disk.names() == [FILE]

    assert fates(change) == {b"old", b"new"}


def test_a_new_file_is_there_for_certain_only_when_its_directory_was_synced():
    def make(disk):
        disk.write(FILE, b"new")
        disk.sync(FILE)

    assert fates(make) == {None, b"new"}
    assert fates(lambda disk: write_whole(FILE, b"new", disk)) == {b"new"}


def test_a_removed_file_may_be_back_until_its_directory_was_synced():
    def remove(disk):
        write_whole(FILE, b"old", disk)
        disk.remove(FILE)

    def remove_for_good(disk):
        remove(disk)
        disk.sync_directory(FILE.parent)

    assert fates(remove) == {None, b"old"}
    assert fates(remove_for_good) == {None}


def test_the_same_seed_brings_the_same_fate():
    def fate(seed):
        disk = SimulatedDisk(Random(seed))
        for number in range(20):
            disk.write(Path(f"/{number}"), bytes(range(number)))
        disk.crash()
        return {path: disk.read(path) for path in disk.names()}

    assert fate(5) == fate(5)
    assert fate(5) != fate(6)


# --------------------------------------------------------------------------------------- write_whole


@pytest.mark.parametrize("step", range(len(STEPS)))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_at_any_step_leaves_one_of_the_two_whole(step, number):
    for seed in range(30):
        disk = SimulatedDisk(Random(seed))
        write_whole(FILE, b"old", disk)
        disk.faults = fails_at(step, number)
        with pytest.raises(MeshError, match="cannot write /state/file: "):
            write_whole(FILE, b"new", disk)
        renamed = STEPS[step] == "sync_directory"
        assert disk.read(FILE) == (b"new" if renamed else b"old")
        assert disk.names() == [FILE]
        disk.crash()
        assert disk.read(FILE) in ((b"old", b"new") if renamed else (b"old",))


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_power_cut_at_any_step_of_a_write_leaves_one_of_the_two_whole(step):
    left = set()
    for seed in range(30):
        disk = SimulatedDisk(Random(seed))
        write_whole(FILE, b"old", disk)
        disk.faults = cut_at(step)
        with pytest.raises(PowerCut):
            write_whole(FILE, b"new", disk)
        disk.faults = None
        disk.crash()
        left.add(disk.read(FILE))
    assert left == ({b"old", b"new"} if STEPS[step] == "sync_directory" else {b"old"})


def cut_at(call):
    faults = fails_at(call, errno.EIO)

    def cut(operation):
        if faults(operation) is not None:
            raise PowerCut

    return cut


# -------------------------------------------------------------------------------------- incarnations


def many_starts(seed):
    """A node's life of restarts on a bad disk, with a clock that jumps by years.

    Checks at each start that no block is used twice; returns how many starts there were, how many
    the disk refused, and how many power cuts.
    """
    rng = Random(seed)
    disk = SimulatedDisk(rng)
    path = FILE.with_name("incarnation")
    spent, starts, refused, cuts = 0, 0, 0, 0
    written = set()
    for _ in range(60):
        bad = rng.random()
        disk.faults = fails_often(rng, 0.15) if bad < 0.5 else cut_at(rng.randrange(8))
        memory = Memory(FILE.parent, disk, wall_clock=lambda: NOW_S + rng.uniform(-60, 60) * YEAR_S)
        try:
            first = memory.reserve_incarnations()
            assert first >= spent, f"seed {seed}: {first} was used before, up to {spent}"
            spent = first + INCARNATION_BLOCK
            starts += 1
            for _ in range(rng.randrange(4)):
                unused = spent + rng.randrange(INCARNATION_BLOCK)
                try:
                    memory.store_incarnation(unused)
                    spent = unused
                except MeshError:
                    refused += 1
        except MeshError:
            refused += 1
        except PowerCut:
            cuts += 1
        if rng.random() < 0.5:
            disk.crash()
        disk.faults = None
        if path in disk.names():
            written.add(int(disk.read(path)))  # whole: a torn one is no number of this size
            assert max(written) < 2**31
            assert int(disk.read(path)) >= spent
        else:
            assert not spent, f"seed {seed}: the file was durable, and is gone"
    return starts, refused, cuts


def test_no_start_repeats_an_incarnation_whatever_fails_or_crashes_at_whatever_operation():
    totals = [sum(column) for column in zip(*map(many_starts, range(150)), strict=True)]
    assert min(totals) > 500, f"starts, refusals, power cuts: {totals}: this test shows nothing"


def test_a_file_that_cannot_be_read_now_is_no_reason_to_guess():
    disk = SimulatedDisk(Random(1))
    memory = Memory(FILE.parent, disk, wall_clock=lambda: 0.0)
    before = memory.reserve_incarnations()
    disk.faults = fails_at(0, errno.EIO)
    with pytest.raises(MeshError, match=r"cannot read .*incarnation"):
        memory.reserve_incarnations()
    assert memory.reserve_incarnations() == before + INCARNATION_BLOCK


def test_a_clock_that_is_decades_ahead_and_right_again_repeats_nothing():
    disk = SimulatedDisk(Random(1))
    ahead = Memory(FILE.parent, disk, wall_clock=lambda: NOW_S + 60 * YEAR_S)
    starts = [ahead.reserve_incarnations()]
    right = Memory(FILE.parent, disk, wall_clock=lambda: NOW_S)
    starts += [right.reserve_incarnations() for _ in range(3)]
    assert starts == [starts[0] + k * INCARNATION_BLOCK for k in range(4)]


def test_an_incarnation_that_a_full_disk_refused_is_written_when_there_is_room():
    disk = SimulatedDisk(Random(1))
    memory = Memory(FILE.parent, disk, wall_clock=lambda: 0.0)
    first = memory.reserve_incarnations()
    full = disk_error(errno.ENOSPC)
    disk.faults = lambda operation: full
    for attempt in (lambda: memory.store_incarnation(first + 5000), memory.catch_up):
        with pytest.raises(MeshError, match="No space left"):
            attempt()
    disk.faults = None
    memory.catch_up()
    memory.store_peers([Address("192.0.2.1", 7710)])
    again = Memory(FILE.parent, disk, wall_clock=lambda: 0.0)
    assert again.reserve_incarnations() == first + 5000
    assert again.peers() == [Address("192.0.2.1", 7710)]
    disk.faults = fails_at(0, errno.EIO)
    assert again.peers() == []
