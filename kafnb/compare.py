"""Results of several networks on the same test images, compared honestly."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import binom, t

from .checks import instance, pick, shown


def _check(results, metric=None):
    instance(results, pd.DataFrame, "results", " as kafnb.run returns it")
    if results.empty:
        raise ValueError("results must be a table as kafnb.run returns it, with a row at least")
    if missing := [c for c in ("activation", "metric", "correct") if c not in results]:
        raise ValueError(f"results must be a table as kafnb.run returns it: no column {missing[0]}")
    if metric is not None and metric not in set(results.metric):
        raise ValueError(f"no metric {shown(metric)} in these results; there are {', '.join(results.metric.unique())}")


def _by_seed(results, metric):
    """Activation -> bool array (seeds, images), seeds in order."""
    _check(results, metric)
    chosen = results[results.metric == metric]
    if "seed" in chosen:
        twice = chosen.duplicated(["activation", "seed"])
        if twice.any():
            name, seed = chosen[twice].iloc[0][["activation", "seed"]]
            raise ValueError(f"two rows of {metric} for {shown(name)}, seed {seed}: one table for each kind of network")
        chosen = chosen.sort_values("seed", kind="stable")
    groups = {name: chosen.correct[chosen.activation == name].tolist() for name in results.activation.unique()}
    for name, correct in groups.items():
        if len({len(c) for c in correct}) > 1:
            raise ValueError(f"all seeds must have been scored on the same images, and those of {shown(name)} were not")
    return {name: np.stack(correct) for name, correct in groups.items() if correct}


def _same_seeds(results, metric, a, b):
    """Refuse two activations that were trained from other seeds: what is paired must be."""
    chosen = results[results.metric == metric]
    if "seed" in chosen:
        one, other = (sorted(chosen.seed[chosen.activation == name]) for name in (a, b))
        if one != other:
            raise ValueError(f"{shown(a)} and {shown(b)} are compared seed by seed: got seeds {one} and {other}")


def _error(d):
    """Standard error of the mean of d (seeds, images), and how many of them a 95 % interval reaches to each side.

    Two errors are added in squares, as both are drawn anew in a repetition: that of the images (from
    their means over seeds) and that of the seeds (from their means over images). Each holds some of the rest too, so
    the sum errs on the wide side. The reach is Student's at Welch and Satterthwaite's degrees of freedom, hence wide
    with two or three seeds that differ (and with two still somewhat short: nine in ten where seeds differ much).
    """
    seeds, images = d.shape
    image = d.mean(0).var(ddof=1) / images
    seed = d.mean(1).var(ddof=1) / seeds
    if image + seed == 0:
        return 0.0, 1.96
    freedom = (image + seed) ** 2 / (image**2 / (images - 1) + seed**2 / (seeds - 1))
    return np.sqrt(image + seed), float(t.ppf(0.975, freedom))


def paired(first, second):
    """Second minus first, in points: (difference, low, high), the 95 % interval of a paired difference of shares.

    Parameters
    ----------
    first, second : bool array, shape (n,)
        The same images counted in two ways. Source of the interval: Agresti, Categorical Data Analysis, section 11.1.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if len(first) == 0 or len(first) != len(second):
        raise ValueError(f"the same images are needed, one at least: got {len(first)} and {len(second)}")
    n, gained, lost = len(first), int((second & ~first).sum()), int((first & ~second).sum())
    difference = (gained - lost) / n
    # one half more in each cell keeps the interval from closing on nothing
    half = 1.96 * np.sqrt(max(gained + lost + 1 - (gained - lost) ** 2 / n, 0)) / n
    return 100 * difference, 100 * (difference - half), 100 * (difference + half)


def rates(results):
    """Accuracy of each activation, and its 95 % interval over images and, where there are several, seeds.

    Parameters
    ----------
    results : DataFrame
        As ``kafnb.run`` returns it.

    Returns
    -------
    DataFrame
        activation, metric, rate, low, high, all in [0, 1], and seeds. Of one seed the interval is Wilson's. Of several
        it is Wilson's for the part of the error that comes from the images, and what seeds add to the reach of a normal
        one is added to that in squares, on both sides, within [0, 1].
    """
    _check(results)
    rows = []
    for activation, metric in results[["activation", "metric"]].drop_duplicates().itertuples(index=False):
        d = _by_seed(results, metric)[activation].astype(float)
        (seeds, n), p = d.shape, d.mean()
        added = 0.0
        if seeds > 1:
            (both, reach), error = _error(d), d.mean(0).std(ddof=1) / np.sqrt(n)
            added = max((reach * both) ** 2 - (1.96 * error) ** 2, 0)
            n = p * (1 - p) / error**2 if error > 0 else n  # so many independent images would tell as much
        middle, half = p + 1.96**2 / (2 * n), 1.96 * np.sqrt(p * (1 - p) / n + 1.96**2 / (4 * n**2))
        low, high = (middle - half) / (1 + 1.96**2 / n), (middle + half) / (1 + 1.96**2 / n)
        low, high = max(p - np.hypot(p - low, np.sqrt(added)), 0), min(p + np.hypot(high - p, np.sqrt(added)), 1)
        rows.append(dict(activation=activation, metric=metric, rate=p, low=low, high=high, seeds=seeds))
    return pd.DataFrame(rows)


