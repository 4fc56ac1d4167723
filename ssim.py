"""SSIM, structural similarity (Wang et al. 2004, the paper's [52]): Eq. (3), and the likeness of Figures 8 and 11."""

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # the Gaussian window
C1, C2 = 0.01 ** 2, 0.03 ** 2  # (K1 * L)^2 and (K2 * L)^2, with L = 1 for images in [0, 1]


def blur_matrix(size: int, device: torch.device) -> Tensor:
    """(size - 10, size) matrix whose rows are the Gaussian at each place where it lies wholly inside ("valid")."""
    gauss = torch.exp(-(torch.arange(WINDOW, device=device) - WINDOW // 2) ** 2 / (2 * SIGMA ** 2))
    places = torch.arange(size - WINDOW + 1, device=device)
    band = torch.zeros(len(places), size, device=device)
    columns = places[:, None] + torch.arange(WINDOW, device=device)
    return band.scatter_(1, columns, (gauss / gauss.sum()).repeat(len(places), 1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each image pair: two (N, C, H, W) batches in [0, 1], H and W >= 11, to (N,) values in [-1, 1].

    Mean over channels and window positions, signed (negative where structure is inverted), differentiable, and always
    computed in float32, since variances cancel badly in 16 bits. Raises ValueError on a wrong or different shape.
    """
    if x.shape != y.shape or x.dim() != 4:
        raise ValueError(f"ssim takes two (N, C, H, W) batches of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(x.shape[2:]) < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {tuple(x.shape[2:])}")
    with torch.autocast(x.device.type, enabled=False):
        x, y = x.float(), y.float()
        # The window is separable, so blurring is rows @ image @ columns: two matrix products for all the local means,
        # several times faster on a CPU than depthwise convolutions.
        rows, columns = blur_matrix(x.shape[2], x.device), blur_matrix(x.shape[3], x.device).T
        mean_x, mean_y, mean_squares, mean_xy = rows @ torch.stack([x, y, x * x + y * y, x * y]) @ columns
        products, squares = mean_x * mean_y, mean_x ** 2 + mean_y ** 2
        covariance, variances = mean_xy - products, mean_squares - squares  # variances: that of x plus that of y
        similarity = (2 * products + C1) * (2 * covariance + C2) / ((squares + C1) * (variances + C2))
        return similarity.mean(dim=(1, 2, 3))
