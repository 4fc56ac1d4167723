"""How a generator is scored, the tables and figures of Section 4, and what the paper leaves out.

    python evaluate.py                      all generators in runs/ and weights/, about two minutes each on 2 CPU cores
    python evaluate.py --timing             and Table 3: what the generator and the classifiers cost
    python evaluate.py --attack             and how much someone who has the generator gets back
    python evaluate.py --image cat.jpg      protect pictures of your own

Every score comes from the 5,000 test images, which nothing was trained or chosen on, in float32, and from protected
images rounded to 8 bits, since that is what a service receives.
"""

import argparse
import glob
import io
import json
import math
import os
import statistics
import sys
import time

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import (CLASSES, CLASSIFIERS, accuracy, add_common_arguments, autocast_dtype, build_classifier,
                         clear_errors, faster_convolutions, find_classifier, fingerprint, first_line, fold_batch_norm,
                         hardware, kind_of, load_cifar10, load_classifier, minutes, positive, shuffled_batches,
                         to_float, write_file)
from ssim import ssim
from unet import Generator, UNet, load_generator

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


# --- Scoring (Section 4.2.1) ------------------------------------------------------------------------------------------

@torch.no_grad()
def protect(generator: nn.Module, images: Tensor) -> Tensor:
    """What leaves the phone: uint8 images (N, 3, H, W) to the generator's output for them, rounded to 8 bits.

    Raises FloatingPointError where that is not a number, which 8 bits would hide.
    """
    batches = []
    for image in images.split(500):
        protected = generator(to_float(image))
        if protected.isnan().any():
            raise FloatingPointError("the output of the U-Net is not finite")
        batches.append((protected * 255).round().to(torch.uint8))
    return torch.cat(batches)


@torch.no_grad()
def score_protected(images: Tensor, protected: Tensor, target: nn.Module, aux: nn.Module | None,
                    labels: Tensor) -> dict:
    """score() for images whose protected version, both uint8 (N, 3, H, W), is there already."""
    batches = []
    for image, hidden, label in zip(images.split(500), protected.split(500), labels.split(500)):
        hidden = to_float(hidden)
        similarity = ssim(to_float(image), hidden)
        sums = {"ssim": similarity.abs().sum(), "signed_ssim": similarity.sum()}
        for role, classifier in ("target", target), ("aux", aux):
            if classifier is not None:
                logits = classifier(hidden).float()
                sums[f"{role}_accuracy"] = 100 * (logits.argmax(1) == label).sum()
                sums[f"{role}_loss"] = F.cross_entropy(logits, label, reduction="sum")
        batches.append(sums)
    return {"aux_accuracy": None, "aux_loss": None} | {
        name: sum(batch[name].item() for batch in batches) / len(labels) for name in sums}


def score(generator: nn.Module, target: nn.Module, aux: nn.Module | None, images: Tensor, labels: Tensor) -> dict:
    """Score a generator on uint8 images (N, 3, H, W) and their labels (N,).

    What leaves the phone is 8-bit, so everything is computed on protected images rounded to 8 bits. Returns
    target_accuracy and aux_accuracy in percent (Eq. 5), ssim (mean absolute value, as in Figure 8), and the means that
    the loss is made of: target_loss and aux_loss (cross-entropies of Eq. 1 and 2) and signed_ssim (Eq. 3). Without an
    auxiliary model aux_accuracy and aux_loss are None. Raises FloatingPointError where protect() does.
    """
    return score_protected(images, protect(generator, images), target, aux, labels)


def evaluate_generator(generator: nn.Module, target_name: str, aux_name: str, classifiers: dict, clean: dict,
                       images: Tensor, labels: Tensor) -> tuple[dict, Tensor]:
    """All scores of one generator on uint8 images (N, 3, H, W), labels (N,), and the protected images, uint8 alike.

    classifiers and clean hold the trained networks and their accuracy on the original images, by name. Raises
    FloatingPointError where protect() does.
    """
    start = time.monotonic()
    target, aux = classifiers[target_name], classifiers.get(aux_name)
    protected = protect(generator, images)
    result = {"clean_target_accuracy": clean[target_name], "clean_aux_accuracy": clean.get(aux_name),
              **score_protected(images, protected, target, aux, labels)}
    result["drop"] = result["clean_target_accuracy"] - result["target_accuracy"]
    result |= {"psnr": mean_of(psnr, images, protected), "svd_distance": mean_of(svd_distance, images, protected)}
    result["unseen"] = {name: accuracy(classifier, protected, labels) for name, classifier in classifiers.items()
                        if name not in (target_name, aux_name)}
    result["wire"] = {name: score_protected(images, send(protected), target, None, labels)
                      for name, send in WIRES.items()}
    return result | {"seconds": time.monotonic() - start}, protected


# --- The paper's tables -----------------------------------------------------------------------------------------------

