"""Engines: the same results from processes and from a Ray cluster as from one process, whatever is killed meanwhile.

``KAFNB_KILLS=10`` repeats the kill test ten times, (``-k kill_a_node``; one to two minutes each).
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import kafnb
from kafnb import Evaluation, Experiment, Recipe, __main__, cluster, engines, errata, profiles, registered
from kafnb.methods import METHODS
from kafnb.store import Folder

QUICK = Recipe("fgsm_rs", epochs=2, lr=(0.003, 0.3), eps=0.1)
PGD = Evaluation("pgd", eps=0.1, steps=2, n=30)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'ray>=2.60,<3'"
)


def table(n, recipe=QUICK, model="mlp"):
    options = {"hidden": (16,)} if model == "mlp" else {}
    return [Experiment("digits", model, a, recipe, s, options) for s in range(n) for a in ("relu", "kaf_elu")][:n]


def same(a, b):
    pd.testing.assert_frame_equal(a.drop(columns="correct"), b.drop(columns="correct"))
    assert all(np.array_equal(x, y) for x, y in zip(a.correct, b.correct, strict=True))


def whole(store, runs):
    """Nothing in the store but whole folders: every file listed, every sum right, no part, no checkpoint, no token."""
    assert {p.name for p in store.iterdir()} == {".locks", *(e.name for e in runs)}
    for e in runs:
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=store / e.name, check=True)
        listed = {line.split("  ")[1] for line in (store / e.name / "SHA256SUMS").read_text().splitlines()}
        assert {p.name for p in (store / e.name).iterdir()} == listed | {"SHA256SUMS"}


def eventually(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    return kafnb.run(table(4), [PGD], store=tmp_path_factory.mktemp("sequential"))


# --- processes -------------------------------------------------------------------------------------------------------


def test_processes_give_the_same_and_leave_no_child(sequential, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    runs = table(4)
    same(kafnb.run([*runs, runs[0]], [PGD], store=tmp_path, engine="processes", workers=2, threads=1)[:8], sequential)
    whole(tmp_path, runs)
    tracker = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert all("resource_tracker" in " ".join(p.cmdline()) for p in tracker)  # Python's own; one, and it stays


def test_what_is_there_starts_no_worker(sequential, tmp_path, monkeypatch):
    runs = table(4)
    kafnb.run(runs, [PGD], store=tmp_path)
    monkeypatch.setattr(engines, "ProcessPoolExecutor", None)  # to start one would now be an error
    same(kafnb.run(runs, [PGD], store=tmp_path, engine="processes"), sequential)
    with pytest.raises(TypeError):
        kafnb.run(runs, [dataclasses.replace(PGD, n=31)], store=tmp_path, engine="processes")


def test_what_another_process_is_at_is_handed_out_last(tmp_path, monkeypatch):
    runs, given = table(3), []

    def noted(measure, experiments, *_, **__):
        given.extend(experiments)
        raise InterruptedError

    monkeypatch.setitem(engines.ENGINES, "processes", noted)
    kafnb.run(runs[0], store=tmp_path)  # trained; now another measures it
    with ThreadPoolExecutor(1) as thread, Folder(tmp_path / runs[0].name).lock():
        running = thread.submit(kafnb.run, runs, [PGD], store=tmp_path, engine="processes")
        with pytest.raises(InterruptedError):
            running.result(timeout=30)
    assert given == [runs[1], runs[2], runs[0]]


def test_an_error_in_an_experiment_comes_back(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'kaf_elu'"):
        wrong = dataclasses.replace(table(1)[0], activation="kaf_eul")
        kafnb.run([wrong, *table(2)], store=tmp_path, engine="processes", workers=2)


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_a_wrong_device_is_said_before_a_worker_starts(tmp_path, monkeypatch, engine):
    monkeypatch.setattr(engines, "ProcessPoolExecutor", None)  # to start one would be another error
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"):
        kafnb.run(table(2), store=tmp_path, engine=engine, device="tpu")


def test_the_bars_are_closed_after_an_error(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(engines.Bars, "close", lambda self: closed.append(self))
    monkeypatch.setattr(engines, "ProcessPoolExecutor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kafnb.run(table(2), store=tmp_path, engine="processes", progress=True)
    assert len(closed) == 1


def test_what_you_registered_reaches_the_workers(tmp_path, monkeypatch):
    monkeypatch.setitem(kafnb.ACTIVATIONS, "square", lambda channels: torch.nn.Softshrink(0.1))
    monkeypatch.setitem(METHODS, "once", errata.frozen_start)  # of the package, and not registered by it
    mine = dataclasses.replace(table(1)[0], activation="square", recipe=dataclasses.replace(QUICK, method="once"))
    assert len(kafnb.run(mine, store=tmp_path, engine="processes", threads=1, device="auto")) == 1
    assert registered.yours(table(2)) == {"activation": {}, "method": {}, "optimizer": {}}


LONG = dataclasses.replace(QUICK, epochs=40)
SCRIPT = """
import sys, kafnb
sys.path.insert(0, {tests!r})
from test_engines import LONG, table
if __name__ == "__main__":
    kafnb.run(table(4, LONG, "light_cnn"), store={store!r}, engine={engine!r}, workers=2, threads=1)
