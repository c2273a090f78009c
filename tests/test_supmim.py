"""supmim.py: what each loss sees and reaches, codes, the plain classifier left at the end, runs."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import common
import data
import evaluate
import mae
import supmim
from conftest import ROOT, fill
from supmim import SupMIM, kmeans, nearest_code
from test_train import checkpoint, close, lines, moments, same, weights
from test_train import photos                            # noqa: F401, a fixture

SMALL = dict(image_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, decoder_embed_dim=8,
             decoder_depth=1, decoder_num_heads=2, classes=5)
HEAD = {"head.weight", "head.bias"}
DECODER = ("decoder", "mask_token")
CPU = torch.device("cpu")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def without_decoder(state):
    return {name: value for name, value in state.items() if not name.startswith(DECODER)}


class Plain(nn.Module):
    """A classifier from the definition of a ViT, of torch's own modules, nothing of supmim.py."""

    def __init__(self, depth=3, classes=5):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 64, 0.0, F.gelu, 1e-6, batch_first=True,
                                       norm_first=True) for _ in range(depth))
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16, eps=1e-6)
        self.head = nn.Linear(16, classes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, 16), requires_grad=False)

    def load(self, state):
        """Weights in timm's names, all of them and no other."""
        names = {"attn.qkv.weight": "self_attn.in_proj_weight",
                 "attn.qkv.bias": "self_attn.in_proj_bias", "attn.proj": "self_attn.out_proj",
                 "mlp.fc1": "linear1", "mlp.fc2": "linear2", "patch_embed.proj": "patch_embed"}
        for ours, theirs in names.items():
            state = {name.replace(ours, theirs): value for name, value in state.items()}
        self.load_state_dict(state)
        return self

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 1:].mean(dim=1))


# -------------------------------------------------------------------------------- the classifier
def test_classifier_is_a_plain_vit():
    """As many parameters, as many operations, the same logits."""
    model = fill(SupMIM(**SMALL), skip=("pos_embed", "decoder_pos_embed")).eval()
    state = without_decoder(model.state_dict())
    plain = Plain().load(state)
    images = gaussian(4, 3, 16, 16)
    torch.testing.assert_close(model.classify(images), plain(images), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in state.values()) == sum(p.numel() for p in plain.parameters())
    operations = []
    for network in (model.classify, plain.train()):      # eval() takes a path that is not counted
        with FlopCounterMode(display=False) as counter:
            network(images)
        operations.append(counter.get_total_flops())
    assert operations[0] == operations[1] > 0


def test_sizes_of_the_papers_model():
    with torch.device("meta"):
        model = supmim.build(supmim.Config(**supmim.PRESETS["imagenet"]), classes=1000)
    assert model.grid == (16, 16)
    trained = [p.numel() for name, p in model.named_parameters()
               if p.requires_grad and not name.startswith(DECODER)]
    D = 768
    blocks = 12 * (12 * D * D + 13 * D)
    patch_embed = (3 * 14 * 14 + 1) * D
    cls_and_norm = 3 * D
    head = 1000 * D + 1000
    assert sum(trained) == blocks + patch_embed + cls_and_norm + head


