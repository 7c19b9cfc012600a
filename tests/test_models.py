"""What all five model files have in common.

    python -m pytest tests/test_models.py

Rows, sizes, behaviour in training, evaluation and export, refusals, and the names of other people's
tensors. From "how a network behaves" on, it is the one of its row "toy", on clips of 32 pixels.
"""
import copy
import functools
import inspect

import pytest
import torch
import torch.nn as nn
import torchvision

import data
import evaluate
import slowfast
import tin
import train
import trn
import tsm
import tsn
from conftest import close, drawn_clip, fill, remember

IMAGE_MODELS = [tsn, trn, tsm, tin]
MODELS = [*IMAGE_MODELS, slowfast]
CLASSES = {tsn: tsn.TSN, trn: trn.TRN, tsm: tsm.TSM, tin: tin.TIN, slowfast: slowfast.SlowFast}


# ---- rows ------------------------------------------------------------------------------------

@pytest.mark.parametrize("module, parameters", [
    (tsn, [43_141_497, 54_787_545, 113_681_321, 11_337_081]),
    (trn, [26_891_215, 14_166_479]),
    (tsm, [24_149_369, 24_149_369, 43_141_497, 11_337_081]),  # a shift has no weights
    (tin, [24_180_377, 43_213_254, 43_220_382, 11_341_137]),
    (slowfast, [62_625_192] * 2 + [60_750_656] * 2 + [60_180_544] * 2 + [11_611_176]),
])
def test_parameters_of_every_row(module, parameters):
    """With M-MiT's 313 classes. But for the toy's, the numbers of the authors' networks."""
    for recipe, expected in zip(module.RECIPES.values(), parameters, strict=True):
        with torch.device("meta"):  # shapes without memory
            model = module.build(recipe, 313).eval()
            clip = torch.empty(1, recipe["frames"], 3, 112, 112)
        assert sum(parameter.numel() for parameter in model.parameters()) == expected
        assert model(clip).shape == (1, 313)


# The figures that the report's text gives, in its sections on training and on results.
BOTH = dict(loss="bce", loss_scale=160, momentum=0.9, dropout=0.5, flip=True)
IMAGE = dict(lr=0.01, schedule="step", milestones=(10, 20), weight_decay=5e-4,
             crop=224, test_crop=224, clips=5, scales=(256,))
VIDEO = dict(lr=0.2, schedule="cosine", iterations=180_000, weight_decay=1e-4, batch=1024,
             sync_bn=True, jitter=(128, 160), crop=112, clips=10, scales=(128, 144, 160))


@pytest.mark.parametrize("name", ["tsn", "trn", "tsm", "tin", "slowfast"])
def test_settings_are_the_reports(name):
    _, recipe = evaluate.open_model(name)  # the first row
    recipe = {**train.RECIPE, **recipe}
    expected = {**BOTH, **(VIDEO if name == "slowfast" else IMAGE)}
    assert {key: recipe[key] for key in expected} == expected


def test_colours_are_normalised_as_the_pretrained_weights_need():
    transforms = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    assert (data.RECIPE["mean"], data.RECIPE["std"]) == (
        tuple(transforms.mean), tuple(transforms.std))


@pytest.mark.parametrize("module", MODELS)
def test_build_hands_every_option_of_a_row_to_the_constructor(module, monkeypatch):
    """Its defaults are those of the first row. No row has a key that nothing reads."""
    first_row = next(iter(module.RECIPES.values()))
    _, *parameters = inspect.signature(CLASSES[module]).parameters.values()
    for parameter in parameters:
        if parameter.name != "shift_every":  # TSM's own default depends on the backbone
            assert parameter.default == first_row[parameter.name]

    monkeypatch.setattr(module, CLASSES[module].__name__, lambda classes, **options: options)
    options = module.build(first_row, 10)
    assert options == {parameter.name: first_row[parameter.name] for parameter in parameters}
    for row in module.RECIPES.values():
        assert row.keys() <= {"frames", *options, *data.RECIPE, *evaluate.RECIPE, *train.RECIPE}


# ---- how a network behaves -------------------------------------------------------------------

@functools.cache
def toy(module):
    """The network of the row "toy", with drawn weights, for evaluation."""
    return fill(module.build(module.RECIPES["toy"], 10)).eval()


def toy_clip(module, videos):
    frames = module.RECIPES["toy"]["frames"]
    return drawn_clip((videos, frames, 3, 32, 32), seed=1)


