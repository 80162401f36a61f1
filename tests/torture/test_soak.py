"""Four hundred experiments in one process: memory, open files and figures do not grow."""

import dataclasses
import gc
import multiprocessing
import os
from pathlib import Path

import psutil

import kafnb
from kafnb import Evaluation, Experiment, Recipe

RECIPE = Recipe("fgsm_rs", epochs=1, batch_size=256, lr=(0.003, 0.3), eps=0.1)
MLP = Experiment("digits", "mlp", "kaf_elu", RECIPE, 0, {"hidden": (16,)})


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def open_files():
    return len(list(Path("/proc/self/fd").iterdir())) if os.path.isdir("/proc/self/fd") else psutil.Process().num_fds()


def soak(home, n, answer):
    """Run, measure and draw ``n`` experiments; sends (memory, open files) at half time and at the end, and figures."""
    os.environ |= {"KAFNB_HOME": home, "KAFNB_PROGRESS": "0"}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    notebook, sizes = kafnb.Session("99_soak", device="cpu"), []
    for seed in range(n):
        table = kafnb.run(dataclasses.replace(MLP, seed=seed), [Evaluation("pgd", eps=0.1, steps=3, restarts=2, n=60)])
        figure, ax = plt.subplots()
        ax.bar(range(len(table)), table.rate)
        notebook.save(figure, "rates", table.drop(columns="correct"))
        plt.close(figure)
        if seed in (n // 2, n - 1):  # until then caches fill, and the collector of garbage finds its pace
            sizes.append((resident(), open_files()))
    answer.send((*sizes, len(plt.get_fignums())))


def test_many_experiments_in_one_process(tmp_path, tries, note):
    n, fresh = tries(12, 400), multiprocessing.get_context("spawn")  # other tests' memory would hide what grows here
    ours, theirs = fresh.Pipe()
    process = fresh.Process(target=soak, args=(str(tmp_path), n, theirs))
    process.start()
    theirs.close()  # or a process that dies would be waited for
    process.join()
    (before, files), (after, more), figures = ours.recv()
    print(
        f"{n}: {before / 2**20:.0f} MiB after {n // 2}, {after / 2**20:.0f} MiB at the end; {files}, {more} open files"
    )
    grown = after > 1.05 * before or more > files or figures
    note("experiments in one process: memory (5 %), open files, figures", n, grown)
    assert not grown, (before, after, files, more, figures)
