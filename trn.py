"""TRN, the Temporal Relation Network: a 2D network sees every frame by itself, then small networks look at ordered
tuples of frames, one network for the pairs, one for the triples and so on; what they say of the classes is added up.

Report: arXiv 2003.05837, section on TRN: tried without success, no figure. Paper: Zhou, Andonian, Oliva and Torralba,
"Temporal Relational Reasoning in Videos", arXiv 1711.08496.

    the tuples of four frames a b c d, scale by scale; frames keep their order, and a scale has one network for all:

    scale 4       abcd
    scale 3       abc        abd        acd        bcd
    scale 2       ab         ac         ad         bc         bd         cd

Training draws at most 3 tuples of a scale for every step and adds up what the network of that scale says of each. In
evaluation all tuples count, scaled down to as many terms: the exact mean over every draw, so nothing is random.

B clips, T frames, H height, W width, K classes, D features per frame, k the scale, R_k tuples, n_k = min(3, R_k) terms.
"""
import itertools
import re

import torch
import torch.nn as nn
import torchvision

REPORT = dict(
    frames=8,  # T; our choice: both public codes' default, the report is silent
    sampling="segments", stride=1,  # a frame from each of T equal parts; report: "evenly select" (stride is for "clip")
    backbone="resnet50",  # or resnet18, resnet101; our choice: mmaction2's, the report is silent
    multiscale=True,  # all scales T ... 2, or T alone; our choice: as most public weights, the report is silent
    dropout=0.5,  # before the frame layer; report (both public codes: 0.8)
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
    published_map=None,  # percent; report: "doesn't work well in our attempt", no figure
)
RECIPES = {
    "r50_8f": REPORT,
    "toy": {
        **REPORT, "backbone": "resnet18",  # as the other models here
        "init": "none", "published_map": None,  # from nothing: enough here, and no download
        "crop": 32, "augment": "jitter", "jitter": (36, 36),  # TSN's own smaller crops would cut off what moves
        "test_resize": 36, "test_crop": 32, "scales": (32,),  # of 40x36; at 36 the last map is 2x2, not 1x1: mAP falls
        "flip": False,  # a mirrored video moves the other way: the flip would swap two labels
        "loss_scale": 10 / 1.7,  # classes / labels per video: what 160 is to 313 classes with 1.96 labels
        "batch": 16, "reference_batch": 16, "epochs": 18,  # minutes on a laptop; measured: 92 to 93, two seeds
        # What is negative in every frame is lost at the first ReLU: of the 256 frame features REPORT's lr and clip_grad
        # leave 2 % after 40 steps, these a sixth or more after 240. With 4 % left some reversals stayed unlearned.
        "lr": 0.02, "clip_grad": 1.0, "warmup": 75, "nesterov": True,  # measured: larger or less damped steps kill them
        "milestones": (17,),  # the full rate nearly to the end; measured without nesterov: 91.7, a cosine 86.1 in 12
        "dropout": 0.0,  # our choice: measured, 0.2 gains nothing
    },
}


class Relation(nn.Module):
    """The network of one scale: frame features f (B, T, 256) -> what this scale adds to the logits, (B, K).

    A tuple's k vectors are concatenated in time order; ReLU, linear, ReLU, linear. tuples (n, k) are frame indices;
    None is all R_k of them in evaluation, and in training n_k, drawn from PyTorch's CPU generator. Their mean counts
    n_k times: for n_k tuples this is the sum, as in both public codes, and for all of them that sum's expected value.
    """

    def __init__(self, frames, scale, hidden, num_classes):
        super().__init__()
        self.scale = scale
        self.hidden = nn.Linear(256 * scale, hidden)
        self.fc = nn.Linear(hidden, num_classes)
        tuples = torch.tensor(list(itertools.combinations(range(frames), scale)))  # (R_k, k), in lexicographic order
        self.register_buffer("tuples", tuples, persistent=False)
        self.terms = min(3, len(tuples))  # n_k

    def forward(self, f, tuples=None):
        if tuples is None:
            tuples = self.tuples
            if self.training:  # without replacement, the same for the whole batch
                tuples = tuples[torch.randperm(len(tuples))[:self.terms].to(tuples.device)]
        x = torch.relu(f)[:, tuples].flatten(2)  # (B, n, k*256): frame after frame
        hidden = torch.relu(self.hidden(x))  # (B, n, h)
        return self.terms * self.fc(hidden.mean(dim=1))  # the mean first: then the last linear runs once


