"""dtm.py against published figures, a naive reference and its invariants; and whole runs."""

import itertools
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import data
import dtm
import evaluate
import mae
from conftest import ROOT, draw, golden
from dtm import draw_schedule, match, morph_loss, sum_groups
from test_maskdistill import (RECIPE, TINY, clip_by_hand, labels_by_hand, optimize, own_teacher,
                              save_teacher)
from test_train import (checkpoint, close, every_step_is_logged, lines, moments,  # noqa: F401
                        photos, same, weights)           # two of them are fixtures

FIGURES = golden("dtm")
ROWS = [(True, row) for row in FIGURES["protect_first_token"]]
ROWS += [(False, row) for row in FIGURES["no_protection"] if row["k"] == 1]


# ------------------------------------------------------------------------------- published figures
def cosine_loss(prediction, target, labels, n):
    """1 - cosine in place of smooth-L1, the other loss of the release."""
    prediction = dtm.group_means(prediction, labels, n)
    target = dtm.group_means(target, labels, n)
    return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()


@pytest.mark.parametrize("protect_first, row", ROWS)
def test_golden_figures(protect_first, row):
    target = draw("dtm/target", 3, 49, 16)
    online = draw("dtm/online", 3, 49, 16).requires_grad_()
    labels, n = match(target, [row["r"]] * row["k"], protect_first)
    number = {}                                          # groups in the order of their first tokens
    found = [number.setdefault(label, len(number)) for label in labels[0].tolist()]
    assert found == row["group_of_token_image0"] and n == row["groups"]
    loss = morph_loss(online, target, labels, n)
    grad, = torch.autograd.grad(loss, online)
    assert loss.item() == pytest.approx(row["loss_smooth_l1_beta2"], rel=1e-5)
    assert grad.norm().item() == pytest.approx(row["grad_norm_online"], rel=1e-5)
    cosine = cosine_loss(online, target, labels, n)      # an option of the release
    assert cosine.item() == pytest.approx(row["loss_cosine"], rel=1e-5)


