"""Images, names and parameters that somebody else chose: nothing runs, nothing is written outside."""

import re
import struct
import zlib
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import kafnb
from kafnb import Experiment, Recipe, figures, paths, provenance


@pytest.fixture
def tree(tmp_path):
    for part in ("train", "test"):
        for c in "ab":
            (tmp_path / "tree" / part / c).mkdir(parents=True)
            for i in range(3):
                noise = np.random.RandomState(i).randint(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(noise).save(tmp_path / "tree" / part / c / f"{i}.png")
    return tmp_path / "tree"


def refused(tree, names):
    """The folder with one bad file is refused in one line that names it, and soon."""
    with pytest.raises(ValueError) as error:
        kafnb.load_data(f"folder:{tree}")
    assert "\n" not in str(error.value) and names in str(error.value), error.value


def png(width, height):
    """A PNG file that claims this size; its pixels are zeros, well packed."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(/tmp/kafnb_proof) (w) file closefile\nshowpage\n%%EOF\n"
)


def test_whole_tree_is_read(tree):
    assert kafnb.load_data(f"folder:{tree}").x_train.shape == (6, 3, 8, 8)


@pytest.mark.parametrize("where", ["train/a/0.png", "train/a/1.png", "test/b/2.png"])
@pytest.mark.parametrize(
    "content",
    [png(100_000, 100_000), png(20_000, 20_000), png(8, 9), b"", b"not an image", POSTSCRIPT, b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\0" * 50],
    ids=["bomb", "large", "other size", "empty", "text", "postscript", "header", "gif"],
)  # fmt: skip
def test_hostile_images_are_refused(tree, where, content):
    (tree / where).write_bytes(content)
    with pytest.raises(ValueError) as error:
        kafnb.load_data(f"folder:{tree}")
    text = str(error.value)
    assert "\n" not in text and (Path(where).name in text or "GiB of pixels" in text), text
    assert not Path("/tmp/kafnb_proof").exists()


def test_truncated_images_are_refused(tree):
    whole = (tree / "train" / "a" / "1.png").read_bytes()
    for length in (20, 40, len(whole) // 2, len(whole) - 40):
        (tree / "train" / "a" / "1.png").write_bytes(whole[:length])
        refused(tree, "1.png")
        kafnb.data._load.cache_clear()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_eight_bits_are_refused(tree, mode):
    image = Image.fromarray(
        np.full((8, 8), 40_000 if mode != "F" else 0.5, {"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
    )
    path = tree / "train" / "a" / "0.tif"
    image.save(path)
    refused(tree, "0.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_any_eight_bit_mode_are_read(tree, mode):
    path = tree / "train" / "a" / ("0.tif" if mode == "CMYK" else "0.png")
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).convert(mode).save(path)
    assert len(kafnb.load_data(f"folder:{tree}").x_train) >= 6


def test_trees_without_two_classes_or_images_are_refused(tree, tmp_path):
    for part in ("train", "test"):
        for p in (tree / part / "b").iterdir():
            p.unlink()
        (tree / part / "b").rmdir()
    refused(tree, "class")
    (tmp_path / "empty" / "train").mkdir(parents=True), (tmp_path / "empty" / "test").mkdir()
    refused(tmp_path / "empty", "empty")


@pytest.mark.parametrize(
    "name", ["../out", "../../out", "/tmp/out", "a/b", "..", ".", "", "a\0b", ".hidden", "a\\b", "x" * 200]
)
def test_names_lead_nowhere_else(home, name):
    (home / "inside").mkdir()
    table = pd.DataFrame({"x": [1]})
    for attempt in (
        lambda: Experiment("digits", name, "relu", Recipe()),
        lambda: Experiment("digits", "mlp", name, Recipe()),
        lambda: kafnb.Evaluation("pgd", loss=name),
        lambda: kafnb.Evaluation(name),
        lambda: figures.save_figure(matplotlib.figure.Figure(), name, table, home / "inside"),
        lambda: kafnb.Session(name),
        lambda: kafnb.Session("x", profile=name),
        lambda: kafnb.run(Experiment(name + "digits/", "mlp", "relu", Recipe()), store=home / "inside"),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        assert "\n" not in str(error.value)
    assert not list((home / "inside").iterdir()) and {p.name for p in home.iterdir()} == {"inside"}


def test_jupyterlab_keeps_its_token_and_stays_on_this_machine():
    makefile = (Path(provenance.PACKAGE).parent / "Makefile").read_text()
    (command,) = re.findall(r"-m jupyterlab (.*)", makefile)
    assert "--ip=127.0.0.1" in command
    assert not re.search(r"token|password|allow.root|allow_origin|disable_check|0\.0\.0\.0", command, re.I)


def test_the_archive_of_cifar10_is_checked_before_it_is_read(tmp_path, monkeypatch):
    """CIFAR-10's batches are pickles: torchvision compares their MD5 first, and ours calls it so that it does."""
    folder, proof = tmp_path / "cifar-10-batches-py", tmp_path / "proof"
    folder.mkdir()
    for name in [
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ]:
        (folder / name).write_bytes(b"cbuiltins\nopen\n(S'%s'\nS'w'\ntR." % str(proof).encode())
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not the archive")

    def offline(*args, **kwargs):
        raise OSError("no network here")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz"):
        kafnb.load_data("cifar10", tmp_path)
    assert not proof.exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail(p):
        p.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*x\.txt: No space left"):
        paths.write_atomically(path, fail)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
