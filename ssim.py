"""SSIM, structural similarity (Wang et al. 2004, the paper's [52]): Eq. (3), Figures 8 and 11."""

import torch
from torch import Tensor

WINDOW = 11  # pixels a side of the Gaussian window, and its standard deviation
SIGMA = 1.5
C1 = 0.01 ** 2  # (K1 * L)^2 and (K2 * L)^2, with L = 1 for images in [0, 1]
C2 = 0.03 ** 2


def blur_matrix(size: int, device: torch.device) -> Tensor:
    """Matrix (size - 10, size) that blurs a line of pixels: row i is the window from pixel i on."""
    pixel = torch.arange(size, dtype=torch.float64, device=device)
    centre = torch.arange(size - WINDOW + 1, device=device)[:, None] + WINDOW // 2
    distance = pixel - centre
    gauss = torch.exp(-(distance ** 2) / (2 * SIGMA ** 2))
    gauss = gauss.where(distance.abs() <= WINDOW // 2, 0)
    return gauss / gauss[0, :WINDOW].sum()  # every row holds the whole window


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of each pair: two (N, C, H, W) batches in [0, 1], H and W >= 11, to (N,) in [-1, 1].

    Mean over channels and window positions, signed (negative where structure is inverted),
    differentiable. Computed in float64, because a variance is the small difference of large
    numbers, and neither autocast nor TF32 shortens float64. The result is float32. Raises
    ValueError on a wrong shape.
    """
    if x.dim() != 4 or x.shape != y.shape:
        raise ValueError(f"ssim takes two (N, C, H, W) batches, got {x.shape} and {y.shape}")
    if x.shape[2] < WINDOW or x.shape[3] < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} x {WINDOW}, got {x.shape}")
    x = x.double()
    y = y.double()
    # The window is separable, so a local mean is blur_rows @ image @ blur_columns: two matrix
    # products, several times faster on a CPU than depthwise convolutions.
    blur_rows = blur_matrix(x.shape[2], x.device)
    blur_columns = blur_matrix(x.shape[3], x.device).T
    mu_x = blur_rows @ x @ blur_columns
    mu_y = blur_rows @ y @ blur_columns
    mean_squares = blur_rows @ (x * x + y * y) @ blur_columns
    mean_xy = blur_rows @ (x * y) @ blur_columns

    # Eq. (13) of Wang et al.
    mu_xy = mu_x * mu_y
    mu_squares = mu_x ** 2 + mu_y ** 2
    sigma_xy = mean_xy - mu_xy
    sigma_squares = mean_squares - mu_squares  # sigma_x^2 + sigma_y^2
    numerator = (2 * mu_xy + C1) * (2 * sigma_xy + C2)
    denominator = (mu_squares + C1) * (sigma_squares + C2)
    similarity = numerator / denominator
    return similarity.mean(dim=(1, 2, 3)).float()
