"""The thesis' own ways, written by us, so that notebook 17 can measure what each was worth. Not for other use."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from .attacks import ascend, frozen
from .attacks.adaptive import swapped
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
        self.model = swapped(model, KAF, Float16KAF)
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
    """k-WTA as the thesis computed it: channels-last is transposed, thresholded, reshaped without going back."""

    def forward(self, x):
        if x.ndim != 4:
            return super().forward(x)
        winners = super().forward(x)  # (N, C, H, W), the layout in which the original thresholds
        n, c, h, w = x.shape
        return winners.reshape(n, h, w, c).permute(0, 3, 1, 2)  # read as if it were (N, H, W, C)


def frozen_start(model, x, y, recipe, state):
    """FGSM-RS as the thesis trained it: the random start was drawn once and served every batch of every epoch."""
    once = torch.Generator().manual_seed(0)
    delta = torch.empty(recipe.batch_size, *x.shape[1:]).uniform_(-recipe.eps, recipe.eps, generator=once)
    delta = delta[: len(x)].to(x.device)
    step_size = 1.25 * recipe.eps if recipe.step_size is None else recipe.step_size
    with frozen(model):
        x_adv = ascend(model, x, y, delta, eps=recipe.eps, step_size=step_size, steps=1)
    logits = model(x_adv)
    yield logits, F.cross_entropy(logits, y)


def best_restart(stands):
    """The thesis' rule for restarts: of bool (restarts, n), the one row in which the fewest images stand."""
    return stands[stands.sum(1).argmin()]


def activation_first(model):
    """In place, in every Sequential: (BN, activation) becomes (activation, BN), as the thesis had its ReLU networks."""
    for m in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        layers = list(m._modules.items())
        for (a, norm), (b, act) in itertools.pairwise(layers):
            if isinstance(norm, nn.BatchNorm2d):
                m._modules[a], m._modules[b] = act, norm
    return model
