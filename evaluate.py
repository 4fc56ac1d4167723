"""The tables and figures of Section 4, and what the paper leaves out.

    python evaluate.py                  every generator in runs/ and weights/
    python evaluate.py --timing         and Table 3: what the generator and the classifiers cost
    python evaluate.py --attack 5       and how much a network trained to undo each one gets back
    python evaluate.py --image cat.jpg  protect images of your own
"""

import argparse
import glob
import io
import json
import os
import statistics
import time
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import (CLASSIFIERS, UserError, accuracy, add_common_arguments, autocast,
                         build_classifier, check_classes, check_data, check_writable,
                         choose_precision, find_classifier, fingerprint, hardware, learning_rate,
                         load_cifar10, load_classifier, positive_int, print_progress, run, save,
                         scoring_batches, to_float)
from ssim import ssim
from train import FORMS, encode_png, load_generator, protect, score
from unet import Generator, UNet, pad_to_16

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Table 2: target accuracy in percent, min, median and max over the auxiliary models, without one.
TABLE_2 = {
    "vgg13_bn": (81.36, 90.86, 92.08, 92.58),
    "vgg16_bn": (83.42, 91.34, 91.90, 91.48),
    "resnet18": (83.82, 89.18, 91.66, 91.22),
    "resnet34": (83.76, 90.98, 91.54, 91.82),
    "densenet121": (80.20, 90.26, 91.74, 92.08),
    "mobilenet_v2": (82.58, 88.88, 91.80, 91.84),
    "googlenet": (83.74, 85.84, 91.22, 90.08),
    "inception_v3": (87.56, 89.62, 91.62, 91.28),
}
# Table 3: ms an image on a 16-core CPU and on an RTX A6000; the generator's are medians.
TABLE_3 = {
    "generator": (1.336, 0.047),
    "vgg13_bn": (1.116, 0.012),
    "vgg16_bn": (1.262, 0.012),
    "resnet18": (0.540, 0.018),
    "resnet34": (0.827, 0.027),
    "densenet121": (2.769, 0.077),
    "mobilenet_v2": (3.580, 0.033),
    "googlenet": (10.636, 0.045),
    "inception_v3": (16.288, 0.064),
}


