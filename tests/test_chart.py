"""Pictures made of characters: what they show is read back off the text."""

import itertools
import math
import re

import pytest

from nodes.chart import Series, chart, sparkline

RISING = Series("rising", [(float(x), float(x)) for x in range(101)])
FALLING = Series("falling", [(float(x), 100.0 - x) for x in range(101)])


def bare(text):
    return re.sub(r"\x1b\[\d+m", "", text)


@pytest.mark.parametrize("width", [24, 40, 79, 200])
@pytest.mark.parametrize("height", [6, 7, 10, 24])
@pytest.mark.parametrize("colour", [False, True])
def test_a_chart_is_as_large_as_it_was_asked_to_be(width, height, colour):
    lines = bare(
        chart([RISING, FALLING], width=width, height=height, title="loss", colour=colour)
    ).splitlines()
    assert max(map(len, lines)) == width
    assert len(lines) == height


def test_a_hundred_lines_leave_room_for_themselves():
    many = [Series(f"node-{k}", [(0.0, 0.0), (1.0, float(k))]) for k in range(100)]
    lines = chart(many, width=80, height=16).splitlines()
    assert len(lines) == 16
    assert sum("│" in line for line in lines) == 10
    named = "".join(lines).count(" node-")
    assert named > 16
    assert lines[-1] == f"... and {100 - named} more"


def test_a_line_that_rises_is_drawn_rising_and_the_axes_say_from_where_to_where():
    lines = chart([RISING], width=40, height=12, x_label="step", ascii=True).splitlines()
    drawn = [line.partition("|")[2] for line in lines if "|" in line]
    assert [row.index("*") for row in drawn] == sorted(row.index("*") for row in drawn)[::-1]
    assert lines[0].split("|")[0].strip() == "100"
    assert lines[len(drawn) - 1].split("|")[0].strip() == "0"
    assert lines[-1].split() == ["0", "step", "100"]
    dots = chart([RISING], width=40, height=12).splitlines()
    assert "⡠" in "".join(dots), "one line alone is drawn in dots of a quarter of a character"


def test_several_lines_are_told_apart_by_marks_or_by_colours():
    marked = chart([RISING, FALLING], width=60, height=12)
    assert "* rising  o falling" in marked
    assert marked.isascii() is False
    assert chart([RISING, FALLING], width=60, height=12, ascii=True).isascii()
    top = marked.splitlines()[0].partition("│")[2]
    assert (top.strip()[0], top.strip()[-1]) == ("o", "*"), "one falls from there, one rises to it"
    painted = chart([RISING, FALLING], width=60, height=12, colour=True)
    assert "\x1b[36m" in painted
    assert "\x1b[33m" in painted
    assert "*" not in painted


def test_what_is_not_finite_is_a_gap_and_nothing_at_all_is_said_in_words():
    gap = Series("gap", [(0.0, 1.0), (1.0, math.nan), (2.0, None), (3.0, math.inf), (4.0, 1.0)])
    row = next(
        line for line in chart([gap], width=44, height=5, ascii=True).splitlines() if "*" in line
    )
    assert row.count("*") == 2
    assert "nothing to draw" in chart([Series("empty", [])])
    assert "nothing to draw" in chart([])
    assert "nothing to draw" in chart([Series("negative", [(0.0, -1.0)])], log=True)


def test_a_logarithmic_axis_gives_each_power_of_ten_the_same_room():
    powers = Series("loss", [(float(x), 10.0**-x) for x in range(5)])
    rows = [
        line.partition("|")[2]
        for line in chart([powers], width=46, height=11, log=True, ascii=True).splitlines()
        if "|" in line
    ]
    ends = [row.index("*") for row in rows]
    assert {b - a for a, b in itertools.pairwise(ends)} <= {3, 4, 5}, ends


def test_one_value_for_ever_is_a_level_line():
    level = Series("level", [(float(x), 3.0) for x in range(9)])
    assert sum("*" in line for line in chart([level], height=9, ascii=True).splitlines()) == 1
    assert sum("*" in r for r in chart([Series("one", [(7.0, 0.0)])], ascii=True).splitlines()) == 1


def test_a_sparkline_shows_the_last_values_between_their_least_and_their_greatest():
    assert sparkline([9, 0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, None, math.nan, 3], 6) == "  ▁  █"
    assert sparkline([5, 5], 2) == "▁▁"
    assert sparkline([], 4) == "    "
    assert sparkline([0, 7], 2, ascii=True) == "_#"
