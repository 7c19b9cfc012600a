"""The training loop, its losses and its checkpoint.

    torchrun train.py --model tin                                              the toy, on a laptop, in minutes
    torchrun --nproc-per-node 8 train.py --model tin --data DATA               one machine, the report's recipe
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py --model slowfast ...
    torchrun train.py --model tin --recipe r101_8f --lr 0.02 --print-recipe    every recipe value is a flag

OUT (runs/MODEL) gets last.pt, from which --resume goes on as if nothing had happened; best.pt, the best on validation;
and log.jsonl. A run is a function of its seed: a step draws from (seed, step, rank), a clip from (seed, epoch, row), an
epoch's order from (seed, epoch), so no generator's state is kept. B clips, K classes; a step is one update of the
weights, from `batch` clips over all processes.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision

import data
import evaluate


def scaled_bce(logits, labels, scale=160.0, weight=None):
    """Binary cross-entropy, mean over videos and classes, times `scale`. logits, labels (B, K), weight (K,).
    Report: simply scaling it by 160 gave "a huge performance gain", scaling the learning rate instead did not: weight
    decay then weighs 160 times more. 160 of 313 classes, with 1.96 labels a video, is the loss summed per label."""
    logits = at_least_float32(logits)
    weight = None if weight is None else weight.to(logits)
    return scale * F.binary_cross_entropy_with_logits(logits, labels.to(logits), weight=weight)


def lsep(logits, labels):
    """Log-sum-exp pairwise loss, log(1 + sum over negatives v, positives u of exp(f_v - f_u)), mean over rows (B, K).
    The double sum is a product, so this is exact in O(K). 0 for rows without positives or negatives. Li, Song and Luo
    2017; report: tried, not used."""
    logits, positive = at_least_float32(logits), labels.bool()
    lowest = torch.finfo(logits.dtype).min  # not -inf, whose gradient may be NaN where nothing is left to sum
    negatives = logits.masked_fill(positive, lowest).logsumexp(1)
    positives = (-logits).masked_fill(~positive, lowest).logsumexp(1)
    return torch.logaddexp(negatives + positives, torch.zeros_like(negatives)).mean()


def warp(logits, labels, sampled=False, generator=None):
    """Weighted approximate-rank pairwise loss, mean over rows (B, K). Per positive u, with V the number of negatives v
    that violate its margin, 1 - f_u + f_v > 0: (1 + 1/2 + ... + 1/V) x the violators' mean of 1 - f_u + f_v.
    sampled: the papers' estimate, which draws negatives until one violates, s of them, and takes floor((K - 1) / s) for
    V; s is geometric, so no loop is needed. Weston, Bengio and Usunier 2011; report: tried, not used."""
    logits, positive = at_least_float32(logits), labels.bool()
    rows, columns = positive.nonzero(as_tuple=True)
    margin = 1 - logits[rows, columns][:, None] + logits[rows]  # (positives of the batch, K)
    violates = (margin > 0) & ~positive[rows]
    count, classes = violates.sum(1), logits.shape[1]
    weight = torch.cat([logits.new_zeros(1), (1 / torch.arange(1, classes + 1).to(logits)).cumsum(0)])  # by V from 0
    if not sampled:
        return (weight[count] * (margin * violates).sum(1) / count.clamp(min=1)).sum() / len(logits)
    chance = count / (~positive[rows]).sum(1).clamp(min=1)
    uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64).to(logits.device)
    draws = (uniform.log() / torch.log1p(-chance.double())).ceil().clamp(1, classes)
    one = torch.multinomial((violates | (count == 0)[:, None]).double(), 1, generator=generator)
    found = (count > 0) & (draws <= classes - 1)
    weight = weight[((classes - 1) // draws).long()] * found
    return (weight * margin.gather(1, one).squeeze(1)).sum() / len(logits)


def at_least_float32(x):
    """Half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def make_criterion(recipe, counts):
    """The recipe's loss, (logits, labels) -> scalar. counts: training videos per class, for class_weight."""
    scale, kind = recipe["loss_scale"], recipe["loss"]
    if kind == "bce":  # report: weights (N_i / mean N) ** 1 or 0.5; gained slightly, not used
        power = {"none": 0.0, "sqrt": 0.5, "ratio": 1.0}[recipe["class_weight"]]
        weight = torch.tensor((counts / counts.mean()) ** power, dtype=torch.float32) if power else None
        return functools.partial(scaled_bce, scale=scale, weight=weight)
    losses = {"lsep": lsep, "warp": warp,  # ce is for single-label lists, such as Kinetics'
              "ce": lambda logits, labels: F.cross_entropy(at_least_float32(logits), labels.argmax(1))}
    return lambda logits, labels: scale * losses[kind](logits, labels)


