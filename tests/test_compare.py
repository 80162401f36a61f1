"""Comparisons of networks on the same images."""

import numpy as np
import pandas as pd
import pytest

from kafnb import compare, thesis


@pytest.fixture
def results():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    rows = [("a", base), ("b", base & (rng.random(400) < 0.8)), ("c", base.copy())]
    return pd.DataFrame(
        [dict(activation=n, metric=m, seed=s, correct=c) for n, c in rows for m in ("x", "y") for s in (0, 1)]
    )


def test_mcnemar_against_the_binomial(results):
    table = compare.mcnemar(results, "x").set_index(["a", "b"])
    wins = int((results.correct[0] & ~results.correct[4]).sum()) * 2  # two seeds, the same
    assert table.loc[("a", "b"), "only a right"] == wins and table.loc[("a", "b"), "only b right"] == 0
    assert table.loc[("a", "b"), "p"] == pytest.approx(2 * 0.5**wins)
    assert table.loc[("a", "b"), "p, corrected"] == pytest.approx(6 * 0.5**wins)
    assert table.loc[("a", "c"), "p"] == 1 and table.loc[("a", "c"), "p, corrected"] == 1


def test_difference_is_paired(results):
    d, low, high = compare.difference(results, "a", "b", "x")
    assert d == pytest.approx(100 * (results.correct[0].mean() - results.correct[4].mean())) and low < d < high
    assert compare.difference(results, "a", "c", "x") == (0, 0, 0)  # the same images right: no doubt is left
    assert high - low < 2 * 196 * np.sqrt(0.25 / 800)  # narrower than unpaired


def test_percent_pools_seeds(results):
    cell = compare.percent(results).loc["a", "x"]
    rate, low, high = (float(v) for v in cell.replace("[", "").replace("]", "").replace(",", "").split())
    assert rate == pytest.approx(100 * results.correct[0].mean(), abs=0.05) and low < rate < high
    assert high - low < 200 * 1.96 * np.sqrt(0.25 / 800)


def test_unknown_metric_names_the_known(results):
    with pytest.raises(ValueError, match="there are x, y"):
        compare.mcnemar(results, "z")


def test_thesis_tables():
    vgg, resnet = thesis.table(thesis.VGG), thesis.table(thesis.RESNET20)
    assert len(vgg) == 7 and len(resnet) == 8
    assert ((vgg["PGD-50-10 %"] < vgg["clean %"]) & (vgg["lr low"] < vgg["lr high"])).all()
