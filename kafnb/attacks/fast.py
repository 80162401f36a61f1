"""A quicker twin of a network for attacks: batch normalisation folded into convolutions, channels last in memory.

In eval mode batch normalisation is y = s x + t a channel, with s = weight / sqrt(var + eps): behind a convolution it
is part of that convolution's weights. The twin computes the same logits and input gradients up to rounding.
"""

import copy
import itertools

import torch
from torch import nn

from ..models import HeBlock, PreactBlock, ThesisBlock

# work on any memory layout; a KAF works on channels-first blocks and would copy
ANY_LAYOUT = (
    nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout,
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Tanh,
)  # fmt: skip
KNOWN = ("torch.nn.modules", "kafnb.models", "kafnb.kaf", "kafnb.kwta", "kafnb.parametric", "kafnb.attacks.fast")


def _affine(norm):
    """s and t of a batch normalisation in eval mode, each (C,)."""
    s = torch.rsqrt(norm.running_var + norm.eps)
    s = s if norm.weight is None else norm.weight * s
    return s, (0 if norm.bias is None else norm.bias) - norm.running_mean * s


def _scaled(conv, s, t=None):
    """The convolution, changed in place to be followed by y = s x + t; without t only its weights are scaled."""
    conv.weight.mul_(s.view(-1, 1, 1, 1))
    if t is not None:
        conv.bias = nn.Parameter(t if conv.bias is None else t + s * conv.bias)
    return conv


def _behind_conv(act):
    """ReLU may overwrite what a convolution returns."""
    return nn.ReLU(inplace=True) if type(act) is nn.ReLU else act


class _Residual(nn.Module):
    """A ``ThesisBlock`` in eval mode: its second normalisation scales the skip, the rest is in the convolutions."""

    def __init__(self, block):
        super().__init__()
        s, t = _affine(block.bn2)
        self.conv1, self.act1 = _scaled(block.conv1, *_affine(block.bn1)), _behind_conv(block.act1)
        self.conv2, self.act2 = _scaled(block.conv2, s, t), _behind_conv(block.act2)
        self.skip = _scaled(block.skip, s) if isinstance(block.skip, nn.Conv2d) else None
        self.register_buffer("scale", s.view(1, -1, 1, 1) if self.skip is None else None)

    def forward(self, x):
        out = self.conv2(self.act1(self.conv1(x)))
        if self.scale is not None:
            return self.act2(out.addcmul_(x, self.scale))
        return self.act2(out.add_(x if self.skip is None else self.skip(x)))


def _unscale(blocks):
    """Take the factor s from the skips of successive ReLU blocks, in place; ReLU(c x) = c ReLU(x) where c > 0.

    A block that is to return its output divided by c = s (times the c of its input) can add its input as it is.
    """
    c = None
    for block, behind in itertools.pairwise([*blocks, None]):
        if c is not None:  # its input comes divided by c
            for conv in filter(None, (block.conv1, block.skip)):
                conv.weight.mul_(c)
            block.scale = block.scale if block.scale is None else block.scale * c
        c = None
        if behind is not None and block.scale is not None and (block.scale > 0).all():
            c, block.scale = block.scale, None
            _scaled(block.conv2, 1 / c.flatten(), torch.zeros_like(c.flatten()))


def _fold(module):
    """Fold, in place, what is known to stand behind a convolution: in a Sequential, and in the blocks of ``models``."""
    for name, child in module.named_children():
        if type(child) is ThesisBlock:
            setattr(module, name, _Residual(child))
        else:
            _fold(child)
    blocks = list(module.children())
    if all(type(b) is _Residual and type(b.act2) is nn.ReLU for b in blocks):
        _unscale(blocks)
    pairs = []
    if type(module) is HeBlock:
        pairs = [("conv1", "bn1"), ("conv2", "bn2")]
    elif type(module) is PreactBlock:
        pairs = [("conv1", "bn2")]
    elif type(module) is nn.Sequential:
        names = list(module._modules)
        pairs = itertools.pairwise(names)
    for conv, norm in pairs:
        first, second = getattr(module, conv), getattr(module, norm)
        if type(first) is nn.Conv2d and type(second) is nn.BatchNorm2d and second.running_var is not None:
            setattr(module, conv, _scaled(first, *_affine(second)))
            setattr(module, norm, nn.Identity())


def twin(model):
    """A quicker copy of a network in eval mode, or the network itself where none is known to be the same.

    Copied are float32 networks with convolutions that consist of torch's and the package's modules without hooks;
    channels last is used on a CPU and where all layers work on any layout.
    """
    modules = list(model.modules())
    known = all(type(m).__module__.startswith(KNOWN) for m in modules)
    plain = known and any(isinstance(m, nn.Conv2d) for m in modules) and not any(map(_hooked, modules))
    if not plain or any(p.dtype != torch.float32 for p in model.parameters()):
        return model
    out = copy.deepcopy(model).eval()
    with torch.no_grad():
        _fold(out)
    out.requires_grad_(False)
    leaves = [m for m in out.modules() if not any(m.children())]
    on_cpu = next(out.parameters()).device.type == "cpu"
    if on_cpu and all(isinstance(m, ANY_LAYOUT) for m in leaves):
        out = out.to(memory_format=torch.channels_last)
    return out


def _hooked(module):
    """True if something watches the module, which a copy would escape or double."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or bool(getattr(module, "parametrizations", None))
