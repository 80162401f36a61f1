"""The thesis' networks. All take images in [0, 1] as (N, C, H, W) and return logits (N, num_classes).

``activation`` is a name (see ``kafnb.activation``) or a function channels -> module. ``l2`` on a model is the
thesis' penalty, lambda * sum(w^2) over the weights of the layer types in ``l2_layers``.
"""

import functools
import inspect
import itertools
import re

from torch import nn
from torch.nn import functional as F

from .activations import activation as named_activation
from .checks import count, instance, number, pick, shown
from .kaf import KAF


def _factory(activation):
    """channels -> module, of a name or of such a function."""
    own = isinstance(activation, type) and activation.__module__ == nn.ELU.__module__ and activation is not nn.PReLU
    if own or isinstance(activation, nn.Module):  # called with the channels it would take them for its parameter
        raise TypeError(
            f"activation must be a name or a function, as lambda channels: nn.ELU(), got {shown(activation)}"
        )
    return activation if callable(activation) else functools.partial(named_activation, activation)


def _sizes(in_channels, image_size, num_classes, halved=0):
    """Refuse what no network can be built for; ``halved``: how often the network halves the image."""
    count(in_channels, "in_channels")
    count(num_classes, "num_classes", low=2)
    count(image_size, "image_size")
    if image_size < 2**halved:
        raise ValueError(f"the network halves the image {halved} times: image_size >= {2**halved}, got {image_size}")


def _he(model, fill):
    """He's initialisation of every convolution and dense layer; biases zero."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            fill(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return model


def _conv_act(cin, cout, act):
    return [nn.Conv2d(cin, cout, 3, padding=1), nn.BatchNorm2d(cout), act(cout)]


def mlp(activation="relu", in_channels=1, image_size=8, num_classes=10, hidden=(128, 64)):
    """Fully connected network on flattened images, ``hidden`` units a layer.

    Images (N, in_channels, image_size, image_size) in [0, 1] -> logits (N, num_classes). Each hidden layer is dense,
    with the activation behind it, one channel a unit. ``l2`` is 0.
    """
    _sizes(in_channels, image_size, num_classes)
    hidden = [count(h, "units in hidden") for h in instance(hidden, list | tuple, "hidden")]
    act, sizes = _factory(activation), (in_channels * image_size**2, *hidden)
    layers = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), act(o)]
    model = _he(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)), nn.init.kaiming_uniform_)
    model.l2, model.l2_layers = 0.0, ()
    return model


def textbook_cnn(activation="relu", in_channels=3, image_size=32, num_classes=10, filters=(16, 32), dropout=0.0):
    """Convolution, activation and pooling by turns, then flatten and two dense layers (section 2.1.4).

    Images and logits as for ``mlp``; each of ``filters`` is one convolution, and its pooling halves the image, rounded
    down. ``dropout``: the rate before the last layer, in [0, 1]. ``l2`` is 0.
    """
    filters = [count(f, "filters") for f in instance(filters, list | tuple, "filters")]
    _sizes(in_channels, image_size, num_classes, halved=len(filters))
    number(dropout, "dropout", low=0, high=1)
    act, layers, cin = _factory(activation), [], in_channels
    for cout in filters:
        layers += [nn.Conv2d(cin, cout, 3, padding=1), act(cout), nn.MaxPool2d(2)]
        cin = cout
    flat = cin * (image_size // 2 ** len(filters)) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, 64), act(64), nn.Dropout(dropout), nn.Linear(64, num_classes)]
    model = _he(nn.Sequential(*layers), nn.init.kaiming_uniform_)
    model.l2, model.l2_layers = 0.0, (nn.Conv2d, nn.Linear)
    return model


def light_cnn(activation="relu", in_channels=3, image_size=32, num_classes=10):
    """The small CNN of the thesis' chapter 4: two blocks of 32 and 64 filters, global average pooling, dense 128.

    Images and logits as for ``mlp``, but of any height and width from 4 pixels on. ``l2`` is on the dense layers.
    """
    _sizes(in_channels, image_size, num_classes, halved=2)
    act = _factory(activation)
    model = nn.Sequential(
        *_conv_act(in_channels, 32, act), *_conv_act(32, 32, act), nn.MaxPool2d(2), nn.Dropout(0.2),
        *_conv_act(32, 64, act), *_conv_act(64, 64, act), nn.MaxPool2d(2), nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 128), act(128), nn.Dropout(0.4),
        nn.Linear(128, num_classes),
    )  # fmt: skip
    model = _he(model, nn.init.kaiming_uniform_)
    model.l2, model.l2_layers = 0.0012, (nn.Linear,)
    return model


def vgg(activation="relu", in_channels=3, image_size=32, num_classes=10):
    """The VGG-inspired network of section 5.1: blocks of 32, 64 and 128 filters, then dense 128.

    Images and logits as for ``mlp``, from 8 pixels on; each block halves the image, rounded down. ``l2`` as
    for ``light_cnn``.
    """
    _sizes(in_channels, image_size, num_classes, halved=3)
    act, layers, cin = _factory(activation), [], in_channels
    for filters, rate in ((32, 0.2), (64, 0.25), (128, 0.3)):
        layers += [*_conv_act(cin, filters, act), *_conv_act(filters, filters, act), nn.MaxPool2d(2), nn.Dropout(rate)]
        cin = filters
    flat = 128 * (image_size // 8) ** 2
    layers += [nn.Flatten(), nn.Linear(flat, 128), act(128), nn.Dropout(0.4), nn.Linear(128, num_classes)]
    model = _he(nn.Sequential(*layers), nn.init.kaiming_uniform_)
    model.l2, model.l2_layers = 0.0012, (nn.Linear,)
    return model


def _conv3(cin, cout, stride=1):
    return nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False)


class _PadShortcut(nn.Module):
    """He's parameter-free shortcut (option A): subsample, and pad the new channels with zeros."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.stride, self.new = stride, cout - cin

    def forward(self, x):
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))


