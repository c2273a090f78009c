"""dtm.py against published figures, a naive reference, its own invariants; and whole runs."""

import itertools
import json
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
from dtm import draw_schedule, gathered, match, morph, morph_loss
from test_maskdistill import RECIPE, averages, clip_state, features_by_hand, optimize, peak_and_cosine
from test_train import checkpoint, close, moments, photos, same, weights     # noqa: F401, photos is a fixture

FIGURES = golden("dtm")


# -------------------------------------------------------------------------------------- published figures
@pytest.mark.parametrize("kind, row", [(kind, row) for kind in ("protect_first_token", "no_protection") for row in FIGURES[kind]
                                       if kind == "protect_first_token" or row["k"] == 1])
def test_golden_figures(kind, row):
    target, online = draw("dtm/target", 3, 49, 16), draw("dtm/online", 3, 49, 16).requires_grad_()
    labels, n, weights = match(target, [row["r"]] * row["k"], protect_first=kind == "protect_first_token")
    first = {}
    assert [first.setdefault(label, len(first)) for label in labels[0].tolist()] == row["group_of_token_image0"]
    assert n == row["groups"] and weights is None
    loss = morph_loss(online, target, labels, n)
    grad, = torch.autograd.grad(loss, online)
    assert loss.item() == pytest.approx(row["loss_smooth_l1_beta2"], rel=1e-5)
    assert grad.norm().item() == pytest.approx(row["grad_norm_online"], rel=1e-5)
    assert morph_loss(online, target, labels, n, loss="cosine").item() == pytest.approx(row["loss_cosine"], rel=1e-5)


