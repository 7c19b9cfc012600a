"""TIN, the Temporal Interlacing Network: a 2D network that computes how far to shift its channels.

A quarter of the channels moves along time, in four groups. In every block, one small net computes
from the block's input how far each group moves, and a second one computes a weight for each frame
of a group. TIN is the report team's own network, and the best of its 2D networks.

Report: arXiv 2003.05837, section 1.4 and Table 1.
Paper: Shao, Qian and Liu, "Temporal Interlacing Network", arXiv 2001.06499.

    One channel of four frames a b c d, moved by an offset. What leaves the clip, at either end,
    is dropped, and the gap is filled with zeros.

    frame         0          1          2          3
    offset  0     a          b          c          d
    offset +1     0          a          b          c          content moves later
    offset -1     b          c          d          0          content moves earlier
    offset +1/2   a/2        (a+b)/2    (b+c)/2    (c+d)/2    a fraction interpolates

The shift is applied to the input of a residual block's first convolution. The block's shortcut
gets the frames as they were, so that no feature of a frame is lost. The first f = C/4 channels form
G = 4 groups, which move by o0, o1, -o0 and -o1: only two offsets are computed, and content moves
both ways. This mixes ("interlaces") the features of different times. Then each group's frames are
multiplied by frame weights. With o0 = o1 = -1 and all frame weights 1 it is exactly TSM's shift.

How can a convolution over time and two linear layers find an offset? The convolution sees the mean
of each moved channel over each frame's pixels: how strongly a feature is present at each time. It
can compare neighbouring frames, and gives one number for each frame. The linear layers see these
numbers of all frames, and can tell a quick change from a slow one, which a longer shift suits
better. (This is our explanation; the paper gives none.)

B clips, T frames, C channels, f moved channels in G groups, H height, W width, K classes,
D features per frame.
"""
import re

import torch
import torch.nn as nn
import torchvision


def temporal_interlace(x, offsets, weights=None):
    """Move each of G equal groups of channels along time by its own offset (paper, section 3).

        y[t] = weight[t] * sum over s of relu(1 - |t - s - offset|) * x[s]

    The relu is 1 where t - s is the offset and falls to 0 within one frame, so y[t] interpolates
    linearly between two frames of x. The sum over s is a matrix product, so autograd gives all
    gradients, including those of the offsets; no custom CUDA kernel is needed.

    x (B, T, f, H, W) -> the same shape and memory layout. offsets (B, G) are in frames; a positive
    offset moves content later. weights (B, G, T); None means that they are all 1.
    """
    # matrix[b, g, t, s]: how much of frame s arrives at frame t. It is computed in float32, since
    # bfloat16 resolves offsets above 1 only to 1/128 frame, and then rounded to the type of x.
    frame = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    steps = frame[:, None] - frame[None, :]  # (T, T): t - s
    distance = steps - offsets[:, :, None, None]  # (B, G, T, T)
    matrix = torch.relu(1 - distance.abs())
    if weights is not None:
        matrix = matrix * weights[:, :, :, None]
    matrix = matrix.to(x.dtype)

    # This is about speed alone. If x is channels_last (its channels lie innermost in memory),
    # joining parts along axis 2 would lose that, and the next convolution would have to restore it.
    # So the channels become the last axis first.
    axis = 4 if x.stride(2) == 1 else 2
    x = x.movedim(2, axis)

    # one product for each group, since a single one for all groups would first copy x
    groups = x.unflatten(axis, (offsets.shape[1], -1))
    moved = []
    for group_matrix, group in zip(matrix.unbind(1), groups.unbind(axis)):
        y = group_matrix @ group.flatten(2)  # (B, T, T) @ (B, T, f/G*H*W)
        moved.append(y.view(group.shape))

    x = torch.cat(moved, dim=axis)
    return x.movedim(axis, 2)


