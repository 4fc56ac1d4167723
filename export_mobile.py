"""The generator on the phone, and the recognition service that it talks to (Section 3.4, Figure 5).

    python export_mobile.py             write runs/NAME.ptl for the phone and check it
    python export_mobile.py --generator runs/mine.pt    the same, for a classifier of your own
    python export_mobile.py --demo      phone and service on this computer, end to end
    python export_mobile.py --serve     the service alone, for a phone or for --demo --connect

The phone runs the .ptl file; the service runs the unchanged target. Each image takes one TCP
connection, as in the authors' app. The phone sends 16 bytes with the length (ASCII digits, padded
with spaces), then the PNG. The service answers with the class, one digit. So this protocol is for
CIFAR-10 only: images of 32 x 32, ten classes.
"""

import argparse
import io
import json
import os
import socket
import socketserver
import sys
import threading
import time
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.jit.mobile import _get_model_bytecode_version, _load_for_lite_interpreter
from torch.nn import functional as F

from classifiers import (CLASSIFIERS, UserError, accuracy, check_writable, hardware, load_cifar10,
                         load_classifier, positive_int, run, save, scoring_batches, to_float)
from evaluate import draw_sheet, find_generators, image_rows, milliseconds
from train import encode_png, load_generator, protect
from unet import Generator

BYTECODE = 8  # the newest that pytorch_android_lite 1.13.1 and 2.1.0 read
MAX_BYTES = 65536  # of a PNG that the service takes: one of 32 x 32 has about 3,000
SECONDS = 10  # how long phone and service wait for each other

# Both warnings recommend a newer format, which PyTorch Mobile cannot read.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")
warnings.filterwarnings("ignore", "Lite Interpreter is deprecated")


# --- The file for the phone -----------------------------------------------------------------------
def export(generator: Generator, path: str) -> None:
    """Write the file that PyTorch Mobile's lite interpreter runs.

    It takes images (N, 3, H, W) in [0, 1], H and W >= 16, and returns protected ones. It is
    scripted, not traced, so that sizes stay free. It has plain operators only: optimize_for_mobile
    would pack weights for XNNPACK, and such a file loads only where that is built in. Raises
    UserError if this PyTorch writes bytecode too new for phones.
    """
    phone = Generator(generator.unet.codes)
    phone.unet = fuse(generator.unet.eval())  # a copy, batch norm folded into the convolutions
    phone.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)
    content = torch.jit.script(phone)._save_to_buffer_for_lite_interpreter()
    version = _get_model_bytecode_version(io.BytesIO(content))
    if version > BYTECODE:
        raise UserError(f"PyTorch {torch.__version__} writes bytecode {version}, "
                        f"phones read {BYTECODE}: export with an older PyTorch")
    save(path, content)


@torch.no_grad()
def largest_difference(phone: nn.Module, generator: Generator, images: Tensor) -> float:
    """Return how far the outputs for uint8 images (N, 3, H, W) differ at most, in [0, 1]."""
    largest = 0.0
    for [batch] in scoring_batches(images):
        x = to_float(batch)
        difference = (phone(x) - generator(x)).abs().max().item()
        largest = max(largest, difference)
    return largest


