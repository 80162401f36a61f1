"""Comparisons of networks on the same images."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest, norm

from kafnb import compare, evaluate, thesis


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
    wins = int((results.correct[0] & ~results.correct[4]).sum())
    assert table.loc[("a", "b"), "only a right"] == 2 * wins and table.loc[("a", "b"), "only b right"] == 0
    assert table.loc[("a", "b"), "p"] == pytest.approx(2 * 0.5**wins)  # the second seed, the same, is no evidence
    assert table.loc[("a", "b"), "p, corrected"] == pytest.approx(6 * 0.5**wins)
    assert table.loc[("a", "c"), "p"] == 1 and table.loc[("a", "c"), "p, corrected"] == 1


def test_a_difference_of_nothing_is_not_known_to_be_nothing(results):
    difference, low, high = compare.difference(results, "a", "c", "x")
    assert difference == 0 and low == -high == pytest.approx(-100 * 1.96 / 400)
    assert compare.paired(results.correct[0], results.correct[0]) == pytest.approx((0, low, high))


def test_a_difference_without_spread_is_not_known_without_error():
    right, wrong = np.ones(200, bool), np.zeros(200, bool)
    first, second = right.copy(), right.copy()
    first[0] = second[1] = False  # in the other seed the other way round: no image and no seed differs in the mean
    for a, b, d in (([first, second], [second, first], 0), ([right, right], [wrong, wrong], 100)):
        rows = [
            dict(activation=n, metric="x", seed=s, correct=c)
            for n, seeds in (("a", a), ("b", b))
            for s, c in enumerate(seeds)
        ]
        found, low, high = compare.difference(pd.DataFrame(rows), "a", "b", "x")
        assert (found, low, high) == pytest.approx((d, d - 0.98, d + 0.98))


def test_paired_difference_by_hand():
    first = np.repeat([True, False, True, False], [30, 40, 10, 20])
    second = np.repeat([True, False, False, True], [30, 40, 10, 20])
    difference, low, high = compare.paired(first, second)
    assert difference == pytest.approx(10)
    half = 196 * np.sqrt((31 - 1) / 100) / 10  # 30 discordant, one more, minus 10^2 / 100
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (7, 3), (3, 7), (40, 61)])
def test_one_seed_is_the_exact_mcnemar_test(only_a, only_b):
    d = np.repeat([1, -1, 0], [only_a, only_b, 5])
    p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1
    assert compare._sign_test(d) == pytest.approx(p, abs=1e-12)


def test_sign_test_of_several_seeds_counts_every_way_to_flip():
    d = np.array([3, 3, -1, 2, 0, 1, -2, 3])
    sums = [abs(np.dot(signs, d)) for signs in product((-1, 1), repeat=len(d))]
    assert compare._sign_test(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum())))


def test_difference_is_paired(results):
    d, low, high = compare.difference(results, "a", "b", "x")
    assert d == pytest.approx(100 * (results.correct[0].mean() - results.correct[4].mean())) and low < d < high
    assert high - low < 2 * 196 * np.sqrt(0.25 / 400)  # narrower than unpaired


def test_same_seeds_twice_are_one(results):
    """A copy of a network tells nothing new: neither interval may shrink."""
    one = results[results.seed == 0]
    assert compare.difference(results, "a", "b", "x") == pytest.approx(compare.difference(one, "a", "b", "x"), rel=0.02)
    assert compare.difference(one, "a", "b", "x") == compare.paired(one.correct[4], one.correct[0])
    both, single = (compare.rates(t).set_index(["activation", "metric"]) for t in (results, one))
    assert np.allclose(both.high - both.low, single.high - single.low, rtol=0.01)


def test_one_seed_has_wilsons_interval(results):
    for r in compare.rates(results[results.seed == 0]).itertuples():
        correct = results.correct[(results.activation == r.activation) & (results.metric == r.metric)].iloc[0]
        assert (r.low, r.high) == pytest.approx(evaluate.wilson(int(correct.sum()), len(correct)), abs=1e-5)
    none = results.assign(correct=[np.zeros(50, bool)] * len(results))
    assert compare.rates(none).high.to_numpy() == pytest.approx(evaluate.wilson(0, 50)[1], abs=1e-5)
    cell = compare.percent(results).loc["a", "x"]
    assert cell.startswith(f"{100 * results.correct[0].mean():.1f} [")


@pytest.mark.parametrize("level, luck", [(0.0, 0.0), (0.0, 0.15), (-5.0, 0.0), (-5.0, 0.15)])
def test_intervals_cover_other_images_and_other_seeds(level, luck):
    """Networks whose threshold hangs on the seed, images that all find hard: what a repetition redraws is covered."""
    rng, covered, pooled, rate = np.random.default_rng(0), 0, 0, 0
    truth = norm.cdf(level / np.sqrt(5 + 16 * luck**2))
    for _ in range(200):
        hard = level + 2 * rng.normal(size=200)
        a, b = (hard + rng.normal(size=(3, 200)) + luck * 4 * rng.normal(size=(3, 1)) > 0 for _ in range(2))
        rows = [dict(activation=n, metric="x", seed=s, correct=c[s]) for n, c in (("a", a), ("b", b)) for s in range(3)]
        table = pd.DataFrame(rows)
        _, low, high = compare.difference(table, "a", "b", "x")
        covered += low <= 0 <= high
        d = 100 * (a.astype(float) - b).ravel()
        pooled += abs(d.mean()) <= 1.96 * d.std() / np.sqrt(d.size)
        own = compare.rates(table).iloc[0]
        rate += own.low <= truth <= own.high
    assert covered >= 176 and rate >= 176, (covered, rate)  # of 200
    assert pooled < 150 or not luck or level, pooled  # each image of each seed for itself: far too sure


@pytest.mark.filterwarnings("error")
def test_one_image_of_one_seed_is_an_interval_without_a_warning():
    own = compare.rates(pd.DataFrame([dict(activation="a", metric="x", seed=0, correct=np.array([True]))])).iloc[0]
    assert (own.low, own.high) == pytest.approx(evaluate.wilson(1, 1), abs=1e-5)


def test_two_seeds_that_differ_leave_much_open_but_not_everything():
    """3.3 and 0.5 per cent of 1,000 images: the interval is Student's of two numbers, not [0, 54]."""
    rows = [dict(activation="a", metric="x", seed=s, correct=np.arange(1000) < k) for s, k in enumerate((33, 5))]
    own = compare.rates(pd.DataFrame(rows)).iloc[0]
    assert own.rate == 0.019 and own.low == 0 and 0.1 < own.high < 0.019 + 12.71 * 0.014
    rows = [dict(activation="a", metric="x", seed=s, correct=np.full(9, bool(s))) for s in range(2)]
    own = compare.rates(pd.DataFrame(rows)).iloc[0]
    assert (own.low, own.rate, own.high) == (0, 0.5, 1)  # every image alike, the seeds opposite


