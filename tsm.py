"""TSM, the Temporal Shift Module: a 2D ResNet in which some channels are shifted along time.

One eighth of the channels moves one frame earlier and one eighth one frame later. The convolution
that follows looks at a single frame, but now it finds features of both neighbours there. The shift
has no weights and no multiplications: TSM costs what TSN does, the same ResNet without a shift.

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

    x (B, T, C, H, W) -> the same shape and memory layout. Gradients move the opposite way: a value
    that was dropped gets 0, and the gradient of a zero that was filled in is lost.

    A figure in the paper shows the two directions the other way round. The weights that its authors
    released need the directions used here.
    """
    # If x is channels_last, move its channels to the last axis: torch.cat of five-dimensional
    # tensors returns contiguous memory, so the result will then have the layout of x.
    axis = 4 if x.stride(2) == 1 else 2
    x = x.movedim(2, axis)

    eighth = x.shape[axis] // 8
    others = x.shape[axis] - 2 * eighth
    earlier, later, kept = x.split([eighth, eighth, others], dim=axis)

    # pad takes two numbers per axis, from the last axis to the first. Time is the fourth axis from
    # the end, wherever the channels are. (-1, 1) drops the first frame and adds a frame of zeros
    # after the last.
    earlier = nn.functional.pad(earlier, (0, 0, 0, 0, 0, 0, -1, 1))
    later = nn.functional.pad(later, (0, 0, 0, 0, 0, 0, 1, -1))

    x = torch.cat([earlier, later, kept], dim=axis)
    return x.movedim(axis, 2)


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


class TSM(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    frames is T; a clip of another length raises a ValueError. depth is the ResNet's: 18, 50 or 101.
    dropout is a probability. shift_every=n shifts in the blocks 0, n, 2n ... of every stage; with
    None, n depends on the depth (see below).
    """

    def __init__(self, num_classes, frames=8, depth=50, dropout=0.5, shift_every=None):
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

        # The default is what the weights that TSM's authors released need: a shift in every block,
        # and in networks deeper than ResNet-50 in every second one. The report's authors shift in
        # every block at any depth, so RECIPES says 1.
        if shift_every is not None:
            self.shift_every = shift_every
        elif depth <= 50:
            self.shift_every = 1
        else:
            self.shift_every = 2
        if self.shift_every < 1:
            raise ValueError(f"shift_every is {shift_every}, but must be at least 1")

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
                moved = x
                if i % self.shift_every == 0:
                    moved = moved.unflatten(0, (-1, self.frames))  # (B, T, C, H, W)
                    moved = temporal_shift(moved)
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
    return TSM(
        num_classes,
        frames=recipe["frames"],
        depth=recipe["depth"],
        dropout=recipe["dropout"],
        shift_every=recipe["shift_every"],
    )


# The rows of the report's Table 1, and the toy. A row holds what build() needs, and what differs
# from the settings in data.py, evaluate.py and train.py. In the comments, "report" means that the
# report says so. "ours" means that the report is silent; what we follow, or why, comes after it.
RECIPES = {
    "r50_8f": dict(
        frames=8,  # T; report
        depth=50,  # of the ResNet; report
        dropout=0.5,  # probability, before the classifier; report
        shift_every=1,  # every block; ours: the code of the report's authors
    ),
    "r50_16f": dict(
        frames=16,
        depth=50,
        dropout=0.5,
        shift_every=1,
    ),
    "r101_8f": dict(
        frames=8,
        depth=101,
        dropout=0.5,
        shift_every=1,
    ),
    "toy": dict(
        frames=8,
        depth=18,
        dropout=0.5,
        shift_every=1,
    ),
}

# mAP in percent on M-MiT's validation set, one view (clip and crop) a video; report, Table 1
REPORTED = {"r50_8f": 59.85, "r50_16f": 61.12, "r101_8f": 61.06}


# ---- other people's weights: skip on first reading ----------------------------------------------

# Patterns of other repositories' keys, and our names for them. A pattern must match the whole key,
# so that the files of other networks are refused.
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

    - ours, and the TSM files of X-Temporal, temporal-shift-module and mmaction2: complete
    - the TSN files of the same people and of tsn-pytorch: complete, as the shift has no weights
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
