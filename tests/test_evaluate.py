"""evaluate.py: scores, heads, optimisers, augmentation, released files, and whole runs of every protocol."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import datasets
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

import common
import data
import evaluate
import mae
from conftest import ROOT, draw, golden
from test_train import checkpoint, close, moments, photos, tiny     # noqa: F401, photos is a fixture

VIT = dict(model="micro", image_size=16, patch_size=4)
FROM_CHECKPOINT = dict(model="", image_size=None, patch_size=None)


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setitem(mae.SIZES, "micro", (16, 2, 2))
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def vit():
    """An encoder as `load_encoder` gives it, untrained."""
    return evaluate.load_encoder(evaluate.Config(**VIT))[0]


def official(size=16, depth=2):
    """Weights in the layout of the released MAE: all of them, decoder included."""
    torch.manual_seed(5)
    return mae.MAE(size, 4, 16, depth, 2, 8, 1, 2).state_dict()


# ------------------------------------------------------------------------------------------- optimisers
def test_lars_golden_figures():
    import zlib
    figures = golden("misc")["lars"]
    w, b, x = (torch.nn.Parameter(draw(f"lars/{n}", *s)) for n, s in (("w", (8, 5)), ("b", (8,)), ("x", (16, 5))))
    y = torch.from_numpy(np.random.RandomState(zlib.crc32(b"lars/y")).randint(0, 8, 16))
    optimizer = evaluate.LARS([w, b], figures["lr"], figures["weight_decay"], figures["momentum"], figures["trust_coefficient"])
    for _ in range(figures["steps"]):
        optimizer.zero_grad()
        F.cross_entropy(x.detach() @ w.T + b, y).backward()
        optimizer.step()
    assert w.norm().item() == pytest.approx(figures["w_norm"], rel=1e-6)
    torch.testing.assert_close(w.flatten()[:5], torch.tensor(figures["w_head"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.detach(), torch.tensor(figures["b"]), rtol=1e-5, atol=1e-6)


def test_lars_by_hand():
    w, zero = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.zeros(1, 2))
    optimizer = evaluate.LARS([w, zero], lr=0.1)
    for want in ([[2.9997, 3.9996]], [[2.99913, 3.99884]]):
        w.grad, zero.grad = torch.tensor([[0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor(want), atol=1e-6, rtol=0)
    # of a zero matrix the first step is a plain one, 0.1; then momentum 0.9 + 0.001 * 0.1 / 1
    torch.testing.assert_close(zero.detach(), torch.tensor([[-0.1 - 0.1 * 0.9001, 0.0]]), atol=1e-7, rtol=0)


@pytest.mark.parametrize("depth, decay, embed", [(12, 0.65, 0.65 ** 13), (24, 0.75, 7.525e-4), (32, 0.75, 7.534e-5)])
def test_layer_decay(depth, decay, embed):
    with torch.device("meta"):
        encoder = mae.VisionTransformer(32, 16, 16, depth, 2)
    model = evaluate.Classifier(encoder, 3, "mean")
    groups = evaluate.layer_decay_groups(model, 0.05, decay)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    got = {name: scale[id(p)] for name, p in model.named_parameters()}           # each in one group
    assert sum(len(g["params"]) for g in groups) == len(got)
    for name in ("pos_embed", "cls_token", "patch_embed.proj.bias"):
        assert got[f"encoder.{name}"] == (pytest.approx(embed, rel=1e-3), 0)
    assert got["encoder.patch_embed.proj.weight"] == (pytest.approx(embed, rel=1e-3), 0.05)
    assert got[f"encoder.blocks.{depth - 1}.mlp.fc1.weight"] == (pytest.approx(decay), 0.05)
    assert got["encoder.blocks.0.norm1.weight"] == (pytest.approx(decay ** depth), 0)
    assert got["head.weight"] == (1, 0.05) and got["fc_norm.bias"] == (1, 0)


def test_parameter_counts_of_the_paper():
    for size, patch, tuned, probed in (("base", 16, 86_567_656, 769_000), ("large", 16, 304_326_632, 1_025_000),
                                       ("huge", 14, 632_045_800, 1_281_000)):
        with torch.device("meta"):
            encoder = mae.VisionTransformer(224, patch, *mae.SIZES[size])
            head = evaluate.LinearHead(encoder.cls_token.shape[-1], 1000, "cls")
        probe = evaluate.Frozen(encoder, head)
        assert sum(p.numel() for p in probe.parameters() if p.requires_grad) == probed
        with torch.device("meta"):
            assert sum(p.numel() for p in evaluate.Classifier(encoder, 1000, "mean").parameters()) == tuned


def test_presets_are_the_papers():
    base = evaluate.PRESETS["finetune"]["imagenet"]
    want = dict(batch_size=1024, epochs=100, warmup_epochs=5, base_lr=5e-4, min_lr=1e-6, weight_decay=0.05, layer_decay=0.65,
                drop_path=0.1, crop_scale=0.08, randaugment=9, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
    assert want.items() <= base.items()
    large, huge = (evaluate.PRESETS["finetune"][f"imagenet-{s}"] for s in ("large", "huge"))
    assert (large["base_lr"], large["epochs"], large["layer_decay"], large["drop_path"]) == (1e-3, 50, 0.75, 0.2)
    assert huge["drop_path"] == 0.3
    probe = evaluate.PRESETS["linear"]["imagenet"]
    assert (probe["batch_size"], probe["epochs"], probe["warmup_epochs"], probe["base_lr"]) == (16384, 90, 10, 0.1)
    for presets in evaluate.PRESETS.values():            # every one of them can be built
        for name, preset in presets.items():
            evaluate.Config(**preset, preset=name)


# ------------------------------------------------------------------------------------------------ scores
def test_nearest_does_not_depend_on_chunks():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(300, 8, generator=generator), torch.randn(2300, 8, generator=generator)
    similarity, rows = data.nearest_neighbors(test, train, 7)
    alone = [data.nearest_neighbors(test[i:i + 1], train, 7) for i in (0, 999, 1000, 2299)]
    for i, (s, r) in zip((0, 999, 1000, 2299), alone):
        assert torch.equal(r[0], rows[i]) and torch.allclose(s[0], similarity[i], atol=1e-6)
    exact = F.normalize(test.double(), dim=1) @ F.normalize(train.double(), dim=1).T
    assert (exact.topk(7).indices == rows).float().mean() > 0.999
    assert data.nearest_neighbors(test, train[:3], 7)[0].shape == (2300, 3)


def test_vote_is_that_of_a_softmax():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.rand(500, 20, generator=generator).sort(descending=True).values
    voters, y = torch.randint(0, 6, (500, 20), generator=generator), torch.randint(0, 6, (500,), generator=generator)
    votes = torch.zeros(500, 6, dtype=torch.double).scatter_add_(1, voters, (similarity.double() / 0.07).softmax(1))
    want = 100 * (votes.argmax(1) == y).double().mean().item()
    assert data.knn_vote(similarity, voters, y, 6)[0] == pytest.approx(want, abs=1e-4)


def test_ranking_by_hand():
    angles = torch.tensor([0.0, 10, 25, 45, 180]).deg2rad()                      # d's class has no other member
    features, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 1, 0, 1, 2])
    # a: b c d -> hit at 2; b: a c d -> hit at 3; c: b d a -> hit at 3; d: c b a -> hit at 2
    recall1, recall5, average = evaluate.ranking(features, labels)
    assert (recall1, recall5) == (0, 100) and average == pytest.approx(100 * (1 / 2 + 1 / 3 + 1 / 3 + 1 / 2) / 4)
    assert evaluate.ranking(features[[0, 0, 4, 4]], torch.tensor([0, 0, 1, 1])) == pytest.approx((100, 100, 100))


def test_a_picture_is_not_its_own_neighbour():
    features = torch.randn(1200, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(1200) % 10
    assert 6 < evaluate.ranking(features, labels)[0] < 14                        # chance, where itself would be 100


def test_mean_iou_by_hand():
    truth, prediction = torch.tensor([0, 1, 1, 1, 2, 255]), torch.tensor([0, 0, 1, 1, 2, 0])
    counts = evaluate.confusion(truth, prediction, 4)    # class 3 never occurs and does not count
    assert counts.sum() == 5 and evaluate.mean_iou(counts) == pytest.approx(100 * (1 / 2 + 2 / 3 + 1) / 3)
    assert evaluate.mean_iou(counts + evaluate.confusion(truth, truth, 4)) != evaluate.mean_iou(counts)


def test_sliding_window():
    constant = lambda x: torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(len(x), 2, *x.shape[-2:])
    for size in ((32, 32), (32, 47), (50, 90)):
        out = evaluate.slide(constant, torch.zeros(2, 3, *size), 32, 21, 2)
        assert out.shape == (2, 2, *size) and (out[:, 0] == 1).all() and (out[:, 1] == -2).all()
    seen = evaluate.slide(lambda x: x[:, :1], torch.arange(3 * 40 * 75.).view(1, 3, 40, 75), 32, 21, 1)
    torch.testing.assert_close(seen, torch.arange(40 * 75.).view(1, 1, 40, 75))  # each window where it belongs
    assert evaluate.windows(683, 512, 341) == [0, 171] and evaluate.windows(512, 512, 341) == [0]
    assert evaluate.windows(1100, 512, 341) == [0, 341, 588]


# ------------------------------------------------------------------------------------------------- heads
def test_batch_norm_of_the_probe_can_be_folded_into_the_linear_layer():
    torch.manual_seed(0)
    head, tokens = evaluate.LinearHead(16, 5, "mean"), 3 * torch.randn(64, 5, 16) + 2
    for _ in range(100):
        head(tokens)
    head.eval()
    scale = (head.norm.running_var + 1e-6).rsqrt()
    x = tokens[:, 1:].mean(1)
    folded = F.linear(x, head.fc.weight * scale, head.fc.bias - head.fc.weight @ (scale * head.norm.running_mean))
    torch.testing.assert_close(head(tokens), folded, atol=1e-5, rtol=1e-5)
    head.features = "cls"
    torch.testing.assert_close(head(tokens), head.fc(head.norm(tokens[:, 0])))


def test_attentive_head():
    torch.manual_seed(0)
    head, tokens = evaluate.AttentiveHead(16, 5, 2), torch.randn(4, 10, 16)
    want = F.linear(head.kv(tokens[:, 1:])[..., 16:].mean(1), head.fc.weight, head.fc.bias)
    uniform = torch.nn.init.zeros_(head.query)           # equal attention is the mean
    torch.testing.assert_close(head(tokens), want, atol=1e-6, rtol=1e-5)
    torch.nn.init.normal_(uniform)
    mixed = torch.cat([torch.randn(4, 1, 16), tokens[:, 1:][:, torch.randperm(9)]], dim=1)
    torch.testing.assert_close(head(tokens), head(mixed), atol=1e-6, rtol=1e-5)
    q, (k, v) = head.query.view(2, 8), head.kv(tokens[0, 1:]).chunk(2, dim=1)    # by hand, head by head
    by_hand = [((k[:, s] @ q[h]) / 8 ** 0.5).softmax(0) @ v[:, s] for h, s in enumerate((slice(0, 8), slice(8, 16)))]
    torch.testing.assert_close(head(tokens)[0], head.fc(torch.cat(by_hand)), atol=1e-5, rtol=1e-5)


def test_classifier_pools_as_released():
    encoder, images = vit(), torch.randn(2, 3, 16, 16)
    tokens = encoder.encode(images)
    cls = evaluate.Classifier(encoder, 3, "cls")
    torch.nn.init.normal_(cls.head.weight)               # its own weights would hide all differences
    torch.testing.assert_close(cls(images), cls.head(tokens[:, 0]))
    encoder = vit()
    raw = []
    encoder.norm.register_forward_hook(lambda m, x, y: raw.append(x[0]))
    encoder.encode(images)
    mean = evaluate.Classifier(encoder, 3, "mean")
    assert mean.head.weight.std() < 4e-5 and encoder.pos_embed.requires_grad
    torch.nn.init.normal_(mean.head.weight)
    torch.testing.assert_close(mean(images), mean.head(F.layer_norm(raw[0][:, 1:].mean(1), (16,), eps=1e-6)))
    assert set(mean.weights()) == set(encoder.state_dict()) | {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def test_taps():
    encoder, images = vit(), torch.randn(3, 3, 16, 16)
    norm, encoder.norm = encoder.norm, torch.nn.Identity()
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    found = evaluate.taps(encoder.encode(images), norm)
    encoder.norm = norm
    tokens = encoder.encode(images)
    torch.testing.assert_close(found["cls"], tokens[:, 0]), torch.testing.assert_close(found["mean"], tokens[:, 1:].mean(1))
    assert list(found) == ["cls", "mean", "cls-raw", "mean-raw"]
    torch.testing.assert_close(norm(found["cls-raw"]), found["cls"])
    assert not torch.allclose(norm(found["mean-raw"]), found["mean"])


def test_drop_path(monkeypatch):
    torch.manual_seed(0)
    kept = torch.stack([stochastic_depth(torch.ones(1, 1), 0.3, "row") for _ in range(4000)])
    assert kept.mean().item() == pytest.approx(1, abs=0.05) and kept.unique().tolist() == pytest.approx([0, 1 / 0.7])
    monkeypatch.setitem(mae.SIZES, "micro", (16, 3, 2))
    encoder, images = vit(), torch.randn(64, 3, 16, 16)
    want, names = encoder.encode(images), list(encoder.state_dict())
    common.add_drop_path(encoder.blocks, 1.0)            # chances 0, 0.5, 1: the last block always goes
    torch.testing.assert_close(encoder.eval().encode(images), want)              # nothing is dropped when scoring
    encoder.train()
    last, seen = encoder.blocks[2], []
    last.register_forward_hook(lambda m, x, y: seen.append(torch.equal(x[0], y)))
    first = encoder.blocks[0]
    first.register_forward_hook(lambda m, x, y: seen.append((x[0] != y).flatten(1).any(1).all().item()))
    encoder.encode(images)
    assert seen == [True, True] and list(encoder.state_dict()) == names


def test_ema_is_the_closed_form():
    model = torch.nn.Linear(2, 1, bias=False)
    ema, want = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), None
    for value in (1.0, 5.0, -2.0):
        torch.nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        want = value if want is None else 0.9 * want + 0.1 * value
    torch.testing.assert_close(ema.module.weight, torch.full((1, 2), want))


# -------------------------------------------------------------------------------------------------- pictures
def test_randaugment_turns_by_27_degrees_at_most():
    strength = data.augment(32, 1.0, randaugment=9).transforms[2]
    assert (strength.num_ops, strength.magnitude, strength.num_magnitude_bins) == (2, 9, 11)
    magnitudes, signed = strength._AUGMENTATION_SPACE["Rotate"]
    assert signed and float(magnitudes(11, 32, 32)[9]) == pytest.approx(27)


def test_augmentation_is_uint8_and_repeats():
    cfg = evaluate.Config(image_size=32, randaugment=9, erasing=0.5, crop_scale=0.3)
    drawn = data.synthetic_shapes("train", np.arange(20))["image"]
    pictures = data.ImageDataset(torch.from_numpy(drawn), transform=evaluate.augment(cfg))
    for i in range(20):
        picture = pictures[3, i][0]
        assert picture.dtype == torch.uint8 and picture.shape == (3, 32, 32) and torch.equal(picture, pictures[3, i][0])


def test_erasing():
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert torch.equal(evaluate.Erase(0.0)(picture), picture)
    erase, changed, noise = evaluate.Erase(1.0), [], []
    for _ in range(50):
        new = erase(picture)
        where = (new != picture).any(0)
        rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
        box = new[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1].double()
        assert where.sum() > 0.9 * box[0].numel()        # a whole rectangle, and nothing else
        changed.append(where.float().mean().item())
        assert box.std() > 30
        noise.append(box.flatten(1))
    noise = torch.cat(noise, dim=1) / 255                # that of normalised images, all but uncut
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.double)
    torch.testing.assert_close(noise.mean(dim=1), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(noise.std(dim=1), std, atol=0, rtol=0.06)
    assert 0.01 < min(changed) and max(changed) < 0.34
    torch.manual_seed(0)
    assert 0.15 < np.mean([not torch.equal(evaluate.Erase(0.25)(picture), picture) for _ in range(400)]) < 0.35


def test_mixing():
    torch.manual_seed(0)
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    mix, kinds = data.mixing(0.8, 1.0, 8), set()
    for _ in range(20):
        mixed, soft = mix(images, labels)
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        weight = soft[torch.arange(8), labels]
        partner = images.roll(1, 0)
        blend = weight.view(-1, 1, 1, 1) * images + (1 - weight).view(-1, 1, 1, 1) * partner
        cut = ((mixed == images) | (mixed == partner)).all()
        kinds.add("cut" if cut else "mix")
        assert cut or torch.allclose(mixed, blend, atol=1e-5)
        logits = torch.randn(8, 8)                       # smoothing of soft labels: the mixture of smoothed ones
        smooth = 0.9 * soft + 0.1 / 8
        want = -(smooth * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(F.cross_entropy(logits, soft, label_smoothing=0.1), want)
    assert kinds == {"cut", "mix"}
    same = data.mixing(0.0, 0.0, 8)(images, labels)
    assert torch.equal(same[0], images) and torch.equal(same[1], labels)


def test_few_shots():
    labels = np.repeat([0, 1, 2], [50, 30, 3])
    pictures = data.ImageDataset(torch.arange(83, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), labels)
    five = data.subset(pictures, 5, 100, 0)
    assert np.bincount(five.labels).tolist() == [5, 5, 3]
    assert (labels[five.source[:, 0, 0, 0].numpy()] == five.labels).all()        # each keeps its label
    assert not torch.equal(five.source, data.subset(pictures, 5, 100, 1).source)
    assert torch.equal(five.source, data.subset(pictures, 5, 100, 0).source)
    assert np.bincount(data.subset(pictures, 0, 10, 0).labels).tolist() == [5, 3, 1]
    assert len(data.subset(pictures, 0, 100, 0)) == 83


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def test_ade20k(tmp_path):
    top = tmp_path / "ADEChallengeData2016"
    for split, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            save(top / "images" / split / f"{i}.jpg", np.zeros((2, 2, 3)))
            save(top / "annotations" / split / f"{i}.png", [[0, 1], [150, 7]])
    train, test, classes = evaluate.open_masked(evaluate.Config(protocol="segment", data="ade20k", data_root=str(tmp_path)))
    assert (len(train), len(test), len(classes)) == (3, 2, 150)
    (picture, mask), _, _ = test[0, 1]
    assert picture.shape == (3, 2, 2) and mask.tolist() == [[255, 0], [149, 6]]


def test_folder_of_pictures_and_masks(tmp_path):
    for i in range(20):
        save(tmp_path / "images" / f"{i:02}.jpg", np.full((12, 9, 3), 10 * i))
        save(tmp_path / "masks" / f"{i:02}.png", np.full((12, 9), 255 if i == 3 else i % 4))
    save(tmp_path / "images/lonely.jpg", np.zeros((4, 4, 3)))
    cfg = evaluate.Config(protocol="segment", data=str(tmp_path), image_size=8)
    train, test, classes = evaluate.open_masked(cfg)
    assert (len(train), len(test), len(classes)) == (18, 2, 4)
    assert [train[0, i][0][1].max().item() for i in range(4)] == [0, 1, 2, 255]
    train.transform = v2.Compose([v2.RandomResizedCrop(8, (0.3, 1)), v2.RandomHorizontalFlip()])
    (picture, mask), _, _ = train[0, 0]
    assert picture.shape == (3, 8, 8) and mask.shape == (8, 8)
    save(tmp_path / "masks/00.png", np.zeros((3, 3)))    # of another size: named, skipped, counted
    (_, mask), _, index = train[0, 0]                    # one drawn by (seed, epoch, index) instead
    assert index == np.random.RandomState(common.derive_seed(0, 0, 0)).randint(18) != 0
    assert mask.unique().tolist() == train.mask(index).unique().tolist()
    assert train.unreadable.nonzero().flatten().tolist() == [0]
    with pytest.raises(common.UserError, match="no images/ and masks/"):
        evaluate.open_masked(evaluate.Config(protocol="segment", data="nowhere"))
    save(tmp_path / "masks/validation/other.png", np.zeros((12, 9)))
    with pytest.raises(common.UserError, match="no picture in .*validation has a mask of its name"):
        evaluate.open_masked(cfg)


@pytest.mark.parametrize("mask, words", [(np.full((4, 4), 7), "holds class 7, classes are 0 to 2"), (np.zeros((4, 4, 3)), "not one byte a pixel"),
                                         (np.zeros((3, 4)), "has (3, 4) pixels"), (None, "mask: ")])
def test_masks_that_cannot_be_used(tmp_path, mask, words):
    save(tmp_path / "a.png", np.zeros((4, 4, 3)))
    save(tmp_path / "mask.png", mask) if mask is not None else (tmp_path / "mask.png").write_text("text")
    with pytest.raises(OSError) as error:
        evaluate.Masked([tmp_path / "a.png"], [tmp_path / "mask.png"], 3).read(0)
    assert words in str(error.value)


def test_masks_of_black_and_white_are_refused(tmp_path):
    for i in range(10):
        save(tmp_path / "images" / f"{i}.png", np.zeros((4, 4, 3)))
        save(tmp_path / "masks" / f"{i}.png", 255 * np.eye(4))
    with pytest.raises(common.UserError, match="one class besides 255"):
        evaluate.open_masked(evaluate.Config(protocol="segment", data=str(tmp_path)))


def test_picture_and_mask_are_cropped_alike():
    drawn = data.synthetic_shapes("train", np.arange(50))
    bright = torch.from_numpy(np.repeat(drawn["mask"][:, None], 3, 1).astype(np.uint8) * 255)
    masked = evaluate.Masked(bright, torch.from_numpy(drawn["mask"].astype(np.uint8)), 2)
    masked.transform = v2.Compose([v2.RandomResizedCrop(32, (0.3, 1), interpolation=v2.InterpolationMode.BICUBIC),
                                   v2.RandomHorizontalFlip()])
    agree = [((masked[1, i][0][0][0] > 127) == (masked[1, i][0][1] > 0)).float().mean().item() for i in range(50)]
    assert min(agree) > 0.9 and np.mean(agree) > 0.97


# ------------------------------------------------------------------------------------------ checkpoints
def load(state, tmp_path, **changes):
    torch.save(state, tmp_path / "weights.pth")
    return evaluate.load_encoder(evaluate.Config(checkpoint=str(tmp_path / "weights.pth"), **VIT | {"image_size": None} | changes))


def encoder_only(state):
    return {name: value for name, value in state.items() if not name.startswith("decoder") and name != "mask_token"}


def test_released_layouts(tmp_path, capsys):
    whole = official()
    encoder, images = encoder_only(whole), torch.randn(2, 3, 16, 16)
    want = mae.VisionTransformer(16, 4, 16, 2, 2)
    want.load_state_dict(encoder)
    want = want.encode(images)
    classifier = encoder | {"head.weight": torch.randn(7, 16), "head.bias": torch.randn(7)}
    for layout, left in (({"model": encoder}, 0), ({"model": whole, "args": argparse.Namespace(a=1), "epoch": 3}, 20),
                         (encoder, 0), (classifier, 2), ({"model": {f"module.{n}": v for n, v in encoder.items()}}, 0),
                         ({"teacher": {f"backbone.{n}": v for n, v in encoder.items()} | {"head.mlp.0.weight": torch.ones(2)}}, 1)):
        model, extra, about = load(layout, tmp_path)
        torch.testing.assert_close(model.encode(images), want)
        assert len(extra) == left and about["method"] == "mae" and about["config"]["image_size"] == 16
        assert set(model.state_dict()) == set(encoder)
        assert f"missing from it 0 [], left out {left} [" in capsys.readouterr().out
    tuned = {n: v for n, v in classifier.items() if not n.startswith("norm.")} | {"fc_norm.weight": torch.ones(16), "fc_norm.bias": torch.ones(16)}
    model, extra, _ = load({"model": tuned}, tmp_path)
    assert isinstance(model.norm, torch.nn.Identity) and set(extra) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}


def test_other_image_size_resizes_positions(tmp_path):
    state = encoder_only(official())
    model, _, about = load(state, tmp_path, image_size=24)
    assert model.grid == (6, 6) and about["config"]["image_size"] == 24
    torch.testing.assert_close(model.pos_embed, common.resize_positions(state["pos_embed"], (6, 6)))
    assert torch.equal(load(state, tmp_path)[0].pos_embed, state["pos_embed"])


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("blocks.1.norm1.bias"), "missing 1 [blocks.*.norm1.bias]"),
    (lambda s: s.update({"dist_token": torch.zeros(1)}), "unexpected 1 [dist_token]"),
    (lambda s: s.update({"dist_token": torch.zeros(1), "pos_embed": torch.zeros(1, 18, 16)}),
     "unexpected 1 [dist_token]"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 18, 16)}),
     "pos_embed has 17 rows for patches"),
    (lambda s: s.update({"cls_token": torch.zeros(1, 1, 8)}), "of another size 1 [cls_token]"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 16, 16)}), "pos_embed has no row for the class token"),
    (lambda s: s.update({"pos_embed": torch.zeros(1, 17, 8)}), "of another size 1 [pos_embed]"),
    (lambda s: s["blocks.0.mlp.fc1.bias"].fill_(torch.nan),
     "not all of blocks.0.mlp.fc1.bias is finite"),
    (lambda s: s.update({"pos_embed": torch.zeros(3)}), "no Vision Transformer"),
    (lambda s: s.update({"patch_embed.proj.weight": torch.tensor(0.0)}), "no Vision Transformer"),
    (lambda s: s.pop("norm.weight"), "missing 1 [norm.weight]"),
    (lambda s: s.update({3: torch.zeros(1)}), "holds no weights"),
    (lambda s: [s.pop(n) for n in list(s) if n != "cls_token"], "no Vision Transformer"),
    (lambda s: s.update({"epoch": 3}), "holds no weights")])
def test_a_file_that_does_not_fit_is_one_line(tmp_path, monkeypatch, change, words):
    state = encoder_only(official())
    change(state)
    with pytest.raises(common.UserError) as error:
        load(state, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setitem(mae.SIZES, "micro", (16, 3, 2))
    with pytest.raises(common.UserError, match="another size|missing"):
        load(encoder_only(official()), tmp_path)


def test_a_checkpoint_of_ours(photos):                   # noqa: F811
    mae.train(tiny(output="run", max_steps=2))
    state = torch.load("run/checkpoint.pt", weights_only=True)
    model, extra, about = evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt"))
    want = mae.build(tiny())
    want.load_state_dict(state["model"])
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.encode(images), want.encode(images)) and about["config"]["embed_dim"] == 16
    assert all(n.startswith("decoder") or n == "mask_token" for n in extra)
    alone, _, _ = evaluate.load_encoder(evaluate.Config(checkpoint="run/encoder.pt", **VIT | {"image_size": None}))
    assert torch.equal(alone.encode(images), model.encode(images))
    with pytest.raises(common.UserError, match="no script other.py"):
        evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt", method="other"))


def test_an_edited_row_of_sizes_does_not_change_an_old_run(photos, monkeypatch):    # noqa: F811
    mae.train(tiny(output="run", max_steps=1))
    monkeypatch.setitem(mae.SIZES, "micro", (32, 1, 4))
    model, _, about = evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt"))
    assert [about["config"][name] for name in ("embed_dim", "depth", "num_heads")] == [16, 2, 2]
    assert len(model.blocks) == 2 and model.blocks[0].attn.num_heads == 2
    for row, words in (((32, 1, 4), "missing 0 .*, unexpected 12 "),
                       ((32, 2, 4), "of another size ")):
        monkeypatch.setitem(mae.SIZES, "micro", row)
        with pytest.raises(common.UserError, match=f"does not fit: {words}"):
            evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt", model="micro"))


def test_the_old_runs_device_and_the_like_do_not_matter(photos):    # noqa: F811
    mae.train(tiny(output="run", max_steps=1))
    want = evaluated("finetune", **FROM_CHECKPOINT, checkpoint="run/checkpoint.pt")
    state = torch.load("run/checkpoint.pt", weights_only=True)
    state["config"] |= dict(device="cuda", compile=True, precision="bf16", workers=1000,
                            resume=False, data="gone", data_root="gone", init="gone.pt",
                            output="gone", preset="gone")
    Path("other").mkdir()
    torch.save(state, "other/checkpoint.pt")
    changes = FROM_CHECKPOINT | dict(checkpoint="other/checkpoint.pt", output="tuned")
    result = evaluated("finetune", **changes)
    changes = FROM_CHECKPOINT | dict(checkpoint="tuned/finetuned.pt", output="again")
    again = evaluated("finetune", eval=True, **changes)
    assert want["top1"] == result["top1"] == again["top1"] and not Path("gone").exists()
    tuned, other = (torch.load(f"{run}/finetuned.pt", weights_only=True)["model"]
                    for run in ("eval-finetune", "tuned"))
    assert all(torch.equal(tuned[name], other[name]) for name in tuned)


def test_settings_become_a_config_again():
    cfg = tiny(mask_ratio=0.5, seed=7)
    settings = dict(vars(cfg))
    assert evaluate.config_from(mae.Config, settings) == cfg and settings == vars(cfg)
    same = evaluate.config_from(mae.Config, settings | {"embed_dim": 32, "depth": 1})
    assert vars(same) == settings | {"embed_dim": 32, "depth": 1}
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


# -------------------------------------------------------------------------------------------------- runs
FAST = dict(epochs=1, batch_size=10, base_lr=0.01, seed=0)


def evaluated(protocol, **changes):
    settings = dict(data="photos", output=f"eval-{protocol}") | VIT | FAST | changes
    return evaluate.evaluate(evaluate.Config(protocol=protocol, **settings))


@pytest.mark.parametrize("protocol, figure", [("knn", "top1"), ("retrieval", "map"), ("linear", "top1"), ("attentive", "top1"),
                                              ("finetune", "top1"), ("segment", "miou")])
def test_every_protocol(photos, capsys, monkeypatch, protocol, figure):   # noqa: F811
    changes = {}
    if protocol == "segment":
        for i in range(12):
            save(Path(f"masks/images/{i}.png"), np.random.RandomState(i).randint(0, 255, (16 + i % 2, 24, 3)))
            save(Path(f"masks/masks/{i}.png"), np.random.RandomState(i).randint(0, 3, (16 + i % 2, 24)))
        changes = dict(data="masks", crop_scale=0.5)
    honest, seen = evaluate.load_encoder, []

    def load_encoder(cfg):
        found = honest(cfg)
        seen.extend((found[0], {n: v.clone() for n, v in found[0].state_dict().items()}))
        return found

    monkeypatch.setattr(evaluate, "load_encoder", load_encoder)
    result = evaluated(protocol, **changes)
    last = json.loads(open(f"eval-{protocol}/metrics.jsonl").readlines()[-1])
    assert last["protocol"] == protocol and last[figure] == pytest.approx(result[figure], abs=1e-3) and 0 <= result[figure] <= 100
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(f"{protocol}, none, ")
    encoder, before = seen
    unchanged = all(torch.equal(before[n], v) for n, v in encoder.state_dict().items())
    assert unchanged == (protocol != "finetune")         # a probe leaves every byte of the encoder alone
    if protocol == "segment":
        assert np.asarray(Image.open("eval-segment/segmentation.png")).std() > 20


def test_maes_probe(photos):                             # noqa: F811
    result = evaluated("linear", cached=False, features="cls-raw", crop_scale=0.5, epochs=2)
    lines = [json.loads(line) for line in open("eval-linear/metrics.jsonl")]
    assert [line["step"] for line in lines if "top1" in line and "step" in line] == [4, 8] and result["top1"] == lines[-2]["top1"]
    state = torch.load("eval-linear/checkpoint.pt", weights_only=True)["model"]
    assert set(state) == {"fc.weight", "fc.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    with pytest.raises(common.UserError, match="two pictures or more"):
        evaluated("linear", cached=False, batch_size=1, output="other")


# --------------------------------------------------------------------------- recipes, written out
# All of them: 40 images, 10 a step, 2 epochs of 4 steps, half an epoch of warm-up, 5 steps trained.
RECIPE = dict(checkpoint="encoder.pth", batch_size=10, epochs=2, warmup_epochs=0.5, max_steps=5)
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rate(step, peak, minimum, shape="cosine", steps=4):
    """Of an epoch of `steps` steps."""
    warmup, total = steps / 2, 2 * steps
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
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    torch.save(encoder.state_dict(), "encoder.pth")
    return encoder


def tokens_of(encoder, images, drop_path=0.0):
    """Tokens before the last norm; the first block drops nothing, the second with that chance."""
    x = encoder.patch_embed(mae.patchify(images, 4)) + encoder.pos_embed[:, 1:]
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block, chance in zip(encoder.blocks, (0.0, drop_path)):
        x = x + stochastic_depth(block.attn(block.norm1(x)), chance, "row")
        x = x + stochastic_depth(block.mlp(block.norm2(x)), chance, "row")
    return x


@torch.no_grad()
def raw_tokens(encoder, dataset):
    """Those of the images' centres, before the last norm."""
    centres = dataset.with_transform(data.CenterCrop(16))
    images = torch.stack([centres[0, i][0] for i in range(len(centres))])
    return tokens_of(encoder, (images / 255 - MEAN) / STD)


