"""A detector of adversarial images on a network's activations, and the attack that knows about it."""

import torch
from torch import nn

from .attacks import project, random_delta, still
from .attacks.losses import margin
from .checks import count, forward, images, instance, labels, radius
from .probes import activation_layers, capture


def features(model, x, layers):
    """(logits, mean and standard deviation of every channel of the named layers (N, features)), differentiable in x."""
    with capture(model, layers) as found:
        logits = model(x)
    parts = []
    for a in found.values():
        flat = a.flatten(2) if a.ndim > 2 else a[..., None]  # (N, C, P)
        parts += [flat.mean(2), flat.var(2, unbiased=False).add(1e-8).sqrt()] if flat.shape[2] > 1 else [flat[..., 0]]
    return logits, torch.cat(parts, 1)


class Detector:
    """Logistic regression on activations: positive scores say "adversarial".

    In the spirit of Metzen et al., ICLR 2017, arXiv:1702.04267, with a linear detector on channel statistics.

    Parameters
    ----------
    model : Module
    clean, adversarial : Tensors, shape (N, C, H, W)
        What it is fitted to; scikit-learn does that.
    """

    def __init__(self, model, clean, adversarial):
        from sklearn.linear_model import LogisticRegression

        self.model = instance(model, nn.Module, "model")
        if len(images(clean)) == 0 or len(images(adversarial)) == 0:
            raise ValueError("a detector needs clean and adversarial images, at least one of each")
        with still(model), torch.no_grad(), forward(clean):
            self.layers = activation_layers(model, clean)
            both = torch.cat([features(model, v, self.layers)[1] for v in (clean, adversarial)]).double()
        self.mean, self.scale = both.mean(0), both.std(0).clamp_min(1e-6)
        target = [0] * len(clean) + [1] * len(adversarial)
        fitted = LogisticRegression(C=0.1, max_iter=2000).fit(((both - self.mean) / self.scale).cpu().numpy(), target)
        self.weight = torch.as_tensor(fitted.coef_[0], device=both.device)
        self.bias = float(fitted.intercept_[0])

    def both(self, x):
        """(logits of the model, score of the detector), differentiable; the model in the mode it is in."""
        logits, f = features(self.model, x, self.layers)
        return logits, ((f.double() - self.mean) / self.scale) @ self.weight + self.bias

    def score(self, x):
        """Log-odds that each image is adversarial, float64 (N,)."""
        with still(self.model), torch.no_grad():
            return self.both(x)[1]


@torch.enable_grad()
def joint_attack(detector, x, y, *, eps, steps=40):
    """Ascent on the margin and on minus the detector's score at once: images that are wrong and look clean.

    Every step raises ``min(max_{j != y} z_j - z_y, 0.1) + log sigmoid(-score)``: once an image is wrong by
    0.1, only its score counts (after Carlini and Wagner, AISec 2017, arXiv:1705.07263). Returns of each image the point
    along the way that is wrong with the lowest score; the last point if there is none.
    """
    instance(detector, Detector, "detector")
    radius(eps, "linf")
    count(steps, "steps")
    labels(y, len(images(x)))
    best_score = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    with still(detector.model):
        x_adv = project(x, random_delta(x, eps), eps)
        best = x_adv.clone()
        for i in range(steps + 1):
            x_adv = x_adv.detach().requires_grad_()
            with forward(x):
                logits, score = detector.both(x_adv)
            if i == 0:
                labels(y, classes=logits.shape[1])
            lead = margin(logits, y)  # > 0: wrong
            better = (lead > 0) & (score < best_score)
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv.detach(), best)
            best_score = torch.where(better, score.detach(), best_score)
            if i < steps:
                objective = nn.functional.logsigmoid(-score) + lead.clamp_max(0.1)
                gradient = torch.autograd.grad(objective.sum(), x_adv)[0]
                x_adv = project(x, x_adv.detach() + 2.5 * eps / steps * gradient.sign() - x, eps)
        none = torch.isinf(best_score).view(-1, *[1] * (x.ndim - 1))
        return torch.where(none, x_adv.detach(), best)
