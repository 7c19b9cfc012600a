"""TSN, the Temporal Segment Network: a 2D network sees one frame of each of T equal parts of the video, every frame by
itself, and the logits are averaged. The simplest of the five, and what the other four are measured against.

Report: arXiv 2003.05837, Table 1. Paper: Wang and others, "Temporal Segment Networks", arXiv 1608.00859.

    what four frames a b c d become, with f for the network, the same for every frame:

    frame         0          1          2          3
    logits        f(a)       f(b)       f(c)       f(d)       no frame knows of another
    video         ( f(a)  +  f(b)   +   f(c)  +   f(d) ) / 4  so their order cannot matter

B clips, T frames, C channels, H height, W width, K classes, D features per frame.
"""
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torchvision

REPORT = dict(
    frames=5, backbone="resnet101",  # T; or resnet18, resnet50, inception_resnet_v2, senet154; report, Table 1
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
    published_map=58.92,  # percent, validation, one view; report, Table 1
)
RECIPES = {
    "r101_5f": REPORT,
    "inception_resnet_v2_5f": {
        **REPORT, "backbone": "inception_resnet_v2", "published_map": 57.45, "init": "none",  # torchvision has none
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),  # as its public weights; with ImageNet's they run, but worse
    },
    "senet154_5f": {**REPORT, "backbone": "senet154", "published_map": 53.19, "init": "none"},  # none: same reason
    "toy": {
        **REPORT, "backbone": "resnet18", "frames": 8,  # as the others': what they gain then comes from frame order
        "init": "none", "published_map": None,  # from nothing: enough here, and no download
        "crop": 32, "augment": "jitter", "jitter": (36, 36),  # TSN's own smaller crops would cut off what moves
        "test_resize": 36, "test_crop": 32, "scales": (32,),  # of 40x36; at 36 the last map is 2x2, not 1x1: mAP falls
        "flip": False,  # a mirrored video moves the other way: the flip would swap two labels
        "loss_scale": 10 / 1.7,  # classes / labels per video: what 160 is to 313 classes with 1.96 labels
        "batch": 16, "reference_batch": 16, "lr": 0.03, "schedule": "cosine", "epochs": 9,  # minutes on a laptop
    },
}


class TSN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K). backbone: see REPORT. A ValueError for a clip of another T."""

    def __init__(self, num_classes, segments=5, backbone="resnet101", dropout=0.5):
        super().__init__()
        self.frames = segments  # the paper's word for T
        ours = {"inception_resnet_v2": inception_resnet_v2, "senet154": senet154}
        self.backbone = ours[backbone]() if backbone in ours else torchvision.models.get_model(backbone, weights=None)
        self.fc = nn.Linear(self.backbone.fc.in_features, num_classes)
        nn.init.normal_(self.fc.weight, std=0.001)
        nn.init.zeros_(self.fc.bias)
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the classifier sees of each frame, (B, T, D)."""
        if clip.shape[1] != self.frames:
            raise ValueError(f"the network takes clips of {self.frames} frames, got {clip.shape[1]}")
        x = clip.flatten(0, 1)  # (B*T, 3, H, W): to the 2D network a frame is an image
        return self.backbone(x).unflatten(0, (-1, self.frames))  # (B, T, D)

    def forward(self, clip):
        return self.fc(self.dropout(self.features(clip))).mean(dim=1)  # (B, T, K) -> (B, K): logits are averaged


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TSN(num_classes, recipe["frames"], recipe["backbone"], recipe["dropout"])


