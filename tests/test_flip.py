"""flip.py against published figures, closed forms and its own invariants; and whole runs.

Its data and tokenizers are tested in test_flip_data.py."""

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import common
import data
import evaluate
import flip
import mae
from conftest import ROOT, draw, golden
from flip import FLIP, Config, Tokenizer, contrastive_loss, multiplications
from test_train import checkpoint, close, moments, photos, same, weights     # noqa: F401, a fixture

FIGURES = golden("clip")
SIZE = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, text_width=12,
            text_depth=2, text_heads=2, proj_dim=8, vocab_size=258, text_length=10)  # 16 patches


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = FLIP(**SIZE | changes)
    with torch.no_grad():                                # at first nearly all features are alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batch(count=4, seed=0):
    """Images (count, 3, 16, 16), ids (count, 10) with padding from 6 on, noise (count, 16)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    noise = torch.rand(count, 16, generator=generator)
    ids = torch.randint(1, 258, (count, 10), generator=generator)
    ids[:, 6:] = 0
    return images, ids, noise


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_errors(gradients, truth):
    errors = {}
    for name, value in truth.items():
        size = value.norm().clamp(min=1e-6)
        errors[name] = ((gradients[name] - value).norm() / size).item()
    return errors


# ------------------------------------------------------------------------------ published figures
def clip_blocks(x, state, prefix, layers, heads, causal):
    """CLIP's blocks by hand: LayerNorm eps 1e-5, QuickGELU."""
    B, T, D = x.shape
    for i in range(layers):
        def tensor(name):
            return state[f"{prefix}transformer.resblocks.{i}.{name}"]
        y = F.layer_norm(x, (D,), tensor("ln_1.weight"), tensor("ln_1.bias"))
        qkv = F.linear(y, tensor("attn.in_proj_weight"), tensor("attn.in_proj_bias"))
        q, k, v = qkv.view(B, T, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, D)
        x = x + F.linear(y, tensor("attn.out_proj.weight"), tensor("attn.out_proj.bias"))
        y = F.layer_norm(x, (D,), tensor("ln_2.weight"), tensor("ln_2.bias"))
        y = F.linear(y, tensor("mlp.c_fc.weight"), tensor("mlp.c_fc.bias"))
        y = y * torch.sigmoid(1.702 * y)
        x = x + F.linear(y, tensor("mlp.c_proj.weight"), tensor("mlp.c_proj.bias"))
    return x


