"""SlowFast: two 3D ResNets watch the same clip. The slow one has many channels and sees few frames;
the fast one has few channels and sees every frame, and tells the slow one how things move.

This is the video network of the team's report, with the variants of its ensemble: the same
network on longer clips, and either pathway alone.

Report: arXiv 2003.05837, section 2 and Table 2.
Paper: Feichtenhofer, Fan, Malik and He, "SlowFast Networks for Video Recognition",
arXiv 1812.03982.

    frame                 0   1   2   3   4   5   6   7   8  ...  T - 1
    fast,  8 channels     x   x   x   x   x   x   x   x   x         x     how things move
    slow, 64 channels     x               x               x               what things are
    lateral                       [____ k = 5 ____]                       for the slow frame at 4

The slow pathway sees every alpha-th frame (here every 4th). Before each of its four stages, a
lateral connection brings in the fast pathway: a convolution over k fast frames, centred on each
slow frame, whose output is concatenated to the slow channels.

Inside a pathway the number of frames never changes: all strides are in space. At the end each
pathway is averaged over frames and pixels, and the classifier sees both averages side by side.

The name of a variant tells its clip: frames, x, distance between neighbouring frames in the video.
With two pathways this is what the slow one sees.

    slowfast_8x8     clip of 32 frames, every 2nd of the video; slow: every 4th of them, 8 frames
    slowfast_11x8    clip of 44 frames, every 2nd of the video; slow: 11 frames; the same network
    slow_8x8         clip of 8 frames, every 8th of the video; slow_8x4 is the same network
    fast_32x2        clip of 32 frames, every 2nd of the video; fast_16x2 is the same network

Some options of this file serve weights that others have published; these have "for other people's
weights" in their comments, and a first reader may pass over them.

B clips, T frames of a clip (those of the fast pathway), C channels, H height, W width, K classes,
D features (2048 slow and 256 fast; 2048 for a pathway alone).
"""
import re

import torch
import torch.nn as nn


def slow_frames(clip, alpha, slow_index="stride"):
    """The frames that the slow pathway sees: clip (B, T, 3, H, W) -> (B, T / alpha, 3, H, W).

    Frames 0, alpha, 2 alpha, ..., each at the centre of its lateral's window. slow_index "linspace"
    is for other people's weights.
    """
    if slow_index == "linspace":
        return linspace_frames(clip, alpha)
    return clip[:, ::alpha]


def conv(inputs, outputs, kernel, stride=(1, 1, 1)):
    """A 3D convolution; kernel and stride: (time, height, width). Stride 1 keeps the map's size."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)


class Lateral(nn.Module):
    """The connection from the fast to the slow pathway.

    A convolution with stride alpha in time gives the fast map as many frames as the slow map has.
    Its output, with twice the channels of the fast map, is appended to the slow channels.

    channels: those of the fast map. kernel: fast frames that one output sees.
    norm: whether batch norm and ReLU follow the convolution; for other people's weights.
    """

    def __init__(self, channels, kernel, alpha, norm):
        super().__init__()
        self.conv = conv(channels, 2 * channels, (kernel, 1, 1), stride=(alpha, 1, 1))
        self.bn = nn.BatchNorm3d(2 * channels) if norm else None

    def forward(self, slow, fast):
        """slow (B, C, T / alpha, H, W), fast (B, c, T, H, W) -> (B, C + 2c, T / alpha, H, W)."""
        message = self.conv(fast)  # (B, 2c, T / alpha, H, W)
        if self.bn is not None:
            message = torch.relu(self.bn(message))
        return torch.cat([slow, message], dim=1)


class Bottleneck(nn.Module):
    """ResNet's bottleneck block in 3D: the first convolution looks along time (if its kernel is
    longer than 1), the second in space.

    planes: channels inside the block; its output has 4 times as many.
    kernel: frames that the first convolution sees. stride: in space, of the second convolution.
    """

    def __init__(self, channels, planes, kernel, stride):
        super().__init__()
        self.conv1 = conv(channels, planes, (kernel, 1, 1))
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = conv(planes, planes, (1, 3, 3), (1, stride, stride))
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = conv(planes, 4 * planes, (1, 1, 1))
        self.bn3 = nn.BatchNorm3d(4 * planes)
        self.relu = nn.ReLU(inplace=True)

        # The first block of a stage changes the map's shape, so its shortcut has to do the same.
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(
                conv(channels, 4 * planes, (1, 1, 1), (1, stride, stride)),
                nn.BatchNorm3d(4 * planes),
            )

    def forward(self, x):
        """x (B, channels, T, H, W) -> (B, 4 planes, T, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))  # (B, planes, T, H, W)
        y = self.relu(self.bn2(self.conv2(y)))  # (B, planes, T, H / stride, W / stride)
        y = self.bn3(self.conv3(y))             # (B, 4 planes, T, H / stride, W / stride)

        if self.downsample is not None:
            x = self.downsample(x)              # (B, 4 planes, T, H / stride, W / stride)
        return self.relu(y + x)


