"""The engine "ray": one task an experiment, on this machine or on a cluster. Ray is imported when it is used."""

import tempfile
import uuid
from pathlib import Path

import torch

from .data import load_data
from .paths import home
from .registered import register, yours
from .store import Folder


def _remote(measure, experiment, evaluations, registered, i, board, *, store, token, files, threads, **where):
    """One experiment on a machine of the cluster. Returns its files where the store is out of reach, else None."""
    torch.set_num_threads(threads)
    register(registered)

    def report(done, total):
        board.put.remote(i, done, total)  # not waited for: a lost board must not stop the training

    if (Path(store) / token).exists():
        measure(experiment, evaluations, store=store, report=report, **where)
        return None
    with tempfile.TemporaryDirectory(prefix="kafnb-") as own:
        folder = Folder(Path(own) / experiment.name)
        folder.put_all(files)
        measure(experiment, evaluations, store=own, report=report, **where)
        return folder.get_all()


class Board:
    """Where the remote experiments write how far they are."""

    def __init__(self):
        self.news = []

    def put(self, i, done, total):
        self.news.append((i, done, total))

    def take(self):
        news, self.news = self.news, []
        return news


def gpu_share(experiment, data, memory):
    """The share of a GPU of ``memory`` bytes that an experiment is given: 1/k, where k of its size fit.

    Counted are the images, the weights with their gradients, momentum and copies, and the layers' outputs of a batch
    (of an evaluation's 512 images, if that is more) twice: kept for the backward pass, and on the way. 1.5 GiB are for
    what CUDA and its convolutions take.
    """
    model, outputs = experiment.build(data), []
    weights = sum(4 * p.numel() for p in model.parameters())
    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(4 * output.numel() / 2))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws
        model.train()(torch.zeros(2, data.in_channels, data.image_size, data.image_size))
    images = data.x_train.numel() + data.x_test.numel()
    need = images + 5 * weights + 2 * max(experiment.recipe.batch_size, 512) * sum(outputs) + 1.5 * 2**30
    return 1 / max(1, int(memory / need))


def _smallest_gpu(ray, at):
    """Bytes of memory of the first GPU of each node that has one; the least of them."""
    ask = ray.remote(num_cpus=0, num_gpus=0.01)(lambda: torch.cuda.get_device_properties(0).total_memory)
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")]
    if not nodes:
        raise ValueError("no machine of this Ray cluster has a GPU: device='cpu', or 'auto'")
    return min(ray.get([ask.options(scheduling_strategy=at(n, soft=False)).remote() for n in nodes]))


def connect(address=None, workers=None):
    """Ray: as it is if it was initialised, else at ``address``, else new on this machine and for this process."""
    import ray

    if not ray.is_initialized():
        # the cluster runs this very code, and looks for data where this process would
        here = {"py_modules": [str(Path(__file__).parent)], "env_vars": {"KAFNB_HOME": str(home())}}
        own = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address or "local", runtime_env=here, log_to_driver=False, logging_level="warning", **own)
    return ray


def ray_tasks(
    measure, experiments, evaluations, *, bars, retries, store, device, data_root, workers=None, threads=None,
    address=None,
):  # fmt: skip
    """One task an experiment on Ray; one that is lost with its worker or machine is started again.

    Where a worker sees the store (the same path on a shared file system) it works in it, and what is started again
    resumes from the last checkpoint. Where not, the files come back with the result, and it starts from the beginning.
    Of a GPU each experiment gets a share by memory (``gpu_share``). ``bars`` is told of progress; see ``engines``.
    """
    ray = connect(address, workers)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At

    if device == "auto":
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    memory = _smallest_gpu(ray, At) if str(device).startswith("cuda") else None
    here = At(ray.get_runtime_context().get_node_id(), soft=True)
    board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
    store, token = Path(store).resolve(), f".seen-{uuid.uuid4().hex}"
    where = dict(store=str(store), token=token, threads=threads or 1, device=device, data_root=data_root)
    task, todo = ray.remote(num_cpus=threads or 1, max_retries=retries)(_remote), {}
    store.mkdir(parents=True, exist_ok=True)
    (store / token).touch()
    try:
        registered = ray.put(yours(experiments))
        for i, e in enumerate(experiments):
            share = gpu_share(e, load_data(e.data, data_root), memory) if memory else 0
            folder = Folder(store / e.name)
            with folder.lock():  # what another process has written, and not listed yet, would look damaged
                files = folder.get_all()
            task_of_e = task.options(num_gpus=share, name=e.name)
            todo[task_of_e.remote(measure, e, evaluations, registered, i, board, files=files, **where)] = i
        while todo:
            done, _ = ray.wait(list(todo), timeout=0.5)
            for news in _news(ray, board):
                bars.report(*news)
            for reference in done:
                files, i = ray.get(reference), todo[reference]
                if files is not None:
                    folder = Folder(store / experiments[i].name)
                    with folder.lock():
                        folder.put_all(files)
                bars.finished(todo.pop(reference))
    finally:
        for reference in todo:  # after an error or an interrupt nobody waits for the others
            ray.cancel(reference, force=True)
        ray.kill(board)
        (store / token).unlink(missing_ok=True)


def _news(ray, board):
    try:
        return ray.get(board.take.remote(), timeout=5)
    except ray.exceptions.RayError:  # no news is no reason to stop
        return []
