"""TIN, the Temporal Interlacing Network: a 2D ResNet in which some channels are shifted along time.

A quarter of the channels moves. In every block, one small net computes from the block's input how
far each group of channels moves, and another one a weight for each frame. TIN is the report's own
network, and the best of its image models.

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
G = 4 groups, which move by o0, o1, -o0 and -o1. Then each group's frames are multiplied by weights,
one for each frame.

B clips, T frames, C channels, H height, W width, K classes, D features per frame.
"""
import re

import torch
import torch.nn as nn
import torchvision


def temporal_interlace(x, offsets, weights=None):
    """Move each of G equal groups of channels along time by its own offset (paper, section 3).

        y[t] = weight[t] * sum over s of relu(1 - |t - s - offset|) * x[s]

    The relu is 1 where t - s is the offset and falls to 0 within one frame, so y[t] interpolates
    linearly between two frames of x.

    x (B, T, C, H, W) -> the same shape and memory layout. offsets (B, G) are in frames; a positive
    offset moves content later. weights (B, G, T); None means that they are all 1.

    This needs no custom CUDA kernel: it is a matrix product, so autograd gives the gradients,
    including those of the offsets (0 at an integer offset, where the slope jumps). It costs less
    than 0.6 % of a ResNet-50's multiplications.
    """
    # At least float32, even if x is bfloat16, whose numbers above 1 are 1/128 frame apart.
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32))

    # matrix[b, g, t, s]: how much of frame s arrives at frame t
    frame = torch.arange(x.shape[1], device=x.device, dtype=offsets.dtype)
    steps = frame[:, None] - frame[None, :]  # (T, T): t - s
    distance = steps - offsets[:, :, None, None]  # (B, G, T, T)
    matrix = torch.relu(1 - distance.abs())  # not torch.maximum, whose gradient at 0 is 1/2
    if weights is not None:
        matrix = matrix * weights[:, :, :, None]
    matrix = matrix.to(x.dtype)

    # If x is channels_last, move its channels to the last axis: torch.cat of five-dimensional
    # tensors returns contiguous memory, so the result will then have the layout of x.
    axis = 4 if x.stride(2) == 1 else 2
    x = x.movedim(2, axis)
    groups = x.unflatten(axis, (offsets.shape[1], -1))

    # One product per group. A single product over all groups would first copy x, and on a CPU that
    # is slower.
    moved = []
    for group_matrix, group in zip(matrix.unbind(1), groups.unbind(axis)):
        y = group_matrix @ group.flatten(2)  # (B, T, T) @ (B, T, C/G*H*W)
        moved.append(y.view(group.shape))

    x = torch.cat(moved, dim=axis)
    return x.movedim(axis, 2)


class TemporalInterlace(nn.Module):
    """Interlace a quarter of the channels, by offsets and weights computed from that quarter.

    x (B, T, C, H, W) -> the same shape and memory layout. T must be `frames`. Paper, section 3.
    """

    def __init__(self, channels, frames):
        super().__init__()
        self.num_moved = channels // 4  # f

        # The offset net. Its linear layers act along time, so its weights fit one T only.
        self.offset_conv = nn.Conv1d(self.num_moved, 1, kernel_size=3, padding=1)
        self.offset_fc1 = nn.Linear(frames, frames)
        self.offset_fc2 = nn.Linear(frames, 2)

        # the weight net
        self.weight_conv = nn.Conv1d(self.num_moved, 2, kernel_size=3, padding=1)

        # Offsets start near half a frame, 4 * (sigmoid(0.5108) - 0.5) = 0.5, and weights near 1.
        nn.init.constant_(self.offset_fc2.bias, 0.5108)
        nn.init.zeros_(self.weight_conv.bias)

    def forward(self, x):
        B, T, C = x.shape[:3]

        # In four dimensions torch.cat keeps channels_last, so split and join the frames there.
        frames = x.flatten(0, 1)  # (B*T, C, H, W)
        moved, kept = frames.split([self.num_moved, C - self.num_moved], dim=1)
        moved = moved.unflatten(0, (B, T))  # (B, T, f, H, W)

        # Both nets compute in float32, the type of their parameters, even under autocast.
        device = "cpu" if x.is_meta else x.device.type  # the meta device has no autocast
        with torch.autocast(device, enabled=False):
            means = moved.mean(dim=(3, 4), dtype=self.weight_conv.weight.dtype)  # (B, T, f)
            means = means.transpose(1, 2)  # (B, f, T)

            # Offsets are between -2 and 2 frames. The paper has T in place of the 4, but all
            # released weights were trained with 4.
            hidden = self.offset_conv(means).squeeze(1)  # (B, T)
            hidden = torch.relu(self.offset_fc1(hidden))  # (B, T)
            offsets = 4 * (torch.sigmoid(self.offset_fc2(hidden)) - 0.5)  # (B, 2)

            # Weights are between 0 and 2.
            weights = 2 * torch.sigmoid(self.weight_conv(means))  # (B, 2, T)

        # four groups: offsets o0 o1 -o0 -o1, but weights w0 w1 w0 w1
        offsets = torch.cat([offsets, -offsets], dim=1)  # (B, 4)
        weights = torch.cat([weights, weights], dim=1)  # (B, 4, T)
        moved = temporal_interlace(moved, offsets, weights)

        frames = torch.cat([moved.flatten(0, 1), kept], dim=1)  # (B*T, C, H, W)
        return frames.unflatten(0, (B, T))


