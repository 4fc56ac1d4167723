"""Tests against independent truths: the paper's counts, direct formulas, other libraries.

    python -m pytest test_core.py

The first test is one to copy: it shows one behaviour, and compares it with what our code did not
compute. Three fixtures give a test what it needs: `shapes` is a small made-up data set, on which a
network trains in a second; `data` is CIFAR-10, for what only real images or the files that ship can
show; `folder` is a working folder for whole commands, with untrained networks in runs/. Three of
the longest tests go through the U-Net and the two trainings line by line.
"""

import functools
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from pytorch_msssim import ssim as their_ssim
from torch import nn
from torch.nn import functional as F

import classifiers
import evaluate
import export_mobile
import train
from classifiers import (Muon, UserError, accuracy, build_classifier, cut_out, learning_rate,
                         load_cifar10, load_classifier, random_crop_flip, save, to_float,
                         train_classifier)
from ssim import ssim
from train import load_generator, protect, protective_loss, score, train_generator
from unet import Generator

pytestmark = pytest.mark.filterwarnings(  # PyTorch Mobile's, which export_mobile.py silences
    "ignore:.*torch.jit.* is deprecated", "ignore:.*Lite Interpreter is deprecated")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
needs_executorch = pytest.mark.skipif(export_mobile.executorch_version() is None,
                                      reason="the package executorch is not installed")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
forms = pytest.mark.parametrize("form", ["paper", "pretrained", "hardened"])
ROOT = Path(__file__).resolve().parent
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
STD = torch.tensor([0.2471, 0.2435, 0.2616]).view(1, 3, 1, 1)
PRETRAINED = f"{ROOT}/weights/generator-vgg13_bn-resnet18.pt"
HARDENED = f"{ROOT}/weights/generator-vgg13_bn-resnet18-hardened.pt"
PAIR = ["--target", "resnet18", "--aux", "mobilenet_v2"]  # two networks of `folder`
NAME = "generator-resnet18-mobilenet_v2"  # the file of their generator


# --- An example to copy ---------------------------------------------------------------------------
def test_accuracy_is_equation_5(shapes):
    images, labels = shapes["test"]
    service = make_service()
    correct = 0
    for image, label in zip(images, labels):
        logits = service(image[None] / 255)
        if logits.argmax() == label:
            correct += 1
    assert 0 < correct < 80
    assert accuracy(service, images, labels) == pytest.approx(100 * correct / 80)
    with pytest.raises(ValueError, match="labels must be"):
        accuracy(service, images, labels[:, None])


# --- Fixtures and helpers -------------------------------------------------------------------------
@pytest.fixture(scope="session")
def data():
    """CIFAR-10, as load_cifar10 gives it: 50,000, 5,000 and 5,000 images."""
    return load_cifar10(str(ROOT / "data"))


@pytest.fixture(scope="session")
def shapes():
    """Made-up data: 80 images of each split, 32 x 32; class i is a square of colour i in noise."""
    return make_shapes()


@pytest.fixture
def folder(tmp_path, monkeypatch, shapes):
    """A working folder with untrained networks in runs/.

    The scripts take `shapes` for CIFAR-10 there, and see no GPU.
    """
    def load_shapes(folder, device="cpu"):
        return take(shapes, 80, device=device)

    for script in (classifiers, train, evaluate, export_mobile):
        monkeypatch.setattr(script, "load_cifar10", load_shapes)
    for script in (classifiers, evaluate):
        monkeypatch.setattr(script, "FOLDERS", ("runs", "weights"))  # not what ships
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for name in ("resnet18", "mobilenet_v2", "encoder"):
        weights = make_network(name).net.state_dict()
        save(f"runs/{name}.pt", {"classifier": weights, "meta": {}})
    return tmp_path


def make_shapes(classes=10):
    """The data of the fixture `shapes`; a process of its own makes the same."""
    torch.manual_seed(0)
    colours = torch.randint(0, 256, (classes, 3, 1, 1), dtype=torch.uint8)
    data = {}
    for split in ("train", "validation", "test"):
        labels = torch.arange(80) % classes
        images = torch.randint(90, 160, (80, 3, 32, 32), dtype=torch.uint8)
        for image, label in zip(images, labels):
            top, left = torch.randint(0, 16, (2,))
            image[:, top:top + 16, left:left + 16] = colours[label]
        data[split] = images, labels
    return data


def take(data, n, side=32, device="cpu"):
    """The first n images of each split, cut to side x side, and their labels."""
    taken = {}
    for split, (images, labels) in data.items():
        taken[split] = images[:n, :, :side, :side].to(device), labels[:n].to(device)
    return taken


@functools.cache
@torch.no_grad()
def make_network(name):
    """A classifier with random weights whose answers depend on the image."""
    images = to_float(make_shapes()["train"][0])
    torch.manual_seed(1)
    model = build_classifier(name)
    torch.optim.swa_utils.update_bn([images], model)
    model.eval()
    last = list(model.modules())[-1]
    last.bias -= model(images).mean(0)  # no class is the answer to all
    return model


def make_service(seed=0, side=32, classes=10):
    """An untrained classifier for images of side x side: linear, on 4 x 4 averages."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.AvgPool2d(side // 4), nn.Flatten(), nn.Linear(3 * 4 * 4, classes))


@torch.no_grad()
def make_generator(hardened=False, look_twice=True):
    """Untrained, but its batch norms have seen images; hardened, it has random codes."""
    torch.manual_seed(0)
    codes = 10000 * torch.randn(10, 512)  # smaller ones give ten pictures that are nearly the same
    generator = Generator(look_twice, codes if hardened else None)
    generator(torch.rand(16, 3, 32, 32))
    return generator.eval()


def encoder_features(generator, x):
    """The mean bottleneck of images (N, 3, H, W), looking once: (N, 512)."""
    return generator.unet.encoder((x - MEAN) / STD)[-1].mean((2, 3))


def write_generator(path, generator, **meta):
    """Write a file as train.py does; the fingerprints of its networks are wrong."""
    meta["form"] = "hardened" if generator.unet.hardened else "pretrained"
    meta["look_twice"] = generator.unet.look_twice
    meta |= {"epoch": 1, "epochs": 1, "flip": True, "image_size": [32, 32]}
    meta["validation"] = {"clean_target_accuracy": 92.0, "target_accuracy": 91.0}
    for network in ("target", "aux", "encoder"):
        meta[f"{network}_sha256"] = "none" if meta.get(network) == "none" else "another"
    save(path, {"generator": generator.state_dict(), "meta": meta})


def read_log(path):
    """What a training has written about each of its epochs."""
    return torch.load(path)["log"]


def to_numpy(image):
    """A uint8 image (3, H, W) as Pillow has it."""
    return image.permute(1, 2, 0).numpy()


def call(script, *words):
    """Run a command in this process; returns its exit code, or the line that it ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
        try:
            classifiers.run(script.main)
        except SystemExit as stop:
            return stop.code
    return 0


def kill_after_an_epoch(training, path):
    """Run training(path) in a process of its own, and kill that when there is a checkpoint."""
    process = multiprocessing.get_context("spawn").Process(target=training, args=(path,))
    process.start()
    while not os.path.exists(f"{path}.checkpoint"):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not os.path.exists(f"{path}.pt")


def stop_at_the_checkpoint(path, content):
    """In place of save(): the training is interrupted after its first epoch."""
    save(path, content)
    if path.endswith(".checkpoint"):
        raise KeyboardInterrupt


def assert_equal(weights, others):
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def train_encoder(path):
    torch.manual_seed(0)
    model = build_classifier("encoder")
    data = take(make_shapes(), 48)
    return train_classifier(model, data, path, epochs=4, batch_size=16, precision="fp32")


def cross_entropy(logits, labels):
    """The cross entropy of each image, by its definition."""
    likelihood = logits.softmax(1)[torch.arange(len(labels)), labels]
    return -likelihood.log()


def halve_and_double(channel):
    half = channel.resize((16, 16), Image.Resampling.BOX)
    return half.resize((32, 32), Image.Resampling.BILINEAR)


def train_pair(path, **changes):
    """A short training of the default form."""
    settings = {"target": make_service(1), "aux": make_service(2),
                "data": take(make_shapes(), 48), "encoder": make_network("encoder"),
                "epochs": 4, "batch_size": 16, "precision": "fp32"}
    return train_generator(path=path, **(settings | changes))


class Service(nn.Module):
    """Answers by a function of its network and the images."""

    def __init__(self, answer, network=None):
        super().__init__()
        self.answer = answer
        self.network = network or make_service()

    def forward(self, x):
        return self.answer(self.network, x)


hidden = make_service()  # no child module of a service that uses it


class Remembers(nn.Sequential):
    """Has an extra state that is no tensor."""

    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass


def shows(images, protected):
    """Can uint8 images be made out in protected ones (N, 3, H, W) in [0, 1]?"""
    protected = (255 * protected).round().byte()
    own = train.visibility(images, protected).mean()
    other = train.visibility(images.roll(1, 0), protected).mean()
    return own - other > train.VISIBLE


def stripes(width, axis):
    """Black and white lines along one axis, 32 x 32."""
    line = torch.arange(32) // width % 2
    return line[:, None].expand(32, 32) if axis == 0 else line.expand(32, 32)


