"""One experiment's results in its folder: the model trained or read, its evaluations measured or read."""

import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError

from .activations import ACTIVATIONS, activation
from .checks import shown
from .data import load_data
from .evaluate import Score, model_device
from .evaluations import CLEAN
from .methods import METHODS
from .provenance import code_fingerprint, code_of, device_name, provenance
from .recipe import OPTIMIZERS, epochs_of
from .store import Folder, key_of
from .training import fit

PRODUCTS = ("weights.safetensors", "history.csv", "experiment.json")


def weights_code(experiment):
    """Fingerprint of the code that the weights come from: this package's, and that of a user's own activation."""
    with torch.random.fork_rng(devices=[]):
        parts = {type(m) for m in activation(experiment.activation, 8).modules()}
    own = [METHODS.get(experiment.recipe.method), OPTIMIZERS.get(experiment.recipe.optimizer)]
    if experiment.activation in ACTIVATIONS:  # not in there: a KAF by its kernels' names
        own.append(ACTIVATIONS[experiment.activation])
    return code_of(("data", "models", "training"), [*parts, *own])


def origin_of(experiment, data):
    """What a checkpoint must have been written with to be gone on from."""
    return {"code": weights_code(experiment), "data": data.fingerprint}


def finished_in(folder, experiment, data):
    """True if the folder holds a whole result that may be used; an error if that is of other data or another recipe."""
    if not all(folder.has(name) for name in PRODUCTS):
        return False
    record = folder.read_json("experiment.json")
    if (trained_on := record.get("data_fingerprint")) != data.fingerprint:
        raise ValueError(
            f"{folder.path} was trained on other data ({shown(trained_on)}) than {data.name} is now "
            f"({data.fingerprint}): move that folder away, or name the right data"
        )
    stored, wanted = record.get("experiment", {}), json.loads(json.dumps(dataclasses.asdict(experiment)))
    for then, now in ((stored, wanted), (stored.get("recipe", {}), wanted["recipe"])):
        for field in (then.keys() & now.keys()) - {"data", "recipe"}:  # a key leaves out what has its default value
            if then[field] != now[field]:
                raise ValueError(
                    f"{folder.path} was trained with {field} {shown(then[field])}, which is {shown(now[field])} now: a "
                    "default has changed; move that folder away"
                )
    return folder.by_this_code("weights.safetensors", record.get("code"), weights_code(experiment))


def _loaded(folder, model):
    """Whether the stored weights fit the model, which has them then."""
    try:
        model.load_state_dict(folder.read_weights())
    except (RuntimeError, SafetensorError):
        folder.set_aside("weights.safetensors", "does not hold the weights of this model (an older format?)")
        return False
    return True


def trained(folder, experiment, data, device, progress, finished=None, report=None, learn=None):
    """Load, resume or train; the model on ``device`` in eval mode. ``finished``: what ``finished_in`` said, if asked.

    ``report(done, total)`` is called after each epoch; ``learn`` stands in for ``fit``.
    """
    model, origin = experiment.build(data).to(device), origin_of(experiment, data)
    if finished_in(folder, experiment, data) if finished is None else finished:
        if _loaded(folder, model):
            folder.drop(*folder.checkpoints())  # of a process that was killed at its very end
            return model.eval()
        model = experiment.build(data).to(device)  # some of the weights may have fitted
    started = time.perf_counter()

    def save(state):
        folder.write_checkpoint(state | origin)
        if report:
            report(len(state["history"]), epochs_of(experiment.recipe))

    history = (learn or fit)(
        model, data, experiment.recipe, seed=experiment.seed, device=device, progress=progress,
        resume=folder.read_checkpoint(**origin), save=save,
    )  # fmt: skip
    folder.drop("experiment.json")  # an older one; killed now, nothing is whole, and the checkpoint is gone on from
    folder.write_weights(model)
    folder.write_table("history.csv", history)
    record = {
        "format": 1,
        "experiment": dataclasses.asdict(experiment),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_fingerprint": data.fingerprint,
        "code": origin["code"],
        "seconds": round(time.perf_counter() - started, 2),
        "device": device_name(device),
    }
    folder.write_json("experiment.json", record | provenance())
    folder.drop(*folder.checkpoints())
    return model