# ---------------------------------------------------------------------------------------- matching
def naive_match(tokens, rounds, protect_first=False):
    """The same for one image (N, C) with lists and loops: groups of tokens, in order."""
    groups = [[i] for i in range(len(tokens))]
    for r in rounds:
        r = min(r, (len(groups) - protect_first) // 2)
        if r == 0:
            continue
        means = [tokens[members].mean(dim=0) for members in groups]
        unit = [mean / mean.norm().clamp(min=1e-12) for mean in means]
        odd = range(1, len(groups), 2)
        best = {}                                        # of each even group: similarity, partner
        for i in range(0, len(groups), 2):
            if i > 0 or not protect_first:
                best[i] = max(((unit[i] @ unit[j]).item(), -j) for j in odd)
        joining = sorted(best, key=lambda i: -best[i][0])[:r]
        joined = {j: list(groups[j]) for j in odd}
        for i in joining:
            joined[-best[i][1]] += groups[i]
        staying = [groups[i] for i in range(0, len(groups), 2) if i not in joining]
        groups = staying + list(joined.values())
    return groups


def labels_of(groups):
    label = {token: g for g, members in enumerate(groups) for token in members}
    return [label[token] for token in range(len(label))]


@pytest.mark.parametrize("protect_first", [False, True])
def test_match_equals_the_naive_reference(protect_first):
    for N, seed in ((16, 5), (49, 1), (50, 2), (64, 3)):
        rounds = [max(1, r) for r in draw_schedule(N, 5, random.Random(seed))]
        tokens = draw(f"naive{seed}", 3, N, 8).double()
        labels, n = match(tokens, rounds, protect_first)
        for b in range(3):
            groups = naive_match(tokens[b], rounds, protect_first)
            assert labels[b].tolist() == labels_of(groups) and n == len(groups)


def match_by_products(tokens, rounds):
    """The same from the tokens' inner products alone: merging adds up their rows and columns."""
    products = tokens @ tokens.transpose(1, 2)
    labels = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    for r in rounds:
        n = products.shape[1]
        a = (n + 1) // 2
        norm = products.diagonal(dim1=1, dim2=2).sqrt()
        cosine = products / norm.unsqueeze(1) / norm.unsqueeze(2)
        best, partner = cosine[:, ::2, 1::2].max(dim=2)
        joins = best.argsort(dim=1, descending=True).argsort(dim=1) < r
        number = torch.arange(n).repeat(len(tokens), 1) // 2 + a - r           # of the odd ones
        number[:, ::2] = torch.where(joins, a - r + partner, (~joins).cumsum(dim=1) - 1)
        member = F.one_hot(number, n - r).to(tokens.dtype)                     # (B, n, n - r)
        products = member.transpose(1, 2) @ products @ member
        labels = number.gather(1, labels)
    return labels


def match_with_static_shapes(tokens, rounds):
    """The same with N places throughout, of which the last become empty; r and n are tensors, as
    they would be for a compiler."""
    B, N, _ = tokens.shape
    place = torch.arange(N)
    labels = place.repeat(B, 1)
    sums = tokens
    n = torch.tensor(N)
    for r in map(torch.tensor, rounds):
        a = (n + 1) // 2
        unit = F.normalize(sums, dim=-1)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        best, partner = similarity.masked_fill(place[1::2] >= n, -2).max(dim=2)
        best = best.masked_fill(place[::2] >= n, -3)
        joins = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < r
        number = torch.empty_like(labels)
        number[:, ::2] = torch.where(joins, a - r + partner, (~joins).cumsum(dim=1) - 1)
        number[:, 1::2] = a - r + place[1::2] // 2
        number = torch.where((place >= n) | (r == 0), place, number)           # empty ones stay
        sums = sum_groups(sums, number, N)
        labels = number.gather(1, labels)
        n = n - r
    return labels


def test_inner_products_and_static_shapes_give_the_same_groups():
    for seed in range(40):
        N = (49, 64, 50)[seed % 3]
        rounds = [r for r in draw_schedule(N, 8, random.Random(seed)) if r]
        tokens = draw(f"same{seed}", 2, N, 12).double()
        labels, _ = match(tokens, rounds)
        assert torch.equal(match_by_products(tokens, rounds), labels)
        assert torch.equal(match_with_static_shapes(tokens, rounds), labels)


@pytest.mark.parametrize("N", [49, 64, 196])
def test_labels_are_a_partition(N):
    for seed in range(20):
        rounds = draw_schedule(N, 14, random.Random(seed))
        labels, n = match(draw("t", 2, N, 8), rounds)
        assert n == N - sum(rounds)
        for row in labels:
            assert torch.equal(row.unique(), torch.arange(n))


def test_more_than_half_cannot_merge():
    tokens = draw("t", 2, 49, 8)
    labels, n = match(tokens, [49, 49])
    assert n == 49 - 24 - 12 and torch.equal(labels, match(tokens, [24, 12])[0])
    assert match(tokens, [49, 49], protect_first=True)[1] == 49 - 24 - 12
    assert match(tokens[:, :48], [48], protect_first=True)[1] == 48 - 23


def test_groups_depend_on_the_images_own_tokens_only():
    tokens = draw("target", 3, 49, 6)
    labels, _ = match(tokens, [9, 7, 5])
    others = torch.cat([tokens[:1], draw("others", 2, 49, 6)])
    for changed in (7.5 * tokens, others):
        assert torch.equal(match(changed, [9, 7, 5])[0][0], labels[0])


def test_groups_are_found_in_fp32():
    """In bf16 they would be others. (Of float64 autocast makes nothing.)"""
    tokens = draw("single", 3, 196, 16)
    want, _ = match(tokens.double(), [40, 30, 20])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(tokens, [40, 30, 20])[0], want)


def test_protected_first_token():
    for seed in range(10):
        rounds = [max(r, 1) for r in draw_schedule(49, 5, random.Random(seed))]
        tokens = draw(f"p{seed}", 3, 49, 4)
        tokens[:, 1] = tokens[:, 0]                      # its neighbor is as similar as can be
        labels, _ = match(tokens, rounds, protect_first=True)
        assert ((labels == labels[:, :1]).sum(dim=1) == 1).all()
        labels, _ = match(tokens, rounds)
        assert ((labels == labels[:, :1]).sum(dim=1) > 1).all()