def check(phone: nn.Module, generator: Generator, images: Tensor) -> dict:
    """Compare the file with the generator on uint8 images (N, 3, H, W), and time it."""
    h, w = images.shape[2:]
    difference = largest_difference(phone, generator, images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a phone
    ms = milliseconds(phone, 1, "cpu", h, w)
    torch.set_num_threads(threads)
    return {
        "image size": [h, w],
        "largest difference": difference,
        "ms an image, one thread": ms,  # Table 3's phone, 32 x 32: 10.52 to 10.84
        "hardware": hardware("cpu"),
        "torch": torch.__version__,
    }


def check_accuracy(phone: nn.Module, generator: Generator, target: nn.Module, images: Tensor,
                   labels: Tensor) -> dict:
    """Return what the target recognises of uint8 test images, in percent (Eq. 5)."""
    return {
        "images": len(images),
        "accuracy on the originals": accuracy(target, images, labels),
        "accuracy through the generator": accuracy(target, protect(generator, images), labels),
        "accuracy through the file": accuracy(target, protect(phone, images), labels),
    }


def random_images(h: int, w: int) -> Tensor:
    """Return 100 uint8 images (100, 3, h, w) of soft random colours."""
    seeded = torch.Generator().manual_seed(0)
    few_pixels = torch.randint(0, 256, (100, 3, 4, 4), dtype=torch.uint8, generator=seeded)
    return F.interpolate(few_pixels, (h, w), mode="bilinear")


# --- The service ----------------------------------------------------------------------------------
def decode(png: bytes) -> Tensor:
    """Turn a PNG of 32 x 32 RGB or RGBA pixels into images (1, 3, 32, 32) in [0, 1].

    Raises ValueError on other sizes, which scaling would spoil, and OSError if it is no PNG.
    """
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:  # reads the header, no pixels yet
        if image.size != (32, 32) or image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"{image.size[0]} x {image.size[1]} {image.mode}, not 32 x 32 RGB")
        pixels = np.array(image.convert("RGB"))
    return to_float(torch.from_numpy(pixels).permute(2, 0, 1)[None])


class RecognitionHandler(socketserver.StreamRequestHandler):
    """One connection: a length, a PNG, and back the class. No image is kept or logged."""

    timeout = SECONDS  # that the phone may be silent

    def handle(self) -> None:
        try:
            length = int(self.rfile.read(16))
            if not 0 < length <= MAX_BYTES:
                raise ValueError(f"a length of {length}, not 1 to {MAX_BYTES}")
            image = decode(self.rfile.read(length))
            with torch.no_grad():
                answer = self.server.target(image).argmax().item()
            self.wfile.write(str(answer).encode())
        except Exception as error:  # whatever one client sends, the others are served
            print(f"dropped {self.client_address[0]}: {error}", file=sys.stderr, flush=True)


