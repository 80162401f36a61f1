"""Results of several networks on the same test images, compared honestly."""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from .checks import instance, pick, shown
from .evaluate import wilson


def _check(results, metric=None):
    instance(results, pd.DataFrame, "results", " as kafnb.run returns it")
    if missing := [c for c in ("activation", "metric", "correct") if c not in results]:
        raise ValueError(f"results must be a table as kafnb.run returns it: no column {missing[0]}")
    if metric is not None and metric not in set(results.metric):
        raise ValueError(f"no metric {shown(metric)} in these results; there are {', '.join(results.metric.unique())}")


def percent(results):
    """Table activation x metric of "rate [low, high]" in per cent: all seeds pooled, 95 % Wilson intervals.

    The interval covers the choice of test images, not the luck of training: that is what several seeds show.
    """

    _check(results)

    def cell(group):
        pooled = np.concatenate(group.correct.tolist())
        low, high = wilson(int(pooled.sum()), len(pooled))
        return f"{100 * pooled.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return results.groupby(["activation", "metric"], sort=False)[["correct"]].apply(cell).unstack(sort=False)


def difference(results, a, b, metric):
    """Accuracy of activation a minus that of b on the same images, in points, with its 95 % interval.

    Parameters
    ----------
    results : DataFrame
        As ``kafnb.run`` returns it; the same seeds for both.

    Returns
    -------
    (difference, low, high) : per cent points
        Normal interval of the mean of the paired differences, images and seeds pooled.
    """
    _check(results, metric)
    chosen = results[results.metric == metric].sort_values("seed").groupby("activation").correct
    for name in (a, b):
        pick(tuple(chosen.groups), name, "activation in these results")
    a, b = (np.concatenate(chosen.get_group(name).tolist()).astype(float) for name in (a, b))
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a difference is of the same images, two at least: got {len(a)} and {len(b)}")
    d = 100 * (a - b)
    half = 1.96 * d.std(ddof=1) / np.sqrt(len(d))
    return d.mean(), d.mean() - half, d.mean() + half


def mcnemar(results, metric):
    """Exact McNemar test of every pair of activations on the images that both saw, seeds pooled.

    Parameters
    ----------
    results : DataFrame
        As ``kafnb.run`` returns it.
    metric : str
        One of its metrics.

    Returns
    -------
    DataFrame
        a, b, how many images only one of them gets right, the two-sided p-value, and that times the number of pairs
        (Bonferroni), most lopsided pair first.

    Source: McNemar, Psychometrika 12, 1947, https://doi.org/10.1007/BF02295996
    """
    _check(results, metric)
    pooled = (
        results[results.metric == metric]
        .groupby("activation", sort=False)
        .correct.apply(lambda c: np.concatenate(c.tolist()))
    )
    pairs, rows = list(combinations(pooled.index, 2)), []
    for a, b in pairs:
        only_a, only_b = int((pooled[a] & ~pooled[b]).sum()), int((pooled[b] & ~pooled[a]).sum())
        p = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        rows.append({"a": a, "b": b, "only a right": only_a, "only b right": only_b, "p": p})
    table = pd.DataFrame(rows, columns=["a", "b", "only a right", "only b right", "p"])
    table["p, corrected"] = (len(pairs) * table.p).clip(upper=1)
    return table.sort_values("p", ignore_index=True)
