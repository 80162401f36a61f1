"""One style for every figure, and ``save_figure``: a picture, its numbers and where they came from."""

import json
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from filelock import FileLock
from matplotlib.colors import to_rgb, to_rgba_array
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Ellipse

from . import compare
from .alttext import describe
from .checks import file_name, instance
from .paths import home, write_atomically

# The same colour and marker for an activation everywhere. Okabe and Ito's colour-blind safe palette;
# relatives share a colour: a KAF that starts as a function has that function's colour and a filled diamond.
_BLACK, _ORANGE, _SKY, _GREEN, _YELLOW, _BLUE, _RED, _PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A800", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
STYLES = {
    "relu": (_BLACK, "o"), "leaky_relu": ("#777777", "o"), "elu": (_ORANGE, "s"), "swish": (_BLUE, "^"),
    "gelu": (_SKY, "^"), "softplus": (_PURPLE, "v"), "sigmoid": (_YELLOW, "v"), "tanh": (_PURPLE, "s"),
    "prelu": ("#777777", "P"), "srelu": (_SKY, "P"), "apl": (_YELLOW, "P"), "saf": (_PURPLE, "P"),
    "maxout": (_ORANGE, "P"), "pssilu": (_BLUE, "P"), "kwta": (_PURPLE, "X"),
    "kaf": (_RED, "D"), "kaf_free": (_GREEN, "D"), "kaf_relu": (_BLACK, "D"), "kaf_elu": (_ORANGE, "D"),
    "kaf_swish": (_BLUE, "D"),
}  # fmt: skip
LABELS = {
    "relu": "ReLU", "leaky_relu": "leaky ReLU", "elu": "ELU", "swish": "Swish", "gelu": "GELU", "softplus": "softplus",
    "sigmoid": "sigmoid", "tanh": "tanh", "prelu": "PReLU", "srelu": "SReLU", "apl": "APL", "saf": "SAF",
    "maxout": "maxout", "pssilu": "PSSiLU", "kwta": "k-WTA", "kaf": "KAF", "kaf_free": "KAF_Free",
    "kaf_relu": "KAF_ReLU", "kaf_elu": "KAF_ELU", "kaf_swish": "KAF_Swish",
}  # fmt: skip


def style(activation):
    """Keyword arguments color, marker, label of an activation, for any matplotlib call."""
    color, marker = STYLES.get(activation, ("#555555", "."))
    return {"color": color, "marker": marker, "label": LABELS.get(activation, activation)}


def line(activation):
    """The same for lines without markers; KAFs dashed, so that they differ from the function they start as."""
    kind = {k: v for k, v in style(activation).items() if k != "marker"}
    return kind | {"linestyle": "--" if activation.startswith("kaf_") else "-"}


def scatter(ax, results, x, y):
    """Two accuracies of each activation, per cent; its ellipse has their 95 % intervals (``compare.rates``) as axes.

    One without both is left out. Where some networks failed, those of more than four fifths of the best rates are
    drawn once more, enlarged.

    Parameters
    ----------
    results : DataFrame
        As ``kafnb.run`` returns it. Where there are several seeds, a small mark each.
    x, y : str
        Two of its metrics.
    """
    rates = 100 * compare.rates(results).set_index(["activation", "metric"])[["rate", "low", "high"]]
    seeds = 100 * results.pivot(index=["activation", "seed"], columns="metric", values="rate")
    means = rates.rate.unstack()[[x, y]].loc[results.activation.unique()].dropna()
    _places(ax, rates, seeds, means.index, x, y)
    ax.set(xlabel=f"{x} accuracy, %" if x == "clean" else f"{x}, %", ylabel=f"{y}, %")
    well = means.index[(means > 0.8 * means.max()).all(axis=1)]
    if 2 < len(well) < len(means):
        inset = ax.inset_axes([0.08, 0.44, 0.5, 0.5])
        _places(inset, rates, seeds, well, x, y)
        inset.tick_params(labelsize=7)
        inset.set_title("enlarged", fontsize=8)


def _places(ax, rates, seeds, names, x, y):
    for name in names:
        look, (across, up) = style(name), (rates.loc[(name, metric)] for metric in (x, y))
        middle = ((across.low + across.high) / 2, (up.low + up.high) / 2)
        size = (across.high - across.low, up.high - up.low)
        ax.add_patch(Ellipse(middle, *size, facecolor=(look["color"], 0.12), edgecolor=look["color"]))
        ax.scatter(across.rate, up.rate, s=45, zorder=3, **look)
        if len(seeds.loc[name]) > 1:
            ax.scatter(seeds.loc[name][x], seeds.loc[name][y], s=8, color=look["color"], marker=look["marker"])
    ax.autoscale_view()


