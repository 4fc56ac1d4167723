"""The tables and figures of Section 4, and what the paper leaves out.

    python evaluate.py                  every generator in runs/ and weights/
    python evaluate.py --timing         and Table 3: what the generator and the classifiers cost
    python evaluate.py --attack         and what a machine reads back from protected images
    python evaluate.py --image cat.jpg  protect images of your own
"""

import argparse
import glob
import hashlib
import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from operator import itemgetter

import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from classifiers import (CLASSIFIERS, FOLDERS, UserError, accuracy, add_common_arguments, answers,
                         build_classifier, check_data, check_writable, find_classifier,
                         fingerprint, hardware, load_cifar10, load_classifier, network_fingerprint,
                         percent, positive_int, run, save, scoring_batches, to_float)
from ssim import ssim
from train import (AUXILIARY_MODELS, FORMS, VISIBLE, describe_visibility, load_generator, protect,
                   score, standardize)
from unet import Generator

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
def jpeg(images: Tensor) -> Tensor:
    """Return uint8 images (N, 3, H, W) as a JPEG file gives them back, which halves the colour."""
    received = []
    for image in images.cpu():
        file = io.BytesIO()
        to_pil_image(image).save(file, "JPEG", quality=75, subsampling="4:2:0")
        received.append(pil_to_tensor(Image.open(file)))
    return torch.stack(received).to(images.device)


def networks_of(meta: dict) -> dict[str, str]:
    """Return the names of the networks that a generator was trained with, by their roles."""
    names = {"target": meta["target"], "aux": meta["aux"], "encoder": "encoder"}
    return {role: name for role, name in names.items() if meta[f"{role}_sha256"] != "none"}