def learning_rate(iteration, total, recipe):
    """The rate of step `iteration` of `total`, from 0; a pure function, so that resuming needs no scheduler.
    Tenths at the milestones, or half a cosine counted from step 0; before `warmup`, a line from a tenth of the base to
    the curve's own value there. The base is the recipe's lr, in proportion to the batch. Report; SlowFast's paper."""
    base = recipe["lr"] * recipe["batch"] / recipe["reference_batch"]
    warmup = recipe["warmup"] * recipe["reference_batch"] / recipe["batch"]
    if iteration < warmup:
        start, end = 0.1 * base, learning_rate(warmup, total, recipe)
        return start + (end - start) * iteration / warmup
    if recipe["schedule"] == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * iteration / total))
    return base * 0.1 ** sum(iteration * recipe["epochs"] >= milestone * total for milestone in recipe["milestones"])


def batches(videos, batch, seed, start, total, rank, world, accumulate):
    """For each step from `start`: `accumulate` lists of dataset indices, this process's parts of that step's batch.
    An epoch is a permutation that depends on (seed, epoch) alone; what does not fill a batch is left for another."""
    steps = videos // batch
    for iteration in range(start, total):
        epoch, step = divmod(iteration, steps)
        if step == 0 or iteration == start:
            order = np.random.default_rng([seed, epoch]).permutation(videos)
        share = order[step * batch : (step + 1) * batch][rank::world]
        for part in range(accumulate):
            yield [int(row) + epoch * videos for row in share[part::accumulate]]


def order_blind_ceiling(videos):
    """The best sample_map, a fraction, of a model that cannot tell a video from its reversal: each pair's labels are
    tried in every order. None where the reversal (path + "_reversed") of some video is not in the list."""
    labels = {video.path: video.labels for video in videos}
    pairs = [(own, labels[f"{path}_reversed"]) for path, own in labels.items() if f"{path}_reversed" in labels]
    if 2 * len(pairs) != len(labels):
        return None
    best = []
    for pair in pairs:
        union = sorted({*pair[0], *pair[1]})
        orders = np.indices([len(union)] * len(union)).reshape(len(union), -1).T  # ties too: they can help
        ap = [evaluate.average_precision(orders, np.tile(np.isin(union, own), (len(orders), 1))) for own in pair]
        best.append(np.mean(ap, axis=0).max())
    return float(np.mean(best))


def save(path, checkpoint):
    """The first process writes a checkpoint whole or not at all: a full disk or a kill leaves the previous one."""
    part, problem = path.with_name(f"{path.name}.part"), ""
    try:
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(checkpoint, part)
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        problem = f"{path}: could not be written ({str(error).splitlines()[0]}); the one before is whole"
    evaluate.raise_together(problem)


def start_from(module, model, recipe):
    """Load the weights that the recipe's init names into the model; a sentence on what was read and what was not.
    A part that the file lacks as a whole, or whose shape depends on the number of classes or frames, keeps its initial
    values. ValueError where the backbone, or part of another part, would: that network would train from nothing."""
    init = recipe["init"]
    if init == "none":
        return "init none: every tensor has its initial value"
    if init == "imagenet":
        backbone = recipe.get("backbone") or f"resnet{recipe['depth']}"
        try:
            weights = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
            checkpoint = weights.get_state_dict(progress=False)
        except ValueError:
            raise ValueError(f"--init imagenet: torchvision has no {backbone}; name a file, or none") from None
        except OSError as error:
            raise OSError(f"--init imagenet: cannot download {weights.url} ({error}); put it into "
                          f"{torch.hub.get_dir()}/checkpoints, or pass --init none") from None
    else:
        checkpoint = evaluate.read_checkpoint(init)
    theirs, ours = evaluate.convert(module, checkpoint, init), model.state_dict()
    fitting = {key for key in ours if key in theirs and ours[key].shape == theirs[key].shape}
    parts = {key.split(".")[0] for key in fitting}
    kept = {}
    for key in sorted({*ours, *theirs} - fitting):
        shapes = [str(tuple(state[key].shape)) if key in state else "absent" for state in (theirs, ours)]
        part, reason = key.split(".")[0], f"{shapes[0]} in the file, {shapes[1]} here"
        if part == "backbone" or key not in ours or (key not in theirs and part in parts):
            raise ValueError(f"--init {init}: {key} is {reason}; the file is of another network or size")
        kept.setdefault(part if key not in theirs else key, []).append(reason if key in theirs else "not in the file")
    model.load_state_dict({key: theirs[key] for key in fitting}, strict=False)
    return f"init {init}: {len(fitting)} of {len(ours)} tensors read" + "".join(
        f"\n  keeps its initial value: {name} ({reasons[0]}{f', {len(reasons)} tensors' if len(reasons) > 1 else ''})"
        for name, reasons in kept.items())