class TemporalInterlace(nn.Module):
    """Interlace a quarter of the channels, by offsets and weights computed from that quarter.

    x (B*T, C, H, W) -> the same shape and memory layout. T must be `frames`. Paper, section 3.
    """

    def __init__(self, channels, frames):
        super().__init__()
        self.frames = frames
        self.num_moved = channels // 4  # f

        # The offset net. Its linear layers act along time, so its weights fit one T only.
        self.offset_conv = nn.Conv1d(self.num_moved, 1, kernel_size=3, padding=1)
        self.offset_fc1 = nn.Linear(frames, frames)
        self.offset_fc2 = nn.Linear(frames, 2)

        # the net of the frame weights
        self.weight_conv = nn.Conv1d(self.num_moved, 2, kernel_size=3, padding=1)

        # As in the authors' code, offsets start near half a frame, since
        # 4 * (sigmoid(0.5108) - 0.5) = 0.5, and frame weights near 1.
        nn.init.constant_(self.offset_fc2.bias, 0.5108)
        nn.init.zeros_(self.weight_conv.bias)

    def forward(self, x):
        moved, kept = x.split([self.num_moved, x.shape[1] - self.num_moved], dim=1)
        moved = moved.unflatten(0, (-1, self.frames))  # (B, T, f, H, W)

        # Both nets compute in float32, the type of their parameters, even under autocast, so that
        # offsets are exact.
        with autocast_off(x.device):
            means = moved.mean(dim=(3, 4), dtype=self.weight_conv.weight.dtype)  # (B, T, f)
            means = means.transpose(1, 2)  # (B, f, T)

            # There is no ReLU after the convolution, as in the authors' code.
            hidden = self.offset_conv(means).squeeze(1)  # (B, T)
            hidden = torch.relu(self.offset_fc1(hidden))  # (B, T)

            # Offsets are between -2 and 2 frames. The paper has T in place of the 4, but all
            # published networks were trained with 4.
            offsets = 4 * (torch.sigmoid(self.offset_fc2(hidden)) - 0.5)  # (B, 2)

            # Frame weights are between 0 and 2.
            weights = 2 * torch.sigmoid(self.weight_conv(means))  # (B, 2, T)

        # four groups: offsets o0 o1 -o0 -o1, frame weights w0 w1 w0 w1
        offsets = torch.cat([offsets, -offsets], dim=1)  # (B, 4)
        weights = torch.cat([weights, weights], dim=1)  # (B, 4, T)
        moved = temporal_interlace(moved, offsets, weights)
        return torch.cat([moved.flatten(0, 1), kept], dim=1)


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


class TIN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    frames: T; a clip of another length raises a ValueError.
    backbone: resnet18, resnet50 or resnet101 of torchvision.
    dropout: a probability.
    """

    def __init__(self, num_classes, frames=8, backbone="resnet50", dropout=0.5):
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

        # a module for every residual block
        self.interlace = nn.ModuleDict()
        for stage in ["layer1", "layer2", "layer3", "layer4"]:
            self.interlace[stage] = nn.ModuleList()
            for block in getattr(self.backbone, stage):
                module = TemporalInterlace(block.conv1.in_channels, frames)
                self.interlace[stage].append(module)

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
                shifted = self.interlace[stage][i](x)
                x = residual(block, x, shifted)

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
    return TIN(
        num_classes,
        frames=recipe["frames"],
        backbone=recipe["backbone"],
        dropout=recipe["dropout"],
    )


# The rows of the report's Table 1, and the toy. A row holds what build() needs, and what differs
# from the settings in data.py, evaluate.py and train.py. In a comment, "report" means that the
# report gives the value. "ours" means that it does not; then comes our source, or the reason.
SHARED = dict(dropout=0.5)  # probability, before the classifier; report
RECIPES = {
    "r50_8f": dict(SHARED, frames=8, backbone="resnet50"),  # report
    "r101_8f": dict(SHARED, frames=8, backbone="resnet101"),  # report
    "r101_16f": dict(SHARED, frames=16, backbone="resnet101"),  # report
    "toy": dict(SHARED, frames=8, backbone="resnet18"),  # ours: small videos that data.py draws
}

# mAP in percent on the validation set, with one view (clip and crop) of each video; report, Table 1
REPORTED = {"r50_8f": 62.23, "r101_8f": 62.22, "r101_16f": 62.49}


# ==== Skip on first reading: other people's weights ===============================================

# ---- the autocast of both nets -------------------------------------------------------------------

def autocast_off(device):
    """A context in which autocast is off. The device "meta" has none, so there it is the CPU's."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


# ---- the 2D network ------------------------------------------------------------------------------

