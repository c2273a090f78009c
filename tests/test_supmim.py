"""supmim.py: the supervised baseline bit for bit, what reaches what, codes, inference, and whole runs."""

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
from test_train import checkpoint, close, moments, photos, same, weights     # noqa: F401, photos is a fixture

SMALL = dict(image_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, decoder_embed_dim=8, decoder_depth=1,
             decoder_num_heads=2, classes=5)
HEAD = {"head.weight", "head.bias"}


def pictures(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reaches(loss, model):
    """Names of the parameters that get a gradient of the loss other than zero."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True, allow_unused=True)
    return {name for name, gradient in zip(named, found) if gradient.abs().max() > 0}


class Plain(nn.Module):
    """A classifier written out from the definition of a ViT, with torch's own modules and nothing of supmim.py."""

    def __init__(self, depth=3, classes=5):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 64, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True)
                                    for _ in range(depth))
        self.patch_embed, self.norm, self.head = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16, eps=1e-6), nn.Linear(16, classes)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 17, 16), requires_grad=False)

    def load(self, state):
        """Weights in timm's names, all of them and no other."""
        for ours, theirs in {"attn.qkv.weight": "self_attn.in_proj_weight", "attn.qkv.bias": "self_attn.in_proj_bias",
                             "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2",
                             "patch_embed.proj": "patch_embed"}.items():
            state = {name.replace(ours, theirs): value for name, value in state.items()}
        self.load_state_dict(state)
        return self

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 1:].mean(dim=1))


def inference(state):
    return {name: value for name, value in state.items() if not name.startswith(("decoder", "mask_token"))}


# ------------------------------------------------------------------------------------------------- inference
def test_classifier_is_a_plain_vit():
    model = fill(SupMIM(**SMALL), skip=("pos_embed", "decoder_pos_embed")).eval()
    plain, images = Plain().load(inference(model.state_dict())), pictures(4, 3, 16, 16)
    torch.testing.assert_close(model.classify(images), plain(images), rtol=1e-5, atol=1e-6)
    kept = [p.numel() for name, p in model.named_parameters() if not name.startswith(("decoder", "mask_token"))]
    assert sum(kept) == sum(p.numel() for p in plain.parameters())
    counted = []
    for network in (model.classify, plain.train()):      # eval() would take torch's fused path, which is not counted
        with FlopCounterMode(display=False) as counter:
            network(images)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


def test_sizes_of_the_papers_model():
    with torch.device("meta"):
        model = supmim.build(supmim.Config(**supmim.PRESETS["imagenet"]), classes=1000)
    kept = sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("decoder", "mask_token")) and name != "pos_embed")
    D, P = 768, 14                                       # blocks, patches, class token, norm, head
    assert kept == 12 * (12 * D * D + 13 * D) + (3 * P * P + 1) * D + D + 2 * D + 1000 * D + 1000 and model.grid == (16, 16)


# ---------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("changes", [{}, dict(mask_tokens="encoder"), dict(codes=7), dict(pool="cls")])
def test_both_losses_reach_the_encoder(changes):
    model = SupMIM(**SMALL, **changes)
    codes = torch.randint(0, 7, (4, 16), generator=torch.Generator().manual_seed(0))
    _, class_loss, masked_loss, _ = model(pictures(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]), torch.rand(4, 16), target_codes=codes)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    decoder = {name for name in trained if name.startswith(("decoder", "mask_token"))}
    assert HEAD <= reaches(class_loss, model) and not reaches(class_loss, model) & decoder
    assert not HEAD & reaches(masked_loss, model) and decoder <= reaches(masked_loss, model)
    for loss in (class_loss, masked_loss):
        assert trained - decoder - HEAD <= reaches(loss, model)


