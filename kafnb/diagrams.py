"""Pictures of networks, drawn from the networks themselves: neurons with real values, modules with traced shapes."""

import dataclasses
import itertools
import operator

import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch
from torch import fx, nn

_WARM, _COLD = "#D55E00", "#0072B2"


def draw_neurons(ax, values, weights, titles, names=()):
    """A fully connected network: a column of circles a layer, filled with its values, joined by its weights.

    Parameters
    ----------
    values : list of Tensor, shape (units,)
        Outputs of each layer for one input, the input first; darker is larger within its layer.
    weights : list of Tensor, shape (units out, units in)
        Lines: width by size, orange positive, blue negative; the largest 60 of each layer.
    titles : list of str
        One a layer.
    names : list of str, optional
        Of the last layer's neurons.
    """
    height = max(len(v) for v in values)
    places = [(1 - np.linspace(-1, 1, len(v)) * len(v) / height) / 2 for v in values]
    for i, w in enumerate(weights):
        strongest = w.abs().flatten().topk(min(60, w.numel())).indices
        for k in strongest.tolist():
            out, into = divmod(k, w.shape[1])
            size = (w[out, into].abs() / w.abs().max()).item()
            color = _WARM if w[out, into] > 0 else _COLD
            ends = places[i][into], places[i + 1][out]
            ax.plot([i, i + 1], ends, color=color, linewidth=2 * size, alpha=0.25 + 0.6 * size, zorder=1)
    for i, (v, y) in enumerate(zip(values, places, strict=True)):
        shade = (v - v.min()) / (v.max() - v.min()).clamp_min(1e-12)
        ax.scatter([i] * len(v), y, c=shade, cmap="gray_r", vmin=0, vmax=1, s=70, edgecolors="black", zorder=2)
        ax.text(i, 1.1, titles[i], ha="center", va="bottom", fontsize=9)
    for name, y in zip(names, places[-1], strict=False):
        ax.text(len(values) - 0.92, y, name, va="center", fontsize=8)
    ax.set(xlim=(-0.4, len(values) - 0.6), ylim=(-0.08, 1.28))
    ax.axis("off")


@dataclasses.dataclass
class Box:
    """One step of a traced network: what it is, the shape it gives (without the batch), its parameters, its inputs."""

    lines: list
    shape: tuple
    parameters: int
    inputs: list


def _describe(module):
    if isinstance(module, nn.Conv2d):
        stride = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        return f"conv {module.kernel_size[0]}×{module.kernel_size[1]}{stride}"
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        kind = "max" if isinstance(module, nn.MaxPool2d) else "average"
        return f"{kind} pool {module.kernel_size}×{module.kernel_size}"
    names = {
        nn.BatchNorm2d: "BN", nn.Linear: "dense", nn.AdaptiveAvgPool2d: "global average pool", nn.Flatten: "flatten",
        nn.Identity: "identity",
    }  # fmt: skip
    return names.get(type(module), type(module).__name__.strip("_"))


_CALLS = {operator.add: "+", torch.cat: "concatenate", torch.relu: "ReLU", torch.flatten: "flatten"}
_SMALL = (nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.Flatten, nn.Identity)


class _Tracer(fx.Tracer):
    def __init__(self, leaves):
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module, name):
        return isinstance(module, self.leaves) or super().is_leaf_module(module, name)


