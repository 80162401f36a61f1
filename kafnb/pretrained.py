"""Trained networks that come with the package: ``kafnb.load("light_cnn-kaf-standard")``.

    kafnb/weights/<name>.safetensors    the weights; beside them what network they are of, and what the store has of it
    kafnb/weights/<name>.md             its model card: data, recipe, every score in the store, where it was computed

Both are written by ``publish``; nothing in a card is typed. ``restore`` puts a network back into a store.
"""

import contextlib
import dataclasses
import json
import re
import types
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from . import models
from .checks import file_name, pick
from .data import load_data
from .evaluate import Score
from .evaluations import CLEAN, Evaluation
from .figures import LABELS
from .paths import write_atomically
from .recipe import Recipe
from .results import evaluation_file
from .store import Folder, default_store

WEIGHTS = Path(__file__).parent / "weights"
LABELLED, OUTCOME = "labels of the test images", "outcome "  # tensors beside the weights; no parameter has a space


def names():
    """Of the networks that ``kafnb.load`` finds without training."""
    return tuple(sorted(p.stem for p in WEIGHTS.glob("*.safetensors")))


def _read(name):
    """The file of a network by name, its metadata and its tensors, weights and others."""
    path = WEIGHTS / f"{pick(names(), name, 'name of a trained network')}.safetensors"
    with _whole(path), safe_open(path, "pt") as f:
        return path, {k: json.loads(v) for k, v in f.metadata().items() if k != "format"}, load_file(path)


@contextlib.contextmanager
def _whole(path):
    try:
        yield
    except (SafetensorError, RuntimeError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): get it anew, git checkout -- {path}") from error


def _weights(tensors):
    return {k: v for k, v in tensors.items() if " " not in k}


def load(name, device="cpu"):
    """The network of that name, in eval mode.

    Raises
    ------
    ValueError
        There is none of that name, or its file is damaged.
    """
    path, told, tensors = _read(name)
    with _whole(path):
        network = told["network"]
        shape = types.SimpleNamespace(**network["images"])
        with torch.random.fork_rng(devices=[]):
            model = models.build(network["model"], network["activation"], shape, **network["options"])
        model.load_state_dict(_weights(tensors))
    return model.to(device).eval()


def restore(name, store=None):
    """Put the network of that name into a store as if it had been trained there, with the scores that came along.

    ``run`` and the notebooks then find it, and train nothing. For that the data must be those of its card, under the
    name that the card has.

    Returns
    -------
    Path
        Its folder.

    Raises
    ------
    ValueError
        There is none of that name, it came without a record, or its file is damaged.
    FileExistsError
        The store has that experiment, or a training of it that can be gone on with.
    """
    path, told, tensors = _read(name)
    if "record" not in told:
        raise ValueError(f"{name} came without the record of its training: kafnb.load has it, a store cannot")
    with _whole(path):
        kept, weights, tables = told["record"], _weights(tensors), []
        folder = Folder(Path(store or default_store()) / file_name(kept["folder"], "folder"))
        for i, (made, n) in enumerate(kept["evaluations"]):
            correct = np.unpackbits(tensors[f"{OUTCOME}{i}"].numpy(), count=n)
            table = pd.DataFrame({"image": range(n), "label": tensors[LABELLED][:n].numpy(), "correct": correct})
            tables.append((evaluation_file(_evaluation(made)), table, made))
    with folder.lock():
        if folder.has("experiment.json") or folder.checkpoints():  # without, it is what a killed call left
            raise FileExistsError(f"{folder.path} is there already: to replace it, move it away")
        folder.write("weights.safetensors", lambda p: p.write_bytes(save(weights)))
        digest = folder.digest("weights.safetensors")
        for file, table, made in tables:
            folder.write_table(file, table, json.dumps(made | {"weights": digest}))
        folder.write("history.csv", lambda p: p.write_text(kept["history"]))
        folder.write_json("experiment.json", kept["experiment"])
    return folder.path


def publish(folder, data_root=None, epochs=False):
    """Put a finished experiment into ``kafnb/weights``, with a card of all its stored scores; its name.

    Parameters
    ----------
    folder : path
        Of the experiment, in a store: "results/light_cnn-kaf-standard-s0-79bdb963d3".
    data_root : path, optional
        Where its data are, or of an image folder where that is now.
    epochs : bool
        Put their number into the name: of networks that come once trained shortly and once at length. A seed other than
        0 is always in it.

    Raises
    ------
    FileNotFoundError, ValueError
        No finished experiment is in that folder; its data are others now.
    """
    folder = Folder(folder)
    if not folder.path.is_dir() or not (folder.has("experiment.json") and folder.has("weights.safetensors")):
        raise FileNotFoundError(f"no finished experiment in {folder.path}: name a folder of the store")
    with folder.lock():  # another process may be writing to it
        return _published(folder, data_root, epochs)


