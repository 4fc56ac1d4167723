"""Train protective perturbation generators: Algorithm 1 with the loss of Eq. (1) to (4).

    python train.py --target vgg13_bn --aux resnet18                    from the pretrained encoder
    python train.py --target vgg13_bn --aux resnet18 --form paper       the paper's, to the letter
    python train.py --target vgg13_bn --aux resnet18 --form hardened    from the class alone
    torchrun --nproc-per-node 8 -- train.py --target all --aux all none    all 64 of Table 2
"""

import argparse
import io
import json
import math
import os
import time
from collections import namedtuple
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

from classifiers import (CLASSIFIERS, Classifier, UserError, accuracy, add_common_arguments,
                         autocast, check_classes, check_data, check_settings, check_writable,
                         choose_precision, find_classifier, fingerprint, hardware, learning_rate,
                         load, load_checkpoint, load_cifar10, load_classifier, load_weights,
                         positive_int, print_progress, random_crop_flip, run, save, scoring_batches,
                         to_16_bits, to_float)
from ssim import ssim
from unet import Generator, pad_to_16

# --- The loss and the forms of the method ---------------------------------------------------------
Loss = namedtuple("Loss", "total target aux ssim")  # Eq. (4), then (1), (2) and (3)


def protective_loss(x: Tensor, protected: Tensor, target_logits: Tensor, aux_logits: Tensor | None,
                    labels: Tensor, w_target: float = 1.0, w_aux: float = 1.0,
                    w_ssim: float = 0.5, balanced: bool = False) -> Loss:
    """The loss of Section 3.3 and its terms, each the mean over the batch; minimise `total`.

    x and protected are (N, 3, H, W) in [0, 1], the logits (N, classes), the labels (N,). The
    default weights are those of Section 4.1.3; w_ssim is the paper's omega_SI. Without an auxiliary
    model (aux_logits None) its term is 0. Balanced is ours: see FORMS. Raises ValueError where
    ssim() does.
    """
    loss_target = F.cross_entropy(target_logits.float(), labels)  # Eq. (1)
    if aux_logits is None:
        loss_aux = torch.zeros_like(loss_target)
    elif balanced:
        aux_entropy = F.cross_entropy(aux_logits.float(), labels, reduction="none")
        loss_aux = -torch.log1p(aux_entropy).mean()  # ours, in place of Eq. (2)
    else:
        loss_aux = -F.cross_entropy(aux_logits.float(), labels)  # Eq. (2)
    similarity = ssim(x, protected)
    if balanced:
        similarity = similarity.abs()  # ours: an inverted image shows as well as an upright one
    loss_ssim = similarity.mean()  # Eq. (3)
    total = w_target * loss_target + w_aux * loss_aux + w_ssim * loss_ssim  # Eq. (4)
    return Loss(total, loss_target, loss_aux, loss_ssim)


# What differs between the three forms of the method; nothing else decides any of it. "paper" is
# Section 4.1.3 to the letter, the other two are ours. U starts at random or from a trained encoder,
# which stays frozen. It adds delta to the image, or it paints a new image from the code of a class
# alone. An epoch is a pass over all images, or max_steps steps if these are fewer; "hardened" needs
# few, because it has only as many pictures to paint as there are classes.
#
# The balanced loss let the same weights serve all twelve pairs tried. -CE(aux) pulls as hard as
# ever when the auxiliary model has long been fooled, and harder with one model than with another;
# the gradient of -log(1 + CE), taken for each image, falls as 1 / (1 + CE). And an auxiliary model
# ends up answering one class for everything: the images of that class must be hidden by the SSIM
# term, which therefore has ten times the paper's weight.
FORMS = {
    "paper": {
        "start": "random", "painted_from": "image", "lossy_channel": False, "balanced": False,
        "epochs": 100, "max_steps": None, "batch_size": 256, "w_aux": 1.0, "w_ssim": 0.5},
    "pretrained": {
        "start": "encoder", "painted_from": "image", "lossy_channel": True, "balanced": True,
        "epochs": 1, "max_steps": 600, "batch_size": 32, "w_aux": 3.0, "w_ssim": 5.0},
    "hardened": {
        "start": "encoder", "painted_from": "class", "lossy_channel": True, "balanced": True,
        "epochs": 1, "max_steps": 200, "batch_size": 32, "w_aux": 3.0, "w_ssim": 5.0},
}


