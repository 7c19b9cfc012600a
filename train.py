"""The training loop, its loss and its schedule.

    torchrun train.py --model tin                                   the toy: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --model tin --data DATA    the report's recipe
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --model slowfast --data DATA                       the report's 32 GPUs
    torchrun train.py --model tin --lr 0.02 --no-flip               every recipe value is a flag

The folder OUT (default runs/MODEL) gets last.pt, from which --resume goes on; best.pt, the best on
validation; and log.jsonl. With several nodes it must be on a disk that all of them share.

A run may be killed at any time. The same command with --resume goes on from last.pt, which is
always whole; only the steps after it are taken again. They are the same steps, since all
randomness derives from the seed: a step draws from (seed, step, rank), a clip from (seed, epoch,
row), the order of an epoch from (seed, epoch). On a CPU the result is the same bit for bit.

B clips, T frames, H height, W width, K classes. A step is one update of the weights.

In comments on settings, "report" means that the report of the team (arXiv 2003.05837) gives the
value. "ours" means that it does not; then comes our source, or the reason. "The authors' code" is
X-Temporal, which the report's authors published.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import time
import weakref
from pathlib import Path

# Make idle CPU threads sleep; their busy-waiting makes training on a busy laptop several times
# slower. This must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

import data
import evaluate

# How a network is trained. The values are those for the report's image models; a row of RECIPES in
# a model file overrides what differs.
RECIPE = dict(
    # loss
    loss="bce",            # report; "lsep" and "warp" are ranking losses that it tried, "ce" is
                           # for data sets of one label per video, such as Kinetics
    loss_scale=160.0,      # report: "a huge performance gain"; its data set, M-MiT, has 313 classes
                           # and 1.96 labels per video, and 313 / 1.96 is about 160
    class_weight="none",   # none, sqrt or ratio; report: both helped slightly but were not used

    # optimiser: SGD with one group for all parameters
    batch=64,              # clips of a step, over all processes; ours: TSM's authors, for lr 0.01
    reference_batch=64,    # the batch that lr, warmup and iterations are meant for
    lr=0.01,               # report
    momentum=0.9,          # report
    nesterov=False,        # ours: the report names momentum alone
    weight_decay=5e-4,     # report; on every parameter
    clip_grad=20.0,        # largest norm of the gradient, 0: off; ours: the authors' code

    # schedule
    schedule="step",       # "step": lr / 10 at each milestone; "cosine": half a period, down to 0
    milestones=(10, 20),   # epochs; the report's "divided by 10, 20 epochs"
    epochs=30,             # ours: three stages of ten epochs
    iterations=0,          # steps in all; 0: use epochs
    warmup=0,              # steps of a linear start; ours: none, clip_grad tames the first steps

    # batch norm and first weights
    sync_bn=False,         # batch norm over all GPUs; ours: off, the report has it for SlowFast
    init="imagenet",       # imagenet (torchvision's weights), none, or a checkpoint file; ours: the
                           # report starts from Kinetics-600, but those weights are not public
)
LOG_EVERY = 20  # steps


# ---- the loss: logits and labels (B, K) -> scalar ------------------------------------------------

def scaled_bce(logits, labels, scale=160.0, weight=None):
    """Binary cross-entropy, averaged over videos and classes, times `scale`; weight (K,).

    Report: the factor 160 gave "a huge performance gain"; a larger learning rate did not. Averaging
    over 313 classes shrinks the loss's gradient but not the weight decay, and the factor restores
    the balance. A larger rate would multiply the decay too. Since 160 is 313 classes / 1.96 labels
    per video, the scaled loss is the sum over classes, divided by the mean number of labels.
    """
    labels = labels.to(logits.dtype)
    return scale * F.binary_cross_entropy_with_logits(logits, labels, weight=weight)


def compute_loss(logits, labels, recipe, class_weight=None):
    """The loss that the recipe names, always in float32."""
    logits = logits.float()  # under autocast the network's output may be in half precision
    scale = recipe["loss_scale"]  # the flags make it 1 for other losses than bce (--loss-scale)
    if recipe["loss"] == "bce":
        return scaled_bce(logits, labels, scale, class_weight)
    if recipe["loss"] == "ce":
        return scale * F.cross_entropy(logits, labels.argmax(dim=1))
    if recipe["loss"] == "lsep":
        return scale * lsep(logits, labels)
    return scale * warp(logits, labels)


# ---- the schedule --------------------------------------------------------------------------------

def learning_rate(step, total, steps_per_epoch, recipe):
    """The learning rate of a step, counted from 0, of `total` steps.

    Report: divided by ten at each milestone, or half a cosine over all steps. A warm-up is a line
    from a tenth of the base rate to the curve's value at the end of the warm-up (SlowFast's paper).
    The recipe's values are for reference_batch clips per step: a larger batch gets a rate in
    proportion and a shorter warm-up.
    """
    base = recipe["lr"] * recipe["batch"] / recipe["reference_batch"]
    warmup = recipe["warmup"] * recipe["reference_batch"] / recipe["batch"]

    # the curve; during the warm-up, its value at the end of the warm-up
    place = max(step, warmup)
    if recipe["schedule"] == "cosine":
        lr = base * 0.5 * (1 + math.cos(math.pi * place / total))
    else:
        passed = 0
        for milestone in recipe["milestones"]:
            if place >= milestone * steps_per_epoch:
                passed += 1
        lr = base * 0.1**passed

    # the warm-up's line up to that value
    if step < warmup:
        start = 0.1 * base
        lr = start + (lr - start) * step / warmup
    return lr


# ---- the clips of each step: they depend on the seed alone, so that resuming needs no state ------

def batches(num_videos, batch, seed, start, total, rank, world):
    """For each step from `start` on, yield this process's share of the batch: [(epoch, row), ...].

    An epoch is a permutation of the videos; the incomplete last batch is dropped. Epochs count
    from 0 here, and from 1 in main and the log.
    """
    steps_per_epoch = num_videos // batch
    for step in range(start, total):
        epoch, position = divmod(step, steps_per_epoch)
        if position == 0 or step == start:  # a run may be resumed within an epoch
            order = np.random.default_rng([seed, epoch]).permutation(num_videos)
        rows = order[position * batch : (position + 1) * batch]
        yield [(epoch, int(row)) for row in rows[rank::world]]


def step_seed(seed, step, rank):
    """The seed of what a step draws: dropout, and the tuples of frames in trn.py."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def load_clips(videos, args, start, total, rank, world, device):
    """One iterator over all batches of this process, from step `start` to the end of the run:
    random clips, uint8 (B, T, H, W, 3), and their labels, float32 (B, K)."""
    clips = data.TrainClips(videos, args.recipe, args.seed)
    if args.skip_broken:
        clips = data.SkipBroken(clips)
    order = batches(len(videos), args.recipe["batch"], args.seed, start, total, rank, world)
    loader = torch.utils.data.DataLoader(
        clips,
        batch_sampler=order,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=data.ignore_interrupts,  # Ctrl-C is for the main process
    )
    return data.load(loader)  # its batches, with a clear error if shared memory runs out


