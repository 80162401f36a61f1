"""Experiments: a frozen description each, whose hash is its key in the store. Equal experiments train once."""

import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from tqdm.auto import tqdm

from . import engines, models
from .activations import ACTIVATIONS, activation
from .checks import device as device_of
from .checks import file_name, instance, seed, shown
from .data import load_data
from .evaluate import Score
from .evaluations import CLEAN, Evaluation
from .methods import METHODS
from .provenance import code_fingerprint, code_of, device_name, provenance
from .recipe import OPTIMIZERS, Recipe, epochs_of
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
        instance(self.data, str, "data", ": 'digits', 'cifar10' or 'folder:PATH'")
        for field in ("model", "activation"):
            value = getattr(self, field)
            file_name(value.replace(":", "-") if isinstance(value, str) else value, field)
        instance(self.recipe, Recipe, "recipe")
        object.__setattr__(self, "seed", seed(self.seed))
        pairs = self.options.items() if isinstance(self.options, dict) else self.options
        try:
            options = tuple(sorted((str(k), v) for k, v in pairs))
            json.dumps(options)
        except (TypeError, ValueError):
            raise TypeError(f"options must be (name, value) pairs of plain values, got {shown(self.options)}") from None
        object.__setattr__(self, "options", options)

    @property
    def key(self):
        data = f"folder:{Path(self.data).name}" if self.data.startswith("folder:") else self.data
        return key_of(dataclasses.replace(self, data=data))

    @property
    def name(self):
        return f"{self.model}-{self.activation.replace(':', '-')}-{self.recipe.method}-s{self.seed}-{self.key}"

    def build(self, data):
        """A new model, initialised from ``seed``; the global generators are left as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return models.build(self.model, self.activation, data, **dict(self.options))


PRODUCTS = ("weights.safetensors", "history.csv", "experiment.json")


def _code(experiment):
    """Fingerprint of the code that the weights come from: this package's, and that of a user's own activation."""
    with torch.random.fork_rng(devices=[]):
        parts = {type(m) for m in activation(experiment.activation, 8).modules()}
    own = [METHODS.get(experiment.recipe.method), OPTIMIZERS.get(experiment.recipe.optimizer)]
    if experiment.activation in ACTIVATIONS:  # not in there: a KAF by its kernels' names
        own.append(ACTIVATIONS[experiment.activation])
    return code_of(("data", "models", "training"), [*parts, *own])


def _finished(folder, data, code):
    """True if the folder holds a whole result that may be used; an error if that was trained on other data."""
    if not all(folder.has(name) for name in PRODUCTS):
        return False
    record = folder.read_json("experiment.json")
    if (trained_on := record.get("data_fingerprint")) != data.fingerprint:
        raise ValueError(
            f"{folder.path} was trained on other data ({shown(trained_on)}) than {data.name} is now "
            f"({data.fingerprint}): move that folder away, or name the right data"
        )
    return folder.by_this_code("weights.safetensors", record.get("code"), code)


def _loaded(folder, model):
    """Whether the stored weights fit the model, which has them then."""
    try:
        model.load_state_dict(folder.read_weights())
    except (RuntimeError, SafetensorError):
        folder.set_aside("weights.safetensors", "does not hold the weights of this model (an older format?)")
        return False
    return True


def _origin(experiment, data):
    """What a checkpoint must have been written with to be gone on from."""
    return {"code": _code(experiment), "data": data.fingerprint}


def _trained(folder, experiment, data, device, progress, finished=None, report=None, learn=None):
    """Load, resume or train; the model on ``device`` in eval mode. ``finished``: what ``_finished`` said, if asked.

    ``report(done, total)`` is called after each epoch; ``learn`` stands in for ``fit``.
    """
    model, origin = experiment.build(data).to(device), _origin(experiment, data)
    code = origin["code"]
    if _finished(folder, data, code) if finished is None else finished:
        if _loaded(folder, model):
            return model.eval()
        model = experiment.build(data).to(device)  # some of the weights may have fitted
    started = time.perf_counter()

    def save(state):
        folder.write_checkpoint(state | origin)
        if report:
            report(len(state["history"]), epochs_of(experiment.recipe))

    history = (learn or fit)(
        model, data, experiment.recipe, seed=experiment.seed, device=device, progress=progress,
        resume=folder.read_checkpoint(**origin), save=save,
    )  # fmt: skip
    folder.write_weights(model)
    folder.write_table("history.csv", history)
    record = {
        "format": 1,
        "experiment": dataclasses.asdict(experiment),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_fingerprint": data.fingerprint,
        "code": code,
        "seconds": round(time.perf_counter() - started, 2),
        "device": device_name(device),
    }
    folder.write_json("experiment.json", record | provenance())
    folder.drop(*folder.checkpoints())
    return model


def _evaluation_file(evaluation):
    return f"evaluation-{evaluation.name.split(' ')[0].lower()}-{key_of(evaluation)}.csv"


def _stored(folder, name, labels, truth, origin):
    """The ``Score`` in a stored evaluation, or None where there is none that may be used."""
    if not folder.has(name):
        return None
    made = folder.read_comment(name)
    if made.get("weights", origin["weights"]) != origin["weights"]:
        folder.set_aside(name, "is of other weights than are there now")
        return None
    if not folder.by_this_code(name, made.get("code"), origin["code"]):
        return None
    try:
        table = folder.read_table(name)
        correct, images = table["correct"].to_numpy(), table["label"].to_numpy()
        right = set(correct) <= {0, 1} and np.array_equal(images, truth.numpy())
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        folder.set_aside(name, "does not hold an evaluation on these images")
        return None
    return Score(correct.astype(bool), labels)


def _score(folder, evaluation, model, data):
    name = _evaluation_file(evaluation)
    labels = "none" if evaluation.attack == "none" else evaluation.labels
    code = code_fingerprint("data", "evaluations", "models")
    origin = {"code": code, "weights": folder.digest("weights.safetensors")}
    if score := _stored(folder, name, labels, data.y_test[: evaluation.n], origin):
        return score
    score = evaluation(model(), data)
    table = pd.DataFrame(
        {"image": range(score.n), "label": data.y_test[: score.n], "correct": score.correct.astype(int)}
    )
    origin = {"code": code, "weights": folder.digest("weights.safetensors")}
    folder.write_table(name, table, json.dumps(dataclasses.asdict(evaluation) | origin))
    return score


def _check(experiment):
    """An experiment whose names are all known."""
    instance(experiment, Experiment, "experiments")
    with torch.random.fork_rng(devices=[]):
        activation(experiment.activation, 8)
    models.maker(experiment.model)
    return experiment


def measure(experiment, evaluations, *, store, data_root=None, device="cpu", progress=False, report=None):
    """Train or load one experiment, under its lock: (evaluation, Score) of clean accuracy and each evaluation.

    ``report(done, total)`` is called after each epoch.
    """
    data, folder = load_data(experiment.data, data_root), Folder(Path(store) / experiment.name)
    with folder.lock():
        finished = _finished(folder, data, _code(experiment))
        train = functools.partial(_trained, folder, experiment, data, device, progress, finished, report)
        model = functools.cache(train)
        if not finished:
            model()
        return [(e, _score(folder, e, model, data)) for e in (CLEAN, *evaluations)]


def _measured(experiment, evaluations, store, data_root):
    """True if ``measure`` would only read."""
    folder, data = Folder(store / experiment.name), load_data(experiment.data, data_root)
    if not folder.path.is_dir():
        return False
    files = [_evaluation_file(e) for e in (CLEAN, *evaluations)]
    with folder.lock():
        return all(map(folder.has, files)) and _finished(folder, data, _code(experiment))


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
        on a Ray cluster (``pip install 'ray>=2.60,<3'``). The results come into the one store.
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

    Raises
    ------
    ValueError, TypeError
        Unknown names, before anything is trained; a stored result of other data; what KAFNB_STALE=refuse refuses.
    OSError
        The store cannot be written: one line. What was finished stays, and the next run goes on from there.
    """
    experiments = [experiments] if isinstance(experiments, Experiment) else list(experiments)
    evaluations = (evaluations,) if isinstance(evaluations, Evaluation) else tuple(evaluations)
    for experiment in experiments:  # before hours of training: what is wrong with any of them
        _check(experiment)
    for evaluation in evaluations:
        instance(evaluation, Evaluation, "evaluations")
    store, rows, spread = Path(store or default_store()), [], engines.check(engine)
    if spread:  # of equal experiments one, and nothing for what is there
        new = [e for e in dict.fromkeys(experiments) if not _measured(e, evaluations, store, data_root)]
        where = dict(store=store, data_root=data_root, device=device, progress=progress)
        if new:
            spread(measure, new, evaluations, **where, workers=workers, threads=threads, address=address)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_of(device)
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
    _check(experiment)
    device, data = device_of(device), load_data(experiment.data, data_root)
    folder = Folder(Path(store or default_store()) / experiment.name)
    with folder.lock():
        return _trained(folder, experiment, data, device, progress)


def history(experiment, *, store=None):
    """The training history of a stored experiment, a row an epoch."""
    folder = Folder(Path(store or default_store()) / _check(experiment).name)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{experiment.name} is not in the store {folder.path.parent}: run it first")
    with folder.lock():  # or a file that another process has written, and not listed yet, would look damaged
        if not folder.has("history.csv"):
            raise FileNotFoundError(f"{experiment.name} is not in the store {folder.path.parent}: run it first")
        return folder.read_table("history.csv")
