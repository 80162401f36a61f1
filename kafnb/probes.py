"""Looking into a network: what goes into and comes out of any layer, and statistics of it in constant memory.

``capture`` holds the latest batch. ``stream`` sends any number of batches through a network and hands each layer's
activations to a collector that keeps no images: ``Moments``, ``Histogram``, ``Shift``.
"""

import array
import contextlib
import math

import torch
from torch import nn

from .activations import kinds
from .attacks import still
from .checks import count, forward, images, instance

WHERE = ("before", "after")


@contextlib.contextmanager
def capture(model, layers, where="after"):
    """Inside, every forward pass leaves what goes into, or comes out of, the named layers in the dict it gives.

    Parameters
    ----------
    model : Module
        Its hooks are taken off at the end, also after an error; mode and gradients are not touched.
    layers : list of str
        Names as ``model.named_modules()`` has them.
    where : {"before", "after"}
        The layer's input (for an activation function: the pre-activation) or its output.

    Yields
    ------
    dict
        name -> Tensor of the latest forward pass, attached to the graph if there is one.

    Raises
    ------
    ValueError
        No layer of that name.
    """
    if where not in WHERE:
        raise ValueError(f"where must be one of {WHERE}, got {where!r}")
    modules, found, hooks = dict(instance(model, nn.Module, "model").named_modules()), {}, []
    instance(layers, list | tuple | dict, "layers")
    if missing := [n for n in layers if n not in modules]:
        raise ValueError(f"the model has no layer {missing[0]!r}: model.named_modules() tells their names")

    in_place = any(getattr(m, "inplace", False) for m in modules.values())  # a later layer may overwrite it

    def note(name):
        def hook(module, inputs, output=None):
            value = inputs[0] if where == "before" else output
            found[name] = value.clone() if in_place else value

        return hook

    try:
        for name in layers:
            module = modules[name]
            register = module.register_forward_pre_hook if where == "before" else module.register_forward_hook
            hooks.append(register(note(name)))
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def shapes(model, x):
    """module -> (its name, shape of one example of its input), of every module that runs on ``x``."""
    if len(images(x, box=False)) == 0:
        raise ValueError("at least one image is needed, got none")
    modules = dict(instance(model, nn.Module, "model").named_modules())
    for name, m in model.named_modules(remove_duplicate=False):
        if name not in modules and isinstance(m, nn.Conv2d | nn.AdaptiveAvgPool2d):
            raise ValueError(f"{name} is a layer used twice, where its input may have two sizes: make it two layers")
    with still(model), torch.no_grad(), forward(x), capture(model, modules, "before") as found:
        model(x[:1])
    return {modules[name]: (name, tuple(v.shape[1:])) for name, v in found.items()}


def activation_layers(model, x):
    """Names of the activation functions of ``model``, in the order in which they run on ``x``; yours if registered."""
    known = kinds()
    return [name for module, (name, _) in shapes(model, x).items() if isinstance(module, known)]


def stream(model, batches, collectors, where="after"):
    """Send batches through a model in eval mode, and each layer's activations to its collector.

    Parameters
    ----------
    batches : iterable of Tensor or of tuples of Tensor
        Images (N, C, H, W); for collectors of several inputs (``Shift``), one such tensor each.
    collectors : dict
        Layer name -> object with ``update(*activations)``.

    Returns
    -------
    dict
        ``collectors``.
    """
    instance(collectors, dict, "collectors", ": layer name -> collector")
    device = next((p.device for p in instance(model, nn.Module, "model").parameters()), torch.device("cpu"))
    with still(model), torch.no_grad(), capture(model, list(collectors), where) as found:
        for batch in batches:
            parts = []
            for x in batch if isinstance(batch, tuple | list) else (batch,):
                found.clear()
                with forward(images(x, box=False)):
                    model(x.to(device))
                if missing := [name for name in collectors if name not in found]:
                    raise ValueError(f"layer {missing[0]!r} does not run on these images")
                parts.append(dict(found))
            for name, collector in collectors.items():
                collector.update(*(p[name] for p in parts))
    return collectors


class Moments:
    """Count, mean, standard deviation, smallest and largest value of every unit, merged batch by batch in float64.

    Source of the merging formula: Chan, Golub, LeVeque, 1979, eq. 2.1.
    """

    def __init__(self):
        self.n = 0

    def update(self, a):
        a = a.detach().double()
        n, mean = len(a), a.mean(0)
        m2 = (a - mean).square().sum(0)
        if self.n == 0:
            self.mean, self.m2 = torch.zeros_like(mean), torch.zeros_like(mean)
            self.low, self.high = mean + math.inf, mean - math.inf
        delta, total = mean - self.mean, self.n + n
        self.m2 = self.m2 + m2 + delta.square() * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.low, self.high = torch.minimum(self.low, a.amin(0)), torch.maximum(self.high, a.amax(0))
        self.n = total

    @property
    def std(self):
        """Of the images seen (divisor n), one a unit."""
        return (self.m2 / self.n).sqrt()

    @property
    def scale(self):
        """Root of the mean squared distance from the mean activation, over the whole layer: its natural unit."""
        return (self.m2.sum() / self.n).sqrt().item()


