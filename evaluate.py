"""The tables and figures of Section 4, and what the paper leaves out.

    python evaluate.py                      all generators in runs/ and weights/, one or two minutes each on 2 CPU cores
    python evaluate.py --timing             and Table 3: what the generator and the classifiers cost
    python evaluate.py --attack 5           and how much someone who has the generator gets back, in 5 epochs
    python evaluate.py --image cat.jpg      protect pictures of your own
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
import statistics
import sys
import time
import warnings

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import (CLASSIFIERS, UserError, accuracy, add_common_arguments, autocast, build_classifier,
                         check_settings, choose_precision, command, each, find_classifier, folder, hardware,
                         load_cifar10, load_classifier, number, remove, report, save, to_float, training)
from ssim import ssim
from train import fingerprint, load_generator, protect, score
from unet import Generator, UNet

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What the paper prints. Table 2: target accuracy in percent, min, median and max over the auxiliary models, and without
# one. Table 3: milliseconds an image of each classifier on a 16-core CPU and on an A6000 GPU; likewise the generator.
TABLE_2 = {"vgg13_bn": (81.36, 90.86, 92.08, 92.58), "vgg16_bn": (83.42, 91.34, 91.90, 91.48),
           "resnet18": (83.82, 89.18, 91.66, 91.22), "resnet34": (83.76, 90.98, 91.54, 91.82),
           "densenet121": (80.20, 90.26, 91.74, 92.08), "mobilenet_v2": (82.58, 88.88, 91.80, 91.84),
           "googlenet": (83.74, 85.84, 91.22, 90.08), "inception_v3": (87.56, 89.62, 91.62, 91.28)}
TABLE_3 = {"vgg13_bn": ("1.116", "0.012"), "vgg16_bn": ("1.262", "0.012"), "resnet18": ("0.540", "0.018"),
           "resnet34": ("0.827", "0.027"), "densenet121": ("2.769", "0.077"), "mobilenet_v2": ("3.580", "0.033"),
           "googlenet": ("10.636", "0.045"), "inception_v3": ("16.288", "0.064"),
           "generator": ("1.168 to 1.392", "0.047 to 0.048")}


# --- How hidden, and what the wire does -------------------------------------------------------------------------------
def psnr(images: Tensor, others: Tensor) -> float:
    """The mean peak signal-to-noise ratio in dB of pairs of uint8 images (N, 3, H, W); infinite for equal ones."""
    return -10 * ((to_float(images) - to_float(others)) ** 2).mean(dim=(1, 2, 3)).log10().mean().item()


def likeness(images: Tensor, protected: Tensor) -> dict:
    """Does a protected picture look more like its own original than like another's? uint8 (N, 3, H, W).

    The mean absolute correlation of brightness with either, and the same for 4 x 4 averages, what is seen from afar.
    SSIM can be fooled (Section 7.3); a generator that hides has both nearly equal.
    """
    result = {}
    for name, size in ("", 1), ("_from_afar", 4):
        grey = [F.avg_pool2d(to_float(batch).mean(1), size).flatten(1) for batch in (images, protected)]
        x, y = (F.normalize(values - values.mean(1, keepdim=True)) for values in grey)
        result |= {f"own{name}": (x * y).sum(1).abs().mean().item(),
                   f"another{name}": (x.roll(1, 0) * y).sum(1).abs().mean().item() if len(x) > 1 else None}
    return result


def jpeg(images: Tensor, quality: int, subsampling: str) -> Tensor:
    """uint8 images (N, 3, H, W) as they come out of a JPEG file of this quality; "4:2:0": colour at half resolution."""
    arrived = []
    for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=quality, subsampling=subsampling)
        arrived.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(arrived)).permute(0, 3, 1, 2).to(images.device)


def rgb565(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) with 5, 6 and 5 bits a channel, as the authors' Android app sends them, and back."""
    bits = torch.tensor([5, 6, 5], dtype=torch.uint8, device=images.device).view(1, 3, 1, 1)
    cut = images >> (8 - bits)
    return (cut << (8 - bits)) | (cut >> (2 * bits - 8))  # the high bits again in place of the low: white stays white


WIRES = {"PNG": lambda images: images,
         **{f"JPEG {subsampling} at {quality}": lambda images, q=quality, s=subsampling: jpeg(images, q, s)
            for subsampling in ("4:4:4", "4:2:0") for quality in (95, 75)}, "RGB565": rgb565}