def gaps(panels, tables):
    """Accuracy of each activation on training and on test images, joined: an axes for each measurement.

    Parameters
    ----------
    panels : sequence of Axes
        Which share y.
    tables : dict of DataFrame
        Of each measurement, by its name, the rows of ``evaluate.generalisation_gap``; index activation.

    Returns
    -------
    str
        The picture in words.
    """
    words = []
    for ax, (measured, table) in zip(panels, tables.items(), strict=True):
        for i, (name, row) in enumerate(table.iterrows()):
            color, marker, _ = style(name).values()
            ax.plot([row.training, row.test], [i, i], color=color, lw=1.5, zorder=1)
            ax.scatter(row.training, i, s=40, marker=marker, facecolor="white", edgecolor=color, zorder=2)
            ax.scatter(row.test, i, s=40, marker=marker, color=color, zorder=3)
        labels = [LABELS.get(name, name) for name in table.index]
        ax.set_yticks(range(len(table)), labels)
        widest = f"largest gap {table.gap.max():.1f} points, {labels[table.gap.argmax()]}"
        ax.set(xlabel="accuracy, %: training images empty, test images full", title=f"{measured}: {widest}")
        rows = zip(labels, table.training, table.test, strict=True)
        each = "; ".join(f"{label} {training:.1f} and {test:.1f}" for label, training, test in rows)
        words.append(f"{measured}, {widest}. Accuracy in per cent on training and on test images: {each}.")
    panels[0].invert_yaxis()
    return " ".join(words)


def wrong_colours(figure):
    """Labels of lines, points and bars that name an activation but are drawn in another colour than its own."""
    own, odd = {LABELS[a]: to_rgb(color) for a, (color, _) in STYLES.items()}, []
    for ax in figure.axes:
        for artist, label in zip(*ax.get_legend_handles_labels(), strict=True):
            part = artist[0] if isinstance(artist, Container) else artist
            if label in own and part is not None:
                colors = to_rgba_array(part.get_color() if hasattr(part, "get_color") else part.get_facecolor())
                if len(colors) and not np.allclose(colors[0, :3], own[label], atol=0.01):
                    odd.append(label)
    return odd


def use_style():
    """Set matplotlib's parameters for all figures."""
    mpl.rcParams.update(
        {
            "figure.figsize": (7, 3.6), "figure.dpi": 90, "savefig.dpi": 150, "figure.constrained_layout.use": True,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
            "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 11, "axes.titlelocation": "left",
            "legend.frameon": False, "font.size": 10, "image.cmap": "gray_r",
        }
    )  # fmt: skip


def footnote(figure, text):
    """A small grey line under all that is drawn; the figure grows by its 0.14 inches, and the rest stays as it was."""
    figure.set_figheight(figure.get_figheight() + 0.14)
    line = 0.14 / figure.get_figheight()
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.get_layout_engine().set(rect=(0, line, 1, 1 - line))
    figure.text(0.995, 0.1 * line, text, ha="right", va="bottom", fontsize=6, color="#777777")


def save_figure(figure, name, table, folder, alt=None, **provenance):
    """Write ``name``.png and .csv into ``folder``, the picture in words and the provenance into its manifest.json.

    Parameters
    ----------
    figure : matplotlib Figure
    table : DataFrame
        The numbers drawn.
    alt : str, optional
        The alternative text; by default what ``alttext.describe`` reads in the figure. A notebook that shows the figure
        afterwards has it in the output's metadata, where nbconvert and the book find it.
    provenance : JSON values
        notebook, profile, seed, commit, device, versions.
    """
    file_name(name, "a figure's name")
    instance(figure, Figure, "figure")
    if not isinstance(table, pd.DataFrame) or table.empty:
        raise ValueError(f"figure {name} needs the numbers it draws as a non-empty DataFrame")
    if odd := wrong_colours(figure):
        warnings.warn(f"figure {name}: {', '.join(odd)} not in the colour that kafnb.figures.style gives", stacklevel=2)
    folder = Path(folder)
    alt = alt or describe(figure)
    figure._repr_mimebundle_ = lambda include=None, exclude=None: ({}, {"image/png": {"alt": alt}})  # asked by IPython
    # no version in the picture's metadata: the same numbers give the same file
    write_atomically(folder / f"{name}.png", lambda p: figure.savefig(p, format="png", metadata={"Software": None}))
    write_atomically(folder / f"{name}.csv", lambda p: table.to_csv(p, index=False, lineterminator="\n"))
    update_manifest(folder, "figures", name, {"alt": alt} | provenance)


def update_manifest(folder, section, name, entry):
    """Put one entry into ``folder``/manifest.json; several notebooks may do so at once."""
    path = Path(folder) / "manifest.json"
    with FileLock(path.parent / ".manifest.lock"):
        manifest = read_manifest(folder)
        manifest.setdefault(section, {})[name] = entry
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda p: p.write_text(text))


def read_manifest(folder):
    """The manifest of a figures folder; empty if there is none yet."""
    path = Path(folder) / "manifest.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: move it away, or restore it with git") from None


def measured(name, profile):
    """Last measured running times of a notebook in words, from the manifest of its figures."""
    entry = read_manifest(home() / "figures" / profile).get("notebooks", {}).get(name, {})
    kinds = {"seconds_from_nothing": "in a first run", "seconds": "with trained models in the store"}
    times = [f"{entry[kind]} s {words}" for kind, words in kinds.items() if kind in entry]
    return (
        f"{', '.join(times)} ({entry['jobs']} notebooks at a time, {entry['cores']} cores)"
        if times
        else "not yet measured"
    )
