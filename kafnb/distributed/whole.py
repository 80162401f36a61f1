"""What belongs to the whole batch on every process: the statistics of batch normalisation, and random numbers."""

import contextlib

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import dropout
from torch.overrides import TorchFunctionMode


class SyncNorm(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes. (torch's own ``SyncBatchNorm`` runs on GPUs only.)"""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # half types cannot count that far
        channels = (0, *range(2, x.ndim))
        count = x.new_tensor([x.numel() / x.shape[1]])
        c = self.num_features
        # all_reduce adds in the forward pass and adds the gradients of all processes in the backward pass
        total = all_reduce(torch.cat([x.sum(channels), count]))
        mean, count = total[:c] / total[c], total[c]
        shape = (1, c, *[1] * (x.ndim - 2))
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(channels)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = self.momentum
            self.running_mean.lerp_(mean.detach(), rate)
            self.running_var.lerp_((variance * count / (count - 1)).detach(), rate)
        scale = torch.rsqrt(variance + self.eps)
        return (centred * (scale * self.weight).view(shape) + self.bias.view(shape)).to(dtype)


@contextlib.contextmanager
def synchronised(model, wanted=True):
    """Inside, the model's batch normalisations are ``SyncNorm``; its parameters and state stay the same objects."""
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d] if wanted else []
    for m in norms:
        m.__class__ = SyncNorm
    try:
        yield
    finally:
        for m in norms:
            m.__class__ = nn.BatchNorm2d


DRAWS = ("uniform_", "normal_", "bernoulli_", "exponential_", "rand_like", "randn_like", "dropout")


class Rows(TorchFunctionMode):
    """Inside, random numbers for ``rows`` of a batch are drawn for the whole batch of ``size``, and the rows taken."""

    def __init__(self, rows, size):
        super().__init__()
        self.rows, self.size = rows, size

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        x = args[0] if args else None
        ours = isinstance(x, torch.Tensor) and x.ndim and len(x) == self.rows.stop - self.rows.start
        if not ours or name not in DRAWS:
            return function(*args, **kwargs)
        whole = torch.ones(self.size, *x.shape[1:], dtype=x.dtype, device=x.device)
        if x.ndim == 4 and not x.is_contiguous():  # numbers are drawn in the order of memory
            whole = whole.to(memory_format=torch.channels_last)
        if name == "dropout":  # what it does to ones is what to multiply with
            drops = kwargs.get("training", args[2] if len(args) > 2 else True)
            return x * dropout(whole, *args[1:], **kwargs)[self.rows] if drops else x
        drawn = function(whole, *args[1:], **kwargs)[self.rows]
        return x.copy_(drawn) if name.endswith("_") else drawn
