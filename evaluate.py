"""How a generator is scored (Section 4.2.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import to_float
from ssim import ssim


@torch.no_grad()
def score(generator: nn.Module, target: nn.Module, aux: nn.Module | None, images: Tensor, labels: Tensor) -> dict:
    """Score a generator on uint8 images (N, 3, H, W) and their labels (N,).

    What leaves the phone is 8-bit, so everything is computed on protected images rounded to 8 bits. Returns
    target_accuracy and aux_accuracy in percent (Eq. 5), ssim (mean absolute value, as in Figure 8), and the means that
    the loss is made of: target_loss and aux_loss (cross-entropies of Eq. 1 and 2) and signed_ssim (Eq. 3). Without an
    auxiliary model aux_accuracy and aux_loss are None.
    """
    names = ["target_accuracy", "target_loss", "ssim", "signed_ssim"] + ["aux_accuracy", "aux_loss"] * (aux is not None)
    sums = torch.zeros(len(names), device=images.device)
    for image, label in zip(images.split(500), labels.split(500)):
        x = to_float(image)
        protected = (generator(x) * 255).round() / 255
        similarity = ssim(x, protected)
        values = [similarity.abs().sum(), similarity.sum()]
        for at, classifier in ((0, target), (4, aux)):
            if classifier is not None:
                logits = classifier(protected).float()
                right = (logits.argmax(1) == label).sum()
                values[at:at] = [100 * right, F.cross_entropy(logits, label, reduction="sum")]
        sums += torch.stack(values)
    return {"aux_accuracy": None, "aux_loss": None} | dict(zip(names, (sums / len(labels)).tolist()))
