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

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import warnings
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from safetensors.torch import load_file, save

from .checks import pick
from .paths import home, write_atomically

SUMS = "SHA256SUMS"
POLICIES = ("warn", "recompute", "refuse")
_told = []  # what the one warning of stale results in this process was about


def policy():
    """What KAFNB_STALE says; see above."""
    return pick(POLICIES, os.environ.get("KAFNB_STALE", POLICIES[0]), "KAFNB_STALE")


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

    @contextlib.contextmanager
    def lock(self):
        """Inside, no other process writes here. A store that cannot be written to needs no lock to be read."""
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link to somewhere else: results are written in the store only")
        locks = self.path.parent / ".locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
            # the operating system releases the lock when its process ends, however it ends
            held = FileLock(locks / f"{self.path.name}.lock").acquire()
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise type(error)(f"cannot lock {self.path}: {error.strerror or error}") from error
            held = contextlib.nullcontext()
        with held:
            for part in self.path.glob(".*.part"):  # of a process that was killed
                with contextlib.suppress(OSError):
                    part.unlink()
            yield

    def _sums(self):
        path = self.path / SUMS
        if not path.exists():
            return {}
        lines = path.read_text(errors="replace").splitlines()
        pairs = [re.fullmatch(r"([0-9a-f]{64})  ([^./\\][^/\\]*)", line) for line in lines]
        if not all(pairs):
            self.set_aside(SUMS, "is not a list of checksums")
            return {}
        return {m[2]: m[1] for m in pairs}

    def has(self, name):
        """True if the file is there, listed and undamaged; one that is not as it should be is moved aside, or refused.

        Raises
        ------
        ValueError
            It is damaged, and KAFNB_STALE=refuse.
        """
        digest, path = self._sums().get(name), self.path / name
        if not path.exists():
            if digest:
                self.set_aside(name, f"is missing, though {SUMS} lists it")
            return False
        if digest == (found := _sha256(path)):
            return True
        reason = f"does not match its checksum ({found[:10]}, listed {digest[:10]})" if digest else f"is not in {SUMS}"
        self.set_aside(name, reason)
        return False

    def set_aside(self, name, reason):
        """Warn of a file that cannot be used, and rename it so that it is out of the way; or refuse."""
        path = self.path / name
        if policy() == "refuse":
            raise ValueError(f"{path} {reason}: KAFNB_STALE=refuse, so nothing was changed; 'warn' computes it again")
        aside, number = path.with_name(f"{name}.damaged"), 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{name}.damaged-{number}")
        if there := path.exists():
            try:
                os.replace(path, aside)
            except OSError as error:
                raise type(error)(f"{path} {reason}; cannot write {aside}: {error.strerror or error}") from error
        if name != SUMS and name in (sums := self._sums()):
            self._write_sums({n: d for n, d in sums.items() if n != name})
        moved = f"moved to {aside.name}, " if there else ""
        warnings.warn(f"{path} {reason}: {moved}it will be computed again", stacklevel=4)

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

    def digest(self, name):
        """The listed checksum of a file, or None."""
        return self._sums().get(name)

    def write(self, name, write):
        """Write one file through ``write(temporary_path)``, then list its checksum."""
        write_atomically(self.path / name, write)
        self._write_sums(self._sums() | {name: _sha256(self.path / name)})

    def _write_sums(self, sums):
        text = "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
        write_atomically(self.path / SUMS, lambda p: p.write_text(text))

    # --- the files -------------------------------------------------------------------------------------------

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
        return pd.read_csv(self.path / name, comment="#", float_precision="round_trip")

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
        content = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
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
            self._write_sums({n: d for n, d in sums.items() if n not in gone | set(names)})

    def get_all(self):
        """name -> bytes of every listed, undamaged file: what a machine without this folder needs to go on."""
        return {name: (self.path / name).read_bytes() for name in self._sums() if self.has(name)}

    def put_all(self, files):
        for name, content in files.items():
            self.write(name, lambda p, content=content: p.write_bytes(content))


def default_store():
    return home() / "results"
