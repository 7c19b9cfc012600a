"""TSN, the Temporal Segment Network: a 2D network sees every frame by itself; logits are averaged.

A clip is the T frames that a network sees. Here they come from T equal parts (segments) of the
video, one from each; data.py picks them. TSN is the simplest of the five models, and the one that
the others are measured against.

Report: the team's report on the M-MiT challenge, arXiv 2003.05837, section 1.1 and Table 1.
Paper: Wang and others, "Temporal Segment Networks", arXiv 1608.00859.

    Four frames a b c d. The network f is the same for every frame.

    frame         0          1          2          3
    logits        f(a)       f(b)       f(c)       f(d)       no frame sees another
    video         ( f(a)  +  f(b)   +   f(c)  +   f(d) ) / 4  so their order does not matter

B clips, T frames, H height, W width, K classes, D features per frame.
"""
import re
from collections import OrderedDict

import torch
import torch.nn as nn
import torchvision


class TSN(nn.Module):
    """clip (B, T, 3, H, W), normalised -> logits (B, K).

    frames: T. A clip of another length raises a ValueError; TSN could average any number of frames,
    but a wrong one is a mistake in the recipe.
    backbone: resnet18, resnet50 or resnet101 of torchvision, inception_resnet_v2 or senet154.
    dropout: a probability.
    """

    def __init__(self, num_classes, frames=5, backbone="resnet101", dropout=0.5):
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

    def features(self, clip):
        """clip (B, T, 3, H, W) -> what the classifier sees of each frame, (B, T, D)."""
        frames = clip.shape[1]
        if frames != self.frames:
            raise ValueError(f"the network takes clips of {self.frames} frames, got {frames}")

        x = clip.flatten(0, 1)  # (B*T, 3, H, W): to the 2D network a frame is an image
        x = self.backbone(x)  # (B*T, D)
        return x.unflatten(0, (-1, self.frames))  # (B, T, D)

    def forward(self, clip):
        x = self.features(clip)  # (B, T, D)
        x = self.dropout(x)
        x = self.fc(x)  # (B, T, K), the logits of every frame
        return x.mean(dim=1)  # (B, K)


def build(recipe, num_classes):
    """The network of a row of RECIPES."""
    return TSN(
        num_classes,
        frames=recipe["frames"],
        backbone=recipe["backbone"],
        dropout=recipe["dropout"],
    )


# The rows of the report's Table 1, and the toy. A row holds what build() needs, and what differs
# from the settings in data.py, evaluate.py and train.py. In a comment, "report" means that the
# report gives the value. "ours" means that it does not; then comes our source, or the reason.
SHARED = dict(dropout=0.5)  # probability, before the classifier; report
# Of Inception-ResNet-v2 and SENet-154, torchvision has no ImageNet weights: train from scratch
# (init "none"; ours), or pass a public file with --init. Public weights of Inception-ResNet-v2
# expect this mean and std.
HALF = (0.5, 0.5, 0.5)
INCEPTION = dict(backbone="inception_resnet_v2", mean=HALF, std=HALF)
RECIPES = {
    "r101_5f": dict(SHARED, frames=5, backbone="resnet101"),  # report
    "inception_resnet_v2_5f": dict(SHARED, frames=5, init="none", **INCEPTION),  # report
    "senet154_5f": dict(SHARED, frames=5, init="none", backbone="senet154"),  # report
    "toy": dict(SHARED, frames=8, backbone="resnet18"),  # ours: small videos that data.py draws
}

# mAP in percent on the validation set, with one view (clip and crop) of each video; report, Table 1
REPORTED = {"r101_5f": 58.92, "inception_resnet_v2_5f": 57.45, "senet154_5f": 53.19}


# ==== Skip on first reading: other people's weights; Inception-ResNet-v2 and SENet-154 ============

# ---- the 2D network ------------------------------------------------------------------------------

def image_network(name):
    """The 2D network of this name, with random weights and a classifier `fc`."""
    if name == "inception_resnet_v2":
        return inception_resnet_v2()
    if name == "senet154":
        return senet154()

    network = torchvision.models.get_model(name, weights=None)
    if not isinstance(network, torchvision.models.ResNet):
        raise ValueError(f"backbone {name} is not one of torchvision's ResNets")
    return network