# --- The scores of one generator ------------------------------------------------------------------
def psnr(images: Tensor, others: Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of pairs of uint8 images (N, 3, H, W)."""
    errors = []
    for x, y in scoring_batches(images, others):
        difference = to_float(x) - to_float(y)
        errors.append((difference ** 2).mean(dim=(1, 2, 3)))
    mse = torch.cat(errors)
    return -10 * mse.log10().mean().item()


def brightness(images: Tensor, block: int) -> Tensor:
    """Brightness of uint8 images (N, 3, H, W) over blocks, less its mean, of length 1: (N, B)."""
    means = []
    for [batch] in scoring_batches(images):
        grey = to_float(batch).mean(1)
        means.append(F.avg_pool2d(grey, block).flatten(1))  # the batch stands in for channels
    blocks = torch.cat(means)
    return F.normalize(blocks - blocks.mean(1, keepdim=True))


def brightness_correlation(images: Tensor, protected: Tensor, block: int = 1) -> dict:
    """Does a protected image look more like its own original than like another's? Both uint8.

    Returns the mean absolute correlation of brightness with its "own" original and with the "other"
    one, over averages of block x block pixels: what is seen from afar. SSIM can be fooled (Section
    7.3); a generator that hides has both nearly equal.
    """
    x = brightness(images, block)
    y = brightness(protected, block)
    own = (x * y).sum(1).abs().mean()
    other = (x.roll(1, 0) * y).sum(1).abs().mean()
    return {"own": own.item(), "other": other.item()}


def jpeg(images: Tensor, subsampling: str, quality: int = 75) -> Tensor:
    """uint8 images (N, 3, H, W) as they come out of a JPEG file; "4:2:0": colour at half size."""
    received = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=subsampling)
        received.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(received)).permute(0, 3, 1, 2).to(images.device)


def matched(images: Tensor, candidates: Tensor) -> float:
    """Percent of uint8 images (N, 3, H, W) whose nearest candidate is the one at the same index.

    Where n candidates are equally near and that one is among them, the image counts 1 / n.
    """
    x = to_float(images).flatten(1)
    y = to_float(candidates).flatten(1)
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")  # equal for equals
    nearest = distances == distances.amin(1, keepdim=True)
    shares = nearest.diagonal().double() / nearest.sum(1)
    return 100 * shares.mean().item()


def another_view(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W), mirrored, shifted by two pixels and 10% brighter."""
    h, w = images.shape[2:]
    views = []
    for [batch] in scoring_batches(images):
        x = to_float(batch).flip(3)
        x = F.pad(x, (2, 0, 2, 0), mode="replicate")[:, :, :h, :w]  # two to the right, two down
        x = (1.1 * x).clamp(0, 1)
        views.append((255 * x).round().to(torch.uint8))
    return torch.cat(views)


def linked(generator: nn.Module, images: Tensor, labels: Tensor) -> dict:
    """How many of uint8 images (N, 3, H, W) are found among their protected ones, in percent.

    Somebody has the generator and "another_view" of each image: he protects his view and takes the
    nearest of the N protected images for its own. "known_candidate_match": he has the image itself,
    and guesses among all protected images that equal its own. "class_alone": he only knows its
    class, and guesses among the images of that class.
    """
    protected = protect(generator, images)
    view = protect(generator, another_view(images))
    return {
        "another_view": matched(view, protected),
        "known_candidate_match": 100 * len(protected.unique(dim=0)) / len(protected),
        "class_alone": 100 * len(labels.unique()) / len(labels),
    }


def evaluate_generator(generator: nn.Module, target_name: str, aux_name: str, classifiers: dict,
                       clean: dict, images: Tensor, labels: Tensor) -> tuple[dict, Tensor]:
    """All scores of one generator on uint8 images (N, 3, H, W), and the protected images.

    `classifiers` and `clean`, their accuracies on the originals, go by name.
    """
    protected = protect(generator, images)
    target = classifiers[target_name]
    result = score(images, protected, target, classifiers.get(aux_name), labels)
    del result["loss"]  # each form is trained with a loss of its own
    result["target"] = target_name
    result["aux"] = aux_name
    result["clean_target_accuracy"] = clean[target_name]
    result["drop"] = clean[target_name] - result["target_accuracy"]
    result["correlation"] = brightness_correlation(images, protected)
    result["correlation_4x4"] = brightness_correlation(images, protected, 4)
    result["jpeg"] = {}
    for subsampling in ("4:4:4", "4:2:0"):
        received = jpeg(protected, subsampling)
        result["jpeg"][subsampling] = accuracy(target, received, labels)
    result["unseen"] = {}  # classifiers that the generator never met
    for name, classifier in classifiers.items():
        if name not in (target_name, aux_name):
            result["unseen"][name] = accuracy(classifier, protected, labels)
    result["linked"] = linked(generator, images[:1000], labels[:1000])
    return result, protected


# --- The reconstruction attack --------------------------------------------------------------------
def score_recovered(recovered: Tensor, originals: Tensor, target: nn.Module,
                    labels: Tensor) -> dict:
    """How much of the originals an attacker got back, both uint8 (N, 3, H, W); SSIM signed."""
    similarities = []
    for x, y in scoring_batches(originals, recovered):
        similarities.append(ssim(to_float(x), to_float(y)))
    return {
        "ssim": torch.cat(similarities).mean().item(),
        "psnr": psnr(originals, recovered),
        "re_identified": matched(recovered, originals),
        "target_accuracy": accuracy(target, recovered, labels),
    }


def describe_recovered(scores: dict) -> str:
    return (f"SSIM {scores['ssim']:.3f}, PSNR {scores['psnr']:.1f} dB, "
            f"re-identified {scores['re_identified']:.1f}%")


class Attacker(nn.Module):
    """Protected images (N, 3, H, W) in [0, 1], H and W >= 16, to guesses at the originals."""

    def __init__(self):
        super().__init__()
        self.unet = UNet()

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2], x.shape[3]
        x = self.unet(pad_to_16(x))  # not normalised: it learns that
        return x[:, :, :h, :w].sigmoid()


