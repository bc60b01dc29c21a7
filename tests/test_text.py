"""Figures as people read them."""

import pytest

from nodes import listing, text


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "-"),
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1m00s"),
        (182.4, "3m02s"),
        (3599.7, "1h00m"),
        (86399.6, "1d0h"),
    ],
)
def test_a_duration_is_rounded_into_the_next_unit(seconds, said):
    assert text.duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999.4, "999 B"),
        (999.6, "1.0 kB"),
        (999_940, "999.9 kB"),
        (999_960, "1.0 MB"),
        (999_960_000, "1.0 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_a_size_is_rounded_into_the_next_unit(count, said):
    assert text.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "-"), (0.000812, "0.812 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (1.5, "1.5 s")],
)
def test_milliseconds_are_written_without_an_exponent(seconds, said):
    assert listing.millis(seconds) == said
