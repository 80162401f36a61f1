"""Profiles (quick, small, paper) and the session that a notebook opens with one."""

import dataclasses
import hashlib
import inspect
import os
import re
import sys
from pathlib import Path

import pandas as pd
import torch

from . import engines, experiments, figures, models, thesis
from .checks import file_name, pick
from .checks import seed as checked_seed
from .data import load_data
from .dryrun import shorten
from .evaluations import Evaluation
from .findings import report_instead_of_stopping
from .paths import home
from .provenance import code_fingerprint, device_name, provenance
from .recipe import Recipe
from .store import Folder, default_store


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a profile fixes for all notebooks: data, the threat, the size of each experiment.

    Attributes
    ----------
    data : str
        Default data set; ``data_root`` may replace CIFAR-10 by a folder tree.
    eps : float
        Radius of the L-inf ball, pixel units.
    mlp_eps : float
        That of fully connected networks: on photographs one with ReLU learns next to nothing at 8/255.
    epochs : dict
        Model name -> epochs.
    lr : float
        Highest learning rate, where a notebook names none.
    vgg_lr : dict
        Activation -> highest learning rate of the VGG-inspired network, for which the thesis has one each.
    adam : dict
        Model -> learning rate, of those that train with Adam.
    images : int or None
        Test images that attacks are scored on; None for all.
    steps, restarts : int
        Of the PGD evaluation.
    seeds : int
        Runs of each experiment in the tables.
    """

    name: str
    data: str
    eps: float
    mlp_eps: float
    epochs: dict
    batch_size: int
    lr: float
    images: int | None
    steps: int
    restarts: int
    seeds: int
    augment: str
    precision: str
    vgg_lr: dict
    adam: dict = dataclasses.field(default_factory=dict)
    needs_gpu: bool = False

    @property
    def step_size(self):
        """2/255 for eps 8/255, as the thesis; the same share of eps elsewhere."""
        return self.eps / 4

    def recipe(self, model, method="fgsm_rs", lr=None, activation=None, **changes):
        """The thesis' recipe for a model in this profile, with the named fields changed.

        SGD without momentum, one-cycle triangular rate from ``lr`` / 100 up to ``lr``; without ``lr`` the profile's,
        for "vgg" that of the ``activation``. Models in ``adam`` (the light CNN of chapter 4, not in ``quick``): Adam
        at a constant rate, unless ``lr`` is given.
        """
        adam = self.adam.get(model) if lr is None else None
        if lr is None:
            lr = self.vgg_lr.get(activation, self.lr) if model == "vgg" else self.lr
        models.maker(model)
        epochs = pick(self.epochs, "resnet" if model.startswith("resnet") else model, "model of this profile")
        defaults = dict(
            method=method, epochs=epochs, eps=self.mlp_eps if model == "mlp" else self.eps, lr=(lr / 100, lr),
            batch_size=self.batch_size, augment=self.augment if model.startswith("resnet") else "none",
            precision=self.precision,
        )  # fmt: skip
        if adam is not None:
            defaults |= dict(optimizer="adam", lr=(adam, adam), schedule="constant")
        return Recipe(**defaults | changes)

    def evaluation(self, labels="true", attack="pgd", **changes):
        """The thesis' attack at this profile's size: PGD of 50 steps and 10 restarts in ``paper``."""
        defaults = dict(eps=self.eps, step_size=self.step_size, steps=self.steps, restarts=self.restarts, n=self.images)
        if attack == "fgsm":
            defaults = dict(eps=self.eps, n=self.images)
        return shorten(Evaluation(attack, labels=labels, **defaults | changes))


_THESIS_VGG = {activation: row[1] for activation, row in thesis.VGG.items()}
PROFILES = {
    "quick": Profile(
        "quick", data="digits", eps=0.1, mlp_eps=0.1, epochs={"mlp": 40, "light_cnn": 18, "vgg": 12, "resnet": 18},
        batch_size=64, lr=0.5,
        images=360, steps=10, restarts=2, seeds=1, augment="none", precision="float32",
        vgg_lr=dict(relu=0.5, elu=0.5, swish=1.0, kaf=3.0, kaf_elu=0.5, kaf_swish=1.5, kaf_free=3.0),
    ),
    "small": Profile(
        "small", data="cifar10", eps=8 / 255, mlp_eps=2 / 255,
        epochs={"mlp": 20, "light_cnn": 20, "vgg": 5, "resnet": 2},
        batch_size=128, lr=0.5,
        images=1000, steps=50, restarts=2, seeds=3, augment="crop_flip", precision="float32", vgg_lr=_THESIS_VGG,
        adam={"light_cnn": 0.001},
    ),
    "paper": Profile(
        "paper", data="cifar10", eps=8 / 255, mlp_eps=2 / 255,
        epochs={"mlp": 20, "light_cnn": 20, "vgg": 60, "resnet": 80},
        batch_size=128, lr=0.1,
        images=None, steps=50, restarts=10, seeds=3, augment="crop_flip", precision="bfloat16", vgg_lr=_THESIS_VGG,
        adam={"light_cnn": 0.001}, needs_gpu=True,
    ),
}  # fmt: skip


def resolve_device(device, needs_gpu=False):
    """ "auto", "cpu" or "cuda" to a device that is there.

    Raises
    ------
    ValueError
        CUDA asked for, or needed, and not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(device)):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    there = torch.cuda.is_available()
    if ((needs_gpu and device != "cpu") or str(device).startswith("cuda")) and not there:
        hint = "; profile 'quick' runs on a CPU, or take device 'cpu' and wait for days" if needs_gpu else ""
        raise ValueError(f"no CUDA device found{hint}")
    return ("cuda" if there else "cpu") if device == "auto" else device


