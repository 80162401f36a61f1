"""What the sliders move: a KAF, an image under attack, a k-WTA unit, the loss near an image, growing gradients."""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from . import attacks, figures, gradients
from .attacks import balls
from .kaf import KAF, RIDGE_TARGETS
from .kaf.kernels import default_bandwidth
from .kwta import KWTA
from .lipschitz import kaf_constant
from .widgets import View


def _rescale(ax):
    ax.relim()
    ax.autoscale_view()


NORM_NAMES = {"linf": "L∞", "l2": "L2", "l1": "L1"}


class BendKaf(View):
    """A KAF bent by hand, with its target, its slope, its Lipschitz constant and the growth factor chi."""

    def __init__(self):
        super().__init__(2)
        left, right = self.axes
        self.x = torch.linspace(-5, 5, 401, dtype=torch.float64)[:, None]
        (self.goal,) = left.plot([], [], color="#bbbbbb", linewidth=4, label="target")
        (self.curve,) = left.plot([], [], **figures.line("kaf"))
        (self.points,) = left.plot([], [], ".", color="#777777", markersize=4, label="dictionary")
        (self.slope,) = right.plot([], [], **figures.line("kaf"))
        left.set(xlabel="x", ylabel="f(x)", xlim=(-5, 5))
        right.set(xlabel="x", ylabel="f'(x)")
        left.legend(fontsize=8, loc="upper left")  # "best" takes longer than the rest of the drawing

    def update(self, alpha=(), target="elu", kernel="gaussian", size=20, boundary=3.0, bandwidth=1.0):
        """``alpha``: added to the first coefficients; ``bandwidth``: in units of 1 / (6 spacing^2)."""
        gamma = bandwidth * default_bandwidth(size, boundary)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kaf = KAF(1, size, boundary, kernel, None if target == "random" else target, bandwidth=gamma).double()
        added = torch.tensor(alpha[:size], dtype=torch.float64)
        kaf.alpha.data[0, : len(added)] += added
        x = self.x.clone().requires_grad_()
        f = kaf(x)
        slope = torch.autograd.grad(f.sum(), x)[0][:, 0].numpy()
        f, x = f.detach()[:, 0].numpy(), self.x[:, 0].numpy()
        self.kaf, self.chi = kaf, gradients.chi_of(kaf)
        self.steepest = kaf_constant(kaf).item() if kernel == "gaussian" else abs(slope).max()
        goal = RIDGE_TARGETS[target](self.x)[:, 0].numpy() if target in RIDGE_TARGETS else np.full_like(f, np.nan)
        d = kaf.dictionary[0].detach().numpy()
        for artist, data in ((self.curve, (x, f)), (self.goal, (x, goal)), (self.slope, (x, slope)),
                             (self.points, (d, 0 * d))):  # fmt: skip
            artist.set_data(*data)
        how = "certified" if kernel == "gaussian" else "on the grid drawn"
        self.axes[0].set_title(f"KAF from {target}: D = {size}, γ = {gamma:.2f}, χ = {self.chi:.2f}")
        self.axes[1].set_title(f"Steepest slope {self.steepest:.2f} ({how})")
        for ax in self.axes:
            _rescale(ax)
        self.numbers = pd.DataFrame({"x": x, "kaf": f, "slope": slope, "target": goal})


class AttackImage(View):
    """An image, its perturbation magnified, what comes out of it, and how sure the network is before and after.

    Parameters
    ----------
    models : dict
        Label -> network.
    data : Data
    """

    def __init__(self, models, data, n=64):
        super().__init__(4, width_ratios=[1, 1, 1, 1.4])
        self.models, self.classes = models, data.classes
        device = next(next(iter(models.values())).parameters()).device
        self.x, self.y = (t.to(device) for t in data.test(n))
        shape = self._pixels(self.x[:1]).shape
        self.images = [ax.imshow(np.zeros(shape), vmin=0, vmax=1) for ax in self.axes[:3]]
        for ax in self.axes[:3]:
            ax.axis("off")
        places = np.arange(len(data.classes))
        self.bars = [self.axes[3].barh(places + s, 0 * places, 0.4, color=color, label=label)
                     for s, color, label in ((-0.2, "#0072B2", "clean"), (0.2, "#D55E00", "attacked"))]  # fmt: skip
        self.axes[3].set_yticks(places, data.classes, fontsize=8)
        self.axes[3].set(xlim=(0, 100), xlabel="confidence, %")
        self.axes[3].invert_yaxis()
        self.axes[3].legend(fontsize=8, loc="upper right")

    @staticmethod
    def _pixels(x):
        return x[0].permute(1, 2, 0).squeeze().cpu().numpy()  # (C, H, W) -> (H, W, C), grey without C

    def update(self, model, image=0, eps=0.1, steps=10, norm="linf", target="none"):
        """``eps`` is the mean change of a pixel: in L2 and L1 the radius is eps times 8 and 64 for 64 pixels."""
        net, x, y = self.models[model], self.x[image : image + 1], self.y[image : image + 1]
        radius = eps * x.numel() ** {"linf": 0, "l2": 0.5, "l1": 1}[norm]
        aim = y if target == "none" else torch.full_like(y, list(self.classes).index(target))
        adv = attacks.pgd(
            net, x, aim, eps=radius, steps=steps, norm=norm, targeted=target != "none", random_start=False
        )
        with torch.no_grad(), attacks.still(net):
            sure = net(torch.cat([x, adv])).softmax(1).cpu()
        change = adv - x
        times = 0.5 / change.abs().max().clamp_min(1e-6).item()
        for artist, picture in zip(self.images, (x, 0.5 + times * change, adv), strict=True):
            artist.set_data(self._pixels(picture))
        for group, p in zip(self.bars, sure, strict=True):
            for bar, share in zip(group, 100 * p, strict=True):
                bar.set_width(share.item())
        says = [f"says {self.classes[int(p.argmax())]} ({100 * p.max():.0f} %)" for p in sure]
        self.size, self.radius = balls.size(change, norm).item(), radius
        self.fooled = bool(sure[1].argmax() != y)
        titles = (says[0], f"change × {times:.3g}" if self.size else "no change", says[1], f"true: {self.classes[y]}")
        for ax, title in zip(self.axes, titles, strict=True):
            ax.set_title(title, fontsize=10)
        self.figure.suptitle(f"{model}: a change of {self.size:.3g} in {NORM_NAMES[norm]}")
        pixels = {"clean": x, "change": change, "attacked": adv}
        self.numbers = pd.DataFrame({k: v.flatten().cpu().numpy() for k, v in pixels.items()})