# ---- one step and one validation -----------------------------------------------------------------

def train_step(net, clips, labels, optimizer, scaler, recipe, class_weight, autocast):
    """Update the weights with one batch: clips (B, T, 3, H, W), labels (B, K) -> (loss, norm of the
    gradient before it is clipped). net: the network, or DDP around it, which averages the gradients
    over the processes."""
    # forward and backward; the scaler does nothing unless --amp is fp16
    with autocast:
        logits = net(clips)
    loss = compute_loss(logits, labels, recipe, class_weight)
    scaler.scale(loss).backward()

    # update
    scaler.unscale_(optimizer)
    max_norm = recipe["clip_grad"] or math.inf  # infinite: only measure
    grad_norm = torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), grad_norm


def validate(model, views, recipe, device, workers, **options):
    """Score every validation video by one view -> (mAP, text for the log line)."""
    # DDP copies the first process's running means and variances (of batch norm) to all when a step
    # begins, and the step then changes them in each process. Copy them once more, so that all
    # processes score the network that is saved.
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    labels = views.videos.label_matrix()  # not None: check_videos has refused a list without any
    scores = evaluate.predict(model, views, labels.shape[1], recipe, device, workers=workers,
                              **options)
    val_map = evaluate.sample_map(scores, labels)
    text = f"val mAP {100 * val_map:.2f}"
    if recipe["loss"] == "ce":
        top1, top5 = evaluate.hit_rates(scores, labels)
        text += f"  top-1 {100 * top1:.2f}  top-5 {100 * top5:.2f}"
    if not labels.any(axis=1).all():
        text += f"  ({evaluate.labelled_map(scores, labels)})"  # the mAP of the labelled videos
    return val_map, text


# ---- a run ---------------------------------------------------------------------------------------