def groups_of(model, decay, weight_decay):
    """A group for each parameter, with its name and the factor on its learning rate: 1 for heads
    and the norm after the two blocks, `decay` and its square for these, its cube below."""
    groups = []
    for name, p in model.named_parameters():
        layer = name.removeprefix("encoder.")
        power = {"c": 3, "p": 3}.get(layer[0], 0)        # cls_token, pos_embed, patch_embed
        power = 2 - int(layer.split(".")[1]) if layer.startswith("blocks") else power
        decayed = p.ndim > 1 and layer not in ("cls_token", "pos_embed")
        groups.append({"params": [p], "name": name, "factor": decay ** power,
                       "weight_decay": weight_decay if decayed else 0.0})
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


def without_keys(state):
    """Of the attentive head, without the bias of its keys, which has no effect: see `close`."""
    return {name: value[16:] if name == "kv.bias" else value for name, value in state.items()}


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_recipe_of_fine_tuning(photos, pool):            # noqa: F811
    """Tables 9 and 11 of MAE: mixing, smoothing, drop path, decay per layer, averaged weights."""
    encoder = drawn_encoder()
    mixed = dict(drop_path=0.5, mixup=0.8, cutmix=1.0, smoothing=0.2, ema=0.7, randaugment=9,
                 erasing=0.5, crop_scale=0.5)
    evaluated("finetune", **RECIPE, **mixed, pool=pool, base_lr=0.5, min_lr=0.01, weight_decay=2.0,
              beta2=0.9, layer_decay=0.5)
    torch.manual_seed(0)                                 # decides the new classifier
    model = evaluate.Classifier(encoder, 2, pool)
    groups = groups_of(model, 0.5, 2.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    augment = [data.augment(16, 0.5, randaugment=9), evaluate.Erase(0.5)]
    dataset = data.open_data("photos", "").train.with_transform(v2.Compose(augment))
    mixup = v2.MixUp(alpha=0.8, num_classes=2)
    cutmix = v2.CutMix(alpha=1.0, num_classes=2)
    mixes = v2.RandomChoice([mixup, cutmix])
    average = None
    for step in range(5):
        images, labels = batch_of(dataset, step)
        torch.manual_seed(seed_of(0, step))
        images, labels = mixes(images, labels)
        x = tokens_of(encoder, images, drop_path=0.5)
        x = model.fc_norm(x[:, 1:].mean(dim=1)) if pool == "mean" else encoder.norm(x[:, 0])
        labels = 0.8 * labels + 0.2 / 2
        loss = -(labels * model.head(x).log_softmax(dim=1)).sum(dim=1).mean()
        loss.backward()
        adam_step(optimizer, rate(step, 0.5 * 10 / 256, 0.01))
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        average = average or weights
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in weights}
    found = checkpoint("eval-finetune")["model"]
    close(weights, {name.removeprefix("0."): value for name, value in found.items()})
    close(average, {name.removeprefix("1.module."): value for name, value in found.items()})
    own = evaluate.layer_decay_groups(model, 2.0, 0.5)
    close(averages(optimizer), saved_averages("eval-finetune", model, own))
    for name, expected in (("finetuned", weights), ("finetuned-ema", average)):
        written = torch.load(f"eval-finetune/{name}.pt", weights_only=True)["model"]
        close({n.removeprefix("encoder."): value for n, value in expected.items()}, written)


