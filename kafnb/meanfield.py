r"""Mean-field theory of gradients in a residual network with batch normalisation.

At initialisation the weights of a convolution are independent of what comes in. Averaged over them,

* forward, an output of the convolution is a Gaussian whose variance is 2 / (9 C) times the sum, over the 9 C inputs it
  sees, of their squared deviation from the mean of all images (He's initialisation), each image for itself; what all
  images have in common stays common,
* backward, the squared gradient of an input is 2 / (9 C) times the sum of the squared gradients of the outputs that
  see it,

and these two rules replace every convolution here. Normalisation divides squared gradients by the variance it
removed, and takes away the share of the two directions that it fixes; an activation multiplies them by f'(x)^2, a sum
of two paths hands them to both. One number a unit is enough: the network is run once on samples of the forward
distribution, and autograd carries *squared* gradients back through it. That images of one batch come to deviate
unequally from its mean has to be kept: without it (``alike``) the growth over 26 blocks is off by a factor of several
for some functions (notebook 13).

Source: for the rules, Schoenholz et al., ICLR 2017, arXiv:1611.01232, and with batch normalisation Yang et al., ICLR
2019, arXiv:1902.08129. The correlation between f'(x) on the skip and what the skip carried is kept here by sampling.
"""

import torch
from torch import nn
from torch.nn import functional as F

from . import models
from .checks import count
from .checks import seed as checked_seed


class _SquaredAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            y = function(z.clone())
            ctx.save_for_backward(torch.autograd.grad(y.sum(), z)[0] ** 2)
        return y.detach()

    @staticmethod
    def backward(ctx, q):
        return q * ctx.saved_tensors[0], None


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True, correction=0)
        var = var + 1e-5  # batch normalisation's eps
        ctx.save_for_backward(var)
        return (x - mean) / var.sqrt()

    @staticmethod
    def backward(ctx, q):
        kept = 1 - 2 * q.shape[1] / q.numel()  # of a channel's values the gradient loses the mean and the part along x
        return q * kept / ctx.saved_tensors[0]


class _SquaredConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride, over):
        ctx.shape, ctx.stride, ctx.share, ctx.over = x.shape, stride, len(weight) / x.shape[1], over
        mean = x.mean(0, keepdim=True)
        share = x.new_full((1, 1, 3, 3), 2 / 9)
        var = F.conv2d((x - mean).square().mean(over, keepdim=True), share, stride=stride, padding=1)  # (N, 1, H, W)
        common = F.conv2d(mean, weight.to(x), stride=stride, padding=1)  # (1, C_out, H, W)
        return common + var.sqrt() * torch.randn(len(x), *common.shape[1:], dtype=x.dtype)

    @staticmethod
    def backward(ctx, q):
        share, height = q.new_full((1, 1, 3, 3), 2 / 9 * ctx.share), ctx.shape[2]
        rest = height - ((q.shape[2] - 1) * ctx.stride + 1)
        q = F.conv_transpose2d(
            q.mean(ctx.over, keepdim=True), share, stride=ctx.stride, padding=1, output_padding=rest
        )  # (N, 1, H, W): the same for all inputs of an image at a place
        return q.expand(ctx.shape), None, None, None


class _Squared(nn.Module):
    """A layer whose backward pass carries squared gradients, averaged by convolutions over these dimensions."""

    def __init__(self, layer, over):
        super().__init__()
        self.layer, self.over = layer, over

    def forward(self, x):
        if isinstance(self.layer, nn.Conv2d):
            return _SquaredConv.apply(x, self.layer.weight.detach(), self.layer.stride[0], self.over)
        return _SquaredNorm.apply(x) if isinstance(self.layer, nn.BatchNorm2d) else _SquaredAct.apply(x, self.layer)


def _swap(block, over):
    """Replace the layers of a block in place; its skip passes squared gradients as it is, or is a convolution."""
    for name, layer in list(block.named_children()):
        if name != "skip" or isinstance(layer, nn.Conv2d):
            setattr(block, name, _Squared(layer, over))


@torch.enable_grad()
def predict(activation, block="thesis", depth=56, image_size=16, *, width=16, images=32, seed=0, alike=False):
    """Predicted norms of the gradient after each block of a ResNet at initialisation, relative to the last one.

    Parameters
    ----------
    activation : str or callable
        A name, or channels -> module.
    block : {"thesis", "he", "preact", "plain"}
    depth : int
        6n + 2.
    image_size : int
        Borders are a larger share of a small image, and padding weakens the convolutions there.
    images : int
        Random images in the batch, at least 2. How unequal they become depends on their number.
    seed : int
        Of the random functions and samples. The global generator is left as it was.
    alike : bool
        Give every image the mean variance and the mean squared gradient of all, to see what their differences do.

    Returns
    -------
    dict
        Block name -> sqrt(sum of squared gradients), input side first, as ``gradients.measure``.
    """
    count(image_size, "image_size")
    count(images, "images", low=2)
    checked_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # float64: squared gradients of a deep network pass float32's 1e38
        model = models.resnet(depth, activation, block, in_channels=3, image_size=image_size, width=width).double()
        batch = torch.rand(images, 3, image_size, image_size, dtype=torch.float64)
        with torch.no_grad():
            x = model.stem.train()(batch)
        h, outputs = x.requires_grad_(), []
        for layer in model.blocks:
            _swap(layer, (0, 1) if alike else 1)
            h = layer(h)
            outputs.append(h)
        squared = torch.autograd.grad(h, outputs, torch.ones_like(h) / h.numel())
    return {f"blocks.{i}": q.double().sum().sqrt().item() for i, q in enumerate(squared)}
