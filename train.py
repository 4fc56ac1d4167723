"""Train protective perturbation generators: Algorithm 1 with the loss of Eq. (1) to (4).

    python train.py --target vgg13_bn --aux resnet18                          one generator
    python train.py --target vgg13_bn --aux resnet18 --hardened               painted from the bottleneck alone
    torchrun --nproc-per-node 8 -- train.py --target all --aux all none       all of the paper, split over processes
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is one line, also while torch is still being imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"\nstopped\n") and 130))

import argparse
import contextlib
import hashlib
import json
import math
import random
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torchvision.utils import save_image

from classifiers import (CLASSIFIERS, UserError, add_common_arguments, augment, autocast, check_settings,
                         choose_precision, command, each, find_classifier, folder, hardware, load, load_cifar10,
                         load_classifier, number, remove, save, to_float, train_classifier, training)
from ssim import ssim
from unet import Encoder, Generator

# Section 4.1.3. A CPU takes fewer epochs, of more steps, from an encoder that has learnt to recognise.
SETTINGS = {"lr": 0.005, "weight_decay": 0.0005, "w_target": 1.0, "w_aux": 1.0, "w_ssim": 0.5, "seed": 0,
            "hardened": False}
# Not the paper's. The bottleneck hides by itself; at weight 1 the boundless -CE(aux) cost the target whole classes.
HARDENED = {"hardened": True, "w_aux": 0.1, "epochs": 1, "batch_size": 64}
DEFAULTS = {"cuda": {"start": "random", "epochs": 100, "batch_size": 256},
            "cpu": {"start": "encoder", "epochs": 4, "batch_size": 64}}
Loss = namedtuple("Loss", "total target aux ssim")  # Eq. (4), then (1), (2) and (3)


def protective_loss(x: Tensor, protected: Tensor, target_logits: Tensor, aux_logits: Tensor | None, labels: Tensor,
                    w_target: float = 1.0, w_aux: float = 1.0, w_ssim: float = 0.5) -> Loss:
    """The loss of Section 3.3 and its terms, each the mean over the batch; training minimises `total`.

    w_ssim is the paper's omega_SI; the default weights are those of Section 4.1.3. x and protected are (N, 3, H, W)
    in [0, 1], the logits (N, classes), the labels (N,). Without an auxiliary model (aux_logits None) its term is 0.
    Raises ValueError where ssim() does.
    """
    loss_target = F.cross_entropy(target_logits.float(), labels)  # Eq. (1)
    loss_aux = -F.cross_entropy(aux_logits.float(), labels) if aux_logits is not None else 0 * loss_target  # Eq. (2)
    loss_ssim = ssim(x, protected).mean()  # Eq. (3)
    total = w_target * loss_target + w_aux * loss_aux + w_ssim * loss_ssim  # Eq. (4)
    return Loss(total, loss_target, loss_aux, loss_ssim)


# --- Scoring (Section 4.2.1): validation here, every report in evaluate.py --------------------------------------------
@torch.no_grad()
def protect(generator: nn.Module, images: Tensor) -> Tensor:
    """What leaves the phone: uint8 images (N, 3, H, W) to the generator's output for them, rounded to 8 bits.

    Raises FloatingPointError where that is not a number, which 8 bits would hide.
    """
    protected = []
    for batch in images.split(500):
        output = 255 * generator(to_float(batch))
        if output.isnan().any():
            raise FloatingPointError("the output of the U-Net is not finite")
        protected.append(output.round().to(torch.uint8))
    return torch.cat(protected)


@torch.no_grad()
def score(images: Tensor, protected: Tensor, target: nn.Module, aux: nn.Module | None, labels: Tensor,
          weights: tuple = ()) -> dict:
    """Score protected images against their originals, both uint8 (N, 3, H, W), labels (N,); weights: Eq. (4)'s.

    Returns target_accuracy and aux_accuracy in percent (Eq. 5; None without an auxiliary model), the absolute SSIM as
    ssim (mean, as in Figure 8), ssim_largest and ssim_over_0.1 (percent of images), and the loss of Eq. (4).
    """
    loss, target_right, aux_right, similarities = 0, 0, 0, []
    for x, hidden, label in zip(images.split(500), protected.split(500), labels.split(500)):
        x, hidden = to_float(x), to_float(hidden)
        target_logits, aux_logits = target(hidden), aux(hidden) if aux else None
        loss += len(label) * protective_loss(x, hidden, target_logits, aux_logits, label, *weights).total.item()
        target_right += (target_logits.argmax(1) == label).sum().item()
        aux_right += (aux_logits.argmax(1) == label).sum().item() if aux else 0
        similarities.append(ssim(x, hidden).abs())
    similarity = torch.cat(similarities)
    return {"target_accuracy": 100 * target_right / len(labels),
            "aux_accuracy": 100 * aux_right / len(labels) if aux else None, "loss": loss / len(labels),
            "ssim": similarity.mean().item(), "ssim_largest": similarity.max().item(),
            "ssim_over_0.1": 100 * (similarity > 0.1).float().mean().item()}


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------
def bad_wire(protected: Tensor) -> Tensor:
    """What the classifiers see while a hardened generator is trained: images (N, 3, H, W) in [0, 1] to the same.

    Noise always; for half of the batches, drawn at random, colour at half resolution too, as in nearly every JPEG file
    (4:2:0; JFIF's luminance y and colour differences). SSIM and validation take what leaves the phone.
    """
    noisy = (protected + 0.1 * torch.randn_like(protected)).clamp(0, 1)
    if torch.rand(()) < 0.5:
        return noisy
    r, g, b = noisy.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    colour = F.avg_pool2d(torch.stack([r - y, b - y], 1), 2, ceil_mode=True)
    r, b = (F.interpolate(colour, noisy.shape[2:], mode="bilinear") + y[:, None]).unbind(1)
    return torch.stack([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], 1).clamp(0, 1)


def train_generator(target: nn.Module, aux: nn.Module | None, data: dict, path: str, settings: dict | None = None,
                    encoder: Encoder | None = None, device: str = "cpu") -> Generator:
    """Algorithm 1, for any classifiers and images: train a generator, write it to path.pt and return it.

    target and aux take images (N, 3, H, W) in [0, 1] and give logits (N, classes); they are frozen. `data` is as of
    load_cifar10: "train" and "validation", uint8 images (N, 3, H, W), H and W >= 16, and int64 labels (N,), on
    `device`, as are all networks. `settings` override SETTINGS and DEFAULTS. A trained `encoder` is copied and frozen;
    without one all of U starts at random; a hardened generator wants one, and HARDENED. The best epoch by validation
    loss is the generator; path.jsonl is the log, path.png eight validation pictures above its protected versions.
    After a stop, the same call goes on from the last finished epoch; after the end, it reads the file. Raises
    FloatingPointError on a loss that is not finite.
    """
    on = "cuda" if device.startswith("cuda") else "cpu"
    settings = (SETTINGS | DEFAULTS[on] | {"precision": choose_precision(device, "fp16")} | (settings or {})
                | {"start": "encoder" if encoder else "random"})
    if os.path.exists(f"{path}.pt") and not os.path.exists(f"{path}.checkpoint"):
        generator, meta = load_generator(f"{path}.pt")
        check_settings(f"{path}.pt", meta, settings)
        print(f"{path}.pt is finished (--force, or deleting it, trains it again)")
        return generator.to(device)
    precision, weights = settings["precision"], [settings[key] for key in ("w_target", "w_aux", "w_ssim")]
    (images, labels), (validation, validation_labels), log = data["train"], data["validation"], []
    for classifier in filter(None, (target, aux)):  # gradients pass through them, nothing in them changes
        classifier.eval().requires_grad_(False)
    torch.manual_seed(settings["seed"])
    generator = Generator(settings["hardened"]).to(device, memory_format=torch.channels_last)  # "Randomly initialize U"
    if encoder:
        generator.unet.encoder.levels.load_state_dict(encoder.levels.state_dict())
        generator.unet.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad],
                                  weight_decay=settings["weight_decay"], fused=True)
    scaler = torch.amp.GradScaler(on, enabled=precision == "fp16")
    print(f"{path}.png shows, from the first epoch on, what the best does to eight validation pictures")
    parts = {"generator": generator, "optimizer": optimizer, "scaler": scaler}
    for epoch, batches in training(path, parts, settings, log, len(images), device):
        start, terms = time.monotonic(), []
        generator.train()
        generator.unet.encoder.train(not encoder)  # frozen: its batch norm statistics too
        for batch in batches:
            x, y = to_float(augment(images[batch])), labels[batch]
            with autocast(device, precision):
                protected = generator(x)  # delta = U(x), x' = clamp(x + delta); hardened: clamp(mean + delta)
                arrived = bad_wire(protected) if settings["hardened"] else protected
                target_logits = target(arrived)
                aux_logits = aux(arrived) if aux else None
            loss = protective_loss(x, protected, target_logits, aux_logits, y, *weights)
            scaler.scale(loss.total).backward()
            scaler.step(optimizer)  # "Update U to minimize Loss"
            scaler.update()
            optimizer.zero_grad()
            terms.append(torch.stack(loss).detach())  # stays on the device: nothing waits for a GPU inside an epoch
        seconds, means = time.monotonic() - start, dict(zip(Loss._fields, torch.stack(terms).mean(0).tolist()))
        with autocast(device, precision):  # quicker; evaluate.py reports in float32
            protected = protect(generator.eval(), validation)
            result = score(validation, protected, target, aux, validation_labels, weights)
        if not math.isfinite(sum(means.values()) + result["loss"]):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}")
        best = all(result["loss"] < line["validation"]["loss"] for line in log)
        log.append({"epoch": epoch, "train": means, "validation": result, "seconds": seconds})
        if best:  # kernels in 16 bits: 15 MB, not 31
            save_image(torch.cat([validation[:8], protected[:8]]) / 255, f"{path}.png", nrow=8)
            state = {key: value.half() if value.dim() == 4 else value for key, value in generator.state_dict().items()}
            save(f"{path}.pt", {"generator": state, "meta": settings | log[-1] | {"hardware": hardware(device)}})
        save(f"{path}.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
        aux_words = f"auxiliary {result['aux_accuracy']:.2f}%, " if aux else ""
        print(f"{path}  epoch {epoch}/{settings['epochs']}  loss {means['total']:.3f}, validation {result['loss']:.3f}"
              f"{' (best)' * best}: target {result['target_accuracy']:.2f}%, {aux_words}|SSIM| {result['ssim']:.4f}")
    remove(f"{path}.checkpoint")
    return load_generator(f"{path}.pt")[0].to(device)


def load_generator(path: str) -> tuple[Generator, dict]:
    """A file of train_generator: (generator in eval mode on the CPU, its settings and scores). Raises UserError."""
    meta = load(path).get("meta", {})
    if "hardened" not in meta:
        raise UserError(f"{path} does not say which form of generator it holds: train it with train.py")
    generator = Generator(meta["hardened"])
    load(path, generator, "generator")
    return generator.eval(), meta


# --- The command ------------------------------------------------------------------------------------------------------
def fingerprint(name: str) -> str | None:
    """The start of the SHA-256 of a classifier's file: by it a generator knows what it was trained with."""
    path = find_classifier(name)
    return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def arguments() -> argparse.Namespace:
    """The command line, understood; `pairs` is what it asks for: path of a generator (no ending) to (target, aux)."""
    parser = argparse.ArgumentParser(description="Train protective perturbation generators (Algorithm 1): one for each "
                                                 "combination of --target and --aux, finished ones skipped.")
    option, here = parser.add_argument, DEFAULTS["cuda" if torch.cuda.is_available() else "cpu"]
    option("--target", nargs="+", required=True, choices=[*CLASSIFIERS, "all"], metavar="NAME",
           help=f"the recognition service: {', '.join(CLASSIFIERS)}, or all")
    option("--aux", nargs="+", required=True, choices=[*CLASSIFIERS, "none", "all"], metavar="NAME",
           help="the auxiliary model: the same names, none, or all (without none)")
    add_common_arguments(parser)
    option("--start", choices=("encoder", "random"), help="a frozen encoder that recognises, or nothing, as in the "
                                                          f"paper (default here: {here['start']})")
    option("--hardened", action="store_true", help="paint from the encoder's last map alone, train over a bad wire; "
           "defaults: " + ", ".join(f"{key} {value}" for key, value in HARDENED.items() if key != "hardened"))
    option("--epochs", type=number(int, 1), help=f"(default here: {here['epochs']})")
    option("--batch-size", type=number(int, 2), help=f"(default here: {here['batch_size']})")
    option("--precision", choices=("fp16", "bf16", "fp32"), help="(default: 16 bits where they are fast)")
    option("--lr", type=number(float, 1e-9), help="the highest (default: 0.005; googlenet with vgg13_bn: 0.001)")
    for term in "target", "aux", "ssim":
        option(f"--w-{term}", type=number(float, 0),
               help=f"weight of this term in Eq. (4) (default: {SETTINGS[f'w_{term}']})")
    option("--limit", type=number(int, 2), help="use the first LIMIT images of each split only (default: all)")
    option("--out", type=folder, default="runs", metavar="FOLDER", help="where generators go (default: %(default)s)")
    option("--force", action="store_true", help="train again what is finished, start over what is not")
    args = parser.parse_args()
    default = DEFAULTS["cuda" if args.device.startswith("cuda") else "cpu"]["start"]
    args.start = args.start or ("encoder" if args.hardened else default)
    args.pairs = {f"{args.out}/generator-{target}-{aux}{'-hardened' * args.hardened}": (target, aux)
                  for target in CLASSIFIERS for aux in (*CLASSIFIERS, "none")
                  if target != aux and {target, "all"} & {*args.target}
                  and (aux in args.aux or aux != "none" and "all" in args.aux)}
    if not args.pairs:
        parser.error("a target is never its own auxiliary: name another one, or use --aux none")
    return args


def train_pair(path: str, args: argparse.Namespace, data: dict) -> None:
    """Train the generator at `path`, one of args.pairs, with the settings asked for and else the defaults."""
    target, aux = args.pairs[path]
    asked = "epochs", "batch_size", "precision", "lr", "w_target", "w_aux", "w_ssim", "seed"
    settings = {"lr": 0.001} if (target, aux) == ("googlenet", "vgg13_bn") else {}  # Section 4.1.3
    settings |= HARDENED if args.hardened else {}
    settings |= {key: getattr(args, key) for key in asked if getattr(args, key) is not None}
    names = {"target": target, "aux": aux, "encoder": "encoder" if args.start == "encoder" else "none"}
    networks = {role: load_classifier(name, args.device) for role, name in names.items() if name != "none"}
    settings |= {"target": target, "aux": aux, "limit": args.limit} | {
        f"{role}_sha256": fingerprint(names[role]) for role in networks}
    few = {part: (images[:args.limit], labels[:args.limit]) for part, (images, labels) in data.items()}
    try:
        train_generator(networks["target"], networks.get("aux"), few, path, settings, networks.get("encoder"),
                        args.device)
    except FloatingPointError as error:  # names the pair, so that nobody adds --force to --target all
        raise UserError(f"{error}: try --target {target} --aux {aux}{' --hardened' * args.hardened} --force with a "
                        "lower --lr") from error


def main() -> None:
    args = arguments()
    if args.world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    barrier = dist.barrier if args.world > 1 else lambda: None
    data = load_cifar10(args.data, args.device)
    if args.force and args.rank == 0:  # all now: after an interruption the command without --force does the rest
        remove(*(f"{path}.{ending}" for path in args.pairs for ending in ("pt", "jsonl", "png", "checkpoint")))
    needed = {args.start, *sum(args.pairs.values(), ())} - {"random", "none"}
    missing = sorted(name for name in needed if not find_classifier(name))
    barrier()  # all have looked
    if mine := missing[args.rank::args.world]:
        print(f"trained first (on a CPU hours), since neither in runs/ nor in weights/: {', '.join(mine)}")
    with contextlib.suppress(UserError):  # said already; what needs it fails below
        each(mine, lambda name: train_classifier(name, data, args.device, seed=args.seed))
    barrier()
    paths = random.Random(0).sample(sorted(args.pairs), len(args.pairs))  # no rank gets all of the costliest auxiliary
    try:
        each(paths[args.rank::args.world], lambda path: train_pair(path, args, data))
    finally:
        barrier()  # torchrun ends all ranks when one fails


if __name__ == "__main__":
    with command():
        main()