def evaluation_file(evaluation):
    return f"evaluation-{evaluation.name.split(' ')[0].lower()}-{key_of(evaluation)}.csv"


def _unlike(made, evaluation, weights):
    """Why a stored evaluation with the comment ``made`` is not this one, in words; empty if it is."""
    if made.get("weights", weights) != weights:
        return "is of other weights than are there now"
    changed = [field for field, value in dataclasses.asdict(evaluation).items() if made.get(field, value) != value]
    return f"was measured with another {' and '.join(changed)}: a default has changed" if changed else ""


def _stored(folder, evaluation, truth, origin):
    """The ``Score`` in a stored evaluation, or None where there is none that may be used."""
    name = evaluation_file(evaluation)
    if not folder.has(name):
        return None
    made = folder.read_comment(name)
    if reason := _unlike(made, evaluation, origin["weights"]):
        folder.set_aside(name, reason)
        return None
    if not folder.by_this_code(name, made.get("code"), origin["code"]):
        return None
    try:
        table = folder.read_table(name)
        correct, images = table["correct"].to_numpy(), table["label"].to_numpy()
        right = set(correct) <= {0, 1} and np.array_equal(images, truth.numpy())
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        folder.set_aside(name, "does not hold an evaluation on these images")
        return None
    return Score(correct.astype(bool), "none" if evaluation.attack == "none" else evaluation.labels)


def _evaluations_code():
    return code_fingerprint("data", "evaluations", "models")


def _score(folder, evaluation, model, data):
    code, truth = _evaluations_code(), data.y_test[: evaluation.n]
    origin = {"code": code, "weights": folder.digest("weights.safetensors")}
    if score := _stored(folder, evaluation, truth, origin):
        return score
    # told the prediction, an attack begins with the images that are right, and does to them what it does told the truth
    both = evaluation.labels == "true" and dataclasses.replace(evaluation, labels="predicted")
    if both and evaluation.attack != "none" and (told := _stored(folder, both, truth, origin)):
        clean = _score(folder, CLEAN, model, data)
        score = Score(told.correct & clean.correct[: told.n], "true")
        device = folder.read_comment(evaluation_file(both)).get("device")
    else:
        net = model()
        score, device = evaluation(net, data), device_name(model_device(net))
    table = pd.DataFrame(
        {"image": range(score.n), "label": data.y_test[: score.n], "correct": score.correct.astype(int)}
    )
    origin = {"code": code, "weights": folder.digest("weights.safetensors"), "device": device}
    folder.write_table(evaluation_file(evaluation), table, json.dumps(dataclasses.asdict(evaluation) | origin))
    return score


def measure(experiment, evaluations, *, store, data_root=None, device="cpu", progress=False, report=None):
    """Train or load one experiment, under its lock: (evaluation, Score) of clean accuracy and each evaluation.

    ``report(done, total)`` is called after each epoch.
    """
    data, folder = load_data(experiment.data, data_root), Folder(Path(store) / experiment.name)
    with folder.lock():
        finished = finished_in(folder, experiment, data)
        train = functools.partial(trained, folder, experiment, data, device, progress, finished, report)
        model = functools.cache(train)
        if not finished:
            model()
        asked = (CLEAN, *evaluations)
        order = sorted(asked, key=lambda e: (e.attack != "none", e.labels == "true"))
        scores = {e: _score(folder, e, model, data) for e in order}
        return [(e, scores[e]) for e in asked]


def measured(experiment, evaluations, store, data_root):
    """True if ``measure`` would only read; a training in another process is not waited for."""
    folder, data = Folder(store / experiment.name), load_data(experiment.data, data_root)
    if not folder.path.is_dir() or (folder.busy() and not (folder.path / PRODUCTS[-1]).exists()):  # written last
        return False
    files = {evaluation_file(e): e for e in (CLEAN, *evaluations)}
    with folder.lock():
        if not (all(map(folder.has, files)) and finished_in(folder, experiment, data)):
            return False
        weights, code = folder.digest("weights.safetensors"), _evaluations_code()
        made = {name: folder.read_comment(name) for name in files}
        return not any(_unlike(made[name], evaluation, weights) for name, evaluation in files.items()) and all(
            folder.by_this_code(name, made[name].get("code"), code) for name in files
        )