@pytest.mark.parametrize("features", ["mean", "cls-raw"])
def test_recipe_of_maes_probe(photos, features):         # noqa: F811
    """Appendix A.1: batch normalisation without weights, LARS, nothing but crops and flips."""
    encoder = drawn_encoder()
    evaluated("linear", **RECIPE, cached=False, features=features, crop_scale=0.5, base_lr=800.0,
              min_lr=5.0, weight_decay=0.5)
    torch.manual_seed(0)
    head = evaluate.LinearHead(16, 2, features)
    weight, bias = head.fc.weight, head.fc.bias
    momentum = [torch.zeros_like(weight), torch.zeros_like(bias)]
    running_mean, running_var = torch.zeros(16), torch.ones(16)
    train = data.open_data("photos", "").train
    dataset = train.with_transform(data.augment(16, 0.5))
    for step in range(5):
        images, labels = batch_of(dataset, step)
        with torch.no_grad():
            tokens = tokens_of(encoder, images)
            tokens = tokens if features.endswith("raw") else encoder.norm(tokens)
            x = tokens[:, 0] if features.startswith("cls") else tokens[:, 1:].mean(dim=1)
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


def test_recipe_of_the_attentive_probe(photos):          # noqa: F811
    encoder = drawn_encoder()
    evaluated("attentive", **RECIPE, crop_scale=0.5, base_lr=0.5, min_lr=0.01, weight_decay=2.0,
              beta2=0.9)
    torch.manual_seed(0)
    head = evaluate.AttentiveHead(16, 2, 1)
    decays = {"query": 2.0, "kv.weight": 2.0, "kv.bias": 0.0, "fc.weight": 2.0, "fc.bias": 0.0}
    groups = [{"params": [p], "factor": 1.0, "name": name, "weight_decay": decays[name]}
              for name, p in head.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    dataset = data.open_data("photos", "").train.with_transform(data.augment(16, 0.5))
    for step in range(5):
        images, labels = batch_of(dataset, step)
        with torch.no_grad():
            tokens = encoder.norm(tokens_of(encoder, images))
        F.cross_entropy(head(tokens), labels).backward()
        adam_step(optimizer, rate(step, 0.5 * 10 / 256, 0.01))
    close(*map(without_keys, (head.state_dict(), checkpoint("eval-attentive")["model"])))
    own = common.parameter_groups(head, 2.0)
    close(*map(without_keys, (averages(optimizer), saved_averages("eval-attentive", head, own))))


def test_recipe_of_the_sweep(photos, monkeypatch):       # noqa: F811
    """Each layer as if it were trained alone, on standardised features, by SGD at its own rate; the
    rate is chosen by layers that never saw the held-out images."""
    encoder = drawn_encoder()
    honest, scored = data.topk_accuracy, []
    monkeypatch.setattr(data, "topk_accuracy",
                        lambda *given: scored.append(given[0]) or honest(*given))
    result = evaluated("linear", **RECIPE, features="mean-raw", base_lr=1.0, min_lr=0.001,
                       weight_decay=0.2)
    splits = data.open_data("photos", "")
    features = [raw_tokens(encoder, part)[:, 1:].mean(dim=1)
                for part in (splits.train, splits.test)]
    mean, std = features[0].mean(dim=0), features[0].std(dim=0) + 1e-6
    x, test = ((part - mean) / std for part in features)
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
        hits = {seen: (features @ layers[layer][0].T + layers[layer][1]).argmax(dim=1) == labels
                for seen, layer, features, labels in (("held", "rest", x[held > 0], y[held > 0]),
                                                      ("known", "all", x[held > 0], y[held > 0]),
                                                      ("test", "all", test, test_y))}
        logits_of.append(test @ layers["all"][0].T + layers["all"][1])
        for name in scores:
            scores[name].append(100 * hits[name].float().mean().item())
    best = scores["held"].index(max(scores["held"]))
    assert best != scores["known"].index(max(scores["known"])) and len(set(scores["test"])) > 2
    assert result["chosen_lr"] == pytest.approx(1.0 * 10 / 256 * rates[best])
    assert result["top1"] == pytest.approx(scores["test"][best])
    torch.testing.assert_close(scored[-1], logits_of[best], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_recipe_of_segmentation(in_tmp, frozen):
    """Decay per layer, drop path, a straight line of rates; pixels of class 255 do not count."""
    random = np.random.RandomState(0)
    for i in range(20):
        save(Path(f"masks/images/{i:02}.png"), random.randint(0, 255, (16 + i % 2, 24, 3)))
        mask = random.randint(0, 3, (16 + i % 2, 24))
        mask[random.rand(*mask.shape) < i / 40] = 255    # not equally many
        save(Path(f"masks/masks/{i:02}.png"), mask)
    encoder = drawn_encoder()
    evaluated("segment", **RECIPE | dict(batch_size=6), data="masks", frozen=frozen, crop_scale=0.5,
              schedule="linear", drop_path=0.5, base_lr=0.8, min_lr=0.01, weight_decay=2.0,
              beta2=0.9, layer_decay=0.5)                # 18 to train on: 3 steps an epoch
    torch.manual_seed(0)
    model = evaluate.Segmenter(encoder.requires_grad_(not frozen), 3)
    groups = groups_of(model.head if frozen else model, 0.5, 2.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.9), eps=1e-8)
    dataset, _, _ = evaluate.open_masked(evaluate.Config(protocol="segment", data="masks"))
    bicubic = v2.InterpolationMode.BICUBIC
    crop = v2.RandomResizedCrop(16, (0.5, 1.0), interpolation=bicubic)
    dataset.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
    for step in range(5):
        epoch, order = order_of(step, images=18, size=6)
        images, masks = zip(*(dataset[epoch, i][0] for i in order))
        images, masks = torch.stack(images), torch.stack(masks).long()
        torch.manual_seed(seed_of(0, step))
        tokens = tokens_of(encoder, (images / 255 - MEAN) / STD, 0.0 if frozen else 0.5)
        maps = encoder.norm(tokens)[:, 1:].reshape(6, 4, 4, 16).permute(0, 3, 1, 2)
        logits = F.interpolate(model.head(maps), (16, 16), mode="bilinear")    # (6, 3, 16, 16)
        logits = logits.permute(0, 2, 3, 1)[masks != 255]                      # (pixels, 3)
        F.cross_entropy(logits, masks[masks != 255]).backward()
        adam_step(optimizer, rate(step, 0.8 * 6 / 256, 0.01, "linear", steps=3))
    expected, found = model.state_dict(), checkpoint("eval-segment")["model"]
    if frozen:
        expected = model.head.state_dict()
    else:                                                # the norm has no effect on a batch
        for name in ("encoder.norm.weight", "encoder.norm.bias", "head.0.running_mean",
                     "head.0.running_var"):              # normalisation, but on what that keeps
            del expected[name], found[name]
    assert expected.keys() == found.keys()
    close(expected, found)
    own = evaluate.layer_decay_groups(model, 2.0, 0.5)
    moved = saved_averages("eval-segment", model, own)
    expected = averages(optimizer)
    close(expected if not frozen else {f"head.{n}": v for n, v in expected.items()}, moved)


def test_figures_of_knn_and_retrieval(photos):           # noqa: F811
    encoder = drawn_encoder()
    splits = data.open_data("photos", "")
    features, figures = {}, {}
    for part in ("train", "test"):
        tokens = raw_tokens(encoder, getattr(splits, part))
        with torch.no_grad():
            normed = encoder.norm(tokens)
        features[part] = {"cls": normed[:, 0], "mean": normed[:, 1:].mean(dim=1),
                          "cls-raw": tokens[:, 0], "mean-raw": tokens[:, 1:].mean(dim=1)}
    train_y, test_y = (torch.from_numpy(part.labels) for part in (splits.train, splits.test))
    for tap in features["train"]:
        queries = features["test"][tap]
        similarity = F.cosine_similarity(queries[:, None], features["train"][tap], dim=2)
        for k in (1, 10, 20, 100, 200):
            best = similarity.topk(min(k, 40), dim=1)
            votes = (best.values / 0.07).softmax(dim=1)
            for_b = (votes * train_y[best.indices]).sum(dim=1) > 0.5
            figures[f"{tap}_{k}"] = 100 * (for_b == test_y.bool()).float().mean().item()
    for tap in ("mean", "cls-raw"):
        result = evaluated("knn", checkpoint="encoder.pth", features=tap)
        assert {name: result[name] for name in figures} == pytest.approx(figures)
        assert result["top1"] == pytest.approx(figures[f"{tap}_20"])
        result = evaluated("retrieval", checkpoint="encoder.pth", features=tap)
        expected = evaluate.ranking(features["test"][tap], test_y)
        found = [result[name] for name in ("recall1", "recall5", "map")]
        assert found == pytest.approx(expected, rel=1e-4)
    assert figures["cls-raw_10"] != figures["cls-raw_20"] != figures["mean_20"]


def test_seeds_of_a_step(monkeypatch):
    """What is drawn depends on the seed, the step, the micro-batch and the process."""
    seeds = {}
    model = torch.nn.Linear(1, 1)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        seeds[rank] = []

        def loss_of(batch):
            seeds[rank].append(torch.initial_seed())
            return model(torch.ones(1)).sum()

        run = argparse.Namespace(steps=lambda batches: [(3, batches[:2]), (4, batches[2:])],
                                 steps_per_epoch=4, end_step=lambda *_: None)
        optimizer = torch.optim.SGD(model.parameters())
        cfg = evaluate.Config(seed=7, accumulate=2)
        evaluate.fit(cfg, run, model, optimizer, [0, 1, 2, 3], loss_of)
        expected = [seed_of(7, step, i, rank) for step in (3, 4) for i in (0, 1)]
        assert seeds[rank] == expected
    assert len({*seeds[0], *seeds[1]}) == 8


def test_nothing_is_dropped_while_images_are_scored(photos, monkeypatch):    # noqa: F811
    """Drop path is off and batch normalisation has its own averages: logits do not depend on the
    draws and on the other images of a batch."""
    for i in range(12):
        random = np.random.RandomState(i)
        save(Path(f"masks/images/{i:02}.png"), random.randint(0, 255, (16, 24, 3)))
        save(Path(f"masks/masks/{i:02}.png"), random.randint(0, 3, (16, 24)))
    features, pictures, calls = data.features, evaluate.segment_pictures, []

    def features_twice(encode, *args, **options):
        first, _ = features(encode, *args, **options)
        second, labels = features(encode, *args, **options, batch_size=1)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)
        calls.append(1)
        return second, labels

    def pictures_twice(cfg, model, *args):
        logits = []
        hook = model.register_forward_hook(lambda module, images, out: logits.append(out))
        pictures(cfg, model, *args)
        count = len(logits)
        found = pictures(cfg, model, *args)
        hook.remove()
        assert all(map(torch.equal, logits[:count], logits[count:])) and len(logits) == 2 * count
        calls.append(1)
        return found

    monkeypatch.setattr(data, "features", features_twice)
    monkeypatch.setattr(evaluate, "segment_pictures", pictures_twice)
    evaluated("finetune", drop_path=0.9, epochs=2, ema=0.5)
    assert len(calls) == 4                               # two epochs, two models
    evaluated("linear", cached=False, epochs=2)
    assert len(calls) == 6
    evaluated("segment", data="masks", frozen=False, drop_path=0.9)
    assert len(calls) > 7