class Mixture(nn.Module):
    """Mixes all pixels of images of 16 x 16, without loss, and adds noise."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.init.orthogonal_(torch.empty(768, 768))

    def forward(self, x):
        mixed = 0.5 + 0.3 * ((x - 0.5).flatten(1) @ self.matrix)
        return (mixed + 0.02 * torch.randn(mixed.shape)).clamp(0, 1).view_as(x)


def in_another_order(x):
    order = torch.randperm(768, generator=torch.Generator().manual_seed(0))
    return x.flatten(1)[:, order].view_as(x)


def one_of_ten(x):
    pictures = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return pictures[make_service(side=16)(x).argmax(1)]


def folded(x):
    """In place of a generator: hardly anything stays similar, but by the right view."""
    return 0.5 + 0.5 * torch.sin(40 * x)


def entry(target, aux, target_accuracy, clean, kept=None):
    """What Table 2 needs of an entry of results.json; less is lost on the validation images."""
    validation = {"target_accuracy": target_accuracy + 0.5, "clean_target_accuracy": clean}
    return {"target": target, "aux": aux, "target_accuracy": target_accuracy, "kept": kept,
            "clean_target_accuracy": clean, "meta": {"validation": validation}}


def read_asset(name):
    return json.loads((ROOT / "assets" / name).read_text())


def start_service():
    """A recognition service on an untrained mobilenet_v2; returns it and its address."""
    server = export_mobile.RecognitionServer(make_network("mobilenet_v2"), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, server.server_address


def make_png(size=(32, 32), mode="RGB", format="PNG"):
    w, h = size
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def exchange(address, message):
    """A client written by hand: what comes back, b"" if the service just closes."""
    with socket.create_connection(address, 30) as connection:
        try:
            connection.sendall(message)
            return connection.recv(100)
        except ConnectionError:  # it may be closed while we are still sending
            return b""


def request(content, length=None):
    """A message of the phone: 16 characters of length, then the PNG."""
    if length is None:
        length = len(content)
    return str(length).ljust(16).encode() + content


# --- ssim.py --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["noise", "inverted", "nearly the same", "17 x 11"])
def test_ssim_and_its_gradient_are_those_of_pytorch_msssim(shapes, kind):
    x = to_float(shapes["train"][0][:3])
    noise = torch.rand(x.shape)
    others = {"noise": noise, "inverted": 1 - x, "nearly the same": 0.9 * x + 0.1 * noise}
    y = others.get(kind, noise)
    if kind == "17 x 11":
        x, y = x[:, :, :17, :11], y[:, :, :17, :11]
    y.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):  # ssim() must ignore it
        values = ssim(x, y)
    expected = their_ssim(x, y, data_range=1, size_average=False)
    assert (values - expected).abs().max() < 1e-5
    gradient = torch.autograd.grad(values.sum(), y)[0]
    expected_gradient = torch.autograd.grad(expected.sum(), y)[0]
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()


@devices
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_ssim_and_its_gradient_do_not_depend_on_the_callers_switches(device, precision):
    """With fewer bits in matrix products, images with little contrast would get 0.8, not 0.5."""
    torch.manual_seed(0)
    x, y = (0.9 + 0.02 * torch.randn(2, 50, 3, 32, 32)).to(device)
    y.requires_grad_()
    expected = their_ssim(x.cpu(), y.cpu(), data_range=1, size_average=False)
    [expected_gradient] = torch.autograd.grad(expected.sum(), y)
    product = x @ x
    torch.set_float32_matmul_precision(precision)
    try:
        values = ssim(x, y)
        [gradient] = torch.autograd.grad(values.sum(), y)
        kept = torch.get_float32_matmul_precision()
        shortened = not torch.equal(product, x @ x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (values.cpu() - expected).abs().max() < 1e-4
    assert (gradient - expected_gradient).norm() < 1e-3 * expected_gradient.norm()
    assert kept == precision
    if not shortened:
        pytest.skip("nothing shown: this switch changes nothing here")


# --- unet.py --------------------------------------------------------------------------------------
@pytest.mark.parametrize("hardened, look_twice", [(False, False), (False, True), (True, True)])
@torch.no_grad()
def test_the_unet_is_that_of_ronneberger_layer_by_layer(hardened, look_twice):
    unet = make_generator(hardened, look_twice).unet
    state = unet.state_dict()

    def block(x, name):
        for i in (0, 3):
            conv = f"{name}.{i}"
            norm = f"{name}.{i + 1}"
            x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
            x = F.batch_norm(x, state[f"{norm}.running_mean"], state[f"{norm}.running_var"],
                             state[f"{norm}.weight"], state[f"{norm}.bias"])
            x = torch.where(x > 0, x, 0.2 * x)
        return x

    def contract(x):
        maps = [block(x, "encoder.levels.0")]
        for i in range(1, 5):
            pooled = F.max_pool2d(maps[-1], 2)
            maps.append(block(pooled, f"encoder.levels.{i}"))
        return maps

    x = torch.randn(2, 3, 32, 48)
    maps = contract(x)
    y = maps.pop()
    if look_twice:
        y = (y + contract(x.flip(3))[-1].flip(3)) / 2
    if hardened:  # the nearest code, at all places
        differences = y.mean((2, 3))[:, None] - state["codes"]
        nearest = (differences ** 2).sum(2).argmin(1)
        y = state["codes"][nearest].repeat_interleave(6, 1).view(2, 512, 2, 3)
    for i in range(4):
        skip = maps.pop()
        if hardened:
            skip = 0 * skip
        y = F.conv_transpose2d(y, state[f"up.{i}.weight"], state[f"up.{i}.bias"], stride=2)
        y = block(torch.cat([skip, y], 1), f"merge.{i}")
    y = F.conv2d(y, state["exit.weight"], state["exit.bias"])
    assert torch.allclose(unet(x), y, atol=1e-5)


@pytest.mark.parametrize("height, width", [(32, 48), (16, 17), (37, 50)])
@pytest.mark.parametrize("hardened", [False, True])
@torch.no_grad()
def test_the_generator_scales_delta_back_and_mirrors_other_sizes(hardened, height, width):
    generator = make_generator(hardened)
    x = torch.rand(1, 3, height, width)
    z = ((x - MEAN) / STD).numpy()
    border = ((0, 0), (0, 0), (0, -height % 16), (0, -width % 16))
    z = np.pad(z, border, mode="reflect")
    delta = STD * generator.unet(torch.from_numpy(z))[:, :, :height, :width]
    expected = (MEAN if hardened else x) + delta
    assert torch.allclose(generator(x), expected.clamp(0, 1), atol=1e-6)


@torch.no_grad()
def test_the_encoder_pads_images_of_28_x_28_as_the_generator_does():
    model = make_network("encoder")
    x = torch.rand(2, 3, 28, 28)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 4), (0, 4)), mode="reflect")
    assert torch.allclose(model(x), model(torch.from_numpy(padded)), atol=1e-5)


@torch.no_grad()
def test_hardened_images_of_one_class_are_one_picture_to_the_last_bit(data):
    """What ships, on test images; the class is that of the nearest code."""
    generator, _ = load_generator(HARDENED)
    x = to_float(data["test"][0][:64])
    features = (encoder_features(generator, x) + encoder_features(generator, x.flip(3))) / 2
    differences = features[:, None] - generator.unet.codes
    classes = differences.norm(dim=2).argmin(1)
    protected = generator(x)
    assert len(protected.unique(dim=0)) == len(classes.unique()) == 10
    for label in range(10):
        assert len(protected[classes == label].unique(dim=0)) == 1


# --- classifiers.py: CIFAR-10 and files -----------------------------------------------------------
def test_cifar10_has_the_counts_of_section_4_1_1(data):
    images, labels = data["train"]
    assert images.shape == (50000, 3, 32, 32)
    assert labels.bincount().tolist() == [5000] * 10
    mean = images.float().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, MEAN.flatten(), atol=5e-4)  # so the channels are RGB


def test_the_test_set_is_split_as_the_authors_split_it(data):
    with np.load(f"{ROOT}/data/cifar10.npz") as file:
        images = torch.from_numpy(file["test_images"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["test_labels"])
    seeded = torch.Generator().manual_seed(0)
    halves = torch.utils.data.random_split(range(10000), [5000, 5000], seeded)
    for split, half in zip(("test", "validation"), halves):
        assert torch.equal(data[split][0], images[half.indices])
        assert torch.equal(data[split][1], labels[half.indices])


def test_wrong_pixels_are_not_taken_for_cifar10(tmp_path):
    wrong = {name: np.zeros(3, np.uint8) for name in classifiers.SHA256}
    np.savez(tmp_path / "cifar10.npz", **wrong)
    with pytest.raises(UserError, match="are not CIFAR-10's"):
        load_cifar10(str(tmp_path))


def test_a_data_folder_that_is_a_file_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("place").write_text("")
    line = call(classifiers, "--arch", "encoder", "--data", "place")
    assert "cannot write place/cifar10.npz" in line


@pytest.mark.parametrize("flip", [True, False])
def test_random_crop_flip_gives_all_crops_and_with_flip_all_mirror_images(data, flip):
    images = data["train"][0][:300]
    torch.manual_seed(0)
    results = random_crop_flip(images, flip)
    seen = set()
    for image, result in zip(F.pad(images, (4, 4, 4, 4)), results):
        matches = set()
        for top in range(9):
            for left in range(9):
                crop = image[:, top:top + 32, left:left + 32]
                if torch.equal(result, crop):
                    matches.add((top, left, "as it was"))
                if flip and torch.equal(result, crop.flip(2)):
                    matches.add((top, left, "mirrored"))
        assert matches
        seen |= matches
    # Of 162 or 81 ways, 300 images should meet some 137 or 79.
    assert len(seen) > (130 if flip else 75)


def test_cut_out_hides_squares_of_the_mean_colour_anywhere():
    """The border may cut them: the smallest have 2 x 2 pixels of 4 x 4."""
    x = torch.rand(2000, 3, 16, 20) + 2
    result = cut_out(x, 4)
    hidden = (result != x).all(1)
    assert hidden.any(0).all()
    colours = result.permute(0, 2, 3, 1)[hidden]
    assert torch.equal(colours, MEAN.flatten().expand_as(colours))
    for place in hidden:
        height = place.any(1).sum().item()
        width = place.any(0).sum().item()
        assert place.sum() == height * width
        assert height in (2, 3, 4) and width in (2, 3, 4)


def test_arrows_to_the_left_and_right_need_a_training_without_mirroring(tmp_path):
    """Mirrored at random, these two of three classes could only be guessed: 67%."""
    arrow = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0],
                          [0, 0, 1, 0, 0]])
    large = arrow.repeat_interleave(2, 0).repeat_interleave(2, 1)
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (400,))
    images = torch.randint(0, 60, (400, 3, 16, 16))
    for image, label in zip(images, labels):
        top, left = torch.randint(0, 6, (2,))
        turned = [large, large.flip(1), large.T][label]  # to the left, to the right, up
        image[:, top:top + 10, left:left + 10] += 180 * turned
    images = images.byte()
    data = {"train": (images[:300], labels[:300]), "validation": (images[300:], labels[300:])}
    for flip in (False, True):
        torch.manual_seed(0)
        model = build_classifier("encoder", classes=3)
        train_classifier(model, data, f"{tmp_path}/{flip}", epochs=4, batch_size=20, flip=flip)
        recognised = accuracy(model, *data["validation"])
        assert recognised < 85 if flip else recognised > 97


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    save(f"{tmp_path}/a.pt", b"before")
    with pytest.raises(TypeError):
        save(f"{tmp_path}/a.pt", {"whole": torch.zeros(3), "none": threading.Lock()})
    assert os.listdir(tmp_path) == ["a.pt"]
    assert (tmp_path / "a.pt").read_bytes() == b"before"


def test_a_file_with_python_objects_is_not_called_damaged(tmp_path):
    path = f"{tmp_path}/a.pt"
    torch.save({"model": nn.Linear(1, 1)}, path)
    with pytest.raises(UserError, match="holds Python objects"):
        classifiers.load(path)
    whole = Path(path).read_bytes()
    np.savez(tmp_path / "no-pytorch.npz", numbers=np.zeros(3))
    foreign = (tmp_path / "no-pytorch.npz").read_bytes()  # a zip file too
    for content in (whole[:-100], foreign):
        Path(path).write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            classifiers.load(path)


def test_what_ships_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_classifier("encoder").net.linear.out_features == 10
    assert evaluate.find_generators()[0] == HARDENED


def test_a_device_that_would_go_wrong_later_is_refused(folder):
    assert call(classifiers, "--arch", "encoder", "--device", "mps") == 2


# --- classifiers.py: the networks and their training ----------------------------------------------
# Parameters, and how many pixels a side the strides of the paper's [35] leave of 32.
TABLE_1 = {
    "vgg13_bn": (28_334_410, 2),
    "vgg16_bn": (33_646_666, 2),
    "resnet18": (11_173_962, 2),
    "resnet34": (21_282_122, 2),
    "densenet121": (6_956_426, 2),
    "mobilenet_v2": (2_236_682, 4),
    "googlenet": (5_490_986, 8),
    "inception_v3": (21_638_954, 7),
}


@pytest.mark.parametrize("name", TABLE_1)
@torch.no_grad()
def test_a_classifier_is_the_papers_and_takes_its_files(name, folder):
    """A file of the paper's [35] is the weights alone, under torchvision's names."""
    parameters, side = TABLE_1[name]
    model = build_classifier(name).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    theirs = torchvision.models.get_model(name, weights=None)
    assert set(model.net.state_dict()) <= set(theirs.state_dict())
    sides = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, x, y: sides.append(y.shape[2]))
    x = torch.rand(2, 3, 32, 32)
    logits = model(x)
    assert (sides[0], sides[-1]) == (32, side)
    assert torch.allclose(logits, model.net((x - MEAN) / STD), atol=1e-5)  # it normalises
    torch.save(model.net.state_dict(), f"runs/{name}.pt")
    assert torch.equal(load_classifier(name)(x), logits)


@pytest.mark.parametrize("name", TABLE_1)
@torch.no_grad()
def test_an_untrained_classifier_guesses(name):
    """Its loss is about ln 10; a far larger one would first have to be unlearnt."""
    torch.manual_seed(0)
    logits = build_classifier(name)(torch.rand(8, 3, 32, 32))
    loss = F.cross_entropy(logits, torch.arange(8)).item()
    assert loss == pytest.approx(2.303, abs=0.5)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 1000, 0.005) for step in range(1000)]
    assert 0 < rates[0] < 1e-4
    assert rates[300] == max(rates) == pytest.approx(0.005)
    assert (np.diff(rates[:301]) > 0).all()
    assert (np.diff(rates[300:]) < 0).all()
    assert rates[650] == pytest.approx(0.0025)
    assert rates[-1] < 1e-7


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 3, 3, 3)])  # a wide matrix and a tall one
def test_muon_steps_by_the_nearest_orthogonal_matrix(shape):
    """Two steps beside the singular value decomposition of the Nesterov momentum."""
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


def test_a_classifier_learns_and_reports_the_accuracy_of_its_file(folder, shapes):
    os.remove("runs/encoder.pt")
    assert call(classifiers, "--arch", "encoder", "--epochs", "8") == 0
    meta = torch.load("runs/encoder.pt")["meta"]
    measured = accuracy(load_classifier("encoder"), *shapes["test"])
    assert measured == pytest.approx(meta["test_accuracy"])
    assert measured > 50  # 10 is guessing
    assert meta["cutout"] == 8


def test_all_trains_what_is_not_there_yet(folder, monkeypatch, capsys):
    """A file of the paper's [35], weights without settings, is there; a name alone reads it."""
    monkeypatch.setattr(classifiers, "CLASSIFIERS", ("resnet18", "mobilenet_v2"))
    os.rename("runs", "weights")
    os.remove("weights/mobilenet_v2.pt")
    assert call(classifiers, "--arch", "all", "encoder", "--epochs", "1") == 0
    assert os.listdir("runs") == ["mobilenet_v2.pt"]
    weights = make_network("resnet18").net.state_dict()
    torch.save(weights, "runs/resnet18.pt")
    assert call(classifiers, "--arch", "resnet18") == 0
    assert "runs/resnet18.pt is finished" in capsys.readouterr().out
    assert_equal(torch.load("runs/resnet18.pt"), weights)


