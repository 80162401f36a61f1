"""A quicker twin of a network for attacks.

Batch normalisation is folded into convolutions, channels are last in memory, and on a CPU residual blocks of ReLU take
as few passes over memory as there are convolutions.

In eval mode batch normalisation is y = s x + t a channel, with s = weight / sqrt(var + eps): behind a convolution it
is part of that convolution's weights. The twin computes the same logits and input gradients up to rounding.
"""

import copy
import functools
import itertools
import platform

import torch
from torch import nn

from ..models import HeBlock, PreactBlock, ThesisBlock, _PadShortcut, any_layout

KNOWN = ("torch.nn.modules", "kafnb.models", "kafnb.kaf", "kafnb.kwta", "kafnb.parametric", "kafnb.attacks.fast")
SMALLEST = 1e-6  # factor c that is taken from a skip: 1 / c of a much smaller one, as products are, overflows


def affine(norm):
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
    """A ``ThesisBlock`` or ``HeBlock`` in eval mode, its normalisations in the convolutions.

    The second one of the former stands behind the sum: it scales the skip.
    """

    def __init__(self, block):
        super().__init__()
        s, t = affine(block.bn2)
        self.conv1, self.act1 = _scaled(block.conv1, *affine(block.bn1)), _behind_conv(block.act1)
        self.conv2, self.act2 = _scaled(block.conv2, s, t), _behind_conv(block.act2)
        self.skip, scale = block.skip, None
        if type(block) is ThesisBlock:
            if isinstance(block.skip, nn.Conv2d):
                _scaled(block.skip, s)
            else:
                scale = s.view(1, -1, 1, 1)
        self.register_buffer("scale", scale)

    def forward(self, x):
        out, skip = self.conv2(self.act1(self.conv1(x))), self.skip(x)
        return self.act2(out.add_(skip) if self.scale is None else out.addcmul_(skip, self.scale))


def _unscale(blocks):
    """Take the factor s from the skips of successive ReLU blocks, in place; ReLU(c x) = c ReLU(x) where c > 0.

    A block that is to return its output divided by c = s (times the c of its input) can add its input as it is. The
    block behind must be able to take c up: in its own factor, or in the weights of its skip.
    """
    c = None
    for block, behind in itertools.pairwise([*blocks, None]):
        if c is not None:  # its input comes divided by c
            for conv in (block.conv1, block.skip):
                if isinstance(conv, nn.Conv2d):
                    conv.weight.mul_(c)
            block.scale = block.scale if block.scale is None else block.scale * c
        c = None
        taken_up = behind is not None and (behind.scale is not None or isinstance(behind.skip, nn.Conv2d))
        if taken_up and block.scale is not None and (block.scale > SMALLEST).all():
            c, block.scale = block.scale, None
            _scaled(block.conv2, 1 / c.flatten(), torch.zeros_like(c.flatten()))


def _as_built(block):
    """True of a residual block whose parts are of the kinds that ``models`` gives it: no other is folded."""
    convs, skip = [block.conv1, block.conv2], block.skip
    if type(skip) is nn.Conv2d and skip.bias is None:
        convs.append(skip)
    elif type(skip) not in (nn.Identity, _PadShortcut):
        return False
    norms = all(type(n) is nn.BatchNorm2d and n.running_var is not None for n in (block.bn1, block.bn2))
    return norms and all(type(c) is nn.Conv2d and _simple(c) for c in convs)


def _simple(conv):
    """True of a convolution of one group over zeros, whose gradient ``_packed`` can take."""
    inside = not isinstance(conv.padding, str) and all(map(int.__lt__, conv.padding, conv.kernel_size))
    return inside and conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def _fold(module):
    """Fold, in place, what is known to stand behind a convolution: in a Sequential, and in the blocks of ``models``."""
    for name, child in module.named_children():
        if type(child) in (ThesisBlock, HeBlock) and _as_built(child):
            setattr(module, name, _Residual(child))
        else:
            _fold(child)
    blocks = list(module.children())
    if all(type(b) is _Residual and type(b.act2) is nn.ReLU for b in blocks):
        _unscale(blocks)
    pairs = []
    if type(module) is PreactBlock:
        pairs = [("conv1", "bn2")]
    elif type(module) is nn.Sequential:
        names = list(module._modules)
        pairs = itertools.pairwise(names)
    for conv, norm in pairs:
        first, second = getattr(module, conv), getattr(module, norm)
        if type(first) is nn.Conv2d and type(second) is nn.BatchNorm2d and second.running_var is not None:
            setattr(module, conv, _scaled(first, *affine(second)))
            setattr(module, norm, nn.Identity())