def reconstruction_attack(generator: nn.Module, target: nn.Module, data: dict, path: str, *,
                          epochs: int = 5, batch_size: int = 128, lr: float = 0.002,
                          device: str | torch.device = "cpu", seed: int = 0,
                          classes: Sequence[str] = ()) -> dict:
    """Train a U-Net to undo a generator, as anyone can who has it (it ships in the app).

    The attacker has images of the same kind: it gets the protected training images, flipped too,
    in 8 bits, and learns to return the originals (squared error and 1 - SSIM, AdamW). Scores are of
    the first 1,000 test images, after each epoch: SSIM (signed), PSNR, and how many are
    re-identified, nearest to their own original (chance: 0.1% of 1,000). "class_mean" is what the
    class alone gives away. Writes path.json and path.png, where `classes` are the names of the
    labels, and returns what is in the former. Raises UserError where these cannot be written, and
    as check_data and check_classes do.
    """
    check_data(data, ["train", "test"], epochs)
    check_classes(data, ["test"])
    check_writable(f"{path}.json")
    device = str(device)
    images, labels = data["train"]
    test_images = data["test"][0][:1000]
    test_labels = data["test"][1][:1000]
    sent = protect(generator, test_images)
    precision = choose_precision(device, "bf16")
    n = len(images)
    print(f"{path}: protecting {n:,} training images and their mirror images", flush=True)
    originals = torch.cat([images, images.flip(3)])
    protected = protect(generator, originals)
    count = int(labels.max()) + 1
    class_means = [images[labels == label].float().mean(0) for label in range(count)]
    guesses = torch.stack(class_means).round().to(torch.uint8)[test_labels]
    results = {
        "protected": score_recovered(sent, test_images, target, test_labels),
        "class_mean": score_recovered(guesses, test_images, target, test_labels),
        "images": len(test_images),
        "training_images": n,
        "precision": precision,
        "seed": seed,
        "hardware": hardware(device),
        "epochs": [],
    }

    torch.manual_seed(seed)
    attacker = Attacker()
    attacker.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(attacker.parameters(), lr=lr, fused=True)
    batch_size = min(batch_size, n)
    steps_per_epoch = n // batch_size
    steps = epochs * steps_per_epoch
    print(f"{path}: {epochs} epochs of {steps_per_epoch} steps; the mean image of the right class "
          f"has {describe_recovered(results['class_mean'])}", flush=True)
    for epoch in range(1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)
        attacker.train()
        start = time.monotonic()
        order = torch.randperm(n, device=device)
        for i in range(steps_per_epoch):
            step = (epoch - 1) * steps_per_epoch + i
            batch = order[i * batch_size:(i + 1) * batch_size]
            flipped = torch.randint(0, 2, batch.shape, device=device)
            batch = batch + n * flipped
            original = to_float(originals[batch])
            with autocast(device, precision):
                recovered = attacker(to_float(protected[batch]))
            recovered = recovered.float()
            error = F.mse_loss(recovered, original)
            similarity = ssim(original, recovered).mean()
            loss = 10 * error + 1 - similarity
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i % 50 == 49:
                print_progress(path, epoch, epochs, start, i + 1, steps_per_epoch, batch_size)

        recovered = protect(attacker.eval(), sent)  # runs any image network, 8 bits in and out
        scores = score_recovered(recovered, test_images, target, test_labels)
        results["epochs"].append(scores)
        save(f"{path}.json", json.dumps(results, indent=1).encode())
        print(f"{path}  epoch {epoch}/{epochs}  {describe_recovered(scores)}", flush=True)
    rows = [(f"a U-Net recovers, after {epochs} epochs: {describe_recovered(scores)}", []),
            (f"the mean image of the right class: {describe_recovered(results['class_mean'])}", [])]
    batches = {"original": test_images[:10], "protected": sent[:10], "recovered": recovered[:10]}
    rows += image_rows(batches, test_labels[:10], {"target": target}, classes)
    draw_sheet(f"{path}.png", rows)
    return results