def optimizer_averages(state):
    """What AdamW or SGD averages of the gradients, whose scale AdamW itself would forgive."""
    return {f"{i} {name}": value for i, part in state["optimizer"]["state"].items()
            for name, value in part.items() if name in ("exp_avg", "momentum_buffer")}


def test_accumulation_is_one_large_batch(photos):        # noqa: F811
    """Two images a micro-batch, into the second epoch."""
    drawn_encoder()
    for protocol in ("finetune", "attentive", "linear"):
        for accumulate in (1, 5):
            evaluated(protocol, **RECIPE, accumulate=accumulate, crop_scale=0.5, smoothing=0.1,
                      base_lr=0.1, output=f"{protocol}{accumulate}")
        one, five = (checkpoint(f"{protocol}{accumulate}") for accumulate in (1, 5))
        close(*map(without_keys, (one["model"], five["model"])))
        close(*map(optimizer_averages, (one, five)))
        assert one["epoch_losses"] == pytest.approx(five["epoch_losses"], rel=1e-5)


def test_segmentation_trains_the_encoder_only_when_asked(in_tmp):
    for frozen in (True, False):
        evaluated("segment", data="shapes", frozen=frozen, max_steps=2, output=f"{frozen}")
        names = torch.load(f"{frozen}/checkpoint.pt", weights_only=True)["model"]
        assert any(name.startswith("encoder.blocks") for name in names) != frozen