def residual(block, x, moved):
    """torchvision's residual block, with `moved` on the main path and x on the shortcut."""
    y = block.conv1(moved)
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

    frames is T; a clip of another length raises a ValueError. depth is the ResNet's: 18, 50 or 101.
    dropout is a probability.
    """

    def __init__(self, num_classes, frames=8, depth=50, dropout=0.5):
        super().__init__()
        self.frames = frames

        # the 2D network, without its own classifier
        self.backbone = torchvision.models.get_model(f"resnet{depth}", weights=None)
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
                moved = x.unflatten(0, (-1, self.frames))  # (B, T, C, H, W)
                moved = self.interlace[stage][i](moved)
                moved = moved.flatten(0, 1)  # (B*T, C, H, W)
                x = residual(block, x, moved)

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
        depth=recipe["depth"],
        dropout=recipe["dropout"],
    )


# The rows of the report's Table 1, and the toy. A row holds what build() needs, and what differs
# from the settings in data.py, evaluate.py and train.py. In the comments, "report" means that the
# report says so. "ours" means that the report is silent; what we follow, or why, comes after it.
RECIPES = {
    "r50_8f": dict(
        frames=8,  # T; report
        depth=50,  # of the ResNet; report
        dropout=0.5,  # probability, before the classifier; report
    ),
    "r101_8f": dict(
        frames=8,
        depth=101,
        dropout=0.5,
    ),
    "r101_16f": dict(
        frames=16,
        depth=101,
        dropout=0.5,
    ),
    "toy": dict(
        frames=8,
        depth=18,
        dropout=0.5,
    ),
}

# mAP in percent on the validation set, one view a video; report, Table 1. The authors' model zoo
# lists the last one as a ResNet-50.
REPORTED = {"r50_8f": 62.23, "r101_8f": 62.22, "r101_16f": 62.49}


# ---- other people's weights: skip on first reading ----------------------------------------------

# Patterns of other repositories' keys, and our names for them. A pattern must match the whole key,
# so that the files of other networks are refused.
#   base_model.          X-Temporal, tsn-pytorch, temporal-shift-module, deepcs233/TIN
#   .conv. and .bn.      mmaction2, where a convolution and its batch norm are one module
#   .net.                the convolution that comes after a shift, in a TSM
#   .net1. and .net2.    TemporalInterlace, and the convolution that comes after it, in a TIN
BACKBONE = r"(?:base_model\.|backbone\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
INTERLACE = BLOCK + r"conv1\.(?:conv\.)?net1\."
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

    # the offset net and the weight net of a block, biasnet and weightnet in X-Temporal and
    # deepcs233/TIN, offset_net and weight_net in mmaction2
    (
        INTERLACE + r"(?:biasnet\.net\.conv|offset_net\.conv)\.(weight|bias)",
        r"interlace.\1.offset_conv.\2",
    ),
    (
        INTERLACE + r"(?:biasnet\.net\.fc|offset_net\.fc1)\.(weight|bias)",
        r"interlace.\1.offset_fc1.\2",
    ),
    (
        INTERLACE + r"(?:biasnet\.net\.lastlayer|offset_net\.fc2)\.(weight|bias)",
        r"interlace.\1.offset_fc2.\2",
    ),
    (
        INTERLACE + r"(?:weightnet\.net\.lastlayer|weight_net\.conv)\.(weight|bias)",
        r"interlace.\1.weight_conv.\2",
    ),
    (r"(interlace\..+)", r"\1"),

    # the classifier
    (r"(?:fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"fc.\1"),
]


def our_name(key):
    """Another repository's key -> ours. ValueError if this network has no such tensor."""
    # DataParallel puts "module." before every key, and torch.compile puts "_orig_mod.".
    bare_key = re.sub(r"^(module\.|_orig_mod\.)+", "", key)

    for pattern, name in KEYS:
        match = re.fullmatch(pattern, bare_key)
        if match:
            return match.expand(name)
    raise ValueError(f"{__name__}.py has no place for the key {key}")


def convert(checkpoint):
    """A checkpoint of another repository, as read from its file -> a state dict in our names.

    - ours, and the TIN files of X-Temporal, deepcs233/TIN and mmaction2: complete
    - the TSN and TSM files of X-Temporal, tsn-pytorch, temporal-shift-module and mmaction2: all but
      the offset and weight nets
    - torchvision's ImageNet ResNets: the backbone alone

    A file with any other key raises a ValueError.
    """
    # The tensors may be in a dict of their own, beside the optimiser's state and the epoch.
    tensors = checkpoint
    for container in ["state_dict", "model", "model_state", "model_state_dict", "net"]:
        if isinstance(checkpoint.get(container), dict):
            tensors = checkpoint[container]
            break

    # torchvision's own files have this key. Their classifier, for the 1,000 classes of ImageNet, is
    # left out.
    from_imagenet = "conv1.weight" in tensors

    state = {}
    for key, tensor in tensors.items():
        name = our_name(str(key))
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{__name__}.py needs a tensor under the key {key}")
        if from_imagenet and name.startswith("fc.") and len(tensor) == 1000:
            continue
        state[name] = tensor
    if not state:
        raise ValueError(f"{__name__}.py finds no tensors in the checkpoint")

    # Files from before PyTorch 0.4.1 lack the number of batches that a batch norm has seen.
    for name in list(state):
        if name.endswith("running_var"):
            count = name.replace("running_var", "num_batches_tracked")
            state.setdefault(count, torch.tensor(0))
    return state