def evaluate_generator(generator: nn.Module, target: str, aux: str, classifiers: dict, clean: dict, images: Tensor,
                       labels: Tensor) -> tuple[dict, Tensor]:
    """All scores of one generator on uint8 images (N, 3, H, W), and the protected images; `clean`: {name: accuracy}."""
    protected = protect(generator, images)
    result = score(images, protected, classifiers[target], classifiers.get(aux), labels) | likeness(images, protected)
    result |= {"clean_target_accuracy": clean[target], "clean_aux_accuracy": clean.get(aux),
               "drop": clean[target] - result["target_accuracy"], "psnr": psnr(images, protected)}
    result["unseen"] = {name: accuracy(classifier, protected, labels) for name, classifier in classifiers.items()
                        if name not in (target, aux)}
    result["wire"] = {name: accuracy(classifiers[target], send(protected), labels) for name, send in WIRES.items()}
    return result, protected


# --- The attack: train a U-Net to undo the generator ------------------------------------------------------------------
def found(pictures: Tensor, candidates: Tensor) -> float:
    """Percent of uint8 pictures (N, 3, H, W) whose nearest candidate, by squared distance, is that of their place."""
    nearest = torch.cdist(to_float(pictures).flatten(1), to_float(candidates).flatten(1)).argmin(1)
    return 100 * (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean().item()


def attack(generator: nn.Module, target: nn.Module, data: dict, path: str, epochs: int, device: str = "cpu",
           seed: int = 0, batch_size: int = 128, lr: float = 0.002) -> None:
    """Train a U-Net to undo a generator, as anyone can who has it (it ships in the app) and pictures of the same kind.

    It gets the protected training images, flipped too, in 8 bits, and learns to return the originals (squared error and
    1 - SSIM, AdamW, one cycle). Writes path.json after every epoch, with the scores of what it recovers from the first
    1,000 test images; at the end path.png. "found" is the percentage whose nearest original is their own (chance: 0.1),
    "floor" what the class alone gives away: its mean training picture, "matched" what is found by who has the originals
    and protects them. A finished attack is not repeated. Raises UserError where it was made with other settings.
    """
    (train, train_labels), (test, labels) = data["train"], (part[:1000] for part in data["test"])
    sent = protect(generator, test)
    settings = {"epochs": epochs, "seed": seed, "batch_size": batch_size, "lr": lr, "training_images": len(train),
                "sent_sha256": hashlib.sha256(sent.cpu().contiguous().numpy()).hexdigest()[:12],
                "precision": choose_precision(device, "bf16")}
    words = "SSIM {ssim:.3f}, PSNR {psnr:.1f} dB, found {found:.1f}%"
    if os.path.exists(f"{path}.png"):
        check_settings(f"{path}.json", json.load(open(f"{path}.json")), settings)
        return print(f"{path}.json is finished")

    def scores(recovered):
        return {"ssim": ssim(to_float(test), to_float(recovered)).mean().item(), "psnr": psnr(test, recovered),
                "found": found(recovered, test), "target_accuracy": accuracy(target, recovered, labels)}

    print(f"{path}  protecting {2 * len(train):,} training pictures ...")
    pictures = torch.cat([train, train.flip(3)])
    protected = protect(generator, pictures)
    class_means = torch.stack([train[train_labels == i].float().mean(0) for i in range(10)]).round().to(torch.uint8)
    results = {"images": len(test), "protected": scores(sent), "floor": scores(class_means[labels]),
               "matched": found(sent, protect(generator, test)), "hardware": hardware(device), "log": []}
    torch.manual_seed(seed)
    attacker = nn.Sequential(UNet(), nn.Sigmoid()).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(attacker.parameters(), fused=True)
    log, parts = results["log"], {"attacker": attacker, "optimizer": optimizer}
    for epoch, batches in training(path, parts, settings, log, len(train), device):
        start = time.monotonic()
        attacker.train()
        for batch in batches:
            batch = batch + len(train) * torch.randint(0, 2, batch.shape, device=device)  # flipped or not
            original = to_float(pictures[batch])
            with autocast(device, settings["precision"]):
                recovered = attacker(to_float(protected[batch])).float()
            loss = 10 * F.mse_loss(recovered, original) + 1 - ssim(original, recovered).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        recovered = protect(attacker.eval(), sent)  # raises where it has diverged
        log.append(scores(recovered) | {"seconds": time.monotonic() - start})
        save(f"{path}.json", json.dumps(results | settings, indent=1).encode())
        print(f"{path}  epoch {epoch}/{epochs}  recovered: {words.format(**log[-1])}")
    shown = {"original": test[:10], "protected": sent[:10], "recovered": recovered[:10]}
    draw_sheet(f"{path}.png", [
        f"{os.path.basename(path)}: a U-Net recovers, after {epochs} epochs: {words.format(**log[-1])}",
        f"(the mean picture of the right class: {words.format(**results['floor'])})"],
        rows_of(shown, labels[:10], {"target": target}))
    remove(f"{path}.checkpoint")


# --- The paper's tables -----------------------------------------------------------------------------------------------
def summarise(entries: list[dict]) -> dict:
    """What Table 2, Figures 10 and 11 and Section 4.2.2 say about several generators; what was not trained is None."""
    pairs, table_2, by_aux = [entry for entry in entries if entry["aux"] != "none"], {}, {}
    for target in CLASSIFIERS:
        scores = {entry["aux"]: entry["target_accuracy"] for entry in entries if entry["target"] == target}
        none, values = scores.pop("none", None), scores.values()
        if values or none is not None:
            table_2[target] = {"min": min(values, default=None), "max": max(values, default=None), "none": none,
                               "median": statistics.median(values) if values else None, "auxiliaries": len(values)}
    for aux in CLASSIFIERS:
        if chosen := [entry for entry in pairs if entry["aux"] == aux]:
            by_aux[aux] = {key: statistics.mean(entry[key] for entry in chosen) for key in ("target_accuracy", "ssim")}
            by_aux[aux]["targets"] = len(chosen)
    return {"generators": len(entries), "table_2": table_2, "by_auxiliary": by_aux, "pairs": len(pairs),
            "pairs_under_5_points": sum(entry["drop"] < 5 for entry in pairs)}


def show(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.00"


def tables(results: dict) -> str:
    """The whole report as Markdown, from the dict that results.json holds."""
    summary, parts = results["summary"], []

    def add(title, head, rows):
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows) if row]
        parts.append("\n".join([f"**{title}**", "", *lines, ""]) * bool(rows))

    def add_scores(title, head, cells):  # one line a generator
        add(title, ("generator", *head), [(name, *cells(entry)) for name, entry in results["generators"].items()])

    add_scores(f"{results['images']:,} protected test images: accuracy (%) and likeness (Section 4.2)",
               ("target, clean", "target, protected", "lost", "auxiliary, clean", "auxiliary, protected",
                "mean abs. SSIM", "largest", "over 0.1 (%)", "epochs"),
               lambda e: (*(show(e[key]) for key in ("clean_target_accuracy", "target_accuracy", "drop",
                                                     "clean_aux_accuracy", "aux_accuracy")), show(e["ssim"], 4),
                          show(e["ssim_largest"], 3), show(e["ssim_over_0.1"]), str(e["settings"].get("epochs", "-"))
                          + " (quick look)" * bool(e["settings"].get("limit")) + " (training)" * (not e["finished"])))
    add_scores("Like its own original, or like any? Mean absolute correlation of brightness; PSNR (dB)",
               ("own", "another's", "own, from afar", "another's, from afar", "PSNR"),
               lambda e: [show(e[key], 3) for key in ("own", "another", "own_from_afar", "another_from_afar", "psnr")])
    if summary["generators"] > 1:
        add("Table 2: target accuracy (%) on protected images, ours / the paper's",
            ("target", "auxiliary models", "min", "median", "max", "no auxiliary"),
            [(target, f"{row['auxiliaries']} / 7", *(f"{show(row[key])} / {show(printed)}" for key, printed in zip(
                ("min", "median", "max", "none"), TABLE_2[target]))) for target, row in summary["table_2"].items()])
        add("Figures 10 and 11: averages by auxiliary model",
            ("auxiliary", "targets", "target accuracy (%)", "mean abs. SSIM"),
            [(aux, f"{row['targets']} / 7", show(row["target_accuracy"]), show(row["ssim"], 4))
             for aux, row in summary["by_auxiliary"].items()])
        parts.append(f"{summary['pairs_under_5_points']} of {summary['pairs']} pairs lose under 5 points "
                     "(the paper: 38 of 56).\n")
    for device, times in results["timing"].items():
        column, machine = (0, "16-core CPU") if device == "cpu" else (1, "RTX A6000")
        add(f"Table 3: ms an image on {times['hardware']} (float32, untrained weights)",
            ("network", "parameters", "MB in float32", "batch 256", "batch 1", f"the paper, {machine}"),
            [(name, f"{row['parameters']:,}", show(row["parameters"] * 4e-6, 1), show(row["ms_batch_256"], 3),
              show(row["ms_batch_1"], 3), TABLE_3[name][column]) for name, row in times["networks"].items()])
    if unseen := [name for name in results["clean"]
                  if any(name in entry["unseen"] for entry in results["generators"].values())]:
        add_scores("Beyond the paper: accuracy (%) of classifiers that the generator never met",
                   [f"{name} (originals {show(results['clean'][name])})" for name in unseen],
                   lambda e: [show(e["unseen"].get(name)) for name in unseen])
    add_scores("Beyond the paper: the wire. Target accuracy (%) on what arrives", WIRES,
               lambda e: [show(e["wire"][name]) for name in WIRES])
    return "\n".join(parts)


