"""amt.py against published figures and its own invariants; maps that follow their images; runs."""

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
from PIL import Image

import amt
import common
import data
import evaluate
import mae
from amt import AMT, AMTSimMIM, Crop, attention_map, attention_order, count_units, crop_maps
from conftest import ROOT, draw, fill, golden
from test_train import checkpoint, close, lines, moments, same, weights
from test_train import photos                            # noqa: F401, a fixture

FIGURES = golden("amt")
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ published figures
@pytest.mark.parametrize("target", ["pixel", "norm_pix"])
def test_golden_figures(target):
    figures = FIGURES[target]
    model = fill(AMT(32, 4, 48, 3, 4, 32, 2, 4, norm_pix=target == "norm_pix"),
                 skip=("pos_embed", "decoder_pos_embed"))
    images = draw("amt/images", 5, 3, 32, 32)
    order = draw("amt/order", 5, 64, uniform=True).argsort(1)
    loss, prediction, masked = model(images, order=order)
    loss.backward()
    assert loss.item() == pytest.approx(figures["loss"], rel=1e-5)
    split = model.split(None, order=order)
    counts = [figures[name] for name in ("masked", "thrown", "visible")]
    assert [5 * part.shape[1] for part in split] == counts
    assert torch.equal(masked, order[:, :28]) and prediction.shape == (5, 28, 48)
    for name, norm in figures["grad_norm"].items():
        assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-5), name
    maps = attention_map(model, images)
    head = torch.tensor(FIGURES["attention_map_row0_head"][:8])
    torch.testing.assert_close(maps[0, :8], head, rtol=1e-5, atol=1e-6)
    assert maps.sum().item() == pytest.approx(FIGURES["attention_map_sum"], rel=1e-5)


# ---------------------------------------------------------------------------------------- drawing
@pytest.mark.parametrize("units, expected", [
    (49, (22, 19, 8)), (64, (28, 26, 10)), (256, (115, 102, 39)), (196, (88, 78, 30)),
    (36, (16, 14, 6)), (144, (64, 58, 22))])
def test_counts_of_mae(units, expected):
    masked, thrown = count_units(units, 0.45, 0.4, "mae")
    assert (masked, thrown, units - masked - thrown) == expected
    assert count_units(10, 0.7, 0.1, "mae") == (7, 1)
    assert count_units(196, 0.75, 0.0, "mae") == (147, 0)
    side = math.isqrt(units)
    model = AMT(4 * side, 4, 16, 1, 2, **DECODER)
    parts = model.split(uniform(3, units), uniform(3, units, seed=1))
    assert [p.shape[1] for p in parts] == list(expected)
    drawn = torch.cat(parts, dim=1).sort(dim=1).values
    assert torch.equal(drawn, torch.arange(units).expand(3, -1))


@pytest.mark.parametrize("units, expected", [(49, (22, 13)), (16, (8, 5))])
def test_counts_of_simmim(units, expected):
    assert count_units(units, 0.44, 0.26, "simmim") == expected


def test_uniform_weights_are_maes_masking():
    noise = uniform(6, 64)
    expected_visible, expected_masked = mae.random_masking(noise, 0.75)
    model = AMT(32, 4, 16, 1, 2, **DECODER)
    for weights in (None, torch.full((6, 64), 0.3)):
        masked, thrown, visible = model.split(noise, weights, (0.75, 0.0))
        assert thrown.shape[1] == 0
        assert torch.equal(masked.sort(1).values, expected_masked.sort(1).values)
        assert torch.equal(visible.sort(1).values, expected_visible.sort(1).values)
    masked, *_ = model.split(uniform(20_000, 64))
    rate = torch.bincount(masked.flatten(), minlength=64) / 20_000
    assert (rate - 28 / 64).abs().max() < 0.018          # five standard deviations


