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

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from classifiers import (CLASSIFIERS, FOLDERS, UserError, accuracy, add_common_arguments, answers,
                         build_classifier, check_data, check_writable, find_classifier,
                         fingerprint, hardware, load_cifar10, load_classifier, network_fingerprint,
                         percent, positive_int, run, save, scoring_batches, to_float)
from ssim import ssim
from train import (AUXILIARY_MODELS, FORMS, VISIBLE, describe_visibility, encode_png,
                   load_generator, protect, score, standardize, visibility)
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
def jpeg(images: Tensor, subsampling: str) -> Tensor:
    """Return uint8 images (N, 3, H, W) as a JPEG file gives them back; 4:2:0 halves the colour."""
    received = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75, subsampling=subsampling)
        received.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(received)).permute(0, 3, 1, 2).to(images.device)


def repeats(service_answers: Tensor, target_answers: Tensor, encoder_answers: Tensor) -> dict:
    """Say whom the service repeats, where the generator starts from an encoder.

    service_answers (N,) are the target's to the protected images; the others are those of target
    and encoder to the originals. "encoder" is the percentage of service_answers that are the
    encoder's. "disagree" is the number of images on which target and encoder disagree. Of these,
    "then_encoder" and "then_target" are the percentages on which the service follows either.
    """
    as_encoder = service_answers == encoder_answers
    as_target = service_answers == target_answers
    disputed = target_answers != encoder_answers
    result = {"encoder": percent(as_encoder), "disagree": disputed.sum().item(),
              "then_encoder": None, "then_target": None}
    if disputed.any():
        result["then_encoder"] = percent(as_encoder[disputed])
        result["then_target"] = percent(as_target[disputed])
    return result


def evaluate_generator(generator: nn.Module, meta: dict, classifiers: dict, seen: dict,
                       images: Tensor, labels: Tensor) -> tuple[dict, Tensor]:
    """Return all scores of one generator on uint8 images (N, 3, H, W), and the protected images.

    `meta` is that of its file. `classifiers` and `seen` are dicts by name; seen holds the target's
    answers to the original images and, if the form starts from it, those of the encoder.
    """
    protected = protect(generator, images)
    target_name, aux_name = meta["target"], meta["aux"]
    target = classifiers[target_name]
    result = score(images, protected, target, classifiers.get(aux_name), labels)
    del result["loss"]  # each form is trained with a loss of its own
    result["target"] = target_name
    result["aux"] = aux_name
    result["clean_target_accuracy"] = percent(seen[target_name] == labels)  # Eq. (5)
    result["own_less_other"] = result["visibility"]["own"] - result["visibility"]["other"]
    result["jpeg"] = {}
    for subsampling in ("4:4:4", "4:2:0"):
        received = jpeg(protected, subsampling)
        result["jpeg"][subsampling] = accuracy(target, received, labels)
    result["unseen"] = {}  # classifiers that the generator never met
    for name in CLASSIFIERS:
        if name in classifiers and name not in (target_name, aux_name):
            result["unseen"][name] = accuracy(classifiers[name], protected, labels)
    result |= {"repeats": None, "read_back": None, "linked": None}  # --attack fills the last two
    if FORMS[meta["form"]]["start"] == "encoder":
        service_answers = answers(target, protected)
        result["repeats"] = repeats(service_answers, seen[target_name], seen["encoder"])
    return result, protected


# --- What a machine reads -------------------------------------------------------------------------
def correlations(images: Tensor, candidates: Tensor) -> Tensor:
    """Return how images (N, C, H, W) correlate with candidates (M, C, H, W): float64 (N, M).

    A change of an image's brightness or contrast does not change them.
    """
    x = standardize(images.flatten(1)[:, None])  # all pixels are one vector
    y = standardize(candidates.flatten(1)[:, None])
    return x[:, 0] @ y[:, 0].T


