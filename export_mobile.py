"""The generator on the phone, and the recognition service that it talks to (Section 3.4, Figure 5).

    python export_mobile.py                                  write runs/NAME.ptl for the phone and check it
    python export_mobile.py --demo                           phone and service on this computer, end to end
    python export_mobile.py --serve                          the service alone, for a phone or for --demo --connect

The phone runs the .ptl file and nothing else of this project; the service runs the target, unchanged. Between them goes
one TCP connection a picture: 16 bytes with the length (ASCII digits, padded with spaces), that many bytes of PNG, and
back comes the class as one ASCII digit.
"""

import argparse
import asyncio
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.jit.mobile import _get_model_bytecode_version, _get_model_ops_and_info, _load_for_lite_interpreter
from torch.nn import functional as F

from classifiers import (CLASSES, CLASSIFIERS, accuracy, clear_errors, first_line, fold_batch_norm, hardware,
                         load_cifar10, load_classifier, positive, to_float, write_file)
from evaluate import (BLACK, GREEN, RED, draw_sheet, find_generators, milliseconds, open_generator, picture,
                      save_picture, score, stem_of, warn_of_other_classifiers)
from unet import Generator

PAPER_PHONE = "10.52 to 10.84"  # Table 3, last column: milliseconds an image on the paper's smartphone
BYTECODE = 8  # the newest bytecode that the files may have: pytorch_android_lite 1.13.1 and 2.1.0 read it
MAX_BYTES = 65536  # of a PNG that the service takes: a picture of 32 x 32 has about 3,000
MAX_CONNECTIONS = 64  # at a time; whoever comes then is turned away
STAGES = "protect", "encode", "round trip", "whole"  # of a picture's way in the demo
SHOWN = 8  # pictures in the demo's figure


def best_generator() -> str:
    """The generator in runs/ and weights/ with the lowest validation loss."""
    losses = {}
    for path in find_generators():
        try:
            losses[path] = open_generator(path, "cpu")[1].get("validation_loss", math.inf)
        except ValueError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
    if not losses:
        raise FileNotFoundError("no generator in runs/ or weights/: run python train.py --target vgg13_bn --aux "
                                "resnet18")
    return min(losses, key=losses.get)


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
    `half` stores the weights in 16 bits. Raises RuntimeError if this PyTorch writes bytecode too new for the phone,
    OSError if it cannot write.
    """
    phone = Generator()
    phone.unet = fold_batch_norm(generator.unet)
    phone = phone.requires_grad_(False).eval().to(memory_format=torch.contiguous_format)
    if half:
        for layer in phone.modules():
            layer.__class__ = {nn.Conv2d: Conv2d16, nn.ConvTranspose2d: ConvTranspose2d16}.get(type(layer), type(layer))
    with warnings.catch_warnings():
        # PyTorch advises torch.export now, which writes for ExecuTorch; PyTorch Mobile reads TorchScript and no other.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Lite Interpreter is deprecated")
        content = torch.jit.script(phone)._save_to_buffer_for_lite_interpreter()
    version = _get_model_bytecode_version(io.BytesIO(content))
    if version > BYTECODE:
        raise RuntimeError(f"PyTorch {torch.__version__} writes bytecode {version} and phones read {BYTECODE}: export "
                           "with an older PyTorch")
    write_file(path, content)


def load_phone_file(path: str):
    """What the phone has: a function, images (N, 3, H, W) in [0, 1] to protected ones, run by the lite interpreter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Lite Interpreter is deprecated")
        return torch.no_grad()(_load_for_lite_interpreter(path))


def compare(a: list[Tensor], b: list[Tensor]) -> dict:
    """Between two lists of batches in [0, 1]: the largest difference, and the percent of 8-bit values that differ."""
    a, b = torch.cat(a), torch.cat(b)
    return {"largest_difference": (a - b).abs().max().item(),
            "percent_of_8bit_values_that_differ": 100 * ((a * 255).round() != (b * 255).round()).float().mean().item()}


