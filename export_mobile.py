"""The generator on the phone, and the recognition service that it talks to (Section 3.4, Figure 5).

    python export_mobile.py             write runs/NAME.ptl for the phone and check it
    python export_mobile.py --demo      phone and service on this computer, end to end
    python export_mobile.py --serve     the service alone, for a phone or for --demo --connect

The phone runs the .ptl file, the service the target, unchanged. Between them goes one TCP connection a picture: 16
bytes with the length (ASCII digits, padded with spaces), that many bytes of PNG, and back comes the class as a digit.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is one line, also while torch is still being imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nstopped\n") and 130))

import argparse
import asyncio
import io
import json
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.jit.mobile import _get_model_bytecode_version, _get_model_ops_and_info, _load_for_lite_interpreter
from torch.nn import functional as F

from classifiers import (CLASSIFIERS, UserError, accuracy, command, hardware, load_cifar10,
                         load_classifier, number, save, to_float)
from evaluate import draw_sheet, find_generators, milliseconds, open_generator, rows_of
from train import protect
from unet import Generator

BYTECODE = 8  # the newest bytecode that the files may have: pytorch_android_lite 1.13.1 and 2.1.0 read it
MAX_BYTES = 65536  # of a PNG that the service takes: a picture of 32 x 32 has about 3,000
MAX_CONNECTIONS = 64  # at a time; whoever comes then is turned away
SECONDS = 10  # the longest for one picture, from connection to answer
STAGES = "protect", "encode", "round trip", "whole"  # of a picture's way in the demo


# --- The file for the phone -------------------------------------------------------------------------------------------
class Stored16:
    """Weights that are 16 bits wide in the file and 32 in memory: converted once, while the runtime loads them."""

    @torch.jit.export
    def __getstate__(self):
        return self.weight.half(), self.bias, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, Tensor | None, bool]):
        self.weight, self.bias, self.training = state[0].float(), state[1], state[2]


class Conv2d16(Stored16, nn.Conv2d):
    pass


class ConvTranspose2d16(Stored16, nn.ConvTranspose2d):
    pass


def export(generator: Generator, path: str, half: bool = False) -> None:
    """Write the file that PyTorch Mobile's lite interpreter runs: images (N, 3, H, W) in [0, 1] to the same, protected.

    Plain operators only: optimize_for_mobile would prepack weights for XNNPACK, and such a file loads only where that
    is built in. Scripted rather than traced, so that the file takes any H and W from 16 up, as the generator does.
    `half` stores the weights in 16 bits. Raises UserError if this PyTorch writes bytecode too new for the phone.
    """
    phone = Generator(generator.hardened)
    phone.unet = fuse(generator.unet.eval())  # a copy, its batch norm folded into the convolutions
    phone = phone.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)
    if half:
        for layer in phone.modules():
            layer.__class__ = {nn.Conv2d: Conv2d16, nn.ConvTranspose2d: ConvTranspose2d16}.get(type(layer), type(layer))
    with warnings.catch_warnings():  # PyTorch advises torch.export, whose files PyTorch Mobile does not read
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Lite Interpreter is deprecated")
        content = torch.jit.script(phone)._save_to_buffer_for_lite_interpreter()
    if (version := _get_model_bytecode_version(io.BytesIO(content))) > BYTECODE:
        raise UserError(f"PyTorch {torch.__version__} writes bytecode {version}, newer than phones read")
    save(path, content)


def load_phone_file(path: str):
    """What the phone has: a function, images (N, 3, H, W) in [0, 1] to protected ones, run by the lite interpreter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lite Interpreter is deprecated")
        return torch.no_grad()(_load_for_lite_interpreter(path))


@torch.no_grad()
def check(path: str, generator: Generator, target: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """Hold the file against the generator on uint8 test images: outputs, accuracy, size, operators, time."""
    phone, threads = load_phone_file(path), torch.get_num_threads()
    small = to_float(images[:1000])
    odd = F.interpolate(small[:100], (37, 50), mode="bilinear")  # no multiples of 16
    torch.set_num_threads(1)  # as on a phone
    time_an_image = milliseconds(phone, 1, "cpu")
    torch.set_num_threads(threads)
    return {"megabytes": os.path.getsize(path) / 1e6, "images": len(images),
            "accuracy on clean images": accuracy(target, images, labels),
            "accuracy through the generator": accuracy(target, protect(generator, images), labels),
            "accuracy through the file": accuracy(target, protect(phone, images), labels),
            "largest difference, 32 x 32": (phone(small) - generator(small)).abs().max().item(),
            "largest difference, 37 x 50": (phone(odd) - generator(odd)).abs().max().item(),
            "ms an image, one thread (Table 3's phone: 10.52 to 10.84)": time_an_image,
            "bytecode": _get_model_bytecode_version(path), "operators": sorted(_get_model_ops_and_info(path)),
            "hardware": hardware("cpu"), "torch": str(torch.__version__)}


# --- The service ------------------------------------------------------------------------------------------------------
def decode(png: bytes) -> Tensor:
    """A PNG of 32 x 32 RGB or RGBA pixels to a batch of one image, (1, 3, 32, 32) in [0, 1]; ValueError on another.

    Other sizes are refused, not scaled: the targets know 32 x 32 only, and scaling would spoil a protected picture.
    """
    if not png.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("not a PNG")
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:  # reads the header, no pixels yet
        if image.size != (32, 32) or image.mode not in ("RGB", "RGBA"):
            raise ValueError(f"a picture of {image.size[0]} x {image.size[1]} {image.mode}, not 32 x 32 RGB or RGBA")
        return to_float(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None])