class Histogram:
    """Histogram of every channel, over images and places, on a range that grows with the data.

    The range is always [-2^k, 2^k], cut into ``bins``: when a value falls outside, neighbouring bins are merged and
    the range doubles, so any two histograms of as many bins can be brought onto one range exactly.

    Parameters
    ----------
    bins : int
        A multiple of 4.
    """

    def __init__(self, bins=1024):
        if count(bins, "bins") % 4:
            raise ValueError(f"Histogram needs a positive multiple of 4 bins, got {bins}")
        self.bins, self.exponent, self.counts = bins, None, None

    def grow(self, exponent):
        """Widen the range to 2^exponent."""
        for _ in range(exponent - self.exponent):
            quarter = self.bins // 4
            pairs = self.counts.view(len(self.counts), -1, 2).sum(2)
            self.counts = nn.functional.pad(pairs, (quarter, quarter))
        self.exponent = max(self.exponent, exponent)

    def update(self, a):
        a = a.detach().transpose(0, 1).flatten(1).double()  # (N, C, *) -> (C, N *)
        largest = a.abs().max().item()
        if not math.isfinite(largest):
            raise ValueError("Histogram got activations that are not finite")
        needed = math.frexp(largest)[1] if largest else -64  # largest < 2^needed
        if self.counts is None:
            self.exponent = needed
            self.counts = torch.zeros(len(a), self.bins, dtype=torch.int64, device=a.device)
        self.grow(needed)
        index = ((a / self.width).floor().long() + self.bins // 2).clamp_(0, self.bins - 1)
        self.counts.scatter_add_(1, index, torch.ones_like(index))

    @property
    def width(self):
        """Of a bin: what a quantile, or a Wasserstein distance, may be wrong by."""
        return 2.0 ** (self.exponent + 1) / self.bins

    @property
    def edges(self):
        return self.width * (torch.arange(self.bins + 1, dtype=torch.float64) - self.bins // 2)

    def quantile(self, q):
        """The q-quantile of each channel, (C,), at most one bin's ``width`` off. q in [0, 1]."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile needs q in [0, 1], got {q}")
        cumulative = self.counts.cumsum(1).double()
        target = (q * cumulative[:, -1:]).clamp_min(1e-9)
        index = torch.searchsorted(cumulative, target).clamp_max(self.bins - 1)
        below = torch.where(index > 0, cumulative.gather(1, (index - 1).clamp_min(0)), torch.zeros_like(target))
        inside = (target - below) / self.counts.gather(1, index).clamp_min(1)
        return (self.edges.to(index.device)[index] + self.width * inside)[:, 0]


def wasserstein(first, second):
    """Wasserstein-1 distance of two ``Histogram`` objects, one a channel: the area between the distribution functions.

    At most one bin's ``width`` off. Both are brought onto the wider range of the two.
    """
    if first.bins != second.bins:
        raise ValueError(f"wasserstein needs as many bins in both, got {first.bins} and {second.bins}")
    exponent = max(first.exponent, second.exponent)
    first.grow(exponent)
    second.grow(exponent)
    f, g = (h.counts.cumsum(1).double() / h.counts.sum(1, keepdim=True) for h in (first, second))
    return (f - g).abs().sum(1) * first.width


class Shift:
    """How far a layer's activations move between two versions of the same images, clean and attacked.

    Attributes
    ----------
    clean : Moments
    histograms : (Histogram, Histogram)
        Of the clean and of the attacked activations.
    """

    def __init__(self, bins=1024):
        self.clean, self.histograms = Moments(), (Histogram(bins), Histogram(bins))
        # one growing block: many small tensors, each kept, would leave holes in memory between the large ones
        self._distances = array.array("d")

    def update(self, clean, attacked):
        self.clean.update(clean)
        for histogram, a in zip(self.histograms, (clean, attacked), strict=True):
            histogram.update(a)
        distances = (attacked.detach().double() - clean.detach().double()).flatten(1).norm(dim=1)
        self._distances.extend(distances.tolist())

    @property
    def raw(self):
        """L2 distance of each pair, (n,): the one thing kept per image."""
        return torch.tensor(self._distances, dtype=torch.float64)

    @property
    def normalised(self):
        """The same in units of the clean activations' own spread, ``clean.scale``: comparable across functions."""
        return self.raw / self.clean.scale

    @property
    def wasserstein(self):
        """Wasserstein-1 of each channel over its clean standard deviation (of all images and places), (C,).

        NaN where that is less than a bin of the histograms: a unit that hardly moves has no unit to measure moves in.
        """
        places = (0,) if self.clean.mean.ndim == 1 else tuple(range(1, self.clean.mean.ndim))
        if self.clean.mean.ndim == 1:
            spread = self.clean.std
        else:  # variance over images and places: within places, and between them
            spread = (self.clean.std.square().mean(places) + self.clean.mean.var(places, correction=0)).sqrt()
        distance = wasserstein(*self.histograms)  # first, as it makes both histograms' bins alike
        return torch.where(spread > self.histograms[0].width, distance / spread.clamp_min(1e-30), torch.nan)
