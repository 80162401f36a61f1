"""The README's results, written from the tables of figures/<profile>/: nothing in them is typed."""

import pandas as pd

from . import thesis
from .figures import LABELS, read_manifest
from .paths import home, write_atomically
from .profiles import PROFILES

BEGIN, END = "<!-- results: written from figures/ by python -m kafnb figures --keep -->\n", "<!-- end of results -->"
# network, its name in a profile's epochs, the stored table, what the thesis has of it, last two columns
TABLES = [
    ("light CNN, standard training (09)", "light_cnn", "09_activation_distributions_scores", thesis.LIGHT_CNN),
    ("VGG-inspired, FGSM-RS (12)", "vgg", "12_vgg_evaluation_scatter", thesis.VGG),
    ("ResNet20, FGSM-RS (14)", "resnet", "14_resnet20_evaluation_scatter", thesis.RESNET20),
]


def _markdown(table):
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def scores(table, said):
    """Per cent and 95 % intervals, a row an activation: clean, attacked with true and predicted labels; thesis."""
    if "mean" not in table:  # tables of one seed may be without
        table = table.assign(mean=table.rate, mean_low=table.low, mean_high=table.high)
    pgd, auto = (table.metric.str.startswith(attack) for attack in ("PGD", "AutoAttack"))
    columns = {"clean": table.metric == "clean"}
    columns |= {f"attacked, {labels} labels": pgd & (table.labels == labels) for labels in ("true", "predicted")}
    if auto.any():
        columns[f"AutoAttack, n = {table[auto].n.iloc[0]}"] = auto
    rows = []
    for activation in table.activation.unique():
        row = {"": LABELS.get(activation, activation)} | dict.fromkeys(columns, "")  # only a part may be in the store
        for column, wanted in columns.items():
            for r in table[wanted & (table.activation == activation)].head(1).itertuples():
                row[column] = f"{100 * r.mean:.1f} [{100 * r.mean_low:.1f}, {100 * r.mean_high:.1f}]"
        clean, robust = said.get(activation, ("", ""))[-2:]
        rows.append(row | {"thesis, CIFAR-10: clean": clean, "attacked": robust})
    return pd.DataFrame(rows)


def _radius(eps):
    """In 255ths where it is a whole number of them."""
    return f"eps {255 * eps:.0f}/255" if abs(255 * eps - round(255 * eps)) < 1e-6 else f"eps {eps:g}"


def poor(table, compared):
    """A line on the networks that hardly trained, empty without; ``compared`` says whether 18 has their comparisons."""
    clean = table[table.labels == "none"].groupby("activation", sort=False).rate.mean()
    if not (names := ", ".join(LABELS.get(a, a) for a in clean.index[clean < 0.5])):
        return ""
    how = "counts comparisons with them as *not testable*" if compared else "does not compare them in this profile"
    return (
        f"\nFewer than half of the clean images right: {names}. Little can be said of the robustness of such networks; "
        f"18 {how}.\n"
    )


def race(table):
    """Of notebook 14's race: accuracies, parameters, and points over ReLU on the same images with their interval."""
    attacked = next(c for c in table.columns if c.startswith("PGD"))
    points = [
        "" if pd.isna(r.low) else f"{r.points:+.1f} [{r.low:+.1f}, {r.high:+.1f}]"
        for r in table.rename(columns={"points over ReLU": "points"}).itertuples()
    ]
    shown = table[["contender", "clean", attacked, "parameters"]].assign(**{"points over ReLU": points})
    return shown.rename(columns={"contender": ""})


def results(profile):
    """The section for one profile, in markdown; empty where it has no tables."""
    folder, parts = home() / "figures" / profile, []
    drawn = read_manifest(folder).get("figures", {})
    claims = folder / "18_conclusions_claims.csv"
    claims = pd.read_csv(claims) if claims.exists() else pd.DataFrame(columns=["model", "verdict"])
    for title, model, name, said in TABLES:
        table = pd.read_csv(folder / f"{name}.csv") if (folder / f"{name}.csv").exists() else None
        if table is not None and table.metric.str.startswith("PGD").any():  # of a part of the store there may be none
            first = table[table.metric.str.startswith("PGD")].iloc[0]
            attack, n, where = (
                first.metric.split(" (")[0],
                first.n,
                f" at {_radius(first.eps)}" if "eps" in first else "",
            )
            data = drawn.get(name, {}).get("data", table.data.iloc[0]).removeprefix("folder:")
            size = f"{data}, n = {table[table.labels == 'none'].n.iloc[0]}, attacked {n}"
            runs = sorted(set(table.groupby("activation").seed.nunique()))
            seeds = f"{' or '.join(map(str, runs))} seed{'s' * (runs[-1] > 1)}"
            block = "He's block, " * ("block" in table and table.block.iloc[0] == "he")
            epochs = f"{PROFILES[profile].epochs[model]} epochs (thesis {thesis.EPOCHS[model]})"
            head = f"{title}, {epochs}, {block}{attack}{where}, {size}, {seeds}"
            compared = claims.model.str.startswith(model).any()
            parts.append(f"{head}:\n\n{_markdown(scores(table, said))}{poor(table, compared)}")
    if (folder / "14_resnet20_evaluation_race.csv").exists():
        table = pd.read_csv(folder / "14_resnet20_evaluation_race.csv")
        data, first = drawn["14_resnet20_evaluation_race"]["data"].removeprefix("folder:"), table.iloc[0]
        size = f"{_radius(first.eps)}, {data}, n = {first.n}, {first.seeds} seeds"
        head = f"Tuned alike, {first.model}, FGSM-RS (14), rates chosen on held-out training images, {size}"
        parts.append(f"{head}:\n\n{_markdown(race(table))}")
    if len(claims) and profile != "quick":  # digits decide nothing on CIFAR-10
        words = ", ".join(f"{verdict} {n}" for verdict, n in claims.verdict.value_counts().items())
        parts.append(
            f"Of {len(claims)} differences between activations in the thesis that are compared here (18): {words}.\n"
        )
    return f"### Profile `{profile}`\n\n" + "\n".join(parts) if parts else ""


def section():
    """All profiles, the largest first."""
    return "\n".join(filter(None, map(results, ("paper", "small", "quick"))))


def write():
    """Put ``section()`` between the two marks in README.md, if there is such a page."""
    path = home() / "README.md"
    text = path.read_text() if path.exists() else ""
    if BEGIN not in text or END not in text:
        return
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_atomically(path, lambda p: p.write_text(head + BEGIN + section() + END + tail))
