"""What a caller registered (an activation, a method, an optimizer of their own), and how another process gets it."""

from .activations import ACTIVATIONS
from .methods import METHODS
from .recipe import OPTIMIZERS

TABLES = {"activation": ACTIVATIONS, "method": METHODS, "optimizer": OPTIMIZERS}
_OURS = {kind: dict(known) for kind, known in TABLES.items()}


def yours(experiments):
    """What these experiments use that was registered after import, by kind and name: other processes lack it."""
    used = {kind: {getattr(e if kind == "activation" else e.recipe, kind) for e in experiments} for kind in TABLES}
    return {
        kind: {n: known[n] for n in used[kind] & set(known) if known[n] is not _OURS[kind].get(n)}
        for kind, known in TABLES.items()
    }


def register(own):
    """Here, what ``yours`` found in another process."""
    for kind, known in own.items():
        TABLES[kind].update(known)