def test_more_weight_is_masked_more_often():
    weights = torch.linspace(0.02, 1, 64).expand(20_000, -1)
    masked, thrown, _ = AMT(32, 4, 16, 1, 2, **DECODER).split(uniform(20_000, 64), weights)
    for part, expected in ((masked, (0.087, 0.472, 0.694)), (thrown, (0.256, 0.479, 0.301))):
        rate = torch.bincount(part.flatten(), minlength=64) / 20_000
        found = rate[:8].mean(), rate[28:36].mean(), rate[-8:].mean()
        assert torch.allclose(torch.stack(found), torch.tensor(expected), atol=0.02)


def test_draws_without_replacement():
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    order = attention_order(uniform(400_000, 4), weights.expand(400_000, -1))

    def rate(column):
        return torch.bincount(order[:, column], minlength=4) / 400_000

    assert (rate(0) - weights).abs().max() < 0.005
    assert (rate(1) - torch.tensor([0.3288, 0.3687, 0.2222, 0.0803])).abs().max() < 0.005


def test_degenerate_maps():
    noise = uniform(3, 64)
    for weights in (torch.zeros(3, 64), torch.ones(3, 64)):
        assert torch.equal(attention_order(noise, weights), attention_order(noise))
    model = AMT(32, 4, 16, 1, 2, **DECODER)
    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight.zero_()         # every token is attended to alike
    maps = attention_map(model, torch.randn(3, 3, 32, 32))
    assert torch.isfinite(maps).all() and maps.max() < 1e-3
    noise[0, 5] = 0.0                                    # torch.rand may give it
    assert torch.equal(attention_order(noise, uniform(3, 64)).sort(1).values[0], torch.arange(64))


# -------------------------------------------------------------------------------------- alignment
def test_map_follows_crop_and_flip():
    """A bright patch of an image that is not square: the greatest weight is where it went."""
    tried = 0
    for trial in range(300):
        torch.manual_seed(trial)
        row, column = torch.randint(14, (2,)).tolist()
        image = torch.zeros(3, 140, 280, dtype=torch.uint8)
        image[:, 10 * row:10 * row + 10, 20 * column:20 * column + 20] = 255
        cropped, box = Crop(112, 0.3)(image)
        bright = F.avg_pool2d(cropped[:1].float().unsqueeze(0), 8).flatten()   # 14 x 14 patches
        if bright.max() < 200:                           # cut away, or only a part of it is left
            continue
        tried += 1
        weights = F.one_hot(torch.tensor(14 * row + column), 196).float()
        found = crop_maps(weights.unsqueeze(0), box.unsqueeze(0), (14, 14))[0]
        r, c = divmod(found.argmax().item(), 14)
        x, y = divmod(bright.argmax().item(), 14)
        assert max(abs(r - x), abs(c - y)) <= 1, (trial, r, c, x, y)
    assert tried > 60


def test_whole_picture_and_two_flips():
    maps = uniform(2, 64)
    box = torch.tensor([[0.0, 0, 1, 1, 0]] * 2)
    torch.testing.assert_close(crop_maps(maps, box, (8, 8)), maps, atol=1e-6, rtol=0)
    flipped = crop_maps(maps, torch.tensor([[0.0, 0, 1, 1, 1]] * 2), (8, 8))
    torch.testing.assert_close(flipped, maps.view(2, 8, 8).flip(2).flatten(1), atol=1e-6, rtol=0)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    for seed in range(6):
        torch.manual_seed(seed)
        cropped, box = Crop(32, 1.0)(image)
        assert torch.equal(cropped, image.flip(2) if box[4] else image)
        assert box[:4].tolist() == [0, 0, 1, 1]
    tall, box = Crop(32, 1.0)(torch.zeros(3, 128, 64, dtype=torch.uint8))
    side = 64 * 32 / 37                                  # shrunk to 37 pixels, of which 32 are left
    expected = [(128 - side) / 256, (64 - side) / 128, side / 128, side / 64]
    torch.testing.assert_close(box[:4], torch.tensor(expected))
    assert tall.shape == (3, 32, 32)


def test_crops_are_those_of_the_other_scripts():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    for seed in range(8):
        scale = (0.2, 1.0)[seed % 2]
        torch.manual_seed(seed)
        expected = data.augment(32, scale)(image)
        torch.manual_seed(seed)
        assert torch.equal(Crop(32, scale)(image)[0], expected)


