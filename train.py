"""The training loop, its losses and its checkpoint.

    torchrun train.py --model tin                                   the toy: minutes on a laptop
    torchrun --nproc-per-node 8 train.py --model tin --data DATA    the report's recipe
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train.py --model slowfast --data DATA                       the report's 32 GPUs
    torchrun train.py --model tin --lr 0.02 --no-flip               every recipe value is a flag

The folder OUT (runs/MODEL) gets last.pt, from which --resume goes on; best.pt, the best on
validation; and log.jsonl. With several nodes it must be on a disk that all of them share.

All randomness derives from the seed: a step draws from (seed, step, rank), a clip from (seed,
epoch, row), the order of an epoch from (seed, epoch). So a checkpoint holds no generator's state,
and a run that is resumed by the same command equals the uninterrupted one, on a CPU bit for bit.

B clips, T frames, H height, W width, K classes. A step is one update of the weights. In comments on
settings "report" is arXiv 2003.05837 and "the authors" are its authors. "ours" means that the
report is silent; what we follow, or why, comes after it.
"""
import argparse
import datetime
import functools
import json
import math
import os
import time
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

# How a network is trained: the report's image models. A model's recipe row overrides what differs.
RECIPE = dict(
    # loss
    loss="bce",            # bce, lsep, warp, or ce for single-label lists such as Kinetics'
    loss_scale=160.0,      # report: "a huge performance gain"; 313 classes / 1.96 labels = 160
    class_weight="none",   # none, sqrt or ratio; report: both gained slightly and were not used

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
    milestones=(10, 20),   # epochs; report: "divided by 10, 20 epochs"
    epochs=30,             # ours: three stages of ten epochs
    iterations=0,          # steps in all; 0: use epochs
    warmup=0,              # steps of a linear start; ours: clip_grad already tames the first steps

    # batch norm and first weights
    sync_bn=False,         # batch norm over all GPUs; ours: the report says it for SlowFast alone
    init="imagenet",       # imagenet (torchvision's weights), none, or a checkpoint file; ours: the
                           # report starts from Kinetics-600, but those weights are not public
)
LOG_EVERY = 20  # steps

# What a run has reached; a checkpoint holds it too.
FRESH = dict(
    epoch=0,        # whole epochs
    iteration=0,    # steps
    best_map=-1.0,  # on validation, a fraction
    best_epoch=0,
    validated=0,    # the last step after which the network was validated
    losses=[],      # of the steps since the last log line
)


# ---- losses: logits and labels (B, K) -> scalar ----------------------------------------------

def scaled_bce(logits, labels, scale=160.0, weight=None):
    """Binary cross-entropy, averaged over videos and classes, times `scale`; weight (K,).

    Report: the factor 160 gave "a huge performance gain", a learning rate times 160 did not.
    Averaging over 313 classes shrinks the loss's gradient but not the weight decay; the factor
    restores the balance. A video has 1.96 labels on average, and 313 / 1.96 is 160, so the scaled
    loss is the sum over all classes, divided by the number of labels.
    """
    logits = at_least_float32(logits)
    if weight is not None:
        weight = weight.to(logits)
    return scale * F.binary_cross_entropy_with_logits(logits, labels.to(logits), weight=weight)


def lsep(logits, labels):
    """Log-sum-exp pairwise loss: log(1 + sum over negatives v and positives u of exp(f_v - f_u)),
    averaged over videos; 0 for a video without positives or without negatives.

    The double sum is a product of two sums, so this is exact without a matrix of pairs.
    Li, Song and Luo 2017; report: tried, not used.
    """
    logits = at_least_float32(logits)
    positive = labels.bool()
    lowest = torch.finfo(logits.dtype).min  # not -inf, whose gradient can be NaN
    negatives = logits.masked_fill(positive, lowest).logsumexp(dim=1)
    positives = (-logits).masked_fill(~positive, lowest).logsumexp(dim=1)
    return torch.logaddexp(negatives + positives, torch.zeros_like(negatives)).mean()


