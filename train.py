"""Train protective perturbation generators: Algorithm 1 with the loss of Eq. (1) to (4).

    python train.py --target vgg13_bn --aux resnet18                          one generator
    torchrun --nproc-per-node 8 train.py --target all --aux all none          all of the paper, split over processes
"""

import argparse
import json
import math
import os
import random
import sys
import time
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from classifiers import (CLASSIFIERS, add_common_arguments, augment, autocast_dtype, clear_errors, differences,
                         faster_convolutions, find_classifier, fingerprint, first_line, fold_batch_norm, hardware,
                         kind_of, load_checkpoint, load_cifar10, load_classifier, minutes, positive, remove, save,
                         shuffled_batches, to_float, train_classifier, write_file)
from evaluate import score
from ssim import ssim
from unet import Generator, load_generator, save_generator

# On a GPU those of Section 4.1.3; on a CPU fewer epochs, of more steps: within an hour on 2 cores with avx512_bf16.
EPOCHS = {"cuda": 100, "cpu": 4}
BATCH_SIZE = {"cuda": 256, "cpu": 64}


def protective_loss(x: Tensor, protected: Tensor, target_logits: Tensor, aux_logits: Tensor | None, labels: Tensor,
                    w_target: float = 1.0, w_aux: float = 1.0, w_ssim: float = 0.5) -> Tensor:
    """(4,): Loss, Loss_target, Loss_aux, Loss_SI of Section 3.3; the first is what training minimises.

    w_ssim is the paper's omega_SI; the default weights are those of Section 4.1.3. x and protected are (N, 3, H, W)
    in [0, 1], the logits (N, 10), the labels (N,). Without an auxiliary model (aux_logits None) Loss_aux is 0. Raises
    ValueError where ssim() does.
    """
    loss_target = F.cross_entropy(target_logits.float(), labels)  # Eq. (1)
    loss_aux = torch.zeros_like(loss_target)
    if aux_logits is not None:
        loss_aux = -F.cross_entropy(aux_logits.float(), labels)  # Eq. (2)
    loss_ssim = ssim(x, protected).mean()  # Eq. (3)
    loss = w_target * loss_target + w_aux * loss_aux + w_ssim * loss_ssim  # Eq. (4)
    return torch.stack([loss, loss_target, loss_aux, loss_ssim])


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Of step 0 to steps - 1: linear warm-up over the first 30%, then a cosine to zero, as in the authors' code."""
    warmup = 0.3 * steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    return highest * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train_generator(target_name: str, aux_name: str, data: dict, path: str, settings: dict, device: str) -> None:
    """Algorithm 1 for one target and one auxiliary model (or "none") on `data` of load_cifar10.

    path.pt is the best epoch so far by validation loss, path.jsonl the log, one line an epoch, path.checkpoint what an
    unfinished run goes on from; `settings` are those of settings_of(). The scores are those of the weights in training;
    save_generator then rounds the kernels to 16 bits. Raises FloatingPointError on a loss that is not finite,
    ValueError where the unfinished run on disk had other settings.
    """
    name, epochs, seed = f"{target_name}-{aux_name}", settings["epochs"], settings["seed"]
    weights = settings["w_target"], settings["w_aux"], settings["w_ssim"]
    (images, labels), validation = ([part[:settings["limit"]] for part in data[split]]
                                    for split in ("train", "validation"))
    batch_size = min(settings["batch_size"], len(images))
    steps_an_epoch = len(images) // batch_size

    # F_target and F_aux are frozen and in eval mode: gradients pass through them, nothing in them changes. That lets
    # their batch norm be folded away, which leaves the function as it is and makes a step a tenth faster.
    target = faster_convolutions(fold_batch_norm(load_classifier(target_name, device)))
    aux = None if aux_name == "none" else faster_convolutions(fold_batch_norm(load_classifier(aux_name, device)))
    torch.manual_seed(seed)
    generator = faster_convolutions(Generator())  # "Randomly initialize U"
    generator.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(generator.parameters(), weight_decay=settings["weight_decay"], fused=True)
    kind, dtype = torch.device(device).type, getattr(torch, settings["precision"])
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    log = []

    def save_checkpoint():
        save(f"{path}.checkpoint", {"generator": generator.state_dict(), "optimizer": optimizer.state_dict(),
                                    "scaler": scaler.state_dict(), "log": log, "settings": settings})

    print(f"{name}  target {find_classifier(target_name)}, auxiliary {find_classifier(aux_name) or 'none'}", flush=True)
    if state := load_checkpoint(f"{path}.checkpoint", settings):
        generator.load_state_dict(state["generator"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        log = state["log"]
        print(f"{name}  going on after epoch {len(log)}/{epochs}", flush=True)
    else:
        save_checkpoint()  # from the very start: a generator without a checkpoint beside it is a finished one

    for epoch in range(len(log) + 1, epochs + 1):
        torch.manual_seed(1000 * seed + epoch)  # an epoch's randomness is its own: a resumed run equals an unbroken one
        start, sums = time.monotonic(), torch.zeros(4, device=device)
        generator.train()
        batches = shuffled_batches(len(images), batch_size, device, name, epoch, epochs)
        for step, batch in enumerate(batches, (epoch - 1) * steps_an_epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, epochs * steps_an_epoch, settings["lr"])
            x, y = to_float(augment(images[batch])), labels[batch]
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                protected = generator(x)  # delta = U(x), x' = clamp(x + delta)
                target_logits = target(protected)
                aux_logits = aux(protected) if aux else None
            terms = protective_loss(x, protected, target_logits, aux_logits, y, *weights)
            scaler.scale(terms[0]).backward()
            scaler.step(optimizer)  # "Update U to minimize Loss"
            scaler.update()
            optimizer.zero_grad()
            sums += terms.detach()  # stays on the device: nothing waits for the GPU inside an epoch
        means = (sums / steps_an_epoch).tolist()
        speed = steps_an_epoch * batch_size / (time.monotonic() - start)
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):  # quicker; evaluate.py reports in float32
            result = score(generator.eval(), target, aux, *validation)
        validation_loss = (weights[0] * result["target_loss"] - weights[1] * (result["aux_loss"] or 0.0)
                           + weights[2] * result["signed_ssim"])  # Eq. (4) again, on the validation half
        if not math.isfinite(sum(means) + validation_loss):
            raise FloatingPointError(f"the loss is not finite in epoch {epoch}")
        best = all(validation_loss < line["validation_loss"] for line in log)
        log.append({"epoch": epoch, **dict(zip(("loss", "loss_target", "loss_aux", "loss_ssim"), means)),
                    "validation_loss": validation_loss, **{f"validation_{key}": value for key, value in result.items()},
                    "images_per_second": speed, "seconds": time.monotonic() - start})
        # The generator first, then the log, last the checkpoint: killed in between, the epoch is done again, alike.
        if best:
            save_generator(f"{path}.pt", generator, {**settings, **log[-1], "hardware": hardware(device),
                                                     "torch": str(torch.__version__)})
        write_file(f"{path}.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
        save_checkpoint()
        left = sum(line["seconds"] for line in log) / epoch * (epochs - epoch)
        print(f"{name}  epoch {epoch}/{epochs}  loss {means[0]:.3f} (target {means[1]:.3f}, aux {means[2]:.3f}, SSIM "
              f"{means[3]:.3f})  validation: {report(result)}, loss {validation_loss:.3f}{' (best)' if best else ''}  "
              f"{speed:.0f} images/s  {minutes(left)} left", flush=True)
    os.remove(f"{path}.checkpoint")
    best = min(log, key=lambda line: line["validation_loss"])
    print(f"{name}  finished: epoch {best['epoch']} is the generator  -> {path}.pt", flush=True)


def report(result: dict) -> str:
    aux = "" if result["aux_accuracy"] is None else f"aux {result['aux_accuracy']:.2f}%, "
    return f"target {result['target_accuracy']:.2f}%, {aux}|SSIM| {result['ssim']:.4f}"


def settings_of(target: str, aux: str, args: argparse.Namespace) -> dict:
    """All that decides how one generator turns out; the two classifiers by the SHA-256 of their files."""
    lr = args.lr or (0.001 if (target, aux) == ("googlenet", "vgg13_bn") else 0.005)  # Section 4.1.3
    precision = str(autocast_dtype(args.device, args.precision)).removeprefix("torch.")
    return {"target": target, "aux": aux, "lr": lr, "precision": precision,
            "target_sha256": fingerprint(find_classifier(target)), "aux_sha256": fingerprint(find_classifier(aux))
            } | {key: getattr(args, key) for key in (
                "epochs", "batch_size", "weight_decay", "w_target", "w_aux", "w_ssim", "seed", "limit")}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line (or `words` in its place), understood; `pairs` is what it asks for."""
    parser = argparse.ArgumentParser(description="Train protective perturbation generators (Algorithm 1): one for each "
                                                 "combination of --target and --aux, finished ones skipped.")
    parser.add_argument("--target", nargs="+", required=True, choices=[*CLASSIFIERS, "all"], metavar="NAME",
                        help=f"the recognition service: {', '.join(CLASSIFIERS)}, or all")
    parser.add_argument("--aux", nargs="+", required=True, choices=[*CLASSIFIERS, "none", "all"], metavar="NAME",
                        help="the auxiliary model: the same names, none, or all (without none)")
    parser.add_argument("--epochs", type=positive(int),
                        help=f"(default: {EPOCHS['cuda']} on a GPU, as in the paper, {EPOCHS['cpu']} on a CPU)")
    parser.add_argument("--limit", type=positive(int),
                        help="train on the first LIMIT images only, and validate on as many, for a quick look "
                             "(default: all; a missing classifier is trained on all the same)")
    parser.add_argument("--batch-size", type=positive(int),
                        help=f"(default: {BATCH_SIZE['cuda']} on a GPU, as in the paper, {BATCH_SIZE['cpu']} on a CPU)")
    parser.add_argument("--lr", type=positive(float), help="highest learning rate (default: the paper's 0.005, and "
                                                           "0.001 for target googlenet with auxiliary vgg13_bn)")
    parser.add_argument("--weight-decay", type=positive(float, or_zero=True), default=0.0005,
                        help="(default: %(default)s)")
    for term, weight in ("target", 1.0), ("aux", 1.0), ("ssim", 0.5):
        parser.add_argument(f"--w-{term}", type=positive(float, or_zero=True), default=weight,
                            help="weight of this loss term in Eq. (4) (default: %(default)s)")
    parser.add_argument("--out", default="runs", metavar="FOLDER", help="where generators go (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="train again what is finished, start over what is not")
    add_common_arguments(parser)
    args = parser.parse_args(words)
    targets = [name for name in CLASSIFIERS if name in args.target or "all" in args.target]
    auxes = [name for name in (*CLASSIFIERS, "none") if name in args.aux or "all" in args.aux and name != "none"]
    args.pairs = [(target, aux) for target in targets for aux in auxes if target != aux]
    if not args.pairs:
        parser.error("a target is never its own auxiliary: name another one, or use --aux none")
    args.epochs = args.epochs or EPOCHS[kind_of(args.device)]
    args.batch_size = args.batch_size or BATCH_SIZE[kind_of(args.device)]
    return args


def main() -> None:
    # Under torchrun every rank takes each WORLD_SIZEth piece of work and only waits for the classifiers of the others.
    # Rank 0 alone downloads, and looks what is there and what there is to do.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())  # what "cuda" means
    args, failed, todo, missing = arguments(), [], [], []
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    torch.backends.cudnn.benchmark = True
    if rank == 0:
        print(f"{len(args.pairs)} generator{'s' * (len(args.pairs) > 1)}, epochs for each: {args.epochs}, batch size: "
              f"{args.batch_size} (the paper: {EPOCHS['cuda']}, {BATCH_SIZE['cuda']}; the default on a CPU: "
              f"{EPOCHS['cpu']}, {BATCH_SIZE['cpu']})", flush=True)
        data = load_cifar10(args.data, args.device)
        if args.force:  # all of them now: after an interruption the command without --force then does the rest
            remove(*(f"{args.out}/generator-{target}-{aux}.{ending}" for target, aux in args.pairs
                     for ending in ("pt", "jsonl", "checkpoint")))
        for target, aux in args.pairs:
            path = f"{args.out}/generator-{target}-{aux}"
            if not os.path.exists(f"{path}.pt") or os.path.exists(f"{path}.checkpoint"):
                todo.append((target, aux))
                continue
            try:
                changed = differences(load_generator(f"{path}.pt")[1], settings_of(target, aux, args))
                print(f"{target}-{aux}  skipped: {path}.pt is finished{' with ' * bool(changed)}{changed} "
                      "(--force trains it again)", flush=True)
            except ValueError as error:
                print(f"error: {target}-{aux}: {error}", file=sys.stderr, flush=True)
                failed.append(f"{target}-{aux}")
        missing = [name for name in CLASSIFIERS if any(name in pair for pair in todo) and not find_classifier(name)]
    if world > 1:
        random.Random(0).shuffle(todo)  # or one rank would have all the pairs of the costliest auxiliary model
        work = [todo, missing]
        dist.broadcast_object_list(work)
        todo, missing = work
    if rank > 0:
        data = load_cifar10(args.data, args.device)
    for name in missing[rank::world]:
        print(f"{name} is neither in runs/ nor in weights/ and is trained first; how long it takes follows within a "
              "minute", flush=True)
        try:
            train_classifier(name, data, args.device, seed=args.seed, precision=args.precision)
        except (FloatingPointError, ValueError, torch.OutOfMemoryError) as error:  # what needs it fails below
            print(f"error: {name}: {first_line(error)}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            sys.exit(f"\nstopped in {name}: the same command goes on after its last finished epoch")
    if world > 1:
        dist.barrier()

    for target, aux in todo[rank::world]:
        path = f"{args.out}/generator-{target}-{aux}"
        try:
            train_generator(target, aux, data, path, settings_of(target, aux, args), args.device)
        except (FloatingPointError, ValueError, FileNotFoundError, torch.OutOfMemoryError) as error:  # others go on
            remedy = ": try a lower --lr or --precision fp32, with --force" * isinstance(error, FloatingPointError)
            print(f"error: {target}-{aux}: {first_line(error)}{remedy}", file=sys.stderr, flush=True)
            failed.append(f"{target}-{aux}")
        except KeyboardInterrupt:
            best = f"{path}.pt holds the best epoch so far; " if os.path.exists(f"{path}.pt") else ""
            sys.exit(f"\nstopped in {target}-{aux}: {best}the same command, without --force, goes on "
                     "after the last finished epoch")
    if world > 1:
        dist.barrier()  # torchrun ends all ranks when one fails
        dist.destroy_process_group()
    if failed:
        sys.exit(f"error: not trained: {', '.join(failed)}")


if __name__ == "__main__":
    with clear_errors():
        main()
