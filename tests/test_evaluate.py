"""evaluate.py: heads, optimizers, augmentation, files of weights, and whole runs."""

import argparse
import copy
import json
import os
import runpy
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

import common
import data
import evaluate
import mae
import maskdistill
import supmim
from conftest import ROOT, draw, golden
from test_train import checkpoint, close, lines, moments, photos, tiny     # noqa: F401, a fixture

VIT = dict(model="micro", image_size=16, patch_size=4)
FROM_CHECKPOINT = dict(model="", image_size=None, patch_size=None)
FAST = dict(epochs=1, batch_size=10, base_lr=0.01)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    for script in (mae, supmim, maskdistill):
        monkeypatch.setitem(script.SIZES, "micro", (16, 2, 2))
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    monkeypatch.setitem(mae.PRESETS, "imagenet", mae.PRESETS["imagenet"] | decoder)
    monkeypatch.setattr(common, "LOG_EVERY", 1)
    monkeypatch.setattr(evaluate, "ADE_CLASSES", 3)


def vit():
    """An encoder as `load_encoder` gives it, untrained."""
    return evaluate.load_encoder(evaluate.Config(**VIT))[0]


def evaluated(protocol, **changes):
    """The result of a run on photos/ (40 images to train on, 10 to test on) in eval-PROTOCOL."""
    settings = dict(data="photos", output=f"eval-{protocol}") | VIT | FAST | changes
    return evaluate.evaluate(evaluate.Config(protocol=protocol, **settings))


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def save_masked_images(count, classes=3, unlabelled=False):
    """Noise of two shapes as ADE20K is laid out; every tenth is one to test on. unlabelled: some
    pixels, not equally many in each mask."""
    random = np.random.RandomState(0)
    for i in range(count):
        height = 16 + i % 2
        image = random.randint(0, 255, (height, 24, 3))
        mask = 1 + random.randint(0, classes, (height, 24))
        if unlabelled:
            mask[random.rand(height, 24) < i / (2 * count)] = 0
        save_masked_image(f"{i:02}", "validation" if i % 10 == 9 else "training", image, mask)


def save_masked_image(name, part, image, mask):
    folder = Path("masks/ADEChallengeData2016")
    save(folder / "images" / part / f"{name}.jpg", image)
    save(folder / "annotations" / part / f"{name}.png", mask)


MASKS = dict(data="ade20k", data_root="masks")


# ------------------------------------------------------------------------------------- optimizers
def test_lars_golden_figures():
    figures = golden("misc")["lars"]
    w, b, x = (torch.nn.Parameter(draw(f"lars/{name}", *shape))
               for name, shape in (("w", (8, 5)), ("b", (8,)), ("x", (16, 5))))
    y = torch.from_numpy(np.random.RandomState(zlib.crc32(b"lars/y")).randint(0, 8, 16))
    optimizer = evaluate.LARS([w, b], figures["lr"], figures["weight_decay"], figures["momentum"],
                              figures["trust_coefficient"])
    for _ in range(figures["steps"]):
        optimizer.zero_grad()
        F.cross_entropy(x.detach() @ w.T + b, y).backward()
        optimizer.step()
    assert w.norm().item() == pytest.approx(figures["w_norm"], rel=1e-6)
    expected = torch.tensor(figures["w_head"])
    torch.testing.assert_close(w.flatten()[:5], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.detach(), torch.tensor(figures["b"]), rtol=1e-5, atol=1e-6)