def main():
    args = parse_arguments()
    recipe = args.recipe
    out = Path(args.out or f"runs/{args.model}")

    # processes and device
    rank, world, device = evaluate.start_process(args.device)
    main_process = rank == 0  # prints, logs and saves
    torch.backends.cudnn.benchmark = True  # clips have one size: let cuDNN try its algorithms

    # videos
    folder = args.data or evaluate.toy_folder(rank)
    videos = data.VideoList(folder, "train")
    val_videos = data.VideoList(folder, "val")
    check_videos(videos, val_videos, recipe, world)
    steps_per_epoch, total = count_steps(recipe, len(videos))

    # network and optimiser
    torch.manual_seed(args.seed)  # the same initial values in every process
    model = args.module.build(recipe, len(videos.categories)).to(device)
    if recipe["sync_bn"] and world > 1 and device.type == "cuda":  # PyTorch refuses it on a CPU
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.channels_last:
        evaluate.use_channels_last(model)
    optimizer, scaler = make_optimizer(model, recipe, device, args.amp)

    # First weights, or the run that is resumed. `run` is what a checkpoint holds beside tensors and
    # steps: the settings ("config"), the best validation so far ("best_map", "best_epoch"), and the
    # step after which the network was last validated ("validated").
    step = 0  # steps taken so far
    run = new_run(args, videos, val_videos)
    checkpoint = find_checkpoint(out / "last.pt", args.resume, run["config"])
    if checkpoint is None:
        message = load_init(args.module, model, recipe, videos.categories)
    else:
        message = resume(checkpoint, model, optimizer, scaler, total)
        step = checkpoint["iteration"]
        run = {key: checkpoint[key] for key in run}  # the same keys, from the file
    if main_process:
        log = Log(out, args.resume, step, run["validated"])  # drops lines later than last.pt
        print_plan(args, device, world, model, videos, val_videos, steps_per_epoch, total, step)
        print(message, flush=True)

    # `net` is what is trained; `model` stays the bare network, for validation and checkpoints
    net = model
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(model)
    if args.compile:
        net = evaluate.compile_network(net)
    autocast = evaluate.make_autocast(device, args.amp)
    class_weight = class_weights(videos.class_counts, recipe["class_weight"]).to(device)

    # clips for training, views for validation
    stream = load_clips(videos, args, step, total, rank, world, device)
    views = evaluate.VideoViews(val_videos, recipe, evaluate.make_protocol(recipe))

    # The loop. If the resumed run was stopped during a validation, all steps of that epoch are
    # already taken: `while` finds none, and only the validation is repeated.
    meter = Meter(recipe["batch"], world)  # of losses and times, for the log
    epochs = math.ceil(total / steps_per_epoch)
    epochs_done = math.ceil(run["validated"] / steps_per_epoch)
    for epoch in range(epochs_done + 1, epochs + 1):
        last_step = min(epoch * steps_per_epoch, total)
        meter.restart()
        while step < last_step:
            # a batch: uint8 (B, T, H, W, 3) -> float (B, T, 3, H, W), and labels (B, K)
            clips, labels = meter.wait_for(stream)  # next(stream), timed
            clips = clips.to(device, non_blocking=True)
            clips = data.normalise(clips, recipe["mean"], recipe["std"], args.channels_last)
            labels = labels.to(device, non_blocking=True)

            # What a step draws depends on (seed, step, rank) alone, so no generator's state has to
            # be saved.
            torch.manual_seed(step_seed(args.seed, step, rank))
            lr = learning_rate(step, total, steps_per_epoch, recipe)
            optimizer.param_groups[0]["lr"] = lr
            loss, grad_norm = train_step(net, clips, labels, optimizer, scaler, recipe,
                                         class_weight, autocast)
            meter.losses.append(loss)
            step += 1

            # log and save; last.pt is written before the validation too, so that a kill during the
            # validation loses no step
            save_now = step % args.save_every == 0 or step == last_step
            if save_now or step % LOG_EVERY == 0:
                line = meter.log_line(epoch, step, lr, grad_norm)  # loss: over all processes
                check_finite(line, args.amp)  # ValueError: a broken network is never saved
                if main_process:
                    log.append(line)
                    print_step(line, recipe, total, device)
            if save_now and main_process:
                save(out / "last.pt", model, optimizer, scaler, epoch, step, run)

        # validate after every epoch
        val_map, text = validate(model, views, recipe, device, args.workers, autocast=autocast,
                                 channels_last=args.channels_last)
        if main_process:
            print(f"epoch {epoch}  {text}", flush=True)
            log.append({"epoch": epoch, "step": step, "val_map": val_map})
            run["validated"] = step
            if val_map >= run["best_map"]:  # on a tie the later epoch, which has trained longer
                run["best_map"] = val_map
                run["best_epoch"] = epoch
                save(out / "best.pt", model, optimizer, scaler, epoch, step, run)
            save(out / "last.pt", model, optimizer, scaler, epoch, step, run)

    # the result
    if main_process:
        print(f"best val mAP {100 * run['best_map']:.2f} (epoch {run['best_epoch']})")
    evaluate.end_process()
    return 0


