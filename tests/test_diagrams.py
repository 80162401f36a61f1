"""Traced pictures against the networks they are drawn from."""

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from kafnb import diagrams, models


@pytest.fixture
def axes():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def relu(channels):
    return nn.ReLU()


def test_a_residual_block_is_traced_with_its_skip():
    block = models.HeBlock(4, 4, 1, relu)
    boxes = diagrams.trace(block, torch.rand(2, 4, 6, 6))
    assert [b.lines for b in boxes] == [
        ["input"], ["conv 3×3", "BN", "ReLU"], ["conv 3×3", "BN"], ["identity"], ["+", "ReLU"],
    ]  # fmt: skip
    assert sorted(boxes[4].inputs) == [2, 3] and boxes[3].inputs == [0] and boxes[1].inputs == [0]
    assert boxes[4].shape == (4, 6, 6)


@pytest.mark.parametrize("block", ["plain", "he", "thesis", "preact"])
def test_every_parameter_is_in_one_box_and_the_model_stays_as_it_was(block):
    model = models.resnet(20, "relu", block=block, in_channels=1, image_size=8, width=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    boxes = diagrams.trace(model, torch.rand(2, 1, 8, 8), leaves=(models._PadShortcut,))
    assert sum(b.parameters for b in boxes) == sum(p.numel() for p in model.parameters())
    assert sum(b.lines[0] == "+" for b in boxes) == (0 if block == "plain" else 9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert boxes[-1].shape == tuple(model(torch.rand(2, 1, 8, 8)).shape[1:])


def test_boxes_of_one_level_stand_side_by_side_and_no_edge_runs_through_a_box():
    boxes = diagrams.trace(models.HeBlock(4, 8, 2, relu), torch.rand(2, 4, 6, 6), leaves=(models._PadShortcut,))
    level, lane, edges = diagrams._layout(boxes)
    places = list(zip(level, lane, strict=True))
    assert len(set(places)) == len(places)
    for (j, i), run in edges.items():
        assert level[j] < level[i]
        assert not {(k, run) for k in range(level[j] + 1, level[i])} & set(places)


def test_drawings_show_every_box_and_neuron(axes):
    boxes = diagrams.trace(models.textbook_cnn("relu", 1, 8), torch.rand(1, 1, 8, 8))
    diagrams.draw_boxes(axes, boxes)
    assert len(axes.texts) - sum(t.get_text() == "" for t in axes.texts) == len(boxes)
    axes.clear()
    diagrams.draw_chain(axes, boxes)
    assert len(axes.patches) == len(boxes)
    axes.clear()
    weights = [torch.randn(4, 3), torch.randn(2, 4)]
    diagrams.draw_neurons(axes, [torch.rand(3), torch.rand(4), torch.rand(2)], weights, ["a", "b", "c"], ["x", "y"])
    assert len(axes.lines) == 3 * 4 + 4 * 2
    assert sum(len(c.get_offsets()) for c in axes.collections) == 3 + 4 + 2