# Other people's keys -> ours. Only whole keys: to cut out a word wherever it stands (.net, .conv) would take in other
# networks, which have it elsewhere. (.conv. and .bn. are mmaction2's.)
BACKBONE = r"(?:module\.)?(?:(?:base_model|backbone)\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
KEYS = [
    (BACKBONE + r"conv1\.(?:conv\.)?weight", r"backbone.conv1.weight"),
    (BACKBONE + r"(?:bn1|conv1\.bn)\." + NORM, r"backbone.bn1.\1"),
    (BLOCK + r"conv([123])\.(?:conv\.)?weight", r"backbone.\1.conv\2.weight"),
    (BLOCK + r"(?:bn([123])|conv([123])\.bn)\." + NORM, r"backbone.\1.bn\2\3.\4"),
    (BLOCK + r"downsample\.(?:0|conv)\.weight", r"backbone.\1.downsample.0.weight"),
    (BLOCK + r"downsample\.(?:1|bn)\." + NORM, r"backbone.\1.downsample.1.\2"),
    (r"(?:module\.)?(?:fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"fc.\1"),
]


def convert(checkpoint):
    """What was read from a checkpoint file -> a state dict in our names. ValueError for a layout that is none of these:
    ours and the TSN files of X-Temporal, tsn-pytorch, temporal-shift-module, mmaction2 and moments_models, also with
    timm's or Cadene's names behind "backbone.": complete, for a strict load;
    the ImageNet files of torchvision, timm and Cadene: the backbone alone."""
    tensors = next((checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), dict)), checkpoint)
    if {"conv1.weight", "conv2d_1a.conv.weight", "layer0.conv1.weight"} & set(tensors):  # an image network's own file
        tensors = {key: x for key, x in tensors.items() if not key.startswith(("fc.", "classif.", "last_linear."))}
    ours = {key: next((m.expand(name) for pattern, name in KEYS if (m := re.fullmatch(pattern, key))), None)
            for key in tensors}
    rest = [key for key, name in ours.items() if name is None]
    if rest or not ours:
        raise ValueError(f"{__name__}.py has no place for {len(rest)} of {len(ours)} keys: {', '.join(rest[:3])} ...")
    state = {ours[key]: tensor for key, tensor in tensors.items()}
    for key in [key for key in state if key.endswith("running_var")]:  # PyTorch before 0.4.1 did not count batches
        state.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return state


# ---- skip on first reading: two backbones that serve one table row each ----------------------------------------------
# Their names are the public weights' own. As in torchvision's, the last is an `fc` for 1,000 classes: TSN takes it off.

SENET = BACKBONE + r"(layer0\.(?:conv|bn)[123]|layer[1-4]\.\d+\.se_module\.fc[12])\."  # beside a ResNet's names
INCEPTION = BACKBONE + (r"((?:conv2d_\d[ab]|mixed_\d[ab]|repeat(?:_[12])?\.\d+|block8)(?:\.branch\d(?:\.\d)?)?"
                        r"\.(?:conv|conv2d|bn))\.")
KEYS += [
    (SENET + NORM, r"backbone.\1.\2"),
    (INCEPTION + NORM, r"backbone.\1.\2"),
    (BACKBONE + r"(?:fc|classif|last_linear)\.(weight|bias)", r"fc.\1"),  # where a file has left it in the backbone
]


def unit(inputs, outputs, kernel, stride=1, padding=0):
    """Convolution, batch norm, ReLU: what Inception-ResNet-v2 is made of. eps is TensorFlow's, where it was trained."""
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(outputs, eps=1e-3),
        relu=nn.ReLU(inplace=True),
    ))


class Inception(nn.Module):
    """What several branches make of one map, concatenated. With `project`, a 1x1 convolution of that back to the map's
    channels, it is a residual block: x + scale * project(...), and ReLU. x (N, C, H, W)."""

    def __init__(self, *branches, project=None, scale=1.0, relu=True):
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)
        self.conv2d = project
        self.scale = scale
        self.relu = relu

    def forward(self, x):
        branches = [module for name, module in self.named_children() if name.startswith("branch")]
        y = torch.cat([branch(x) for branch in branches], dim=1)
        if self.conv2d is None:
            return y
        y = x + self.scale * self.conv2d(y)
        return torch.relu(y) if self.relu else y


