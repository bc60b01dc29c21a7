"""Codecs: what arrives is what closed forms say, or unbiased; whatever a peer sends, mass is kept."""

from random import Random

import numpy as np
import pytest
import torch
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import mesh
from mesh import replica
from mesh.codec import BLOCK, NAMES, PIECE, check_codec, cut_at, make_codecs
from mesh.errors import NotFinite, UsageError
from mesh.player import Player
from mesh.replica import Replica, square_norm
from tests.mesh_in_memory import memory_mesh, run_seeded, until

LENGTHS = (1, 2, 3, 255, 256, 257, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 300)
ROUNDING = ("bf16", "int8")


def codec_of(name, seed=1):
    return make_codecs(Random(seed))[name]


def encoded(codec, values):
    body = memoryview(bytearray(codec.encoded_bytes(len(values))))
    codec.encode(values, body)
    return body


def passed(codec, values):
    """What arrives."""
    return codec.decode(encoded(codec, values), np.empty_like(values)).copy()


def normal(count, seed=1):
    return np.random.default_rng(seed).standard_normal(count, dtype=np.float32)


def steps_of_int8(values):
    """The step of each entry: its block's largest over 126.99."""
    peaks = [np.abs(values[k : k + BLOCK]).max() for k in range(0, len(values), BLOCK)]
    return np.repeat(np.maximum(peaks, 2.0**-100) / 126.99, BLOCK)[: len(values)]


ODD_VALUES = np.float32(
    [
        0,
        -0.0,
        1e-45,
        -1e-45,
        1.1754942e-38,
        1,
        -1,
        1.00390625,
        1.01171875,
        3e38,
        -3.4028235e38,
        1.8e19,
    ]
)


@pytest.mark.parametrize("count", LENGTHS)
def test_float32_is_exact(count):
    assert passed(codec_of("f32"), normal(count)).tobytes() == normal(count).tobytes()


@pytest.mark.parametrize("count", LENGTHS)
def test_bfloat16_is_that_of_torch_bit_for_bit(count):
    bits = np.random.default_rng(count).integers(0, 2**32, count, dtype=np.uint32)
    values = bits.view(np.float32)  # every kind of number, NaN and infinities among them
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    assert np.array_equal(passed(codec_of("bf16"), values), expected, equal_nan=True)


def test_bfloat16_of_odd_numbers_is_that_of_torch():
    odd = np.float32([np.inf, -np.inf, np.nan, *ODD_VALUES])
    nearly = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x3F808000, 0x3F818000, 0x3F808001])
    values = np.concatenate([odd, nearly.view(np.float32)])
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    assert np.array_equal(passed(codec_of("bf16"), values), expected, equal_nan=True)
    assert np.isnan(passed(codec_of("bf16"), nearly[:3].view(np.float32))).all()