# --------------------------------------------------------------------------------- thrown patches
@pytest.mark.parametrize("base", ["mae", "simmim"])
def test_thrown_patches_have_no_effect(base):
    torch.manual_seed(0)
    model = AMT(32, 4, 16, 2, 2, **DECODER, norm_pix=True)
    if base == "simmim":
        model = AMTSimMIM(32, 4, 16, 2, 2, mask_unit=8)
    images = torch.randn(3, 3, 32, 32, requires_grad=True)
    noise = uniform(3, 64)
    seen = []

    def note_length(_, args):
        seen.append(args[0].shape[1])

    model.blocks[0].register_forward_pre_hook(note_length)
    masked, thrown, visible = model.split(noise)
    loss, prediction, _ = model(images, noise=noise)
    loss.backward()
    per_patch = mae.patchify(images.grad, 4).abs().sum(dim=2)
    assert (per_patch.gather(1, thrown) == 0).all()
    assert (per_patch.gather(1, visible) > 0).all()
    assert (per_patch.gather(1, masked) > 0).all()
    assert prediction.shape[1] == masked.shape[1] == (32 if base == "simmim" else 28)
    if base == "mae":
        assert seen == [1 + 10]
        model.decoder_blocks[0].register_forward_pre_hook(note_length)
        with torch.no_grad():
            model.decoder_pos_embed[0, 1 + thrown[0]] += 100               # of the first image
        again, *_ = model(images[:1], noise=noise[:1])
        with torch.no_grad():
            model.decoder_pos_embed[0, 1 + thrown[0]] -= 100
        assert seen[1:] == [11, 1 + 10 + 28] and again == model(images[:1], noise=noise[:1])[0]
    else:
        assert seen == [1 + 64 - 20]                     # 16 squares, 5 of them thrown
        index = thrown.unsqueeze(2).expand(-1, -1, 48)
        patches = mae.patchify(images.detach(), 4).scatter(1, index, 9.0)
        other = mae.unpatchify(patches, 4, (8, 8))
        assert model(other, noise=noise)[0] == loss
        target = amt.gather_tokens(mae.patchify(images, 4), masked)
        assert loss.item() == pytest.approx(F.l1_loss(prediction, target).item(), rel=1e-5)
        squares = masked.view(3, 8, 4)                   # each of 2 x 2 patches
        assert (squares[..., 1] == squares[..., 0] + 1).all()
        assert (squares[..., 2] == squares[..., 0] + 8).all()


def test_mask_tokens_of_simmim_stand_where_the_masked_patches_are():
    """Of one patch repeated, with a mask token that is its embedding, the tokens are the whole
    image's."""
    torch.manual_seed(0)
    model = AMTSimMIM(16, 4, 16, 2, 2, mask_unit=4, mask_ratio=0.5, throw_ratio=0.0)
    patches = torch.randn(1, 1, 48).expand(3, 16, 48)
    with torch.no_grad():
        model.mask_token.copy_(model.patch_embed(patches[:1, :1]))
        masked, _, visible = model.split(uniform(3, 16))
        found = model.encode_masked(patches, visible, masked)
        expected = amt.gather_tokens(model.forward_features(patches)[:, 1:], masked)
    torch.testing.assert_close(found, expected)


def test_positions_are_learned_with_simmim_only(small, unscored):
    for base, learned in (("mae", False), ("simmim", True)):
        before = amt.build(tiny(base=base, mask_unit=4)).pos_embed.clone()
        amt.train(tiny(output=base, base=base, mask_unit=4, max_steps=2, weight_decay=0.5))
        after = weights(base)["pos_embed"]
        assert torch.equal(before[:, 1:], after[:, 1:]) != learned


def test_plain_mae_is_a_special_case():
    ours = AMT(32, 4, 16, 2, 2, **DECODER, norm_pix=True)
    plain = mae.MAE(32, 4, 16, 2, 2, **DECODER)
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 32)
    noise = uniform(3, 64)
    loss, _, _ = ours(images, noise=noise, ratios=(0.75, 0.0))
    expected, _, _ = plain(images, noise)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(ours.encode(images), plain.encode(images))