# ==== Skip on first reading: other losses, first weights, checkpoints, the log, flags =============

# ---- losses that the report tried and did not use ------------------------------------------------

def lsep(logits, labels):
    """Log-sum-exp pairwise loss: log(1 + sum over negatives v and positives u of exp(f_v - f_u)),
    averaged over videos; 0 for a video without positives or without negatives.

    The double sum is a product of two sums, so this is exact without a matrix of pairs.
    Li, Song and Luo 2017.
    """
    positive = labels.bool()
    # -inf adds nothing to a sum, and no gradient passes through a masked entry
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(dim=1)
    positives = (-logits).masked_fill(~positive, -torch.inf).logsumexp(dim=1)
    return torch.logaddexp(negatives + positives, torch.zeros_like(negatives)).mean()


def warp(logits, labels):
    """Weighted approximate-rank pairwise loss, averaged over videos.

    For a positive u, a negative v violates the margin if 1 - f_u + f_v > 0. With V violators the
    loss of u is (1 + 1/2 + ... + 1/V) times the violators' mean of 1 - f_u + f_v.
    Weston, Bengio and Usunier 2011. The papers estimate V by sampling; with 313 classes the exact
    number is cheap.
    """
    positive = labels.bool()

    # One row for each pair of a video and one of its labels; there are P pairs in all.
    videos, classes = positive.nonzero(as_tuple=True)
    margin = 1 - logits[videos, classes][:, None] + logits[videos]  # (P, K)
    violates = (margin > 0) & ~positive[videos]
    count = violates.sum(dim=1)

    # rank_weight[V] is 1 + 1/2 + ... + 1/V, and rank_weight[0] is 0
    reciprocals = 1 / torch.arange(1, logits.shape[1] + 1).to(logits)
    rank_weight = torch.cat([logits.new_zeros(1), reciprocals.cumsum(dim=0)])
    mean_margin = (margin * violates).sum(dim=1) / count.clamp(min=1)
    return (rank_weight[count] * mean_margin).sum() / len(logits)


def class_weights(counts, kind):
    """Training videos of each class, counts (K,) -> the weight of each class in the loss, (K,).
    Report: N_i / mean N ("ratio") or its root ("sqrt"); frequent classes weigh more. A class
    without videos weighs as much as the rarest one: with weight 0 nothing would push it down."""
    powers = {"none": 0, "sqrt": 0.5, "ratio": 1}
    ratios = np.maximum(counts, counts[counts > 0].min()) / counts.mean()
    return torch.tensor(ratios ** powers[kind], dtype=torch.float32)


# ---- first weights -------------------------------------------------------------------------------

