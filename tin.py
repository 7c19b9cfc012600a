"""TIN, the Temporal Interlacing Network: a 2D ResNet in which a quarter of the channels slides along time, by a
distance computed from the clip itself. The team's own network, and the best image-based one of their report.

Report: arXiv 2003.05837, Table 1. Paper: Shao, Qian and Liu, "Temporal Interlacing Network", arXiv 2001.06499.

    what four frames a b c d of one channel become under an offset (what leaves is lost, what nothing reaches is 0):

    frame         0          1          2          3
    offset  0     a          b          c          d
    offset +1     0          a          b          c          content moves later
    offset -1     b          c          d          0          content moves earlier
    offset +1/2   a/2        (a+b)/2    (b+c)/2    (c+d)/2    every distance in between: so it can be learned

Before the first convolution of every residual block (the shortcut keeps the frames where they are), the first f = C/4
channels move in G = 4 groups, by o0, o1, -o0, -o1; then every frame of a group is scaled by a weight.

B clips, T frames, C channels, H height, W width, K classes, D features per frame.
"""
import re

import torch
import torch.nn as nn
import torchvision

REPORT = dict(
    frames=8, depth=50,  # T: 8 or 16, ResNet-50 or 101; report, Table 1
    sampling="segments", stride=1,  # a frame from each of T equal parts; report: "evenly select" (stride is for "clip")
    dropout=0.5,  # before the classifier; report
    augment="multiscale",  # report: "spatial jittering", TSN's crops of 1, .875, .75 and .66 of the short side
    crop=224, jitter=(256, 320), flip=True,  # pixels; half of the clips mirrored; report (jitter: for augment "jitter")
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),  # RGB in 0..1; our choice: ImageNet's, as the weights' are
    loss="bce", loss_scale=160.0,  # mean binary cross-entropy, times 160; report: "a huge performance gain"
    class_weight="none",  # none, sqrt or ratio; report: the other two gained slightly and were not used
    batch=64, reference_batch=64,  # clips a step, and those lr is meant for; our choice: TSM's authors, for lr 0.01
    lr=0.01,  # at reference_batch, otherwise in proportion; report
    schedule="step", milestones=(10, 20), epochs=30,  # lr / 10, twice; report: "divided by 10, 20 epochs"; 30 is ours
    warmup=0,  # steps at reference_batch; our choice: clip_grad already tames the first steps
    momentum=0.9, nesterov=False, weight_decay=5e-4,  # report, which names no Nesterov; decay of every parameter
    clip_grad=20.0, sync_bn=False,  # largest gradient norm, 0: off; BN over all GPUs; our choice: the authors' code
    init="imagenet",  # torchvision's weights; our choice: the report starts from Kinetics-600, for which --init FILE is
    test_resize=256, test_crop=224,  # pixels, short side and centre crop of the one view; report: 224, peers: 256
    clips=5, crops=3, scales=(256,),  # the fuller protocols: per video, per clip, sides in pixels; report
    published_map=62.23,  # percent, validation, one view; report, Table 1
)
RECIPES = {
    "r50_8f": REPORT,
    "r101_8f": {**REPORT, "depth": 101, "published_map": 62.2},  # the authors' model zoo, which gives one decimal
    "r101_16f": {**REPORT, "depth": 101, "frames": 16, "published_map": 62.49},  # their model zoo says ResNet-50
    "toy": {
        **REPORT, "depth": 18, "init": "none", "published_map": None,  # from nothing: enough here, and no download
        "crop": 32, "augment": "jitter", "jitter": (36, 36),  # TSN's own smaller crops would cut off what moves
        "test_resize": 36, "test_crop": 32, "scales": (32,),  # of 40x36; at 36 the last map is 2x2, not 1x1: mAP falls
        "flip": False,  # a mirrored video moves the other way: the flip would swap two labels
        "loss_scale": 10 / 1.7,  # classes / labels per video: what 160 is to 313 classes with 1.96 labels
        "batch": 16, "reference_batch": 16, "lr": 0.03, "schedule": "cosine", "epochs": 9,  # minutes on a laptop
    },
}


