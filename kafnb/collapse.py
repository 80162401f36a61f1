"""Early warning of catastrophic overfitting: single-step training that learns to fool its own attack.

Source: Wong, Rice, Kolter, ICLR 2020, arXiv:2001.03994, section 5.4, who found it by watching PGD on training images.
"""

import pandas as pd
import torch

from .attacks import fgsm, pgd
from .checks import instance
from .data import to_unit
from .evaluate import clean_accuracy


def watched(model, data, recipe):
    """Accuracy under FGSM and under PGD-10 on the first ``recipe.watch`` training images, for the history."""
    device = next(model.parameters()).device
    x, y = to_unit(data.x_train[: recipe.watch]).to(device), data.y_train[: recipe.watch].to(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same random start in every epoch: what changes is the model
        batches = list(zip(x.split(500), y.split(500), strict=True))
        attacked = {
            f"watch_{attack.__name__}": torch.cat([attack(model, *few, eps=recipe.eps) for few in batches])
            for attack in (fgsm, pgd)
        }
    return {name: clean_accuracy(model, (x_adv, y)).rate for name, x_adv in attacked.items()}


def collapsed(history):
    """Number of the epoch in which training collapsed, or None.

    That is the first one in which accuracy under PGD is a third and at least 10 points below its best so far, while
    accuracy under FGSM is no lower than it was then.

    Parameters
    ----------
    history : DataFrame or list of dict
        With columns epoch, watch_fgsm, watch_pgd: a recipe with ``watch``.
    """
    rows = (
        history if isinstance(instance(history, list | pd.DataFrame, "history"), list) else history.to_dict("records")
    )
    if rows and not {"epoch", "watch_fgsm", "watch_pgd"} <= set(rows[0]):
        raise ValueError("history has no columns watch_fgsm and watch_pgd: train with Recipe(watch=...)")
    best = None
    for row in rows:
        if best is None or row["watch_pgd"] >= best["watch_pgd"]:
            best = row
        fallen = best["watch_pgd"] - row["watch_pgd"] >= max(0.10, best["watch_pgd"] / 3)
        if fallen and row["watch_fgsm"] >= best["watch_fgsm"]:
            return int(row["epoch"])
    return None


def message(history, images):
    """The warning of ``fit``, one line."""
    row, best = history[-1], max(history, key=lambda r: r["watch_pgd"])
    return (
        f"catastrophic overfitting in epoch {row['epoch']}: on {images} training images, accuracy under PGD fell from "
        f"{100 * best['watch_pgd']:.0f} % (epoch {best['epoch']}) to {100 * row['watch_pgd']:.0f} % while FGSM's is "
        f"{100 * row['watch_fgsm']:.0f} %; train with method 'n_fgsm', 'fgsm_rs' or 'pgd', or stop earlier"
    )