def load_init(module, model, recipe, categories):
    """Load the weights that the recipe's init names; returns a text that says what was read.

    Three kinds of tensors may keep their initial values: a classifier of other classes, tensors of
    at most two dimensions that differ in size (meant for linear layers whose size depends on the
    number of frames), and whole parts that the file lacks, such as TIN's small networks in a file
    of TSM. Any other mismatch raises a ValueError: that part of the network would be silently
    trained from scratch.
    """
    init = recipe["init"]
    if init == "none":
        return "init none: every tensor has its initial value"
    if init == "imagenet":
        checkpoint = imagenet_weights(recipe)
    elif not os.path.exists(init):
        raise ValueError(f"--init {init}: no such file, and neither imagenet nor none")
    else:
        checkpoint = evaluate.read_checkpoint(init)
    notes = evaluate.notes_on_file(module, recipe, {"init"}, checkpoint, init)
    theirs = evaluate.state_of(module, checkpoint, init)
    ours = {}
    for key, tensor in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):  # a counter that nothing uses
            ours[key] = tensor
    problems = evaluate.misfits(theirs, ours)

    # the classifier; one of the same size may still be for other classes
    classifier = evaluate.classifier_keys(module, recipe)
    if evaluate.is_ours(checkpoint) and checkpoint["config"]["categories"] != categories:
        for key in classifier:
            problems[key] = f"{key} is for other classes in the file"

    # everything else
    fitting = {key: theirs[key] for key in ours if key not in problems}
    parts = {key.split(".")[0] for key in fitting}
    for key, problem in problems.items():
        missing_part = key not in theirs and key.split(".")[0] not in parts
        at_most_2d = key in theirs and key in ours and ours[key].dim() <= 2
        if not (key in classifier or missing_part or at_most_2d):
            raise ValueError(f"--init {init}: {problem}; the file belongs to another network or "
                             "size")
    if len(fitting) < 0.4 * len(ours):  # one SlowFast pathway has nearly half of the tensors
        raise ValueError(f"--init {init}: only {len(fitting)} of {len(ours)} tensors fit; for "
                         f"example, {next(iter(problems.values()))}")
    model.load_state_dict(fitting, strict=False)

    message = f"init {init}: {len(fitting)} of {len(ours)} tensors read"
    kept = list(problems.values())
    for problem in kept[:3]:
        message += f"\n  keeps its initial value: {problem}"
    if len(kept) > 3:
        message += f"\n  and {len(kept) - 3} others"
    return "\n".join([message, *notes])


def imagenet_weights(recipe):
    """torchvision's ImageNet weights for the recipe's ResNet."""
    if "backbone" not in recipe:
        raise ValueError("--init imagenet: torchvision has no weights for this network; name a "
                         "file, or none")
    backbone = recipe["backbone"]
    try:
        weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    except ValueError:
        raise ValueError(f"--init imagenet: torchvision has no {backbone}; name a file, or "
                         "none") from None
    try:
        return weights.get_state_dict(progress=False)
    except OSError as error:
        raise OSError(f"--init imagenet: cannot download {weights.url} ({error}); put it into "
                      f"{torch.hub.get_dir()}/checkpoints, or pass --init none") from None


# ---- optimiser and checkpoints -------------------------------------------------------------------