def answers_of_two_looks(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the class that the encoder sees in uint8 images (N, 3, H, W) by two looks: int64 (N,).

    The logits are linear in the encoder's features, so the sum of both logits has the same largest
    class as the logits of the mean bottleneck (see UNet).
    """
    def two_looks(x: Tensor) -> Tensor:
        return encoder(x) + encoder(x.flip(3))

    return answers(two_looks, images)


def evaluate_generator(generator: nn.Module, meta: dict, classifiers: dict, clean_answers: dict,
                       images: Tensor, labels: Tensor) -> tuple[dict, Tensor]:
    """Return all scores of one generator on uint8 images (N, 3, H, W), and the protected images.

    `meta` is that of its file. `classifiers` and `clean_answers` are dicts by name; the latter
    holds what target and encoder answer to the original images. "kept" is the share of protected
    images that the target answers as it answers their originals, in percent. "repeats" is the share
    that it answers as the encoder answers the originals by two looks; it is None if the generator
    does not look twice. --attack adds "read_back" and "linked".
    """
    protected = protect(generator, images)
    target = classifiers[meta["target"]]
    aux = classifiers.get(meta["aux"])
    result = score(images, protected, target, aux, labels)
    result["target"] = meta["target"]
    result["aux"] = meta["aux"]
    result["clean_target_accuracy"] = percent(clean_answers[meta["target"]] == labels)  # Eq. (5)
    result["own_less_other"] = result["visibility"]["own"] - result["visibility"]["other"]
    result["jpeg"] = accuracy(target, jpeg(protected), labels)
    target_answers = answers(target, protected)
    result["kept"] = percent(target_answers == clean_answers[meta["target"]])
    result |= {"repeats": None, "read_back": None, "linked": None}
    if meta["look_twice"]:
        result["repeats"] = percent(target_answers == clean_answers["encoder"])
    return result, protected


# --- What a machine reads -------------------------------------------------------------------------
def correlations(images: Tensor, candidates: Tensor) -> Tensor:
    """Return how images (N, C, H, W) correlate with candidates (M, C, H, W): float64 (N, M).

    A change of an image's brightness or contrast does not change them.
    """
    x = standardize(images.flatten(1)[:, None])  # all pixels are one vector
    y = standardize(candidates.flatten(1)[:, None])
    return x[:, 0] @ y[:, 0].T


def share_found(similarity: Tensor) -> float:
    """Return how many images are found, in percent.

    similarity is float64 (N, M), N <= M. The own candidate of image i is candidate i. It is found
    if no other is more similar; if it is one of n that are equally similar, it counts 1 / n.
    """
    advantage = similarity - similarity.diagonal()[:, None]  # of each candidate over the own one
    beaten = (advantage > 1e-10).any(1)  # smaller differences are rounding errors
    equal = (advantage.abs() <= 1e-10).sum(1)
    shares = torch.where(beaten, 0.0, 1 / equal.double())
    return 100 * shares.mean().item()


def shrink(images: Tensor) -> Tensor:
    """Turn uint8 images (N, 3, H, W) into float32 in [0, 1], of 32 x 32 pixels at most."""
    h, w = images.shape[2:]
    small = []
    for [batch] in scoring_batches(images):
        small.append(F.adaptive_avg_pool2d(to_float(batch), (min(h, 32), min(w, 32))))
    return torch.cat(small)


def ridge_regression(sent: dict[str, Tensor], originals: dict[str, Tensor]) -> Tensor:
    """Read the originals of the "test" images back by ridge regression, a linear map of all pixels.

    Both dicts hold float images (N, 3, H, W) by split. The map fits "train" best, with a penalty on
    large weights; of seven penalties the one is taken that serves "validation" best. Nothing is
    random, and nothing has to converge. Returns (N, 3, H, W) in [0, 1].
    """
    x_mean = sent["train"].mean(0)
    y_mean = originals["train"].mean(0)
    x = {}
    y = {}
    for split in sent:
        x[split] = (sent[split] - x_mean).flatten(1).double()
        y[split] = (originals[split] - y_mean).flatten(1).double()
    covariance = x["train"].T @ x["train"]  # all three without the division by N
    cross_covariance = x["train"].T @ y["train"]
    variance = covariance.diagonal().mean() + 1e-9  # solvable, if all have become one picture
    identity = torch.eye(len(covariance)).to(covariance)
    best_error = torch.inf
    for share in (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 1):
        weights = torch.linalg.solve(covariance + share * variance * identity, cross_covariance)
        error = F.mse_loss(x["validation"] @ weights, y["validation"]).item()
        if error < best_error:
            best_error = error
            pixels = x["test"] @ weights
    recovered = y_mean + pixels.float().view_as(originals["test"])
    return recovered.clamp(0, 1)


@torch.no_grad()
def read_back(generator: nn.Module, data: dict, picture: str | None = None) -> dict:
    """Say what a linear map gets back from protected images, by ridge_regression.

    Anyone can do this who has the generator and images of the same kind. `generator` is any module
    that takes and returns images (N, 3, H, W) in [0, 1]; `data` is like load_cifar10's. The
    attacker protects the first 12,000 training images, and learns from them to read the first 1,000
    test images back. Images larger than 32 x 32, protected ones and originals, are shrunk to that.

    Returns "found", the percentage of images that correlate more with their own original than with
    any other, "class_alone", the same for the mean image of the right class, and "ssim", the mean
    SSIM (Eq. 3) with the originals. A linear map that finds no more than the class alone has learnt
    nothing else. It does not follow that nothing else is there: a network may read what it cannot,
    or what is finer than the 32 x 32 pixels. `picture` names a .png for ten images. Raises what
    check_data raises for these images.
    """
    few = {}
    originals = {}
    sent = {}
    for split, count in (("train", 12000), ("validation", 1000), ("test", 1000)):
        images, labels = data[split]
        few[split] = images[:count], labels[:count]
    check_data(few)
    for split, (images, _) in few.items():
        originals[split] = shrink(images)
        sent[split] = shrink(protect(generator, images))
    recovered = ridge_regression(sent, originals)
    class_mean = torch.empty_like(recovered)
    for label in few["test"][1].unique():
        mean = originals["train"][few["train"][1] == label].mean(0)
        class_mean[few["test"][1] == label] = mean
    found = share_found(correlations(recovered, originals["test"]))
    if picture is not None:
        rows = [(f"{found:.1f}% of the images are found by what is read back", [])]
        shown = {"original": originals["test"], "protected": sent["test"], "read back": recovered}
        for name, images in shown.items():
            rows.append((name, list((255 * images[:10]).round().byte())))
        draw_sheet(picture, rows)
    return {"found": found,
            "class_alone": share_found(correlations(class_mean, originals["test"])),
            "ssim": ssim(originals["test"], recovered).mean().item()}


def another_view(images: Tensor, mirrored: bool = True, down: int = 2, right: int = 2,
                 brightness: float = 1.1) -> Tensor:
    """Return a view of uint8 images (N, 3, H, W): mirrored or not, shifted, brighter or darker.

    They move down and to the right by -2 to 2 pixels; the border is repeated.
    """
    h, w = images.shape[2:]
    x = to_float(images)
    if mirrored:
        x = x.flip(3)
    x = F.pad(x, (2, 2, 2, 2), mode="replicate")
    x = x[:, :, 2 - down:2 - down + h, 2 - right:2 - right + w]
    x = (brightness * x).clamp(0, 1)
    return (255 * x).round().to(torch.uint8)


def linked(generator: nn.Module, images: Tensor, labels: Tensor, flip: bool = True) -> dict:
    """Say how many images are found among protected ones by "another_view" of each, in percent.

    The first 100 of uint8 images (N, 3, H, W) are sought among all N protected ones. Somebody has
    the generator and that view of each, and tries 36 views of it, of which one undoes the changes
    but for border and clipping: mirrored or not, shifted by -2, 0 or 2 pixels in each direction, as
    bright or darker. He protects them all, and takes the protected image that correlates most with
    any of them. `flip` says whether views are mirrored at all (18 views, if not): set it as in the
    training. "class_alone" is what he finds if he knows only the class, "different_pictures" how
    many of the N protected images differ. Larger images are compared at 32 x 32.
    """
    protected = protect(generator, images)
    candidates = shrink(protected)
    views = another_view(images[:100], mirrored=flip)
    mirrorings = (False, True) if flip else (False,)
    tries = itertools.product(mirrorings, (-2, 0, 2), (-2, 0, 2), (1, 1 / 1.1))
    similarities = []
    for mirrored, down, right, brightness in tries:
        attempt = protect(generator, another_view(views, mirrored, down, right, brightness))
        similarities.append(correlations(shrink(attempt), candidates))
    found = share_found(torch.stack(similarities).amax(0))
    of_class = (labels[:100, None] == labels).sum(1)
    return {"another_view": found, "class_alone": 100 * (1 / of_class).mean().item(),
            "different_pictures": len(protected.unique(dim=0))}


# --- The tables, as README.md and assets/results.md show them -------------------------------------
def by_form(generators: dict[str, dict]) -> dict[str, list[dict]]:
    """Sort entries of results.json by form, since no table or figure mixes forms.

    Of two generators for the same networks the last one counts.
    """
    forms = {}
    for form in FORMS:
        pairs = {}
        for result in generators.values():
            if result["meta"]["form"] == form:
                pairs[result["target"], result["aux"]] = result
        if pairs:
            forms[form] = list(pairs.values())
    return forms


def summarise(entries: list[dict]) -> dict:
    """Sum up the generators of one form, entries of results.json, as Section 4.2.2 does.

    "table_2" has, for each target, the min, median and max over the auxiliary models of Table 1,
    the accuracy with the encoder as auxiliary model, and without one, and "kept", the median share
    of answers kept; None stands for what was not trained. "pairs" counts the pairs of Table 1,
    "pairs_under_5_points" those of them that lose less than 5 points. "lost" and "lost_validation"
    are the points that all pairs lose, in ascending order: on the test images, and on the
    validation images, as the trainings measured them.
    """
    table_2 = {}
    for target in CLASSIFIERS:
        by_aux = {e["aux"]: e["target_accuracy"] for e in entries if e["target"] == target}
        kept = []
        for entry in entries:
            if entry["target"] == target and entry["aux"] in CLASSIFIERS:
                kept.append(entry["kept"])
        if by_aux:
            encoder = by_aux.pop("encoder", None)
            none = by_aux.pop("none", None)
            values = list(by_aux.values()) or [None]
            table_2[target] = {"pairs": len(by_aux), "min": min(values), "max": max(values),
                               "median": statistics.median(values), "encoder": encoder,
                               "none": none, "kept": statistics.median(kept or [None])}

    lost = []
    lost_validation = []
    for entry in entries:
        if entry["aux"] in CLASSIFIERS:
            lost.append(entry["clean_target_accuracy"] - entry["target_accuracy"])
            scores = entry["meta"]["validation"]
            lost_validation.append(scores["clean_target_accuracy"] - scores["target_accuracy"])
    under_5 = sum(points < 5 for points in lost)
    return {"table_2": table_2, "pairs": len(lost), "pairs_under_5_points": under_5,
            "lost": sorted(lost), "lost_validation": sorted(lost_validation)}


def number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}"


def heading(title: str, columns: str) -> str:
    """Return the first lines of a table in Markdown; `columns` are separated by |."""
    rule = " --- |" * (1 + columns.count("|"))
    return f"# {title}\n\n| {columns} |\n|{rule}\n"


def score_table(generators: dict[str, dict]) -> str:
    text = heading(
        "Scores", "form: target, auxiliary model | target (%): originals, protected "
        "| auxiliary (%) | seen by a person: own / another's | target after JPEG 4:2:0 (%) "
        "| read back by a machine (%)")
    for result in generators.values():
        meta = result["meta"]
        form = meta["form"]
        if meta["epochs"] > 1 or "stopped_after" in meta:
            form += f", epoch {meta['epoch']} of {meta['epochs']}"
        if "stopped_after" in meta:
            form += f", stopped after epoch {meta['stopped_after']}"
        visible = result["visibility"]
        recovered = result["read_back"] or {"found": None}
        text += (f"| {form}: {result['target']}, {result['aux']} "
                 f"| {result['clean_target_accuracy']:.2f}, {result['target_accuracy']:.2f} "
                 f"| {number(result['aux_accuracy'])} "
                 f"| {number(visible['own'], 3)} / {number(visible['other'], 3)} "
                 f"| {result['jpeg']:.2f} | {number(recovered['found'], 1)} |\n")
    return text


def table_2(form: str, summary: dict) -> str:
    text = heading(f"Table 2, form {form}: target accuracy (%), ours / the paper's",
                   "target | auxiliary models, of 7 | min | median | max | "
                   "no auxiliary model | ours: the encoder | answers kept (%, median)")
    for target, row in summary["table_2"].items():
        text += f"| {target} | {row['pairs']} "
        for key, printed in zip(("min", "median", "max", "none"), TABLE_2[target]):
            text += f"| {number(row[key])} / {printed:.2f} "
        text += f"| {number(row['encoder'])} | {number(row['kept'], 1)} |\n"
    text += (f"\n{summary['pairs_under_5_points']} of {summary['pairs']} pairs lose under 5 "
             "points (the paper: 38 of 56).\n")
    for key, images in (("lost", "test"), ("lost_validation", "validation")):
        if summary[key]:
            text += (f"On the {images} images the median pair loses "
                     f"{statistics.median(summary[key]):.2f} points, and the worst "
                     f"{summary[key][-1]:.2f}.\n")
    return text


def machine_table(generators: dict[str, dict]) -> str:
    text = heading("What a machine reads / what the class alone tells",
                   "generator | read back: found (%) | SSIM of what is read | linked (%) "
                   "| different pictures of 1,000")
    for name, result in generators.items():
        if result["read_back"] is not None:
            read = result["read_back"]
            links = result["linked"]
            text += (f"| {name} | {read['found']:.1f} / {read['class_alone']:.1f} "
                     f"| {read['ssim']:.3f} "
                     f"| {links['another_view']:.1f} / {links['class_alone']:.1f} "
                     f"| {links['different_pictures']} |\n")
    return text


def table_3(timing: dict) -> str:
    text = heading(f"Table 3, {timing['hardware']}: ms an image, float32, batches of 256",
                   f"network | parameters | ours | {timing['paper']}")
    for name, row in timing["networks"].items():
        text += f"| {name} | {row['parameters']:,} | {row['ms']:.3f} | {row['ms_paper']:.3f} |\n"
    return text


def tables(results: dict) -> str:
    """Return the text of tables.md, from the content of results.json."""
    generators = results["generators"]
    texts = [score_table(generators)]
    for form, entries in by_form(generators).items():
        texts.append(table_2(form, summarise(entries)))
    if any(result["read_back"] is not None for result in generators.values()):
        texts.append(machine_table(generators))
    if "timing" in results:
        texts.append(table_3(results["timing"]))
    return "\n".join(texts)


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


def encode_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def draw_sheet(path: str, rows: list[tuple[str, list]]) -> None:
    """Write a PNG of rows of (label, cells); a row without cells is a title.

    A cell is a uint8 image (3, H, W), resized to 96 x 96, or (text, colour, background).
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
                image = to_pil_image(cell).resize((96, 96), Image.Resampling.NEAREST)
                sheet.paste(image, (x, y))
            else:
                text, colour, background = cell
                draw.rectangle((x, y, x + CELL - 6, y + LINE - 3), background)
                draw.text((x + 48, y + LINE / 2), text, colour, font, anchor="mm")
            x += CELL
        y += height
    save(path, encode_png(sheet))


def image_rows(batches: dict[str, Tensor], labels: Tensor,
               classifiers: dict[str, nn.Module]) -> list:
    """Return rows of a sheet: the classes, batches of uint8 images, and what is seen in the last.

    The keys of batches and classifiers are the words before their rows.
    """
    rows = [("", [(CLASSES[label], BLACK, WHITE) for label in labels.tolist()])]
    for name, images in batches.items():
        rows.append((name, list(images)))
    last = list(batches.values())[-1]
    for name, classifier in classifiers.items():
        predictions = answers(classifier, last)
        cells = []
        for prediction, label in zip(predictions.tolist(), labels.tolist()):
            colour = GREEN if prediction == label else RED
            cells.append((CLASSES[prediction], colour, WHITE))
        rows.append((f"{name} sees", cells))
    return rows


def first_of_class(labels: Tensor) -> list[int]:
    """Return the index of the first image of each class."""
    return [(labels == i).int().argmax().item() for i in range(len(CLASSES))]


def describe_accuracies(result: dict) -> str:
    return (f"target {result['target_accuracy']:.2f}%, of the originals "
            f"{result['clean_target_accuracy']:.2f}%; auxiliary {number(result['aux_accuracy'])}%")


def draw_examples(out: str, name: str, result: dict, images: Tensor, protected: Tensor,
                  labels: Tensor, classifiers: dict) -> None:
    """Draw OUT/generator-NAME.png, an image a class, and OUT/worst-NAME.png, the least hidden."""
    shown = f"{name}: {describe_visibility(result['visibility'])}"
    networks = {"target": classifiers[result["target"]]}
    if result["aux"] != "none":
        networks["auxiliary"] = classifiers[result["aux"]]
    for kind, chosen in (("generator", first_of_class(labels)), ("worst", result["worst"])):
        batches = {"original": images[chosen], "protected": protected[chosen]}
        rows = [(shown, []), (describe_accuracies(result), [])]
        rows += image_rows(batches, labels[chosen], networks)
        draw_sheet(f"{out}/{kind}-{name}.png", rows)


def draw_figure_9(path: str, entries: list[dict], originals: Tensor) -> None:
    """Draw Figure 9: a few images without an auxiliary model, left, and with the best one, right.

    The best of Table 1 has the lowest mean |SSIM|, as in the paper. A target is left out unless it
    was trained both ways.
    """
    gap = ("", BLACK, WHITE)
    rows = []
    for target in CLASSIFIERS:
        by_aux = {e["aux"]: e for e in entries if e["target"] == target}
        by_aux.pop("encoder", None)
        none = by_aux.pop("none", None)
        if none is None or not by_aux:
            continue
        best = min(by_aux.values(), key=itemgetter("ssim"))
        aux = best["aux"]
        title = (f"{target}. Left, no auxiliary model: target {none['target_accuracy']:.1f}%, "
                 f"|SSIM| {none['ssim']:.3f}. Right, {aux}: target {best['target_accuracy']:.1f}%, "
                 f"auxiliary {best['aux_accuracy']:.1f}%, |SSIM| {best['ssim']:.3f}")
        rows.append((title, []))
        generator, _ = load_generator(none["file"])
        left = protect(generator.to(originals.device), originals)
        generator, _ = load_generator(best["file"])
        right = protect(generator.to(originals.device), originals)
        rows.append(("protected", [*left, gap, *right]))
    if rows:
        draw_sheet(path, [("original", [*originals, gap, *originals]), *rows])


def heatmap_rows(entries: list[dict], key: str, digits: int, average: str) -> list:
    """Return rows of a sheet: targets go down, auxiliary models across, and dark is high.

    The column "none" does not set the scale. The last row, labelled `average`, holds the means over
    the targets.
    """
    values = {(e["target"], e["aux"]): e[key] for e in entries if e[key] is not None}
    targets = [name for name in CLASSIFIERS if any(name == target for target, _ in values)]
    auxes = [name for name in AUXILIARY_MODELS if any(name == aux for _, aux in values)]
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
    """Draw the bars of Figures 7 and 8 as heat maps, with the averages of Figures 10 and 11."""
    rows = [("Figure 7(a): target accuracy (%) on protected images. High is good.", [])]
    rows += heatmap_rows(entries, "target_accuracy", 1, "average, Figure 10")
    rows += [("", []), ("Figure 7(b): auxiliary accuracy (%). Low is good, 10 is guessing.", [])]
    rows += heatmap_rows(entries, "aux_accuracy", 1, "average")
    rows += [("", []), ("Figure 8: mean |SSIM|. Low is good, 1 is the same image.", [])]
    rows += heatmap_rows(entries, "ssim", 3, "average, Figure 11")
    rows += [("", []), (f"Ours: visibility, own less another's. Over {VISIBLE} images show.", [])]
    rows += heatmap_rows(entries, "own_less_other", 3, "average")
    draw_sheet(path, rows)


# --- Overhead (Section 4.3, Table 3) --------------------------------------------------------------
@torch.no_grad()
def milliseconds(network: nn.Module, batch_size: int, device: str, h: int = 32,
                 w: int = 32) -> float:
    """Return ms an image of h x w: the median of a second of runs, after three to warm up."""
    x = torch.rand(batch_size, 3, h, w, device=device)
    seconds = []
    while len(seconds) < 6 or sum(seconds[3:]) < 1:
        start = time.perf_counter()
        network(x)
        if device != "cpu":
            torch.cuda.synchronize(device)  # a GPU works on after the call
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[3:]) / batch_size


