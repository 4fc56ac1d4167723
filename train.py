"""Train protective perturbation generators: Algorithm 1 with the loss of Eq. (1) to (4).

    python train.py --target vgg13_bn --aux resnet18               the paper's form
    python train.py --target vgg13_bn --aux resnet18 --hardened    painted from the bottleneck alone
    torchrun --nproc-per-node 8 -- train.py --target all --aux all none     the paper's 64
"""

import argparse
import io
import json
import math
import os
import time
from collections import namedtuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

from classifiers import (CLASSIFIERS, SCORING_BATCH, Classifier, UserError, accuracy,
                         add_common_arguments, autocast, check_settings, choose_precision,
                         find_classifier, hardware, learning_rate, load, load_checkpoint,
                         load_cifar10, load_classifier, load_weights, positive_int,
                         print_progress, random_crop_flip, run, save, to_16_bits, to_float)
from ssim import ssim
from unet import Generator

Loss = namedtuple("Loss", "total target aux ssim")  # Eq. (4), then (1), (2) and (3)


def protective_loss(x: Tensor, protected: Tensor, target_logits: Tensor, aux_logits: Tensor | None,
                    labels: Tensor, w_target: float = 1.0, w_aux: float = 1.0,
                    w_ssim: float = 0.5) -> Loss:
    """The loss of Section 3.3 and its terms, each the mean over the batch; minimise `total`.

    x and protected are (N, 3, H, W) in [0, 1], the logits (N, classes), the labels (N,). The
    default weights are those of Section 4.1.3; w_ssim is the paper's omega_SI. Without an auxiliary
    model (aux_logits None) its term is 0. Raises ValueError where ssim() does.
    """
    loss_target = F.cross_entropy(target_logits.float(), labels)  # Eq. (1)
    if aux_logits is None:
        loss_aux = torch.zeros_like(loss_target)
    else:
        loss_aux = -F.cross_entropy(aux_logits.float(), labels)  # Eq. (2)
    loss_ssim = ssim(x, protected).mean()  # Eq. (3)
    total = w_target * loss_target + w_aux * loss_aux + w_ssim * loss_ssim  # Eq. (4)
    return Loss(total, loss_target, loss_aux, loss_ssim)


def lossy_channel(protected: Tensor) -> Tensor:
    """What reaches the classifiers while a hardened generator is trained: (N, 3, H, W) in [0, 1].

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


# --- Validation (Section 4.2.1); evaluate.py reports with the same functions ----------------------
@torch.no_grad()
def protect(generator: nn.Module, images: Tensor) -> Tensor:
    """What leaves the phone: uint8 images (N, 3, H, W) to protected ones, rounded to 8 bits.

    Raises UserError where the network gives no number, which 8 bits would hide.
    """
    protected = []
    for batch in images.split(SCORING_BATCH):
        output = generator(to_float(batch))
        if output.isnan().any():
            raise UserError("the output of the network is not a number")
        output = (255 * output).round()
        protected.append(output.to(torch.uint8))
    return torch.cat(protected)


@torch.no_grad()
def score(images: Tensor, protected: Tensor, target: nn.Module, aux: nn.Module | None,
          labels: Tensor, weights: tuple = (1.0, 1.0, 0.5)) -> dict:
    """Score protected images against their originals, both uint8 (N, 3, H, W); labels (N,).

    Returns target_accuracy and aux_accuracy in percent (Eq. 5; None without an auxiliary model),
    the absolute SSIM as ssim (mean, as in Figure 8), ssim_largest and ssim_over_0.1 (percent of
    images), the up to ten images with the largest as worst (indices), and the loss of Eq. (4) with
    these weights.
    """
    loss_sum = 0
    target_correct = 0
    aux_correct = 0
    aux_logits = None
    similarities = []
    for i in range(0, len(images), SCORING_BATCH):
        x = to_float(images[i:i + SCORING_BATCH])
        x_protected = to_float(protected[i:i + SCORING_BATCH])
        y = labels[i:i + SCORING_BATCH]
        target_logits = target(x_protected)
        target_correct += (target_logits.argmax(1) == y).sum().item()
        if aux is not None:
            aux_logits = aux(x_protected)
            aux_correct += (aux_logits.argmax(1) == y).sum().item()
        similarities.append(ssim(x, x_protected).abs())
        loss = protective_loss(x, x_protected, target_logits, aux_logits, y, *weights)
        loss_sum += len(y) * loss.total.item()
    n = len(labels)
    similarity = torch.cat(similarities)
    return {
        "target_accuracy": 100 * target_correct / n,  # Eq. (5)
        "aux_accuracy": None if aux is None else 100 * aux_correct / n,
        "ssim": similarity.mean().item(),
        "ssim_largest": similarity.max().item(),
        "ssim_over_0.1": 100 * (similarity > 0.1).float().mean().item(),
        "worst": similarity.topk(min(10, n)).indices.tolist(),
        "loss": loss_sum / n,
    }


def encode_png(image: Tensor) -> bytes:
    """A uint8 image (3, H, W) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return file.getvalue()


