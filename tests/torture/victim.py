"""What the crash tests kill: a small programme that trains, evaluates, measures a table and saves a figure."""

import itertools
import os
import random
import signal
import warnings
from pathlib import Path

import pandas as pd
import torch

import kafnb
from kafnb import Evaluation, Experiment, Recipe, results

EXPERIMENTS = [
    Experiment("digits", "mlp", "kaf_elu", Recipe("fgsm_rs", epochs=4, lr=(0.003, 0.3), eps=0.1), 0, {"hidden": (16,)}),
    Experiment("digits", "mlp", "relu", Recipe(epochs=3, lr=(0.003, 0.3), momentum=0.9), 1, {"hidden": (16,)}),
]
EVALUATIONS = [Evaluation("pgd", eps=0.1, steps=5, restarts=2, n=60), Evaluation("fgsm", eps=0.1)]
WRITES = ("fsync", "replace", "unlink")


def squares(n):
    return pd.DataFrame({"n": range(n), "square": [i * i for i in range(n)]})


def work(home, phase=None, die_at=None, fail_at=None, limit=None, answer=None):
    """The programme in the folder ``home``.

    ``die_at``: kill this process at its so-many-th write to disk; a file being written is then half there.
    ``fail_at``: from that write on the disk is full. ``limit``: largest size of a file, bytes.
    """
    import matplotlib

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    os.environ["KAFNB_HOME"] = str(home)
    os.environ["KAFNB_PROGRESS"] = "0"
    warnings.simplefilter("ignore")
    tell = phase if phase is not None else type("Nobody", (), {})()
    if die_at is not None or fail_at is not None:
        _count_writes(die_at, fail_at)
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        tell.value = b"training"
        kafnb.run(EXPERIMENTS)
        tell.value = b"evaluating"
        table = kafnb.run(EXPERIMENTS, EVALUATIONS)
        tell.value = b"a table"
        notebook = kafnb.Session("99_victim")
        notebook.table(squares, 50)
        tell.value = b"a figure"
        import matplotlib.pyplot as plt

        figure, ax = plt.subplots()
        ax.bar(range(len(table)), table.rate)
        notebook.save(figure, "rates", table.drop(columns="correct"))
        plt.close(figure)
    except OSError as error:
        if answer is None:
            raise
        answer.send(f"{type(error).__name__}: {error}")


def _count_writes(die_at, fail_at):
    import errno

    counter = itertools.count(1)

    def counted(name, original):
        def call(target, *rest, **options):
            number = next(counter)
            if fail_at is not None and number >= fail_at and name != "unlink":  # which needs no space
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number == die_at:
                if name == "fsync":
                    os.ftruncate(os.open(f"/proc/self/fd/{target}", os.O_RDWR), os.fstat(target).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(target, *rest, **options)

        return call

    for name in WRITES:
        setattr(os, name, counted(name, getattr(os, name)))


def race(home, order, gate):
    """Run the experiments in this order, at once with others; each training leaves a line in trained.log."""
    torch.set_num_threads(1)
    os.environ["KAFNB_HOME"] = str(home)
    fit = results.fit

    def noted(model, data, recipe, **options):
        with open(Path(home) / "trained.log", "a") as log:
            log.write(f"{recipe.method} {options['seed']}\n")
        return fit(model, data, recipe, **options)

    results.fit = noted
    gate.wait()
    kafnb.run([EXPERIMENTS[i] for i in order], EVALUATIONS)


def snapshot(home):
    """Everything that must come out the same: relative path -> bytes; of histories all but the seconds."""
    home, out = Path(home), {}
    for path in sorted(p for p in home.rglob("*") if p.is_file()):
        name = str(path.relative_to(home))
        if path.name == "history.csv":
            out[name] = pd.read_csv(path).drop(columns=["seconds", "cpu_seconds"]).to_csv().encode()
        elif path.suffix in (".safetensors", ".png") or path.name.startswith(("evaluation", "table", "99_")):
            out[name] = path.read_bytes()
    return {
        name: content for name, content in out.items() if not any(s in name for s in (".damaged", ".part", ".lock"))
    }


def unsound(home):
    """Names of stored files that are there, listed, and not what the list says."""
    from kafnb.integrity import _sha256
    from kafnb.store import Folder

    bad = []
    for folder in (p for p in (Path(home) / "results").glob("[!.]*") if p.is_dir()):
        listed = Folder(folder)._sums()
        bad += [folder / n for n, d in listed.items() if (folder / n).exists() and _sha256(folder / n) != d]
    return bad


def delay(generator: random.Random, longest):
    """Seconds until the kill, and for one in four a moment right after the start of the programme."""
    return generator.uniform(0, 0.15) if generator.random() < 0.25 else generator.uniform(0, longest)
