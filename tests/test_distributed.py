"""DDP under torchrun, two processes on gloo: the same network as one process trains, whatever the method."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import kafnb
from kafnb import Experiment, Recipe, distributed, fit, models
from kafnb.methods import METHODS

CASES = {
    **{m: ("mlp", Recipe(m, epochs=2, lr=(0.01, 0.05), batch_size=40, eps=0.05, steps=2, replays=2)) for m in METHODS},
    # batch normalisation, dropout, momentum, clipping, augmentation, a KAF; 27 and 27 + 27 + 26 images at last
    "norm": ("light_cnn", Recipe("fgsm_rs", epochs=2, lr=(0.01, 0.05), batch_size=40, eps=0.05, momentum=0.9, clip=1.0, augment="crop_flip")),
    "uneven": ("mlp", Recipe("n_fgsm", epochs=2, lr=(0.01, 0.05), batch_size=27, eps=0.05)),
}  # fmt: skip


class Double(torch.nn.Module):
    """A network in float64 for float32 images: what differs then is not rounding."""

    def __init__(self, model):
        super().__init__()
        self.model = model.double()
        self.l2, self.l2_layers = model.l2, model.l2_layers

    def forward(self, x):
        return self.model(x.double())


def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if CASES[name][0] == "mlp":
            model = models.mlp("kaf_elu", hidden=(24,))
        else:
            model = models.light_cnn("kaf_elu", in_channels=1, image_size=8)
    # these two take the layers apart, which Double would hide
    return model if name in ("interval", "lipschitz") else Double(model)


def cut(n=200):
    digits = kafnb.load_data("digits")
    return dataclasses.replace(digits, x_train=digits.x_train[:n], y_train=digits.y_train[:n])


def work(folder, names, **how):
    """What each process runs: train each case, the first keeps the weights."""
    torch.set_num_threads(1)
    with distributed.group() as (rank, _, device):
        for name in names.split(","):
            model = network(name)
            history = distributed.fit(model, cut(), CASES[name][1], seed=1, device=device, **how)
            if rank == 0:
                save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f"{folder}/{name}.safetensors")
                history.to_csv(f"{folder}/{name}.csv", index=False)


def say(model):
    """One line in one write: the processes share one pipe."""
    sys.stdout.write(f"sum {sum(float(p.detach().double().abs().sum()) for p in model.parameters())}\n")


def torchrun(code, processes=2, check=True):
    """Run code in several processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    script = os.path.join(os.environ["KAFNB_TEST_SCRIPTS"], "script.py")
    with open(script, "w") as f:
        f.write(code)
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.fixture(autouse=True)
def scripts(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFNB_TEST_SCRIPTS", str(tmp_path))


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.fixture(scope="module")
def alone():
    out = {}
    for name, (_, recipe) in CASES.items():
        model = network(name)
        history = fit(model, cut(), recipe, seed=1)
        start = network(name).state_dict()
        out[name] = {k: v.clone() for k, v in model.state_dict().items()}, history, distance(start, out_of(model))
    return out


def out_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"accumulate": 2}], ids=["two processes", "in two parts each"])
def test_two_processes_train_what_one_does(tmp_path, alone, how):
    names = [n for n in CASES if not (how and n == "norm")]  # batch statistics are those of a part
    torchrun(f"import test_distributed as t; t.work({str(tmp_path)!r}, {','.join(names)!r}, **{how})")
    for name in names:
        want, history, moved = alone[name]
        got = load_file(tmp_path / f"{name}.safetensors")
        exact = name not in ("interval", "lipschitz")  # the others are in float32
        assert distance(got, want) < (1e-7 if exact else 2e-4) < moved / 10, (name, distance(got, want), moved)
        import pandas as pd

        rows = pd.read_csv(tmp_path / f"{name}.csv")
        assert rows.loss.to_numpy() == pytest.approx(history.loss.to_numpy(), rel=1e-4), name
        assert rows.accuracy.to_numpy() == pytest.approx(history.accuracy.to_numpy(), abs=1e-9), name


