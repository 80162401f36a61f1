"""Experiments: a frozen description each, whose hash is its key in the store. Equal experiments train once."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from . import engines, models, pretrained
from .activations import activation
from .checks import count, file_name, instance, seed, shown
from .checks import device as device_of
from .data import known, load_data
from .evaluations import Evaluation
from .recipe import Recipe
from .results import evaluation_file, measure, measured, trained
from .store import Folder, default_store, key_of


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

    Raises
    ------
    ValueError, TypeError
        A field of another type; a seed out of range; a model or activation that cannot be part of a file's name.
        Unknown names are not found here, but by ``kafnb.run`` and ``kafnb.load``.
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
            options = tuple(sorted((str(k), tuple(v) if isinstance(v, list) else v) for k, v in pairs))
            json.dumps(options)
        except (TypeError, ValueError):
            raise TypeError(f"options must be (name, value) pairs of plain values, got {shown(self.options)}") from None
        object.__setattr__(self, "options", options)

    @property
    def key(self):
        kind, folder, path = self.data.partition("folder:")
        return key_of(dataclasses.replace(self, data=f"{kind}{folder}{Path(path).name}"))

    @property
    def name(self):
        return f"{self.model}-{self.activation.replace(':', '-')}-{self.recipe.method}-s{self.seed}-{self.key}"

    def build(self, data):
        """A new model, initialised from ``seed``; the global generators are left as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return models.build(self.model, self.activation, data, **dict(self.options))


def _found(device):
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _check(experiment):
    """An experiment whose names are all known."""
    instance(experiment, Experiment, "experiments")
    with torch.random.fork_rng(devices=[]):
        activation(experiment.activation, 8)
    models.maker(experiment.model)
    known(experiment.data)
    return experiment


def run(
    experiments, evaluations=(), *, data_root=None, device="cpu", progress=False, store=None,
    engine="local", workers=None, threads=None, address=None, stored=False,
):  # fmt: skip
    """Train or load each experiment and measure it.

    What another process is at comes last, so that several with the same list share its work.

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
    stored : bool
        Compute nothing: the table has what the store has.

    Returns
    -------
    DataFrame
        One row an experiment and metric: the experiment's fields, metric, labels, rate, low, high (95 % Wilson), n,
        and ``correct``, the boolean of each test image.

    Raises
    ------
    ValueError, TypeError
        Unknown names, before anything is trained; a stored result of other data; what KAFNB_STALE=refuse refuses.
    FileNotFoundError
        ``stored``, and none of it is there.
    OSError
        The store cannot be written: one line. What was finished stays, and the next run goes on from there.
    """
    experiments = [experiments] if isinstance(experiments, Experiment | str) else list(experiments)
    evaluations = (evaluations,) if isinstance(evaluations, Evaluation | str) else tuple(evaluations)
    for experiment in experiments:  # before hours of training: what is wrong with any of them
        _check(experiment)
    for evaluation in evaluations:
        instance(evaluation, Evaluation, "evaluations")
    count(workers, "workers", optional=True)
    count(threads, "threads", optional=True)
    store, rows, spread = Path(store or default_store()), [], engines.check(engine)
    if engine != "ray":  # which knows what its cluster has
        device = device_of(_found(device))
    wanted = dict.fromkeys(experiments, evaluations)
    if stored:
        there = lambda e, v: measured(e, v, store, data_root)  # noqa: E731
        wanted = {e: tuple(v for v in evaluations if there(e, [v])) for e in wanted if there(e, [])}
        experiments = [e for e in experiments if e in wanted]
        if not experiments:
            raise FileNotFoundError(f"none of these experiments is in the store {store}: nothing was to be computed")
    elif spread:  # of equal experiments one, and nothing for what is there; to ask what is busy would be to wait for it
        busy = {e: Folder(store / e.name).busy() for e in experiments}
        new = [e for e in sorted(busy, key=busy.get) if busy[e] or not measured(e, evaluations, store, data_root)]
        where = dict(store=store, data_root=data_root, device=device, progress=progress)
        if new:
            spread(measure, new, evaluations, **where, workers=workers, threads=threads, address=address)
    if engine == "ray" and str(device).startswith("cuda"):  # the cluster's: here its results are read, on what there is
        device = "auto"
    device = device_of(_found(device))
    where = dict(store=store, data_root=data_root, device=device, progress=progress)
    scores, left = {}, list(dict.fromkeys(experiments))
    for _ in tqdm(range(len(left)), unit="model", leave=False, disable=not progress):
        experiment = left.pop(next((i for i, e in enumerate(left) if not Folder(store / e.name).busy()), 0))
        scores[experiment] = measure(experiment, wanted[experiment], **where)
    for experiment in experiments:
        for evaluation, score in scores[experiment]:
            low, high = score.interval
            eps = None if evaluation.attack == "none" else evaluation.eps
            rows.append(
                dict(
                    data=experiment.data, model=experiment.model, activation=experiment.activation,
                    method=experiment.recipe.method, seed=experiment.seed, metric=evaluation.name,
                    labels=score.labels, eps=eps, rate=score.rate, low=low, high=high, n=score.n,
                    correct=score.correct, experiment=experiment.key,
                )
            )  # fmt: skip
    return pd.DataFrame(rows)


def load(experiment, *, data_root=None, device="cpu", progress=False, store=None):
    """The trained model of an experiment, in eval mode; trained first if the store has none.

    Parameters
    ----------
    experiment : Experiment or str
        A name is that of a network that comes with the package: one of ``kafnb.pretrained.names()``.
    data_root, device, progress, store
        As for ``run``.

    Returns
    -------
    torch.nn.Module
        Images (N, C, H, W) in [0, 1] to logits (N, classes).

    Raises
    ------
    ValueError, TypeError
        No such network; data, a device or a name that there is not; a damaged file of the package.
    """
    if isinstance(experiment, str):
        return pretrained.load(experiment, device_of(_found(device)))
    _check(instance(experiment, Experiment, "experiment", " or a name of kafnb.pretrained.names()"))
    device, data = device_of(_found(device)), load_data(experiment.data, data_root)
    folder = Folder(Path(store or default_store()) / experiment.name)
    with folder.lock():
        return trained(folder, experiment, data, device, progress)


def computed_on(experiment, evaluations=(), *, store=None):
    """Where a stored experiment was trained, "device, torch version, commit", and attacked, "attack: device"; a set."""
    folder = Folder(Path(store or default_store()) / _check(experiment).name)
    record = folder.read_json("experiment.json")
    lines = {f"{record['device']}, torch {record['torch']}, commit {record['commit']}"}
    for evaluation in evaluations:
        if evaluation.attack != "none" and folder.has(file := evaluation_file(evaluation)):
            device = folder.read_comment(file).get("device")  # since 11/2026
            lines |= {f"{evaluation.name}: {device}"} if device else set()
    return lines


def history(experiment, *, store=None):
    """The training history of a stored experiment: a DataFrame, a row an epoch, of epoch, loss, accuracy, lr and times.

    Loss and accuracy are those on the training images as the method saw them; ``seconds`` and ``cpu_seconds`` are of
    the whole epoch. FileNotFoundError if the store has no such experiment.
    """
    folder = Folder(Path(store or default_store()) / _check(experiment).name)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{experiment.name} is not in the store {folder.path.parent}: run it first")
    with folder.lock():  # or a file that another process has written, and not listed yet, would look damaged
        if not folder.has("history.csv"):
            raise FileNotFoundError(f"{experiment.name} is not in the store {folder.path.parent}: run it first")
        return folder.read_table("history.csv")