@pytest.mark.parametrize("base", ["mae", "simmim"])
def test_compiled_equals_eager(base):
    """And each pair of ratios is compiled with shapes of its own, once."""
    torch._dynamo.reset()
    if base == "mae":
        model = AMT(16, 4, 16, 1, 2, **DECODER)
    else:
        model = AMTSimMIM(16, 4, 16, 1, 2, mask_unit=4)
    images = torch.randn(3, 3, 16, 16)
    noise = uniform(3, 16)
    graphs = []

    def note_graph(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, dynamic=False, backend=note_graph)
    for weights, ratios in ((None, (0.75, 0.0)), (uniform(3, 16, seed=1), (0.45, 0.3))) * 2:
        given = (images, weights, noise, ratios)
        for a, b in zip(compiled(*given), model(*given)):
            assert torch.equal(a, b)
    assert len(graphs) == 2


def test_map_is_the_attention():
    """By the block's own attention with all queries, head by head."""
    torch.manual_seed(0)
    model = AMT(32, 4, 16, 3, 2, **DECODER)
    images = torch.randn(2, 3, 32, 32)
    found = {}
    model.blocks[-1].attn.qkv.register_forward_hook(lambda _, args, out: found.update(qkv=out))
    model.encode(images)
    q, k, _ = found["qkv"].view(2, 65, 3, 2, 8).permute(2, 0, 3, 1, 4)
    rows = (q @ k.transpose(2, 3) / 8 ** 0.5).softmax(dim=-1)[:, :, 0, 1:]       # (B, heads, N)
    expected = []
    for heads in rows:
        scaled = [(row - row.min()) / (row.max() - row.min()) for row in heads]
        expected.append(torch.stack(scaled).mean(dim=0))
    maps = attention_map(model, images)
    torch.testing.assert_close(maps, torch.stack(expected), atol=1e-5, rtol=0)


def test_what_the_image_shows(monkeypatch):
    """Black, gray or visible as the map has it, and the prediction in its place."""
    rows = {}
    monkeypatch.setattr(data, "save_image_grid", lambda path, found: rows.update(found))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)

    def pick(images, index):
        """Their patches there, with pixels from 0 to 1."""
        return amt.gather_tokens(mae.patchify(images * std + mean, 4), index)

    for base, attention in (("mae", True), ("mae", False), ("simmim", True)):
        torch.manual_seed(0)
        if base == "mae":
            model = AMT(16, 4, 16, 2, 2, **DECODER, norm_pix=True)
        else:
            model = AMTSimMIM(16, 4, 16, 2, 2, mask_unit=4)
        images = torch.randn(3, 3, 16, 16)
        noise = uniform(3, 16)
        ratios = (0.45, 0.3)
        rows.clear()
        amt.save_visualization(model, images, noise, ratios, attention, None)
        original, heat, seen, filled = rows.values()
        maps = attention_map(model, images)
        weights = maps if attention else None
        masked, thrown, visible = model.split(noise, weights, ratios)
        _, prediction, _ = model(images, noise=noise, attention=weights, ratios=ratios)
        assert torch.equal(original, images)
        assert pick(seen, masked).abs().max() < 1e-6
        gray = torch.full((3, thrown.shape[1], 48), 128 / 255)
        torch.testing.assert_close(pick(seen, thrown), gray)
        torch.testing.assert_close(pick(seen, visible), pick(images, visible))
        if base == "mae":                                # pixels normalised within their patch
            truth = amt.gather_tokens(mae.patchify(images, 4), masked)
            std_of_patch = (truth.var(2, keepdim=True) + 1e-6).sqrt()
            prediction = truth.mean(2, True) + prediction * std_of_patch
        shown = amt.gather_tokens(mae.patchify(filled, 4), masked)
        torch.testing.assert_close(shown, prediction)
        torch.testing.assert_close(pick(filled, thrown), pick(seen, thrown))
        yellow = torch.tensor([255.0, 230.0, 60.0]).repeat(16) / 255
        brightest = pick(heat, maps.argmax(1, keepdim=True))[maps.amax(1) > 0.999]
        torch.testing.assert_close(brightest, yellow.expand_as(brightest))