def test_a_classifiers_losses_are_those_of_plain_training_by_hand(tmp_path, shapes):
    """Order, augmentation, both optimizers and their rates: each changes these numbers.

    Borrowed from the code: random_crop_flip, cut_out, learning_rate and Muon, which have their own
    tests.
    """
    data = take(shapes, 32)
    images, labels = data["train"]
    torch.manual_seed(0)
    model = build_classifier("encoder")
    copy = build_classifier("encoder")
    copy.load_state_dict(model.state_dict())
    train_classifier(model, data, f"{tmp_path}/a", epochs=2, batch_size=16, cutout=8,
                     precision="fp32", seed=5)
    log = read_log(f"{tmp_path}/a.pt")

    kernels = [p for p in copy.parameters() if p.dim() == 4]
    others = [p for p in copy.parameters() if p.dim() != 4]
    muon = Muon(kernels, 0, momentum=0.9, dtype=torch.float32)
    sgd = torch.optim.SGD(others, momentum=0.9, nesterov=True, weight_decay=1e-3)
    copy.train()
    step = 0
    for epoch in (1, 2):
        torch.manual_seed(5000 + epoch)
        losses = []
        for batch in torch.randperm(32).split(16):
            x = cut_out(random_crop_flip(images[batch]) / 255, 8)
            logits = copy(x)
            loss = -logits.log_softmax(1)[torch.arange(16), labels[batch]].mean()
            copy.zero_grad()
            loss.backward()
            rate = learning_rate(step, 4, 0.03)
            for optimizer in (muon, sgd):
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
            losses.append(loss.item())
            step += 1
        tolerance = 1e-4 if epoch == 1 else 5e-3  # rounding grows from step to step
        assert log[epoch - 1]["loss"] == pytest.approx(np.mean(losses), abs=tolerance)


# --- train.py: the loss, Algorithm 1 --------------------------------------------------------------
def test_the_loss_is_equation_4(shapes):
    torch.manual_seed(0)
    x = to_float(shapes["train"][0][:4])
    protected = torch.rand(4, 3, 32, 32)
    target, aux = torch.randn(2, 4, 10)
    labels = torch.tensor([0, 3, 9, 3])
    loss_target = cross_entropy(target, labels).mean()
    loss_aux = -cross_entropy(aux, labels).mean()
    loss_ssim = their_ssim(x, protected, data_range=1)
    total = 2 * loss_target + 3 * loss_aux + 4 * loss_ssim
    loss = protective_loss(x, protected, target, aux, labels, 2, 3, 4)
    expected = torch.stack([total, loss_target, loss_aux, loss_ssim])
    assert torch.allclose(torch.stack(loss), expected, atol=1e-4)
    alone = protective_loss(x, protected, target, None, labels, 2, 3, 4)
    assert torch.allclose(alone.total, total - 3 * loss_aux, atol=1e-4)


def test_the_balanced_loss_takes_log_and_absolute_value_of_each_image(shapes):
    x = to_float(shapes["train"][0][:4])
    protected = torch.stack([x[0], 1 - x[1], 1 - x[2], torch.rand(3, 32, 32)])
    target, aux = torch.randn(2, 4, 10)
    labels = torch.tensor([0, 3, 9, 3])
    loss = protective_loss(x, protected, target, aux, labels, balanced=True)
    similarity = their_ssim(x, protected, data_range=1, size_average=False)
    assert similarity[1] < 0  # an inverted image has a negative SSIM
    expected_aux = -(1 + cross_entropy(aux, labels)).log().mean()
    assert loss.aux.item() == pytest.approx(expected_aux.item(), abs=1e-4)
    assert loss.ssim.item() == pytest.approx(similarity.abs().mean().item(), abs=1e-4)