def test_equal_and_zero_tokens():
    rounds = draw_schedule(49, 7, random.Random(3))
    for tokens in (torch.ones(2, 49, 4), torch.zeros(2, 49, 4)):
        labels, n = match(tokens, rounds)
        for row in labels:
            assert torch.equal(row.unique(), torch.arange(n))
        online = draw("online", 2, 49, 4)
        loss = morph_loss(online, tokens, labels, n)
        assert loss.isfinite() and loss <= F.smooth_l1_loss(online, tokens, beta=2.0)


# --------------------------------------------------------------------------------- schedule, loss
class Given:
    """Stands in for random.Random: gives the numbers that it was given."""

    def __init__(self, *values):
        self.values = list(values)
        self.ranges = []

    def randint(self, low, high):
        self.ranges.append((low, high))
        return self.values.pop(0)


@pytest.mark.parametrize("N", [16, 49, 64, 196, 197, 256])
def test_exact_schedule(N):
    """As many groups as were drawn are left, whatever was drawn."""
    for groups, k in itertools.product(range(1, N + 1), range(1, 15)):
        drawn = Given(groups, k)
        rounds = draw_schedule(N, 14, drawn)
        assert drawn.ranges == [(1, N), (1, 14)]
        n = N
        for r in rounds:
            assert 0 <= r <= n // 2
            n -= r
        assert n == groups and k <= len(rounds) <= max(k, math.ceil(math.log2(N)))
        if math.ceil((N - groups) / k) <= groups:        # no round has to halve
            assert len(rounds) == k and max(rounds) - min(rounds) <= 1


def test_schedules_of_a_step():
    """Each morphing has one of its own; other steps and seeds have others."""
    def schedules(step=0, **changes):
        return dtm.draw_schedules(tiny(**dict(morphs=3, seed=1) | changes), 196, step)

    first = schedules()
    assert len(first) == 3 and first == schedules()
    different = [*first, *schedules(step=1), *schedules(seed=2)]
    assert len({tuple(rounds) for rounds in different}) == 9
    for i, rounds in enumerate(first):
        assert rounds == draw_schedule(196, 4, random.Random(common.derive_seed(1, 0, i, 1)))
    assert schedules(morphs=0) == [[]]


def morphing(rounds=(9, 7, 5), N=49):
    """online, target (3, N, 6), float64, and the labels and number of groups."""
    online = draw("online", 3, N, 6).double().requires_grad_()
    target = draw("target", 3, N, 6).double()
    return online, target, *match(target, list(rounds))


def equal_with_gradients(value, expected, online):
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    found, = torch.autograd.grad(value, online, retain_graph=True)
    wanted, = torch.autograd.grad(expected, online, retain_graph=True)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rounds", [(), (0, 0)])
def test_no_round_is_the_loss_token_by_token(rounds):
    online, target, labels, n = morphing(rounds)
    assert torch.equal(labels, torch.arange(49).expand(3, -1)) and n == 49
    plain = F.smooth_l1_loss(online, target, beta=2.0)
    equal_with_gradients(morph_loss(online, target, labels, n), plain, online)
    plain = 1 - F.cosine_similarity(online, target, dim=-1).mean()
    equal_with_gradients(cosine_loss(online, target, labels, n), plain, online)


@pytest.mark.parametrize("loss", [morph_loss, cosine_loss])
def test_dense_form(loss):
    """The released form: give every token its group's mean, average over all tokens."""
    online, target, labels, n = morphing()
    same_group = (labels.unsqueeze(1) == labels.unsqueeze(2)).double()         # (B, N, N)
    P = same_group / same_group.sum(dim=2, keepdim=True)                       # (B, N, N)
    torch.testing.assert_close(P @ P, P, atol=1e-12, rtol=0)
    trace = P.diagonal(dim1=1, dim2=2).sum(dim=1)
    torch.testing.assert_close(trace, torch.full((3,), n).double(), atol=1e-12, rtol=0)
    if loss is morph_loss:
        dense = F.smooth_l1_loss(P @ online, P @ target, beta=2.0)
    else:
        dense = 1 - F.cosine_similarity(P @ online, P @ target, dim=-1).mean()
    equal_with_gradients(loss(online, target, labels, n), dense, online)