class KwtaLine(View):
    """A unit of a random layer along a straight line in input space: ReLU, and k-WTA with its jumps."""

    def __init__(self, points=4001, inputs=20):
        super().__init__(1, size=(8, 3))
        self.t, self.inputs = torch.linspace(0, 1, points, dtype=torch.float64), inputs
        self.curves = {n: self.axes[0].plot([], [], **figures.line(n))[0] for n in ("relu", "kwta")}
        (self.marks,) = self.axes[0].plot([], [], "|", color="#777777", label="exchange of winners")
        self.axes[0].set(xlabel="t along a line in input space", ylabel="output of the unit", xlim=(0, 1))
        self.axes[0].legend(fontsize=8, loc="upper left")

    def update(self, ratio=0.15, width=64, unit=0, length=8.0, line=0):
        """``line``: the seed of layer and line; ``unit`` counts from the one that jumps farthest."""
        g = torch.Generator().manual_seed(line)
        shapes = (width, self.inputs), (self.inputs,), (self.inputs,)
        w, a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
        before = (a + length * self.t[:, None] * b / b.norm()) @ w.T / self.inputs**0.5  # (points, units)
        after = {"relu": torch.relu(before), "kwta": KWTA(ratio)(before)}
        on = after["kwta"] != 0
        exchange = (on[1:] != on[:-1]).any(1)
        jumps = (after["kwta"][1:] - after["kwta"][:-1]).abs().amax(0)
        unit = int(jumps.argsort(descending=True)[min(unit, width - 1)])
        t, self.exchanges = self.t.numpy(), int(exchange.sum())
        for name, curve in self.curves.items():
            curve.set_data(t, after[name][:, unit].numpy())
        self.marks.set_data(t[1:][exchange.numpy()], np.zeros(self.exchanges))
        k = int(on[0].sum())
        self.axes[0].set_title(f"{k} winners of {width} units: {self.exchanges} exchanges on the way; unit {unit}")
        _rescale(self.axes[0])
        self.numbers = pd.DataFrame({"t": t} | {n: v[:, unit].numpy() for n, v in after.items()}).iloc[::20]