@pytest.mark.parametrize("module", MODELS)
def test_gradients_reach_every_parameter(module):
    torch.manual_seed(0)
    model = copy.deepcopy(toy(module)).train()
    model(toy_clip(module, videos=2)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), key


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_dropout_1_drops_every_feature(module):
    model = fill(module.build({**module.RECIPES["toy"], "dropout": 1.0}, 10)).train()
    calls = remember(model.dropout)
    model(toy_clip(module, videos=2))
    [(x, y)] = calls
    assert x.any() and not y.any()
    if module == slowfast:  # its 2048 + 256 features of the video
        assert x.shape == (2, 2304)
    else:  # the features of every frame
        assert x.shape == (2, 8, 512)


@pytest.mark.parametrize("module", IMAGE_MODELS)
def test_the_last_layer_over_a_frame_starts_small(module):
    torch.manual_seed(0)
    model = module.build(module.RECIPES["toy"], 313)
    layer = model.frame if module == trn else model.fc
    assert layer.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_a_batch_is_its_videos_one_by_one(module):
    model = toy(module)
    clip = toy_clip(module, videos=2)
    logits = model(clip)
    assert torch.equal(model(clip), logits)  # nothing is drawn at random
    close(torch.cat([model(clip[:1]), model(clip[1:])]), logits, 1e-5)
    if module != tsn:  # which does not see the order of frames
        assert (model(clip.flip(1)) - logits).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_autocast_changes_logits_by_rounding_alone(module):
    """bfloat16 rounds by up to 1/256; about 20 layers add that up to 1 %, or 2 % by chance."""
    clip = toy_clip(module, videos=2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = toy(module)(clip).float()
    close(logits, toy(module)(clip), 0.02)


@pytest.mark.parametrize("module", IMAGE_MODELS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_memory_layout_is_kept_to_the_end(module, layout):
    """No convolution is handed a map, or a gradient, in another order, which it would first copy.

    SlowFast is left out: some of PyTorch's own 3D convolutions on a CPU answer in the plain order.
    """
    model = copy.deepcopy(toy(module)).to(memory_format=layout)
    seen = []
    for key, part in model.backbone.named_modules():
        if isinstance(part, nn.Conv2d) and key != "conv1":  # the first gets the plain clip
            part.register_forward_pre_hook(lambda conv, inputs: seen.append(inputs[0]))
            part.register_full_backward_hook(lambda conv, to_x, to_y: seen.append(to_y[0]))

    clip = toy_clip(module, videos=2)
    logits = model(clip)
    close(logits.detach(), toy(module)(clip).detach(), 1e-5)
    logits.square().sum().backward()
    assert len(seen) == 2 * 19
    for x in seen:
        assert x.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("module", MODELS)
@torch.no_grad()
def test_export_with_any_number_of_videos_and_compilation(module):
    clip = toy_clip(module, videos=3)
    logits = toy(module)(clip)

    videos = torch.export.Dim("videos")
    example = (toy_clip(module, videos=2),)
    exported = torch.export.export(toy(module), example, dynamic_shapes=({0: videos},))
    close(exported.module()(clip), logits, 1e-5)

    # The backend aot_eager needs no compiler on the machine.
    compiled = torch.compile(toy(module), fullgraph=True, backend="aot_eager")
    close(compiled(clip), logits, 1e-5)


# ---- refusals --------------------------------------------------------------------------------

@pytest.mark.parametrize("module", IMAGE_MODELS)
def test_an_unfit_clip_or_backbone_is_refused(module):
    """16 frames would divide by 8, and one video would become two without a word."""
    with pytest.raises(ValueError, match="takes clips of 8 frames, got 16"):
        toy(module)(torch.zeros(1, 16, 3, 32, 32))
    with pytest.raises(ValueError, match="backbone vgg11 is not one of torchvision's ResNets"):
        with torch.device("meta"):
            CLASSES[module](10, backbone="vgg11")


@pytest.mark.parametrize("module, options, message", [
    (trn, dict(frames=1), "2 to 10 frames, got 1$"),  # no pair
    (trn, dict(frames=11), "2 to 10 frames, got 11$"),  # 2,036 tuples
    (tsm, dict(shift_every=0), "shift_every is 0, but must be at least 1"),
    (slowfast, dict(variant="slowfast_16x8"),
     "no variant 'slowfast_16x8', only slowfast_8x8, slowfast_11x8, slowfast_4x16, fast_32x2"),
    (slowfast, dict(depth=18), "no depth 18, only 14, 50, 101, 152, 200"),
    (slowfast, dict(slow_index="nearest"), "no slow_index 'nearest', only stride, linspace"),
])
def test_an_unknown_option_is_refused(module, options, message):
    with pytest.raises(ValueError, match=message):
        CLASSES[module](10, **options)


# ---- other people's weights ------------------------------------------------------------------

@pytest.mark.parametrize("module", MODELS)
def test_our_own_names_are_kept(module):
    """Also a file without counters of batches, as Caffe2 and PyTorch before 0.4.1 wrote it."""
    ours = toy(module).state_dict()
    file = {key: x for key, x in ours.items() if not key.endswith("num_batches_tracked")}
    assert module.convert(ours) == ours
    assert module.convert(file) == file
    module.build(module.RECIPES["toy"], 10).load_state_dict(module.convert(file))  # complete


@pytest.mark.parametrize("module", IMAGE_MODELS)
def test_torchvisions_file_gives_the_backbone_alone(module):
    file = torchvision.models.resnet18().state_dict()
    state = module.convert(file)
    del file["fc.weight"], file["fc.bias"]
    assert state == {f"backbone.{key}": tensor for key, tensor in file.items()}


@pytest.mark.parametrize("module, key, expected", [
    # X-Temporal without dropout
    (tsn, "base_model.fc.bias", "fc.bias"),
    (trn, "base_model.fc.bias", "frame.bias"),  # which is no classifier
    (tsm, "base_model.fc.bias", "fc.bias"),
    (tin, "base_model.fc.bias", "fc.bias"),

    # X-Temporal's large backbones
    (tsn, "base_model.block8.branch1.2.conv.weight", "backbone.block8.branch1.2.conv.weight"),
    (tsn, "base_model.layer0.bn3.bias", "backbone.layer0.bn3.bias"),

    # mmaction2's TIN
    (tin, "backbone.layer3.5.conv1.conv.net2.weight", "backbone.layer3.5.conv1.weight"),
    (tin, "backbone.layer3.5.conv1.conv.net1.offset_net.conv.weight",
     "interlace.layer3.5.offset_conv.weight"),
    (tin, "backbone.layer3.5.conv1.conv.net1.offset_net.fc1.weight",
     "interlace.layer3.5.offset_fc1.weight"),
    (tin, "backbone.layer3.5.conv1.conv.net1.offset_net.fc2.bias",
     "interlace.layer3.5.offset_fc2.bias"),
    (tin, "backbone.layer3.5.conv1.conv.net1.weight_net.conv.bias",
     "interlace.layer3.5.weight_conv.bias"),

    # mmaction2's SlowFast with batch norm in the laterals
    (slowfast, "backbone.slow_path.layer3_lateral.bn.running_mean", "fuse.3.bn.running_mean"),
])
def test_other_peoples_names(module, key, expected):
    """Those that no file in tests/golden has."""
    assert module.our_name(key) == expected


@pytest.mark.parametrize("module, key", [
    (tsn, "layer1.0.se.fc1.weight"),  # timm's other SENet-154
    (tsn, "base_model.layer1.0.conv1.net.weight"),  # TSM
    (trn, "base_model.layer1.0.conv1.net.weight"),  # TSM
    (trn, "consensus.classifiers.0.weight"),  # a deeper TRN, without public weights
    (tsm, "base_model.layer1.0.net.conv1.weight"),  # the shift stands before the whole block
    (tsm, "base_model.layer2.net.0.conv1.net.weight"),  # temporal pooling
    (tsm, "base_model.layer2.0.nl.g.weight"),  # non-local blocks
    (tsm, "base_model.layer1.0.conv1.net2.weight"),  # TIN
    (tin, "base_model.layer2.0.conv12.weight"),  # what deleting ".net" makes of conv1.net2
    (slowfast, "backbone.conv1.weight"),  # our TSN
    (slowfast, "s4.pathway0_nonlocal3.conv_theta.weight"),  # PySlowFast's non-local blocks
    *[(module, "xfc.weight") for module in MODELS],  # a known key matches from its first letter
    *[(module, "fc.weight.x") for module in MODELS],  # to its last
])
def test_a_key_of_another_network_is_named(module, key):
    with pytest.raises(ValueError, match=f"{module.__name__}.py has no place for the key {key}$"):
        module.convert({key: torch.zeros(1)})
