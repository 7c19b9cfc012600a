"""TRN, the Temporal Relation Network: small networks look at ordered tuples of a video's frames.

A 2D network sees every frame by itself. Then one small network looks at pairs of frames, another
one at triples, and so on. Their logits are added up.

Report: arXiv 2003.05837, section 1.2: "it doesn't work well in our attempt", without a figure.
Paper: Zhou, Andonian, Oliva and Torralba, "Temporal Relational Reasoning in Videos",
arXiv 1711.08496.

    The tuples of four frames a b c d, scale by scale. Frames keep their order, and all tuples of a
    scale are seen by the same small network.

    scale 4       abcd
    scale 3       abc        abd        acd        bcd
    scale 2       ab         ac         ad         bc         bd         cd

In training, every step draws at most 3 tuples of each scale and adds up their logits. Evaluation
takes the mean over all tuples of a scale, times the number that training draws. This is the exact
mean over all possible draws, so evaluation is not random.

B clips, T frames, H height, W width, K classes, D features per frame, k the scale, which is the
number of frames in a tuple, R_k tuples of scale k, n_k = min(3, R_k) of them drawn in training.
"""
import itertools
import re

import torch
import torch.nn as nn
import torchvision


class Relation(nn.Module):
    """The network of one scale: frame features f (B, T, 256) -> its part of the logits, (B, K).

    The k feature vectors of a tuple are concatenated in time order; then ReLU, linear, ReLU,
    linear. tuples (n, k) holds frame indices. None means tuples drawn at random in training, and
    all tuples in evaluation.
    """

    def __init__(self, frames, scale, hidden, num_classes):
        super().__init__()
        self.scale = scale  # k
        self.hidden = nn.Linear(256 * scale, hidden)
        self.fc = nn.Linear(hidden, num_classes)

        # all increasing tuples of k frame indices; a buffer, so that model.to() moves them too
        tuples = torch.tensor(list(itertools.combinations(range(frames), scale)))
        self.register_buffer("tuples", tuples, persistent=False)  # (R_k, k)
        self.terms = min(3, len(tuples))  # n_k; 3 as in TRN-pytorch and mmaction2

    def forward(self, f, tuples=None):
        # Training draws n_k of all tuples without replacement, the same for the whole batch.
        # randperm uses PyTorch's CPU generator, so the draw is the same on any device.
        if tuples is None:
            tuples = self.tuples
            if self.training:
                drawn = torch.randperm(len(tuples))[: self.terms]
                tuples = tuples[drawn.to(tuples.device)]

        x = torch.relu(f)  # (B, T, 256)
        x = x[:, tuples]  # (B, n, k, 256), the frames of every tuple
        x = x.flatten(2)  # (B, n, k*256)
        x = torch.relu(self.hidden(x))  # (B, n, h)

        # TRN-pytorch and mmaction2 add up the logits of n_k tuples, which is n_k times their mean.
        # The mean before the last linear layer gives the same, and that layer sees one vector.
        x = x.mean(dim=1)  # (B, h)
        return self.terms * self.fc(x)  # (B, K)