# ------------------------------------------------------------------------------------ both losses
def reached(loss, model):
    """Names of the parameters that get a gradient of the loss other than zero."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True,
                                    materialize_grads=True, allow_unused=True)
    return {name for name, gradient in zip(named, gradients) if gradient.abs().max() > 0}


@pytest.mark.parametrize("codes", [0, 7])
def test_both_losses_reach_the_encoder(codes):
    model = SupMIM(**SMALL, codes=codes)
    target_codes = torch.arange(64).view(4, 16) % 7
    _, class_loss, masked_loss, _ = model(gaussian(4, 3, 16, 16), torch.arange(4), uniform(4, 16),
                                          target_codes=target_codes)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    decoder = {name for name in trained if name.startswith(DECODER)}
    assert reached(class_loss, model) == trained - decoder
    assert reached(masked_loss, model) == trained - HEAD


@pytest.mark.parametrize("ratio, count", [(0.5, 8), (0.75, 12), (0.3, 5)])
def test_masked_patches_do_not_reach_the_prediction(ratio, count):
    model = SupMIM(**SMALL, mask_ratio=ratio)
    patches = gaussian(3, 16, 48)
    noise = uniform(3, 16, seed=1)
    prediction, masked = model.predict_masked(patches, noise)
    order = noise.argsort(dim=1)
    assert torch.equal(masked, order[:, 16 - count:]) and prediction.shape == (3, count, 48)
    for index, changes in ((masked, False), (order[:, :1], True)):
        other = patches.scatter(1, index.unsqueeze(-1).expand(-1, -1, 48), 9.0)
        of_other, _ = model.predict_masked(other, noise)
        assert torch.equal(of_other, prediction) != changes


@pytest.mark.parametrize("norm_pix", [True, False])
def test_masked_loss_is_maes(norm_pix):
    """The same weights, images and masks give MAE's loss."""
    model = SupMIM(**SMALL, norm_pix=norm_pix)
    sizes = {name: value for name, value in SMALL.items() if name != "classes"}
    other = mae.MAE(**sizes, mask_ratio=0.5, norm_pix=norm_pix)
    state = model.state_dict()
    other.load_state_dict({name: value for name, value in state.items() if name not in HEAD})
    images = gaussian(4, 3, 16, 16)
    noise = uniform(4, 16)
    _, _, masked_loss, _ = model(images, torch.arange(4), noise)
    expected, _, _ = other(images, noise)
    assert torch.equal(masked_loss, expected)


def test_loss_is_the_sum_and_zero_predictions_score_as_they_must():
    images = gaussian(4, 3, 16, 16)
    labels = torch.arange(4)
    model = SupMIM(**SMALL, mim_weight=0.3, smoothing=0.1)
    for parameter in (*model.head.parameters(), *model.decoder_pred.parameters()):
        nn.init.zeros_(parameter)
    loss, class_loss, masked_loss, logits = model(images, labels, uniform(4, 16))
    assert logits.shape == (4, 5) and logits.abs().max() == 0
    assert class_loss.item() == pytest.approx(np.log(5), rel=1e-6)
    assert masked_loss.item() == pytest.approx(47 / 48, rel=1e-4)    # unbiased variance: (n - 1)/n
    assert loss.item() == pytest.approx(class_loss.item() + 0.3 * masked_loss.item(), rel=1e-6)
    model = SupMIM(**SMALL, codes=7)
    nn.init.zeros_(model.decoder_pred.weight)
    codes = torch.zeros(4, 16, dtype=torch.long)
    _, _, masked_loss, _ = model(images, labels, uniform(4, 16), target_codes=codes)
    assert masked_loss.item() == pytest.approx(np.log(7), rel=1e-6)


def test_codes_are_those_of_the_masked_patches():
    """A decoder that is certain of one code is right where the masked patches have it."""
    model = SupMIM(**SMALL, codes=7)
    nn.init.zeros_(model.decoder_pred.weight)
    with torch.no_grad():
        model.decoder_pred.bias[3] = 20.0
    noise = uniform(4, 16)
    masked = noise.argsort(dim=1)[:, 8:]
    codes = torch.zeros(4, 16, dtype=torch.long).scatter(1, masked, 3)
    images = gaussian(4, 3, 16, 16)
    _, _, masked_loss, _ = model(images, torch.arange(4), noise, target_codes=codes)
    assert masked_loss < 1e-6
    _, _, masked_loss, _ = model(images, torch.arange(4), noise, target_codes=3 - codes)
    assert masked_loss.item() == pytest.approx(20, rel=1e-5)


def test_mixed_images_are_classified_and_not_masked():
    model = SupMIM(**SMALL)
    images = gaussian(4, 3, 16, 16)
    mixed = gaussian(4, 3, 16, 16, seed=1)
    labels = uniform(4, 5).softmax(dim=1)
    _, _, expected, _ = model(images, labels, uniform(4, 16))
    _, class_loss, masked_loss, logits = model(images, labels, uniform(4, 16), mixed)
    assert torch.equal(masked_loss, expected)
    assert torch.equal(logits, model.classify(mixed))
    cross_entropy = -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()
    assert class_loss.item() == pytest.approx(cross_entropy.item(), rel=1e-5)