# --- Table 2 (Section 4.2.2) ----------------------------------------------------------------------
def summarise(entries: list[dict]) -> dict:
    """What Section 4.2.2 says about several generators, entries of results.json.

    "table_2": min, median, max over the auxiliary models and the accuracy without one, by target;
    None for what was not trained. "pairs" and how many of them lose under 5 points.
    """
    table_2 = {}
    for target in CLASSIFIERS:
        by_aux = {e["aux"]: e["target_accuracy"] for e in entries if e["target"] == target}
        if by_aux:
            none = by_aux.pop("none", None)
            row = {"pairs": len(by_aux), "min": None, "median": None, "max": None, "none": none}
            if by_aux:
                row["min"] = min(by_aux.values())
                row["median"] = statistics.median(by_aux.values())
                row["max"] = max(by_aux.values())
            table_2[target] = row
    drops = [entry["drop"] for entry in entries if entry["aux"] != "none"]
    under_5 = sum(drop < 5 for drop in drops)
    return {"table_2": table_2, "pairs": len(drops), "pairs_under_5_points": under_5}


def number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}"


def print_scores(result: dict) -> None:
    """One generator's entry of results.json, for people."""
    pixels = result["correlation"]
    blocks = result["correlation_4x4"]
    jpeg_accuracy = result["jpeg"]
    links = result["linked"]
    print(f"  target {result['target_accuracy']:.2f}%, {result['drop']:.2f} lost; "
          f"auxiliary {number(result['aux_accuracy'])}%")
    print(f"  target, after JPEG of quality 75: 4:4:4 {jpeg_accuracy['4:4:4']:.2f}%, "
          f"4:2:0 {jpeg_accuracy['4:2:0']:.2f}%")
    for other, value in result["unseen"].items():
        print(f"  {other}, which it never met: {value:.2f}%")
    print(f"  |SSIM| {result['ssim']:.4f}, at most {result['ssim_largest']:.3f}")
    print("  correlation of brightness with its own original / another's: "
          f"{pixels['own']:.3f} / {pixels['other']:.3f}; "
          f"over 4 x 4 blocks {blocks['own']:.3f} / {blocks['other']:.3f}")
    print(f"  linked by another view {links['another_view']:.1f}%, by the image itself "
          f"{links['known_candidate_match']:.1f}%; the class alone {links['class_alone']:.1f}%",
          flush=True)


def print_table_2(form: str, summary: dict) -> None:
    print(f"\nTable 2, form {form}: target accuracy (%), ours / the paper's")
    print(f"{'target':14}{'pairs':9}{'min':17}{'median':17}{'max':17}no auxiliary")
    for target, row in summary["table_2"].items():
        cells = []
        for key, printed in zip(("min", "median", "max", "none"), TABLE_2[target]):
            cells.append(f"{number(row[key])} / {printed:.2f}".ljust(17))
        print(f"{target:14}{row['pairs']} / 7    {''.join(cells).rstrip()}")
    print(f"{summary['pairs_under_5_points']} of {summary['pairs']} pairs lose under 5 points "
          "(the paper: 38 of 56)")


# --- Figures 7 to 11 ------------------------------------------------------------------------------
BLACK = (0, 0, 0)
WHITE = (255, 255, 255)
GREEN = (0, 110, 40)
RED = (190, 20, 20)
PALE = (226, 236, 248)  # the ends of a heat map
DARK = (16, 60, 120)
CELL = 102  # pixels: the width of a cell, and the height of one that holds an image
LINE = 28  # the height of text
LABEL = 170  # the width of the first column


