"""TRN, the Temporal Relation Network: small networks look at ordered tuples of a video's frames.

A 2D network sees every frame by itself. Then one small network looks at the features of pairs of
frames, another one at triples, and so on. Their logits are added up.

Report: arXiv 2003.05837, section 1.2: "it doesn't work well in our attempt", without an mAP.
Paper: Zhou, Andonian, Oliva and Torralba, "Temporal Relational Reasoning in Videos",
arXiv 1711.08496.

    The tuples of four frames a b c d, scale by scale. Frames keep their order, and all tuples of a
    scale are seen by the same small network.

    scale 4       abcd
    scale 3       abc        abd        acd        bcd
    scale 2       ab         ac         ad         bc         bd         cd

In training, every step draws at most 3 tuples of each scale and adds up their logits. Evaluation is
not random: it averages the logits of all tuples of a scale, and multiplies by the number that
training draws. This is the mean of training's sum over all possible draws.

The authors' code is TRN-pytorch; mmaction2, a library, has TRN too.

B clips, T frames, H height, W width, K classes, D features per frame, k the scale: the number of
frames in a tuple; R tuples of a scale, of which a forward pass looks at n.
"""
import itertools
import re

import torch
import torch.nn as nn
import torchvision

FRAME_FEATURES = 256  # what the relations see of a frame; as in TRN-pytorch and mmaction2