def _packed(conv):
    """Two functions of a convolution whose weights are laid out once, not at every call, for oneDNN's fused kernels.

    forward(x, other=None, then="relu"): ReLU or "none" of the convolution, ``other`` added before. backward(g, x,
    onto=None): the gradient in x where g is that in the output, added to ``onto`` in place.
    """
    mkldnn, how, ones = torch.ops.mkldnn, (conv.padding, conv.stride, conv.dilation, 1), (1, 1)
    around = [k - 1 - p for k, p in zip(conv.kernel_size, conv.padding, strict=True)]
    laid_out = torch.ops.aten.mkldnn_reorder_conv2d_weight
    weight = laid_out(conv.weight.contiguous().to_mkldnn(), *how)
    flipped = conv.weight.flip(2, 3).transpose(0, 1).contiguous()
    flipped = laid_out(flipped.to_mkldnn(), around, ones, ones, 1)

    def forward(x, other=None, then="relu"):
        if other is None:
            return mkldnn._convolution_pointwise(x, weight, conv.bias, *how, then, [], "")
        return mkldnn._convolution_pointwise.binary(x, other, weight, conv.bias, *how, "add", 1.0, then, [], "")

    def backward(g, x, onto=None):
        if conv.stride != ones:
            options = conv.stride, conv.padding, conv.dilation, False, [0, 0], 1, [True, False, False]
            g = torch.ops.aten.convolution_backward(g, x, conv.weight, None, *options)[0]
            return g if onto is None else onto.add_(g)
        # of stride 1: the convolution with the flipped weights
        if onto is None:
            return mkldnn._convolution_pointwise(g, flipped, None, around, ones, ones, 1, "none", [], "")
        then = "add", 1.0, None, [], None
        return mkldnn._convolution_pointwise_.binary(onto, g, flipped, None, around, ones, ones, 1, *then)

    return forward, backward


def _packed_skip(skip):
    """The same two functions, forward(x) and backward(g, x), of what a block has beside its convolutions."""
    if type(skip) is nn.Conv2d:
        forward, backward = _packed(skip)
        return functools.partial(forward, then="none"), backward
    if type(skip) is nn.Identity:
        return skip, lambda g, x: g

    def backward(g, x):
        out = torch.zeros_like(x)
        out[:, :, :: skip.stride, :: skip.stride] = g[:, : x.shape[1]]
        return out

    return skip, backward


class _Chain(nn.Module):
    """Successive ReLU blocks as one step of autograd, by the kernels that torch's compiler takes on a CPU.

    Convolutions run near the peak of its arithmetic; what is left to save are the passes over memory between them. Here
    ReLU and sums are done where a convolution writes its result, and the backward pass overwrites its own gradients.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.packed = blocks, None

    def __getstate__(self):
        return self.__dict__ | {"packed": None}  # weights in oneDNN's layout cannot be copied

    def forward(self, x):
        if torch.is_autocast_enabled("cpu"):
            return self.blocks(x)
        if self.packed is None:
            self.packed = [(_packed(b.conv1), _packed(b.conv2), _packed_skip(b.skip), b.scale) for b in self.blocks]
        return _ChainFunction.apply(x.contiguous(memory_format=torch.channels_last), self.packed)


class _ChainFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed):
        kept = [x]
        for (conv1, _), (conv2, _), (skip, _), scale in packed:
            inner, other = conv1(x), skip(x)
            x = conv2(inner, other if scale is None else scale * other)
            kept += [inner, x]
        ctx.packed = packed
        ctx.save_for_backward(*kept)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        kept, threshold = list(ctx.saved_tensors), torch.ops.aten.threshold_backward
        g = threshold(g.contiguous(memory_format=torch.channels_last), kept.pop(), 0)
        for (_, conv1), (_, conv2), (_, skip), scale in reversed(ctx.packed):
            inner, x = kept.pop(), kept.pop()
            through = conv2(g, inner)
            threshold.grad_input(through, inner, 0, grad_input=through)
            g = conv1(through, x, onto=skip(g if scale is None else g.mul_(scale), x))
            if kept:
                threshold.grad_input(g, x, 0, grad_input=g)
        return g, None


def _chained(blocks):
    """True where a ``_Chain`` computes the same as these blocks, and this processor has its kernels."""
    there = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    there = there and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")
    return there and all(type(b) is _Residual and type(b.act1) is type(b.act2) is nn.ReLU for b in blocks)


def twin(model):
    """A quicker copy of a network in eval mode, or the network itself where none is known to be the same.

    Copied are float32 networks with convolutions that consist of torch's and the package's modules without hooks;
    channels last is used where all layers work on any layout. Where a weight is not finite, the network itself: folding
    may overflow, and oneDNN's ReLU makes 0 of NaN.
    """
    modules = list(model.modules())
    known = all(type(m).__module__.startswith(KNOWN) for m in modules)
    plain = known and any(isinstance(m, nn.Conv2d) for m in modules) and not any(map(_hooked, modules))
    plain = plain and not _shared(model)
    if not plain or any(p.dtype != torch.float32 for p in model.parameters()):
        return model
    out = copy.deepcopy(model).eval()
    with torch.no_grad():
        _fold(out)
    out.requires_grad_(False)
    if not all(v.isfinite().all() for v in out.state_dict().values()):
        return model
    if not any_layout(out):
        return out
    out = out.to(memory_format=torch.channels_last)
    if next(out.parameters()).device.type == "cpu":
        for name, child in list(out.named_children()):
            if type(child) is nn.Sequential and len(child) > 0 and _chained(child):
                setattr(out, name, _Chain(child))
    return out


def _shared(model):
    """True if a module or a parameter stands in two places, where it would be scaled twice."""
    kinds = model.named_modules, model.named_parameters
    return any(len(list(k())) != len(list(k(remove_duplicate=False))) for k in kinds)


def _hooked(module):
    """True if something watches the module, which a copy would escape or double."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or bool(getattr(module, "parametrizations", None))