def draw_sheet(path: str, rows: list[tuple[str, list]]) -> None:
    """Write a PNG of rows of (label, cells), a title being a label without cells.

    A cell is a uint8 image (3, H, W), squeezed to 96 x 96, or (text, colour, background).
    """
    font = ImageFont.load_default(16)
    heights = []
    widths = []
    for label, cells in rows:
        holds_images = len(cells) > 0 and isinstance(cells[0], Tensor)
        heights.append(CELL if holds_images else LINE)
        widths.append(max(LABEL + CELL * len(cells), 20 + int(font.getlength(label))))
    sheet = Image.new("RGB", (max(widths), 20 + sum(heights)), WHITE)
    draw = ImageDraw.Draw(sheet)
    y = 10
    for (label, cells), height in zip(rows, heights):
        draw.text((10, y + height / 2), label, BLACK, font, anchor="lm")
        x = LABEL
        for cell in cells:
            if isinstance(cell, Tensor):
                image = Image.fromarray(cell.permute(1, 2, 0).cpu().numpy())
                sheet.paste(image.resize((96, 96), Image.Resampling.NEAREST), (x, y))
            else:
                text, colour, background = cell
                draw.rectangle((x, y, x + CELL - 6, y + LINE - 3), background)
                draw.text((x + 48, y + LINE / 2), text, colour, font, anchor="mm")
            x += CELL
        y += height
    file = io.BytesIO()
    sheet.save(file, "PNG")
    save(path, file.getvalue())


@torch.no_grad()
def image_rows(batches: dict[str, Tensor], labels: Tensor, classifiers: dict[str, nn.Module],
               classes: Sequence[str] = CLASSES) -> list:
    """Rows of a sheet: the classes, batches of uint8 images, and what is seen in the last one.

    Batches and classifiers go by the words that stand before their row. A label without a name in
    `classes` stands for itself.
    """
    names = dict(enumerate(classes))
    rows = [("", [(names.get(label, str(label)), BLACK, WHITE) for label in labels.tolist()])]
    for name, images in batches.items():
        rows.append((name, list(images)))
    last = to_float(list(batches.values())[-1])
    for name, classifier in classifiers.items():
        predictions = classifier(last).argmax(1)
        cells = []
        for prediction, label in zip(predictions.tolist(), labels.tolist()):
            colour = GREEN if prediction == label else RED
            cells.append((names.get(prediction, str(prediction)), colour, WHITE))
        rows.append((f"{name} sees", cells))
    return rows


def first_of_class(labels: Tensor) -> list[int]:
    """The place of the first image of each class."""
    return [(labels == i).int().argmax().item() for i in range(len(CLASSES))]


def draw_examples(out: str, name: str, result: dict, images: Tensor, protected: Tensor,
                  labels: Tensor, classifiers: dict) -> None:
    """OUT/generator-NAME.png, an image of each class, and OUT/worst-NAME.png, the least hidden."""
    hidden = f"{name}: |SSIM| {result['ssim']:.3f}, at most {result['ssim_largest']:.3f}"
    recognised = (f"target {result['target_accuracy']:.2f}%, of the originals "
                  f"{result['clean_target_accuracy']:.2f}%; "
                  f"auxiliary {number(result['aux_accuracy'])}%")
    networks = {"target": classifiers[result["target"]]}
    if result["aux"] != "none":
        networks["auxiliary"] = classifiers[result["aux"]]
    for kind, chosen in (("generator", first_of_class(labels)), ("worst", result["worst"])):
        batches = {"original": images[chosen], "protected": protected[chosen]}
        rows = image_rows(batches, labels[chosen], networks)
        draw_sheet(f"{out}/{kind}-{name}.png", [(hidden, []), (recognised, []), *rows])


def draw_figure_9(path: str, entries: list[dict], originals: Tensor,
                  protected: dict[tuple, Tensor]) -> None:
    """Figure 9: a few images without an auxiliary model, left, and with the best one, right.

    The best has the lowest mean |SSIM|, as in the paper. `protected` holds, by target and auxiliary
    model, what becomes of the `originals`. A target that was not trained both ways is left out; if
    all are, nothing is drawn.
    """
    gap = ("", BLACK, WHITE)
    rows = []
    for target in CLASSIFIERS:
        by_aux = {e["aux"]: e for e in entries if e["target"] == target}
        none = by_aux.pop("none", None)
        if none is None or not by_aux:
            continue
        best = min(by_aux.values(), key=itemgetter("ssim"))
        aux = best["aux"]
        title = (f"{target}. Left, no auxiliary model: target {none['target_accuracy']:.1f}%, "
                 f"|SSIM| {none['ssim']:.3f}. Right, {aux}: target {best['target_accuracy']:.1f}%, "
                 f"auxiliary {best['aux_accuracy']:.1f}%, |SSIM| {best['ssim']:.3f}")
        rows.append((title, []))
        rows.append(("protected", [*protected[target, "none"], gap, *protected[target, aux]]))
    if rows:
        draw_sheet(path, [("original", [*originals, gap, *originals]), *rows])


