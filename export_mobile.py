"""The generator on the phone, and the recognition service that it talks to (Section 3.4, Figure 5).

    python export_mobile.py             write the files for the phone and check them
    python export_mobile.py --int8      the same, and one more that computes in 8 bits
    python export_mobile.py --generator runs/mine.pt    the same, for a classifier of your own
    python export_mobile.py --demo      phone and service on this computer, end to end
    python export_mobile.py --serve     the service alone, for a phone

A phone runs one of the files. runs/NAME.pte is for ExecuTorch, PyTorch's present library for
phones; to write it, install the package executorch. runs/NAME.ptl is for PyTorch Mobile, which the
authors' app uses. The service runs the unchanged target. Each image takes one TCP connection, as in
the authors' app. The phone sends 16 bytes with the length (ASCII digits, padded with spaces), then
the PNG. The service answers with the class, one digit. So this protocol is for CIFAR-10 only:
images of 32 x 32, ten classes.
"""

import argparse
import copy
import importlib.metadata
import io
import json
import os
import socket
import socketserver
import sys
import threading
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.jit.mobile import _get_model_bytecode_version, _load_for_lite_interpreter
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from classifiers import (CLASSIFIERS, UserError, accuracy, check_writable, hardware, load_cifar10,
                         load_classifier, percent, positive_int, run, save, scoring_batches,
                         to_float)
from evaluate import (draw_sheet, encode_png, find_generators, heading, image_rows, milliseconds,
                      number)
from train import describe_visibility, load_generator, protect, score
from unet import Generator

BYTECODE = 8  # the newest that pytorch_android_lite 1.13.1 and 2.1.0 read
MAX_BYTES = 65536  # of a PNG that the service takes: one of 32 x 32 has about 3,000
SECONDS = 10  # how long phone and service wait for each other

# Both warnings recommend a newer format, which PyTorch Mobile cannot read.
warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")
warnings.filterwarnings("ignore", "Lite Interpreter is deprecated")


# --- The files for the phone ----------------------------------------------------------------------
def fold_batch_norm(generator: Generator) -> Generator:
    """Return a copy on the CPU: batch norm is folded into the convolutions, no gradients."""
    folded = copy.deepcopy(generator).eval().requires_grad_(False)
    for level in folded.modules():
        if isinstance(level, nn.Sequential):  # of double_conv
            for i in (0, 3):
                level[i] = fuse_conv_bn_eval(level[i], level[i + 1])
                level[i + 1] = nn.Identity()
    return folded.to("cpu", memory_format=torch.contiguous_format)


def export_torchscript(generator: Generator, path: str) -> None:
    """Write the file that PyTorch Mobile's lite interpreter runs.

    It takes images (N, 3, H, W) in [0, 1], H and W >= 16, and returns protected ones. It is
    scripted, not traced, so that sizes stay free. It has plain operators only: optimize_for_mobile
    would pack weights for XNNPACK, and such a file loads only where that is built in. Raises
    UserError if this PyTorch writes bytecode too new for phones.
    """
    scripted = torch.jit.script(fold_batch_norm(generator))
    content = scripted._save_to_buffer_for_lite_interpreter()
    version = _get_model_bytecode_version(io.BytesIO(content))
    if version > BYTECODE:
        raise UserError(f"PyTorch {torch.__version__} writes bytecode {version}, "
                        f"phones read {BYTECODE}: export with an older PyTorch")
    save(path, content)


def export_executorch(generator: Generator, path: str, size: Sequence[int],
                      examples: Tensor | None = None) -> None:
    """Write the file that ExecuTorch runs, with the operators of XNNPACK.

    It takes one image (1, 3, H, W) in [0, 1] and returns the protected one; `size`, (H, W), is
    fixed, since a generator hides at one size. With `examples`, uint8 images (N, 3, H, W) of the
    kind that the phone will protect, it computes in 8 bits. Needs the package executorch.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    x = torch.zeros(1, 3, *size)
    program = torch.export.export(fold_batch_norm(generator), (x,))
    if examples is not None:
        network = quantize(program.module(), examples)
        program = torch.export.export(network, (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    save(path, lowered.to_executorch().buffer)


def quantize(network: nn.Module, examples: Tensor) -> nn.Module:
    """Return an exported network with weights and feature maps in 8 bits.

    The ranges of the maps are those that occur with `examples`, uint8 images (N, 3, H, W). A
    hardened generator still chooses its code in float32.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer, get_symmetric_quantization_config)
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer()
    quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
    network = prepare_pt2e(network, quantizer)
    for image in examples.cpu().split(1):
        network(to_float(image))  # its observers note the ranges
    return convert_pt2e(network)


