"""TSN sees every frame by itself and averages the logits; all its backbones are their authors'.

    python -m pytest tests/test_tsn.py

By hand, then the answers of the original code with every backbone. test_models.py has what is the
same for all model files.
"""
import pytest
import torch
import torch.nn as nn

import tsn
from conftest import close, golden, golden_names


def shapes_only(backbone):
    """A TSN without values, on PyTorch's device "meta", since large networks take long to fill."""
    with torch.device("meta"):
        return tsn.TSN(313, backbone=backbone).eval()


@torch.no_grad()
def test_four_frames_by_hand():
    """A frame is one pixel, and f of a frame is 2 x its red + 1. The video is their mean."""
    model = tsn.TSN(1, frames=4, backbone="resnet18").eval()
    model.backbone = nn.Flatten()  # the features of a pixel are its red, green and blue
    model.fc = nn.Linear(3, 1)
    model.fc.weight.copy_(torch.tensor([[2.0, 0.0, 0.0]]))
    model.fc.bias.fill_(1)

    clip = torch.zeros(1, 4, 3, 1, 1)
    clip[0, :, 0, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert model(clip).item() == (3 + 5 + 7 + 21) / 4
    assert model(clip[:, [3, 0, 2, 1]]).item() == (21 + 3 + 7 + 5) / 4  # in another order


@pytest.mark.parametrize("name", golden_names("tsn"))
@torch.no_grad()
def test_logits_are_those_of_the_authors(name):
    case = golden(name)
    model = shapes_only(case.options["backbone"])
    model.fc = nn.Linear(model.fc.in_features, case.options["num_classes"])
    model.load_state_dict(tsn.convert(case.tensors), assign=True)
    close(model(case.clip), case.arrays["logits"])


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
    assert tsn.convert(file) == expected

    # a TSN with as many classes keeps its own classifier
    file = {"backbone.conv1.weight": torch.empty(1), "fc.bias": torch.empty(classes)}
    assert tsn.convert(file) == file