def test_without_a_weight_nothing_is_masked(monkeypatch):
    model = SupMIM(**SMALL, mim_weight=0.0)
    monkeypatch.setattr(model, "predict_masked", None)   # a call would be an error
    loss, class_loss, masked_loss, _ = model(gaussian(4, 3, 16, 16), torch.arange(4))
    assert loss == class_loss > 0 and masked_loss == 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert reached(loss, model) == trained


@pytest.mark.parametrize("codes", [0, 7])
def test_bf16_and_one_graph(codes):
    """Under bf16 the losses are fp32 and every parameter gets a gradient; compiling finds one
    graph."""
    model = SupMIM(**SMALL, codes=codes)
    target_codes = torch.zeros(4, 16, dtype=torch.long)
    given = (gaussian(4, 3, 16, 16), torch.arange(4), uniform(4, 16), None, target_codes)
    with torch.autocast("cpu", torch.bfloat16):
        loss, class_loss, masked_loss, _ = model(*given)
    assert loss.dtype == class_loss.dtype == masked_loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    explained = torch._dynamo.explain(model)(*given)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ codes
def test_codes_are_those_of_the_nearest_center():
    x = gaussian(50, 6)
    centers = gaussian(9, 6, seed=1)
    distances = (x[:, None] - centers).square().sum(dim=2)                     # (50, 9)
    assert torch.equal(nearest_code(x, centers), distances.argmin(dim=1))


def test_tokenize():
    """One code for each patch, row by row, of its normalised pixels or of the raw ones."""
    images = gaussian(2, 3, 8, 12)
    for norm_pix in (True, False):
        centers = gaussian(5, 48, seed=1)
        codes = supmim.tokenize(images, centers, 4, norm_pix)
        assert codes.shape == (2, 6) and codes.dtype == torch.int64
        for number in range(6):
            top = 4 * (number // 3)
            left = 4 * (number % 3)
            patch = images[1, :, top:top + 4, left:left + 4].permute(1, 2, 0).flatten()
            if norm_pix:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            distances = (centers - patch).square().sum(dim=1)
            assert codes[1, number] == distances.argmin()


def clusters():
    """400 points about 4 centers far from each other, and these."""
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(4, 6, generator=generator)
    noise = torch.randn(4, 100, 6, generator=generator)
    points = centers.unsqueeze(1) + 0.1 * noise
    return points.flatten(0, 1), centers


def test_kmeans_finds_clusters_and_improves():
    x, true_centers = clusters()
    costs = []
    for rounds in range(6):
        centers = kmeans(x, 8, 1, rounds)
        costs.append((x - centers[nearest_code(x, centers)]).square().sum().item())
    for before, after in zip(costs, costs[1:]):
        assert after <= before * (1 + 1e-5)
    assert costs[-1] < 0.9 * costs[0]
    centers = kmeans(x, 8, 1)
    distances = torch.cdist(true_centers, centers).amin(dim=1)
    assert (distances < 1).all()                         # 8 starts meet each of the 4 clusters
    nearest = nearest_code(x, centers)                   # at rest: each is the mean of its points
    means = torch.stack([x[nearest == code].mean(dim=0) for code in range(8)])
    torch.testing.assert_close(centers, means, rtol=1e-4, atol=1e-4)


def test_kmeans_starts_at_points_drawn_by_the_seed():
    x, _ = clusters()
    assert torch.equal(kmeans(x, 8, 1), kmeans(x, 8, 1))
    assert not torch.equal(kmeans(x, 8, 1), kmeans(x, 8, 2))
    start = kmeans(x, 8, 2, rounds=0)
    is_start = (start[:, None] == x).all(dim=2)                                # (8, 400)
    assert is_start.any(dim=1).all()
    twins = torch.cat([x[:3], x[:3]])                    # one of each pair is nearest to nothing:
    centers = kmeans(twins, 6, 0)                        # it stays where it began, not at 0
    assert (torch.cdist(centers, x[:3]).amin(dim=1) < 1e-3).all()
    with pytest.raises(common.UserError, match="3 patches cannot make 4 codes"):
        kmeans(x[:3], 4, 0)


# ------------------------------------------------------------------------------------- whole runs
TINY = dict(data="photos", image_size=16, patch_size=4, decoder_embed_dim=16, shots=0,
            crop_scale=0.5, base_lr=0.01, epochs=3, warmup_epochs=1.0, batch_size=10,
            eval_every=2)                                # 40 photos: 4 steps an epoch


@pytest.fixture
def small(photos, monkeypatch):                          # noqa: F811
    """photos, a smaller model, and a line of metrics for every step."""
    monkeypatch.setitem(supmim.SIZES, "micro", (16, 2, 2))
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def tiny(**changes):
    return supmim.Config(**TINY | changes)


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def test_without_the_masked_loss_it_is_the_plain_classifier(small):
    """Five steps of a loop written out here, mixing and drop path included, give the weights of a
    run bit for bit: also after test images were scored, without drop path, at an epoch's end."""
    cfg = tiny(output="run", mim_weight=0.0, max_steps=5, mixup=0.8, smoothing=0.1, randaugment=5,
               drop_path=0.5, eval_every=1)
    supmim.train(cfg)
    assert not Path("run/reconstruction.png").exists()
    model = supmim.build(cfg, 2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name in trained if name.startswith(DECODER)]
    groups = [{"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 0.05},
              {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)
    mix = data.mixing(0.8, 0.0, 2)
    train = data.open_data("photos", "").train
    train.transform = data.augment(16, 0.5, randaugment=5)
    for step, batch in enumerate(data.BatchSampler(cfg, 40, 0, 5)):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, 4, 12, 0.01 * 10 / 256)
        torch.manual_seed(seed_of(0, step, 0, 0, 1))
        images, labels, _ = zip(*(train[key] for key in batch))
        images, labels = mix(data.to_device(torch.stack(images), CPU), torch.tensor(labels))
        logits = model.head(model.encode(images)[:, 1:].mean(dim=1))
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights("run"), model.state_dict())


MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)