def time_networks(device: str) -> dict:
    """Measure Table 3 in float32. Untrained networks will do, since weights do not change the time.

    The generator is the paper's, which looks once; our forms run its encoder twice. The authors'
    clock does not wait for the GPU, so their GPU column is another quantity.
    """
    column = 0 if device == "cpu" else 1
    machine = ("the paper's 16-core CPU", "the paper's RTX A6000")[column]
    networks = {}
    for name, printed in TABLE_3.items():
        network = Generator() if name == "generator" else build_classifier(name)
        network.eval().to(device, memory_format=torch.channels_last)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        ms = milliseconds(network, 256, device)
        networks[name] = {"parameters": parameters, "ms": ms, "ms_paper": printed[column]}
        print(f"{name}: {ms:.3f} ms an image", flush=True)
    return {"hardware": hardware(device), "paper": machine, "networks": networks}


# --- Images of your own ---------------------------------------------------------------------------
def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF block says; if that cannot be read, leave it as it lies."""
    try:
        image.getexif()  # Pillow keeps what it has read
        image.info.pop("exif", None)  # exif_transpose would write it anew: a damaged tag stops it
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises nearly every kind
        return image


def open_image(path: str, size: Sequence[int]) -> Tensor:
    """Read an image file, turn it upright, put it on white, and squeeze it to `size`, (H, W).

    Returns uint8 (3, H, W). A generator hides at the size that it was trained for, so an image is
    shrunk before it is protected. Raises UserError if it cannot be read.
    """
    h, w = size
    try:
        with Image.open(path) as image:
            image.draft("RGB", (4 * w, 4 * h))  # a large JPEG is decoded small
            image.load()
            image = turn_upright(image)
    except Exception as error:  # Pillow raises nearly every kind
        raise UserError(f"{path} cannot be read as an image ({error})") from error
    if image.mode.startswith(("I", "F")):
        raise UserError(f"{path} has no 8 bits a channel: save it with 8")
    image = image.convert("RGBA").resize((w, h))
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    return pil_to_tensor(image)


def load_folder(folder: str, size: Sequence[int]) -> tuple[dict, list[str]]:
    """Read a folder of images, FOLDER/CLASS/NAME: data like load_cifar10's, and the class names.

    Images of any format and size are squeezed to `size`, (H, W). Labels follow the alphabetical
    order of the classes. A tenth of the images is "test", another tenth "validation"; as long as
    the folder stays as it is, they are always the same. A file that open_image cannot read is
    named, and left out. Raises UserError if a class has no other.
    """
    files = torchvision.datasets.ImageFolder(folder, is_valid_file=os.path.lexists)  # any file
    images = []
    labels = []
    for path, label in files.samples:
        try:
            images.append(open_image(path, size))
        except UserError as error:  # the others are used
            print(f"left out: {error}", flush=True)
            continue
        labels.append(label)
    print(f"{folder}: {len(images)} images of {len(files.classes)} classes, "
          f"files left out: {len(files) - len(images)}")
    for label, name in enumerate(files.classes):
        if label not in labels:
            raise UserError(f"{folder}/{name} has no image that can be read")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = torch.stack(images)[order]
    labels = torch.tensor(labels)[order]
    tenth = len(images) // 10
    data = {"train": (images[2 * tenth:], labels[2 * tenth:]),
            "validation": (images[tenth:2 * tenth], labels[tenth:2 * tenth]),
            "test": (images[:tenth], labels[:tenth])}
    return data, files.classes


@torch.no_grad()
def protect_image(path: str, out: str, generator: Generator, size: Sequence[int],
                  target: nn.Module | None) -> None:
    """Write OUT-protected.png for an image, and OUT-sheet.png to look at.

    size is the (H, W) that the generator was trained for. With a target of Table 1 the sheet says
    what that sees. Raises UserError if the image cannot be read, OSError if it cannot be written.
    """
    original = open_image(path, size)[None]
    protected = protect(generator, original)
    title = "look: if you can tell what is on it, it is not hidden"
    if target is not None:
        before = CLASSES[answers(target, original)]
        after = CLASSES[answers(target, protected)]
        title = f"the target sees {before} in the original, {after} in the protected one; {title}"
    save(f"{out}-protected.png", encode_png(to_pil_image(protected[0])))
    rows = [(title, []), ("original", list(original)), ("protected", list(protected))]
    draw_sheet(f"{out}-sheet.png", rows)
    print(f"{path}: {title}  -> {out}-protected.png, {out}-sheet.png")


def protect_images(paths: list[str], generator_path: str, out: str) -> None:
    """Protect each image with one generator, into the folder `out`.

    Raises UserError at the end if images could not be read or written.
    """
    generator, meta = load_generator(generator_path)
    target = None
    if meta.get("target") in CLASSIFIERS:
        target = load_classifier(meta["target"])
    h, w = meta["image_size"]
    print(f"{generator_path}: images are squeezed to {h} x {w}")
    failed = 0
    for name, path in name_files(paths).items():
        try:
            protect_image(path, f"{out}/{name}", generator, (h, w), target)
        except (UserError, OSError) as error:  # the others are protected
            print(f"error: {error}", flush=True)
            failed += 1
    if failed:
        raise UserError(f"{failed} of {len(paths)} images failed, see above")


# --- The command ----------------------------------------------------------------------------------
def name_files(paths: Sequence[str]) -> dict[str, str]:
    """Return the paths by the names of their results. Raises UserError if two have one name."""
    names = {}
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0].removeprefix("generator-")
        for other in names:
            if name.lower() == other.lower():  # some disks take IMG for img
                raise UserError(f"{names[other]} and {path} have the same name: take one at a "
                                "time, each with a folder of its own (--out)")
        names[name] = path
    return names


def find_generators() -> list[str]:
    """List the generators in FOLDERS, hardened ones first; the first folder hides the others."""
    paths = {}
    for folder in reversed(FOLDERS):
        for path in glob.glob(f"{glob.escape(folder)}/generator-*.pt"):
            paths[os.path.basename(path)] = path
    if not paths:
        raise UserError("no generator in runs/ or weights/: run "
                        "python train.py --target vgg13_bn --aux resnet18")
    hardened = []
    others = []
    for _, path in sorted(paths.items()):
        _, meta = load_generator(path)
        if meta["form"] == "hardened":
            hardened.append(path)
        else:
            others.append(path)
    return hardened + others


def file_sha256(path: str | None) -> str | None:
    """Return the start of the SHA-256 of a file, None if it is not there."""
    if path is None or not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def still_true(result: dict) -> bool:
    """Say if an entry of results.json is of the generator and the networks that are here today."""
    if file_sha256(result["file"]) != result["file_sha256"]:
        return False
    networks = result["networks_sha256"]
    return all(file_sha256(find_classifier(name)) == networks[name] for name in networks)


def read_results(out: str, images_sha256: str) -> dict:
    """Return "generators" and "timing" of OUT/results.json, as far as they are still true.

    Results of other images, generators or networks go. The times of Table 3 stay: their title names
    the hardware.
    """
    results = {"generators": {}}
    if not os.path.exists(f"{out}/results.json"):
        return results
    with open(f"{out}/results.json") as file:
        before = json.load(file)
    if "timing" in before:
        results["timing"] = before["timing"]
    same_images = before["images_sha256"] == images_sha256
    for name, result in before["generators"].items():
        if same_images and still_true(result):
            results["generators"][name] = result
        else:
            print(f"{name}: earlier results dropped, since images, file or classifiers changed")
    return results


def write_results(out: str, results: dict) -> str:
    """Write OUT/results.json and OUT/tables.md, in the order of names, and return the tables."""
    generators = dict(sorted(results["generators"].items()))
    results = results | {"generators": generators}
    text = tables(results)
    save(f"{out}/results.json", json.dumps(results, indent=1).encode())
    save(f"{out}/tables.md", text.encode())
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score generators: the paper's tables, figures.")
    parser.add_argument("--generator", nargs="+", metavar="FILE",
                        help="to score, also the .checkpoint of a stopped training (default: all "
                             "in runs/ and weights/; --image takes the first, a hardened one)")
    parser.add_argument("--out", metavar="FOLDER",
                        help="for the results (default: runs/evaluation, with --limit N "
                             "runs/evaluation-N); earlier results that are still true stay")
    parser.add_argument("--limit", type=positive_int,
                        help="score on the first LIMIT test images (--attack takes 1,000)")
    parser.add_argument("--timing", action="store_true", help="also measure Table 3")
    parser.add_argument("--attack", action="store_true",
                        help="also read protected images back, and link them to other views")
    parser.add_argument("--image", nargs="+", metavar="FILE",
                        help="only protect these, squeezed to the size trained for")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.image and (args.timing or args.attack):
        parser.error("--image only protects images: run --timing and --attack without it")
    if args.out is None:
        args.out = "runs/evaluation"
        if args.limit is not None:
            args.out += f"-{args.limit}"
    return args


def main() -> None:
    args = parse_arguments()
    out = args.out
    paths = args.generator or find_generators()
    names = name_files(paths)
    if args.image:
        protect_images(args.image, paths[0], out)
        return

    needed = set()
    for path in paths:  # checked before the work
        _, meta = load_generator(path)
        if meta.get("target") not in CLASSIFIERS:
            raise UserError(f"{path} is for no classifier of Table 1: only --image and "
                            "export_mobile.py take it")
        needed.update(networks_of(meta).values())
    check_writable(f"{out}/results.json")
    data = load_cifar10(args.data, args.device)
    images = data["test"][0][:args.limit]
    labels = data["test"][1][:args.limit]
    classifiers = {}
    clean_answers = {}  # to the original images
    for name in sorted(needed):
        classifiers[name] = load_classifier(name, args.device)
        title = name
        if name == "encoder":
            clean_answers[name] = answers_of_two_looks(classifiers[name], images)
            title = "encoder, looking twice"
        else:
            clean_answers[name] = answers(classifiers[name], images)
        share = percent(clean_answers[name] == labels)
        print(f"{title}: {share:.2f}% of {len(images):,} original images", flush=True)
    images_sha256 = fingerprint(images, labels)
    results = read_results(out, images_sha256)
    results |= {"images": len(images), "images_sha256": images_sha256}
    scored = results["generators"]
    if args.timing:
        results["timing"] = time_networks(args.device)
        write_results(out, results)
    for name, path in names.items():
        print(f"\n{name}", flush=True)
        sha256 = file_sha256(path)
        generator, meta = load_generator(path)
        generator.to(args.device)
        result, protected = evaluate_generator(generator, meta, classifiers, clean_answers,
                                               images, labels)
        result |= {"file": path, "file_sha256": sha256, "meta": meta,
                   "hardware": hardware(args.device), "torch": torch.__version__}
        networks = networks_of(meta)
        result["networks_sha256"] = {}
        for network in networks.values():
            result["networks_sha256"][network] = file_sha256(find_classifier(network))
        draw_examples(out, name, result, images, protected, labels, classifiers)
        print(f"  {describe_accuracies(result)}; |SSIM| {result['ssim']:.4f}, "
              f"at most {result['ssim_largest']:.3f}; {describe_visibility(result['visibility'])}",
              flush=True)
        print(f"  the target answers {result['kept']:.1f}% of the protected images as it answers "
              "their originals")
        if result["repeats"] is not None:
            print(f"  the target repeats the encoder in {result['repeats']:.1f}% of its answers")
        for role, network in networks.items():
            if network_fingerprint(classifiers[network]) != meta[f"{role}_sha256"]:
                print(f"  note: it was trained with another {network}")
        if args.attack:
            print("  reading back and linking, one to two minutes", flush=True)
            result["read_back"] = read_back(generator, data, f"{out}/read-back-{name}.png")
            result["linked"] = linked(generator, data["test"][0][:1000], data["test"][1][:1000],
                                      meta["flip"])
            read = result["read_back"]
            links = result["linked"]
            print(f"  read back: {read['found']:.1f}% of the images found, by the class alone "
                  f"{read['class_alone']:.1f}%; linked {links['another_view']:.1f}%, by the class "
                  f"alone {links['class_alone']:.1f}%")
        elif name in scored and scored[name]["file_sha256"] == sha256:  # an earlier run's
            result["read_back"] = scored[name]["read_back"]
            result["linked"] = scored[name]["linked"]
        scored[name] = result
        text = write_results(out, results)
    print(f"\n{text}")
    few = first_of_class(labels)[::2]  # every second class is enough for Figure 9
    for form, of_form in by_form(scored).items():
        draw_heatmaps(f"{out}/heatmaps-{form}.png", of_form)
        draw_figure_9(f"{out}/figure-9-{form}.png", of_form, images[few])
    earlier = len(scored) - len(paths)
    print(f"-> {out}/ ({earlier} of the results are from earlier runs)")


if __name__ == "__main__":
    run(main)