# --- Pictures: Figures 7, 8 and 9 -------------------------------------------------------------------------------------
BLACK, WHITE, GREEN, RED = (0, 0, 0), (255, 255, 255), (0, 110, 40), (190, 20, 20)
PALE, DARK = (226, 236, 248), (16, 60, 120)  # the ends of a heat map


def picture(image: Tensor, scale: int = 3) -> Image.Image:
    """A uint8 image (3, H, W) to a Pillow picture, every pixel a square of `scale` x `scale`."""
    rgb = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    return rgb.resize((scale * rgb.width, scale * rgb.height), Image.Resampling.NEAREST)


def draw_sheet(path: str, title: list[str], rows: list[tuple[str, list]]) -> None:
    """Write a PNG: lines of title, rows of (label, cells): pictures, (text, colour, background) or none, a heading."""
    big, font, cell, words = ImageFont.load_default(22), ImageFont.load_default(16), 102, [*title, *dict(rows)]
    left = 20 + int(max(font.getlength(label) for label, cells in rows if cells))
    heights = [6 + max([c.height for c in cells if isinstance(c, Image.Image)], default=24) for _, cells in rows]
    width = max([left + cell * len(cells) for _, cells in rows] + [20 + int(big.getlength(line)) for line in words])
    sheet = Image.new("RGB", (width, 32 * len(title) + sum(heights) + 20), WHITE)
    draw, y = ImageDraw.Draw(sheet), 10 + 32 * len(title)
    for i, line in enumerate(title):
        draw.text((10, 10 + 32 * i), line, BLACK, big)
    for (label, cells), height in zip(rows, heights):
        draw.text((10, y + height / 2), label, BLACK, font, anchor="lm")
        for x, content in zip(range(left, width, cell), cells):
            if isinstance(content, Image.Image):
                sheet.paste(content, (x + (cell - content.width) // 2, y))
            else:
                text, colour, background = content
                draw.rectangle((x, y, x + cell - 3, y + height - 3), background)
                draw.text((x + cell / 2, y + height / 2), text, colour, font, anchor="mm")
        y += height
    sheet.save(file := io.BytesIO(), "PNG")
    save(path, file.getvalue())


def draw_heatmaps(path: str, entries: list[dict]) -> None:
    """Figures 7 and 8 as heat maps, targets down, auxiliary models across: dark is high, what was not trained empty."""
    rows = []
    for title, key, digits in (("Figure 7(a): target accuracy (%). High is good.", "target_accuracy", 1),
                               ("Figure 7(b): auxiliary accuracy (%). Low is good, 10 is guessing.", "aux_accuracy", 1),
                               ("Figure 8: likeness, mean |SSIM|. Low is good, 1 is the same picture.", "ssim", 3)):
        cells = {(e["target"], e["aux"]): e[key] for e in entries if e[key] is not None}
        low, high = min(cells.values(), default=0), max(cells.values(), default=0)
        for pair, value in cells.items():
            share = (value - low) / max(high - low, 1e-9)
            fill = tuple(int(a + share * (b - a)) for a, b in zip(PALE, DARK))
            cells[pair] = show(value, digits), WHITE if share > 0.6 else BLACK, fill
        targets, auxes = ([name for name in (*CLASSIFIERS, "none") if name in {pair[i] for pair in cells}]
                          for i in (0, 1))
        rows += [("", []), (title, []), ("target \\ auxiliary", [(aux, BLACK, WHITE) for aux in auxes])] * bool(cells)
        rows += [(target, [cells.get((target, aux), ("", BLACK, WHITE)) for aux in auxes]) for target in targets]
    draw_sheet(path, [], rows)


@torch.no_grad()
def rows_of(batches: dict[str, Tensor], labels: Tensor, judges: dict[str, nn.Module]) -> list[tuple[str, list]]:
    """Rows of a sheet: the class, each batch of uint8 images (N, 3, H, W), and the judges' answers to the last one."""
    rows = [("", [(CLASSES[label], BLACK, WHITE) for label in labels.tolist()]),
            *((name, [picture(image) for image in batch]) for name, batch in batches.items())]
    for name, judge in judges.items():
        guesses = judge(to_float(list(batches.values())[-1])).argmax(1)
        rows.append((f"{name} sees", [(CLASSES[guess], GREEN if guess == label else RED, WHITE)
                                      for guess, label in zip(guesses.tolist(), labels.tolist())]))
    return rows


# --- Overhead (Section 4.3, Table 3) ----------------------------------------------------------------------------------
@torch.no_grad()
def milliseconds(network: nn.Module, batch: int, device: str) -> float:
    """ms an image: the median of at least 3 runs and a second of them, after warming up."""
    x = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    wait = (lambda: torch.accelerator.synchronize(device)) if device != "cpu" else lambda: None  # a GPU works on
    times, warm_up = [], 2 if device == "cpu" else 20
    while len(times) < warm_up + 3 or sum(times[warm_up:]) < 1:
        wait()
        start = time.perf_counter()
        network(x)
        wait()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warm_up:]) / batch


