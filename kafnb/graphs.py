"""A training step on CUDA as one graph: captured once, then replayed.

A step of ResNet20 on 128 small images is about a thousand kernels of a few microseconds each; asked for one by one,
they take Python longer than the GPU. A graph is asked for once. It reads and writes the same memory at every replay,
so what changes from step to step, the indices of the images and the learning rate, is written there beforehand; and
nothing in it may ask the GPU for a value. Random numbers come from the generator's state at each replay, as in a step
without a graph.
"""

import contextlib
import os

import torch

WARMUP = 3  # steps before the capture, so that kernels are compiled and the optimiser's memory is there
QUIET = ("standard", "fgsm", "fgsm_rs", "pgd", "n_fgsm", "trades", "gaussian")  # methods that ask for no value
OPTIMIZERS = ("sgd", "adam")  # whose rate can stand on the GPU; a user's own are not touched


def usable(model, recipe, device):
    """True where ``Graphed`` can stand in for a step of this recipe; the environment's KAFNB_GRAPHS=0 says never.

    A network with layers that are neither PyTorch's nor ours is left to plain steps: they may ask for values.
    """
    quiet = recipe.method in QUIET and recipe.optimizer in OPTIMIZERS and recipe.precision != "float16"
    quiet &= all(type(m).__module__.split(".")[0] in ("torch", "kafnb") for m in model.modules())
    changing = recipe.monitor or recipe.kwta_start is not None
    wanted = os.environ.get("KAFNB_GRAPHS", "1") != "0"
    return torch.device(device).type == "cuda" and quiet and not changing and wanted


@contextlib.contextmanager
def tried(device):
    """Inside, cuDNN times its kernels on CUDA and takes the quickest: pays where many steps have one shape."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, cudnn.benchmark or torch.device(device).type == "cuda"
    try:
        yield
    finally:
        cudnn.benchmark = before


def prepare(optimizer, device, graphed):
    """Make an optimiser, fresh or with a state from elsewhere, ready for steps in a graph, or for steps without."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if graphed else rate
        group["fused"] = True if graphed else None  # the one that reads its rate on the GPU
        if "capturable" in group:
            group["capturable"] = graphed
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].to(device if graphed else "cpu")


def set_rate(optimizer, rate):
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def capture(step, index):
    """(replay, outputs) of ``step(index)``, which is recorded here and not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(index.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(index.device)):
        outputs = step(index)
    return graph.replay, outputs


class Graphed:
    """``graphed(step, index)`` is ``step(index)``, a tuple of tensors; from the fourth call on by replay.

    The outputs are those of the last replay, in the same memory: use them before the next. An index of another length
    than the first one's, the last batch of an epoch, goes through ``step`` itself.
    """

    def __init__(self):
        self.index = self.replay = self.outputs = None
        self.calls = 0

    def __call__(self, step, index):
        if self.index is None:
            self.index = index.clone()
        if len(index) != len(self.index):
            return step(index)
        self.calls += 1
        if self.calls <= WARMUP:
            return _aside(step, index)
        self.index.copy_(index)
        if self.replay is None:
            self.replay, self.outputs = capture(step, self.index)
        self.replay()
        return self.outputs


def _aside(step, index):
    """``step(index)`` on another stream than the default, as a capture wants the steps before it."""
    if not index.is_cuda:
        return step(index)
    stream, here = torch.cuda.Stream(index.device), torch.cuda.current_stream(index.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        outputs = step(index)
    here.wait_stream(stream)
    return outputs