def test_seeds_of_other_images_are_refused(results):
    short = results.assign(
        correct=[
            c[: 400 - 100 * (s == 1 and n == "b")]
            for c, s, n in zip(results.correct, results.seed, results.activation, strict=True)
        ]
    )
    for call in (compare.percent, lambda t: compare.mcnemar(t, "x"), lambda t: compare.difference(t, "a", "b", "x")):
        with pytest.raises(ValueError, match="same images"):
            call(short)
    fewer = results[(results.seed == 0) | (results.activation == "a")]
    for call in (lambda t: compare.mcnemar(t, "x"), lambda t: compare.difference(t, "a", "b", "x")):
        with pytest.raises(ValueError, match="images and seeds"):
            call(fewer)


def test_unknown_metric_names_the_known(results):
    with pytest.raises(ValueError, match="there are x, y"):
        compare.mcnemar(results, "z")


def test_what_is_no_table_of_results_is_said(results):
    for table in (results[:0], results.drop(columns="correct")):
        with pytest.raises(ValueError, match=r"^results must be a table as kafnb\.run returns it[^\n]+$"):
            compare.rates(table)
    with pytest.raises(TypeError, match=r"^results must be a DataFrame as kafnb\.run returns it, got [^\n]+$"):
        compare.rates(results.to_dict())


def test_thesis_tables():
    vgg, resnet = thesis.table(thesis.VGG), thesis.table(thesis.RESNET20)
    assert len(vgg) == 7 and len(resnet) == 8
    assert ((vgg["PGD-50-10 %"] < vgg["clean %"]) & (vgg["lr low"] < vgg["lr high"])).all()


def test_rows_of_two_kinds_of_network_are_not_taken_for_seeds(results):
    with pytest.raises(ValueError, match="two rows of x for 'a', seed 0"):
        compare.rates(pd.concat([results, results]))


def test_other_seeds_are_not_paired(results):
    results.loc[(results.activation == "b") & (results.seed == 1), "seed"] = 2
    for compared in (lambda: compare.difference(results, "a", "b", "x"), lambda: compare.mcnemar(results, "x")):
        with pytest.raises(ValueError, match=r"seeds \[0, 1\] and \[0, 2\]"):
            compared()
    assert compare.difference(results, "a", "c", "x")[0] == 0
