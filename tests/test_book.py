"""The site's source and its pictures' words; what a browser sees of it is in test_browser.py."""

import importlib.util
import re

import matplotlib.figure
import pytest

from kafnb import figures, poster
from kafnb.notebooks import available
from kafnb.paths import home

QUICK = home() / "figures" / "quick"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("book_build", home() / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_has_words_numbers_and_a_picture():
    manifest = figures.read_manifest(QUICK)["figures"]
    pictures = {p.stem for p in QUICK.glob("*.png")}
    assert not [name for name in pictures if not (QUICK / f"{name}.csv").exists()]
    assert not [name for name in sorted(pictures) if len(manifest.get(name, {}).get("alt", "")) < 12]


def test_every_notebook_is_in_a_chapter_and_every_reference_linked(build):
    manifest, known, trees = figures.read_manifest(QUICK)["figures"], build.bibliography(), build.toctrees()
    for name in available():
        assert f"\n{name}\n" in trees
        text = "\n".join(
            c["source"] for c in build.notebook(name, manifest, known)["cells"] if c["cell_type"] == "markdown"
        )
        lines = re.findall(r"(?m)^- .+$", text.split("## References")[1])
        assert lines and all("{cite}`" in line for line in lines), name


def test_figures_get_words_and_equations_get_numbers(build):
    name = "06_kernel_activation_functions"
    cells = build.notebook(name, figures.read_manifest(QUICK)["figures"], {})["cells"]
    shown = [
        c for c in cells if c["cell_type"] == "code" and any("image/png" in o.get("data", {}) for o in c["outputs"])
    ]
    assert len(shown) >= 9 and all(len(c["metadata"]["mystnb"]["image"]["alt"]) > 12 for c in shown)
    text = "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
    labels = re.findall(r"\$\$ \((eq-06-\d+)\)", text)
    assert len(labels) >= 3 and len(labels) == len(set(labels)) == len(re.findall(r"(?m)^\$\$", text))


def test_photographs_have_the_tables_of_the_readme_and_every_picture(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    page, readme = build.photographs(), (home() / "README.md").read_text()
    for profile in ("paper", "small"):
        pictures = {p.name for p in QUICK.with_name(profile).glob("*.png")}
        assert pictures and {p.name for p in (tmp_path / "figures" / profile).glob("*.png")} == pictures
        assert not [name for name in pictures if f"figures/{profile}/{name}" not in page]
        table = readme.split(f"### Profile `{profile}`\n")[1].split("\n### ")[0].strip()
        assert table.count("|") > 50 and table in page


def test_the_poster_draws_what_is_stored(tmp_path, monkeypatch):
    import pandas as pd

    figure, table = poster.poster(QUICK)
    stored = pd.read_csv(QUICK / f"{poster.SOURCES['training']}.csv")
    last = stored[stored.run == "KAF_ELU"].accuracy.iloc[-1]
    titles = [ax.get_title("left") for ax in figure.axes]
    assert any(f"{100 * last:.0f} % when they start as ELU" in t for t in titles), titles
    assert set(table.panel) == set(poster.SOURCES)
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    assert not poster.save_poster()  # nothing stored, nothing drawn


def test_the_poster_s_intervals_are_over_seeds_too():
    import pandas as pd

    table = pd.read_csv(QUICK.with_name("small") / "14_resnet20_evaluation_scatter.csv")
    rows = table[table.metric == "PGD-50-2 (true labels)"].drop_duplicates("activation")
    assert (table.seed.nunique(), len(rows)) == (3, 2)
    ax = matplotlib.figure.Figure().subplots()
    poster._resnet20(ax, table)
    half = 50 * (rows.mean_high - rows.mean_low).mean()
    assert f"± {half:.1f} points" in ax.get_title("left") and half > 50 * (rows.high - rows.low).mean()


def test_requirements_are_pinned_and_apart():
    lines = [x for x in (home() / "requirements-book.txt").read_text().splitlines() if x[:1].isalpha()]
    assert lines and all("==" in line for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert not names & set(re.findall(r"(?m)^[\w-]+", (home() / "requirements.txt").read_text()))