def clip_features():
    """Image and text features (5, 32) of the CLIP of the golden figures, not normalised."""
    c = FIGURES["config"]
    state = {}
    for name, shape in FIGURES["state_dict"].items():
        state[name] = 0.15 * draw(name, *shape)
        if len(shape) == 1 and name.endswith("weight"):
            state[name] += 1
    images = draw("clip/images", c["batch"], 3, c["image_size"], c["image_size"])
    width = c["vision_width"]
    x = F.conv2d(images, state["visual.conv1.weight"], stride=c["patch_size"])
    x = x.flatten(2).transpose(1, 2)
    cls = state["visual.class_embedding"].expand(c["batch"], 1, -1)
    x = torch.cat([cls, x], dim=1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (width,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = clip_blocks(x, state, "visual.", c["vision_layers"], c["vision_heads"], causal=False)
    cls = x[:, 0]
    cls = F.layer_norm(cls, (width,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    image = cls @ state["visual.proj"]
    ids = torch.tensor(FIGURES["tokens"])
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = clip_blocks(x, state, "", c["text_layers"], c["text_heads"], causal=True)
    x = x[torch.arange(len(ids)), ids.argmax(dim=1)]     # the end token, whose id is the largest
    x = F.layer_norm(x, (c["text_width"],), state["ln_final.weight"], state["ln_final.bias"])
    return image, x @ state["text_projection"]


def near(value, name):
    expected = torch.tensor(FIGURES[name])
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=5e-6)


def test_golden_loss_and_logits():
    """CLIP's loss of CLIP's features: FLIP's is the same."""
    image, text = clip_features()
    near(image[0, :8], "image_features_row0_head")
    near(image.norm(), "image_features_norm")
    near(text[0, :8], "text_features_row0_head")
    near(text.norm(), "text_features_norm")
    image = F.normalize(image, dim=-1)
    text = F.normalize(text, dim=-1)
    scale = torch.tensor(2.5).exp()
    near((scale * image @ text.T)[0], "logits_per_image_row0")
    near(contrastive_loss(image, text, scale), "contrastive_loss")


@pytest.mark.parametrize("size, patch, image, text", [
    ("base", 16, 85.80, 53.47), ("large", 16, 303.30, 108.52), ("huge", 14, 630.76, 333.60)])
def test_size_of_the_papers_models(size, patch, image, text):
    """Table 9 of the paper, recounted, in millions of parameters."""
    with torch.device("meta"):
        model = FLIP(224, patch, *flip.SIZES[size], 30523, 32)

    def count(*prefixes):
        named = model.named_parameters()
        return sum(p.numel() for name, p in named if name.startswith(prefixes)) / 1e6

    projections = count("image_proj", "text.proj")
    assert count("text.") - count("text.proj") == pytest.approx(text, abs=0.006)
    assert count("cls", "pos", "patch", "blocks", "norm") == pytest.approx(image, abs=0.006)
    assert count("") == pytest.approx(image + text + projections, abs=0.01)


@pytest.mark.parametrize("size, patch, half, quarter", [
    ("large", 16, 0.5175, 0.2817), ("base", 16, 0.528, 0.300), ("huge", 14, 0.522, 0.289)])
def test_share_of_the_multiplications(size, patch, half, quarter):
    """The paper counts the projection of all patches; here the masked ones are left out there."""
    cfg = Config(model=size, image_size=224, patch_size=patch, text_length=32)
    whole = multiplications(cfg, 0)
    for ratio, share in ((0.5, half), (0.75, quarter)):
        skipped = (224 // patch) ** 2 * ratio * 3 * patch ** 2 * cfg.embed_dim
        assert (multiplications(cfg, ratio) + skipped) / whole == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("ratio", [0, 0.5, 0.75])
def test_masked_patches_enter_no_matrix_product(monkeypatch, ratio):
    sizes = tuple(SIZE[field] for field in flip.SIZE_FIELDS)
    monkeypatch.setitem(flip.SIZES, "micro", sizes)
    cfg = Config(image_size=16, patch_size=4, text_length=10)
    with torch.device("meta"):
        model = FLIP(**SIZE, mask_ratio=ratio).to("meta")    # the position table is not
        images = torch.randn(3, 3, 16, 16)
        ids = torch.zeros(3, 10, dtype=torch.int64)
        noise = torch.rand(3, 16)
        with FlopCounterMode(display=False) as counter:
            model.embed(images, ids, noise)
    projections = 8 * (16 + 12)
    expected = 3 * 2 * (multiplications(cfg, ratio) + projections)
    assert counter.get_total_flops() == expected


# ------------------------------------------------------------------------------- the loss by hand
def test_loss_in_closed_form():
    eye = torch.eye(6)
    scale = torch.tensor(3.0)
    expected = math.log(math.exp(3) + 5) - 3
    assert contrastive_loss(eye, eye, scale).item() == pytest.approx(expected, rel=1e-6)
    alike = F.normalize(torch.ones(6, 4), dim=1)
    assert contrastive_loss(alike, alike, scale).item() == pytest.approx(math.log(6), rel=1e-6)


CASES = ((4, False, 1), (2, False, 1), (2, False, 2), (2, True, 1))      # see `process`


def process(rank, folder):
    """One of several processes: the loss and the gradients, averaged as in training, of its share
    of 8 pairs. For each case: how many processes, whether what is gathered comes without gradient,
    how many micro-batches."""
    torch.set_num_threads(1)
    for world, detached, micro_batches in CASES:
        if rank >= world:
            continue
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        name = f"{folder}/{world}-{detached}-{micro_batches}"
        honest = flip.Gather.backward
        if detached:
            flip.Gather.backward = staticmethod(lambda ctx, g: torch.zeros_like(g.chunk(2)[0]))
        dist.init_process_group("gloo", f"file://{name}.store", rank=rank, world_size=world)
        images, ids, noise = (x[rank::world] for x in batch(8))
        model = small().double()
        network = DistributedDataParallel(model)
        if micro_batches == 1:
            loss, *_ = network(images.double(), ids, noise)
            loss.backward()
        else:
            loss = in_parts(model, network, images, ids, noise, micro_batches)
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            torch.save((loss / world, gradients(model)), f"{name}.pt")
        dist.barrier()
        dist.destroy_process_group()
        flip.Gather.backward = honest


def in_parts(model, network, images, ids, noise, micro_batches):
    """flip.backward_in_parts in fp64, of images that are normalised already."""
    parts = list(zip(images.chunk(micro_batches), ids.chunk(micro_batches),
                     noise.chunk(micro_batches)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "to_device", lambda images, device: images.double())
        return flip.backward_in_parts(model, network, parts, torch.autocast("cpu", enabled=False))


def test_processes_equal_one(tmp_path):
    """Loss and every gradient; and not, if the features of the others came without gradient."""
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=process, args=(rank, str(tmp_path))) for rank in range(4)]
    for each in running:
        each.start()
    for each in running:
        each.join()
        assert each.exitcode == 0
    model = small().double()
    images, ids, noise = batch(8)
    loss, *_ = model(images.double(), ids, noise)
    loss.backward()
    truth = gradients(model)
    for world, detached, micro_batches in CASES:
        path = tmp_path / f"{world}-{detached}-{micro_batches}.pt"
        their_loss, theirs = torch.load(path, weights_only=True)
        assert abs(their_loss - loss) < 1e-12
        assert theirs.keys() == truth.keys() and "logit_scale" in theirs
        worst = max(relative_errors(theirs, truth).values())
        assert worst > 0.1 if detached else worst < 1e-6, (world, detached, micro_batches, worst)


@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_parts_equal_one_large_batch(micro_batches, monkeypatch):
    """--accumulate: all pairs are each other's negatives; the loss is computed once a step."""
    images, ids, noise = batch(6)
    whole = small().double()
    loss, *_ = whole(images.double(), ids, noise)
    loss.backward()
    calls = []

    def counted(image, text, scale):
        calls.append(len(image))
        return contrastive_loss(image, text, scale)

    monkeypatch.setattr(flip, "contrastive_loss", counted)
    model = small().double()
    part_loss = in_parts(model, model, images, ids, noise, micro_batches)
    assert calls == [6] and abs(part_loss.item() - loss.item()) < 1e-12
    assert gradients(model).keys() == gradients(whole).keys()
    assert max(relative_errors(gradients(model), gradients(whole)).values()) < 1e-8


def test_fp32_features_and_loss_under_bf16():
    images, ids, noise = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, image, text = small()(images, ids, noise)
    assert loss.dtype == image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------- masks and towers
def test_visible_patches_and_nothing_else():
    model = small(mask_ratio=0.75)
    images, ids, noise = batch()
    inputs = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images.requires_grad_()
    loss, image, _ = model(images, ids, noise)
    patches = flip.patchify(images, 4)
    embedded = model.patch_embed(patches) + model.pos_embed[:, 1:]
    visible = noise.argsort(dim=1)[:, :4]
    torch.testing.assert_close(inputs[0][:, 1:], flip.gather_tokens(embedded, visible))
    assert inputs[0].shape[1] == 5
    assert len({tuple(sorted(row)) for row in visible.tolist()}) > 1
    loss.backward()
    per_patch = flip.patchify(images.grad, 4).abs().sum(dim=-1)                # (B, N)
    masked = torch.ones(4, 16, dtype=torch.bool).scatter_(1, visible, False)
    assert (per_patch[masked] == 0).all() and (per_patch[~masked] > 0).all()
    model.encode_image(images)
    assert inputs[-1].shape[1] == 17                     # scoring sees everything
    model.mask_ratio = 0
    assert torch.equal(model(images, ids, noise)[1], model.encode_image(images))


@torch.no_grad()
def test_order_of_the_visible_does_not_matter():
    model = small()
    images, *_ = batch()
    patches = flip.patchify(images, 4)
    visible = torch.arange(8).expand(4, -1)
    shuffled = visible[:, torch.randperm(8)]
    first = model.pooled(model.forward_features(patches, visible))
    second = model.pooled(model.forward_features(patches, shuffled))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


@torch.no_grad()
def test_features_by_hand():
    """Images: the mean of all tokens, the class token's too. Texts: the first token, which attends
    to everything, padding too."""
    model = small()
    images, ids, _ = batch()
    mean = model.encode(images).mean(dim=1) @ model.image_proj.weight.T
    expected = mean / mean.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode_image(images), expected)
    x = model.text.token_embedding.weight[ids] + model.text.pos_embed
    for block in model.text.blocks:
        x = block(x)
    first = model.text.norm(x[:, 0]) @ model.text.proj.weight.T
    expected = first / first.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode_text(ids), expected)
    changed = ids.clone()
    changed[:, 9] = 7                                    # padding before
    assert not torch.equal(model.encode_text(ids), model.encode_text(changed))


def test_weights_at_the_start():
    """Released code: Xavier-uniform matrices, biases 0, embeddings N(0, 0.02); scale 1 / 0.07."""
    torch.manual_seed(0)
    model = FLIP(32, 4, 64, 1, 2, 48, 1, 2, 32, 258, 36)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith(("token_embedding.weight", "text.pos_embed", "cls_token")):
            assert value.std().item() == pytest.approx(0.02, rel=0.35), name
        elif value.ndim > 1 and name != "pos_embed":
            fan_out, fan_in = value.flatten(1).shape
            limit = math.sqrt(6 / (fan_in + fan_out))
            assert 0.95 * limit < value.abs().max().item() <= limit, name
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


# ------------------------------------------------------------------ zero-shot accuracy, retrieval
def test_recall_by_hand():
    hits = torch.zeros(4, 10, dtype=torch.bool)
    hits[0, [0, 7]] = True
    hits[1, 4] = True
    hits[2, 5] = True
    assert flip.recall(hits) == [25.0, 50.0, 75.0]


@torch.no_grad()
def test_class_features():
    model = small(text_length=12)
    tokenizer = Tokenizer("", 12)
    features = flip.class_features(model, [["a ring"], ["a bar", "the bar"]], tokenizer, "cpu")
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    one, two, three = model.encode_text(tokenizer.encode_batch(["a ring", "a bar", "the bar"]))
    torch.testing.assert_close(features, torch.stack([one, F.normalize(two + three, dim=0)]))


class KnownTowers:
    """Images 0, 1, 2 (black, gray, white) have the features e0, e1, e2; texts those of the digit at
    their end."""

    def encode_image(self, images):
        gray = images[:, 0, 0, 0] * 0.229 + 0.485
        return torch.eye(3)[(2 * gray).round().long()]

    def encode_text(self, ids):
        last = [row[row > 0][-1].item() for row in ids]
        return torch.eye(3)[[number - 1 - ord("0") for number in last]]


def test_score_by_hand():
    tokenizer = Tokenizer("", 12)
    shades = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    captions = [["a 1", "a 0"], ["a 2"], ["a 1"]]        # the second one alone is right
    retrieval = flip.Pairs(shades, captions, tokenizer, labels=np.arange(3))
    labelled = data.ImageDataset(shades[[0, 1, 2, 2, 1]], [0, 0, 2, 2, 0])     # three are right
    held_out = np.array([False, False, True])
    prompts = [["the 0", "a 0"], ["the 1"], ["the 2"]]
    nothing = data.Splits(None, None, None, [])
    source = flip.Source(nothing, retrieval, labelled, prompts, held_out)
    cfg = Config(image_size=16, patch_size=4)
    scores = flip.score(KnownTowers(), source, cfg, tokenizer, torch.device("cpu"))
    assert scores == pytest.approx({
        "zero_shot": 60, "zero_shot_top5": 100,
        "zero_shot_seen": 100 / 3, "zero_shot_held_out": 100,
        "image_to_text_1": 100 / 3, "image_to_text_5": 100, "image_to_text_10": 100,
        "text_to_image_1": 25, "text_to_image_5": 100, "text_to_image_10": 100})


def test_untrained_is_about_chance():
    cfg = Config(data="shapes", text_length=40)
    tokenizer = Tokenizer("", 40)
    source = flip.open_source(cfg, tokenizer)
    scores = flip.score(flip.build(cfg), source, cfg, tokenizer, torch.device("cpu"))
    assert scores["zero_shot"] < 6 and scores["zero_shot_top5"] < 20
    assert scores["image_to_text_1"] < 10


# ------------------------------------------------------------------------------------- whole runs
TINY = dict(data="photos", image_size=16, patch_size=4, text_length=30, batch_size=10, epochs=2,
            warmup_epochs=0.5)                           # 40 photos: 4 steps an epoch, 8 in all
TINY_SIZES = (16, 1, 2, 16, 1, 2, 8)


@pytest.fixture(autouse=True)
def tiny_models(request, monkeypatch):
    if "short_run" not in request.node.name:
        monkeypatch.setitem(flip.SIZES, "micro", TINY_SIZES)


def tiny(**changes):
    return Config(**TINY | changes)


def test_short_run_learns(in_tmp, monkeypatch):
    """A part of `python flip.py`, in smaller batches: colors first. Then scored once more."""
    monkeypatch.setattr(data, "score_encoders", lambda *_: {"unreadable": 0})    # slow, not FLIP's
    metrics = flip.main(["--batch-size=16", "--base-lr=0.016", "--epochs=1", "--warmup-epochs=0.3",
                         "--max-steps=170"])
    assert metrics["zero_shot_seen"] > 8 and metrics["image_to_text_5"] > 30
    assert metrics["loss"] < 2.2                         # ln 16 = 2.77 at the start
    assert Image.open("runs/flip-shapes/similarity.png").size[0] > 8 * 64
    again = flip.main(["--zero-shot=runs/flip-shapes/checkpoint.pt"])
    assert again == pytest.approx({name: metrics[name] for name in again}, abs=1e-3)
    assert set(again) >= {"zero_shot", "zero_shot_held_out", "text_to_image_10"}


def test_recipe(photos):
    """Five steps of a loop written out from table 10 of the paper end with the same weights."""
    flip.train(tiny(output="run", max_steps=5, crop_scale=0.5, weight_decay=2.0, base_lr=0.4))
    torch.manual_seed(0)
    model = FLIP(16, 4, *TINY_SIZES, 258, 30, mask_ratio=0.5)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {name for name, _ in trained if "pos_embed" in name} == {"text.pos_embed"}
    decayed = [p for name, p in trained if p.ndim > 1 and name != "text.pos_embed"]
    others = [p for name, p in trained if p.ndim < 2 or name == "text.pos_embed"]
    groups = [{"params": decayed, "weight_decay": 2.0}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    train = data.open_data("photos", "").train
    dataset = train.with_transform(data.augment(16, 0.5))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    scales = []
    for step in range(5):
        epoch, position = divmod(step, 4)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()
        order = order[10 * position:10 * position + 10]
        images = torch.stack([dataset[epoch, i][0] for i in order])
        ids = torch.zeros(10, 30, dtype=torch.int64)
        for row, i in zip(ids, order):                   # one of the seven captions of its class
            template = flip.TEMPLATES[seed_of(0, epoch, i, 1) % 7]
            caption = template.format("ab"[train.labels[i]])
            numbers = [257, *(1 + byte for byte in caption.encode())][:30]
            row[:len(numbers)] = torch.tensor(numbers)
        noise = torch.rand(10, 16, generator=torch.Generator().manual_seed(seed_of(0, step)))
        lr = 0.4 * 10 / 256                              # warm-up: half an epoch, two steps
        if step < 2:
            lr = lr * step / 2
        else:
            lr = lr / 2 * (1 + math.cos(math.pi * (step - 2) / (8 - 2)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, *_ = model((images / 255 - mean) / std, ids, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(model.logit_scale.item())
    assert 0 < min(scales) < math.log(1 / 0.07) - 0.01 and max(scales) < math.log(100)
    close(model.state_dict(), weights("run"))
    expected = {str(i): optimizer.state[p]["exp_avg"] for i, p in enumerate([*decayed, *others])}
    close(expected, moments("run"))


def test_exported_encoder_is_a_vit_in_timms_names(photos):
    flip.train(tiny(output="run", max_steps=1))
    exported = torch.load("run/encoder.pt", weights_only=True)
    names = {name.split(".")[0] for name in exported}
    assert names == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}
    vit = mae.VisionTransformer(16, 4, *TINY_SIZES[:3])
    vit.load_state_dict(exported, strict=True)
    model = flip.build(tiny())
    model.load_state_dict(weights("run"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.encode(images), model.encode(images))
    loaded, *_ = evaluate.load_encoder(evaluate.Config(checkpoint="run/checkpoint.pt"))
    assert torch.equal(loaded.encode(images), model.encode(images))


def test_resumed_run_equals_an_undisturbed_one(photos):
    whole = flip.train(tiny(output="whole"))
    for steps in (1, 3, 0):
        parts = flip.train(tiny(output="parts", max_steps=steps))
    assert same(weights("whole"), weights("parts")) and whole == parts
    assert whole.keys() >= {"zero_shot", "knn_trained", "linear_pixels", "unreadable"}


def test_accumulation_is_one_large_batch(photos):
    """Two pairs a micro-batch, into the second epoch."""
    for accumulate in (1, 5):
        flip.train(tiny(output=f"a{accumulate}", accumulate=accumulate, max_steps=5,
                        crop_scale=0.5))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))
    first = checkpoint("a1")["epoch_losses"]
    second = checkpoint("a5")["epoch_losses"]
    assert first == pytest.approx(second, rel=1e-5) and len(first) == 1


RUNS = """
import sys
sys.path.insert(0, {root!r})
import common, flip
common.LOG_EVERY = 1
flip.SIZES["micro"] = {sizes!r}
with common.command_line():
    for settings in {runs!r}:
        flip.train(flip.Config(**settings))
"""


def test_two_processes_equal_one(photos):
    """Several pairs a process and micro-batch, into the second epoch: losses and weights of one."""
    one = TINY | dict(batch_size=12, max_steps=5, crop_scale=0.5)              # 3 steps an epoch
    runs = [one | dict(output="plain"), one | dict(output="accumulated", accumulate=2)]
    Path("runs.py").write_text(RUNS.format(root=str(ROOT), sizes=TINY_SIZES, runs=runs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, "runs.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for settings in runs:
        two = settings["output"]
        result = flip.train(Config(**settings | dict(output=f"{two}1")))
        close(weights(f"{two}1"), weights(two))
        close(moments(f"{two}1"), moments(two))
        first = checkpoint(f"{two}1")["epoch_losses"]
        second = checkpoint(two)["epoch_losses"]
        assert first == pytest.approx(second, rel=1e-5) and len(first) == 2
        last = json.loads(open(f"{two}/metrics.jsonl").readlines()[-1])
        assert last == pytest.approx(result, rel=1e-4)   # the zero-shot accuracies, too


def test_the_scale_stays_below_100(photos, monkeypatch):
    honest = flip.build

    def build(cfg):
        model = honest(cfg)
        model.logit_scale.data.fill_(9.0)
        return model

    monkeypatch.setattr(flip, "build", build)
    flip.train(tiny(output="run", max_steps=1))
    assert weights("run")["logit_scale"].item() == pytest.approx(math.log(100))


def test_unmasked_tuning_starts_from_the_weights(photos):
    flip.train(tiny(output="run", max_steps=1))
    flip.train(tiny(output="same", init="run/checkpoint.pt", mask_ratio=0.0, base_lr=0.0,
                    max_steps=1))
    assert same(weights("run"), weights("same"))
    assert tiny(init="run/checkpoint.pt").output == "runs/flip-photos-tuned"
    with pytest.raises(common.UserError, match="does not fit"):
        flip.train(tiny(output="other", init="run/encoder.pt"))
    with pytest.raises(common.UserError, match="does not fit"):
        flip.train(tiny(output="other", init="run/checkpoint.pt", text_length=20))