@forms
def test_the_losses_are_those_of_algorithm_1_by_hand(tmp_path, shapes, form):
    """Order, augmentation, channel, weights, schedule and decay: each changes these numbers.

    Borrowed from the code: new_generator, ssim, random_crop_flip, lossy_channel and learning_rate,
    which have their own tests.
    """
    data = take(shapes, 32)
    images, labels = data["train"]
    target = nn.Sequential(nn.Dropout(), make_service(1))  # in training mode until it is frozen
    aux = make_service(2)
    encoder = None if form == "paper" else make_network("encoder")
    scripted = torch.jit.script(target)  # any kind of module will do
    train_generator(scripted, aux, data, f"{tmp_path}/a", encoder=encoder, form=form, epochs=2,
                    batch_size=16, lr=0.01, weight_decay=0.5, w_target=2.0, w_aux=3.0,
                    w_ssim=4.0, flip=form != "hardened", precision="fp32", seed=5)
    log = read_log(f"{tmp_path}/a.pt")
    _, meta = load_generator(f"{tmp_path}/a.pt")
    assert meta["look_twice"] == (form == "pretrained")  # hardened has no flip here

    target.eval()
    torch.manual_seed(5)
    generator = train.new_generator(meta, encoder, images, labels).train()
    generator.to(memory_format=torch.channels_last)
    if form != "paper":
        generator.unet.encoder.eval()  # frozen
    learning = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, weight_decay=0.5)
    step = 0
    for epoch in (1, 2):
        torch.manual_seed(5000 + epoch)
        losses = []
        for batch in torch.randperm(32).split(16):
            x = random_crop_flip(images[batch], flip=form != "hardened") / 255
            x = x.to(memory_format=torch.channels_last)  # the order in which noise is drawn
            y = labels[batch]
            protected = generator(x)
            received = protected
            if form != "paper":
                received = train.lossy_channel(protected)
            aux_entropy = cross_entropy(aux(received), y)
            similarity = ssim(x, protected)
            loss_target = cross_entropy(target(received), y).mean()  # Eq. (1)
            loss_aux = -aux_entropy.mean()  # Eq. (2)
            loss_ssim = similarity.mean()  # Eq. (3)
            if form != "paper":
                loss_aux = -(1 + aux_entropy).log().mean()
                loss_ssim = similarity.abs().mean()
            total = 2 * loss_target + 3 * loss_aux + 4 * loss_ssim  # Eq. (4)
            optimizer.param_groups[0]["lr"] = learning_rate(step, 4, 0.01)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(torch.stack([total, loss_target, loss_aux, loss_ssim]).detach())
            step += 1
        expected = torch.stack(losses).mean(0)
        logged = torch.tensor(list(log[epoch - 1]["train"].values()))
        tolerance = 1e-4 if epoch == 1 else 5e-3  # rounding grows from step to step
        assert torch.allclose(logged, expected, atol=tolerance)


@pytest.mark.parametrize("form", ["pretrained", "hardened"])
def test_a_generator_starts_from_the_frozen_encoder_and_hardened_has_its_mean_features(form,
                                                                                      shapes):
    images, labels = shapes["train"]
    encoder = make_network("encoder")
    generator = train.new_generator(train.FORMS[form], encoder, images, labels).eval()
    x = images / 255
    logits = encoder.net.linear(encoder_features(generator, x))
    assert torch.allclose(logits, encoder(x), atol=1e-5)
    for name, parameter in generator.named_parameters():
        assert parameter.requires_grad != ("encoder" in name)
    if form == "hardened":
        for label, code in enumerate(generator.unet.codes):
            features = encoder_features(generator, x[labels == label])
            assert torch.allclose(code, features.mean(0), atol=1e-5)


def test_the_targets_loss_falls_and_the_auxiliary_models_rises(tmp_path, data):
    """What Algorithm 1 is for: 30 steps with the classifiers that ship."""
    target = load_classifier("vgg13_bn")
    aux = load_classifier("resnet18")
    encoder = load_classifier("encoder")
    train_generator(target, aux, take(data, 320), f"{tmp_path}/a", encoder=encoder, epochs=3,
                    precision="fp32")
    log = read_log(f"{tmp_path}/a.pt")
    first = log[0]["train"]
    last = log[-1]["train"]
    assert last["target"] < first["target"]
    assert -last["aux"] > -first["aux"]


def test_without_a_named_auxiliary_model_the_encoder_plays_the_person(folder):
    assert call(train, "--target", "resnet18", "--epochs", "1") == 0
    _, meta = load_generator("runs/generator-resnet18-encoder.pt")
    assert meta["aux_sha256"] == meta["encoder_sha256"] != "none"
    assert call(train, "--target", "resnet18", "--form", "paper") == 2  # it has no encoder


def test_the_lossy_channel_is_noise_and_the_colour_of_a_jpeg():
    """Beside Pillow's YCbCr with its colours at half size, for half of the batches."""
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(1, 3, 8, 8), (32, 32), mode="bilinear") / 2 + 0.25
    halved = []
    for seed in range(8):
        torch.manual_seed(seed)
        received = train.lossy_channel(x)[0]
        torch.manual_seed(seed)
        noisy = (x + 0.1 * torch.randn(x.shape)).clamp(0, 1)[0]
        rgb = Image.fromarray(to_numpy((noisy * 255).round().to(torch.uint8)))
        y, cb, cr = rgb.convert("YCbCr").split()
        cb = halve_and_double(cb)
        cr = halve_and_double(cr)
        rgb = Image.merge("YCbCr", (y, cb, cr)).convert("RGB")
        half = torch.from_numpy(np.array(rgb)).permute(2, 0, 1) / 255
        from_noisy = (received - noisy).abs().max()
        from_half = (received - half).abs().max()
        assert min(from_noisy, from_half) < 0.02 < 0.1 < max(from_noisy, from_half)
        halved.append(bool(from_half < from_noisy))
    assert True in halved and False in halved


# --- train.py: stopped, changed, diverged ---------------------------------------------------------
@pytest.mark.parametrize("training", [train_encoder, train_pair])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, training):
    kill_after_an_epoch(training, f"{tmp_path}/killed")
    goes_on = training(f"{tmp_path}/killed")
    whole = training(f"{tmp_path}/whole")
    assert_equal(goes_on.state_dict(), whole.state_dict())


@pytest.mark.parametrize("training", [train_encoder, train_pair])
def test_what_is_finished_is_read_and_not_trained_again(tmp_path, training):
    before = training(f"{tmp_path}/a")
    written = os.stat(f"{tmp_path}/a.pt").st_mtime_ns
    again = training(f"{tmp_path}/a")
    assert_equal(before.state_dict(), again.state_dict())
    assert os.stat(f"{tmp_path}/a.pt").st_mtime_ns == written


def test_a_training_with_other_networks_or_settings_is_refused(tmp_path, monkeypatch):
    """A finished one, and one that was stopped after an epoch."""
    train_pair(f"{tmp_path}/finished")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stop_at_the_checkpoint)
        train_pair(f"{tmp_path}/stopped")
    data = take(make_shapes(), 48)
    images, labels = data["train"]
    for change, words in (({"target": make_service(3)}, "the target changed since"),
                          ({"aux": None}, "the aux changed since"),
                          ({"encoder": build_classifier("encoder")}, "the encoder changed since"),
                          ({"data": data | {"train": (images + 1, labels)}}, "the images changed"),
                          ({"data": data | {"train": (images, labels.roll(1))}}, "the labels"),
                          ({"epochs": 3}, "has epochs 4, not 3"),
                          ({"flip": False}, "has flip True, not False"),
                          ({"form": "hardened"}, "has form pretrained, not hardened")):
        for name in ("finished", "stopped"):
            with pytest.raises(UserError, match=f"{name}.* {words}"):
                train_pair(f"{tmp_path}/{name}", **change)


def test_a_generator_of_a_version_that_looked_once_is_refused(tmp_path):
    content = torch.load(PRETRAINED)
    del content["meta"]["look_twice"]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="no generator of this version"):
        load_generator(f"{tmp_path}/a.pt")


@pytest.mark.parametrize("first_loss, kept", [(-1e9, 1), (1e9, 2)])
def test_the_best_epoch_by_validation_loss_is_kept(tmp_path, monkeypatch, first_loss, kept):
    """It travels in the checkpoint, where we give the first epoch another loss."""
    path = f"{tmp_path}/a"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stop_at_the_checkpoint)
        train_pair(path, epochs=2)
    checkpoint = torch.load(f"{path}.checkpoint")
    checkpoint["best"]["meta"]["validation"]["loss"]["total"] = first_loss
    torch.save(checkpoint, f"{path}.checkpoint")
    train_pair(path, epochs=2)
    assert load_generator(f"{path}.pt")[1]["epoch"] == kept