def test_one_group_is_the_mean_of_all():
    online, target, labels, n = morphing((8, 4, 2, 1), N=16)
    assert n == 1
    want = F.smooth_l1_loss(online.mean(dim=1), target.mean(dim=1), beta=2.0)
    equal_with_gradients(morph_loss(online, target, labels, n), want, online)


def test_morphed_loss_is_never_above_the_loss_token_by_token():
    for seed in range(30):
        online = draw(f"o{seed}", 2, 49, 5)
        target = draw(f"t{seed}", 2, 49, 5)
        labels, n = match(target, draw_schedule(49, 7, random.Random(seed)))
        plain = F.smooth_l1_loss(online, target, beta=2.0)
        assert morph_loss(online, target, labels, n) <= plain + 1e-7


@pytest.mark.parametrize("loss", [morph_loss, cosine_loss])
def test_members_of_a_group_have_equal_gradients(loss):
    online, target, labels, n = morphing()
    grad, = torch.autograd.grad(loss(online, target, labels, n), online)
    for of_image, of_tokens in zip(grad, labels):
        for g in range(n):
            members = of_image[of_tokens == g]
            torch.testing.assert_close(members, members[:1].expand_as(members), atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------- a student
@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """--model micro of this process is smaller; a CLIP of width 128 has two heads."""
    monkeypatch.setitem(dtm.SIZES, "micro", (16, 2, 2))
    monkeypatch.setitem(dtm.SIZES, "golden", (128, 2, 2))


@pytest.fixture
def unscored(monkeypatch):
    """Runs end without scores and images, for tests of their weights or files alone."""
    monkeypatch.setattr(data, "score_encoders", lambda *_: {})
    monkeypatch.setattr(dtm, "save_visualization", lambda *_: None)


def tiny(**changes):
    return dtm.Config(**TINY | dict(teacher="self") | changes)


def test_forward():
    """The mean over the morphings; all patches are predicted, from the visible ones."""
    model = dtm.build(tiny(), 24)
    images = draw("i", 3, 3, 16, 16)
    features = draw("f", 3, 16, 24)
    noise = draw("n", 3, model.noise_width, uniform=True)
    schedules = [[3, 2], [5]]
    loss, online, target = model(images, features, noise, schedules)
    visible, masked = model.masks(noise)
    assert masked.shape == (3, 6) and visible.shape == (3, 10) and torch.equal(target, features)
    x = model.patch_embed(mae.patchify(images, 4)).clone()
    for i in range(3):
        x[i, masked[i]] = model.mask_token[0, 0]
    want = model.distill_head(model.forward_features(x)[:, 1:])
    torch.testing.assert_close(online, want)
    losses = [morph_loss(online, target, *match(target, rounds)) for rounds in schedules]
    torch.testing.assert_close(loss, (losses[0] + losses[1]) / 2)
    plain, _, _ = model(images, features, noise)
    torch.testing.assert_close(plain, F.smooth_l1_loss(online, target, beta=2.0))
    where = masked.unsqueeze(2).expand(-1, -1, 48)
    patches = mae.patchify(images, 4).scatter(1, where, 1.0)
    other = mae.unpatchify(patches, 4, (4, 4))           # other pixels where nothing is seen
    assert torch.equal(model(other, features, noise, schedules)[1], online)
    loss.backward()
    assert all(p.grad.any() for p in model.parameters())


def test_what_the_image_shows(monkeypatch):
    """Gray where patches are masked; how well each is predicted; a color for each group."""
    rows = {}
    monkeypatch.setattr(data, "save_image_grid", lambda path, given: rows.update(given))
    model = dtm.build(tiny(image_size=32), 24)
    images = draw("i", 2, 3, 32, 32)
    features = draw("f", 2, 64, 24)
    noise = draw("n", 2, model.noise_width, uniform=True)
    dtm.save_visualization(model, images, features, noise, None)
    assert list(rows)[3].startswith("32 groups")
    original, seen, heat, tinted = (mae.patchify(row, 4) for row in rows.values())
    _, masked = model.masks(noise)
    assert torch.equal(original, mae.patchify(images, 4))
    assert (mae.gather_tokens(seen, masked) == 0).all()
    cosine = F.cosine_similarity(model.predict(images, noise), features, dim=2).clamp(0, 1)
    torch.testing.assert_close(heat, data.heat_patches(cosine, 4), atol=1e-4, rtol=0)
    labels, _ = match(features, [8, 8, 8, 8])
    tint = tinted - 0.4 * original
    for i, j in itertools.product(range(64), range(64)):
        if labels[0, i] == labels[0, j]:
            torch.testing.assert_close(tint[0, i], tint[0, j], atol=1e-4, rtol=0)
    assert len((tint[0, :, 0] * 1000).round().unique()) > 16


def test_presets():
    cfg = common.parse_config(dtm.Config, dtm.PRESETS, ["--data=imagenet"])
    assert (cfg.teacher, cfg.morphs, cfg.most_rounds) == ("clip", 2, 14)
    assert (cfg.min_block, int(cfg.mask_ratio * 196)) == (16, 75)
    assert cfg.base_lr * cfg.batch_size / 256 == pytest.approx(1.5e-3)
    assert (dtm.MIN_LR, cfg.weight_decay, cfg.clip_grad, cfg.epochs) == (1e-5, 0.05, 3.0, 300)
    argv = ["--data=imagenet", "--preset=imagenet-large"]
    large = common.parse_config(dtm.Config, dtm.PRESETS, argv)
    assert (large.embed_dim, large.depth, large.layer_scale) == (1024, 24, 1e-5)


# -------------------------------------------------------------------------------------- whole runs
def teacher_by_hand(kind):
    """What --teacher names, of a finished run called run: images -> features (B, 16, E), and E."""
    if kind == "clip.pt":
        return lambda images: clip_by_hand(images, projected=True), 32
    if kind == "vit.pth":
        vit = mae.VisionTransformer(16, 4, 192, 1, 3)
        vit.load_state_dict(torch.load("vit.pth", weights_only=True))
    else:                                                # self
        vit = labels_by_hand(own_teacher())
        saved = checkpoint("run", "teacher.pt")["model"]
        close(vit.state_dict(), saved)
        vit.load_state_dict(saved)                       # a rounding could change the groups
    vit.requires_grad_(False)
    return lambda images: vit.encode(images)[:, 1:], vit.cls_token.shape[-1]


def morphed_by_hand(online, target, rounds):
    """smooth-L1 with beta 2 between a group's means, as often as it has tokens, for one image."""
    total = 0.0
    for members in naive_match(target.double(), rounds):
        error = (online[members].mean(dim=0) - target[members].mean(dim=0)).abs()
        error = torch.where(error < 2, error.square() / 4, error - 1)
        total = total + len(members) * error.mean()
    return total / len(target)


@pytest.mark.parametrize("kind, clip, morphs", [("self", 0.2, 2), ("clip.pt", 0.29, 3),
                                                ("vit.pth", 0.1, 0)])
def test_recipe(photos, unscored, monkeypatch, kind, clip, morphs):
    """Five steps of a loop written out, with the matching by lists of above, end with the same
    weights, averages of gradients, teacher."""
    monkeypatch.setitem(dtm.SIZES, "micro", (16, 3, 2))
    monkeypatch.setattr(dtm, "MIN_LR", 3e-4)
    save_teacher(kind)
    dtm.train(tiny(**RECIPE, output="run", teacher=kind, clip_grad=clip, morphs=morphs,
                   most_rounds=3))
    features_of, width = teacher_by_hand(kind)
    torch.manual_seed(3)
    model = dtm.DTM(16, 4, 16, 3, 2, width, mask_ratio=0.4, min_block=3, layer_scale=0.5)
    numbers_of_groups = set()

    def loss_of(images, noise, step):
        online = model.predict(images, noise)
        target = features_of(images)
        losses = []
        for i in range(max(morphs, 1)):
            seed = int(np.random.SeedSequence((3, step, i, 1)).generate_state(1)[0])
            rounds = draw_schedule(16, 3, random.Random(seed)) if morphs else []
            numbers_of_groups.add(16 - sum(rounds))
            for of_image, wanted in zip(online, target):
                losses.append(morphed_by_hand(of_image, wanted, rounds))
        return torch.stack(losses).mean()

    averages = optimize(model, loss_of, clip)
    close(model.state_dict(), weights("run"))
    close(averages, moments("run"))
    assert len(numbers_of_groups) > 3 if morphs else numbers_of_groups == {16}


def test_what_a_run_scores_and_exports(photos):
    """The encoder alone, beside the untrained one, the teacher and pixels."""
    metrics = dtm.train(tiny(output="run", max_steps=2))
    for protocol in ("knn", "linear"):
        for name in ("pixels", "trained", "untrained", "teacher"):
            assert 0 <= metrics[f"{protocol}_{name}"] <= 100
    encoder = dtm.VisionTransformer(16, 4, 16, 2, 2, relative=True, layer_scale=1.0)
    encoder.load_state_dict(torch.load("run/encoder.pt", weights_only=True))
    assert Path("run/similarity.png").stat().st_size > 1000
    assert evaluate.main(["knn", "--checkpoint=run/checkpoint.pt", "--data=photos", "--workers=0"])


def test_resumed_run_equals_an_undisturbed_one(photos, unscored):
    whole = dtm.train(tiny(output="whole"))
    for steps in (3, 6, 0):
        parts = dtm.train(tiny(output="parts", max_steps=steps))
    assert same(weights("whole"), weights("parts")) and whole == parts
    with pytest.raises(common.UserError, match="morphs: 2 there, 1 here"):
        dtm.train(tiny(output="parts", morphs=1))


def test_accumulation_is_one_large_batch(photos, unscored):
    """Gradients are not cut here: that, as AdamW, forgives those of the wrong scale; their averages
    do not."""
    save_teacher("vit.pth")
    for accumulate in (1, 5):
        dtm.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=6, clip_grad=1e6,
                       teacher="vit.pth"))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))
    assert checkpoint("a1")["epoch_losses"] == pytest.approx(checkpoint("a5")["epoch_losses"])