def test_lars_by_hand():
    w = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    zero = torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = evaluate.LARS([w, zero], lr=0.1)
    for expected in ([[2.9997, 3.9996]], [[2.99913, 3.99884]]):
        w.grad = torch.tensor([[0.6, 0.8]])
        zero.grad = torch.tensor([[1.0, 0.0]])
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor(expected), atol=1e-6, rtol=0)
    # of a zero matrix the first step is a plain one, 0.1; then momentum 0.9 + 0.001 * 0.1 / 1
    expected = torch.tensor([[-0.1 - 0.1 * 0.9001, 0.0]])
    torch.testing.assert_close(zero.detach(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("depth, decay, embed", [
    (12, 0.65, 0.65 ** 13), (24, 0.75, 7.525e-4), (32, 0.75, 7.534e-5)])
def test_layer_decay(depth, decay, embed):
    with torch.device("meta"):
        encoder = mae.VisionTransformer(32, 16, 16, depth, 2)
    model = evaluate.Classifier(encoder, 3, "mean")
    groups = evaluate.layer_decay_groups(model, 0.05, decay)
    settings = {id(p): (group["lr_scale"], group["weight_decay"])
                for group in groups for p in group["params"]}
    found = {name: settings[id(p)] for name, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(found)         # each in one group
    for name in ("pos_embed", "cls_token", "patch_embed.proj.bias"):
        assert found[f"encoder.{name}"] == (pytest.approx(embed, rel=1e-3), 0)
    assert found["encoder.patch_embed.proj.weight"] == (pytest.approx(embed, rel=1e-3), 0.05)
    assert found[f"encoder.blocks.{depth - 1}.mlp.fc1.weight"] == (pytest.approx(decay), 0.05)
    assert found["encoder.blocks.0.norm1.weight"] == (pytest.approx(decay ** depth), 0)
    assert found["head.weight"] == (1, 0.05)
    assert found["fc_norm.bias"] == (1, 0)


@pytest.mark.parametrize("size, patch, tuned, probed", [
    ("base", 16, 86_567_656, 769_000), ("large", 16, 304_326_632, 1_025_000),
    ("huge", 14, 632_045_800, 1_281_000)])
def test_parameter_counts_of_the_paper(size, patch, tuned, probed):
    with torch.device("meta"):
        encoder = mae.VisionTransformer(224, patch, *mae.SIZES[size])
        head = evaluate.LinearHead(mae.SIZES[size][0], 1000)
        classifier = evaluate.Classifier(encoder, 1000, "mean")
    assert common.count_parameters(head) == probed
    assert common.count_parameters(classifier) == tuned


def test_presets_are_the_sources():
    finetune = evaluate.PRESETS["finetune"]
    released = dict(batch_size=1024, epochs=100, warmup_epochs=5, base_lr=5e-4, min_lr=1e-6,
                    weight_decay=0.05, layer_decay=0.65, drop_path=0.1, crop_scale=0.08,
                    randaugment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
    expected = {
        "imagenet": released,
        "imagenet-large": released | dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
        "imagenet-huge": released | dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3),
        "imagenet-amt": released | dict(base_lr=1e-3, layer_decay=0.75),
        "imagenet-distilled": released | dict(base_lr=5e-4 / 4, warmup_epochs=20),
        "imagenet-distilled-large": released | dict(base_lr=5e-4 / 4, epochs=50, layer_decay=0.8,
                                                    drop_path=0.2),
    }
    for name, preset in expected.items():
        assert finetune[name] == preset | dict(workers=12)
    scratch = finetune["imagenet-scratch"]
    assert (scratch["epochs"], scratch["ema"], scratch["beta2"]) == (300, 0.9999, 0.95)
    probe = dict(cached=False, pooling="cls", batch_size=16384, epochs=90, warmup_epochs=10,
                 base_lr=0.1, crop_scale=0.08, workers=12)
    assert evaluate.PRESETS["linear"]["imagenet"] == probe
    for protocol, presets in evaluate.PRESETS.items():   # every one of them can be built, and none
        for name, preset in presets.items():             # repeats another
            evaluate.Config(protocol=protocol, **preset, preset=name)
        assert all(list(presets.values()).count(preset) == 1 for preset in presets.values())


# ------------------------------------------------------------------------------------------ scores
def test_nearest_does_not_depend_on_chunks():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(300, 8, generator=generator)
    test = torch.randn(2300, 8, generator=generator)
    similarity, rows = data.nearest_neighbors(test, train, 7)
    for i in (0, 999, 1000, 2299):
        similarity_alone, rows_alone = data.nearest_neighbors(test[i:i + 1], train, 7)
        assert torch.equal(rows_alone[0], rows[i])
        torch.testing.assert_close(similarity_alone[0], similarity[i], atol=1e-6, rtol=0)
    exact = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    assert (exact.topk(7).indices == rows).float().mean() > 0.999
    assert data.nearest_neighbors(test, train[:3], 7)[0].shape == (2300, 3)


def test_vote_is_that_of_a_softmax():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(500, 20, generator=generator).sort(descending=True).values
    voters = torch.randint(0, 6, (500, 20), generator=generator)
    y = torch.randint(0, 6, (500,), generator=generator)
    votes = torch.zeros(500, 6, dtype=torch.double)
    votes.scatter_add_(1, voters, (similarity.double() / 0.07).softmax(1))
    expected = 100 * (votes.argmax(1) == y).double().mean().item()
    assert data.knn_vote(similarity, voters, y, 6)[0] == pytest.approx(expected, abs=1e-4)


def test_mean_iou_by_hand():
    truth = torch.tensor([0, 1, 1, 1, 2, 255])
    prediction = torch.tensor([0, 0, 1, 1, 2, 0])
    counts = evaluate.confusion(truth, prediction, 4)    # class 3 never occurs and does not count
    assert counts.sum() == 5
    assert evaluate.mean_iou(counts) == pytest.approx(100 * (1 / 2 + 2 / 3 + 1) / 3)
    perfect = evaluate.confusion(truth, truth, 4)
    assert evaluate.mean_iou(perfect) == 100


def test_sliding_window():
    def constant(images):
        return torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(len(images), 2, 32, 32)

    for size in ((32, 32), (32, 47), (50, 90)):
        logits = evaluate.slide(constant, torch.zeros(2, 3, *size), 32, 2)
        assert logits.shape == (2, 2, *size)
        assert (logits[:, 0] == 1).all() and (logits[:, 1] == -2).all()
    images = torch.arange(3 * 40 * 75.0).view(1, 3, 40, 75)
    logits = evaluate.slide(lambda window: window[:, :1], images, 32, 1)
    torch.testing.assert_close(logits, images[:, :1])    # each window where it belongs
    seen = []
    evaluate.slide(lambda window: seen.append(window.shape) or window[:, :1],
                   torch.zeros(1, 3, 512, 683), 512, 1)
    assert seen == 2 * [(1, 3, 512, 512)]                # DINOv2's stride: 341
    assert evaluate.window_starts(683, 512, 341) == [0, 171]
    assert evaluate.window_starts(512, 512, 341) == [0]
    assert evaluate.window_starts(1100, 512, 341) == [0, 341, 588]


# ------------------------------------------------------------------------------------------- heads
def test_batch_norm_of_the_probe_can_be_folded_into_the_linear_layer():
    torch.manual_seed(0)
    head = evaluate.LinearHead(16, 5)
    x = 3 * torch.randn(64, 16) + 2
    for _ in range(100):
        head(x)
    head.eval()
    scale = (head.norm.running_var + 1e-6).rsqrt()
    shift = head.fc.weight @ (scale * head.norm.running_mean)
    folded = F.linear(x, head.fc.weight * scale, head.fc.bias - shift)
    torch.testing.assert_close(head(x), folded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pooling, new_norm", [("mean", True), ("mean", False), ("cls", True)])
def test_what_a_classifier_pools(pooling, new_norm):
    encoder = vit()
    torch.nn.init.normal_(encoder.norm.weight)
    images = torch.randn(2, 3, 16, 16)
    raw = tokens_of(encoder, images)
    normed = encoder.norm(raw)
    pooled = {"mean True": F.layer_norm(raw[:, 1:].mean(dim=1), (16,), eps=1e-6),
              "mean False": normed[:, 1:].mean(dim=1),   # supmim.py's
              "cls True": normed[:, 0]}
    names = {"head.weight", "head.bias"} | encoder.state_dict().keys()
    if (pooling, new_norm) == ("mean", True):
        names = names - {"norm.weight", "norm.bias"} | {"fc_norm.weight", "fc_norm.bias"}
    model = evaluate.Classifier(encoder, 3, pooling, new_norm)
    assert model.head.weight.std() < 4e-5 and encoder.pos_embed.requires_grad
    torch.nn.init.normal_(model.head.weight)             # its own weights would hide differences
    expected = model.head(pooled[f"{pooling} {new_norm}"])
    torch.testing.assert_close(model(images), expected)
    assert {name.removeprefix("encoder.") for name in model.state_dict()} == names


def test_drop_path(monkeypatch):
    torch.manual_seed(0)
    ones = torch.ones(4000, 1)
    scaled = stochastic_depth(ones, 0.3, "row")
    assert scaled.mean().item() == pytest.approx(1, abs=0.05)
    assert scaled.unique().tolist() == pytest.approx([0, 1 / 0.7])
    monkeypatch.setitem(mae.SIZES, "micro", (16, 3, 2))
    encoder = vit()
    images = torch.randn(64, 3, 16, 16)
    expected = encoder.encode(images)
    names = list(encoder.state_dict())
    common.add_drop_path(encoder.blocks, 1.0)            # probabilities 0, 0.5, 1
    assert list(encoder.state_dict()) == names
    encoder.eval()
    torch.testing.assert_close(encoder.encode(images), expected)
    encoder.train()
    changed = []                                         # the share of the images, by block
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, out: changed.append(
            (args[0] != out).flatten(1).any(dim=1).float().mean().item()))
    encoder.encode(images)
    assert changed[0] == 1 and 0.5 < changed[1] < 0.95 and changed[2] == 0


def test_average_is_the_closed_form():
    model = torch.nn.BatchNorm1d(1)
    average = copy.deepcopy(model)
    expected = 1.0                                       # it begins with the weights of the start
    for i, value in enumerate((3.0, 5.0, -2.0)):
        torch.nn.init.constant_(model.weight, value)
        model.running_mean.fill_(i)
        evaluate.update_average(average, model, 0.9)
        expected = 0.9 * expected + 0.1 * value
    assert average.weight.item() == pytest.approx(expected)
    assert average.running_mean.item() == 2              # buffers are copied
    assert model.weight.item() == -2


# ------------------------------------------------------------------------------------ augmentation
def test_randaugment_turns_by_27_degrees_at_most():
    randaugment = data.augment(32, 1.0, randaugment=9).transforms[2]
    assert randaugment.num_ops == 2
    assert (randaugment.magnitude, randaugment.num_magnitude_bins) == (9, 11)
    magnitudes, signed = randaugment._AUGMENTATION_SPACE["Rotate"]
    assert signed and float(magnitudes(11, 32, 32)[9]) == pytest.approx(27)


def test_erasing():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(evaluate.Erase(0.0)(image), image)
    erase = evaluate.Erase(1.0)
    changed = []
    noise = []
    for _ in range(50):
        erased = erase(image)
        assert erased.dtype == torch.uint8
        where = (erased != image).any(0)
        rows = where.any(1).nonzero()
        columns = where.any(0).nonzero()
        box = erased[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1].double()
        assert where.sum() > 0.9 * box[0].numel()        # a whole rectangle, and nothing else
        assert box.std() > 30
        changed.append(where.float().mean().item())
        noise.append(box.flatten(1))
    assert 0.01 < min(changed) and max(changed) < 0.34
    noise = torch.cat(noise, dim=1) / 255                # that of normalised images, all but uncut
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.double)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.double)
    torch.testing.assert_close(noise.mean(dim=1), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(dim=1), std, atol=0, rtol=0.06)
    erase = evaluate.Erase(0.25)
    erased = [not torch.equal(erase(image), image) for _ in range(400)]
    assert 0.15 < np.mean(erased) < 0.35


def test_mixing():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 32, 32)
    labels = torch.arange(8)
    partner = images.roll(1, 0)
    mix = data.mixing(0.8, 1.0, 8)
    kinds = set()
    for _ in range(20):
        mixed, soft = mix(images, labels)
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        share = soft[torch.arange(8), labels].view(-1, 1, 1, 1)
        blend = share * images + (1 - share) * partner
        is_cut = ((mixed == images) | (mixed == partner)).all()
        kinds.add("cut" if is_cut else "mix")
        assert is_cut or torch.allclose(mixed, blend, atol=1e-5)
        logits = torch.randn(8, 8)
        smooth = 0.9 * soft + 0.1 / 8                    # smoothing of soft labels
        expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
        loss = F.cross_entropy(logits, soft, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)
    assert kinds == {"cut", "mix"}
    unmixed, same_labels = data.mixing(0.0, 0.0, 8)(images, labels)
    assert torch.equal(unmixed, images) and torch.equal(same_labels, labels)