def time_networks(device: str) -> dict:
    """Table 3 on this device: size and time of each network; untrained, since the weights do not change the time."""
    networks = {}
    for name in ("generator", *CLASSIFIERS):
        network = Generator() if name == "generator" else build_classifier(name)
        network = network.eval().to(device, memory_format=torch.channels_last)
        networks[name] = {"parameters": sum(parameter.numel() for parameter in network.parameters())} | {
            f"ms_batch_{batch}": milliseconds(network, batch, device) for batch in (256, 1)}
        print(f"timing on {device}  {name}: {networks[name]}")
    return {"cpu" if device == "cpu" else "gpu": {"hardware": hardware(device), "networks": networks}}


# --- Your own pictures ------------------------------------------------------------------------------------------------
PngImagePlugin.PngStream.chunk_iCCP = lambda png, at, length: png.fp.read(length)  # a fault in it does not matter


def to_rgba(image: Image.Image) -> Image.Image:
    """RGBA of 8 bits: 16-bit grey by its high byte, float as [0, 1]. Raises UserError where there is no clear range."""
    values = np.asarray(image) if image.mode[0] in "IF" else None  # 16-bit grey, 32-bit, float
    if image.mode.startswith("I;16"):
        alpha = np.where(values == image.info.get("transparency"), 0, 255)
        image = Image.fromarray(np.stack([values >> 8, alpha], 2).astype(np.uint8), "LA")
    elif image.mode == "F" and 0 <= values.min() and values.max() <= 1:
        image = Image.fromarray(np.uint8(np.rint(255 * values)))
    elif values is not None:
        raise UserError(f"its values go from {values.min():g} to {values.max():g}: save it with 8 bits a channel")
    return image.convert("RGBA")