@torch.no_grad()
def check(path: str, generator: Generator, target: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """Hold the file against the generator on uint8 test images: outputs, accuracy, size, operators, time."""
    phone, by_generator, by_file = load_phone_file(path), [], []

    def keep(outputs, output):
        outputs.append(output)
        return output

    generator_score = score(lambda x: keep(by_generator, generator(x)), target, None, images, labels)
    file_score = score(lambda x: keep(by_file, phone(x)), target, None, images, labels)
    odd = F.interpolate(to_float(images[:100]), (37, 50), mode="bilinear")  # no multiples of 16
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on a phone
    time_an_image = milliseconds(phone, 1, "cpu")
    torch.set_num_threads(threads)
    return {"file": path, "bytes": os.path.getsize(path), "bytecode": _get_model_bytecode_version(path),
            "operators": sorted(_get_model_ops_and_info(path)), "images": len(images),
            "clean_accuracy": accuracy(target, images, labels),
            "through_generator": generator_score, "through_file": file_score,
            "32x32": compare(by_generator, by_file), "37x50": compare([generator(odd)], [phone(odd)]),
            "milliseconds_an_image": time_an_image,
            "torch": str(torch.__version__), "hardware": hardware("cpu")}


def check_table(result: dict, target_name: str, half: bool) -> str:
    def compared(key):
        return (f"at most {result[key]['largest_difference']:.1e}; "
                f"{result[key]['percent_of_8bit_values_that_differ']:.4f}% of the 8-bit values differ")

    rows = [("size on disk", f"{result['bytes'] / 1e6:.1f} MB, weights in {16 if half else 32} bits"),
            (f"{target_name}'s accuracy, {result['images']:,} test images",
             f"{result['through_file']['target_accuracy']:.2f}% through the file, "
             f"{result['through_generator']['target_accuracy']:.2f}% through the generator, "
             f"{result['clean_accuracy']:.2f}% on clean images"),
            ("file against generator, 32 x 32", compared("32x32")),
            ("file against generator, 37 x 50", compared("37x50")),
            ("time an image, 32 x 32", f"{result['milliseconds_an_image']:.2f} ms in the lite interpreter on this "
             f"computer, batch 1, one thread (the paper's phone, Table 3: {PAPER_PHONE} ms)"),
            ("bytecode version", result["bytecode"]),
            (f"the {len(result['operators'])} operators it needs", " ".join(result["operators"]))]
    return "\n".join([f"| {result['file']} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


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
    length = header.strip(b" ")
    if not (length.isdigit() and 0 < int(length) <= MAX_BYTES):
        raise ValueError(f"{header!r} is no length from 1 to {MAX_BYTES}")
    image = decode(await reader.readexactly(int(length)))
    with torch.inference_mode():
        return b"%d" % target(image).argmax()


async def serve(target: nn.Module, name: str, host: str, port: int, seconds: float) -> None:
    """Answer until cancelled; OSError where it cannot listen. No picture outlives its request or reaches the log.

    One thread does everything, so the target runs once at a time. A connection has `seconds` in all, however busy it
    keeps, and its buffers are a few times MAX_BYTES; there are MAX_CONNECTIONS at most.
    """
    connections = 0

    async def connection(reader, writer):
        nonlocal connections
        connections += 1
        try:
            if connections > MAX_CONNECTIONS:
                raise ValueError(f"{MAX_CONNECTIONS} others are connected")
            writer.write(await asyncio.wait_for(recognise(reader, target), seconds))
        except asyncio.CancelledError:
            pass  # Ctrl-C; passed on, it would print a traceback for each client that is connected
        except Exception as error:  # whatever one client sends, the others are served
            client = (writer.get_extra_info("peername") or ["a client"])[0]
            reason = "out of time" if isinstance(error, asyncio.TimeoutError) else first_line(error)
            print(f"dropped {client}: {reason}", file=sys.stderr, flush=True)
        finally:
            connections -= 1
            writer.close()

    try:
        server = await asyncio.start_server(connection, host, port, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise OSError(f"cannot serve on {host}:{port} ({first_line(error)}): try another --host or --port") from error
    print("serving {} on {}:{} (Ctrl-C ends it)".format(name, *server.sockets[0].getsockname()[:2]), flush=True)
    await asyncio.Event().wait()  # for ever


# --- The phone --------------------------------------------------------------------------------------------------------

def ask(png: bytes, host: str, port: int, seconds: float) -> int:
    """Send one PNG, return the class that the service answers; OSError if a step of that takes over `seconds`."""
    try:
        with socket.create_connection((host, port), seconds) as connection:
            connection.sendall(b"%-16d" % len(png) + png)
            answer = connection.recv(1)
    except OSError as error:
        raise OSError(f"no answer from {host}:{port} ({first_line(error)}): is python export_mobile.py --serve "
                      "running there?") from error
    if not answer.isdigit():
        raise OSError(f"{host}:{port} closed the connection without an answer: its log says why")
    return int(answer)


def play_phone(path: str, images: Tensor, address: tuple, seconds: float) -> tuple[Tensor, Tensor, np.ndarray]:
    """Protect uint8 images (N, 3, 32, 32) with the .ptl file and have them recognised, one after the other.

    Returns what left the phone (uint8, as `images`), the answers (N,), and the milliseconds (N, 4) of STAGES. Raises
    OSError where the service gives no answer.
    """
    phone = load_phone_file(path)
    sent, answers, times = [], [], []
    for image in [images[0], *images]:  # the first one twice: the first call sets things up and does not count
        start = time.perf_counter()
        protected = (phone(to_float(image[None]))[0] * 255).round().to(torch.uint8)
        at_protected = time.perf_counter()
        file = io.BytesIO()
        Image.fromarray(protected.permute(1, 2, 0).numpy()).save(file, "PNG")
        at_encoded = time.perf_counter()
        answers.append(ask(file.getvalue(), *address, seconds))
        end = time.perf_counter()
        sent.append(protected)
        times.append([at_protected - start, at_encoded - at_protected, end - at_encoded, end - start])
    return torch.stack(sent[1:]), torch.tensor(answers[1:]), 1000 * np.array(times[1:])


def figure(images: Tensor, sent: Tensor, answers: Tensor, labels: Tensor, headline: str) -> Image.Image:
    """The demo as a picture: what the user holds, what the service sees, what it answers."""
    return draw_sheet([headline], [
        ("the user holds", [picture(image) for image in images]),
        ("which is", [(CLASSES[label], BLACK) for label in labels]),
        ("the service sees", [picture(image) for image in sent]),
        ("and answers", [(CLASSES[answer], GREEN if answer == label else RED)
                         for answer, label in zip(answers, labels)])])


def demo(path: str, generator: Generator, target: nn.Module, target_name: str, images: Tensor, labels: Tensor,
         address: tuple[str, int] | None, seconds: float) -> None:
    """Phone and service, end to end on uint8 test images: prints a table, writes it and a figure beside the file.

    Without an `address` the service is started here, as a process of its own, and ended.
    """
    service = None
    if address is None:
        service = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve", "--port", "0", "--seconds",
                                    str(seconds), "--target", target_name], stdout=subprocess.PIPE, text=True)
        ready = service.stdout.readline()  # "serving NAME on HOST:PORT (...)", or nothing if it failed
        if not ready:
            raise RuntimeError("the service did not start: its message is above")
        host, port = ready.split()[3].rsplit(":", 1)
        address = host, int(port)
    try:
        sent, answers, times = play_phone(path, images, address, seconds)
    finally:
        if service:
            service.terminate()
            service.wait()
    clean, through_path = accuracy(target, images, labels), 100 * (answers == labels).sum().item() / len(labels)
    scored = score(generator, target, None, images, labels)["target_accuracy"]
    quantiles = {stage: np.percentile(column, [50, 95]).tolist() for stage, column in zip(STAGES, times.T)}
    stem = path.removesuffix(".ptl")
    write_file(f"{stem}.demo.json", json.dumps({
        "file": path, "target": target_name, "images": len(images), "clean_accuracy": clean,
        "accuracy_through_path": through_path, "accuracy_by_score": scored, "torch": str(torch.__version__),
        "milliseconds_median_and_95th_percentile": quantiles, "hardware": hardware("cpu")}, indent=1).encode())
    save_picture(f"{stem}.demo.png", figure(images[:SHOWN], sent[:SHOWN], answers[:SHOWN], labels[:SHOWN],
               f"{target_name} is right on {through_path:.1f}% of {len(images):,} protected pictures, "
               f"on {clean:.1f}% of the originals"))
    print(f"| {target_name}, {len(images):,} test images | accuracy |\n| --- | --- |\n| clean | {clean:.2f}% |\n"
          f"| through phone, network and service | {through_path:.2f}% |\n| evaluate.py's score | {scored:.2f}% |\n\n"
          f"| milliseconds an image | median | 95th percentile |\n| --- | --- | --- |")
    for stage, (median, high) in quantiles.items():
        print(f"| {stage} | {median:.2f} | {high:.2f} |")
    print(f"\n-> {stem}.demo.json, {stem}.demo.png", flush=True)


def port_argument(text: str) -> int:
    """An argparse type: a port number, or 0."""
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


def address_argument(text: str) -> tuple[str, int]:
    """An argparse type: HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), port_argument(port)  # brackets: around an IPv6 address


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a generator as a file for PyTorch Mobile and check it; --demo "
                                                 "and --serve play the phone and the recognition service (Figure 5).")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--serve", action="store_true", help="run the recognition service until Ctrl-C (default: export)")
    mode.add_argument("--demo", action="store_true",
                      help="export, then protect test images and have them recognised (default: export, then check)")
    parser.add_argument("--generator", metavar="PATH",
                        help="(default: the one in runs/ and weights/ with the lowest validation loss)")
    parser.add_argument("--out", metavar="PATH", help="the file to write (default: runs/NAME.ptl, with --half "
                                                      "runs/NAME-half.ptl); reports are written beside it")
    parser.add_argument("--half", action="store_true",
                        help="store the weights in 16 bits, half the size (default: in 32 bits)")
    parser.add_argument("--target", choices=CLASSIFIERS, metavar="NAME",
                        help="the service's classifier (default: the one the generator was trained for)")
    parser.add_argument("--images", type=positive(int), metavar="N",
                        help="use the first N of the 5,000 test images (default: 5000, with --demo 1000)")
    parser.add_argument("--host", default="127.0.0.1", help="address that --serve listens on (default: %(default)s, "
                                                            "this computer only)")
    parser.add_argument("--port", type=port_argument, default=9000,
                        help="port that --serve listens on, 0 for any (default: %(default)s)")
    parser.add_argument("--seconds", type=positive(float), default=10,
                        help="longest time for one picture, from connection to answer (default: %(default)s)")
    parser.add_argument("--connect", type=address_argument, metavar="HOST:PORT",
                        help="a service that runs already, for --demo (default: --demo starts its own)")
    parser.add_argument("--data", default="data", metavar="FOLDER",
                        help="where CIFAR-10 is or will be (default: %(default)s)")
    args = parser.parse_args()
    if args.connect and not args.demo:
        parser.error("--connect goes with --demo")
    if args.out and not args.out.endswith(".ptl"):
        parser.error(f"--out {args.out} does not end in .ptl")

    target_name = args.target
    if not (args.serve and target_name):  # a service needs to know its target, no generator
        path = args.generator or best_generator()
        generator, meta = open_generator(path, "cpu")
        warn_of_other_classifiers(path, meta)
        target_name = target_name or meta["target"]
    target = load_classifier(target_name)
    if args.serve:
        try:
            return asyncio.run(serve(target, target_name, args.host, args.port, args.seconds))
        except KeyboardInterrupt:
            return print("stopped")

    out = args.out or f"runs/{stem_of(path)}{'-half' * args.half}.ptl"
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    images, labels = (part[:args.images or (1000 if args.demo else 5000)] for part in load_cifar10(args.data)["test"])
    export(generator, out, args.half)
    print(f"{path} -> {out}\n", flush=True)
    if args.demo:
        return demo(out, generator, target, target_name, images, labels, args.connect, args.seconds)
    result = {"generator_file": path, "target": target_name, "half": args.half,
              **check(out, generator, target, images, labels)}
    write_file(f"{out}.json", json.dumps(result, indent=1).encode())
    print(check_table(result, target_name, args.half))
    print(f"\n-> {out}.json", flush=True)
    allowed = 0.02 if args.half else 1e-4
    if not all(result[size]["largest_difference"] <= allowed for size in ("32x32", "37x50")):
        raise ValueError(f"{out} does not give the generator's pictures: they differ by more than {allowed}")


if __name__ == "__main__":
    with clear_errors():
        main()
