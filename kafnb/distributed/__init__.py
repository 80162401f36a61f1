"""One model on several processes: PyTorch's DDP, for every recipe and method.

    torchrun --nproc-per-node 4 train.py          # one machine
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py

where ``train.py`` calls ``train(experiment)``, or ``fit`` with what ``kafnb.fit`` takes. gloo on CPU, nccl on CUDA.

The result is that of one process at the same batch size, up to rounding: the recipe's batch is the global one, each
process takes its rows, and every random number is drawn for the whole batch on all of them (``whole.Rows``). With batch
normalisation this needs ``sync_batchnorm``, and ``accumulate=1``: statistics are of what is in memory at a time. (The
perturbation that "free" carries on keeps its rows only while batches are full.)
"""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist

from .. import training
from ..checks import count
from ..data import load_data
from ..epoch import batches, taken
from ..results import finished_in, origin_of, trained
from ..store import Folder, default_store
from .steps import Learner, group, learn, wrapped
from .whole import synchronised

__all__ = ["Learner", "fit", "group", "synchronised", "train"]


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
    count(accumulate, "accumulate")
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
                states, parts = [{} for _ in range(accumulate)], processes * accumulate
                sums = torch.zeros(3, dtype=torch.float64, device=x.device)
                for i, index in enumerate(batches(x, recipe)):
                    xb, yb = taken(x, y, index, recipe)
                    if len(xb) < parts:  # not an image for each; the schedule goes on
                        for _ in range(recipe.replays if recipe.method == "free" else 1):
                            rate()
                        continue
                    for s in states:
                        s["progress"] = done[0] + (done[1] - done[0]) * i * recipe.batch_size / len(x)
                    ends = [len(xb) * p // parts for p in range(parts + 1)]
                    mine = [slice(ends[p], ends[p + 1]) for p in range(rank * accumulate, (rank + 1) * accumulate)]
                    batch = [(xb[rows], yb[rows], rows, len(xb)) for rows in mine]
                    for step in learn(*ddp, batch, processes, optimizer, scaler, recipe, rate, states):
                        sums += step
                if processes > 1:
                    dist.all_reduce(sums)
                    for buffer in model.buffers():  # as before a step: whether all are finite, all must say alike
                        dist.broadcast(buffer, 0)
                loss, correct, n = sums.tolist()
                yield loss, correct, int(n)

            return training.fit(
                model, data, recipe, seed=seed, device=device, progress=progress and rank == 0, resume=resume,
                save=save if rank == 0 else None, epoch=epoch,
            )  # fmt: skip


def train(experiment, *, data_root=None, device="cpu", store=None, progress=False):
    """``kafnb.load`` on all processes of the group: the first reads and writes the store, the others work with it.

    A training that was stopped resumes from its checkpoint, on any number of processes. It is always with
    ``sync_batchnorm`` and in one part a process: what the store keeps under an experiment's name is what one process
    computes.
    """
    with group(device) as (rank, processes, device):
        data, folder = load_data(experiment.data, data_root), Folder(Path(store or default_store()) / experiment.name)
        with folder.lock() if rank == 0 else contextlib.nullcontext():
            state, origin = [None], origin_of(experiment, data)
            if rank == 0:
                state = [(finished_in(folder, experiment, data), folder.read_checkpoint(**origin))]
            if processes > 1:
                dist.broadcast_object_list(state)
            finished, resume = state[0]
            if rank == 0:
                model = trained(folder, experiment, data, device, progress, learn=fit)
            else:
                model = experiment.build(data).to(device)
                if not finished:
                    fit(model, data, experiment.recipe, seed=experiment.seed, device=device, resume=resume)
            for tensor in model.state_dict().values() if processes > 1 else ():  # to all what is in the store
                dist.broadcast(tensor, 0)
            return model.eval()