def test_a_batch_without_a_counted_pixel(in_tmp):
    for i in range(12):
        save(Path(f"data/images/{i:02}.png"), np.random.RandomState(i).randint(0, 255, (16, 16, 3)))
        save(Path(f"data/masks/{i:02}.png"), np.full((16, 16), 255 if i < 8 else i % 2))
    assert evaluated("segment", data="data", batch_size=1, epochs=1)["miou"] >= 0


def test_another_encoder_at_the_same_path_is_refused(photos):    # noqa: F811
    for seed, refused in ((0, False), (1, True)):
        mae.train(tiny(output="run", max_steps=1, seed=seed, resume=False))
        for protocol in ("linear", "attentive"):
            try:
                evaluated(protocol, checkpoint="run/checkpoint.pt", **FROM_CHECKPOINT)
            except common.UserError as error:
                assert refused and "encoder" in str(error)
            else:
                assert not refused


def test_probes_recover_separable_labels(in_tmp):
    """Black, grey and white pictures: any honest probe of any encoder tells them apart."""
    for split, count in (("train", 20), ("val", 6)):
        for value, c in ((0, "a"), (128, "b"), (255, "c")):
            for i in range(count):
                save(Path("tones", split, c, f"{i}.png"), np.random.RandomState(i).randint(max(0, value - 30), min(255, value + 30) + 1, (16, 16, 3)))
    for protocol in ("knn", "linear", "attentive"):
        assert evaluated(protocol, data="tones", epochs=12, base_lr=0.3 if protocol == "attentive" else 1.0)["top1"] == 100
    for shots in (1, 2, 3):
        assert evaluated("linear", data="tones", epochs=30, base_lr=1.0, shots=shots, output=f"few{shots}")["top1"] == 100


