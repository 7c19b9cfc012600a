"""tsn.py is the TSN of the original authors: it answers as their own code did, on every backbone, is as large and as
expensive as theirs, and reads the checkpoints of all of them.

    python -m pytest tests/test_tsn.py
"""
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import golden, golden_names

import tsn

BACKBONES = ["resnet50", "resnet101", "inception_resnet_v2", "senet154"]


def shapes_only(backbone, **options):
    """A TSN of 313 classes without numbers, for counting and for key names: it costs no memory and no time."""
    with torch.device("meta"):
        return tsn.TSN(313, backbone=backbone, **options).eval()


def small(segments, **options):
    torch.manual_seed(0)
    return tsn.TSN(6, segments=segments, backbone="resnet18", **options).eval()


# ---- the forward pass


@pytest.mark.parametrize("name", golden_names("tsn"))
def test_answers_as_the_authors_code(name):
    case = golden(name)
    model = tsn.TSN(**case.options).eval()
    model.load_state_dict(tsn.convert(case.checkpoint))
    with torch.no_grad():
        features = model.features(case.clip)
        frame_logits = model.fc(features).numpy()
        logits = model(case.clip).numpy()
    largest = np.abs(case.arrays["logits"]).max()
    assert np.abs(logits - case.arrays["logits"]).max() < 1e-4 * largest
    if "frame_logits" in case.arrays:
        assert np.abs(frame_logits - case.arrays["frame_logits"]).max() < 1e-4 * largest


def test_is_a_loop_over_single_frames():
    model, clip = small(3), torch.randn(2, 3, 3, 40, 32)
    with torch.no_grad():
        logits = model(clip)
        for video in range(2):
            one_by_one = [model.fc(model.backbone(clip[video, t][None]))[0] for t in range(3)]
            torch.testing.assert_close(logits[video], sum(one_by_one) / 3)


def test_order_of_frames_does_not_matter():
    model, clip = small(5), torch.randn(2, 5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(clip[:, [3, 0, 4, 2, 1]]), model(clip))
        assert not torch.allclose(model(clip[:, [0, 0, 1, 2, 3]]), model(clip), rtol=1e-3)  # yet every frame counts


def test_dropout_draws_for_every_frame():
    model, seen = small(4), []
    model.dropout.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    with torch.no_grad():
        model(torch.randn(2, 4, 3, 32, 32))
    assert seen == [(2, 4, 512)]  # mmaction2 draws once per video, (2, 512): the same answer in evaluation only


def test_weights_fit_any_number_of_frames():
    few, many = small(2), small(4)
    many.load_state_dict(few.state_dict())
    clip = torch.randn(1, 2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(many(clip.repeat(1, 2, 1, 1, 1)), few(clip))


def test_another_number_of_frames_is_an_error():
    with pytest.raises(ValueError, match="5 frames, got 10"):  # 10 would divide: two videos mixed without a word
        small(5)(torch.zeros(1, 10, 3, 32, 32))


def test_classifier_starts_small():
    fc = small(2).fc
    assert 0.0009 < fc.weight.std() < 0.0011 and not fc.bias.any()


# ---- size and cost, spec/tsn.md's table, 313 classes


@pytest.mark.parametrize("backbone, parameters, of_backbone, tensors, norms, convolutions", [
    ("resnet50", 24_149_369, 23_508_032, 320, 53, 53),
    ("resnet101", 43_141_497, 42_500_160, 626, 104, 104),
    ("inception_resnet_v2", 54_787_545, 54_306_464, 1306, 204, 244),
    ("senet154", 113_681_321, 113_039_984, 1144, 157, 257),
])
def test_size(backbone, parameters, of_backbone, tensors, norms, convolutions):
    model = shapes_only(backbone)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.backbone.parameters()) == of_backbone
    assert len(model.state_dict()) == tensors
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == norms
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions


@pytest.mark.parametrize("backbone, pixels, giga", [
    ("resnet50", 224, 4.09), ("resnet50", 256, 5.34),
    ("resnet101", 224, 7.80), ("resnet101", 256, 10.19),
    ("inception_resnet_v2", 224, 6.47), ("inception_resnet_v2", 299, 13.16),
    ("senet154", 224, 20.69), ("senet154", 256, 27.02),
])
def test_multiply_adds_per_frame(backbone, pixels, giga):
    model, counts = shapes_only(backbone, segments=2), []

    def count(module, args, output):  # every output value is a sum of so many products
        counts.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.empty(1, 2, 3, pixels, pixels, device="meta"))
    assert sum(counts) / 2 / 1e9 == pytest.approx(giga, abs=0.006)  # two decimals; of 13.155 the table has 13.16