def _shortcut(cin, cout, stride):
    return nn.Identity() if stride == 1 and cin == cout else _PadShortcut(cin, cout, stride)


class ThesisBlock(nn.Module):
    """conv-BN-act-conv, + skip, then BN, then act: nothing passes the block unchanged.

    The skip of a stride block is a 3x3 convolution.
    """

    def __init__(self, cin, cout, stride, act):
        super().__init__()
        self.conv1, self.bn1, self.act1 = _conv3(cin, cout, stride), nn.BatchNorm2d(cout), act(cout)
        self.conv2, self.bn2, self.act2 = _conv3(cout, cout), nn.BatchNorm2d(cout), act(cout)
        self.skip = nn.Identity() if stride == 1 and cin == cout else _conv3(cin, cout, stride)

    def forward(self, x):
        out = self.conv2(self.act1(self.bn1(self.conv1(x))))
        return self.act2(self.bn2(out + self.skip(x)))


class HeBlock(nn.Module):
    """conv-BN-act-conv-BN, + skip, then act. Source: He et al., CVPR 2016, arXiv:1512.03385."""

    def __init__(self, cin, cout, stride, act):
        super().__init__()
        self.conv1, self.bn1, self.act1 = _conv3(cin, cout, stride), nn.BatchNorm2d(cout), act(cout)
        self.conv2, self.bn2, self.act2 = _conv3(cout, cout), nn.BatchNorm2d(cout), act(cout)
        self.skip = _shortcut(cin, cout, stride)

    def forward(self, x):
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(out + self.skip(x))


class PlainBlock(HeBlock):
    """He's block without its skip, to show what the skip is for. Source: as ``HeBlock``."""

    def __init__(self, cin, cout, stride, act):
        super().__init__(cin, cout, stride, act)
        del self.skip

    def forward(self, x):
        return self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


class PreactBlock(nn.Module):
    """BN-act-conv-BN-act-conv, + skip: an identity path. Source: He et al., ECCV 2016, arXiv:1603.05027."""

    def __init__(self, cin, cout, stride, act):
        super().__init__()
        self.bn1, self.act1, self.conv1 = nn.BatchNorm2d(cin), act(cin), _conv3(cin, cout, stride)
        self.bn2, self.act2, self.conv2 = nn.BatchNorm2d(cout), act(cout), _conv3(cout, cout)
        self.skip = _shortcut(cin, cout, stride)

    def forward(self, x):
        return self.conv2(self.act2(self.bn2(self.conv1(self.act1(self.bn1(x)))))) + self.skip(x)


