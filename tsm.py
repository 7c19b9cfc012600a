"""TSM, the Temporal Shift Module: a 2D network that shifts some channels along time.

One eighth of the channels moves one frame earlier and one eighth one frame later. The convolution
that follows looks at a single frame, but now it finds features of both neighbours there. The shift
has no weights and no multiplications, so TSM needs as many of both as TSN.

Report: arXiv 2003.05837, section 1.3 and Table 1.
Paper: Lin, Gan and Han, "TSM: Temporal Shift Module", arXiv 1811.08383.

    One channel of four frames a b c d, moved by an offset. What leaves the clip, at either end,
    is dropped, and the gap is filled with zeros.

    frame         0          1          2          3
    offset  0     a          b          c          d
    offset +1     0          a          b          c          content moves later
    offset -1     b          c          d          0          content moves earlier

The shift is applied to the input of a residual block's first convolution. The block's shortcut
gets the frames as they were, so that no feature of a frame is lost. The first C/8 channels move
by -1, the next C/8 by +1 and the others by 0.

B clips, T frames, C channels, H height, W width, K classes, D features per frame.
"""
import re

import torch
import torch.nn as nn
import torchvision


def temporal_shift(x):
    """Move the first C/8 channels one frame earlier and the next C/8 channels one frame later.

    x (B, T, C, H, W) -> the same shape and memory layout.
    """
    # This is about speed alone. If x is channels_last (its channels lie innermost in memory),
    # joining parts along axis 2 would lose that, and the next convolution would have to restore it.
    # So the channels become the last axis first.
    axis = 4 if x.stride(2) == 1 else 2
    x = x.movedim(2, axis)

    eighth = x.shape[axis] // 8
    rest = x.shape[axis] - 2 * eighth
    earlier, later, kept = x.split([eighth, eighth, rest], dim=axis)

    # drop a frame at one end, and fill the gap at the other one with a frame of zeros
    zeros = torch.zeros_like(earlier[:, :1])
    earlier = torch.cat([earlier[:, 1:], zeros], dim=1)
    later = torch.cat([zeros, later[:, :-1]], dim=1)

    x = torch.cat([earlier, later, kept], dim=axis)
    return x.movedim(axis, 2)


def residual(block, x, shifted):
    """torchvision's residual block, with `shifted` on the main path and x on the shortcut. (Its own
    forward gives both paths the same input.)"""
    y = block.conv1(shifted)
    y = block.bn1(y)
    y = block.relu(y)
    y = block.conv2(y)
    y = block.bn2(y)
    if hasattr(block, "conv3"):  # the blocks of ResNet-50 and deeper have three convolutions
        y = block.relu(y)
        y = block.conv3(y)
        y = block.bn3(y)

    if block.downsample is not None:  # where the block changes the map's size or channels
        x = block.downsample(x)
    y += x
    return block.relu(y)


