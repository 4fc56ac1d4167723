"""The U-Net of the paper (Section 3.2) and the protective perturbation generator (Figure 3).

    protected = clamp(x + delta),  delta = U(x)

One forward pass of a fully convolutional network: the same 7,766,051 weights take an image of any
size from 16 x 16 up (Section 4.3.1), and the cost does not depend on the target classifier
(Section 4.3.2). The image is hidden only at the size that the weights were trained for.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images, RGB in [0, 1]
STD = (0.2471, 0.2435, 0.2616)
BOTTLENECK = 512  # channels of the encoder's last feature map


def double_conv(c_in: int, c_out: int) -> nn.Sequential:
    """One level of the U-Net: two 3 x 3 convolutions, each with batch norm and leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.LeakyReLU(0.2, inplace=True),
    )


def pad_to_16(x: Tensor) -> Tensor:
    """Images (N, C, H, W), mirrored at two borders so that H and W become multiples of 16."""
    h, w = x.shape[2], x.shape[3]
    if h % 16 != 0 or w % 16 != 0:
        x = F.pad(x, [0, -w % 16, 0, -h % 16], mode="reflect")
    return x


class Encoder(nn.Module):
    """The contracting path: normalised images (N, 3, H, W) to five feature maps.

    H and W are multiples of 16. The maps go from (N, 32, H, W) down to (N, 512, H / 16, W / 16),
    the bottleneck.
    """

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList([
            double_conv(3, 32),
            double_conv(32, 64),
            double_conv(64, 128),
            double_conv(128, 256),
            double_conv(256, BOTTLENECK),
        ])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.levels[0](x)
        maps = [x]
        for level in self.levels[1:]:
            x = F.max_pool2d(x, 2)
            x = level(x)
            maps.append(x)
        return maps


class UNet(nn.Module):
    """U(.) of Figure 3: normalised images (N, 3, H, W) to delta, of the same shape, unbounded.

    H and W are multiples of 16; delta is in the units of the normalised image. With `codes`
    (K, 512), one for each class, delta is painted from one of them alone: the nearest to the
    bottleneck's mean.
    Source: Ronneberger et al. 2015, the paper's [39].
    """

    def __init__(self, codes: Tensor | None = None):
        super().__init__()
        self.register_buffer("codes", codes)
        self.encoder = Encoder()
        self.up = nn.ModuleList([
            nn.ConvTranspose2d(BOTTLENECK, 256, 2, stride=2),
            nn.ConvTranspose2d(256, 128, 2, stride=2),
            nn.ConvTranspose2d(128, 64, 2, stride=2),
            nn.ConvTranspose2d(64, 32, 2, stride=2),
        ])
        self.merge = nn.ModuleList([
            double_conv(256 + 256, 256),
            double_conv(128 + 128, 128),
            double_conv(64 + 64, 64),
            double_conv(32 + 32, 32),
        ])
        self.exit = nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        x = maps.pop()
        if self.codes is not None:
            features = x.float().mean(dim=(2, 3))
            # Without matrix products an image has the same distances alone and in a batch.
            distances = torch.cdist(features, self.codes,
                                    compute_mode="donot_use_mm_for_euclid_dist")
            nearest = distances.argmin(1)  # the class, as far as the encoder can tell
            code = self.codes[nearest]  # nothing else of the image goes on from here
            x = code[:, :, None, None].expand_as(x)
        for up, merge in zip(self.up, self.merge):
            skip = maps.pop()
            if self.codes is not None:
                skip = torch.zeros_like(skip)
            x = up(x)
            x = torch.cat([skip, x], dim=1)
            x = merge(x)
        return self.exit(x)


class Generator(nn.Module):
    """The protective perturbation generator: what the phone computes before anything leaves it.

    Images to protected images, both (N, 3, H, W) float32 RGB in [0, 1], H and W >= 16. The U-Net
    works on the normalised image, so its delta is scaled back by the standard deviation. Where H or
    W is not a multiple of 16, the image is padded by mirroring and delta is cropped.
    Raises ValueError on any other shape.

    With `codes` (K, 512) it has the hardened form, which goes beyond the paper. U recognises the
    image, to the nearest of K codes, and paints a new one from that code: the skip connections give
    zeros, x is not added. What leaves the phone is one of K pictures (for each image size).
    """

    def __init__(self, codes: Tensor | None = None):
        super().__init__()
        self.hardened = codes is not None  # torch.fx loses the buffer where it is None
        self.unet = UNet(codes)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] < 16 or x.shape[3] < 16:
            raise ValueError(f"images must be (N, 3, H, W) with H and W >= 16, got {x.shape}")
        h, w = x.shape[2], x.shape[3]
        z = (x - self.mean) / self.std
        z = pad_to_16(z)
        delta = self.unet(z)
        delta = delta[:, :, :h, :w]
        delta = self.std * delta.float()  # float32 again if the U-Net ran under autocast
        if self.hardened:
            protected = self.mean + delta
        else:
            protected = x + delta
        return protected.clamp(0.0, 1.0)