class RecognitionServer(socketserver.ThreadingTCPServer):
    """The recognition service: one thread a connection, all with the unchanged target."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: nn.Module, host: str, port: int):
        self.target = target
        super().__init__((host, port), RecognitionHandler)


# --- The phone ------------------------------------------------------------------------------------
def ask(png: bytes, address: tuple[str, int]) -> int:
    """Send one PNG, return the class that the service answers. Raises OSError without one."""
    with socket.create_connection(address, SECONDS) as connection:
        connection.sendall(str(len(png)).ljust(16).encode() + png)
        answer = connection.recv(1)
    if not answer:
        raise OSError("the service closed the connection: its log says why")
    return int(answer)


def play_phone(phone: nn.Module, images: Tensor,
               address: tuple[str, int]) -> tuple[Tensor, Tensor, dict]:
    """Protect uint8 images (N, 3, 32, 32) with the .ptl file and have them recognised, one by one.

    Returns what left the phone (uint8, like `images`), the answers (N,), and the median
    milliseconds of each stage.
    """
    with torch.no_grad():
        phone(to_float(images[:1]))  # the first call sets things up and does not count
    sent = []
    answers = []
    times = []
    for image in images:
        start = time.perf_counter()
        protected = protect(phone, image[None])[0]
        after_protect = time.perf_counter()
        png = encode_png(protected)
        after_encode = time.perf_counter()
        answers.append(ask(png, address))
        end = time.perf_counter()
        sent.append(protected)
        times.append([after_protect - start, after_encode - after_protect, end - after_encode,
                      end - start])
    medians = 1000 * np.median(times, axis=0)
    stages = dict(zip(("protect", "encode", "round trip", "whole"), medians.round(2).tolist()))
    return torch.stack(sent), torch.tensor(answers), stages


def demo(phone: nn.Module, path: str, target: nn.Module, images: Tensor, labels: Tensor,
         address: tuple[str, int] | None) -> dict:
    """Run phone and service from end to end on uint8 test images; the figure goes beside `path`.

    Returns a report. Without an `address` the service runs here, in a thread.
    """
    server = None
    if address is None:
        server = RecognitionServer(target, "127.0.0.1", 0)
        address = server.server_address
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        sent, answers, times = play_phone(phone, images, address)
    except OSError as error:
        raise UserError(f"no answer from {address[0]}:{address[1]} ({error})") from error
    finally:
        if server is not None:
            server.shutdown()
            server.server_close()
    correct = 100 * (answers == labels).double().mean().item()
    title = f"the service is right on {correct:.1f}% of {len(images):,} protected images"
    batches = {"the user holds": images[:8], "the service gets": sent[:8]}
    figure = f"{path.removesuffix('.ptl')}.demo.png"
    draw_sheet(figure, [(title, []), *image_rows(batches, labels[:8], {"it": target})])
    return {"accuracy through phone, network and service": correct, "median ms an image": times,
            "figure": figure}


# --- The command ----------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a generator as a file for PyTorch Mobile and check it; --demo and "
                    "--serve play the phone and the recognition service (Figure 5).")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--serve", action="store_true", help="run the service until Ctrl-C")
    mode.add_argument("--demo", action="store_true",
                      help="export, then protect test images and have them recognised")
    parser.add_argument("--generator", metavar="FILE",
                        help="the generator's file (default: a hardened one)")
    parser.add_argument("--out", metavar="FILE",
                        help="the file to write (default: runs/NAME.ptl); reports lie beside it")
    parser.add_argument("--images", type=positive_int, default=1000, metavar="N",
                        help="use the first N of the 5,000 test images (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address that --serve listens on (default: %(default)s, local only)")
    parser.add_argument("--port", type=int, default=9000,
                        help="port that --serve listens on (default: %(default)s)")
    parser.add_argument("--connect", nargs=2, metavar=("HOST", "PORT"),
                        help="a service for --demo (default: --demo starts its own)")
    parser.add_argument("--data", default="data", metavar="FOLDER",
                        help="where CIFAR-10 is or goes (default: %(default)s)")
    args = parser.parse_args()

    path = args.generator or find_generators()[0]
    generator, meta = load_generator(path)
    target = None
    if meta.get("target") in CLASSIFIERS:
        target = load_classifier(meta["target"])
    elif args.serve or args.demo:
        raise UserError(f"{path} is for a classifier of your own: --serve and --demo need a "
                        "target of Table 1")
    if args.serve:
        try:
            server = RecognitionServer(target, args.host, args.port)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve on {args.host}:{args.port} ({error})") from error
        host, port = server.server_address
        print(f"serving {meta['target']} on {host}:{port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    address = None
    if args.connect:
        host, port = args.connect
        address = (host, int(port))
    out = args.out or f"runs/{os.path.splitext(os.path.basename(path))[0]}.ptl"
    check_writable(out)
    if target is None:
        images = random_images(*meta["image_size"])
    else:
        images, labels = load_cifar10(args.data)["test"]
        images = images[:args.images]
        labels = labels[:args.images]
    export(generator, out)
    phone = _load_for_lite_interpreter(out)
    report = {"file": out, "megabytes": os.path.getsize(out) / 1e6, "generator": path}
    report |= check(phone, generator, images)
    if target is not None:
        report["target"] = meta["target"]
        report |= check_accuracy(phone, generator, target, images, labels)
    if args.demo:
        report["demo"] = demo(phone, out, target, images, labels, address)
    text = json.dumps(report, indent=1)
    save(f"{out}.json", text.encode())
    print(f"{text}\n-> {out}, {out}.json")
    if report["largest difference"] > 1e-4:
        raise UserError(f"{out} gives other images than the generator: see the difference")


if __name__ == "__main__":
    run(main)
