"""The U-Net of the paper (Section 3.2) and the protective perturbation generator around it (Figure 3).

    protected = clamp(x + delta),  delta = U(x)

One forward pass of a fully convolutional network: the cost does not depend on the target classifier, and the same
7,766,051 weights protect a picture of any size from 16 x 16 up (Section 4.3.1).
"""

import contextlib
import io
import os

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


class UNet(nn.Module):
    """U(.) of Figure 3: normalised image (N, 3, H, W), H and W multiples of 16, to delta of the same shape.

    Delta is unbounded and in the units of the normalised image. Other sizes fail: Generator takes those. Source:
    Ronneberger et al. 2015, the paper's [39].
    """

    def __init__(self):
        super().__init__()
        w = WIDTHS
        self.enter = double_conv(3, w[0])
        self.down = nn.ModuleList(double_conv(w[i], w[i + 1]) for i in range(4))
        self.up = nn.ModuleList(nn.ConvTranspose2d(w[i + 1], w[i], 2, stride=2) for i in reversed(range(4)))
        self.merge = nn.ModuleList(double_conv(2 * w[i], w[i]) for i in reversed(range(4)))
        self.exit = nn.Conv2d(w[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.enter(x), []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.exit(x)


class Generator(nn.Module):
    """The protective perturbation generator: image to protected image, both (N, 3, H, W) RGB in [0, 1], H and W >= 16.

    The U-Net works on the normalised image, so its delta is scaled back by the standard deviation. Where H or W is not
    a multiple of 16 the picture is padded to the next one by mirroring, and delta is cropped. Raises ValueError on any
    other shape. Source: Section 3.2, Figure 3.
    """

    def __init__(self):
        super().__init__()
        self.unet = UNet()
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
        return (x + delta).clamp(0.0, 1.0)


def save_generator(path: str, generator: nn.Module, meta: dict) -> None:
    """Write a generator's weights and `meta` (plain numbers, strings, lists, dicts), so that `path` is whole or absent.

    Convolution kernels are stored in 16 bits (15 MB instead of 31), everything else in 32. Raises OSError if it cannot.
    """
    state = {key: value.half() if value.dim() == 4 else value for key, value in generator.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"generator": state, "meta": meta}, buffer)
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise OSError(f"cannot write {path}: is the folder there, and the disk not full?") from error


def load_generator(path: str) -> tuple[Generator, dict]:
    """Read what save_generator wrote: (generator in eval mode on the CPU, meta).

    Raises FileNotFoundError where there is no such file, ValueError where it is damaged or is something else.
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        generator = Generator()
        generator.load_state_dict(file["generator"])
        return generator.eval(), file["meta"]
    except OSError:
        raise
    except Exception as error:  # torch.load meets foreign bytes with nearly every kind
        raise ValueError(f"{path} is damaged or not a generator of this project: delete or replace it") from error
