"""Torture tests: a short form in ``make test``, the long one by ``make torture``, which keeps a table of what it did."""

import datetime
import os
import platform
from pathlib import Path

import pandas as pd
import pytest
from effort import LONG

from kafnb import paths, provenance

_rows = {}


@pytest.fixture
def tries():
    """``tries(short, long)``: how often to try."""
    return lambda short, long: long if LONG else short


@pytest.fixture
def note(request):
    """``note(fault, tries, losses)``: a row of the table; call it before the assertion that there were none."""

    def keep(fault, tries, losses):
        before = _rows.get(fault, {"tries": 0, "losses": 0})
        name = request.node.originalname
        _rows[fault] = {
            "fault": fault, "tries": before["tries"] + tries, "losses": before["losses"] + int(losses),
            "command": f'make torture ARGS="-k {name}"',
        }  # fmt: skip

    return keep


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    return tmp_path


def pytest_sessionfinish(session):
    """The long form writes figures/benchmark/torture.csv; of a part of the tests, only its rows are new."""
    if not LONG or not _rows:
        return
    path = paths.home() / "figures" / "benchmark" / "torture.csv"
    where = {
        "date": datetime.date.today().isoformat(),
        "commit": provenance.provenance()["commit"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    rows = {r["fault"]: r for r in pd.read_csv(path).to_dict("records")} if path.exists() else {}
    rows |= {fault: row | where for fault, row in _rows.items()}
    table = pd.DataFrame([rows[fault] for fault in sorted(rows)])
    paths.write_atomically(path, lambda p: table.to_csv(p, index=False, lineterminator="\n"))
    readme = Path(__file__).with_name("README.md")
    begin, end = "<!-- table: written by make torture -->\n", "<!-- end of table -->"
    head, tail = readme.read_text().split(begin)[0], readme.read_text().split(end)[1]
    paths.write_atomically(readme, lambda p: p.write_text(head + begin + as_markdown(table) + end + tail))


def as_markdown(table):
    """The rows of the table for readers."""
    rows = [f"| {r.fault} | {r.tries:,} | {r.losses} | `{r.command}` |" for r in table.itertuples()]
    return "\n".join(["| fault | tries | losses | repeat with |", "|---|---|---|---|", *rows]) + "\n"
