"""One model on several processes: PyTorch's DDP, for every recipe and method.

    torchrun --nproc-per-node 4 train.py          # one machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py

where ``train.py`` calls ``train(experiment)``, or ``fit`` with what ``kafnb.fit`` takes. gloo on CPU, nccl on CUDA.

The result is that of one process at the same batch size, up to rounding: the recipe's batch is the global one, each
process takes its rows, and every random number is drawn for the whole batch on all of them (``Rows``). With batch
normalisation this needs ``sync_batchnorm``, and ``accumulate=1``: statistics are of what is in memory at a time. (The
perturbation that "free" carries on keeps its rows only while batches are full.)
"""

import contextlib
import functools
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.functional import dropout
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from . import training
from .data import load_data
from .experiments import _finished, _origin, _trained
from .methods import METHODS
from .recipe import PRECISIONS
from .store import Folder, default_store


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
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        if mine:
            dist.destroy_process_group()


class SyncNorm(nn.BatchNorm2d):
    """Batch normalisation over the images of all processes. (torch's own ``SyncBatchNorm`` runs on GPUs only.)"""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
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
        return centred * (scale * self.weight).view(shape) + self.bias.view(shape)


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


class Rows(TorchFunctionMode):
    """Inside, random numbers for ``rows`` of a batch are drawn for the whole batch of ``size``, and the rows taken."""

    def __init__(self, rows, size):
        super().__init__()
        self.rows, self.size = rows, size

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        x = args[0] if args else None
        ours = isinstance(x, torch.Tensor) and x.ndim and len(x) == self.rows.stop - self.rows.start
        if not ours or name not in (
            "uniform_",
            "normal_",
            "bernoulli_",
            "exponential_",
            "rand_like",
            "randn_like",
            "dropout",
        ):
            return function(*args, **kwargs)
        whole = torch.ones(self.size, *x.shape[1:], dtype=x.dtype, device=x.device)
        if name == "dropout":  # what it does to ones is what to multiply with
            return x * dropout(whole, *args[1:], **kwargs)[self.rows] if _drops(args, kwargs) else x
        drawn = function(whole, *args[1:], **kwargs)[self.rows]
        return x.copy_(drawn) if name.endswith("_") else drawn


def _drops(args, kwargs):
    return kwargs.get("training", args[2] if len(args) > 2 else True)


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


def learn(ddp, net, parts, processes, optimizer, scaler, recipe, rate, states, same_draws=True):
    """Learn from one batch given as ``parts``, (x, y, rows, size of the whole batch): yields the sums of each step.

    Several parts are accumulated: their gradients are added before the optimiser's step, and only then exchanged.
    With ``same_draws`` random numbers are drawn for the whole batch, else each process draws its own.
    """
    steps = [METHODS[recipe.method](net, x, y, recipe, s) for (x, y, *_), s in zip(parts, states, strict=True)]
    for _ in range(recipe.replays if recipe.method == "free" else 1):
        lr = rate()
        for g in optimizer.param_groups:
            g["lr"] = lr
        optimizer.zero_grad()
        start = _generators(parts[0][0].device)
        sums = torch.zeros(3, dtype=torch.float64)
        for i, ((_, y, rows, size), step) in enumerate(zip(parts, steps, strict=True)):
            _generators(parts[0][0].device, start)  # each part sees the same draws for the whole batch
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                with Rows(rows, size) if same_draws and len(y) < size else contextlib.nullcontext():
                    logits, loss = ddp(step)
                # DDP takes the mean over processes; this is the mean over images
                scaler.scale(loss * (len(y) * processes / size)).backward()
            sums += torch.tensor([float(loss.detach()) * len(y), int((logits.argmax(1) == y).sum()), len(y)])
        if recipe.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        scaler.step(optimizer)
        scaler.update()
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