def test_training_protocols_resume_bit_for_bit(photos):  # noqa: F811
    mixed = dict(epochs=2, drop_path=0.5, mixup=0.8, cutmix=1.0, smoothing=0.1, ema=0.9, randaugment=9, erasing=0.5, crop_scale=0.5)
    for protocol, changes in (("finetune", mixed), ("linear", dict(epochs=2))):
        evaluated(protocol, output="whole", resume=False, **changes)
        for steps in (3, 4, 6, 0):
            result = evaluated(protocol, output="parts", max_steps=steps, resume=steps != 3, **changes)
        whole, parts = (torch.load(f"{run}/checkpoint.pt", weights_only=True)["model"] for run in ("whole", "parts"))
        assert all(torch.equal(whole[n], parts[n]) for n in whole)
        log = [[json.loads(line) for line in open(f"{run}/metrics.jsonl")] for run in ("whole", "parts")]
        strip = lambda lines: [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines if "step" in line]
        assert strip(log[0]) == strip(log[1])            # the scores of each epoch, too
        assert result["top1"] == pytest.approx(json.loads(open("whole/metrics.jsonl").readlines()[-1])["top1"], abs=1e-3)
    with pytest.raises(common.UserError, match="epochs: 2 there, 3 here"):
        evaluated("linear", output="parts", epochs=3)


