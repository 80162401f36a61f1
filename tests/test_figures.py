"""Figures: picture, numbers and provenance together."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import matplotlib
import numpy as np
import pandas as pd
import pytest

from kafnb import ACTIVATIONS, compare, figures, notebooks
from kafnb.alttext import describe

matplotlib.use("Agg")


@pytest.fixture
def figure():
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    ax.plot([1, 2])
    yield figure
    plt.close(figure)


def test_save_writes_picture_numbers_and_manifest(figure, tmp_path):
    table = pd.DataFrame({"x": [1, 2], "y": [0.1, 0.2]})
    for seed in (0, 1):
        figures.save_figure(figure, "06_a", table, tmp_path, seed=seed, commit="abc")
    figures.save_figure(figure, "14_b", table, tmp_path, seed=0, commit="abc")
    assert (tmp_path / "06_a.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv(tmp_path / "06_a.csv").equals(table)
    manifest = figures.read_manifest(tmp_path)
    assert all(entry.pop("alt") for entry in manifest["figures"].values())
    assert manifest["figures"] == {"06_a": {"seed": 1, "commit": "abc"}, "14_b": {"seed": 0, "commit": "abc"}}
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("size", [(7, 3.6), (9, 8)])
def test_a_footnote_is_under_all_that_is_drawn(size):
    figure = matplotlib.figure.Figure(size, layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel="epoch, and more that is long enough to reach the corner " * 2, ylabel="loss")
    figure.draw_without_rendering()
    before = ax.get_window_extent().size
    figures.footnote(figure, "profile small")
    figure.draw_without_rendering()
    assert np.allclose(ax.get_window_extent().size, before, atol=1)  # pixels
    assert 0 <= figure.texts[0].get_window_extent().y0 < figure.texts[0].get_window_extent().y1 <= ax.get_tightbbox().y0


def test_same_figure_same_bytes(figure, tmp_path):
    table = pd.DataFrame({"x": [1]})
    for name in ("a", "b"):
        figures.save_figure(figure, name, table, tmp_path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_figure_without_its_numbers(figure, tmp_path):
    for table in (None, pd.DataFrame()):
        with pytest.raises(ValueError, match="numbers"):
            figures.save_figure(figure, "a", table, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_activation_has_its_own_look():
    named = set(ACTIVATIONS) - {"identity"}
    assert named <= set(figures.STYLES) and named <= set(figures.LABELS)
    assert len({figures.STYLES[n] for n in named}) == len(named)


def test_an_activation_in_another_colour_is_noticed(figure, tmp_path):
    ax, table = figure.axes[0], pd.DataFrame({"x": [1]})
    ax.plot([1], **figures.style("relu"))
    ax.plot([1, 2], **figures.line("kaf_elu"))
    ax.bar([1], [2], color=figures.style("swish")["color"], label="Swish")
    ax.errorbar([1], [2], [1], **figures.style("kaf"))
    ax.scatter([1], [2], color="none", edgecolor="k", label="tanh")
    assert figures.wrong_colours(figure) == []
    ax.bar([1], [2], color="#123456", label="ELU")
    ax.axhline(1, color="#777777", label="GELU")
    with pytest.warns(UserWarning, match="figure a: GELU, ELU not in the colour"):
        figures.save_figure(figure, "a", table, tmp_path)


def test_scatter_draws_the_intervals_it_was_given(figure):
    from matplotlib.patches import Ellipse

    rng, rows = np.random.default_rng(0), []
    for name, metric, seed in product(("relu", "kaf_elu"), ("clean", "PGD"), (0, 1)):
        correct = rng.random(300) < {"clean": 0.8, "PGD": 0.4}[metric]
        rows.append(dict(activation=name, metric=metric, seed=seed, rate=correct.mean(), correct=correct))
    results, ax = pd.DataFrame(rows), figure.axes[0]
    unattacked = results[results.metric == "clean"].query("activation == 'relu'").assign(activation="swish")
    figures.scatter(ax, pd.concat([results, unattacked]), "clean", "PGD")
    rates = compare.rates(results).set_index(["activation", "metric"])
    for name, e in zip(("relu", "kaf_elu"), (p for p in ax.patches if isinstance(p, Ellipse)), strict=True):
        (clean, pgd), (x, y) = (100 * rates.loc[name].loc[m] for m in ("clean", "PGD")), e.center
        assert (x - e.width / 2, x + e.width / 2) == pytest.approx((clean.low, clean.high))
        assert (y - e.height / 2, y + e.height / 2) == pytest.approx((pgd.low, pgd.high))
    assert ax.get_legend_handles_labels()[1] == ["ReLU", "KAF_ELU"]  # once each, whatever the number of seeds
    assert [len(c.get_offsets()) for c in ax.collections] == [1, 2, 1, 2] and not figures.wrong_colours(figure)
    assert "ReLU at (" in describe(figure)


def test_gaps_of_a_function_of_one_s_own(figure):
    row = {"training": 50.0, "test": 40.0, "gap": 10.0}
    words = figures.gaps(figure.axes, {"clean": pd.DataFrame([row, row | {"gap": 11.0}], ["relu", "cube"])})
    assert "largest gap 11.0 points, cube" in words and "ReLU 50.0 and 40.0" in words


def test_a_first_run_keeps_no_time_of_an_earlier_one(monkeypatch, tmp_path):
    name, seconds = "06_kernel_activation_functions", iter((20, 5, 30))
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    monkeypatch.setattr(notebooks.engines, "pool", ThreadPoolExecutor)
    monkeypatch.setattr(notebooks, "_execute", lambda name, *_: notebooks.Outcome(name, next(seconds)))
    for folder in ("notebooks", "results/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "notebooks" / f"{name}.ipynb").touch()
    sums = tmp_path / "results" / "a" / "SHA256SUMS"
    for first in (True, False, True):
        sums.unlink(missing_ok=True) if first else sums.touch()
        notebooks.run_notebooks(jobs=1)
        said = figures.measured(name, "quick")
        assert ("20 s in a first run, 5 s with trained models" in said) == (not first)
    assert said.startswith("30 s in a first run (")
