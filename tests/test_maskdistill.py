"""maskdistill.py against published figures, hand-made references and invariants; whole runs."""

import functools
import hashlib
import math
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import data
import evaluate
import flip
import mae
import maskdistill
from conftest import ROOT, draw, golden
from maskdistill import MaskDistill, Teacher, VisionTransformer, block_masking, load_teacher
from test_train import (checkpoint, close, every_step_is_logged, lines, moments,  # noqa: F401
                        photos, same, weights)           # two of them are fixtures

FIGURES = golden("clip")
SMALL = dict(image_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, target_dim=24,
             min_block=4)                                # 8 x 8 patches, 25 of them masked
IMAGENET_MEAN, IMAGENET_STD, CLIP_MEAN, CLIP_STD = torch.tensor([
    [0.485, 0.456, 0.406], [0.229, 0.224, 0.225],
    [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).view(4, 3, 1, 1)


def small_student(**changes):
    """A student whose positions and biases are not zero, so that they count."""
    torch.manual_seed(1)
    model = MaskDistill(**SMALL | changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "table" in name or p.ndim == 1:
                p.add_(0.3 * draw(name, *p.shape))
    return model


def inputs(model, width=24):
    """Three images, features of a teacher, noise."""
    images = draw("maskdistill/images", 3, 3, 32, 32)
    features = draw("maskdistill/features", 3, 64, width)
    noise = draw("maskdistill/noise", 3, model.noise_width, uniform=True)
    return images, features, noise


# ---------------------------------------------------------------------------------- CLIP's figures
def clip_state():
    """CLIP with the golden weights: two blocks of width 128, 4 x 4 patches of 8 pixels."""
    state = {}
    for name, shape in FIGURES["state_dict"].items():
        state[name] = 0.15 * draw(name, *shape) if shape else torch.tensor(2.5)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    return state


class Tree(nn.Module):
    """Modules and parameters with the dotted names of a state."""

    def __init__(self, state):
        super().__init__()
        children = {}
        for name, value in state.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = value
            else:
                self.register_parameter(first, nn.Parameter(value))
        for name, part in children.items():
            self.add_module(name, Tree(part))

    def forward(self, x):
        return x


def save_torchscript(state, path):
    """As OpenAI published CLIP. Returns the file's SHA-256."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                  # newer torch: TorchScript is deprecated
        torch.jit.save(torch.jit.script(Tree(state)), path)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def golden_images(teacher):
    """The figures' images, normalised so that the teacher's normalisation gives them back."""
    images = draw("clip/images", 5, 3, 32, 32)
    return (images - teacher.shift) / teacher.scale


@pytest.mark.parametrize("kind", ["plain", "TorchScript"])
def test_clip_figures(tmp_path, monkeypatch, kind):
    path = tmp_path / "clip.pt"
    if kind == "plain":
        torch.save(clip_state(), path)
    else:                                                # it is run because its hash is known
        digest = save_torchscript(clip_state(), path)
        monkeypatch.setitem(maskdistill.RELEASED, "clip", ("x.pt", digest))
    teacher = load_teacher(path, (4, 4))
    projecting = load_teacher(path, (4, 4), projected=True)
    assert not any(p.requires_grad for p in teacher.parameters())
    post = teacher(golden_images(teacher))
    proj = projecting(golden_images(teacher))
    assert post.shape == (5, 16, 128) and teacher.width == 128
    assert proj.shape == (5, 16, 32) and projecting.width == 32
    want = FIGURES["patch_tokens_after_ln_post_norm"]
    assert post.norm().item() == pytest.approx(want, rel=1e-5)
    want = FIGURES["patch_tokens_projected_norm"]
    assert proj.norm().item() == pytest.approx(want, rel=1e-5)
    head = torch.tensor(FIGURES["patch_tokens_row0_token0_head"])
    torch.testing.assert_close(post[0, 0, :len(head)], head, rtol=1e-4, atol=1e-5)
    tokens = teacher.vit.encode(draw("clip/images", 5, 3, 32, 32))
    image = tokens[:, 0] @ projecting.proj               # the class token's is CLIP's image feature
    assert image.norm().item() == pytest.approx(FIGURES["image_features_norm"], rel=1e-5)
    head = torch.tensor(FIGURES["image_features_row0_head"])
    torch.testing.assert_close(image[0, :len(head)], head, rtol=1e-4, atol=1e-5)


def test_clip_equals_a_tower_of_torchs_own_attention():
    """Independent of the figures: nn.MultiheadAttention and the published names."""
    def part_of(state, prefix):
        return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}

    def norm(x, name):
        return F.layer_norm(x, (128,), tower[f"{name}.weight"], tower[f"{name}.bias"], 1e-5)

    tower = part_of(clip_state(), "visual.")
    images = draw("x", 2, 3, 32, 32)
    x = F.conv2d(images, tower["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([tower["class_embedding"].expand(2, 1, -1), x], dim=1)
    x = norm(x + tower["positional_embedding"], "ln_pre")
    for i in range(2):
        name = f"transformer.resblocks.{i}"
        part = part_of(tower, f"{name}.")
        attention = nn.MultiheadAttention(128, 2, batch_first=True)
        attention.load_state_dict(part_of(part, "attn."))
        y = norm(x, f"{name}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, f"{name}.ln_2")
        y = F.linear(y, part["mlp.c_fc.weight"], part["mlp.c_fc.bias"])
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    want = norm(x, "ln_post")

    vit = clip_vit()
    torch.testing.assert_close(vit.encode(images), want, atol=1e-4, rtol=1e-4)
    vit.blocks[0].mlp.activation = F.gelu                # and QuickGELU is not GELU
    assert (vit.encode(images) - want).abs().max() > 1e-3


def clip_vit():
    """The golden CLIP's vision tower, loaded strictly."""
    tower = maskdistill.clip_to_timm(clip_state())
    assert torch.equal(tower.pop("proj"), clip_state()["visual.proj"])
    vit = VisionTransformer(32, 8, 128, 2, 2, clip=True)
    vit.load_state_dict(tower)
    return vit.requires_grad_(False)


def test_each_network_has_its_own_normalisation():
    pixels = torch.rand(2, 3, 32, 32)
    images = data.to_device(255 * pixels, torch.device("cpu"))
    vit = VisionTransformer(32, 4, 24, 1, 3)
    seen = []
    vit.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    Teacher(vit, maskdistill.CLIP_MEAN, maskdistill.CLIP_STD)(images)
    Teacher(vit)(images)
    for patches, mean, std in zip(seen, (CLIP_MEAN, IMAGENET_MEAN), (CLIP_STD, IMAGENET_STD)):
        want = mae.patchify((pixels - mean) / std, 4)
        torch.testing.assert_close(patches, want, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------- files as teachers
def test_teachers_grid_is_made_to_fit(tmp_path):
    """CLIP of 4 x 4 patches, asked for 6 x 6: bicubic positions; images are resized."""
    torch.save(clip_state(), tmp_path / "clip.pt")
    fits = load_teacher(tmp_path / "clip.pt", (4, 4))
    larger = load_teacher(tmp_path / "clip.pt", (6, 6))
    assert fits.vit.pos_embed.shape == (1, 17, 128) and larger.vit.pos_embed.shape == (1, 37, 128)
    assert larger(torch.randn(2, 3, 24, 24)).shape == (2, 36, 128)
    images = torch.randn(2, 3, 48, 48)
    resized = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(fits(images), fits(resized))


def test_checkpoints_of_ours_and_timms_files_are_teachers(photos, unscored, monkeypatch):
    """DINO's and timm's: heads as wide as is usual. Of our checkpoints, the encoder alone."""
    monkeypatch.setattr(mae, "save_visualization", lambda *_: None)
    plain = mae.VisionTransformer(16, 4, 192, 2, 3)
    plain.init_weights()
    torch.save({"teacher": {f"backbone.{n}": v for n, v in plain.state_dict().items()}}, "dino.pth")
    cfg = mae.Config(**SHORT, image_size=16, patch_size=4, output="mae")
    mae.train(cfg)
    maskdistill.train(tiny(output="ours", max_steps=1))
    pairs = flip.build(flip.Config(data="photos", image_size=16, patch_size=4))
    pairs_config = dict(num_heads=pairs.blocks[0].attn.num_heads)
    torch.save({"model": pairs.state_dict(), "config": pairs_config}, "flip.pt")
    encoders = {"dino.pth": plain, "flip.pt": pairs, "mae/checkpoint.pt": mae.build(cfg),
                "ours/checkpoint.pt": maskdistill.build(tiny(), 48)}
    images = draw("i", 2, 3, 16, 16)
    for path, encoder in encoders.items():
        if "checkpoint" in path:
            encoder.load_state_dict(weights(Path(path).parent))
        found = load_teacher(path, (4, 4))(images)
        torch.testing.assert_close(found, encoder.encode(images)[:, 1:])


@pytest.mark.parametrize("content, words", [
    (None, "no file x.pt; --teacher is one of the names"),
    (b"text", "no file of weights"),
    ({"a": torch.zeros(1)}, "holds neither OpenAI's CLIP nor a ViT in timm's names, but ['a']"),
    ({"model": [1]}, "holds no weights"),
    ("TorchScript", "x.pt is TorchScript, a program; of these only OpenAI's released CLIPs"),
    ("norm.bias is missing", "does not fit: missing 1 [norm.bias]"),
    ("of width 64", "does not tell how many heads it has at width 64")])
def test_a_bad_teacher_is_one_line(photos, capfd, content, words):
    if content == "TorchScript":
        save_torchscript(clip_state(), "x.pt")
    elif content == "norm.bias is missing":
        state = mae.VisionTransformer(32, 8, 192, 2, 3).state_dict()
        del state["norm.bias"]
        torch.save(state, "x.pt")
    elif content == "of width 64":
        torch.save(mae.VisionTransformer(32, 8, 64, 2, 2).state_dict(), "x.pt")
    elif isinstance(content, bytes):
        Path("x.pt").write_bytes(content)
    elif content:
        torch.save(content, "x.pt")
    assert words in error_of("--teacher=x.pt", capfd=capfd)


def error_of(*argv, capfd):
    """The one line with which the script ends."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        maskdistill.main(["--data=photos", "--preset=shapes", "--batch-size=10", *argv])
    error = capfd.readouterr().err.splitlines()[-1]      # before it a download's progress bar
    assert stop.value.code == 2 and error.startswith("error: ")
    return error


def test_download(photos, monkeypatch, capfd):
    """By name, checked against the hash; without network, what to fetch and where to put it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", "hub")
    monkeypatch.setattr(maskdistill, "CLIP_ADDRESS", Path("server").absolute().as_uri())
    torch.save(clip_state(), "clip.pt")
    content = Path("clip.pt").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    source = Path("server", digest, "vit.pt")
    source.parent.mkdir(parents=True)
    source.write_bytes(content)
    monkeypatch.setitem(maskdistill.RELEASED, "clip", ("vit.pt", digest))
    path = maskdistill.download("clip")
    assert path == Path("hub/checkpoints/clip-vit.pt") and path.read_bytes() == content
    source.unlink()
    assert maskdistill.download("clip") == path          # it is there now
    path.unlink()
    error = error_of("--teacher=clip", capfd=capfd)
    assert error.startswith("error: clip cannot be downloaded")
    assert source.absolute().as_uri() in error and str(path) in error
    source.write_bytes(content + b"more")                # another hash
    assert "cannot be downloaded (invalid hash" in error_of("--teacher=clip", capfd=capfd)
    assert not path.exists()


# ----------------------------------------------------------------------------------------- masking
def count_neighbors(masked, side):
    """Mean number of pairs of masked patches side by side."""
    mask = torch.zeros(len(masked), side * side).scatter(1, masked, 1.0).view(-1, side, side)
    pairs = (mask[:, 1:] * mask[:, :-1]).sum() + (mask[:, :, 1:] * mask[:, :, :-1]).sum()
    return pairs.item() / len(masked)


@pytest.mark.parametrize("side, count, min_block, block, single", [
    (14, 78, 16, 131, 57), (16, 102, 16, 174, 76), (8, 25, 4, 35, 17), (4, 6, 2, 5.7, 3)])
def test_masks(side, count, min_block, block, single):
    """Neighbors by block: measured with BEiT's own loop; by single patches: by counting."""
    N = side * side
    assert round(2 * side * (side - 1) * count * (count - 1) / N / (N - 1)) == single
    assert int(0.4 * N) == count
    noise = draw("masks", 2000, 4 * (6 + side) + N, uniform=True)

    def block_masks(noise):
        return block_masking(noise, (side, side), count, min_block)

    def random_masks(noise):
        return maskdistill.random_masking(noise[:, -N:], count)

    for masks, pairs in ((block_masks, block), (random_masks, single)):
        visible, masked = masks(noise)
        order = torch.cat([visible, masked], dim=1)
        assert masked.shape == (2000, count)
        assert torch.equal(order.sort().values, torch.arange(N).expand(2000, -1))
        assert count_neighbors(masked, side) == pytest.approx(pairs, rel=0.03)
        _, alone = masks(noise[7:8])
        assert torch.equal(alone, masked[7:8])           # an image's masks are of its noise only
    assert torch.equal(order, noise[:, -N:].argsort(dim=1))      # random: the least are visible


def blocks_by_hand(noise, grid, count, min_block, tries):
    """BEiT's algorithm for one image: a list of numbers -> the set of masked patches."""
    mask = np.zeros(grid, bool)
    failures = 0
    for t in range(tries):
        of_area, of_shape, of_top, of_left = noise[4 * t:4 * t + 4]
        missing = count - mask.sum()
        if missing == 0 or failures == 10:
            break
        area = max(min_block + of_area * (missing - min_block), 0)
        aspect = math.exp((2 * of_shape - 1) * math.log(0.3))
        height = round(math.sqrt(area * aspect))
        width = round(math.sqrt(area / aspect))
        failures += 1
        if height < grid[0] and width < grid[1]:
            top = int(of_top * (grid[0] - height + 1))
            left = int(of_left * (grid[1] - width + 1))
            new = mask.copy()
            new[top:top + height, left:left + width] = True
            if 1 <= new.sum() - mask.sum() <= missing:
                mask = new
                failures = 0
    masked = set(np.flatnonzero(mask))
    for patch in np.argsort(noise[4 * tries:]):          # single ones make up the number
        if len(masked) < count:
            masked.add(patch)
    return masked


def test_block_masking_equals_a_loop_over_images():
    noise = draw("loop", 200, 4 * 30 + 54, uniform=True).double()
    _, masked = block_masking(noise, (6, 9), 22, 4)
    for row, found in zip(noise.tolist(), masked.tolist()):
        assert set(found) == blocks_by_hand(row, (6, 9), 22, 4, tries=30)


# --------------------------------------------------------------------------------- target and loss
def test_forward_by_hand():
    """Mask tokens in place of the masked patches; the features of these are the target."""
    model = small_student()
    images, features, noise = inputs(model)
    loss, prediction, target, predicted = model(images, features, noise)
    visible, masked = model.masks(noise)
    assert torch.equal(predicted, masked) and masked.shape == (3, 25) and visible.shape == (3, 39)
    x = model.patch_embed(mae.patchify(images, 4)).clone()
    for i in range(3):
        x[i, masked[i]] = model.mask_token[0, 0]
    tokens = model.distill_head(model.forward_features(x)[:, 1:])
    for i in range(3):
        torch.testing.assert_close(prediction[i], tokens[i, masked[i]])
        want = features[i, masked[i]]
        want = want - want.mean(dim=1, keepdim=True)
        want = want / want.var(dim=1, unbiased=False, keepdim=True).sqrt()
        torch.testing.assert_close(target[i], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(loss, F.smooth_l1_loss(prediction, target))


def test_masked_pixels_do_not_reach_the_prediction():
    model = small_student()
    with torch.no_grad():                                # weights that let much through
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(0.15 * draw(name, *p.shape))
    images, features, noise = inputs(model)
    visible, masked = model.masks(noise)
    _, prediction, _, _ = model(images, features, noise)

    def predict_with_others(index):
        where = index.unsqueeze(2).expand(-1, -1, 48)
        patches = mae.patchify(images, 4).scatter(1, where, draw("d", 3, index.shape[1], 48))
        return model(mae.unpatchify(patches, 4, (8, 8)), features, noise)[1]

    assert torch.equal(predict_with_others(masked), prediction)
    difference = (predict_with_others(visible[:, :1]) - prediction).abs()
    assert difference.amax(dim=(1, 2)).min() > 1e-4      # in every image


def test_gradient_of_visible_patches_is_zero():
    model = small_student()
    images, features, noise = inputs(model)
    tokens = []

    def remember(module, args, output):
        output.retain_grad()
        tokens.append(output)

    model.blocks[-1].register_forward_hook(remember)
    loss, _, _, masked = model(images, features, noise)
    loss.backward()
    length = tokens[0].grad.norm(dim=2)                                        # (B, 1 + N)
    assert (length > 0).sum() == masked.numel() and (length.gather(1, masked + 1) > 0).all()


def test_targets():
    features = draw("features", 3, 25, 24)
    target = maskdistill.normalize_target(features, "ln")
    assert target.mean(dim=2).abs().max() < 1e-5
    assert (target.var(dim=2, unbiased=False) - 1).abs().max() < 1e-3
    factor = torch.arange(1.0, 76).view(3, 25, 1)        # each token changed in its own way
    changed = maskdistill.normalize_target(factor * features - 7 * factor, "ln")
    torch.testing.assert_close(changed, target, atol=1e-3, rtol=1e-3)
    target = maskdistill.normalize_target(features, "l2")
    want = features / features.square().mean(dim=2, keepdim=True).sqrt()
    torch.testing.assert_close(target, want)
    assert torch.equal(maskdistill.normalize_target(features, "none"), features)


def test_losses_by_hand():
    prediction = draw("p", 3, 25, 24)
    target = draw("t", 3, 25, 24)

    def loss_of(kind, beta=1.0):
        return maskdistill.distillation_loss(prediction, target, kind, beta).item()

    total = 0.0
    for error in (prediction - target).abs().flatten().tolist():
        total += error ** 2 / 1.4 if error < 0.7 else error - 0.35
    assert loss_of("smooth_l1", 0.7) == pytest.approx(total / target.numel(), rel=1e-6)
    assert loss_of("smooth_l1", 1e3) == pytest.approx(loss_of("l2") / 2e3, rel=1e-4)
    squares = (prediction - target).square()
    assert loss_of("l2") == pytest.approx(squares.mean().item(), rel=1e-6)
    cosine = (prediction * target).sum(dim=2) / prediction.norm(dim=2) / target.norm(dim=2)
    assert loss_of("cosine") == pytest.approx(1 - cosine.mean().item(), rel=1e-5)


def test_loss_of_a_zero_prediction():
    """1 by l2 of a normalised target; for normal targets smooth-L1's expectation."""
    target = maskdistill.normalize_target(torch.randn(1, 400, 768), "ln")
    loss = maskdistill.distillation_loss(torch.zeros_like(target), target, "l2", 1.0)
    assert loss.item() == pytest.approx(1, abs=1e-4)
    target = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    for beta, want in ((1.0, 0.4245), (2.0, 0.2471), (0.5, 0.5805)):
        zeros = torch.zeros_like(target)
        loss = maskdistill.distillation_loss(zeros, target, "smooth_l1", beta)
        assert loss.item() == pytest.approx(want, abs=2e-3)


def test_pixels_with_ln_and_l2_are_maes_target():
    model = small_student(target_dim=48, loss="l2")
    images, _, noise = inputs(model)
    cfg = maskdistill.Config(teacher="pixels", patch_size=4)
    teacher, width = maskdistill.open_teacher(cfg, torch.device("cpu"))
    _, _, target, masked = model(images, teacher(images), noise)
    patches = mae.gather_tokens(mae.patchify(images, 4), masked)
    want = mae.pixel_target(patches, norm_pix=True) * (48 / 47) ** 0.5         # biased variance
    assert width == 48
    torch.testing.assert_close(target, want, atol=1e-4, rtol=1e-4)


def test_without_masks_all_patches_are_predicted():
    model = small_student(mask_ratio=0.0)
    images, features, noise = inputs(model)
    _, prediction, _, predicted = model(images, features, noise)
    assert prediction.shape == (3, 64, 24)
    assert torch.equal(predicted.sort().values, torch.arange(64).expand(3, -1))


def test_hog_by_hand():
    """A ramp that rises to the right votes for the first bin, one downwards for the middle one."""
    ramp = torch.arange(32.0).expand(1, 3, 32, 32)
    for images, which in ((ramp, 0), (ramp.transpose(2, 3), 4)):
        features = maskdistill.hog(images, 8).view(16, 2, 2, 3, 9)             # cells and colors
        one = F.one_hot(torch.tensor(which), 9).float()
        torch.testing.assert_close(features, one.expand(16, 2, 2, 3, 9))
    images = draw("hog", 2, 3, 32, 32)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    votes = np.zeros((2, 3, 9, 8, 8))
    for b, c, y, x in np.ndindex(2, 3, 32, 32):
        dx = float(padded[b, c, y + 1, x + 2] - padded[b, c, y + 1, x])
        dy = float(padded[b, c, y + 2, x + 1] - padded[b, c, y, x + 1])
        bin_index = min(int(math.atan2(dy, dx) / math.pi % 1 * 9), 8)
        votes[b, c, bin_index, y // 4, x // 4] += math.hypot(dx, dy)
    votes /= np.linalg.norm(votes, axis=2, keepdims=True)
    cells = torch.from_numpy(votes).float()[:, :, :, 2:4, 4:6]                 # row 1, column 2
    want = cells.permute(0, 3, 4, 1, 2).flatten(1)
    torch.testing.assert_close(maskdistill.hog(images, 8)[:, 6], want, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------- the student
@pytest.mark.parametrize("side, rows", [(14, 732), (16, 964), (8, 228), (4, 52)])
def test_relative_positions(side, rows):
    index = maskdistill.relative_index((side, side))
    N = side * side
    assert index.shape == (1 + N, 1 + N) and torch.equal(index.unique(), torch.arange(rows))
    assert (index[0, 1:] == rows - 3).all() and (index[1:, 0] == rows - 2).all()
    assert index[0, 0] == rows - 1
    assert index[1, 2] == (side - 1) * (2 * side - 1) + side - 2     # query minus key: (0, -1)
    assert index[1 + side, 1] == side * (2 * side - 1) + side - 1    # and (1, 0)
    row_of_offset = {}
    y, x = np.divmod(np.arange(N), side)
    for i, j in np.ndindex(min(N, 64), min(N, 64)):      # equal offsets share a row
        offset = (y[i] - y[j], x[i] - x[j])
        row = index[1 + i, 1 + j].item()
        assert row_of_offset.setdefault(offset, row) == row
    assert len(set(row_of_offset.values())) == len(row_of_offset)    # and others do not


def test_zero_table_is_no_bias_and_patches_may_be_permuted():
    model = small_student()
    nn.init.zeros_(model.rel_pos_bias.relative_position_bias_table)
    x = draw("p", 2, 64, 32)
    order = torch.randperm(64)
    tokens = model.forward_features(x)
    permuted = model.forward_features(x[:, order])
    torch.testing.assert_close(permuted[:, 1:], tokens[:, 1:][:, order])
    model.rel_pos_bias = None
    torch.testing.assert_close(model.forward_features(x), tokens)
    assert not any("pos_embed" in name or "qkv.bias" in name for name in model.state_dict())


def test_block_by_hand():
    """Head by head, with biases of queries and values, positions, and both gains."""
    torch.manual_seed(0)
    block = maskdistill.Block(8, 2, False, 0.5, F.gelu, 1e-6)
    nn.init.normal_(block.attn.q_bias)
    nn.init.normal_(block.attn.v_bias)
    nn.init.normal_(block.gamma_1)
    nn.init.normal_(block.gamma_2)
    x = torch.randn(3, 5, 8)
    bias = torch.randn(1, 2, 5, 5)
    y = F.layer_norm(x, (8,), eps=1e-6)
    q, k, v = (y @ w.T for w in block.attn.qkv.weight.chunk(3))
    q = q + block.attn.q_bias
    v = v + block.attn.v_bias
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / 2 + bias[0, h]
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    z = x + block.gamma_1 * block.attn.proj(torch.cat(heads, dim=-1))
    hidden = block.mlp.fc1(F.layer_norm(z, (8,), eps=1e-6))
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5))
    want = z + block.gamma_2 * block.mlp.fc2(gelu)
    torch.testing.assert_close(block(x, bias), want)


@pytest.mark.parametrize("width, depth, std", [(192, 3, 0.04), (768, 1, 0.02), (1024, 1, 0.02)])
def test_initial_weights(width, depth, std):
    torch.manual_seed(0)
    model = MaskDistill(16, 4, width, depth, 4, width, layer_scale=0.1)
    state = model.state_dict()
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "distill_head.weight",
                 "mask_token", "cls_token"):
        assert 0.95 * std < state[name].abs().max() <= std, name
    normal_cut_at_one_std = 0.5396 * std
    assert state["distill_head.weight"].std() == pytest.approx(normal_cut_at_one_std, rel=0.01)
    for layer in range(1, depth + 1):
        for name in ("attn.proj", "mlp.fc2"):
            weight = state[f"blocks.{layer - 1}.{name}.weight"]
            want = std / (2 * layer) ** 0.5
            assert weight.abs().max().item() == pytest.approx(want, rel=1e-2)
        assert (state[f"blocks.{layer - 1}.gamma_1"] == 0.1).all()
        assert (state[f"blocks.{layer - 1}.gamma_2"] == 0.1).all()
    for name, value in state.items():
        if name.endswith(("bias", "table")):
            assert (value == 0).all(), name


@pytest.mark.parametrize("size, patch, target_dim, count", [
    ("base", 16, 768, 86_256_720), ("large", 16, 1024, 304_186_816),
    ("huge", 14, 1024, 631_805_248)])
def test_parameter_counts_of_the_paper(size, patch, target_dim, count):
    with torch.device("meta"):
        model = MaskDistill(224, patch, *maskdistill.SIZES[size], target_dim)
    assert common.count_parameters(model) == count


def test_presets_are_the_recipe():
    cfg = common.parse_config(maskdistill.Config, maskdistill.PRESETS, ["--data=imagenet"])
    assert (cfg.teacher, cfg.normalize, cfg.loss, cfg.beta) == ("clip", "ln", "smooth_l1", 1.0)
    assert (cfg.masking, cfg.min_block, int(cfg.mask_ratio * 196)) == ("block", 16, 78)
    assert cfg.base_lr * cfg.batch_size / 256 == pytest.approx(1.5e-3)
    assert (maskdistill.MIN_LR, cfg.weight_decay, cfg.clip_grad) == (1e-5, 0.05, 3.0)
    assert (cfg.epochs, cfg.warmup_epochs, cfg.crop_scale, cfg.color_jitter) == (300, 10, 0.2, 0.4)
    assert (cfg.embed_dim, cfg.depth, cfg.layer_scale) == (768, 12, 0.1)
    argv = ["--data=imagenet", "--preset=imagenet-large"]
    large = common.parse_config(maskdistill.Config, maskdistill.PRESETS, argv)
    assert (large.data, large.teacher) == ("imagenet", "clip-large")
    assert (large.embed_dim, large.depth, large.layer_scale) == (1024, 24, 1e-5)


def test_what_is_trained_and_what_is_decayed():
    model = small_student()
    model(*inputs(model))[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    decayed, others = common.parameter_groups(model, 0.05, ("cls_token",))
    decayed = {id(p) for p in decayed["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names >= {"mask_token", "rel_pos_bias.relative_position_bias_table"}
    assert not names & {"cls_token", "norm.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias"}
    teacher = Teacher(VisionTransformer(32, 4, 24, 2, 3))
    assert not any(p.requires_grad for p in teacher.parameters())


def test_overfits_one_image():
    model = small_student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    image, features, noise = (value[:1] for value in inputs(model))
    losses = []
    for _ in range(200):
        loss, _, _, _ = model(image, features, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_momentum_teacher_is_the_average_of_the_student(monkeypatch):
    monkeypatch.setitem(maskdistill.SIZES, "micro", (16, 5, 2))
    model = maskdistill.build(tiny(teacher="momentum"), 16)
    average = model.momentum.vit
    start = {name: p.clone() for name, p in average.named_parameters()}
    for name, p in start.items():                        # at first it is the student
        assert torch.equal(p, model.get_parameter(name))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    model.momentum.update(model, 0.9)
    for name, p in average.named_parameters():
        torch.testing.assert_close(p, start[name] + 0.1)
        assert not p.requires_grad
    outputs = []
    for block in average.blocks:
        block.register_forward_hook(lambda _, args, output: outputs.append(output))
    images = draw("i", 2, 3, 16, 16)
    average.encode(images)
    want = (outputs[2] + outputs[3] + outputs[4])[:, 1:] / 3                   # of five blocks
    torch.testing.assert_close(model.momentum(images), want)


def test_compiled_model_keeps_names_and_values():
    model = small_student(image_size=16, patch_size=8, depth=1)
    names = list(model.state_dict())
    images, features, _ = inputs(model)
    images = images[:, :, :16, :16]
    noise = draw("noise", 3, model.noise_width, uniform=True)
    with torch.no_grad():
        eager = model(images, features[:, :4], noise)
        model.compile(backend="aot_eager")               # the default needs a C++ compiler
        compiled = model(images, features[:, :4], noise)
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == names


def test_tables_of_other_grids_are_resized():
    """Numbers that grow evenly with the offset do so on another grid, too."""
    offset = torch.arange(-3.0, 4)                       # of a 4 x 4 grid
    plane = offset.view(7, 1) / 3 + 10 * offset / 3                            # (7, 7)
    table = torch.cat([plane.flatten(), torch.tensor([50.0, 60, 70])]).unsqueeze(1)
    assert common.resize_relative_positions(table, (4, 4)) is table
    larger = common.resize_relative_positions(table, (6, 6))
    assert larger.shape == (maskdistill.relative_index((6, 6)).max() + 1, 1)
    assert larger[-3:, 0].tolist() == [50, 60, 70]
    plane = larger[:-3].view(11, 11)
    assert plane[5, 5].abs() < 1e-4 and plane[5, 6] > 0
    torch.testing.assert_close(plane, -plane.flip(0, 1), atol=1e-4, rtol=0)
    assert (plane.diff(dim=1) > 0).all() and plane[0, 0].item() == pytest.approx(-11, abs=1e-3)


def test_what_the_image_shows(monkeypatch):
    """Gray where patches are masked, and there alone how well they are predicted."""
    rows = {}
    monkeypatch.setattr(data, "save_image_grid", lambda path, given: rows.update(given))
    model = small_student()
    images, features, noise = inputs(model)
    maskdistill.save_visualization(model, images, features, noise, None)
    original, seen, heat = rows.values()
    _, prediction, target, masked = model(images, features, noise)
    visible, _ = model.masks(noise)
    cosine = F.cosine_similarity(prediction, target, dim=2).clamp(0, 1)

    def patches_of(row, index):
        return mae.gather_tokens(mae.patchify(row, 4), index)

    assert torch.equal(original, images)
    assert (patches_of(seen, masked) == 0).all()
    for row in (seen, heat):
        assert torch.equal(patches_of(row, visible), patches_of(images, visible))
    want = data.heat_patches(cosine, 4)
    torch.testing.assert_close(patches_of(heat, masked), want, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------- whole runs
SHORT = dict(data="photos", batch_size=10, epochs=2, warmup_epochs=0.5, max_steps=1)
TINY = dict(data="photos", image_size=16, patch_size=4, epochs=2, warmup_epochs=0.5, batch_size=10,
            teacher="pixels")                            # 40 photos: 4 steps an epoch, 8 in all
MICRO = maskdistill.SIZES["micro"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """--model micro of this process is smaller; a CLIP of width 128 has two heads."""
    monkeypatch.setitem(maskdistill.SIZES, "micro", (16, 2, 2))
    monkeypatch.setitem(maskdistill.SIZES, "golden", (128, 2, 2))


@pytest.fixture
def unscored(monkeypatch):
    """Runs end without scores and images, for tests of their weights or files alone."""
    monkeypatch.setattr(data, "score_encoders", lambda *_: {})
    monkeypatch.setattr(maskdistill, "save_visualization", lambda *_: None)


def tiny(**changes):
    return maskdistill.Config(**TINY | changes)


def peak_and_cosine(step, peak, warmup, total, least):
    """A line from 0 to the peak, then half a cosine to the least."""
    if step < warmup:
        return peak * step / warmup
    return least + (peak - least) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def one_cycle(step, total, peak=0.004):
    """Half a cosine from a 25th of the peak to it in a tenth of the steps, then half a cosine to
    1 / 250,000 of it (torch's OneCycleLR, which counts so that the peak is at 0.1 * total - 1)."""
    def half_cosine(first, last, share):
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    top = 0.1 * total - 1
    if step <= top:
        return half_cosine(peak / 25, peak, step / top)
    return half_cosine(peak, peak / 250_000, (step - top) / (total - 1 - top))


def crops(indices, epoch, color_jitter):
    """The photos' crops in an epoch and their labels: uint8 (n, 3, 16, 16), (n,)."""
    augmented = data.open_data("photos", "", 3).train
    augmented.transform = data.augment(16, 0.5, color_jitter)
    images, labels, _ = zip(*(augmented[epoch, i] for i in indices))
    return torch.stack(images), torch.tensor(labels)


def labels_by_hand(vit, batch_size=64, epochs=3):
    """The training of --teacher self: AdamW with torch's betas, all parameters decayed."""
    torch.manual_seed(3)
    head = nn.Linear(64, 2)
    trained = [p for name, p in vit.named_parameters() if name != "pos_embed"]
    for p in trained:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained + [head.weight, head.bias], betas=(0.9, 0.999),
                                  eps=1e-8, weight_decay=0.05)
    steps = math.ceil(40 / batch_size)                   # the last may be smaller
    for step in range(epochs * steps):
        epoch, position = divmod(step, steps)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
        batch = order[batch_size * position:batch_size * (position + 1)]
        images, labels = crops(batch, epoch, 0.0)
        optimizer.param_groups[0]["lr"] = one_cycle(step, epochs * steps)
        images = data.to_device(images, torch.device("cpu"))     # rounded as in the run: many
        logits = head(vit.encode(images)[:, 1:].mean(dim=1))     # gradients are all but zero
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return vit.requires_grad_(False)


def own_teacher():
    """The untrained teacher of --teacher self."""
    torch.manual_seed(3)
    return VisionTransformer(16, 4, 64, 2, 4)


def test_training_on_labels(photos):
    """Three batches an epoch, the last a smaller one; the learning rate rises, then falls."""
    found = own_teacher()
    cfg = tiny(seed=3, crop_scale=0.5)
    dataset = data.open_data("photos", "", 3).train
    dataset.transform = data.augment(16, 0.5)
    maskdistill.train_classifier(found, dataset, 2, cfg, torch.device("cpu"), 8, 16)
    expected = labels_by_hand(own_teacher(), 16, 8)
    close(found.state_dict(), expected.state_dict())
    assert not same(found.state_dict(), own_teacher().state_dict())
    assert not any(p.requires_grad for p in found.parameters())


RECIPE = dict(seed=3, max_steps=5, mask_ratio=0.4, min_block=3, layer_scale=0.5, crop_scale=0.5,
              color_jitter=0.4, base_lr=0.05, weight_decay=0.3)


def optimize(model, loss_of, clip, after_step=None):
    """BEiT v2's recipe written out, five steps of ten photos: AdamW, its second beta 0.98; neither
    vectors nor the class token are decayed; the gradient's norm is at most `clip`.

    loss_of: (images (10, 3, 16, 16), noise (10, 4 * 10 + 16), step) -> loss.
    Returns AdamW's averages of the gradients, as `moments` reads them from a checkpoint."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    vectors = [p for name, p in trained.items() if p.ndim == 1 or name == "cls_token"]
    matrices = [p for name, p in trained.items() if p.ndim > 1 and name != "cls_token"]
    groups = [dict(params=matrices, weight_decay=0.3), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    norms = []
    for step in range(5):
        epoch, position = divmod(step, 4)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
        images, _ = crops(order[10 * position:10 * position + 10], epoch, 0.4)
        images = (images / 255 - IMAGENET_MEAN) / IMAGENET_STD
        seed = int(np.random.SeedSequence((3, step)).generate_state(1)[0])
        noise = torch.rand(10, 4 * 10 + 16, generator=torch.Generator().manual_seed(seed))
        for group in optimizer.param_groups:
            group["lr"] = peak_and_cosine(step, 0.05 * 10 / 256, 2, 8, 3e-4)
        loss_of(images, noise, step).backward()
        norms.append(sum(p.grad.square().sum() for p in trained.values()).sqrt().item())
        for p in trained.values():
            p.grad *= min(1, clip / norms[-1])
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            after_step()
    assert min(norms) < 0.95 * clip and max(norms) > 1.05 * clip, norms        # some are cut
    states = optimizer.state_dict()["state"]
    return {str(i): state["exp_avg"] for i, state in states.items()}


def clip_by_hand(images, projected):
    """Patch features of the golden CLIP for images (B, 3, 16, 16), normalised for the student."""
    pixels = F.interpolate(images * IMAGENET_STD + IMAGENET_MEAN, (32, 32), mode="bicubic",
                           antialias=True)
    tokens = clip_vit().encode((pixels - CLIP_MEAN) / CLIP_STD)[:, 1:]
    return tokens @ clip_state()["visual.proj"] if projected else tokens


def teacher_by_hand(kind):
    """What --teacher names, of a finished run called run: images -> features (B, 16, E), and E."""
    if kind == "pixels":
        return partial(mae.patchify, patch_size=4), 48
    if kind == "hog":
        return partial(maskdistill.hog, patch_size=4), 108
    if kind == "clip.pt":
        return partial(clip_by_hand, projected=False), 128
    if kind == "vit.pth":
        vit = mae.VisionTransformer(16, 4, 192, 1, 3)
        vit.load_state_dict(torch.load("vit.pth", weights_only=True))
    else:                                                # self
        vit = labels_by_hand(own_teacher())
        close(vit.state_dict(), checkpoint("run", "teacher.pt")["model"])
    vit.requires_grad_(False)
    return lambda images: vit.encode(images)[:, 1:], vit.cls_token.shape[-1]


def save_teacher(kind):
    torch.manual_seed(5)
    if kind == "clip.pt":
        torch.save(clip_state(), kind)
    if kind == "vit.pth":
        vit = mae.VisionTransformer(16, 4, 192, 1, 3)
        vit.init_weights()
        torch.save(vit.state_dict(), kind)


def target_by_hand(features, normalize):
    E = features.shape[2]
    if normalize == "l2":
        return features / features.norm(dim=2, keepdim=True) * E ** 0.5
    if normalize == "ln":
        features = features - features.mean(dim=2, keepdim=True)
        return features / (features.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
    return features


def error_by_hand(prediction, target, loss):
    """smooth-L1 with beta 0.7, or the square, or 1 - cosine."""
    error = (prediction - target).abs()
    if loss == "cosine":
        dot = (prediction * target).sum(dim=2)
        return 1 - (dot / prediction.norm(dim=2) / target.norm(dim=2)).mean()
    if loss == "l2":
        return error.square().mean()
    return torch.where(error < 0.7, error.square() / 1.4, error - 0.35).mean()


@pytest.mark.parametrize("kind, clip, changes", [
    ("self", 0.5, dict(beta=0.7)), ("clip.pt", 0.27, dict(beta=0.7, normalize="l2")),
    ("momentum", 0.65, dict(beta=0.7, momentum=0.9)),
    ("pixels", 1.2, dict(masking="random", loss="l2")),
    ("hog", 0.45, dict(normalize="none", loss="l2")), ("vit.pth", 1.0, dict(loss="cosine"))])
def test_recipe(photos, unscored, monkeypatch, kind, clip, changes):
    """Five steps of a loop written out end with the same weights, moments and teacher."""
    monkeypatch.setitem(maskdistill.SIZES, "micro", (16, 3, 2))
    monkeypatch.setattr(maskdistill, "MIN_LR", 3e-4)
    save_teacher(kind)
    cfg = tiny(**RECIPE | changes, output="run", teacher=kind, clip_grad=clip)
    maskdistill.train(cfg)

    if kind == "momentum":
        average = VisionTransformer(16, 4, 16, 3, 2, relative=True, layer_scale=0.5)
        average.requires_grad_(False)
        outputs = []
        for block in average.blocks:
            block.register_forward_hook(lambda _, args, output: outputs.append(output))

        def features_of(images):
            average.encode(images)
            return (outputs[-2] + outputs[-1])[:, 1:] / 2
        width = 16
    else:
        features_of, width = teacher_by_hand(kind)
    torch.manual_seed(3)
    model = MaskDistill(16, 4, 16, 3, 2, width, mask_ratio=0.4, masking=cfg.masking, min_block=3,
                        layer_scale=0.5)
    if kind == "momentum":
        average.load_state_dict(model.state_dict(), strict=False)

    def loss_of(images, noise, step):
        _, prediction, _, predicted = model(images, torch.zeros(10, 16, width), noise)
        assert torch.equal(predicted, model.masks(noise)[1]) and predicted.shape == (10, 6)
        features = torch.stack([of_image[rows] for of_image, rows
                                in zip(features_of(images), predicted)])
        return error_by_hand(prediction, target_by_hand(features, cfg.normalize), cfg.loss)

    def update_average():
        for name, p in average.named_parameters():
            p.copy_(0.9 * p + 0.1 * model.get_parameter(name).detach())

    averages = optimize(model, loss_of, clip, update_average if kind == "momentum" else None)
    close(model.state_dict(), weights("run"))
    close(averages, moments("run"))
    if kind == "momentum":
        close({f"momentum.vit.{n}": p for n, p in average.named_parameters()}, weights("run"))


def test_what_a_run_scores_and_exports(photos, monkeypatch):
    """encoder.pt is the trained encoder alone; it is compared with the untrained one, the teacher
    and pixels."""
    scored = {}
    monkeypatch.setattr(data, "score_encoders", lambda encoders, *_: scored.update(encoders) or {})
    maskdistill.train(tiny(output="run", teacher="self", max_steps=2))
    encoder = VisionTransformer(16, 4, 16, 2, 2, relative=True, layer_scale=1.0)
    encoder.load_state_dict(torch.load("run/encoder.pt", weights_only=True))
    teacher = load_teacher("run/teacher.pt", (4, 4)).vit
    images = draw("i", 2, 3, 16, 16)
    wanted = {"trained": encoder, "untrained": maskdistill.build(tiny(), 64),
              "teacher": teacher}
    assert scored.keys() == {"pixels", *wanted}
    for name, vit in wanted.items():
        want = vit.encode(images)[:, 1:].mean(dim=1)
        torch.testing.assert_close(scored[name](images), want)
    assert Path("run/similarity.png").stat().st_size > 1000
    scored.clear()
    maskdistill.train(tiny(output="momentum", teacher="momentum", max_steps=1))
    assert scored.keys() == {"pixels", "trained", "untrained"}
    saved = torch.load("momentum/encoder.pt", weights_only=True)
    assert saved.keys() == encoder.state_dict().keys()   # nothing of the average


@pytest.mark.parametrize("teacher", ["momentum", "self"])
def test_resumed_run_equals_an_undisturbed_one(photos, unscored, monkeypatch, teacher):
    """With the teacher that it learned from before; that teacher serves other runs, too."""
    whole = maskdistill.train(tiny(output="whole", teacher=teacher))
    maskdistill.train(tiny(output="parts", teacher=teacher, max_steps=3))
    monkeypatch.setattr(maskdistill, "train_classifier", None)                 # no second training
    for steps in (6, 0):
        parts = maskdistill.train(tiny(output="parts", teacher=teacher, max_steps=steps))
    assert same(weights("whole"), weights("parts")) and whole == parts
    with pytest.raises(common.UserError, match="beta: 1.0 there, 2.0 here"):
        maskdistill.train(tiny(output="parts", teacher=teacher, beta=2.0))
    if teacher == "self":
        maskdistill.train(tiny(output="other", teacher="whole/teacher.pt"))
        assert same(weights("whole"), weights("other"))


def test_own_teacher_is_set_aside_with_the_student(photos, unscored):
    for resume in (True, False):
        maskdistill.train(tiny(output="run", teacher="self", resume=resume, max_steps=1))
    assert {path.name for path in Path().glob("run*")} == {"run", "run.1"}
    assert same(weights("run"), weights("run.1"))
    old, new = (checkpoint(run, "teacher.pt") for run in ("run.1", "run"))
    assert same(old["model"], new["model"]) and new["num_heads"] == 4


def test_accumulation_is_one_large_batch(photos, unscored):
    """Gradients are not cut here: that, as AdamW, forgives those of the wrong scale; their averages
    do not."""
    for accumulate in (1, 5):
        maskdistill.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=6,
                               clip_grad=1e6, teacher="momentum", momentum=0.9))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))
    assert checkpoint("a1")["epoch_losses"] == pytest.approx(checkpoint("a5")["epoch_losses"])


def test_two_processes_equal_one(photos):
    """Several images a process and micro-batch, into the second epoch: one torchrun makes both
    runs, with cut gradients and an average of the student, then with accumulation and a teacher
    that the first process alone trains."""
    settings = TINY | dict(batch_size=12, max_steps=5, crop_scale=0.5, base_lr=0.05)
    runs = {"momentum": settings | dict(teacher="momentum", momentum=0.9, clip_grad=0.1),
            "self": settings | dict(teacher="self", accumulate=2, clip_grad=1e6)}
    Path("both.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import common, maskdistill
common.LOG_EVERY = 1
maskdistill.SIZES["micro"] = (16, 2, 2)
if common.rank() > 0:
    maskdistill.train_classifier = None
with common.command_line():
    for name, settings in {runs!r}.items():
        maskdistill.train(maskdistill.Config(output=name + "2", **settings))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "both.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, settings in runs.items():
        maskdistill.train(maskdistill.Config(output=f"{name}1", **settings))
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        for line, other in zip(lines(f"{name}1"), lines(f"{name}2"), strict=True):
            for key in {"loss", "lr", "epoch_loss", "knn_untrained"} & line.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-4), key
    one, two = (checkpoint(run, "teacher.pt")["model"] for run in ("self1", "self2"))
    close(one, two)


@pytest.mark.parametrize("argv, words", [
    (["--teacher=nothing.pt"], "no file nothing.pt"),
    (["--teacher=photos/train/a/00.png"], "no file of weights"),
    (["--mask-ratio=1"], "mask_ratio 1.0 leaves nothing to see of 16 patches"),
    (["--min-block=7"], "min_block 7 is more than the 4 masked"),
    (["--teacher=hog", "--patch-size=1"], "patch_size 1 must be even"),
    (["--beta=0"], "beta is 0.0, it must be from 1e-06"),
    (["--momentum=2"], "momentum is 2.0, it must be from 0 to 1"),
    (["--masking=blocks"], "invalid choice"), (["--loss=l1"], "invalid choice"),
    (["--data=flat", "--teacher=self"], "learns labels, and there are none: class folders")])
def test_a_users_mistake_is_one_line(photos, capfd, argv, words):
    Path("flat").mkdir()
    for path in Path("photos/train/a").iterdir():
        os.link(path, Path("flat", path.name))
    assert words in error_of(*argv, capfd=capfd)


def test_evaluation_of_a_student(photos, unscored):
    """Relative positions: a table for each block when fine-tuned."""
    maskdistill.train(tiny(output="run", max_steps=1, teacher="momentum"))
    argv = ["--data=photos", "--workers=0", "--batch-size=10"]
    assert evaluate.main(["knn", "--checkpoint=run/checkpoint.pt", *argv])
    tuned = evaluate.main(["finetune", "--checkpoint=run/checkpoint.pt", *argv, "--epochs=1",
                           "--warmup-epochs=0", "--base-lr=0.1", "--output=tuned"])
    saved = checkpoint("tuned", "finetuned.pt")["model"]
    tables = [value for name, value in saved.items() if name.endswith("bias_table")]
    assert len(tables) == 2 and not torch.equal(*tables)
    again = evaluate.main(["finetune", "--eval", "--checkpoint=tuned/finetuned.pt", *argv])
    assert again["top1"] == pytest.approx(tuned["top1"])


def test_student_learns_from_a_teacher_that_knows(in_tmp, fewer_shapes, monkeypatch):
    """`python maskdistill.py` on fewer images, its teacher on twice the epochs: it learns the
    labels, the student some of them from it. (The numbers: seeds 0, 1, 2.)"""
    longer = functools.partial(maskdistill.train_classifier, epochs=6)
    monkeypatch.setattr(maskdistill, "train_classifier", longer)
    monkeypatch.setitem(maskdistill.SIZES, "micro", MICRO)
    monkeypatch.setattr(common, "LOG_EVERY", 50)
    metrics = maskdistill.main(["--epochs=3"])
    first, *_ = lines("runs/maskdistill-shapes")
    assert metrics["loss"] < 0.9 * first["loss"]         # 0.84, 0.83, 0.82 of it
    assert metrics["linear_teacher"] > metrics["linear_untrained"] + 20        # 30, 44, 44
    assert metrics["linear_trained"] > metrics["linear_untrained"] + 6         # 16, 11, 19