def heatmap_rows(entries: list[dict], key: str, digits: int, average: str) -> list:
    """Rows of a sheet: targets down, auxiliary models across, dark is high among the pairs.

    "none" is beside them, not in the scale; the paper's Figure 7 has the originals there. The last
    row, labelled `average`, holds the mean over the targets.
    """
    values = {}
    for entry in entries:
        if entry[key] is not None:
            values[entry["target"], entry["aux"]] = entry[key]
    targets = [name for name in CLASSIFIERS if any(name == target for target, _ in values)]
    auxes = [name for name in (*CLASSIFIERS, "none") if any(name == aux for _, aux in values)]
    for aux in auxes:
        column = [values[target, aux] for target in targets if (target, aux) in values]
        values[average, aux] = statistics.mean(column)
    paired = [value for (_, aux), value in values.items() if aux != "none"]
    low = min(paired, default=0)
    high = max(paired, default=0)
    rows = [("target \\ auxiliary", [(aux, BLACK, WHITE) for aux in auxes])]
    for target in [*targets, average]:
        cells = []
        for aux in auxes:
            if (target, aux) not in values:
                cells.append(("", BLACK, WHITE))
                continue
            value = values[target, aux]
            share = (value - low) / max(high - low, 1e-9)
            share = min(max(share, 0), 1)
            fill = tuple(round(a + share * (b - a)) for a, b in zip(PALE, DARK))
            cells.append((number(value, digits), WHITE if share > 0.6 else BLACK, fill))
        rows.append((target, cells))
    return rows


def draw_heatmaps(path: str, entries: list[dict]) -> None:
    """The bars of Figures 7 and 8 as heat maps, their averages, Figures 10 and 11, below."""
    rows = [("Figure 7(a): target accuracy (%) on protected images. High is good.", [])]
    rows += heatmap_rows(entries, "target_accuracy", 1, "average, Figure 10")
    rows += [("", []), ("Figure 7(b): auxiliary accuracy (%). Low is good, 10 is guessing.", [])]
    rows += heatmap_rows(entries, "aux_accuracy", 1, "average")
    rows += [("", []), ("Figure 8: mean |SSIM|. Low is good, 1 is the same image.", [])]
    rows += heatmap_rows(entries, "ssim", 3, "average, Figure 11")
    draw_sheet(path, rows)


# --- Overhead (Section 4.3, Table 3) --------------------------------------------------------------
@torch.no_grad()
def milliseconds(network: nn.Module, batch_size: int, device: str, h: int = 32,
                 w: int = 32) -> float:
    """ms an image of h x w: the median of a second of runs, after three that warm up."""
    x = torch.rand(batch_size, 3, h, w, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    seconds = []
    while len(seconds) < 6 or sum(seconds[3:]) < 1:
        start = time.perf_counter()
        network(x)
        if device != "cpu":
            torch.cuda.synchronize(device)  # a GPU works on after the call
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[3:]) / batch_size


def time_networks(device: str) -> dict:
    """Table 3, in float32; the networks are untrained, since weights do not change the time."""
    column = 0 if device == "cpu" else 1
    machine = ("16-core CPU", "RTX A6000")[column]
    print(f"\nTable 3: ms an image, float32, {hardware(device)}")
    print(f"{'network':14}{'parameters':>12}{'batch 256':>12}{'batch 1':>12}"
          f"   the paper's {machine}")
    table = {}
    for name, printed in TABLE_3.items():
        network = Generator() if name == "generator" else build_classifier(name)
        network.eval().to(device, memory_format=torch.channels_last)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        in_batches = milliseconds(network, 256, device)
        alone = milliseconds(network, 1, device)
        table[name] = {"parameters": parameters, "ms_batch_256": in_batches, "ms_batch_1": alone}
        print(f"{name:14}{parameters:12,}{in_batches:12.3f}{alone:12.3f}   {printed[column]:.3f}",
              flush=True)
    return table