def score_matches(similarity: Tensor) -> tuple[float, float]:
    """Return how many images are found, in percent, and the median rank of their own candidates.

    similarity is float64 (N, M), N <= M. The own candidate of image i is candidate i. It is found
    if no other is more similar; if it is one of n that are equally similar, it counts 1 / n.
    """
    advantage = similarity - similarity.diagonal()[:, None]  # of each candidate over the own one
    more = (advantage > 1e-10).sum(1)  # smaller differences are rounding errors
    equal = (advantage.abs() <= 1e-10).sum(1)
    shares = (more == 0).double() / equal
    ranks = more + (equal + 1) / 2
    return 100 * shares.mean().item(), ranks.quantile(0.5).item()


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


def score_recovered(recovered: Tensor, originals: Tensor) -> dict:
    """Score what was read back beside the originals, both (N, 3, H, W) in [0, 1]; psnr is in dB."""
    errors = ((recovered - originals) ** 2).mean(dim=(1, 2, 3))
    errors = errors.clamp(min=1e-10)  # at most 100 dB
    found, median_rank = score_matches(correlations(recovered, originals))
    return {"psnr": -10 * errors.log10().mean().item(),
            "ssim": ssim(originals, recovered).mean().item(),
            "found": found, "median_rank": median_rank}


def describe_recovered(scores: dict) -> str:
    return (f"found {scores['found']:.1f}%, median rank {scores['median_rank']:.1f}, "
            f"SSIM {scores['ssim']:.3f}, PSNR {scores['psnr']:.1f} dB")