def warp(logits, labels):
    """Weighted approximate-rank pairwise loss, averaged over videos.

    For a positive u, a negative v violates the margin if 1 - f_u + f_v > 0. With V violators the
    loss of u is (1 + 1/2 + ... + 1/V) times the violators' mean of 1 - f_u + f_v.
    Weston, Bengio and Usunier 2011; report: tried, not used. The papers estimate V by sampling;
    with 313 classes the exact number is cheap.
    """
    logits = at_least_float32(logits)
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


def at_least_float32(x):
    """Half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def class_weights(counts, kind):
    """Training videos of each class, counts (K,) -> the classes' weights in the loss, or None.
    Report: N_i / mean N ("ratio") or its root ("sqrt"); frequent classes weigh more."""
    if kind == "none":
        return None
    weights = counts / counts.mean()
    if kind == "sqrt":
        weights = weights**0.5
    return torch.tensor(weights, dtype=torch.float32)


def compute_loss(logits, labels, recipe, class_weight=None):
    """The recipe's loss in float32."""
    scale = recipe["loss_scale"]
    if recipe["loss"] == "bce":
        return scaled_bce(logits, labels, scale, class_weight)
    if recipe["loss"] == "lsep":
        return scale * lsep(logits, labels)
    if recipe["loss"] == "warp":
        return scale * warp(logits, labels)
    return scale * F.cross_entropy(at_least_float32(logits), labels.argmax(dim=1))


# ---- schedule and order: pure functions, so that resuming needs no state -----------------------

def learning_rate(iteration, total, recipe):
    """The learning rate of step `iteration` of `total`, counted from 0.

    Report: a tenth at each milestone, or half a cosine over all steps. A warm-up is a line from a
    tenth of the base rate to the curve's own value at its end (SlowFast's paper). The recipe's
    values are for reference_batch clips a step: a larger batch gets a rate in proportion and a
    shorter warm-up.
    """
    base = recipe["lr"] * recipe["batch"] / recipe["reference_batch"]
    warmup = recipe["warmup"] * recipe["reference_batch"] / recipe["batch"]
    if iteration < warmup:
        start = 0.1 * base
        end = learning_rate(warmup, total, recipe)
        return start + (end - start) * iteration / warmup
    if recipe["schedule"] == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * iteration / total))
    passed = 0
    for milestone in recipe["milestones"]:
        first_step = milestone * total / recipe["epochs"]
        if iteration >= first_step - 1e-6:  # epochs can be a fraction, with a rounding error
            passed += 1
    return base * 0.1**passed


def batches(num_videos, batch, seed, start, total, rank, world):
    """Yield, for each step from `start` on, this process's indices into the data set. An epoch is a
    permutation of the videos; the incomplete last batch is dropped."""
    steps_per_epoch = num_videos // batch
    order = None
    for iteration in range(start, total):
        epoch, position = divmod(iteration, steps_per_epoch)
        if position == 0 or order is None:
            order = np.random.default_rng([seed, epoch]).permutation(num_videos)
        rows = order[position * batch : (position + 1) * batch][rank::world]
        yield [epoch * num_videos + int(row) for row in rows]  # VideoList divides it up again


def step_seed(seed, iteration, rank):
    """The seed of what a step draws: dropout, and TRN's tuples."""
    return int(np.random.SeedSequence([seed, iteration, rank]).generate_state(1)[0])


# ---- first weights and checkpoints -----------------------------------------------------------

