"""Training methods: what is learned from a batch. One short generator each, read like its paper's algorithm.

``method(model, x, y, recipe, state)`` yields (logits, loss) once an optimiser step; the loop in ``training`` runs
``loss.backward()`` and steps the optimiser between yields. ``state`` is a dict that lives for one epoch; the loop
keeps ``state["progress"]``, the share of all training done, in [0, 1].
"""

import copy
import time

import torch
from torch.nn import functional as F

from .attacks import ascend, frozen, input_gradient, project, random_delta, still
from .certify.bounds import interval_bounds
from .kaf import KAF
from .lipschitz import activation_constant, chain_bound
from .lipschitz.kaf import kaf_steepest
from .lipschitz.maps import linear_map
from .probes import shapes


class Autocast(torch.nn.Module):
    """The model with its forward pass in a lower precision; logits in float32."""

    def __init__(self, model, dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x):
        with torch.autocast(x.device.type, self.dtype):
            return self.model(x).float()


def _plain(model):
    """The model itself, without autocast: bounds rounded to 8 bits are none."""
    return model.model if isinstance(model, Autocast) else model


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
    most = max(recipe.batch_size, len(x))
    delta = state.setdefault("delta", torch.zeros(most, *x.shape[1:], device=x.device))[: len(x)]
    for _ in range(recipe.replays):
        x_adv = (x + delta).clamp(0, 1).requires_grad_()
        yield _learn(model, x_adv, y)  # the loop's backward pass leaves the input's gradient in x_adv.grad
        delta.add_(recipe.eps * x_adv.grad.sign()).clamp_(-recipe.eps, recipe.eps)


def n_fgsm(model, x, y, recipe, state):
    """FGSM from a strongly noised image, not projected back onto the ball: a cheap remedy against the collapse.

    ``strength`` k (default 2): the noise is uniform in [-k eps, k eps]. (arXiv:2202.01181, algorithm 1)
    """
    k = 2.0 if recipe.strength is None else recipe.strength
    noisy = (x + random_delta(x, k * recipe.eps)).clamp(0, 1)
    with frozen(model):
        x_adv = (noisy + recipe.eps * input_gradient(model, noisy, y).sign()).clamp(0, 1)
    yield _learn(model, x_adv, y)


def grad_align(model, x, y, recipe, state):
    """FGSM, and a penalty 1 - cos of the angle between input gradients at the image and at a random point near it.

    ``strength`` lambda (default 0.2) weighs the penalty. It asks for a second derivative. (arXiv:2007.02617)
    """
    there = []
    for start in (x, x + random_delta(x, recipe.eps)):
        start = start.detach().requires_grad_()
        loss = F.cross_entropy(model(start), y, reduction="sum")
        there.append(torch.autograd.grad(loss, start, create_graph=True)[0].flatten(1))
    x_adv = (x + recipe.eps * there[0].detach().sign().view_as(x)).clamp(0, 1)
    logits, loss = _learn(model, x_adv, y)
    strength = 0.2 if recipe.strength is None else recipe.strength
    yield logits, loss + strength * (1 - F.cosine_similarity(*there)).mean()


def trades(model, x, y, recipe, state):
    """Cross-entropy on the clean image, and its answer's divergence from that to the worst image near it.

    ``strength`` beta (default 6) weighs the second part. As in the authors' code the inner problem is solved in eval
    mode from a start of normal noise 0.001. (arXiv:1901.08573, algorithm 1)
    """
    step_size = 2.5 * recipe.eps / recipe.steps if recipe.step_size is None else recipe.step_size
    with still(model):
        clean = model(x)
        x_adv = project(x, 0.001 * torch.randn_like(x), recipe.eps)
        for _ in range(recipe.steps):
            x_adv.requires_grad_()
            gradient = torch.autograd.grad(_divergence(model(x_adv), clean), x_adv)[0]
            x_adv = project(x, x_adv.detach() + step_size * gradient.sign() - x, recipe.eps)
    (answer, loss), logits = _learn(model, x, y), model(x_adv)
    beta = 6.0 if recipe.strength is None else recipe.strength
    yield logits, loss + beta * _divergence(logits, answer) / len(x)