# --- Algorithm 1 ----------------------------------------------------------------------------------
# The settings go with the start of U; "random" is the paper's (Section 4.1.3). From a trained
# encoder one epoch is enough, and -CE(aux), which has no bound, needs less weight: at 1 that
# epoch cost the target resnet18 8 points, at 0.3 it hid some images of densenet121 less well.
DEFAULTS = {
    "random": {"epochs": 100, "batch_size": 256, "w_aux": 1.0},
    "encoder": {"epochs": 1, "batch_size": 64, "w_aux": 0.5},
}


def check_classifier(classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raise ValueError where these do not belong together: now, not after an epoch."""
    if labels.dtype != torch.int64 or labels.shape != (len(images),):
        raise ValueError(f"labels must be torch.int64 ({len(images)},), not {labels.dtype} "
                         f"{tuple(labels.shape)}")
    with torch.no_grad():
        logits = classifier(to_float(images[:2]))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("a classifier must return logits (N, classes), nothing else")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels must be 0 to {logits.shape[1] - 1}, as many as there are logits")


def train_generator(target: nn.Module, aux: nn.Module | None, data: dict, path: str, *,
                    encoder: Classifier | None = None, hardened: bool = False,
                    epochs: int | None = None, batch_size: int | None = None, lr: float = 0.005,
                    weight_decay: float = 0.0005, w_target: float = 1.0,
                    w_aux: float | None = None, w_ssim: float = 0.5,
                    precision: str | None = None, device: str = "cpu", seed: int = 0,
                    meta: dict | None = None) -> Generator:
    """Algorithm 1, for any classifiers and images: train a generator and write it to path.pt.

    target and aux take images (N, 3, H, W) in [0, 1] and give logits (N, classes); they are frozen.
    `data` is as of load_cifar10: "train" and "validation", each uint8 images (N, 3, H, W), H and W
    >= 16, and int64 labels (N,). It is on `device`, as are all networks. `encoder` is a trained
    build_classifier("encoder"): its layers are copied into U and frozen; without one all of U
    starts at random, as in the paper. epochs, batch_size and w_aux are by default those of
    DEFAULTS, the rest those of Section 4.1.3. Precision is "fp16", "bf16" or "fp32", by default 16
    bits where they are fast; a finished file of any is read then.

    Returns the best epoch by validation loss (Figure 4), its kernels rounded to 16 bits; in the
    file are the settings, its scores (before rounding) and `meta` too. path.jsonl is the log;
    path.png shows eight validation images above what the best epoch makes of them. After a stop,
    the same call goes on from the last finished epoch; what is finished is read from path.pt.

    Raises UserError where that or a checkpoint is of other settings, and on a loss that is not
    finite; ValueError where classifiers and data do not belong together.
    """
    start_of_u = "random" if encoder is None else "encoder"
    if epochs is None:
        epochs = DEFAULTS[start_of_u]["epochs"]
    if batch_size is None:
        batch_size = DEFAULTS[start_of_u]["batch_size"]
    if w_aux is None:
        w_aux = DEFAULTS[start_of_u]["w_aux"]
    weights = (w_target, w_aux, w_ssim)
    images, labels = data["train"]
    validation_images, validation_labels = data["validation"]
    settings = {"start": start_of_u, "hardened": hardened, "epochs": epochs,
                "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay,
                "w_target": w_target, "w_aux": w_aux, "w_ssim": w_ssim, "precision": precision,
                "seed": seed, "training_images": list(images.shape)}
    for classifier in (target, aux):
        if classifier is not None:
            classifier.eval().requires_grad_(False)  # gradients pass through, nothing changes
            check_classifier(classifier, images, labels)
    clean_accuracy = accuracy(target, validation_images, validation_labels)
    print(f"{path}: the target recognises {clean_accuracy:.2f}% of the original validation images")
    if os.path.exists(f"{path}.pt"):
        generator, before = load_generator(f"{path}.pt")
        check_settings(f"{path}.pt", before, settings)
        generator.to(device)
        protected = protect(generator, validation_images)
        target_accuracy = accuracy(target, protected, validation_labels)
        print(f"{path}.pt is finished, {target_accuracy:.2f}% of the protected ones: delete it to "
              "train it again")
        return generator

    precision = precision or choose_precision(device, "fp16")
    settings["precision"] = precision
    torch.manual_seed(seed)
    generator = Generator(hardened)  # "Randomly initialize U"
    generator.to(device, memory_format=torch.channels_last)
    if encoder is not None:
        generator.unet.encoder.levels.load_state_dict(encoder.net.levels.state_dict())
        generator.unet.encoder.requires_grad_(False)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision == "fp16")
    best = None  # what path.pt will hold
    log = []
    checkpoint = load_checkpoint(path, settings)
    if checkpoint is not None:
        generator.load_state_dict(checkpoint["generator"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        best = checkpoint["best"]
        log = checkpoint["log"]

    batch_size = min(batch_size, len(images))
    steps_per_epoch = len(images) // batch_size  # a rest smaller than a batch is dropped
    steps = epochs * steps_per_epoch
    print(f"{path}: {epochs} epochs of {steps_per_epoch} steps", flush=True)
    if encoder is not None:
        print(f"U starts from the trained encoder, frozen, with w_aux {w_aux}; the paper's starts "
              "at random", flush=True)
    for epoch in range(len(log) + 1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)  # of each epoch: resumed or not, it draws the same
        generator.train()
        if encoder is not None:
            generator.unet.encoder.eval()  # frozen: its batch norm statistics too
        start = time.monotonic()
        loss_sum = 0
        order = torch.randperm(len(images), device=device)
        for i in range(steps_per_epoch):
            step = (epoch - 1) * steps_per_epoch + i
            batch = order[i * batch_size:(i + 1) * batch_size]
            x = to_float(random_crop_flip(images[batch]))
            y = labels[batch]
            with autocast(device, precision):
                protected = generator(x)  # delta = U(x), x' = clamp(x + delta)
                received = protected
                if hardened:
                    received = lossy_channel(protected)
                target_logits = target(received)
                aux_logits = None
                if aux is not None:
                    aux_logits = aux(received)
            # Eq. (3) looks at what leaves the phone, the classifiers at what arrives.
            loss = protective_loss(x, protected, target_logits, aux_logits, y, *weights)
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr)
            scaler.scale(loss.total).backward()
            scaler.step(optimizer)  # "Update U to minimize Loss"
            scaler.update()
            optimizer.zero_grad()
            loss_sum += torch.stack(loss).detach()
            if i % 50 == 49:
                print_progress(path, epoch, epochs, start, i + 1, steps_per_epoch, batch_size)
        train_loss = Loss(*(loss_sum / steps_per_epoch).tolist())  # waits for a GPU
        seconds = time.monotonic() - start

        diverged = (f"{path}: the loss is not finite in epoch {epoch}: try a lower --lr or "
                    "--precision fp32, and delete its .checkpoint")
        if not math.isfinite(train_loss.total):
            raise UserError(diverged)
        generator.eval()
        with autocast(device, precision):  # quicker; evaluate.py reports in float32
            protected = protect(generator, validation_images)
            scores = score(validation_images, protected, target, aux, validation_labels, weights)
        if not math.isfinite(scores["loss"]):
            raise UserError(diverged)
        log.append({"epoch": epoch, "train": train_loss._asdict(), "validation": scores,
                    "seconds": seconds})
        if best is None or scores["loss"] < best["meta"]["validation"]["loss"]:
            facts = settings | log[-1] | {"hardware": hardware(device)}
            best = {"generator": to_16_bits(generator.state_dict()),
                    "meta": facts | (meta or {})}
            shown = torch.cat([validation_images[:8], protected[:8]])
            zoom = max(1, 128 // shown.shape[3])  # 32 pixels are too few to judge by
            shown = shown.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
            grid = make_grid(shown, nrow=len(shown) // 2)
            save(f"{path}.png", encode_png(grid))
        lines = [json.dumps(line) + "\n" for line in log]
        save(f"{path}.jsonl", "".join(lines).encode())
        checkpoint = {"generator": generator.state_dict(), "optimizer": optimizer.state_dict(),
                      "scaler": scaler.state_dict(), "best": best, "log": log,
                      "settings": settings}
        save(f"{path}.checkpoint", checkpoint)
        aux_words = ""
        if aux is not None:
            aux_words = f"auxiliary {scores['aux_accuracy']:.2f}%, "
        print(f"{path}  epoch {epoch}/{epochs}  loss {train_loss.total:.3f}, validation "
              f"{scores['loss']:.3f}: target {scores['target_accuracy']:.2f}%, {aux_words}"
              f"|SSIM| {scores['ssim']:.4f}", flush=True)

    save(f"{path}.pt", best)
    os.remove(f"{path}.checkpoint")
    print(f"{path}.pt is epoch {best['meta']['epoch']}, the best. Look at {path}.png: "
          "if you can tell what is on it, the run has failed")
    generator, _ = load_generator(f"{path}.pt")
    return generator.to(device)


def load_generator(path: str) -> tuple[Generator, dict]:
    """A file of train_generator: (generator in eval mode on the CPU, its settings and scores).

    Raises UserError where it is something else.
    """
    content = load(path)
    meta = content.get("meta", {})
    if "generator" not in content or "hardened" not in meta:
        raise UserError(f"{path} holds no generator: train one with train.py")
    generator = Generator(meta["hardened"])
    load_weights(generator, content["generator"], path)
    return generator.eval(), meta


# --- The command ----------------------------------------------------------------------------------
def describe_default(name: str) -> str:
    values = [f"{kind} {row[name]}" for kind, row in DEFAULTS.items()]
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
    parser.add_argument("--start", choices=["encoder", "random"],
                        help="a frozen encoder that recognises, or nothing, as in the paper "
                             "(default: encoder on a CPU or with --hardened, else random)")
    parser.add_argument("--hardened", action="store_true",
                        help="paint from the bottleneck alone, train over a lossy channel")
    parser.add_argument("--epochs", type=positive_int, help=describe_default("epochs"))
    parser.add_argument("--batch-size", type=positive_int, help=describe_default("batch_size"))
    parser.add_argument("--w-aux", type=float, help=describe_default("w_aux"))
    parser.add_argument("--w-target", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--w-ssim", type=float, default=0.5, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float,
                        help="the highest (default: 0.005; googlenet with vgg13_bn 0.001)")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"],
                        help="(default: 16 bits where they are fast)")
    parser.add_argument("--limit", type=positive_int,
                        help="to see it run, on LIMIT images of each split, to quick-look-*.pt")
    parser.add_argument("--out", default="runs", metavar="FOLDER",
                        help="where generators go (default: %(default)s)")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.start is None:
        # Hardened, a random start loses the target: all that it reads is what the encoder sees.
        args.start = "encoder" if args.hardened or args.device == "cpu" else "random"
    return args


def choose_pairs(targets: list[str], auxes: list[str]) -> list[tuple[str, str]]:
    """Every (target, auxiliary) of the names asked for, "all" understood; none is its own."""
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
    pairs = choose_pairs(args.target, args.aux)
    if "RANK" in os.environ:  # under torchrun: every process has its share and its own GPU
        pairs = pairs[int(os.environ["RANK"])::int(os.environ["WORLD_SIZE"])]
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    needed = [name for name in CLASSIFIERS if any(name in pair for pair in pairs)]
    if args.start == "encoder":
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
    encoder = classifiers.get("encoder")

    failed = 0
    for target, aux in pairs:
        kind = "generator"
        if args.limit is not None:
            kind = f"quick-look-{args.limit}"  # which nothing takes for a generator
        path = f"{args.out}/{kind}-{target}-{aux}"
        if args.hardened:
            path += "-hardened"
        if os.path.exists(f"{path}.pt"):
            _, meta = load_generator(f"{path}.pt")
            print(f"{path}.pt is finished (start {meta['start']}, {meta['epochs']} epochs of "
                  f"{meta['batch_size']}, w_aux {meta['w_aux']}, seed {meta['seed']}): delete it "
                  "to train it again")
            continue
        lr = args.lr
        if lr is None:
            lr = 0.001 if (target, aux) == ("googlenet", "vgg13_bn") else 0.005  # Section 4.1.3
        meta = {"target": target, "aux": aux, "limit": args.limit,
                "clean_target_accuracy": accuracy(classifiers[target], *data["test"])}
        try:
            train_generator(
                classifiers[target], classifiers[aux], data, path, encoder=encoder,
                hardened=args.hardened, epochs=args.epochs, batch_size=args.batch_size, lr=lr,
                w_target=args.w_target, w_aux=args.w_aux, w_ssim=args.w_ssim,
                precision=args.precision, device=device, seed=args.seed, meta=meta)
        except UserError as error:  # one that diverges does not stop the others
            print(f"error: {error}", flush=True)
            failed += 1
    if failed and "RANK" not in os.environ:  # torchrun would stop the other processes
        raise UserError(f"{failed} of {len(pairs)} generators failed, see above")


if __name__ == "__main__":
    run(main)