# ------------------------------------------------------------------------------------------- by hand
def naive(tokens, rounds, protect_first, average, orders):
    """The same for one picture (N, C) with lists and loops; orders: a permutation of the slots for each round."""
    slots, vectors, weights = [[i] for i in range(len(tokens))], list(tokens), [1.0] * len(tokens)
    for r, order in zip(rounds, orders):
        n = len(slots)
        r = min(r, (n - protect_first) // 2)
        if r == 0:
            continue
        if order is not None:
            slots, vectors = [slots[i] for i in order], [vectors[i] for i in order]
        unit = [v / v.norm().clamp(min=1e-12) for v in vectors]
        best = {}
        for i in range(0, n, 2):
            values = [(unit[i] @ unit[j]).item() for j in range(1, n, 2)]
            best[i] = (-math.inf if protect_first and i == 0 else max(values), 1 + 2 * values.index(max(values)))
        merged = sorted(best, key=lambda i: -best[i][0])[:r]
        joined = {j: [j] + [i for i in merged if best[i][1] == j] for j in range(1, n, 2)}
        new = [[i] for i in range(0, n, 2) if i not in merged] + [joined[j] for j in range(1, n, 2)]
        if average == "uniform":
            for members in new:
                for i in members:
                    for token in slots[i]:
                        weights[token] /= len(members)
            vectors = [sum(vectors[i] for i in members) / len(members) for members in new]
        else:
            sizes = [sum(len(slots[i]) for i in members) for members in new]
            vectors = [sum(vectors[i] * len(slots[i]) for i in members) / size for members, size in zip(new, sizes)]
        slots = [sum((slots[i] for i in members), []) for members in new]
    labels = [0] * len(tokens)
    for g, slot in enumerate(slots):
        for i in slot:
            labels[i] = g
    return labels, weights, vectors


@pytest.mark.parametrize("protect_first, average, split", list(itertools.product([False, True], ["size", "uniform"], ["alternating", "random"])))
def test_match_equals_the_naive_reference(protect_first, average, split):
    for N, seed in ((16, 5), (49, 1), (50, 2), (64, 3)):
        rounds = [max(1, r) for r in draw_schedule(N, 5, random.Random(seed))]
        tokens = draw(f"naive{seed}", 3, N, 8).double()
        labels, n, weight = match(tokens, rounds, protect_first, average, split, torch.Generator().manual_seed(seed))
        generator, left, orders = torch.Generator().manual_seed(seed), N, []
        for r in rounds:
            r = min(r, (left - protect_first) // 2)
            first, rest = [0] * protect_first, left - protect_first
            orders.append(first + [i + protect_first for i in torch.randperm(rest, generator=generator).tolist()]
                          if r and split == "random" else None)
            left -= r
        for b in range(3):
            expected, expected_weights, vectors = naive(tokens[b], rounds, protect_first, average, orders)
            assert labels[b].tolist() == expected and n == len(vectors)
            if average == "uniform" and weight is not None:
                torch.testing.assert_close(weight[b].double(), torch.tensor(expected_weights).double())
                means = gathered(tokens[b:b + 1] * weight[b:b + 1].unsqueeze(2), labels[b:b + 1], n)[0]
            else:
                means = morph(tokens[b:b + 1], labels[b:b + 1], n)[0][[expected.index(g) for g in range(n)]]
            torch.testing.assert_close(means, torch.stack(vectors), atol=1e-12, rtol=0)


def by_gram(tokens, rounds):
    """The same from the tokens' inner products alone: merging adds rows and columns of their matrix."""
    products, labels = tokens @ tokens.transpose(1, 2), torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    for r in rounds:
        n = products.shape[1]
        r = min(r, n // 2)
        if r == 0:
            continue
        length = products.diagonal(dim1=1, dim2=2).sqrt()
        best, partner = (products / length.unsqueeze(1) / length.unsqueeze(2))[:, ::2, 1::2].max(dim=2)
        merged, a = best.argsort(dim=1, descending=True).argsort(dim=1) < r, (n + 1) // 2
        place = torch.arange(n).repeat(len(tokens), 1) // 2 + a - r                          # of the odd ones
        place[:, ::2] = torch.where(merged, a - r + partner, (~merged).cumsum(dim=1) - 1)
        join = F.one_hot(place, n - r).to(tokens.dtype).transpose(1, 2)                      # (B, n - r, n)
        products, labels = join @ products @ join.transpose(1, 2), place.gather(1, labels)
    return labels


def with_static_shapes(tokens, rounds):
    """The same with N places throughout, of which the last get empty; r and n are tensors, as for a compiler."""
    B, N, _ = tokens.shape
    x, labels, n, place_of = tokens, torch.arange(N).repeat(B, 1), torch.tensor(N), torch.arange(N)
    even, odd = place_of[::2], place_of[1::2]
    for r in map(torch.tensor, rounds):
        r = torch.minimum(r, n // 2)
        unit = F.normalize(x, dim=-1)
        similarity = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).masked_fill(odd >= n, -2)
        best, partner = similarity.max(dim=2)
        best = best.masked_fill(even >= n, -3)
        merged, a = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < r, (n + 1) // 2
        place = torch.empty_like(labels)
        place[:, ::2] = torch.where(merged, a - r + partner, (~merged).cumsum(dim=1) - 1)
        place[:, 1::2] = a - r + odd // 2
        place = torch.where((place_of >= n) | (r == 0), place_of, place)                     # the empty stay where they are
        x, labels, n = gathered(x, place, N), place.gather(1, labels), n - r
    return labels


def test_inner_products_and_static_shapes_give_the_same_groups():
    for seed in range(40):
        N, chance = (49, 64, 50)[seed % 3], random.Random(seed)
        rounds, tokens = draw_schedule(N, 8, chance), draw(f"same{seed}", 2, N, 12).double()
        labels, n, _ = match(tokens, rounds)
        assert torch.equal(by_gram(tokens, rounds), labels) and torch.equal(with_static_shapes(tokens, rounds), labels)
        assert labels.max() == n - 1


def some(N=49, C=6, rounds=(9, 7, 5), **options):
    target, online = (draw(name, 3, N, C).double() for name in ("target", "online"))
    labels, n, weights = match(target, list(rounds), **options)
    return online.requires_grad_(), target, labels, n, weights


@pytest.mark.parametrize("N", [49, 64, 196])
def test_labels_are_a_partition(N):
    for seed in range(20):
        rounds = draw_schedule(N, 14, random.Random(seed))
        labels, n, _ = match(draw("t", 2, N, 8), rounds)
        assert n == N - sum(rounds) and all(torch.equal(row.unique(), torch.arange(n)) for row in labels)


def test_no_round_is_the_token_wise_loss():
    for rounds in ((), (0, 0)):
        online, target, labels, n, _ = some(rounds=rounds)
        assert torch.equal(labels, torch.arange(49).expand(3, -1)) and n == 49
        for kind, plain in (("smooth_l1", F.smooth_l1_loss(online, target, beta=2.0)), ("l2", F.mse_loss(online, target)),
                            ("l1", F.l1_loss(online, target)), ("cosine", 1 - F.cosine_similarity(online, target, dim=-1).mean())):
            loss = morph_loss(online, target, labels, n, loss=kind)
            torch.testing.assert_close(loss, plain, atol=1e-12, rtol=0)
            grads = [torch.autograd.grad(value, online, retain_graph=True)[0] for value in (loss, plain)]
            torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def matrix(labels, n):
    return F.one_hot(labels, n).transpose(1, 2).double()                        # (B, n, N)


@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
def test_dense_form(kind):
    """The released form: morph, give every token its group's mean, average over all tokens."""
    online, target, labels, n, _ = some()
    M = matrix(labels, n)
    P = M.transpose(1, 2) @ (M / M.sum(dim=2, keepdim=True))                     # (B, N, N)
    torch.testing.assert_close(P, P.transpose(1, 2), atol=1e-12, rtol=0)
    torch.testing.assert_close(P @ P, P, atol=1e-12, rtol=0)
    torch.testing.assert_close(P.diagonal(dim1=1, dim2=2).sum(dim=1), torch.full((3,), float(n)).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(morph(target, labels, n), P @ target, atol=1e-12, rtol=0)
    u, v = P @ online, P @ target
    dense = F.smooth_l1_loss(u, v, beta=2.0) if kind == "smooth_l1" else 1 - F.cosine_similarity(u, v, dim=-1).mean()
    for places in (n, None):                             # and the loss with N places, of which some are empty
        loss = morph_loss(online, target, labels, places, loss=kind)
        torch.testing.assert_close(loss, dense, atol=1e-12, rtol=0)
        grads = [torch.autograd.grad(value, online, retain_graph=True)[0] for value in (loss, dense)]
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_one_group_is_the_mean_of_all():
    _, target, labels, n, _ = some(16, rounds=(8, 4, 2, 1))
    assert n == 1
    torch.testing.assert_close(morph(target, labels, n), target.mean(dim=1, keepdim=True).expand_as(target), atol=1e-12, rtol=0)


def test_uniform_groups_count_once_each():
    online, target, labels, n, _ = some()
    M = matrix(labels, n)
    difference = (M / M.sum(dim=2, keepdim=True)) @ (online - target)
    for places in (n, None):
        loss = morph_loss(online, target, labels, places, group_weight="uniform", loss="l2")
        torch.testing.assert_close(loss, difference.square().mean(), atol=1e-12, rtol=0)


def test_uniform_average_is_the_product_of_averaging_matrices():
    _, target, labels, n, weights = some(average="uniform")
    before, whole = torch.arange(49).expand(3, -1), torch.eye(49).double().expand(3, -1, -1)
    for rounds in ((9,), (9, 7), (9, 7, 5)):             # the partitions of one, two and three rounds
        after, m, _ = match(target, list(rounds), average="uniform")
        step = torch.zeros(3, m, int(before.max()) + 1).double()
        for b, i in itertools.product(range(3), range(49)):
            step[b, after[b, i], before[b, i]] = 1       # which slots a slot was made of
        whole, before = step / step.sum(dim=2, keepdim=True) @ whole, after
    torch.testing.assert_close(gathered(target * weights.unsqueeze(2), labels, n), whole @ target, atol=1e-12, rtol=0)
    torch.testing.assert_close(gathered(weights.unsqueeze(2), labels, n), torch.ones(3, n, 1).double(), atol=1e-12, rtol=0)


def test_morphed_loss_is_never_above_the_token_wise_one():
    for seed in range(30):
        online, target = draw(f"o{seed}", 2, 49, 5), draw(f"t{seed}", 2, 49, 5)
        labels, n, _ = match(target, draw_schedule(49, 7, random.Random(seed)))
        everyone = torch.arange(49).expand(2, -1)
        for kind in ("smooth_l1", "l1", "l2"):
            assert morph_loss(online, target, labels, n, loss=kind) <= morph_loss(online, target, everyone, 49, loss=kind) + 1e-7


def test_groups_depend_on_the_pictures_own_teacher_only():
    online, target, labels, n, _ = some()
    for other in (7.5 * target, torch.cat([target[:1], torch.randn_like(target[1:])])):
        assert torch.equal(match(other, [9, 7, 5])[0][0], labels[0])
    target.requires_grad_()
    loss = morph_loss(online, target.detach(), labels, n)
    assert match(target, [9])[0].requires_grad is False and torch.autograd.grad(loss, online)[0].abs().sum() > 0
    single, many = draw("single", 3, 196, 16), [40, 30, 20]        # in bf16 they would be others
    labels = match(single.double(), many)[0]             # of float64 autocast makes nothing
    with torch.autocast("cpu", torch.bfloat16):          # groups are found in fp32 all the same
        assert torch.equal(match(single, many)[0], labels)


def test_members_of_a_group_have_equal_gradients():
    for kind in ("smooth_l1", "cosine"):
        online, target, labels, n, _ = some()
        grad, = torch.autograd.grad(morph_loss(online, target, labels, n, loss=kind), online)
        torch.testing.assert_close(grad, morph(grad, labels, n), atol=1e-12, rtol=0)


class Given:
    """Stands in for random.Random: gives the numbers that it was given."""

    def __init__(self, *values):
        self.values = list(values)

    def randint(self, low, high):
        assert low <= self.values[0] <= high
        return self.values.pop(0)


@pytest.mark.parametrize("N", [16, 49, 64, 196, 197, 256])
def test_exact_schedule(N):
    for remain, k in itertools.product(range(1, N + 1), range(1, 15)):
        rounds, n = draw_schedule(N, 14, Given(remain, k)), N
        for r in rounds:
            assert 0 <= r <= n // 2
            n -= r
        assert n == remain and k <= len(rounds) <= max(k, math.ceil(math.log2(N)))
        if math.ceil((N - remain) / k) <= remain:        # no round has to halve: all merge about equally many
            assert len(rounds) == k and max(rounds) - min(rounds) <= 1


def test_official_schedule():
    left = {}
    for merged, k in ((196, 1), (196, 14), (0, 3), (100, 7), (195, 14)):
        rounds = draw_schedule(196, 14, Given(merged, k), "official")
        assert len(rounds) == k and len(set(rounds)) == 1
        left[merged, k] = match(draw("s", 1, 196, 8), rounds, protect_first=True)[1]
    assert left[196, 1] == 99 and left[196, 14] == 8 and left[0, 3] == 196 and left[100, 7] == 196 - 7 * 15
    mean = sum(match(torch.zeros(1, 196, 1), draw_schedule(196, 14, Given(m, k), "official"), True)[1]
               for m in range(0, 197, 4) for k in range(1, 15)) / (50 * 14)
    assert mean == pytest.approx(98.5, abs=1.5)


@pytest.mark.parametrize("split", ["alternating", "random"])
def test_protected_first_token(split):
    for seed in range(10):
        rounds = [max(r, 1) for r in draw_schedule(49, 5, random.Random(seed))]
        tokens = draw(f"p{seed}", 3, 49, 4)
        tokens[:, 1] = tokens[:, 0]                      # its neighbour is all it could wish for
        labels, n, _ = match(tokens, rounds, True, split=split)
        assert ((labels == labels[:, :1]).sum(dim=1) == 1).all()
        labels, _, _ = match(tokens, rounds)
        assert ((labels == labels[:, :1]).sum(dim=1) > 1).all()


def test_equal_and_zero_tokens():
    for tokens in (torch.ones(2, 49, 4), torch.zeros(2, 49, 4)):
        rounds = draw_schedule(49, 7, random.Random(3))
        labels, n, _ = match(tokens, rounds)
        assert all(torch.equal(row.unique(), torch.arange(n)) for row in labels)
        online = torch.randn(2, 49, 4)
        loss = morph_loss(online, tokens, labels, n)
        assert loss.isfinite() and loss <= F.smooth_l1_loss(online, tokens, beta=2.0)


def test_compiled_loss_does_not_recompile():
    torch._dynamo.reset()
    compiled = torch.compile(morph_loss)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rounds in ((5,), (), (0,), (9, 7, 5), (20, 10)):
            online, target, labels, n, _ = some(rounds=rounds)
            torch.testing.assert_close(compiled(online, target, labels), morph_loss(online, target, labels, n))


# ------------------------------------------------------------------------------------------- whole runs
TINY = dict(data="photos", image_size=16, patch_size=4, epochs=2, batch_size=10, teacher="random", min_block=2)
# 40 photos: 4 steps an epoch, 8 in all


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """--model micro of this process is smaller, and every step is logged."""
    monkeypatch.setitem(dtm.SIZES, "micro", (16, 2, 2))
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def tiny(**changes):
    return dtm.Config(**TINY | changes)


def test_forward():
    """The mean over the morphings; nothing of a hidden patch reaches the student; all patches are predicted."""
    cfg = tiny(token_weight=0.5)
    model, teacher = dtm.build(cfg, 16), dtm.open_teacher(cfg, None, torch.device("cpu"))[0]
    images, noise = draw("i", 3, 3, 16, 16), draw("n", 3, model.noise_width, uniform=True)
    schedules = [[3, 2], [5]]
    loss, online, target = model(images, teacher, noise, schedules)
    hidden = model.masks(noise)[1]
    assert online.shape == target.shape == (3, 16, 16) and hidden.shape == (3, 6)
    parts = [morph_loss(online, target, *match(target, rounds)[:2]) for rounds in schedules]
    token = F.smooth_l1_loss(mae.gather_tokens(online, hidden), mae.gather_tokens(target, hidden), beta=2.0)
    torch.testing.assert_close(loss, sum(parts) / 2 + 0.5 * token)
    patches = mae.patchify(images, 4)
    other = mae.unpatchify(patches.scatter(1, hidden.unsqueeze(-1).expand(-1, -1, 48), 1.0), 4, (4, 4))
    assert torch.equal(model(other, teacher, noise, schedules)[1], online)
    teacher.requires_grad_()                             # even then nothing reaches the teacher
    loss, _, target = model(images, teacher, noise, schedules)
    loss.backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not target.requires_grad and all(p.grad is None for p in teacher.parameters())
    for changes in (dict(mask_ratio=0.0), dict(student="sparse")):
        cfg = tiny(token_weight=0.5, **changes)
        other = dtm.build(cfg, 16)
        loss, online, target = other(images, teacher, noise, [[3, 2]])
        assert loss.isfinite() and online.shape[1] == other.scored == (16 if "mask_ratio" in changes else 10)
        where = torch.arange(16).expand(3, -1) if other.dense else other.masks(noise)[0]         # online and target are of the same patches
        embedded = other.patch_embed(mae.gather_tokens(patches, where))
        tokens = other.layers(embedded, None if other.dense else where)[-1][:, 1:]
        torch.testing.assert_close(online, other.distill_head(other.norm(tokens)))
        torch.testing.assert_close(target, teacher(images, where))


def scored(error, kind):
    """smooth-L1 with beta 0.7, or the square, of each error."""
    smooth = torch.where(error.abs() < 0.7, error.square() / 1.4, error.abs() - 0.35)
    return smooth if kind == "smooth_l1" else error.square()


@pytest.mark.parametrize("kind, clip, changes", [
    ("random", 1.2, dict(split="random", token_weight=0.5, morphs=3, group_weight="uniform")),
    ("self", 1.5, dict(average="uniform", split="random", masking="random", normalize="ln", loss="l2")),
    ("clip.pt", 0.37, dict(teacher_feature="proj", teacher_norm="student", protect_first=True, schedule="official")),
    ("momentum", 0.07, dict(momentum=0.9, drop_path=0.3, morphs=0)), ("pixels", 0.22, dict(student="sparse", token_weight=0.5))])
def test_recipe(photos, monkeypatch, kind, clip, changes):               # noqa: F811
    """Five steps of a loop written out, with the matching by lists of above and sums over groups, end with the same
    weights, averages of gradients, teacher."""
    size = (16, 3, 2)
    monkeypatch.setitem(dtm.SIZES, "micro", size)
    if kind == "clip.pt":
        torch.save(clip_state(), "clip.pt")
    cfg = tiny(**RECIPE | changes, most_rounds=3, output="run", teacher=kind, clip_grad=clip)
    dtm.train(cfg)
    if kind != "momentum":
        features, width = features_by_hand(kind, size, clip)
        if kind == "clip.pt":                            # of pixels normalised as the student's
            clips, features = features, lambda images: clips(images, *torch.tensor([data.MEAN, data.STD]).view(2, 3, 1, 1))
    else:
        average, width = dtm.VisionTransformer(16, 4, *size, relative=True, layer_scale=0.5), 16

        def features(images):                            # the mean of the upper half of the blocks, without a norm
            outputs = average.layers(average.patch_embed(mae.patchify(images, 4)), top=3)
            return (outputs[1] + outputs[2])[:, 1:] / 2
    torch.manual_seed(3)
    model = dtm.DTM(16, 4, *size, width, mask_ratio=0.4, masking=cfg.masking, min_block=3, student=cfg.student,
                    layer_scale=0.5, drop_path=cfg.drop_path)
    if kind == "momentum":
        average.load_state_dict(model.state_dict(), strict=False)
    seed_of = lambda *numbers: int(np.random.SeedSequence(numbers).generate_state(1)[0])
    groups_seen = []

    def loss_of(images, _, step):
        noise = torch.rand(10, 4 * 10 + 16 + 2 * 3, generator=torch.Generator().manual_seed(seed_of(3, step)))
        with torch.no_grad():                            # the features of all patches in the whole image
            target = features(images)
            if cfg.normalize == "ln":
                target = F.layer_norm(target, (width,), eps=1e-6)
        nothing = lambda images, where: torch.zeros(*where.shape, width)
        online, _, masked = model.features(images, nothing, noise)
        if cfg.student == "sparse":
            target, masked = mae.gather_tokens(target, model.masks(noise)[0]), torch.arange(10).expand(10, -1)
        N = 16 if cfg.student == "dense" else 10
        assert online.shape == (10, N, width) and masked.shape == (10, 6 if N == 16 else 10)
        drawn = [draw_schedule(N, 3, random.Random(seed_of(3, step, i)), cfg.schedule) for i in range(cfg.morphs)]
        generator, losses = torch.Generator().manual_seed(seed_of(3, step, cfg.morphs)), []
        for rounds in drawn or [[]]:                     # without a morphing: token by token
            left, orders, first = N, [], [0] * cfg.protect_first
            for r in rounds:
                r = min(r, (left - len(first)) // 2)
                order = None
                if r and cfg.split == "random":
                    order = first + [i + len(first) for i in torch.randperm(left - len(first), generator=generator).tolist()]
                left, orders = left - r, [*orders, order]
            for of_image, expected in zip(online, target):
                labels, shares, _ = naive(expected.double(), rounds, cfg.protect_first, cfg.average, orders)
                groups = [[i for i in range(N) if labels[i] == g] for g in range(left)]
                errors, sizes = [], []
                for members in groups:
                    of = torch.tensor([shares[i] if cfg.average == "uniform" else 1 / len(members) for i in members])
                    errors.append(scored(of @ (of_image - expected)[members], cfg.loss).mean())
                    sizes.append(len(members) if cfg.group_weight == "size" else 1)
                losses.append(sum(size * error for size, error in zip(sizes, errors)) / sum(sizes))
                groups_seen.append(left)
        loss = sum(losses) / len(losses)
        if cfg.token_weight:                             # and the masked (sparse: the visible) ones, one by one
            error = torch.stack([(a - b)[rows] for a, b, rows in zip(online, target, masked)])
            loss = loss + 0.5 * scored(error, cfg.loss).mean()
        return loss

    def after():
        if kind == "momentum":                           # the average follows after each step
            with torch.no_grad():
                for name, p in average.named_parameters():
                    p.copy_(0.9 * p + 0.1 * model.get_parameter(name))

    optimizer = optimize(model, loss_of, peak_and_cosine(0.05 * 10 / 256, 2, 8, 3e-4), clip, 5, after)
    close(model.state_dict(), weights("run"))
    close(averages(optimizer), moments("run"))
    assert len(set(groups_seen)) == 1 if kind == "momentum" else len(set(groups_seen)) > 3
    if kind == "momentum":
        close({f"momentum.vit.{name}": p.detach() for name, p in average.named_parameters()}, weights("run"))


def test_neighbour_cosine_by_hand():
    tokens, grid = draw("side", 2, 6, 4), (2, 3)
    at = {place: i for i, place in enumerate(itertools.product(range(2), range(3)))}
    pairs = [(i, at[y + dy, x + dx]) for (y, x), i in at.items() for dy, dx in ((0, 1), (1, 0)) if (y + dy, x + dx) in at]
    expected = torch.stack([F.cosine_similarity(tokens[:, i], tokens[:, j], dim=-1) for i, j in pairs]).mean().item()
    assert len(pairs) == 7 and dtm.neighbour_cosine(tokens, grid) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [dict(split="random", token_weight=0.5), dict(student="sparse", average="uniform", group_weight="uniform", split="random")])
def test_accumulation_is_one_large_batch(photos, changes):               # noqa: F811
    """Gradients are not cut here: that, as AdamW, forgives those of the wrong scale; their averages do not."""
    for accumulate in (1, 5):
        dtm.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=6, clip_grad=1e6, **changes))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))


