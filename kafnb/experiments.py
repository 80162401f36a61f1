"""Experiments: a frozen description each, whose hash is its key in the store. Equal experiments train once."""

import dataclasses
import functools
import json
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from . import models
from .data import load_data
from .evaluate import Score
from .evaluations import CLEAN
from .provenance import device_name, provenance
from .recipe import Recipe
from .store import Folder, default_store, key_of
from .training import fit


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One trained model.

    Attributes
    ----------
    data : str
        See ``kafnb.data.load_data``. Of "folder:PATH" only the last name counts for the key, so that a tree may be
        moved; what was in it is checked by fingerprint.
    model : str
        "mlp", "light_cnn", "vgg", "resnet20", ...
    activation : str
        See ``kafnb.activation``.
    recipe : Recipe
    seed : int
        Of initialisation and training.
    options : tuple of (name, value)
        Further arguments of the model, e.g. (("block", "he"),). A dict is accepted and sorted.
    """

    data: str = "digits"
    model: str = "resnet20"
    activation: str = "relu"
    recipe: Recipe = Recipe()
    seed: int = 0
    options: tuple = ()

    def __post_init__(self):
        pairs = self.options.items() if isinstance(self.options, dict) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(k), v) for k, v in pairs)))

    @property
    def key(self):
        data = f"folder:{Path(self.data).name}" if self.data.startswith("folder:") else self.data
        return key_of(dataclasses.replace(self, data=data))

    @property
    def name(self):
        return f"{self.model}-{self.activation}-{self.recipe.method}-s{self.seed}-{self.key}"

    def build(self, data):
        """A new model, initialised from ``seed``; the global generators are left as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return models.build(self.model, self.activation, data, **dict(self.options))


PRODUCTS = ("weights.safetensors", "history.csv", "experiment.json")


def _finished(folder, data):
    """True if the folder holds a whole result; an error if that was trained on other data."""
    if not all(folder.has(name) for name in PRODUCTS):
        return False
    trained_on = folder.read_json("experiment.json")["data_fingerprint"]
    if trained_on != data.fingerprint:
        raise ValueError(
            f"{folder.path} was trained on other data ({trained_on}) than {data.name} is now "
            f"({data.fingerprint}): move that folder away, or name the right data"
        )
    return True


def _trained(folder, experiment, data, device, progress):
    """Load, resume or train; the model on ``device`` in eval mode."""
    model = experiment.build(data).to(device)
    if _finished(folder, data):
        model.load_state_dict(folder.read_weights())
        return model.eval()
    started = time.perf_counter()
    history = fit(
        model, data, experiment.recipe, seed=experiment.seed, device=device,
        progress=progress, resume=folder.read_checkpoint(device), save=folder.write_checkpoint,
    )  # fmt: skip
    folder.write_weights(model)
    folder.write_table("history.csv", history)
    record = {
        "experiment": dataclasses.asdict(experiment),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_fingerprint": data.fingerprint,
        "seconds": round(time.perf_counter() - started, 2),
        "device": device_name(device),
    }
    folder.write_json("experiment.json", record | provenance())
    folder.drop(*folder.checkpoints())
    return model


def _score(folder, evaluation, model, data):
    slug = evaluation.name.split(" ")[0].lower()
    name = f"evaluation-{slug}-{key_of(evaluation)}.csv"
    if folder.has(name):
        correct = folder.read_table(name)["correct"].to_numpy(bool)
        return Score(correct, "none" if evaluation.attack == "none" else evaluation.labels)
    score = evaluation(model(), data)
    table = pd.DataFrame(
        {"image": range(score.n), "label": data.y_test[: score.n], "correct": score.correct.astype(int)}
    )
    folder.write_table(name, table, json.dumps(dataclasses.asdict(evaluation)))
    return score


def run(experiments, evaluations=(), *, data_root=None, device="cpu", progress=False, store=None):
    """Train or load each experiment and measure it.

    Parameters
    ----------
    experiments : Experiment or list
    evaluations : list of Evaluation
        Besides clean accuracy on all test images, which always comes first.
    data_root : path, optional
        Where cifar10 is kept.
    store : path, optional
        Default ``results/`` in the checkout.

    Returns
    -------
    DataFrame
        One row an experiment and metric: the experiment's fields, metric, labels, rate, low, high (95 % Wilson), n,
        and ``correct``, the boolean of each test image.
    """
    experiments = [experiments] if isinstance(experiments, Experiment) else list(experiments)
    store, rows = Path(store or default_store()), []
    for experiment in tqdm(experiments, unit="model", leave=False, disable=not progress):
        data = load_data(experiment.data, data_root)
        folder = Folder(store / experiment.name)
        with folder.lock():
            model = functools.cache(functools.partial(_trained, folder, experiment, data, device, progress))
            if not _finished(folder, data):
                model()
            for evaluation in [CLEAN, *evaluations]:
                score = _score(folder, evaluation, model, data)
                low, high = score.interval
                rows.append(
                    dict(
                        data=experiment.data, model=experiment.model, activation=experiment.activation,
                        method=experiment.recipe.method, seed=experiment.seed, metric=evaluation.name,
                        labels=score.labels, rate=score.rate, low=low, high=high, n=score.n,
                        correct=score.correct, experiment=experiment.key,
                    )
                )  # fmt: skip
    return pd.DataFrame(rows)


def load(experiment, *, data_root=None, device="cpu", progress=False, store=None):
    """The trained model of an experiment, in eval mode; trained first if the store has none."""
    folder = Folder(Path(store or default_store()) / experiment.name)
    with folder.lock():
        return _trained(folder, experiment, load_data(experiment.data, data_root), device, progress)


def history(experiment, *, store=None):
    """The training history of a stored experiment, a row an epoch."""
    folder = Folder(Path(store or default_store()) / experiment.name)
    if not folder.has("history.csv"):
        raise FileNotFoundError(f"{experiment.name} is not in the store {folder.path.parent}: run it first")
    return folder.read_table("history.csv")
