"""The store of trained models: one readable folder an experiment.

    results/<name>-<key>/
        experiment.json             what was run, on which data, code, device and versions
        history.csv                 one row an epoch
        weights.safetensors
        evaluation-<name>-<key>.csv one row a test image
        SHA256SUMS                  checksums of all of these (``sha256sum -c SHA256SUMS``)
        checkpoint-<epoch>.pt       only while training: state after the last finished epoch

A file counts once its checksum is listed; files are written whole or not at all; a lock a folder keeps a second
process from training the same model.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from .paths import home, write_atomically

SUMS = "SHA256SUMS"


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _changed(value):
    """The fields that differ from their defaults: a field added later leaves all old keys as they are."""
    out = {}
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if dataclasses.is_dataclass(v):
            v = _changed(v)
        if f.default is not dataclasses.MISSING and getattr(value, f.name) == f.default:
            continue
        out[f.name] = v
    return out


def key_of(value, length=10):
    """Hash of a frozen description: the name under which the store keeps what belongs to it."""
    text = json.dumps(_changed(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class Folder:
    """One experiment's folder. Use ``with folder.lock():`` around every sequence of read, compute, write."""

    def __init__(self, path):
        self.path = Path(path)

    def lock(self):
        locks = self.path.parent / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        # the operating system releases the lock when its process ends, however it ends
        return FileLock(locks / f"{self.path.name}.lock")

    def _sums(self):
        path = self.path / SUMS
        lines = path.read_text().splitlines() if path.exists() else []
        return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}

    def has(self, name):
        """True if the file is there, listed and undamaged; a damaged one is moved aside with a warning."""
        digest, path = self._sums().get(name), self.path / name
        if digest is None or not path.exists():
            return False
        if _sha256(path) == digest:
            return True
        aside = path.with_name(name + ".damaged")
        os.replace(path, aside)
        warnings.warn(
            f"{path} does not match its checksum: moved to {aside.name}, it will be computed again", stacklevel=3
        )
        return False

    def write(self, name, write):
        """Write one file through ``write(temporary_path)``, then list its checksum."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, write)
        self._write_sums(self._sums() | {name: _sha256(self.path / name)})

    def _write_sums(self, sums):
        text = "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
        write_atomically(self.path / SUMS, lambda p: p.write_text(text))

    # --- the files -------------------------------------------------------------------------------------------

    def write_json(self, name, value):
        self.write(name, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))

    def read_json(self, name):
        return json.loads((self.path / name).read_text())

    def write_table(self, name, table, comment=""):
        """A CSV file, ``comment`` as its first line behind a #."""
        text = f"# {comment}\n" * bool(comment) + table.to_csv(index=False, lineterminator="\n")
        self.write(name, lambda p: p.write_text(text))

    def read_table(self, name):
        return pd.read_csv(self.path / name, comment="#", float_precision="round_trip")

    def write_weights(self, model):
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        self.write("weights.safetensors", lambda p: save_file(tensors, p))

    def read_weights(self):
        return load_file(self.path / "weights.safetensors")

    def checkpoints(self):
        """Names of the listed checkpoints, oldest first."""
        return sorted(n for n in self._sums() if n.startswith("checkpoint-"))

    def write_checkpoint(self, state):
        """A new file each time, the older ones dropped after: at every moment one is whole."""
        older = self.checkpoints()
        self.write(f"checkpoint-{len(state['history']):05d}.pt", lambda p: torch.save(state, p))
        self.drop(*older)

    def read_checkpoint(self, device):
        """The newest undamaged state, or None."""
        for name in reversed(self.checkpoints()):
            if self.has(name):
                return torch.load(self.path / name, map_location=device, weights_only=True)
        return None

    def drop(self, *names):
        if names:
            self._write_sums({n: d for n, d in self._sums().items() if n not in names})
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def get_all(self):
        """name -> bytes of every listed, undamaged file: what a machine without this folder needs to go on."""
        return {name: (self.path / name).read_bytes() for name in self._sums() if self.has(name)}

    def put_all(self, files):
        for name, content in files.items():
            self.write(name, lambda p, content=content: p.write_bytes(content))


def default_store():
    return home() / "results"