def load_init(module, model, recipe, categories):
    """Load the weights that the recipe's init names; returns a text that says what was read.

    Three kinds of tensors may keep their initial values: a classifier of other classes, linear
    layers and their biases whose size depends on the number of frames, and whole parts that the
    file lacks, such as TIN's small networks in a file of TSM. Any other mismatch raises a
    ValueError: that part of the network would be trained from nothing, unnoticed.
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
    theirs = evaluate.convert(module, checkpoint, init)
    ours = model.state_dict()
    problems = evaluate.misfits(theirs, ours)

    # the classifier; one of the same size may still be for other classes
    classifier = evaluate.classifier_keys(module, recipe)
    config = checkpoint.get("config")
    if isinstance(config, dict) and config.get("categories") not in (None, categories):
        for key in classifier:
            problems[key] = f"{key} is for other classes in the file"

    # everything else
    fitting = {key: theirs[key] for key in ours if key not in problems}
    parts = {key.split(".")[0] for key in fitting}
    for key, problem in problems.items():
        if key in classifier:
            continue
        if key not in ours:
            allowed = False
        elif key not in theirs:
            allowed = key.split(".")[0] not in parts  # the file lacks the whole part
        else:
            allowed = ours[key].dim() <= 2  # another convolution means another network
        if not allowed:
            raise ValueError(f"--init {init}: {problem}; the file is of another network or size")
    if not fitting:
        raise ValueError(f"--init {init}: nothing in the file fits this network")
    if len(fitting) < 0.4 * len(ours):  # one of two pathways is nearly a half
        raise ValueError(f"--init {init}: only {len(fitting)} of {len(ours)} tensors fit; for "
                         f"example, {next(iter(problems.values()))}")
    model.load_state_dict(fitting, strict=False)

    message = f"init {init}: {len(fitting)} of {len(ours)} tensors read"
    kept = list(problems.values())
    for problem in kept[:3]:
        message += f"\n  keeps its initial value: {problem}"
    if len(kept) > 3:
        message += f"\n  and {len(kept) - 3} others"
    return message


def imagenet_weights(recipe):
    """torchvision's ImageNet weights for the recipe's ResNet."""
    backbone = recipe.get("backbone") or f"resnet{recipe['depth']}"
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


def find_checkpoint(last, resume, config):
    """What last.pt holds, or None if it is not there. ValueError if it is there but was not asked
    for, or if it belongs to another run than this one."""
    if not last.exists():
        return None
    if not resume:
        raise ValueError(f"{last}: a run is there already; continue it with --resume, or name "
                         "another --out")
    checkpoint = evaluate.read_checkpoint(last)
    theirs = checkpoint["config"]
    way_out = f"; to start a new run from its weights: --init {last} --out NEW"
    try:
        data.compare_categories(config["categories"], "this data folder", theirs["categories"],
                                last)
    except ValueError as error:
        raise ValueError(f"{error}{way_out}") from None
    if (config["videos"], config["list_hash"]) != (theirs["videos"], theirs["list_hash"]):
        raise ValueError(f"{last}: was trained on another list, of {theirs['videos']} videos; the "
                         f"list here has {config['videos']}{way_out}")

    ours = {"model": config["model"], "seed": config["seed"], **config["recipe"]}
    theirs = {"model": theirs["model"], "seed": theirs["seed"], **theirs["recipe"]}
    differences = []
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            differences.append(f"{key} {theirs.get(key)} there, {ours.get(key)} here")
    if differences:
        raise ValueError(f"{last}: belongs to another run: {', '.join(differences)}{way_out}")
    return checkpoint


def make_optimizer(model, recipe, device, amp):
    """SGD with one group for all parameters, as the report's authors have it, and fp16's scaler."""
    # Not fused with fp16: if the scaler skips the first step, fused SGD starts with a momentum of
    # whatever the memory held.
    optimizer = torch.optim.SGD(model.parameters(), momentum=recipe["momentum"],
                                nesterov=recipe["nesterov"], weight_decay=recipe["weight_decay"],
                                fused=amp != "fp16")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    return optimizer, scaler


def make_checkpoint(model, optimizer, scaler, state, config, videos):
    """A plain dict that torch.load(weights_only=True) reads. Its keys have no prefix of DDP's or
    torch.compile's, since `model` is the bare network."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), **state, "config": config,
            "class_counts": videos.class_counts.tolist()}


