"""SSIM, structural similarity (Wang et al. 2004, the paper's [52]): Eq. (3), Figures 8 and 11."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

WINDOW = 11  # pixels a side of the Gaussian window, and its standard deviation
SIGMA = 1.5
C1 = 0.01 ** 2  # (K1 * L)^2 and (K2 * L)^2, with L = 1 for images in [0, 1]
C2 = 0.03 ** 2


def blur_matrix(size: int, device: torch.device) -> Tensor:
    """Matrix (size - 10, size) that blurs a line of pixels, wherever the window lies inside it."""
    pixel = torch.arange(size, device=device)
    centre = torch.arange(size - WINDOW + 1, device=device)[:, None] + WINDOW // 2
    distance = pixel - centre
    gauss = torch.exp(-(distance ** 2) / (2 * SIGMA ** 2))
    gauss = gauss.where(distance.abs() <= WINDOW // 2, 0)
    return gauss / gauss[0, :WINDOW].sum()  # every row holds the whole window


@contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Let matrix products be in float32, whatever the caller's autocast and switches say.

    torch.set_float32_matmul_precision and its like allow fewer bits in them (bf16, TF32).
    """
    switches = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


class Blur(torch.autograd.Function):
    """blur_rows @ images @ blur_columns, in float32 forward and backward: variances cancel badly.

    The window is separable, so these are the local means of each image (..., H, W). Two matrix
    products are several times faster on a CPU than depthwise convolutions.
    """

    @staticmethod
    def forward(ctx, images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        blur_rows = blur_matrix(h, images.device)
        blur_columns = blur_matrix(w, images.device).T
        ctx.save_for_backward(blur_rows, blur_columns)
        with full_float32(images.device.type):
            return blur_rows @ images @ blur_columns

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        blur_rows, blur_columns = ctx.saved_tensors
        with full_float32(gradient.device.type):
            return blur_rows.T @ (gradient @ blur_columns.T)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each pair: two (N, C, H, W) batches in [0, 1], H and W >= 11, to (N,) in [-1, 1].

    Mean over channels and window positions, signed (negative where structure is inverted),
    differentiable. Always in float32. Raises ValueError on a wrong shape.
    """
    if x.dim() != 4 or x.shape != y.shape:
        raise ValueError(f"ssim takes two (N, C, H, W) batches, got {x.shape} and {y.shape}")
    if x.shape[2] < WINDOW or x.shape[3] < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} x {WINDOW}, got {x.shape}")
    x = x.float()
    y = y.float()
    moments = torch.stack([x, y, x * x + y * y, x * y])
    mu_x, mu_y, mean_squares, mean_xy = Blur.apply(moments)

    # Eq. (13) of Wang et al.
    mu_xy = mu_x * mu_y
    mu_squares = mu_x ** 2 + mu_y ** 2
    sigma_xy = mean_xy - mu_xy
    sigma_squares = mean_squares - mu_squares  # sigma_x^2 + sigma_y^2
    numerator = (2 * mu_xy + C1) * (2 * sigma_xy + C2)
    denominator = (mu_squares + C1) * (sigma_squares + C2)
    similarity = numerator / denominator
    return similarity.mean(dim=(1, 2, 3))