def _published(folder, data_root, epochs):
    record = folder.read_json("experiment.json")
    run = record["experiment"] | {"options": dict(record["experiment"]["options"])}
    moved = data_root and run["data"].startswith("folder:")
    held_out = ":validation" * run["data"].endswith(":validation")
    data, options = load_data(f"folder:{data_root}{held_out}" if moved else run["data"], data_root), run["options"]
    if record["data_fingerprint"] != data.fingerprint:
        raise ValueError(f"{folder.path} was trained on other data than {data.name} is now: name the right data")
    parts = run["model"], run["activation"], *map(str, options.values()), run["recipe"]["method"]
    parts += (f"{run['recipe']['epochs']} epochs",) * epochs + (f"seed {run['seed']}",) * (run["seed"] != 0)
    name = "-".join(re.sub(r"[^\w.]+", " ", part).strip().replace(" ", "-") for part in parts)
    images = {k: getattr(data, k) for k in ("in_channels", "image_size", "num_classes")}
    network = {k: run[k] for k in ("model", "activation", "options")} | {"images": images}
    evaluated = _evaluated(folder)
    kept = {"folder": folder.path.name, "experiment": record, "history": (folder.path / "history.csv").read_text()}
    kept["evaluations"] = [(made, len(correct)) for made, correct in evaluated]
    tensors = folder.read_weights() | {LABELLED: data.y_test.to(torch.int16)}
    tensors |= {f"{OUTCOME}{i}": torch.from_numpy(np.packbits(correct)) for i, (_, correct) in enumerate(evaluated)}
    content = save(tensors, {"format": "pt", "network": json.dumps(network), "record": json.dumps(kept)})
    write_atomically(WEIGHTS / f"{name}.safetensors", lambda p: p.write_bytes(content))
    scores = [(e, Score(c, "none" if e == CLEAN else e.labels)) for e, c in ((_evaluation(m), c) for m, c in evaluated)]
    scores.sort(key=lambda pair: (pair[0] != CLEAN, pair[0].labels != "true", pair[0].name))
    spent = folder.read_table("history.csv").seconds.sum() or record["seconds"]  # of every process that trained a part
    text = _card(name, run, data, record | {"seconds": spent}, scores)
    write_atomically(WEIGHTS / f"{name}.md", lambda p: p.write_text(text))
    return name


def _evaluation(made):
    """The ``Evaluation`` that a stored score is of; a field that came later has its default, as ``run`` takes it."""
    return Evaluation(**{f.name: made[f.name] for f in dataclasses.fields(Evaluation) if f.name in made})


def _evaluated(folder):
    """(how it was made, bool of each image) of every stored evaluation of these weights."""
    found, digest = [], folder.digest("weights.safetensors")
    for path in sorted(folder.path.glob("evaluation-*.csv")):
        made = folder.read_comment(path.name) if folder.has(path.name) else {}
        if made.get("weights") == digest:
            found.append((made, folder.read_table(path.name)["correct"].to_numpy().astype(bool)))
    return found


def _card(name, run, data, record, scores):
    recipe = Recipe(**run["recipe"])
    rate = f"{recipe.lr[1]:g}" if recipe.schedule == "constant" else f"{recipe.lr[0]:g} to {recipe.lr[1]:g}"
    method = recipe.method if recipe.method == "standard" else f"{recipe.method}, eps {255 * recipe.eps:g}/255"
    how = f"{recipe.optimizer}, rate {rate} ({recipe.schedule}), {recipe.precision}"
    how += f", k-WTA ratio from {recipe.kwta_start:g}" if recipe.kwta_start else ""
    network = [f"{run['model']} with {LABELS.get(run['activation'], run['activation'])}"]
    network += [f"{k} {v}" for k, v in run["options"].items()] + [f"{record['parameters']:,} parameters"]
    rows = "".join(
        f"| {e.name}{'' if e == CLEAN else f', eps {255 * e.eps:g}/255'} | {100 * s.rate:.1f} | "
        f"{100 * s.interval[0]:.1f} to {100 * s.interval[1]:.1f} | {s.n} |\n"
        for e, s in scores
    )
    return f"""---
license: mit
library_name: kafnb
---
# {name}

{", ".join(network)}. {data.in_channels}x{data.image_size}x{data.image_size} images in [0, 1]
to {data.num_classes} logits: {", ".join(data.classes)}.

```python
model = kafnb.load("{name}")
```

## Training

- Data: {data.name.removeprefix("folder:")}, {len(data.x_train):,} images, fingerprint {data.fingerprint}.
- Method: {method}; augmentation: {recipe.augment}; seed {run["seed"]}.
- {recipe.epochs} epochs in batches of {recipe.batch_size}; {how}.

## Scores

Per cent of the first n test images that stay right, with 95 % Wilson intervals.

| | % | interval | n |
|---|---|---|---|
{rows}
One run with one seed, for the study of attacks. Accuracy under an attack is an upper bound on robustness: a better
attack lowers it. "Predicted labels" is the thesis' protocol, which counts too many as robust.

Computed on {record["device"]} in {record["seconds"]:.0f} s with kafnb {record["kafnb"]} (commit {record["commit"]},
code {record["code"]}) and torch {record["torch"]}.
"""