# ---- public weights ------------------------------------------------------------------------------
#
#     python evaluate.py --model tsn --weights FILE FLAGS --data DATA
#
# train.py --init FILE reads the same files. Where they are published, which networks, which FLAGS:
#
#   github.com/Sense-X/X-Temporal, ModelZoo.md
#       ResNet-101 for M-MiT                        none
#   github.com/open-mmlab/mmaction2, tsn_r101_1x1x5_50e_mmit_rgb_20200618-642f450d.pth
#       ResNet-101 for M-MiT                        --test-crop 256
#   github.com/open-mmlab/mmaction2, model zoo 1.x
#       ResNet-50                                   --backbone resnet50 --frames 8
#   github.com/mit-han-lab/temporal-shift-module
#       ResNet-50                                   --backbone resnet50 --frames 8
#   github.com/yjxiong/tsn-pytorch
#       ResNet-101                                  none
#   github.com/zhoubolei/moments_models
#       ResNet-50 of one frame                      --backbone resnet50 --frames 1
#   timm, and github.com/Cadene/pretrained-models.pytorch: ImageNet, for train.py --init alone
#       legacy_senet154, senet154 in Cadene's       --recipe senet154_5f
#       inception_resnet_v2                         --recipe inception_resnet_v2_5f
#
# A network for videos of one label each, as of Kinetics, needs --loss ce too. The number of frames,
# sizes and normalisation leave no trace in a file, so nothing can notice a wrong one. What does not
# load: networks on BNInception or InceptionV3, timm's senet154.gluon_in1k, files of MMAction 0.x.


# ---- their names and ours ------------------------------------------------------------------------

