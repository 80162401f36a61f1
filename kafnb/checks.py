"""What callers may pass. Each check raises a TypeError or ValueError of one line: what is wrong, and what to do.

Values come back as they were given (NumPy's numbers as Python's), so that no check changes a key in the store.
"""

import contextlib
import difflib
import math
import numbers
import typing

import numpy as np
import torch


def shown(value):
    """A value in at most 60 characters of one line, for messages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def pick(table, name, what):
    """``table[name]`` (of a tuple: ``name``), or a ValueError in one line with the nearest known name."""
    if isinstance(name, str) and name in table:
        return table[name] if isinstance(table, dict) else name
    near, known = difflib.get_close_matches(str(name), table, n=1), ", ".join(table)
    if len(known) > 300:
        known = known[:300].rsplit(", ", 1)[0] + f", ... ({len(table)} in all)"
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {known}"
    raise ValueError(f"unknown {what} {shown(name)}{hint}")


def number(value, name, low=-math.inf, high=math.inf, *, above=-math.inf, optional=False, unit=""):
    """A finite number with low <= value <= high and value > above; None too if ``optional``."""
    if value is None and optional:
        return value
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not (isinstance(value, numbers.Real) or _scalar(value)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not (math.isfinite(value) and low <= value <= high and value > above):
        parts = [f">= {low:g}"] * (low > -math.inf) + [f"> {above:g}"] * (above > -math.inf)
        parts += [f"<= {high:g}"] * (high < math.inf)
        raise ValueError(f"{name} must be finite{''.join(f' and {p}' for p in parts)}{unit}, got {shown(value)}")
    return value if isinstance(value, int | float) else float(value)


def radius(eps, norm=None):
    """Of a ball around an image."""
    if isinstance(eps, str) or eps is None:
        raise TypeError(f"eps must be a number, in pixel units of [0, 1], got {shown(eps)}")
    if norm == "linf" and (isinstance(eps, numbers.Real) or _scalar(eps)) and 1 < eps < math.inf:
        raise ValueError(
            f"eps must be at most 1, in pixel units of [0, 1], got {float(eps):g}: did you mean {float(eps):g} / 255?"
        )
    return number(eps, "eps", low=0, unit=", in pixel units of [0, 1]")


def _scalar(value):
    return isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex()


def count(value, name, low=1, high=2**53, *, optional=False):
    """A whole number, low <= value <= high; None too if ``optional``."""
    if value is None and optional:
        return value
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be >= {low}{f' and <= {high}' if high < 2**53 else ''}, got {shown(value)}")
    return value


def seed(value, name="seed"):
    """A whole number that every generator takes, also times the million that tells epochs apart."""
    return count(value, name, low=-(2**40), high=2**40)


def device(value):
    """ "cpu", or a CUDA device that this machine has, as it was given."""
    try:
        known = torch.device(value)
    except (RuntimeError, TypeError):
        known = None
    if known is None or known.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {shown(value)}")
    there = torch.cuda.device_count() if known.type == "cuda" else 1
    if not 0 <= (known.index or 0) < there:  # PyTorch lets large numbers wrap round
        raise ValueError(f"device {shown(value)}: {there or 'no'} CUDA device found")
    return value


def instance(value, kind, name, hint=""):
    """``value`` if it is of the type, or the union of types, ``kind``."""
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in typing.get_args(kind) or (kind,))
        article = "an" if kinds[0] in "AEIOUaeiou" else "a"
        raise TypeError(f"{name} must be {article} {kinds}{hint}, got {shown(value)}")
    return value


def gradients(what):
    """That gradients can be had where ``what`` is called."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{what} needs gradients: call it outside torch.inference_mode(); torch.no_grad() is fine")


def file_name(name, what):
    """A name that goes into the name of a file or folder: it must stay inside the folder it is meant for."""
    instance(name, str, what)
    if not name or name[0] in ".-" or any(c in '/\\:*?"|' or not c.isprintable() for c in name):
        raise ValueError(f"{what} becomes a file's name: no slashes, colons or leading dots, please, got {shown(name)}")
    if len(name.encode()) > 120:
        raise ValueError(f"{what} becomes a file's name: at most 120 bytes, got {len(name.encode())}")
    return name


def images(x, *, box=True, dims=None):
    """Float images: a Tensor of at least 2 dimensions (``dims``: exactly so many), with ``box`` in [0, 1]."""
    instance(x, torch.Tensor, "images", " (N, C, H, W)")
    if not x.is_floating_point():
        raise ValueError(f"images must be float in [0, 1], got {x.dtype}: divide by 255 first")
    if x.ndim < 2 or dims not in (None, x.ndim):
        raise ValueError(f"images must be (N, C, H, W), got shape {tuple(x.shape)}: one image needs x[None]")
    if box and x.numel() and not (x.min() >= 0 and x.max() <= 1):  # NaN is not either
        raise ValueError(f"images must be in [0, 1], got [{x.min():.3g}, {x.max():.3g}]")
    return x


def labels(y, n=None, classes=None):
    """Integer labels, one for each of ``n`` images, each below ``classes``."""
    if not isinstance(y, torch.Tensor):
        raise ValueError(f"labels must be a Tensor of one integer an image, got {shown(y)}")
    if y.dtype != torch.int64 and not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise ValueError(f"labels must be int64, got {y.dtype}: say y.long()")
    if y.is_floating_point():
        raise ValueError(f"labels must be int64, got {y.dtype}: say y.long(), or logits.argmax(1) of scores")
    if y.dtype != torch.int64 or (n is not None and y.shape != (n,)):
        count_text = "" if n is None else f" of {n} images"
        raise ValueError(f"labels must be one integer for each{count_text}, got {y.dtype} of shape {tuple(y.shape)}")
    if y.numel() and (y.min() < 0 or (classes is not None and y.max() >= classes)):
        limit = "" if classes is None else f" and below the {classes} classes"
        raise ValueError(f"labels must be >= 0{limit}, got {int(y.min())} to {int(y.max())}")
    return y


@contextlib.contextmanager
def forward(x):
    """Around a model's forward pass on ``x``: images that it cannot take become a ValueError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the model fails on {x.dtype} images of shape {tuple(x.shape)}: {reason}") from error


def logits(value, classes):
    """What a model returned for images: a score for each of at least ``classes`` classes."""
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.shape[1] < classes:
        got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
        raise ValueError(f"the model must return logits (N, {classes}), one a class of the data, got {got}")