def make_optimizer(model, recipe, device, amp):
    """SGD with one group for all parameters, as the report's authors have it, and fp16's scaler."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        momentum=recipe["momentum"],
        nesterov=recipe["nesterov"],
        weight_decay=recipe["weight_decay"],
        # with fp16 the scaler may skip the first step; fused SGD's momentum is uninitialised then
        fused=amp != "fp16",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return optimizer, scaler


def new_run(args, videos, val_videos):
    """What a checkpoint holds beside the weights, the optimiser and the number of steps."""
    return {
        "validated": 0,    # the step after which the network was last validated
        "best_map": -1.0,  # on validation, a fraction
        "best_epoch": 0,
        "class_counts": videos.class_counts.tolist(),
        "config": {
            "model": args.model,
            "recipe": args.recipe,
            "seed": args.seed,
            "categories": videos.categories,
            "videos": len(videos),
            "list_hash": videos.hash,
            "val_videos": len(val_videos),
            "val_hash": val_videos.hash,
        },
    }


def save(path, model, optimizer, scaler, epoch, step, run):
    """Write a checkpoint, whole or not at all: a plain dict that torch.load(weights_only=True)
    reads. No key has a prefix of DDP's or torch.compile's, since `model` is the bare network."""
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "iteration": step,
        **run,
    }
    try:
        with data.replacing(path) as part:
            torch.save(checkpoint, part)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).split("\n")[0]
        raise OSError(f"{path}: could not be written ({reason}); nothing was "
                      "overwritten") from None


def find_checkpoint(last, resume, config):
    """What last.pt holds, or None if it is not there. ValueError if a run is there that was not
    asked for, or if it is another run than this one."""
    if last.exists() and not resume:
        raise ValueError(f"{last}: a run is there already; continue it with --resume, or name "
                         "another --out")
    if not last.exists():
        best = last.with_name("best.pt")
        if best.exists():
            raise ValueError(f"{best}: is there, but no last.pt to go on from; name another --out")
        return None
    checkpoint = evaluate.read_checkpoint(last)
    theirs = checkpoint["config"]
    hint = f"; to start a new run from its weights: --init {last} --out NEW"

    # the classes and the list
    try:
        data.compare_categories(config["categories"], "this data folder", theirs["categories"],
                                last)
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    if config["list_hash"] != theirs["list_hash"]:
        raise ValueError(f"{last}: was trained on another list, of {theirs['videos']} videos; the "
                         f"list here has {config['videos']}{hint}")
    if config["val_hash"] != theirs.get("val_hash", config["val_hash"]):  # older ones lack it
        raise ValueError(f"{last}: was validated on another val.txt, of {theirs['val_videos']} "
                         f"videos; the list here has {config['val_videos']}, so its best mAP "
                         f"would not compare{hint}")

    # the network and its settings
    ours = {"model": config["model"], "seed": config["seed"], **config["recipe"]}
    theirs = {"model": theirs["model"], "seed": theirs["seed"], **theirs["recipe"]}
    differences = []
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            differences.append(f"{key} {theirs.get(key)} there, {ours.get(key)} here")
    if differences:
        raise ValueError(f"{last}: belongs to another run: {', '.join(differences)}{hint}")
    return checkpoint


def resume(checkpoint, model, optimizer, scaler, total):
    """Load a checkpoint, even if it was written with another --amp or --channels-last, and return
    what to tell the user. total: the steps of the whole run."""
    model.load_state_dict(checkpoint["model"])
    fused = optimizer.param_groups[0]["fused"]
    optimizer.load_state_dict(checkpoint["optimizer"])
    optimizer.param_groups[0]["fused"] = fused
    if scaler.is_enabled() and checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    # Fused SGD needs a momentum in its parameter's memory layout.
    for parameter, values in optimizer.state.items():
        momentum = torch.empty_like(parameter)
        momentum.copy_(values["momentum_buffer"])
        values["momentum_buffer"] = momentum

    if checkpoint["validated"] == total:
        return "finished already"
    return f"resuming after step {checkpoint['iteration']}"


# ---- the log -------------------------------------------------------------------------------------

class Log:
    """OUT/log.jsonl: each line is a dict as JSON.

    A new run creates the file before its first step, and fails if it is there already, so that two
    new runs cannot share a folder. A run that ends before its first line leaves no file behind,
    unless it is killed: then --resume starts it.
    """

    def __init__(self, out, resume, step, validated):
        """Make the folder. A resumed run removes unfinished files, and the log's lines that are
        later than last.pt."""
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        if not (resume and self.path.exists()):
            try:
                open(self.path, "x").close()
            except FileExistsError:
                raise ValueError(f"{self.path}: a run is there already; continue it with --resume, "
                                 "or name another --out") from None
        weakref.finalize(self, remove_empty, self.path)  # also after an error or Ctrl-C
        if not resume:
            return

        for part in out.glob("*.part-*"):  # left by a run that was killed
            part.unlink()
        kept = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            if not text.endswith("}"):  # a kill cut it off
                continue
            line = json.loads(text)
            written = step
            if "val_map" in line:
                written = validated
            if line["step"] <= written:
                kept.append(text)
        data.write_lines(self.path, kept)

    def append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def remove_empty(path):
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


class Meter:
    """What has been measured since the last line of steps in the log, validations left out."""

    def __init__(self, batch, world):
        self.batch = batch
        self.world = world
        self.restart()

    def restart(self):
        self.losses = []           # one scalar tensor per step
        self.seconds_waited = 0.0  # for clips
        self.start = time.time()

    def wait_for(self, stream):
        """The next batch of an iterator."""
        wait_start = time.time()
        batch = next(stream)
        self.seconds_waited += time.time() - wait_start
        return batch

    def log_line(self, epoch, step, lr, grad_norm):
        """A line for log.jsonl; the loss is the mean over steps and processes. Then restart."""
        losses = torch.stack(self.losses)
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.world
        losses = losses.tolist()  # waits for the GPU, whose work belongs in the time
        seconds = time.time() - self.start
        line = {
            "epoch": epoch,
            "step": step,
            "loss": sum(losses) / len(losses),
            "lr": lr,
            "grad_norm": grad_norm.item(),
            "clips_per_s": len(losses) * self.batch / seconds,
            "data_share": self.seconds_waited / seconds,  # of the time, spent waiting for clips
        }
        self.restart()
        return line


def check_finite(line, amp):
    """ValueError where training has gone wrong, before a checkpoint is written."""
    finite = math.isfinite(line["loss"])
    if amp != "fp16":  # there the gradient overflows now and then, and the scaler skips the step
        finite = finite and math.isfinite(line["grad_norm"])
    if not finite:
        raise ValueError(f"the loss or its gradient is not finite at step {line['step']} or "
                         "shortly before, and no checkpoint was written after that; try a smaller "
                         "--lr or --clip-grad, or --amp bf16 in place of fp16")


def print_step(line, recipe, total, device):
    """Print a line of the log for people to read, with the time that is left."""
    seconds = (total - line["step"]) * recipe["batch"] / line["clips_per_s"]
    left = datetime.timedelta(seconds=int(seconds))
    memory = ""
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB  "
    print(f"epoch {line['epoch']} step {line['step']}/{total}  loss {line['loss']:.3f} "
          f"({line['loss'] / recipe['loss_scale']:.4f} unscaled)  lr {line['lr']:.5f}  "
          f"grad {line['grad_norm']:.1f}  {line['clips_per_s']:.1f} clips/s  "
          f"data {100 * line['data_share']:.0f} %  {memory}left {left}", flush=True)


# ---- the plan of a run ---------------------------------------------------------------------------

def check_videos(videos, val_videos, recipe, world):
    """ValueError if the lists cannot be used with this recipe by so many processes."""
    batch = recipe["batch"]
    for listed in (videos, val_videos):
        if len(listed.label_ids) == 0:
            raise ValueError(f"{listed.file}: no video has a label; training needs labels, and "
                             "validation, to find the best epoch")
    if recipe["loss"] == "ce":
        for row in range(len(videos)):
            labels = len(videos.labels(row))
            if labels != 1:
                raise ValueError(f"{videos.place(row)}: {labels} labels; --loss ce needs exactly "
                                 "one for every video")
    if len(videos) < world:
        raise ValueError(f"{videos.file}: {len(videos)} videos are too few for {world} processes")
    if batch > len(videos):
        largest = len(videos) // world * world
        raise ValueError(f"--batch {batch}: more than the {len(videos)} videos of {videos.file}; "
                         f"try --batch {largest}")
    if batch % world != 0:
        raise ValueError(f"--batch {batch}: is split over {world} processes, so it must be a "
                         f"multiple of {world}")


def count_steps(recipe, num_videos):
    """(steps of an epoch, steps in all)."""
    steps_per_epoch = num_videos // recipe["batch"]
    if recipe["iterations"] == 0:
        return steps_per_epoch, recipe["epochs"] * steps_per_epoch
    total = round(recipe["iterations"] * recipe["reference_batch"] / recipe["batch"])
    return steps_per_epoch, max(total, 1)


def print_plan(args, device, world, model, videos, val_videos, steps_per_epoch, total, step):
    """The whole recipe, the device, the network, the videos, and the steps that follow."""
    recipe = args.recipe
    for key, value in recipe.items():
        print(f"  {key:16} {value}")
    hardware = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"{world} x {device.type} ({hardware})")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.model} {args.row}: {parameters:,} parameters, {len(videos.categories)} classes")
    print(data.describe_videos(videos))
    print(data.describe_videos(val_videos))

    labels_per_video = videos.class_counts.sum() / len(videos)
    print(f"loss {recipe['loss']}, scale {recipe['loss_scale']:g}; classes / labels per video: "
          f"{len(videos.categories) / labels_per_video:.1f}")
    batch = recipe["batch"]
    reference = recipe["reference_batch"]
    print(f"batch {batch} = {world} processes x {batch // world} clips; "
          f"{steps_per_epoch} steps an epoch, {total} in all, from {step}")
    print(f"learning rate {recipe['lr']} x {batch} / {reference} = "
          f"{recipe['lr'] * batch / reference:g}")
    if batch != reference:
        print(f"  (lr x batch / reference_batch; --reference-batch {batch} would keep "
              f"{recipe['lr']})")
    warmup = recipe["warmup"] * reference / batch
    if warmup > 0:
        print(f"warm-up {warmup:,.0f} steps, {100 * warmup / total:,.0f} % of the run")
    if "test_resize" in args.given and "scales" not in args.given:
        print(f"the scales of the fuller protocols follow test_resize: {recipe['scales']}")
    for note in odd_settings(args, videos, val_videos, steps_per_epoch, total):
        print(note)


def odd_settings(args, videos, val_videos, steps_per_epoch, total):
    """What is odd about a run: sentences, with a remedy where there is one."""
    recipe = args.recipe
    notes = []
    if total < 100:
        notes.append(f"warning: {total} steps are too few to learn much; raise --epochs, or lower "
                     "--batch for more steps an epoch, and start from a trained network with "
                     "--init FILE")
    warmup = recipe["warmup"] * recipe["reference_batch"] / recipe["batch"]
    if warmup >= total / 5:
        notes.append(f"warning: the warm-up's {warmup:,.0f} steps are much of a run of {total}; "
                     "shorten it with --warmup, of which 1 is "
                     f"{recipe['reference_batch'] / recipe['batch']:g} steps at this batch")
    late = [m for m in recipe["milestones"] if m * steps_per_epoch >= total]
    if recipe["schedule"] == "step" and late:
        notes.append(f"warning: the run ends before the milestones {late}, so the learning rate "
                     "does not fall there; set --milestones (epochs)")

    absent = [videos.categories[k] for k in np.flatnonzero(videos.class_counts == 0)]
    if recipe["class_weight"] != "none" and absent:
        notes.append(f"warning: {len(absent)} classes, such as {absent[0]}, have no training "
                     "video; in the loss they weigh as much as the rarest class that has one")
    shared = set(val_videos.paths).intersection(videos.paths)
    if shared:
        notes.append(f"warning: {len(shared)} of {len(val_videos)} videos of {val_videos.file}, "
                     f"such as {min(shared)}, are in {videos.file} too: the mAP on validation is "
                     "too high")
    if hasattr(args.module, "check"):
        notes += args.module.check(recipe, args.given)
    return notes


# ---- flags ---------------------------------------------------------------------------------------

def parse_arguments():
    """The flags. args.module is the model file, args.recipe a row of its RECIPES with the values
    that were given as flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="train.py --model NAME [--data DATA] [--FLAG VALUE ...]; see --help",
        add_help=False, allow_abbrev=False,
        epilog="--model NAME --help shows the flags of the recipe's values too.\n"
               "--class-weight ratio: in the loss a class weighs its number of training videos,\n"
               "divided by the mean number; sqrt: its root. So frequent classes weigh more.")
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model file beside this script, such as tin")
    add("--recipe", metavar="ROW", dest="row",
        help="a row of its RECIPES (default: toy without --data, else the first)")
    add("--data", metavar="DATA", help="a data folder (default: the toy, drawn into runs/toy)")
    add("--out", metavar="DIR", help="for checkpoints and log (default: runs/MODEL)")
    add("--resume", action="store_true", help="go on from OUT/last.pt, or start if there is none")
    add("--save-every", type=data.at_least(1), default=500, metavar="STEPS",
        help="write last.pt every STEPS steps, and after every epoch (%(default)s)")
    add("--seed", type=data.at_least(0), default=0, help="random seed (%(default)s)")
    add("--skip-broken", action="store_true",
        help="replace a training video that cannot be read by the next one")
    evaluate.add_shared_flags(parser)

    # the recipe, whose keys are flags too; --help comes last, so that it shows them
    known, _ = parser.parse_known_args()
    recipe = {}
    if known.model is not None:
        row = known.row
        if row is None and known.data is None:
            row = "toy"
        pages = (data.RECIPE, evaluate.RECIPE, RECIPE)
        module, recipe = evaluate.open_model(known.model, row, pages)
        if row is None:
            evaluate.refuse_toy_row(known.model, module)
            row = next(iter(module.RECIPES))
        evaluate.add_recipe_flags(parser, recipe)
    add("-h", "--help", action="help")
    args = parser.parse_args()
    if args.model is None:
        parser.error("which network? --model NAME, a model file such as tin")
    given = {key: value for key, value in vars(args).items() if key in recipe}
    if given.get("loss", "bce") != "bce" and "loss_scale" not in given:
        given["loss_scale"] = 1.0  # 160 belongs to the mean of binary cross-entropy
    recipe = evaluate.override(recipe, evaluate.with_scales(recipe, given))

    evaluate.check_recipe(recipe)
    if recipe["loss_scale"] == 0:
        raise ValueError("--loss-scale 0: must be larger than 0")
    if recipe["epochs"] < 1 and recipe["iterations"] < 1:
        raise ValueError(f"--epochs {recipe['epochs']}: at least 1")
    if recipe["class_weight"] != "none" and recipe["loss"] != "bce":
        raise ValueError(f"--class-weight {recipe['class_weight']}: goes with --loss bce")
    for key, value in recipe.items():
        if isinstance(value, tuple):
            recipe[key] = list(value)  # as a checkpoint holds it, so that the two compare
    args.module = module
    args.row = row
    args.recipe = recipe
    args.given = set(given)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:  # torchrun started it again
        args.resume = True
    return args


if __name__ == "__main__":
    data.run_script(main, "stopped; the same command with --resume goes on from OUT/last.pt")