class ExecuTorchFile:
    """A .pte file as a network for images (N, 3, H, W): one by one, on one thread."""

    def __init__(self, path: str):
        from executorch.extension.pybindings.portable_lib import (
            _threadpool_get_thread_count, _unsafe_reset_threadpool)
        from executorch.runtime import Runtime

        if _threadpool_get_thread_count() != 1:  # before the first file; others find one thread
            _unsafe_reset_threadpool(1)
        self.forward = Runtime.get().load_program(path).load_method("forward")

    def __call__(self, x: Tensor) -> Tensor:
        protected = []
        for image in x.split(1):
            image = image.contiguous()  # the file takes the memory as it lies
            [output] = self.forward.execute([image])
            protected.append(output)
        return torch.cat(protected)


def export(generator: Generator, name: str, size: Sequence[int],
           examples: Tensor | None) -> dict[str, nn.Module | ExecuTorchFile]:
    """Write NAME.pte, with `examples` NAME-int8.pte, and NAME.ptl. Return what runs them, by path.

    `examples` is as for export_executorch; without the package executorch only NAME.ptl is written.
    """
    float32 = f"{name}.pte"
    int8 = f"{name}-int8.pte"
    torchscript = f"{name}.ptl"
    phones = {}
    if executorch_version() is not None:
        print(f"writing {float32}", flush=True)
        export_executorch(generator, float32, size)
        phones[float32] = ExecuTorchFile(float32)
    else:
        print(f"no {float32}: ExecuTorch is missing (pip install executorch)", flush=True)
    if examples is not None:
        print(f"writing {int8}", flush=True)
        export_executorch(generator, int8, size, examples)
        phones[int8] = ExecuTorchFile(int8)
    print(f"writing {torchscript}", flush=True)
    export_torchscript(generator, torchscript)
    phones[torchscript] = _load_for_lite_interpreter(torchscript)
    for path in (float32, int8):
        if os.path.exists(path) and path not in phones:
            print(f"note: {path} is of an earlier export, perhaps of another generator")
    return phones


def executorch_version() -> str | None:
    """Return the version of the package executorch, None where it is not installed."""
    try:
        return importlib.metadata.version("executorch")
    except importlib.metadata.PackageNotFoundError:
        return None


# --- Checking them --------------------------------------------------------------------------------
@torch.no_grad()
def largest_difference(phone: nn.Module, generator: Generator, images: Tensor) -> float:
    """Return how far the outputs for uint8 images (N, 3, H, W) differ at most, in [0, 1]."""
    differences = []
    for [batch] in scoring_batches(images):
        x = to_float(batch)
        differences.append((phone(x) - generator(x)).abs().max())
    return torch.stack(differences).max().item()  # nan if an output is nan


