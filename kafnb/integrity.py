"""A folder whose files count once their checksums are listed: written whole or not at all, locked, verified on read."""

import contextlib
import errno
import hashlib
import os
import re
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from .checks import pick
from .paths import write_atomically

SUMS = "SHA256SUMS"
POLICIES = ("warn", "recompute", "refuse")


def policy():
    """What KAFNB_STALE says; see ``store``."""
    return pick(POLICIES, os.environ.get("KAFNB_STALE", POLICIES[0]), "KAFNB_STALE")


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Checked:
    """A folder of files with checksums. Use ``with folder.lock():`` around every sequence of read, compute, write."""

    def __init__(self, path):
        self.path = Path(path)

    @property
    def _lock_file(self):
        return self.path.parent / ".locks" / f"{self.path.name}.lock"

    @contextlib.contextmanager
    def lock(self, blocking=True):
        """Inside, no other process writes here. A store that cannot be written to needs no lock to be read."""
        if self.path.is_symlink():
            raise ValueError(f"{self.path} is a link to somewhere else: results are written in the store only")
        try:
            self._lock_file.parent.mkdir(parents=True, exist_ok=True)
            # the operating system releases the lock when its process ends, however it ends
            held = FileLock(self._lock_file).acquire(blocking=blocking)
        except Timeout:
            raise
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise type(error)(f"cannot lock {self.path}: {error.strerror or error}") from error
            held = contextlib.nullcontext()
        with held:
            for part in self.path.glob(".*.part"):  # of a process that was killed
                with contextlib.suppress(OSError):
                    part.unlink()
            yield

    def busy(self):
        """Whether another process has the lock; writes nothing."""
        if not self._lock_file.exists():
            return False
        try:
            with self.lock(blocking=False):
                return False
        except Timeout:
            return True

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

    def digest(self, name):
        """The listed checksum of a file, or None."""
        return self._sums().get(name)

    def write(self, name, write):
        """Write one file through ``write(temporary_path)``, then list its checksum."""
        write_atomically(self.path / name, write)
        try:
            self._write_sums(self._sums() | {name: _sha256(self.path / name)})
        except OSError:  # not listed it does not count; each new try would move one more aside, on a disk that is full
            (self.path / name).unlink(missing_ok=True)
            raise

    def _write_sums(self, sums):
        text = "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items()))
        write_atomically(self.path / SUMS, lambda p: p.write_text(text))
