"""Train protective perturbation generators: Algorithm 1 with the loss of Eq. (1) to (4).

    python train.py --target vgg13_bn --aux resnet18                    our default form
    python train.py --target vgg13_bn --aux resnet18 --form hardened    our other form
    python train.py --target vgg13_bn --aux resnet18 --form paper       Section 4.1.3 to the letter
    python train.py --target all --aux all none --form paper            all 64 of Table 2
"""

import argparse
import os
import time
from collections import namedtuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import save_image

from classifiers import (CLASSIFIERS, Classifier, UserError, accuracy, add_common_arguments,
                         autocast, check_classifier, check_data, check_finite, choose_precision,
                         fingerprint, hardware, learning_rates, load, load_checkpoint,
                         load_cifar10, load_classifier, load_finished, load_weights,
                         network_fingerprint, percent, positive_int, print_progress,
                         random_crop_flip, run, save, scoring_batches, to_16_bits, to_float)
from ssim import ssim
from unet import Generator

# --- The loss and the forms of the method ---------------------------------------------------------
Loss = namedtuple("Loss", "total target aux ssim")  # Eq. (4), then (1), (2) and (3)


def protective_loss(x: Tensor, protected: Tensor, target_logits: Tensor, aux_logits: Tensor | None,
                    labels: Tensor, w_target: float = 1.0, w_aux: float = 1.0,
                    w_ssim: float = 0.5, balanced: bool = False) -> Loss:
    """Return the loss of Section 3.3, to be minimised, and its terms: means over the batch.

    x and protected are (N, 3, H, W) in [0, 1], logits (N, classes), labels (N,). The default
    weights are those of Section 4.1.3; w_ssim is the paper's omega_SI. Without an auxiliary model
    (aux_logits None) its term is 0. `balanced` is ours: see FORMS. Raises what ssim() raises.
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


# What differs between the three forms of the method:
# - "paper" has the settings of Section 4.1.3. U starts at random and adds delta to the image.
# - "pretrained" is ours. U adds delta too, but starts from a trained encoder, which stays frozen.
# - "hardened" is ours. U starts likewise, and paints a new image from the code of a class alone.
# Our two look twice (see UNet): no generator that hides recognises more than its encoder, and that
# recognises more from an image and its mirror image than from the image alone. A training without
# mirroring (flip=False) switches this off.
# An epoch is a pass over all images, or max_steps steps if these are fewer; "hardened" needs few,
# because it has only as many pictures to paint as there are classes.
#
# With the balanced loss the same weights of its terms served all thirty pairs tried. -CE(aux) pulls
# as hard as ever when the auxiliary model has long been fooled, and harder with one model than with
# another; the gradient of -log(1 + CE), taken for each image, falls as 1 / (1 + CE). The auxiliary
# model ends up giving one answer to everything. Then only the SSIM term hides the images of that
# class, so it has ten times the paper's weight.
FORMS = {
    "paper": {
        "start": "random", "look_twice": False, "painted_from": "image",
        "lossy_channel": False, "balanced": False,
        "epochs": 100, "max_steps": None, "batch_size": 256, "w_aux": 1.0, "w_ssim": 0.5},
    "pretrained": {
        "start": "encoder", "look_twice": True, "painted_from": "image",
        "lossy_channel": True, "balanced": True,
        "epochs": 1, "max_steps": 600, "batch_size": 32, "w_aux": 3.0, "w_ssim": 5.0},
    "hardened": {
        "start": "encoder", "look_twice": True, "painted_from": "class",
        "lossy_channel": True, "balanced": True,
        "epochs": 1, "max_steps": 400, "batch_size": 32, "w_aux": 3.0, "w_ssim": 5.0},
}


def lossy_channel(protected: Tensor) -> Tensor:
    """Return what arrives of protected images (N, 3, H, W) in [0, 1]. The paper has none.

    Every batch gets noise. With probability 1/2 its colour is kept at half resolution only, as
    nearly every JPEG file keeps it (4:2:0, with JFIF's luma and colour differences).
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
    """Return the codes (K, 512) of the hardened form: the mean features of each class with images.

    Features are the encoder's bottleneck, averaged over its places, as in UNet.keep_class_alone.
    encoder is a trained build_classifier("encoder") in eval mode, images are uint8 (N, 3, H, W),
    labels (N,). The first 500 images of a class are used, by one look: neither more images nor the
    mirror images move the mean much.
    """
    codes = []
    for label in labels.unique():
        of_class = images[labels == label][:500]
        features = []
        for [batch] in scoring_batches(of_class):
            z = encoder.normalize(to_float(batch))
            features.append(encoder.net.features(z))
        codes.append(torch.cat(features).mean(0))
    return torch.stack(codes)


# --- Algorithm 1 ----------------------------------------------------------------------------------
def train_epoch(generator: Generator, target: nn.Module, aux: nn.Module | None, images: Tensor,
                labels: Tensor, loss_settings: dict, optimizer: torch.optim.Optimizer,
                scaler: torch.amp.GradScaler, rates: list[float], settings: dict) -> Tensor:
    """Run the inner loop of Algorithm 1, a step for each learning rate.

    images are uint8 (N, 3, H, W), labels int64 (N,): X and Y. loss_settings are what
    protective_loss takes, `settings` what train_generator writes into its file. A rest smaller than
    a batch is dropped. Returns the Loss of each step: (steps, 4).
    """
    losses = []
    start = time.monotonic()
    order = torch.randperm(len(images), device=images.device)
    for batch, rate in zip(order.split(settings["batch_size"]), rates):  # foreach x, y in X, Y
        x = to_float(random_crop_flip(images[batch], settings["flip"]))
        x = x.contiguous(memory_format=torch.channels_last)  # faster
        y = labels[batch]
        with autocast(images.device.type, settings["precision"]):
            protected = generator(x)  # delta = U(x), x' = clamp(x + delta)
            received = protected
            if settings["lossy_channel"]:
                received = lossy_channel(protected)  # ours: what arrives of x'
            received = received.contiguous()  # the view() of many a service needs it
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
        losses.append(torch.stack(loss).detach())
        print_progress(len(losses), len(rates), start, len(y))
    return torch.stack(losses)


# --- Validation (Section 4.2.1); evaluate.py reports with the same functions ----------------------
# Protected images show if visibility is higher by more than this for their own originals than for
# others. On CIFAR-10 what shows had 0.047 or more, what hides 0.028 or less. On MNIST traces of
# digits were left at 0.025 to 0.031, so an image below the limit must be looked at too.
VISIBLE = 0.03


@torch.no_grad()
def protect(generator: nn.Module, images: Tensor) -> Tensor:
    """Return what leaves the phone: uint8 images (N, 3, H, W), protected and rounded to 8 bits.

    Raises UserError if the network's output is not a number, which 8 bits would hide.
    """
    protected = []
    for [batch] in scoring_batches(images):
        output = generator(to_float(batch))
        if output.isnan().any():
            raise UserError("the output of the network is not a number")
        output = (255 * output).round()
        protected.append(output.to(torch.uint8))
    return torch.cat(protected)


def visual_cues(x: Tensor) -> Tensor:
    """Return what an eye finds in each block of 2 x 2 pixels of x: (N, 6, H / 2, W / 2).

    x is (N, 3, H, W) in [0, 1]. The six are its three colours and its structure tensor: how much it
    changes along both axes, and in which direction its stripes lie. Each is averaged over 3 x 3
    pixels, then over its block.
    """
    dx = F.pad(x.diff(dim=3), (0, 1))  # no change at the border
    dy = F.pad(x.diff(dim=2), (0, 0, 0, 1))
    structure = torch.stack([(dx * dx).sum(1), (dy * dy).sum(1), (dx * dy).sum(1)], 1)
    cues = torch.cat([x, structure], 1)
    cues = F.avg_pool2d(cues, 3, stride=1, padding=1, count_include_pad=False)
    return F.avg_pool2d(cues, 2)


def standardize(maps: Tensor) -> Tensor:
    """Make vectors (N, C, H * W) of maps (N, C, H, W), of mean 0 and length 1.

    Their products are correlations. They are in float64, which autocast leaves alone.
    """
    vectors = maps.flatten(2).double()
    return F.normalize(vectors - vectors.mean(2, keepdim=True), dim=2, eps=1e-5)


@torch.no_grad()
def visibility(images: Tensor, protected: Tensor) -> Tensor:
    """Return how well the brightness of each image can be read from its protected one: (N,).

    Both are uint8 (N, 3, H, W). Section 7.3 warns that SSIM may miss what people see; we found that
    flat areas and colour fool it. This is ours: the multiple correlation R, 0 to 1, of an image's
    brightness with the visual_cues of its protected one, over the blocks of 2 x 2 pixels. A single
    value says little, since images resemble each other: compare it with that of other images. It
    cannot see what is moved far from its place, nor what only a network can read.
    """
    values = []
    for x, x_protected in scoring_batches(images, protected):
        brightness = to_float(x).mean(1, keepdim=True)
        brightness = standardize(F.avg_pool2d(brightness, 2))
        cues = standardize(visual_cues(to_float(x_protected)))
        # R^2 = c' C^-1 c: C correlates the cues with each other, c the cues with the brightness.
        # The 1e-6 is for cues that are equal, as in grey images, or the same everywhere.
        among_cues = cues @ cues.mT + 1e-6 * torch.eye(6, device=cues.device)
        with_brightness = cues @ brightness.mT
        solution = torch.linalg.solve(among_cues, with_brightness)
        r_squared = (with_brightness * solution).sum(dim=(1, 2))
        values.append(r_squared.clamp(0, 1).sqrt())
    return torch.cat(values)


def by_term(losses: Tensor) -> dict[str, float]:
    """Turn a loss (4,) into a dict with the names of Loss."""
    return dict(zip(Loss._fields, losses.tolist()))


@torch.no_grad()
def score(images: Tensor, protected: Tensor, target: nn.Module, aux: nn.Module | None,
          labels: Tensor, loss_settings: dict | None = None) -> dict:
    """Score protected images against their originals, both uint8 (N, 3, H, W), with labels (N,).

    Returns the accuracies in percent (Eq. 5; aux_accuracy is None without an auxiliary model).
    visibility holds two means: of the protected images with their "own" originals and with "other"
    images; below 50 images they are left to chance. worst has the indices of the ten images of
    which most shows. The absolute SSIM is given as ssim (the mean, as in Figure 8) and as
    ssim_largest. With loss_settings, loss is protective_loss and its terms.
    """
    target_right = []
    aux_right = []
    aux_logits = None
    similarities = []
    loss_sums = 0
    for x, x_protected, y in scoring_batches(images, protected, labels):
        x = to_float(x)
        x_protected = to_float(x_protected)
        target_logits = target(x_protected)
        target_right.append(target_logits.argmax(1) == y)
        if aux is not None:
            aux_logits = aux(x_protected)
            aux_right.append(aux_logits.argmax(1) == y)
        similarities.append(ssim(x, x_protected).abs())
        if loss_settings is not None:
            loss = protective_loss(x, x_protected, target_logits, aux_logits, y, **loss_settings)
            loss_sums += len(y) * torch.stack(loss)
    similarity = torch.cat(similarities)
    own = visibility(images, protected)
    n = len(labels)
    other = visibility(images.roll(n // 2, 0), protected)  # far away, if labels are sorted
    scores = {
        "target_accuracy": percent(torch.cat(target_right)),  # Eq. (5)
        "aux_accuracy": None,
        "visibility": {"own": own.mean().item(), "other": other.mean().item()},
        "worst": (own - other).topk(min(10, n)).indices.tolist(),
        "ssim": similarity.mean().item(),
        "ssim_largest": similarity.max().item(),
    }
    if aux is not None:
        scores["aux_accuracy"] = percent(torch.cat(aux_right))
    if loss_settings is not None:
        scores["loss"] = by_term(loss_sums / n)
    return scores


# --- A whole training -----------------------------------------------------------------------------
def freeze(classifier: nn.Module) -> None:
    """Put a classifier into eval mode and fix its weights. Gradients still reach the image."""
    try:
        classifier.eval()
    except NotImplementedError:
        pass  # a module of torch.export stays in the mode of its export
    for parameter in classifier.parameters():
        parameter.requires_grad_(False)


def draw_protected(path: str, images: Tensor, protected: Tensor) -> None:
    """Write a PNG with uint8 images (N, 3, H, W) above their protected versions, enlarged."""
    shown = torch.cat([images, protected])
    zoom = max(1, 128 // shown.shape[3])  # 32 pixels are too few to judge by
    shown = shown.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    save_image(shown / 255, path, nrow=len(images))


def new_generator(settings: dict, encoder: Classifier | None, images: Tensor,
                  labels: Tensor) -> Generator:
    """Return the generator that a training starts with: see FORMS, and class_codes for the rest.

    `settings` are those of train_generator.
    """
    codes = None
    if settings["painted_from"] == "class":
        codes = class_codes(encoder, images, labels)
    generator = Generator(settings["look_twice"], codes)  # "Randomly initialize U"
    if settings["start"] == "encoder":
        generator.unet.encoder.levels.load_state_dict(encoder.net.levels.state_dict())
        generator.unet.encoder.requires_grad_(False)
    return generator


def describe_visibility(visible: dict) -> str:
    """Put the visibility that score() returned into words, with a warning if images show."""
    text = f"visibility {visible['own']:.3f}, of other images {visible['other']:.3f}"
    if visible["own"] - visible["other"] > VISIBLE:
        text += ", WARNING: the originals can be made out"
    return text


def describe(loss: dict) -> str:
    """Put the loss of Eq. (4) and its three terms into words."""
    return (f"{loss['total']:.3f} (target {loss['target']:.3f}, aux {loss['aux']:.3f}, "
            f"ssim {loss['ssim']:.3f})")


def train_generator(target: nn.Module, aux: nn.Module | None, data: dict, path: str, *,
                    form: str = "pretrained", encoder: Classifier | None = None,
                    epochs: int | None = None, batch_size: int | None = None, lr: float = 0.005,
                    weight_decay: float = 0.0005, w_target: float = 1.0,
                    w_aux: float | None = None, w_ssim: float | None = None, flip: bool = True,
                    precision: str | None = None, device: str | torch.device = "cpu",
                    seed: int = 0, meta: dict | None = None) -> Generator:
    """Train a generator by Algorithm 1, for any classifiers and images, and write it to path.pt.

    target and aux are modules of any kind, scripted ones too: they take images (N, 3, H, W) in
    [0, 1] and return logits (N, classes). `data` is like load_cifar10's: "train" and "validation"
    are uint8 images (N, 3, H, W), H and W >= 16, and int64 labels (N,). Data and networks are on
    `device`. `encoder` is a trained build_classifier("encoder"): U gets its layers, frozen, and the
    hardened form its codes; the form "paper" takes none. The encoder also serves as aux. If aux is
    None, there is no auxiliary model, and then images show, except with "hardened". All classifiers
    get frozen, and the encoder.

    By default epochs, batch_size, w_aux and w_ssim are those of the form in FORMS, whose max_steps
    may cap an epoch; the other settings are those of Section 4.1.3. `flip` mirrors training images
    at random, as the paper does, and lets our forms look twice: set it to False, here and for the
    encoder, if a class is the mirror image of another.
    Precision is "fp16", "bf16" or "fp32": by default fp16 on a GPU, and on a CPU the faster of the
    other two.

    Returns the best epoch by validation loss (Figure 4), with kernels rounded to 16 bits. path.pt
    holds the settings, the scores before rounding, the image size, `meta` and the log too. path.png
    shows eight validation images above what the best epoch makes of them. The printed lines warn if
    validation images can be made out (see VISIBLE). After a stop, the same call goes on from the
    last finished epoch; a finished path.pt is read.

    Raises UserError if path.pt or its checkpoint has other settings, networks or images, if it
    cannot be written, or if the loss is not finite; ValueError if form and encoder do not
    belong together; and what check_data and check_classifier raise.
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
    check_data(data, all_classes=row["painted_from"] == "class")
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
            check_classifier(classifier, data)
    if encoder is not None:
        freeze(encoder)
    # The file names all that a training depends on. flip comes before look_twice, so that
    # check_settings names what the user has changed.
    settings = {"form": form, "flip": flip} | row | loss_settings
    settings["look_twice"] = row["look_twice"] and flip
    settings |= {"epochs": epochs, "batch_size": batch_size, "lr": lr,
                 "weight_decay": weight_decay, "precision": precision, "seed": seed,
                 "target_sha256": network_fingerprint(target),
                 "aux_sha256": "none", "encoder_sha256": "none",
                 "images_sha256": fingerprint(images), "labels_sha256": fingerprint(labels),
                 "validation_sha256": fingerprint(validation_images, validation_labels)}
    if aux is not None:
        settings["aux_sha256"] = network_fingerprint(aux)
    if encoder is not None:
        settings["encoder_sha256"] = network_fingerprint(encoder)
    if load_finished(path, settings) is not None:
        generator, _ = load_generator(f"{path}.pt")
        return generator.to(device)
    checkpoint = load_checkpoint(path, settings)
    if checkpoint is not None:
        settings["precision"] = checkpoint["settings"]["precision"]
    elif precision is None:
        settings["precision"] = choose_precision(device, "fp16")

    torch.manual_seed(seed)
    generator = new_generator(settings, encoder, images, labels)
    generator.to(device, memory_format=torch.channels_last)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=settings["precision"] == "fp16")
    best = None  # what path.pt will hold
    log = []
    if checkpoint is not None:
        generator.load_state_dict(checkpoint["generator"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        best = checkpoint["best"]
        log = checkpoint["log"]

    steps = len(images) // batch_size  # of an epoch
    if row["max_steps"] is not None:
        steps = min(steps, row["max_steps"])
    with autocast(device, settings["precision"]):  # as the protected images are scored below
        clean_accuracy = accuracy(target, validation_images, validation_labels)
    print(f"{path}: form {form}, {epochs} epochs of {steps} steps; the target recognises "
          f"{clean_accuracy:.2f}% of the original validation images", flush=True)
    for epoch in range(len(log) + 1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)  # so that a resumed run draws the same
        generator.train()
        if encoder is not None:
            generator.unet.encoder.eval()  # frozen: its batch norm statistics too
        start = time.monotonic()
        rates = learning_rates(epoch, epochs, steps, lr)
        losses = train_epoch(generator, target, aux, images, labels, loss_settings, optimizer,
                             scaler, rates, settings)
        if settings["precision"] == "fp16":
            losses = losses[losses.isfinite().all(1)]  # the scaler has skipped the other steps
        loss = by_term(losses.mean(0))  # waits for a GPU
        check_finite(loss["total"], path)
        seconds = time.monotonic() - start

        generator.eval()
        with autocast(device, settings["precision"]):  # quicker; evaluate.py reports in float32
            protected = protect(generator, validation_images)
            scores = score(validation_images, protected, target, aux, validation_labels,
                           loss_settings)
        scores["clean_target_accuracy"] = clean_accuracy
        check_finite(scores["loss"]["total"], path)
        log.append({"epoch": epoch, "train": loss, "validation": scores, "seconds": seconds})
        # The loss chooses the epoch, as in the paper, which need not be the most accurate one.
        if best is None or scores["loss"]["total"] < best["meta"]["validation"]["loss"]["total"]:
            facts = settings | log[-1] | {"hardware": hardware(device),
                                          "image_size": list(images.shape[2:])}
            best = {"generator": to_16_bits(generator.state_dict()),
                    "meta": facts | (meta or {})}
            draw_protected(f"{path}.png", validation_images[:8], protected[:8])
        save(f"{path}.checkpoint", {"generator": generator.state_dict(),
                                    "optimizer": optimizer.state_dict(),
                                    "scaler": scaler.state_dict(), "best": best, "log": log,
                                    "settings": settings})
        aux_words = ""
        if aux is not None:
            aux_words = f"auxiliary {scores['aux_accuracy']:.2f}%, "
        print(f"{path}  epoch {epoch}/{epochs}, {(epochs - epoch) * seconds / 60:.0f} min left: "
              f"loss {describe(loss)}; validation {describe(scores['loss'])}: "
              f"target {scores['target_accuracy']:.2f}%, {aux_words}"
              f"|SSIM| {scores['ssim']:.4f}, {describe_visibility(scores['visibility'])}",
              flush=True)

    scores = best["meta"]["validation"]
    save(f"{path}.pt", best | {"log": log})
    os.remove(f"{path}.checkpoint")
    print(f"{path}.pt is epoch {best['meta']['epoch']}, the best: the target recognises "
          f"{scores['target_accuracy']:.2f}%, of the originals {clean_accuracy:.2f}%; "
          f"{describe_visibility(scores['visibility'])}. "
          f"Look at {path}.png: if you can tell what is on it, the training has failed")
    generator, _ = load_generator(f"{path}.pt")
    return generator.to(device)


def load_generator(path: str) -> tuple[Generator, dict]:
    """Load a file of train_generator: the generator, in eval mode on the CPU, and its meta.

    meta holds the settings, the scores and "image_size", the (H, W) that it was trained for. The
    .checkpoint of a stopped training gives its best epoch so far, and meta has "stopped_after", the
    last epoch. Raises UserError if the file is something else.
    """
    content = load(path)
    if "best" in content:
        content["best"]["meta"]["stopped_after"] = len(content["log"])
        content = content["best"]
    meta = content.get("meta", {})
    weights = content.get("generator", {})
    codes = weights.get("unet.codes")
    if meta.get("form") not in FORMS or "look_twice" not in meta:
        raise UserError(f"{path} holds no generator of this version: train one with train.py")
    generator = Generator(meta["look_twice"], codes).float()  # the codes are stored in 16 bits
    load_weights(generator, weights, path)
    generator.to(memory_format=torch.channels_last)  # faster
    return generator.eval(), meta


# --- The command ----------------------------------------------------------------------------------
AUXILIARY_MODELS = (*CLASSIFIERS, "encoder", "none")  # the names that --aux takes
LEARNING_RATES = {("googlenet", "vgg13_bn"): 0.001}  # Section 4.1.3: 0.005 for all others


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
    parser.add_argument("--aux", nargs="+", metavar="NAME",
                        choices=[*AUXILIARY_MODELS, "all"],
                        help="the auxiliary model: the same names; encoder, the one that U starts "
                             "from (default; with --form paper name another); none, then images "
                             "show, except with hardened; or all (the eight)")
    parser.add_argument("--form", choices=FORMS, default="pretrained",
                        help="paper: the paper's own; pretrained: ours, to study the method; "
                             "hardened: ours, to protect pictures (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, help=describe_default("epochs"))
    parser.add_argument("--batch-size", type=positive_int, help=describe_default("batch_size"))
    parser.add_argument("--w-target", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--w-aux", type=float, help=describe_default("w_aux"))
    parser.add_argument("--w-ssim", type=float, help=describe_default("w_ssim"))
    parser.add_argument("--lr", type=float,
                        help="the highest learning rate (default: 0.005; googlenet with vgg13_bn "
                             "0.001)")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"],
                        help="(default: fp16 on a GPU, on a CPU the faster of the others)")
    parser.add_argument("--out", default="runs", metavar="FOLDER",
                        help="where generators go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.aux is None:
        if FORMS[args.form]["start"] != "encoder":
            parser.error(f"form {args.form} has no encoder: name an auxiliary model, --aux NAME")
        args.aux = ["encoder"]
    return args


def choose_pairs(targets: list[str], auxes: list[str]) -> list[tuple[str, str]]:
    """Return every pair of the targets and auxiliary models asked for; "all" stands for the eight.

    No model is paired with itself. Raises UserError if nothing is left.
    """
    pairs = []
    for target in CLASSIFIERS:
        for aux in AUXILIARY_MODELS:
            target_asked = target in targets or "all" in targets
            aux_asked = aux in auxes or ("all" in auxes and aux in CLASSIFIERS)
            if target_asked and aux_asked and target != aux:
                pairs.append((target, aux))
    if not pairs:
        raise UserError("a target is never its own auxiliary model: name another, or --aux none")
    return pairs


def main() -> None:
    args = parse_arguments()
    pairs = choose_pairs(args.target, args.aux)
    classifiers = {"none": None}
    for name in (*CLASSIFIERS, "encoder"):
        if any(name in pair for pair in pairs):
            classifiers[name] = load_classifier(name, args.device)
    encoder = None
    if FORMS[args.form]["start"] == "encoder":
        encoder = load_classifier("encoder", args.device)
    data = load_cifar10(args.data, args.device)
    failed = 0
    for target, aux in pairs:
        path = f"{args.out}/generator-{target}-{aux}"
        if args.form != "pretrained":
            path += f"-{args.form}"
        lr = args.lr or LEARNING_RATES.get((target, aux), 0.005)
        try:
            train_generator(
                classifiers[target], classifiers[aux], data, path, form=args.form,
                encoder=encoder, epochs=args.epochs, batch_size=args.batch_size, lr=lr,
                w_target=args.w_target, w_aux=args.w_aux, w_ssim=args.w_ssim,
                precision=args.precision, device=args.device, seed=args.seed,
                meta={"target": target, "aux": aux})
        except UserError as error:  # the other pairs go on
            print(f"error: {error}", flush=True)
            failed += 1
    if failed:
        raise UserError(f"{failed} of {len(pairs)} generators failed, see above")


if __name__ == "__main__":
    run(main, stopped="stopped: the same command goes on after the last finished epoch")