# --- Images of your own ---------------------------------------------------------------------------
def open_image(path: str, size: Sequence[int]) -> Tensor:
    """An image file, upright, on white, squeezed to `size`, (H, W): uint8 (3, H, W).

    A generator hides at the size that it was trained for, so an image is shrunk before it is
    protected. Raises UserError where it cannot be read.
    """
    h, w = size
    try:
        with Image.open(path) as image:
            image.draft("RGB", (4 * w, 4 * h))  # a large JPEG is decoded small
            image.load()
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow raises nearly every kind
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path} has no 8 bits a channel: save it with 8")
    image = image.convert("RGBA").resize((w, h))
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@torch.no_grad()
def protect_images(paths: list[str], generator: Generator, size: Sequence[int],
                   target: nn.Module | None, out: str) -> None:
    """Write OUT/NAME-protected.png for each image, and OUT/NAME-sheet.png to look at.

    size is the (H, W) that the generator was trained for; target, if it is one of Table 1's, says
    what it sees. Raises UserError at the end if images could not be read.
    """
    failed = 0
    for name, path in name_files(paths).items():
        try:
            original = open_image(path, size)[None]
        except UserError as error:  # the others are protected
            print(f"error: {error}", flush=True)
            failed += 1
            continue
        protected = protect(generator, original)
        similarity = ssim(to_float(original), to_float(protected)).abs().item()
        title = f"|SSIM| {similarity:.3f}"
        if target is not None:
            before = CLASSES[target(to_float(original)).argmax()]
            after = CLASSES[target(to_float(protected)).argmax()]
            title = f"the target sees {before}, protected {after}; {title}"
        save(f"{out}/{name}-protected.png", encode_png(protected[0]))
        rows = [(title, []), ("original", list(original)), ("protected", list(protected))]
        draw_sheet(f"{out}/{name}-sheet.png", rows)
        print(f"{name}: {title}  -> {out}/{name}-protected.png, {out}/{name}-sheet.png")
    if failed:
        raise UserError(f"{failed} of {len(paths)} images could not be read, see above")


# --- The command ----------------------------------------------------------------------------------
def name_files(paths: list[str]) -> dict[str, str]:
    """Each path under a name for what comes of it; of two files of one name the second is "-2"."""
    files = {}
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0].removeprefix("generator-")
        name = stem
        count = 1
        while name in files:
            count += 1
            name = f"{stem}-{count}"
        files[name] = path
    return files


def find_generators() -> list[str]:
    """The generators on disk, hardened ones first; runs/ comes before weights/ for one name."""
    paths = {}
    for path in glob.glob("weights/generator-*.pt") + glob.glob("runs/generator-*.pt"):
        paths[os.path.basename(path)] = path
    if not paths:
        raise UserError("no generator in runs/ or weights/: run "
                        "python train.py --target vgg13_bn --aux resnet18")
    hardened = [paths[name] for name in sorted(paths) if "-hardened" in name]
    others = [paths[name] for name in sorted(paths) if "-hardened" not in name]
    return hardened + others


def open_generator(path: str) -> tuple[Generator, dict]:
    """load_generator, for one that train.py has trained. Raises UserError otherwise."""
    generator, meta = load_generator(path)
    if meta.get("target") not in CLASSIFIERS or meta.get("aux") not in (*CLASSIFIERS, "none"):
        raise UserError(f"{path} is for no classifier of Table 1: only --image and "
                        "export_mobile.py take it")
    return generator.to(memory_format=torch.channels_last), meta


