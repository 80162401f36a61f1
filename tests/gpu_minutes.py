"""Some minutes of a GPU: the tests that need one, the KAF layer's benchmark, and what profile ``paper`` lacks.

    python tests/gpu_minutes.py --minutes 14 --data-root TREE --out FOLDER

If a test fails, nothing is trained. Notebooks 14, 12, 09 and 18 say what is wanted: their cells run up to each question
for trained networks, and ask on. First comes each one's table with seed 0, then what else 09, 12, 14 and 18 ask with
it, then the other seeds. Networks that come along, and what is in ``results/``, are not computed again. Any moment may
be the last: a training goes on from its last epoch the next time, and an attack is begun only if it is likely to end.
FOLDER gets figures/benchmark/, the logs and what is new in results/, as one archive in parts of 15 MB: ``cat
minutes.tar.gz.* | tar xz`` in a checkout, then ``python -m kafnb figures --profile paper --stored --only 12 14 18``.
(09 attacks on its own: half an hour on a CPU for ten networks.)
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import kafnb
from kafnb import dryrun, notebooks, paths, pretrained, profiles
from kafnb.results import measured

NOTEBOOKS = ("14", "12", "09", "18")  # in the order of their tables
ATTACK = {"pgd": 120, "autoattack": 150}  # seconds that must be left to begin one; of others, and in a dry run, 2
PART = 15 * 2**20


class Asked(Exception):
    """Ends a cell at its question for a trained network."""


def asked(name, profile, data_root):
    """[(experiments, evaluations)] of a notebook's questions, in its order; nothing is trained, attacked or drawn."""
    questions = []

    class Listener(profiles.Session):
        def run(self, runs, evaluations=()):
            runs = [runs] if isinstance(runs, kafnb.Experiment) else list(runs)
            evaluations = [evaluations] if isinstance(evaluations, kafnb.Evaluation) else list(evaluations)
            questions.append((runs, [dryrun.shorten(e) for e in evaluations]))
            raise Asked

        def load(self, experiment):
            self.run(experiment)

        def table(self, *arguments, **options):
            raise Asked

        def save(self, *arguments, **options):
            raise Asked

    cells = json.loads((paths.home() / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    names, own = {}, kafnb.Session
    kafnb.Session = Listener
    try:
        for cell in (c for c in cells if c["cell_type"] == "code"):
            # a cell fails where it needs what another was to compute
            with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
                exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                names |= dict(profile=profile, device="cpu", data_root=data_root and str(data_root))
    finally:
        kafnb.Session = own
    return questions


def wanted(profile, data_root):
    """{experiment: evaluations} of NOTEBOOKS, what matters most first."""
    places = {}  # experiment -> (seed, not of the first question, whose table or which notebook)
    evaluations = {}
    for i, name in enumerate(NOTEBOOKS):
        for j, (experiments, attacks) in enumerate(asked(notebooks.select([name])[0], profile, data_root)):
            for e in experiments:
                places.setdefault(e, (e.seed, j > 0, int(name) if j else i))
                evaluations.setdefault(e, {}).update(dict.fromkeys(attacks))
    return {e: tuple(evaluations[e]) for e in sorted(places, key=places.get)}


def compute(job, data_root, device, end):
    """Train and attack one network as far as time is left; a line on how it stands."""
    (experiment, evaluations), where, begun = job, dict(data_root=data_root, device=device), []
    table = kafnb.run(experiment, **where)
    for e in sorted(evaluations, key=lambda e: e.labels == "true"):  # one told the prediction tells of both
        if time.time() + (2 if dryrun.active() else ATTACK.get(e.attack, 2)) < end:
            begun.append(e)
            table = kafnb.run(experiment, begun, **where)
    waiting = f"; {len(evaluations) - len(begun)} attacks wait" * (len(begun) < len(evaluations))
    return f"{experiment.name}: " + ", ".join(f"{r.metric} {100 * r.rate:.1f}" for r in table.itertuples()) + waiting


def paper(end, data_root, device, workers, profile="paper"):
    """Work on all that is wanted until ``end`` (of ``time.time()``)."""
    jobs = wanted(profile, data_root)
    left = [(e, v) for e, v in jobs.items() if not measured(e, v, paths.home() / "results", data_root)]
    print(f"{len(jobs)} networks are wanted, {len(jobs) - len(left)} are there", flush=True)
    pool = multiprocessing.get_context("spawn").Pool(workers)
    work = functools.partial(compute, data_root=data_root, device=device, end=end)
    try:
        done = pool.imap_unordered(work, left)
        for _ in left:
            try:
                print(done.next(timeout=max(0.0, end - time.time())), flush=True)
            except (multiprocessing.TimeoutError, KeyboardInterrupt):
                print("time is up", flush=True)
                break
            except Exception as error:  # of one network: the others go on
                print(f"failed: {type(error).__name__}: {' '.join(str(error).split())}", flush=True)
    finally:
        pool.terminate()
        pool.join()


def run(log, seconds, *command):
    """Exit status of a command of this Python, its output in a log; "out of time" if it was ended after so many seconds.

    It is interrupted, and has ten seconds to keep what it measured.
    """
    with open(log, "w") as f, subprocess.Popen([sys.executable, *command], stdout=f, stderr=subprocess.STDOUT) as child:
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = "out of time"
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()
    print(f"{log.name}: {status}; {(log.read_text().strip().splitlines() or ['nothing'])[-1]}", flush=True)
    return status


def tests(logs, seconds):
    """False if a test marked gpu fails; else the benchmark is run, too, which writes figures/benchmark/."""
    files = [str(p) for p in sorted(Path(__file__).parent.glob("test_*.py")) if "mark.gpu" in p.read_text()]
    started, plain = time.time(), ("-m", "pytest", "-o", "addopts=", "-q")
    workers = str(max(1, os.cpu_count() - 2))
    if run(logs / "tests.log", seconds, *plain, "-m", "gpu", "-n", workers, *files) not in (0, "out of time"):
        return False
    left = max(1.0, seconds - (time.time() - started))
    benchmark = str(Path(__file__).parent / "benchmark_kaf.py")
    keep = f"--benchmark-json={logs / 'benchmark.json'}"
    few = ("-k", "not compiled")  # the compiler takes a minute and more for some of its cases
    run(logs / "benchmark.log", left, *plain, *few, "-p", "no:xdist", "--benchmark-only", keep, benchmark)
    return True


def pack(out, logs, since):
    """Logs, figures/benchmark/ and the experiments that changed since then, as ``minutes.tar.gz.NN``."""
    root, whole = paths.home(), logs / "whole.tar.gz"
    new = [p for p in sorted(root.glob("results/*")) if any(f.stat().st_mtime > since for f in p.glob("*"))]
    with tarfile.open(whole, "w:gz") as archive:
        for path in (*new, root / "figures" / "benchmark", *sorted(logs.glob("*.log")), *sorted(logs.glob("*.json"))):
            if path.exists():
                archive.add(path, path.relative_to(root))
    content = whole.read_bytes()
    for i in range(0, len(content), PART):
        (out / f"minutes.tar.gz.{i // PART:02d}").write_bytes(content[i : i + PART])
    print(f"{len(new)} experiments, {len(content) / 2**20:.1f} MB in {out}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True, help="all in all")
    parser.add_argument("--tests", type=float, default=5, help="of them at most for tests and benchmark (default 5)")
    parser.add_argument("--data-root", help="a train/, test/ image tree (default: torchvision's CIFAR-10)")
    parser.add_argument("--out", type=Path, required=True, help="the archive's folder")
    parser.add_argument("--workers", type=int, default=6, help="networks at a time")
    parser.add_argument("--dry-run", action="store_true", help="the same on few images, on a CPU, in runs/dry/")
    args = parser.parse_args()
    if args.data_root and not Path(args.data_root).is_dir():
        parser.error(f"--data-root: no folder {args.data_root}")
    end = time.time() + 60 * args.minutes - (2 if args.dry_run else 15)  # to pack
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of ``timeout``: stop, and pack what is there
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "KAFNB_PROGRESS": "0"}
    if args.dry_run:
        args.data_root = dryrun.prepare()
    logs = paths.home() / "runs" / "minutes"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    since = time.time()
    if args.tests and not tests(logs, 60 * min(args.tests, args.minutes)):
        pack(args.out, logs, since)
        sys.exit("a kernel computes something else here (tests.log): nothing is trained with it; --tests 0 insists")
    for name in pretrained.names():
        with contextlib.suppress(ValueError, FileExistsError):  # no record came along; it is there
            pretrained.restore(name)
    since = time.time()
    server = None if args.dry_run else shutil.which("nvidia-cuda-mps-control")
    # or the networks would take turns on the GPU; one that runs already is somebody's, and stays
    started = server is not None and subprocess.run([server, "-d"], check=False).returncode == 0
    try:
        paper(end, args.data_root, "cpu" if args.dry_run else "cuda", args.workers)
    finally:
        pack(args.out, logs, since)
        if started:  # a network that was ended in a kernel keeps it waiting
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run([server], input="quit -t 2\n", text=True, check=False, timeout=5)


if __name__ == "__main__":
    main()