@pytest.mark.parametrize("backbone, pixels, sizes", [
    ("inception_resnet_v2", 299, dict(conv2d_1a=149, conv2d_2b=147, conv2d_3b=73, conv2d_4a=71, mixed_5b=35, repeat=35,
                                      mixed_6a=17, repeat_1=17, mixed_7a=8, block8=8, conv2d_7b=8)),
    ("inception_resnet_v2", 224, dict(conv2d_1a=111, conv2d_2b=109, conv2d_3b=54, conv2d_4a=52, mixed_5b=25, repeat=25,
                                      mixed_6a=12, repeat_1=12, mixed_7a=5, block8=5, conv2d_7b=5)),
    ("inception_resnet_v2", 75, dict(conv2d_7b=1)),
    ("senet154", 224, dict(layer0=56, layer1=56, layer2=28, layer3=14, layer4=7)),
    ("senet154", 64, dict(layer0=16, layer1=16, layer2=8, layer3=4, layer4=2)),
])
def test_map_sizes(backbone, pixels, sizes):
    model, seen = shapes_only(backbone, segments=1), {}
    for name in sizes:
        model.backbone.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output.shape[-1]}))
    model(torch.empty(1, 1, 3, pixels, pixels, device="meta"))
    assert seen == sizes


# ---- checkpoints of other people: spec/tsn.md's table, read from ours to theirs


def base_model(key):  # tsn-pytorch, X-Temporal, temporal-shift-module
    return key.replace("backbone.", "base_model.") if key.startswith("backbone.") else "new_" + key


def base_model_without_dropout(key):
    return "base_model." + key.removeprefix("backbone.")


def mmaction2(key):
    if key.startswith("fc."):
        return "cls_head.fc_cls." + key.removeprefix("fc.")
    key = key.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")
    return re.sub(r"\bbn(\d)\.", r"conv\1.bn.", re.sub(r"\bconv(\d)\.weight", r"conv\1.conv.weight", key))


def mmaction2_foreign(key):  # mmaction2 around another library's backbone
    return key if key.startswith("backbone.") else "cls_head.fc_cls." + key.removeprefix("fc.")


def torchvision_names(key):  # moments_models, and the ImageNet files
    return key.removeprefix("backbone.")


def timm(key):  # its Inception-ResNet-v2
    return key if key.startswith("backbone.") else "backbone.classif." + key.removeprefix("fc.")


def cadene(key):  # both of his, and timm's legacy_senet154
    return key if key.startswith("backbone.") else "backbone.last_linear." + key.removeprefix("fc.")


def ours(key):
    return key


@pytest.mark.parametrize("backbone, rename, prefix, container", [
    ("resnet101", base_model, "module.", "state_dict"),
    ("resnet50", base_model_without_dropout, "module.", "state_dict"),
    ("resnet50", base_model, "module.", "model"),
    ("resnet50", base_model, "", "model"),
    ("resnet50", base_model, "", None),
    ("resnet101", mmaction2, "", "state_dict"),
    ("resnet50", mmaction2, "module.", "state_dict"),
    ("resnet50", torchvision_names, "module.", "state_dict"),
    ("resnet50", mmaction2_foreign, "", "state_dict"),
    ("inception_resnet_v2", mmaction2_foreign, "", "state_dict"),
    ("inception_resnet_v2", timm, "", None),
    ("inception_resnet_v2", cadene, "", None),
    ("inception_resnet_v2", base_model, "module.", "state_dict"),
    ("senet154", cadene, "", None),
    ("senet154", mmaction2_foreign, "", "state_dict"),
    ("resnet18", mmaction2, "", "state_dict"),
    *[(backbone, ours, "", "model") for backbone in ["resnet18", *BACKBONES]],
    ("senet154", ours, "", None),
])
@pytest.mark.parametrize("counted", [True, False], ids=["", "before PyTorch 0.4.1"])
def test_layout(backbone, rename, prefix, container, counted):
    model = shapes_only(backbone)
    wanted = model.state_dict()
    theirs = {prefix + rename(key): tensor for key, tensor in wanted.items()
              if counted or not key.endswith("num_batches_tracked")}
    state = tsn.convert({container: theirs, "epoch": 3, "meta": {}} if container else theirs)
    model.load_state_dict(state, assign=True)
    for key, tensor in wanted.items():
        if counted or not key.endswith("num_batches_tracked"):
            assert state[key] is tensor, key
        else:
            assert state[key] == 0