def open_picture(path: str) -> Tensor:
    """Any picture that Pillow reads, upright, laid on white, resized to what the target takes: uint8 (1, 3, 32, 32).

    The generator hides at the size that it was trained for, so a picture is shrunk first and protected then. Large ones
    are averaged strip by strip, so that nothing larger than the decoded picture is held.
    """
    orientation = 1
    with warnings.catch_warnings(action="ignore"), Image.open(path) as file:  # large is not yet a decompression bomb
        file.draft("RGB", (128, 128))  # a JPEG can be decoded small
        with contextlib.suppress(Exception):  # what stands in a damaged EXIF block does not matter
            orientation = file.getexif()[0x0112]
        with contextlib.suppress(Exception):  # nor what follows the pixels: where they are damaged, crop() raises again
            file.load()
        k = max(1, min(file.size) // 128)
        strips = [to_rgba(file.crop((0, top, file.width, min(top + 8 * k, file.height)))).reduce(k)
                  for top in range(0, file.height, 8 * k)]
    image = Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips])).resize((32, 32))
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.getexif()[0x0112] = orientation
    return torch.from_numpy(np.array(ImageOps.exif_transpose(image))).permute(2, 0, 1)[None]


def protect_picture(file: str, generator: nn.Module, target: nn.Module, out: str) -> None:
    """--image: write OUT/NAME-protected.png, and OUT/NAME-sheet.png to look at."""
    try:
        original = open_picture(file).to(generator.mean.device)
    except Exception as error:  # Pillow raises nearly every kind
        raise UserError(f"cannot be read as a picture ({error})") from error
    protected, stem = protect(generator, original), f"{out}/{os.path.splitext(os.path.basename(file))[0]}"
    seen = [CLASSES[target(to_float(image)).argmax()] for image in (original, protected)]
    words = (f"the target sees {seen[0]}, protected {seen[1]}; |SSIM| "
             f"{ssim(to_float(original), to_float(protected)).abs().item():.3f}")
    picture(protected[0], 1).save(png := io.BytesIO(), "PNG")
    save(f"{stem}-protected.png", png.getvalue())
    pictures = [("original", [picture(original[0])]), ("protected", [picture(protected[0])])]
    draw_sheet(f"{stem}-sheet.png", [words], pictures)
    print(f"{file}: {words}  -> {stem}-protected.png, {stem}-sheet.png")