class TRN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    segments is T; a clip of another length raises a ValueError. backbone is resnet18, resnet50 or
    resnet101. multiscale means all scales from T to 2, for a T of at most 10; otherwise T is the
    only scale. dropout is a probability.
    """

    def __init__(self, num_classes, segments=8, backbone="resnet50", multiscale=True, dropout=0.5):
        super().__init__()
        if multiscale and segments < 2:
            raise ValueError(
                f"a multiscale TRN takes 2 to 10 frames, got {segments}, which makes no pair"
            )
        if multiscale and segments > 10:  # evaluation looks at all tuples
            tuples = 2**segments - segments - 1
            raise ValueError(
                f"a multiscale TRN takes 2 to 10 frames, got {segments}, "
                f"whose {tuples:,} tuples are too many"
            )
        self.frames = segments

        # the 2D network, without its own classifier
        self.backbone = torchvision.models.get_model(backbone, weights=None)
        if not isinstance(self.backbone, torchvision.models.ResNet):
            raise ValueError(f"backbone {backbone} is not one of torchvision's ResNets")
        features = self.backbone.fc.in_features  # D
        self.backbone.fc = nn.Identity()

        # the frame layer, where the other models have their classifier
        self.dropout = nn.Dropout(dropout)
        self.frame = nn.Linear(features, 256)
        nn.init.normal_(self.frame.weight, std=0.001)  # as TSN's classifier
        nn.init.zeros_(self.frame.bias)

        # the scales, and the width of each relation's hidden layer; as in TRN-pytorch and mmaction2
        if multiscale:
            scales = range(segments, 1, -1)  # T, T - 1, ... 2
            hidden = 256
        else:
            scales = [segments]
            hidden = 512

        # one small network per scale
        self.relations = nn.ModuleList()
        for scale in scales:
            self.relations.append(Relation(segments, scale, hidden, num_classes))

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

    def forward(self, clip, tuples=None):
        """tuples, to replay a choice: {scale: (n, scale) frame indices}, with every scale."""
        f = self.features(clip)  # (B, T, 256)

        logits = 0
        for relation in self.relations:
            chosen = None
            if tuples is not None:
                chosen = tuples[relation.scale]
            logits = logits + relation(f, chosen)  # (B, K)
        return logits


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TRN(
        num_classes,
        segments=recipe["frames"],
        backbone=recipe["backbone"],
        multiscale=recipe["multiscale"],
        dropout=recipe["dropout"],
    )


# The report has no row for TRN; this one follows its other image models. A row holds what build()
# needs, and what differs from the settings in data.py, evaluate.py and train.py. In the comments,
# "report" means that the report says so. "ours" means that the report is silent; what we follow, or
# why, comes after it.
RECIPES = {
    "r50_8f": dict(
        frames=8,  # T; ours: the default of TRN-pytorch and mmaction2
        backbone="resnet50",  # the 2D network; ours: that of mmaction2
        multiscale=True,  # all scales from T to 2; ours: as most public weights
        dropout=0.5,  # probability, before the frame layer; ours: as the report's image models
    ),
    # The relations begin with a ReLU, so a frame feature that is always negative is dead: it gets
    # no gradient any more. With the report's lr and clip_grad 2 % of the 256 features were left
    # after 40 steps, too few to tell every video from its reversal; with the values below at least
    # a sixth were left after 240 steps.
    "toy": dict(
        frames=8,
        backbone="resnet18",
        multiscale=True,
        dropout=0.0,  # ours: 0.2 was no better

        # ours: small and smooth steps, against dead features
        lr=0.02,
        clip_grad=1.0,  # largest gradient norm
        warmup=75,  # steps, one epoch
        nesterov=True,

        # ours: the full rate almost to the end. mAP 92 to 93 with two seeds; it was 91.7 without
        # nesterov, and 86.1 with a cosine over 12 epochs.
        epochs=18,
        schedule="step",
        milestones=(17,),
    ),
}

# mAP; the report has no figure: "it doesn't work well in our attempt"
REPORTED = {"r50_8f": None}


# ---- other people's weights: skip on first reading ----------------------------------------------

# Patterns of other repositories' keys, and our names for them. A pattern must match the whole key,
# so that the files of other networks are refused.
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
    (CONSENSUS + r"fc_fusion_scales\.(\d+)\.1\.(weight|bias)", r"relations.\1.hidden.\2"),
    (CONSENSUS + r"fc_fusion_scales\.(\d+)\.3\.(weight|bias)", r"relations.\1.fc.\2"),
    (CONSENSUS + r"classifier\.1\.(weight|bias)", r"relations.0.hidden.\1"),
    (CONSENSUS + r"classifier\.3\.(weight|bias)", r"relations.0.fc.\1"),
    (r"(relations\..+)", r"\1"),

    # the frame layer, which has the names of another network's classifier
    (r"(?:frame|fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"frame.\1"),
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

    - ours, and the TRN files of TRN-pytorch and mmaction2: complete
    - the TSN files of X-Temporal, tsn-pytorch, temporal-shift-module and mmaction2: the backbone
      alone
    - torchvision's ImageNet ResNets: the backbone alone

    A file with any other key raises a ValueError.
    """
    # The tensors may be in a dict of their own, beside the optimiser's state and the epoch.
    tensors = checkpoint
    for container in ["state_dict", "model", "model_state", "model_state_dict", "net"]:
        if isinstance(checkpoint.get(container), dict):
            tensors = checkpoint[container]
            break

    state = {}
    for key, tensor in tensors.items():
        name = our_name(str(key))
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{__name__}.py needs a tensor under the key {key}")
        state[name] = tensor

    # A file without relations is another network's, and what we call the frame layer is its
    # classifier, which is left out.
    has_relations = any(name.startswith("relations.") for name in state)
    if not has_relations:
        state.pop("frame.weight", None)
        state.pop("frame.bias", None)

    if not state:
        raise ValueError(f"{__name__}.py finds no tensors in the checkpoint")

    # Files from before PyTorch 0.4.1 lack the number of batches that a batch norm has seen.
    for name in list(state):
        if name.endswith("running_var"):
            count = name.replace("running_var", "num_batches_tracked")
            state.setdefault(count, torch.tensor(0))
    return state