def test_scores_come_as_often_as_asked_and_at_the_end(photos):     # noqa: F811
    evaluated("finetune", epochs=3, eval_every=2)
    lines = [json.loads(line) for line in open("eval-finetune/metrics.jsonl")]
    ends = [line["step"] for line in lines if "epoch" in line]
    assert [line["step"] for line in lines if "top1" in line and "step" in line] == ends[1:]


def test_fine_tuned_checkpoint_is_scored_again(photos):  # noqa: F811
    result = evaluated("finetune", epochs=2, ema=0.9, base_lr=0.5)
    assert result["top1"] != result["ema_top1"]
    assert set(torch.load("eval-finetune/finetuned.pt", weights_only=True)["model"]) >= {"fc_norm.weight", "head.bias"}
    again = evaluated("finetune", checkpoint="eval-finetune/finetuned.pt", eval=True, output="again", **FROM_CHECKPOINT)
    average = evaluated("finetune", checkpoint="eval-finetune/finetuned-ema.pt", eval=True, output="again", **FROM_CHECKPOINT)
    assert again["top1"] == result["top1"] and average["top1"] == result["ema_top1"]
    assert evaluated("knn", checkpoint="eval-finetune/finetuned.pt", **FROM_CHECKPOINT)["top1"] >= 0
    weights = torch.load("eval-finetune/finetuned.pt", weights_only=True)["model"]
    torch.save({"model": weights}, "released.pth")       # as the official fine-tuned file
    assert evaluated("finetune", checkpoint="released.pth", eval=True, output="again", **VIT | {"image_size": None})["top1"] == result["top1"]
    with pytest.raises(common.UserError, match="finetuned.pt beside it"):
        evaluated("knn", checkpoint="eval-finetune/checkpoint.pt", **FROM_CHECKPOINT)
    with pytest.raises(common.UserError, match="no classifier of 2 classes"):
        evaluated("finetune", eval=True, output="again")