class LossSurface(View):
    """The loss around an image, over the sign of its gradient and a random corner, and along the first of them.

    The two directions share pixels, so that at (u, v) a pixel changes by up to (|u| + |v|) ``radius``: the square is
    larger than the L-inf ball of that radius, of which the dashed diamond is the cut.
    """

    def __init__(self, models, data, n=64, cells=13):
        super().__init__(2, size=(8, 3.4))
        self.models, self.classes = models, data.classes
        device = next(next(iter(models.values())).parameters()).device
        self.x, self.y = (t.to(device) for t in data.test(n))
        self.s = torch.linspace(-1, 1, cells, device=device)
        self.inside = self.s.abs() + self.s.abs()[:, None] <= 1 + 1e-5  # (cells, cells): in the ball
        self.picture = self.axes[0].imshow(np.zeros((cells, cells)), origin="lower", cmap="viridis", aspect="auto")
        self.bar = self.figure.colorbar(self.picture, ax=self.axes[0], label="loss")
        (self.diamond,) = self.axes[0].plot([], [], "w--", linewidth=1)
        self.axes[0].grid(False)
        (self.cut,) = self.axes[1].plot([], [], color="#0072B2")
        self.axes[0].set(xlabel="along the gradient's sign", ylabel="along a random corner")
        self.axes[1].set(xlabel="along the gradient's sign", ylabel="loss")

    def update(self, model, image=0, radius=0.1, corner=0):
        """``radius``: half the side of the square, in pixel units; ``corner``: the seed of the second direction."""
        net, x, y = self.models[model], self.x[image : image + 1], self.y[image : image + 1]
        with attacks.still(net):
            first = attacks.input_gradient(net, x, y).sign()
            g = torch.Generator().manual_seed(corner)
            second = torch.randn(x.shape, generator=g).sign().to(x)
            v, u = (a[..., None, None, None] for a in torch.meshgrid(self.s, self.s, indexing="ij"))  # rows: second
            square = (x[0] + radius * (u * first[0] + v * second[0])).clamp(0, 1)  # (cells, cells, C, H, W)
            with torch.no_grad():
                logits = net(square.flatten(0, 1))
        z = F.cross_entropy(logits, y.expand(len(logits)), reduction="none").view(len(self.s), -1).cpu().numpy()
        wrong = (logits.argmax(1) != y).view_as(self.inside)
        self.wrong, self.wrong_inside = float(wrong.float().mean()), float(wrong[self.inside].float().mean())
        edge = radius * (1 + 1 / (len(self.s) - 1))  # half a cell more: the outer cells' centres lie at the radius
        self.picture.set(data=z, extent=[-edge, edge, -edge, edge])
        self.diamond.set_data(radius * np.array([1, 0, -1, 0, 1]), radius * np.array([0, 1, 0, -1, 0]))
        self.picture.set_clim(z.min(), max(z.max(), z.min() + 1e-6))
        s = radius * self.s.cpu().numpy()
        self.cut.set_data(s, z[len(s) // 2])
        shares = f"wrong on {100 * self.wrong_inside:.0f} % of the diamond, {100 * self.wrong:.0f} % of the square"
        self.axes[0].set(xlim=(-edge, edge), ylim=(-edge, edge))
        self.axes[0].set_title(f"{model}: a {self.classes[y]},\n{shares}", fontsize=9)
        middle = f"At 0: {z[len(s) // 2, len(s) // 2]:.3g}"
        self.axes[1].set_title(f"{middle},\nlargest in the square: {z.max():.3g}", fontsize=9)
        _rescale(self.axes[1])
        self.numbers = pd.DataFrame(z, index=s, columns=[f"{v:.4g}" for v in s]).rename_axis("corner").reset_index()


class GradientGrowth(View):
    """chi of a random KAF against its bandwidth, and what it makes of the gradient, block by block.

    The growth is that of the simple formula, sqrt((chi + 2 chi^2) / 3) a block of the thesis (notebook 13, section 3).
    """

    def __init__(self):
        super().__init__(2)
        left, right = self.axes
        self.shares = np.geomspace(1 / 64, 4, 13)
        (self.curve,) = left.plot([], [], **figures.line("kaf"))
        (self.here,) = left.plot([], [], "D", color="k", label="chosen")
        chi = {n: gradients.growth_factor(n) for n in ("relu", "kaf_elu")}
        self.known = {n: (right.plot([], [], **figures.line(n))[0], self.block(c)) for n, c in chi.items()}
        (self.path,) = right.plot([], [], **figures.line("kaf"))
        left.axhline(chi["relu"], linewidth=0.8, **figures.line("relu") | {"linestyle": ":"})
        left.set(xscale="log", yscale="log", xlabel="bandwidth, in units of 1/(6 Δ²)", ylabel="χ, random coefficients")
        right.set(
            yscale="log", xlabel="blocks passed, from the output", ylabel="growth of the gradient, simple formula"
        )
        for ax in self.axes:
            ax.legend(fontsize=8, loc="upper left")
            ax.minorticks_off()
        left.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        left.xaxis.set_major_formatter("{x:g}")  # powers as TeX take a third of the time
        left.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_major_formatter("{x:.0e}")

    @staticmethod
    def block(chi):
        """Growth of the norm a block."""
        return ((chi + 2 * chi**2) / 3) ** 0.5

    def update(self, bandwidth=1.0, size=20, boundary=3.0, depth=56):
        def chi(share):
            a, b = gradients.kaf_moments(d, share * default_bandwidth(size, boundary))
            return float(a.trace() / b.trace())

        d = torch.linspace(-boundary, boundary, size, dtype=torch.float64)
        curve, self.chi = [chi(s) for s in self.shares], chi(bandwidth)
        blocks, self.growth = np.arange((depth - 2) // 2), self.block(self.chi)
        self.curve.set_data(self.shares, curve)
        self.here.set_data([bandwidth], [self.chi])
        self.path.set_data(blocks, self.growth**blocks)
        for line, factor in self.known.values():
            line.set_data(blocks, factor**blocks)
        self.axes[0].set_title(f"D = {size}, boundary {boundary:.3g}: χ = {self.chi:.3g}")
        self.axes[1].set_title(f"ResNet{depth}: × {self.growth:.3g} a block, {self.growth ** blocks[-1]:.1e} in all")
        for ax in self.axes:
            _rescale(ax)
        self.axes[0].set_ylim(1, max(2.2, self.axes[0].get_ylim()[1]), auto=True)  # chi is never below 1
        columns = {"blocks": blocks, "kaf": self.growth**blocks}
        self.numbers = pd.DataFrame(columns | {n: f**blocks for n, (_, f) in self.known.items()})
