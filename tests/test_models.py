"""Shapes, parameter counts and block forms of the networks."""

import pytest
import torch
from torch import nn

from kafnb import models


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet_counts_of_the_literature():
    # He et al. 2016, table 6: 0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M (option A shortcuts)
    for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)):
        assert round(count(models.resnet(depth, block="he")) / 1e6, 2 if depth < 110 else 1) == millions


@pytest.mark.parametrize("name", ["resnet020", "resnet0020", "resnet\u0662\u0660", "resnet20 ", "resnet"])
def test_a_network_has_one_name(name):
    """Two names would be two keys in the store."""
    with pytest.raises(ValueError, match="unknown model"):
        models.maker(name)


def test_thesis_resnet_count():
    # stem 432 + 32; blocks of the three stages; two 3x3 skips; dense 650; batch norms 2 a channel
    stages = sum(n * (9 * c * c * 2 + 4 * c) for n, c in ((3, 16), (3, 32), (3, 64)))
    first = -9 * 32 * 32 + 9 * 16 * 32 - 9 * 64 * 64 + 9 * 32 * 64  # the first convolutions of stages 2 and 3
    skips = 9 * 16 * 32 + 9 * 32 * 64
    assert count(models.resnet(20)) == 432 + 32 + stages + first + skips + 650


def test_kaf_adds_its_coefficients_only():
    channels = 16 * 7 + 32 * 6 + 64 * 6
    assert count(models.resnet(20, "kaf")) - count(models.resnet(20)) == 20 * channels
    assert count(models.resnet(20, "kaf_free")) - count(models.resnet(20)) == 41 * channels


def test_light_cnn_and_vgg_counts():
    conv = lambda i, o: 9 * i * o + o + 2 * o  # noqa: E731
    light = conv(3, 32) + conv(32, 32) + conv(32, 64) + conv(64, 64) + 64 * 128 + 128 + 1290
    assert count(models.light_cnn()) == light
    vgg = sum(conv(*p) for p in ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)))
    assert count(models.vgg()) == vgg + 128 * 16 * 128 + 128 + 1290


@pytest.mark.parametrize("activation", ["relu", "kwta", "kaf", "kaf_free", "prelu"])
@pytest.mark.parametrize(
    "make", [models.mlp, models.light_cnn, models.vgg, *(lambda a, b=b, **k: models.resnet(20, a, b, **k) for b in models.BLOCKS)]
)  # fmt: skip
def test_every_network_learns_shapes(make, activation):
    model = make(activation, in_channels=1, image_size=8, num_classes=7)
    logits = model(torch.rand(3, 1, 8, 8))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_thesis_block_by_hand():
    block = models.ThesisBlock(4, 4, 1, lambda c: torch.nn.Tanh()).eval()
    x = torch.randn(2, 4, 5, 5)
    inner = block.conv2(torch.tanh(block.bn1(block.conv1(x))))
    assert torch.allclose(block(x), torch.tanh(block.bn2(inner + x)))
    stride = models.ThesisBlock(4, 8, 2, lambda c: torch.nn.Tanh())
    assert stride.skip.kernel_size == (3, 3) and stride(x).shape == (2, 8, 3, 3)


def test_preact_skip_is_the_identity():
    block = models.PreactBlock(4, 4, 1, lambda c: torch.nn.ReLU())
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_penalty_stands_where_the_thesis_has_it():
    assert models.light_cnn().l2 == models.vgg().l2 == 0.0012 and models.vgg().l2_layers == (torch.nn.Linear,)
    assert models.resnet(20).l2 == 0.0005 and torch.nn.Conv2d in models.resnet(20).l2_layers


@pytest.mark.parametrize("depth", [0, 2, 18, 21, 57])
def test_bad_depth(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        models.resnet(depth)


def test_unknown_names(digits):
    with pytest.raises(ValueError, match="block"):
        models.resnet(20, block="thesys")
    with pytest.raises(ValueError, match="did you mean 'vgg'"):
        models.build("vgg1", "relu", digits)
    with pytest.raises(ValueError, match="image_size"):
        models.vgg(image_size=4)


@pytest.mark.parametrize("wrong", [nn.ELU, nn.LeakyReLU, nn.ReLU()])
def test_a_torch_activation_is_not_called_with_the_channels(wrong):
    with pytest.raises(TypeError, match=r"lambda channels: nn.ELU\(\)"):
        models.mlp(wrong)
    assert models.mlp(nn.PReLU)[2].num_parameters == 128 and models.mlp(lambda channels: nn.ELU())[2].alpha == 1


def test_plain_blocks_have_he_s_parameters_and_no_skip():
    plain, he = (models.resnet(20, block=b, in_channels=1, image_size=8, width=4) for b in ("plain", "he"))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in he.parameters()]
    for block in plain.blocks:  # with its second convolution silenced, nothing of the input is left
        torch.nn.init.zeros_(block.conv2.weight)
    plain.eval()
    with torch.no_grad():
        out = plain.blocks(torch.rand(2, 4, 8, 8))
    assert torch.equal(out, torch.zeros_like(out))


def test_textbook_cnn_counts_and_runs():
    model = models.textbook_cnn("relu", in_channels=3, image_size=32, num_classes=7, filters=(16, 32))
    expected = (3 * 9 + 1) * 16 + (16 * 9 + 1) * 32 + (32 * 8 * 8 + 1) * 64 + (64 + 1) * 7
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
