"""The process group, and one step of a method on it: what DDP wraps."""

import atexit
import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..epoch import finish
from ..graphs import set_rate
from ..methods import METHODS, Autocast
from ..recipe import PRECISIONS
from .whole import Rows


@contextlib.contextmanager
def group(device="cpu"):
    """The process group that torchrun's environment describes, as (rank, processes, device); alone without one."""
    if "RANK" not in os.environ:
        yield 0, 1, torch.device(device)
        return
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"])) if str(device).startswith("cuda") else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # for the rest of the process: torchrun lets nobody meet twice
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    yield dist.get_rank(), dist.get_world_size(), device


class Learner(nn.Module):
    """A model whose forward pass is one step of a method: attack, then the loss to learn from.

    This is what DDP wraps. It prepares for one backward pass after each of its forward passes; an attack's passes
    within, and methods with several, are then no business of its.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, steps):
        return next(steps)

    no_sync = contextlib.nullcontext  # as DDP has it, for one process


def wrapped(model, precision="float32"):
    """(a ``Learner``, in DDP where there is a group; the network that the methods see)."""
    net = model if precision == "float32" else Autocast(model, PRECISIONS[precision])
    learner = Learner(net.train())
    return (DistributedDataParallel(learner) if dist.is_initialized() else learner), net


def learn(ddp, net, parts, processes, optimizer, scaler, recipe, rate, states, same_draws=True):
    """Learn from one batch given as ``parts``, (x, y, rows, size of the whole batch): yields the sums of each step.

    The sums (loss, number correct, number seen) are a tensor on the device: nothing here waits for it.
    Several parts are accumulated: their gradients are added before the optimiser's step, and only then exchanged.
    With ``same_draws`` random numbers are drawn for the whole batch, else each process draws its own.
    """
    steps = [METHODS[recipe.method](net, x, y, recipe, s) for (x, y, *_), s in zip(parts, states, strict=True)]
    for _ in range(recipe.replays if recipe.method == "free" else 1):
        set_rate(optimizer, rate())
        optimizer.zero_grad()
        start = _generators(parts[0][0].device)
        sums = torch.zeros(3, dtype=torch.float64, device=parts[0][0].device)
        for i, ((_, y, rows, size), step) in enumerate(zip(parts, steps, strict=True)):
            _generators(parts[0][0].device, start)  # each part sees the same draws for the whole batch
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                with Rows(rows, size) if same_draws and len(y) < size else contextlib.nullcontext():
                    logits, loss = ddp(step)
                # DDP takes the mean over processes; this is the mean over images
                scaler.scale(loss * (len(y) * processes / size)).backward()
            sums[0] += loss.detach() * len(y)
            sums[1] += (logits.argmax(1) == y).sum()
            sums[2] += len(y)
        finish(net, optimizer, scaler, recipe)
        yield sums
    for step in steps:  # what a method does after its last step
        next(step, None)


def _generators(device, state=None):
    """The states of the generators of CPU and device; put back if given."""
    if state is None:
        return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