def temporal_interlace(x, offsets, weights=None):
    """Move the channels of x along time, each of G equal groups by an offset of its own; fractions interpolate.

    y[b, t] = sum over s of max(0, 1 - |t - s - offset|) * x[b, s], times weights[b, g, t]: paper, section 3.
    x (B, T, C, H, W); offsets (B, G) in frames, positive moves content later; weights (B, G, T). Returns x's shape.
    One T x T matrix per group: under 0.6 % of ResNet-50's multiplications, and no kernel of its own, since the gradient
    of a product is known, to the offsets too (0 where an offset is exactly whole, a kink).
    """
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))  # bfloat16: steps of 1/128 frame near 1
    frame = torch.arange(x.shape[1], device=x.device, dtype=offsets.dtype)
    distance = frame[:, None] - frame - offsets[:, :, None, None]  # (B, G, T, T): [t, s] is t - s - offset
    matrix = torch.relu(1 - distance.abs())  # not torch.maximum, whose gradient at 0 is one half
    if weights is not None:
        matrix = matrix * weights[..., None]  # a row is the frame that values arrive at
    place = 4 if x.stride(2) == 1 else 2  # channels_last, which has the channels last in memory, stays channels_last
    groups = x.movedim(2, place).unflatten(place, (offsets.shape[1], -1)).unbind(place)  # a joint product copies x
    moved = [(m @ group.flatten(2)).view(group.shape) for m, group in zip(matrix.to(x.dtype).unbind(1), groups)]
    return torch.cat(moved, dim=place).movedim(place, 2)


class TemporalInterlace(nn.Module):
    """Interlaces a quarter of the channels by two offsets, their mirror images and weights per frame, all computed from
    that quarter's spatial means. x (B, T, C, H, W) -> the same shape. Paper, section 3."""

    def __init__(self, channels, frames):
        super().__init__()
        self.moved = channels // 4
        self.offset_conv = nn.Conv1d(self.moved, 1, kernel_size=3, padding=1)
        self.offset_fc1 = nn.Linear(frames, frames)  # over time: this is what ties the weights to T
        self.offset_fc2 = nn.Linear(frames, 2)
        self.weight_conv = nn.Conv1d(self.moved, 2, kernel_size=3, padding=1)
        nn.init.constant_(self.offset_fc2.bias, 0.5108)  # 4 * (sigmoid(0.5108) - 1/2) = 0.5: half a frame at the start
        nn.init.zeros_(self.weight_conv.bias)  # weights start near 1

    def forward(self, x):
        frames = x.flatten(0, 1)  # (B*T, C, H, W): split and cat keep channels_last in four dimensions alone
        moved, kept = frames.split([self.moved, frames.shape[1] - self.moved], dim=1)
        moved = moved.unflatten(0, x.shape[:2])  # (B, T, f, H, W)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # in the parameters' float32
            means = moved.mean(dim=(3, 4), dtype=self.weight_conv.weight.dtype).transpose(1, 2)  # (B, f, T)
            hidden = torch.relu(self.offset_fc1(self.offset_conv(means).squeeze(1)))  # (B, T)
            # -2 to 2 frames for every T: the paper writes T for the 4, all released weights were trained with 4.
            offsets = 4 * (torch.sigmoid(self.offset_fc2(hidden)) - 0.5)  # (B, 2)
            weights = 2 * torch.sigmoid(self.weight_conv(means))  # (B, 2, T)
        offsets = torch.cat([offsets, -offsets], dim=1)  # (B, G): o0 o1 -o0 -o1, but weights w0 w1 w0 w1
        moved = temporal_interlace(moved, offsets, torch.cat([weights, weights], dim=1))
        return torch.cat([moved.flatten(0, 1), kept], dim=1).unflatten(0, x.shape[:2])


def residual(block, x, moved):
    """torchvision's residual block with `moved` in place of x on its main path; the shortcut still gets x."""
    y = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(moved)))))
    if hasattr(block, "conv3"):  # a bottleneck, of ResNet-50 and deeper
        y = block.bn3(block.conv3(block.relu(y)))
    return block.relu(y.add_(x if block.downsample is None else block.downsample(x)))  # in place, as torchvision does