def without_images(results):
    """The results for a CSV: not each image's outcome, but ``rates`` of all seeds as mean, mean_low and mean_high."""
    means = rates(results).drop(columns="seeds").set_index(["activation", "metric"])
    means.columns = ["mean", "mean_low", "mean_high"]
    return results.drop(columns="correct").join(means, on=["activation", "metric"])


def percent(results):
    """Table activation x metric of "rate [low, high]" in per cent, see ``rates``."""
    table = rates(results)
    table["cell"] = [f"{100 * r.rate:.1f} [{100 * r.low:.1f}, {100 * r.high:.1f}]" for r in table.itertuples()]
    cells = table.pivot(index="activation", columns="metric", values="cell")
    return cells.loc[table.activation.unique(), table.metric.unique()]


def difference(results, a, b, metric):
    """Accuracy of activation a minus that of b on the same images, in points, with its 95 % interval.

    Parameters
    ----------
    results : DataFrame
        As ``kafnb.run`` returns it; as many seeds for both.

    Returns
    -------
    (difference, low, high) : per cent points
        Of one seed the interval is that of ``paired``, for the choice of images; of several it covers that of images
        and seeds. It is wider than if each image and seed were an observation of its own, which it is not. Where
        neither images nor seeds show any spread, it is that of half an image gained and half an image lost: an interval
        does not close on nothing.
    """
    found = _by_seed(results, metric)
    names = [pick(tuple(found), name, "activation in these results") for name in (a, b)]
    a, b = (found[name] for name in names)
    if a.shape != b.shape or a.shape[1] < 2:
        raise ValueError(
            "a difference is of the same images and seeds, two images at least: "
            f"got {a.shape[1]} and {b.shape[1]} images, {len(a)} and {len(b)} seeds"
        )
    _same_seeds(results, metric, *names)
    if len(a) == 1:
        return paired(b[0], a[0])
    d = 100 * (a.astype(float) - b)
    error, reach = _error(d)
    error = error or 100 / d.shape[1]
    return d.mean(), d.mean() - reach * error, d.mean() + reach * error


def mcnemar(results, metric):
    """Exact McNemar test of every pair of activations on the images that both saw.

    Of several seeds an image still counts once, by how many more networks of a than of b get it right; the test is
    then how often such a sum comes out if a coin gives each image its sign. It says that these networks differ: what
    other seeds would give is ``difference``'s interval.

    Parameters
    ----------
    results : DataFrame
        As ``kafnb.run`` returns it; as many seeds for all.
    metric : str
        One of its metrics.

    Returns
    -------
    DataFrame
        a, b, how many times only one of them gets an image right, the two-sided p-value, and that times the number of
        pairs (Bonferroni), most lopsided pair first.

    Source: McNemar, Psychometrika 12, 1947, https://doi.org/10.1007/BF02295996
    """
    found = _by_seed(results, metric)
    pairs, rows = list(combinations(found, 2)), []
    for a, b in pairs:
        if found[a].shape != found[b].shape:
            raise ValueError(f"{shown(a)} and {shown(b)} were not scored on the same images and seeds")
        _same_seeds(results, metric, a, b)
        only_a, only_b = int((found[a] & ~found[b]).sum()), int((found[b] & ~found[a]).sum())
        p = _sign_test(found[a].sum(0) - found[b].sum(0))
        rows.append({"a": a, "b": b, "only a right": only_a, "only b right": only_b, "p": p})
    table = pd.DataFrame(rows, columns=["a", "b", "only a right", "only b right", "p"])
    table["p, corrected"] = (len(pairs) * table.p).clip(upper=1)
    return table.sort_values("p", ignore_index=True)


def _sign_test(d):
    """Two-sided p-value of the sum of whole numbers d if a fair coin gave each its sign, exact."""
    chances = np.ones(1)  # of the sums -m, ..., m
    for size, n in zip(*np.unique(np.abs(d[d != 0]), return_counts=True), strict=True):
        flips = np.zeros(2 * size * n + 1)
        flips[:: 2 * size] = binom.pmf(np.arange(n + 1), n, 0.5)
        chances = np.convolve(chances, flips)
    sums = np.abs(np.arange(len(chances)) - len(chances) // 2)
    return min(1.0, float(chances[sums >= abs(d.sum())].sum()))