# ------------------------------------------------------------------------------------- refreshing
def test_when_maps_are_made():
    cfg = amt.Config(attention_from=41, refresh_every=40, epochs=400)
    assert [epoch for epoch in range(400) if amt.is_refresh(cfg, epoch)] == list(range(41, 400, 40))
    assert not any(amt.is_refresh(amt.Config(sampling="uniform"), epoch) for epoch in range(9))


def test_phases():
    """Before attention_from masks are random, and as many as the base's; then attention chooses."""
    cfg = amt.Config(attention_from=2, epochs=5)
    phases = [amt.masking_of(cfg, epoch) for epoch in (1, 2)]
    assert phases == [(False, (0.75, 0.0)), (True, (0.45, 0.4))]
    cfg = amt.Config(base="simmim", attention_from=1, epochs=5, sampling="uniform")
    phases = [amt.masking_of(cfg, epoch) for epoch in (0, 1)]
    assert phases == [(False, (0.44, 0.0)), (False, (0.44, 0.26))]


def levels(images):
    """In place of attention maps: the same for all patches of an image, by its brightness."""
    return images.mean(dim=(1, 2, 3)).sigmoid().unsqueeze(1).expand(-1, 16)


def test_refresh():
    images = data.ImageDataset(torch.randint(0, 256, (10, 3, 20, 28), dtype=torch.uint8))
    maps = torch.full((10, 16), 255, dtype=torch.uint8)
    cpu = torch.device("cpu")
    amt.refresh_maps(levels, images, maps, tiny(), cpu)
    squeezed = amt.v2.functional.resize(images.source, [16, 16])
    expected = levels(data.to_device(squeezed, cpu))
    assert (maps < 255).all() and (amt.from_bytes(maps) - expected).abs().max() < 1 / 255


def test_an_unreadable_image_keeps_its_map(photos):
    """And the maps of the images beside it are their own."""
    images = data.open_data("photos", "").pretrain
    maps = torch.full((40, 16), 255, dtype=torch.uint8)
    whole = maps.clone()
    cpu = torch.device("cpu")
    amt.refresh_maps(levels, images, whole, tiny(), cpu)
    Path(os.fsdecode(images.source[3])).write_text("text")
    amt.refresh_maps(levels, data.open_data("photos", "").pretrain, maps, tiny(), cpu)
    assert (maps[3] == 255).all() and (whole < 255).all()
    others = [i for i in range(40) if i != 3]
    assert torch.equal(maps[others], whole[others]) and len(maps[:, 0].unique()) > 4


def test_map_lift():
    maps, objects = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 16)
    objects[:, 3] = 1
    assert amt.map_lift(maps, objects) == pytest.approx(1.0)
    maps[:, 3] = 255
    assert amt.map_lift(maps, objects) > 10


@pytest.mark.parametrize("base, masked", [("mae", 28), ("simmim", 32)])       # of 64 patches
def test_share_of_the_objects_that_is_masked(base, masked):
    """SimMIM masks squares of four patches, and rounds up."""
    model = amt.build(tiny(base=base, image_size=32, mask_unit=8))
    maps = torch.zeros(2000, 64, dtype=torch.uint8)
    objects = torch.zeros(2000, 64)
    objects[:, 3] = 1
    share, at_random = amt.masked_object_share(model, maps, objects)
    assert at_random == masked / 64
    assert share == pytest.approx(at_random, abs=0.04)
    maps[:, 3] = 255
    share, _ = amt.masked_object_share(model, maps, objects)
    assert share > 0.98


# ------------------------------------------------------------------------------------- whole runs
TINY = dict(data="photos", image_size=16, decoder_embed_dim=16, crop_scale=0.5, norm_pix=True,
            epochs=3, batch_size=10,                     # 40 photos: 4 steps an epoch
            attention_from=1, refresh_every=1)


@pytest.fixture
def small(photos, monkeypatch):
    """photos, a smaller model, and a line of metrics for every step."""
    monkeypatch.setitem(amt.SIZES, "micro", (16, 1, 2))
    monkeypatch.setattr(common, "LOG_EVERY", 1)


