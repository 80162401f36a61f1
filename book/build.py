"""The notebooks as one site: ``python book/build.py`` writes build/book/index.html.

Copies notebooks, with their stored outputs, and figures into build/book-source, gives each picture its words, its
caption and a number, each displayed equation a number, each reference its entry in the bibliography; generates the
gallery and the list of modules; and calls Sphinx, for which every warning is an error.
"""

import json
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kafnb  # noqa: E402
from kafnb import summary  # noqa: E402
from kafnb.figures import read_manifest  # noqa: E402
from kafnb.notebooks import PROGRAMME, available  # noqa: E402

SOURCE, SITE = ROOT / "build" / "book-source", ROOT / "build" / "book"
FIGURES = ROOT / "figures" / "quick"
CHAPTERS = {
    "": "Start", "2": "Chapter 2: background", "3": "Chapter 3: robust activations", "4": "Chapter 4: inside networks",
    "5": "Chapter 5: evaluation", "6": "Chapter 6: open questions", "a": "All chapters", "7": "Chapter 7: conclusions",
}  # fmt: skip


def bibliography():
    """What a line of a reference list is recognised by (DOI, arXiv number or title) -> key."""
    known = {}
    for key, body in re.findall(r"(?ms)^@\w+\{([^,\s]+),\n(.*?)^\}$", (ROOT / "notebooks/references.bib").read_text()):
        fields = dict(re.findall(r"(?m)^  (\w+) = \{(.*)\},$", body))
        for mark in (fields.get("doi"), fields.get("eprint"), fields["title"].replace("{", "").replace("}", "")):
            known |= {mark: key} if mark else {}
    return known


def cite(text, known):
    """Append to each line under References a link to its entry."""
    if "## References" not in text:
        return text
    before, after = text.split("## References")

    def linked(match):
        keys = [key for mark, key in known.items() if mark.lower() in match[0].lower()]
        return f"{match[0]} {{cite}}`{keys[0]}`" if keys else match[0]

    return before + "## References" + re.sub(r"(?m)^- .+$", linked, after)


def number_equations(text, name, count):
    """``$$...$$`` on lines of its own gets a label, and with it a number."""

    def label(match):
        count[0] += 1
        return f"{match[0]} (eq-{name[:2]}-{count[0]})"

    return re.sub(r"(?ms)^\$\$.+?\$\$(?=[ \t]*$)", label, text)


def words(name, manifest, folder=FIGURES):
    """Alternative text and caption of a figure: what ``save_figure`` noted, or the names of its numbers."""
    alt = manifest[name].get("alt")
    if not alt:  # drawn before figures had words: its notebook has to run once more (make keep)
        columns = (folder / f"{name}.csv").read_text().split("\n", 1)[0].replace(",", ", ")[:300]
        alt = f"{name.replace('_', ' ')}, drawn from {columns}."
        print(f"book: figure {name} has no words of its own", file=sys.stderr)
    title = re.sub(r"^\d+ panels\. ", "", alt.removesuffix("."))
    return alt, re.sub(r"([*_$`])", r"\\\1", re.split(r"(?<=[^\d])\.\s", title)[0])


def _text(output):
    return {"output_type": "stream", "name": "stdout", "text": output["data"]["text/plain"]}


def notebook(name, manifest, known):
    """The notebook's JSON for Sphinx."""
    content, count = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text()), [0]
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = cite(number_equations(source, name, count), known)
            continue
        saved = re.findall(r"nb\.save\(\w+, \"(\w+)\"", source)
        pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        if len(pictures) > 1 or bool(pictures) != bool(saved):
            raise SystemExit(f"book: {name}, cell {cell['id']}: {len(pictures)} pictures, {len(saved)} saved figures")
        if pictures:  # the figure's number and caption are for the picture, not for what stands above the sliders
            cell["outputs"] = [o if "text" in o or o in pictures else _text(o) for o in cell["outputs"]]
            figure = f"{name}_{saved[0]}"
            alt, caption = words(figure, manifest)
            caption += f" ({{download}}`numbers <figures/{figure}.csv>`)"
            cell["metadata"]["mystnb"] = {
                "image": {"alt": alt},
                "figure": {"name": f"fig-{figure}", "caption": caption},
            }
    return content


