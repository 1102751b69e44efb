"""The drawings: every weight stands where it belongs, every array entry is there once, nothing breaks on odd shapes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from ipywidgets import Dropdown, IntSlider, Output

from nbs_lib.formats.bcs import BCS
from nbs_lib.report import drawings
from nbs_lib.schemes import SCHEMES, Block, BlockPunched, Pattern
from notebooks.beside.map_fig01_schemes import explore, handles
from notebooks.beside.map_fig04_bcs import paper_example
from notebooks.beside.tour import roofline


@pytest.fixture
def ax():
    yield plt.figure().add_subplot()
    plt.close("all")


def kept(ax):
    """Which cells of the drawn image are not pale."""
    return (np.asarray(ax.images[0].get_array()) != drawings.PRUNED).any(axis=2)


@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (1, 9, 1, 1), (2, 3, 5, 1), (13, 1), (1, 1)])
@pytest.mark.parametrize("matrix", [False, True])
def test_every_weight_stands_where_it_belongs(ax, rng, shape, matrix):
    weight = np.where(rng.random(shape) < 0.4, 0, rng.standard_normal(shape))
    found = kept(drawings.weights(weight, ax, matrix))
    kh, kw = (*shape, 1, 1)[2:4]
    for place in np.ndindex(shape):
        p, q, i, j = (*place, 0, 0)[:4]
        cell = (p, (q * kh + i) * kw + j) if matrix else (p * kh + i, q * kw + j)
        assert found[cell] == (weight[place] != 0)


def test_blocks_and_kinds(ax):
    weight, scheme = np.ones((8, 6, 3, 3)), BlockPunched(4, 2)
    drawings.weights(weight, ax, blocks=scheme.blocks(weight.shape), kinds=np.arange(8)[:, None, None, None])
    assert len(np.unique(np.asarray(ax.images[0].get_array()).reshape(-1, 3), axis=0)) == 8
    borders = [c.get_segments() for c in ax.collections if c.get_zorder() == 3]
    assert [[segment[0] for segment in part] for part in borders] == [
        [pytest.approx((-0.5, 11.5))],
        [pytest.approx((5.5, -0.5)), pytest.approx((11.5, -0.5))],
    ]


def test_a_small_matrix_shows_its_values(ax):
    drawings.weights(paper_example(), ax)
    assert sorted(int(text.get_text()) for text in ax.texts if text.get_text()) == list(range(1, 21))


def test_pruned_draws_the_corner_of_the_whole_layers_mask(ax, rng):
    weight = rng.standard_normal((20, 17))
    mask = Block(4, 4).project(weight, 3.0)
    assert (kept(drawings.pruned(weight, Block(4, 4), 3.0, ax, crop=(6, 9))) == mask[:6, :9]).all()


def test_pruned_says_why_a_scheme_is_not_legal(ax, rng):
    drawings.pruned(rng.standard_normal((8, 8)), Pattern(8), 3.0, ax)
    assert not ax.images and "3x3" in ax.texts[0].get_text()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_explore_draws_any_scheme_on_any_layer(scheme, rng):
    for shape in ((13, 9, 3, 3), (9, 13)):
        figure = explore(rng.standard_normal(shape), scheme, 4, 3, 4.0)
        assert all(ax.images or ax.texts for ax in figure.axes)
        plt.close(figure)


@pytest.mark.parametrize("weight", [paper_example(), np.zeros((3, 4), np.float32), np.eye(40, dtype=np.float32)])
def test_arrays_have_every_entry_up_to_most(ax, weight):
    packed = BCS.pack(weight)
    drawings.arrays(packed, ax, most=24)
    sizes = [array.size for name, array in vars(packed).items() if name != "shape"]
    assert len(ax.patches) == sum(min(size, 24) for size in sizes)


def test_roofline_places_points_under_the_roof(ax):
    columns = ["label", "macs", "bytes", "ms", "provenance"]
    points = pd.DataFrame([["a", 4e6, 1e6, 0.1, "measured here"], ["b", 1e6, 1e6, 0.1, "simulated"]], columns=columns)
    roofline(points, 100.0, 20.0, ax)
    assert [tuple(dots.get_offsets()[0]) for dots in ax.collections] == [(4, 40), (1, 10)]
    x, y = ax.lines[0].get_data()
    assert np.allclose(y, np.minimum(100, 20 * x)) and 5.0 in x
    assert [text.get_text() for text in ax.get_legend().get_texts()][1:] == ["a, measured here", "b, simulated"]


def test_stacked_pieces_add_up(ax):
    drawings.stacked(pd.DataFrame({"x": [30.0, 2.0], "y": [70.0, 98.0]}, index=["one", "two"]), ax)
    assert sorted(bar.get_x() + bar.get_width() for bar in ax.patches) == [2, 30, 100, 100]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["one", "two"] and ax.yaxis_inverted()


def test_handles_redraw_when_a_control_changes(rng):
    weight, drawn = rng.standard_normal((8, 8, 3, 3)), []

    def draw(scheme, p):
        drawn.append((scheme, p))
        return explore(weight, scheme, p)

    scheme, p = Dropdown(options=list(SCHEMES), value="filter"), IntSlider(2, 1, 8)
    box = handles(draw, scheme=scheme, p=p)
    before = bytes(box.children[-1].value)
    scheme.value = "block_punched"
    p.value = 4
    assert drawn == [("filter", 2), ("block_punched", 2), ("block_punched", 4)] and not plt.get_fignums()
    assert before.startswith(b"\x89PNG") and bytes(box.children[-1].value) != before
    assert not any(isinstance(child, Output) for child in box.children)  # see notebooks/beside/map_fig01_schemes.py
