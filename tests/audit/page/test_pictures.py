"""Pictures of an audit: well-formed SVG of the page's colours, with texts as text."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lit_did.audit.page import pictures
from lit_did.audit.report import Estimate

NAME = 'a <b>&"$x$\n\ud800\x07'
ESTIMATES = [Estimate(0.5, 0.4, 0.6, 9), Estimate(0.25), Estimate(float("nan"))]
PICTURES = {
    "bars": lambda: pictures.bars([NAME, "b", "c"], ESTIMATES, "accuracy", 0.5),
    "forest": lambda: pictures.forest([NAME, "b", "c"], {"chosen": ESTIMATES, NAME: ESTIMATES}, "nats", 0.0),
    "histogram": lambda: pictures.histogram({"chosen": [1, 2, 2, np.nan, 900], NAME: np.arange(400)}, "words", 1.0),
    "scatter": lambda: pictures.scatter(np.arange(600), np.arange(600), "words", "nats", ["a", NAME] * 300, 0.0),
    "curves": lambda: pictures.curves({"": ([1, 2, 3], ESTIMATES), NAME: ([1, 2], [0.1, 0.2])}, "step", "nats"),
    "reliability": lambda: pictures.reliability([0.1, 0.5, 0.9], ESTIMATES),
    "position": lambda: pictures.position(Estimate(3.0, 0.5, 4.0), NAME, "exploring"),
    "no bars": lambda: pictures.bars([], [], "accuracy"),
    "no values": lambda: pictures.histogram({"": []}, "words"),
    "no points": lambda: pictures.scatter([], [], "words", "nats"),
}


def texts(svg: str) -> list[str]:
    return [element.text for element in ET.fromstring(svg).iter("text")]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_lean_svg_of_the_page(name):
    svg = PICTURES[name]()
    assert ET.fromstring(svg).get("role") == "img"
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]*)", svg))
    assert colours <= {"none", *(f"var(--{known})" for known in ("ink", "line", "paper", "series-1", "series-2"))}
    assert not re.search(r"<style|<metadata|font-family|http|\d\.\d{4}", svg)
    assert svg == PICTURES[name]()


def test_names_are_text_on_one_line():
    assert 'a <b>&"$x$   ' in texts(PICTURES["bars"]())
    assert "x" * 31 + "…" in texts(pictures.bars(["x" * 99], [1.0], "y"))


def test_histogram_counts_outlying_values_in_the_end_bins():
    outlying = pictures.histogram({"": [*np.arange(999) / 1000, 50.0]}, "nats")
    assert "nats; the end bins hold all beyond" in texts(outlying)
    assert "nats" in texts(pictures.histogram({"": np.arange(999) / 1000}, "nats"))
    edges, is_cut = pictures._edges(np.array([1.0, 2.0, 4.0]), 30)
    assert list(edges) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert not is_cut


def test_scatter_says_how_many_points_it_draws():
    svg = PICTURES["scatter"]()
    assert "words (500 of 600 points)" in texts(svg)
    assert 500 <= svg.count("<use") < 540


def test_position_beyond_the_ends_is_an_open_mark():
    assert "fill: var(--paper)" in PICTURES["position"]()
    assert "fill: var(--paper)" not in pictures.position(0.5, "low", "high")


def test_more_series_than_colours_are_refused():
    with pytest.raises(ValueError, match="Expected 1 to 4 series, but got 5"):
        pictures.forest(["a"], {str(number): [0.5] for number in range(5)}, "nats")
