"""Where the companion keeps things: all under one root, the checkout (or the folder in KAFNB_HOME)."""

import contextlib
import os
from pathlib import Path

VERSION = "0.1.0"


def home():
    """The checkout that holds this package, or the folder named by the environment variable KAFNB_HOME."""
    return Path(os.environ.get("KAFNB_HOME") or Path(__file__).resolve().parents[1])


def write_atomically(path, write):
    """Call ``write(temporary_path)`` and move the finished file to ``path``: readers see all of it or none.

    Raises
    ------
    OSError
        It cannot be written (disk full, no permission): one line that names it. What was at ``path`` is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        text = f"cannot write {path}: {error.strerror or error}; what was finished before is still there"
        raise type(error)(text) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
