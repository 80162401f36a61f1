"""The words that stand for a picture."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kafnb import alttext, figures


@pytest.fixture
def panel():
    figure, ax = plt.subplots()
    yield figure, ax
    plt.close(figure)


def test_lines_are_told_by_their_ends_and_by_a_peak(panel):
    figure, ax = panel
    ax.plot([0, 1, 2], [1, 5, 2], label="hill")
    ax.plot([0, 1, 2], [np.nan, 3, 4], label="slope")
    ax.set(title="Two lines", xlabel="epoch", ylabel="loss", yscale="log")
    text = alttext.describe(figure)
    assert text == "Two lines. Loss (log scale) over epoch: lines, left to right: hill 1 to 2, up to 5; slope 3 to 4."


@pytest.mark.parametrize("draw", ["bar", "barh"])
def test_bars_are_told_with_their_names(panel, draw):
    figure, ax = panel
    getattr(ax, draw)([0, 1, 2], [80.0, 41.5, 0.01])
    getattr(ax, "set_xticks" if draw == "bar" else "set_yticks")([0, 1, 2], ["ReLU", "KAF", "none"])
    assert "Bars: ReLU 80, KAF 41.5, none 0" in alttext.describe(figure)


def test_bars_that_are_missing_are_not_told(panel):
    figure, ax = panel
    ax.barh([0, 1], [3.0, float("nan")], label="some")
    ax.barh([0, 1], [float("nan")] * 2, label="none")
    ax.set_yticks([0, 1], ["ReLU", "KAF"])
    text = alttext.describe(figure)
    assert "some: ReLU 3" in text and "KAF" not in text and "none" not in text


def test_points_that_are_not_drawn_are_not_told(panel):
    figure, ax = panel
    ax.scatter([1, 2, np.nan], [1, np.nan, 3], label="one")
    ax.scatter([], [], label="none")
    text = alttext.describe(figure)
    assert text == "Points: one at (1, 1)."


def test_points_pictures_and_diagrams():
    figure, (a, b, c) = plt.subplots(1, 3)
    a.scatter([1.5], [2.5], label="KAF")
    b.imshow(np.zeros((3, 5)))
    c.text(0, 0, "conv 3×3")
    text = alttext.describe(figure)
    plt.close(figure)
    assert "3 panels" in text and "KAF at (1.5, 2.5)" in text and "5 by 3 pixels" in text and "Says conv 3×3" in text


@pytest.mark.parametrize(
    ("label", "words"), [("$L_\\infty$", "L infinity"), ("a\nb", "a b"), ("$\\gamma$ = 2", "gamma = 2")]
)
def test_labels_without_tex(label, words):
    assert alttext.plain(label) == words


def test_never_empty_and_never_too_long(panel):
    figure, ax = panel
    assert alttext.describe(figure)
    for i in range(8):
        ax.plot([0, 1, 2], [i, 2 * i, i], label=f"a rather long name of line {i} " * 5)
    assert len(alttext.describe(figure)) <= alttext.LIMIT


def test_a_saved_figure_has_its_words_in_the_manifest_and_in_the_notebook(panel, tmp_path):
    import pandas as pd
    from IPython.core.formatters import DisplayFormatter

    figure, ax = panel
    ax.set_title("Saved")
    figures.save_figure(figure, "a", pd.DataFrame({"x": [1]}), tmp_path)
    figures.save_figure(figure, "b", pd.DataFrame({"x": [1]}), tmp_path, alt="my own words")
    manifest = figures.read_manifest(tmp_path)["figures"]
    assert manifest["a"]["alt"] == "Saved." and manifest["b"]["alt"] == "my own words"
    assert DisplayFormatter().format(figure)[1]["image/png"] == {"alt": "my own words"}
