"""torchvision's ResNet50 with any activation, and the normalisation inside."""

from torch import nn

from ..activations import activation as named

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Images in [0, 1] to the mean and spread that the network expects: inside it, so that eps stays in pixel units."""

    def forward(self, x):
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (x - mean) / std


def resnet(activation="relu", layers=(3, 4, 6, 3), num_classes=1000):
    """torchvision's bottleneck ResNet (ResNet50 by default) with an activation of its own behind each layer.

    Source: He et al., CVPR 2016, arXiv:1512.03385, stride in the 3x3 convolution as torchvision has it.
    """
    from torchvision.models.resnet import Bottleneck, ResNet

    class Block(Bottleneck):
        def __init__(self, inplanes, planes, *arguments, **options):
            super().__init__(inplanes, planes, *arguments, **options)
            del self.relu  # one module for three places cannot learn three functions
            self.act1, self.act2, self.act3 = (
                named(activation, c.out_channels) for c in (self.conv1, self.conv2, self.conv3)
            )

        def forward(self, x):
            out = self.act1(self.bn1(self.conv1(x)))
            out = self.act2(self.bn2(self.conv2(out)))
            out = self.bn3(self.conv3(out))
            return self.act3(out + (x if self.downsample is None else self.downsample(x)))

    net = ResNet(Block, list(layers), num_classes=num_classes)
    net.relu = named(activation, 64)
    model = nn.Sequential(Normalise(), net)
    model.l2, model.l2_layers = 5e-5, (nn.Conv2d, nn.Linear)  # a weight decay of 1e-4
    return model
