"""The quicker twin is the same function, is not the same object, and is only made of what is known."""

import copy

import pytest
import torch
from torch import nn

from kafnb import attacks, models
from kafnb.attacks import fast
from kafnb.attacks.fast import twin


def trained_like(model, seed=0):
    """Batch normalisation with statistics and weights as after training."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3, generator=generator)
            m.running_var.uniform_(0.5, 2, generator=generator)
            with torch.no_grad():
                m.weight.uniform_(-1.5, 1.5, generator=generator)
                m.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["relu", "swish", "kaf_elu", "kwta"])
@pytest.mark.parametrize("make", ["thesis", "he", "preact", "light_cnn", "vgg"])
def test_same_logits_and_gradients(make, name):
    torch.manual_seed(0)
    small = dict(in_channels=2, image_size=8)
    model = models.resnet(8, name, make, **small) if make in models.BLOCKS else getattr(models, make)(name, **small)
    model, before = trained_like(model), {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    quick = twin(model)
    assert quick is not model and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x, y = torch.rand(9, 2, 8, 8), torch.randint(0, 10, (9,))
    with torch.no_grad():
        assert torch.allclose(quick(x), model(x), rtol=1e-3, atol=1e-4)
    if name in ("swish", "kaf_elu"):  # at a kink or jump rounding may choose the other side
        g, h = (attacks.input_gradient(m, x, y) for m in (model, quick))
        apart = (g - h).flatten(1).norm(dim=1) / g.flatten(1).norm(dim=1)
        assert (apart > 1e-3).sum() <= 1  # near a tie in max pooling too


def test_folding_removes_every_normalisation_of_the_thesis_block():
    quick = twin(trained_like(models.resnet(20, "relu")))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in quick.modules())
    layouts = [
        m.weight.is_contiguous(memory_format=torch.channels_last) for m in quick.modules() if isinstance(m, nn.Conv2d)
    ]
    assert all(layouts)


@pytest.mark.parametrize("block", ["thesis", "he"])
def test_a_chain_of_relu_blocks_is_the_same_in_float64(block):
    torch.manual_seed(0)
    model = trained_like(models.resnet(20, "relu", block, in_channels=2, image_size=16))
    quick = twin(model)
    if type(quick.blocks) is not fast._Chain:
        pytest.skip("this processor or this torch has no fused kernels of oneDNN")
    for n in (1, 9, 4):  # the weights are laid out once, for any number of images
        x, y = torch.rand(n, 2, 16, 16), torch.randint(0, 10, (n,))
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            torch.testing.assert_close(quick(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4)
        g, h = attacks.input_gradient(quick, x, y).double(), attacks.input_gradient(exact, x.double(), y)
        apart = (g - h).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)
        assert apart.min() < 1e-5 and (apart < 1e-3).float().mean() > 0.7, apart  # at a kink either side is right
    again = copy.deepcopy(quick)  # after use
    torch.testing.assert_close(again(x), quick(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(quick(x).float(), model(x).float(), rtol=0.1, atol=0.1 * quick(x).abs().max().item())
    x.requires_grad_()
    (g,) = torch.autograd.grad(quick(x).logsumexp(1).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_what_is_not_a_number_stays_so():
    model = trained_like(models.resnet(8, "relu"))
    with torch.no_grad():
        model.blocks[1].conv1.weight[0] = torch.nan
        assert twin(model)(torch.rand(2, 3, 32, 32)).isnan().all()


@pytest.mark.parametrize("flipped", [False, True])
def test_skips_of_relu_blocks_need_no_factor_where_none_is_negative(flipped):
    torch.manual_seed(0)
    model = trained_like(models.resnet(20, "relu")).double()
    with torch.no_grad():
        for block in model.blocks:
            block.bn2.weight.abs_().clamp_(min=0.01)
        model.blocks[1].bn2.weight[3] *= (-1) ** flipped
    quick = copy.deepcopy(model)
    with torch.no_grad():
        fast._fold(quick)
    left = [i for i, block in enumerate(quick.blocks) if block.scale is not None]
    assert left == [1, 8] if flipped else left == [8]  # the last has nobody to leave its factor to
    x, y = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (4,))
    torch.testing.assert_close(quick(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(attacks.input_gradient(m, x, y) for m in (quick, model)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gain, blocks", [(1e-40, [1]), (1e-15, [0, 1, 2])])
def test_a_factor_that_cannot_be_divided_out_stays_in_its_block(gain, blocks):
    """1 / c, or that of the product of three, would overflow, and the NaN behind it be no attack at all."""
    torch.manual_seed(0)
    model = trained_like(models.resnet(20, "relu", in_channels=1, image_size=8))
    with torch.no_grad():
        for block in model.blocks:
            block.bn2.weight.abs_().clamp_(min=0.5)
        for i in blocks:
            model.blocks[i].bn2.weight[0] = gain
    quick, x = twin(model), torch.rand(4, 1, 8, 8)
    assert quick is not model
    torch.testing.assert_close(quick(x), model(x), rtol=1e-3, atol=1e-4 * model(x).abs().max().item())


def test_no_twin_whose_weights_overflow():
    net = trained_like(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()))
    with torch.no_grad():
        net[0].weight.fill_(1e30)
        net[1].weight.fill_(1e30)
    assert twin(net) is net


@pytest.mark.parametrize("behind", [models.HeBlock, models.ThesisBlock])
@pytest.mark.parametrize("wider", [False, True])
def test_a_thesis_block_may_stand_before_any_block(behind, wider):
    torch.manual_seed(0)
    cout = 16 if wider else 8
    blocks = models.ThesisBlock(8, 8, 1, lambda c: nn.ReLU()), behind(8, cout, 1 + wider, lambda c: nn.ReLU())
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cout, 10)
    model = trained_like(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(*blocks), *head))
    with torch.no_grad():
        model[1][0].bn2.weight.abs_()
    x = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(twin(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_unknown_is_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.light_cnn("relu")

        def forward(self, x):
            return self.net(x)

    watched = models.light_cnn("relu")
    watched[0].register_forward_hook(lambda *_: None)
    for model in (Odd(), watched, models.light_cnn("relu").double(), models.mlp()):
        assert twin(model) is model


def altered(change, block):
    """A ResNet8 with something in its blocks that the package never puts there."""
    net = trained_like(models.resnet(8, block=block, in_channels=1, image_size=8))
    for part in [m for m in net.modules() if type(m) is models.BLOCKS[block]]:
        change(part)
    return net.eval()


def _circular(block):
    block.conv1.padding_mode = block.conv2.padding_mode = "circular"
    block.conv2._reversed_padding_repeated_twice = block.conv1._reversed_padding_repeated_twice = [1] * 4


def _biased(block):
    if isinstance(block.skip, nn.Conv2d):
        block.skip.bias = nn.Parameter(torch.ones(block.skip.out_channels))


def _put(**parts):
    return lambda block: [setattr(block, name, make(block.conv2.out_channels)) for name, make in parts.items()]


@pytest.mark.parametrize(
    "change",
    [
        _circular,
        _put(conv2=lambda c: nn.Conv2d(c, c, 3, padding="same")),
        _put(conv2=lambda c: nn.Conv2d(c, c, 3, padding=1, groups=2)),
        _put(conv2=lambda c: nn.Conv2d(c, c, 3, padding=2, dilation=2)),
        _put(bn2=lambda c: nn.GroupNorm(2, c)),
        _put(bn1=lambda c: nn.Identity()),
        _put(bn2=lambda c: nn.BatchNorm2d(c, track_running_stats=False)),
        lambda block: setattr(block, "skip", nn.Sequential(block.skip)),
        _biased,
    ],
)
@pytest.mark.parametrize("block", ["thesis", "he"])
def test_blocks_with_other_parts_stay_as_they_are(change, block):
    torch.manual_seed(0)
    model = altered(change, block)
    x, y = torch.rand(6, 1, 8, 8), torch.randint(0, 10, (6,))
    torch.testing.assert_close(twin(model)(x), model(x), rtol=1e-4, atol=1e-4)
    gradients = [attacks.input_gradient(m, x, y) for m in (twin(model), model)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[1].abs().max().item())


def test_pgd_with_and_without_it():
    torch.manual_seed(0)
    model = trained_like(models.resnet(8, activation="swish", in_channels=1, image_size=8))
    x, y = torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,))
    adv = []
    for quick in (False, True):
        torch.manual_seed(1)
        adv.append(attacks.pgd(model, x, y, eps=0.1, steps=8, fast=quick))
    assert ((adv[0] - adv[1]).abs() > 1e-4).float().mean() < 0.01
    assert (model(adv[0]).argmax(1) == model(adv[1]).argmax(1)).float().mean() > 0.96
    assert not any(m.inplace for m in models.light_cnn("relu").modules() if isinstance(m, nn.ReLU))


def test_a_layer_in_two_places_is_not_folded_twice():
    conv, other = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    tied = nn.Conv2d(2, 2, 3, padding=1)
    tied.weight = conv.weight
    for second in (conv, tied):
        net = nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), second, nn.BatchNorm2d(2), nn.Flatten())
        assert twin(trained_like(net)) is net
    net = trained_like(nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), other, nn.BatchNorm2d(2), nn.Flatten()))
    x = torch.rand(2, 2, 5, 5)
    assert twin(net) is not net and torch.allclose(twin(net)(x), net(x), atol=1e-5)