def lossy_channel(protected: Tensor) -> Tensor:
    """What reaches the classifiers in training, where the form says so: (N, 3, H, W) in [0, 1].

    Noise always, and for half of the batches, drawn at random, colour at half resolution, as in
    nearly every JPEG file (4:2:0; JFIF's luma and colour differences). Not in the paper.
    """
    noise = torch.randn_like(protected)
    noisy = (protected + 0.1 * noise).clamp(0, 1)
    if torch.rand(()) < 0.5:
        return noisy
    r, g, b = noisy.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    colour = torch.stack([r - luma, b - luma], 1)
    colour = F.avg_pool2d(colour, 2, ceil_mode=True)
    colour = F.interpolate(colour, noisy.shape[2:], mode="bilinear")
    r, b = (colour + luma[:, None]).unbind(1)
    g = (luma - 0.299 * r - 0.114 * b) / 0.587
    return torch.stack([r, g, b], 1).clamp(0, 1)


@torch.no_grad()
def class_codes(encoder: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """What the hardened form paints from: for each class its code, the mean of the features.

    encoder is a trained build_classifier("encoder") in eval mode, images are uint8 (N, 3, H, W),
    labels (N,). The first 500 images of each class are used: more hardly move the mean. Returns
    (K, 512), in the order of the labels; a class without images gets no code.
    """
    codes = []
    for label in labels.unique():
        of_class = images[labels == label][:500]
        features = []
        for [batch] in scoring_batches(of_class):
            z = (to_float(batch) - encoder.mean) / encoder.std
            features.append(encoder.net.features(pad_to_16(z)))  # as in Generator
        codes.append(torch.cat(features).mean(0))
    return torch.stack(codes)


# --- Algorithm 1 ----------------------------------------------------------------------------------
def train_epoch(generator: Generator, target: nn.Module, aux: nn.Module | None, images: Tensor,
                labels: Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                rates: list[float], batch_size: int, lossy: bool, loss_settings: dict,
                precision: str) -> Iterator[Tensor]:
    """The inner loop of Algorithm 1: one step for each learning rate of `rates`.

    images are uint8 (N, 3, H, W), labels int64 (N,). A rest smaller than a batch is dropped. Yields
    the Loss of each step, (4,), so that whoever runs the loop can count and print.
    """
    order = torch.randperm(len(images), device=images.device)
    for batch, rate in zip(order.split(batch_size), rates):  # foreach x, y in X, Y
        x = to_float(random_crop_flip(images[batch]))
        y = labels[batch]
        with autocast(images.device.type, precision):
            protected = generator(x)  # delta = U(x), x' = clamp(x + delta), hardened without x
            received = protected
            if lossy:
                received = lossy_channel(protected)  # ours: what arrives of x'
            target_logits = target(received)  # y_pred_target = F_target(x')
            aux_logits = None
            if aux is not None:
                aux_logits = aux(received)  # y_pred_aux = F_aux(x')
        loss = protective_loss(x, protected, target_logits, aux_logits, y, **loss_settings)
        optimizer.param_groups[0]["lr"] = rate
        scaler.scale(loss.total).backward()
        scaler.step(optimizer)  # "Update U to minimize Loss"
        scaler.update()
        optimizer.zero_grad()
        yield torch.stack(loss).detach()


# --- Validation (Section 4.2.1); evaluate.py reports with the same functions ----------------------
@torch.no_grad()
def protect(generator: nn.Module, images: Tensor) -> Tensor:
    """What leaves the phone: uint8 images (N, 3, H, W) to protected ones, rounded to 8 bits.

    Raises UserError where the network gives no number, which 8 bits would hide.
    """
    protected = []
    for [batch] in scoring_batches(images):
        output = generator(to_float(batch))
        if output.isnan().any():
            raise UserError("the output of the network is not a number")
        output = (255 * output).round()
        protected.append(output.to(torch.uint8))
    return torch.cat(protected)


@torch.no_grad()
def score(images: Tensor, protected: Tensor, target: nn.Module, aux: nn.Module | None,
          labels: Tensor, **loss_settings) -> dict:
    """Score protected images against their originals, both uint8 (N, 3, H, W); labels (N,).

    Returns target_accuracy and aux_accuracy in percent (Eq. 5; None without an auxiliary model),
    the absolute SSIM as ssim (mean, as in Figure 8), ssim_largest and ssim_over_0.1 (percent of
    images), the up to ten images with the largest as worst (indices), and loss, the total and the
    terms of protective_loss with these settings of it.
    """
    loss_sums = 0
    target_correct = 0
    aux_correct = 0
    aux_logits = None
    similarities = []
    for x, x_protected, y in scoring_batches(images, protected, labels):
        x = to_float(x)
        x_protected = to_float(x_protected)
        target_logits = target(x_protected)
        target_correct += (target_logits.argmax(1) == y).sum().item()
        if aux is not None:
            aux_logits = aux(x_protected)
            aux_correct += (aux_logits.argmax(1) == y).sum().item()
        similarities.append(ssim(x, x_protected).abs())
        loss = protective_loss(x, x_protected, target_logits, aux_logits, y, **loss_settings)
        loss_sums += len(y) * torch.stack(loss)
    n = len(labels)
    similarity = torch.cat(similarities)
    return {
        "target_accuracy": 100 * target_correct / n,  # Eq. (5)
        "aux_accuracy": None if aux is None else 100 * aux_correct / n,
        "ssim": similarity.mean().item(),
        "ssim_largest": similarity.max().item(),
        "ssim_over_0.1": 100 * (similarity > 0.1).float().mean().item(),
        "worst": similarity.topk(min(10, n)).indices.tolist(),
        "loss": Loss(*(loss_sums / n).tolist())._asdict(),
    }


def encode_png(image: Tensor) -> bytes:
    """A uint8 image (3, H, W) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return file.getvalue()


# --- A whole training -----------------------------------------------------------------------------
def freeze(classifier: nn.Module) -> None:
    """Put a classifier into eval mode and fix its weights; gradients still reach the image."""
    try:
        classifier.eval()
    except NotImplementedError:
        pass  # a module of torch.export's stays in the mode in which it was exported
    for parameter in classifier.parameters():
        parameter.requires_grad_(False)


def check_classifier(classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise ValueError, before the first step, where no generator can be trained for a classifier.

    It must return logits, as many as there are classes, leave its input unchanged, and pass
    gradients back to it. Its weights are frozen, so the only gradients are the image's.
    """
    x = to_float(images[:2]).requires_grad_()
    given = x.clone()  # like a protected image: not a leaf of the graph
    logits = classifier(given)
    if not torch.equal(given, x):
        raise ValueError("the classifier changes its input in place: let it work on a copy")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("a classifier must return logits (N, classes), nothing else")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be 0 to {logits.shape[1] - 1}, as many as there are logits")
    sums = logits.sum(1)
    if logits.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError("the classifier returns probabilities: it must return the logits, from "
                         "which softmax makes them")
    gradient = torch.zeros_like(x)
    if logits.requires_grad:
        gradient = torch.autograd.grad(logits.square().sum(), x)[0]
    if not gradient.any():
        raise ValueError("the classifier passes no gradient back to the image: no_grad, detach, "
                         "numpy and rounding stop it")


def draw_protected(path: str, images: Tensor, protected: Tensor) -> None:
    """Write a PNG: uint8 images (N, 3, H, W) above their protected versions, large enough."""
    shown = torch.cat([images, protected])
    zoom = max(1, 128 // shown.shape[3])  # 32 pixels are too few to judge by
    shown = shown.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = make_grid(shown, nrow=len(images))
    save(path, encode_png(grid))


def describe(loss: dict) -> str:
    """The loss of Eq. (4) and its three terms, for people."""
    return (f"{loss['total']:.3f} (target {loss['target']:.3f}, aux {loss['aux']:.3f}, "
            f"ssim {loss['ssim']:.3f})")


def train_generator(target: nn.Module, aux: nn.Module | None, data: dict, path: str, *,
                    form: str = "pretrained", encoder: Classifier | None = None,
                    epochs: int | None = None, batch_size: int | None = None, lr: float = 0.005,
                    weight_decay: float = 0.0005, w_target: float = 1.0,
                    w_aux: float | None = None, w_ssim: float | None = None,
                    precision: str | None = None, device: str | torch.device = "cpu",
                    seed: int = 0, meta: dict | None = None) -> Generator:
    """Algorithm 1, for any classifiers and images: train a generator and write it to path.pt.

    target and aux are modules of any kind, scripted ones too; they take images (N, 3, H, W) in
    [0, 1], give logits (N, classes), and are frozen. `data` is as of load_cifar10: "train" and
    "validation", each uint8 images (N, 3, H, W), H and W >= 16, and int64 labels (N,). It is on
    `device`, as are all networks. `encoder` is a trained build_classifier("encoder"): its layers
    are copied into U and frozen, and the hardened form's codes come from it; the form "paper" takes
    none. epochs, batch_size, w_aux and w_ssim are by default those of the form in FORMS, which may
    also cap the steps of an epoch; the rest are those of Section 4.1.3. Precision is "fp16", "bf16"
    or "fp32", by default fp16 on a GPU, and on a CPU the faster of the other two.

    Returns the best epoch by validation loss (Figure 4), its kernels rounded to 16 bits; in the
    file are the settings, its scores (before rounding), the images' size and `meta` too.
    path.jsonl is the log; path.png shows eight validation images above what the best epoch makes of
    them. After a stop, the same call goes on from the last finished epoch; what is finished is read
    from path.pt.

    Raises UserError where that or a checkpoint is of other settings, networks or images, where it
    cannot be written, and on a loss that is not finite; ValueError where the form, networks and
    data do not belong together; and as check_data, check_classifier and, for the hardened form,
    check_classes do.
    """
    device = str(device)
    row = FORMS[form]
    if row["start"] == "encoder" and encoder is None:
        raise ValueError(f"form {form} starts from a trained encoder: encoder is missing")
    if row["start"] == "random" and encoder is not None:
        raise ValueError(f"form {form} starts at random: it takes no encoder")
    images, labels = data["train"]
    validation_images, validation_labels = data["validation"]
    if epochs is None:
        epochs = row["epochs"]
    if batch_size is None:
        batch_size = row["batch_size"]
    check_data(data, ["train", "validation"], epochs)
    if row["painted_from"] == "class":
        check_classes(data, ["validation"])
    batch_size = min(batch_size, len(images))
    if w_aux is None:
        w_aux = row["w_aux"]
    if w_ssim is None:
        w_ssim = row["w_ssim"]
    loss_settings = {"w_target": w_target, "w_aux": w_aux, "w_ssim": w_ssim,
                     "balanced": row["balanced"]}
    for classifier in (target, aux):
        if classifier is not None:
            freeze(classifier)
            check_classifier(classifier, images, labels)
            if not classifier.state_dict():
                print(f"{path}: a classifier's state_dict is empty, so a later call cannot tell "
                      "whether it has changed")
    if encoder is not None:
        encoder.eval()
    settings = {"form": form} | row | loss_settings  # a file tells all that a run depends on
    settings |= {"epochs": epochs, "batch_size": batch_size, "lr": lr,
                 "weight_decay": weight_decay, "precision": precision, "seed": seed,
                 "target_sha256": fingerprint(*target.state_dict().values()),
                 "aux_sha256": "none", "encoder_sha256": "none",
                 "images_sha256": fingerprint(images), "labels_sha256": fingerprint(labels),
                 "validation_sha256": fingerprint(validation_images, validation_labels)}
    if aux is not None:
        settings["aux_sha256"] = fingerprint(*aux.state_dict().values())
    if encoder is not None:
        settings["encoder_sha256"] = fingerprint(*encoder.state_dict().values())
    if os.path.exists(f"{path}.pt"):
        generator, before = load_generator(f"{path}.pt")
        check_settings(f"{path}.pt", before, settings)
        print(f"{path}.pt is finished: delete it to train it again", flush=True)
        return generator.to(device)
    check_writable(f"{path}.pt")
    checkpoint = load_checkpoint(path, settings)
    if checkpoint is not None:
        precision = checkpoint["settings"]["precision"]
    elif precision is None:
        precision = choose_precision(device, "fp16")
    settings["precision"] = precision

    torch.manual_seed(seed)
    codes = None
    if row["painted_from"] == "class":
        codes = class_codes(encoder, images, labels)
    generator = Generator(codes)  # "Randomly initialize U"
    generator.to(device, memory_format=torch.channels_last)
    if encoder is not None:
        generator.unet.encoder.levels.load_state_dict(encoder.net.levels.state_dict())
        generator.unet.encoder.requires_grad_(False)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision == "fp16")
    best = None  # what path.pt will hold
    log = []
    if checkpoint is not None:
        generator.load_state_dict(checkpoint["generator"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        best = checkpoint["best"]
        log = checkpoint["log"]

    steps_per_epoch = len(images) // batch_size
    if row["max_steps"] is not None:
        steps_per_epoch = min(steps_per_epoch, row["max_steps"])
    steps = epochs * steps_per_epoch
    clean_accuracy = accuracy(target, validation_images, validation_labels)
    print(f"{path}: form {form}, {epochs} epochs of {steps_per_epoch} steps; the target recognises "
          f"{clean_accuracy:.2f}% of the original validation images", flush=True)
    for epoch in range(len(log) + 1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)  # for each epoch: a resumed run draws the same
        generator.train()
        if encoder is not None:
            generator.unet.encoder.eval()  # frozen: its batch norm statistics too
        start = time.monotonic()
        first_step = (epoch - 1) * steps_per_epoch
        rates = [learning_rate(first_step + i, steps, lr) for i in range(steps_per_epoch)]
        losses = []
        for loss in train_epoch(generator, target, aux, images, labels, optimizer, scaler, rates,
                                batch_size, row["lossy_channel"], loss_settings, precision):
            losses.append(loss)
            if len(losses) % 50 == 0:
                print_progress(path, epoch, epochs, start, len(losses), steps_per_epoch, batch_size)
        losses = torch.stack(losses)  # (steps, 4)
        finite = losses.isfinite().all(1)  # waits for a GPU
        seconds = time.monotonic() - start

        # In fp16 a step that overflows is skipped by the scaler; anything else does not heal.
        diverged = (f"{path}: the loss is not finite in epoch {epoch}: try a lower --lr or "
                    "--precision fp32, and delete its .checkpoint")
        if not finite.any() or (precision != "fp16" and not finite.all()):
            raise UserError(diverged)
        train_loss = Loss(*losses[finite].mean(0).tolist())._asdict()
        generator.eval()
        with autocast(device, precision):  # quicker; evaluate.py reports in float32
            try:
                protected = protect(generator, validation_images)
            except UserError as error:
                raise UserError(diverged) from error
            scores = score(validation_images, protected, target, aux, validation_labels,
                           **loss_settings)
        if not math.isfinite(scores["loss"]["total"]):
            raise UserError(diverged)
        log.append({"epoch": epoch, "train": train_loss, "validation": scores,
                    "seconds": seconds})
        # The loss chooses, as in the paper, although the auxiliary term of Eq. (2) swamps the rest.
        if best is None or scores["loss"]["total"] < best["meta"]["validation"]["loss"]["total"]:
            facts = settings | log[-1] | {"hardware": hardware(device),
                                          "image_size": list(images.shape[2:])}
            best = {"generator": to_16_bits(generator.state_dict()),
                    "meta": facts | (meta or {})}
            draw_protected(f"{path}.png", validation_images[:8], protected[:8])
        lines = [json.dumps(line) + "\n" for line in log]
        save(f"{path}.jsonl", "".join(lines).encode())
        checkpoint = {"generator": generator.state_dict(), "optimizer": optimizer.state_dict(),
                      "scaler": scaler.state_dict(), "best": best, "log": log,
                      "settings": settings}
        save(f"{path}.checkpoint", checkpoint)
        aux_words = ""
        if aux is not None:
            aux_words = f"auxiliary {scores['aux_accuracy']:.2f}%, "
        print(f"{path}  epoch {epoch}/{epochs}  loss {describe(train_loss)}; validation "
              f"{describe(scores['loss'])}: target {scores['target_accuracy']:.2f}%, {aux_words}"
              f"|SSIM| {scores['ssim']:.4f}", flush=True)

    save(f"{path}.pt", best)
    os.remove(f"{path}.checkpoint")
    print(f"{path}.pt is epoch {best['meta']['epoch']}, the best. Look at {path}.png: "
          "if you can tell what is on it, the run has failed")
    generator, _ = load_generator(f"{path}.pt")
    return generator.to(device)


def load_generator(path: str) -> tuple[Generator, dict]:
    """A file of train_generator: (generator in eval mode on the CPU, its settings and scores).

    Its form is the settings' "form", and "image_size" the (H, W) that it was trained for. Raises
    UserError where the file is something else.
    """
    content = load(path)
    meta = content.get("meta", {})
    if "generator" not in content or meta.get("form") not in FORMS:
        raise UserError(f"{path} holds no generator of this version: train one with train.py")
    codes = content["generator"].get("unet.codes")
    if FORMS[meta["form"]]["painted_from"] == "class" and codes is None:
        target, aux = meta.get("target", "NAME"), meta.get("aux", "NAME")
        raise UserError(f"{path} is of an older hardened form, without codes: delete it and run "
                        f"python train.py --target {target} --aux {aux} --form hardened")
    generator = Generator(codes).float()  # the codes are stored in 16 bits
    load_weights(generator, content["generator"], path)
    return generator.eval(), meta


# --- The command ----------------------------------------------------------------------------------
FORM_WORDS = {
    "paper": "the paper's own, to the letter: U starts at random, no lossy channel",
    "pretrained": "x + U(x) from the pretrained encoder, over a lossy channel, by a balanced loss",
    "hardened": "the pretrained encoder recognises the image, U paints the picture of that class",
}


def describe_default(name: str) -> str:
    values = [f"{form} {row[name]}" for form, row in FORMS.items()]
    return f"(default: {', '.join(values)})"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train generators (Algorithm 1): one for each combination of --target and "
                    "--aux, finished ones skipped.")
    parser.add_argument("--target", nargs="+", required=True, metavar="NAME",
                        choices=[*CLASSIFIERS, "all"],
                        help=f"the recognition service: {', '.join(CLASSIFIERS)}, or all")
    parser.add_argument("--aux", nargs="+", required=True, metavar="NAME",
                        choices=[*CLASSIFIERS, "none", "all"],
                        help="the auxiliary model: the same names, none, or all (without none)")
    forms = "; ".join(f"{form}, {words}" for form, words in FORM_WORDS.items())
    parser.add_argument("--form", choices=FORMS, default="pretrained",
                        help=f"{forms} (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, help=describe_default("epochs"))
    parser.add_argument("--batch-size", type=positive_int, help=describe_default("batch_size"))
    parser.add_argument("--w-target", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--w-aux", type=float, help=describe_default("w_aux"))
    parser.add_argument("--w-ssim", type=float, help=describe_default("w_ssim"))
    parser.add_argument("--lr", type=float,
                        help="the highest (default: 0.005; googlenet with vgg13_bn 0.001)")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"],
                        help="(default: fp16 on a GPU, on a CPU the faster of the others)")
    parser.add_argument("--limit", type=positive_int,
                        help="to see it run, on LIMIT images of each split, to quick-look-*.pt")
    parser.add_argument("--out", default="runs", metavar="FOLDER",
                        help="where generators go (default: %(default)s)")
    add_common_arguments(parser)
    return parser.parse_args()


def choose_pairs(targets: list[str], auxes: list[str]) -> list[tuple[str, str]]:
    """Every (target, auxiliary) of the names asked for, "all" understood, but no model with itself.

    Raises UserError where nothing is left.
    """
    pairs = []
    for target in CLASSIFIERS:
        for aux in (*CLASSIFIERS, "none"):
            target_asked = target in targets or "all" in targets
            aux_asked = aux in auxes or ("all" in auxes and aux != "none")
            if target_asked and aux_asked and target != aux:
                pairs.append((target, aux))
    if not pairs:
        raise UserError("a target is never its own auxiliary model: name another, or --aux none")
    return pairs


def main() -> None:
    args = parse_arguments()
    device = args.device
    row = FORMS[args.form]
    hint = ""
    if args.form == "pretrained":
        hint = " (--form paper is the paper's own, to the letter)"
    print(f"form {args.form}: {FORM_WORDS[args.form]}{hint}", flush=True)
    pairs = choose_pairs(args.target, args.aux)
    if "RANK" in os.environ:  # under torchrun: every process has its share and its own GPU
        pairs = pairs[int(os.environ["RANK"])::int(os.environ["WORLD_SIZE"])]
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    needed = [name for name in CLASSIFIERS if any(name in pair for pair in pairs)]
    if row["start"] == "encoder":
        needed.append("encoder")
    missing = [name for name in needed if find_classifier(name) is None]
    if missing:
        names = " ".join(missing)
        raise UserError(f"not trained yet: {names}; run python classifiers.py --arch {names}")
    data = load_cifar10(args.data, device)
    for split, (images, labels) in data.items():
        data[split] = images[:args.limit], labels[:args.limit]
    classifiers = {"none": None}
    for name in needed:
        classifiers[name] = load_classifier(name, device)

    failed = 0
    for target, aux in pairs:
        kind = "generator"
        if args.limit is not None:
            kind = f"quick-look-{args.limit}"  # which nothing takes for a generator
        path = f"{args.out}/{kind}-{target}-{aux}"
        if args.form != "pretrained":
            path += f"-{args.form}"
        lr = args.lr
        if lr is None:
            lr = 0.001 if (target, aux) == ("googlenet", "vgg13_bn") else 0.005  # Section 4.1.3
        try:
            train_generator(
                classifiers[target], classifiers[aux], data, path, form=args.form,
                encoder=classifiers.get("encoder"), epochs=args.epochs,
                batch_size=args.batch_size, lr=lr, w_target=args.w_target, w_aux=args.w_aux,
                w_ssim=args.w_ssim, precision=args.precision, device=device, seed=args.seed,
                meta={"target": target, "aux": aux, "limit": args.limit})
        except UserError as error:  # one that diverges does not stop the others
            print(f"error: {error}", flush=True)
            failed += 1
    if failed and "RANK" not in os.environ:  # torchrun would stop the other processes
        raise UserError(f"{failed} of {len(pairs)} generators failed, see above")


if __name__ == "__main__":
    run(main, stopped="stopped: the same command goes on")