def test_an_epoch_has_max_steps_at_most(tmp_path, monkeypatch):
    monkeypatch.setitem(train.FORMS["pretrained"], "max_steps", 2)  # of three
    monkeypatch.setattr(train, "save", stop_at_the_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        train_pair(f"{tmp_path}/a")
    checkpoint = torch.load(tmp_path / "a.checkpoint")
    assert checkpoint["optimizer"]["state"][0]["step"] == 2


@devices
def test_fp16_with_its_scaler_follows_float32(tmp_path, shapes, device):
    losses = {}
    for precision in ("fp32", "fp16"):
        data = take(shapes, 16, 16, device)
        service = make_service(side=16).to(device)
        path = f"{tmp_path}/{precision}"
        train_generator(service, service, data, path, form="paper", epochs=3, batch_size=8,
                        lr=1e-4, w_aux=0.5, precision=precision, device=device)
        losses[precision] = [epoch["train"]["total"] for epoch in read_log(f"{path}.pt")]
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["fp16"] != losses["fp32"]  # it did compute in 16 bits


@devices
def test_a_stopped_fp16_training_goes_on_with_its_scale(tmp_path, shapes, monkeypatch, device):
    """The first steps overflow in 16 bits, and each halves the scale of the gradients."""
    settings = {"data": take(shapes, 16, 16, device), "form": "paper", "epochs": 2,
                "batch_size": 4, "w_target": 10.0, "precision": "fp16", "device": device}
    service = make_service(side=16).to(device)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save", stop_at_the_checkpoint)
        train_generator(service, None, path=f"{tmp_path}/stopped", **settings)
    checkpoint = torch.load(tmp_path / "stopped.checkpoint")
    done = checkpoint["optimizer"]["state"][0]["step"].item()
    assert 0 < done < 4  # some of the four overflow, not all
    assert checkpoint["scaler"]["scale"] == 65536 / 2 ** (4 - done)
    losses = []
    for name in ("stopped", "whole"):
        train_generator(service, None, path=f"{tmp_path}/{name}", **settings)
        losses.append(read_log(f"{tmp_path}/{name}.pt")[1]["train"]["total"])
    tolerance = 0 if device == "cpu" else 0.01
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


# --- train.py: a classifier of one's own ----------------------------------------------------------
BROKEN = [
    ("changes its input", Service(lambda network, x: network(x.sub_(0.5)))),
    ("no gradient", Service(lambda network, x: network((255 * x).round() / 255))),
    ("must return logits", Service(lambda network, x: (network(x), x))),
    ("one logit", Service(lambda network, x: network(x)[:, :1])),
    ("for one image", Service(lambda network, x: network(x).squeeze())),
    ("logits .* not finite",
     Service(lambda network, x: network(x / x.amax((1, 2, 3), keepdim=True)))),
    ("gradient .* not finite", Service(lambda network, x: network(x.sqrt()))),
    ("returns probabilities", Service(lambda network, x: network(x).softmax(1))),
    ("returns probabilities", Service(lambda network, x: 100 * network(x).softmax(1))),
    ("returns probabilities", Service(lambda network, x: network(x).sigmoid())),
    ("answers differently", Service(lambda network, x: F.dropout(network(x)))),
    ("answers differently",
     Service(lambda network, x: network(F.batch_norm(x, None, None, training=True)))),
    ("does not see", Service(lambda network, x: 2 * x.flatten(1)[:, :10] - 1, nn.Identity())),
    ("does not see", Service(lambda network, x: network(x) + hidden(x))),
]


@pytest.mark.parametrize("words, service", BROKEN)
def test_a_service_that_would_go_wrong_is_refused_before_the_first_step(tmp_path, shapes, words,
                                                                        service):
    with pytest.raises(ValueError, match=words):
        train_generator(service, None, shapes, f"{tmp_path}/a", form="paper", epochs=1)
    assert os.listdir(tmp_path) == []


def test_a_service_that_flattens_by_view_works_as_for_its_owner(tmp_path):
    """As every LeNet: view() takes contiguous images only, whatever the user's own images are."""
    data = take(make_shapes(), 48)
    for split, (images, labels) in data.items():
        data[split] = images.to(memory_format=torch.channels_last), labels
    linear = nn.Linear(3 * 32 * 32, 10)
    service = Service(lambda network, x: network(x.view(len(x), -1)), linear)
    same = nn.Sequential(nn.Flatten(), linear)
    for form in train.FORMS:
        encoder = None if form == "paper" else make_network("encoder")
        generator = train_pair(f"{tmp_path}/{form}", target=service, aux=service, data=data,
                               encoder=encoder, form=form, epochs=1)
        images, labels = data["test"]
        protected = protect(generator, images)
        scores = score(images, protected, service, service, labels)
        assert scores["target_accuracy"] == accuracy(same, protected, labels)


def test_a_service_with_an_extra_state_is_known_by_its_weights(tmp_path):
    train_pair(f"{tmp_path}/a", target=Remembers(make_service(1)), epochs=1)
    train_pair(f"{tmp_path}/a", target=Remembers(make_service(1)), epochs=1)  # is read
    with pytest.raises(UserError, match="the target changed since"):
        train_pair(f"{tmp_path}/a", target=Remembers(make_service(3)), epochs=1)


BAD_DATA = [
    ("images must be torch.uint8 (N, 3, H, W) with H and W >= 16, not torch.uint8 (48, 1, 32, 32)",
     lambda images, labels: (images[:, :1], labels)),
    ("images must be torch.uint8 (N, 3, H, W) with H and W >= 16, not torch.uint8 (48, 32, 32, 3)",
     lambda images, labels: (images.permute(0, 2, 3, 1), labels)),
    ("images must be torch.uint8", lambda images, labels: (images / 255, labels)),
    ("images must be torch.uint8", lambda images, labels: (images[:, :, :, :15], labels)),
    ("images and labels must be tensors, not ndarray and Tensor",
     lambda images, labels: (images.numpy(), labels)),
    ("labels must be torch.int64 (48,), not torch.int64 (48, 1)",
     lambda images, labels: (images, labels[:, None])),
    ("has label -100", lambda images, labels: (images, labels - 100)),
    ("has no images", lambda images, labels: (images[:0], labels[:0])),
]


@pytest.mark.parametrize("words, change", BAD_DATA)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_of_another_kind_are_refused_before_the_first_step(tmp_path, split, words, change):
    data = take(make_shapes(), 48)
    data[split] = change(*data[split])
    with pytest.raises((ValueError, UserError), match=re.escape(f"{split} {words}")):
        train_pair(f"{tmp_path}/a", data=data)
    with pytest.raises((ValueError, UserError), match=re.escape(f"{split} {words}")):
        train_classifier(build_classifier("encoder"), data, f"{tmp_path}/b")
    assert os.listdir(tmp_path) == []


def test_a_label_without_a_logit_is_refused_before_the_first_step(tmp_path):
    """Label 10 of a classifier with ten, in all splits, or among validation images only."""
    data = take(make_shapes(), 48)
    wrong = {}
    for split, (images, labels) in data.items():
        wrong[split] = images, torch.where(labels == 9, 10, labels)
    for bad, words in ((wrong, "train has label 10"),
                       (data | {"validation": wrong["validation"]}, "validation has .* 10")):
        with pytest.raises((ValueError, UserError), match=words):
            train_pair(f"{tmp_path}/a", data=bad)
        with pytest.raises((ValueError, UserError), match=words):
            train_classifier(build_classifier("encoder"), bad, f"{tmp_path}/b")
    assert os.listdir(tmp_path) == []


def test_the_readmes_python_does_what_it_says(tmp_path, monkeypatch, capsys):
    """As it stands, for a photo and a folder of images of seven classes, and on to the phone."""
    images, labels = make_shapes(classes=7)["train"]
    for i, (image, label) in enumerate(zip(images, labels)):
        place = tmp_path / "my-images" / f"class-{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(to_numpy(image)).save(place / f"{i}.jfif", "JPEG")
    Path(tmp_path / "my-images" / "class-0" / "notes.txt").write_text("no image")
    Image.effect_noise((90, 60), 100).convert("RGB").save(tmp_path / "photo.jpg")
    os.symlink(ROOT / "weights", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    names = {"MyClassifier": functools.partial(make_service, side=64, classes=7)}
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    for block in blocks:
        code = block.split("```")[0]
        exec(code, names)
    printed = capsys.readouterr().out
    assert "80 images of 7 classes, files left out: 1" in printed
    assert "different_pictures" in printed  # the last line has run
    assert call(export_mobile, "--generator", "runs/mine.pt") == 0
    phone = export_mobile._load_for_lite_interpreter("runs/mine.ptl")
    images, _ = names["data"]["test"]
    protected = protect(names["generator"], images)
    difference = protect(phone, images).float() - protected.float()
    assert protected.shape == (8, 3, 64, 64)
    assert difference.abs().max() <= 1  # rounding


# --- train.py: the command ------------------------------------------------------------------------
@pytest.mark.parametrize("names, expected", [
    ([["all"], ["all", "none"]], 8 * 7 + 8), ([["resnet18"], ["none"]], 1),
    ([["resnet18", "vgg13_bn"], ["all"]], 2 * 7)])
def test_all_means_the_generators_of_table_2(names, expected):
    pairs = train.choose_pairs(*names)
    assert len(set(pairs)) == len(pairs) == expected


def test_ctrl_c_says_that_the_same_command_goes_on(folder):
    command = [sys.executable, "-u", f"{ROOT}/train.py", *PAIR, "--form", "paper", "--data",
               f"{ROOT}/data", "--precision", "fp32", "--device", "cpu"]
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores Ctrl-C
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if "100 epochs of" in line:
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "stopped: the same command goes on after the last finished epoch"


@no_gpu
def test_a_generator_scores_on_a_gpu_what_it_scores_on_a_cpu(folder):
    assert call(train, *PAIR, "--epochs", "1", "--device", "cuda") == 0
    scores = {}
    for device in ("cuda", "cpu"):
        assert call(evaluate, "--device", device, "--attack", "--out", device) == 0
        results = json.loads(Path(f"{device}/results.json").read_text())
        scores[device] = results["generators"]["resnet18-mobilenet_v2"]
        scores[device]["read back"] = scores[device]["read_back"]["ssim"]
    tolerances = {"target_accuracy": 2, "aux_accuracy": 2, "ssim": 0.01, "read back": 0.02}
    for key, tolerance in tolerances.items():
        assert scores["cuda"][key] == pytest.approx(scores["cpu"][key], abs=tolerance)


# --- evaluate.py: scores --------------------------------------------------------------------------
@torch.no_grad()
def test_the_scores_are_those_of_the_direct_computation(shapes):
    target = make_service(1)
    aux = make_service(2)
    images, labels = take(shapes, 40)["test"]
    generator = make_generator()
    protected = protect(generator, images)
    assert torch.equal(protected, (255 * generator(images / 255)).round())  # 8 bits
    protected[::2] = images[::2]  # half of them show
    result = score(images, protected, target, aux, labels, {"w_aux": 2.0})

    target_logits = target(protected / 255)
    aux_logits = aux(protected / 255)
    similarity = their_ssim(images / 255, protected / 255, data_range=1, size_average=False)
    expected = {"target": cross_entropy(target_logits, labels).mean().item(),
                "aux": -cross_entropy(aux_logits, labels).mean().item(),
                "ssim": similarity.mean().item()}
    expected["total"] = expected["target"] + 2 * expected["aux"] + 0.5 * expected["ssim"]
    assert result["loss"] == pytest.approx(expected, abs=1e-3)
    assert result["target_accuracy"] == 2.5 * (target_logits.argmax(1) == labels).sum()  # percent
    assert result["aux_accuracy"] == 2.5 * (aux_logits.argmax(1) == labels).sum()
    assert result["ssim"] == pytest.approx(similarity.abs().mean().item(), abs=1e-4)
    assert result["ssim_largest"] == pytest.approx(1)
    own = train.visibility(images, protected)
    other = train.visibility(images.roll(20, 0), protected)
    expected = {"own": own.mean().item(), "other": other.mean().item()}
    assert result["visibility"] == pytest.approx(expected)
    assert result["worst"] == (own - other).topk(10).indices.tolist()


def test_visibility_is_the_multiple_correlation_of_a_direct_least_squares(shapes):
    """Place by place, with NumPy: brightness of 2 x 2 blocks on colours and structure."""
    image = shapes["test"][0][:1]
    noise = torch.randint(0, 256, image.shape, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):  # visibility() must ignore it
        measured = train.visibility(image, noise).item()

    picture = noise[0].double().numpy() / 255
    padded = np.pad(picture, ((0, 0), (0, 1), (0, 1)), mode="edge")
    maps = np.zeros((6, 32, 32))
    maps[:3] = picture
    for row in range(32):
        for column in range(32):
            here = picture[:, row, column]
            dx = padded[:, row, column + 1] - here
            dy = padded[:, row + 1, column] - here
            maps[3:, row, column] = dx @ dx, dy @ dy, dx @ dy
    means = np.zeros_like(maps)  # over the 3 x 3 places around
    for row in range(32):
        for column in range(32):
            around = maps[:, max(row - 1, 0):row + 2, max(column - 1, 0):column + 2]
            means[:, row, column] = around.mean((1, 2))
    cues = means.reshape(6, 16, 2, 16, 2).mean((2, 4)).reshape(6, 256)
    brightness = image[0].double().mean(0).numpy().reshape(16, 2, 16, 2).mean((1, 3)).flatten()
    columns = np.vstack([cues, np.ones(256)]).T
    weights = np.linalg.lstsq(columns, brightness, rcond=None)[0]
    expected = np.corrcoef(columns @ weights, brightness)[0, 1]
    assert measured == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("form, visible", [("pretrained", True), ("hardened", False)])
def test_a_training_says_in_one_line_if_images_can_be_made_out(tmp_path, capsys, form, visible):
    """Three steps are too few for pretrained; hardened never shows more than the class."""
    train_pair(f"{tmp_path}/a", form=form, epochs=1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"Look at {tmp_path}/a.png" in last
    assert ("WARNING: the originals can be made out" in last) == visible


def test_what_can_be_made_out_is_called_visible_and_what_cannot_is_not(data):
    """Whatever carries it: brightness, colour, sign, texture, or a place near by."""
    images, labels = take(data, 1000)["test"]
    x = images / 255
    torch.manual_seed(0)
    noise = torch.rand(x.shape)
    grey = x.mean(1, keepdim=True).expand(x.shape)
    nothing = torch.zeros_like(x[:, :1])
    one = torch.stack([x[labels == label][0] for label in range(10)])[labels]  # of each class
    another = torch.empty_like(x)
    for label in range(10):
        another[labels == label] = x[labels == label].roll(1, 0)
    light = F.interpolate(F.avg_pool2d(grey, 2), (32, 32))
    light = light > grey.mean((2, 3), keepdim=True)
    tiles_of_4 = F.interpolate(torch.randn(1000, 1, 8, 8).sign(), (32, 32))
    tiles_of_8 = F.interpolate(torch.randn(1000, 1, 4, 4).sign(), (32, 32))
    visible = {
        "identity": x,
        "inverted": 1 - x,
        "colours swapped": x[:, [1, 2, 0]],
        "one colour on noise": torch.cat([noise[:, :2], grey[:, :1]], 1),
        "blue on black": torch.cat([nothing, nothing, grey[:, :1]], 1),
        "10% upon a picture of the class": 0.9 * one + 0.1 * x,
        "10% upon noise": 0.9 * noise + 0.1 * x,
        "stripes of 1 pixel": torch.where(light, stripes(1, 0), stripes(1, 1)),
        "stripes of 2 pixels": torch.where(light, stripes(2, 0), stripes(2, 1)),
        "checks against grey": torch.where(light, stripes(1, 0) ^ stripes(1, 1), 0.5),
        "sign turned by tiles of 4": 0.5 + tiles_of_4 * (x - 0.5),
        "sign turned by tiles of 8": 0.5 + tiles_of_8 * (x - 0.5),
        "shifted": x.roll((2, 2), (2, 3)),
        "mirrored": x.flip(3),
        "blurred": F.interpolate(F.avg_pool2d(x, 8), (32, 32)),
    }
    hidden = {
        "noise": noise,
        "a constant": torch.full_like(x, 0.5),
        "another image of the class": another,
        "hardened": protect(load_generator(HARDENED)[0], images) / 255,
    }
    assert [name for name, protected in visible.items() if not shows(images, protected)] == []
    assert [name for name, protected in hidden.items() if shows(images, protected)] == []


@pytest.mark.parametrize("form", ["", "-hardened", "-paper"])
def test_what_ships_hides_and_scores_what_the_results_say(data, form):
    name = f"vgg13_bn-resnet18{form}"
    reported = read_asset("results.json")["generators"][name]
    generator, meta = load_generator(f"{ROOT}/weights/generator-{name}.pt")
    images, labels = data["test"]
    protected = protect(generator, images)
    measured = score(images, protected, load_classifier("vgg13_bn"), None, labels)
    visible = measured["visibility"]
    assert meta == reported["meta"]
    assert measured["target_accuracy"] == pytest.approx(reported["target_accuracy"], abs=0.3)
    assert visible == pytest.approx(reported["visibility"], abs=0.005)
    assert visible["own"] - visible["other"] < train.VISIBLE


def test_jpeg_is_what_pillow_writes_by_default(data):
    images = data["test"][0][:2]
    received = evaluate.jpeg(images)
    for image, decoded in zip(images, received):
        file = io.BytesIO()
        Image.fromarray(to_numpy(image)).save(file, "JPEG", quality=75)  # Pillow's own default
        assert np.array_equal(to_numpy(decoded), np.array(Image.open(file)))


# --- evaluate.py: what a machine reads ------------------------------------------------------------
def test_correlations_are_numpys_and_contrast_does_not_count(data):
    images = data["test"][0][:4]
    candidates = torch.cat([images[:2], 255 - images[:2], images[:2] // 10 + 100])
    measured = evaluate.correlations(images, candidates)
    expected = np.corrcoef(images.flatten(1), candidates.flatten(1))[:4, 4:]
    assert measured.numpy() == pytest.approx(expected, abs=1e-9)
    assert measured[0, 4] > 0.99  # a tenth of the contrast


def test_an_image_is_found_if_nothing_is_more_similar_and_shares_among_equals():
    similarity = torch.tensor([[0.9, 0.1, 0.2, 0.3],
                               [0.1, 0.5, 0.5 + 1e-13, 0.4],  # equal but for rounding
                               [0.3, 0.2, 0.1, 0.9]], dtype=torch.float64)
    assert evaluate.share_found(similarity) == pytest.approx(100 * (1 + 1 / 2 + 0) / 3)


def test_images_are_read_back_by_the_ridge_regression_that_serves_validation_best():
    """A penalty on the weights is a plain least squares with more rows, by NumPy."""
    torch.manual_seed(0)
    mixture = torch.randn(16, 16)
    sent = {}
    originals = {}
    for split in ("train", "validation", "test"):
        originals[split] = torch.rand(40, 1, 4, 4)
        noise = 0.5 * torch.randn(40, 16)
        sent[split] = (originals[split].flatten(1) @ mixture + noise).view(40, 1, 4, 4)
    x, x_validation, x_test = (sent[split].flatten(1).numpy() for split in sent)
    y, y_validation, _ = (originals[split].flatten(1).numpy() for split in sent)
    x_mean, y_mean = x.mean(0), y.mean(0)
    variance = ((x - x_mean) ** 2).sum() / 16
    guesses = {}
    for share in (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 1):
        rows = np.concatenate([x - x_mean, np.sqrt(share * variance) * np.eye(16)])
        wanted = np.concatenate([y - y_mean, np.zeros((16, 16))])
        weights = np.linalg.lstsq(rows, wanted)[0]
        error = (((x_validation - x_mean) @ weights + y_mean - y_validation) ** 2).mean()
        guesses[error] = share, ((x_test - x_mean) @ weights + y_mean).clip(0, 1)
    share, expected = guesses[min(guesses)]
    assert share not in (1e-6, 1)  # else the choice shows nothing
    measured = evaluate.ridge_regression(sent, originals).flatten(1).numpy()
    assert measured == pytest.approx(expected, abs=1e-5)


def test_images_are_shrunk_to_32_x_32_and_smaller_ones_stay():
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(evaluate.shrink(large), images / 255)
    assert torch.equal(evaluate.shrink(images[:, :, :28, :28]), images[:, :, :28, :28] / 255)


def test_a_linear_map_reads_back_what_is_there_and_of_ten_pictures_no_more_than_ten(data):
    small = take(data, 12000, side=16)
    torch.manual_seed(0)
    readable = {
        "identity": nn.Identity(),
        "inverted": lambda x: 1 - x,
        "3% of contrast": lambda x: 0.5 + 0.03 * (x - 0.5),
        "another order": in_another_order,
        "mixture": Mixture(),
    }
    unreadable = {
        "one of ten pictures": one_of_ten,
        "noise": torch.rand_like,
        "a constant": torch.zeros_like,
    }
    for name, generator in readable.items():
        assert evaluate.read_back(generator, small)["found"] > 95, name
    for name, generator in unreadable.items():
        assert evaluate.read_back(generator, small)["found"] <= 1, name  # ten of 1,000 images


def test_a_constant_is_read_back_as_the_mean_image_of_what_the_attacker_learnt_from(data):
    few = take(data, 30, side=16)
    images, labels = few["test"]
    train_images, train_labels = few["train"]
    result = evaluate.read_back(torch.zeros_like, few)
    mean = train_images.float().mean(0).expand(images.shape)
    similarity = their_ssim(images / 255, mean / 255, data_range=1)
    assert result["ssim"] == pytest.approx(similarity.item(), abs=1e-4)
    assert result["found"] == pytest.approx(100 / 30)  # all are equally similar
    of_class = torch.stack([train_images[train_labels == i].float().mean(0) for i in labels])
    nearest = np.corrcoef(of_class.flatten(1), images.flatten(1))[:30, 30:]
    found = 0
    for i, row in enumerate(nearest):
        if row[i] == row.max():
            found += 1
    assert result["class_alone"] == pytest.approx(100 * found / 30)


def test_another_view_is_mirrored_shifted_and_brighter(data):
    images = data["test"][0][:2]
    view = evaluate.another_view(images)
    inner = images.flip(3)[:, :, :30, :30]  # two to the right, two down
    expected = (1.1 * inner).clamp(0, 255)
    assert (view[:, :, 2:, 2:] - expected).abs().max() <= 0.51  # rounded
    back = evaluate.another_view(view, down=-2, brightness=1 / 1.1)  # to the right, as mirrored
    difference = (back.float() - images)[:, :, :30, 2:]
    clipped = (images >= 232)[:, :, :30, 2:]  # what the brighter view has lost
    assert difference[~clipped].abs().max() <= 1


def test_an_image_is_linked_if_one_of_the_tries_undoes_the_other_view(data):
    images = data["test"][0][:300]
    labels = (torch.arange(300) >= 90).long()  # 90 of one class, 210 of another
    links = evaluate.linked(folded, images, labels)
    assert 90 < links["another_view"] < 100  # border and clipping are lost
    assert links["class_alone"] == pytest.approx(90 * 1 / 90 + 10 * 1 / 210)
    assert links["different_pictures"] == 300


def test_without_flip_no_view_is_mirrored():
    images = torch.randint(0, 100, (20, 3, 32, 32), dtype=torch.uint8)
    images[:, :, :, :16] += 150  # bright on the left
    seen = []

    def generator(x):
        seen.append(bool(x[:, :, :, :16].mean() > x[:, :, :, 16:].mean()))
        return x

    evaluate.linked(generator, images, torch.zeros(20, dtype=torch.long), flip=False)
    assert seen == 19 * [True]  # all images, then 18 tries
    seen.clear()
    evaluate.linked(generator, images, torch.zeros(20, dtype=torch.long))
    assert sorted(seen) == 18 * [False] + 19 * [True]


def test_hardened_images_are_as_many_as_classes_and_linked_by_their_class_alone(data):
    generator, _ = load_generator(HARDENED)
    images, labels = data["test"]
    links = evaluate.linked(generator, images[:60], labels[:60])
    assert links["different_pictures"] == 10
    assert links["class_alone"] == pytest.approx(100 * 10 / 60)
    assert links["another_view"] <= links["class_alone"] + 1e-6


def test_a_class_that_the_attacker_has_no_image_of_is_named(shapes):
    images, labels = shapes["train"]
    few = shapes | {"train": (images[labels != 3], labels[labels != 3])}
    with pytest.raises(UserError, match="class 3"):
        evaluate.read_back(nn.Identity(), few)


# --- evaluate.py: tables, figures, the command ----------------------------------------------------
ENTRIES = [
    entry("vgg13_bn", "resnet18", 80.0, 94.0, kept=82.0),
    entry("vgg13_bn", "vgg16_bn", 90.0, 94.0, kept=91.0),
    entry("vgg13_bn", "resnet34", 91.0, 94.0, kept=92.0),
    entry("vgg13_bn", "googlenet", 92.0, 94.0, kept=94.0),
    entry("vgg13_bn", "none", 93.0, 94.0, kept=99.0),
    entry("vgg13_bn", "encoder", 92.5, 94.0, kept=99.0),  # ours: no pair of the paper's
    entry("googlenet", "resnet18", 88.0, 93.0, kept=90.0),
]


def test_table_2_by_hand():
    summary = evaluate.summarise(ENTRIES)
    assert summary["table_2"] == {
        "vgg13_bn": {"pairs": 4, "min": 80, "median": 90.5, "max": 92, "none": 93, "encoder": 92.5,
                     "kept": 91.5},
        "googlenet": {"pairs": 1, "min": 88, "median": 88, "max": 88, "none": None,
                      "encoder": None, "kept": 90}}
    assert summary["pairs"] == 5
    assert summary["pairs_under_5_points"] == 3  # 88 of 93 loses exactly 5
    assert summary["lost"] == [2, 3, 4, 5, 14]
    assert summary["lost_validation"] == [1.5, 2.5, 3.5, 4.5, 13.5]


def test_the_tables_of_readme_and_results_are_those_that_evaluate_wrote():
    """No row of them is typed, or older than the files beside results.md."""
    written = set()
    for name in ("results.json", "paper-settings.json"):
        written |= set(evaluate.tables(read_asset(name)).splitlines())
    pages = (ROOT / "README.md").read_text() + (ROOT / "assets" / "results.md").read_text()
    header = ""
    rows = 0
    for before, line in zip(["", *pages.splitlines()], pages.splitlines()):
        if not before.startswith("|"):
            header = line
        if line.startswith("|") and header in written and not line.startswith("| *"):
            assert line in written
            rows += 1
    assert rows > 30


def test_the_whole_command(folder, monkeypatch, shapes):
    """Two forms of one pair, Table 3 of one network; then what a machine reads, of one of them."""
    monkeypatch.setattr(evaluate, "TABLE_3", {"generator": (1, 1)})
    for name, generator in ((NAME, make_generator()), (f"{NAME}-hardened", make_generator(True))):
        write_generator(f"runs/{name}.pt", generator, target="resnet18", aux="mobilenet_v2")
    assert call(evaluate, "--timing", "--out", "out") == 0
    results = json.loads(Path("out/results.json").read_text())
    assert results["timing"]["networks"]["generator"]["parameters"] == 7_766_051
    text = Path("out/tables.md").read_text()
    for name, result in results["generators"].items():
        assert {f"generator-{name}.png", f"worst-{name}.png"} <= set(os.listdir("out"))
        form = result["meta"]["form"]
        assert f"| {form}: resnet18, mobilenet_v2 " in text
        assert f"Table 2, form {form}" in text

    assert call(evaluate, "--attack", "--generator", f"runs/{NAME}.pt", "--out", "attack") == 0
    [result] = json.loads(Path("attack/results.json").read_text())["generators"].values()
    assert result["read_back"]["found"] > 50  # untrained, it hides nothing
    generator, _ = load_generator(f"runs/{NAME}.pt")
    images = shapes["test"][0]
    protected = protect(generator, images)
    target = load_classifier("resnet18")
    kept = accuracy(target, protected, classifiers.answers(target, images))
    assert result["kept"] == pytest.approx(kept)
    encoder = load_classifier("encoder").net
    z = (images / 255 - MEAN) / STD
    features = (encoder.features(z) + encoder.features(z.flip(3))) / 2  # it looks twice
    seen = encoder.linear(features).argmax(1)
    assert not torch.equal(seen, classifiers.answers(load_classifier("encoder"), images))
    assert result["repeats"] == pytest.approx(accuracy(target, protected, seen))
    assert f"{result['read_back']['found']:.1f} / " in Path("attack/tables.md").read_text()
    assert os.path.exists("attack/read-back-resnet18-mobilenet_v2.png")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_what_earlier_runs_measured_stays_whatever_their_order(folder, monkeypatch, order):
    """Table 3, what a machine reads of one generator, and the scores of a second one."""
    monkeypatch.setattr(evaluate, "TABLE_3", {"generator": (1, 1)})
    monkeypatch.setattr(evaluate, "milliseconds", lambda network, batch_size, device: 1.0)
    monkeypatch.setattr(evaluate, "ridge_regression", lambda sent, originals: originals["test"])
    links = {"another_view": 100.0, "class_alone": 1.0, "different_pictures": 80}
    monkeypatch.setattr(evaluate, "linked", lambda *words: links)  # it takes long
    first, second = f"runs/{NAME}.pt", f"runs/{NAME}-hardened.pt"
    write_generator(first, make_generator(), target="resnet18", aux="mobilenet_v2")
    write_generator(second, make_generator(True), target="resnet18", aux="mobilenet_v2")
    runs = [["--timing", "--generator", second], ["--attack", "--generator", first],
            ["--generator", first]]
    for i in order:
        assert call(evaluate, *runs[i], "--out", "out") == 0
    results = json.loads(Path("out/results.json").read_text())
    entries = list(results["generators"].values())
    assert [entry["file"] for entry in entries] == [first, second]
    assert [entry["read_back"] is None for entry in entries] == [False, True]
    text = Path("out/tables.md").read_text()
    assert text == evaluate.tables(results)
    assert "| generator | 7,766,051 | 1.000 | 1.000 |" in text
    assert text.count(": resnet18, mobilenet_v2 |") == 2


def test_what_earlier_runs_measured_goes_with_what_it_was_measured_on(folder):
    first, second = f"runs/{NAME}.pt", "runs/generator-resnet18-none.pt"
    for path, aux in ((first, "mobilenet_v2"), (second, "none")):
        write_generator(path, make_generator(), target="resnet18", aux=aux)

    def score_again(path, limit="20"):
        assert call(evaluate, "--generator", path, "--limit", limit, "--out", "out") == 0
        results = json.loads(Path("out/results.json").read_text())["generators"]
        return {result["file"]: result for result in results.values()}

    def change(network):
        weights = build_classifier(network).net.state_dict()
        save(f"runs/{network}.pt", {"classifier": weights, "meta": {}})

    score_again(second)
    assert score_again(first).keys() == {first, second}
    change("mobilenet_v2")  # the auxiliary model of the first
    assert score_again(second).keys() == {second}
    assert score_again(first).keys() == {first, second}
    change("resnet18")  # the target of both
    assert score_again(second).keys() == {second}
    assert score_again(first).keys() == {first, second}
    write_generator(second, make_generator(True), target="resnet18", aux="none")
    assert score_again(first).keys() == {first}
    assert score_again(second, limit="19").keys() == {second}  # other images


def test_a_stopped_training_is_scored_and_exported_by_its_best_epoch(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "save", stop_at_the_checkpoint)
        assert call(train, *PAIR, "--epochs", "5") == 130
    stopped = f"runs/{NAME}.checkpoint"
    assert call(evaluate, "--generator", stopped, "--out", "out") == 0
    assert "epoch 1 of 5, stopped after epoch 1:" in Path("out/tables.md").read_text()
    assert call(export_mobile, "--generator", stopped) == 0
    best = torch.load(stopped)["best"]["generator"]
    generator, _ = load_generator(stopped)
    assert torch.equal(generator.unet.exit.weight, best["unet.exit.weight"].float())
    assert os.path.exists(f"runs/{NAME}.ptl")


def test_ones_own_generator_takes_the_place_of_the_one_that_ships(folder):
    write_generator(f"weights/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    assert call(evaluate, "--limit", "20", "--out", "out") == 0
    write_generator(f"runs/{NAME}.pt", make_generator(True), target="resnet18", aux="none")
    assert call(evaluate, "--limit", "20", "--out", "out") == 0
    [result] = json.loads(Path("out/results.json").read_text())["generators"].values()
    assert result["file"] == f"runs/{NAME}.pt"


def test_milliseconds_are_of_one_image():
    def network(x):
        time.sleep(0.04)

    assert 10 <= evaluate.milliseconds(network, 4, "cpu") < 30  # 40 ms for a batch of four


# --- evaluate.py: images of one's own -------------------------------------------------------------
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_a_photo_that_lies_on_its_side_is_turned_upright(tmp_path, ending):
    photo = Image.linear_gradient("L").convert("RGB")  # dark above, bright below
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    photo.save(tmp_path / f"a.{ending}", exif=exif)
    image = evaluate.open_image(f"{tmp_path}/a.{ending}", (20, 30)).float()
    assert image[:, :, 0].mean() > 240  # bright on the left now
    assert image[:, :, -1].mean() < 15


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_photo_is_turned_upright_beside_a_damaged_tag(tmp_path, orientation):
    """As Pillow turns it that has no other tag; here a text stands where a number belongs."""
    photo = Image.linear_gradient("L").resize((40, 40))
    photo = Image.merge("RGB", [photo, photo.transpose(Image.Transpose.ROTATE_90), photo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "fine.jpg", exif=exif, quality=95)
    ascii_, short = 2, 3
    damaged = struct.pack("<2sHIH" + 2 * "HHII" + "I", b"II", 42, 8, 2,
                          0x0112, short, 1, orientation, 0x0128, ascii_, 2, ord("2"), 0)
    photo.save(tmp_path / "damaged.jpg", exif=b"Exif\0\0" + damaged, quality=95)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / "fine.jpg"))
    opened = evaluate.open_image(f"{tmp_path}/damaged.jpg", (40, 40))
    assert np.array_equal(to_numpy(opened), np.array(expected))


def test_an_exif_block_that_cannot_be_read_leaves_the_image_as_it_lies(tmp_path):
    photo = Image.effect_noise((40, 40), 100).convert("RGB")
    photo.save(tmp_path / "a.png", exif=b"Exif\0\0no such block")
    opened = evaluate.open_image(f"{tmp_path}/a.png", (40, 40))
    assert np.array_equal(to_numpy(opened), np.array(photo))


def test_a_class_without_a_readable_image_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "a" / "1.png")
    (tmp_path / "b" / "2.heic").write_text("no image")
    with pytest.raises(UserError, match="/b has no image"):
        evaluate.load_folder(str(tmp_path), (16, 16))


def test_two_images_of_one_name_are_refused(folder):
    """Some disks take IMG for img."""
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    assert "have the same name" in call(evaluate, "--image", "a/IMG.jpg", "b/img.png")


def test_what_is_transparent_becomes_white(tmp_path):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert evaluate.open_image(f"{tmp_path}/clear.png", (20, 30)).min() == 255


def test_images_that_cannot_be_read_are_named_and_the_others_done(folder, capsys):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    Image.effect_noise((50, 33), 100).convert("RGB").save("good.png")
    Image.fromarray(np.zeros((9, 9), np.uint16)).save("deep.png")  # 16 bits a channel
    Path("text.png").write_text("no image")
    long = f"{'n' * 245}.png"  # too long for the names of its results
    Image.new("RGB", (40, 40)).save(long)
    files = ["deep.png", long, "good.png", "text.png", "absent.png"]
    line = call(evaluate, "--image", *files, "--out", "out")
    assert "4 of 5 images failed" in line
    printed = capsys.readouterr().out
    for name in ("deep.png", "text.png", "absent.png"):
        assert f"error: {name}" in printed
    assert sorted(os.listdir("out")) == ["good-protected.png", "good-sheet.png"]


# --- export_mobile.py -----------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
@pytest.mark.parametrize("path", [PRETRAINED, HARDENED])
@pytest.mark.parametrize("ending", ["ptl", pytest.param("pte", marks=needs_executorch)])
@torch.no_grad()
def test_the_phones_file_computes_what_the_generator_computes(tmp_path, data, ending, path, size):
    generator, _ = load_generator(path)
    if ending == "ptl":
        export_mobile.export_torchscript(generator, f"{tmp_path}/a")
        phone = export_mobile._load_for_lite_interpreter(f"{tmp_path}/a")
    else:
        export_mobile.export_executorch(generator, f"{tmp_path}/a", size)
        phone = export_mobile.ExecuTorchFile(f"{tmp_path}/a")
        assert b"XnnpackBackend" in Path(f"{tmp_path}/a").read_bytes()
    x = F.interpolate(to_float(data["test"][0][:8]), size)
    x = x.to(memory_format=torch.channels_last)
    protected = generator(x)
    assert (protected - protected[0]).abs().max() > 0.1  # else the test shows nothing
    assert (phone(x) - protected).abs().max() < 1e-5


def test_the_phones_file_has_plain_operators_that_phones_read(tmp_path):
    path = f"{tmp_path}/a.ptl"
    export_mobile.export_torchscript(make_generator(), path)
    operators = torch.jit.mobile._get_model_ops_and_info(path)
    for name in operators:
        assert name.startswith("aten::")
    assert "aten::batch_norm" not in operators
    assert export_mobile._get_model_bytecode_version(path) <= 8


@needs_executorch
def test_in_8_bits_the_target_recognises_the_same_ten_pictures(tmp_path, data):
    generator, _ = load_generator(HARDENED)
    path = f"{tmp_path}/a.pte"
    export_mobile.export_executorch(generator, path, (32, 32), data["train"][0][:100])
    images, labels = take(data, 300)["test"]
    protected = protect(export_mobile.ExecuTorchFile(path), images)
    expected = accuracy(load_classifier("vgg13_bn"), protect(generator, images), labels)
    assert 7.7e6 < os.path.getsize(path) < 8e6  # a byte for each of 7,766,051 parameters
    assert len(protected.flatten(1).unique(dim=0)) == 10
    assert accuracy(load_classifier("vgg13_bn"), protected, labels) > expected - 2


def test_without_executorch_the_command_says_how_to_get_it(folder, monkeypatch, capsys):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    Path(f"runs/{NAME}.pte").write_text("of another generator")
    monkeypatch.setattr(export_mobile, "executorch_version", lambda: None)
    assert "pip install executorch" in call(export_mobile, "--int8")
    assert call(export_mobile, "--images", "20") == 0
    printed = capsys.readouterr().out
    assert "pip install executorch" in printed
    assert f"runs/{NAME}.pte is of an earlier export" in printed
    assert os.path.exists(f"runs/{NAME}.ptl")


def test_a_file_that_gives_other_images_is_refused(folder, monkeypatch):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    another = Generator().eval()
    export = export_mobile.export_torchscript
    monkeypatch.setattr(export_mobile, "export_torchscript", lambda _, path: export(another, path))
    monkeypatch.setattr(export_mobile, "executorch_version", lambda: None)
    assert "gives other images than the generator" in call(export_mobile, "--images", "20")


BAD_MESSAGES = {  # by what the service's log has to say about them
    "invalid literal": b"hello, world    ",
    "not 1 to 65536": request(b"", 65537),
    "cannot identify": request(make_png(format="JPEG")),
    "31 x 32 RGB": request(make_png((31, 32))),
    "32 x 32 L": request(make_png(mode="L")),
    "truncated": request(make_png()[:-30]),
    "timed out": request(make_png(), 60000),
}


@pytest.mark.parametrize("reason", BAD_MESSAGES)
def test_the_service_drops_a_bad_client_and_serves_the_next(capsys, reason):
    server, address = start_service()
    good = make_png()
    x = torch.from_numpy(np.array(Image.open(io.BytesIO(good)))).permute(2, 0, 1)[None] / 255
    answer = make_network("mobilenet_v2")(x).argmax().item()
    assert exchange(address, BAD_MESSAGES[reason]) == b""
    assert exchange(address, request(good)) == str(answer).encode()
    server.shutdown()
    server.server_close()
    log = capsys.readouterr().err
    assert log.startswith("dropped 127.0.0.1: ")
    assert reason in log


def test_the_service_says_on_which_free_port_it_listens(folder):
    write_generator(f"runs/{NAME}.pt", make_generator(), target="resnet18", aux="none")
    command = [sys.executable, "-u", f"{ROOT}/export_mobile.py", "--serve", "--port", "0",
               "--generator", f"runs/{NAME}.pt"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    words = process.stdout.readline().split()
    port = int(words[3].split(":")[1])  # serving resnet18 on 127.0.0.1:PORT
    answer = exchange(("127.0.0.1", port), request(make_png()))
    process.kill()
    process.communicate()
    assert answer.isdigit()


@pytest.mark.parametrize("ending", ["ptl", pytest.param("pte", marks=needs_executorch)])
def test_the_demo_goes_from_phone_to_service_and_back(folder, monkeypatch, shapes, ending):
    generator = make_generator()
    write_generator(f"runs/{NAME}.pt", generator, target="mobilenet_v2", aux="none")
    if ending == "ptl":
        monkeypatch.setattr(export_mobile, "executorch_version", lambda: None)
    assert call(export_mobile, "--demo", "--images", "60") == 0
    images, labels = take(shapes, 60)["test"]
    expected = accuracy(load_classifier("mobilenet_v2"), protect(generator, images), labels)
    report = json.loads(Path(f"runs/{NAME}.phone.json").read_text())
    file = report["demo"]["file"]
    assert file == f"runs/{NAME}.{ending}"
    assert report["files"][file]["target_accuracy"] == pytest.approx(expected)
    assert report["demo"]["accuracy"] == pytest.approx(expected)