async def recognise(reader: asyncio.StreamReader, target: nn.Module) -> bytes:
    """Read one request, return the answer to it; ValueError or one of Pillow's many exceptions if it is not right."""
    header = await reader.readexactly(16)
    if not (header.strip(b" ").isdigit() and 0 < int(header) <= MAX_BYTES):
        raise ValueError(f"{header!r} is no length from 1 to {MAX_BYTES}")
    image = decode(await reader.readexactly(int(header)))
    with torch.inference_mode():
        return b"%d" % target(image).argmax()


async def serve(target: nn.Module, name: str, host: str, port: int) -> None:
    """Answer until cancelled; OSError where it cannot listen. No picture outlives its request or reaches the log.

    One thread does everything. A connection has SECONDS in all, and its buffers are a few times MAX_BYTES.
    """
    connections = 0

    async def connection(reader, writer):
        nonlocal connections
        connections += 1
        try:
            if connections > MAX_CONNECTIONS:
                raise ValueError(f"{MAX_CONNECTIONS} others are connected")
            writer.write(await asyncio.wait_for(recognise(reader, target), SECONDS))
        except asyncio.CancelledError:
            pass  # Ctrl-C; passed on, it would print a traceback for each client that is connected
        except Exception as error:  # whatever one client sends, the others are served
            client = (writer.get_extra_info("peername") or ["a client"])[0]
            reason = "out of time" if isinstance(error, asyncio.TimeoutError) else str(error).splitlines()[0]
            print(f"dropped {client}: {reason}", file=sys.stderr)
        finally:
            connections -= 1
            writer.close()

    try:
        server = await asyncio.start_server(connection, host, port, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise OSError(f"cannot serve on {host}:{port} ({error}): try another --host or --port") from error
    print("serving {} on {}:{} (Ctrl-C ends it)".format(name, *server.sockets[0].getsockname()[:2]), flush=True)
    await asyncio.Event().wait()  # for ever


# --- The phone --------------------------------------------------------------------------------------------------------
def ask(png: bytes, host: str, port: int) -> int:
    """Send one PNG, return the class that the service answers; OSError if a step of that takes over SECONDS."""
    try:
        with socket.create_connection((host, port), SECONDS) as connection:
            connection.sendall(b"%-16d" % len(png) + png)
            answer = connection.recv(1)
    except OSError as error:
        raise OSError(f"no answer from {host}:{port} ({error}): does export_mobile.py --serve run there?") from error
    if not answer.isdigit():
        raise OSError(f"{host}:{port} closed the connection without an answer: its log says why")
    return int(answer)


def play_phone(path: str, images: Tensor, address: tuple) -> tuple[Tensor, Tensor, np.ndarray]:
    """Protect uint8 images (N, 3, 32, 32) with the .ptl file and have them recognised, one after the other.

    Returns what left the phone (uint8, as `images`), the answers (N,), and the milliseconds (N, 4) of STAGES.
    """
    phone, sent, answers, times = load_phone_file(path), [], [], []
    for image in [images[0], *images]:  # the first one twice: the first call sets things up and does not count
        moments = [time.perf_counter()]
        sent.append((phone(to_float(image[None]))[0] * 255).round().to(torch.uint8))
        moments.append(time.perf_counter())
        Image.fromarray(sent[-1].permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "PNG")
        moments.append(time.perf_counter())
        answers.append(ask(file.getvalue(), *address))
        moments.append(time.perf_counter())
        times.append([*np.diff(moments), moments[3] - moments[0]])
    return torch.stack(sent[1:]), torch.tensor(answers[1:]), 1000 * np.array(times[1:])


def demo(path: str, generator: Generator, target: nn.Module, target_name: str, images: Tensor, labels: Tensor,
         address: tuple[str, int] | None) -> None:
    """Phone and service, end to end on uint8 test images: writes a report and a figure beside the file.
    Without an `address` the service is started here, as a process of its own, and ended."""
    service = None
    if address is None:
        service = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve", "--port", "0", "--target",
                                    target_name], stdout=subprocess.PIPE, text=True)
        ready = service.stdout.readline().split()  # "serving NAME on HOST:PORT (...)", or nothing if it failed
        if not ready:
            raise UserError("the service did not start: its message is above")
        address = address_argument(ready[3])
    try:
        sent, answers, times = play_phone(path, images, address)
    finally:
        if service:
            service.terminate()
            service.wait()
    percent = {"on the originals": accuracy(target, images, labels),
               "through phone, network and service": 100 * (answers == labels).double().mean().item(),
               "by evaluate.py's scoring": accuracy(target, protect(generator, images), labels)}
    stem, result = path.removesuffix(".ptl"), {
        "file": path, "target": target_name, "images": len(images), "accuracy": percent,
        "ms an image, median and 95th percentile": {stage: np.percentile(column, [50, 95]).round(2).tolist()
                                                    for stage, column in zip(STAGES, times.T)},
        "hardware": hardware("cpu"), "torch": str(torch.__version__)}
    save(f"{stem}.demo.json", json.dumps(result, indent=1).encode())
    draw_sheet(f"{stem}.demo.png", [f"{target_name} is right on {percent['through phone, network and service']:.1f}% "
                                    f"of {len(images):,} protected pictures, on {percent['on the originals']:.1f}% of "
                                    "the originals"],
               rows_of({"the user holds": images[:8], "the service gets": sent[:8]}, labels[:8], {"it": target}))
    print(f"{json.dumps(result, indent=1)}\n-> {stem}.demo.json, {stem}.demo.png")