"""


def start(tmp_path, engine):
    """A process of its own that runs four experiments, once its first checkpoint is there."""
    script, store = tmp_path / "script.py", tmp_path / "store"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), store=str(store), engine=engine))
    running = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert eventually(lambda: list(store.glob("*/checkpoint-*.pt")), 90), running.stderr.read()
    return running, psutil.Process(running.pid).children(recursive=True), store


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", pytest.param("ray", marks=needs_ray)])
def test_nothing_outlives_a_killed_run(tmp_path, engine):
    running, children, store = start(tmp_path, engine)
    assert len(children) >= 2
    running.kill()
    running.wait()
    try:
        # two agents of Ray try to tell the dead cluster for a minute before they go
        assert eventually(lambda: not any(p.is_running() and p.status() != "zombie" for p in children), 120)
        for folder in (p for p in store.iterdir() if (p / "SHA256SUMS").exists()):  # what it left is whole
            subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    finally:
        for p in (p for p in children if p.is_running()):
            p.kill()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_experiment_resumes(tmp_path, monkeypatch):
    runs, pools, store = table(2, dataclasses.replace(QUICK, epochs=14), "light_cnn"), [], tmp_path / "store"

    def pool(*arguments):
        pools.append(ProcessPoolExecutor(*arguments))
        return pools[-1]

    def listed():  # not when its file is there: killed before it is listed, a state is moved aside
        return any(re.search(r"checkpoint-0000[789]\.pt", p.read_text()) for p in store.glob("*/SHA256SUMS"))

    saved = {}  # experiment -> seconds of each epoch up to its last state

    def kill():
        if eventually(listed, 90):
            for process in list(pools[0]._processes.values()):  # one of them trains what was just saved
                process.kill()
            for path in store.glob("*/checkpoint-*.pt"):
                with contextlib.suppress(FileNotFoundError):  # the next one is there already
                    saved[path.parent.name] = [row["seconds"] for row in torch.load(path)["history"]]

    monkeypatch.setattr(engines, "ProcessPoolExecutor", pool)
    killer = threading.Thread(target=kill)
    killer.start()
    got = kafnb.run(runs, store=store, engine="processes", workers=2, threads=1)
    killer.join()
    assert len(pools) == 2 and max(map(len, saved.values())) >= 7
    whole(store, runs)
    same(got, kafnb.run(runs, store=tmp_path / "sequential"))
    kept = {e.name: kafnb.history(e, store=store).seconds.tolist() for e in runs}  # not of epochs trained again
    assert any(kept[name][: len(seconds)] == pytest.approx(seconds) for name, seconds in saved.items()), (kept, saved)


# --- Ray -------------------------------------------------------------------------------------------------------------


def test_ray_missing_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .ray>="):
        kafnb.run(table(1), store=tmp_path, engine="ray")
    assert __main__.main(["figures", "--engine", "ray"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kafnb: engine 'ray' needs Ray") and err.count("\n") == 1
    with pytest.raises(ValueError, match="did you mean 'ray'"):
        kafnb.run(table(1), store=tmp_path, engine="rya")


def test_what_a_cluster_computed_on_gpus_is_read_without_one(sequential, tmp_path, monkeypatch):
    def cluster_with_gpus(measure, experiments, evaluations, *, store, data_root, device, **where):
        assert device == "cuda"
        for e in experiments:
            measure(e, evaluations, store=store, data_root=data_root)

    monkeypatch.setitem(engines.ENGINES, "ray", cluster_with_gpus)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: True)
    for count in ("is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, count, lambda: 0)
    same(kafnb.run(table(4), [PGD], store=tmp_path, engine="ray", device="cuda"), sequential)


def test_the_engine_is_the_notebooks_too(monkeypatch):
    given = {}
    monkeypatch.setattr(profiles.experiments, "run", lambda runs, evaluations, **where: given.update(where))
    kafnb.Session("x").run([])
    assert given["engine"] == "local" and given["device"] in ("cpu", "cuda")
    monkeypatch.setenv("KAFNB_ENGINE", "processes")
    monkeypatch.setenv("KAFNB_ADDRESS", "10.0.0.1:6379")
    kafnb.Session("x").run([])
    assert (given["engine"], given["address"]) == ("processes", "10.0.0.1:6379")


def test_more_memory_is_more_experiments_a_gpu(digits):
    small, large = Experiment("digits", "mlp"), Experiment("digits", "resnet20", "kaf", options={"width": 64})
    state = torch.get_rng_state()
    cluster.gpu_share(Experiment("digits", "light_cnn"), digits, 2**30)  # its dropout draws
    assert torch.equal(torch.get_rng_state(), state)
    shares = [cluster.gpu_share(e, digits, gib * 2**30) for e in (small, large) for gib in (1, 8, 80)]
    assert shares[0] == 1.0 and shares[2] < shares[1] <= 1 / 4  # 1.5 GiB of 8, and of 80
    assert shares[3] == 1.0 and shares[4] > shares[1] and shares[5] > shares[2]
    assert all(float(1 / s).is_integer() for s in shares)


@pytest.fixture
def three_nodes():
    """A Ray cluster of three nodes of one core each, on this machine, and this process connected to it."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.60,<3'")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    cluster.connect(nodes.address)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