def gallery(manifest):
    """Every figure, small, with its words and a link to where it is made."""
    lines = [
        "# Gallery",
        "",
        f"{len(manifest)} figures, each with the notebook that draws it and the numbers drawn.",
        "",
    ]
    for name, (_, title) in PROGRAMME.items():
        drawn = sorted(f for f in manifest if f.startswith(name + "_"))
        lines += [f"## {name[:2]} · {title}", ""] if drawn else []
        for figure in drawn:
            alt, _ = words(figure, manifest)
            lines += [
                f":::{{image}} figures/{figure}.png",
                f":alt: {alt}",
                ":class: thumbnail",
                ":loading: lazy",
                ":::",
                "",
            ]
            short = figure.removeprefix(name + "_").replace("_", " ")
            lines += [f"[{short}](#fig-{figure}) ({{download}}`numbers <figures/{figure}.csv>`)", ""]
    return "\n".join(lines)


def photographs():
    """What profiles of larger size have left in figures/: the README's tables, and each picture with its words."""
    lines = [
        "# On photographs",
        "",
        "The notebooks' pages show runs on digits. Here is what the larger profiles drew so far,",
    ]
    lines += ["their notebooks run headless; an interval is of images and, where there are several, of seeds.", ""]
    for profile in ("paper", "small"):
        folder = FIGURES.with_name(profile)
        manifest = {f: m for f, m in read_manifest(folder)["figures"].items() if (folder / f"{f}.png").exists()}
        shutil.copytree(folder, SOURCE / "figures" / profile, ignore=shutil.ignore_patterns("*.lock"))
        lines += [summary.results(profile).removeprefix("#"), ""]
        for figure, made in sorted(manifest.items()):
            alt, caption = words(figure, manifest, folder)
            here = f"{made['device']}, torch {made['torch']}, commit {made['commit']}"
            said = [f"{{doc}}`{made['notebook'][:2]} <{made['notebook']}>`, profile {profile}"]
            said += [f"{{download}}`numbers <figures/{profile}/{figure}.csv>`", *made.get("computed_on", [here])]
            lines += [f":::{{figure}} figures/{profile}/{figure}.png", f":alt: {alt}", f":name: fig-{profile}-{figure}"]
            lines += ["", f"{caption} ({'; '.join(said)})", ":::", ""]
    return "\n".join(lines)


def toctrees():
    """The notebooks by chapter of the thesis."""
    parts = []
    for mark, caption in CHAPTERS.items():
        names = [n for n in available() if PROGRAMME[n][0][:1] == mark]
        parts += [f'```{{toctree}}\n:caption: "{caption}"\n\n' + "\n".join(names) + "\n```\n"] if names else []
    return "\n".join(parts)


def reference():
    """A page for every module, and a table of them."""
    found = [m.name for m in pkgutil.walk_packages(kafnb.__path__, "kafnb.") if not m.name.endswith("__main__")]
    names = ["kafnb", *found]
    (SOURCE / "modules").mkdir()
    for name in names:
        options = "   :members:\n   :ignore-module-all:\n   :show-inheritance:\n"
        page = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n{options}"
        (SOURCE / "modules" / f"{name}.rst").write_text(page)
    title = "Reference\n=========\n\nEvery module, from its docstrings; :mod:`kafnb` has the order of the story.\n\n"
    table = ".. autosummary::\n\n" + "".join(f"   {name}\n" for name in names)
    tree = "\n.. toctree::\n   :hidden:\n\n" + "".join(f"   modules/{name}\n" for name in names)
    (SOURCE / "reference.rst").write_text(title + table + tree)


def prepare():
    """Write the source of the site."""
    manifest, known = read_manifest(FIGURES)["figures"], bibliography()
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(Path(__file__).parent, SOURCE, ignore=shutil.ignore_patterns("__pycache__", "build.py"))
    shutil.copytree(FIGURES, SOURCE / "figures", ignore=shutil.ignore_patterns("*.lock"))
    for name in ("references.bib", "glossary.md"):
        shutil.copy(ROOT / "notebooks" / name, SOURCE)
    for name in available():
        (SOURCE / f"{name}.ipynb").write_text(json.dumps(notebook(name, manifest, known)))
    index = (SOURCE / "index.md").read_text().replace("{toctrees}", toctrees())
    (SOURCE / "index.md").write_text(index.replace("{poster}", words("poster", manifest)[0]))
    (SOURCE / "gallery.md").write_text(gallery({f: m for f, m in manifest.items() if (FIGURES / f"{f}.png").exists()}))
    (SOURCE / "photographs.md").write_text(photographs())
    reference()


def main():
    start = time.perf_counter()
    prepare()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-n", SOURCE, SITE]
    done = subprocess.run(command + sys.argv[1:], cwd=ROOT)
    for page in SITE.rglob("*.html"):  # Sphinx' headings in the sidebar lack the level that screen readers need
        text = page.read_text()
        page.write_text(
            text.replace('class="caption" role="heading">', 'class="caption" role="heading" aria-level="2">')
        )
    print(f"{SITE / 'index.html'}: {time.perf_counter() - start:.0f} s, exit status {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