@pytest.mark.parametrize("mask_tokens", ["decoder", "encoder"])
@pytest.mark.parametrize("ratio, hidden_count", [(0.5, 8), (0.75, 12), (0.3, 5)])
def test_hidden_patches_are_hidden(mask_tokens, ratio, hidden_count):
    model = SupMIM(**SMALL, mask_tokens=mask_tokens, mask_ratio=ratio)
    images, noise = pictures(3, 3, 16, 16), torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    patches = supmim.patchify(images, 4)
    visible, prediction, hidden = model.predict_masked(patches, noise)
    assert hidden.shape == (3, hidden_count) and visible.shape[1] == 1 + 16 - hidden_count and prediction.shape == (3, hidden_count, 48)
    for where, changes in ((hidden, False), (noise.argsort(1)[:, :1], True)):
        other = patches.scatter(1, where.unsqueeze(-1).expand(-1, -1, 48), 9.0)
        assert torch.equal(model.predict_masked(other, noise)[1], prediction) != changes


def test_masked_pass_is_maes():
    """With mask tokens in the decoder: the same weights, pictures and masks give MAE's loss."""
    model = SupMIM(**SMALL)
    other = mae.MAE(**{name: value for name, value in SMALL.items() if name != "classes"}, mask_ratio=0.5)
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name not in HEAD})
    images, noise = pictures(4, 3, 16, 16), torch.rand(4, 16)
    assert torch.equal(model(images, torch.zeros(4, dtype=torch.long), noise)[2], other(images, noise)[0])


def test_loss_is_the_sum_and_zero_predictions_score_as_they_must():
    model, images, labels = SupMIM(**SMALL, mim_weight=0.3, smoothing=0.1), pictures(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    for p in (*model.head.parameters(), *model.decoder_pred.parameters()):
        nn.init.zeros_(p)
    loss, class_loss, masked_loss, logits = model(images, labels, torch.rand(4, 16))
    assert class_loss.item() == pytest.approx(torch.tensor(5.0).log().item(), rel=1e-6) and logits.abs().max() == 0
    assert masked_loss.item() == pytest.approx(47 / 48, rel=1e-4)              # unbiased variance: (n - 1) / n
    assert loss.item() == pytest.approx((class_loss + 0.3 * masked_loss).item(), rel=1e-6)
    model = SupMIM(**SMALL, codes=7)
    nn.init.zeros_(model.decoder_pred.weight)
    masked_loss = model(images, labels, torch.rand(4, 16), target_codes=torch.zeros(4, 16, dtype=torch.long))[2]
    assert masked_loss.item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6)


def test_mixed_pictures_are_classified_and_not_masked():
    model, images, mixed = SupMIM(**SMALL), pictures(4, 3, 16, 16), pictures(4, 3, 16, 16, seed=1)
    labels, noise = torch.rand(4, 5).softmax(1), torch.rand(4, 16)
    plain, with_mix = model(images, labels, noise), model(images, labels, noise, mixed)
    assert torch.equal(plain[2], with_mix[2]) and torch.equal(with_mix[3], model.classify(mixed))
    assert with_mix[1].item() == pytest.approx(-(labels * with_mix[3].log_softmax(1)).sum(1).mean().item(), rel=1e-5)


def test_one_pass_classifies_what_is_visible():
    model, images, noise = SupMIM(**SMALL, passes="one"), pictures(4, 3, 16, 16), torch.rand(4, 16)
    mixed, labels = pictures(4, 3, 16, 16, seed=1), torch.zeros(4, dtype=torch.long)
    kept, hidden = supmim.random_masking(noise, 0.5)
    visible = model.forward_features(supmim.patchify(images, 4), kept)
    logits = model(images, labels, noise)[3]
    assert torch.equal(logits, model.head(visible[:, 1:].mean(1)))
    other = supmim.patchify(images, 4).scatter(1, hidden.unsqueeze(-1).expand(-1, -1, 48), 9.0)
    assert torch.equal(model(supmim.unpatchify(other, 4, (4, 4)), labels, noise)[3], logits)
    assert torch.equal(model(images, labels, noise, mixed)[0], model(mixed, labels, noise)[0])  # one pass: what is mixed is masked


