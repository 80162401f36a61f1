r"""How fast a network's answers change near given images, found by looking: lower bounds, and an estimate.

For the label y and another class j, the margin m_j = f_y - f_j cannot fall to zero within a ball while

.. math:: m_j(x) > \varepsilon \sup_{z \in B(x, \varepsilon)} \lVert \nabla m_j(z) \rVert_*,

with the dual norm: L1 for an L-inf ball, L2 for an L2 ball, L-inf for an L1 ball. ``gradient_norms`` gives the norm at
points of the ball, which is at most the supremum; ``intervals.local_bound`` a number that is at least that; ``clever``
a guess.
"""

import warnings

import numpy as np
import torch
from scipy import stats

from .. import checks
from ..attacks import NORMS, project, random_delta, still


def dual(g, norm):
    """(N, *) -> (N,)."""
    return torch.linalg.vector_norm(g.flatten(1), {"linf": 1, "l2": 2, "l1": float("inf")}[norm], dim=1)


def check_ball(norm, eps):
    checks.pick(NORMS, norm, "norm")
    checks.radius(eps, norm)


def check_images(model, x, box=True):
    checks.instance(model, torch.nn.Module, "model")
    if len(checks.images(x, box=box)) == 0:
        raise ValueError("at least one image is needed, got none")


def gradient_norms(model, x, y, *, eps=0.0, norm="linf", samples=0, seed=0):
    """Dual norm of the gradient of each margin f_y - f_j, the largest over x and random points of its ball.

    Parameters
    ----------
    x, y : Tensor, shapes (N, C, H, W) and (N,)
    eps : float
        Radius of the ball that ``samples`` points an image are drawn from, pixel units.
    norm : {"linf", "l2", "l1"}
        Of the ball; gradients are measured in the dual norm: L1, L2 or L-inf.

    Returns
    -------
    Tensor, shape (N, classes)
        0 in column y. A lower bound of the local Lipschitz constant.
    """
    check_ball(norm, eps)
    check_images(model, x)
    checks.labels(y, len(x))
    checks.count(samples, "samples", low=0)
    checks.seed(seed)
    best = None
    with still(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for i in range(samples + 1):
            z = (project(x, random_delta(x, eps, norm), eps, norm) if i else x).detach().requires_grad_()
            with torch.enable_grad():
                with checks.forward(z):
                    logits = model(z)
                checks.labels(y, classes=logits.shape[1])
                top = logits.gather(1, y[:, None])
                columns = [
                    dual(torch.autograd.grad((top[:, 0] - logits[:, j]).sum(), z, retain_graph=True)[0], norm)
                    for j in range(logits.shape[1])
                ]
            found = torch.stack(columns, 1)
            best = found if best is None else torch.maximum(best, found)
    return best


def jacobian_norms(model, x, *, iterations=30, seed=0):
    """Spectral norm of the Jacobian of the logits at each image, by power iteration: (N,).

    Any of them, times 1 - rounding, is a lower bound of the network's global L2 constant. J v is had by
    differentiating J'u in u, so nothing of the Jacobian's size is built.
    """
    check_images(model, x, box=False)
    checks.count(iterations, "iterations")
    checks.seed(seed)
    with still(model), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        z = x.detach().requires_grad_()
        with checks.forward(z):
            logits = model(z)
        u = torch.zeros_like(logits, requires_grad=True)
        (pulled,) = torch.autograd.grad(logits, z, u, create_graph=True)  # J'u
        v = torch.randn_like(x)
        value = x.new_zeros(len(x))
        for _ in range(iterations):
            v = v / v.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, *[1] * (x.ndim - 1))
            (jv,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            value = jv.norm(dim=1)  # of a unit vector: never above the norm
            (v,) = torch.autograd.grad(logits, z, jv, retain_graph=True)
        return value.detach()


def clever(model, x, *, eps, norm="linf", batches=30, samples=16, seed=0):
    """CLEVER score of one image: an estimate of the radius within which no other class wins. Not a certificate.

    For each other class, the largest gradient norms of ``batches`` samples of ``samples`` points each are fitted by a
    reverse Weibull distribution, whose end is taken for the local Lipschitz constant. Where the fit runs away (an end
    of more than ten times the largest norm seen), that largest norm is taken instead. The Adversarial Robustness
    Toolbox has CLEVER too; it returns 0 in that case, and is tested against.

    Parameters
    ----------
    x : Tensor, shape (C, H, W)
    eps : float
        Radius of the ball searched, and the largest score.

    Returns
    -------
    float, pixel units of the ball's norm

    Source: Weng et al., ICLR 2018, arXiv:1801.10578.
    """
    check_ball(norm, eps)
    checks.images(x, dims=3)
    check_images(model, x[None])
    checks.count(batches, "batches", low=2)
    checks.count(samples, "samples")
    checks.seed(seed)
    points = x[None].expand(batches * samples, *x.shape)
    with torch.random.fork_rng(), still(model), torch.no_grad():
        torch.manual_seed(seed)
        points = project(points, random_delta(points, eps, norm), eps, norm)
        with checks.forward(x[None]):
            logits = model(x[None])[0].double()
        if logits.isnan().any():
            raise ValueError("the model's logits are NaN: it has no score")
        y = logits.argmax()
    norms = gradient_norms(model, points, y.expand(len(points)), norm=norm).double()
    largest = norms.view(batches, samples, -1).amax(1).cpu().numpy()  # (batches, classes)
    score = eps
    for j in range(len(logits)):
        constant = seen = largest[:, j].max()
        if j == y or seen == 0:
            continue
        if np.ptp(largest[:, j]) > 1e-6 * seen:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                _, end, _ = stats.weibull_min.fit(-largest[:, j] / seen)
            constant = -end * seen if 1 <= -end <= 10 else seen
        score = min(score, ((logits[y] - logits[j]) / constant).item())
    return score
