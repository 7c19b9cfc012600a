"""SlowFast: a 3D ResNet of many channels that sees few frames, told what moves by a narrow one that sees them all. The
video network of the team's report, with the variants that joined its ensemble: longer clips, and one pathway alone.

Report: arXiv 2003.05837, Table 2. Paper: Feichtenhofer et al., "SlowFast Networks for Video Recognition", 1812.03982.

    frame                 0   1   2   3   4   5   6   7   8  ...  T - 1
    fast,  8 channels     x   x   x   x   x   x   x   x   x         x     all of them: how things move
    slow, 64 channels     x               x               x               every alpha-th, here 4th: what things are
    a lateral                     [____ k = 5 ____]                       what slow frame 4 is told by the fast ones

Before each of the four stages a lateral, a convolution over k fast frames, adds a quarter to the slow channels. Within
a pathway all frames stay to the end; the classifier sees each pathway's mean over its frames and pixels.
In time the fast pathway's kernels span 5 frames (stem) and 3 (every block), the slow one's 3 (the last two stages).

B clips, T fast frames, C channels, H height, W width, K classes, D features (2048 of slow and 256 of fast).
"""
import re

import torch
import torch.nn as nn

REPORT = dict(
    variant="slowfast_8x8",  # a key of ALPHA: pathways, then slow frames x their distance in the video; report, Table 2
    frames=32, stride=2,  # T, and their distance in the video; report: 64 consecutive frames, 8x8 in the paper's words
    sampling="clip",  # all T from one window, at a random place in training; report: "consecutive frames"
    depth=101,  # 50, 101, 152 or 200, and 14 for the toy; report: 152 and 200 are no better
    fusion_kernel=5,  # fast frames that a lateral sees; our choice: the authors' code (7 in others' 8x8)
    fusion_norm=False,  # batch norm and ReLU after a lateral; our choice: the authors' code (PySlowFast has them)
    fc_bias=False,  # a bias in the classifier; our choice: the authors' code (all others have one)
    slow_index="stride",  # every alpha-th frame, or "linspace" as PySlowFast has it; our choice: the authors' code
    alpha=None,  # fast frames per slow frame, None: the variant's; our choice: the paper's, 4
    dropout=0.5,  # before the classifier; report
    augment="jitter",  # a random short side, then a random crop, the same for the whole clip; report
    crop=112, jitter=(128, 160), flip=True,  # pixels; the short side before the crop; half are mirrored; report
    draft=False,  # decode JPEGs at half size where jitter allows it; our choice: off, pixels differ by about 1 of 255
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),  # RGB in 0..1; our choice: ImageNet's, as the authors' code
    loss="bce", loss_scale=160.0,  # mean binary cross-entropy, times 160; report: "a huge performance gain"
    class_weight="none",  # none, sqrt or ratio; report: the other two gained slightly and were not used
    batch=1024, reference_batch=1024,  # clips a step, and those lr is meant for; report: 32 GPUs with 32 clips each
    lr=0.2,  # at reference_batch, otherwise in proportion; report
    schedule="cosine",  # half a period, from lr at step 0 to 0 at the end; report
    iterations=180000,  # steps at reference_batch, the warm-up among them; report, 179.8 epochs of its training set
    milestones=(60, 120),  # epochs, for schedule "step" alone; our choice: thirds, the report has no steps here
    warmup=8000,  # steps at reference_batch, a line from lr / 10; our choice: the paper's, the report names no length
    momentum=0.9,  # report
    nesterov=False,  # our choice: the report names momentum alone
    weight_decay=1e-4,  # on every parameter; report
    clip_grad=0.0,  # largest norm of the gradient, 0: off; our choice: the warm-up does that, the report is silent
    sync_bn=True,  # batch norm over all GPUs; report
    init="none",  # report: from scratch, a start from Kinetics cost 1.1 points
    test_resize=128, test_crop=112,  # pixels, short side and centre crop of the one view; our choice: the authors' code
    clips=10, crops=3, scales=(128, 144, 160),  # the fuller protocols: per video, per clip, sides in pixels; report
    published_map=59.89,  # percent, validation, one view; report, Table 2 (10 clips 61.52, all three scales 63.52)
)
RECIPES = {  # published_map None: what the row scored is not in our sources
    "r101_8x8": REPORT,
    "r101_11x8": {**REPORT, "variant": "slowfast_11x8", "frames": 44, "published_map": None},  # nearly all of 3 s
    "r101_fast_16x2": {**REPORT, "variant": "fast_16x2", "frames": 16, "published_map": None},
    "r101_fast_32x2": {**REPORT, "variant": "fast_32x2", "published_map": None},  # 3.9 times the work of r101_8x8
    "r101_slow_8x4": {**REPORT, "variant": "slow_8x4", "frames": 8, "stride": 4, "published_map": None},
    "r101_slow_8x8": {**REPORT, "variant": "slow_8x8", "frames": 8, "stride": 8, "published_map": None},  # in its text
    "toy": {
        **REPORT, "crop": 32, "jitter": (36, 36), "test_resize": 36, "test_crop": 32,  # of 40x36, nearly all of it
        "scales": (32, 30, 28),  # at 36 the last map is 2x2, not 1x1: measured, dense 82.0 there, 99.6 here
        "frames": 24, "stride": 1, "clip_grad": 5.0,  # the whole video, 6 slow frames; measured: it learns fastest so
        "flip": False,  # a mirrored video moves the other way: the flip would swap two labels
        "loss_scale": 10 / 1.7,  # classes / labels per video: what 160 is to 313 classes with 1.96 labels
        "depth": 14, "batch": 16, "reference_batch": 16, "published_map": None,  # minutes on a laptop
        "lr": 0.05, "warmup": 0, "epochs": 10,  # our choice: clip_grad tames the first steps; measured: 98.9, 88.6 in 7
    },
}
del RECIPES["toy"]["iterations"]  # a row has either iterations or epochs

