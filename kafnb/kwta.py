"""k-winners-take-all: the layer keeps its k largest values and zeroes the rest.

Source: Xiao, Zhong, Zheng, "Enhancing adversarial defense by k-winners-take-all", ICLR 2020, arXiv:1905.10510
"""

import torch
from torch import nn

from .checks import number


class KWTA(nn.Module):
    """Keep the k largest activations of each example's whole layer, k = ratio * size, at least 1.

    Parameters
    ----------
    ratio : float
        In (0, 1]; 1 is the identity. May be changed between epochs (the paper lowers it step by step).

    Shape
    -----
    (N, *) -> same. Values equal to the k-th largest are all kept.
    """

    def __init__(self, ratio):
        super().__init__()
        self.ratio = number(ratio, "KWTA ratio", above=0, high=1)

    def forward(self, x):
        flat = x.flatten(1)
        k = max(1, round(self.ratio * flat.shape[1]))
        # the k-th largest of n is the (n - k + 1)-th smallest; the threshold is a constant for the gradient
        threshold = flat.detach().kthvalue(flat.shape[1] - k + 1, dim=1).values
        return torch.where(x >= threshold.view(-1, *[1] * (x.ndim - 1)), x, 0)

    def extra_repr(self):
        return f"{self.ratio}"