def test_mask_tokens_in_the_encoder_stand_where_the_hidden_patches_are():
    """Of one patch repeated, with a mask token that is its embedding, the masked pass is that of the whole picture."""
    model, noise = SupMIM(**SMALL, mask_tokens="encoder"), torch.rand(3, 16)
    patch = pictures(1, 1, 48)
    with torch.no_grad():
        model.mask_token.copy_(model.patch_embed(patch))
    patches, (kept, hidden) = patch.expand(3, 16, 48), supmim.random_masking(noise, 0.5)
    place = F.pad(torch.cat([kept, hidden], dim=1) + 1, (1, 0))
    torch.testing.assert_close(model.encode_masked(patches, kept, hidden), supmim.gather_tokens(model.forward_features(patches), place))


@pytest.mark.parametrize("changes", [{}, dict(codes=7), dict(passes="one", mask_tokens="encoder")])
def test_bf16_and_one_graph(changes):
    """Under bf16 the losses are fp32 and every parameter gets a gradient; compiling finds one graph."""
    model, codes = SupMIM(**SMALL, **changes), torch.zeros(4, 16, dtype=torch.long)
    given = pictures(4, 3, 16, 16), torch.arange(4), torch.rand(4, 16), None, codes
    with torch.autocast("cpu", torch.bfloat16):
        loss, *both, _ = model(*given)
    loss.backward()
    assert {loss.dtype, *(x.dtype for x in both)} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    found = torch._dynamo.explain(model)(*given)
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    torch._dynamo.reset()


@pytest.mark.parametrize("passes", ["one", "two"])
def test_which_pictures_are_mixed(small, monkeypatch, passes):
    met, forward = [], SupMIM.forward
    monkeypatch.setattr(SupMIM, "forward", lambda model, images, labels, noise, mixed, codes:
                        met.append((images, labels, mixed, codes)) or forward(model, images, labels, noise, mixed, codes))
    monkeypatch.setattr(supmim, "nearest_code", lambda patches, centres: (patches[..., 0] > 0).long())
    supmim.train(tiny(output="run", passes=passes, mixup=1.0, max_steps=2, target="kmeans", codes=8, norm_pix=False))
    assert len(met) == 2
    for images, labels, mixed, codes in met:             # codes: those of the pictures that are masked
        assert labels.shape == (10, 2) and not torch.equal(images, mixed)
        assert torch.equal(codes, (supmim.patchify(images if passes == "two" else mixed, 4)[..., 0] > 0).long())


# ----------------------------------------------------------------------------------------------------- codes
def test_codes_are_those_of_the_nearest_centre():
    x, centres = pictures(50, 6), pictures(9, 6, seed=1)
    brute = [min(range(9), key=lambda k: sum((a - b) ** 2 for a, b in zip(row.tolist(), centres[k].tolist()))) for row in x]
    assert nearest_code(x, centres).tolist() == brute


def test_kmeans_finds_clusters_and_improves():
    generator = torch.Generator().manual_seed(0)
    true = 10 * torch.randn(4, 6, generator=generator)
    x = (true.unsqueeze(1) + 0.1 * torch.randn(4, 100, 6, generator=generator)).flatten(0, 1)
    cost = lambda rounds, codes: (x - (c := kmeans(x, codes, 1, rounds))[nearest_code(x, c)]).square().sum().item()
    costs = [cost(rounds, 8) for rounds in range(6)]
    assert all(b <= a * (1 + 1e-5) for a, b in zip(costs, costs[1:])) and costs[-1] < 0.9 * costs[0]
    centres = kmeans(x, 8, 1)
    assert (torch.cdist(true, centres).min(1).values < 1).all()                 # 8 starts meet each of 4 clusters
    near = nearest_code(x, centres)                      # it has come to rest: each is the mean of what is nearest
    means = torch.stack([x[near == code].mean(dim=0) for code in range(8)])
    torch.testing.assert_close(centres, means, rtol=1e-4, atol=1e-4)
    assert torch.equal(centres, kmeans(x, 8, 1)) and not torch.equal(centres, kmeans(x, 8, 2))
    doubled = kmeans(torch.cat([x[:3], x[:3]]), 6, 0)    # twins: one of each pair stays without patches, and finite
    assert (torch.cdist(doubled, x[:3]).min(dim=1).values < 1e-3).all()        # where it began, not at 0
    with pytest.raises(common.UserError, match="3 patches cannot make 4 codes"):
        kmeans(x[:3], 4, 0)