def wrapped(model, precision="float32"):
    """(a ``Learner``, in DDP where there is a group; the network that the methods see)."""
    net = model if precision == "float32" else training.Autocast(model, PRECISIONS[precision])
    learner = Learner(net.train())
    return (DistributedDataParallel(learner) if dist.is_initialized() else learner), net


def fit(
    model, data, recipe, *, seed=0, device="cpu", progress=False, resume=None, save=None, sync_batchnorm=True,
    accumulate=1,
):  # fmt: skip
    """``kafnb.fit`` on all processes of the group; every process is given the same and returns the same.

    Parameters
    ----------
    sync_batchnorm : bool
        Statistics of the whole batch, at the price of two exchanges a layer; else each process uses its rows.
    accumulate : int
        Parts that a process learns its rows in, one after the other, when they do not fit its memory together.
    save : callable
        Called by the first process only. Nothing in a state depends on the number of processes: it may change.
    """
    with group(device) as (rank, processes, device):
        model.to(device)
        if processes == 1 and accumulate == 1:
            return training.fit(
                model, data, recipe, seed=seed, device=device, progress=progress, resume=resume, save=save
            )
        if recipe.monitor:
            raise ValueError("monitor=True needs one process: its norms are those of one process' rows")
        with synchronised(model, sync_batchnorm and processes > 1):
            ddp = None

            def epoch(model, x, y, optimizer, scaler, recipe, rate, done):
                nonlocal ddp
                if ddp is None:  # made when the weights of a resumed training are there
                    ddp = wrapped(model, recipe.precision)
                model.train()
                states, sums, parts = (
                    [{} for _ in range(accumulate)],
                    torch.zeros(3, dtype=torch.float64),
                    processes * accumulate,
                )
                for i, (xb, yb) in enumerate(training._batches(x, y, recipe)):
                    if len(xb) < parts:  # not an image for each
                        continue
                    for s in states:
                        s["progress"] = done[0] + (done[1] - done[0]) * i * recipe.batch_size / len(x)
                    ends = [len(xb) * p // parts for p in range(parts + 1)]
                    mine = [slice(ends[p], ends[p + 1]) for p in range(rank * accumulate, (rank + 1) * accumulate)]
                    batch = [(xb[rows], yb[rows], rows, len(xb)) for rows in mine]
                    for step in learn(*ddp, batch, processes, optimizer, scaler, recipe, rate, states):
                        sums += step
                if processes > 1:
                    sums = sums.to(device)
                    dist.all_reduce(sums)
                yield sums[0].cpu(), sums[1].cpu(), int(sums[2])

            return training.fit(
                model, data, recipe, seed=seed, device=device, progress=progress and rank == 0, resume=resume,
                save=save if rank == 0 else None, epoch=epoch,
            )  # fmt: skip


def train(experiment, *, data_root=None, device="cpu", store=None, progress=False, **how):
    """``kafnb.load`` on all processes of the group: the first reads and writes the store, the others work with it.

    ``how`` goes to ``fit``. A training that was stopped resumes from its checkpoint, on any number of processes.
    """
    with group(device) as (rank, processes, device):
        data, folder = load_data(experiment.data, data_root), Folder(Path(store or default_store()) / experiment.name)
        together = functools.partial(fit, **how)
        with folder.lock() if rank == 0 else contextlib.nullcontext():
            state, origin = [None], _origin(experiment, data)
            if rank == 0:
                state = [(_finished(folder, data, origin["code"]), folder.read_checkpoint(**origin))]
            if processes > 1:
                dist.broadcast_object_list(state)
            finished, resume = state[0]
            if rank == 0:
                model = _trained(folder, experiment, data, device, progress, learn=together)
            else:
                model = experiment.build(data).to(device)
                if not finished:
                    together(model, data, experiment.recipe, seed=experiment.seed, device=device, resume=resume)
            for tensor in model.state_dict().values() if processes > 1 else ():  # to all what is in the store
                dist.broadcast(tensor, 0)
            return model.eval()