def test_few_shots():
    labels = np.repeat([0, 1, 2], [50, 30, 3])
    images = torch.arange(83, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    dataset = data.ImageDataset(images, labels)
    five = data.subset(dataset, 5, 100, 0)
    assert np.bincount(five.labels).tolist() == [5, 5, 3]
    numbers = five.source[:, 0, 0, 0].numpy()
    assert (labels[numbers] == five.labels).all()        # each keeps its label
    assert not torch.equal(five.source, data.subset(dataset, 5, 100, 1).source)
    assert torch.equal(five.source, data.subset(dataset, 5, 100, 0).source)
    assert np.bincount(data.subset(dataset, 0, 10, 0).labels).tolist() == [5, 3, 1]
    assert len(data.subset(dataset, 0, 100, 0)) == 83


def test_every_tenth_of_each_class():
    labels = torch.tensor(25 * [0] + 3 * [1] + [2])
    marked = evaluate.every_tenth(labels, 4)             # no image of class 3
    assert marked.nonzero()[:, 0].tolist() == [9, 19, 27]


# ------------------------------------------------------------------------------------------- masks
def test_ade20k(in_tmp, monkeypatch):
    monkeypatch.setattr(evaluate, "ADE_CLASSES", 150)
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            save_masked_image(str(i), part, np.zeros((2, 2, 3)), [[0, 1], [150, 7]])
    cfg = evaluate.Config(protocol="segment", **MASKS)
    train, test = evaluate.open_masked_images(cfg)
    assert (len(train), len(test), train.classes, test.classes) == (3, 2, 150, 150)
    (image, mask), _, _ = test[0, 1]
    assert image.shape == (3, 2, 2) and mask.tolist() == [[255, 0], [149, 6]]
    for changes, match in ((dict(data_root="nowhere"), "no masks in nowhere/ADEChallengeData2016"),
                           (dict(data="masks"), "segment is for --data shapes and ade20k")):
        with pytest.raises(common.UserError, match=match):
            evaluate.open_masked_images(replace(cfg, **changes))


@pytest.mark.parametrize("mask, words", [
    (np.full((4, 4), 4), "more than 3 classes"), (np.zeros((4, 4, 3)), "not one byte a pixel"),
    (np.zeros((3, 4)), "has (3, 4) pixels"),
    ("text", "cannot identify image file"), ("%!PS-Adobe-3.0 EPSF-3.0\n", "cannot identify"),
    (None, "mask: no such file, or not a regular one")])
def test_masks_that_cannot_be_used(tmp_path, mask, words):
    save(tmp_path / "a.png", np.zeros((4, 4, 3)))
    if mask is None:
        os.mkfifo(tmp_path / "mask.png")
    elif isinstance(mask, str):
        (tmp_path / "mask.png").write_text(mask)
    else:
        save(tmp_path / "mask.png", mask)
    dataset = evaluate.MaskedImages([tmp_path / "a.png"], [tmp_path / "mask.png"], 3)
    with pytest.raises(OSError) as error:
        dataset.read(0)
    assert words in str(error.value)


def test_image_and_mask_are_cropped_alike():
    shapes = data.synthetic_shapes("train", np.arange(50))
    masks = torch.from_numpy(shapes["mask"].astype(np.uint8))
    bright = 255 * masks.unsqueeze(1).expand(-1, 3, -1, -1)
    dataset = evaluate.MaskedImages(bright, masks, 2)
    crop = v2.RandomResizedCrop(32, (0.3, 1), interpolation=data.BICUBIC)
    dataset.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    agreement = []
    for i in range(50):
        (image, mask), _, _ = dataset[1, i]
        agreement.append(((image[0] > 127) == (mask > 0)).float().mean().item())
    assert min(agreement) > 0.9 and np.mean(agreement) > 0.97


def test_masked_shapes():
    shapes = data.synthetic_shapes("test", np.arange(30))
    dataset = evaluate.masked_shapes("test", 30, 0)
    assert dataset.classes == 9
    for i in range(30):
        (image, mask), _, _ = dataset[0, i]
        assert torch.equal(image, torch.from_numpy(shapes["image"][i]))
        assert (mask == torch.from_numpy(shapes["mask"][i]) * (shapes["shape"][i] + 1)).all()


# ------------------------------------------------------------------------------------- checkpoints
def official():
    """Weights in the layout of the released MAE: all of them, decoder included."""
    torch.manual_seed(5)
    return mae.MAE(16, 4, 16, 2, 2, 8, 1, 2).state_dict()


def encoder_only(state):
    return {name: value for name, value in state.items()
            if not name.startswith(("decoder", "mask_token"))}


def load(state, tmp_path, **changes):
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    return evaluate.load_encoder(evaluate.Config(checkpoint=str(file), **changes))


def with_prefix(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_released_layouts(tmp_path, capsys):
    whole = official()
    weights = encoder_only(whole)
    images = torch.randn(2, 3, 16, 16)
    vit = mae.VisionTransformer(16, 4, 16, 2, 2)
    vit.load_state_dict(weights)
    expected = vit.encode(images)
    head = {"head.weight": torch.randn(7, 16), "head.bias": torch.randn(7)}
    dino = with_prefix("backbone.", weights) | {"head.mlp.0.weight": torch.ones(2)}
    for layout, left in (
            (weights, 0), ({"model": weights}, 0), (weights | head, 2), ({"teacher": dino}, 1),
            ({"model": whole, "args": argparse.Namespace(a=1), "epoch": 3}, 20),
            ({"model": with_prefix("module.", weights)}, 0)):
        model, left_out, about = load(layout, tmp_path)
        torch.testing.assert_close(model.encode(images), expected)
        assert len(left_out) == left and set(model.state_dict()) == set(weights)
        assert about["method"] == "mae" and about["config"]["image_size"] == 16
        assert about["pooling"] == "cls"
        assert f"missing from it 0 [], left out {left} [" in capsys.readouterr().out
    norm = {"fc_norm.weight": torch.ones(16), "fc_norm.bias": torch.ones(16)}
    tuned = weights | head | norm
    del tuned["norm.weight"], tuned["norm.bias"]
    model, left_out, about = load({"model": tuned}, tmp_path)
    assert isinstance(model.norm, torch.nn.Identity) and about["pooling"] == "mean"
    assert left_out.keys() == head.keys() | norm.keys()


def test_shapes_tell_the_size_and_the_file_or_the_table_the_heads(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vit = mae.VisionTransformer(24, 4, 32, 3, 4)
    weights = vit.state_dict()
    images = torch.randn(2, 3, 24, 24)
    teacher = {"model": weights, "num_heads": 4}         # as maskdistill.py writes it
    model, _, about = load(teacher, tmp_path)
    assert torch.equal(model.encode(images), vit.encode(images))
    sizes = ("embed_dim", "depth", "num_heads", "image_size", "patch_size")
    assert [about["config"][name] for name in sizes] == [32, 3, 4, 24, 4]
    with pytest.raises(common.UserError, match="how many heads .* at width 32; give mae.py a row"):
        load(weights, tmp_path)
    monkeypatch.setitem(mae.SIZES, "own", (32, 12, 8))   # its depth does not matter
    model, _, _ = load(weights, tmp_path)
    assert len(model.blocks) == 3 and model.blocks[0].attn.num_heads == 8
    monkeypatch.setitem(mae.SIZES, "micro", (32, 3, 2))  # --model names the row
    assert load(weights, tmp_path, model="micro")[0].blocks[0].attn.num_heads == 2
    for heads, match in ((3, "num_heads 3 does not divide"), ("4", "another version")):
        with pytest.raises(common.UserError, match=match):
            load({"model": weights, "num_heads": heads}, tmp_path)


def test_other_image_size_resizes_positions(tmp_path):
    state = encoder_only(official())
    model, _, about = load(state, tmp_path, image_size=24)
    assert model.grid == (6, 6) and about["config"]["image_size"] == 24
    expected = common.resize_positions(state["pos_embed"], (6, 6))
    torch.testing.assert_close(model.pos_embed, expected)
    assert torch.equal(load(state, tmp_path)[0].pos_embed, state["pos_embed"])


@pytest.mark.parametrize("missing, added, words", [
    (["blocks.1.norm1.bias"], {}, "missing 1 [blocks.*.norm1.bias]"),
    (["norm.weight"], {}, "missing 1 [norm.weight]"),
    ([], {"dist_token": torch.zeros(1)}, "unexpected 1 [dist_token]"),
    ([], {"pos_embed": torch.zeros(1, 18, 16)}, "pos_embed has 17 rows besides the class token's"),
    ([], {"pos_embed": torch.zeros(1, 16, 16)}, "pos_embed has 15 rows besides"),
    ([], {"pos_embed": torch.zeros(1, 17, 8)}, "of another size 1 [pos_embed]"),
    ([], {"pos_embed": torch.zeros(3)}, "no Vision Transformer"),
    ([], {"cls_token": torch.zeros(1, 1, 8)}, "of another size 1 [cls_token]"),
    ([], {"norm.bias": torch.full((16,), torch.nan)}, "not all of norm.bias is finite"),
    ([], {"patch_embed.proj.weight": torch.tensor(0.0)}, "no Vision Transformer"),
    (["patch_embed.proj.weight"], {}, "no Vision Transformer"),
    ([], {3: torch.zeros(1)}, "holds no weights"), ([], {"epoch": 3}, "holds no weights")])
def test_a_file_that_does_not_fit_is_one_line(tmp_path, missing, added, words):
    state = encoder_only(official()) | added
    for name in missing:
        del state[name]
    with pytest.raises(common.UserError) as error:
        load(state, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def save_checkpoint(path, script, cfg, **more):
    """A checkpoint of an untrained model of another seed, as a run of the script writes it."""
    torch.manual_seed(5)
    model = script.build(cfg)
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    Path(path).parent.mkdir(exist_ok=True)
    method = script.__name__
    torch.save({"method": method, "config": dict(vars(cfg)), "model": model.state_dict()} | more,
               path)
    return model


def test_a_checkpoint_of_ours(in_tmp):
    trained = save_checkpoint("run/checkpoint.pt", mae, tiny())
    cfg = evaluate.Config(checkpoint="run/checkpoint.pt")
    encoder, left_out, about = evaluate.load_encoder(cfg)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder.encode(images), trained.encode(images))
    assert about["config"]["embed_dim"] == 16
    assert all(name.startswith(("decoder", "mask_token")) for name in left_out)
    assert not any(name.startswith(("decoder", "mask_token")) for name in encoder.state_dict())
    torch.save(encoder.state_dict(), "run/encoder.pt")   # what runs write beside it
    cfg = evaluate.Config(checkpoint="run/encoder.pt")
    alone, _, _ = evaluate.load_encoder(cfg)
    assert torch.equal(alone.encode(images), trained.encode(images))
    with pytest.raises(common.UserError, match="no script other.py"):
        evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt", method="other"))


def test_an_edited_row_of_sizes_does_not_change_an_old_run(in_tmp, monkeypatch):
    save_checkpoint("run/checkpoint.pt", mae, tiny())
    cfg = evaluate.Config(checkpoint="run/checkpoint.pt")
    monkeypatch.setitem(mae.SIZES, "micro", (32, 1, 4))
    encoder, _, about = evaluate.load_encoder(cfg)
    sizes = ("embed_dim", "depth", "num_heads")
    assert [about["config"][name] for name in sizes] == [16, 2, 2]
    assert len(encoder.blocks) == 2 and encoder.blocks[0].attn.num_heads == 2
    cfg = evaluate.Config(checkpoint="run/checkpoint.pt", model="micro")
    for row, match in (((32, 1, 4), "missing 0 .*, unexpected 12 "), ((32, 2, 4), "other size ")):
        monkeypatch.setitem(mae.SIZES, "micro", row)
        with pytest.raises(common.UserError, match=f"does not fit: .*{match}"):
            evaluate.load_encoder(cfg)


def test_the_old_runs_device_and_the_like_do_not_matter(photos):    # noqa: F811
    cfg = tiny()
    save_checkpoint("here/checkpoint.pt", mae, cfg)
    gone = dict(device="cuda", compile=True, precision="bf16", workers=1000, resume=False,
                data="gone", data_root="gone", init="gone.pt", output="gone", preset="gone")
    state = checkpoint("here")
    Path("there").mkdir()
    torch.save(state | {"config": state["config"] | gone}, "there/checkpoint.pt")
    for folder in ("here", "there"):
        changes = FROM_CHECKPOINT | dict(checkpoint=f"{folder}/checkpoint.pt", max_steps=2)
        evaluated("finetune", **changes, output=f"{folder}-tuned")
    here, there = (checkpoint(f"{folder}-tuned", "finetuned.pt") for folder in ("here", "there"))
    close(here["model"], there["model"])
    changes = FROM_CHECKPOINT | dict(checkpoint="there-tuned/finetuned.pt", output="again")
    evaluated("finetune", eval=True, **changes)
    assert not Path("gone").exists()


def test_settings_become_a_config_again():
    cfg = tiny(mask_ratio=0.5, seed=7)
    settings = dict(vars(cfg))
    assert evaluate.config_from(mae.Config, settings) == cfg
    assert settings == vars(cfg)
    smaller = settings | {"embed_dim": 32, "depth": 1}
    assert vars(evaluate.config_from(mae.Config, smaller)) == smaller
    larger = evaluate.config_from(mae.Config, settings, model="tiny", image_size=32)
    assert (larger.embed_dim, larger.depth, larger.num_heads) == (192, 12, 3)
    assert (larger.image_size, larger.seed) == (32, 7)


@pytest.mark.parametrize("change, words", [
    (dict(log_every=50, knn_pictures=10_000, mlp_ratio=4.0),
     "version of this code: it has the settings knn_pictures, log_every, mlp_ratio"),
    (dict(depth=None), "KeyError: 'depth'"), (dict(model="giant"), "KeyError: 'giant'"),
    (dict(epochs="ten"), "TypeError"), (dict(image_size=15), "does not divide"),
    (dict(num_heads=3), "num_heads 3 does not divide embed_dim 16"),
    (dict(embed_dim=-4), "embed_dim is -4")])
def test_settings_of_another_version_are_one_line(change, words):
    settings = vars(tiny()) | change
    if change == {"depth": None}:
        del settings["depth"]
    with pytest.raises(common.UserError, match=words) as error:
        evaluate.config_from(mae.Config, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file, folder", [
    ("runs/mae-photos/checkpoint.pt", "knn-mae-photos"), ("none", "knn-none-photos"),
    ("runs/mae-photos/encoder.pt", "knn-mae-photos"), ("mae_base.pth", "knn-mae_base-photos"),
    ("runs/mae-shapes/finetuned-ema.pt", "knn-mae-shapes-ema-photos"),
    ("runs/dtm-photos/teacher.pt", "knn-dtm-teacher-photos")])
def test_folder_of_a_run(file, folder):
    cfg = evaluate.Config(checkpoint=file, data="some/photos/")
    assert cfg.output == f"runs/{folder}"


def test_runs_that_differ_have_folders_of_their_own():
    settings = [dict(protocol="finetune"), dict(protocol="finetune", eval=True),
                dict(protocol="linear"), dict(protocol="linear", cached=False)]
    outputs = {evaluate.Config(data="photos", **changes).output for changes in settings}
    assert len(outputs) == 4


# -------------------------------------------------------------------------------------------- runs
@pytest.fixture
def scored(monkeypatch):
    """The logits that runs are scored with, in order."""
    tables = []
    honest = data.topk_accuracy

    def topk_accuracy(logits, labels):
        tables.append(logits)
        return honest(logits, labels)

    monkeypatch.setattr(data, "topk_accuracy", topk_accuracy)
    return tables


@pytest.mark.parametrize("protocol, cached, figure", [
    ("knn", True, "top1"), ("linear", True, "top1"), ("linear", False, "top1"),
    ("finetune", True, "top1"), ("segment", True, "miou"), ("features", True, "width")])
def test_every_protocol(photos, capsys, monkeypatch, protocol, cached, figure):    # noqa: F811
    changes = dict(cached=cached)
    if protocol == "segment":
        save_masked_images(12)
        changes = MASKS | dict(crop_scale=0.5)
    honest = evaluate.load_encoder
    loaded = []

    def load_encoder(cfg):
        encoder, *others = honest(cfg)
        weights = {name: value.clone() for name, value in encoder.state_dict().items()}
        loaded.extend((encoder, weights))
        return encoder, *others

    monkeypatch.setattr(evaluate, "load_encoder", load_encoder)
    result = evaluated(protocol, **changes)
    last = lines(f"eval-{protocol}")[-1]
    assert last["protocol"] == protocol and 0 <= result[figure] <= 100
    assert last[figure] == pytest.approx(result[figure], abs=1e-3)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("wrote " if protocol == "features" else f"{protocol}, none, ")
    encoder, before = loaded
    is_frozen = all(torch.equal(value, before[name])
                    for name, value in encoder.state_dict().items())
    assert is_frozen == (protocol != "finetune")         # every byte of the encoder
    if protocol == "segment":
        assert np.asarray(Image.open("eval-segment/segmentation.png")).std() > 20


@pytest.mark.parametrize("protocol, cached", [
    ("knn", True), ("linear", True), ("linear", False), ("finetune", True), ("segment", True),
    ("features", True)])
@pytest.mark.parametrize("width, amx, dtype", [
    (192, True, torch.bfloat16), (192, False, torch.float32), (64, True, torch.float32)])
def test_bf16_by_default_where_it_is_fast(photos, monkeypatch, protocol, cached,    # noqa: F811
                                          width, amx, dtype):
    monkeypatch.setitem(mae.SIZES, "micro", (width, 1, 2))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    changes = dict(cached=cached, epochs=2)
    if protocol == "segment":
        save_masked_images(12)
        changes |= MASKS
    honest = evaluate.load_encoder
    seen = set()

    def load_encoder(cfg):
        encoder, *others = honest(cfg)
        encoder.blocks[0].mlp.fc1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
        return encoder, *others

    monkeypatch.setattr(evaluate, "load_encoder", load_encoder)
    evaluated(protocol, **changes)
    assert seen == {dtype}
    if protocol == "finetune":
        seen.clear()
        evaluated("finetune", **FROM_CHECKPOINT, output="score", eval=True,
                  checkpoint="eval-finetune/finetuned.pt")
        assert seen == {dtype}


def test_features_of_class_folders(photos):              # noqa: F811
    encoder = drawn_encoder()
    Path("photos/train/a/08.png").write_text("text")     # not readable: no row
    evaluated("features", checkpoint="encoder.pth", pooling="cls-raw")
    saved = np.load("eval-features/features.npz")        # allow_pickle=False
    assert set(saved) == {"features", "files", "labels", "classes"}
    assert saved["features"].dtype == np.float32 and saved["features"].shape == (49, 16)
    files = sorted(Path("photos/train").rglob("*.png")) + sorted(Path("photos/val").rglob("*.png"))
    files.remove(Path("photos/train/a/08.png"))
    assert saved["files"].tolist() == [str(file) for file in files]
    assert saved["classes"].tolist() == ["a", "b"]
    names = saved["classes"][saved["labels"]]
    assert names.tolist() == [file.parent.name for file in files]
    images = torch.stack([data.CenterCrop(16)(data.decode(file.read_bytes())) for file in files])
    with torch.no_grad():
        expected = tokens_of(encoder, (images / 255 - MEAN) / STD)[:, 0]
    torch.testing.assert_close(torch.from_numpy(saved["features"]), expected, rtol=1e-4, atol=1e-5)


def test_features_of_a_flat_folder_and_of_arrays(photos, monkeypatch):    # noqa: F811
    evaluated("features", data="photos/val/a", pooling="mean")
    saved = np.load("eval-features/features.npz")
    assert set(saved) == {"features", "files"} and saved["features"].shape == (5, 16)
    assert [Path(file).exists() for file in saved["files"]] == 5 * [True]
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    train = data.ImageDataset(images, [0, 1, 0])
    test = data.ImageDataset(images[:2], [1, 1])
    splits = data.Splits(train, train, test, ["dark", "darker"])
    monkeypatch.setattr(data, "open_data", lambda *_: splits)
    evaluated("features", data="dark")
    saved = np.load("eval-features/features.npz")
    assert saved["files"].tolist() == ["train/0", "train/1", "train/2", "test/0", "test/1"]
    assert saved["labels"].tolist() == [0, 1, 0, 1, 1]


def test_features_cannot_be_written(photos):             # noqa: F811
    Path("eval-features/features.npz.new").mkdir(parents=True)
    with pytest.raises(common.UserError, match="cannot write to eval-features/features.npz"):
        evaluated("features")


def test_maes_probe(photos):                             # noqa: F811
    result = evaluated("linear", cached=False, pooling="cls-raw", crop_scale=0.5, epochs=2)
    log = lines("eval-linear")
    assert [line["step"] for line in log if "top1" in line and "step" in line] == [4, 8]
    assert result["top1"] == log[-2]["top1"]
    assert set(checkpoint("eval-linear")["model"]) == {
        "fc.weight", "fc.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    with pytest.raises(common.UserError, match="two images or more"):
        evaluated("linear", cached=False, batch_size=1, output="other")


# --------------------------------------------------------------------------- recipes, written out
# All of them: 40 images, 10 a step, 2 epochs of 4 steps, half an epoch of warm-up, 5 steps trained.
RECIPE = dict(checkpoint="encoder.pth", batch_size=10, epochs=2, warmup_epochs=0.5, max_steps=5)
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rate(step, peak, minimum, shape="cosine", steps=4):
    """Of an epoch of `steps` steps."""
    warmup = steps / 2
    total = 2 * steps
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / (total - warmup)
    left = 1 - done if shape == "linear" else (1 + np.cos(np.pi * done)) / 2
    return minimum + (peak - minimum) * left


def order_of(step, images=40, size=10):
    """(epoch, numbers of the images) of a step."""
    epoch, position = divmod(step, images // size)
    order = torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).tolist()
    return epoch, order[size * position:size * (position + 1)]


def batch_of(dataset, step):
    """Normalised images and labels of a step."""
    epoch, order = order_of(step)
    images, labels, _ = zip(*(dataset[epoch, i] for i in order))
    return (torch.stack(images) / 255 - MEAN) / STD, torch.tensor(labels)


def drawn_encoder():
    """An encoder without zeros and ones, and its weights in encoder.pth."""
    torch.manual_seed(3)
    encoder = mae.VisionTransformer(16, 4, 16, 2, 2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(encoder.state_dict(), "encoder.pth")
    return encoder


def tokens_of(encoder, images, drop_path=0.0):
    """Tokens before the last norm; the first block drops nothing, the second with drop_path."""
    x = encoder.patch_embed(mae.patchify(images, 4)) + encoder.pos_embed[:, 1:]
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, x], dim=1)
    for block, probability in zip(encoder.blocks, (0.0, drop_path)):
        x = x + stochastic_depth(block.attn(block.norm1(x)), probability, "row")
        x = x + stochastic_depth(block.mlp(block.norm2(x)), probability, "row")
    return x


def centers_of(dataset):
    dataset = dataset.with_transform(data.CenterCrop(16))
    images = torch.stack([dataset[0, i][0] for i in range(len(dataset))])
    return (images / 255 - MEAN) / STD


def groups_of(model, decay, weight_decay):
    """A group for each parameter, with its name and the factor on its learning rate: 1 for heads
    and the norm after the two blocks, `decay` and its square for these, its cube below."""
    groups = []
    for name, parameter in model.named_parameters():
        layer = name.removeprefix("encoder.")
        power = 0
        if layer.startswith(("cls_token", "pos_embed", "patch_embed")):
            power = 3
        elif layer.startswith("blocks"):
            power = 2 - int(layer.split(".")[1])
        is_decayed = parameter.ndim > 1 and layer not in ("cls_token", "pos_embed")
        groups.append({"params": [parameter], "name": name, "factor": decay ** power,
                       "weight_decay": weight_decay if is_decayed else 0.0})
    return groups


def adam_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
    optimizer.step()
    optimizer.zero_grad()


def averages(optimizer):
    """AdamW's averages of the gradients, by name."""
    return {group["name"]: optimizer.state[p]["exp_avg"]
            for group in optimizer.param_groups for p in group["params"]}


def saved_averages(folder, model, groups):
    """Those of a checkpoint, whose groups are the script's."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = [name_of[id(p)] for group in groups for p in group["params"]]
    return dict(zip(names, moments(folder).values(), strict=True))


MIXED = dict(drop_path=0.5, mixup=0.8, cutmix=1.0, smoothing=0.2, ema=0.7, randaugment=9,
             erasing=0.5, crop_scale=0.5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_recipe_of_fine_tuning(photos, pooling):         # noqa: F811
    """Tables 9 and 11 of MAE: mixing, smoothing, drop path, decay per layer, averaged weights."""
    encoder = drawn_encoder()
    evaluated("finetune", **RECIPE, **MIXED, pooling=pooling, base_lr=0.5, min_lr=0.01,
              weight_decay=2.0, beta2=0.9, layer_decay=0.5)
    torch.manual_seed(0)                                 # decides the new classifier
    model = evaluate.Classifier(encoder, 2, pooling)
    optimizer = torch.optim.AdamW(groups_of(model, 0.5, 2.0), betas=(0.9, 0.9), eps=1e-8)
    augment = v2.Compose([data.augment(16, 0.5, randaugment=9), evaluate.Erase(0.5)])
    dataset = data.open_data("photos", "").train.with_transform(augment)
    mixup = v2.MixUp(alpha=0.8, num_classes=2)
    cutmix = v2.CutMix(alpha=1.0, num_classes=2)
    mix = v2.RandomChoice([mixup, cutmix])
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(5):
        images, labels = batch_of(dataset, step)
        torch.manual_seed(seed_of(0, step))
        images, labels = mix(images, labels)
        x = tokens_of(encoder, images, drop_path=0.5)
        x = model.fc_norm(x[:, 1:].mean(dim=1)) if pooling == "mean" else encoder.norm(x[:, 0])
        labels = 0.8 * labels + 0.2 / 2
        loss = -(labels * model.head(x).log_softmax(dim=1)).sum(dim=1).mean()
        loss.backward()
        adam_step(optimizer, rate(step, 0.5 * 10 / 256, 0.01))
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in weights}
    found = checkpoint("eval-finetune")["model"]
    close(weights, {name.removeprefix("0."): value for name, value in found.items()})
    close(average, {name.removeprefix("1."): value for name, value in found.items()})
    groups = evaluate.layer_decay_groups(model, 2.0, 0.5)
    close(averages(optimizer), saved_averages("eval-finetune", model, groups))
    for name, expected in (("finetuned", weights), ("finetuned-ema", average)):
        written = checkpoint("eval-finetune", f"{name}.pt")["model"]
        expected = {key.removeprefix("encoder."): value for key, value in expected.items()}
        assert expected.keys() == written.keys()
        close(expected, written)


@pytest.mark.parametrize("pooling", ["mean", "cls-raw"])
def test_recipe_of_maes_probe(photos, scored, pooling):  # noqa: F811
    """Appendix A.1: batch normalisation without weights, LARS, nothing but crops and flips."""
    encoder = drawn_encoder()
    evaluated("linear", **RECIPE, cached=False, pooling=pooling, crop_scale=0.5, base_lr=800.0,
              min_lr=5.0, weight_decay=0.5)

    @torch.no_grad()
    def features(images):
        tokens = tokens_of(encoder, images)
        if not pooling.endswith("raw"):
            tokens = encoder.norm(tokens)
        return tokens[:, 0] if pooling.startswith("cls") else tokens[:, 1:].mean(dim=1)

    torch.manual_seed(0)
    head = evaluate.LinearHead(16, 2)
    weight = head.fc.weight
    bias = head.fc.bias
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    running_mean = torch.zeros(16)
    running_var = torch.ones(16)
    splits = data.open_data("photos", "")
    dataset = splits.train.with_transform(data.augment(16, 0.5))
    for step in range(5):
        images, labels = batch_of(dataset, step)
        x = features(images)
        running_mean = 0.9 * running_mean + 0.1 * x.mean(dim=0)
        running_var = 0.9 * running_var + 0.1 * x.var(dim=0)
        x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-6).sqrt()
        logits = x @ weight.T + bias
        loss = -logits.log_softmax(dim=1)[torch.arange(10), labels].mean()
        gradients = torch.autograd.grad(loss, [weight, bias])
        with torch.no_grad():
            change = gradients[0] + 0.5 * weight         # the bias: neither decayed nor scaled
            change = change * 0.001 * weight.norm() / change.norm()
            momentum = [0.9 * m + c for m, c in zip(momentum, (change, gradients[1]))]
            for p, m in zip((weight, bias), momentum):
                p -= rate(step, 800.0 * 10 / 256, 5.0) * m
    state = checkpoint("eval-linear")
    expected = {"fc.weight": weight.data, "fc.bias": bias.data, "norm.running_mean": running_mean,
                "norm.running_var": running_var}
    found = {name: state["model"][name] for name in expected}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    found = [state["optimizer"]["state"][i]["momentum"] for i in (0, 1)]
    torch.testing.assert_close(found, momentum, rtol=1e-4, atol=1e-8)
    x = (features(centers_of(splits.test)) - running_mean) / (running_var + 1e-6).sqrt()
    expected = (x @ weight.T + bias).detach()            # scored with the learned averages
    torch.testing.assert_close(scored[-1], expected, rtol=1e-3, atol=1e-3)


def test_recipe_of_the_sweep(photos, scored):            # noqa: F811
    """Each layer as if it were trained alone, on standardised features, by SGD at its own rate; the
    rate is chosen by layers that never saw the held-out images."""
    encoder = drawn_encoder()
    result = evaluated("linear", **RECIPE, pooling="mean-raw", base_lr=1.0, min_lr=0.001,
                       weight_decay=0.2)
    splits = data.open_data("photos", "")
    with torch.no_grad():
        train, test = (tokens_of(encoder, centers_of(part))[:, 1:].mean(dim=1)
                       for part in (splits.train, splits.test))
    mean = train.mean(dim=0)
    std = train.std(dim=0) + 1e-6
    x = (train - mean) / std
    test = (test - mean) / std
    y, test_y = (torch.from_numpy(part.labels) for part in (splits.train, splits.test))
    held = torch.zeros(40)
    for label in (0, 1):
        held[(y == label).nonzero()[[9, 19], 0]] = 1     # every tenth of 20
    found = checkpoint("eval-linear")["model"]
    rates = [10 ** (i / 2 - 2) for i in range(10)]
    scores = {"held": [], "known": [], "test": []}       # of each rate
    logits_of = []                                       # of the test images
    for i, factor in enumerate(rates):
        layers = {}
        for seen in ("rest", "all"):
            weight = torch.zeros(2, 16, requires_grad=True)
            bias = torch.zeros(2, requires_grad=True)
            momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
            for step in range(5):
                _, rows = order_of(step)
                logits = x[rows] @ weight.T + bias
                losses = F.cross_entropy(logits, y[rows], reduction="none")
                losses = losses * (1 - held[rows]) if seen == "rest" else losses
                gradients = torch.autograd.grad(losses.sum() / 10, [weight, bias])
                with torch.no_grad():
                    changes = gradients[0] + 0.2 * weight, gradients[1]
                    momentum = [0.9 * m + c for m, c in zip(momentum, changes)]
                    for p, m in zip((weight, bias), momentum):
                        p -= factor * rate(step, 1.0 * 10 / 256, 0.001) * m
            layers[seen] = weight.data, bias.data
        for j, part in enumerate(("weight", "bias")):
            expected = torch.cat([layers["rest"][j], layers["all"][j]])
            torch.testing.assert_close(found[f"fcs.{i}.{part}"], expected, rtol=1e-4, atol=1e-5)
        for name, layer, rows, truth in (("held", "rest", x[held > 0], y[held > 0]),
                                         ("known", "all", x[held > 0], y[held > 0]),
                                         ("test", "all", test, test_y)):
            weight, bias = layers[layer]
            logits = rows @ weight.T + bias
            hits = (logits.argmax(dim=1) == truth).float()
            scores[name].append(100 * hits.mean().item())
        logits_of.append(logits)
    best = scores["held"].index(max(scores["held"]))
    assert best != scores["known"].index(max(scores["known"])) and len(set(scores["test"])) > 2
    assert result["chosen_lr"] == pytest.approx(1.0 * 10 / 256 * rates[best])
    assert result["top1"] == pytest.approx(scores["test"][best])
    torch.testing.assert_close(scored[-1], logits_of[best], rtol=1e-4, atol=1e-4)


def test_recipe_of_segmentation(in_tmp):
    """A straight line of rates; unlabelled pixels do not count."""
    save_masked_images(20, unlabelled=True)
    encoder = drawn_encoder()
    changes = RECIPE | MASKS | dict(batch_size=6)        # 18 to train on: 3 steps an epoch
    result = evaluated("segment", **changes, crop_scale=0.5, base_lr=0.8, min_lr=0.01,
                       weight_decay=2.0, beta2=0.9)
    torch.manual_seed(0)
    model = evaluate.Segmenter(encoder.requires_grad_(False), 3)
    groups = groups_of(model.head, 0.5, 2.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    cfg = evaluate.Config(protocol="segment", image_size=16, **MASKS)
    train, test = evaluate.open_masked_images(cfg)
    crop = v2.RandomResizedCrop(16, (0.5, 1.0), interpolation=data.BICUBIC)
    train.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    for step in range(5):
        epoch, order = order_of(step, images=18, size=6)
        images, masks = zip(*(train[epoch, i][0] for i in order))
        images = torch.stack(images)
        masks = torch.stack(masks).long()
        torch.manual_seed(seed_of(0, step))
        tokens = tokens_of(encoder, (images / 255 - MEAN) / STD, 0.0)
        maps = encoder.norm(tokens)[:, 1:].reshape(6, 4, 4, 16).permute(0, 3, 1, 2)
        logits = F.interpolate(model.head(maps), (16, 16), mode="bilinear")    # (6, 3, 16, 16)
        logits = logits.permute(0, 2, 3, 1)[masks != 255]                      # (pixels, 3)
        F.cross_entropy(logits, masks[masks != 255]).backward()
        adam_step(optimizer, rate(step, 0.8 * 6 / 256, 0.01, "linear", steps=3))
    saved = checkpoint("eval-segment")["model"]
    expected = model.head.state_dict()
    assert expected.keys() == saved.keys()
    close(expected, saved)
    groups = common.parameter_groups(model.head, 2.0)
    close(averages(optimizer), saved_averages("eval-segment", model.head, groups))

    model.head.load_state_dict(saved)
    model.eval()                                         # nothing is dropped while it is scored
    correct = 0
    counted = 0
    for i in range(len(test)):
        (image, mask), _, _ = test[0, i]
        with torch.no_grad():
            prediction = evaluate.predict_classes(cfg, model, image.unsqueeze(0), mask.shape, 3,
                                                  torch.device("cpu"))[0]
        correct += (prediction == mask).sum().item()
        counted += (mask != 255).sum().item()
    assert result["pixels"] == pytest.approx(100 * correct / counted)


def test_figures_of_knn(photos):                         # noqa: F811
    encoder = drawn_encoder()
    splits = data.open_data("photos", "")
    features = {}
    for part in ("train", "test"):
        with torch.no_grad():
            raw = tokens_of(encoder, centers_of(getattr(splits, part)))
            normed = encoder.norm(raw)
        features[part] = {"cls": normed[:, 0], "mean": normed[:, 1:].mean(dim=1),
                          "cls-raw": raw[:, 0], "mean-raw": raw[:, 1:].mean(dim=1)}
    train_y, test_y = (torch.from_numpy(part.labels) for part in (splits.train, splits.test))
    figures = {}
    for pooling, train in features["train"].items():
        queries = features["test"][pooling]
        similarity = F.cosine_similarity(queries[:, None], train, dim=2)
        for k in (1, 10, 20, 100, 200):
            best = similarity.topk(min(k, 40), dim=1)
            votes = (best.values / 0.07).softmax(dim=1)
            for_b = (votes * train_y[best.indices]).sum(dim=1) > 0.5
            figures[f"{pooling}_{k}"] = 100 * (for_b == test_y.bool()).float().mean().item()
    for pooling in ("mean", "cls-raw"):
        result = evaluated("knn", checkpoint="encoder.pth", pooling=pooling)
        assert {name: result[name] for name in figures} == pytest.approx(figures)
        assert result["top1"] == pytest.approx(figures[f"{pooling}_20"])
        assert result["top5"] == 100
    assert figures["cls-raw_10"] != figures["cls-raw_20"] != figures["mean_20"]


# ------------------------------------------------------------------------------------ what follows
def optimizer_averages(state):
    """What AdamW or SGD averages of the gradients, whose scale AdamW itself would forgive."""
    return {f"{i} {name}": value for i, values in state["optimizer"]["state"].items()
            for name, value in values.items() if name in ("exp_avg", "momentum_buffer")}


def test_accumulation_is_one_large_batch(photos):        # noqa: F811
    """Two images a micro-batch, into the second epoch."""
    drawn_encoder()
    for protocol in ("finetune", "linear"):
        for accumulate in (1, 5):
            evaluated(protocol, **RECIPE, accumulate=accumulate, crop_scale=0.5, smoothing=0.1,
                      base_lr=0.1, output=f"{protocol}{accumulate}")
        one, five = (checkpoint(f"{protocol}{accumulate}") for accumulate in (1, 5))
        close(one["model"], five["model"])
        close(optimizer_averages(one), optimizer_averages(five))
        assert one["epoch_losses"] == pytest.approx(five["epoch_losses"], rel=1e-5)


def test_each_micro_batch_draws_its_own_mixture(photos, monkeypatch):     # noqa: F811
    """The other processes, too: test_two_processes_score_what_one_does."""
    seeds = record_seeds(monkeypatch.setattr)
    evaluated("finetune", accumulate=2, mixup=0.8, max_steps=2, seed=7)
    assert seeds == [seed_of(7, step, i, 0) for step in (0, 1) for i in (0, 1)]


def record_seeds(replace_attribute):
    """The seeds with which images are mixed, in order."""
    seeds = []
    honest = data.mixing

    def mixing(*args):
        mix = honest(*args)

        def recorded(images, labels):
            seeds.append(torch.initial_seed())
            return mix(images, labels)

        return recorded

    replace_attribute(data, "mixing", mixing)
    return seeds


def test_segmentation_of_shapes(in_tmp, monkeypatch):
    honest = evaluate.masked_shapes

    def few_shapes(split, count, seed):
        assert count == {"train": 10_000, "test": 2_000}[split]
        return honest(split, count // 100, seed)

    monkeypatch.setattr(evaluate, "masked_shapes", few_shapes)
    metrics = evaluated("segment", data="shapes", epochs=2, base_lr=0.1)
    assert metrics["miou"] > 0
    names = checkpoint("eval-segment")["model"].keys()
    assert not any(name.startswith("encoder") for name in names)


def test_a_batch_without_a_counted_pixel(in_tmp):
    for i in range(12):
        part = "validation" if i == 9 else "training"
        mask = np.full((16, 16), 0 if i < 8 else 1 + i % 2)
        save_masked_image(f"{i:02}", part, np.full((16, 16, 3), 20 * i), mask)
    assert evaluated("segment", **MASKS, batch_size=1)["miou"] >= 0


def test_another_encoder_at_the_same_path_is_refused(photos):    # noqa: F811
    changes = FROM_CHECKPOINT | dict(checkpoint="encoder.pth", max_steps=1)
    drawn_encoder()
    for _ in range(2):
        evaluated("linear", **changes)
        evaluated("finetune", **changes)
    state = torch.load("encoder.pth")
    state["norm.bias"] += 1e-6
    torch.save(state, "encoder.pth")
    for protocol in ("linear", "finetune"):
        with pytest.raises(common.UserError, match="evaluate, encoder"):
            evaluated(protocol, **changes)


def test_probes_recover_separable_labels(in_tmp):
    """Black, grey and white images: any honest probe of any encoder tells them apart."""
    for split, count in (("train", 20), ("val", 6)):
        for name, low, high in (("a", 0, 30), ("b", 98, 158), ("c", 225, 256)):
            for i in range(count):
                noise = np.random.RandomState(i).randint(low, high, (16, 16, 3))
                save(Path("tones", split, name, f"{i}.png"), noise)
    assert evaluated("knn", data="tones")["top1"] == 100
    for shots in (0, 1, 2, 3):
        result = evaluated("linear", data="tones", epochs=12 if shots == 0 else 30, base_lr=1.0,
                           shots=shots, output=f"linear{shots}")
        assert result["top1"] == 100


@pytest.mark.parametrize("protocol, changes", [
    ("finetune", MIXED), ("linear", {}), ("linear", dict(cached=False, crop_scale=0.5)),
    ("segment", MASKS | dict(crop_scale=0.5, batch_size=4))])
def test_training_protocols_resume_bit_for_bit(photos, protocol, changes):    # noqa: F811
    if protocol == "segment":
        save_masked_images(20)                           # 4 steps an epoch, too
    evaluated(protocol, epochs=2, output="whole", **changes)
    for steps in (3, 4, 6, 0):
        evaluated(protocol, epochs=2, output="parts", max_steps=steps, **changes)
    whole, parts = (checkpoint(run)["model"] for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = []
    for run in ("whole", "parts"):
        of_steps = [line for line in lines(run) if "step" in line]             # scores, too
        logs.append([{k: v for k, v in line.items() if k != "images_per_s"} for line in of_steps])
    assert logs[0] == logs[1]
    for key, value in lines("whole")[-1].items():
        assert lines("parts")[-1][key] == value
    with pytest.raises(common.UserError, match="epochs: 2 there, 3 here"):
        evaluated(protocol, epochs=3, output="parts", **changes)


def test_scores_come_as_often_as_asked_and_at_the_end(photos):     # noqa: F811
    evaluated("finetune", epochs=3, eval_every=2)
    log = lines("eval-finetune")
    ends = [line["step"] for line in log if "epoch" in line]
    assert [line["step"] for line in log if "top1" in line and "step" in line] == ends[1:]


def test_fine_tuned_checkpoint_is_scored_again(photos, scored):    # noqa: F811
    """Drop path and all: nothing is dropped while images are scored."""
    result = evaluated("finetune", epochs=2, ema=0.5, base_lr=0.1, drop_path=0.9)
    last, average = scored[-2:]
    assert not torch.equal(last, average) and result["ema_top1"] >= 0
    changes = FROM_CHECKPOINT | dict(eval=True, output="again")
    for file, expected in (("finetuned", last), ("finetuned-ema", average)):
        evaluated("finetune", checkpoint=f"eval-finetune/{file}.pt", **changes)
        torch.testing.assert_close(scored[-1], expected)
    weights = checkpoint("eval-finetune", "finetuned.pt")["model"]
    torch.save({"model": weights}, "released.pth")       # as the official fine-tuned file
    evaluated("finetune", checkpoint="released.pth", **changes)
    torch.testing.assert_close(scored[-1], last)
    changes = FROM_CHECKPOINT | dict(output="other")
    evaluated("knn", checkpoint="eval-finetune/finetuned.pt", **changes)
    evaluated("finetune", checkpoint="eval-finetune/finetuned.pt", max_steps=1, **changes)
    with pytest.raises(common.UserError, match="has no norm for the class token"):
        evaluated("finetune", checkpoint="released.pth", pooling="cls", **changes)
    with pytest.raises(common.UserError, match="what finetune trains is finetuned.pt"):
        evaluated("knn", checkpoint="eval-finetune/checkpoint.pt", **changes)
    with pytest.raises(common.UserError, match="no classifier of 2 classes"):
        evaluated("finetune", eval=True, output="again")
    weights["head.weight"] = torch.zeros(2, 8)
    torch.save({"model": weights}, "released.pth")
    with pytest.raises(common.UserError, match="no classifier of 2 classes"):
        evaluated("finetune", checkpoint="released.pth", eval=True, **changes)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_classifier_of_supmim_pools_as_it_trained(photos, scored, pooling):    # noqa: F811
    """Tokens after the encoder's last norm: when it is fine-tuned, and when it is scored again."""
    cfg = supmim.Config(data="photos", image_size=16, patch_size=4, shots=0)
    torch.manual_seed(1)
    classifier = supmim.build(cfg, 2)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {"method": "supmim", "config": dict(vars(cfg)), "model": classifier.state_dict()}
    torch.save(state, "classifier.pt")
    images = centers_of(data.open_data("photos", "").test)
    changes = FROM_CHECKPOINT | dict(output="again", eval=True)
    evaluated("finetune", checkpoint="classifier.pt", **changes)
    expected = classifier.classify(images).detach()
    torch.testing.assert_close(scored[-1], expected, rtol=1e-4, atol=1e-5)

    evaluated("finetune", checkpoint="classifier.pt", **FROM_CHECKPOINT, pooling=pooling,
              base_lr=0.1)
    weights = checkpoint("eval-finetune", "finetuned.pt")["model"]
    missing, unexpected = classifier.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(("decoder", "mask_token")) for name in missing)
    tokens = classifier.encode(images)
    pooled = tokens[:, 1:].mean(dim=1) if pooling == "mean" else tokens[:, 0]
    expected = classifier.head(pooled).detach()
    torch.testing.assert_close(scored[-1], expected, rtol=1e-4, atol=1e-5)
    evaluated("finetune", checkpoint="eval-finetune/finetuned.pt", **changes)
    torch.testing.assert_close(scored[-1], expected, rtol=1e-4, atol=1e-5)


def test_a_student_with_relative_positions(photos, scored):    # noqa: F811
    """Each block has a table of its own when fine-tuned, in the averaged weights, too."""
    cfg = maskdistill.Config(image_size=16, patch_size=4)
    student = save_checkpoint("run/checkpoint.pt", maskdistill, cfg)
    encoder = evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt"))[0]
    images = torch.randn(2, 3, 16, 16)
    expected = student.encode(images)
    torch.testing.assert_close(encoder.encode(images), expected)
    model = evaluate.Classifier(encoder, 2, "cls")
    torch.testing.assert_close(model.encoder.encode(images), expected)
    evaluated("finetune", checkpoint="run/checkpoint.pt", **FROM_CHECKPOINT, base_lr=0.1, ema=0.5,
              drop_path=0.5)
    for file, table in (("finetuned", scored[-2]), ("finetuned-ema", scored[-1])):
        weights = checkpoint("eval-finetune", f"{file}.pt")["model"]
        tables = [weights[f"blocks.{i}.rel_pos_bias.relative_position_bias_table"] for i in (0, 1)]
        assert not torch.equal(*tables)
        assert not any(name.startswith("rel_pos_bias") for name in weights)
        evaluated("finetune", checkpoint=f"eval-finetune/{file}.pt", eval=True, output="again",
                  **FROM_CHECKPOINT)
        torch.testing.assert_close(scored[-1], table)


SCORES = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import common, data, evaluate, mae
from test_evaluate import FAST, VIT, record_seeds, vit
which = sys.argv[1]
mae.SIZES["micro"] = (16, 2, 2)
common.LOG_EVERY = 1
evaluate.ADE_CLASSES = 3

def run(protocol, output=None, **changes):
    settings = dict(data="photos", output=(output or protocol) + "-" + which) | VIT | FAST | changes
    return evaluate.evaluate(evaluate.Config(protocol=protocol, **settings))

with common.command_line():
    results = [run("knn"), run("features", pooling="cls")]
    results.append(run("finetune", checkpoint="tuned/finetuned.pt", eval=True, output="scored"))
    run("linear", "probe", cached=False, max_steps=1)
    two_epochs = dict(epochs=2, batch_size=12, max_steps=5, crop_scale=0.5, smoothing=0.1,
                      weight_decay=0.05)                 # of 3 steps each
    results.append(run("linear", accumulate=common.world_size(), **two_epochs))
    for accumulate in (1, 3):
        run("finetune", "finetune%d" % accumulate, accumulate=accumulate, **two_epochs)
    seeds = record_seeds(setattr)
    run("finetune", "mixed", mixup=0.8, max_steps=1)
    assert len(seeds) == 1 and seeds[0] == common.derive_seed(0, 0, 0, common.rank())

    cfg = evaluate.Config(protocol="segment", image_size=16, data="ade20k", data_root="masks")
    torch.manual_seed(0)
    model = evaluate.Segmenter(vit(), 3)
    _, test = evaluate.open_masked_images(cfg)
    counts = evaluate.count_pixels(cfg, model, test, torch.device("cpu"))
    results.append(counts.tolist())
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(common.rank())
    evaluate.eval_mode(norm)                             # the first process's averages for all
    assert not norm.training and norm.running_mean.tolist() == [0, 0]
    if common.rank() == 0:
        json.dump(results, open(which + ".json", "w"))
"""


def test_two_processes_score_what_one_does(photos, monkeypatch):      # noqa: F811
    save_masked_images(50)
    Path("photos/val/a/40.png").write_text("text")       # 9 images remain: an odd number
    evaluated("finetune", output="tuned", max_steps=1)
    Path("scores.py").write_text(SCORES.format(root=str(ROOT)))
    monkeypatch.setattr(sys, "argv", ["scores.py", "one"])
    runpy.run_path("scores.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, "scores.py", "two"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads(Path(f"{which}.json").read_text()) for which in ("one", "two"))
    assert one == two and len(one) == 5
    assert sum(map(sum, one[-1])) == sum((16 + i % 2) * 24 for i in range(9, 50, 10))
    saved = [np.load(f"features-{which}/features.npz") for which in ("one", "two")]
    assert all(np.array_equal(saved[0][name], saved[1][name]) for name in ("files", "labels"))
    np.testing.assert_allclose(saved[0]["features"], saved[1]["features"], rtol=1e-4, atol=1e-5)
    assert len(saved[0]["files"]) == 49
    for protocol in ("linear", "finetune1", "finetune3"):     # and training agrees
        states = [checkpoint(f"{protocol}-{which}") for which in ("one", "two")]
        close(states[0]["model"], states[1]["model"])
        close(*map(optimizer_averages, states))
        first, second = (state["epoch_losses"] for state in states)
        assert first == pytest.approx(second, rel=1e-5) and len(first) == 2


@pytest.mark.parametrize("argv, words", [
    (["knnn"], "no protocol knnn; there are knn, features, linear"),
    (["linear", "--checkpont=x"], "unrecognized arguments: --checkpont=x"),
    (["knn", "--protocol=linear"], "first word"),
    (["knn", "--depth=4"], "unrecognized arguments: --depth"),
    (["knn", "--checkpoint=nothing.pt"], "no file nothing.pt"),
    (["knn", "--checkpoint=text.pt"], "no file of weights"),
    (["knn", "--method=nothing"], "no script nothing.py"),
    (["knn", "--method=common"], "no script"), (["knn", "--method=data"], "no script"),
    (["knn", "--data=flat"], "no labelled images"),
    (["segment", "--data=flat"], "segment is for --data shapes and ade20k"),
    (["features", "--data=nowhere"], "no folder nowhere"),
    (["linear", "--percent=-1"], "percent is -1.0"),
    (["features", "--shots=2"], "are for knn, linear and finetune"),
    (["linear", "--shots=2", "--percent=9"], "exclude"),
    (["segment", "--percent=10"], "are for knn, linear and finetune"),
    (["finetune", "--pooling=cls-raw"], "--pooling is cls or mean"),
    (["finetune", "--drop-path=1.5"], "from 0 to 0.99"),
    (["finetune", "--randaugment=11"], "from 0 to 10"),
    (["finetune", "--eval", "--data=photos"], "no classifier of 2 classes"),
    (["knn", "--image-size=0"], "image_size is 0"),
    (["knn", "--patch-size=5"], "patch_size 5 does not divide image_size 28"),
    (["linear", "--epochs=5", "--warmup-epochs=5"], "less than epochs"),
    (["linear", "--output=/proc/x", "--data=photos"], "/proc/x")])
def test_a_users_mistake_is_one_line(photos, capfd, argv, words):    # noqa: F811
    save(Path("flat/a.jpg"), np.zeros((4, 4, 3)))
    Path("text.pt").write_text("hello")
    shape = ["--preset=shapes"] if "--data=photos" in argv else []
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, *shape])
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2
    assert words in error and error.startswith("error: ") and "\n" not in error
