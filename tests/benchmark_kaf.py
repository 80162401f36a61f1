"""Benchmark of the KAF layer: ``make bench`` prints the table and keeps it in figures/benchmark/.

Forward and backward at 64x16x32x32, the gradients in input and all that is learned taken, CPU time of one thread. On
CUDA at 256x64x32x32, too large for the GPU's cache, and the time of a replayed graph, as in training; there also the
forward pass alone, beside a copy. Peak memory counts what is allocated above the inputs, in units of one activation.
"""

import pytest
import torch
from torch.nn import functional as F

from kafnb import KAF, fit, models
from kafnb.data import Data
from kafnb.profiles import PROFILES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (64, 16, 32, 32) if DEVICE == "cpu" else (256, 64, 32, 32)


def plain(x, alpha, points, gamma):
    """The formula as written: a (N, C, H, W, D) tensor."""
    k = torch.exp(-gamma * (x[..., None] - points) ** 2)
    return (alpha.view(1, -1, 1, 1, alpha.shape[1]) * k).sum(-1)


def authors(x, alpha, points, gamma):
    """As the Kafnets authors lay it out: channels last, the dictionary as a trailing dimension, then a weighted sum."""
    x = x.permute(0, 2, 3, 1).unsqueeze(-1)
    k = torch.exp(-gamma * torch.square(x - points.view(1, 1, 1, 1, -1)))
    return torch.sum(k * alpha, dim=-1).permute(0, 3, 1, 2)


def ways(size):
    """name -> (function of x, what is learned)"""
    kaf, free = (KAF(SHAPE[1], size, trainable_dictionary=free).to(DEVICE) for free in (False, True))
    points, gamma = kaf.dictionary[0], kaf.grid.gamma
    conv = torch.nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1).to(DEVICE)
    formula = lambda x: plain(x, kaf.alpha, points, gamma)  # noqa: E731
    return {
        "KAF": (kaf, [kaf.alpha]),
        "KAF, compiled": (torch.compile(kaf, fullgraph=True), [kaf.alpha]),
        "KAF, compiled, subnormals 0": (torch.compile(kaf, fullgraph=True), [kaf.alpha]),
        "KAF_Free": (free, [*free.parameters()]),
        "KAF_Free, compiled": (torch.compile(free, fullgraph=True), [*free.parameters()]),
        "formula": (formula, [kaf.alpha]),
        "formula, compiled": (torch.compile(formula), [kaf.alpha]),
        "authors' layout": (lambda x: authors(x, kaf.alpha, points, gamma), [kaf.alpha]),
        "SiLU": (F.silu, []),
        "ReLU": (F.relu, []),
        "convolution 3x3": (conv, [conv.weight]),
    }


def peak_memory(function):
    """Most bytes allocated at a time during one call, above what was there before."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        function()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = [(20, n) for n in ways(20)] + [
    (size, n) for size in (5, 10, 50, 100) for n in ("KAF", "KAF, compiled", "KAF, compiled, subnormals 0", "formula")
]
if DEVICE == "cuda":  # no subnormal numbers there, and the compiler's code is not what anybody would take
    CASES = [c for c in CASES if "subnormals" not in c[1] and (c[0] == 20 or c[1] == "KAF")]


def step(function, x, g, learned):
    y = function(x)
    torch.autograd.grad(y, [x, *learned], g)


def timed(benchmark, function, rounds, warmup_rounds):
    """Of CPU time pytest-benchmark's statistics; of a GPU the median of a replayed graph, in ``extra_info``."""
    if DEVICE == "cpu":
        return benchmark.pedantic(function, rounds=rounds, warmup_rounds=warmup_rounds)
    from triton.testing import do_bench_cudagraph

    for _ in range(warmup_rounds):
        function()
    benchmark.extra_info["median_ms"] = do_bench_cudagraph(function, return_mode="median")
    benchmark.pedantic(function, rounds=1)


@pytest.mark.parametrize("size, name", CASES)
def test_layer(benchmark, size, name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    g = torch.randn(SHAPE, device=DEVICE)
    function, learned = ways(size)[name]
    slow = any(word in name for word in ("formula", "authors", "Free"))
    torch.set_flush_denormal("subnormals" in name)
    timed(benchmark, lambda: step(function, x, g, learned), 5 if slow else 25, 2)
    torch.set_flush_denormal(False)
    benchmark.extra_info["activations"] = peak_memory(lambda: step(function, x, g, learned)) / (x.numel() * 4)


@pytest.mark.skipif(DEVICE == "cpu", reason="of a CPU the whole step is timed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["copy", "KAF", "KAF_Free", "SiLU"])
def test_forward(benchmark, name, dtype):
    x = torch.randn(SHAPE, device=DEVICE, dtype=getattr(torch, dtype))
    function = torch.clone if name == "copy" else ways(20)[name][0]
    with torch.no_grad():
        timed(benchmark, lambda: function(x), 1, 2)
    seconds = benchmark.extra_info["median_ms"] / 1e3
    benchmark.extra_info["terabytes_per_second"] = 2 * x.numel() * x.element_size() / seconds / 1e12


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("activation", ["relu", "kaf"])
def test_resnet20_step(benchmark, activation, compiled):
    torch._dynamo.reset()
    x, y = torch.rand(32, 3, 32, 32, device=DEVICE), torch.randint(0, 10, (32,), device=DEVICE)
    model = models.resnet(20, activation).to(DEVICE)
    run = torch.compile(model) if compiled else model

    def train():
        F.cross_entropy(run(x), y).backward()

    timed(benchmark, train, 10, 3)


@pytest.mark.skipif(DEVICE == "cpu", reason="of a CPU, minutes")
@pytest.mark.parametrize("activation", ["relu", "swish", "kaf", "kaf_free"])
def test_training_step(benchmark, activation):
    """Of the thesis' training, FGSM-RS on batches of 128 in bfloat16: the last of three epochs of 200 steps."""
    x, y = torch.randint(0, 256, (25_600, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (25_600,))
    data = Data("noise", x, y, x[:1], y[:1], tuple("0123456789"))
    recipe = PROFILES["paper"].recipe("resnet20", epochs=3)
    train = lambda: fit(models.resnet(20, activation), data, recipe, device=DEVICE)  # noqa: E731
    history = benchmark.pedantic(train, rounds=1)
    benchmark.extra_info["median_ms"] = 1e3 * history.seconds.iloc[-1] / 200
