"""Command line: ``torchrun ... -m kafnb.imagenet ROOT``."""

import argparse
import sys

import torch

from .. import imagenet
from ..checks import device


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kafnb.imagenet", description=imagenet.__doc__.splitlines()[0])
    parser.add_argument(
        "root", nargs="+", help="a tree train/<class>/*, val/<class>/* (or test/); of several, one a phase"
    )
    parser.add_argument("--activation", default="relu", help="a name of kafnb.ACTIVATIONS (default relu)")
    parser.add_argument("--eps", type=float, default=4, help="in 255ths")
    parser.add_argument("--workers", type=int, default=8, help="decoding processes of each training process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--sync-batchnorm", action="store_true", help="statistics of all processes, not of each")
    parser.add_argument("--small", action="store_true", help="the same code at a size for a CPU")
    parser.add_argument("--store", help="folder of the checkpoints (default: results/)")
    a = parser.parse_args(argv)
    try:
        history = _train(a)
    except (ValueError, TypeError, OSError) as error:
        print(f"kafnb.imagenet: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if history is not None:
        print(history.to_string(index=False))
    return 0


def _train(a):
    device(a.device)
    chosen = imagenet.Training(a.activation, a.eps / 255, classes=len(imagenet.images(a.root[-1], True, 32).classes))
    chosen = imagenet.small(chosen, chosen.classes) if a.small else chosen
    where = dict(device=a.device, workers=a.workers, store=a.store, sync_batchnorm=a.sync_batchnorm)
    return imagenet.train(chosen, a.root, **where)


if __name__ == "__main__":
    sys.exit(main())