@torch.no_grad()
def read_back(generator: nn.Module, data: dict, picture: str | None = None) -> dict:
    """Say what a linear map gets back from protected images, by ridge_regression.

    Anyone can do this who has the generator and images of the same kind. `generator` is any module
    that takes and returns images (N, 3, H, W) in [0, 1]; `data` is like load_cifar10's. The
    attacker protects the first 12,000 training images, and learns from them to read the first 1,000
    test images back. Images larger than 32 x 32, protected ones and originals, are shrunk to that.

    Returns psnr (dB), ssim (signed), found, the percentage of images that correlate more with their
    own original than with any other, and median_rank, the place of their own in that order.
    "class_mean" has the same four of the mean image of the right class. A linear map that gets no
    more than that has learnt the class alone. It does not follow that nothing else is there: a
    network may read what it cannot, or what is finer than the 32 x 32 pixels. `picture` names a
    .png for ten images. Raises what check_data raises for these images.
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
    scores = score_recovered(recovered, originals["test"])
    if picture is not None:
        rows = [(describe_recovered(scores), [])]
        shown = {"original": originals["test"], "protected": sent["test"], "read back": recovered}
        for name, images in shown.items():
            rows.append((name, list((255 * images[:10]).round().byte())))
        draw_sheet(picture, rows)
    return scores | {"class_mean": score_recovered(class_mean, originals["test"])}


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
    any of them. `flip` says whether views are mirrored at all: set it as in the training.
    "class_alone" is what he finds if he knows only the class, "different_pictures" how many of the
    N protected images differ. Larger images are compared at 32 x 32.
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
    found, _ = score_matches(torch.stack(similarities).amax(0))
    of_class = (labels[:100, None] == labels).sum(1)
    return {"another_view": found, "class_alone": 100 * (1 / of_class).mean().item(),
            "different_pictures": len(protected.unique(dim=0))}


# --- The tables, as README.md and assets/results.md show them -------------------------------------
def hardened_first(name: str) -> tuple[bool, str]:
    return "-hardened" not in name, name


def by_form(generators: dict[str, dict]) -> dict[str, list[dict]]:
    """Sort entries of results.json by form, since no table or figure mixes forms.

    Of two files with the same networks the last one counts, in the order of their paths.
    """
    forms = {}
    for form in reversed(FORMS):  # hardened first
        pairs = {}
        for result in sorted(generators.values(), key=itemgetter("file")):
            if result["meta"]["form"] == form:
                pairs[result["target"], result["aux"]] = result
        if pairs:
            forms[form] = list(pairs.values())
    return forms


def summarise(entries: list[dict]) -> dict:
    """Sum up the generators of one form, entries of results.json, as Section 4.2.2 does.

    "table_2" has, for each target, the min, median and max over the auxiliary models of Table 1,
    the accuracy with the encoder as auxiliary model, and without one; None stands for what was not
    trained. "pairs" counts the pairs of Table 1, "pairs_under_5_points" those of them that lose
    less than 5 points.
    """
    table_2 = {}
    for target in CLASSIFIERS:
        by_aux = {e["aux"]: e["target_accuracy"] for e in entries if e["target"] == target}
        if by_aux:
            encoder = by_aux.pop("encoder", None)
            none = by_aux.pop("none", None)
            values = list(by_aux.values()) or [None]
            table_2[target] = {"pairs": len(by_aux), "min": min(values), "max": max(values),
                               "median": statistics.median(values), "encoder": encoder,
                               "none": none}

    drops = []
    for entry in entries:
        if entry["aux"] in CLASSIFIERS:
            drops.append(entry["clean_target_accuracy"] - entry["target_accuracy"])
    under_5 = sum(drop < 5 for drop in drops)
    return {"table_2": table_2, "pairs": len(drops), "pairs_under_5_points": under_5}


def number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}"


def heading(title: str, columns: str) -> str:
    """Return the first lines of a table in Markdown; `columns` are separated by |."""
    rule = " --- |" * (1 + columns.count("|"))
    return f"# {title}\n\n| {columns} |\n|{rule}\n"


def describe_training(meta: dict) -> str:
    """Put the form and the length of a training on CIFAR-10 into words."""
    text = f"{meta['form']}, epoch {meta['epoch']} of {meta['epochs']}"
    if meta.get("max_steps") is not None:
        images = meta["limit"] or 50000
        steps = min(images // meta["batch_size"], meta["max_steps"])  # of an epoch
        text = f"{meta['form']}, step {meta['epoch'] * steps} of {meta['epochs'] * steps}"
    if "stopped_after" in meta:
        text += f", stopped after epoch {meta['stopped_after']}"
    return text


def score_table(generators: dict[str, dict]) -> str:
    text = heading(
        "Scores, accuracies in percent",
        "form | target, auxiliary model | target accuracy: originals, protected | auxiliary "
        "accuracy | visibility: own / another's / same class | absolute SSIM: mean, largest | "
        "target accuracy after JPEG: 4:4:4, 4:2:0 | repeats the phone (%): all images, "
        "disputed ones | read back (%)")
    for result in generators.values():
        visible = result["visibility"]
        repeated = result["repeats"] or {"encoder": None, "then_encoder": None}
        recovered = result["read_back"] or {"found": None}
        text += (f"| {describe_training(result['meta'])} "
                 f"| {result['target']}, {result['aux']} "
                 f"| {result['clean_target_accuracy']:.2f}, {result['target_accuracy']:.2f} "
                 f"| {number(result['aux_accuracy'])} "
                 f"| {number(visible['own'], 3)} / {number(visible['other'], 3)} "
                 f"/ {number(visible['same_class'], 3)} "
                 f"| {result['ssim']:.4f}, {result['ssim_largest']:.3f} "
                 f"| {result['jpeg']['4:4:4']:.2f}, {result['jpeg']['4:2:0']:.2f} "
                 f"| {number(repeated['encoder'], 1)}, {number(repeated['then_encoder'], 1)} "
                 f"| {number(recovered['found'], 1)} |\n")
    return text


def table_2(form: str, summary: dict) -> str:
    text = heading(f"Table 2, form {form}: target accuracy (%), ours / the paper's",
                   "target | auxiliary models, of 7 | min | median | max | "
                   "no auxiliary model | ours: the encoder")
    for target, row in summary["table_2"].items():
        text += f"| {target} | {row['pairs']} "
        for key, printed in zip(("min", "median", "max", "none"), TABLE_2[target]):
            text += f"| {number(row[key])} / {printed:.2f} "
        text += f"| {number(row['encoder'])} |\n"
    return text + (f"\n{summary['pairs_under_5_points']} of {summary['pairs']} pairs lose under 5 "
                   "points (the paper: 38 of 56).\n")


def machine_table(generators: dict[str, dict]) -> str:
    text = heading("What a machine reads / what the class alone tells",
                   "generator | read back: found (%) | median rank | SSIM | PSNR (dB) | linked (%) "
                   "| different pictures of 1,000")
    for name, result in generators.items():
        if result["read_back"] is None:
            continue
        read = result["read_back"]
        mean = read["class_mean"]
        text += f"| {name} "
        for key, digits in (("found", 1), ("median_rank", 1), ("ssim", 3), ("psnr", 1)):
            text += f"| {read[key]:.{digits}f} / {mean[key]:.{digits}f} "
        links = result["linked"]
        text += (f"| {links['another_view']:.1f} / {links['class_alone']:.1f} "
                 f"| {links['different_pictures']} |\n")
    return text


def table_3(timing: dict) -> str:
    text = heading(f"Table 3, {timing['hardware']}: ms an image, float32",
                   f"network | parameters | batches of 256 | one by one | {timing['paper']}")
    for name, row in timing["networks"].items():
        text += (f"| {name} | {row['parameters']:,} | {number(row['ms_batch_256'], 3)} "
                 f"| {number(row['ms_batch_1'], 3)} | {row['ms_paper']:.3f} |\n")
    return text


def tables(results: dict) -> str:
    """Return the text of tables.md, from the content of results.json."""
    generators = results["generators"]
    texts = [score_table(generators)]
    for form, summary in results["summary"].items():
        texts.append(table_2(form, summary))
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


def draw_examples(out: str, name: str, result: dict, images: Tensor, protected: Tensor,
                  labels: Tensor, classifiers: dict) -> None:
    """Draw OUT/generator-NAME.png, an image a class, and OUT/worst-NAME.png, the least hidden."""
    shown = f"{name}: {describe_visibility(result['visibility'])}"
    recognised = (f"target {result['target_accuracy']:.2f}%, of the originals "
                  f"{result['clean_target_accuracy']:.2f}%; "
                  f"auxiliary {number(result['aux_accuracy'])}%")
    networks = {"target": classifiers[result["target"]]}
    if result["aux"] != "none":
        networks["auxiliary"] = classifiers[result["aux"]]
    for kind, chosen in (("generator", first_of_class(labels)), ("worst", result["worst"])):
        batches = {"original": images[chosen], "protected": protected[chosen]}
        rows = image_rows(batches, labels[chosen], networks)
        draw_sheet(f"{out}/{kind}-{name}.png", [(shown, []), (recognised, []), *rows])


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

    The authors' clock does not wait for the GPU, so their GPU column is another quantity.
    """
    column = 0 if device == "cpu" else 1
    machine = ("the paper's 16-core CPU", "the paper's RTX A6000")[column]
    networks = {}
    for name, printed in TABLE_3.items():
        network = Generator() if name == "generator" else build_classifier(name)
        network.eval().to(device, memory_format=torch.channels_last)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        in_batches = milliseconds(network, 256, device)
        alone = milliseconds(network, 1, device)
        networks[name] = {"parameters": parameters, "ms_batch_256": in_batches,
                          "ms_batch_1": alone, "ms_paper": printed[column]}
        print(f"{name}: {in_batches:.3f} ms an image, {alone:.3f} ms alone", flush=True)
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
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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