def test_run_shows_what_it_should(photos):               # noqa: F811
    metrics = dtm.train(tiny(output="run", teacher="self", teacher_epochs=1))
    lines = [json.loads(line) for line in open("run/metrics.jsonl")]
    scores = [line for line in lines if "groups" in line]
    assert len(scores) == 2 and metrics["step"] == 8 and Path("run/similarity.png").stat().st_size > 1000
    for line in scores:
        assert line["morphed_loss"] <= line["token_loss"] and 1 <= line["groups"] <= 16
        assert line["neighbour_cosine"] < line["neighbour_cosine_morphed"] <= 1
    knn = evaluate.main(["knn", "--checkpoint=run/checkpoint.pt", "--data=photos", "--workers=0"])
    assert knn


@pytest.mark.parametrize("changes", [dict(split="random", drop_path=0.3, teacher="momentum"), dict(preset="official", schedule="official", protect_first=True)])
def test_resumed_run_equals_an_undisturbed_one(photos, changes):        # noqa: F811
    dtm.train(tiny(output="whole", **changes))
    for steps in (3, 6, 0):
        dtm.train(tiny(output="parts", max_steps=steps, **changes))
    assert same(weights("whole"), weights("parts"))


def test_two_processes_equal_one(photos):                # noqa: F811
    """Several images a process and micro-batch, into the second epoch: one torchrun makes both runs, with cut gradients
    and drops, then with accumulation. All processes make the same morphings."""
    one = TINY | dict(batch_size=12, max_steps=5, crop_scale=0.5, base_lr=0.05, split="random")          # 3 steps an epoch
    runs = {"plain": one | dict(token_weight=0.5, clip_grad=0.1, drop_path=0.3),
            "parts": one | dict(accumulate=2, average="uniform", group_weight="uniform", clip_grad=1e6)}
    Path("both.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import common, dtm
common.LOG_EVERY = 1
dtm.SIZES["micro"] = (16, 2, 2)
with common.command_line():
    for name, settings in {runs!r}.items():
        dtm.train(dtm.Config(output=name + "2", **settings))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "both.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    read = lambda run: [json.loads(line) for line in open(f"{run}/metrics.jsonl")]
    for name, settings in runs.items():
        dtm.train(dtm.Config(output=f"{name}1", **settings))
        first, second = f"{name}1", f"{name}2"
        close(weights(first), weights(second))
        close(moments(first), moments(second))
        assert checkpoint(first)["epoch_losses"] == pytest.approx(checkpoint(second)["epoch_losses"], rel=1e-5)
        for line, other in zip(read(first), read(second), strict=True):
            for key in {"loss", "lr", "epoch_loss", "morphed_loss", "token_loss", "groups", "knn_untrained"} & line.keys():
                assert line[key] == pytest.approx(other[key], rel=1e-4), key


@pytest.mark.parametrize("argv, words", [
    (["--morphs=-1"], "morphs is -1, it must be from 0"), (["--most-rounds=0"], "most_rounds is 0, it must be from 1"), (["--group-weight=x"], "invalid choice"),
    (["--teacher=nothing.pt"], "no file nothing.pt"), (["--protect-first", "--student=sparse"], "may not see")])
def test_a_users_mistake_is_one_line(in_tmp, capfd, argv, words):
    with pytest.raises(SystemExit) as stop:
        dtm.main(argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error


def test_official_preset_names_its_mistakes():
    cfg = common.parse_config(dtm.Config, dtm.PRESETS, ["--data=imagenet", "--preset=official"])
    assert (cfg.schedule, cfg.protect_first, cfg.split, cfg.average, cfg.loss, cfg.beta, cfg.morphs, cfg.most_rounds) == \
        ("official", True, "alternating", "size", "smooth_l1", 2.0, 2, 14)
    assert (cfg.teacher, cfg.teacher_feature, cfg.teacher_norm, cfg.normalize, int(cfg.mask_ratio * 196)) == ("clip", "proj", "student", "none", 75)
    for teacher, feature in (("self", "post"), ("dino", "post"), ("hog", "post"), ("clip-large", "proj"), ("x.pt", "post")):
        for data in ("imagenet", "cifar10", "somewhere"):
            assert common.parse_config(dtm.Config, dtm.PRESETS, [f"--data={data}", f"--teacher={teacher}"]).teacher_feature == feature
    paper = common.parse_config(dtm.Config, dtm.PRESETS, ["--data=imagenet"])
    assert (paper.schedule, paper.protect_first, paper.teacher_norm) == ("exact", False, "own")
