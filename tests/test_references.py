"""Every reference of every notebook against the one bibliography, notebooks/references.bib."""

import contextlib
import re
import unicodedata
import warnings

import nbformat
import pytest

from kafnb import notebooks
from kafnb.paths import home

BIB = home() / "notebooks" / "references.bib"
DOI, EPRINT = r"10\.\d{4,9}/\S+", r"\d{4}\.\d{4,5}"
VENUE = {"article": "journal", "inproceedings": "booktitle", "mastersthesis": "school", "misc": "eprint"}
LINK = re.compile(r"\[(arXiv|doi):([^\]]+)\]\((\S+)\)\s*$")


def entries():
    """key -> its fields, and "type"; one field a line."""
    found = {}
    for kind, key, body in re.findall(r"(?ms)^@(\w+)\{([^,\s]+),\n(.*?)^\}$", BIB.read_text()):
        fields = dict(re.findall(r"(?m)^  (\w+) = \{(.*)\},$", body))
        assert len(fields) == len(body.strip().splitlines()), f"{key}: a line that is no field, or one given twice"
        assert key not in found, f"{key} stands twice"
        found[key] = fields | {"type": kind}
    return found


def plain(text):
    """Lower case, no accents, no remarks in parentheses, words only."""
    text = unicodedata.normalize("NFKD", re.sub(r"\([^)]*\)", " ", text))
    return " ".join(re.findall(r"[a-z0-9]+", "".join(c for c in text.lower() if not unicodedata.combining(c))))


def cited():
    """(notebook, text) of each line of each notebook's list."""
    lines = []
    for path in sorted(BIB.parent.glob("*.ipynb")):
        text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
        section = text.split("## References")[1] if "## References" in text else ""
        lines += [(path.stem, line) for line in re.findall(r"(?m)^- (.+)$", section)]
    return lines


def match(line):
    """The key of the entry that a line of a reference list is, or a ValueError that says what differs."""
    link = LINK.search(line)
    if link:
        kind, name, target = link.groups()
        if target != {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}[kind] + name:
            raise ValueError(f"the link {target} is not that of {kind}:{name}")
        field = {"arXiv": "eprint", "doi": "doi"}[kind]
        keys = [k for k, e in entries().items() if e.get(field) == name]
    else:
        keys = [k for k, e in entries().items() if not {"doi", "eprint"} & set(e) and plain(e["title"]) in plain(line)]
    if not keys:
        raise ValueError(f"not in {BIB.name}")
    entry, text = entries()[keys[0]], plain(line)
    # the title up to its colon is enough; its other half may be left out
    title = plain(entry["title"].split(":")[0])
    author = plain(entry["author"].split(",")[0])
    differs = [w for w in (title, entry["year"], author) if f" {w} " not in f" {text} "]
    if differs:
        raise ValueError(f"{keys[0]} has {', '.join(map(repr, differs))}")
    return keys[0]


def test_entries_are_well_formed():
    found = entries()
    assert len(found) == BIB.read_text().count("\n@")
    for key, entry in found.items():
        assert re.fullmatch(r"[a-z]+\d{4}[a-z]*", key) and entry["year"] in key, key
        assert {"author", "title", "year", VENUE[entry["type"]]} <= set(entry), key
        assert all(v.count("{") == v.count("}") and v.strip() for v in entry.values()), key
        assert all("," in name for name in entry["author"].split(" and ")), f"{key}: names are 'Last, First'"
        assert ("eprint" in entry) == (entry.get("archiveprefix") == "arXiv"), key
        assert re.fullmatch(DOI, entry.get("doi", "10.1234/x")) and re.fullmatch(
            EPRINT, entry.get("eprint", "1234.5678")
        )
        assert {"doi", "eprint"} & set(entry) or entry["type"] == "mastersthesis", f"{key} has neither DOI nor eprint"


@pytest.mark.parametrize("field", ["doi", "eprint", "title"])
def test_no_work_stands_twice(field):
    values = [e[field].lower() for e in entries().values() if field in e]
    assert len(values) == len(set(values))


def test_every_reference_is_in_the_bibliography():
    wrong = []
    for notebook, line in cited():
        try:
            match(line)
        except ValueError as error:
            wrong.append(f"{notebook}: {line}\n    {error}")
    assert cited() and not wrong, "\n".join(wrong)


def test_every_entry_is_cited():
    """While notebooks are still to come, an entry may wait for its own."""
    keys = set()
    for _, line in cited():
        with contextlib.suppress(ValueError):  # the test above names it
            keys.add(match(line))
    waiting = sorted(set(entries()) - keys)
    if set(notebooks.available()) == set(notebooks.PROGRAMME):
        assert not waiting
    elif waiting:
        warnings.warn(f"not cited yet: {', '.join(waiting)}", stacklevel=1)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("A. Madry et al. Towards deep learning models resistant to adversarial attacks. ICLR 2018. [arXiv:1706.06083](https://arxiv.org/abs/1706.06084)", "link"),
        ("A. Madry et al. Towards deep learning models resistant to adversarial attacks. ICLR 2018. [arXiv:1706.06084](https://arxiv.org/abs/1706.06084)", "not in"),
        ("A. Madry et al. Towards deep learning models resistant to adversarial attacks. ICLR 2017. [arXiv:1706.06083](https://arxiv.org/abs/1706.06083)", "2018"),
        ("A. Madry et al. Deep learning models. ICLR 2018. [arXiv:1706.06083](https://arxiv.org/abs/1706.06083)", "towards"),
        ("B. Other. Towards deep learning models resistant to adversarial attacks. ICLR 2018. [arXiv:1706.06083](https://arxiv.org/abs/1706.06083)", "madry"),
        ("A. Nobody. An unknown work. 2018.", "not in"),
    ],
)  # fmt: skip
def test_a_wrong_reference_is_found(line, complaint):
    with pytest.raises(ValueError, match=complaint):
        match(line)