VISIBLE_IN_ONE = 0.3  # in place of VISIBLE: one image varies by 0.1, the mean over many hardly


def describe_one(original: Tensor, protected: Tensor) -> str:
    """Put the visibility of a single image into words, both uint8 (1, 3, H, W).

    There may be no other image, so 15 copies of the original take its place, which are shifted by
    quarters of its size (what leaves on one side comes in on the other). What shows but faintly
    gets no warning.
    """
    h, w = original.shape[2:]
    shifted = []
    for down in range(4):
        for right in range(4):
            shifted.append(original.roll((down * h // 4, right * w // 4), (2, 3)))
    copies = torch.cat(shifted[1:])  # the first is where it was
    own = visibility(original, protected).item()
    other = visibility(copies, protected.expand_as(copies)).mean().item()
    text = f"visibility {own:.3f}, of shifted copies {other:.3f}"
    if own - other > VISIBLE_IN_ONE:
        text += ", WARNING: the original can be made out"
    return text


@torch.no_grad()
def protect_image(path: str, out: str, generator: Generator, size: Sequence[int],
                  target: nn.Module | None) -> None:
    """Write OUT-protected.png for an image, and OUT-sheet.png to look at.

    size is the (H, W) that the generator was trained for. With a target of Table 1 the sheet says
    what that sees. Raises UserError if the image cannot be read, OSError if it cannot be written.
    """
    original = open_image(path, size)[None]
    protected = protect(generator, original)
    title = describe_one(original, protected)
    if target is not None:
        before = CLASSES[target(to_float(original)).argmax()]
        after = CLASSES[target(to_float(protected)).argmax()]
        title = f"the target sees {before}, protected {after}; {title}"
    save(f"{out}-protected.png", encode_png(protected[0]))
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
    h, w = meta.get("image_size", (32, 32))  # files that ship lack it
    print(f"{generator_path}: images are squeezed to {h} x {w}")
    failed = 0
    for path, name in name_files(paths, {}).items():
        try:
            protect_image(path, f"{out}/{name}", generator, (h, w), target)
        except (UserError, OSError) as error:  # the others are protected
            print(f"error: {error}", flush=True)
            failed += 1
    if failed:
        raise UserError(f"{failed} of {len(paths)} images failed, see above")


# --- The command ----------------------------------------------------------------------------------
def name_files(paths: Sequence[str], known: dict[str, str]) -> dict[str, str]:
    """Give each path a name for its results, {path: name}; those in `known` have theirs.

    A second file of the same name becomes NAME-2.
    """
    names = dict(known)
    for path in paths:
        if path in names:
            continue
        stem = os.path.splitext(os.path.basename(path))[0].removeprefix("generator-")
        name = stem
        count = 1
        taken = [other.lower() for other in names.values()]  # some disks take IMG for img
        while name.lower() in taken:
            count += 1
            name = f"{stem}-{count}"
        names[path] = name
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
    return [paths[name] for name in sorted(paths, key=hardened_first)]


def file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def still_true(result: dict, networks: dict[str, str]) -> bool:
    """Say if an entry of results.json is of the generator and networks (fingerprints) of today.

    Of classifiers that the generator never met, each counts for its own score only, which goes.
    """
    if not os.path.exists(result["file"]) or file_sha256(result["file"]) != result["file_sha256"]:
        return False
    for name, sha256 in list(result["networks"].items()):
        if networks.get(name) != sha256:
            if name not in result["unseen"]:
                return False
            del result["unseen"][name], result["networks"][name]
    return True


def read_results(out: str, images_sha256: str, networks: dict[str, str], found: list[str]) -> dict:
    """Return "generators" and "timing" of OUT/results.json, as far as they are still true.

    Results of other images, generators or networks go, with their pictures, and those of a file
    that has the name of another one in `found`, which hides it. The times of Table 3 stay: their
    title names the hardware.
    """
    results = {"generators": {}}
    if not os.path.exists(f"{out}/results.json"):
        return results
    with open(f"{out}/results.json") as file:
        before = json.load(file)
    if "timing" in before:
        results["timing"] = before["timing"]
    same_images = before.get("images_sha256") == images_sha256
    found_names = [os.path.basename(path) for path in found]
    for name, result in before["generators"].items():
        path = result["file"]
        hidden = path not in found and os.path.basename(path) in found_names
        if same_images and not hidden and still_true(result, networks):
            results["generators"][name] = result
            continue
        print(f"{name}: earlier results dropped, since images, file or classifiers changed")
        for kind in ("generator", "worst", "read-back"):
            if os.path.exists(f"{out}/{kind}-{name}.png"):
                os.remove(f"{out}/{kind}-{name}.png")
    return results


def write_results(out: str, results: dict) -> str:
    """Write OUT/results.json and OUT/tables.md, in an order that does not depend on earlier runs.

    Returns the tables.
    """
    scored = results["generators"]
    ordered = {name: scored[name] for name in sorted(scored, key=hardened_first)}
    summary = {form: summarise(of_form) for form, of_form in by_form(ordered).items()}
    results = results | {"generators": ordered, "summary": summary}
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
    if args.image:
        protect_images(args.image, paths[0], out)
        return

    needed = set()
    for path in paths:  # checked before the work
        _, meta = load_generator(path)
        if meta.get("target") not in CLASSIFIERS:
            raise UserError(f"{path} is for no classifier of Table 1: only --image and "
                            "export_mobile.py take it")
        needed.update([meta["target"], meta["aux"]])
        if FORMS[meta["form"]]["start"] == "encoder":
            needed.add("encoder")
    check_writable(f"{out}/results.json")
    data = load_cifar10(args.data, args.device)
    images = data["test"][0][:args.limit]
    labels = data["test"][1][:args.limit]
    classifiers = {}
    networks = {}  # their fingerprints
    seen = {}  # answers to the original images, of the networks that a generator needs
    for name in (*CLASSIFIERS, "encoder"):
        if name in needed or find_classifier(name):
            classifiers[name] = load_classifier(name, args.device)
            networks[name] = network_fingerprint(classifiers[name])
        if name in needed:
            seen[name] = answers(classifiers[name], images)
            share = percent(seen[name] == labels)
            print(f"{name}: {share:.2f}% of {len(images):,} original images", flush=True)
    images_sha256 = fingerprint(images, labels)
    found = [] if args.generator else paths
    results = read_results(out, images_sha256, networks, found)
    results |= {"images": len(images), "images_sha256": images_sha256}
    scored = results["generators"]
    names = name_files(paths, {result["file"]: name for name, result in scored.items()})
    if args.timing:
        results["timing"] = time_networks(args.device)
        write_results(out, results)
    for i, path in enumerate(paths):
        name = names[path]
        print(f"\n{name} ({i + 1} of {len(paths)})", flush=True)
        sha256 = file_sha256(path)
        generator, meta = load_generator(path)
        generator.to(args.device)
        result, protected = evaluate_generator(generator, meta, classifiers, seen, images, labels)
        result |= {"file": path, "file_sha256": sha256, "meta": meta,
                   "hardware": hardware(args.device), "torch": torch.__version__}
        used = [meta["target"], meta["aux"], *result["unseen"]]
        if result["repeats"] is not None:
            used.append("encoder")
        result["networks"] = {network: networks.get(network) for network in used}
        draw_examples(out, name, result, images, protected, labels, classifiers)
        print(f"  target {result['target_accuracy']:.2f}%, of the originals "
              f"{result['clean_target_accuracy']:.2f}%; auxiliary "
              f"{number(result['aux_accuracy'])}%; |SSIM| {result['ssim']:.4f}, "
              f"at most {result['ssim_largest']:.3f}; {describe_visibility(result['visibility'])}",
              flush=True)
        for role, network in (("target", meta["target"]), ("aux", meta["aux"]),
                              ("encoder", "encoder")):
            trained_with = meta[f"{role}_sha256"]
            if trained_with != "none" and trained_with != networks[network]:
                print(f"  note: it was trained with another {network}")
        if args.attack:
            result["read_back"] = read_back(generator, data, f"{out}/read-back-{name}.png")
            result["linked"] = linked(generator, data["test"][0][:1000], data["test"][1][:1000],
                                      meta.get("flip", True))
            print(f"  read back: {describe_recovered(result['read_back'])}; "
                  f"linked {result['linked']['another_view']:.1f}%", flush=True)
        elif name in scored:  # what an earlier run has read back
            result["read_back"] = scored[name]["read_back"]
            result["linked"] = scored[name]["linked"]
        scored[name] = result
        text = write_results(out, results)
    print(f"\n{text}")
    few = first_of_class(labels)[::2]  # every second class is enough for Figure 9
    for form, of_form in by_form(scored).items():
        draw_heatmaps(f"{out}/heatmaps-{form}.png", of_form)
        draw_figure_9(f"{out}/figure-9-{form}.png", of_form, images[few])
    kept = len(scored) - len(set(paths))
    print(f"-> {out}/ ({kept} of the results are from earlier runs)")


if __name__ == "__main__":
    run(main)