# ------------------------------------------------------------------------------------------------- whole runs
TINY = dict(data="photos", image_size=16, decoder_embed_dim=16, shots=0, crop_scale=0.5, epochs=3, batch_size=10,
            warmup_epochs=1.0, eval_every=2)             # 40 photos: 4 steps an epoch


@pytest.fixture
def small(photos, monkeypatch):
    """photos, a smaller model, and a line of metrics for every step."""
    monkeypatch.setitem(supmim.SIZES, "micro", (16, 2, 2))
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def tiny(**changes):
    return supmim.Config(**TINY | changes)


def read(run):
    return [json.loads(line) for line in open(f"{run}/metrics.jsonl")]


def test_without_the_masked_loss_it_is_the_plain_classifier(small):
    """Five steps of a loop written out here, mixing and drop path included, give the weights of a
    run: also after the test images were scored, without drop path, at the first epoch's end."""
    cfg = tiny(output="run", mim_weight=0.0, max_steps=5, mixup=0.8, smoothing=0.1, randaugment=5,
               drop_path=0.5, eval_every=1)
    supmim.train(cfg)
    assert not Path("run/reconstruction.png").exists()
    model = supmim.build(cfg, 2)
    kept = [p for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name.startswith(("decoder", "mask_token"))]
    groups = [{"params": [p for p in kept if (p.ndim > 1) == matrix], "weight_decay": 0.05 * matrix} for matrix in (True, False)]
    optimizer, mix = torch.optim.AdamW(groups, fused=True), data.mixing(0.8, 0.0, 2)
    train = data.open_data("photos", "").train
    train.transform = data.augment(16, 0.5, randaugment=5)
    for step, batch in enumerate(data.BatchSampler(cfg, 40, 0, 5)):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, 4, 12, 0.01 * 10 / 256)
        torch.manual_seed(common.derive_seed(0, step, 0, 0, 1))
        images, labels, _ = zip(*(train[key] for key in batch))
        images, labels = mix(data.to_device(torch.stack(images), torch.device("cpu")), torch.tensor(labels))
        F.cross_entropy(model.head(model.encode(images)[:, 1:].mean(dim=1)), labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights("run"), model.state_dict())


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@pytest.mark.parametrize("target, pool, shots", [("pixels", "mean", 0), ("kmeans", "cls", 12)])
def test_recipe(small, target, pool, shots):
    """Five steps of a loop written out end with the same weights, codes and logged losses: both
    losses, mixing, drop path, scores in between, and the codes' centres."""
    supmim.train(tiny(output="run", target=target, codes=8, pool=pool, shots=shots, mim_weight=2.0,
                      drop_path=0.5, randaugment=5, mixup=0.8, cutmix=1.0, smoothing=0.1, epochs=4,
                      warmup_epochs=0.75, base_lr=0.05, weight_decay=2.0, eval_every=1, max_steps=5))
    torch.manual_seed(0)
    codes = 8 if target == "kmeans" else 0
    model = SupMIM(16, 4, 16, 2, 2, 16, 1, 2, classes=2, codes=codes, drop_path=0.5)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert not {"pos_embed", "decoder_pos_embed"} & {n for n, _ in trained}
    groups = [{"params": [p for _, p in trained if p.ndim > 1], "weight_decay": 2.0},
              {"params": [p for _, p in trained if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    train = data.open_data("photos", "").train
    random = np.random.RandomState(0)                    # which images have labels
    rows = [random.permutation(np.flatnonzero(train.labels == label)) for label in (0, 1)]
    rows = np.sort(np.concatenate([of_class[:shots or None] for of_class in rows]))
    labelled = data.ImageDataset(train.source[rows], train.labels[rows])
    crops = labelled.with_transform(data.augment(16, 0.5, randaugment=5))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    bicubic = v2.InterpolationMode.BICUBIC
    whole = [v2.functional.resize(labelled.read(i), [18], bicubic) for i in range(len(rows))]
    whole = torch.stack([v2.functional.center_crop(image, [16]) for image in whole])

    def targets(images):
        """Normalised patches (B, N, 48)."""
        x = images.view(-1, 3, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return (x - x.mean(dim=2, keepdim=True)) / (x.var(dim=2, keepdim=True) + 1e-6).sqrt()

    if codes:
        centres = kmeans(targets((whole / 255 - mean) / std).flatten(0, 1), 8, 0)
    mixes = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=2), v2.CutMix(alpha=1.0, num_classes=2)])
    per_epoch = len(rows) // 10
    warmup, total = 0.75 * per_epoch, 4 * per_epoch
    losses = []
    for step in range(5):
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        batch = [crops[epoch, i] for i in order[10 * position:10 * position + 10]]
        images = (torch.stack([image for image, _, _ in batch]) / 255 - mean) / std
        noise = torch.rand(10, 16, generator=torch.Generator().manual_seed(seed_of(0, step)))
        lr = 0.05 * 10 / 256
        if step < warmup:
            lr *= step / warmup
        else:
            lr *= (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_of(0, step, 0, 0, 1))
        mixed, labels = mixes(images, torch.tensor([label for _, label, _ in batch]))
        tokens = model.encode(mixed)
        logits = model.head(tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1))
        labels = 0.9 * labels + 0.1 / 2                  # smoothed, (10, 2)
        class_loss = -(labels * logits.log_softmax(dim=1)).sum(dim=1).mean()
        _, prediction, masked = model.predict_masked(supmim.patchify(images, 4), noise)
        assert torch.equal(masked, noise.argsort(dim=1)[:, 8:])                # half of 16
        target = torch.stack([of_image[m] for of_image, m in zip(targets(images), masked)])
        if codes:
            code = torch.cdist(target, centres.expand(10, 8, 48)).argmin(dim=2)
            masked_loss = -prediction.log_softmax(dim=2).gather(2, code.unsqueeze(2)).mean()
        else:
            masked_loss = (prediction - target).square().mean()
        losses.append([class_loss.item(), masked_loss.item()])
        (class_loss + 2.0 * masked_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    close(model.state_dict(), weights("run"))
    logged = [line for line in read("run") if "class_loss" in line]
    assert len(logged) == 5 // per_epoch                 # one epoch, or two
    for epoch, line in enumerate(logged):
        expected = np.mean(losses[epoch * per_epoch:(epoch + 1) * per_epoch], axis=0)
        assert [line["class_loss"], line["masked_loss"]] == pytest.approx(expected, rel=1e-5)
    if codes:
        torch.testing.assert_close(checkpoint("run")["tensors"]["centres"], centres)


def test_nothing_is_dropped_while_images_are_scored(small, monkeypatch):
    """Scores, features and the image are of the model without drop path: made twice, they agree.
    In training the encoder drops, the decoder does not."""
    torch.manual_seed(0)
    model = SupMIM(**SMALL, drop_path=0.9)
    patches, noise = pictures(4, 16, 48), torch.rand(4, 16)
    for training in (True, False):
        model.train(training)
        made = [model.forward_features(patches) for _ in range(2)]
        assert torch.equal(*made) != training
        made = [model.decode(made[0], *supmim.random_masking(noise, 0.0)) for _ in range(2)]
        assert torch.equal(*made)
    features, save, calls = data.features, data.save_image_grid, []

    def twice(encode, *args, **options):
        def encode_twice(images):
            found = encode(images)
            assert torch.equal(found, encode(images))
            calls.append(1)
            return found
        return features(encode_twice, *args, **options)

    monkeypatch.setattr(data, "features", twice)
    rows_of = []
    monkeypatch.setattr(data, "save_image_grid", lambda path, rows: rows_of.append(rows) or save(path, rows))
    supmim.train(tiny(output="run", drop_path=0.9, base_lr=0.0))
    assert len(calls) > 6 and len(rows_of) == 4          # after each epoch and at the end
    first, *others = [torch.cat(list(rows.values())) for rows in rows_of]
    assert all(torch.equal(first, other) for other in others)


def test_weight_of_the_masked_loss_changes_no_random_number(small):
    """With a weight too small to matter the classifier becomes that of the baseline, drops and mixing included."""
    for name, weight in (("none", 0.0), ("tiny", 1e-30)):
        supmim.train(tiny(output=name, mim_weight=weight, mixup=0.8, drop_path=0.5, randaugment=5, max_steps=4))
    assert same(inference(weights("none")), inference(weights("tiny")))
    assert [line["masked_loss"] > 0 for run in ("none", "tiny") for line in read(run) if "masked_loss" in line] == [False, True]


@pytest.mark.parametrize("changes", [dict(drop_path=0.3, mixup=0.5, cutmix=1.0), dict(target="kmeans", codes=8, mask_tokens="encoder"),
                                     dict(passes="one", pool="cls", shots=10)])
def test_resumed_run_equals_an_undisturbed_one(small, changes):
    whole = supmim.train(tiny(output="whole", **changes))
    for steps in (2, 5, 8, 0, 0):                        # the last one finds a run that has ended
        parts = supmim.train(tiny(output="parts", max_steps=steps, **changes))
    assert same(weights("whole"), weights("parts")) and whole == parts
    lines, also = ([line for line in read(run) if "masked_loss" in line] for run in ("whole", "parts"))
    assert [line["masked_loss"] for line in lines] == pytest.approx([line["masked_loss"] for line in also], rel=1e-6)
    lines = read("whole")
    ends = [line["step"] for line in lines if "masked_loss" in line]
    per_epoch = (20 if "shots" in changes else 40) // 10
    assert ends == [per_epoch * e for e in (1, 2, 3)] and [line["step"] for line in lines if "top1" in line] == [ends[1], ends[2], ends[2]]
    assert Image.open("whole/reconstruction.png").size[0] > 8 * 90 and {"top1", "top5", "knn_trained", "linear_trained"} <= lines[-1].keys()


def test_a_tokenizer_of_ones_own(small, capsys):
    Path("bright.py").write_text("""def tokenizer(device):
    def codes(images):                                   # how bright a patch is, in eight steps
        assert 0 <= images.min() and images.max() <= 1
        patches = images.mean(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(3, 4))
        return (patches * 8).clamp(max=7).long().flatten(1)
    return codes, 8
""")
    supmim.train(tiny(output="run", target="bright.py", epochs=12, base_lr=0.1))
    losses = [line["masked_loss"] for line in read("run") if "masked_loss" in line]
    assert weights("run")["decoder_pred.weight"].shape == (8, 16) and losses[-1] < 0.9 * losses[0]
    for text in ("x = 1", "def tokenizer(device): return lambda images: images.long(), 8", "def tokenizer(device): return lambda images: 1 / 0, 8",
                 "def tokenizer(device): return lambda images: images[:, 0, ::4, ::4].flatten(1), 8",
                 "def tokenizer(device): return lambda images: images[:, 0, ::4, ::4].flatten(1).ceil().long() + 7, 8"):
        Path("bad.py").write_text(text)
        with pytest.raises(common.UserError, match="no Python file with tokenizer|from 0 to below 8 are needed"):
            supmim.train(tiny(output="bad", target="bad.py"))
    Path("bright.py").rename("moved.py")                 # what was trained does not need it
    assert evaluate.main(["finetune", "--eval", "--checkpoint", "run/classifier.pt", "--data", "photos"])["top1"] >= 0


def test_feature_and_voters_of_the_scores(small, monkeypatch):
    """The token that is classified, of the trained and of the untrained model; the labels are those
    that were trained on, and no more."""
    met = []
    monkeypatch.setattr(data, "score_encoders", lambda *given: met.append(given) or {"knn_trained": 0.0})
    for pool in ("cls", "mean"):
        met.clear()
        supmim.train(tiny(output=pool, pool=pool, shots=10, max_steps=2))
        encoders, splits, *_ = met[0]
        assert len(splits.train) == 20 and len(splits.test) == 10
        untrained = supmim.build(tiny(pool=pool), 2)
        trained = supmim.build(tiny(pool=pool), 2)
        trained.load_state_dict(weights(pool))
        images = pictures(2, 3, 16, 16)
        for name, model in (("trained", trained), ("untrained", untrained)):
            tokens = model.encode(images)
            expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
            assert torch.equal(encoders[name](images), expected)


@pytest.mark.parametrize("codes", ["pixels", "centres", "tokenizer"])
def test_what_the_image_shows(monkeypatch, codes):
    rows = {}
    monkeypatch.setattr(data, "save_image_grid", lambda path, found: rows.update(found))
    torch.manual_seed(0)
    model = SupMIM(**SMALL, codes=0 if codes == "pixels" else 7)
    images, noise, centres = pictures(3, 3, 16, 16), torch.rand(3, 16), pictures(7, 48)
    target_codes = torch.randint(0, 7, (3, 16))
    supmim.save_visualization(model, images, noise, target_codes, centres if codes == "centres" else None, None)
    visible, masked = noise.argsort(dim=1).split(8, dim=1)
    pick = lambda picture, index: supmim.gather_tokens(supmim.patchify(picture, 4), index)
    original, black, alone, filled = rows.values()
    prediction = model.predict_masked(supmim.patchify(images, 4), noise)[1]
    truth = pick(images, masked)
    if codes == "tokenizer":                             # the brightest value where the code is right
        right = prediction.argmax(dim=2) == target_codes.gather(1, masked)
        assert 0 < right.sum() < right.numel()
        prediction = torch.where(right.unsqueeze(2), truth.max(), truth.min()).expand_as(truth)
    else:
        if codes == "centres":
            prediction = centres[prediction.argmax(dim=2)]
        prediction = truth.mean(2, True) + prediction * (truth.var(2, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(original, images) and (pick(black, masked) == 0).all() and (pick(alone, visible) == 0).all()
    for picture in (black, filled):
        assert torch.equal(pick(picture, visible), pick(images, visible))
    for picture in (alone, filled):
        torch.testing.assert_close(pick(picture, masked), prediction)


def test_export_is_a_plain_classifier(small):
    found = supmim.train(tiny(output="run"))
    saved = torch.load("run/classifier.pt", weights_only=True)
    plain, images = Plain(depth=2, classes=2).load(saved["model"]), pictures(4, 3, 16, 16)     # strictly
    sizes = {name: saved["config"].pop(name) for name in ("embed_dim", "depth", "num_heads")}
    cfg = supmim.Config(**saved["config"])
    assert vars(cfg) == saved["config"] | sizes and sizes == {"embed_dim": 16, "depth": 2, "num_heads": 2}
    model = supmim.build(cfg, 2)
    model.load_state_dict(weights("run"))
    torch.testing.assert_close(plain(images), model.classify(images), rtol=1e-4, atol=1e-5)
    encoder = torch.load("run/encoder.pt", weights_only=True)
    assert set(saved["model"]) - set(encoder) == HEAD
    for file in ("classifier.pt", "checkpoint.pt"):      # evaluate.py scores it as the run itself did
        assert evaluate.main(["finetune", "--eval", "--checkpoint", f"run/{file}", "--data", "photos"])["top1"] == found["top1"]
    tuned = evaluate.main(["finetune", "--checkpoint", "run/classifier.pt", "--data", "photos", "--pool", "cls", "--epochs", "1",
                           "--batch-size", "10", "--workers", "0", "--output", "tuned", "--base-lr", "0.1"])
    config = torch.load("tuned/finetuned.pt", weights_only=True)["config"]
    assert config["pool"] == "cls" and tuned["top1"] == evaluate.main(
        ["finetune", "--eval", "--checkpoint", "tuned/finetuned.pt", "--data", "photos"])["top1"]


def same_losses(one, two):
    """The means of both losses that are logged after each epoch."""
    found = [[(line["class_loss"], line["masked_loss"]) for line in read(run) if "class_loss" in line]
             for run in (one, two)]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert checkpoint(one)["epoch_losses"] == pytest.approx(checkpoint(two)["epoch_losses"], rel=1e-5)


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
    one = TINY | dict(batch_size=12, max_steps=5)        # 3 steps an epoch
    runs = {"plain": one, "codes": one | dict(accumulate=2, target="kmeans", codes=8, shots=19)}
    Path("both.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import json, torch
import common, supmim
common.LOG_EVERY = 1
supmim.SIZES["micro"] = (16, 2, 2)
forward, seeds = supmim.SupMIM.forward, []
supmim.SupMIM.forward = lambda *given: seeds.append(torch.initial_seed()) or forward(*given)
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
        passes = [(step, i) for count in (1, 2) for step in range(5) for i in range(count)]
        expected = [seed_of(0, step, i, rank, 1) for step, i in passes]
        assert json.load(open(f"seeds{rank}.json")) == expected
    for name, settings in runs.items():
        supmim.train(supmim.Config(output=f"{name}1", **settings))
        close(weights(f"{name}1"), weights(f"{name}2"))
        close(moments(f"{name}1"), moments(f"{name}2"))
        first, second = (checkpoint(f"{name}{processes}") for processes in (1, 2))
        assert first["epoch_losses"] == pytest.approx(second["epoch_losses"], rel=1e-5)
        for key, value in read(f"{name}1")[-1].items():
            assert read(f"{name}2")[-1][key] == pytest.approx(value, rel=1e-5), key


def test_short_run_learns(in_tmp):
    found = supmim.main(["--epochs=4", "--warmup-epochs=1", "--mask-ratio=0.75", "--max-steps=60", "--shots=125", "--mim-weight=1"])
    losses = [(line["class_loss"], line["masked_loss"]) for line in read("runs/supmim-shapes") if "class_loss" in line]
    assert found["step"] == 60 and all(late < early for early, late in zip(losses[0], losses[-1]))
    encoder, extra, _ = evaluate.load_encoder(evaluate.Config(protocol="segment", checkpoint="runs/supmim-shapes/classifier.pt"))
    assert encoder.encode(torch.randn(1, 3, 32, 32)).shape == (1, 65, 64) and set(extra) == HEAD


@pytest.mark.parametrize("argv, words", [
    (["--target=nothing.py"], "no file nothing.py"), (["--mim-weight=-1"], "mim_weight is -1"), (["--passes=one", "--mim-weight=0"], "--passes one"),
    (["--mask-ratio=1"], "nothing to see"), (["--drop-path=1"], "drop_path is 1"), (["--shots=5", "--batch-size=64"], "batch"),
    (["--masc-ratio=0.5"], "did you mean --mask-ratio?")])
def test_a_users_mistake_is_one_line(in_tmp, capfd, argv, words):
    with pytest.raises(SystemExit) as stop:
        supmim.main(argv)
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error


def test_pictures_without_labels_are_refused(in_tmp):
    Path("flat").mkdir()
    Image.new("RGB", (20, 20)).save("flat/a.png")
    with pytest.raises(common.UserError, match="has no labelled images to train"):
        supmim.train(supmim.Config(data="flat"))