SCORES = """
import json, sys, torch
sys.path.insert(0, {root!r}), sys.path.insert(0, {root!r} + "/tests")
import common, evaluate, mae
from test_evaluate import VIT, FAST, vit
mae.SIZES["micro"] = (16, 2, 2)
common.LOG_EVERY = 1
run = lambda p, **changes: evaluate.evaluate(evaluate.Config(protocol=p, **dict(data="photos", output=p + sys.argv[1]) | FAST | VIT | changes))
results = [run("knn"), run("retrieval"), run("linear", accumulate=5)]
run("linear", cached=False, output="bn" + sys.argv[1])
one = dict(epochs=2, batch_size=12, max_steps=5, crop_scale=0.5, smoothing=0.1, weight_decay=0.05)
for protocol in ("linear", "attentive", "finetune"):     # 3 steps an epoch: into the second one
    for name, accumulate in (("plain", 1), ("accumulated", common.world_size())):
        output = protocol + "-" + name + "-" + sys.argv[1]
        run(protocol, accumulate=accumulate, output=output, **one)
results.append(evaluate.evaluate(evaluate.Config(protocol="finetune", checkpoint="tuned/finetuned.pt", data="photos", output="out", eval=True)))
cfg = evaluate.Config(protocol="segment", image_size=16, data="masks")
torch.manual_seed(0)
model, (_, test, _) = evaluate.Segmenter(vit(), 3), evaluate.open_masked(cfg)
results.append(evaluate.segmentation(cfg, model, test, 3, torch.device("cpu")).tolist())
norm = torch.nn.BatchNorm1d(2)
norm.running_mean.fill_(common.rank())
evaluate.ready(norm)                                     # the first process's averages for all
assert not norm.training and norm.running_mean.tolist() == [0, 0]
if common.rank() == 0:
    json.dump(results, open(sys.argv[1], "w"))
"""


def test_two_processes_score_what_one_does(photos, monkeypatch):      # noqa: F811
    for i in range(50):
        save(Path(f"masks/images/{i:02}.png"), np.random.RandomState(i).randint(0, 255, (16 + i % 3, 24, 3)))
        save(Path(f"masks/masks/{i:02}.png"), np.random.RandomState(i).randint(0, 3, (16 + i % 3, 24)))
    Path("photos/val/a/40.png").write_text("text")       # 9 pictures remain to be scored: an odd number
    evaluated("finetune", output="tuned")
    Path("scores.py").write_text(SCORES.format(root=str(ROOT)))
    monkeypatch.setattr(sys, "argv", ["scores.py", "one.json"])
    runpy.run_path("scores.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, "scores.py", "two.json"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = json.load(open("one.json")), json.load(open("two.json"))
    assert one == two and len(one) == 5 and sum(map(sum, one[4])) == sum((16 + i % 3) * 24 for i in range(9, 50, 10))
    for protocol in ("linear", "attentive", "finetune"):  # and training agrees
        for name in ("plain", "accumulated"):            # 6 images a process, or twice 3
            states = [checkpoint(f"{protocol}-{name}-{which}.json") for which in ("one", "two")]
            close(*(without_keys(state["model"]) for state in states))
            close(*map(optimizer_averages, states))
            first, second = (state["epoch_losses"] for state in states)
            assert first == pytest.approx(second, rel=1e-5) and len(first) == 2


@pytest.mark.parametrize("argv, words", [
    (["knnn"], "no protocol knnn; there are knn, retrieval"), (["linear", "--checkpont=x"], "did you mean --checkpoint?"),
    (["knn", "--checkpoint=nothing.pt"], "no file nothing.pt"), (["knn", "--checkpoint=text.pt"], "no file of weights"),
    (["knn", "--data=flat"], "no labelled images"), (["segment", "--data=flat"], "no images/ and masks/"),
    (["knn", "--method=nothing"], "no script nothing.py"), (["linear", "--percent=-1"], "percent is -1.0"), (["linear", "--shots=2", "--percent=9"], "exclude"),
    (["segment", "--shots=2"], "segment has none"), (["finetune", "--drop-path=1.5"], "from 0 to 0.99"), (["knn", "--image-size=0"], "image_size is 0"),
    (["knn", "--depth=4"], "unknown argument --depth"),
    (["knn", "--patch-size=5"], "patch_size 5 does not divide image_size 32"),
    (["segment", "--stride=99"], "gaps"), (["knn", "--protocol=linear"], "first word"), (["knn", "--method=common"], "no script"),
    (["knn", "--method=data"], "no script"),
    (["linear", "--epochs=5", "--warmup-epochs=5"], "less than epochs"),
    (["finetune", "--randaugment=11"], "from 0 to 10"), (["finetune", "--eval"], "no classifier of 8 classes"),
    (["linear", "--output=/proc/x"], "/proc/x")])
def test_a_users_mistake_is_one_line(in_tmp, capfd, argv, words):
    save(Path("flat/a.jpg"), np.zeros((4, 4, 3)))
    Path("text.pt").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error
