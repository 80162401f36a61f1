"""Trained networks that come with the package: ``kafnb.load("light_cnn-kaf-standard")``.

    kafnb/weights/<name>.safetensors    the weights; in its metadata what network they are of
    kafnb/weights/<name>.md             its model card: data, recipe, every score in the store, where it was computed

Both are written by ``publish``; nothing in a card is typed.
"""

import dataclasses
import json
import re
import types
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from . import models
from .checks import pick
from .data import load_data
from .evaluate import Score
from .evaluations import CLEAN, Evaluation
from .figures import LABELS
from .paths import write_atomically
from .recipe import Recipe
from .store import Folder

WEIGHTS = Path(__file__).parent / "weights"


def names():
    """Of the networks that ``kafnb.load`` finds without training."""
    return tuple(sorted(p.stem for p in WEIGHTS.glob("*.safetensors")))


def load(name, device="cpu"):
    """The network of that name, in eval mode.

    Raises
    ------
    ValueError
        There is none of that name, or its file is damaged.
    """
    path = WEIGHTS / f"{pick(names(), name, 'name of a trained network')}.safetensors"
    try:
        with safe_open(path, "pt") as f:
            network = json.loads(f.metadata()["network"])
        shape = types.SimpleNamespace(**network["images"])
        with torch.random.fork_rng(devices=[]):
            model = models.build(network["model"], network["activation"], shape, **network["options"])
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): get it anew, git checkout -- {path}") from error
    return model.to(device).eval()


def publish(folder, data_root=None, epochs=False):
    """Put the weights of a finished experiment into ``kafnb/weights``, with a card of all its stored scores; its name.

    Parameters
    ----------
    folder : path
        Of the experiment, in a store: "results/light_cnn-kaf-standard-s0-79bdb963d3". Its data must be there too.
    epochs : bool
        Put their number into the name: of networks that come once trained shortly and once at length.

    Raises
    ------
    FileNotFoundError, ValueError
        No finished experiment is in that folder; its data are others now.
    """
    folder = Folder(folder)
    if not folder.path.is_dir() or not (folder.has("experiment.json") and folder.has("weights.safetensors")):
        raise FileNotFoundError(f"no finished experiment in {folder.path}: name a folder of the store")
    record = folder.read_json("experiment.json")
    run = record["experiment"] | {"options": dict(record["experiment"]["options"])}
    data, options = load_data(run["data"], data_root), run["options"]
    if record["data_fingerprint"] != data.fingerprint:
        raise ValueError(f"{folder.path} was trained on other data than {data.name} is now: name the right data")
    parts = run["model"], run["activation"], *map(str, options.values()), run["recipe"]["method"]
    parts += (f"{run['recipe']['epochs']} epochs",) * epochs
    name = "-".join(re.sub(r"[^\w.]+", " ", part).strip().replace(" ", "-") for part in parts)
    images = {k: getattr(data, k) for k in ("in_channels", "image_size", "num_classes")}
    network = {k: run[k] for k in ("model", "activation", "options")} | {"images": images}
    content = save(folder.read_weights(), {"format": "pt", "network": json.dumps(network)})
    write_atomically(WEIGHTS / f"{name}.safetensors", lambda p: p.write_bytes(content))
    text = _card(name, run, data, record, _scores(folder))
    write_atomically(WEIGHTS / f"{name}.md", lambda p: p.write_text(text))
    return name


def _scores(folder):
    """(Evaluation, Score) of every stored evaluation of these weights, the clean one first."""
    found = []
    for path in sorted(folder.path.glob("evaluation-*.csv")):
        made = folder.read_comment(path.name) if folder.has(path.name) else {}
        if made.get("weights") == folder.digest("weights.safetensors"):
            evaluation = Evaluation(**{f.name: made[f.name] for f in dataclasses.fields(Evaluation)})
            correct = folder.read_table(path.name)["correct"].to_numpy().astype(bool)
            found.append((evaluation, Score(correct, "none" if evaluation == CLEAN else evaluation.labels)))
    return sorted(found, key=lambda pair: (pair[0] != CLEAN, pair[0].labels != "true", pair[0].name))


def _card(name, run, data, record, scores):
    recipe = Recipe(**run["recipe"])
    rate = f"{recipe.lr[1]:g}" if recipe.schedule == "constant" else f"{recipe.lr[0]:g} to {recipe.lr[1]:g}"
    method = recipe.method if recipe.method == "standard" else f"{recipe.method}, eps {255 * recipe.eps:g}/255"
    how = f"{recipe.optimizer}, rate {rate} ({recipe.schedule}), {recipe.precision}"
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
