"""Two hundred experiments in one process: memory, open files and figures do not grow."""

import dataclasses
import gc
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


def test_many_experiments_in_one_process(home, tries, note):
    import matplotlib.pyplot as plt

    notebook, n, sizes = kafnb.Session("99_soak", device="cpu"), tries(12, 200), {}
    warm = n // 4  # caches fill, the allocator settles
    figures = set(plt.get_fignums())
    for seed in range(n):
        table = kafnb.run(dataclasses.replace(MLP, seed=seed), [Evaluation("pgd", eps=0.1, steps=3, restarts=2, n=60)])
        figure, ax = plt.subplots()
        ax.bar(range(len(table)), table.rate)
        notebook.save(figure, "rates", table.drop(columns="correct"))
        plt.close(figure)
        if seed in (warm, n - 1):
            sizes[seed] = resident(), open_files()
    (before, files), (after, more) = sizes[warm], sizes[n - 1]
    print(
        f"{n} experiments: {before / 2**20:.0f} MiB after {warm}, {after / 2**20:.0f} MiB at the end; {files}, {more} open files"
    )
    grown = after > 1.05 * before or more > files or set(plt.get_fignums()) != figures
    note("experiments in one process: memory (5 %), open files, figures", n, grown)
    assert not grown, (before, after, files, more)