BLOCKS = {"thesis": ThesisBlock, "he": HeBlock, "preact": PreactBlock, "plain": PlainBlock}


def resnet_blocks(depth):
    """n of a depth 6n + 2."""
    n, rest = divmod(count(depth, "resnet depth", low=-10_000, high=10_000) - 2, 6)
    if rest or n < 1:
        raise ValueError(f"resnet depth must be 6n + 2 (20, 32, 44, 56, ...), got {depth}")
    return n


def resnet(depth, activation="relu", block="thesis", in_channels=3, num_classes=10, image_size=32, width=16):
    """ResNet of 6n + 2 layers for small images: three stages of n blocks with width, 2 width, 4 width filters.

    Parameters
    ----------
    depth : int
        6n + 2: 20, 32, 44, 56, 110, ...
    block : {"thesis", "he", "preact", "plain"}
        Where normalisation and activation stand; see the block classes.

    Raises
    ------
    ValueError
        depth is not 6n + 2, or block is unknown.
    """
    n = resnet_blocks(depth)
    _sizes(in_channels, image_size, num_classes)
    count(width, "width")
    act, make = _factory(activation), pick(BLOCKS, block, "block")
    stem, tail = [_conv3(in_channels, width)], [nn.BatchNorm2d(4 * width), act(4 * width)]
    if block != "preact":
        stem, tail = [*stem, nn.BatchNorm2d(width), act(width)], []
    blocks, cin = [], width
    for stage, filters in enumerate((width, 2 * width, 4 * width)):
        for i in range(n):
            blocks.append(make(cin, filters, 2 if stage and i == 0 else 1, act))
            cin = filters
    head = [*tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes)]
    model = nn.Sequential()
    model.stem, model.blocks, model.head = nn.Sequential(*stem), nn.Sequential(*blocks), nn.Sequential(*head)
    model = _he(model, nn.init.kaiming_normal_)
    model.l2, model.l2_layers = 0.0005, (nn.Conv2d, nn.Linear)
    return model


def out_of_place(model):
    """The model itself, changed so that no layer overwrites its input."""
    for m in model.modules():
        if getattr(m, "inplace", False):
            m.inplace = False
    return model


# these work on any memory layout
ANY_LAYOUT = (
    nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Dropout,
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Softplus, nn.Sigmoid, nn.Tanh, KAF, _PadShortcut,
)  # fmt: skip


def any_layout(model):
    """True if every layer computes the same on channels last as on channels first, without copies that would cost more.

    On CUDA all of PyTorch's and ours count: there convolutions and normalisations in channels first cost far more.
    """
    layers = [m for m in model.modules() if not any(m.children())]
    if any(p.is_cuda for p in model.parameters()):
        return all(type(m).__module__.split(".")[0] in ("torch", "kafnb") for m in layers)
    return all(isinstance(m, ANY_LAYOUT) for m in layers)


def maker(name):
    """The function that makes the model of this name, "resnetD" with any D = 6n + 2 below 10,000 among them.

    It takes the arguments of ``mlp`` but ``hidden``, by name, and any of its own. ValueError for an unknown name.
    """
    makers = {"mlp": mlp, "textbook_cnn": textbook_cnn, "light_cnn": light_cnn, "vgg": vgg}
    if isinstance(name, str) and re.fullmatch(r"resnet[1-9]\d{0,3}", name, re.ASCII):
        resnet_blocks(int(name[6:]))
        return functools.partial(resnet, int(name[6:]))
    return pick(makers | {f"resnet{d}": resnet for d in (20, 32, 44, 56, 110)}, name, "model")


def build(name, activation, data, **options):
    """A model by name ("mlp", "textbook_cnn", "vgg", "resnet20", ...) with the shape and classes of ``data``.

    ``options`` are further arguments of its maker, e.g. block="he"; ValueError for a name or option that is unknown.
    """
    shape = dict(in_channels=data.in_channels, image_size=data.image_size, num_classes=data.num_classes)
    make = maker(name)
    known = inspect.signature(make).parameters
    for option in options:
        pick(tuple(k for k in known if k not in ("activation", *shape)), option, f"option of {name}")
    return make(activation, **shape, **options)
