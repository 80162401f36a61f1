"""Evaluations: a frozen description of each measurement of a trained model, by its attack."""

import dataclasses
import functools
import typing

from . import attacks
from .attacks import adaptive
from .attacks import library as library_attacks
from .attacks.balls import NORMS
from .attacks.losses import LOSSES
from .checks import count, number, pick, radius, seed, shown
from .evaluate import LABELS, clean_accuracy, robust_accuracy

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
    "fgsm": "FGSM", "pgd": "PGD", "apgd": "APGD", "autoattack": "AutoAttack", "square": "Square", "cw": "C&W",
    "deepfool": "DeepFool",
}  # fmt: skip


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

    Raises
    ------
    ValueError, TypeError
        An unknown attack, norm, loss, ``labels`` or ``targeted``; a number of another type or out of range, eps > 1 in
        L-inf too; ``loss`` or ``targeted`` for an attack that takes none.
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
    targeted: typing.Literal[False, "all"] = False
    queries: int = 5000

    def __post_init__(self):
        if self.attack != "none":
            pick(ATTACKS, self.attack, "attack")
        for field, low in dict(steps=1, restarts=1, n=1, queries=1).items():
            object.__setattr__(self, field, count(getattr(self, field), field, low, optional=field == "n"))
        object.__setattr__(self, "step_size", number(self.step_size, "step_size", low=0, optional=True))
        object.__setattr__(self, "seed", seed(self.seed))
        object.__setattr__(self, "early_stop", bool(self.early_stop))
        pick(NORMS, self.norm, "norm")
        norm = "l2" if self.attack in ("cw", "deepfool") else self.norm
        if not (norm != self.norm and self.eps == float("inf")):  # no limit
            object.__setattr__(self, "eps", radius(self.eps, norm))
        pick(LOSSES, self.loss, "loss")
        if not isinstance(self.targeted, bool | str) or self.targeted not in (
            False,
            "all",
        ):  # towards the labels themselves it would be no attack
            raise ValueError(f"targeted must be False or 'all', got {shown(self.targeted)}")
        takes = ATTACKS[self.attack][1] if self.attack in ATTACKS else ()
        for field, default in dict(loss="ce", targeted=False).items():
            if getattr(self, field) != default and field not in takes:
                raise ValueError(f"the attack {self.attack!r} takes no {field}: leave it out")
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
