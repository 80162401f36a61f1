"""Experiments: a frozen description each, whose hash is its key in the store. Equal experiments train once."""

import dataclasses
import functools
import json
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from . import engines, models
from .data import load_data
from .evaluate import Score
from .evaluations import CLEAN
from .provenance import device_name, provenance
from .recipe import Recipe, epochs_of
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


def _trained(folder, experiment, data, device, progress, report=None, fit=fit):
    """Load, resume or train; the model on ``device`` in eval mode."""
    model = experiment.build(data).to(device)
    if _finished(folder, data):
        model.load_state_dict(folder.read_weights())
        return model.eval()
    started = time.perf_counter()

    def save(state):
        folder.write_checkpoint(state)
        if report:
            report(len(state["history"]), epochs_of(experiment.recipe))

    history = fit(
        model, data, experiment.recipe, seed=experiment.seed, device=device,
        progress=progress, resume=folder.read_checkpoint(device), save=save,
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


def _evaluation_file(evaluation):
    return f"evaluation-{evaluation.name.split(' ')[0].lower()}-{key_of(evaluation)}.csv"


def _score(folder, evaluation, model, data):
    name = _evaluation_file(evaluation)
    if folder.has(name):
        correct = folder.read_table(name)["correct"].to_numpy(bool)
        return Score(correct, "none" if evaluation.attack == "none" else evaluation.labels)
    score = evaluation(model(), data)
    table = pd.DataFrame(
        {"image": range(score.n), "label": data.y_test[: score.n], "correct": score.correct.astype(int)}
    )
    folder.write_table(name, table, json.dumps(dataclasses.asdict(evaluation)))
    return score


def measure(experiment, evaluations, *, store, data_root=None, device="cpu", progress=False, report=None):
    """Train or load one experiment, under its lock: (evaluation, Score) of clean accuracy and each evaluation.

    ``report(done, total)`` is called after each epoch.
    """
    data, folder = load_data(experiment.data, data_root), Folder(Path(store) / experiment.name)
    with folder.lock():
        train = functools.partial(_trained, folder, experiment, data, device, progress, report)
        model = functools.cache(train)
        if not _finished(folder, data):
            model()
        return [(e, _score(folder, e, model, data)) for e in (CLEAN, *evaluations)]


def _measured(experiment, evaluations, store, data_root):
    """True if ``measure`` would only read."""
    folder = Folder(store / experiment.name)
    files = [_evaluation_file(e) for e in (CLEAN, *evaluations)]
    return all(map(folder.has, files)) and _finished(folder, load_data(experiment.data, data_root))


def run(
    experiments, evaluations=(), *, data_root=None, device="cpu", progress=False, store=None,
    engine="local", workers=None, threads=None, address=None,
):  # fmt: skip
    """Train or load each experiment and measure it.

    Parameters
    ----------
    experiments : Experiment or list
    evaluations : list of Evaluation
        Besides clean accuracy on all test images, which always comes first.
    data_root : path, optional
        Where cifar10 is kept.
    device : str
        "cpu", "cuda" or "auto".
    store : path, optional
        Default ``results/`` in the checkout.
    engine : {"local", "processes", "ray"}
        Where what is not in the store yet is computed: here, one after the other; in several processes of this machine;
        on a Ray cluster (``pip install 'kafnb[ray]'``). The results come into the one store.
    workers : int, optional
        Experiments at a time of "processes", and of a Ray cluster started here; default the number of cores.
    threads : int, optional
        Of each worker; default an equal share of the cores for "processes", 1 for "ray".
    address : str, optional
        Of a running Ray cluster, e.g. "auto" or "10.0.0.1:6379"; without one, it is started on this machine.

    Returns
    -------
    DataFrame
        One row an experiment and metric: the experiment's fields, metric, labels, rate, low, high (95 % Wilson), n,
        and ``correct``, the boolean of each test image.
    """
    experiments = [experiments] if isinstance(experiments, Experiment) else list(experiments)
    store, rows, spread = Path(store or default_store()), [], engines.check(engine)
    evaluations = tuple(evaluations)
    if spread:  # of equal experiments one, and nothing for what is there
        new = [e for e in dict.fromkeys(experiments) if not _measured(e, evaluations, store, data_root)]
        where = dict(store=store, data_root=data_root, device=device, progress=progress)
        if new:
            spread(measure, new, evaluations, **where, workers=workers, threads=threads, address=address)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for experiment in tqdm(experiments, unit="model", leave=False, disable=not progress):
        scores = measure(
            experiment, evaluations, store=store, data_root=data_root, device=device, progress=progress
        )  # fmt: skip
        for evaluation, score in scores:
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