@pytest.fixture
def unscored(monkeypatch):
    """Runs end without scores and images, for tests of their weights alone."""
    monkeypatch.setattr(data, "score_encoders", lambda *_: {})
    monkeypatch.setattr(amt, "save_visualization", lambda *_: None)


def tiny(**changes):
    return amt.Config(**TINY | changes)


@pytest.mark.parametrize("changes", [{}, dict(base="simmim", mask_unit=4, refresh_every=2)])
def test_resumed_run_equals_an_undisturbed_one(small, changes):
    whole = amt.train(tiny(output="whole", **changes))
    for steps in (2, 6, 8, 0):     # before the first maps, in the middle, at an epoch's end
        parts = amt.train(tiny(output="parts", max_steps=steps, **changes))
    assert same(weights("whole"), weights("parts")) and whole == parts
    maps = [checkpoint(run)["tensors"]["maps"] for run in ("whole", "parts")]
    assert torch.equal(*maps) and maps[0].shape == (40, 16) and maps[0].dtype == torch.uint8
    assert maps[0].float().std() > 10
    refreshed = [line["step"] for line in lines("whole") if "refresh_s" in line]
    assert refreshed == ([4] if changes else [4, 8])
    assert Image.open("whole/reconstruction.png").size[0] > 8 * 90


def test_controls_differ(small, unscored):
    runs = {"amt": {}, "uniform": dict(sampling="uniform"),
            "attention": dict(throw_ratio=0.0, mask_ratio=0.75)}
    trained, first = {}, {}
    for name, changes in runs.items():
        amt.train(tiny(output=name, max_steps=6, **changes))
        trained[name] = weights(name)
        first[name] = [line.get("epoch_loss") for line in lines(name)][:5]
    assert first["amt"] == first["uniform"] == first["attention"]               # until the masking
    assert any(first["amt"]) and not same(trained["amt"], trained["uniform"])   # begins
    assert not same(trained["amt"], trained["attention"])


def test_which_image_is_drawn(small, unscored, monkeypatch):
    """That of the masking of the epoch that has ended, also at the end of a run."""
    drawn = []
    monkeypatch.setattr(amt, "save_visualization", lambda *given: drawn.append(given[3:5]))
    amt.train(tiny(output="run", max_steps=4))           # an epoch
    assert drawn == [((0.75, 0.0), False)]
    drawn.clear()
    amt.train(tiny(output="run", max_steps=6))           # one and a half
    assert drawn == [((0.45, 0.4), True)]
    drawn.clear()
    amt.train(tiny(output="run"))
    assert drawn == [((0.45, 0.4), True)] * 2
    drawn.clear()
    amt.train(tiny(output="uniform", sampling="uniform"))
    assert drawn == [((0.75, 0.0), False)] + [((0.45, 0.4), False)] * 2


def test_init_and_what_is_exported(small, unscored, monkeypatch):
    """A run begins with the weights of another, writes the encoder alone, and compares it with an
    untrained one."""
    met = {}
    monkeypatch.setattr(data, "score_encoders", lambda encoders, *_: met.update(encoders) or {})
    amt.train(tiny(output="first", max_steps=2))
    amt.train(tiny(output="second", max_steps=2, init="first/checkpoint.pt", base_lr=0.0))
    assert same(weights("first"), weights("second"))
    encoder = torch.load("second/encoder.pt", weights_only=True)
    vit = mae.VisionTransformer(16, 4, 16, 1, 2)
    vit.load_state_dict(encoder)                         # strictly
    images = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    untrained = AMT(16, 4, 16, 1, 2, **DECODER)
    for name, expected in (("trained", vit), ("untrained", untrained)):
        assert torch.equal(met[name](images), expected.encode(images)[:, 1:].mean(dim=1))