def summarise(entries: list[dict]) -> dict:
    """What Table 2, Figures 10 and 11 and Section 4.2.2 say about several generators: a dict of plain numbers.

    An entry holds target, aux ("none" or a name), target_accuracy, drop and ssim; of several for one combination the
    last counts. What was not trained is None.
    """
    entries = list({(entry["target"], entry["aux"]): entry for entry in entries}.values())
    pairs = [entry for entry in entries if entry["aux"] != "none"]
    table_2, by_aux = {}, {}
    for target in CLASSIFIERS:
        values = [entry["target_accuracy"] for entry in pairs if entry["target"] == target]
        none = [e["target_accuracy"] for e in entries if e["target"] == target and e["aux"] == "none"]
        if values or none:
            low_median_high = (min(values), statistics.median(values), max(values)) if values else (None,) * 3
            table_2[target] = dict(zip(("min", "median", "max"), low_median_high),
                                   none=none[0] if none else None, auxiliaries=len(values))
    for aux in CLASSIFIERS:
        if chosen := [entry for entry in pairs if entry["aux"] == aux]:
            by_aux[aux] = {key: statistics.mean(entry[key] for entry in chosen) for key in ("target_accuracy", "ssim")}
            by_aux[aux]["targets"] = len(chosen)
    return {"table_2": table_2, "by_auxiliary": by_aux, "pairs": len(pairs),
            "pairs_under_5_points": sum(entry["drop"] < 5 for entry in pairs)}


def matrix(entries: list[dict], key: str, clean: str = "") -> dict:
    """{(target, aux): value} of one score; with `clean`, that baseline as one more column (target) or row (aux)."""
    cells = {}
    for entry in entries:
        if entry[key] is not None:
            cells[entry["target"], entry["aux"]] = entry[key]
        if clean and entry[f"clean_{clean}_accuracy"] is not None:
            at = (entry["target"], "originals") if clean == "target" else ("originals", entry["aux"])
            cells[at] = entry[f"clean_{clean}_accuracy"]
    return cells


def axes(cells: dict) -> tuple[list[str], list[str]]:
    """The targets and the auxiliary models that occur in a matrix, in Table 1's order."""
    names = (*CLASSIFIERS, "none", "originals")
    return tuple([name for name in names if name in {pair[i] for pair in cells}] for i in (0, 1))


def matrices(entries: list[dict]) -> list[tuple[str, dict, int]]:
    """Figures 7 and 8: title, matrix, digits after the point; without those that would hold nothing but baselines."""
    figures = [("Figure 7(a): accuracy (%) of the target on protected pictures. High is good.",
                matrix(entries, "target_accuracy", "target"), 1),
               ("Figure 7(b): accuracy (%) of the auxiliary model on them. Low is good, 10 is guessing.",
                matrix(entries, "aux_accuracy", "aux"), 1),
               ("Figure 8: likeness, mean |SSIM|. Low is good, 1 is the same picture.", matrix(entries, "ssim"), 3)]
    return [figure for figure in figures if any("originals" not in pair for pair in figure[1])]