def check(path: str, phone: nn.Module, generator: Generator, images: Tensor,
          labels: Tensor | None, target: nn.Module | None) -> dict:
    """Compare `phone`, which runs the file, with the generator on uint8 images; print a row.

    The time is that of one image on one thread (the paper's phone, Table 3: 10.52 to 10.84 ms).
    With a target, the result also has its accuracy in percent (Eq. 5) and the visibility: by these
    a file in 8 bits is judged, since its images are not quite those of the generator.
    """
    difference = None
    if not path.endswith("-int8.pte"):
        difference = largest_difference(phone, generator, images)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ms = milliseconds(phone, 1, "cpu", *images.shape[2:])
    torch.set_num_threads(threads)
    result = {"megabytes": os.path.getsize(path) / 1e6, "ms": ms, "largest_difference": difference,
              "target_accuracy": None, "visibility": None}
    shows = "-"
    if target is not None:
        scores = score(images, protect(phone, images), target, None, labels)
        result["target_accuracy"] = scores["target_accuracy"]
        result["visibility"] = scores["visibility"]
        shows = describe_visibility(scores["visibility"])
    print(f"| {path} | {result['megabytes']:.1f} | {ms:.2f} | {number(difference, 7)} "
          f"| {number(result['target_accuracy'])} | {shows} |", flush=True)
    return result


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
        pixels = pil_to_tensor(image.convert("RGB"))
    return to_float(pixels[None])


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
    """Protect uint8 images (N, 3, 32, 32) as the phone does and have them recognised, one by one.

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
        png = encode_png(to_pil_image(protected))
        after_encode = time.perf_counter()
        answers.append(ask(png, address))
        end = time.perf_counter()
        sent.append(protected)
        times.append([after_protect - start, after_encode - after_protect, end - after_encode,
                      end - start])
    medians = 1000 * np.median(times, axis=0)
    stages = dict(zip(("protect", "encode", "round trip", "whole"), medians.round(2).tolist()))
    return torch.stack(sent), torch.tensor(answers), stages


def demo(phone: nn.Module, figure: str, target: nn.Module, images: Tensor,
         labels: Tensor) -> dict:
    """Run phone and service from end to end on uint8 test images, and draw the figure, a PNG.

    The service runs in a thread of its own. Returns a report.
    """
    with RecognitionServer(target, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sent, answers, times = play_phone(phone, images, server.server_address)
        server.shutdown()
    correct = percent(answers == labels)
    title = f"the service is right on {correct:.1f}% of {len(images):,} protected images"
    batches = {"the user holds": images[:8], "the service gets": sent[:8]}
    draw_sheet(figure, [(title, []), *image_rows(batches, labels[:8], {"it": target})])
    words = ", ".join(f"{stage} {ms}" for stage, ms in times.items())
    print(f"{title}; median ms an image: {words}", flush=True)
    return {"accuracy": correct, "median_ms": times}


# --- The command ----------------------------------------------------------------------------------
def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a generator as files for ExecuTorch and PyTorch Mobile, and check them; "
                    "--demo and --serve play the phone and the recognition service (Figure 5).")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--serve", action="store_true", help="run the service until Ctrl-C")
    mode.add_argument("--demo", action="store_true",
                      help="export, then protect test images with the first file and have them "
                           "recognised")
    parser.add_argument("--generator", metavar="FILE",
                        help="the generator's file (default: a hardened one)")
    parser.add_argument("--int8", action="store_true",
                        help="also write a .pte file that computes in 8 bits, a quarter as large")
    parser.add_argument("--images", type=positive_int, default=1000, metavar="N",
                        help="use the first N of the 5,000 test images (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address that --serve listens on (default: %(default)s, local only)")
    parser.add_argument("--port", type=int, default=9000,
                        help="port that --serve listens on (default: %(default)s)")
    parser.add_argument("--data", default="data", metavar="FOLDER",
                        help="where CIFAR-10 is or goes (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
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
        return
    if args.int8 and executorch_version() is None:
        raise UserError("--int8 needs ExecuTorch: pip install executorch")
    if args.int8 and target is None:
        raise UserError(f"{path} is for images of your own: for 8 bits call export_executorch in "
                        "Python, with some of them as examples")
    size = meta["image_size"]
    name = f"runs/{os.path.splitext(os.path.basename(path))[0]}"
    check_writable(f"{name}.ptl")
    examples = None
    labels = None
    if target is None:
        images = random_images(*size)
    else:
        data = load_cifar10(args.data)
        images = data["test"][0][:args.images]
        labels = data["test"][1][:args.images]
        if args.int8:
            examples = data["train"][0][:500]

    phones = export(generator, name, size, examples)
    report = {"generator": path, "target": meta.get("target"), "images": len(images),
              "image_size": list(size), "hardware": hardware("cpu"), "torch": torch.__version__,
              "executorch": executorch_version()}
    if target is not None:
        report["clean_target_accuracy"] = accuracy(target, images, labels)
        print(f"{meta['target']}: {report['clean_target_accuracy']:.2f}% of {len(images):,} "
              "original images", flush=True)
    columns = ("file | MB | ms an image on one thread | largest difference from the generator | "
               "target accuracy (%) | what shows")
    print(heading("Files for the phone", columns), end="")
    report["files"] = {}
    for file, phone in {path: generator, **phones}.items():
        report["files"][file] = check(file, phone, generator, images, labels, target)
    if args.demo:
        first = list(phones)[0]
        print(f"phone and service, with {first}", flush=True)
        result = demo(phones[first], f"{name}.demo.png", target, images, labels)
        report["demo"] = {"file": first, **result}
        print(f"-> {name}.demo.png")
    save(f"{name}.phone.json", json.dumps(report, indent=1).encode())
    print(f"-> {name}.phone.json")
    for file, result in report["files"].items():
        difference = result["largest_difference"]
        if difference is not None and not difference < 1e-4:  # nan is not
            raise UserError(f"{file} gives other images than the generator: see the difference")


if __name__ == "__main__":
    run(main)