# Patterns of their keys, and our names for them. A pattern must match the whole key, so that the
# files of other networks are refused.
#   base_model.          X-Temporal, tsn-pytorch, temporal-shift-module
#   .conv. and .bn.      mmaction2, where a convolution and its batch norm are one module
BACKBONE = r"(?:base_model\.|backbone\.)?"
BLOCK = BACKBONE + r"(layer[1-4]\.\d+)\."
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
SENET = r"(layer0\.(?:conv|bn)[123]|layer[1-4]\.\d+\.se_module\.fc[12])\."
INCEPTION_RESNET = (
    r"((?:conv2d_\d[ab]|mixed_\d[ab]|repeat(?:_[12])?\.\d+|block8)"  # a unit, or a block ...
    r"(?:\.branch\d(?:\.\d)?)?"  # ... its branch, and a unit of that
    r"\.(?:conv|conv2d|bn))\."
)
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

    # the two large networks; the other names of SENet-154 are a ResNet's
    (BACKBONE + SENET + NORM, r"backbone.\1.\2"),
    (BACKBONE + INCEPTION_RESNET + NORM, r"backbone.\1.\2"),

    # the classifier; in ImageNet's files classif (timm) or last_linear (Cadene)
    (r"(?:fc|new_fc|base_model\.fc|cls_head\.fc_cls)\.(weight|bias)", r"fc.\1"),
    (BACKBONE + r"(?:fc|classif|last_linear)\.(weight|bias)", r"fc.\1"),
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

    - ours, and the TSN files of X-Temporal, tsn-pytorch, temporal-shift-module, mmaction2 and
      moments_models, also around a backbone with timm's or Cadene's names: complete
    - the ImageNet files of torchvision, timm and Cadene: the backbone alone

    evaluate.tensors_of takes the tensors out of a file. Without it:
    {key.removeprefix("module."): x for key, x in torch.load(FILE)["state_dict"].items()}
    """
    state = {}
    for key, tensor in tensors.items():
        state[our_name(key)] = tensor

    # An ImageNet file has one of these keys. Its classifier, for 1,000 classes (1,001 in one of
    # Cadene's files), is left out.
    first_keys = {"conv1.weight", "conv2d_1a.conv.weight", "layer0.conv1.weight"}
    if first_keys & tensors.keys() and len(state.get("fc.bias", [])) in (1000, 1001):
        del state["fc.weight"], state["fc.bias"]
    return state


# ---- two backbones for one row each --------------------------------------------------------------

# Their modules have the names of the public weights. As in torchvision's networks, the last one is
# a classifier `fc` for 1,000 classes, which TSN takes off.

def unit(inputs, outputs, kernel, stride=1, padding=0):
    """Convolution, batch norm, ReLU: the unit that Inception-ResNet-v2 is made of.

    Kernels are (height, width). eps is that of TensorFlow, where the public weights come from.
    """
    return nn.Sequential(OrderedDict(
        conv=nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        bn=nn.BatchNorm2d(outputs, eps=1e-3),
        relu=nn.ReLU(inplace=True),
    ))


class Inception(nn.Module):
    """Several branches see the same map x (N, C, H, W); their results are concatenated."""

    def __init__(self, *branches):
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x):
        # by name, since a ResidualInception has a convolution, conv2d, beside its branches
        results = []
        for name, module in self.named_children():
            if name.startswith("branch"):
                results.append(module(x))
        return torch.cat(results, dim=1)


class ResidualInception(Inception):
    """A residual block: x + scale * conv2d(the concatenated branches), then, with relu, a ReLU.

    conv2d is a 1x1 convolution that brings the result back to the channels of x (N, C, H, W).
    """

    def __init__(self, *branches, conv2d, scale, relu=True):
        super().__init__(*branches)
        self.conv2d = conv2d
        self.scale = scale
        self.relu = relu

    def forward(self, x):
        y = super().forward(x)
        y = self.conv2d(y)
        y = x + self.scale * y
        if self.relu:
            y = torch.relu(y)
        return y


def inception_35():
    """The block for maps of 35 x 35 (25 x 25 if the image has 224 pixels instead of 299)."""
    return ResidualInception(
        unit(320, 32, 1),
        nn.Sequential(
            unit(320, 32, 1),
            unit(32, 32, 3, padding=1),
        ),
        nn.Sequential(
            unit(320, 32, 1),
            unit(32, 48, 3, padding=1),
            unit(48, 64, 3, padding=1),
        ),
        conv2d=nn.Conv2d(128, 320, 1),
        scale=0.17,
    )


def inception_17():
    """The block for maps of 17 x 17 (12 x 12 if the image has 224 pixels instead of 299)."""
    return ResidualInception(
        unit(1088, 192, 1),
        nn.Sequential(
            unit(1088, 128, 1),
            unit(128, 160, (1, 7), padding=(0, 3)),
            unit(160, 192, (7, 1), padding=(3, 0)),
        ),
        conv2d=nn.Conv2d(384, 1088, 1),
        scale=0.1,
    )


def inception_8(scale=0.2, relu=True):
    """The block for maps of 8 x 8 (5 x 5 if the image has 224 pixels instead of 299)."""
    return ResidualInception(
        unit(2080, 192, 1),
        nn.Sequential(
            unit(2080, 192, 1),
            unit(192, 224, (1, 3), padding=(0, 1)),
            unit(224, 256, (3, 1), padding=(1, 0)),
        ),
        conv2d=nn.Conv2d(448, 2080, 1),
        scale=scale,
        relu=relu,
    )


def inception_resnet_v2():
    """Inception-ResNet-v2: Szegedy and others, arXiv 1602.07261.

    Images (N, 3, H, W), H and W at least 75 -> (N, 1000). It was made for 299 pixels; the report
    gave it 224.
    """
    return nn.Sequential(OrderedDict(
        # the first layers
        conv2d_1a=unit(3, 32, 3, stride=2),
        conv2d_2a=unit(32, 32, 3),
        conv2d_2b=unit(32, 64, 3, padding=1),
        maxpool_3a=nn.MaxPool2d(3, stride=2),
        conv2d_3b=unit(64, 80, 1),
        conv2d_4a=unit(80, 192, 3),
        maxpool_5a=nn.MaxPool2d(3, stride=2),

        # 35 x 35 maps of 320 channels
        mixed_5b=Inception(
            unit(192, 96, 1),
            nn.Sequential(
                unit(192, 48, 1),
                unit(48, 64, 5, padding=2),
            ),
            nn.Sequential(
                unit(192, 64, 1),
                unit(64, 96, 3, padding=1),
                unit(96, 96, 3, padding=1),
            ),
            nn.Sequential(
                nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
                unit(192, 64, 1),
            ),
        ),
        repeat=nn.Sequential(*[inception_35() for _ in range(10)]),

        # 17 x 17 maps of 1088 channels
        mixed_6a=Inception(
            unit(320, 384, 3, stride=2),
            nn.Sequential(
                unit(320, 256, 1),
                unit(256, 256, 3, padding=1),
                unit(256, 384, 3, stride=2),
            ),
            nn.MaxPool2d(3, stride=2),
        ),
        repeat_1=nn.Sequential(*[inception_17() for _ in range(20)]),

        # 8 x 8 maps of 2080 channels
        mixed_7a=Inception(
            nn.Sequential(
                unit(1088, 256, 1),
                unit(256, 384, 3, stride=2),
            ),
            nn.Sequential(
                unit(1088, 256, 1),
                unit(256, 288, 3, stride=2),
            ),
            nn.Sequential(
                unit(1088, 256, 1),
                unit(256, 288, 3, padding=1),
                unit(288, 320, 3, stride=2),
            ),
            nn.MaxPool2d(3, stride=2),
        ),
        repeat_2=nn.Sequential(*[inception_8() for _ in range(9)]),
        block8=inception_8(scale=1.0, relu=False),
        conv2d_7b=unit(2080, 1536, 1),

        # Cadene's port pools by a window of 8 x 8, which fits 299 pixels only.
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(1536, 1000),
    ))


class SEBottleneck(nn.Module):
    """SENet-154's residual block of width p: (N, inputs, H, W) -> (N, 4p, H/stride, W/stride)."""

    def __init__(self, inputs, p, stride=1, downsample=None):
        super().__init__()

        # the main path
        self.conv1 = nn.Conv2d(inputs, 2 * p, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * p)
        self.conv2 = nn.Conv2d(2 * p, 4 * p, 3, stride, padding=1, groups=64, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * p)
        self.conv3 = nn.Conv2d(4 * p, 4 * p, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * p)

        # "squeeze and excitation": a weight for every channel, from the means of all channels
        self.se_module = nn.Sequential(OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1),
            fc1=nn.Conv2d(4 * p, p // 4, 1),
            relu=nn.ReLU(inplace=True),
            fc2=nn.Conv2d(p // 4, 4 * p, 1),
            sigmoid=nn.Sigmoid(),
        ))

        # the shortcut; None means x itself
        self.downsample = downsample

    def forward(self, x):
        y = self.conv1(x)
        y = torch.relu(self.bn1(y))
        y = self.conv2(y)
        y = torch.relu(self.bn2(y))
        y = self.conv3(y)
        y = self.bn3(y)

        # the weights are (N, 4p, 1, 1)
        y = y * self.se_module(y)

        if self.downsample is not None:
            x = self.downsample(x)
        return torch.relu(y + x)


