"""Where the companion keeps things: all under one root, the checkout (or the folder in KAFNB_HOME)."""

import os
from pathlib import Path

VERSION = "0.1.0"


def home():
    """The checkout that holds this package, or the folder named by the environment variable KAFNB_HOME."""
    return Path(os.environ.get("KAFNB_HOME") or Path(__file__).resolve().parents[1])


def write_atomically(path, write):
    """Call ``write(temporary_path)`` and move the finished file to ``path``: readers see all of it or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