@pytest.mark.parametrize("count", LENGTHS)
def test_int8_is_at_most_one_step_off_and_a_quarter_as_long(count):
    values = normal(count)
    error = np.abs(passed(codec_of("int8"), values) - values)
    assert (error <= steps_of_int8(values) * (1 + 1e-5)).all()
    assert codec_of("int8").encoded_bytes(count) == count + 4 * -(-count // BLOCK)


@given(
    st.lists(
        st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=1, max_size=600
    )
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_int8_is_at_most_one_step_off_whatever_the_numbers(numbers):
    values = np.float32(numbers)
    error = np.abs(passed(codec_of("int8"), values).astype(np.float64) - values)
    assert (error <= steps_of_int8(values.astype(np.float64)) * (1 + 1e-5)).all()


SIZES = st.lists(st.one_of(st.integers(0, 3), st.integers(1, 1000)), min_size=1, max_size=20)


@given(SIZES, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_block_of_int8_holds_numbers_of_two_tensors(sizes, seed):
    """One tensor's are up to 1e6 times those of its neighbours."""
    rng = np.random.default_rng(seed)
    parts = [
        np.float32(10.0 ** rng.integers(-3, 4)) * normal(size, seed + k)
        for k, size in enumerate(sizes)
    ]
    if not sum(sizes):
        return
    values, codec, cut = np.concatenate(parts), codec_of("int8"), cut_at(sizes)
    room = codec.encoded_bytes(len(values), cut)
    body = memoryview(bytearray(room))
    codec.encode(values, body, cut)
    error = np.abs(codec.decode(body, np.empty_like(values), cut) - values)
    blocks = sum(-(-size // BLOCK) for size in sizes)
    if 4 * blocks <= 3 * len(values):
        steps = np.concatenate([steps_of_int8(part) for part in parts if len(part)])
        assert room == len(values) + 4 * blocks
        assert (error <= steps * (1 + 1e-5)).all()
    assert room <= 4 * len(values) + 4, "never longer than float32"


@pytest.mark.parametrize("size", [1, 2, 100, 256, 257, 2000])
def test_many_small_tensors_cost_no_more_calls_than_a_large_one(size):
    """A fragment is coded between two turns of the node's loop."""
    count = 262_144 // size
    assert len(cut_at([size] * count)) <= 2 * len(cut_at([262_144]))


def test_a_fragment_is_cut_where_its_tensors_are():
    """In a replica of short fragments tensors begin and end anywhere in them."""
    sizes = [700, 0, 3, 3, 1, 2500, 300, 20, 1493]
    entries, codec = sum(sizes), codec_of("int8")
    a, b = (Replica(entries, 1000, sizes) for _ in range(2))
    scale = np.repeat(np.float32([1, 1, 1e4, 1, 1e-3, 1, 1e3, 1e-2, 1]), sizes)
    values = scale * normal(entries)
    for index in range(a.fragments):
        a.fill(index, values)
        room = a.body_bytes(index, codec)
        assert room == b.body_bytes(index, codec)
        sent, reply = memoryview(bytearray(room)), memoryview(bytearray(room))
        a.write(index, sent, codec)
        b.answer(index, sent, 1.0, reply, codec)
    peaks = np.repeat(
        [np.abs(v).max(initial=0) for v in np.split(values, np.cumsum(sizes)[:-1])], sizes
    )
    assert (np.abs(b.weights - values) <= 2 * peaks / 126).all()


def test_the_weights_beside_a_mask_of_ten_thousands_survive_int8():
    def build(rank):
        torch.manual_seed(1)
        model = torch.nn.Linear(7, 3)
        model.register_buffer("mask", torch.full((5,), -1e4))
        return model, torch.optim.SGD(model.parameters(), lr=0.0), torch.nn.functional.mse_loss

    def loader(rank):
        while True:
            yield torch.zeros(1, 7), torch.zeros(1, 3)

    report = mesh.simulate(build, loader, nodes=3, every=2, steps=40, codec="int8")
    before = build(0)[0].state_dict()
    for name in ("weight", "bias"):
        assert np.abs(report.weights[name] - before[name].numpy()).max() < 0.02


def test_int8_is_right_on_average_and_zero_stays_zero():
    values = np.concatenate([normal(300), np.zeros(300, np.float32), np.float32([1e-45, -1e-40])])
    count = 2000
    mean = sum(passed(codec_of("int8", seed), values).astype(np.float64) for seed in range(count))
    steps = steps_of_int8(values)
    # The standard deviation of one rounding is at most half a step; of a mean nothing lies 5 off.
    assert (np.abs(mean / count - values) <= 5 * 0.5 * steps / count**0.5).all()
    assert (mean[512:600] == 0).all()


def test_int8_rounds_by_its_seed_alone():
    values = normal(1000)
    first, again, other = (passed(codec_of("int8", seed), values) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, 3.4e38])
def test_a_scale_that_no_encoder_writes_is_refused_as_not_finite(scale):
    codec, values = codec_of("int8"), normal(600)
    body = encoded(codec, values)
    body[4:8] = np.float32(scale).tobytes()
    mine = Replica(600)
    mine.fill(0, values)
    reply = memoryview(bytearray(len(body)))
    for step in (
        lambda: mine.answer(0, body, 0.5, reply, codec),
        lambda: mine.apply(0, body, 0.5, codec),
        lambda: mine.take(0, body, np.empty(600, np.float32), codec),
    ):
        with pytest.raises(NotFinite):
            step()
    assert mine.weights.tobytes() == values.tobytes(), "nothing was changed"


@given(st.sampled_from(ROUNDING), st.integers(1, 700), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_whatever_bytes_come_they_are_taken_whole_or_refused(name, count, rng):
    codec = codec_of(name)
    body = memoryview(bytearray(rng.randbytes(codec.encoded_bytes(count))))
    mine = Replica(count)
    before = mine.weights.copy()
    try:
        assert np.isfinite(mine.apply(0, body, 0.5, codec))
    except NotFinite:
        assert mine.weights.tobytes() == before.tobytes()
    assert np.isfinite(mine.weights).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [5, 700, PIECE + 300])
def test_both_ends_apply_the_very_same_delta(name, count):
    """From weights of 0 a step of the whole delta leaves the delta itself in each replica."""
    a, b, codec = Replica(count), Replica(count), codec_of(name)
    a.fill(0, normal(count))
    sent, reply = (memoryview(bytearray(codec.encoded_bytes(count))) for _ in range(2))
    a.write(0, sent, codec)
    distance = b.answer(0, sent, 1.0, reply, codec)
    delta = b.weights.copy()
    a.weights[:] = 0
    moved = a.apply(0, reply, 1.0, codec_of(name, seed=9))
    assert np.array_equal(-a.weights, delta)
    assert moved == pytest.approx(square_norm(delta))
    assert distance == pytest.approx(moved, rel=0.1)


def test_a_codec_that_is_none_is_said_at_once():
    with pytest.raises(UsageError, match="codec='bf17': one of f32, bf16, int8"):
        check_codec("bf17")
    with pytest.raises(UsageError):
        check_codec(["f32"])


# ------------------------------------------------------------------------------- in a whole mesh

ENTRIES = 5000


@pytest.fixture
def small_fragments(monkeypatch):
    monkeypatch.setattr(replica, "FRAGMENT_ENTRIES", 600)


async def meet(rng, codecs):
    """One replica in each codec, started as one model, moved apart, left to meet; returns (sums before
    and after in float64, how far apart, players)."""
    async with memory_mesh(rng, len(codecs)) as mesh:
        players = []
        for index, codec in enumerate(codecs, 1):
            players.append(Player(normal(ENTRIES), codec=codec))
            await players[-1].attach(mesh.nodes[index])
        await until(lambda: all(p.begun and p.node.exchanged(p.run) for p in players))
        mesh.network.lose_all()
        for seed, player in enumerate(players):
            await player.run.offer()
            await player.post(normal(ENTRIES, seed + 10))
        before = sum(player.x.astype(np.float64) for player in players)
        await trio.sleep(60)
        await until(lambda: all(p.run.current is None and not p.run.unfinished for p in players))
        after = sum(player.weights.astype(np.float64) for player in players)
        apart = np.ptp([player.weights for player in players], axis=0).max()
        return before, after, apart, players


@pytest.mark.usefixtures("small_fragments")
@pytest.mark.parametrize("codecs", [("bf16", "bf16"), ("int8", "int8"), ("f32", "bf16", "int8")])
def test_nodes_of_any_codecs_agree_and_their_sum_stays(codecs):
    before, after, apart, players = run_seeded(meet, 3, codecs)
    assert all(player.run.counters.completed for player in players)
    assert np.abs(after - before).max() <= 2e-5, "only float32's own rounding may move the sum"
    assert apart <= 1e-4, "at rest nothing is rounded: else they stay two or three steps apart"


@pytest.mark.usefixtures("small_fragments")
def test_a_newcomer_takes_weights_exactly_whatever_its_codec():
    async def main(rng):
        async with memory_mesh(rng, 2) as mesh:
            donor, taker = (Player(normal(ENTRIES, s), codec="int8") for s in (1, 2))
            await donor.attach(mesh.nodes[1])
            await until(lambda: donor.begun == "alone")
            await taker.attach(mesh.nodes[2])
            await until(lambda: taker.begun)
            assert taker.x.tobytes() == donor.x.tobytes()

    run_seeded(main, 1)


@pytest.mark.usefixtures("small_fragments")
def test_fewer_bytes_travel_while_trainings_go_on():
    async def main(rng, codec):
        async with memory_mesh(rng, 2) as mesh:
            players = [Player(normal(ENTRIES), codec=codec) for _ in mesh.nodes]
            for player, node in zip(players, mesh.nodes.values(), strict=True):
                await player.attach(node)
            await until(lambda: all(p.begun and p.node.exchanged(p.run) for p in players))
            counters = players[0].run.counters
            sent, completed = counters.bytes_sent, counters.completed
            for _ in range(10):
                await players[0].run.offer()
                await players[0].post(normal(ENTRIES, 3))
                await trio.sleep(0.2)
            return (counters.bytes_sent - sent) / (counters.completed - completed)

    exact, half, quarter = (run_seeded(main, 5, codec) for codec in ("f32", "bf16", "int8"))
    assert half < 0.56 * exact  # headers count: these fragments are short
    assert quarter < 0.35 * exact
