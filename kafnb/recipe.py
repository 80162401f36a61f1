"""How a model is trained, as a frozen description, and the schedules that it names."""

import dataclasses
import math

import torch

from .checks import count, instance, number, pick, radius
from .methods import METHODS

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained. Lengths in epochs, eps and step_size in pixel units of [0, 1].

    Attributes
    ----------
    method : str
        A key of ``methods.METHODS``.
    lr : (float, float)
        Lowest and highest learning rate of the schedule.
    schedule : {"triangular", "constant"}
        One cycle low -> high -> low, or high throughout. ``peak`` is where in the cycle the top stands.
    l2 : float, optional
        Penalty lambda * sum(w^2) over the model's ``l2_layers``, or all dense and convolutional ones where it names
        none; None takes the model's own lambda.
    steps, step_size : of "pgd" (default step 2.5 eps / steps) and of "fgsm_rs" (default 1.25 eps).
    replays : m of "free"; its epochs are divided by it.
    strength : float, optional
        The number that some methods turn on (weight of a penalty, size of a noise): see each; None is its default.
    augment : {"none", "crop", "crop_flip"}
        Random crop after padding by an eighth of the image (4 for 32 pixels), and horizontal flip.
    precision : {"float32", "bfloat16", "float16"}
        Of the forward passes, by autocast; float16 scales the loss.
    clip : float, optional
        Largest Euclidean norm of the gradient in all parameters; longer ones are scaled down to it.
    monitor : bool
        After each epoch, the norms of ``gradients.measure`` on the first training images go into the history
        (columns "gradient blocks.0", ...), with a warning once one would overflow float16; and every step is
        checked: a gradient that is not finite stops the training, with the layer's name (not under float16, whose
        scaled gradients overflow by design now and then).
    track : int
        After each epoch, clean and PGD-10 accuracy on the first ``track`` test images go into the history.
    watch : int
        After each epoch, FGSM and PGD-10 accuracy on the first ``watch`` training images go into the history, and a
        warning is given when ``collapse.collapsed`` finds that training learns to fool its own attack.
    kwta_start : float, optional
        Ratio that k-WTA layers have for the first 40 % of training; then it falls in steps of about 0.01 to each
        layer's own. With 50 epochs, 0.30 and layers of 0.15: 20 epochs, then a step every 2, as the thesis trains.

    Raises
    ------
    ValueError, TypeError
        An unknown name; a number of another type or out of range, eps > 1 too; ``lr`` that is not (low, high) with
        0 <= low <= high.
    """

    method: str = "standard"
    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "sgd"
    momentum: float = 0.0
    lr: tuple = (0.0, 0.1)
    schedule: str = "triangular"
    peak: float = 0.5
    l2: float | None = None
    eps: float = 8 / 255
    steps: int = 7
    step_size: float | None = None
    replays: int = 8
    strength: float | None = None
    augment: str = "none"
    precision: str = "float32"
    clip: float | None = None
    monitor: bool = False
    track: int = 0
    watch: int = 0
    kwta_start: float | None = None

    def __post_init__(self):
        rates = [number(v, "lr") for v in instance(self.lr, list | tuple, "lr", ": (low, high)")]
        object.__setattr__(self, "lr", tuple(float(v) for v in rates))
        for field, low in dict(epochs=0, batch_size=2, steps=1, replays=1, track=0, watch=0).items():
            object.__setattr__(self, field, count(getattr(self, field), field, low))
        object.__setattr__(self, "eps", radius(self.eps, "linf"))
        for field, low in dict(momentum=0, eps=0, l2=0, step_size=0, strength=0, clip=0).items():
            optional = field not in ("momentum", "eps")
            object.__setattr__(self, field, number(getattr(self, field), field, low, optional=optional))
        object.__setattr__(self, "peak", number(self.peak, "peak", low=0, high=1))
        object.__setattr__(self, "monitor", bool(self.monitor))
        for field, table in (("method", METHODS), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            pick(table, getattr(self, field), field)
        if self.schedule not in ("triangular", "constant"):
            raise ValueError(f"schedule must be 'triangular' or 'constant', got {self.schedule!r}")
        if self.augment not in ("none", "crop", "crop_flip"):
            raise ValueError(f"augment must be 'none', 'crop' or 'crop_flip', got {self.augment!r}")
        if len(self.lr) != 2 or not 0 <= self.lr[0] <= self.lr[1] < float("inf"):
            raise ValueError(f"lr must be (low, high) with 0 <= low <= high, got {self.lr}")
        object.__setattr__(self, "kwta_start", number(self.kwta_start, "kwta_start", above=0, high=1, optional=True))


OPTIMIZERS = {
    "sgd": lambda groups, recipe: torch.optim.SGD(groups, lr=recipe.lr[1], momentum=recipe.momentum),
    "adam": lambda groups, recipe: torch.optim.Adam(groups, lr=recipe.lr[1]),
}


def epochs_of(recipe):
    """Passes over the data: the recipe's epochs, for "free" divided by its replays."""
    return -(-recipe.epochs // recipe.replays) if recipe.method == "free" else recipe.epochs


def triangular(step, total, low, high, peak=0.5):
    """Learning rate of a one-cycle triangle at ``step`` of ``total``: low, up to high at ``peak``, back to low."""
    top = peak * total
    rising = step / top if step < top else (total - step) / (total - top)
    return low + (high - low) * rising


def kwta_ratio(epoch, epochs, start, end):
    """Ratio of a k-WTA layer in ``epoch`` (from 0) of ``epochs``; see ``Recipe.kwta_start``."""
    steps, done = max(1, round(abs(start - end) / 0.01)), (epoch + 0.5) / epochs
    return start + (end - start) * math.ceil(max(0.0, (done - 0.4) / 0.6) * steps) / steps


def optimizer_of(model, recipe):
    """The recipe's optimiser; lambda * sum(w^2) in the loss is a weight decay of 2 lambda in the gradient."""
    l2 = getattr(model, "l2", 0.0) if recipe.l2 is None else recipe.l2
    types = getattr(model, "l2_layers", ()) or ((torch.nn.Conv2d, torch.nn.Linear) if recipe.l2 else ())
    decayed = [m.weight for m in model.modules() if isinstance(m, types)] if types else []
    ids = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return OPTIMIZERS[recipe.optimizer](
        [{"params": decayed, "weight_decay": 2 * l2}, {"params": rest, "weight_decay": 0.0}], recipe
    )