def test_lift_is_that_of_the_training_images_objects(small, unscored, monkeypatch):
    """Maps that are the objects themselves are lifted as far as can be."""
    shapes = data.synthetic_shapes("train", np.arange(60))
    objects = torch.from_numpy(shapes["mask"]).float().view(60, 8, 4, 8, 4).mean(dim=(2, 4))
    images = data.ImageDataset(torch.from_numpy(shapes["image"]))
    monkeypatch.setattr(data, "open_data", lambda *_: data.Splits(images, None, None, []))
    monkeypatch.setattr(amt, "attention_map", lambda model, given: objects.flatten(1)[:len(given)])
    monkeypatch.setattr(amt, "save_visualization", lambda *_: None)
    amt.train(tiny(data="shapes", output="run", image_size=32, attention_from=0, max_steps=1))
    found = [json.loads(line) for line in open("run/metrics.jsonl")]
    share = F.normalize(objects.flatten(1) + 0.5 / 256, p=1, dim=1)
    on = (share * objects.flatten(1)).sum(dim=1) / objects.flatten(1).sum(dim=1)
    assert found[0]["map_lift"] == pytest.approx(64 * on.mean().item(), rel=0.01)


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@pytest.mark.parametrize("base, size, side, ratios, first_ratio, beta2, undecayed", [
    ("mae", 16, 4, (0.45, 0.4), 0.75, 0.95, ()),
    ("simmim", 32, 8, (0.44, 0.26), 0.44, 0.999, ("pos_embed", "cls_token"))])