def main() -> None:
    parser = argparse.ArgumentParser(description="Score generators: the paper's tables, figures.")
    parser.add_argument("--generator", nargs="+", metavar="FILE",
                        help="(default: all in runs/ and weights/; for --image a hardened one)")
    parser.add_argument("--out", default="runs/evaluation", metavar="FOLDER",
                        help="for the results (default: %(default)s)")
    parser.add_argument("--limit", type=positive_int,
                        help="score on the first LIMIT test images (the attack takes all)")
    parser.add_argument("--timing", action="store_true", help="also measure Table 3")
    parser.add_argument("--attack", nargs="?", type=positive_int, const=5, metavar="EPOCHS",
                        help="also train a U-Net to undo each generator, 5 epochs or EPOCHS")
    parser.add_argument("--image", nargs="+", metavar="FILE",
                        help="only protect these, squeezed to the size trained for")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.image and (args.timing or args.attack):
        parser.error("--image only protects images: run --timing and --attack without it")
    paths = args.generator or find_generators()
    if args.image:
        generator, meta = load_generator(paths[0])
        if meta.get("target") in CLASSIFIERS:
            name = meta["target"]
            target = load_classifier(name)
            h, w = 32, 32
        else:
            name = "your own"
            target = None
            h, w = meta["image_size"]
        print(f"{paths[0]}, target {name}, {h} x {w}")
        protect_images(args.image, generator, (h, w), target, args.out)
        return

    needed = set()
    for path in paths:  # what cannot be evaluated is said before the work
        _, meta = open_generator(path)
        needed.update([meta["target"], meta["aux"]])
    check_writable(f"{args.out}/results.json")
    data = load_cifar10(args.data, args.device)
    images = data["test"][0][:args.limit]
    labels = data["test"][1][:args.limit]
    classifiers = {}
    clean = {}
    for name in CLASSIFIERS:
        if name in needed or find_classifier(name):
            classifiers[name] = load_classifier(name, args.device)
            clean[name] = accuracy(classifiers[name], images, labels)
            print(f"{name}: {clean[name]:.2f}% of {len(images):,} original images", flush=True)
    results = {"images": len(images), "clean": clean, "hardware": hardware(args.device),
               "torch": torch.__version__, "generators": {}}
    if args.timing:
        results["timing"] = time_networks(args.device)
    entries = {form: [] for form in FORMS}  # no table or figure mixes forms
    few = first_of_class(labels)[::2]  # every second class is enough for Figure 9
    few_protected = {form: {} for form in FORMS}
    for i, (name, path) in enumerate(name_files(paths).items(), 1):
        generator, meta = open_generator(path)
        generator.to(args.device)
        target, aux, form = meta["target"], meta["aux"], meta["form"]
        print(f"\n{name}, form {form} ({i} of {len(paths)})", flush=True)
        result, protected = evaluate_generator(generator, target, aux, classifiers, clean, images,
                                               labels)
        result["file"] = path
        result["meta"] = meta
        results["generators"][name] = result
        if not meta.get("limit"):  # a quick look belongs into no table
            entries[form].append(result)
            few_protected[form][target, aux] = protected[few]
        results["summary"] = {}
        for of_form, scored in entries.items():
            if scored:
                results["summary"][of_form] = summarise(scored)
        save(f"{args.out}/results.json", json.dumps(results, indent=1).encode())
        draw_examples(args.out, name, result, images, protected, labels, classifiers)
        print_scores(result)
        for role in ("target", "aux"):
            if meta[role] == "none":
                continue
            weights = classifiers[meta[role]].state_dict().values()
            if meta[f"{role}_sha256"] != fingerprint(*weights):
                print(f"  note: it was trained with another {meta[role]}")
        if args.attack:
            reconstruction_attack(generator, classifiers[target], data,
                                  f"{args.out}/attack-{name}", epochs=args.attack,
                                  device=args.device, seed=args.seed, classes=CLASSES)
    for form, summary in results["summary"].items():
        print_table_2(form, summary)
        draw_heatmaps(f"{args.out}/heatmaps-{form}.png", entries[form])
        draw_figure_9(f"{args.out}/figure-9-{form}.png", entries[form], images[few],
                      few_protected[form])
    print(f"-> {args.out}/")


if __name__ == "__main__":
    run(main)