class Relation(nn.Module):
    """The network of one scale k: frame features f (B, T, 256) -> its part of the logits, (B, K).

    ReLU; the k feature vectors of a tuple are concatenated in time order; then linear, ReLU,
    linear. hidden: features between the two linear layers.
    """

    def __init__(self, frames, scale, hidden, num_classes):
        super().__init__()
        self.fc1 = nn.Linear(scale * FRAME_FEATURES, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

        # All tuples of k frame indices in time order. A buffer, so that model.to() moves them too;
        # not in the state dict, since they can be computed again.
        tuples = torch.tensor(list(itertools.combinations(range(frames), scale)))
        self.register_buffer("tuples", tuples, persistent=False)  # (R, k)
        self.draws = min(3, len(tuples))  # in training; as in TRN-pytorch and mmaction2

    def forward(self, f):
        # Training draws n tuples, the same for the whole batch. In evaluation n is R: all tuples.
        tuples = self.tuples
        if self.training:
            drawn = torch.randperm(len(tuples))[: self.draws]  # on the CPU: same on any device
            tuples = tuples[drawn.to(tuples.device)]

        x = torch.relu(f)  # (B, T, 256)
        x = x[:, tuples]  # (B, n, k, 256), the frames of every tuple
        x = x.flatten(2)  # (B, n, k*256)
        x = torch.relu(self.fc1(x))  # (B, n, hidden)

        # In training n is self.draws, and the sum of n logits is n times their mean. Evaluation
        # multiplies the mean over all R tuples by the same number. fc2 is linear, so the mean of
        # the logits is fc2 of the mean of x.
        x = x.mean(dim=1)  # (B, hidden)
        return self.draws * self.fc2(x)  # (B, K)


class TRN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    frames: T; a clip of another length raises a ValueError.
    backbone: resnet18, resnet50 or resnet101 of torchvision.
    dropout: a probability.
    multiscale: True: all scales from T to 2, for a T of at most 10. False: the scale T alone.
    """

    def __init__(self, num_classes, frames=8, backbone="resnet50", dropout=0.5, multiscale=True):
        super().__init__()
        if multiscale and not 2 <= frames <= 10:  # 10 frames have 1,013 tuples, 11 twice as many
            raise ValueError(f"a multiscale TRN takes 2 to 10 frames, got {frames}")
        self.frames = frames

        # the 2D network with random weights, without its own classifier
        self.backbone = image_network(backbone)
        features = self.backbone.fc.in_features  # D
        self.backbone.fc = nn.Identity()

        # the frame layer: what the relations see of a frame
        self.dropout = nn.Dropout(dropout)
        self.frame = nn.Linear(features, FRAME_FEATURES)
        nn.init.normal_(self.frame.weight, std=0.001)  # as in the authors' code
        nn.init.zeros_(self.frame.bias)

        # the scales, and the width of their hidden layers, as in TRN-pytorch and mmaction2
        if multiscale:
            scales = range(frames, 1, -1)  # T, T - 1, ... 2
            hidden = 256
        else:
            scales = [frames]
            hidden = 512

        # a small network for every scale
        self.relations = nn.ModuleList()
        for scale in scales:
            self.relations.append(Relation(frames, scale, hidden, num_classes))

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the relations see of each frame, (B, T, 256)."""
        frames = clip.shape[1]
        if frames != self.frames:
            raise ValueError(f"the network takes clips of {self.frames} frames, got {frames}")

        x = clip.flatten(0, 1)  # (B*T, 3, H, W): to the 2D network a frame is an image
        x = self.backbone(x)  # (B*T, D)
        x = x.unflatten(0, (-1, self.frames))  # (B, T, D)
        x = self.dropout(x)
        return self.frame(x)  # (B, T, 256)

    def forward(self, clip):
        x = self.features(clip)  # (B, T, 256)
        return sum(relation(x) for relation in self.relations)  # (B, K)


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TRN(
        num_classes,
        frames=recipe["frames"],
        backbone=recipe["backbone"],
        dropout=recipe["dropout"],
        multiscale=recipe["multiscale"],
    )


# A row like those of the report's other networks, and the toy. A row holds what build() needs, and
# what differs from the settings in data.py, evaluate.py and train.py. The report gives no value for
# TRN, so all are "ours"; then comes the source that we follow, or the reason.
SHARED = dict(
    frames=8,  # T; ours: as in TRN-pytorch and mmaction2
    multiscale=True,  # all scales from T to 2; ours: as in most public weights
)
RECIPES = {
    "r50_8f": dict(SHARED, backbone="resnet50", dropout=0.5),  # ours: as in the report's other rows
    "toy": dict(
        SHARED,
        backbone="resnet18",
        dropout=0.0,  # ours: 0.2 was no better

        # ours: small, smooth steps. The relations begin with a ReLU, so a feature that is negative
        # in every frame of every clip no longer gets a gradient. With larger steps few still do.
        lr=0.02,
        clip_grad=1.0,  # largest gradient norm
        nesterov=True,
        warmup=75,  # steps: one epoch

        # ours: the full rate almost to the end, then a tenth
        epochs=18,
        schedule="step",
        milestones=(17,),
    ),
}

# mAP; the report gives none for TRN
REPORTED = {"r50_8f": None}


# ==== Skip on first reading: other people's weights ===============================================

# ---- the 2D network ------------------------------------------------------------------------------

def image_network(name):
    """torchvision's ResNet of this name, with random weights."""
    network = torchvision.models.get_model(name, weights=None)
    if not isinstance(network, torchvision.models.ResNet):
        raise ValueError(f"backbone {name} is not one of torchvision's ResNets")
    return network


# ---- public weights ------------------------------------------------------------------------------
#
#     python evaluate.py --model trn --weights FILE FLAGS --data DATA
#
# train.py --init FILE reads the same files. Where they are published, which networks, which FLAGS:
#
#   github.com/zhoubolei/TRN-pytorch
#       ResNet-50                                   none
#   github.com/open-mmlab/mmaction2, model zoo 1.x
#       ResNet-50                                   none
#
# A network for videos of one label each, as of Kinetics, needs --loss ce too, one of a single scale
# --no-multiscale. Sizes and normalisation leave no trace in a file, so nothing can notice a wrong
# one. What does not load: networks on BNInception or InceptionV3.


# ---- their names and ours ------------------------------------------------------------------------

# Patterns of their keys, and our names for them. A pattern must match the whole key, so that the
# files of other networks are refused.
#   base_model.          TRN-pytorch, X-Temporal, tsn-pytorch, temporal-shift-module
#   .conv. and .bn.      mmaction2, where a convolution and its batch norm are one module
BACKBONE = r"(?:base_model\.|backbone\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
CONSENSUS = r"(?:cls_head\.)?consensus\."
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = [
    # the ResNet's first layers
    (BACKBONE + r"conv1\.(?:conv\.)?weight", r"backbone.conv1.weight"),
    (BACKBONE + r"(?:bn1|conv1\.bn)\." + NORM, r"backbone.bn1.\1"),

    # its residual blocks
    (BLOCK + r"conv([123])\.(?:conv\.)?weight", r"backbone.\1.conv\2.weight"),
    (BLOCK + r"bn([123])\." + NORM, r"backbone.\1.bn\2.\3"),
    (BLOCK + r"conv([123])\.bn\." + NORM, r"backbone.\1.bn\2.\3"),
    (BLOCK + r"downsample\.(?:0|conv)\.weight", r"backbone.\1.downsample.0.weight"),
    (BLOCK + r"downsample\.(?:1|bn)\." + NORM, r"backbone.\1.downsample.1.\2"),

    # the relations: in these files module 0 is of scale T, module 1 of scale T - 1 and so on;
    # "classifier" is the only scale of a network that is not multiscale
    (CONSENSUS + r"fc_fusion_scales\.(\d+)\.1\.(weight|bias)", r"relations.\1.fc1.\2"),
    (CONSENSUS + r"fc_fusion_scales\.(\d+)\.3\.(weight|bias)", r"relations.\1.fc2.\2"),
    (CONSENSUS + r"classifier\.1\.(weight|bias)", r"relations.0.fc1.\1"),
    (CONSENSUS + r"classifier\.3\.(weight|bias)", r"relations.0.fc2.\1"),
    (r"(relations\..+)", r"\1"),

    # the frame layer, which has the names of another network's classifier
    (r"(?:frame|fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"frame.\1"),
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

    - ours, and the TRN files of TRN-pytorch and mmaction2: complete
    - the TSN files of X-Temporal, tsn-pytorch, temporal-shift-module and mmaction2: the backbone
      alone
    - torchvision's ImageNet ResNets: the backbone alone

    evaluate.tensors_of takes the tensors out of a file. Without it:
    {key.removeprefix("module."): x for key, x in torch.load(FILE)["state_dict"].items()}
    """
    state = {}
    for key, tensor in tensors.items():
        state[our_name(key)] = tensor

    # A file without relations is another network's, and what we call the frame layer is its
    # classifier, which is left out.
    if not any(name.startswith("relations.") for name in state):
        state.pop("frame.weight", None)
        state.pop("frame.bias", None)
    return state