# --- The command ------------------------------------------------------------------------------------------------------
def find_generators() -> list[str]:
    """The generators on disk, by name; one in runs/ hides one of the same name in weights/."""
    files = glob.glob("weights/generator-*.pt") + glob.glob("runs/generator-*.pt")
    paths = {os.path.basename(path): path for path in files}
    for path in set(files) - set(paths.values()):
        print(f"{path} gives way to runs/{os.path.basename(path)}", file=sys.stderr)
    return [paths[name] for name in sorted(paths)]


def open_generator(path: str) -> tuple[nn.Module, dict]:
    """load_generator, with a warning where a classifier on disk is not the one that it was trained with."""
    generator, meta = load_generator(path)
    if not (meta.get("target") in CLASSIFIERS and meta.get("aux") in (*CLASSIFIERS, "none")):
        raise UserError(f"{path} does not say which classifiers it was trained with: train it with train.py")
    for role in ("target", "aux"):
        if find_classifier(meta[role]) and meta.get(f"{role}_sha256") not in (None, fingerprint(meta[role])):
            print(f"warning: {path} was trained with another {meta[role]} than {find_classifier(meta[role])}",
                  file=sys.stderr)
    return generator.to(memory_format=torch.channels_last), meta


def evaluate_file(path: str, args: argparse.Namespace, data: dict, classifiers: dict, results: dict) -> None:
    """Add the generator at `path` to results["generators"] and write everything; then attack it, if asked to."""
    start, name = time.monotonic(), " ".join(os.fsencode(os.path.basename(path)).decode(errors="replace").split())
    name = name.removeprefix("generator-").removesuffix(".pt")
    (images, labels), (generator, meta) = (part[:args.limit] for part in data["test"]), open_generator(path)
    for missing in {meta["target"], meta["aux"]} - {*classifiers, "none"}:
        raise UserError(f"no {missing} to judge it: run python classifiers.py --arch {missing}")
    target, aux = classifiers[meta["target"]], classifiers.get(meta["aux"])
    print(f"{name}  protecting and scoring {len(images):,} images ...")
    result, protected = evaluate_generator(generator.to(args.device), meta["target"], meta["aux"], classifiers,
                                           results["clean"], images, labels)
    result |= {"file": path, "target": meta["target"], "aux": meta["aux"], "settings": meta,
               "finished": not os.path.exists(f"{path.removesuffix('.pt')}.checkpoint")}
    results["generators"][name] = result
    write_results(args.out, results)
    title = [f"{name}: |SSIM| {result['ssim']:.3f} on average, {result['ssim_largest']:.3f} at most",
             f"Right answers: target {result['target_accuracy']:.2f}% (originals "
             f"{result['clean_target_accuracy']:.2f}%), auxiliary {show(result['aux_accuracy'])}%"]
    judges = {"target": target} | ({"auxiliary": aux} if aux else {})
    similar = [ssim(to_float(x), to_float(y)).abs() for x, y in zip(images.split(500), protected.split(500))]
    sheets = {"generator": torch.stack([(labels == i).int().argmax() for i in range(10)]),  # one picture of each class
              "worst": torch.cat(similar).topk(min(10, len(images))).indices}  # the ten that are hidden worst
    for kind, chosen in sheets.items():
        draw_sheet(f"{args.out}/{kind}-{name}.png", title, rows_of(
            {"original": images[chosen], "protected": protected[chosen]}, labels[chosen], judges))
    print(f"{'. '.join(title)}  ({time.monotonic() - start:.0f} s)")
    if args.attack:
        attack(generator, target, data, f"{args.out}/attack-{name}", args.attack, args.device, args.seed)