def trace(model, x, leaves=()):
    """The steps of a network as boxes, by running it once: convolutions, pools, sums, concatenations.

    A normalisation, activation or other small step joins the box of the step before it.

    Parameters
    ----------
    model : Module
        Without branches that depend on values (see ``torch.fx``). Its mode and statistics stay as they were.
    x : Tensor
        A batch that it accepts.
    leaves : tuple of Module types
        Drawn as one box each.

    Returns
    -------
    list of Box
        In the order of running, the input first; ``inputs`` are places in this list.
    """
    graph = _Tracer(tuple(leaves)).trace(model)
    modes, buffers = {m: m.training for m in model.modules()}, {k: v.clone() for k, v in model.state_dict().items()}
    shapes = {}

    class Watch(fx.Interpreter):
        def run_node(self, node):
            out = super().run_node(node)
            shapes[node.name] = tuple(out.shape[1:]) if isinstance(out, torch.Tensor) else ()
            return out

    model.eval()
    try:
        with torch.no_grad():
            Watch(fx.GraphModule(model, graph)).run(x)
    finally:
        for m, mode in modes.items():
            m.training = mode
        model.load_state_dict(buffers)
    boxes, place = [], {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        count = sum(p.numel() for p in module.parameters()) if module else 0
        text = _describe(module) if module else _CALLS.get(node.target, node.name)
        text, before = ("input" if node.op == "placeholder" else text), node.all_input_nodes
        joins = isinstance(module, _SMALL) or node.target in (torch.relu, torch.flatten)
        if joins and len(before[0].users) == 1 and boxes[place[before[0]]].lines != ["input"]:
            box = boxes[place[before[0]]]
            box.lines.append(text)
            box.shape, box.parameters = shapes[node.name], box.parameters + count
            place[node] = place[before[0]]
            continue
        place[node] = len(boxes)
        boxes.append(Box([text], shapes[node.name], count, [place[n] for n in before]))
    return boxes


def _layout(boxes):
    """(level, lane) of each box, and for each edge (from, to) the lane it runs in."""
    level, lane, taken = [], [], set()
    for box in boxes:
        level.append(1 + max((level[i] for i in box.inputs), default=-1))
    for i, box in enumerate(boxes):
        wanted = lane[box.inputs[0]] if len(box.inputs) == 1 else 0
        while (level[i], wanted) in taken:
            wanted += 1
        lane.append(wanted)
        taken.add((level[i], wanted))
    edges = {}
    for i, box in enumerate(boxes):
        for j in box.inputs:
            run, between = lane[j], range(level[j] + 1, level[i])
            while any((k, run) in taken for k in between):
                run += 1
            taken |= {(k, run) for k in between}
            edges[j, i] = run
    return level, lane, edges


def draw_boxes(ax, boxes, lanes=1, fontsize=8):
    """Boxes from ``trace`` from top to bottom with arrows: what each does, its shape, its number of parameters.

    Parameters
    ----------
    lanes : int
        Room for at least so many columns, so that several pictures get boxes of one size.
    """
    level, lane, edges = _layout(boxes)
    width, step, half = 2.6, 1.9, 0.6
    last = max([*lane, *edges.values()])
    # a level with one box, and nothing passing it, has that box in the middle
    passed = {k for j, i in edges for k in range(level[j] + 1, level[i])}
    alone = {k for k in level if level.count(k) == 1} - passed
    side = [(last / 2 if k in alone else at) * (width + 0.5) for k, at in zip(level, lane, strict=True)]
    for (j, i), run in edges.items():
        path = [(side[j], -level[j] * step - half)]
        if level[i] - level[j] > 1:
            along = run * (width + 0.5)
            path += [(along, -(level[j] + 1) * step + half), (along, -(level[i] - 1) * step - half)]
        for near, far in itertools.pairwise([*path, (side[i], -level[i] * step + half + 0.04)]):
            ax.plot(*zip(near, far, strict=True), color="#555555", linewidth=1.1, zorder=1)
        arrow = dict(arrowstyle="-|>", color="#555555", shrinkA=0, shrinkB=0)
        ax.annotate("", far, [n + 0.9 * (f - n) for n, f in zip(near, far, strict=True)], arrowprops=arrow)
    for box, k, at in zip(boxes, level, side, strict=True):
        frame = dict(boxstyle="round,pad=0.04", fc="#fbe3d3" if box.parameters else "#eeeeee", ec="#555555", zorder=2)
        ax.add_patch(FancyBboxPatch((at - width / 2, -k * step - half), width, 2 * half, **frame))
        text = [", ".join(box.lines), "×".join(map(str, box.shape))]
        text += [f"{box.parameters:,} parameters"] if box.parameters else []
        ax.text(at, -k * step, "\n".join(text), ha="center", va="center", fontsize=fontsize, zorder=3)
    middle, room = last * (width + 0.5) / 2, max(last + 1, lanes) * (width + 0.5) / 2
    ax.set(xlim=(middle - room, middle + room), ylim=(-max(level) * step - half - 0.2, half + 0.2))
    ax.axis("off")


def draw_chain(ax, boxes):
    """A deep network from ``trace`` as a row of bars: height by image size, shade by channels, arcs for skips."""
    through = {i: box.inputs[0] for i, box in enumerate(boxes) if box.lines[0] in ("identity", "PadShortcut")}
    most = max(b.shape[0] for b in boxes if len(b.shape) == 3)
    tallest = max(b.shape[1] for b in boxes if len(b.shape) == 3)
    place = {i: n for n, i in enumerate(i for i in range(len(boxes)) if i not in through)}
    for i, n in place.items():
        box = boxes[i]
        inputs = [through.get(j, j) for j in box.inputs]
        if box.lines[0] == "+":
            ax.scatter(n, 0, s=45, marker="P", color=_WARM, zorder=3)
            start = min(place[j] for j in inputs)
            arc = np.linspace(0, np.pi, 30)
            along, up = (n + start) / 2 - (n - start) / 2 * np.cos(arc), 0.5 + 0.25 * np.sin(arc)
            ax.plot([*along, n], [*up, 0], color=_WARM, linewidth=1.2)
        else:
            flat = len(box.shape) < 3
            height = 0.12 if flat else 0.2 + 0.8 * box.shape[1] / tallest
            shade = "#ffffff" if flat else str(0.95 - 0.6 * box.shape[0] / most)
            ax.bar(n, height, 0.7, bottom=-height / 2, color=shade, edgecolor="#555555", zorder=2)
            label = f"{box.lines[0]} · {'×'.join(map(str, box.shape))}"
            ax.text(n, -0.62, label, rotation=90, ha="center", va="top", fontsize=6)
    ax.plot([0, len(place) - 1], [0, 0], color="#555555", linewidth=0.8, zorder=1)
    ax.set(xlim=(-1, len(place)), ylim=(-1.75, 0.9))
    ax.axis("off")
