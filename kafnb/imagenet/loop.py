"""Training on the processes of torchrun's group, resumable after every epoch."""

import contextlib
import dataclasses
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from .. import evaluate
from ..attacks import pgd
from ..distributed.steps import group, learn, wrapped
from ..distributed.whole import synchronised
from ..provenance import code_fingerprint, device_name, provenance
from ..recipe import optimizer_of
from ..store import Folder, default_store
from .folders import images


def train(training, root, *, device="cpu", workers=0, store=None, sync_batchnorm=False, test_images=500):
    """Train on the processes of torchrun's group; the first keeps the store.

    Parameters
    ----------
    root : path or list of paths
        The images; of several, one a phase (resized beforehand, they are read and decoded faster).
    workers : int
        Decoding processes of each process.
    test_images : int
        That the trained network is measured on, by the first process.

    Returns
    -------
    DataFrame
        The history, a row an epoch: phase's size, loss, accuracy (on perturbed batches), images_per_s of all
        processes, and waiting, the share of time in which the first process had no images to learn from. A last row
        has the accuracy on test images, clean and under PGD-10.

    Raises
    ------
    ValueError
        An epoch whose loss or weights are not finite; one without a batch; a store of other images or statistics.
    FileNotFoundError
        ``root`` is no tree of images.
    """
    with group(device) as (rank, processes, device), contextlib.ExitStack() as stack:
        folder = Folder(Path(store or default_store()) / training.name)
        if rank == 0:
            stack.enter_context(folder.lock())
        roots = [root] if isinstance(root, str | Path) else list(root)
        origin = {"code": code_fingerprint("imagenet"), "data": _listed(roots), "sync_batchnorm": sync_batchnorm}
        known = [(_finished(folder, origin), folder.read_checkpoint(**origin))] if rank == 0 else [None]
        if processes > 1:
            dist.broadcast_object_list(known)
        (finished, state), model = known[0], training.build().to(device)
        if finished:
            return folder.read_table("history.csv") if rank == 0 else None
        optimizer, rows = optimizer_of(model, training.recipe), []
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            rows = list(state["history"])
        with synchronised(model, sync_batchnorm and processes > 1):
            ddp = wrapped(model, training.precision)
            plan = [
                (p, e, roots[min(i, len(roots) - 1)]) for i, p in enumerate(training.phases) for e in range(p.epochs)
            ]
            for phase, epoch, root in plan[len(rows) :]:
                torch.manual_seed(1_000_003 * (training.seed * processes + rank) + len(rows))
                data = images(root, True, phase.size)
                row = _epoch(ddp, data, training, phase, epoch, len(rows), optimizer, rank, processes, workers)
                if not math.isfinite(row["loss"]):  # of all processes, so that each stops here
                    raise ValueError(
                        f"epoch {row['epoch']} diverged: its loss or its weights are not finite, and it is not kept. "
                        f"Run again, this training resumes after epoch {len(rows)}; Training.phases with lower rates "
                        "are another training, which starts anew"
                    )
                rows.append(row)
                if rank == 0:
                    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    folder.write_checkpoint(states | origin | {"history": rows})
        if rank == 0:
            return _keep(folder, training, model.eval(), roots[-1], rows, device, test_images, origin)


def _listed(roots):
    """Fingerprint of the images, by class and file name: to train on of each folder, to test on of the last."""
    parts = [*(images(root, True, 32) for root in roots), images(roots[-1], False, 32)]
    for part in parts[1:]:
        if part.classes != parts[0].classes:
            raise ValueError(f"{parts[0].root} and {part.root} have different classes: their labels would not agree")
    lists = [(Path(path).relative_to(part.root).as_posix(), label) for part in parts for path, label in part.samples]
    return hashlib.sha256(repr(lists).encode()).hexdigest()[:16]


def _finished(folder, origin):
    """True if the folder holds a whole training that may be used; an error if that was of other images."""
    if not all(folder.has(name) for name in ("weights.safetensors", "experiment.json", "history.csv")):
        return False
    record = folder.read_json("experiment.json")
    if any(record.get(name, origin[name]) != origin[name] for name in ("data", "sync_batchnorm")):
        raise ValueError(f"{folder.path} was trained on other images or with other statistics: name another --store")
    return folder.by_this_code("weights.safetensors", record.get("code"), origin["code"])


def _epoch(ddp, data, training, phase, epoch, done, optimizer, rank, processes, workers):
    learner, net = ddp
    device, recipe = next(net.parameters()).device, training.recipe
    batch = max(1, phase.batch // processes)
    sampler = DistributedSampler(data, processes, rank, seed=training.seed, drop_last=True)
    sampler.set_epoch(done)
    generator = torch.Generator().manual_seed(1_000_003 * (training.seed * processes + rank) + done)
    loader = DataLoader(
        data, batch, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda",
        generator=generator,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
    net.train()
    sums, state, start, waiting = torch.zeros(3, dtype=torch.float64), {}, time.perf_counter(), 0.0
    asked = start
    for i, (x, y) in enumerate(loader):
        waiting += time.perf_counter() - asked
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        now = epoch + (i + 0.5) / len(loader)
        part = [(x, y, slice(0, len(y)), len(y) * processes)]
        rate = lambda now=now: float(np.interp(now, phase.at, phase.rates))  # noqa: E731
        for step in learn(learner, net, part, processes, optimizer, scaler, recipe, rate, [state], same_draws=False):
            sums += step.cpu()  # waits for the step: what follows is time without images
        asked = time.perf_counter()
    seconds = time.perf_counter() - start
    if not all(bool(p.isfinite().all()) for p in net.parameters()):  # what the last step did is in no loss
        sums[0] = float("nan")
    if processes > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    loss, correct, n = sums.tolist()
    if not n:
        raise ValueError(f"not one batch of {phase.batch} in {len(data)} images on {processes} processes")
    return {
        "epoch": done + 1, "size": phase.size, "loss": loss / n, "accuracy": correct / n, "images": int(n),
        "images_per_s": n / seconds, "waiting": waiting / seconds, "processes": processes,
    }  # fmt: skip


def _keep(folder, training, model, root, rows, device, n, origin):
    """Measure the trained model, and write weights, history and record."""
    data = images(root, False, training.phases[-1].size)
    order = np.random.RandomState(0).permutation(len(data))[:n]
    x, y = zip(*(data[i] for i in order), strict=True)
    pair = torch.stack(x), torch.tensor(y)
    attack = lambda m, x, y: pgd(m, x, y, eps=training.eps, steps=10)  # noqa: E731
    scores = (
        evaluate.clean_accuracy(model, pair, batch_size=64),
        evaluate.robust_accuracy(model, pair, attack, batch_size=64),
    )
    last = {"epoch": len(rows), "clean": scores[0].rate, "pgd": scores[1].rate, "images": len(order)}
    history = pd.DataFrame([*rows, last])
    folder.drop("history.csv")  # written last: an old one beside new weights would count as whole
    folder.write_weights(model)
    record = {"training": dataclasses.asdict(training), "device": device_name(device)} | origin
    folder.write_json("experiment.json", record | provenance())
    folder.write_table("history.csv", history)
    folder.drop(*folder.checkpoints())
    return history