class TRN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K). backbone: resnet18, resnet50 or resnet101. A ValueError for a
    clip of another T, and for a multiscale network of more than 10 frames."""

    def __init__(self, num_classes, segments=8, backbone="resnet50", multiscale=True, dropout=0.5):
        super().__init__()
        if multiscale and not 2 <= segments <= 10:
            raise ValueError(f"a multiscale TRN takes 2 to 10 frames, got {segments}: they make "
                             f"{2 ** segments - segments - 1:,} tuples, all of which evaluation looks at")
        self.frames = segments  # the paper's word for T
        self.backbone = torchvision.models.get_model(backbone, weights=None)
        self.frame = nn.Linear(self.backbone.fc.in_features, 256)
        nn.init.normal_(self.frame.weight, std=0.001)
        nn.init.zeros_(self.frame.bias)
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        scales, hidden = (range(segments, 1, -1), 256) if multiscale else ([segments], 512)
        self.relations = nn.ModuleList(Relation(segments, scale, hidden, num_classes) for scale in scales)

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the relations see of each frame, (B, T, 256)."""
        if clip.shape[1] != self.frames:
            raise ValueError(f"the network takes clips of {self.frames} frames, got {clip.shape[1]}")
        x = clip.flatten(0, 1)  # (B*T, 3, H, W): to the 2D network a frame is an image
        x = self.backbone(x).unflatten(0, (-1, self.frames))  # (B, T, D)
        return self.frame(self.dropout(x))

    def forward(self, clip, tuples=None):
        """tuples, to replay a choice: {scale: (n, scale) frame indices}, with every scale of this network."""
        f = self.features(clip)
        return sum(relation(f, None if tuples is None else tuples[relation.scale]) for relation in self.relations)


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TRN(num_classes, recipe["frames"], recipe["backbone"], recipe["multiscale"], recipe["dropout"])


# Other people's keys -> ours: stem, blocks, frame layer, relations. What is the classifier to the other 2D networks is
# the frame layer here. Whole keys, as in the other files. (.conv. and .bn. are mmaction2's.)
BACKBONE = r"(?:module\.)?(?:(?:base_model|backbone)\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
CONSENSUS = r"(?:module\.)?(?:cls_head\.)?consensus\."
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = [
    (BACKBONE + r"conv1\.(?:conv\.)?weight", r"backbone.conv1.weight"),
    (BACKBONE + r"(?:bn1|conv1\.bn)\." + NORM, r"backbone.bn1.\1"),
    (BLOCK + r"conv([123])\.(?:conv\.)?weight", r"backbone.\1.conv\2.weight"),
    (BLOCK + r"(?:bn([123])|conv([123])\.bn)\." + NORM, r"backbone.\1.bn\2\3.\4"),
    (BLOCK + r"downsample\.(?:0|conv)\.weight", r"backbone.\1.downsample.0.weight"),
    (BLOCK + r"downsample\.(?:1|bn)\." + NORM, r"backbone.\1.downsample.1.\2"),
    (CONSENSUS + r"fc_fusion_scales\.(\d+)\.1\.(weight|bias)", r"relations.\1.hidden.\2"),  # 0 is scale T, 1 is T - 1
    (CONSENSUS + r"fc_fusion_scales\.(\d+)\.3\.(weight|bias)", r"relations.\1.fc.\2"),
    (CONSENSUS + r"classifier\.1\.(weight|bias)", r"relations.0.hidden.\1"),  # not multiscale: scale T alone
    (CONSENSUS + r"classifier\.3\.(weight|bias)", r"relations.0.fc.\1"),
    (r"((?:frame|relations)\..+)", r"\1"),
    (r"(?:module\.)?(?:fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"frame.\1"),
]


def convert(checkpoint):
    """What was read from a checkpoint file -> a state dict in our names. ValueError for a layout that is none of these:
    ours and the TRN files of TRN-pytorch and mmaction2: complete, for a strict load;
    the TSN files of X-Temporal, tsn-pytorch, temporal-shift-module and mmaction2, and torchvision's ImageNet ResNets:
    the backbone alone, without the classifier."""
    tensors = next((checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), dict)), checkpoint)
    ours = {key: next((m.expand(name) for pattern, name in KEYS if (m := re.fullmatch(pattern, key))), None)
            for key in tensors}
    rest = [key for key, name in ours.items() if name is None]
    if rest or not ours:
        raise ValueError(f"{__name__}.py has no place for {len(rest)} of {len(ours)} keys: {', '.join(rest[:3])} ...")
    state = {ours[key]: tensor for key, tensor in tensors.items()}
    if not any(key.startswith("relations.") for key in state):  # of another network, whose classifier is no frame layer
        state = {key: tensor for key, tensor in state.items() if not key.startswith("frame.")}
    for key in [key for key in state if key.endswith("running_var")]:  # PyTorch before 0.4.1 did not count batches
        state.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return state
