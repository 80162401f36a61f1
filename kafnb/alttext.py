"""A figure in words, read from what is drawn in it: the alternative text of every picture."""

import re

import numpy as np
from matplotlib.collections import PathCollection

LIMIT = 700  # characters; all numbers are in the CSV beside the picture
_SIGNS = {"infty": "infinity", "varepsilon": "epsilon", "pm": "plus or minus", "lVert": "|", "rVert": "|"}


def plain(text):
    r"""A label on one line and without TeX: ``$L_\infty$`` becomes "L infinity"."""
    if "$" in text:
        text = re.sub(r"\\([A-Za-z]+)", lambda m: f" {_SIGNS.get(m[1], m[1])} ", text)
        text = re.sub(r"[${}^_\\]", " ", text)
    return " ".join(text.split())


def _name(artist):
    label = plain(str(artist.get_label()))
    return "" if label.startswith("_") else label


def _said(values):
    """First and last finite value, and a largest or smallest one in between."""
    values = values[np.isfinite(values)]
    if not len(values):
        return "no finite value"
    low, high = sorted((values[0], values[-1]))
    room = 0.05 * (values.max() - values.min())
    text = f"{_number(values[0])} to {_number(values[-1])}"
    text += f", up to {_number(values.max())}" if values.max() > high + room else ""
    return text + (f", down to {_number(values.min())}" if values.min() < low - room else "")


def _number(v):
    return f"{v:.3g}" if v else "0"


def _lines(ax):
    found = [(_name(a), np.ravel(np.asarray(a.get_ydata(), float))) for a in ax.lines if a.get_visible()]
    found = [(name, y) for name, y in found if len(y) > 2]
    named = {name: y for name, y in found if name}
    if 0 < len(named) <= 8:
        return "lines, left to right: " + "; ".join(f"{name} {_said(y)}" for name, y in named.items())
    if found:
        y = np.concatenate([y for _, y in found])
        y = y[np.isfinite(y)]
        if len(y):
            return f"{len(found)} line{'s' * (len(found) > 1)} between {_number(y.min())} and {_number(y.max())}"
    return ""


def _bars(ax):
    told = []
    log = "log" in (ax.get_xscale(), ax.get_yscale())
    for bars in ax.containers:
        patches = list(getattr(bars, "patches", []))
        if not patches:
            continue
        wide = bars.orientation == "horizontal"  # a bar of ``barh`` grows to the right
        sizes = [p.get_width() if wide else p.get_height() for p in patches]
        middles = [p.get_y() + p.get_height() / 2 if wide else p.get_x() + p.get_width() / 2 for p in patches]
        drawn = [(m, s) for m, s in zip(middles, sizes, strict=True) if s == s]  # not NaN
        if not drawn:
            continue
        middles, sizes = zip(*drawn, strict=True)
        axis, least = ax.yaxis if wide else ax.xaxis, 0 if log else 0.01 * max(map(abs, sizes))
        labels = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
        texts = {round(place): plain(t.get_text()) for place, t in labels}
        group = f"{_name(bars)}: " if _name(bars) else ""
        each = [f"{texts.get(round(m), '')} {_number(s if abs(s) > least else 0)}".strip()
                for m, s in zip(middles, sizes, strict=True)]  # fmt: skip
        told.append(group + (", ".join(each) if len(each) <= 12 else f"{len(each)} bars up to {_number(max(sizes))}"))
    return "bars: " + "; ".join(told) if told else ""


def _places(collection):
    places = np.ma.filled(np.ma.asarray(collection.get_offsets(), float), np.nan)
    return places[np.isfinite(places).all(axis=1)]  # what is drawn


def _points(ax):
    groups = [(c, _places(c)) for c in ax.collections if isinstance(c, PathCollection)]
    groups = [(c, places) for c, places in groups if len(places)]
    named = [f"{_name(c)} at ({', '.join(f'{v:.3g}' for v in p[0])})" if len(p) == 1 else f"{_name(c)} ({len(p)})"
             for c, p in groups if _name(c)]  # fmt: skip
    if 0 < len(named) <= 12:
        return "points: " + "; ".join(named)
    total = sum(len(p) for _, p in groups)
    return f"{total} point{'s' * (total > 1)}" if total else ""


def _panel(ax):
    title = plain(" ".join(ax.get_title(loc) for loc in ("left", "center", "right")))
    drawn = [t for t in (_lines(ax), _bars(ax), _points(ax)) if t]
    if ax.images:
        rows, columns = np.shape(ax.images[0].get_array())[:2]
        drawn.append(f"an image of {columns} by {rows} pixels")
    texts = [plain(t.get_text()) for t in ax.texts if t.get_text().strip()]
    if texts and len(drawn) < 2:
        drawn.append("says " + ", ".join(texts[:12]))
    x, y = plain(ax.get_xlabel()), plain(ax.get_ylabel())
    log = {"log": " (log scale)"}
    over = f"over {x}{log.get(ax.get_xscale(), '')}" if x and ax.axison else ""
    what = " ".join(p for p in (f"{y}{log.get(ax.get_yscale(), '')}" if y and ax.axison else "", over) if p)
    body = ": ".join(p for p in (what, ", ".join(drawn)) if p)
    return ". ".join(p for p in (title, body[:1].upper() + body[1:]) if p)


def describe(figure):
    """The picture in words: its title, then each panel's title, axes, and what is drawn with first and last values.

    Returns
    -------
    str
        One line, at most ``LIMIT`` characters, never empty.
    """
    panels = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    told = list(dict.fromkeys(filter(None, (_panel(ax) for ax in panels))))
    heading = plain(figure.get_suptitle())
    if len(panels) > 1:
        told = [f"{len(panels)} panels", *told]
    text = " ".join(t.rstrip(".") + "." for t in ([heading] if heading else []) + told)
    text = text or "A figure without labels."
    return text if len(text) <= LIMIT else text[: LIMIT - 4].rsplit(" ", 1)[0] + " ..."