def draw_shots(dataset, shots):
    """`shots` images of each of two classes, all of them if 0."""
    random = np.random.RandomState(0)
    rows = []
    for label in (0, 1):
        of_class = random.permutation(np.flatnonzero(dataset.labels == label))
        rows.append(of_class[:shots or None])
    rows = np.sort(np.concatenate(rows))
    return data.ImageDataset(dataset.source[rows], dataset.labels[rows])


def normalised_patches(images):
    """(B, 3, 16, 16) -> (B, 16, 48)."""
    x = images.view(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1)
    x = x.reshape(len(images), 16, 48)
    return (x - x.mean(dim=2, keepdim=True)) / (x.var(dim=2, keepdim=True) + 1e-6).sqrt()


def centers_of(dataset):
    """Eight k-means centers of the patches of all images' middles."""
    images = [v2.functional.resize(dataset.read(i), [18], v2.InterpolationMode.BICUBIC)
              for i in range(len(dataset))]
    images = torch.stack([v2.functional.center_crop(image, [16]) for image in images])
    patches = normalised_patches((images / 255 - MEAN) / STD)
    return kmeans(patches.flatten(0, 1), 8, 0)


@pytest.mark.parametrize("target, shots", [("pixels", 0), ("kmeans", 12)])
def test_recipe(small, target, shots):
    """Five steps of a loop written out end with the same weights, codes and logged losses: both
    losses, mixing, drop path, scores in between, and the codes' centers."""
    supmim.train(tiny(output="run", target=target, codes=8, shots=shots, mim_weight=2.0,
                      mask_ratio=0.5, drop_path=0.5, randaugment=5, mixup=0.8, cutmix=1.0,
                      smoothing=0.1, epochs=4, warmup_epochs=0.75, base_lr=0.05,
                      weight_decay=2.0, eval_every=1, max_steps=5))
    torch.manual_seed(0)
    codes = 8 if target == "kmeans" else 0
    model = SupMIM(16, 4, 16, 2, 2, 16, 1, 2, classes=2, codes=codes, drop_path=0.5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not {"pos_embed", "decoder_pos_embed"} & trained.keys()
    groups = [{"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": 2.0},
              {"params": [p for p in trained.values() if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    labelled = draw_shots(data.open_data("photos", "").train, shots)
    crops = labelled.with_transform(data.augment(16, 0.5, randaugment=5))
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=2),
                           v2.CutMix(alpha=1.0, num_classes=2)])
    if codes:
        centers = centers_of(labelled)
    per_epoch = len(labelled) // 10
    warmup = 0.75 * per_epoch
    total = 4 * per_epoch
    losses = []
    for step in range(5):
        epoch, position = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(labelled), generator=generator).tolist()
        batch = [crops[epoch, i] for i in order[10 * position:10 * position + 10]]
        images = (torch.stack([image for image, _, _ in batch]) / 255 - MEAN) / STD
        labels = torch.tensor([label for _, label, _ in batch])
        lr = 0.05 * 10 / 256
        if step < warmup:
            lr *= step / warmup
        else:
            lr *= (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_of(0, step, 0, 0, 1))
        mixed, labels = mix(images, labels)
        labels = 0.9 * labels + 0.1 / 2                  # smoothed                   (10, 2)
        logits = model.head(model.encode(mixed)[:, 1:].mean(dim=1))
        class_loss = -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()
        noise = uniform(10, 16, seed=seed_of(0, step))
        masked = noise.argsort(dim=1)[:, 8:]             # half of 16
        prediction, _ = model.predict_masked(supmim.patchify(images, 4), noise)
        patches = normalised_patches(images)
        target = torch.stack([of_image[index] for of_image, index in zip(patches, masked)])
        if codes:
            code = torch.cdist(target, centers.expand(10, 8, 48)).argmin(dim=2)        # (10, 8)
            probability = prediction.log_softmax(dim=2).gather(2, code.unsqueeze(2))
            masked_loss = -probability.mean()
        else:
            masked_loss = (prediction - target).square().mean()
        losses.append([class_loss.item(), masked_loss.item()])
        (class_loss + 2.0 * masked_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    close(model.state_dict(), weights("run"))
    logged = [line for line in lines("run") if "class_loss" in line]
    assert len(logged) == 5 // per_epoch                 # one epoch, or two
    for epoch, line in enumerate(logged):
        expected = np.mean(losses[epoch * per_epoch:(epoch + 1) * per_epoch], axis=0)
        assert [line["class_loss"], line["masked_loss"]] == pytest.approx(expected, rel=1e-5)
    if codes:
        torch.testing.assert_close(checkpoint("run")["tensors"]["centers"], centers)


def test_drop_path_is_the_encoders():
    torch.manual_seed(0)
    model = SupMIM(**SMALL, drop_path=0.9)
    patches = gaussian(4, 16, 48)
    visible, masked = supmim.random_masking(uniform(4, 16), 0.5)
    for training in (True, False):
        model.train(training)
        latent = model.forward_features(patches, visible)
        assert torch.equal(latent, model.forward_features(patches, visible)) != training
        decoded = model.decode(latent, visible, masked)
        assert torch.equal(decoded, model.decode(latent, visible, masked))


@pytest.mark.parametrize("max_steps, scored", [(0, 2), (5, 0)])
def test_nothing_is_dropped_while_images_are_scored(small, monkeypatch, max_steps, scored):
    """Scores, features and the image are of the model without drop path: made twice, they agree.
    In training it drops, also after an epoch's end, scored (the second) or not (the first). 5: the
    run ends within an epoch."""
    features = data.features
    save_image_grid = data.save_image_grid
    forward = SupMIM.forward
    modes = []
    grids = []

    def encode_twice(encode, *args, **options):
        def twice(images):
            encoded = encode(images)
            assert torch.equal(encoded, encode(images))
            return encoded
        return features(twice, *args, **options)

    def keep_grid(path, rows):
        grids.append(torch.cat(list(rows.values())))
        save_image_grid(path, rows)

    def note_mode(model, *given):
        modes.append(model.training)
        return forward(model, *given)

    monkeypatch.setattr(data, "features", encode_twice)
    monkeypatch.setattr(data, "save_image_grid", keep_grid)
    monkeypatch.setattr(SupMIM, "forward", note_mode)
    supmim.train(tiny(output="run", drop_path=0.9, base_lr=0.0, max_steps=max_steps))
    steps = max_steps or 12
    assert modes == [True] * steps
    assert len(grids) == max(1, scored)                  # after epochs 2 and 3, or at the end
    for grid in grids:
        assert torch.equal(grid, grids[0])


def test_weight_of_the_masked_loss_changes_no_random_number(small):
    """With a weight too small to matter the classifier becomes that of the baseline, drops and
    mixing included."""
    settings = dict(mixup=0.8, drop_path=0.5, randaugment=5, max_steps=4)
    supmim.train(tiny(output="none", mim_weight=0.0, **settings))
    supmim.train(tiny(output="least", mim_weight=1e-30, **settings))
    assert same(without_decoder(weights("none")), without_decoder(weights("least")))
    for name in ("none", "least"):
        logged = [line["masked_loss"] for line in lines(name) if "masked_loss" in line]
        assert len(logged) == 1 and (logged[0] > 0) == (name == "least")


@pytest.mark.parametrize("changes", [dict(drop_path=0.3, mixup=0.5, cutmix=1.0),
                                     dict(target="kmeans", codes=8, shots=10)])
def test_resumed_run_equals_an_undisturbed_one(small, changes):
    whole = supmim.train(tiny(output="whole", **changes))
    for steps in (2, 5, 0, 0):                           # the last one finds a run that has ended
        parts = supmim.train(tiny(output="parts", max_steps=steps, **changes))
    assert same(weights("whole"), weights("parts")) and whole == parts
    tensors = [checkpoint(run)["tensors"] for run in ("whole", "parts")]
    assert same(*tensors)
    logged = [[line for line in lines(run) if "masked_loss" in line] for run in ("whole", "parts")]
    assert logged[0] == logged[1]
    per_epoch = (20 if "shots" in changes else 40) // 10
    assert [line["step"] for line in logged[0]] == [per_epoch, 2 * per_epoch, 3 * per_epoch]
    scored = [line["step"] for line in lines("whole") if "top1" in line]
    assert scored == [2 * per_epoch, 3 * per_epoch, 3 * per_epoch]   # the last line is of the end
    keys = {f"{kind}_{name}" for kind in ("knn", "linear")
            for name in ("trained", "untrained", "pixels")}
    assert whole.keys() == {"step", "loss", "top1", "top5", "unreadable"} | keys
    assert Image.open("whole/reconstruction.png").size[0] > 8 * 90


def test_a_tokenizer_of_your_own(small, monkeypatch):
    """What `tokenize` is replaced with gets the images that are masked, not the mixed ones, and its
    codes are learned."""
    met = []
    forward = SupMIM.forward

    def brightness(images, centers, patch_size, norm_pix):
        """In eight steps, of each patch."""
        patches = F.avg_pool2d(images.mean(dim=1, keepdim=True), patch_size).flatten(1)
        return ((patches + 2) * 2).clamp(0, 7).long()

    def note(model, images, labels, noise, mixed, codes):
        met.append((images, labels, mixed, codes))
        return forward(model, images, labels, noise, mixed, codes)

    monkeypatch.setattr(supmim, "tokenize", brightness)
    monkeypatch.setattr(SupMIM, "forward", note)
    supmim.train(tiny(output="run", target="kmeans", codes=8, epochs=12, base_lr=0.1, mixup=1.0))
    for images, labels, mixed, codes in met:
        assert labels.shape == (10, 2) and not torch.equal(images, mixed)
        assert torch.equal(codes, brightness(images, None, 4, True))
    losses = [line["masked_loss"] for line in lines("run") if "masked_loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_features_and_voters_of_the_scores(small, monkeypatch):
    """The mean patch token, which is classified, of the trained and of the untrained model; the
    labels are those that were trained on, and no more."""
    given = []

    def score_encoders(encoders, splits, cfg, device):
        given.append((encoders, splits))
        return {"knn_trained": 0.0}

    monkeypatch.setattr(data, "score_encoders", score_encoders)
    cfg = tiny(output="run", shots=10, max_steps=2, drop_path=0.9)
    supmim.train(cfg)
    [(encoders, splits)] = given
    assert len(splits.train) == 20 and len(splits.test) == 10
    trained = supmim.build(cfg, 2).eval()
    trained.load_state_dict(weights("run"))
    untrained = supmim.build(cfg, 2).eval()
    images = gaussian(2, 3, 16, 16)
    for name, model in (("trained", trained), ("untrained", untrained)):
        assert torch.equal(encoders[name](images), model.encode(images)[:, 1:].mean(dim=1))


@pytest.mark.parametrize("codes, norm_pix", [(0, True), (0, False), (7, True)])
def test_what_the_image_shows(monkeypatch, codes, norm_pix):
    rows = {}
    monkeypatch.setattr(data, "save_image_grid", lambda path, given: rows.update(given))
    torch.manual_seed(0)
    model = SupMIM(**SMALL, codes=codes, norm_pix=norm_pix)
    images = gaussian(3, 3, 16, 16)
    noise = uniform(3, 16)
    centers = gaussian(codes, 48)
    supmim.save_visualization(model, images, noise, centers, None)
    visible, masked = noise.argsort(dim=1).split(8, dim=1)

    def patches_of(images, index):
        return supmim.gather_tokens(supmim.patchify(images, 4), index)

    truth = patches_of(images, masked)
    prediction, _ = model.predict_masked(supmim.patchify(images, 4), noise)
    if codes:
        prediction = centers[prediction.argmax(dim=2)]
    if norm_pix:
        std = (truth.var(dim=2, keepdim=True) + 1e-6).sqrt()
        prediction = truth.mean(dim=2, keepdim=True) + prediction * std
    original, seen, alone, filled = rows.values()
    assert torch.equal(original, images)
    assert (patches_of(seen, masked) == 0).all() and (patches_of(alone, visible) == 0).all()
    for shown in (seen, filled):
        assert torch.equal(patches_of(shown, visible), patches_of(images, visible))
    for shown in (alone, filled):
        torch.testing.assert_close(patches_of(shown, masked), prediction)


def test_export_is_a_plain_classifier(small):
    supmim.train(tiny(output="run"))
    saved = torch.load("run/classifier.pt", weights_only=True)
    assert saved["method"] == "supmim"
    plain = Plain(depth=2, classes=2).load(saved["model"])           # strictly
    sizes = {name: saved["config"].pop(name) for name in ("embed_dim", "depth", "num_heads")}
    assert sizes == {"embed_dim": 16, "depth": 2, "num_heads": 2}
    cfg = supmim.Config(**saved["config"])
    assert vars(cfg) == saved["config"] | sizes
    model = supmim.build(cfg, 2)
    model.load_state_dict(weights("run"))
    images = gaussian(4, 3, 16, 16)
    torch.testing.assert_close(plain(images), model.classify(images), rtol=1e-4, atol=1e-5)
    encoder = torch.load("run/encoder.pt", weights_only=True)
    assert saved["model"].keys() - encoder.keys() == HEAD


@pytest.mark.parametrize("file", ["classifier.pt", "checkpoint.pt"])
def test_evaluate_averages_the_tokens_that_were_classified(small, file):
    """The score of the same classifier; the class token's would be another."""
    metrics = supmim.train(tiny(output="run", base_lr=0.1, mim_weight=1.0, seed=2))
    model = supmim.build(tiny(), 2)
    model.load_state_dict(weights("run"))

    def classify_cls(images):
        return model.head(model.encode(images)[:, 0])

    logits, labels = data.features(classify_cls, data.open_data("photos", "").test, 16, CPU)
    assert data.topk_accuracy(logits, labels)["top1"] != metrics["top1"]
    again = evaluate.main(["finetune", "--eval", "--checkpoint", f"run/{file}", "--data", "photos"])
    assert again["top1"] == metrics["top1"]


def same_losses(one, two):
    """The means of both losses that are logged after each epoch."""
    logged = [[(line["class_loss"], line["masked_loss"]) for line in lines(run)
               if "class_loss" in line] for run in (one, two)]
    assert len(logged[0]) == len(logged[1]) > 0
    np.testing.assert_allclose(*logged, rtol=1e-5)
    epoch_losses = checkpoint(one)["epoch_losses"]
    assert epoch_losses == pytest.approx(checkpoint(two)["epoch_losses"], rel=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(target="kmeans", codes=8)])
def test_accumulation_is_one_large_batch(small, changes):
    for accumulate in (1, 5):
        supmim.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=6, **changes))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))
    same_losses("a1", "a5")


