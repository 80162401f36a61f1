"""Training methods: what is learned from a batch. One short generator each, read like its paper's algorithm.

``method(model, x, y, recipe, state)`` yields (logits, loss) once an optimiser step; the loop in ``training`` runs
``loss.backward()`` and steps the optimiser between yields. ``state`` is a dict that lives for one epoch; the loop
keeps ``state["progress"]``, the share of all training done, in [0, 1].
"""

import torch
from torch.nn import functional as F

from .attacks import ascend, frozen, random_delta
from .kaf import KAF
from .lipschitz import activation_constant, chain_bound
from .lipschitz_kaf import kaf_steepest
from .lipschitz_maps import linear_map, shapes


def _learn(model, x, y):
    logits = model(x)
    return logits, F.cross_entropy(logits, y)


def standard(model, x, y, recipe, state):
    """The images as they are."""
    yield _learn(model, x, y)


def fgsm(model, x, y, recipe, state):
    """One signed step of size eps from the image itself. Collapses: see notebook 11. (arXiv:1412.6572)"""
    with frozen(model):
        x_adv = ascend(model, x, y, torch.zeros_like(x), eps=recipe.eps, step_size=recipe.eps, steps=1)
    yield _learn(model, x_adv, y)


def fgsm_rs(model, x, y, recipe, state):
    """Fast adversarial training: a fresh uniform start, one step of 1.25 eps, projected. (arXiv:2001.03994)"""
    step_size = 1.25 * recipe.eps if recipe.step_size is None else recipe.step_size
    with frozen(model):
        x_adv = ascend(model, x, y, random_delta(x, recipe.eps), eps=recipe.eps, step_size=step_size, steps=1)
    yield _learn(model, x_adv, y)


def pgd(model, x, y, recipe, state):
    """Madry's adversarial training: PGD from a random start. (arXiv:1706.06083)"""
    step_size = 2.5 * recipe.eps / recipe.steps if recipe.step_size is None else recipe.step_size
    with frozen(model):
        delta = random_delta(x, recipe.eps)
        x_adv = ascend(model, x, y, delta, eps=recipe.eps, step_size=step_size, steps=recipe.steps)
    yield _learn(model, x_adv, y)


def free(model, x, y, recipe, state):
    """Free adversarial training: each batch m times, one backward pass for weights and perturbation both.

    The perturbation goes on from batch to batch within an epoch. (arXiv:1904.12843)
    """
    delta = state.setdefault("delta", torch.zeros(recipe.batch_size, *x.shape[1:], device=x.device))[: len(x)]
    for _ in range(recipe.replays):
        x_adv = (x + delta).clamp(0, 1).requires_grad_()
        yield _learn(model, x_adv, y)  # the loop's backward pass leaves the input's gradient in x_adv.grad
        delta.add_(recipe.eps * x_adv.grad.sign()).clamp_(-recipe.eps, recipe.eps)


def lipschitz(model, x, y, recipe, state):
    """Cross-entropy + strength * log(1 + product bound of the network): margins are paid for in slope. Default 0.1.

    The bound is ``lipschitz.network_bound``'s, kept cheap: spectral norms by one step of power iteration a batch from
    where the last batch left them, KAFs' slopes on a grid. (Cf. arXiv:1705.10941, which penalises squared norms, and
    arXiv:1802.04034, which penalises the product through the margin.)
    """
    net = getattr(model, "model", model)  # without autocast
    if "shapes" not in state:
        state["shapes"] = shapes(net, x)

    def norm(layer, shape, scale):
        apply, transpose, _ = linear_map(layer, shape, scale)
        size = shape if len(shape) == 3 else (layer.in_features,)
        with torch.no_grad():
            v = state.get(layer)
            for _ in range(5 if v is None else 1):
                v = torch.randn(1, *size, dtype=torch.float64, device=x.device) if v is None else transpose(apply(v))
                v = v / v.norm().clamp_min(1e-12)
            state[layer] = v
        return apply(v).norm()

    def constant(layer):
        return kaf_steepest(layer).double() if isinstance(layer, KAF) else activation_constant(layer)

    bound = chain_bound([net], state["shapes"], norm, constant)
    logits, loss = _learn(model, x, y)
    yield logits, loss + (0.1 if recipe.strength is None else recipe.strength) * bound.log1p().to(loss.dtype)


METHODS = {"standard": standard, "fgsm": fgsm, "fgsm_rs": fgsm_rs, "pgd": pgd, "free": free, "lipschitz": lipschitz}