def image_network(name):
    """torchvision's ResNet of this name, with random weights."""
    network = torchvision.models.get_model(name, weights=None)
    if not isinstance(network, torchvision.models.ResNet):
        raise ValueError(f"backbone {name} is not one of torchvision's ResNets")
    return network


# ---- public weights ------------------------------------------------------------------------------
#
#     python evaluate.py --model tin --weights FILE FLAGS --data DATA
#
# train.py --init FILE reads the same files. Where they are published, which networks, which FLAGS:
#
#   github.com/Sense-X/X-Temporal, ModelZoo.md
#       ResNet-50 for M-MiT                         none, or --frames 16
#       ResNet-101 for M-MiT                        --recipe r101_8f
#   github.com/deepcs233/TIN
#       ResNet-50                                   none
#   github.com/open-mmlab/mmaction2, model zoo 1.x
#       ResNet-50                                   none
#
# A network for videos of one label each, as of Kinetics, needs --loss ce too. Sizes and
# normalisation leave no trace in a file, so nothing can notice a wrong one. The zoo of X-Temporal
# lists its network of 16 frames as a ResNet-50, the report as a ResNet-101 (--recipe r101_16f).


# ---- their names and ours ------------------------------------------------------------------------

# Patterns of their keys, and our names for them. A pattern must match the whole key, so that the
# files of other networks are refused.
#   base_model.          X-Temporal, tsn-pytorch, temporal-shift-module, deepcs233/TIN
#   .conv. and .bn.      mmaction2, where a convolution and its batch norm are one module
#   .net.                the convolution that comes after a shift, in a TSM
#   .net1. and .net2.    TemporalInterlace, and the convolution that comes after it, in a TIN
BACKBONE = r"(?:base_model\.|backbone\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
INTERLACE = BLOCK + r"conv1\.(?:conv\.)?net1\."
VALUE = r"\.(weight|bias)"
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = [
    # the ResNet's first layers
    (BACKBONE + r"conv1\.(?:conv\.)?weight", r"backbone.conv1.weight"),
    (BACKBONE + r"(?:bn1|conv1\.bn)\." + NORM, r"backbone.bn1.\1"),

    # its residual blocks
    (BLOCK + r"conv1\.(?:conv\.)?(?:net2?\.)?weight", r"backbone.\1.conv1.weight"),
    (BLOCK + r"conv([23])\.(?:conv\.)?weight", r"backbone.\1.conv\2.weight"),
    (BLOCK + r"bn([123])\." + NORM, r"backbone.\1.bn\2.\3"),
    (BLOCK + r"conv([123])\.bn\." + NORM, r"backbone.\1.bn\2.\3"),
    (BLOCK + r"downsample\.(?:0|conv)\.weight", r"backbone.\1.downsample.0.weight"),
    (BLOCK + r"downsample\.(?:1|bn)\." + NORM, r"backbone.\1.downsample.1.\2"),

    # the offset net and the weight net of a block, in X-Temporal and deepcs233/TIN
    (INTERLACE + r"biasnet\.net\.conv" + VALUE, r"interlace.\1.offset_conv.\2"),
    (INTERLACE + r"biasnet\.net\.fc" + VALUE, r"interlace.\1.offset_fc1.\2"),
    (INTERLACE + r"biasnet\.net\.lastlayer" + VALUE, r"interlace.\1.offset_fc2.\2"),
    (INTERLACE + r"weightnet\.net\.lastlayer" + VALUE, r"interlace.\1.weight_conv.\2"),

    # and in mmaction2
    (INTERLACE + r"offset_net\.conv" + VALUE, r"interlace.\1.offset_conv.\2"),
    (INTERLACE + r"offset_net\.fc1" + VALUE, r"interlace.\1.offset_fc1.\2"),
    (INTERLACE + r"offset_net\.fc2" + VALUE, r"interlace.\1.offset_fc2.\2"),
    (INTERLACE + r"weight_net\.conv" + VALUE, r"interlace.\1.weight_conv.\2"),

    # ours
    (r"(interlace\..+)", r"\1"),

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

    - ours, and the TIN files of X-Temporal, deepcs233/TIN and mmaction2: complete
    - the TSN and TSM files of X-Temporal, tsn-pytorch, temporal-shift-module and mmaction2: all but
      the offset and weight nets
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