BLOCKS = {  # depth -> blocks in each of the four stages
    14: (1, 1, 1, 1),  # for the toy
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


class Pathway(nn.Module):
    """A 3D ResNet: a stem and four stages, named as in torchvision's ResNets.

    width: channels after the stem; the stages give 4, 8, 16 and 32 times as many.
    stem_kernel: frames that the stem sees.
    kernels: frames that a block sees, one number for each of the four stages.
    lateral_channels: what laterals append to the input of each of the four stages.
    """

    def __init__(self, depth, width, stem_kernel, kernels, lateral_channels=(0, 0, 0, 0)):
        super().__init__()
        self.conv1 = conv(3, width, (stem_kernel, 7, 7), stride=(1, 2, 2))
        self.bn1 = nn.BatchNorm3d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

        stages = []
        channels = width
        for stage in range(4):
            channels += lateral_channels[stage]  # the lateral's channels join the input
            planes = width * 2**stage

            # Only the first block changes the number of channels and the size of the map.
            stride = 1 if stage == 0 else 2
            blocks = [Bottleneck(channels, planes, kernels[stage], stride)]
            channels = 4 * planes
            for _ in range(BLOCKS[depth][stage] - 1):
                blocks.append(Bottleneck(channels, planes, kernels[stage], stride=1))
            stages.append(nn.Sequential(*blocks))

        self.layer1, self.layer2, self.layer3, self.layer4 = stages

    def stem(self, x):
        """x (B, 3, T, H, W) -> (B, width, T, H / 4, W / 4)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (B, width, T, H / 2, W / 2)
        return self.maxpool(x)

    def forward(self, x):
        """A pathway alone: x (B, 3, T, H, W) -> (B, 32 width, T, H / 32, W / 32)."""
        x = self.stem(x)    # (B, width, T, H / 4, W / 4)
        x = self.layer1(x)  # (B, 4 width, T, H / 4, W / 4)
        x = self.layer2(x)  # (B, 8 width, T, H / 8, W / 8)
        x = self.layer3(x)  # (B, 16 width, T, H / 16, W / 16)
        return self.layer4(x)


ALPHA = {  # variant -> fast frames per slow frame
    "slowfast_8x8": 4,
    "slowfast_11x8": 4,
    "slowfast_4x16": 8,  # not in the report; for other people's weights
    "fast_32x2": 1,      # a pathway alone sees every frame of its clip
    "fast_16x2": 1,
    "slow_8x8": 1,
    "slow_8x4": 1,
}

# channels of the fast map in front of each stage, and what a lateral makes of them: twice as many
FAST_CHANNELS = (8, 32, 64, 128)
LATERAL_CHANNELS = (16, 64, 128, 256)


class SlowFast(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    variant: a key of ALPHA.
    depth: a key of BLOCKS.
    dropout: a probability.

    The other options are for other people's weights; the defaults are those of the report's
    authors. fusion_kernel: fast frames that a lateral sees. fusion_norm: batch norm and ReLU after
    a lateral. fc_bias: a bias in the classifier. slow_index: see slow_frames. alpha: fast frames
    per slow frame, None for the variant's own.
    """

    def __init__(
        self,
        num_classes,
        variant="slowfast_8x8",
        depth=101,
        dropout=0.5,
        fusion_kernel=5,
        fusion_norm=False,
        fc_bias=False,
        slow_index="stride",
        alpha=None,
    ):
        super().__init__()
        check_options(variant, depth, slow_index)  # ValueError for an unknown value
        self.alpha = ALPHA[variant] if alpha is None else alpha
        self.slow_index = slow_index
        pathways = variant.split("_")[0]  # slowfast, slow or fast

        # The slow pathway looks along time in its last two stages only, the fast one everywhere.
        slow_kernels = dict(stem_kernel=1, kernels=(1, 1, 3, 3))
        fast_kernels = dict(stem_kernel=5, kernels=(3, 3, 3, 3))

        # Alone, the fast pathway is as wide as the slow one: the report's "no channel reduction".
        self.slow = None
        self.fast = None
        if pathways == "slowfast":
            self.slow = Pathway(depth, width=64, **slow_kernels, lateral_channels=LATERAL_CHANNELS)
            self.fast = Pathway(depth, width=8, **fast_kernels)
        elif pathways == "slow":
            self.slow = Pathway(depth, width=64, **slow_kernels)
        else:
            self.fast = Pathway(depth, width=64, **fast_kernels)

        # a lateral in front of each stage
        self.fuse = nn.ModuleList()
        if pathways == "slowfast":
            for channels in FAST_CHANNELS:
                self.fuse.append(Lateral(channels, fusion_kernel, self.alpha, fusion_norm))

        # the classifier
        features = 2048 + 256 if pathways == "slowfast" else 2048  # D
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, num_classes, bias=fc_bias)

        # Initial weights as in PySlowFast, the code of SlowFast's authors. The scale of the last
        # batch norm of each block starts at zero, so that the block starts as its shortcut.
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.fc.weight, std=0.01)
        if fc_bias:
            nn.init.zeros_(self.fc.bias)

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the classifier sees, (B, D)."""
        frames = clip.shape[1]
        if frames % self.alpha != 0:
            raise ValueError(
                f"the number of frames must be a multiple of {self.alpha}, got {frames}"
            )

        # 3D convolutions want the channels in front of the frames.
        x = clip.transpose(1, 2)  # (B, 3, T, H, W)

        # one pathway alone
        if self.slow is None:
            return self.fast(x).mean(dim=(2, 3, 4))
        if self.fast is None:
            return self.slow(x).mean(dim=(2, 3, 4))

        # Two pathways: in front of each stage, a lateral joins the fast map to the slow one.
        picked = slow_frames(clip, self.alpha, self.slow_index)
        slow = self.slow.stem(picked.transpose(1, 2))      # (B, 64, T / alpha, H / 4, W / 4)
        fast = self.fast.stem(x)                           # (B, 8, T, H / 4, W / 4)

        slow = self.slow.layer1(self.fuse[0](slow, fast))  # (B, 256, T / alpha, H / 4, W / 4)
        fast = self.fast.layer1(fast)                      # (B, 32, T, H / 4, W / 4)

        slow = self.slow.layer2(self.fuse[1](slow, fast))  # (B, 512, T / alpha, H / 8, W / 8)
        fast = self.fast.layer2(fast)                      # (B, 64, T, H / 8, W / 8)

        slow = self.slow.layer3(self.fuse[2](slow, fast))  # (B, 1024, T / alpha, H / 16, W / 16)
        fast = self.fast.layer3(fast)                      # (B, 128, T, H / 16, W / 16)

        slow = self.slow.layer4(self.fuse[3](slow, fast))  # (B, 2048, T / alpha, H / 32, W / 32)
        fast = self.fast.layer4(fast)                      # (B, 256, T, H / 32, W / 32)

        # the means over frames and pixels, slow first
        slow = slow.mean(dim=(2, 3, 4))
        fast = fast.mean(dim=(2, 3, 4))
        return torch.cat([slow, fast], dim=1)

    def forward(self, clip):
        x = self.features(clip)  # (B, D)
        x = self.dropout(x)
        return self.fc(x)  # (B, K)


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return SlowFast(
        num_classes,
        variant=recipe["variant"],
        depth=recipe["depth"],
        dropout=recipe["dropout"],
        fusion_kernel=recipe["fusion_kernel"],
        fusion_norm=recipe["fusion_norm"],
        fc_bias=recipe["fc_bias"],
        slow_index=recipe["slow_index"],
        alpha=recipe["alpha"],
    )


# The rows of the report's Table 2, Slow 8x8 of its section 2 (c), and the toy. A row holds what
# build() needs, and what differs from the settings in data.py, evaluate.py and train.py. In a
# comment, "report" means that the report gives the value. "ours" means that it does not; then
# comes our source, or the reason; "the authors' code" is the code of the report's authors.
NETWORK = dict(  # of all rows
    dropout=0.5,           # probability, before the classifier; report
    fusion_kernel=5,       # fast frames that a lateral sees; ours: the authors' code
    fusion_norm=False,     # batch norm and ReLU after a lateral; ours: the authors' code
    fc_bias=False,         # a bias in the classifier; ours: the authors' code
    slow_index="stride",   # every alpha-th frame, or "linspace"; ours: the authors' code
    alpha=None,            # fast frames per slow frame, None: the variant's own (ALPHA)
)
SHARED = dict(  # of all rows but the toy
    NETWORK,
    depth=101,             # 50, 101, 152 or 200; report: 152 and 200 score about the same

    # clips
    sampling="clip",       # one window at a random place; report
    augment="jitter",      # a random short side, then a random crop; report
    crop=112,              # pixels; report
    jitter=(128, 160),     # pixels, range of the short side before the crop; report

    # training
    batch=1024,            # clips per step; report: 32 GPUs with 32 clips each
    reference_batch=1024,  # the batch for which lr, iterations and warmup hold; report
    lr=0.2,                # report
    schedule="cosine",     # half a period over all steps, down to 0; report
    iterations=180000,     # steps, warm-up included; report: about 180 epochs of its training set
    warmup=8000,           # steps in place of the cosine's first, linear from lr / 10 up to it;
                           # ours: the paper's, the report gives no number
    weight_decay=1e-4,     # on every parameter; report
    clip_grad=0.0,         # off; ours: the report names no clipping, and there is a warm-up
    sync_bn=True,          # batch norm over all GPUs; report
    init="none",           # report: starting from weights trained on Kinetics lost 1.1 mAP

    # evaluation
    test_resize=128,       # pixels, short side of the one view; ours: the authors' code
    test_crop=112,         # pixels, its centre crop; ours: the authors' code
    clips=10,              # per video, in "dense" and "multiscale" (evaluate.py); report
    scales=(128, 144, 160),  # pixels, short sides; report: 128 in "dense", all in "multiscale"
)
RECIPES = {  # frames is T; stride: the clip holds every stride-th frame of the video
    "r101_8x8": dict(SHARED, variant="slowfast_8x8", frames=32, stride=2),  # report
    "r101_11x8": dict(SHARED, variant="slowfast_11x8", frames=44, stride=2),  # report
    "r101_fast_16x2": dict(SHARED, variant="fast_16x2", frames=16, stride=2),  # report
    "r101_fast_32x2": dict(SHARED, variant="fast_32x2", frames=32, stride=2),  # report
    "r101_slow_8x4": dict(SHARED, variant="slow_8x4", frames=8, stride=4),  # report
    "r101_slow_8x8": dict(SHARED, variant="slow_8x8", frames=8, stride=8),  # report
    "toy": dict(
        NETWORK,
        variant="slowfast_8x8",  # ours: the layers of the report's first row
        depth=14,              # ours: one block per stage, minutes on a laptop
        frames=24,             # ours: the whole toy video; the slow pathway sees 6 frames of it
        sampling="clip",       # report

        lr=0.05,               # ours: large for batches of 16, clip_grad makes it possible
        epochs=10,             # ours: minutes on a laptop
        clip_grad=5.0,         # ours: limits the first steps, in place of a warm-up
        weight_decay=1e-4,     # report
        sync_bn=True,          # report

        clips=10,              # report
        scales=(32, 30, 28),   # ours: larger ones give a last map of 2x2 pixels, unlike training's
    ),
}

REPORTED = {  # percent mAP on the validation set by the protocols clip, dense, multiscale; Table 2
    "r101_8x8": (59.89, 61.52, 63.52),
    "r101_11x8": (60.41, 61.60, 64.00),
    "r101_fast_16x2": (59.05, 61.55, 63.45),
    "r101_fast_32x2": (62.03, 63.59, 64.81),
    "r101_slow_8x4": (59.02, 61.68, 62.99),
    "r101_slow_8x8": None,  # named in section 2 (c), without a number
}


# ==== Skip on first reading: other people's weights ===============================================

# ---- options for them ----------------------------------------------------------------------------

def check_options(variant, depth, slow_index):
    """ValueError if SlowFast has no such variant, depth or slow_index."""
    if variant not in ALPHA:
        raise ValueError(f"SlowFast has no variant {variant!r}, only {', '.join(ALPHA)}")
    if depth not in BLOCKS:
        raise ValueError(f"SlowFast has no depth {depth!r}, only {', '.join(map(str, BLOCKS))}")
    if slow_index not in ("stride", "linspace"):
        raise ValueError(f"SlowFast has no slow_index {slow_index!r}, only stride, linspace")


def linspace_frames(clip, alpha):
    """slow_frames of PySlowFast and pytorchvideo: evenly from the first frame to the last, rounded
    down. 32 frames and alpha 4 give 0 4 8 13 17 22 26 31.

    Weights trained with one choice and run with the other raise no error: the logits are merely
    wrong, by up to a few percent.
    """
    last = clip.shape[1] - 1
    count = clip.shape[1] // alpha
    steps = max(1, count - 1)  # one frame alone needs no step, and must not divide by zero
    frames = [clip[:, i * last // steps] for i in range(count)]
    return torch.stack(frames, dim=1)


def check(recipe, given, tensors=None):
    """Whether the variant of a flag --variant goes with the recipe's frames and stride, which its
    name tells: sentences on what is odd. (tensors, those of a file, tell nothing here.)"""
    variant = recipe["variant"]
    if variant not in ALPHA:
        return []  # an error soon
    toy = RECIPES["toy"]
    is_toy = recipe["frames"] == toy["frames"] and recipe["stride"] == 1
    if "variant" not in given or {"frames", "stride"} <= set(given) or is_toy:
        return []

    # what the slow pathway sees, or a pathway alone: 4x16 is 4 frames that are 16 apart
    count, distance = variant.split("_")[1].split("x")
    alpha = recipe["alpha"] or ALPHA[variant]
    frames = int(count) * alpha
    stride = max(1, int(distance) // alpha)
    if (recipe["frames"], recipe["stride"]) == (frames, stride):
        return []
    return [f"warning: --variant {variant} means {frames} frames of stride {stride}, but the "
            f"recipe has {recipe['frames']} of stride {recipe['stride']}; pass --frames {frames} "
            f"--stride {stride}, or --recipe with the row of this variant"]


# ---- public weights ------------------------------------------------------------------------------
#
#     python evaluate.py --model slowfast --weights FILE FLAGS --data DATA
#
# train.py --init FILE reads the same files. Where they are published, which networks, which FLAGS:
#
#   github.com/Sense-X/X-Temporal, ModelZoo.md
#       SlowFast ResNet-101 8x8 for M-MiT           none
#       SlowFast ResNet-50 8x8                      --depth 50
#   github.com/open-mmlab/mmaction2, model zoo 1.x
#       SlowFast ResNet-50 8x8                      --depth 50 --fusion-kernel 7 --fc-bias
#       SlowFast ResNet-50 4x16                     --variant slowfast_4x16 --depth 50 --fc-bias
#       SlowOnly ResNet-50 8x8                      --recipe r101_slow_8x8 --depth 50 --fc-bias
#   pytorchvideo, and github.com/facebookresearch/SlowFast (PySlowFast); all of these networks with
#   --mean 0.45 0.45 0.45 --std 0.225 0.225 0.225 --test-resize 256 --test-crop 224
#       SlowFast ResNet-50 8x8                      --depth 50 --fusion-kernel 7 --fusion-norm
#                                                   --fc-bias --slow-index linspace
#       SlowFast ResNet-50 4x16                     --variant slowfast_4x16 --depth 50
#                                                   --fusion-norm --fc-bias --slow-index linspace
#       Slow ResNet-50 8x8                          --recipe r101_slow_8x8 --depth 50 --fc-bias
#
# A network for videos of one label each, as of Kinetics, needs --loss ce too. alpha, slow_index,
# sizes and normalisation leave no trace in a file, so nothing can notice a wrong one. What does not
# load: networks with non-local blocks, with R101_50_50 in their name, or of two depths, and files
# of MMAction 0.x.
#
# PySlowFast's Caffe2 files (.pkl) are pickles, which can run code. One that you trust becomes .pt:
#
#     import pickle, torch
#     with open("SLOWFAST_8x8_R50.pkl", "rb") as file:
#         blobs = pickle.load(file, encoding="latin1")["blobs"]
#     blobs = {key: torch.as_tensor(x) for key, x in blobs.items() if hasattr(x, "shape")}
#     torch.save({"blobs": blobs}, "slowfast.pt")


# ---- their names and ours ------------------------------------------------------------------------
#
# A key is translated in two steps. One of PySlowFast's, for example:
#
#     s3.pathway1_res0.branch2.a_bn.weight    its key
#     pathway1.s3.0.branch2a_bn.weight        KEYS: its words in our order, with dots between them
#     fast.layer2.0.bn1.weight                WORDS: each word that we call something else, replaced

VALUE = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"
BLOB = r"_(w|s|b|rm|riv)"                        # the same in Caffe2
PART = r"(conv[123]|bn[123]|downsample\.[01])"   # of a block, in torchvision's words
PTV = r"(?:multipathway_blocks\.([01])\.)?"      # pytorchvideo's pathway, nothing if it is alone
MM2 = r"backbone\.(?:(slow|fast)_path\.)?"       # mmaction2's pathway, no name if it is alone

KEYS = [  # (a pattern for another code base's whole key, its words in our order)
    # our own
    (rf"(slow|fast)\.(conv1|bn1){VALUE}", r"\1.\2.\3"),
    (rf"(slow|fast)\.(layer[1-4])\.(\d+)\.{PART}{VALUE}", r"\1.\2.\3.\4.\5"),
    (rf"fuse\.([0-3])\.(conv|bn){VALUE}", r"fuse.\1.\2.\3"),
    (rf"fc{VALUE}", r"fc.\1"),

    # X-Temporal, the authors' code; its classifier is called fc too
    (rf"(slow|fast)_(conv1|bn1){VALUE}", r"\1.\2.\3"),
    (rf"(slow|fast)_(res[2-5])\.(\d+)\.{PART}{VALUE}", r"\1.\2.\3.\4.\5"),
    (rf"(lateral_p1|lateral_res[2-4]){VALUE}", r"fuse.\1.conv.\2"),

    # PySlowFast
    (rf"s1\.(pathway[01])_stem\.(conv|bn){VALUE}", r"\1.stem_\2.\3"),
    (rf"(s[2-5])\.(pathway[01])_res(\d+)\.branch2\.([abc]|[abc]_bn){VALUE}",
     r"\2.\1.\3.branch2\4.\5"),
    (rf"(s[2-5])\.(pathway[01])_res0\.(branch1|branch1_bn){VALUE}", r"\2.\1.0.\3.\4"),
    (rf"(s[1-4]_fuse)\.(conv_f2s|bn){VALUE}", r"fuse.\1.\2.\3"),
    (rf"head\.projection{VALUE}", r"fc.\1"),

    # PySlowFast's Caffe2 files: the fast pathway's names begin with t_, the slow one's do not
    (rf"(t_|)conv1{BLOB}", r"\1.conv1.\2"),
    (rf"(t_|)res_conv1_bn{BLOB}", r"\1.bn1.\2"),
    (rf"(t_|)(res[2-5])_(\d+)_(branch2[abc]|branch2[abc]_bn){BLOB}", r"\1.\2.\3.\4.\5"),
    (rf"(t_|)(res[2-5])_0_(branch1|branch1_bn){BLOB}", r"\1.\2.0.\3.\4"),
    (rf"t_(pool1)_subsample{BLOB}", r"fuse.\1_subsample.conv.\2"),
    (rf"t_(pool1)_subsample_bn{BLOB}", r"fuse.\1_subsample.bn.\2"),
    (rf"t_(res[2-4])_\d+_branch2c_bn_subsample{BLOB}", r"fuse.\1_subsample.conv.\2"),
    (rf"t_(res[2-4])_\d+_branch2c_bn_subsample_bn{BLOB}", r"fuse.\1_subsample.bn.\2"),
    (rf"pred{BLOB}", r"fc.\1"),

    # pytorchvideo
    (rf"blocks\.0\.{PTV}(conv|norm){VALUE}", r"pathway\1.stem_\2.\3"),
    (rf"blocks\.([1-4])\.{PTV}res_blocks\.(\d+)\.branch2\.(conv_[abc]|norm_[abc]){VALUE}",
     r"pathway\2.layer\1.\3.\4.\5"),
    (rf"blocks\.([1-4])\.{PTV}res_blocks\.0\.(branch1_conv|branch1_norm){VALUE}",
     r"pathway\2.layer\1.0.\3.\4"),
    (rf"blocks\.([0-3])\.multipathway_fusion\.(conv_fast_to_slow|norm){VALUE}",
     r"fuse.\1.\2.\3"),
    (rf"blocks\.[56]\.proj{VALUE}", r"fc.\1"),

    # mmaction2
    (rf"{MM2}conv1\.(conv|bn){VALUE}", r"\1.stem_\2.\3"),
    (rf"{MM2}layer([1-4])\.(\d+)\.conv([123])\.(conv|bn){VALUE}", r"\1.layer\2.\3.\5\4.\6"),
    (rf"{MM2}layer([1-4])\.0\.(downsample)\.(conv|bn){VALUE}", r"\1.layer\2.0.\3_\4.\5"),
    (rf"backbone\.slow_path\.(conv1_lateral|layer[1-3]_lateral)\.(conv|bn){VALUE}",
     r"fuse.\1.\2.\3"),
    (rf"cls_head\.fc_cls{VALUE}", r"fc.\1"),
]

WORDS = {
    # pathways; without name or number it is Caffe2's slow one, or a pathway alone
    "": "slow", "pathway": "slow", "pathway0": "slow",
    "t_": "fast", "pathway1": "fast",

    # stages; for the others the stem is the first one
    "s2": "layer1", "res2": "layer1",
    "s3": "layer2", "res3": "layer2",
    "s4": "layer3", "res4": "layer3",
    "s5": "layer4", "res5": "layer4",

    # the stem
    "stem_conv": "conv1",
    "stem_bn": "bn1", "stem_norm": "bn1",

    # blocks
    "branch2a": "conv1", "conv_a": "conv1",
    "branch2b": "conv2", "conv_b": "conv2",
    "branch2c": "conv3", "conv_c": "conv3",
    "branch2a_bn": "bn1", "norm_a": "bn1",
    "branch2b_bn": "bn2", "norm_b": "bn2",
    "branch2c_bn": "bn3", "norm_c": "bn3",

    # shortcuts
    "branch1": "downsample.0", "branch1_conv": "downsample.0", "downsample_conv": "downsample.0",
    "branch1_bn": "downsample.1", "branch1_norm": "downsample.1", "downsample_bn": "downsample.1",

    # laterals; ours have numbers, the others are named after the fast map that goes in
    "lateral_p1": "0", "s1_fuse": "0", "pool1_subsample": "0", "conv1_lateral": "0",
    "lateral_res2": "1", "s2_fuse": "1", "res2_subsample": "1", "layer1_lateral": "1",
    "lateral_res3": "2", "s3_fuse": "2", "res3_subsample": "2", "layer2_lateral": "2",
    "lateral_res4": "3", "s4_fuse": "3", "res4_subsample": "3", "layer3_lateral": "3",
    "conv_f2s": "conv", "conv_fast_to_slow": "conv",
    "norm": "bn",

    # Caffe2's values; the i in riv stands for inverse, but it holds the variance itself
    "w": "weight", "s": "weight",
    "b": "bias",
    "rm": "running_mean",
    "riv": "running_var",
}


def our_name(key):
    """Another project's key -> ours. ValueError if SlowFast has no such tensor."""
    for pattern, order in KEYS:
        match = re.fullmatch(pattern, key)
        if match:
            words = match.expand(order).split(".")
            return ".".join(WORDS.get(word, word) for word in words)
    raise ValueError(f"{__name__}.py has no place for the key {key}")


