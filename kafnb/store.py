"""The store of trained models: one readable folder an experiment.

    results/<name>-<key>/
        experiment.json             what was run, on which data, code, device and versions
        history.csv                 one row an epoch
        weights.safetensors
        evaluation-<name>-<key>.csv one row a test image
        SHA256SUMS                  checksums of all of these (``sha256sum -c SHA256SUMS``)
        checkpoint-<epoch>.pt       only while training: state after the last finished epoch

A file counts once its checksum is listed; files are written whole or not at all; a lock a folder keeps a second
process from training the same model. What is found damaged is moved aside, never deleted. Nothing that is read can run
code: weights are safetensors, checkpoints are read with ``weights_only``, tables and records are text.

The environment variable KAFNB_STALE says what becomes of a stored result that was computed by other code, and of a
damaged one: "warn" uses the one and computes the other again, with a warning; "recompute" computes both again; "refuse"
stops with an error and touches nothing.
"""

import dataclasses
import hashlib
import io
import json
import warnings

import pandas as pd
import torch
from safetensors.torch import load_file, save

from .integrity import Checked, policy
from .paths import home

_told = []  # what the one warning of stale results in this process was about


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


class Folder(Checked):
    """One experiment's folder: what each of its files is written and read by."""

    def by_this_code(self, name, code, now):
        """Whether to use a stored file that was computed by ``code``, where the code is ``now`` another; warns once."""
        if code == now:
            return True
        text = f"{self.path / name} was computed by other code ({code or 'unknown'}) than this is ({now})"
        if (chosen := policy()) == "refuse":
            raise ValueError(f"{text}: KAFNB_STALE=refuse; 'warn' uses it, 'recompute' computes it again")
        if chosen == "warn" and not _told:
            _told.append(text)
            more = "others in this process are not named. KAFNB_STALE=recompute computes them again, =refuse stops"
            warnings.warn(f"{text}: used as it is, and {more}", stacklevel=4)
        return chosen == "warn"

    def write_json(self, name, value):
        self.write(name, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))

    def read_json(self, name):
        """The dict in a file; an empty one if it holds none."""
        try:
            value = json.loads((self.path / name).read_text())
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_table(self, name, table, comment=""):
        """A CSV file, ``comment`` as its first line behind a #."""
        text = f"# {comment}\n" * bool(comment) + table.to_csv(index=False, lineterminator="\n")
        self.write(name, lambda p: p.write_text(text))

    def read_table(self, name):
        with open(self.path / name) as f:
            commented = f.readline().startswith("# ")
        how = dict(skiprows=int(commented), keep_default_na=False, na_values=[""])  # "None" is a word like others
        return pd.read_csv(self.path / name, float_precision="round_trip", **how)

    def read_comment(self, name):
        """The JSON dict in the first line of a table; an empty one if there is none."""
        try:
            with open(self.path / name) as f:
                value = json.loads(f.readline().removeprefix("# "))
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_weights(self, model):
        # by way of memory: the libraries' own writers report a full disk as errors of their own
        # and copied: a parameter in several places is written in each of them, which safetensors refuses to do itself
        own = dict(device="cpu", copy=True, memory_format=torch.contiguous_format)
        content = save({k: v.detach().to(**own) for k, v in model.state_dict().items()})
        self.write("weights.safetensors", lambda p: p.write_bytes(content))

    def read_weights(self):
        return load_file(self.path / "weights.safetensors")

    def checkpoints(self):
        """Names of the checkpoints that are there, oldest first."""
        return sorted(p.name for p in self.path.glob("checkpoint-*.pt"))

    def write_checkpoint(self, state):
        """A new file each time, the older ones dropped after: at every moment one is whole."""
        name, older, content = f"checkpoint-{len(state['history']):05d}.pt", self.checkpoints(), io.BytesIO()
        torch.save(state, content)
        self.write(name, lambda p: p.write_bytes(content.getbuffer()))
        self.drop(*(n for n in older if n != name))

    def read_checkpoint(self, **origin):
        """The newest undamaged state that has the values ``origin``, or None; what has not is moved aside."""
        for name in reversed(self.checkpoints()):
            if not self.has(name):
                continue
            try:
                state = torch.load(self.path / name, map_location="cpu", weights_only=True)
            except MemoryError:
                raise
            except Exception as error:  # of many types
                self.set_aside(name, f"cannot be read ({type(error).__name__})")
                continue
            kept = state if isinstance(state, dict) else {}
            if not (other := [k for k, v in origin.items() if kept.get(k) != v]):
                return state
            self.set_aside(name, f"was written with other {' and '.join(other)}")
        return None

    def drop(self, *names):
        # files first: whatever is there and not listed would look like a damaged list
        for name in names:
            (self.path / name).unlink(missing_ok=True)
        if names:  # and of earlier ones that were killed in between
            sums = self._sums()
            gone = {n for n in sums if n.startswith("checkpoint-") and not (self.path / n).exists()}
            left = {n: d for n, d in sums.items() if n not in gone | set(names)}
            if left != sums:
                self._write_sums(left)

    def get_all(self):
        """name -> bytes of every listed, undamaged file: what a machine without this folder needs to go on."""
        return {name: (self.path / name).read_bytes() for name in self._sums() if self.has(name)}

    def put_all(self, files):
        """Write what ``get_all`` returned. The record comes last, and an older one goes first: see ``results``."""
        self.drop("experiment.json")
        for name, content in sorted(files.items(), key=lambda item: item[0] == "experiment.json"):
            self.write(name, lambda p, content=content: p.write_bytes(content))


def default_store():
    return home() / "results"