def address_argument(text: str) -> tuple[str, int]:
    """An argparse type: HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), number(int, 0, 65536)(port)  # brackets: around an IPv6 address


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a generator as a file for PyTorch Mobile and check it; --demo "
                                                 "and --serve play the phone and the recognition service (Figure 5).")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--serve", action="store_true", help="run the recognition service until Ctrl-C")
    mode.add_argument("--demo", action="store_true", help="export, then protect test images and have them recognised")
    parser.add_argument("--generator", metavar="PATH",
                        help="(default: the first by name)")
    parser.add_argument("--out", metavar="PATH", help="the file to write (default: runs/NAME.ptl, with --half "
                                                      "runs/NAME-half.ptl); reports are written beside it")
    parser.add_argument("--half", action="store_true", help="store the weights in 16 bits, half the size")
    parser.add_argument("--target", choices=CLASSIFIERS, metavar="NAME",
                        help="the service's classifier (default: the one the generator was trained for)")
    parser.add_argument("--images", type=number(int, 1), metavar="N",
                        help="use the first N of the 5,000 test images (default: 5000, with --demo 1000)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address that --serve listens on (default: %(default)s, this computer only)")
    parser.add_argument("--port", type=number(int, 0, 65536), default=9000,
                        help="port that --serve listens on, 0 for any (default: %(default)s)")
    parser.add_argument("--connect", type=address_argument, metavar="HOST:PORT",
                        help="a service that runs already, for --demo (default: --demo starts its own)")
    parser.add_argument("--data", default="data", metavar="FOLDER", help="CIFAR-10's (default: data)")
    args = parser.parse_args()
    if args.connect and not args.demo:
        parser.error("--connect goes with --demo")
    if args.out and not args.out.endswith(".ptl"):
        parser.error(f"--out {args.out} does not end in .ptl")

    target_name, path = args.target, args.generator or next(iter(find_generators()), None)
    if not (args.serve and target_name):  # a service needs to know its target, no generator
        if not path:
            raise UserError("no generator in runs/ or weights/: run python train.py --target vgg13_bn --aux resnet18")
        generator, meta = open_generator(path)
        target_name = target_name or meta["target"]
    target = load_classifier(target_name)
    if args.serve:
        return asyncio.run(serve(target, target_name, args.host, args.port))
    out = args.out or f"runs/{os.path.basename(path).removesuffix('.pt')}{'-half' * args.half}.ptl"
    images, labels = (part[:args.images or (1000 if args.demo else 5000)] for part in load_cifar10(args.data)["test"])
    export(generator, out, args.half)
    if args.demo:
        return demo(out, generator, target, target_name, images, labels, args.connect)
    result = {"file": out, "generator": path, "target": target_name, **check(out, generator, target, images, labels)}
    save(f"{out}.json", json.dumps(result, indent=1).encode())
    print(f"{json.dumps(result, indent=1)}\n-> {out}, {out}.json")
    if max(value for name, value in result.items() if "difference" in name) > (0.02 if args.half else 1e-4):
        raise UserError(f"{out} does not give the generator's pictures: look at the largest differences")


if __name__ == "__main__":
    with command():
        main()