def inception_resnet_v2():
    """Szegedy and others, arXiv 1602.07261: images (N, 3, H, W), H and W at least 75 -> (N, 1000). Made for 299 pixels;
    the report fed 224. Kernels are (height, width)."""
    def block35():
        return Inception(
            unit(320, 32, 1),
            nn.Sequential(unit(320, 32, 1), unit(32, 32, 3, padding=1)),
            nn.Sequential(unit(320, 32, 1), unit(32, 48, 3, padding=1), unit(48, 64, 3, padding=1)),
            project=nn.Conv2d(128, 320, 1), scale=0.17)

    def block17():
        return Inception(
            unit(1088, 192, 1),
            nn.Sequential(unit(1088, 128, 1), unit(128, 160, (1, 7), padding=(0, 3)),
                          unit(160, 192, (7, 1), padding=(3, 0))),
            project=nn.Conv2d(384, 1088, 1), scale=0.1)

    def block8(scale=0.2, relu=True):
        return Inception(
            unit(2080, 192, 1),
            nn.Sequential(unit(2080, 192, 1), unit(192, 224, (1, 3), padding=(0, 1)),
                          unit(224, 256, (3, 1), padding=(1, 0))),
            project=nn.Conv2d(448, 2080, 1), scale=scale, relu=relu)

    return nn.Sequential(OrderedDict(
        conv2d_1a=unit(3, 32, 3, stride=2),
        conv2d_2a=unit(32, 32, 3),
        conv2d_2b=unit(32, 64, 3, padding=1),
        maxpool_3a=nn.MaxPool2d(3, stride=2),
        conv2d_3b=unit(64, 80, 1),
        conv2d_4a=unit(80, 192, 3),
        maxpool_5a=nn.MaxPool2d(3, stride=2),
        mixed_5b=Inception(
            unit(192, 96, 1),
            nn.Sequential(unit(192, 48, 1), unit(48, 64, 5, padding=2)),
            nn.Sequential(unit(192, 64, 1), unit(64, 96, 3, padding=1), unit(96, 96, 3, padding=1)),
            nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False), unit(192, 64, 1))),
        repeat=nn.Sequential(*[block35() for _ in range(10)]),
        mixed_6a=Inception(
            unit(320, 384, 3, stride=2),
            nn.Sequential(unit(320, 256, 1), unit(256, 256, 3, padding=1), unit(256, 384, 3, stride=2)),
            nn.MaxPool2d(3, stride=2)),
        repeat_1=nn.Sequential(*[block17() for _ in range(20)]),
        mixed_7a=Inception(
            nn.Sequential(unit(1088, 256, 1), unit(256, 384, 3, stride=2)),
            nn.Sequential(unit(1088, 256, 1), unit(256, 288, 3, stride=2)),
            nn.Sequential(unit(1088, 256, 1), unit(256, 288, 3, padding=1), unit(288, 320, 3, stride=2)),
            nn.MaxPool2d(3, stride=2)),
        repeat_2=nn.Sequential(*[block8() for _ in range(9)]),
        block8=block8(scale=1.0, relu=False),
        conv2d_7b=unit(2080, 1536, 1),
        pool=nn.AdaptiveAvgPool2d(1),  # not the 8x8 window of Cadene's port, which fits 299 pixels alone
        flatten=nn.Flatten(),
        fc=nn.Linear(1536, 1000),
    ))


class SEBottleneck(nn.Module):
    """SENet-154's residual block for width p: (N, inputs, H, W) -> (N, 4p, H / stride, W / stride), the main path
    weighted per channel (squeeze and excitation) before the sum."""

    def __init__(self, inputs, p, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 2 * p, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * p)
        self.conv2 = nn.Conv2d(2 * p, 4 * p, 3, stride, padding=1, groups=64, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * p)
        self.conv3 = nn.Conv2d(4 * p, 4 * p, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * p)
        self.se_module = nn.Sequential(OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            fc1=nn.Conv2d(4 * p, p // 4, 1),
            relu=nn.ReLU(inplace=True),
            fc2=nn.Conv2d(p // 4, 4 * p, 1),
            sigmoid=nn.Sigmoid(),
        ))
        self.downsample = downsample

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y * self.se_module(y) + (x if self.downsample is None else self.downsample(x)))


def senet154():
    """Hu, Shen and Sun, arXiv 1709.01507: images (N, 3, H, W) -> (N, 1000). timm calls it legacy_senet154; the weights
    of timm's senet154 belong to a network with another max pool and other names."""
    def stem(inputs, outputs, stride, i):
        return {f"conv{i}": nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                f"bn{i}": nn.BatchNorm2d(outputs), f"relu{i}": nn.ReLU(inplace=True)}

    def layer(inputs, p, blocks, kernel=3, stride=2):  # kernel: the shortcut's, 1x1 in a ResNet
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, 4 * p, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(4 * p))
        return nn.Sequential(SEBottleneck(inputs, p, stride, shortcut),
                             *[SEBottleneck(4 * p, p) for _ in range(blocks - 1)])

    return nn.Sequential(OrderedDict(
        layer0=nn.Sequential(OrderedDict(
            **stem(3, 64, 2, 1), **stem(64, 64, 1, 2), **stem(64, 128, 1, 3),
            pool=nn.MaxPool2d(3, stride=2, ceil_mode=True))),  # padding 1 gives the same size, other values
        layer1=layer(128, 64, blocks=3, kernel=1, stride=1),
        layer2=layer(256, 128, blocks=8),
        layer3=layer(512, 256, blocks=36),
        layer4=layer(1024, 512, blocks=3),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(2048, 1000),
    ))
