"""PGD timed side by side in one process, in 15 minutes, after ``pip install --no-deps torchattacks`` (it pins old packages):
``python -m pytest tests/benchmark_attacks.py -o addopts= -s``.

The same ResNet20 (the thesis' block, ReLU), the same images of 3x32x32, the same eps, step and number of steps from
each library. The network has learned digits enlarged to that size, and every other image stands. Ways are timed in
turns, so that a slow spell of the machine meets all of them; the best round of each counts. The training before has
ended glibc's habit of returning memory after each step. In a fresh process that habit slows the libraries more than us,
so PGD-10 is timed once more in one, with glibc's defaults: what a script meets that loads a network and attacks it. The
table is kept in figures/benchmark/attacks_cpu.csv (attacks_cuda.csv on a GPU).
"""

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import tempfile
import time

import cpuinfo
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

import kafnb
from kafnb import attacks, figures, models, paths, provenance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def enlarged(data):
    """8x8 grey digits as 3x32x32 images."""

    def grown(x):
        return F.interpolate(x, scale_factor=4).expand(-1, 3, -1, -1).contiguous()

    return dataclasses.replace(data, x_train=grown(data.x_train), x_test=grown(data.x_test))


@pytest.fixture(scope="module")
def task():
    """A trained network, images that it gets right, their labels, and an eps at which every other one stands."""
    torch.set_num_threads(1)
    data = enlarged(kafnb.load_data("digits"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.resnet(20, "relu").to(DEVICE)
    kafnb.fit(model, data, kafnb.Recipe(epochs=3, lr=(0.01, 0.2)), device=DEVICE)
    x, y = (t.to(DEVICE) for t in data.test(160))

    def stands(eps, restarts, n=None):
        attack = functools.partial(attacks.pgd, eps=eps, steps=20, restarts=restarts, early_stop=True)
        return kafnb.evaluate.robust_accuracy(model, (x, y), attack, n=n).correct

    clean = kafnb.evaluate.clean_accuracy(model, (x, y)).correct
    eps = min((2 ** (i / 2) / 255 for i in range(-6, 9)), key=lambda e: abs(stands(e, 1, 40).mean() - clean.mean() / 2))
    left = stands(eps, 4)
    # 64 images of which every other one stands
    order = np.stack([np.flatnonzero(left)[:32], np.flatnonzero(clean & ~left)[:32]], 1).ravel()
    return model.eval(), x[order], y[order], eps


def ways(model, eps, steps, restarts):
    """name -> function of (x, y) -> images of the last restart; without restarts of its own a library is called again."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    options = dict(eps=eps, step_size=eps / 4, steps=steps, restarts=restarts, early_stop=restarts > 1)
    theirs = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps)
    fb = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
    linf = foolbox.attacks.LinfPGD(abs_stepsize=eps / 4, steps=steps)
    linf = linf.repeat(restarts) if restarts > 1 else linf
    loss, kind = torch.nn.CrossEntropyLoss(), "gpu" if DEVICE == "cuda" else "cpu"
    classifier = PyTorchClassifier(model, loss, (3, 32, 32), 10, clip_values=(0.0, 1.0), device_type=kind)
    size = dict(norm=np.inf, eps=eps, eps_step=eps / 4, max_iter=steps, num_random_init=restarts, batch_size=64)
    art = ProjectedGradientDescentPyTorch(classifier, **size, verbose=False)
    return {
        "kafnb": lambda x, y: attacks.pgd(model, x, y, **options),
        "kafnb, fast=False": lambda x, y: attacks.pgd(model, x, y, fast=False, **options),
        "torchattacks": lambda x, y: [theirs(x, y) for _ in range(restarts)][-1],
        "foolbox": lambda x, y: linf(fb, x, y, epsilons=eps)[1],
        "ART": lambda x, y: torch.from_numpy(art.generate(x.cpu().numpy(), y.cpu().numpy())).to(x),
    }


def timed(functions, x, y, rounds):
    """name -> (best seconds, images): CPU time on a CPU, synchronised wall time on a GPU."""
    clock = time.perf_counter if DEVICE == "cuda" else time.process_time
    best = {}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            adv = function(x, y)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best.get(name, (np.inf, None)), (clock() - start, adv), key=lambda pair: pair[0])
    return best


def measured(task, case, steps, restarts, rounds):
    """A row a library."""
    (model, x, y, eps), rows = task, []
    for name, (seconds, adv) in timed(ways(model, eps, steps, restarts), x, y, rounds).items():
        model.eval()
        stands = (kafnb.evaluate.predict(model, adv).to(DEVICE) == y).float().mean().item()
        rate = len(x) * steps * restarts / seconds
        rows.append({"case": case, "library": name, "images_steps_per_s": rate, "seconds": seconds})
        rows[-1] |= {"standing": stands, "n": len(x), "eps": eps}
    return rows


def measured_apart(task, *what):
    """``measured`` in a fresh process with glibc's defaults, which never gets to training."""
    code = (
        "import sys, pickle, torch, benchmark_attacks as b; torch.set_num_threads(1); "
        "out = b.measured(*pickle.load(sys.stdin.buffer)); pickle.dump(out, open(sys.argv[1], 'wb'))"
    )
    folder, env = os.path.dirname(__file__), {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    with tempfile.TemporaryDirectory() as there:
        out = os.path.join(there, "rows")
        command = [sys.executable, "-c", code, out]
        subprocess.run(command, input=pickle.dumps((task, *what)), check=True, env=env, cwd=folder)
        with open(out, "rb") as f:
            return pickle.load(f)


def test_pgd(task):
    rows = measured(task, "PGD-10", 10, 1, 12) + measured(task, "PGD-50-10", 50, 10, 2)
    table = pd.DataFrame(rows + measured_apart(task, "PGD-10, fresh process", 10, 1, 12))
    others = table[~table.library.str.startswith("kafnb")].groupby("case").images_steps_per_s.max()
    table["times_fastest_library"] = table.images_steps_per_s / table.case.map(others)
    print("\n", table.round(4).to_string())
    name, folder = f"attacks_{DEVICE}", paths.home() / "figures" / "benchmark"
    paths.write_atomically(folder / f"{name}.csv", lambda p: table.to_csv(p, index=False, lineterminator="\n"))
    where = {"device": provenance.device_name(DEVICE), "processor": cpuinfo.get_cpu_info().get("brand_raw", "")}
    figures.update_manifest(folder, "tables", name, where | provenance.provenance())
    assert (table.images_steps_per_s > 0).all() and table.standing.between(0, 1).all()