def parse_arguments():
    """(args, model file's module, recipe): the row of RECIPES, with every value that was given as a flag."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", required=True, metavar="NAME", help="a model file beside this script, such as tin")
    first.add_argument("--recipe", metavar="ROW", help="a row of its RECIPES (toy without --data, else the first)")
    first.add_argument("--data", metavar="DATA", help="a data folder (the toy, drawn into runs/toy)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     parents=[first], allow_abbrev=False)
    parser.add_argument("--out", metavar="DIR", help="for checkpoints and log (runs/MODEL)")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt, or start if there is none")
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="write last.pt within epochs too")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch, to save memory (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes per process, 0: none (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (cuda if there is one)")
    parser.add_argument("--amp", default="off", choices=["off", "bf16", "fp16"], help="half precision (%(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="pixels before channels in memory: faster on GPUs")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--skip-broken", action="store_true", help="train on the next video where one cannot be read")
    parser.add_argument("--print-recipe", action="store_true", help="show each value with its source, and stop")
    if not any(arg.startswith("--model") for arg in sys.argv):
        parser.parse_args()  # says that --model is missing, or helps without the recipe's flags
    known, _ = first.parse_known_args()
    module, recipe, notes = evaluate.open_recipe(known.model, known.recipe or ("toy" if known.data is None else None))
    evaluate.add_recipe_flags(parser, recipe, notes)
    args = parser.parse_args()
    given = {key: value for key, value in vars(args).items() if key in recipe}
    if given.get("loss", "bce") != "bce":  # 160 belongs to the mean of binary cross-entropy
        given.setdefault("loss_scale", 1.0)
    recipe = evaluate.check_recipe({**recipe, **given})
    if args.print_recipe:
        for key, value in recipe.items():
            print(f"{key:16} {value!s:24} {'given on the command line' if key in given else notes.get(key, '')}")
        sys.exit()
    if args.accumulate < 1 or min(args.save_every, args.workers, args.seed) < 0:
        raise ValueError("--accumulate is at least 1, --save-every, --workers and --seed at least 0")
    # Lists, as a checkpoint would hold, so that the two compare.
    return args, module, {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()}


def open_lists(folder, recipe, seed, skip_broken):
    """(training videos, validation videos by the recipe's one view, the latter's labels (N, K)) of a data folder."""
    videos = data.VideoList(folder, "train", recipe, train=True, seed=seed, skip_broken=skip_broken)
    views = functools.partial(evaluate.test_views, recipe=recipe, protocol=evaluate.make_protocol(recipe))
    val = data.VideoList(folder, "val", recipe, train=False, views=views)
    val_labels = evaluate.multi_hot(val.videos, len(val.categories))
    if val_labels is None:
        raise ValueError(f"{val.list}: no video has a label, so the best epoch cannot be told")
    if recipe["loss"] == "ce" and any(len(video.labels) != 1 for video in videos.videos):
        raise ValueError(f"{videos.list}: --loss ce needs exactly one label for every video")
    return videos, val, val_labels


def open_run(last, resume, config):
    """What last.pt holds, or None without such a file. ValueError if it is not to be gone on with, or another run's."""
    if not last.exists():
        return None
    if not resume:
        raise ValueError(f"{last}: a run is there already; go on with --resume, or choose another --out")
    checkpoint = evaluate.read_checkpoint(last)
    theirs, ours = ({**some, **some["recipe"], "recipe": None} for some in (checkpoint["config"], config))
    differences = [f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in {**theirs, **ours}
                   if theirs.get(key) != ours.get(key)]
    if differences:
        raise ValueError(f"{last}: belongs to another run: {'; '.join(differences)}")
    return checkpoint


