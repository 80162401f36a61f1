"""The thesis' own ways, written by us, so that notebook 17 can measure what each was worth. Not for other use."""

import torch
from torch import nn

from .adaptive import _swapped
from .kaf import KAF
from .kwta import KWTA


class Float16KAF(nn.Module):
    """A KAF of which every step runs in float16: dictionary, bandwidth and coefficients cast, kernels underflow."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        half, shape = torch.float16, (1, -1, *[1] * (x.ndim - 2))
        points, gamma = self.layer.dictionary.to(half), self.layer.bandwidth.to(half).view(-1, 1)
        alpha = self.layer.alpha.to(half)
        z, out = x.to(half), 0
        for i in range(alpha.shape[1]):
            distance = z - points[:, i].view(shape)
            out = out + alpha[:, i].view(shape) * torch.exp(-gamma.view(shape) * distance * distance)
        return out.to(x.dtype)


class Float16(nn.Module):
    """A network with float16 KAFs whose signals and gradients all pass through float16, without any loss scaling.

    The multiplications of convolutions and dense layers sum up in float32, as on a GPU.
    """

    def __init__(self, model):
        super().__init__()
        self.model = _swapped(model, KAF, Float16KAF)
        for m in self.model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d | Float16KAF):
                m.register_forward_hook(_rounded)

    def forward(self, x):
        return self.model(_Round.apply(x)).float()


class _Round(torch.autograd.Function):
    """To float16 and back, the gradient too."""

    @staticmethod
    def forward(ctx, x):
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g.half().to(g.dtype)


def _rounded(module, inputs, output):
    return _Round.apply(output)


class ScrambledKWTA(KWTA):
    """k-WTA as the thesis computed it: a channels-last layer is transposed, thresholded, reshaped without going back."""

    def forward(self, x):
        if x.ndim != 4:
            return super().forward(x)
        winners = super().forward(x)  # (N, C, H, W), the layout in which the original thresholds
        n, c, h, w = x.shape
        return winners.reshape(n, h, w, c).permute(0, 3, 1, 2)  # read as if it were (N, H, W, C)