def resolve_data(profile, data_root=None):
    """The data spec of a profile: its own, or the folder tree that ``data_root`` is."""
    if data_root and profile.data != "cifar10":
        raise ValueError(f"profile {profile.name} is of {profile.data}: a data root is for profiles small and paper")
    if data_root and (Path(data_root) / "train").is_dir():
        return f"folder:{Path(data_root).absolute()}"
    return profile.data


class Session:
    """What a notebook needs: sizes, data, ``run``, ``save``; one line a notebook instead of five arguments a call.

    Parameters
    ----------
    notebook : str
        Its file name without suffix; figures are named after it.
    profile, seed, device, data_root
        The notebook's parameters. The data are loaded at their first use, see ``kafnb.load_data``.

    The environment's KAFNB_ENGINE and KAFNB_ADDRESS (set by ``python -m kafnb figures --engine ray --address ...``) say
    where models train, see ``kafnb.run``; with "ray" the GPU may be the cluster's alone. With KAFNB_STORED=1
    (``--stored``) nothing is trained or attacked: ``stored`` is True, and tables have what is in the store.

    Raises
    ------
    ValueError, TypeError
        An unknown profile or engine; a device that ``resolve_device`` refuses; a seed that is no whole number or out of
        range; a notebook that cannot be part of a file's name; ``data_root`` with "quick".
    ModuleNotFoundError
        Engine "ray", and Ray is not installed.
    """

    def __init__(self, notebook, profile="quick", seed=0, device="auto", data_root=None):
        if not isinstance(profile, str) or profile not in PROFILES:
            raise ValueError(f"profile must be one of {tuple(PROFILES)}, got {profile!r}")
        seed = checked_seed(int(seed) if isinstance(seed, str) and re.fullmatch(r"-?\d{1,12}", seed) else seed)
        self.notebook, self.profile = file_name(notebook, "notebook"), shorten(PROFILES[profile])
        self.seed = seed
        self.engine = os.environ.get("KAFNB_ENGINE") or "local"
        self.address = os.environ.get("KAFNB_ADDRESS") or None
        engines.check(self.engine)
        self.stored, self.computed_on = os.environ.get("KAFNB_STORED") == "1", set()
        self.device = resolve_device(device, self.profile.needs_gpu and self.engine != "ray" and not self.stored)
        self.workers_device = "auto" if (self.engine, device) == ("ray", "auto") else self.device
        self.data_root = data_root
        self.data_spec = resolve_data(self.profile, data_root)
        self.progress = os.environ.get("KAFNB_PROGRESS", "1") == "1" and sys.stderr is not None
        if profile == "quick":  # small tensors gain nothing from more; and sums are added in the same order everywhere
            torch.set_num_threads(1)
        figures.use_style()
        report_instead_of_stopping(profile != "quick")
        torch.manual_seed(self.seed)

    @property
    def data(self):
        return load_data(self.data_spec, self.data_root)

    @property
    def seeds(self):
        return range(self.seed, self.seed + self.profile.seeds)

    def experiment(self, model, activation, recipe, seed=None, **options):
        """An ``Experiment`` on this session's data; ``options`` go to the model."""
        seed = self.seed if seed is None else seed
        return experiments.Experiment(self.data_spec, model, activation, shorten(recipe), seed, options)

    def _where(self):
        return dict(data_root=self.data_root, device=self.device, progress=self.progress)

    def run(self, runs, evaluations=()):
        """``kafnb.run`` on this session's engine, device and store."""
        where = self._where() | dict(device=self.workers_device, engine=self.engine, address=self.address)
        runs = [runs] if isinstance(runs, experiments.Experiment) else list(runs)
        evaluations = [evaluations] if isinstance(evaluations, Evaluation) else evaluations
        evaluations = list(dict.fromkeys(shorten(e) for e in evaluations))
        table = experiments.run(runs, evaluations, stored=self.stored, **where)
        if self.stored:  # on another machine, maybe
            keys = set(table.experiment)
            self.computed_on |= {
                line for e in runs if e.key in keys for line in experiments.computed_on(e, evaluations)
            }
        return table

    def load(self, experiment):
        """``kafnb.load`` on this session's device and store."""
        if self.stored:
            self.run(experiment)
        return experiments.load(experiment, **self._where())

    def table(self, function, *arguments, **options):
        """The DataFrame ``function(*arguments, **options)``, computed once and then read from the store.

        For measurements of a few seconds or more that are no ``Evaluation``. The key holds the arguments (their
        ``repr``; experiments, numbers, names), the function's own source, the profile, the data and the package's
        source, not what other notebook cells define: pass that as an argument. Not for timings.

        Raises
        ------
        TypeError
            An argument is a tensor, an array or a DataFrame; what the function returns is no DataFrame.
        """
        if odd := [v for v in (*arguments, *options.values()) if getattr(v, "ndim", 0)]:  # whose repr is not all of it
            kind = type(odd[0]).__name__
            raise TypeError(f"arguments of a table are its key: pass numbers, names and lists of such, and no {kind}")
        given = [inspect.getsource(function), repr(arguments), repr(sorted(options.items()))]
        fixed = [str(self.seed), self.profile.name, self.data.fingerprint, code_fingerprint()]
        key = hashlib.sha256("\0".join(given + fixed).encode()).hexdigest()[:10]
        folder = Folder(default_store() / file_name(f"{self.notebook}-{function.__name__}-{key}", "a table's name"))
        with folder.lock():
            if not folder.has("table.csv"):
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed)
                    computed = function(*arguments, **options)
                if not isinstance(computed, pd.DataFrame):
                    raise TypeError(f"{function.__name__} must return a DataFrame, got {type(computed).__name__}")
                folder.write_table("table.csv", computed)
            return folder.read_table("table.csv")

    def save(self, figure, name, table, alt=None):
        """Write figures/<profile>/<notebook>_<name>.png, the numbers drawn as .csv, and its line in the manifest.

        ``alt``: the picture in words, where those that are read from it will not do.
        """
        if self.profile.name == "small":
            figures.footnote(figure, f"profile small, reduced runs: {self.data.name.removeprefix('folder:')}")
        figures.save_figure(
            figure, f"{self.notebook}_{name}", table, home() / "figures" / self.profile.name,
            alt=alt, notebook=self.notebook, profile=self.profile.name, data=self.data.name, seed=self.seed,
            device=device_name(self.device), **provenance(),
            **({"computed_on": sorted(self.computed_on)} if self.computed_on else {}),
        )  # fmt: skip

    def __str__(self):
        n = "all" if self.profile.images is None else self.profile.images
        return (
            f"profile {self.profile.name}: {self.data.name}, {len(self.data.x_train)} training images of "
            f"{self.data.in_channels}x{self.data.image_size}x{self.data.image_size}; attacks scored on {n} test "
            f"images; eps {self.profile.eps:.4g}; seed {self.seed}\n"
            f"running time: {figures.measured(self.notebook, self.profile.name)}\n"
            f"in profile paper, on a GPU: {figures.measured(self.notebook, 'paper')}"
        )
