"""Where a result came from: code, commit, versions, device."""

import functools
import hashlib
import platform
import subprocess
from pathlib import Path

import torch

from .paths import VERSION, home


@functools.cache
def code_fingerprint():
    """Ten hex digits of the SHA-256 of this package's source: what was computed by other code has another one."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:10]


def provenance():
    """Code version, commit, device names and library versions, for records beside results."""

    def git(*args):
        out = subprocess.run(["git", *args], cwd=home(), capture_output=True, text=True)
        return out.stdout.strip() if out.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=12", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "kafnb") else ""
        )
    except OSError:  # no git on this machine
        commit = ""
    return {
        "kafnb": VERSION,
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def device_name(device):
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