def convert(tensors):
    """{key: tensor} of a file in another project's names, or ours -> our state dict.

    - ours, and the files of X-Temporal, pytorchvideo, mmaction2 and PySlowFast, with two pathways
      or one, also PySlowFast's Caffe2 files: complete

    evaluate.tensors_of takes the tensors out of a file. Without it:
    {key.removeprefix("module."): x for key, x in torch.load(FILE)["state_dict"].items()}
    """
    state = {}
    for key, tensor in tensors.items():
        if re.fullmatch(r"lr|model_iter|.+_momentum", key):  # Caffe2 files hold the optimiser too
            continue
        name = our_name(key)

        # Caffe2 may leave out a convolution's last axes if their length is 1.
        if key.endswith("_w") and name != "fc.weight":
            while tensor.dim() < 5:
                tensor = tensor.unsqueeze(-1)
        state[name] = tensor

    # A pathway alone, without a name, was named "slow" above. It is a fast one if its stem sees
    # several frames.
    stem = state.get("slow.conv1.weight")
    if stem is not None and stem.dim() == 5 and stem.shape[2] > 1:
        state = {name.replace("slow.", "fast."): tensor for name, tensor in state.items()}

    # mmaction2's classifier has the 256 fast features in front, ours the 2048 slow ones.
    from_mmaction2 = any(key.startswith("backbone.fast_path.") for key in tensors)
    if from_mmaction2 and "fc.weight" in state:
        state["fc.weight"] = state["fc.weight"].roll(-256, dims=-1)
    return state
