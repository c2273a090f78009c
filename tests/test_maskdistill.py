"""maskdistill.py against published figures, hand-made references, its own invariants; and whole runs."""

import hashlib
import json
import math
import os
import subprocess
import sys
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
from maskdistill import MaskDistill, Teacher, VisionTransformer, block_masking, random_masking
from test_train import checkpoint, close, moments, photos, same, weights         # noqa: F401, photos is a fixture

FIGURES = golden("clip")
SMALL = dict(image_size=32, patch_size=4, embed_dim=32, depth=2, num_heads=4, target_dim=24, min_block=4)


def student(**changes):
    torch.manual_seed(1)
    model = MaskDistill(**SMALL | changes)
    with torch.no_grad():                                # so that positions count
        for name, p in model.named_parameters():
            if "table" in name or p.ndim == 1:
                p.add_(0.3 * draw(name, *p.shape))
    return model


def frozen(width=24, **options):
    """A teacher with random weights."""
    torch.manual_seed(2)
    vit = VisionTransformer(32, 4, width, 2, 3, **options)
    vit.init_weights()
    return Teacher(vit)


def given(model, batch=3):
    return draw("maskdistill/images", batch, 3, 32, 32), draw("maskdistill/noise", batch, model.noise_width, uniform=True)


# -------------------------------------------------------------------------------------- CLIP's figures
def clip_state():
    """CLIP with the golden weights."""
    state = {name: 0.15 * draw(name, *shape) if shape else torch.tensor(2.5) for name, shape in FIGURES["state_dict"].items()}
    return {name: value + 1 if value.ndim == 1 and name.endswith("weight") else value for name, value in state.items()}


def archive(state, path):
    """The state as TorchScript, as CLIP was published."""
    def tree(state):
        module = nn.Module()
        for name, value in state.items():
            if "." not in name:
                module.register_parameter(name, nn.Parameter(value))
        for child in {name.split(".")[0]: 0 for name in state if "." in name}:
            module.add_module(child, tree({name.split(".", 1)[1]: v for name, v in state.items() if name.split(".")[0] == child}))
        return module

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in tree(state).named_children():
                self.add_module(name, child)
            for name, value in state.items():
                if "." not in name:
                    self.register_parameter(name, nn.Parameter(value))

        def forward(self, x):
            return x
    with pytest.warns(FutureWarning):
        torch.jit.save(torch.jit.script(Whole()), path)
    return path


def golden_images(teacher):
    """The images of the figures, normalised so that the teacher's own normalisation gives them back."""
    size = FIGURES["config"]["image_size"]
    return (draw("clip/images", FIGURES["config"]["batch"], 3, size, size) - teacher.shift) / teacher.scale


