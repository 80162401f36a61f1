"""What an attack raises: one number an image, the higher the more wrong."""

import math

import torch.nn.functional as F


def cross_entropy(logits, y):
    """-log softmax(z)_y."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits, y):
    """max_{j != y} z_j - z_y: positive if and only if the image is misclassified."""
    own = logits.gather(1, y[:, None])
    return (logits.scatter(1, y[:, None], -math.inf).amax(1, keepdim=True) - own)[:, 0]


def dlr(logits, y):
    """Margin over the distance of the largest and third largest logit: no scaling of the logits hides its gradient.

    Source: Croce and Hein, ICML 2020, arXiv:2003.01690, equation 6.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {logits.shape[1]}")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


LOSSES = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def towards(logits, y, target, loss):
    """The same three, raised to reach ``target`` from the true label y (MultiTargeted: arXiv:1910.09338)."""
    if loss == "ce":
        return -cross_entropy(logits, target)
    lead = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    if loss == "margin":
        return lead
    if logits.shape[1] < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, got {logits.shape[1]}")
    top = logits.topk(4, dim=1).values
    return lead / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