class TSM(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    frames: T; a clip of another length raises a ValueError.
    backbone: resnet18, resnet50 or resnet101 of torchvision.
    dropout: a probability.
    shift_every: with n, the blocks 0, n, 2n ... of every stage shift. None: what the weights of
    TSM's authors need, 2 for ResNet-101 and otherwise 1.
    """

    def __init__(self, num_classes, frames=8, backbone="resnet50", dropout=0.5, shift_every=None):
        super().__init__()
        self.frames = frames

        # the 2D network with random weights, without its own classifier
        self.backbone = image_network(backbone)
        features = self.backbone.fc.in_features  # D
        self.backbone.fc = nn.Identity()

        # the classifier
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.001)  # logits start near 0, as in the authors' code
        nn.init.zeros_(self.fc.bias)

        self.shift_every = choose_shift_every(shift_every, backbone)

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the classifier sees of each frame, (B, T, D)."""
        frames = clip.shape[1]
        if frames != self.frames:
            raise ValueError(f"the network takes clips of {self.frames} frames, got {frames}")

        x = clip.flatten(0, 1)  # (B*T, 3, H, W): to the 2D network a frame is an image

        # the ResNet's first layers
        net = self.backbone
        x = net.conv1(x)
        x = net.bn1(x)
        x = net.relu(x)
        x = net.maxpool(x)  # (B*T, 64, H/4, W/4)

        # its four stages of residual blocks
        for stage in ["layer1", "layer2", "layer3", "layer4"]:
            for i, block in enumerate(getattr(net, stage)):
                if i % self.shift_every == 0:
                    shifted = x.unflatten(0, (-1, self.frames))  # (B, T, C, H, W)
                    shifted = temporal_shift(shifted)
                    shifted = shifted.flatten(0, 1)  # (B*T, C, H, W)
                    x = residual(block, x, shifted)
                else:
                    x = block(x)

        x = net.avgpool(x)  # (B*T, D, 1, 1)
        x = x.flatten(1)  # (B*T, D)
        return x.unflatten(0, (-1, self.frames))  # (B, T, D)

    def forward(self, clip):
        x = self.features(clip)  # (B, T, D)
        x = self.dropout(x)
        x = self.fc(x)  # (B, T, K), the logits of every frame
        return x.mean(dim=1)  # (B, K)


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TSM(
        num_classes,
        frames=recipe["frames"],
        backbone=recipe["backbone"],
        dropout=recipe["dropout"],
        shift_every=recipe["shift_every"],
    )


# The rows of the report's Table 1, and the toy. A row holds what build() needs, and what differs
# from the settings in data.py, evaluate.py and train.py. In a comment, "report" means that the
# report gives the value. "ours" means that it does not; then comes our source, or the reason.
SHARED = dict(
    dropout=0.5,  # probability, before the classifier; report
    shift_every=1,  # in every block; ours: as in the code that the report's authors published
)
RECIPES = {
    "r50_8f": dict(SHARED, frames=8, backbone="resnet50"),  # report
    "r50_16f": dict(SHARED, frames=16, backbone="resnet50"),  # report
    "r101_8f": dict(SHARED, frames=8, backbone="resnet101"),  # report
    "toy": dict(SHARED, frames=8, backbone="resnet18"),  # ours: small videos that data.py draws
}

# mAP in percent on the validation set, with one view (clip and crop) of each video; report, Table 1
REPORTED = {"r50_8f": 59.85, "r50_16f": 61.12, "r101_8f": 61.06}


# ==== Skip on first reading: other people's weights ===============================================

# ---- the 2D network ------------------------------------------------------------------------------

def image_network(name):
    """torchvision's ResNet of this name, with random weights."""
    network = torchvision.models.get_model(name, weights=None)
    if not isinstance(network, torchvision.models.ResNet):
        raise ValueError(f"backbone {name} is not one of torchvision's ResNets")
    return network


# ---- the blocks that shift -----------------------------------------------------------------------

def choose_shift_every(shift_every, backbone):
    """TSM's shift_every. None is the rule of TSM's authors, whose weights need it: every block, and
    in networks deeper than ResNet-50 every second one. The report's authors shift in every block.
    """
    if shift_every is None:
        return 2 if backbone in ("resnet101", "resnet152") else 1
    if shift_every < 1:
        raise ValueError(f"shift_every is {shift_every}, but must be at least 1")
    return shift_every


def check(recipe, given, tensors=None):
    """Whether a file shifts in the blocks in which the network does: sentences on what is odd.

    tensors: {key: tensor} of the file. In the names of TSM's authors and of mmaction2 a convolution
    that comes after a shift is called net: layer2.0.conv1.net.weight. A TSN's file has none. It is
    fine as a start for training (--init; then "init" is in given), and otherwise a ValueError.
    """
    if tensors is None or "backbone.conv1.weight" in tensors:  # in our names there is no net
        return []
    complete = "fc.weight" in convert(tensors)  # ValueError for the keys of another network
    weight = BACKBONE + r"(layer[1-4])\.(\d+)\.conv1\.(?:conv\.)?(net\.)?weight"
    shifts = {}  # (stage, block): whether it shifts
    for key in tensors:
        match = re.fullmatch(weight, key)
        if match:
            shifts[match[1], int(match[2])] = match[3] is not None

    if not any(shifts.values()):
        if complete and "init" not in given:
            raise ValueError("no block of the file's network shifts, as in a TSN: use --model tsn, "
                             "or train a TSM from it with train.py --init")
        return []

    shift_every = choose_shift_every(recipe["shift_every"], recipe["backbone"])
    fitting = []  # the values of shift_every with which the same blocks shift
    for every in range(1, 1 + max(shift_every, len(shifts))):
        if all(shift == (i % every == 0) for (_, i), shift in shifts.items()):
            fitting.append(every)
    if shift_every in fitting:
        return []
    if not fitting:
        return ["warning: the file's network shifts in other blocks than any --shift-every does, "
                "so its weights do not fit this one"]
    return [f"warning: the file's network shifts with --shift-every {fitting[0]}, this one with "
            f"{shift_every}, which its weights do not fit; pass --shift-every {fitting[0]}"]


# ---- public weights ------------------------------------------------------------------------------
#
#     python evaluate.py --model tsm --weights FILE FLAGS --data DATA
#
# train.py --init FILE reads the same files. Where they are published, which networks, which FLAGS:
#
#   github.com/mit-han-lab/temporal-shift-module
#       ResNet-50                                   none, or --recipe r50_16f for 16 frames
#       ResNet-101                                  --recipe r101_8f --shift-every 2
#   github.com/open-mmlab/mmaction2, model zoo 1.x
#       ResNet-50                                   none, or --recipe r50_16f for 16 frames
#       ResNet-101                                  --recipe r101_8f --shift-every 2
#
# A network for videos of one label each, as of Kinetics, needs --loss ce too. The number of frames,
# sizes and normalisation leave no trace in a file, so nothing can notice a wrong one. What does
# not load: networks with non-local blocks, temporal pooling, or a shift before the whole block.


# ---- their names and ours ------------------------------------------------------------------------

# Patterns of their keys, and our names for them. A pattern must match the whole key, so that the
# files of other networks are refused.
#   base_model.          X-Temporal, tsn-pytorch, temporal-shift-module
#   .conv. and .bn.      mmaction2, where a convolution and its batch norm are one module
#   .net.                the convolution that comes after a shift
BACKBONE = r"(?:base_model\.|backbone\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = [
    # the ResNet's first layers
    (BACKBONE + r"conv1\.(?:conv\.)?weight", r"backbone.conv1.weight"),
    (BACKBONE + r"(?:bn1|conv1\.bn)\." + NORM, r"backbone.bn1.\1"),

    # its residual blocks
    (BLOCK + r"conv1\.(?:conv\.)?(?:net\.)?weight", r"backbone.\1.conv1.weight"),
    (BLOCK + r"conv([23])\.(?:conv\.)?weight", r"backbone.\1.conv\2.weight"),
    (BLOCK + r"bn([123])\." + NORM, r"backbone.\1.bn\2.\3"),
    (BLOCK + r"conv([123])\.bn\." + NORM, r"backbone.\1.bn\2.\3"),
    (BLOCK + r"downsample\.(?:0|conv)\.weight", r"backbone.\1.downsample.0.weight"),
    (BLOCK + r"downsample\.(?:1|bn)\." + NORM, r"backbone.\1.downsample.1.\2"),

    # the classifier
    (r"(?:fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"fc.\1"),
]


def our_name(key):
    """Another project's key -> ours. ValueError if this network has no such tensor."""
    for pattern, name in KEYS:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(name)
    raise ValueError(f"{__name__}.py has no place for the key {key}")


def convert(tensors):
    """{key: tensor} of a file in another project's names, or ours -> our state dict.

    - ours, and the TSM files of X-Temporal, temporal-shift-module and mmaction2: complete
    - the TSN files of the same people and of tsn-pytorch: complete, as the shift has no weights
    - torchvision's ImageNet ResNets: the backbone alone

    evaluate.tensors_of takes the tensors out of a file. Without it:
    {key.removeprefix("module."): x for key, x in torch.load(FILE)["state_dict"].items()}
    """
    state = {}
    for key, tensor in tensors.items():
        state[our_name(key)] = tensor

    # torchvision's ImageNet file has this key. Its classifier, for 1,000 classes, is left out.
    if "conv1.weight" in tensors and len(state.get("fc.bias", [])) == 1000:
        del state["fc.weight"], state["fc.bias"]
    return state
