"""Engines: where the experiments of one ``run`` are computed. Here, in several processes, or on a Ray cluster.

An engine is ``engine(measure, experiments, evaluations, *, store, device, data_root, progress, workers, threads,
address)``. It has ``experiments.measure`` called once for each experiment, somewhere, and returns when every result is
in the store. Which engine did it makes no difference to the results, at an equal number of threads: an experiment
seeds its own generators.
"""

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .checks import pick
from .cluster import ray_tasks
from .recipe import epochs_of
from .registered import register, yours

RETRIES = 5  # of an experiment whose process or machine was lost; an error in the experiment itself is not retried


class Bars:
    """One bar for all experiments, and one for each that is being trained."""

    def __init__(self, experiments, show):
        self.names, self.show, self.running = [e.name for e in experiments], show, {}
        self.all = tqdm(total=len(experiments), unit="model", leave=False, disable=not show)

    def report(self, i, done, total):
        if i not in self.running:
            shown = dict(desc=self.names[i][:40], leave=False, disable=not self.show)
            self.running[i] = tqdm(total=total, initial=done, unit="epoch", **shown)  # what is done took no time here
        self.running[i].update(max(0, done - self.running[i].n))  # checkpoints go when training ends

    def finished(self, i):
        if i in self.running:
            self.running.pop(i).close()
        self.all.update()

    def close(self):
        for bar in (*self.running.values(), self.all):
            bar.close()


@contextlib.contextmanager
def pool(workers, start=None, arguments=()):
    """A pool of processes, each begun by ``start(*arguments)``. They end with this one, however it ends.

    After an error or an interrupt they are ended at once: nobody waits for the others.
    """
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (start, arguments))
    try:
        yield executor
    except BaseException:
        for child in list((executor._processes or {}).values()):  # no public name before Python 3.14
            child.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(start, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends its workers

    def end_with_parent():
        """A parent that is killed tells nobody: without this its workers would wait for ever."""
        wait_for_any([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if start:
        start(*arguments)


def _start(threads, registered):
    torch.set_num_threads(threads)
    register(pickle.loads(registered))


def _progress(folder):
    """Epochs done of what is being trained there, by its checkpoint: no queue that a killed worker could block."""
    return max((int(p.stem.split("-")[1]) for p in folder.glob("checkpoint-*.pt")), default=0)


def processes(
    measure, experiments, evaluations, *, store, device, data_root, progress, workers=None, threads=None, address=None
):
    """A pool on this machine; the cores are divided among the workers. For several GPUs take ``ray``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(experiments))
    try:
        import cloudpickle as pickler  # for what was defined in a notebook
    except ImportError:
        pickler = pickle
    start = threads or max(1, cores // workers), pickler.dumps(yours(experiments))
    where = dict(store=store, device=device, data_root=data_root)
    left, bars = set(range(len(experiments))), Bars(experiments, progress)
    with contextlib.closing(bars):
        for attempt in range(1 + RETRIES):
            try:
                with pool(workers, _start, start) as executor:
                    todo = {executor.submit(measure, experiments[i], evaluations, **where): i for i in sorted(left)}
                    while todo:
                        done, _ = wait(todo, timeout=0.5 if progress else None, return_when=FIRST_COMPLETED)
                        for i in todo.values() if progress else ():
                            if (folder := Path(store) / experiments[i].name).is_dir():  # some worker has begun
                                bars.report(i, _progress(folder), epochs_of(experiments[i].recipe))
                        for future in done:
                            future.result()
                            bars.finished(todo[future])
                            left.discard(todo.pop(future))
                break
            except BrokenProcessPool:  # a worker was killed: the unfinished resume from their checkpoints
                if attempt == RETRIES:
                    raise


def ray(measure, experiments, evaluations, *, progress, **where):
    """See ``cluster.ray_tasks``."""
    with contextlib.closing(Bars(experiments, progress)) as bars:
        ray_tasks(measure, experiments, evaluations, bars=bars, retries=RETRIES, **where)


ENGINES = {"local": None, "processes": processes, "ray": ray}


def check(engine):
    """The engine by name; None for "local".

    Raises
    ------
    ValueError, ModuleNotFoundError
        Unknown; not installed.
    """
    chosen = pick(ENGINES, engine, "engine")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError("engine 'ray' needs Ray, which is not installed: pip install 'ray>=2.60,<3'")
    return chosen