def main():
    args, module, recipe = parse_arguments()
    rank, world, device = evaluate.start_process(args.device)
    say = functools.partial(print, flush=True) if rank == 0 else (lambda *_, **__: None)
    all_reduce = dist.all_reduce if world > 1 else (lambda *_: None)
    out = Path(args.out or f"runs/{args.model}")
    last, log = out / "last.pt", out / "log.jsonl"
    videos, val, val_labels = open_lists(args.data or evaluate.toy_folder(rank), recipe, args.seed, args.skip_broken)
    counts = np.bincount([label for video in videos.videos for label in video.labels], minlength=len(videos.categories))
    batch, steps = recipe["batch"], len(videos) // recipe["batch"]  # clips of a step, steps of an epoch
    share, rest = divmod(batch, world * args.accumulate)  # clips at once in a process
    if rest or not steps:
        raise ValueError(f"--batch {batch}: has to be a multiple of {world} processes x --accumulate {args.accumulate} "
                         f"and at most {len(videos)}, the videos of {videos.list}")
    total = round(recipe["epochs"] * steps if "epochs" in recipe else
                  recipe["iterations"] * recipe["reference_batch"] / batch)

    torch.manual_seed(args.seed)  # the same initial values in every process
    model = module.build(recipe, len(videos.categories)).to(device)
    config = {"model": args.model, "recipe": recipe, "seed": args.seed, "categories": videos.categories,
              "mean": recipe["mean"], "std": recipe["std"]}
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))  # a node counts its own alone
    all_reduce(restarts, dist.ReduceOp.MAX)
    checkpoint = open_run(last, args.resume or restarts > 0, config)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
    else:
        say(start_from(module, model, recipe))
    start, best = (checkpoint["iteration"], checkpoint["best_map"]) if checkpoint else (0, -1.0)

    if args.channels_last:
        video = any(parameter.dim() == 5 for parameter in model.parameters())
        model.to(memory_format=torch.channels_last_3d if video else torch.channels_last)
    if recipe["sync_bn"] and world > 1 and device.type == "cuda":  # on CPU PyTorch refuses it
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = model  # `model` stays bare, for checkpoints and evaluation; `net` is what is trained
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(model)
    if args.compile:
        net = torch.compile(net)
    # Not fused in fp16: where the scaler skips the first step, fused SGD keeps what its momentum had in memory before.
    optimizer = torch.optim.SGD(model.parameters(), momentum=recipe["momentum"], nesterov=recipe["nesterov"],
                                weight_decay=recipe["weight_decay"], fused=True if args.amp != "fp16" else None)
    half = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    autocast = functools.partial(torch.autocast, device.type, half, enabled=half is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():  # fused SGD takes the parameter's own layout for granted
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        scaler.load_state_dict(checkpoint["scaler"])
    criterion = make_criterion(recipe, counts)

    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    lines = [line for line in lines if line["step"] <= start]  # what a stopped run wrote after its last checkpoint goes
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if log.exists():
            data.write_lines(log, [json.dumps(line) for line in lines])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    say(*(f"  {key:16} {value}" for key, value in recipe.items()), sep="\n")
    say(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {world} x {device.type} ({hardware})")
    say(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(counts)} classes")
    for some in (videos, val):
        labels = sum(len(video.labels) for video in some.videos) / len(some)
        say(f"{some.list}: {len(some)} videos, {labels:.2f} labels each; {some.left_out} lines left out")
    say(f"batch {batch} = {world} processes x {share} clips x {args.accumulate}; "
        f"{steps} steps an epoch, {total} in all, from {start}")
    say(f"learning rate {recipe['lr']} x {batch} / {recipe['reference_batch']} = "
        f"{recipe['lr'] * batch / recipe['reference_batch']:g}")

    def record(line):
        lines.append(line)
        if rank == 0:
            with open(log, "a") as file:
                print(json.dumps(line), file=file)

    def stop_if_not_finite():
        all_reduce(bad_step, dist.ReduceOp.MIN)
        if bad_step < total:
            raise ValueError(f"step {int(bad_step) + 1}: the gradient is not finite; no checkpoint was written since, "
                             "try a smaller --lr or --clip-grad, or --amp bf16 in place of fp16")

    def write(name):
        stop_if_not_finite()
        save(out / name, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                          "scaler": scaler.state_dict(), "epoch": done // steps, "iteration": done, "best_map": best,
                          "config": config, "class_counts": counts.tolist()})

    stopped_by = [0]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stopped_by.append(number))
    drawn = functools.partial(batches, len(videos), batch, args.seed, start, total, rank, world, args.accumulate)
    loader = torch.utils.data.DataLoader(videos, batch_sampler=drawn(), num_workers=args.workers,
                                         pin_memory=device.type == "cuda", worker_init_fn=data.leave_process_group)
    stream, wanted = iter(loader), drawn()
    bad_step = torch.tensor(total, device=device)  # the first step whose gradient was not finite
    loss_sum = torch.zeros((), device=device)
    replaced = torch.tensor(0)  # clips of this epoch
    done, window, waited, since = start, 0, 0.0, time.time()
    for iteration in range(start, total):
        asked, problem = time.time(), ""
        try:
            parts = [next(stream) for _ in range(args.accumulate)]
        except OSError as error:
            problem = str(error.with_traceback(None))  # whose frames would keep the loader's workers alive
        waited += time.time() - asked
        events = torch.tensor([len(problem) > 0, stopped_by[-1]], dtype=torch.int)
        all_reduce(events, dist.ReduceOp.MAX)  # all processes leave together, or none
        if events.any():
            evaluate.raise_together(problem)
            write("last.pt")
            say(f"stopped after step {done} of {total}; the same command with --resume goes on from {last}")
            break

        torch.manual_seed(int(np.random.SeedSequence([args.seed, iteration, rank]).generate_state(1)[0]))
        rate = learning_rate(iteration, total, {"epochs": total / steps, **recipe})
        optimizer.param_groups[0]["lr"] = rate
        for part, (clip, labels, rows) in enumerate(parts, 1):
            replaced += (rows != torch.tensor(next(wanted)) % len(videos)).sum()
            clip, labels = clip.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with net.no_sync() if world > 1 and part < args.accumulate else contextlib.nullcontext():
                with autocast():
                    logits = net(data.normalise(clip, recipe["mean"], recipe["std"], args.channels_last))
                loss = criterion(logits, labels) / args.accumulate  # in float32, outside autocast
                scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_grad"] or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # fp16 overflows now and then, and its scaler skips the step: there only a bad loss tells of trouble.
        fine = torch.isfinite(loss_sum if args.amp == "fp16" else norm)
        bad_step = torch.where(fine, bad_step, bad_step.clamp(max=iteration))
        done, epoch, window = iteration + 1, iteration // steps + 1, window + 1

        if done % 20 == 0 or done == total:
            stop_if_not_finite()
            all_reduce(loss_sum)
            seconds, value = time.time() - since, loss_sum.item() / window / world
            record({"epoch": epoch, "step": done, "loss": value, "lr": rate, "grad_norm": norm.item(),
                    "clips_per_s": window * batch / seconds, "data_share": waited / seconds})
            memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 1024 * resource.getrusage(
                resource.RUSAGE_SELF).ru_maxrss
            left = datetime.timedelta(seconds=int((total - done) * seconds / window))
            say(f"epoch {epoch} step {done}/{total}  loss {value:.3f} ({value / recipe['loss_scale']:.4f} unscaled)  "
                f"lr {rate:.5f}  grad {norm.item():.1f}  {window * batch / seconds:.1f} clips/s  "
                f"data {100 * waited / seconds:.0f} %  {memory / 2**30:.1f} GB  left {left}")
            loss_sum.zero_()
            window, waited, since = 0, 0.0, time.time()
        if done % steps == 0 or done == total:
            stop_if_not_finite()
            paused = time.time()
            all_reduce(replaced)
            for buffer in model.buffers() if world > 1 else ():  # running means differ: the scored must be the saved
                dist.broadcast(buffer, 0)
            scores = evaluate.predict(model, val, len(counts), recipe, device, workers=args.workers,
                                      autocast=autocast())
            score = evaluate.sample_map(scores, val_labels)
            record({"epoch": epoch, "step": done, "val_map": score})
            hits = np.take_along_axis(val_labels, np.argsort(-scores, axis=1), axis=1)  # labels, likeliest class first
            top = f"  top-1 {100 * hits[:, 0].mean():.2f}  top-5 {100 * hits[:, :5].any(1).mean():.2f}"
            say(f"epoch {epoch}  val mAP {100 * score:.2f}" + top * (recipe["loss"] == "ce")
                + f"  ({replaced} broken videos replaced)" * args.skip_broken)
            if score > best:  # written first: after a kill between the two files, the run repeats both
                best = score
                write("best.pt")
            write("last.pt")
            replaced.zero_()
            since += time.time() - paused
        elif args.save_every and done % args.save_every == 0:
            write("last.pt")

    if done == total:
        epoch = next((line["epoch"] for line in lines if line.get("val_map") == best), "not in the log")
        ceiling = order_blind_ceiling(val.videos)
        say("finished already: " * (start == total) + f"best val mAP {100 * best:.2f} (epoch {epoch})"
            + (f" order-blind ceiling {100 * ceiling:.2f}" if ceiling is not None else ""))
    evaluate.end_process()
    return 0 if done == total else 128 + int(events[1])


if __name__ == "__main__":
    data.run_script(main)
