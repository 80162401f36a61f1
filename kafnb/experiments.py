"""Experiments: a frozen description each, whose hash is its key in the store. Equal experiments train once."""

import dataclasses
import functools
import hashlib
import json
import platform
import subprocess
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from . import attacks, models
from .activations import pick
from .attacks import adaptive
from .attacks import library as library_attacks
from .data import load_data
from .evaluate import LABELS, Score, clean_accuracy, robust_accuracy
from .paths import VERSION, home
from .store import Folder, default_store
from .training import Recipe, fit


def _changed(value):
    """The fields that differ from their defaults: a field added later leaves all old keys as they are."""
    out = {}
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if dataclasses.is_dataclass(v):
            v = _changed(v)
        if f.default is not dataclasses.MISSING and getattr(value, f.name) == f.default:
            continue
        out[f.name] = v
    return out


def _key(value, length=10):
    text = json.dumps(_changed(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


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
        return _key(dataclasses.replace(self, data=data))

    @property
    def name(self):
        return f"{self.model}-{self.activation}-{self.recipe.method}-s{self.seed}-{self.key}"

    def build(self, data):
        """A new model, initialised from ``seed``; the global generators are left as they were."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return models.build(self.model, self.activation, data, **dict(self.options))


# name of an attack -> (where it is, fields of Evaluation that it takes beside eps)
_STEPS = ("steps", "step_size", "restarts", "norm", "loss", "early_stop", "targeted")
_ADAPTIVE = ("neighbours", "kwta_smooth", "kwta_both", "double", "kaf_tails", "kaf_annealed")
ATTACKS = {
    "fgsm": (attacks, ("norm",)),
    "pgd": (attacks, _STEPS),
    "apgd": (library_attacks, ("norm",)),
    "autoattack": (library_attacks, ("norm",)),
    "square": (library_attacks, ("norm", "queries")),
    "cw": (library_attacks, ()),
    "deepfool": (library_attacks, ()),
} | dict.fromkeys(_ADAPTIVE, (adaptive, _STEPS))
TITLES = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "apgd": "APGD",
    "autoattack": "AutoAttack",
    "square": "Square",
    "cw": "C&W",
    "deepfool": "DeepFool",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One measurement of a trained model on the first n test images.

    Attributes
    ----------
    attack : str
        "none" is clean accuracy; else a key of ``ATTACKS``, the function of that name in ``attacks``,
        ``attacks.library`` or ``attacks.adaptive``. Each takes of the fields below what it knows.
    labels : {"true", "predicted"}
        See ``kafnb.evaluate.robust_accuracy``.
    eps, step_size : float, pixel units
    steps, restarts, norm, loss, early_stop, targeted
        See ``kafnb.attacks.pgd``.
    queries : int
        Of the Square attack.
    """

    attack: str = "none"
    eps: float = 8 / 255
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    norm: str = "linf"
    labels: str = "true"
    n: int | None = None
    seed: int = 0
    loss: str = "ce"
    early_stop: bool = False
    targeted: bool | str = False
    queries: int = 5000

    def __post_init__(self):
        if self.attack != "none":
            pick(ATTACKS, self.attack, "attack")
        if self.labels not in LABELS:
            raise ValueError(f"labels must be one of {LABELS}, got {self.labels!r}")

    @property
    def name(self):
        if self.attack == "none":
            return "clean"
        takes, label = ATTACKS[self.attack][1], TITLES.get(self.attack, self.attack)
        label += f"-{self.steps}-{self.restarts}" if "steps" in takes else ""
        label += f"-{self.queries}" if "queries" in takes else ""
        label += f"-{self.loss}" if self.loss != "ce" else ""
        label += "-all-targets" if self.targeted == "all" else ""
        return f"{label} ({self.labels} labels)"

    def __call__(self, model, data):
        if self.attack == "none":
            return clean_accuracy(model, data, n=self.n)
        module, takes = ATTACKS[self.attack]
        options = {"eps": self.eps} | {field: getattr(self, field) for field in takes}
        attack = functools.partial(getattr(module, self.attack), **options)
        return robust_accuracy(model, data, attack, self.labels, n=self.n, seed=self.seed)


CLEAN = Evaluation()


def provenance():
    """Code version, commit, device names and library versions, for records beside results."""

    def git(*args):
        out = subprocess.run(["git", *args], cwd=home(), capture_output=True, text=True)
        return out.stdout.strip() if out.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "kafnb") else ""
        )
    except OSError:  # no git on this machine
        commit = ""
    return {
        "kafnb": VERSION,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def device_name(device):
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


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
    name = f"evaluation-{slug}-{_key(evaluation)}.csv"
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