def senet_layer(inputs, p, blocks, shortcut_kernel=3, stride=2):
    """One of SENet-154's four stages: (N, inputs, H, W) -> (N, 4p, H/stride, W/stride)."""
    # The first block changes the map's channels and size, so its shortcut needs a convolution.
    padding = shortcut_kernel // 2
    shortcut = nn.Sequential(
        nn.Conv2d(inputs, 4 * p, shortcut_kernel, stride, padding, bias=False),
        nn.BatchNorm2d(4 * p),
    )

    layer = nn.Sequential(SEBottleneck(inputs, p, stride, shortcut))
    for _ in range(blocks - 1):
        layer.append(SEBottleneck(4 * p, p))
    return layer


def senet154():
    """SENet-154: Hu, Shen and Sun, arXiv 1709.01507. Images (N, 3, H, W) -> (N, 1000).

    timm calls it legacy_senet154. The network that timm calls senet154 has another max pool, and
    its weights have other names.
    """
    return nn.Sequential(OrderedDict(
        layer0=nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(64, 64, 3, stride=1, padding=1, bias=False),
            bn2=nn.BatchNorm2d(64),
            relu2=nn.ReLU(inplace=True),
            conv3=nn.Conv2d(64, 128, 3, stride=1, padding=1, bias=False),
            bn3=nn.BatchNorm2d(128),
            relu3=nn.ReLU(inplace=True),
            # padding=1 in place of ceil_mode would give maps of the same size, but other values
            pool=nn.MaxPool2d(3, stride=2, ceil_mode=True),
        )),
        layer1=senet_layer(128, 64, blocks=3, shortcut_kernel=1, stride=1),
        layer2=senet_layer(256, 128, blocks=8),
        layer3=senet_layer(512, 256, blocks=36),
        layer4=senet_layer(1024, 512, blocks=3),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(2048, 1000),
    ))