def write_results(out: str, results: dict) -> None:
    papers = [entry for entry in results["generators"].values() if entry["finished"]
              and not entry["settings"].get("hardened") and not entry["settings"].get("limit")]
    results["summary"] = summarise(papers)
    save(f"{out}/results.json", json.dumps(results, indent=1).encode())
    save(f"{out}/tables.md", tables(results).encode())
    if len(papers) > 1:
        draw_heatmaps(f"{out}/heatmaps.png", papers)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score generators: the paper's tables and figures, and some more.")
    parser.add_argument("--generator", nargs="+", metavar="FILE", help="(default: all in runs/ and weights/)")
    parser.add_argument("--out", type=folder, default="runs/evaluation", help="for the results (default: %(default)s)")
    parser.add_argument("--limit", type=number(int, 1), help="score on the first LIMIT test images (default: 5,000)")
    parser.add_argument("--timing", action="store_true", help="also measure Table 3, a few minutes (default: no)")
    parser.add_argument("--attack", nargs="?", type=number(int, 1), const=5, metavar="EPOCHS",
                        help="also train a U-Net on all training images to undo each generator, 5 epochs or EPOCHS")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="only protect these (first generator by name)")
    add_common_arguments(parser)
    args = parser.parse_args()
    names = {os.path.splitext(os.path.basename(file))[0] for file in args.image or ()}  # of what comes of them
    if args.image and (args.timing or args.attack or len(names) < len(args.image)):
        parser.error("--image only protects pictures, each of another name: run --timing and --attack without it")
    paths = args.generator or find_generators()
    if not paths and not args.timing:
        raise UserError("no generator in runs/ or weights/: run python train.py --target vgg13_bn --aux resnet18")
    if args.image:
        generator, meta = open_generator(paths[0])
        target = load_classifier(meta["target"], args.device)
        print(f"{paths[0]}{' (quick look)' * bool(meta.get('limit'))}, target {meta['target']} (--generator chooses)")
        return each(args.image, lambda file: protect_picture(file, generator.to(args.device), target, args.out))

    results = {"generators": {}, "images": min(args.limit or 5000, 5000), "clean": {}, "timing": {},
               "hardware": hardware(args.device), "arguments": vars(args), "torch": str(torch.__version__)}
    if args.timing:
        results["timing"] = time_networks(args.device)
        write_results(args.out, results)
    data, classifiers = load_cifar10(args.data, args.device), {}
    for name in filter(find_classifier, CLASSIFIERS):
        try:
            classifiers[name] = load_classifier(name, args.device)
        except UserError as error:
            report(error)
            continue
        results["clean"][name] = accuracy(classifiers[name], *(part[:args.limit] for part in data["test"]))
        print(f"{name}  {results['clean'][name]:.2f}% of the original test images")
    try:
        each(paths, lambda path: evaluate_file(path, args, data, classifiers, results))
    finally:
        if (results["generators"] or args.timing) and os.path.isdir(args.out):
            print(f"\n{tables(results)}\n-> {args.out}/: {', '.join(sorted(os.listdir(args.out)))}")


if __name__ == "__main__":
    with command():
        main()