@pytest.mark.slow
def test_without_synchronised_statistics_it_is_another_network(tmp_path, alone):
    """The check above can fail: it is the statistics of the whole batch that make the result the same."""
    torchrun(f"import test_distributed as t; t.work({str(tmp_path)!r}, 'norm', sync_batchnorm=False)")
    assert distance(load_file(tmp_path / "norm.safetensors"), alone["norm"][0]) > 1e-4


EXPERIMENT = Experiment(
    "digits", "mlp", "kaf_elu", Recipe("fgsm_rs", epochs=4, lr=(0.003, 0.1), eps=0.1), options={"hidden": (16,)}
)


def test_a_batch_with_too_few_images_for_the_parts_keeps_its_place_in_the_schedule():
    recipe, rates = Recipe(epochs=4, batch_size=128, lr=(0.01, 0.1)), {}
    for parts in (1, 3):  # 258 images: the last batch has two
        rates[parts] = distributed.fit(network("standard"), cut(258), recipe, accumulate=parts).lr.tolist()
    assert rates[3] == pytest.approx(rates[1])


@pytest.mark.slow
def test_one_script_trains_several(tmp_path):
    code = f"""
import dataclasses, torch, test_distributed
from kafnb import distributed
torch.set_num_threads(1)
for seed in range(3):
    experiment = dataclasses.replace(test_distributed.EXPERIMENT, seed=seed)
    test_distributed.say(distributed.train(experiment, store={str(tmp_path / "store")!r}))
"""
    sums = [line for line in torchrun(code).stdout.splitlines() if line.startswith("sum")]
    assert len(sums) == 6 and len(set(sums)) == 3 and len(list((tmp_path / "store").glob("mlp-*"))) == 3


@pytest.mark.slow
def test_stopped_on_two_processes_goes_on_with_three_and_is_kept_once(tmp_path):
    kafnb.run(EXPERIMENT, store=tmp_path / "alone")
    call = f"distributed.train(test_distributed.EXPERIMENT, store={str(tmp_path / 'store')!r})"
    stop = f"""
import torch, test_distributed
from kafnb import distributed
from kafnb.store import Folder
torch.set_num_threads(1)
write = Folder.write_checkpoint
def stopping(self, state):
    write(self, state)
    if len(state["history"]) == 2:
        raise SystemExit(3)
Folder.write_checkpoint = stopping
{call}
"""
    assert torchrun(stop, check=False).returncode != 0
    folder = tmp_path / "store" / EXPERIMENT.name
    assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "checkpoint-00002.pt"]
    ended = torchrun(
        f"import torch, test_distributed\nfrom kafnb import distributed\ntorch.set_num_threads(1)\nm = {call}\n"
        "test_distributed.say(m)",
        processes=3,
    )
    got, want = (load_file(tmp_path / s / EXPERIMENT.name / "weights.safetensors") for s in ("store", "alone"))
    assert distance(got, want) < 2e-3  # float32: a sign of a gradient near zero may differ
    sums = [line for line in ended.stdout.splitlines() if line.startswith("sum")]
    assert len(sums) == 3 and len(set(sums)) == 1
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    assert not list(folder.glob("checkpoint*")) and not list(folder.glob(".*.part"))
    # what is there is read by all
    again = torchrun(f"import test_distributed\nfrom kafnb import distributed\nm = {call}\ntest_distributed.say(m)")
    assert {line for line in again.stdout.splitlines() if line.startswith("sum")} == set(sums)


class Asked(TorchDispatchMode):
    """Counts how often a tensor's value is asked for: on CUDA each time waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_values_are_asked_for_once_an_epoch(tiny):
    counts = []
    for batch_size in (20, 100):
        with Asked() as asked:
            recipe = Recipe("fgsm_rs", epochs=2, lr=(0.01, 0.1), batch_size=batch_size, eps=0.1)
            distributed.fit(models.mlp("relu", hidden=(8,)), tiny, recipe, accumulate=2)
        counts.append(asked.count)
    assert counts[0] == counts[1]


def test_one_process_is_plain_training(tiny):
    recipe = Recipe("fgsm_rs", epochs=2, lr=(0.01, 0.1), eps=0.1)
    a, b = (models.mlp("relu") for _ in range(2))
    b.load_state_dict(a.state_dict())
    fit(a, tiny, recipe), distributed.fit(b, tiny, recipe)
    assert distance(a.state_dict(), b.state_dict()) == 0
