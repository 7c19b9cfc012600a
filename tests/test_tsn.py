"""TSN sees every frame by itself and averages the logits; all its backbones are their authors'.

    python -m pytest tests/test_tsn.py

The tests follow tsn.py from top to bottom: four frames by hand, a loop over frames, the answers of
the original code with every backbone, other people's weights. test_models.py has what is the same
for all model files. Networks that would take long to fill with numbers have shapes only (PyTorch's
device "meta").
"""
import pytest
import torch
import torch.nn as nn

import tsn
from conftest import close, drawn_clip, fill, golden, golden_names


def shapes_only(backbone):
    """A TSN without values, for evaluation."""
    with torch.device("meta"):
        return tsn.TSN(313, segments=5, backbone=backbone).eval()


# ---- the network -----------------------------------------------------------------------------

@torch.no_grad()
def test_four_frames_by_hand():
    """A frame is one pixel, and f of a frame is 2 x its red + 1. The video is their mean."""
    model = tsn.TSN(1, segments=4, backbone="resnet18").eval()
    model.backbone = nn.Flatten()  # the features of a pixel are its red, green and blue
    model.fc = nn.Linear(3, 1)
    model.fc.weight.copy_(torch.tensor([[2.0, 0.0, 0.0]]))
    model.fc.bias.fill_(1)

    clip = torch.zeros(1, 4, 3, 1, 1)
    clip[0, :, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert model(clip).item() == (3 + 5 + 7 + 21) / 4

    # in another order they have the same mean
    assert model(clip[:, [3, 0, 2, 1]]).item() == (21 + 3 + 7 + 5) / 4


@torch.no_grad()
def test_a_video_is_a_loop_over_single_frames():
    model = fill(tsn.TSN(6, segments=3, backbone="resnet18")).eval()
    clip = drawn_clip((2, 3, 3, 40, 32), seed=1)

    for video in range(2):
        total = 0
        for t in range(3):
            frame = clip[video, t].unsqueeze(0)  # (1, 3, H, W)
            total = total + model.fc(model.backbone(frame))[0]
        close(model(clip)[video], total / 3, 1e-5)


def test_a_backbone_that_is_not_a_resnet_is_refused():
    with pytest.raises(ValueError, match="backbone vgg11 is not one of torchvision's ResNets"):
        shapes_only("vgg11")


# ---- the answers of the original code --------------------------------------------------------

@pytest.mark.parametrize("name", golden_names("tsn"))
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    case = golden(name)
    model = shapes_only(case.options["backbone"])
    model.fc = nn.Linear(model.fc.in_features, case.options["num_classes"])
    model.load_state_dict(tsn.convert(case.checkpoint), assign=True)
    close(model(case.clip), case.arrays["logits"])


@pytest.mark.parametrize("pixels, sides", [
    (299, [35, 17, 8]),  # the size that it was made for
    (224, [25, 12, 5]),  # the report's: here the pools do not fit, and leave out the last row
])
def test_sides_of_the_maps_of_inception_resnet_v2(pixels, sides):
    """After each of its three stages."""
    x = torch.empty(1, 3, pixels, pixels, device="meta")
    seen = []
    for name, part in shapes_only("inception_resnet_v2").backbone.named_children():
        x = part(x)
        if name.startswith("repeat"):
            seen.append(x.shape[-1])
    assert seen == sides


# ---- other people's weights ------------------------------------------------------------------

@pytest.mark.parametrize("backbone", ["inception_resnet_v2", "senet154"])
def test_a_backbone_keeps_the_names_of_its_image_network(backbone):
    """ImageNet files have no prefix, mmaction2 has backbone, X-Temporal has base_model."""
    for key in shapes_only(backbone).state_dict():
        bare = key.removeprefix("backbone.")
        for prefix in ["", "backbone.", "base_model."]:
            assert tsn.our_name(prefix + bare) == key


@pytest.mark.parametrize("backbone, classifier, classes", [
    ("inception_resnet_v2", "classif", 1000),  # timm
    ("inception_resnet_v2", "last_linear", 1001),  # Cadene, whose class 0 is the background
    ("senet154", "last_linear", 1000),  # both
])
def test_an_imagenet_file_gives_all_but_the_classifier(backbone, classifier, classes):
    expected = shapes_only(backbone).state_dict()
    del expected["fc.weight"], expected["fc.bias"]

    file = {key.removeprefix("backbone."): tensor for key, tensor in expected.items()}
    file[f"{classifier}.weight"] = torch.empty(classes, 1)
    file[f"{classifier}.bias"] = torch.empty(classes)

    state = tsn.convert(file)
    assert state.keys() == expected.keys()
    for key in state:
        assert state[key] is expected[key]

    # a TSN with as many classes keeps its own classifier
    assert "fc.weight" in tsn.convert({"fc.weight": torch.empty(classes, 1)})


@pytest.mark.parametrize("key", [
    "layer1.0.se.fc1.weight",  # timm's other SENet-154
    "base_model.conv1_7x7_s2.weight",  # BNInception
    "base_model.layer1.0.conv1.net.weight",  # TSM
    "fc_verb.weight",  # two classifiers
    "xbackbone.conv1.weight",  # a known name has to match from the first letter ...
    "backbone.conv1.weight.x",  # ... to the last
])
def test_another_networks_file_is_refused(key):
    file = {"module.base_model.bn1.weight": torch.zeros(64), f"module.{key}": torch.zeros(1)}
    with pytest.raises(ValueError, match=f"tsn.py has no place for the key module.{key}$"):
        tsn.convert({"state_dict": file})