def _divergence(logits, answer):
    """KL(softmax(answer) || softmax(logits)), summed over the batch."""
    return F.kl_div(logits.log_softmax(1), answer.log_softmax(1), reduction="sum", log_target=True)


def interval(model, x, y, recipe, state):
    """Interval-bound training: cross-entropy of the worst logits that interval arithmetic allows in the ball.

    For the first tenth of training on clean images alone; then eps grows linearly from 0, and the weight of the clean
    loss falls from 1 to ``strength`` kappa (default 0.5), until half of training is done. (arXiv:1810.12715)
    """
    ramp = min(max((state.get("progress", 1.0) - 0.1) / 0.4, 0.0), 1.0)
    kappa = 1 - ramp * (1 - (0.5 if recipe.strength is None else recipe.strength))
    logits, loss = _learn(model, x, y)
    if ramp > 0:
        eps = ramp * recipe.eps
        low, high = interval_bounds(_plain(model), (x - eps).clamp(0, 1), (x + eps).clamp(0, 1), pieces=8)
        worst = torch.where(F.one_hot(y, low.shape[1]).bool(), low, high)
        loss = kappa * loss + (1 - kappa) * F.cross_entropy(worst, y)
    yield logits, loss


def gaussian(model, x, y, recipe, state):
    """Normal noise of standard deviation ``strength`` (default 0.25, pixel units) on every image, not clipped.

    The training that randomized smoothing needs. (arXiv:1902.02918)
    """
    yield _learn(model, x + (0.25 if recipe.strength is None else recipe.strength) * torch.randn_like(x), y)


def lipschitz(model, x, y, recipe, state):
    """Cross-entropy + strength * log(1 + product bound of the network): margins are paid for in slope. Default 0.1.

    The bound is ``lipschitz.network_bound``'s, kept cheap: spectral norms by one step of power iteration a batch from
    where the last batch left them, KAFs' slopes on a grid. (Cf. arXiv:1705.10941, which penalises squared norms, and
    arXiv:1802.04034, which penalises the product through the margin.)
    """
    net = _plain(model)
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


METHODS = {
    "standard": standard, "fgsm": fgsm, "fgsm_rs": fgsm_rs, "pgd": pgd, "free": free, "n_fgsm": n_fgsm,
    "grad_align": grad_align, "trades": trades, "interval": interval, "gaussian": gaussian,
    "lipschitz": lipschitz,
}  # fmt: skip


def cost(model, recipes, x, y, rounds=15):
    """CPU seconds of one learned batch of each method, measured in turns so that a busy machine slows all alike.

    Parameters
    ----------
    model : Module
        Left as it is: each method works on a copy.
    recipes : dict
        Name -> Recipe.
    rounds : int
        The least of so many is taken, what the machine does when nothing disturbs it; two more before do not count.

    Returns
    -------
    dict
        Name -> (seconds, optimiser steps) of one batch.
    """
    nets = {name: copy.deepcopy(model).train() for name in recipes}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-6) for name, net in nets.items()}
    seconds, steps = {name: [] for name in recipes}, {}
    with torch.random.fork_rng():
        for _ in range(rounds + 2):
            for name, recipe in recipes.items():
                started, steps[name] = time.process_time(), 0
                for _, loss in METHODS[recipe.method](nets[name], x, y, recipe, {"progress": 1.0}):
                    optimizers[name].zero_grad()
                    loss.backward()
                    optimizers[name].step()
                    steps[name] += 1
                seconds[name].append(time.process_time() - started)
    return {name: (min(s[2:]), steps[name]) for name, s in seconds.items()}