MIDDLE = dataclasses.replace(QUICK, epochs=12)  # long enough to be killed in the middle on a fast machine


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["shared store", "files sent back"])
@pytest.mark.parametrize("again", range(int(os.environ.get("KAFNB_KILLS", 1))))
def test_kill_a_node_in_the_middle_of_twelve_experiments(three_nodes, tmp_path, monkeypatch, shared, again):
    runs, store, starts, remote = (
        table(12, MIDDLE, "light_cnn"),
        tmp_path / "store",
        tmp_path / "starts",
        cluster._remote,
    )
    starts.mkdir()
    victim = three_nodes.list_all_nodes()[1]

    def noted(measure, experiment, *arguments, token, **where):
        """The engine's own task; notes that it started, on which node, and sees no store where none is shared."""
        node = ray.get_runtime_context().get_node_id()
        (starts / f"{experiment.name} {node} {os.getpid()}").touch()
        return remote(measure, experiment, *arguments, token=token if shared else "none", **where)

    def on_victim():
        return [p for p in starts.iterdir() if p.name.split()[1] == victim.node_id]

    def kill():
        if eventually(lambda: len(list(starts.iterdir())) >= 6 and on_victim(), 120):
            three_nodes.remove_node(victim, allow_graceful=False)

    import ray

    monkeypatch.setattr(cluster, "_remote", noted)
    killer = threading.Thread(target=kill)
    killer.start()
    got = kafnb.run(runs, [PGD], store=store, engine="ray")
    killer.join()
    assert eventually(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 2, 60)  # Ray takes a while to notice
    assert len(list(starts.iterdir())) > len(runs), "nothing was lost: the node was killed too late"
    whole(store, runs)
    same(got, kafnb.run(runs, [PGD], store=sequential_store(tmp_path)))


def sequential_store(tmp_path):
    """One for all repetitions: trained at the first."""
    return tmp_path.parent / "sequential-middle"


def test_bars_time_only_the_epochs_they_saw(capsys):
    bars = engines.Bars(table(1), show=True)
    bars.report(0, 15, 20)  # resumed, or first seen, after fifteen
    bar = bars.running[0]
    bars.report(0, 16, 20)
    assert (bar.initial, bar.n) == (15, 16)
    bars.report(0, 0, 20)  # trained, being attacked: the checkpoints are gone, the epochs are not
    assert bar.n == 16
    bars.finished(0)
    bars.close()
