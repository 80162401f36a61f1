"""The dry run: real networks and cells on few images, in folders of its own."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from kafnb import Recipe, dryrun, profiles
from kafnb.data import load_data
from kafnb.paths import home


def test_lengths_are_cut_inside_and_only_inside(monkeypatch):
    paper, recipe = profiles.PROFILES["paper"], Recipe("free", epochs=0, batch_size=128, replays=8, eps=0.3)
    assert dryrun.shorten(paper) is paper and dryrun.shorten(recipe) is recipe
    monkeypatch.setenv("KAFNB_DRY_RUN", "1")
    cut = dryrun.shorten(paper)
    assert set(cut.epochs.values()) == {1} and set(cut.epochs) == set(paper.epochs) and cut.images == 8
    assert (cut.precision, cut.eps, cut.lr) == (paper.precision, paper.eps, paper.lr)
    cut = dryrun.shorten(recipe)
    assert (cut.epochs, cut.batch_size, cut.replays, cut.eps) == (0, 20, 2, 0.3)  # what is shorter stays
    evaluation = dryrun.shorten(paper.evaluation())
    assert (evaluation.n, evaluation.steps, evaluation.restarts, evaluation.eps) == (8, 2, 1, paper.eps)


def test_images_are_a_tree_that_the_loader_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFNB_HOME", str(tmp_path))
    monkeypatch.setenv("KAFNB_DRY_RUN", "0")  # so that it is put back after
    tree = dryrun.prepare()
    assert home() == tmp_path / "runs" / "dry" and dryrun.active()
    data = load_data(f"folder:{tree}")
    assert data.x_train.shape == data.x_test.shape == (40, 3, 32, 32) and data.num_classes == 10
    assert (data.y_train.bincount() == 4).all() and not (data.x_train == data.x_test).all()


@pytest.mark.slow
def test_the_paper_profile_runs_dry_from_the_command_line(tmp_path):
    """Notebook 14 at the thesis' settings: eight ResNet20, two seeds or more, bfloat16, random crops, two label protocols."""
    (tmp_path / "notebooks").symlink_to(home() / "notebooks")
    command = [
        sys.executable,
        "-m",
        "kafnb",
        "figures",
        "--profile",
        "paper",
        "--dry-run",
        "--only",
        "14",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, env=os.environ | {"KAFNB_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 notebooks done" in done.stdout, done.stderr[-2000:]
    assert not (tmp_path / "results").exists() and not (tmp_path / "figures").exists()
    dry = tmp_path / "runs" / "dry"
    scatter = pd.read_csv(dry / "figures" / "paper" / "14_resnet20_evaluation_scatter.csv")
    seeds = scatter.groupby("activation").seed.nunique()
    assert len(seeds) == 8 and seeds[["relu", "swish", "kaf"]].eq(4).all() and seeds.sum() == 22
    assert scatter.n.max() <= 40
    experiment = json.loads(next(dry.glob("results/resnet20-kaf-*/experiment.json")).read_text())["experiment"]
    assert experiment["recipe"]["precision"] == "bfloat16" and experiment["recipe"]["augment"] == "crop_flip"

    # what is in the store is drawn, and the rest neither trained nor attacked
    for folder in (*dry.glob("results/resnet20-kaf_free-*"), *dry.glob("results/resnet20-swish-fgsm_rs-s1-*")):
        shutil.rmtree(folder)
    before = {p.name: {f.name for f in p.iterdir()} for p in dry.glob("results/resnet20-*")}
    (dry / "figures" / "paper" / "14_resnet20_evaluation_scatter.csv").unlink()
    command = [*(c for c in command if c != "--dry-run"), "--stored", "--data-root", str(dry / "images")]
    there = {"KAFNB_HOME": str(dry), "KAFNB_DRY_RUN": "1"}
    done = subprocess.run(command, env=os.environ | there, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 notebooks done" in done.stdout, done.stderr[-2000:]
    assert {p.name: {f.name for f in p.iterdir()} for p in dry.glob("results/resnet20-*")} == before
    scatter = pd.read_csv(dry / "figures" / "paper" / "14_resnet20_evaluation_scatter.csv")
    networks = scatter.drop_duplicates(["activation", "seed"])
    assert len(networks) == 19 and not networks.activation.isin(["kaf_free"]).any()
    manifest = json.loads((dry / "figures" / "paper" / "manifest.json").read_text())
    lines = manifest["figures"]["14_resnet20_evaluation_scatter"]["computed_on"]
    attacks, trained = [s for s in lines if "labels): cpu, " in s], [s for s in lines if ", commit " in s]
    assert len(trained) == 1 and len(attacks) >= 2 and len(attacks) + 1 == len(lines), lines