def test_two_processes_equal_one(small):
    """Several images a process and micro-batch, into the second epoch: one torchrun makes both
    runs, with and without accumulation. Each micro-batch of each process has a seed of its own."""
    settings = TINY | dict(batch_size=12, max_steps=5)   # 3 steps an epoch
    runs = {"plain": settings,
            "codes": settings | dict(accumulate=2, target="kmeans", codes=8, shots=19)}
    Path("both.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import json
import torch
import common
import supmim

common.LOG_EVERY = 1
supmim.SIZES["micro"] = (16, 2, 2)
forward = supmim.SupMIM.forward
seeds = []

def note_seed(*given):
    seeds.append(torch.initial_seed())
    return forward(*given)

supmim.SupMIM.forward = note_seed
with common.command_line():
    for name, settings in {runs!r}.items():
        supmim.train(supmim.Config(output=name + "2", **settings))
    json.dump(seeds, open(f"seeds{{common.rank()}}.json", "w"))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "both.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        expected = [seed_of(0, step, i, rank, 1)
                    for micro_batches in (1, 2) for step in range(5) for i in range(micro_batches)]
        assert json.load(open(f"seeds{rank}.json")) == expected
    for name, settings in runs.items():
        supmim.train(supmim.Config(output=f"{name}1", **settings))
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        one = checkpoint(f"{name}1")["epoch_losses"]
        assert one == pytest.approx(checkpoint(f"{name}2")["epoch_losses"], rel=1e-5)
        last_line = lines(f"{name}2")[-1]
        for key, value in lines(f"{name}1")[-1].items():
            assert last_line[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("crop_scale, size", [(1.0, 24), (0.5, 32)])
def test_shapes_resized_once_are_those_resized_in_each_epoch(fewer_shapes, crop_scale, size):
    """Only random crops need the images in their own size."""
    cfg = supmim.Config(image_size=24, crop_scale=crop_scale, shots=2)
    images = supmim.open_labelled(cfg).train
    assert images.source.shape == (16, 3, size, size)
    whole = data.open_data("shapes", "", cfg.seed).train
    others = data.subset(whole, cfg.shots, 100, cfg.seed)
    others.transform = data.augment(24, crop_scale)
    for key in itertools.product(range(3), range(16)):   # epoch, index
        assert torch.equal(images[key][0], others[key][0])


def test_short_run_learns(in_tmp, fewer_shapes):
    metrics = supmim.main(["--patch-size=8", "--epochs=6", "--warmup-epochs=1", "--mim-weight=1"])
    assert metrics["step"] == 60
    first, *_, last = [line for line in lines("runs/supmim-shapes") if "class_loss" in line]
    assert last["class_loss"] < 0.9 * first["class_loss"]
    assert last["masked_loss"] < 0.7 * first["masked_loss"]


@pytest.mark.parametrize("argv, words", [
    (["--target=vq.py"], "invalid choice: 'vq.py'"), (["--mim-weight=-1"], "mim_weight is -1"),
    (["--mask-ratio=1"], "nothing to see"), (["--mask-ratio=0"], "nothing to predict"),
    (["--drop-path=1"], "drop_path is 1"), (["--shots=5", "--batch-size=64"], "batch"),
    (["--masc-ratio=0.5"], "unrecognized arguments: --masc-ratio=0.5")])
def test_a_users_mistake_is_one_line(in_tmp, capfd, argv, words):
    with pytest.raises(SystemExit) as stop:
        supmim.main(argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and "\n" not in error


def test_images_without_labels_are_refused(in_tmp):
    Path("flat").mkdir()
    Image.new("RGB", (20, 20)).save("flat/a.png")
    with pytest.raises(common.UserError, match="has no labelled images to train"):
        supmim.train(supmim.Config(data="flat"))
