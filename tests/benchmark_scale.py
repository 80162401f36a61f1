"""Engines and the ImageNet recipe, timed: ``python tests/benchmark_scale.py`` (``--epochs`` sets an experiment's length).

Writes figures/benchmark/scale_cpu.csv (experiments an hour by engine and workers, and what an experiment costs beside
its own work), imagenet_cpu.csv (CPU time of one learned image at full size, and of decoding one) and
imagenet_small_cpu.csv (the recipe's code on two processes under torchrun). The manifest beside them says how many
cores the machine has and how busy it was: where other work runs, two workers cannot be twice one.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

import kafnb
from kafnb import cluster, engines, experiments, figures, imagenet, paths, provenance
from kafnb.methods import METHODS

FOLDER = paths.home() / "figures" / "benchmark"


def timed(experiment, evaluations, *, store, **where):
    """``experiments.measure``, and its wall and CPU seconds into the store's folder of times."""
    wall, cpu = time.perf_counter(), time.process_time()
    experiments.measure(experiment, evaluations, store=store, **where)
    line = f"{time.perf_counter() - wall} {time.process_time() - cpu}"
    (Path(store) / f".{experiment.name}.seconds").write_text(line)


def keep(name, table, **more):
    paths.write_atomically(FOLDER / f"{name}.csv", lambda p: table.to_csv(p, index=False, lineterminator="\n"))
    where = {"device": provenance.device_name("cpu"), "cores": os.cpu_count(), "command": " ".join(sys.argv)}
    figures.update_manifest(FOLDER, "tables", name, where | more | provenance.provenance())
    print(table.round(4).to_string())


def throughput(n, epochs):
    """A row for each engine and number of workers: the same n experiments, one thread each."""
    recipe = kafnb.Recipe("fgsm_rs", epochs=epochs, lr=(0.003, 0.3), eps=0.1)
    runs = [kafnb.Experiment("digits", "light_cnn", "relu", recipe, seed) for seed in range(n)]
    rows, busy = [], os.getloadavg()[0]
    cases = [("local", 1), ("processes", 1), ("processes", 2)]
    if importlib.util.find_spec("ray"):
        cases[1:1] = [("ray", 1), ("ray", 2)]
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a busy machine needs more than Ray's 30
    for engine, workers in cases:
        with tempfile.TemporaryDirectory() as store:
            where = dict(store=Path(store), device="cpu", data_root=None)
            start = time.perf_counter()
            if engine == "local":
                for e in runs:
                    timed(e, (), **where)
            else:
                if engine == "ray":
                    import ray

                    ray.shutdown()
                    cluster.connect(workers=workers)
                    # part of the start, once a worker: its process, and torch and the package imported
                    warm = ray.remote(num_cpus=1)(lambda: (importlib.import_module("kafnb"), time.sleep(1), None)[-1])
                    ray.get([warm.remote() for _ in range(workers)])
                started = time.perf_counter()
                engines.ENGINES[engine](timed, runs, (), **where, progress=False, workers=workers, threads=1)
            end = time.perf_counter()
            times = [[float(v) for v in p.read_text().split()] for p in Path(store).glob(".*.seconds")]
        wall, cpu = (sum(v) for v in zip(*times, strict=True))
        begin = start if engine == "local" else started
        rows.append(
            {
                "engine": engine, "workers": workers, "experiments": n, "start_s": begin - start, "seconds": end - begin,
                "own_wall_s": wall, "own_cpu_s": cpu, "per_hour": 3600 * n / (end - begin),
                "overhead_s": ((end - begin) * workers - wall) / n,
            }
        )  # fmt: skip
        keep("scale_cpu", pd.DataFrame(rows), load_before=busy, load_after=os.getloadavg()[0])


def full_size(batch=2):
    """CPU seconds an image: to learn from it with the full network, by activation and size; to decode and crop it."""
    torch.set_num_threads(1)
    rows = []
    for activation, sizes in (("relu", (128, 224, 288)), ("swish", (128,)), ("kaf_elu", (128,))):
        training = imagenet.Training(activation)
        model, recipe = training.build().train(), kafnb.Recipe("fgsm_rs", eps=training.eps)
        for size in sizes:
            x, y, best = torch.rand(batch, 3, size, size), torch.zeros(batch, dtype=torch.long), []
            for _ in range(2):
                start = time.process_time()
                for _, loss in METHODS["fgsm_rs"](model, x, y, recipe, {}):
                    loss.backward()
                best.append(time.process_time() - start)
            rows.append({"what": "learn", "activation": activation, "size": size, "cpu_s": min(best) / batch})
            rows[-1]["GFLOP"] = imagenet.flops(training, size) / 1e9
    with tempfile.TemporaryDirectory() as root:
        imagenet.toy_folder(root, classes=2, train=16, test=1, shape=(375, 500))  # about the mean size on ImageNet
        for size in (128, 224, 288):
            data, best = imagenet.images(root, True, size), []
            for _ in range(3):
                start = time.process_time()
                for i in range(len(data)):
                    data[i]
                best.append(time.process_time() - start)
            files = [Path(f).stat().st_size for f, _ in data.samples]
            rows.append({"what": "decode", "activation": "", "size": size, "cpu_s": min(best) / len(data)})
            rows[-1]["kB"] = sum(files) / len(files) / 1e3
    keep("imagenet_cpu", pd.DataFrame(rows))


def small():
    """The recipe at a small size on two processes of torchrun, for each activation."""
    tables = []
    with tempfile.TemporaryDirectory() as tmp:
        root = imagenet.toy_folder(Path(tmp) / "toy")
        for activation in ("relu", "swish", "kaf_elu"):
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kafnb.imagenet"]
            command += [str(root), "--small", "--activation", activation, "--workers", "0", "--device", "cpu"]
            subprocess.run([sys.executable, *command, "--store", tmp], check=True, stdout=subprocess.DEVNULL)
            training = imagenet.small(imagenet.Training(activation), 4)
            tables.append(pd.read_csv(Path(tmp) / training.name / "history.csv").assign(activation=activation))
    keep("imagenet_small_cpu", pd.concat(tables), load_after=os.getloadavg()[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiments", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=60, help="of each experiment (60: about 30 s on one core)")
    parser.add_argument("--only", choices=("scale", "full", "small"))
    arguments = parser.parse_args()
    if arguments.only in (None, "scale"):
        throughput(arguments.experiments, arguments.epochs)
    if arguments.only in (None, "full"):
        full_size()
    if arguments.only in (None, "small"):
        small()