def test_recipe(small, unscored, base, size, side, ratios, first_ratio, beta2, undecayed):
    """Five steps of a loop written out from MAE's and SimMIM's settings and AMT's release: two at
    random, two by the first maps, one by the second ones. Maps and weights are the run's."""
    amt.train(tiny(output="run", base=base, image_size=size, mask_unit=8, batch_size=20, epochs=4,
                   warmup_epochs=1.5, base_lr=0.05, weight_decay=2.0, max_steps=5))
    torch.manual_seed(0)
    if base == "mae":
        model = AMT(size, 4, 16, 1, 2, 16, 1, 2, *ratios, norm_pix=True)
    else:
        model = AMTSimMIM(size, 4, 16, 1, 2, *ratios, mask_unit=8)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decays = [p.ndim > 1 and n not in undecayed for n, p in trained]
    groups = [{"params": [p for (_, p), decayed in zip(trained, decays) if decayed == wanted],
               "weight_decay": 2.0 * wanted} for wanted in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, beta2), eps=1e-8)
    photos = data.open_data("photos", "").pretrain
    crops = photos.with_transform(data.augment(size, 0.5))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    whole = [amt.v2.functional.resize(photos.read(i), [size, size]) for i in range(40)]
    whole = (torch.stack(whole) / 255 - mean) / std
    n = size // 4                                        # patches and, below, units in a row
    for step in range(5):
        epoch, position = divmod(step, 2)
        if epoch > 0 and position == 0:
            with torch.no_grad():
                new = attention_map(model, whole)
            maps = (255 * new).round()                                         # (40, N)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()
        batch = order[20 * position:20 * position + 20]
        images = torch.stack([crops[epoch, i][0] for i in batch])
        noise = torch.rand(20, n * n, generator=torch.Generator().manual_seed(seed_of(0, step)))
        weights_of_units = torch.ones(20, (size // side) ** 2)
        if epoch > 0:
            affine = []                                  # where a crop's corners lie in its image
            for i in batch:
                torch.manual_seed(seed_of(0, epoch, i))
                image = photos.read(i)
                box = amt.v2.RandomResizedCrop(size, (0.5, 1.0)).make_params([image])
                height, width = box["height"] / image.shape[1], box["width"] / image.shape[2]
                middle = [2 * (box["left"] / image.shape[2] + width / 2) - 1,
                          2 * (box["top"] / image.shape[1] + height / 2) - 1]
                flip = -1 if torch.rand(1) < 0.5 else 1
                affine.append([[flip * width, 0, middle[0]], [0, height, middle[1]]])
            grid = F.affine_grid(torch.tensor(affine), (20, 1, n, n), align_corners=False)
            stored = ((maps[batch] + 0.5) / 256).view(20, 1, n, n)
            found = F.grid_sample(stored, grid, padding_mode="border", align_corners=False)
            u = side // 4
            weights_of_units = found.view(20, n // u, u, n // u, u).mean(dim=(2, 4)).flatten(1)
        noise_of_units = noise[:, :weights_of_units.shape[1]]
        race = -noise_of_units.log() / weights_of_units  # the first are masked
        peak = 0.05 * 20 / 256                           # warm-up: 1.5 epochs, three steps
        lr = peak * step / 3 if step < 3 else peak / 2 * (1 + np.cos(np.pi * (step - 3) / (8 - 3)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        counts_of = ratios if epoch > 0 else (first_ratio, 0.0)
        images = (images / 255 - mean) / std
        loss, _, _ = model(images, order=race.argsort(dim=1), ratios=counts_of)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    close(model.state_dict(), weights("run"))
    difference = (maps - checkpoint("run")["tensors"]["maps"].float()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01    # rounding apart


def test_accumulation_is_one_large_batch(small, unscored):
    for accumulate in (1, 5):
        amt.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=6))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))
    assert checkpoint("a1")["epoch_losses"] == pytest.approx(checkpoint("a5")["epoch_losses"])


def test_two_processes_equal_one(small, unscored):
    """Several images a process and micro-batch, into the third epoch, with the second maps: one
    torchrun makes both runs, with and without accumulation."""
    runs = {"plain": TINY | dict(batch_size=12, max_steps=8),                  # 3 steps an epoch
            "accumulated": TINY | dict(batch_size=12, max_steps=8, accumulate=2, base="simmim",
                                       mask_unit=4)}
    (Path.cwd() / "both.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import amt, common
amt.SIZES["micro"] = (16, 1, 2)
with common.command_line():
    for name, settings in {runs!r}.items():
        amt.train(amt.Config(output=name + "2", **settings))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "both.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, settings in runs.items():
        amt.train(amt.Config(output=f"{name}1", **settings))
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        one, two = checkpoint(f"{name}1"), checkpoint(f"{name}2")
        assert one["epoch_losses"] == pytest.approx(two["epoch_losses"], rel=1e-5)
        difference = one["tensors"]["maps"].float() - two["tensors"]["maps"].float()
        assert difference.abs().max() <= 1               # rounding apart


def test_a_short_run_learns(in_tmp, fewer_shapes):
    """The loss falls, the first maps find the objects (lift of seeds 0 and 1: 2.4 and 2.5), and
    evaluate.py reads the checkpoint."""
    metrics = amt.main(["--epochs=2", "--attention-from=1", "--base-lr=0.016",
                        "--image-size=32", "--patch-size=8", "--max-steps=150"])
    log = lines("runs/amt-shapes")
    lift = [line["map_lift"] for line in log if "map_lift" in line]
    losses = [line["epoch_loss"] for line in log if "epoch" in line]
    assert len(lift) == 1 and lift[0] > 1.5 and metrics["step"] == 150
    assert log[0]["loss"] > 0.95 > losses[0] and log[0]["loss"] > log[-2]["loss"]
    cfg = evaluate.Config(checkpoint="runs/amt-shapes/checkpoint.pt")
    encoder, *_ = evaluate.load_encoder(cfg)
    assert encoder.encode(torch.randn(1, 3, 32, 32)).shape == (1, 17, 64)


@pytest.mark.parametrize("argv, words", [
    (["--attention-from=7"], "never reached"), (["--throw-ratio=0.6"], "leave nothing to see"),
    (["--mask-ratio=0"], "leave nothing to see or nothing to predict"),
    (["--throw-ratio=-0.1"], "throw_ratio is -0.1"),
    (["--base=simmim", "--mask-unit=6"], "mask_unit 6"),
    (["--refresh-every=0"], "refresh_every is 0, it must be from 1"),
    (["--base=beit"], "invalid choice"),
    (["--attention-form=3"], "unrecognized arguments: --attention-form=3")])
def test_a_users_mistake_is_one_line(in_tmp, capfd, argv, words):
    with pytest.raises(SystemExit) as stop:
        amt.main(argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and "\n" not in error