def test_two_processes_equal_one(photos):
    """Several images a process and micro-batch, into the second epoch: one torchrun makes both
    runs, with cut gradients, then with accumulation. All processes make the same morphings."""
    save_teacher("vit.pth")
    settings = TINY | dict(batch_size=12, max_steps=5, crop_scale=0.5, base_lr=0.05,
                           teacher="vit.pth")
    runs = {"plain": settings | dict(clip_grad=0.1),
            "accumulated": settings | dict(accumulate=2, morphs=3, clip_grad=1e6)}
    Path("both.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import common, dtm
common.LOG_EVERY = 1
dtm.SIZES["micro"] = (16, 2, 2)
with common.command_line():
    for name, settings in {runs!r}.items():
        dtm.train(dtm.Config(output=name + "2", **settings))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, "both.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for name, settings in runs.items():
        dtm.train(dtm.Config(output=f"{name}1", **settings))
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        for line, other in zip(lines(f"{name}1"), lines(f"{name}2"), strict=True):
            for key in {"loss", "lr", "epoch_loss", "knn_untrained"} & line.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-4), key


@pytest.mark.parametrize("argv, words", [
    (["--morphs=-1"], "morphs is -1, it must be from 0"),
    (["--most-rounds=0"], "most_rounds is 0, it must be from 1"),
    (["--mask-ratio=1"], "mask_ratio 1.0 leaves nothing to see of 16 patches"),
    (["--min-block=7"], "min_block 7 is more than the 6 masked"),
    (["--teacher=nothing.pt"], "no file nothing.pt"),
    (["--morph=2"], "unrecognized arguments: --morph=2")])
def test_a_users_mistake_is_one_line(photos, capfd, argv, words):
    with pytest.raises(SystemExit) as stop:
        dtm.main(["--data=photos", "--preset=shapes", "--batch-size=10", *argv])
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error
    assert error.startswith("error: ") and "\n" not in error