@pytest.mark.parametrize("backbone, head, classes", [
    ("resnet18", "fc", 1000), ("resnet50", "fc", 1000), ("resnet101", "fc", 1000),
    ("inception_resnet_v2", "classif", 1000),  # timm
    ("inception_resnet_v2", "last_linear", 1001),  # Cadene, with the background
    ("senet154", "last_linear", 1000),  # both
])
def test_imagenet_file_starts_all_but_the_classifier(backbone, head, classes):
    model = shapes_only(backbone)
    wanted = model.state_dict()
    file = {torchvision_names(key): tensor for key, tensor in wanted.items() if key.startswith("backbone.")}
    file |= {f"{head}.weight": torch.empty(classes, 3), f"{head}.bias": torch.empty(classes)}
    state = tsn.convert(file)
    assert wanted.keys() - state.keys() == {"fc.weight", "fc.bias"}
    assert all(wanted[key] is tensor for key, tensor in state.items())


@pytest.mark.parametrize("keys, named", [
    (["conv1.0.weight", "bn1.weight", "layer1.0.se.fc1.weight"], "conv1.0.weight, layer1.0.se.fc1.weight"),  # gluon
    (["module.base_model.conv1_7x7_s2.weight", "module.new_fc.weight"], "conv1_7x7_s2"),  # BNInception
    (["module.base_model.layer1.0.conv1.net.weight", "module.new_fc.weight"], "layer1.0.conv1.net.weight"),  # TSM
    (["backbone.layer1.0.conv1.conv.net2.weight"], "layer1.0.conv1.conv.net2.weight"),  # TIN
    (["interlace.layer1.0.offset_fc1.weight"], "interlace.layer1.0.offset_fc1.weight"),  # TIN, ours
    (["module.base_model.layer2.0.nl.g.weight"], "layer2.0.nl.g.weight"),  # non-local
    (["module.base_model.layer2.net.0.conv1.weight"], "layer2.net.0.conv1.weight"),  # temporal pooling
    (["module.consensus.classifier.1.weight"], "consensus.classifier.1.weight"),  # TRN
    (["module.base_model.conv1.weight", "module.fc_verb.weight", "module.fc_noun.weight"], "fc_verb.weight"),  # EPIC
    (["xbackbone.conv1.weight", "backbone.conv1.weight.x"], "xbackbone.conv1.weight, backbone.conv1.weight.x"),
    (["conv2d_1a.conv.weight.momentum"], "conv2d_1a.conv.weight.momentum"),
    ([], "0 of 0 keys"),
])
def test_refuses_what_it_does_not_know(keys, named):
    file = {key: torch.zeros(1) for key in ["backbone.bn1.weight", *keys]} if keys else {}
    with pytest.raises(ValueError, match=re.escape(named)):
        tsn.convert({"state_dict": file})


# ---- recipes


def test_recipes_are_the_rows_of_the_report():
    assert {name: (recipe["backbone"], recipe["frames"], recipe["published_map"])
            for name, recipe in tsn.RECIPES.items()} == {
        "r101_5f": ("resnet101", 5, 58.92),
        "inception_resnet_v2_5f": ("inception_resnet_v2", 5, 57.45),
        "senet154_5f": ("senet154", 5, 53.19),
        "toy": ("resnet18", 8, None),
    }
    assert next(iter(tsn.RECIPES)) == "r101_5f"  # what --data alone means
    assert [name for name, recipe in tsn.RECIPES.items() if recipe["mean"] == recipe["std"] == (0.5, 0.5, 0.5)] == [
        "inception_resnet_v2_5f"]


def test_build_follows_the_recipe():
    recipe = {**tsn.RECIPES["toy"], "frames": 3, "dropout": 0.25}
    model = tsn.build(recipe, 7)
    assert (model.frames, model.dropout.p, model.fc.out_features, model.fc.in_features) == (3, 0.25, 7, 512)