class TIN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K). depth: 18, 50 or 101. A ValueError for a clip of another T."""

    def __init__(self, num_classes, frames=8, depth=50, dropout=0.5):
        super().__init__()
        self.frames = frames
        self.backbone = torchvision.models.get_model(f"resnet{depth}", weights=None)
        self.fc = nn.Linear(self.backbone.fc.in_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.001)
        nn.init.zeros_(self.fc.bias)
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.interlace = nn.ModuleDict({
            stage: nn.ModuleList(TemporalInterlace(block.conv1.in_channels, frames) for block in blocks)
            for stage, blocks in self.backbone.named_children() if stage.startswith("layer")})

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the classifier sees of each frame, (B, T, D)."""
        if clip.shape[1] != self.frames:
            raise ValueError(f"the network takes clips of {self.frames} frames, got {clip.shape[1]}")
        x = clip.flatten(0, 1)  # (B*T, 3, H, W): to the 2D network a frame is an image
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for i, block in enumerate(getattr(net, stage)):
                moved = self.interlace[stage][i](x.unflatten(0, (-1, self.frames))).flatten(0, 1)
                x = residual(block, x, moved)  # (B*T, C, H, W)
        return net.avgpool(x).flatten(1).unflatten(0, (-1, self.frames))  # (B, T, D)

    def forward(self, clip):
        return self.fc(self.dropout(self.features(clip))).mean(dim=1)  # (B, T, K) -> (B, K): logits are averaged


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TIN(num_classes, recipe["frames"], recipe["depth"], recipe["dropout"])


# Other people's keys -> ours. Only whole keys: to cut out a word wherever it stands (.net, .conv) would take in other
# networks, which have it elsewhere. (.conv. and .bn. are mmaction2's.)
BACKBONE = r"(?:module\.)?(?:(?:base_model|backbone)\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
NET = BLOCK + r"conv1\.(?:conv\.)?net1\."
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = [
    (BACKBONE + r"conv1\.(?:conv\.)?weight", r"backbone.conv1.weight"),
    (BACKBONE + r"(?:bn1|conv1\.bn)\." + NORM, r"backbone.bn1.\1"),
    (BLOCK + r"conv1\.(?:conv\.)?(?:net2?\.)?weight", r"backbone.\1.conv1.weight"),  # net2: TIN's, net: TSM's
    (BLOCK + r"conv([23])\.(?:conv\.)?weight", r"backbone.\1.conv\2.weight"),
    (BLOCK + r"(?:bn([123])|conv([123])\.bn)\." + NORM, r"backbone.\1.bn\2\3.\4"),
    (BLOCK + r"downsample\.(?:0|conv)\.weight", r"backbone.\1.downsample.0.weight"),
    (BLOCK + r"downsample\.(?:1|bn)\." + NORM, r"backbone.\1.downsample.1.\2"),
    (NET + r"(?:biasnet\.net|offset_net)\.conv\.(weight|bias)", r"interlace.\1.offset_conv.\2"),
    (NET + r"(?:biasnet\.net\.fc|offset_net\.fc1)\.(weight|bias)", r"interlace.\1.offset_fc1.\2"),
    (NET + r"(?:biasnet\.net\.lastlayer|offset_net\.fc2)\.(weight|bias)", r"interlace.\1.offset_fc2.\2"),
    (NET + r"(?:weightnet\.net\.lastlayer|weight_net\.conv)\.(weight|bias)", r"interlace.\1.weight_conv.\2"),
    (r"(interlace\..+)", r"\1"),
    (r"(?:module\.)?(?:fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"fc.\1"),
]


def convert(checkpoint):
    """What was read from a checkpoint file -> a state dict in our names. ValueError for a layout that is none of these:
    ours and the TIN files of X-Temporal, deepcs233/TIN and mmaction2: complete, for a strict load;
    the TSN and TSM files of X-Temporal, tsn-pytorch, temporal-shift-module and mmaction2: all but the small nets;
    torchvision's ImageNet ResNets: the backbone alone."""
    tensors = next((checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), dict)), checkpoint)
    if "conv1.weight" in tensors:  # torchvision's own file: its 1,000 classes are not ours
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("fc.")}
    ours = {key: next((m.expand(name) for pattern, name in KEYS if (m := re.fullmatch(pattern, key))), None)
            for key in tensors}
    rest = [key for key, name in ours.items() if name is None]
    if rest or not ours:
        raise ValueError(f"{__name__}.py has no place for {len(rest)} of {len(ours)} keys: {', '.join(rest[:3])} ...")
    state = {ours[key]: tensor for key, tensor in tensors.items()}
    for key in [key for key in state if key.endswith("running_var")]:  # PyTorch before 0.4.1 did not count batches
        state.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return state