def save(path, checkpoint):
    """Write a checkpoint whole or not at all: until it is complete it has another name, so a full
    disk or a kill leaves the previous one."""
    part = path.with_name(f"{path.name}.part")
    try:
        torch.save(checkpoint, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).split("\n")[0]
        raise OSError(f"{path}: could not be written ({reason}); nothing was "
                      "overwritten") from None
    finally:
        part.unlink(missing_ok=True)  # only there if something went wrong


def load_optimizer(optimizer, scaler, checkpoint):
    """The state of a checkpoint, even if it was written with another --amp or --channels-last."""
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


# ---- the log ---------------------------------------------------------------------------------

def clean_log(path, state):
    """Drop from the log what a stopped run wrote after its last checkpoint."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        if not text.endswith("}"):  # a kill cut it off
            continue
        line = json.loads(text)
        written = state["iteration"]
        if "val_map" in line:
            written = state["validated"]
        if line["step"] <= written:
            kept.append(text)
    data.write_lines(path, kept)


def append_log(path, line):
    """Add a dict to log.jsonl as a line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def average_losses(losses, world):
    """The losses of some steps, scalar tensors, as floats: means over the processes. Here training
    waits for the GPU, so this is not done at every step."""
    values = torch.stack(losses).float()
    if world > 1:
        dist.all_reduce(values)
        values /= world
    return values.tolist()


def check_finite(state, grad_norm, amp):
    """ValueError where training has gone wrong, before a checkpoint is written."""
    finite = all(math.isfinite(loss) for loss in state["losses"])
    if amp != "fp16":  # there the gradient overflows now and then, and the scaler skips the step
        finite = finite and math.isfinite(grad_norm)
    if not finite:
        raise ValueError(f"the loss or its gradient is not finite at step {state['iteration']} or "
                         "shortly before, and no checkpoint was written after that; try a smaller "
                         "--lr or --clip-grad, or --amp bf16 in place of fp16")


def print_settings(args, recipe, device, world, model, videos, val):
    """The whole recipe, the device, the network and the videos."""
    for key, value in recipe.items():
        print(f"  {key:16} {value}")
    hardware = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"{world} x {device.type} ({hardware})")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.model}: {parameters:,} parameters, {len(videos.categories)} classes")
    print(videos.describe())
    print(val.describe())
    classes_per_label = len(videos.categories) * len(videos) / max(videos.class_counts.sum(), 1)
    print(f"loss {recipe['loss']}, scale {recipe['loss_scale']:g}; classes / labels per video: "
          f"{classes_per_label:.1f}")


def print_plan(recipe, world, steps_per_epoch, total, start):
    """The batch, the steps and the learning rate that follow from the recipe."""
    batch = recipe["batch"]
    reference = recipe["reference_batch"]
    print(f"batch {batch} = {world} processes x {batch // world} clips; "
          f"{steps_per_epoch} steps an epoch, {total} in all, from {start}")
    print(f"learning rate {recipe['lr']} x {batch} / {reference} = "
          f"{recipe['lr'] * batch / reference:g}")
    if total < 100:
        print(f"warning: {total} steps are too few to learn much; raise --epochs, or lower --batch "
              "for more steps an epoch, and start from a trained network with --init FILE")
    if start == total:
        print("finished already")


def print_step(line, recipe, total, device):
    """Print a line of the log for people to read, with the time that is left."""
    seconds = (total - line["step"]) * recipe["batch"] / line["clips_per_s"]
    left = datetime.timedelta(seconds=int(seconds))
    memory = ""
    if device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB  "
    print(f"epoch {line['epoch']} step {line['step']}/{total}  loss {line['loss']:.3f} "
          f"({line['loss'] / recipe['loss_scale']:.4f} unscaled)  lr {line['lr']:.5f}  "
          f"grad {line['grad_norm']:.1f}  {line['clips_per_s']:.1f} clips/s  "
          f"data {100 * line['data_share']:.0f} %  {memory}left {left}", flush=True)


# ---- the parts of a run ----------------------------------------------------------------------

