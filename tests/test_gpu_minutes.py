"""The script for some minutes of a GPU, dry: what it wants is what the notebooks ask, and a stop loses nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_minutes
import pytest

from kafnb import dryrun, thesis
from kafnb.paths import home


def test_what_is_wanted_first(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    (tmp_path / "notebooks").symlink_to(Path(__file__).parents[1] / "notebooks")
    monkeypatch.setenv("KAFNB_DRY_RUN", "0")  # so that it is put back after
    jobs = gpu_minutes.wanted("paper", dryrun.prepare())
    order = list(jobs)
    resnet, vgg = [[e.activation for e in order if (e.model, e.seed) == (m, 0)] for m in ("resnet20", "vgg")]
    assert resnet[: len(thesis.RESNET20)] == [e.activation for e in order[: len(thesis.RESNET20)]]
    assert set(resnet[: len(thesis.RESNET20)]) == set(thesis.RESNET20) and set(vgg) == set(thesis.VGG)
    assert [e.seed for e in order] == sorted(e.seed for e in order) and {e.seed for e in order} == {0, 1}
    assert [e.model for e in order[8:16]] == ["vgg"] * 7 + ["light_cnn"]
    assert {e.attack for e in jobs[order[0]]} >= {"fgsm", "pgd", "autoattack"}
    assert {e.labels for e in jobs[order[0]] if e.attack == "pgd"} == {"true", "predicted"}
    assert not (home() / "results").exists() and not (home() / "figures" / "paper").exists()


@pytest.mark.slow
def test_it_stops_in_time_and_goes_on(tmp_path):
    (tmp_path / "notebooks").symlink_to(home() / "notebooks")
    script = Path(gpu_minutes.__file__)
    command = [sys.executable, str(script), "--minutes", "0.3", "--tests", "0", "--out", str(tmp_path / "out")]
    command += ["--workers", "1", "--dry-run"]
    done = subprocess.run(command, env=os.environ | {"KAFNB_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    networks = re.findall(r"^(\S+): clean.*\d$", done.stdout, re.MULTILINE)  # those with all attacks
    assert networks and "time is up" in done.stdout and networks[0].startswith("resnet20-relu-fgsm_rs-s0-")
    parts = sorted((tmp_path / "out").glob("minutes.tar.gz.*"))
    (tmp_path / "unpacked").mkdir()
    subprocess.run(
        ["tar", "xz", "-C", tmp_path / "unpacked"], input=b"".join(p.read_bytes() for p in parts), check=True
    )
    assert {p.name for p in tmp_path.glob("unpacked/results/*")} >= set(networks)
    # a store that has them is gone on with
    code = (
        "import sys, gpu_minutes; jobs = gpu_minutes.wanted('paper', sys.argv[1])\n"
        "there = [gpu_minutes.measured(e, v, gpu_minutes.paths.home() / 'results', None) for e, v in jobs.items()]\n"
        "print(sum(there), there[0])"
    )
    dry = tmp_path / "runs" / "dry"
    there = {"KAFNB_HOME": str(dry), "KAFNB_DRY_RUN": "1", "PYTHONPATH": str(script.parent)}
    again = subprocess.run(
        [sys.executable, "-c", code, str(dry / "images")], env=os.environ | there, capture_output=True, text=True
    )
    assert again.stdout.split()[1] == "True" and int(again.stdout.split()[0]) >= len(networks), again.stderr[-2000:]
