"""A dry run: all that a profile does, with a few images, one epoch and two steps an attack.

For whoever is about to spend hours of a GPU: ``python -m kafnb figures --profile paper --dry-run`` takes the same
cells, networks, precisions and files in minutes on a CPU. Its products stay apart, under runs/dry/; its numbers mean
nothing.
"""

import dataclasses
import os
import shutil

from .data import load_data
from .paths import home

IMAGES, ATTACKED, BATCH, STEPS, SEEDS = 40, 8, 20, 2, 2  # images in the tree, and what a profile's lengths become


def active():
    """True inside a dry run."""
    return os.environ.get("KAFNB_DRY_RUN") == "1"


def prepare():
    """An empty root of its own, runs/dry/, with a tree of 32x32 colour images; returns the tree's path.

    From here on ``home()`` is that root, in this process and those it starts.
    """
    from PIL import Image

    root, real = home() / "runs" / "dry", home()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    (root / "notebooks").symlink_to(real / "notebooks")
    if (real / "figures" / "benchmark").is_dir():
        shutil.copytree(real / "figures" / "benchmark", root / "figures" / "benchmark")
    digits = load_data("digits")
    for part, images, labels in (("train", digits.x_train, digits.y_train), ("test", digits.x_test, digits.y_test)):
        for i, name in enumerate(digits.classes * (IMAGES // digits.num_classes)):
            image = images[labels == int(name)][i // digits.num_classes, 0]
            path = root / "images" / part / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).resize((32, 32)).convert("RGB").save(path)
    os.environ |= {"KAFNB_HOME": str(root), "KAFNB_DRY_RUN": "1"}
    return root / "images"


def shorten(value):
    """A Profile, Recipe or Evaluation with every length at most that of a dry run; unchanged outside of one."""
    if not active():
        return value
    longest = dict(epochs=1, batch_size=BATCH, steps=STEPS, replays=STEPS, restarts=1, seeds=SEEDS, queries=10)
    longest |= dict(images=ATTACKED, n=ATTACKED, track=ATTACKED, watch=ATTACKED)
    changes = {}
    if getattr(value, "attack", "") in ("apgd", "autoattack"):  # of fixed length, on what stands
        longest["n"] = 2
    for field in dataclasses.fields(value):
        now, most = getattr(value, field.name), longest.get(field.name)
        if isinstance(now, dict) and field.name == "epochs":
            changes[field.name] = dict.fromkeys(now, most)
        elif most is not None:
            changes[field.name] = most if now is None else min(now, most)
    return dataclasses.replace(value, **changes)