@pytest.mark.parametrize("kind", ["plain", "TorchScript"])
def test_clip_figures(tmp_path, monkeypatch, kind):
    path = tmp_path / "clip.pt"
    if kind == "plain":
        torch.save(clip_state(), path)
    else:                                                # it is run because its hash is known
        archive(clip_state(), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(maskdistill.RELEASED, "clip", ("file:///nowhere/x.pt", digest))
    everything = torch.arange(16).expand(5, -1)
    tokens = {}
    for feature in ("post", "proj", "raw"):
        teacher = maskdistill.load_teacher(path, (4, 4), feature)
        with torch.no_grad():
            tokens[feature] = teacher(golden_images(teacher), everything)
        assert teacher.width == tokens[feature].shape[-1] == {"proj": 32}.get(feature, 128)
    assert tokens["post"].norm().item() == pytest.approx(FIGURES["patch_tokens_after_ln_post_norm"], rel=1e-5)
    assert tokens["proj"].norm().item() == pytest.approx(FIGURES["patch_tokens_projected_norm"], rel=1e-5)
    head = torch.tensor(FIGURES["patch_tokens_row0_token0_head"])
    torch.testing.assert_close(tokens["post"][0, 0, :len(head)], head, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher.vit.norm(tokens["raw"]), tokens["post"])
    with torch.no_grad():                                # the class token is CLIP's image feature
        image = teacher.vit.encode(golden_images(teacher) * teacher.scale + teacher.shift)[:, 0] @ teacher.proj
    assert image.norm().item() == pytest.approx(FIGURES["image_features_norm"], rel=1e-5)
    head = torch.tensor(FIGURES["image_features_row0_head"])
    torch.testing.assert_close(image[0, :len(head)], head, rtol=1e-4, atol=1e-5)


def test_clip_equals_a_tower_of_torchs_own_attention():
    """Independent of the figures: nn.MultiheadAttention and the published names, on random weights."""
    state = {name.removeprefix("visual."): value for name, value in clip_state().items() if name.startswith("visual.")}
    x = F.conv2d(draw("x", 2, 3, 32, 32), state["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(2, 1, -1), x], dim=1) + state["positional_embedding"]
    norm = lambda x, name: F.layer_norm(x, (128,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)
    x = norm(x, "ln_pre")
    for i in range(2):
        part = {n.removeprefix(f"transformer.resblocks.{i}."): v for n, v in state.items()}
        attention = nn.MultiheadAttention(128, 2, batch_first=True)
        attention.load_state_dict({n.removeprefix("attn."): v for n, v in part.items() if n.startswith("attn.")})
        y = norm(x, f"transformer.resblocks.{i}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = F.linear(norm(x, f"transformer.resblocks.{i}.ln_2"), part["mlp.c_fc.weight"], part["mlp.c_fc.bias"])
        x = x + F.linear(y * torch.sigmoid(1.702 * y), part["mlp.c_proj.weight"], part["mlp.c_proj.bias"])
    vit = VisionTransformer(32, 8, 128, 2, 2, pre_norm=True, act=maskdistill.quick_gelu, eps=1e-5)
    names = maskdistill.clip_to_timm(clip_state())
    torch.testing.assert_close(names.pop("proj"), state["proj"])
    vit.load_state_dict(names, strict=True)
    torch.testing.assert_close(vit.encode(draw("x", 2, 3, 32, 32)), norm(x, "ln_post"), atol=1e-4, rtol=1e-4)
    vit.blocks[0].mlp.act = F.gelu                       # and QuickGELU is not GELU
    assert (vit.encode(draw("x", 2, 3, 32, 32)) - norm(x, "ln_post")).abs().max() > 1e-3


def test_each_network_has_its_own_normalisation():
    pixels = torch.rand(2, 3, 32, 32)
    seen, teacher = [], frozen()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (maskdistill.CLIP_MEAN, maskdistill.CLIP_STD))
    teacher = Teacher(teacher.vit, maskdistill.CLIP_MEAN, maskdistill.CLIP_STD)
    teacher.vit.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher(data.to_device((255 * pixels), torch.device("cpu")), torch.zeros(2, 1, dtype=torch.long))
    torch.testing.assert_close(seen[0], mae.patchify((pixels - mean) / std, 4), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------- teachers
def test_teachers_grid_is_made_to_fit(tmp_path):
    """CLIP of patch 8 on 4 x 4 patches, asked for 6 x 6: bicubic positions and pictures of 48 pixels."""
    torch.save(clip_state(), tmp_path / "clip.pt")
    fits, other = (maskdistill.load_teacher(tmp_path / "clip.pt", grid) for grid in ((4, 4), (6, 6)))
    assert fits.vit.pos_embed.shape == (1, 17, 128) and other.vit.pos_embed.shape == (1, 37, 128)
    assert other(torch.randn(2, 3, 24, 24), torch.arange(36).expand(2, -1)).shape == (2, 36, 128)
    big = torch.randn(2, 3, 48, 48)
    small = F.interpolate(big, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(fits(big, torch.arange(16).expand(2, -1)), fits(small, torch.arange(16).expand(2, -1)))


def test_checkpoints_of_this_repository_and_dino_are_teachers(photos):   # noqa: F811
    images, where = draw("i", 2, 3, 16, 16), torch.tensor([[3, 0], [15, 7]])
    plain = mae.VisionTransformer(16, 4, 192, 2, 3)      # DINO's and timm's: heads as wide as is usual
    plain.init_weights()
    torch.save(plain.state_dict(), "dino.pth")
    mae.train(mae.Config(data="photos", image_size=16, epochs=1, warmup_epochs=0.5, batch_size=20, output="mae"))
    maskdistill.train(tiny(output="ours"))
    pairs = flip.Config(data="photos", image_size=16, epochs=1, warmup_epochs=0.5, batch_size=20, output="flip")
    flip.train(pairs)
    encoders = {"dino.pth": plain, "mae/checkpoint.pt": mae.build(mae.Config(image_size=16)),
                "ours/checkpoint.pt": maskdistill.build(tiny(), 16), "flip/checkpoint.pt": flip.build(pairs)}
    for path, encoder in encoders.items():
        if "checkpoint" in path:
            encoder.load_state_dict(torch.load(path, weights_only=True)["model"])
        teacher = maskdistill.load_teacher(Path(path), (4, 4))
        torch.testing.assert_close(teacher(images, where), mae.gather_tokens(encoder.encode(images)[:, 1:], where))
    with pytest.raises(common.UserError, match="does not tell how many heads"):
        maskdistill.load_teacher(Path("mae/encoder.pt"), (4, 4))


@pytest.mark.parametrize("content, words", [
    (None, "no file x.pt; --teacher is one of pixels, hog"), (b"text", "no file of weights"),
    ({"a": torch.zeros(1)}, "neither CLIP's vision tower nor a ViT"), ({"model": [1]}, "holds no weights"),
    ("short", "does not fit"), ("script", "x.pt is TorchScript, a program; of these only OpenAI's released")])
def test_a_bad_teacher_is_one_line(in_tmp, capfd, content, words):
    if content == "short":
        content = {n: v for n, v in mae.VisionTransformer(32, 8, 192, 2, 3).state_dict().items() if n != "norm.bias"}
    if content == "script":
        archive(clip_state(), "x.pt")
    elif isinstance(content, bytes):
        Path("x.pt").write_bytes(content)
    elif content:
        torch.save(content, "x.pt")
    with pytest.raises(SystemExit) as stop:
        maskdistill.main(["--teacher=x.pt"])
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error


def test_download(in_tmp, monkeypatch, capfd):
    """By name: from the address, checked against the hash; without network, what to fetch and where to put it."""
    monkeypatch.setattr(torch.hub, "_hub_dir", "hub")
    torch.save(clip_state(), "source.pt")
    digest = hashlib.sha256(Path("source.pt").read_bytes()).hexdigest()
    monkeypatch.setitem(maskdistill.RELEASED, "clip", (Path("source.pt").absolute().as_uri(), digest))
    path = maskdistill.download("clip")
    assert path == Path("hub/checkpoints/clip-source.pt") and path.read_bytes() == Path("source.pt").read_bytes()
    Path("source.pt").unlink()
    assert maskdistill.download("clip") == path          # it is there now
    capfd.readouterr()
    for address, sha in (("file:///nowhere/x.pt", None), (Path("hub/checkpoints/clip-source.pt").absolute().as_uri(), "0" * 64)):
        monkeypatch.setitem(maskdistill.RELEASED, "clip", (address, sha))
        with pytest.raises(SystemExit) as stop:
            maskdistill.main(["--teacher=clip"])
        error = capfd.readouterr().err.splitlines()[-1]  # before it torch's progress bar
        assert stop.value.code == 2 and error.startswith("error: clip cannot be downloaded") and address in error
        assert str(Path("hub/checkpoints", f"clip-{address.split('/')[-1]}")) in error


# ---------------------------------------------------------------------------------------------- masking
def neighbours(hidden, grid):
    """Mean number of pairs of hidden patches side by side."""
    mask = torch.zeros(len(hidden), grid[0] * grid[1]).scatter_(1, hidden, 1.0).view(-1, *grid)
    return ((mask[:, 1:] * mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] * mask[:, :, :-1]).sum((1, 2))).mean().item()


@pytest.mark.parametrize("side, count, least, block, single", [(14, 78, 16, 131, 57), (16, 102, 16, 174, 76), (8, 25, 4, 35, 17), (4, 6, 2, 5.7, 3)])
def test_masks(side, count, least, block, single):
    """Neighbours by block: measured with BEiT's own loop, by single patches: by counting."""
    assert round(2 * side * (side - 1) * count * (count - 1) / side ** 2 / (side ** 2 - 1)) == single
    assert int(0.4 * side ** 2) == count
    noise = draw("masks", 2000, 4 * (6 + side) + side ** 2, uniform=True)
    for masking, pairs in ((block_masking, block), (random_masking, single)):
        kept, hidden = masking(noise, (side, side), count, least)
        assert hidden.shape == (2000, count) and torch.equal(torch.cat([kept, hidden], 1).sort().values, torch.arange(side ** 2).expand(2000, -1))
        assert neighbours(hidden, (side, side)) == pytest.approx(pairs, rel=0.03)
        assert torch.equal(masking(noise[7:8], (side, side), count, least)[1], hidden[7:8])      # of its own noise only
    assert torch.equal(torch.cat([kept, hidden], 1), noise[:, -side ** 2:].argsort(dim=1))       # single ones: the least noise is kept


def test_block_masking_equals_a_loop_over_pictures():
    """BEiT's algorithm, one picture at a time, with the same random numbers."""
    grid, count, least = (6, 9), 22, 4
    noise = draw("loop", 200, 4 * 30 + 54, uniform=True).double()
    _, hidden = block_masking(noise, grid, count, least)
    for row, found in zip(noise.tolist(), hidden):
        mask, failures = np.zeros(grid, bool), 0
        for t in range(30):
            u, missing = row[4 * t:4 * t + 4], count - mask.sum()
            if not missing or failures == 10:
                break
            area, aspect = max(least + u[0] * (missing - least), 0), math.exp((2 * u[1] - 1) * math.log(0.3))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            failures += 1
            if h < grid[0] and w < grid[1]:
                top, left = int(u[2] * (grid[0] - h + 1)), int(u[3] * (grid[1] - w + 1))
                new = mask.copy()
                new[top:top + h, left:left + w] = True
                if 1 <= new.sum() - mask.sum() <= missing:
                    mask, failures = new, 0
        flat = mask.flatten()
        rest = [i for i in np.argsort(row[-54:]) if not flat[i]][:count - flat.sum()]
        assert set(found.tolist()) == set(np.flatnonzero(flat)) | set(rest)


# ------------------------------------------------------------------------------------- target and loss
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_hidden_pixels_do_not_reach_the_student(mode):
    model, teacher = student(student=mode), frozen()
    with torch.no_grad():                                # weights that let much through
        for network in (model, teacher.vit):
            for name, p in network.named_parameters():
                if p.ndim > 1 and name != "pos_embed":
                    p.copy_(0.15 * draw(name, *p.shape))
    images, noise = given(model)
    _, prediction, target, where = model(images, teacher, noise)
    kept, hidden = model.masks(noise)
    assert torch.equal(where, hidden if mode == "dense" else kept)
    patches = mae.patchify(images, 4)
    change = lambda index: mae.unpatchify(patches.scatter_add(1, index.unsqueeze(-1).expand(-1, -1, 48), draw("d", 3, index.shape[1], 48)), 4, (8, 8))
    _, same_prediction, other_target, _ = model(change(hidden), teacher, noise)
    assert torch.equal(prediction, same_prediction) and (target - other_target).abs().max() > 0.1
    _, other_prediction, _, _ = model(change(kept[:, :1]), teacher, noise)
    assert (prediction - other_prediction).abs().amax(dim=(1, 2)).min() > 1e-4           # of every picture


def test_targets():
    model, teacher = student(), frozen()
    images, noise = given(model)
    target = model(images, teacher, noise)[2]
    assert target.mean(dim=-1).abs().max() < 1e-5 and (target.var(dim=-1, unbiased=False) - 1).abs().max() < 1e-3
    assert not target.requires_grad and torch.equal(target, model(images, teacher, noise)[2])
    for move in (lambda where: 3.0, lambda where: 3.0 + where.unsqueeze(2)):         # all alike, each token in its own way
        scaled = lambda images, where: move(where) * teacher(images, where) - 7 * move(where)
        torch.testing.assert_close(model(images, scaled, noise)[2], target, atol=1e-3, rtol=1e-3)
    model.normalize = "l2"
    torch.testing.assert_close(model(images, teacher, noise)[2].norm(dim=-1), torch.full((3, 25), 24 ** 0.5))
    model.normalize = "none"
    _, _, target, where = model(images, teacher, noise)
    assert torch.equal(target, teacher(images, where))


def test_zero_prediction():
    """A prediction of zero scores 1 by l2; for normal targets smooth-L1 has the expected value."""
    target = F.layer_norm(torch.randn(400, 768), (768,))
    assert maskdistill.LOSSES["l2"](torch.zeros_like(target), target, 1).item() == pytest.approx(1, abs=1e-4)
    target = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    for beta, expected in ((1.0, 0.4245), (2.0, 0.2471), (0.5, 0.5805)):
        loss = maskdistill.LOSSES["smooth_l1"](torch.zeros_like(target), target, beta)
        assert loss.item() == pytest.approx(expected, abs=1e-3)


def test_losses_by_hand():
    model, teacher = student(beta=0.7), frozen()
    loss, prediction, target, _ = model(*given(model)[:1], teacher, given(model)[1])
    by_hand = sum(d * d / 1.4 if d < 0.7 else d - 0.35 for d in (prediction - target).abs().flatten().tolist())
    assert loss.item() == pytest.approx(by_hand / target.numel(), rel=1e-6)
    apply = lambda name, beta=1.0: maskdistill.LOSSES[name](prediction, target, beta).item()
    assert apply("smooth_l1", 1e3) == pytest.approx(apply("l2") / 2e3, rel=1e-4)
    assert apply("l1") == pytest.approx((prediction - target).abs().mean().item(), rel=1e-6)
    cosine = (prediction * target).sum(-1) / prediction.norm(dim=-1) / target.norm(dim=-1)
    assert apply("cosine") == pytest.approx(1 - cosine.mean().item(), rel=1e-5)


def test_gradient_at_visible_patches_is_zero():
    model, teacher = student(), frozen()
    images, noise = given(model)
    tokens = []
    model.blocks[-1].register_forward_hook(lambda _, __, output: (output.retain_grad(), tokens.append(output)) and None)
    loss, hidden = model(images, teacher, noise)[0], model.masks(noise)[1]
    loss.backward()
    length = tokens[0].grad.abs().sum(dim=-1)            # (B, 1 + N)
    assert (length > 0).sum() == hidden.numel() and (length.gather(1, hidden + 1) > 0).all()


def test_pixels_with_ln_and_l2_are_maes_target():
    model = student(target_dim=48, loss="l2")
    images, noise = given(model)
    teacher, width = maskdistill.open_teacher(maskdistill.Config(teacher="pixels", patch_size=4), None, None)
    _, _, target, hidden = model(images, teacher, noise)
    mae_target = mae.pixel_target(mae.gather_tokens(mae.patchify(images, 4), hidden), norm_pix=True)
    assert width == 48
    torch.testing.assert_close(target, mae_target * (48 / 47) ** 0.5, atol=1e-4, rtol=1e-4)  # biased variance


def test_without_masks_all_patches_are_scored():
    model = student(mask_ratio=0.0)
    _, prediction, _, where = model(given(model)[0], frozen(), given(model)[1])
    assert prediction.shape == (3, 64, 24) and torch.equal(where.sort().values, torch.arange(64).expand(3, -1))


def test_hog_by_hand():
    """A ramp that rises to the right votes for the first bin, one that rises downwards for the middle one."""
    right = torch.arange(32.0).expand(1, 3, 32, 32)
    for images, which in ((right, 0), (right.transpose(2, 3), 4)):
        features = maskdistill.hog(images, 8).view(16, 2, 2, 3, 9)             # cells and colours
        one = F.one_hot(torch.tensor(which), 9).float()
        torch.testing.assert_close(features, one.expand(16, 2, 2, 3, 9))
    images = draw("hog", 2, 3, 32, 32)
    features, found = maskdistill.hog(images, 8), np.zeros((2, 3, 9, 8, 8))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    for b, c, y, x in np.ndindex(2, 3, 32, 32):
        dx = float(padded[b, c, y + 1, x + 2] - padded[b, c, y + 1, x])
        dy = float(padded[b, c, y + 2, x + 1] - padded[b, c, y, x + 1])
        found[b, c, min(int(math.atan2(dy, dx) / math.pi % 1 * 9), 8), y // 4, x // 4] += math.hypot(dx, dy)
    found /= np.linalg.norm(found, axis=2, keepdims=True)
    cells = torch.from_numpy(found).float()[:, :, :, 2:4, 4:6]                  # patch of row 1, column 2
    torch.testing.assert_close(features[:, 6], cells.permute(0, 3, 4, 1, 2).flatten(1), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------ the student
@pytest.mark.parametrize("side, rows", [(14, 732), (16, 964), (8, 228), (4, 52)])
def test_relative_positions(side, rows):
    index = maskdistill.relative_index((side, side))
    N = side ** 2
    assert maskdistill.relative_rows((side, side)) == rows and index.shape == (1 + N, 1 + N) and index.max() == rows - 1
    assert torch.equal(index.unique(), torch.arange(rows))
    assert index[0, 1:].unique().tolist() == [rows - 3] and index[1:, 0].unique().tolist() == [rows - 2] and index[0, 0] == rows - 1
    y, x = np.divmod(np.arange(N), side)
    offsets = {}
    for i, j in np.ndindex(N, N) if side < 9 else ():    # equal offsets share a row, others do not
        assert offsets.setdefault((y[i] - y[j], x[i] - x[j]), index[1 + i, 1 + j].item()) == index[1 + i, 1 + j]
    assert side > 8 or len(set(offsets.values())) == len(offsets)
    assert index[1, 2] == (side - 1) * 2 * side - 1      # offset of the query from the key, as in BEiT's tables: row 0, column -1
    assert index[1 + side, 1] == side * (2 * side - 1) + side - 1              # and row 1, column 0


def test_zero_table_is_no_bias_and_patches_may_be_permuted():
    model = student()
    nn.init.zeros_(model.rel_pos_bias.relative_position_bias_table)
    x, order = draw("p", 2, 64, 32), torch.randperm(64)
    out = model.layers(x)[-1]
    torch.testing.assert_close(model.layers(x[:, order])[-1][:, 1:], out[:, 1:][:, order])
    model.rel_pos_bias.forward = lambda: None
    torch.testing.assert_close(model.layers(x)[-1], out)
    assert not any("pos_embed" in name or "qkv.bias" in name for name in model.state_dict())


def test_a_sparse_student_knows_where_its_patches_are():
    """Its patches in another order are its tokens in another order; at other places they are other tokens."""
    model = student(student="sparse")
    nn.init.normal_(model.blocks[0].attn.qkv.weight)
    x, where, order = draw("s", 2, 20, 32), torch.arange(11, 31).expand(2, -1), torch.randperm(20)
    out = model.layers(x, where)[-1]
    torch.testing.assert_close(model.layers(x[:, order], where[:, order])[-1][:, 1:], out[:, 1:][:, order])
    assert (model.layers(x, where + 1)[-1] - out).abs().max() > 1e-3
    whole = draw("w", 2, 64, 32)
    torch.testing.assert_close(model.layers(whole, torch.arange(64).expand(2, -1))[-1], model.layers(whole)[-1])


def test_attention_with_bias_by_hand():
    torch.manual_seed(0)
    attention = maskdistill.Attention(8, 2, key_bias=False)
    x, bias = torch.randn(3, 5, 8), torch.randn(1, 2, 5, 5)
    nn.init.normal_(attention.q_bias), nn.init.normal_(attention.v_bias)
    q, k, v = (x @ w.T for w in attention.qkv.weight.chunk(3))
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / 2 + bias[0, h]
        heads.append(logits.softmax(dim=-1) @ v[..., part])
    torch.testing.assert_close(attention(x, bias), attention.proj(torch.cat(heads, dim=-1)))


def test_initial_weights():
    torch.manual_seed(0)
    model = MaskDistill(32, 4, 256, 3, 4, 256, layer_scale=0.1)
    state = model.state_dict()
    for name in ("patch_embed.proj.weight", "blocks.2.attn.qkv.weight", "distill_head.weight", "mask_token", "cls_token"):
        assert 0.019 < state[name].abs().max() <= 0.02, name
    for layer in (1, 2, 3):
        for name in ("attn.proj", "mlp.fc2"):
            assert state[f"blocks.{layer - 1}.{name}.weight"].abs().max().item() == pytest.approx(0.02 / (2 * layer) ** 0.5, rel=1e-2)
        assert (state[f"blocks.{layer - 1}.gamma_2"] == 0.1).all()
    assert all((v == 0).all() for n, v in state.items() if n.endswith("bias") or n.endswith("table"))


def test_parameter_counts_of_the_paper():
    with torch.device("meta"):
        for name, target, count in (("base", 768, 86_256_720), ("large", 1024, 304_186_816), ("huge", 1024, 631_805_248)):
            patch = 14 if name == "huge" else 16
            model = MaskDistill(224, patch, *maskdistill.SIZES[name], target)
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_presets_are_the_recipe():
    cfg = common.parse_config(maskdistill.Config, maskdistill.PRESETS, ["--data=imagenet"])
    steps, peak = 1, cfg.base_lr * cfg.batch_size / 256
    assert (cfg.teacher, cfg.normalize, cfg.loss, cfg.beta, cfg.masking, cfg.min_block) == ("clip", "ln", "smooth_l1", 1.0, "block", 16)
    assert (peak, cfg.min_lr, cfg.weight_decay, cfg.clip_grad, cfg.epochs, cfg.warmup_epochs) == (1.5e-3, 1e-5, 0.05, 3.0, 300, 10)
    assert (cfg.layer_scale, cfg.drop_path, cfg.crop_scale, cfg.color_jitter, int(0.4 * 196)) == (0.1, 0, 0.2, 0.4, 78)
    large = common.parse_config(maskdistill.Config, maskdistill.PRESETS, ["--data=imagenet", "--preset=imagenet-large"])
    assert (large.data, large.embed_dim, large.depth, large.layer_scale) == ("imagenet", 1024, 24, 1e-5)
    rates = [common.learning_rate(step, 10, 300, peak, cfg.min_lr) for step in (0, 10, 300)]
    assert rates == pytest.approx([0, 1.5e-3, 1e-5])


def test_drop_path():
    """Branches of a picture are dropped by its noise, what stays is scaled up; encode drops nothing."""
    model = student(drop_path=0.5)
    x, noise = draw("x", 2, 64, 32), torch.ones(2, 2, 2)
    assert model.drop_rates == [0.0, 0.5]
    noise[0, 1] = 0.2                                    # the second block of the first picture, both branches
    first, second = model.layers(x, None, noise, top=2)
    assert torch.equal(second[0], first[0])
    assert torch.equal(model.layers(x, top=2)[0], first) and len(model.layers(x)) == 1
    images, noise = given(model)                         # noise for the masks alone drops nothing
    assert not torch.equal(model(images, frozen(), noise)[1], model(images, frozen(), noise[:, :model.mask_noise])[1])
    model.drop_rates = [0.0, 0.0]
    quiet = model(images, frozen(), noise)[1]
    model.drop_rates = [0.0, 0.5]
    assert torch.equal(quiet, model(images, frozen(), noise[:, :model.mask_noise])[1])
    other = noise.clone()                                # drops have numbers of their own, behind those of the masks
    other[:, -2:] = 1 - other[:, -2:].round()
    _, prediction, target, where = model(images, frozen(), other)
    assert torch.equal(where, model(images, frozen(), noise)[3]) and not torch.equal(prediction, model(images, frozen(), noise)[1])
    block, bias = model.blocks[1], model.rel_pos_bias()
    y = first + 2 * block.gamma_1 * block.attn(block.norm1(first), bias)
    y = y + 2 * block.gamma_2 * block.mlp(block.norm2(y))
    torch.testing.assert_close(second[1], y[1])


def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher():
    for mode in ("dense", "sparse"):
        model, teacher = student(student=mode, drop_path=0.1), frozen()
        before = {n: p.clone() for n, p in teacher.named_parameters()}
        optimizer = torch.optim.AdamW(common.parameter_groups(model, 0.05, ("cls_token",)), lr=0.01)
        teacher.requires_grad_()                         # even then nothing reaches it
        model(given(model)[0], teacher, given(model)[1])[0].backward()
        untouched = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
        assert not untouched and all(p.grad is None for p in teacher.parameters())
        optimizer.step()
        assert all(torch.equal(p, before[n]) for n, p in teacher.named_parameters())
        decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
        kinds = {n: id(p) in decayed for n, p in model.named_parameters() if p.requires_grad}
        assert not kinds["cls_token"] and not kinds["norm.weight"] and not kinds["blocks.0.gamma_1"]
        assert mode == "sparse" or kinds["mask_token"] and kinds["rel_pos_bias.relative_position_bias_table"]


def test_overfits_one_batch():
    model, teacher = student(), frozen()
    images, noise = given(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(150):
        loss = model(images, teacher, noise)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_momentum_teacher_is_the_average_of_the_student(monkeypatch):
    monkeypatch.setitem(maskdistill.SIZES, "micro", (16, 4, 2))
    cfg = tiny(teacher="momentum")
    model = maskdistill.build(cfg, 16)
    start = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("momentum")}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    maskdistill.follow(model, 0.9)
    for name, p in model.momentum.vit.named_parameters():
        torch.testing.assert_close(p, start[name] + 0.1 if start[name].requires_grad else start[name])
    images, where = draw("i", 2, 3, 16, 16), torch.arange(16).expand(2, -1)
    outputs = model.momentum.vit.layers(model.momentum.vit.patch_embed(mae.patchify(images, 4)), top=2)
    torch.testing.assert_close(model.momentum(images, where), (outputs[0] + outputs[1])[:, 1:] / 2)


def test_compiled_equals_eager():
    model, teacher = student(drop_path=0.1, image_size=16, patch_size=8), Teacher(VisionTransformer(16, 8, 24, 1, 3))
    images, noise = given(model)
    images = images[:, :, :16, :16]
    eager = model(images, teacher, noise)
    model.compile()
    compiled = model(images, teacher, noise)
    for a, b in zip(eager, compiled):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_tables_of_other_grids_are_resized():
    y, x = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    table = torch.cat([(y / 3 + 10 * x / 3).flatten(), torch.tensor([50.0, 60, 70])]).unsqueeze(1)   # of a 4 x 4 grid
    assert common.resize_relative_positions(table, (4, 4)) is table
    other = common.resize_relative_positions(table, (6, 6))
    assert other.shape == (maskdistill.relative_rows((6, 6)), 1) and other[-3:, 0].tolist() == [50, 60, 70]
    middle = other[:-3].view(11, 11)
    assert middle[5, 5].abs() < 1e-4 and middle[5, 6] > 0 and torch.allclose(middle, -middle.flip(0, 1), atol=1e-4)
    assert (middle.diff(dim=1) > 0).all() and middle[0, 0].item() == pytest.approx(-11, abs=1e-3)


# ------------------------------------------------------------------------------------------- whole runs
TINY = dict(data="photos", image_size=16, patch_size=4, epochs=2, batch_size=10, teacher="random")
MICRO = maskdistill.SIZES["micro"]                       # 40 photos: 4 steps an epoch, 8 in all


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """--model micro of this process is smaller, and every step is logged."""
    monkeypatch.setitem(maskdistill.SIZES, "micro", (16, 2, 2))
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def tiny(**changes):
    return maskdistill.Config(**TINY | changes)



RECIPE = dict(seed=3, max_steps=5, mask_ratio=0.4, min_block=3, beta=0.7, layer_scale=0.5, crop_scale=0.5, color_jitter=0.4,
              warmup_epochs=0.5, base_lr=0.05, min_lr=3e-4, weight_decay=0.3, teacher_epochs=2, teacher_lr=0.1)


def optimize(model, loss_of, rate, clip, steps, after=lambda: None):
    """BEiT v2's recipe written out, ten of the 40 photos in a step: AdamW, its second beta 0.98; neither vectors nor the
    class token are decayed; the gradient is cut to the length `clip`, in some of the steps.

    loss_of: (images (10, 3, 16, 16), normalised, labels (10,), step) -> loss; rate: step -> learning rate."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = {name for name, p in trained.items() if p.ndim == 1} | {"cls_token"}
    groups = [[p for name, p in trained.items() if (name in undecayed) == vectors] for vectors in (False, True)]
    optimizer = torch.optim.AdamW([dict(params=groups[0], weight_decay=0.3), dict(params=groups[1], weight_decay=0.0)],
                                  betas=(0.9, 0.98), eps=1e-8)
    dataset = data.open_data("photos", "", 3).train.with_transform(data.augment(16, 0.5, 0.4))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    lengths = []
    for step in range(steps):
        epoch, position = divmod(step, 4)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3 + epoch)).tolist()
        images, labels, _ = zip(*(dataset[epoch, i] for i in order[10 * position:10 * position + 10]))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss_of((torch.stack(images) / 255 - mean) / std, torch.tensor(labels), step).backward()
        lengths.append(sum(p.grad.square().sum() for p in trained.values()).sqrt().item())
        for p in trained.values():
            p.grad *= min(1, clip / lengths[-1])
        optimizer.step()
        optimizer.zero_grad()
        after()
    assert min(lengths) < 0.95 * clip and max(lengths) > 1.05 * clip, lengths
    return optimizer


def averages(optimizer):
    """As `moments` reads them from a checkpoint."""
    return {str(i): state["exp_avg"] for i, state in optimizer.state_dict()["state"].items()}


def peak_and_cosine(peak, warmup, total, least=0.0):
    """step -> learning rate: a line from 0 to the peak, then half a cosine to the least."""
    return lambda step: (peak * step / warmup if step < warmup else
                         least + (peak - least) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2)


def features_by_hand(kind, size, clip):
    """What a teacher is, of a `size` and, if it is "self", trained with a `clip`: normalised images (B, 3, 16, 16) ->
    features (B, 16, E), and E. "self" ends as the teacher of the run called run."""
    if kind == "pixels":
        return lambda images: mae.patchify(images, 4), 48
    if kind == "clip.pt":                                # its projected tokens, of pixels normalised as it was trained
        state = maskdistill.clip_to_timm(clip_state())
        proj = state.pop("proj")
        vit = VisionTransformer(32, 8, 128, 2, 2, pre_norm=True, act=maskdistill.quick_gelu, eps=1e-5)
        vit.load_state_dict(state)
        ours, clips = (torch.tensor(values).view(2, 3, 1, 1) for values in (
            [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]],
            [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]))

        def encode(images, mean=clips[0], std=clips[1]):
            pixels = F.interpolate(images * ours[1] + ours[0], (32, 32), mode="bicubic", antialias=True)
            return vit.encode((pixels - mean) / std)[:, 1:] @ proj
        return encode, 32
    if kind == "random":
        torch.manual_seed(3 + 1)
        vit = VisionTransformer(16, 4, *size)
        vit.init_weights()
    else:                                                # learns the labels; a tenth of its two epochs is warm-up
        torch.manual_seed(3)
        vit = maskdistill.Classifier(16, 4, *size, classes=2)

        def loss_of(images, labels, _):
            logits = vit.head(vit.encode(images)[:, 1:].mean(dim=1))
            return -logits.log_softmax(dim=1).gather(1, labels.unsqueeze(1)).mean()
        optimizer = optimize(vit, loss_of, peak_and_cosine(0.1 * 10 / 256, 0.8, 8), clip, 8)
        close(vit.state_dict(), weights("run-teacher"))
        close(averages(optimizer), moments("run-teacher"))
    return lambda images: vit.encode(images)[:, 1:], size[0]


@pytest.mark.parametrize("kind, clip, changes", [
    ("random", 1.2, {}), ("self", 2.5, dict(masking="random", loss="l2")),
    ("clip.pt", 0.5, dict(teacher_feature="proj", normalize="l2")),
    ("momentum", 0.3, dict(momentum=0.9, drop_path=0.3)), ("pixels", 0.15, dict(student="sparse", normalize="none"))])
def test_recipe(photos, monkeypatch, kind, clip, changes):               # noqa: F811
    """Five steps of a loop written out end with the same weights, averages of gradients, teacher."""
    size = (16, 3, 2)
    monkeypatch.setitem(maskdistill.SIZES, "micro", size)
    if kind == "clip.pt":
        torch.save(clip_state(), "clip.pt")
    cfg = tiny(**RECIPE | changes, output="run", teacher=kind, clip_grad=clip)
    maskdistill.train(cfg)
    if kind != "momentum":
        features, width = features_by_hand(kind, size, clip)
    else:
        average, width = VisionTransformer(16, 4, *size, relative=True, layer_scale=0.5), 16

        def features(images):                            # the mean of the upper half of the blocks, without a norm
            outputs = average.layers(average.patch_embed(mae.patchify(images, 4)), top=3)
            return (outputs[1] + outputs[2])[:, 1:] / 2
    torch.manual_seed(3)
    model = MaskDistill(16, 4, *size, width, mask_ratio=0.4, masking=cfg.masking, min_block=3, student=cfg.student,
                        layer_scale=0.5, drop_path=cfg.drop_path)
    if kind == "momentum":
        average.load_state_dict(model.state_dict(), strict=False)

    def loss_of(images, _, step):
        seed = int(np.random.SeedSequence((3, step)).generate_state(1)[0])
        noise = torch.rand(10, 4 * 10 + 16 + 2 * 3, generator=torch.Generator().manual_seed(seed))
        nothing = lambda images, where: torch.zeros(*where.shape, width)
        _, prediction, _, where = model(images, nothing, noise)
        assert torch.equal(where, model.masks(noise)[cfg.student == "dense"]) and where.shape == (10, 6 if model.dense else 10)
        with torch.no_grad():                            # the target: the scored patches' features in the whole image
            target = torch.stack([of_image[rows] for of_image, rows in zip(features(images), where)])
            if cfg.normalize == "l2":
                target = target / target.norm(dim=2, keepdim=True) * width ** 0.5
            if cfg.normalize == "ln":
                target = target - target.mean(dim=2, keepdim=True)
                target = target / (target.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
        error = (prediction - target).abs()
        if cfg.loss == "l2":
            return error.square().mean()
        return torch.where(error < 0.7, error.square() / 1.4, error - 0.35).mean()

    def after():
        if kind == "momentum":                           # the average follows after each step
            with torch.no_grad():
                for name, p in average.named_parameters():
                    p.copy_(0.9 * p + 0.1 * model.get_parameter(name))

    optimizer = optimize(model, loss_of, peak_and_cosine(0.05 * 10 / 256, 2, 8, 3e-4), clip, 5, after)
    close(model.state_dict(), weights("run"))
    close(averages(optimizer), moments("run"))
    if kind == "momentum":
        close({f"momentum.vit.{name}": p.detach() for name, p in average.named_parameters()}, weights("run"))


@pytest.mark.parametrize("changes", [dict(teacher="momentum", drop_path=0.3), dict(teacher="self", teacher_epochs=1)])
def test_resumed_run_equals_an_undisturbed_one(photos, changes):        # noqa: F811
    maskdistill.train(tiny(output="whole", **changes))
    for steps in (3, 6, 0):
        maskdistill.train(tiny(output="parts", max_steps=steps, **changes))
    assert same(weights("whole"), weights("parts"))
    assert Path("whole/similarity.png").stat().st_size > 1000
    with pytest.raises(common.UserError, match="beta: 1.0 there, 2.0 here"):
        maskdistill.train(tiny(output="parts", beta=2.0, **changes))


def test_own_teacher_is_set_aside_with_the_student(photos):              # noqa: F811
    for resume in (True, False):
        maskdistill.train(tiny(output="run", teacher="self", teacher_epochs=1, resume=resume))
    assert {path.name for path in Path().glob("run*")} == {"run", "run.1", "run-teacher", "run-teacher.1"}
    assert same(weights("run"), weights("run.1")) and same(weights("run-teacher"), weights("run-teacher.1"))


@pytest.mark.parametrize("changes", [dict(teacher="self", teacher_epochs=2),
                                     dict(teacher="momentum", momentum=0.9, drop_path=0.3, student="sparse")])
def test_accumulation_is_one_large_batch(photos, changes):               # noqa: F811
    """Gradients are not cut here: that, as AdamW, forgives those of the wrong scale; their averages do not."""
    for accumulate in (1, 5):
        maskdistill.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=6, clip_grad=1e6, **changes))
    for part in ("", "-teacher") if changes["teacher"] == "self" else ("",):
        close(weights(f"a1{part}"), weights(f"a5{part}"))
        close(moments(f"a1{part}"), moments(f"a5{part}"))


def test_two_processes_equal_one(photos):                # noqa: F811
    """Several images a process and micro-batch, into the second epoch: one torchrun makes both runs, with cut gradients,
    drops and an average of the student, then with accumulation and the teacher's training."""
    one = TINY | dict(batch_size=12, max_steps=5, crop_scale=0.5, base_lr=0.05)         # 3 steps an epoch
    runs = {"plain": one | dict(teacher="momentum", momentum=0.9, drop_path=0.3, student="sparse", clip_grad=0.1),
            "self": one | dict(accumulate=2, teacher="self", teacher_epochs=2, clip_grad=1e6)}
    Path("both.py").write_text(f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
import common, maskdistill
common.LOG_EVERY, save = 1, common.save_atomic
common.save_atomic = lambda *given: time.sleep(0.2) or save(*given)             # slowly: who did not wait would read an old teacher
maskdistill.SIZES["micro"] = (16, 2, 2)
with common.command_line():
    for name, settings in {runs!r}.items():
        maskdistill.train(maskdistill.Config(output=name + "2", **settings))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "both.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    read = lambda run: [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    for name, settings in runs.items():
        maskdistill.train(maskdistill.Config(output=f"{name}1", **settings))
        for part in ("", "-teacher") if name == "self" else ("",):
            first, second = f"{name}1{part}", f"{name}2{part}"
            close(weights(first), weights(second))
            close(moments(first), moments(second))
            assert checkpoint(first)["epoch_losses"] == pytest.approx(checkpoint(second)["epoch_losses"], rel=1e-5)
            for line, other in zip(read(first), read(second), strict=True):
                for key in {"loss", "lr", "epoch_loss", "knn_untrained"} & line.keys():
                    assert line[key] == pytest.approx(other[key], rel=1e-4), key


@pytest.mark.parametrize("argv, words", [
    (["--teacher=nothing.pt"], "no file nothing.pt"), (["--mask-ratio=1"], "leaves nothing to see"),
    (["--min-block=7"], "more than the 6 masked"), (["--teacher=hog", "--teacher-feature=raw"], "no choice of --teacher-feature"),
    (["--beta=0"], "beta is 0.0, it must be from 1e-06"), (["--drop-path=1"], "drop_path is 1.0, it must be from 0 to 0.99"), (["--teacher=hog", "--patch-size=1"], "even patch_size"),
    (["--data=flat", "--teacher=self"], "class folders, or another --teacher"), (["--teacher=flat/0.png"], "no file of weights"),
    (["--masking=blocks"], "invalid choice"), (["--teacher-feature=proj", "--teacher=vit.pth"], "no projection")])
def test_a_users_mistake_is_one_line(photos, capfd, argv, words):        # noqa: F811
    Path("flat").mkdir()
    for i, path in enumerate(sorted(Path("photos").rglob("*.png"))[:12]):
        (Path("flat") / f"{i}.png").write_bytes(path.read_bytes())
    torch.save(mae.VisionTransformer(32, 8, 192, 2, 3).state_dict(), "vit.pth")
    with pytest.raises(SystemExit) as stop:
        maskdistill.main([*argv, "--batch-size=10"])
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error


def test_evaluation_of_a_student(photos):                # noqa: F811
    """Relative positions: a table for each block when fine-tuned, resized for other pictures."""
    maskdistill.train(tiny(output="run", drop_path=0.3, teacher="momentum"))
    given = ["--checkpoint=run/checkpoint.pt", "--data=photos", "--batch-size=10", "--workers=0"]
    encoder, extra, _ = evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt"))
    assert not [n for n in encoder.state_dict() if n.startswith(MaskDistill.pretrain_only)] and "distill_head.bias" in extra
    model = maskdistill.build(tiny(drop_path=0.3, teacher="momentum"), 16)
    model.load_state_dict(weights("run"))
    images = draw("i", 2, 3, 16, 16)
    assert torch.equal(encoder.encode(images), model.encode(images))
    torch.testing.assert_close(evaluate.Classifier(encoder, 2, "cls").encoder.encode(images), model.encode(images))
    evaluate.main(["finetune", *given, "--epochs=2", "--base-lr=0.1", "--output=tuned", "--drop-path=0.1"])
    tuned = torch.load("tuned/finetuned.pt", weights_only=True)["model"]
    tables = [tuned[f"blocks.{i}.rel_pos_bias.relative_position_bias_table"] for i in range(2)]
    assert not torch.equal(*tables) and not any(n.startswith("rel_pos_bias") for n in tuned)
    last = [json.loads(line) for line in open("tuned/metrics.jsonl")][-1]
    again = evaluate.main(["finetune", "--eval", "--checkpoint=tuned/finetuned.pt", "--data=photos", "--workers=0"])
    assert again["top1"] == pytest.approx(last["top1"])
    larger = evaluate.load_encoder(evaluate.Config(checkpoint="tuned/finetuned.pt", image_size=32))[0]
    assert larger.encode(draw("i", 2, 3, 32, 32)).shape == (2, 65, 16)
    alone = evaluate.load_encoder(evaluate.Config(checkpoint="run/encoder.pt", method="maskdistill", model="micro"))[0]
    assert torch.equal(alone.encode(images), model.encode(images))
    groups = evaluate.layer_decay_groups(evaluate.Classifier(encoder, 2, "mean"), 0.05, 0.5)
    assert sorted({g["lr_scale"] for g in groups}) == [0.125, 0.25, 0.5, 1]


def test_student_learns_from_a_teacher_that_knows(in_tmp, monkeypatch):
    """Half of `python maskdistill.py`: the teacher learns the labels, and the student something of them."""
    monkeypatch.setitem(maskdistill.SIZES, "micro", MICRO)
    monkeypatch.setattr(common, "LOG_EVERY", 50)
    metrics = maskdistill.main(["--teacher-epochs=4", "--epochs=4"])
    lines = [json.loads(line) for line in open("runs/maskdistill-shapes/metrics.jsonl")]
    teacher = [json.loads(line) for line in open("runs/maskdistill-shapes-teacher/metrics.jsonl")]
    assert teacher[0]["loss"] > 2 and teacher[-1]["epoch_loss"] < 1 and metrics["knn_teacher"] > 60
    assert metrics["loss"] < 0.9 * lines[0]["loss"]
    assert metrics["linear_trained"] > metrics["linear_untrained"] + 15        # 34.6 and 14.3 %
    assert metrics["knn_trained"] > metrics["knn_untrained"] + 6               # of 400 voters: 24.9 and 17.0 %
