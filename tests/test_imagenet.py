"""The ImageNet recipe: its full configuration, its network, and the same code at a small size on two processes."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torchvision.models import resnet50

import kafnb
from kafnb import imagenet
from kafnb.imagenet.__main__ import main as command


def test_full_configuration_is_the_recipe():
    assert {(t.activation, round(255 * t.eps)) for t in imagenet.FULL} == {
        (a, e) for a in ("relu", "swish", "kaf_elu") for e in (2, 4)
    }
    assert len({t.name for t in imagenet.FULL}) == 6
    for t in imagenet.FULL:
        assert [(p.size, p.batch, p.epochs) for p in t.phases] == [(128, 512, 6), (224, 224, 6), (288, 128, 3)]
        assert t.recipe.method == "fgsm_rs" and t.recipe.momentum == 0.9 and t.layers == (3, 4, 6, 3)
        # the rate goes on where the last phase left it
        assert all(a.rates[-1] == b.rates[0] for a, b in zip(t.phases, t.phases[1:], strict=False))
        assert all(len(p.at) == len(p.rates) and p.at[-1] == p.epochs for p in t.phases)


def test_network_is_torchvisions_resnet50():
    ours, theirs = imagenet.resnet("relu").eval(), resnet50().eval()
    theirs.load_state_dict(ours[1].state_dict())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(imagenet.Normalise()(x)), atol=1e-5)
    kafs = [m for m in imagenet.resnet("kaf_elu").modules() if isinstance(m, kafnb.KAF)]
    assert len(kafs) == 1 + 3 * 16 and len({id(m) for m in kafs}) == 49  # each place its own


def test_operations_are_what_is_known_of_resnet50():
    t = imagenet.Training()
    once = imagenet.flops(dataclasses.replace(t, method="standard"), 224) / 3
    assert once == pytest.approx(2 * 4.09e9, rel=0.02)  # 4.09 G multiply-adds forward, torchvision's model table
    # fgsm_rs adds a forward pass and a backward pass to the image
    assert imagenet.flops(t, 224) / once == pytest.approx(5, rel=0.02)
    table = imagenet.cost(t, 1e14)
    assert table.hours.sum() == pytest.approx(1e18 * table.EFLOP.sum() / 1e14 / 3600)
    assert table.images.sum() == 15 * imagenet.IMAGES


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train/<class>"):
        imagenet.images(tmp_path, True, 32)
    wrong = [sys.executable, "-m", "kafnb.imagenet", str(tmp_path)]
    said = subprocess.run(wrong, capture_output=True, text=True, timeout=300)
    assert said.returncode == 2 and re.fullmatch(r"kafnb\.imagenet: no folder .*train/<class>.*\n", said.stderr)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_said_before_the_folders_are_read(device, capsys):
    assert command(["no folder", "--device", device]) == 2
    assert re.fullmatch(rf"kafnb\.imagenet: device .*{device}[^\n]+\n", capsys.readouterr().err)


def test_folders_of_other_classes_are_refused(tmp_path):
    root = imagenet.toy_folder(tmp_path / "toy", train=4, test=2)
    (root / "test").rename(root / "val")
    (root / "test" / "images").mkdir(parents=True)  # ImageNet's test images have no labels
    assert imagenet.images(root, False, 32).root == root / "val"
    shutil.rmtree(root / "val" / "class0")
    training = imagenet.small(imagenet.Training(), 4)
    with pytest.raises(ValueError, match="different classes"):
        imagenet.train(training, root, store=tmp_path / "store")


class Spoiling(torch.nn.Module):
    """The identity, with a gradient that is NaN: the loss is finite, the weights after the step are not."""

    def forward(self, x):
        return x + torch.sqrt(0 * x)


@pytest.mark.parametrize("activation, epoch", [("relu", 2), ("spoiling", 1)])
def test_a_training_that_diverges_keeps_its_last_good_state(tmp_path, monkeypatch, activation, epoch):
    monkeypatch.setitem(kafnb.ACTIVATIONS, "spoiling", lambda channels: Spoiling())
    root = imagenet.toy_folder(tmp_path / "toy", train=8, test=2)
    phases = (imagenet.Phase(32, 32, 1, (0, 1), (0.01, 0.01)), imagenet.Phase(32, 16, 1, (0, 1), (1e30, 1e30)))
    training = imagenet.small(imagenet.Training(activation, method="standard"), 4)
    training = dataclasses.replace(training, phases=phases)
    folder = kafnb.store.Folder(tmp_path / "store" / training.name)
    for _ in range(2):  # and goes on from it
        with pytest.raises(ValueError, match=rf"^epoch {epoch} diverged[^\n]+lower rates[^\n]+$"):
            imagenet.train(training, root, store=tmp_path / "store")
        assert folder.checkpoints() == ["checkpoint-00001.pt"][: epoch - 1]


def test_killed_while_a_new_result_replaces_an_old_one_nothing_counts_as_whole(tmp_path, monkeypatch):
    root, folder_of = imagenet.toy_folder(tmp_path / "toy", train=8, test=2), kafnb.store.Folder
    training = imagenet.small(imagenet.Training(method="standard"), 4)
    training = dataclasses.replace(training, phases=(imagenet.Phase(32, 32, 1, (0, 1), (0.01, 0.01)),))
    old = imagenet.train(training, root, store=tmp_path)
    monkeypatch.setattr(imagenet.loop, "code_fingerprint", lambda *modules: "0123456789")
    monkeypatch.setenv("KAFNB_STALE", "recompute")

    def killed(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder_of, "write_table", killed)
        imagenet.train(training, root, store=tmp_path)
    monkeypatch.delenv("KAFNB_STALE")
    new = imagenet.train(training, root, store=tmp_path)
    assert new.images_per_s[0] != old.images_per_s[0]  # it was not read with the new weights and their record


@pytest.mark.slow
def test_two_processes_train_on_a_small_folder_and_one_resumes(tmp_path):
    root = imagenet.toy_folder(tmp_path / "toy", train=32, test=12)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kafnb.imagenet",
    ]
    command += f"{root} --small --activation kaf_elu --device cpu --workers 0".split()
    stopped = tmp_path / "stopped"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--store", str(stopped)], env=environment, check=True, capture_output=True, timeout=600)
    training = imagenet.small(imagenet.Training("kaf_elu"), 4)
    folder = stopped / training.name
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    history = pd.read_csv(folder / "history.csv")
    epochs = history[history["size"].notna()]
    assert (
        epochs["size"].tolist() == [32, 32, 48, 64] and (epochs.processes == 2).all() and (epochs.images == 128).all()
    )
    assert history.clean.iloc[-1] > 0.5 > 0.25  # of four classes
    # as if stopped after two epochs of one process: the rest is trained, on one
    state = {}

    def keep(self, value, write=kafnb.store.Folder.write_checkpoint):
        write(self, value)
        if len(value["history"]) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kafnb.store.Folder, "write_checkpoint", keep)
        with pytest.raises(KeyboardInterrupt):
            imagenet.train(training, root, store=tmp_path / "alone")
    state = kafnb.store.Folder(tmp_path / "alone" / training.name).read_checkpoint()
    assert len(state["history"]) == 2
    resumed = imagenet.train(training, root, store=tmp_path / "alone")
    assert resumed["size"].tolist()[:4] == [32, 32, 48, 64] and resumed.loss.tolist()[:2] == [
        r["loss"] for r in state["history"]
    ]
    other = imagenet.toy_folder(tmp_path / "other", train=49, test=12)
    for wrong in (dict(root=other), dict(root=root, sync_batchnorm=True)):
        with pytest.raises(ValueError, match="other images or with other statistics"):
            imagenet.train(training, store=tmp_path / "alone", **wrong)
    again = imagenet.train(training, root, store=tmp_path / "alone")
    pd.testing.assert_frame_equal(again, resumed, check_dtype=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet.loop, "code_fingerprint", lambda *modules: "0123456789")
        patch.setenv("KAFNB_STALE", "refuse")
        with pytest.raises(ValueError, match="other code"):
            imagenet.train(training, root, store=tmp_path / "alone")