def show(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.00"


def tables(results: dict) -> str:
    """The whole report as Markdown, from the dict that results.json holds."""
    entries, summary, parts = list(results["generators"].values()), results["summary"], []

    def add(title, head, rows):  # a Markdown table
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        parts.append("\n".join([f"**{title}**".replace("|", "&#124;"), "", *lines, ""]))

    def add_scores(title, head, cells, entries=entries):  # one line a generator
        add(title, ("target", "auxiliary", *head), [(e["target"], e["aux"], *cells(e)) for e in entries])

    if entries:
        add_scores(f"{results['images']:,} protected test images: accuracy (%) and likeness (Section 4.2)",
                   ("target, clean", "target, protected", "lost", "auxiliary, clean", "auxiliary, protected",
                    "mean abs. SSIM", "epochs"),
                   lambda e: (show(e["clean_target_accuracy"]), show(e["target_accuracy"]), show(e["drop"]),
                              show(e["clean_aux_accuracy"]), show(e["aux_accuracy"]), show(e["ssim"], 4),
                              str(e["settings"].get("epochs", "–"))
                              + " (quick look)" * bool(e["settings"].get("limit"))
                              + " (in training)" * (not e["finished"])))
    if len(entries) > 1:
        add("Table 2: target accuracy (%) on protected images, ours / the paper's",
            ("target", "auxiliary models", "min", "median", "max", "no auxiliary"),
            [(target, f"{row['auxiliaries']} / 7", *(f"{show(row[key])} / {show(printed)}" for key, printed in zip(
                ("min", "median", "max", "none"), TABLE_2[target]))) for target, row in summary["table_2"].items()])
        for title, cells, digits in matrices(entries):
            targets, auxes = axes(cells)
            add(title, ("target \\ auxiliary", *auxes),
                [(target, *(show(cells.get((target, aux)), digits) for aux in auxes)) for target in targets])
    if len(entries) > 1 and summary["pairs"]:
        add("Figures 10 and 11: averages by auxiliary model",
            ("auxiliary", "targets", "target accuracy (%)", "mean abs. SSIM"),
            [(aux, f"{row['targets']} / 7", show(row["target_accuracy"]), show(row["ssim"], 4))
             for aux, row in summary["by_auxiliary"].items()])
        parts.append(f"{summary['pairs_under_5_points']} of {summary['pairs']} pairs lose under 5 points "
                     "(the paper: 38 of 56).\n")
    for device, times in results["timing"].items():
        column, machine = (0, "16-core CPU") if device == "cpu" else (1, "RTX A6000")
        add(f"Table 3: ms an image on {times['hardware']} (float32, batch norm folded, untrained weights)",
            ("network", "parameters", "MB in float32", "batch 256", "batch 1", f"the paper, {machine}"),
            [(name, f"{row['parameters']:,}", show(row["bytes"] / 1e6, 1), show(row["ms_batch_256"], 3),
              show(row["ms_batch_1"], 3), TABLE_3[name][column]) for name, row in times["networks"].items()])
    if unseen := [name for name in CLASSIFIERS if any(name in entry["unseen"] for entry in entries)]:
        add_scores("Beyond the paper: accuracy (%) on protected images of classifiers that the generator never met",
                   [f"{name} (originals {show(results['clean'][name])})" for name in unseen],
                   lambda e: [show(e["unseen"].get(name)) for name in unseen])
    if entries:
        add_scores("Beyond the paper: the wire. Target accuracy (%) / mean abs. SSIM of what arrives",
                   ("8-bit, as above", *WIRES),
                   lambda e: [f"{show(arrived['target_accuracy'])} / {show(arrived['ssim'], 4)}"
                              for arrived in (e, *e["wire"].values())])
        add_scores("Beyond the paper: other measures of likeness (Section 7.3) to the original",
                   ("mean abs. SSIM", "PSNR (dB)", "singular-value distance (0: same)"),
                   lambda e: (show(e["ssim"], 4), show(e["psnr"]), show(e["svd_distance"])),
                   [*entries, {"target": "two different", "aux": "test images", **results["unrelated"]}])
    if attacked := [entry for entry in entries if entry["attack"]]:
        add_scores("Beyond the paper: pictures recovered by a U-Net that was trained to undo the generator",
                   ("epochs", "SSIM, protected", "SSIM, recovered", "PSNR (dB), protected", "PSNR (dB), recovered",
                    "target (%) on recovered", "auxiliary (%) on recovered"),
                   lambda e: (str(e["attack"]["epochs"]), show(e["ssim"], 4), show(e["attack"]["ssim"], 4),
                              show(e["psnr"]), show(e["attack"]["psnr"]), show(e["attack"]["target_accuracy"]),
                              show(e["attack"]["aux_accuracy"])), attacked)
    return "\n".join(parts)


# --- Pictures: Figures 7, 8 and 9 -------------------------------------------------------------------------------------

BLACK, GREEN, RED, GREY = (0, 0, 0), (0, 110, 40), (190, 20, 20), (110, 110, 110)


def picture(image: Tensor, scale: int = 3) -> Image.Image:
    """A uint8 image (3, H, W) to a Pillow picture, every pixel a square of `scale` x `scale`."""
    rgb = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    return rgb.resize((scale * rgb.width, scale * rgb.height), Image.Resampling.NEAREST)


def draw_sheet(title: list[str], rows: list[tuple[str, list]]) -> Image.Image:
    """Lines of title above rows of cells: (label, cells), where a cell is a picture or (text, colour)."""
    gap, title_font, text_font = 6, ImageFont.load_default(24), ImageFont.load_default(18)
    cell = max(cell.width for _, cells in rows for cell in cells if isinstance(cell, Image.Image))
    left = gap + int(max(text_font.getlength(label) for label, _ in rows)) + 2 * gap
    heights = [max(cell.height if isinstance(cell, Image.Image) else 22 for cell in cells) for _, cells in rows]
    width = max(left + len(rows[0][1]) * (cell + gap), *(int(title_font.getlength(line)) + 3 * gap for line in title))
    sheet = Image.new("RGB", (width, 32 * len(title) + 3 * gap + sum(heights) + gap * len(rows)), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for line in title:
        draw.text((gap, y), line, BLACK, title_font)
        y += 32
    y += gap
    for (label, cells), height in zip(rows, heights):
        draw.text((gap, y + height / 2), label, BLACK, text_font, anchor="lm")
        for i, content in enumerate(cells):
            x = left + i * (cell + gap)
            if isinstance(content, Image.Image):
                sheet.paste(content, (x + (cell - content.width) // 2, y + (height - content.height) // 2))
            else:
                draw.text((x + cell / 2, y + height / 2), *content, text_font, anchor="mm")
        y += height + gap
    return sheet


@torch.no_grad()
def answers(classifier: nn.Module, images: Tensor, labels: Tensor) -> list[tuple[str, tuple]]:
    """The classifier's answers as cells of a sheet: the class in words, green if it is right."""
    return [(CLASSES[guess], GREEN if guess == label else RED)
            for guess, label in zip(classifier(to_float(images)).argmax(1).tolist(), labels.tolist())]


def headline(result: dict) -> list[str]:
    """Target, auxiliary and the three scores, as in the captions of Figure 9."""
    aux, accuracies = "no auxiliary model", f"target {show(result['target_accuracy'])}%"
    accuracies += f" (on originals {show(result['clean_target_accuracy'])}%)"
    if result["aux"] != "none":
        aux = f"auxiliary {result['aux']}"
    if result["aux_accuracy"] is not None:
        accuracies += f",  auxiliary {show(result['aux_accuracy'])}%"
        accuracies += f" (on originals {show(result['clean_aux_accuracy'])}%)"
    return [f"Target {result['target']}, {aux}.  Likeness to the originals: mean |SSIM| {show(result['ssim'], 3)}",
            f"Right answers: {accuracies}"]


def sheet(result: dict, target: nn.Module, aux: nn.Module | None, images: Tensor, protected: Tensor, labels: Tensor,
          recovered: Tensor | None = None) -> Image.Image:
    """Figure 9: one image of each class above what the generator makes of it, the scores, and what the models see.

    With `recovered` a third row shows what the attack makes of the protected images, and the models judge that row.
    """
    chosen = [(labels == i).nonzero()[0].item() for i in range(10) if (labels == i).any()]
    images, protected, labels = images[chosen], protected[chosen], labels[chosen]
    title, rows, judged = headline(result), [("original", images), ("protected", protected)], protected
    if recovered is not None:
        attack, judged = result["attack"], recovered[chosen]
        rows.append(("recovered", judged))
        title = [f"Target {result['target']}, auxiliary {result['aux']}: pictures recovered by a U-Net",
                 f"Likeness to the originals: SSIM {show(attack['ssim'], 3)} (protected: {show(result['ssim'], 3)}),  "
                 f"PSNR {show(attack['psnr'], 1)} dB (protected: {show(result['psnr'], 1)} dB)"]
    rows = [(label, [picture(image) for image in batch]) for label, batch in rows]
    rows.insert(0, ("", [(CLASSES[label], GREY) for label in labels.tolist()]))
    rows.append(("target sees", answers(target, judged, labels)))
    if aux is not None:
        rows.append(("auxiliary sees", answers(aux, judged, labels)))
    return draw_sheet(title, rows)


def draw_heatmaps(panels: list[tuple[str, dict, int]]) -> Image.Image:
    """Matrices (title, {(target, aux): value}, digits) as heat maps one above another, 900 pixels wide.

    Dark is high; the baselines ("originals") have no colour; pairs that were not trained are empty.
    """
    left, row_height, title_font, text_font = 150, 34, ImageFont.load_default(20), ImageFont.load_default(16)
    small = ImageFont.load_default(15)
    heights = [row_height * (len(axes(cells)[0]) + 2) + 30 for _, cells, _ in panels]
    image = Image.new("RGB", (900, sum(heights)), "white")
    draw, y = ImageDraw.Draw(image), 0
    for (title, cells, digits), height in zip(panels, heights):
        targets, auxes = axes(cells)
        width = min((880 - left) // len(auxes), 150)
        coloured = [value for pair, value in cells.items() if "originals" not in pair]
        low, high = min(coloured), max(coloured)
        draw.text((10, y + 12), title, BLACK, title_font)
        draw.text((10, y + 1.5 * row_height + 10), "target \\ auxiliary", GREY, text_font, anchor="lm")
        for j, aux in enumerate(auxes):
            name = aux.replace("_", "\n_").replace("121", "\n121")  # long names in two lines: the columns are narrow
            draw.text((left + (j + 0.5) * width, y + 1.5 * row_height + 8), name, BLACK, small, anchor="mm",
                      align="center", spacing=1)
        for i, target in enumerate(targets):
            top = y + (i + 2) * row_height + 10
            draw.text((10, top + row_height / 2), target, BLACK, text_font, anchor="lm")
            for j, aux in enumerate(auxes):
                x, value = left + j * width, cells.get((target, aux))
                box = (x, top, x + width - 2, top + row_height - 2)
                if value is None:
                    draw.rectangle(box, outline=(225, 225, 225))
                    continue
                share = 0.0 if "originals" in (target, aux) or high == low else (value - low) / (high - low)
                fill = (255, 255, 255) if "originals" in (target, aux) else tuple(
                    int(light + share * (dark - light)) for light, dark in zip((226, 236, 248), (16, 60, 120)))
                draw.rectangle(box, fill, (160, 170, 185))
                draw.text((x + width / 2 - 1, top + row_height / 2 - 1), show(value, digits),
                          (255, 255, 255) if share > 0.6 else BLACK, text_font, anchor="mm")
        y += height
    return image


# --- Overhead (Section 4.3, Table 3) ----------------------------------------------------------------------------------

@torch.no_grad()
def milliseconds(network: nn.Module, batch: int, device: str) -> float:
    """ms an image: the median of at least 3 runs and a second of them, after warming up."""
    x = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None  # a GPU works on after the call
    times, warm_up = [], 2 if device == "cpu" else 20
    while len(times) < warm_up + 3 or sum(times[warm_up:]) < 1:
        wait()
        start = time.perf_counter()
        network(x)
        wait()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[warm_up:]) / batch


def time_networks() -> dict:
    """Table 3 on this machine: for "cpu", and "cuda" where there is one, size and time of each network.

    The networks are untrained, since the weights do not change how long they take.
    """
    timing = {}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        networks = timing.setdefault(device, {"hardware": hardware(device), "networks": {}})["networks"]
        for name in ("generator", *CLASSIFIERS):
            network = Generator() if name == "generator" else build_classifier(name)
            parameters = sum(parameter.numel() for parameter in network.parameters())
            if name == "generator":
                network.unet = fold_batch_norm(network.unet)
            else:
                network = fold_batch_norm(network)
            network = network.eval().to(device, memory_format=torch.channels_last)
            networks[name] = {"parameters": parameters, "bytes": 4 * parameters} | {
                f"ms_batch_{batch}": milliseconds(network, batch, device) for batch in (256, 1)}
            print(f"timing  {device}  {name}: {networks[name]['ms_batch_256']:.3f} ms an image in batches of 256, "
                  f"{networks[name]['ms_batch_1']:.3f} alone", flush=True)
    return timing


# --- Beyond the paper: likeness, the wire, and an attack --------------------------------------------------------------

def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image pair, (N, 3, H, W) in [0, 1] to (N,); infinite for equal ones."""
    return -10 * torch.log10(((x - y) ** 2).mean(dim=(1, 2, 3)))


def svd_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distance in singular values of each image pair, (N, 3, H, W) in [0, 1] with H and W >= 8, to (N,): 0 if equal.

    The mean, over the whole 8 x 8 blocks of the luminance (0 to 255), of the Euclidean distance between the eight
    singular values in x and the eight in y. Source: the block distances of Shnayderman, Gusev and Eskicioglu, "An
    SVD-based grayscale image quality measure for local and global assessment", IEEE Trans. on Image Processing 15,
    2006. Their summary, M-SVD, takes the median away first: it finds pictures alike that are spoiled evenly, as here.
    """
    def singular_values(image):
        grey = 255 * (image * image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
        return torch.linalg.svdvals(grey.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2))

    return (singular_values(x) - singular_values(y)).norm(dim=2).mean(1)


def mean_of(measure, images: Tensor, others: Tensor) -> float:
    """The mean of a measure of likeness over pairs of uint8 images (N, 3, H, W)."""
    return torch.cat([measure(to_float(x), to_float(y)) for x, y in zip(images.split(500), others.split(500))]
                     ).mean().item()


def jpeg(images: Tensor, quality: int) -> Tensor:
    """uint8 images (N, 3, H, W) as they come out of a JPEG file (Pillow's, colour at half resolution)."""
    arrived = []
    for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        arrived.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(arrived)).permute(0, 3, 1, 2).to(images.device)


def rgb565(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) with 5, 6 and 5 bits a channel, as the authors' Android app sends them.

    The low bits are cut off; to get back to 8 bits the high ones are repeated, so that white stays white.
    """
    bits = torch.tensor([5, 6, 5], dtype=torch.uint8, device=images.device).view(1, 3, 1, 1)
    cut = images >> (8 - bits)
    return (cut << (8 - bits)) | (cut >> (2 * bits - 8))


ATTACK_EPOCHS = {"cuda": 20, "cpu": 1}  # by kind_of(device)
WIRES = {"JPEG 95": lambda images: jpeg(images, 95), "JPEG 75": lambda images: jpeg(images, 75), "RGB565": rgb565}


def attack(generator: nn.Module, name: str, data: dict, epochs: int, device: str, precision: str, seed: int,
           batch_size: int = 128, lr: float = 0.002) -> tuple[nn.Module, dict]:
    """Train a U-Net to undo a generator, as anyone can who has it (it ships in the app) and pictures of the same kind.

    Only training images are used: the U-Net gets them protected, in 8 bits, and learns to return the originals (squared
    error and 1 - SSIM, AdamW, one cycle). Returns the network, protected to recovered image, both (N, 3, H, W) in
    [0, 1], and how it was trained. Raises FloatingPointError on a loss that is not finite.
    """
    torch.manual_seed(seed)
    images, start = data["train"][0], time.monotonic()
    print(f"attack on {name}  protecting {len(images)} training images ...", flush=True)
    protected = protect(generator, images)
    attacker = faster_convolutions(nn.Sequential(UNet(), nn.Sigmoid())).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(attacker.parameters(), fused=True)
    batch_size = min(batch_size, len(images))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (len(images) // batch_size))
    kind, dtype = torch.device(device).type, autocast_dtype(device, precision)
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=device)
        for batch in shuffled_batches(len(images), batch_size, device, f"attack on {name}", epoch, epochs):
            original = to_float(images[batch])
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                recovered = attacker(to_float(protected[batch])).float()
            loss = 10 * F.mse_loss(recovered, original) + 1 - ssim(original, recovered).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
        if not math.isfinite(total.item()):
            raise FloatingPointError("the loss is not finite: try --precision fp32")
    return attacker.eval(), {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
                             "precision": str(dtype).removeprefix("torch."), "minutes": (time.monotonic() - start) / 60}


# --- Beyond the paper: your own pictures ------------------------------------------------------------------------------

def open_picture(path: str) -> Image.Image:
    """Any picture that Pillow reads, upright, as RGB: 16-bit grey cut to 8, what is transparent laid on white.

    Raises ValueError where the file is no picture, is damaged, or is smaller than 16 x 16.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        image = image.convert("RGBA")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({first_line(error)})") from error
    if min(image.size) < 16:
        raise ValueError(f"{path} is {image.width} x {image.height}: pictures need at least 16 x 16 pixels")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


@torch.no_grad()
def sees(classifier: nn.Module, image: Image.Image) -> tuple[str, float]:
    """The classifier's answer to a picture of any size and its confidence in percent.

    The classifiers know pictures of 32 x 32 only, so the service shrinks what it receives to that.
    """
    small = to_tensor(image.resize((32, 32), Image.Resampling.BICUBIC)).to(classifier.mean.device)
    confidence, guess = classifier(to_float(small)).softmax(1).max(1)
    return CLASSES[guess.item()], 100 * confidence.item()


def protect_picture(path: str, stem: str, generator: nn.Module, target: nn.Module, device: str, out: str) -> str:
    """Write OUT/STEM-protected.png and OUT/STEM-sheet.png; returns in one line what the target sees before and after.

    The whole picture is protected at its own size, for which about 1 GB of memory a megapixel is needed, and then
    shrunk by the service (see sees()). The generator was trained on pictures of 32 x 32: for a larger one the answer
    is also given for a phone that shrinks first and protects then.
    """
    image = open_picture(path)
    original = to_tensor(image).to(device)
    protected = picture(protect(generator, original)[0], 1)
    save_picture(f"{out}/{stem}-protected.png", protected)
    shown = [("original", image), ("protected", protected)]
    if image.size != (32, 32):
        small = to_tensor(image.resize((32, 32), Image.Resampling.BICUBIC)).to(device)
        shown.append(("resized to 32 x 32, then protected", picture(protect(generator, small)[0], 1)))
    said = ["{} ({:.0f}%)".format(*sees(target, seen)) for _, seen in shown]
    cells = [ImageOps.contain(seen, (320, 320), Image.Resampling.NEAREST if max(seen.size) < 320 else
                              Image.Resampling.BICUBIC) for _, seen in shown]
    rows = [("", [(name, BLACK) for name, _ in shown]), ("", cells), ("target sees", [(text, BLACK) for text in said])]
    title = f"{os.path.basename(path)}, {image.width} x {image.height}"
    save_picture(f"{out}/{stem}-sheet.png", draw_sheet([title], rows))
    return ", ".join(f"{name}: {answer}" for (name, _), answer in zip(shown, said))


# --- The command ------------------------------------------------------------------------------------------------------

def save_picture(path: str, image: Image.Image) -> None:
    file = io.BytesIO()
    image.save(file, "PNG")
    write_file(path, file.getvalue())


def save_results(out: str, results: dict) -> None:
    """results.json, in which what is not a finite number is null, and tables.md."""
    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    write_file(f"{out}/results.json", json.dumps(finite(results), indent=1, allow_nan=False).encode())
    write_file(f"{out}/tables.md", tables(results).encode())


def find_generators() -> list[str]:
    """The generators on disk in Table 1's order; one in runs/ hides one of the same name in weights/."""
    paths = {os.path.basename(path): path for folder in ("weights", "runs")
             for path in glob.glob(f"{folder}/generator-*.pt")}
    names = [f"generator-{target}-{aux}.pt" for target in CLASSIFIERS for aux in (*CLASSIFIERS, "none")]
    return [paths[name] for name in sorted(paths, key=lambda name: (
        names.index(name) if name in names else len(names), name))]


def open_generator(path: str, device: str) -> tuple[nn.Module, dict]:
    """load_generator on `device`; ValueError also where the file does not say what it was trained for."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {path}")
    generator, meta = load_generator(path)
    if not (isinstance(meta, dict) and meta.get("target") in CLASSIFIERS
            and meta.get("aux") in (*CLASSIFIERS, "none")):
        raise ValueError(f"{path} does not say which classifiers it was trained with: train it again with train.py")
    if not all(value.isfinite().all() for value in generator.state_dict().values()):
        raise ValueError(f"{path} holds numbers that are not finite: train it again with a lower --lr")
    return generator.to(device, memory_format=torch.channels_last), meta


def warn_of_other_classifiers(path: str, meta: dict) -> None:
    """Say so where a classifier on disk is not the one that the generator at `path` was trained with."""
    for role in ("target", "aux"):
        now = find_classifier(meta[role])
        if now and meta.get(f"{role}_sha256") not in (None, fingerprint(now)):
            print(f"warning: {path} was trained with another {meta[role]} than {now}: expect worse scores",
                  file=sys.stderr, flush=True)


def distinct(stems: list[str]) -> list[str]:
    """The names, repeated ones with -2, -3 ... appended, so that no file overwrites another."""
    chosen = []
    for stem in stems:
        names = [stem, *(f"{stem}-{i}" for i in range(2, len(stems) + 1))]
        chosen.append(next(name for name in names if name not in chosen))
    return chosen


def stem_of(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def own_pictures(args: argparse.Namespace, path: str, skip) -> None:
    """--image: protect each file with the generator at `path`."""
    generator, meta = open_generator(path, args.device)
    warn_of_other_classifiers(path, meta)
    target = load_classifier(meta["target"], args.device)
    print(f"{path} (target {meta['target']}, auxiliary {meta['aux']}; --generator chooses)", flush=True)
    for file, stem in zip(args.image, distinct([stem_of(file) for file in args.image])):
        try:
            line = protect_picture(file, stem, generator, target, args.device, args.out)
        except (OSError, ValueError, FloatingPointError, RuntimeError) as error:  # RuntimeError: no memory for it
            skip(f"no such file: {file}" if isinstance(error, FileNotFoundError) else f"{file}: {first_line(error)}")
            continue
        print(f"{file}: {meta['target']} sees  {line}  -> {args.out}/{stem}-protected.png, {stem}-sheet.png",
              flush=True)


def earlier_results(out: str) -> dict:
    """The attacks and the timing in results.json: they cost too much to be thrown away by the next run."""
    try:
        with open(f"{out}/results.json") as file:
            results = json.load(file)
        return {"attacks": dict(results["attacks"]), "timing": dict(results["timing"])}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours
        return {"attacks": {}, "timing": {}}


def evaluate_all(args: argparse.Namespace, paths: list[str], results: dict, skip) -> None:
    """Fill results["generators"] and write everything that is drawn, after each generator.

    An attack in results["attacks"] belongs to a generator while its file, the classifiers' and the images are the same.
    """
    data = load_cifar10(args.data, args.device)
    images, labels = (part[:args.limit] for part in data["test"])
    results["images"] = len(images)
    results["unrelated"] = {"ssim": mean_of(lambda x, y: ssim(x, y).abs(), images, images.roll(1, 0)),
                            "psnr": mean_of(psnr, images, images.roll(1, 0)),
                            "svd_distance": mean_of(svd_distance, images, images.roll(1, 0))}
    classifiers, clean = {}, results["clean"]
    for name in filter(find_classifier, CLASSIFIERS):
        try:
            classifiers[name] = load_classifier(name, args.device)
        except ValueError as error:
            skip(error)
            continue
        clean[name] = accuracy(classifiers[name], images, labels)
        print(f"{name}  {clean[name]:.2f}% of the original test images", flush=True)

    names = distinct([stem_of(path).removeprefix("generator-") for path in paths])
    for i, (path, name) in enumerate(zip(paths, names), 1):
        try:
            generator, meta = open_generator(path, args.device)
        except (OSError, ValueError) as error:
            skip(error)
            continue
        for role in ("aux", "target"):
            if meta[role] not in (*classifiers, "none"):
                skip(f"{role} of {name}, not on disk or damaged: run python classifiers.py --arch {meta[role]}")
        if meta["target"] not in classifiers:
            continue
        warn_of_other_classifiers(path, meta)
        print(f"{name}  ({i} of {len(paths)})  protecting and scoring {len(images)} images ...", flush=True)
        target, aux = classifiers[meta["target"]], classifiers.get(meta["aux"])
        try:
            result, protected = evaluate_generator(generator, meta["target"], meta["aux"], classifiers, clean, images,
                                                   labels)
        except FloatingPointError as error:
            skip(f"{path}: {error}: train it again with a lower --lr")
            continue
        made_from = {"images": len(images), "generator": fingerprint(path)} | {
            role: fingerprint(find_classifier(meta[role])) for role in ("target", "aux")}
        known = results["attacks"].get(name)
        result = {"file": path, "target": meta["target"], "aux": meta["aux"], **result,
                  "attack": known if known and known["made_from"] == made_from else None,
                  "settings": meta, "finished": not os.path.exists(path.removesuffix(".pt") + ".checkpoint")}
        results["generators"][name] = result
        entries = list(results["generators"].values())
        results["summary"] = summarise(entries)
        save_picture(f"{args.out}/generator-{name}.png", sheet(result, target, aux, images, protected, labels))
        if len(entries) > 1:
            save_picture(f"{args.out}/heatmaps.png", draw_heatmaps(matrices(entries)))
        save_results(args.out, results)
        print(f"{name}  {minutes(result['seconds'])}  target {result['target_accuracy']:.2f}% "
              f"(lost {result['drop']:.2f}), aux {show(result['aux_accuracy'])}%, |SSIM| {result['ssim']:.4f}",
              flush=True)
        if args.attack:
            try:
                attacker, attacked = attack(generator, name, data, args.attack_epochs, args.device, args.precision,
                                            args.seed)
                recovered = protect(attacker, protected)
                result["attack"] = results["attacks"][name] = attacked | {
                    **score_protected(images, recovered, target, aux, labels),
                    "psnr": mean_of(psnr, images, recovered), "made_from": made_from}
                save_picture(f"{args.out}/attack-{name}.png",
                             sheet(result, target, aux, images, protected, labels, recovered))
            except FloatingPointError as error:
                skip(f"attack on {name}: {error}")
                continue
            save_results(args.out, results)
            print(f"{name}  attacked in {minutes(60 * attacked['minutes'])}: SSIM {result['attack']['ssim']:.4f}, PSNR "
                  f"{result['attack']['psnr']:.2f} dB, target {result['attack']['target_accuracy']:.2f}%", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score generators on the 5,000 test images: the paper's tables and "
                                                 "figures, and what the paper leaves out. Scores are always "
                                                 "taken in float32: --precision is for --attack.")
    parser.add_argument("--generator", nargs="+", metavar="FILE",
                        help="which to evaluate (default: all generator-*.pt in runs/ and weights/)")
    parser.add_argument("--out", default="runs/evaluation", metavar="FOLDER",
                        help="where results.json, tables.md and the pictures go (default: %(default)s)")
    parser.add_argument("--limit", type=positive(int),
                        help="score on the first LIMIT test images only, for a quick look (default: all 5,000)")
    parser.add_argument("--timing", action="store_true", help="also measure Table 3, a few minutes (default: no)")
    parser.add_argument("--attack", action="store_true",
                        help="also train a U-Net to undo each generator (default: no)")
    parser.add_argument("--attack-epochs", type=positive(int),
                        help=f"(default: {ATTACK_EPOCHS['cuda']} on a GPU, {ATTACK_EPOCHS['cpu']} on a CPU)")
    parser.add_argument("--image", nargs="+", metavar="FILE",
                        help="only protect these pictures, with the first generator (default: none)")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.image and (args.timing or args.attack):
        parser.error("--image only protects pictures: run --timing and --attack without it")
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a GPU too
    args.attack_epochs = args.attack_epochs or ATTACK_EPOCHS[kind_of(args.device)]
    skipped = 0

    def skip(why):
        nonlocal skipped
        skipped += 1
        print(f"skipped: {why if isinstance(why, str) else first_line(why)}", file=sys.stderr, flush=True)

    paths = args.generator or find_generators()
    if not paths and not args.timing:
        sys.exit("error: no generator in runs/ or weights/: run python train.py --target vgg13_bn --aux resnet18")
    os.makedirs(args.out, exist_ok=True)
    if args.image:
        own_pictures(args, paths[0], skip)
    else:
        results = {"generators": {}, "summary": None, "unrelated": None, "images": 0, "clean": {},
                   **earlier_results(args.out), "seed": args.seed, "device": args.device,
                   "hardware": hardware(args.device), "arguments": vars(args), "versions": {
                       "python": sys.version.split()[0], "torch": str(torch.__version__),
                       "torchvision": str(torchvision.__version__), "numpy": np.__version__,
                       "pillow": Image.__version__}}
        if paths:
            evaluate_all(args, paths, results, skip)
        if args.timing:
            results["timing"] = time_networks()
        if results["generators"] or args.timing:
            save_results(args.out, results)
            print(f"\n{tables(results)}\n-> {args.out}/: {', '.join(sorted(os.listdir(args.out)))}")
    if skipped:
        sys.exit(f"error: {skipped} skipped, see above")


if __name__ == "__main__":
    with clear_errors():
        main()