def open_videos(folder, recipe, args):
    """(training videos, validation videos seen by one view, the labels of these (N, K))."""
    videos = data.VideoList(folder, "train", recipe, train=True, seed=args.seed,
                            skip_broken=args.skip_broken)
    views = functools.partial(evaluate.test_views, recipe=recipe,
                              protocol=evaluate.make_protocol(recipe, "clip"))
    val = data.VideoList(folder, "val", recipe, train=False, views=views)
    val_labels = evaluate.multi_hot(val)
    if val_labels is None:
        raise ValueError(f"{val.list}: no video has a label, so the best epoch cannot be told")
    if recipe["loss"] == "ce":
        for row in range(len(videos)):
            video = videos.video(row)
            if len(video.labels) != 1:
                raise ValueError(f"{videos.list}:{video.line}: {len(video.labels)} labels; "
                                 "--loss ce needs exactly one for every video")
    return videos, val, val_labels


def count_steps(recipe, videos, world):
    """(steps of an epoch, steps in all)."""
    batch = recipe["batch"]
    if len(videos) < world:
        raise ValueError(f"{videos.list}: {len(videos)} videos are too few for {world} processes")
    if batch > len(videos):
        largest = len(videos) // world * world
        raise ValueError(f"--batch {batch}: more than the {len(videos)} videos of {videos.list}; "
                         f"try --batch {largest}")
    if batch % world != 0:
        raise ValueError(f"--batch {batch}: is split over {world} processes, so it must be a "
                         f"multiple of {world}")
    steps_per_epoch = len(videos) // batch
    if recipe["iterations"] > 0:
        total = round(recipe["iterations"] * recipe["reference_batch"] / batch)
        return steps_per_epoch, max(total, 1)
    return steps_per_epoch, recipe["epochs"] * steps_per_epoch


def validate(model, val, val_labels, recipe, device, world, args, autocast):
    """(mAP, text for the log line): every validation video, seen by one view."""
    # DDP copies the first process's running means to all when a step begins; the step then changes
    # them in each process. Copy them once more, so that all score the network that is saved.
    if world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    scores = evaluate.predict(model, val, val_labels.shape[1], recipe, device,
                              workers=args.workers, autocast=autocast,
                              channels_last=args.channels_last)
    val_map = evaluate.sample_map(scores, val_labels)
    text = f"val mAP {100 * val_map:.2f}"
    if recipe["loss"] == "ce":
        top1, top5 = evaluate.hit_rates(scores, val_labels)
        text += f"  top-1 {100 * top1:.2f}  top-5 {100 * top5:.2f}"
    return val_map, text


def parse_arguments():
    """(args, the model file's module, recipe): a row of RECIPES with the values given as flags."""
    basic = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    basic.add_argument("--model", metavar="NAME",
                       help="a model file beside this script, such as tin")
    basic.add_argument("--recipe", metavar="ROW",
                       help="a row of its RECIPES (default: toy without --data, else the first)")
    basic.add_argument("--data", metavar="DATA",
                       help="a data folder (default: the toy, drawn into runs/toy)")

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[basic], allow_abbrev=False,
        epilog="--model NAME --help shows the flags of the recipe's values too.")
    add = parser.add_argument
    add("--out", metavar="DIR", help="for checkpoints and log (default: runs/MODEL)")
    add("--resume", action="store_true", help="go on from OUT/last.pt, or start if there is none")
    add("--save-every", type=int, default=500, metavar="STEPS",
        help="write last.pt every STEPS steps, and after every epoch (%(default)s)")
    add("--seed", type=int, default=0, help="random seed (%(default)s)")
    add("--workers", type=int, default=2,
        help="loader processes per process, 0: none (%(default)s)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--amp", default="off", choices=["off", "bf16", "fp16"],
        help="half precision (%(default)s)")
    add("--channels-last", action="store_true", help="channels innermost in memory: faster on GPUs")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--skip-broken", action="store_true",
        help="replace a training video that cannot be read by the next one")

    # the recipe, whose keys are flags too
    known, _ = basic.parse_known_args()
    if known.model is None:
        parser.parse_known_args()  # prints --help, if it was asked for
        parser.error("which network? --model NAME, a model file such as tin")
    row = known.recipe
    if row is None and known.data is None:
        row = "toy"
    module, recipe = evaluate.open_model(known.model, row, (data.RECIPE, evaluate.RECIPE, RECIPE))
    evaluate.add_recipe_flags(parser, recipe)
    args = parser.parse_args()

    given = {key: value for key, value in vars(args).items() if key in recipe}
    if given.get("loss", "bce") != "bce" and "loss_scale" not in given:
        given["loss_scale"] = 1.0  # 160 belongs to the mean of binary cross-entropy
    recipe = evaluate.override(recipe, given)
    check_arguments(args, recipe)
    for key, value in recipe.items():
        if isinstance(value, tuple):
            recipe[key] = list(value)  # as a checkpoint holds it, so that the two compare
    return args, module, recipe


