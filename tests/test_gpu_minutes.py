"""The script for some minutes of a GPU, dry: what it wants is what the notebooks ask, and a stop loses nothing."""

import os
import re
import signal
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
    assert [e.seed for e in order] == sorted(e.seed for e in order) and {e.seed for e in order} == {0, 1, 2, 3}
    assert [e.model for e in order[8:16]] == ["vgg"] * 7 + ["light_cnn"]
    assert {e.attack for e in jobs[order[0]]} >= {"fgsm", "pgd", "autoattack"}
    assert {e.labels for e in jobs[order[0]] if e.attack == "pgd"} == {"true", "predicted"}
    assert not (home() / "results").exists() and not (home() / "figures" / "paper").exists()


def test_a_folder_that_is_not_there_is_said_at_once(tmp_path):
    script = [sys.executable, gpu_minutes.__file__, "--minutes", "1", "--out", str(tmp_path / "out")]
    said = subprocess.run([*script, "--data-root", str(tmp_path / "no")], capture_output=True, text=True, timeout=300)
    assert said.returncode == 2 and said.stderr.splitlines()[-1].endswith(f"--data-root: no folder {tmp_path / 'no'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_stop_loses_nothing(tmp_path):
    """Stopped when two networks are done: they are in the archive, and the next run finds them."""
    (tmp_path / "notebooks").symlink_to(home() / "notebooks")
    script = Path(gpu_minutes.__file__)
    command = [sys.executable, str(script), "--minutes", "10", "--tests", "0", "--out", str(tmp_path / "out")]
    networks, there = [], os.environ | {"KAFNB_HOME": str(tmp_path)}
    with subprocess.Popen(
        [*command, "--workers", "1", "--dry-run"], env=there, stdout=subprocess.PIPE, text=True
    ) as running:
        for line in running.stdout:
            networks += re.findall(r"^(\S+): clean .*AutoAttack", line)
            if len(networks) == 2:
                running.send_signal(signal.SIGTERM)
                break
        rest = running.stdout.read()
    assert networks[0].startswith("resnet20-relu-fgsm_rs-s0-") and running.returncode == 0
    assert "time is up" in rest and "experiments, " in rest
    parts = sorted((tmp_path / "out").glob("minutes.tar.gz.*"))
    (tmp_path / "unpacked").mkdir()
    subprocess.run(
        ["tar", "xz", "-C", tmp_path / "unpacked"], input=b"".join(p.read_bytes() for p in parts), check=True
    )
    assert {p.name for p in tmp_path.glob("unpacked/results/*")} >= set(networks)
    code = "import sys, gpu_minutes; gpu_minutes.paper(0, sys.argv[1], 'cpu', 1)"  # its time is up at once
    dry = tmp_path / "runs" / "dry"
    there = {"KAFNB_HOME": str(dry), "KAFNB_DRY_RUN": "1", "PYTHONPATH": str(script.parent)}
    again = [sys.executable, "-c", code, str(dry / "images")]
    said = subprocess.run(again, env=os.environ | there, capture_output=True, text=True, check=True).stdout
    wanted, found = map(int, re.match(r"(\d+) networks are wanted, (\d+) are there\n", said).groups())
    assert 2 <= found < wanted and "time is up" in said