ALPHA = {"slowfast_8x8": 4, "slowfast_4x16": 8, "slowfast_11x8": 4,  # fast frames per slow frame
         "fast_32x2": 1, "fast_16x2": 1, "slow_8x8": 1, "slow_8x4": 1}  # one pathway alone sees every frame of its clip
BLOCKS = {14: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}  # per stage


def slow_frames(clip, alpha, slow_index="stride"):
    """The frames that the slow pathway sees: clip (B, T, 3, H, W) -> (B, T / alpha, 3, H, W).

    "stride": 0, alpha, 2 alpha ..., each in the middle of what its lateral sees; the authors' code and mmaction2.
    "linspace": evenly from the first to the last, rounded down (32 to 8: 0 4 8 13 17 22 26 31); PySlowFast and
    pytorchvideo. The wrong one moves the logits by up to some percent and raises no error.
    """
    if slow_index == "stride":
        return clip[:, ::alpha]
    last, count = clip.shape[1] - 1, clip.shape[1] // alpha
    return torch.stack([clip[:, i * last // max(1, count - 1)] for i in range(count)], dim=1)


class Lateral(nn.Module):
    """Fast to slow: slow (B, C, T / alpha, H, W) and fast (B, c, T, H, W) -> (B, C + 2c, T / alpha, H, W)."""

    def __init__(self, channels, kernel, alpha, norm):
        super().__init__()
        self.conv = nn.Conv3d(channels, 2 * channels, (kernel, 1, 1), (alpha, 1, 1), (kernel // 2, 0, 0), bias=False)
        if norm:
            self.bn = nn.BatchNorm3d(2 * channels)

    def forward(self, slow, fast):
        x = self.conv(fast)
        if hasattr(self, "bn"):
            x = torch.relu(self.bn(x))
        return torch.cat([slow, x], dim=1)


class Bottleneck(nn.Module):
    """A residual block of planes * 4 channels: `kernel` frames in its first convolution, 3 x 3 pixels in its second."""

    def __init__(self, channels, planes, kernel, stride):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, planes, (kernel, 1, 1), padding=(kernel // 2, 0, 0), bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != 4 * planes:  # the shortcut of a stage's first block
            self.downsample = nn.Sequential(
                nn.Conv3d(channels, 4 * planes, 1, stride=(1, stride, stride), bias=False), nn.BatchNorm3d(4 * planes))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Pathway(nn.Module):
    """A 3D ResNet. kernels: the frames seen by the stem, then by every block's first convolution in each of 4 stages.
    laterals: whether each stage gets a quarter more channels than the one before it gives."""

    def __init__(self, depth, width, kernels, laterals):
        super().__init__()
        stem, *kernels = kernels
        self.conv1 = nn.Conv3d(3, width, (stem, 7, 7), stride=(1, 2, 2), padding=(stem // 2, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        channels = width
        for stage, (blocks, kernel) in enumerate(zip(BLOCKS[depth], kernels)):
            joined, planes = channels + laterals * (channels // 4), width * 2 ** stage  # 2c lateral, c = C / 8
            first = Bottleneck(joined, planes, kernel, 1 if stage == 0 else 2)
            channels = 4 * planes
            rest = [Bottleneck(channels, planes, kernel, 1) for _ in range(1, blocks)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))

    def stem(self, x):
        """x (B, 3, T, H, W) -> (B, C, T, H / 4, W / 4)."""
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


class SlowFast(nn.Module):
    """clip (B, T, 3, H, W) at the fast rate, normalised -> logits (B, K).

    Variants: the keys of ALPHA; depths: those of BLOCKS. T: any multiple of alpha, else a ValueError. The defaults are
    the network that the report's authors released; the other options are there for other people's weights.
    """

    def __init__(self, num_classes, variant="slowfast_8x8", depth=101, dropout=0.5, fusion_kernel=5, fusion_norm=False,
                 fc_bias=False, slow_index="stride", alpha=None):
        super().__init__()
        for name, value, known in (("variant", variant, ALPHA), ("depth", depth, BLOCKS),
                                   ("slow_index", slow_index, ("stride", "linspace"))):
            if value not in known:
                raise ValueError(f"SlowFast has no {name} {value!r}, only {', '.join(map(str, known))}")
        self.alpha = alpha or ALPHA[variant]
        self.slow_index = slow_index
        self.pathways = re.findall("slow|fast", variant)  # slow first
        both = len(self.pathways) == 2
        if "slow" in self.pathways:
            self.slow = Pathway(depth, 64, (1, 1, 1, 3, 3), laterals=both)
        if "fast" in self.pathways:  # alone it is as wide as a slow one: the report's "no channel reduction"
            self.fast = Pathway(depth, 8 if both else 64, (5, 3, 3, 3, 3), laterals=False)
        self.fuse = nn.ModuleList(
            Lateral(channels, fusion_kernel, self.alpha, fusion_norm) for channels in (8, 32, 64, 128) if both)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2048 + 256 if both else 2048, num_classes, bias=fc_bias)
        for module in self.modules():  # as PySlowFast; the authors' code leaves PyTorch's own
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its shortcut
        nn.init.normal_(self.fc.weight, std=0.01)
        if fc_bias:
            nn.init.zeros_(self.fc.bias)

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the classifier sees, (B, D)."""
        if clip.shape[1] % self.alpha:
            raise ValueError(f"this SlowFast takes clips of a multiple of {self.alpha} frames, got {clip.shape[1]}")
        nets = [getattr(self, name) for name in self.pathways]
        clips = [slow_frames(clip, self.alpha, self.slow_index), clip] if self.fuse else [clip]
        maps = [net.stem(x.transpose(1, 2)) for net, x in zip(nets, clips)]  # (B, C, T, H, W), slow first
        for stage in range(4):
            if self.fuse:
                maps[0] = self.fuse[stage](*maps)
            maps = [getattr(net, f"layer{stage + 1}")(x) for net, x in zip(nets, maps)]
        return torch.cat([x.mean(dim=(2, 3, 4)) for x in maps], dim=1)

    def forward(self, clip):
        return self.fc(self.dropout(self.features(clip)))


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return SlowFast(num_classes, recipe["variant"], recipe["depth"], recipe["dropout"], recipe["fusion_kernel"],
                    recipe["fusion_norm"], recipe["fc_bias"], recipe["slow_index"], recipe["alpha"])


# Other people's keys -> ours: stem, blocks, shortcuts, laterals of each code base, then the classifier. What a named
# group catches goes to the place of that name, in our word for it where WORDS has one.
WORDS = {
    "path": {"": "slow", "0": "slow", "1": "fast", "t_": "fast"},
    "layer": {"conv1": "0", "layer1": "1", "layer2": "2", "layer3": "3",  # others count from res2; laterals, from 0
              **{f"{word}{n + 1}": str(n) for word in ("s", "res", "p", "pool") for n in range(5)}},
    "kind": {"": "conv", "conv_f2s": "conv", "conv_fast_to_slow": "conv", "_bn": "bn", "norm": "bn"},
    "conv": {"a": "1", "b": "2", "c": "3"}, "half": {"": "0", "conv": "0", "_bn": "1", "bn": "1", "norm": "1"},
    "value": {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"},
}
STEM, BLOCK = "{path}.{kind}1.{value}", "{path}.layer{layer}.{block}.{kind}{conv}.{value}"
SHORTCUT, LATERAL = "{path}.layer{layer}.0.downsample.{half}.{value}", "fuse.{layer}.{kind}.{value}"
VALUE = r"\.(?P<value>weight|bias|running_mean|running_var|num_batches_tracked)"
BLOB = r"_(?P<value>w|s|b|rm|riv)"  # riv is the variance itself, against its name
PSF = r"(?P<layer>s[2-5])\.pathway(?P<path>[01])_res"
PTV = r"blocks\.(?P<layer>[0-4])\.(?:multipathway_blocks\.(?P<path>[01])\.)?"  # a lone pathway has no name here
MM2 = r"backbone\.(?:(?P<path>slow|fast)_path\.)?"  # nor here
KEYS = [
    (r"(?P<ours>(?:slow|fast|fuse)\..+)", "{ours}"),
    (r"(?P<path>slow|fast)_(?P<kind>conv|bn)1" + VALUE, STEM),  # X-Temporal
    (r"(?P<path>slow|fast)_(?P<layer>res[2-5])\.(?P<ours>.+)", "{path}.layer{layer}.{ours}"),
    (r"lateral_(?P<layer>p1|res[2-4])(?P<kind>)" + VALUE, LATERAL),
    (r"s1\.pathway(?P<path>[01])_stem\.(?P<kind>conv|bn)" + VALUE, STEM),  # PySlowFast
    (PSF + r"(?P<block>\d+)\.branch2\.(?P<conv>[abc])(?P<kind>|_bn)" + VALUE, BLOCK),
    (PSF + r"0\.branch1(?P<half>|_bn)" + VALUE, SHORTCUT),
    (r"(?P<layer>s[1-4])_fuse\.(?P<kind>conv_f2s|bn)" + VALUE, LATERAL),
    (r"(?P<path>|t_)(?:conv1|res_conv1(?P<kind>_bn))" + BLOB, STEM),  # PySlowFast's Caffe2 files
    (r"(?P<path>|t_)(?P<layer>res[2-5])_(?P<block>\d+)_branch2(?P<conv>[abc])(?P<kind>|_bn)" + BLOB, BLOCK),
    (r"(?P<path>|t_)(?P<layer>res[2-5])_0_branch1(?P<half>|_bn)" + BLOB, SHORTCUT),
    (r"t_(?P<layer>pool1|res[2-4])(?:_\d+_branch2c_bn)?_subsample(?P<kind>|_bn)" + BLOB, LATERAL),
    (PTV + r"(?P<kind>conv|norm)" + VALUE, STEM),  # pytorchvideo
    (PTV + r"res_blocks\.(?P<block>\d+)\.branch2\.(?P<kind>conv|norm)_(?P<conv>[abc])" + VALUE, BLOCK),
    (PTV + r"res_blocks\.0\.branch1_(?P<half>conv|norm)" + VALUE, SHORTCUT),
    (r"blocks\.(?P<layer>[0-3])\.multipathway_fusion\.(?P<kind>conv_fast_to_slow|norm)" + VALUE, LATERAL),
    (MM2 + r"conv1\.(?P<kind>conv|bn)" + VALUE, STEM),  # mmaction2
    (MM2 + r"layer(?P<layer>[1-4])\.(?P<block>\d+)\.conv(?P<conv>[123])\.(?P<kind>conv|bn)" + VALUE, BLOCK),
    (MM2 + r"layer(?P<layer>[1-4])\.0\.downsample\.(?P<half>conv|bn)" + VALUE, SHORTCUT),
    (r"backbone\.slow_path\.(?P<layer>conv1|layer[1-3])_lateral\.(?P<kind>conv|bn)" + VALUE, LATERAL),
    (r"(?:fc|head\.projection|blocks\.[56]\.proj|cls_head\.fc_cls)" + VALUE, "fc.{value}"),
    (r"pred" + BLOB, "fc.{value}"),
]


def our_name(key):
    """Another's key -> ours, None where no pattern of KEYS fits."""
    for pattern, name in KEYS:
        if match := re.fullmatch(r"(?:module\.|model\.)*" + pattern, key):
            caught = match.groupdict(default="").items()
            return name.format(**{group: WORDS.get(group, {}).get(word, word) for group, word in caught})
    return None


def convert(checkpoint):
    """What was read from a checkpoint file -> a state dict in our names, complete for a strict load.

    Ours, and two-pathway, Slow-only and Fast-only files of X-Temporal, PySlowFast (its Caffe2 zoo's too, as unpickled),
    pytorchvideo and mmaction2. They tell every option of SlowFast but two: alpha and slow_index leave no trace.
    ValueError for four kinds of near relatives, by name, and for any other layout, with its first keys.
    """
    tensors = next((checkpoint[k] for k in ("model_state", "state_dict", "model", "blobs")
                    if isinstance(checkpoint.get(k), dict)), checkpoint)
    if "blobs" in checkpoint:  # arrays, the optimiser's too; a convolution's last axes may be missing if of length 1
        tensors = {key: torch.as_tensor(x)[(...,) + (None,) * (5 - x.ndim if re.fullmatch("(?!pred).+_w", key) else 0)]
                   for key, x in tensors.items() if not re.fullmatch(".+_momentum|lr|model_iter", key)}
    ours = {key: our_name(key) for key in tensors}
    state = {name: tensors[key] for key, name in ours.items() if name}
    for key, x in tensors.items():
        res4 = re.fullmatch(r"\w+(\.layer3\.\d+\.conv1\.weight)", ours[key] or "")
        refused = (
            "non-local blocks" if re.search("non_?local", key)
            else "the layout of MMAction 0.x" if re.search(r"backbone\.(\w+\.)?conv1\.weight$", key) and x.ndim == 5
            else "single-frame blocks in res4, as R101_50_50 has from block 6 on" if res4 and x.shape[2] == 1
            else "pathways of two depths, as mmaction2's r101-r50"
            if res4 and "fast.conv1.weight" in state and "fast" + res4[1] not in state else None)
        if refused:
            raise ValueError(f"{__name__}.py does not read {refused}: {key}")
    rest = [key for key, name in ours.items() if name is None]
    if rest or not ours:
        raise ValueError(f"{__name__}.py has no place for {len(rest)} of {len(ours)} keys: {', '.join(rest[:3])} ...")
    if any(name == "slow.conv1.weight" and x.shape[2] > 1 for name, x in state.items()):  # others' lone fast pathway
        state = {re.sub("^slow", "fast", name): x for name, x in state.items()}
    if "fc.weight" in state and any("backbone.fast_path" in key for key in tensors):  # mmaction2 sees fast, then slow
        state["fc.weight"] = state["fc.weight"].roll(-256, dims=1)
    for key in [key for key in state if key.endswith("running_var")]:  # Caffe2 did not count batches
        state.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return state