def check_arguments(args, recipe):
    """ValueError with the flag, if the values cannot be used."""
    evaluate.check_recipe(recipe)
    if recipe["loss_scale"] == 0:
        raise ValueError("--loss-scale 0: must be larger than 0")
    if recipe["epochs"] < 1 and recipe["iterations"] < 1:
        raise ValueError(f"--epochs {recipe['epochs']}: at least 1")
    if recipe["class_weight"] != "none" and recipe["loss"] != "bce":
        raise ValueError(f"--class-weight {recipe['class_weight']}: goes with --loss bce")
    if args.save_every < 1:
        raise ValueError(f"--save-every {args.save_every}: at least 1")
    if args.workers < 0:
        raise ValueError(f"--workers {args.workers}: at least 0")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: at least 0")


def main():
    args, module, recipe = parse_arguments()
    out = Path(args.out or f"runs/{args.model}")

    # ---- processes and device
    rank, world, device = evaluate.start_process(args.device)
    main_process = rank == 0  # prints, logs and saves
    torch.backends.cudnn.benchmark = True  # clips have one size: let cuDNN try its algorithms

    # ---- videos
    folder = args.data or evaluate.toy_folder(rank)
    videos, val, val_labels = open_videos(folder, recipe, args)
    steps_per_epoch, total = count_steps(recipe, videos, world)
    batch = recipe["batch"]

    # ---- model and optimiser
    torch.manual_seed(args.seed)  # the same initial values in every process
    model = module.build(recipe, len(videos.categories)).to(device)
    if recipe["sync_bn"] and world > 1 and device.type == "cuda":  # PyTorch refuses it on a CPU
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.channels_last:
        evaluate.use_channels_last(model)
    optimizer, scaler = make_optimizer(model, recipe, device, args.amp)

    # ---- first weights, or those of the run that is resumed
    config = {"model": args.model, "recipe": recipe, "seed": args.seed,
              "categories": videos.categories, "videos": len(videos), "list_hash": videos.hash}
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun
    checkpoint = find_checkpoint(out / "last.pt", args.resume or restarted, config)
    state = dict(FRESH)
    if checkpoint is None:
        message = load_init(module, model, recipe, videos.categories)
    else:
        model.load_state_dict(checkpoint["model"])
        load_optimizer(optimizer, scaler, checkpoint)
        state = {key: checkpoint[key] for key in FRESH}
        message = f"resuming from {out / 'last.pt'}"
    step = state["iteration"]
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        clean_log(out / "log.jsonl", state)
        print_settings(args, recipe, device, world, model, videos, val)
        print_plan(recipe, world, steps_per_epoch, total, step)
        print(message, flush=True)

    # ---- `model` stays the bare network, for checkpoints and validation; `net` is what is trained
    net = model
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(model)
    if args.compile:
        net = torch.compile(net)
    autocast = evaluate.make_autocast(device, args.amp)
    class_weight = class_weights(videos.class_counts, recipe["class_weight"])
    max_norm = recipe["clip_grad"] or math.inf
    # With --iterations the recipe's epochs is 0, but the milestones need the real number.
    rate_recipe = {**recipe, "epochs": total / steps_per_epoch}

    def save_as(name):
        if main_process:
            save(out / name, make_checkpoint(model, optimizer, scaler, state, config, videos))

    # ---- the loop
    indices = batches(len(videos), batch, args.seed, step, total, rank, world)
    loader = torch.utils.data.DataLoader(
        videos, batch_sampler=indices, num_workers=args.workers,
        pin_memory=device.type == "cuda", worker_init_fn=data.ignore_interrupts)
    stream = iter(data.load(loader))
    new_losses = []  # tensors on the device; state["losses"] has the older ones as numbers
    steps_since_log = 0
    seconds_waited = 0.0  # for clips, since the last log line
    log_time = time.time()
    while True:
        # Validate after every epoch and after the last step. This comes first in the loop, because
        # a resumed run may have to begin with it.
        if state["validated"] < step and (step % steps_per_epoch == 0 or step == total):
            paused = time.time()
            val_map, text = validate(model, val, val_labels, recipe, device, world, args, autocast)
            epoch = math.ceil(step / steps_per_epoch)
            state["validated"] = step
            if main_process:
                print(f"epoch {epoch}  {text}", flush=True)
                append_log(out / "log.jsonl", {"epoch": epoch, "step": step, "val_map": val_map})
            if val_map > state["best_map"]:
                state["best_map"] = val_map
                state["best_epoch"] = epoch
                save_as("best.pt")
            save_as("last.pt")
            log_time += time.time() - paused  # not the time of training
        if step == total:
            break

        # a batch: uint8 (B, T, H, W, 3) -> float (B, T, 3, H, W), and labels (B, K)
        asked = time.time()
        clips, labels, _ = next(stream)
        seconds_waited += time.time() - asked
        clips = clips.to(device, non_blocking=True)
        clips = data.normalise(clips, recipe["mean"], recipe["std"], args.channels_last)
        labels = labels.to(device, non_blocking=True)

        # What a step draws depends on (seed, step, rank) alone: no generator's state to resume.
        torch.manual_seed(step_seed(args.seed, step, rank))
        lr = learning_rate(step, total, rate_recipe)
        optimizer.param_groups[0]["lr"] = lr

        # forward and backward
        with autocast:
            logits = net(clips)
        loss = compute_loss(logits, labels, recipe, class_weight)  # in float32, outside autocast
        scaler.scale(loss).backward()

        # update
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        new_losses.append(loss.detach())
        step += 1
        steps_since_log += 1

        # log and save; last.pt is written before validation, so a kill there loses no step
        log_now = step % LOG_EVERY == 0 or step == total
        save_now = step % args.save_every == 0 or step % steps_per_epoch == 0 or step == total
        if log_now or save_now:
            state["iteration"] = step
            state["epoch"] = step // steps_per_epoch  # whole ones; a log line says which is running
            state["losses"] = state["losses"] + average_losses(new_losses, world)
            new_losses.clear()
            check_finite(state, grad_norm.item(), args.amp)
        if log_now:
            seconds = time.time() - log_time
            line = {"epoch": math.ceil(step / steps_per_epoch), "step": step,
                    "loss": sum(state["losses"]) / len(state["losses"]), "lr": lr,
                    "grad_norm": grad_norm.item(), "clips_per_s": steps_since_log * batch / seconds,
                    "data_share": seconds_waited / seconds}
            if main_process:
                append_log(out / "log.jsonl", line)
                print_step(line, recipe, total, device)
            state["losses"] = []
            steps_since_log = 0
            seconds_waited = 0.0
            log_time = time.time()
        if save_now:
            save_as("last.pt")

    # ---- the result
    if main_process:
        print(f"best val mAP {100 * state['best_map']:.2f} (epoch {state['best_epoch']})")
    evaluate.end_process()
    return 0


if __name__ == "__main__":
    data.run_script(main, "stopped; the same command with --resume goes on from OUT/last.pt")
