"""The U-Net of the paper (Section 3.2) and the protective perturbation generator (Figure 3).

    protected = clamp(x + delta),  delta = U(x)

A fully convolutional network: the same 7,766,051 weights take an image of any size from 16 x 16 up
(Section 4.3.1), and the cost does not depend on the target classifier (Section 4.3.2). The image is
hidden only at the size that the weights were trained for.
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images, RGB in [0, 1]
STD = (0.2471, 0.2435, 0.2616)
BOTTLENECK = 512  # channels of the encoder's last feature map


class Normalize(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to the normalised ones that all our networks work on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


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
    """Make H and W of images (N, C, H, W) multiples of 16, by reflection at the border."""
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
        maps = []
        for i, level in enumerate(self.levels):
            if i > 0:
                x = F.max_pool2d(x, 2)
            x = level(x)
            maps.append(x)
        return maps


class UNet(nn.Module):
    """U(.) of Figure 3: normalised images (N, 3, H, W) to a normalised delta of the same shape.

    H and W are 16 or more; delta is unbounded. Two things go beyond the paper. With `look_twice`,
    the bottleneck is the mean of two: the image's, and its mirror image's, which is mirrored back.
    A trained encoder recognises more by both. The other maps are those of the image alone. With
    `codes` (K, 512), for each of K classes the mean bottleneck of its training images, U has the
    hardened form: it paints delta from one of the codes alone.
    Source: Ronneberger et al. 2015, the paper's [39].
    """

    # Final: TorchScript then compiles only the form that this network has.
    look_twice: Final[bool]
    hardened: Final[bool]

    def __init__(self, look_twice: bool = False, codes: Tensor | None = None):
        super().__init__()
        self.look_twice = look_twice
        self.hardened = codes is not None
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

    def keep_class_alone(self, maps: list[Tensor]) -> list[Tensor]:
        """Put zeros in place of all maps of the encoder but the last: that becomes a code.

        It is the code nearest to the mean of the last map. So nothing of an image goes on but its
        class, as far as the encoder can tell.
        """
        features = maps[-1].float().mean(dim=(2, 3))
        # Without matrix products an image has the same distances alone and in a batch.
        distances = torch.cdist(features, self.codes, compute_mode="donot_use_mm_for_euclid_dist")
        code = self.codes[distances.argmin(1)]
        kept = [torch.zeros_like(skip) for skip in maps[:-1]]
        kept.append(code[:, :, None, None].expand_as(maps[-1]))
        return kept

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = pad_to_16(x)
        if self.look_twice:
            looks = torch.cat([x, x.flip([3])])  # one batch: the file in 8 bits needs that
            maps_of_both = self.encoder(looks)
            maps = [both[:n] for both in maps_of_both]
            mirrored = maps_of_both[-1][n:]
            maps[-1] = (maps[-1] + mirrored.flip([3])) / 2
        else:
            maps = self.encoder(x)
        if self.hardened:
            maps = self.keep_class_alone(maps)
        x = maps.pop()
        for up, merge in zip(self.up, self.merge):
            skip = maps.pop()
            x = up(x)
            x = torch.cat([skip, x], dim=1)
            x = merge(x)
        delta = self.exit(x)
        return delta[:, :, :h, :w]  # without the padding


class Generator(nn.Module):
    """The protective perturbation generator: what the phone computes before anything leaves it.

    Images to protected images, both (N, 3, H, W) float32 RGB in [0, 1], H and W >= 16. The U-Net
    works on the normalised image, so its delta is scaled back by the standard deviation. For
    `look_twice` and `codes` see UNet. In the hardened form x is not added: what leaves the phone is
    one of K pictures (for each image size). Raises ValueError on any other shape.
    """

    def __init__(self, look_twice: bool = False, codes: Tensor | None = None):
        super().__init__()
        self.normalize = Normalize()
        self.unet = UNet(look_twice, codes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] < 16 or x.shape[3] < 16:
            raise ValueError(f"images must be (N, 3, H, W) with H and W >= 16, got {x.shape}")
        z = self.normalize(x)
        normalized_delta = self.unet(z).float()  # float32 again if U ran under autocast
        delta = self.normalize.std * normalized_delta
        if self.unet.hardened:
            protected = self.normalize.mean + delta
        else:
            protected = x + delta
        return protected.clamp(0.0, 1.0)
