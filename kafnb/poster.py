"""The whole story in one picture, drawn from the numbers that the notebooks stored; no number is typed here."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import figures
from .paths import home
from .provenance import provenance

SOURCES = {
    "kafs": "00_start_here_kafs", "attack": "00_start_here_attack", "kwta": "07_k_winners_take_all_attacks",
    "depth": "13_exploding_gradients_depth", "training": "13_exploding_gradients_training",
    "resnet20": "14_resnet20_evaluation_scatter",
}  # fmt: skip


def _kafs(ax, table):
    for name in table.columns[1:]:
        target = name.startswith("target of ")
        look = {"color": "#999999", "linewidth": 0.8, "zorder": 1} if target else figures.line(name)
        ax.plot(table.x, table[name], **look)
    ax.set(title="KAFs before training,\nand their targets (grey)", xlabel="x", ylabel="f(x)")
    ax.legend(fontsize=8)


def _attack(ax, table):
    side = round(len(table) ** 0.5)
    if side * side != len(table):  # colour
        side = round((len(table) / 3) ** 0.5)
    pair = table.image, table.image + table.change
    shown = [v.to_numpy().reshape(-1, side, side).transpose(1, 2, 0).squeeze() for v in pair]  # (C, H, W) -> (H, W, C)
    gap = np.zeros_like(shown[0][:, :1])
    ax.imshow(np.concatenate([shown[0], gap, shown[1]], 1).clip(0, 1), vmin=0, vmax=1)
    ax.axis("off")
    ax.set_title(f"No pixel changes by more than {table.change.abs().max():.2g}:\nfor the network another digit")


def _kwta(ax, table):
    rate = 100 * table.pivot(index="attack", columns="network", values="rate").loc[table.attack.unique()]
    networks = {"ReLU": "relu", "k-WTA, ratio falling": "kwta"}
    for i, (network, activation) in enumerate(networks.items()):
        look = {"color": figures.style(activation)["color"], "label": figures.LABELS[activation]}
        ax.barh(np.arange(len(rate)) + 0.4 * i - 0.2, rate[network], 0.4, **look)
    ax.set_yticks(range(len(rate)), rate.index, fontsize=8)
    seen, left = rate.loc["PGD", "k-WTA, ratio falling"], rate.loc["all together", "k-WTA, ratio falling"]
    ax.set(xlabel="accuracy, %", ylim=(len(rate) - 0.4, -1.6))  # room for the legend
    ax.set_title(f"k-WTA hides: {seen:.0f} % stand PGD,\n{left:.0f} % stand {len(rate) - 2} attacks together")
    ax.legend(fontsize=8, ncols=2, loc="upper center")


def _depth(ax, table):
    for name, group in table.groupby("activation", sort=False):
        ax.scatter(group.depth, group.total, s=20, **figures.style(name))
        curve = group.drop_duplicates("depth").sort_values("depth")
        ax.plot(curve.depth, curve.total_predicted, color=figures.style(name)["color"], linewidth=1)
    ax.set(yscale="log", xlabel="depth", ylabel="growth of the gradient")
    ax.set_title("Random KAFs explode, as predicted\n(lines: theory, no trained weights)")
    ax.legend(fontsize=8)


def _training(ax, table):
    names = {"ReLU": "relu", "KAF": "kaf", "KAF_ELU": "kaf_elu"}
    for run, group in table.groupby("run", sort=False):
        if run in names:
            ax.plot(group.epoch, 100 * group.accuracy, **figures.line(names[run]))
    last = 100 * table.groupby("run").accuracy.last()
    ax.set(xlabel="epoch", ylabel="training accuracy, %", ylim=(0, 103))
    ax.set_title(f"56 layers: {last['KAF']:.0f} % with random KAFs,\n{last['KAF_ELU']:.0f} % when they start as ELU")
    ax.legend(fontsize=8)


def _resnet20(ax, table):
    attack = next(m for m in table.metric.unique() if "true" in m)
    rate = 100 * table.pivot_table(index="activation", columns="metric", values="rate")
    ends = [f"mean_{end}" if f"mean_{end}" in table else end for end in ("low", "high")]  # with seeds, where several
    low, high = (table[table.metric == attack].groupby("activation")[end].first() for end in ends)
    half = 50 * (high - low)
    for name in table.activation.unique():
        ax.scatter(rate.loc[name, "clean"], rate.loc[name, attack], s=45, **figures.style(name))
    ax.set(xlabel="clean accuracy, %", ylabel=f"{attack}, %")
    ax.set_title(f"ResNet20, trained by FGSM-RS: 95 % intervals\nunder attack, ± {half.mean():.1f} points on average")
    ax.legend(fontsize=7, ncols=2)


def poster(folder):
    """Draw it from the CSVs in ``folder`` (figures/<profile>).

    Returns
    -------
    (Figure, DataFrame)
        The second: all numbers drawn, one row a value of a source's row.

    Raises
    ------
    FileNotFoundError
        A source is not there: its notebook has not run in this profile.
    """
    tables = {panel: pd.read_csv(Path(folder) / f"{name}.csv") for panel, name in SOURCES.items()}
    figures.use_style()
    figure = Figure(figsize=(13, 7))
    axes = figure.subplots(2, 3)
    draw = dict(kafs=_kafs, attack=_attack, kwta=_kwta, depth=_depth, training=_training, resnet20=_resnet20)
    for ax, (panel, table) in zip(axes.flat, tables.items(), strict=True):
        draw[panel](ax, table)
    manifest = figures.read_manifest(folder).get("figures", {})
    data = sorted({manifest[name]["data"] for name in SOURCES.values() if name in manifest})
    figure.suptitle(f"Kernel activation functions and robustness: the story in six figures ({', '.join(data)})")
    rows = [t.astype(str).rename_axis("row").reset_index().melt("row").assign(panel=p) for p, t in tables.items()]
    return figure, pd.concat(rows)[["panel", "row", "variable", "value"]]


def save_poster(profile="quick"):
    """Write figures/<profile>/poster.png and .csv, where every source is there; say whether it was."""
    folder = home() / "figures" / profile
    if any(not (folder / f"{name}.csv").exists() for name in SOURCES.values()):
        return False
    try:
        figure, table = poster(folder)
    except (KeyError, StopIteration):  # drawn from a part of a store: a panel's networks are not in its table
        return False
    figures.save_figure(figure, "poster", table, folder, profile=profile, sources=SOURCES, **provenance())
    return True
