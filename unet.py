"""The U-Net of the paper (Section 3.2) and the protective perturbation generator around it (Figure 3).

    protected = clamp(x + delta),  delta = U(x)

One forward pass of a fully convolutional network: the cost does not depend on the target classifier, and the same
7,766,051 weights take a picture of any size from 16 x 16 up (Section 4.3.1), but hide at the size trained for.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (32, 64, 128, 256, 512)
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images, RGB in [0, 1]
STD = (0.2471, 0.2435, 0.2616)


def double_conv(c_in: int, c_out: int) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with batch norm and leaky ReLU: one level of the U-Net."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True))


class Encoder(nn.Module):
    """The contracting path, which understands the picture: normalised image (N, 3, H, W) to five feature maps.

    The maps go from (N, 32, H, W) down to (N, 512, H / 16, W / 16), the bottleneck; H and W are multiples of 16.
    """

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(double_conv(c_in, c_out) for c_in, c_out in zip((3, *WIDTHS), WIDTHS))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.levels[0](x)]
        for level in self.levels[1:]:
            maps.append(level(F.max_pool2d(maps[-1], 2)))
        return maps


class UNet(nn.Module):
    """U(.) of Figure 3: normalised image (N, 3, H, W), H and W multiples of 16, to delta of the same shape.

    Delta is unbounded and in the units of the normalised image. Without `skips` it is painted from the bottleneck
    alone. Source: Ronneberger et al. 2015, the paper's [39].
    """

    def __init__(self, skips: bool = True):
        super().__init__()
        self.skips = skips
        upwards = [(WIDTHS[i + 1], WIDTHS[i]) for i in reversed(range(4))]  # 512 to 256 channels, ..., 64 to 32
        self.encoder = Encoder()
        self.up = nn.ModuleList(nn.ConvTranspose2d(c_in, c_out, 2, stride=2) for c_in, c_out in upwards)
        self.merge = nn.ModuleList(double_conv(c_in, c_out) for c_in, c_out in upwards)
        self.exit = nn.Conv2d(WIDTHS[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        x = maps.pop()
        for up, merge in zip(self.up, self.merge):
            skip = maps.pop()
            x = merge(torch.cat([skip if self.skips else torch.zeros_like(skip), up(x)], 1))
        return self.exit(x)


class Generator(nn.Module):
    """The protective perturbation generator: image to protected image, both (N, 3, H, W) RGB in [0, 1], H and W >= 16.

    The U-Net works on the normalised image, so its delta is scaled back by the standard deviation. Where H or W is not
    a multiple of 16 the picture is padded to the next one by mirroring, and delta is cropped. Raises ValueError on any
    other shape. Source: Section 3.2, Figure 3.

    `hardened` is not the paper's: protected = clamp(mean + std * U), without skips and without x, since what is not in
    the bottleneck cannot leak to someone who trains a network to undo this one. The weights of both forms have the same
    names and shapes: train.load_generator knows which form a file holds.
    """

    def __init__(self, hardened: bool = False):
        super().__init__()
        self.hardened = hardened
        self.unet = UNet(skips=not hardened)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] < 16 or x.shape[3] < 16:
            raise ValueError(f"the generator takes (N, 3, H, W) images with H and W >= 16, got {x.shape}")
        h, w = x.shape[2], x.shape[3]
        z = (x - self.mean) / self.std
        if h % 16 != 0 or w % 16 != 0:
            z = F.pad(z, [0, -w % 16, 0, -h % 16], mode="reflect")
        delta = self.std * self.unet(z)[:, :, :h, :w].float()  # float32 again if the U-Net ran under autocast
        return ((self.mean if self.hardened else x) + delta).clamp(0.0, 1.0)
