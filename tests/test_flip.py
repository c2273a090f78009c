"""flip.py against published figures, closed forms and its own invariants; its inputs; and whole runs."""

import gzip
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
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
from flip import FLIP, Bytes, BytePairs, Config, Shards, Tokenizer, WordPieces, contrastive_loss, multiplications
from test_train import checkpoint, close, moments, photos, same, weights     # noqa: F401, photos is a fixture

FIGURES = golden("clip")
SIZE = dict(image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, text_width=12, text_depth=2, text_heads=2,
            proj_dim=8, vocab_size=259, text_length=10)  # 16 patches


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(common, "LOG_EVERY", 1)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = FLIP(**SIZE | changes)
    with torch.no_grad():                                # at the start nearly all features are alike
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def seed_of(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def batch(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, noise = torch.randn(count, 3, 16, 16, generator=generator), torch.rand(count, 26, generator=generator)
    ids = torch.randint(1, 250, (count, 10), generator=generator)
    ids[:, 6:] = 0
    ids[torch.arange(count), torch.arange(count) % 4 + 3] = 258                 # the end token, the largest id
    return images, ids, noise


# -------------------------------------------------------------------------------------- published figures
@pytest.fixture
def clip():
    """The CLIP of the golden figures, its images and its ids."""
    c, state = FIGURES["config"], {}
    for name, shape in FIGURES["state_dict"].items():
        state[name] = 0.15 * draw(name, *shape) + float(len(shape) == 1 and name.endswith("weight"))
    state["logit_scale"] = torch.tensor(2.5)
    model = FLIP(c["image_size"], c["patch_size"], c["vision_width"], c["vision_layers"], c["vision_heads"], c["text_width"],
                 c["text_layers"], c["text_heads"], c["embed_dim"], c["vocab_size"], c["context_length"], mask_ratio=0, towers="clip")
    common.load_weights(model, "golden", weights=flip.from_clip(state))
    images = draw("clip/images", c["batch"], 3, c["image_size"], c["image_size"])
    scale, shift = flip.clip_scale(images.device)
    return model, (images - shift) / scale, torch.tensor(FIGURES["tokens"]), state


@torch.no_grad()
def test_golden_figures(clip):
    model, images, ids, _ = clip
    near = lambda value, name: torch.testing.assert_close(value, torch.tensor(FIGURES[name]), rtol=1e-5, atol=5e-6)
    tokens, text = model.encode(images), model.text(ids)
    near(tokens[0, 1, :8], "patch_tokens_row0_token0_head"), near(tokens[:, 1:].norm(), "patch_tokens_after_ln_post_norm")
    near((tokens[:, 1:] @ model.image_proj.weight.T).norm(), "patch_tokens_projected_norm")
    image = model.image_proj(tokens[:, 0])
    near(image[0, :8], "image_features_row0_head"), near(image.norm(), "image_features_norm")
    near(text[0, :8], "text_features_row0_head"), near(text.norm(), "text_features_norm")
    loss, image, text = model(images, ids)
    near(loss, "contrastive_loss"), near((model.logit_scale.exp() * image @ text.T)[0], "logits_per_image_row0")


def test_clips_names_both_ways(clip, tmp_path):
    model, images, ids, state = clip
    exported = flip.to_clip(model)
    assert exported.keys() == state.keys() and all(torch.equal(exported[n], state[n]) and exported[n].shape == state[n].shape for n in state)
    with torch.no_grad():
        model.patch_embed.proj.bias.copy_(torch.randn(128))              # CLIP has none: it goes into the positions
        image = model.encode_image(images)
    torch.save({"state_dict": {f"module.{n}": v.half() if n == "visual.proj" else v for n, v in flip.to_clip(model).items()}
                | {"input_resolution": torch.tensor(32)}}, tmp_path / "clip.pt")
    read, told = flip.read_weights(str(tmp_path / "clip.pt"))
    config = Config(towers="clip", text_length=12, vocab_size=300, **{k: v for k, v in told.items() if k not in ("text_length", "vocab_size")})
    config = replace(config, **told)
    other = flip.build(config)
    common.load_weights(other, "clip.pt", optional=flip.DECODER, weights=read)
    torch.testing.assert_close(other.encode_image(images), image, atol=1e-3, rtol=0)     # the projection was halved
    torch.testing.assert_close(other.encode(images), model.encode(images))
    assert torch.equal(other.encode_text(ids), model.encode_text(ids))


def test_size_of_clip_and_of_the_papers_models():
    """CLIP ViT-B/16: 302 tensors, 149,620,737 numbers; table 9 of the paper, recounted in millions."""
    with torch.device("meta"):
        model = FLIP(224, 16, *flip.SIZES["base"], 49408, 77, towers="clip")
        names = set(model.state_dict()) - {"patch_embed.proj.bias"}
        assert len(names) == 302 and sum(p.numel() for p in model.parameters()) == 149_620_737 + 768      # ours has a bias
        for size, patch, image, text in (("base", 16, 85.80, 53.47), ("large", 16, 303.30, 108.52), ("huge", 14, 630.76, 333.60)):
            model = FLIP(224, patch, *flip.SIZES[size], 30523, 32)
            count = lambda *begin: sum(p.numel() for n, p in model.named_parameters() if n.startswith(begin)) / 1e6
            projections = count("image_proj", "text.proj")
            assert count("text.") - count("text.proj") == pytest.approx(text, abs=0.006)
            assert count("cls", "pos", "patch", "blocks", "norm") == pytest.approx(image, abs=0.006)
            assert count("") == pytest.approx(image + text + projections, abs=0.01)


@pytest.mark.parametrize("size, patch, half, quarter", [("large", 16, 0.5175, 0.2817), ("base", 16, 0.528, 0.300), ("huge", 14, 0.522, 0.289)])
def test_share_of_the_multiplications(size, patch, half, quarter):
    """The paper's figures count the projection of all patches; ours leaves the masked ones out there, too."""
    cfg = Config(model=size, image_size=224, patch_size=patch, text_length=32, vocab_size=30523)
    whole = multiplications(cfg, 0)
    for ratio, share in ((0.5, half), (0.75, quarter)):
        skipped = (224 // patch) ** 2 * ratio * 3 * patch ** 2 * cfg.embed_dim
        assert (multiplications(cfg, ratio) + skipped) / whole == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize("ratio", [0, 0.5, 0.75])
def test_masked_patches_enter_no_matrix_product(ratio):
    cfg = Config(**SIZE, mask_ratio=ratio)
    with torch.device("meta"):
        model, (images, ids, noise) = FLIP(**SIZE, mask_ratio=ratio).to("meta"), (torch.randn(3, 3, 16, 16), torch.zeros(3, 10, dtype=torch.int64), torch.rand(3, 26))
        with FlopCounterMode(display=False) as counter:
            model.embed(images, ids, noise)
    projections = 8 * (16 + 12)
    assert counter.get_total_flops() == 3 * 2 * (multiplications(cfg, ratio) + projections)


# --------------------------------------------------------------------------------------- the loss by hand
def test_loss_in_closed_form():
    eye, a = torch.eye(6), torch.tensor(3.0)
    assert contrastive_loss(eye, eye, a).item() == pytest.approx(math.log(math.exp(3) + 5) - 3, rel=1e-6)
    same_everywhere = F.normalize(torch.ones(6, 4), dim=1)
    assert contrastive_loss(same_everywhere, same_everywhere, a).item() == pytest.approx(math.log(6), rel=1e-6)


def process(rank, folder):
    """One of four processes, then of two, then of two without the gradient of what is gathered: the loss and
    the gradients, averaged as in training, of its share of 8 pairs."""
    torch.set_num_threads(1)
    for world, detached in ((4, False), (2, False), (2, True)):
        if rank >= world:
            return
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        if detached:
            flip.Gather.backward = staticmethod(lambda ctx, gradient: torch.zeros_like(gradient.chunk(2)[0]))
        dist.init_process_group("gloo", f"file://{folder}/store{world}{detached}", rank=rank, world_size=world)
        images, ids, noise = (x[rank::world] for x in batch(8))
        model = small().double()
        network = DistributedDataParallel(model)
        loss, *_ = network(images.double(), ids, noise)
        loss.backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            torch.save((loss / world, grads), f"{folder}/{world}{detached}.pt")
        dist.destroy_process_group()


def test_processes_equal_one(tmp_path):
    """Loss and every gradient; and not, if the features of the others came without gradient."""
    running = [multiprocessing.get_context("spawn").Process(target=process, args=(r, str(tmp_path))) for r in range(4)]
    for each in running:
        each.start()
    for each in running:
        each.join()
        assert each.exitcode == 0
    model = small().double()
    images, ids, noise = batch(8)
    loss, *_ = model(images.double(), ids, noise)
    loss.backward()
    truth = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for world, detached in ((4, False), (2, False), (2, True)):
        their_loss, grads = torch.load(tmp_path / f"{world}{detached}.pt", weights_only=True)
        assert abs(their_loss - loss) < 1e-12 and grads.keys() == truth.keys() and "logit_scale" in grads
        errors = {n: ((grads[n] - truth[n]).norm() / truth[n].norm().clamp(min=1e-6)).item() for n in truth}
        assert max(errors.values()) > 0.1 if detached else max(errors.values()) < 1e-6, (world, errors)


def test_parts_equal_one_pass():
    """--accumulate: all pairs are each other's negatives, and the scale's gradient counts once."""
    images, ids, noise = batch(6)
    whole, parts = small().double(), small().double()
    loss, *_ = whole(images.double(), ids, noise)
    loss.backward()
    chunks = list(zip(images.double().chunk(3), ids.chunk(3), noise.chunk(3)))
    cached = [torch.stack(f).detach() for f in list(zip(*(parts.embed(*chunk) for chunk in chunks)))[:2]]
    for i in (2, 1, 0):
        part_loss, *_ = parts(*chunks[i], cached, i)
        part_loss.backward()
        assert torch.allclose(part_loss, loss)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad)), name


def test_fp32_features_and_loss_under_bf16():
    images, ids, noise = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, image, text = small()(images, ids, noise)
    assert loss.dtype == image.dtype == text.dtype == torch.float32
    torch.testing.assert_close(image.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------- masks and towers
def test_visible_patches_and_nothing_else(monkeypatch):
    model, (images, ids, noise) = small(mask_ratio=0.75), batch()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images.requires_grad_()
    loss, image, _ = model(images, ids, noise)
    embedded = model.patch_embed(model.patches(images)) + model.pos_embed[:, 1:]
    visible = noise[:, :16].argsort(dim=1)[:, :4]
    torch.testing.assert_close(seen[0][:, 1:], flip.gather_tokens(embedded, visible))
    assert seen[0].shape[1] == 5 and len({tuple(sorted(k)) for k in visible.tolist()}) > 1
    loss.backward()
    per_patch = flip.patchify(images.grad, 4).abs().sum(dim=-1)                 # (B, N)
    masked = torch.ones(4, 16, dtype=torch.bool).scatter_(1, visible, False)
    assert (per_patch[masked] == 0).all() and (per_patch[~masked] > 0).all()
    model.encode_image(images)
    assert seen[-1].shape[1] == 17                       # scoring sees everything
    model.mask_ratio = 0
    assert torch.equal(model(images, ids, noise)[1], model.encode_image(images))


def test_order_of_the_visible_does_not_matter():
    model, (images, *_) = small(), batch()
    patches, visible = model.patches(images), torch.arange(8).expand(4, -1)
    shuffled = visible[:, torch.randperm(8)]
    torch.testing.assert_close(model.pooled(model.forward_features(patches, visible)), model.pooled(model.forward_features(patches, shuffled)), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("towers", ["flip", "clip", "open_clip"])
def test_what_the_text_tower_reads(towers):
    """CLIP's is causal and read off the end token; FLIP's reads everything, padding, too, from the front."""
    model, (_, ids, _) = small(towers=towers), batch()
    changed = ids.clone()
    changed[:, 9] = 7                                    # behind the end
    assert torch.equal(model.encode_text(ids), model.encode_text(changed)) == (towers != "flip")
    first = ids.clone()
    first[:, 1] = 9
    assert not torch.equal(model.encode_text(ids), model.encode_text(first))


@torch.no_grad()
def test_what_is_pooled():
    """FLIP: the mean of all tokens, the class token's, too; the first of the text's."""
    model, (images, ids, _) = small(), batch()
    mean = model.encode(images).mean(dim=1) @ model.image_proj.weight.T
    torch.testing.assert_close(model.encode_image(images), mean / mean.norm(dim=1, keepdim=True))
    x = model.text.token_embedding.weight[ids] + model.text.pos_embed
    for block in model.text.blocks:
        x = block(x)
    first = model.text.norm(x[:, 0]) @ model.text.proj.weight.T
    torch.testing.assert_close(model.encode_text(ids), first / first.norm(dim=1, keepdim=True))


def test_images_are_normalised_as_clip_was_trained():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    patches = small(towers="clip").patches(data.to_device(images, "cpu"))
    expected = flip.patchify((images / 255 - mean) / std, 4)
    torch.testing.assert_close(patches, expected, atol=1e-5, rtol=1e-5)
    plain = small().patches(data.to_device(images, "cpu"))
    assert torch.equal(plain, flip.patchify(data.to_device(images, "cpu"), 4))


def test_text_masking():
    ids, noise = batch()[1], torch.rand(4, 10, generator=torch.Generator().manual_seed(1))
    ids[0, 3:] = ids[1, 4:] = 0
    for kind in ("padding", "random"):
        visible = flip.text_masking(noise, ids, 0.5, kind)
        assert visible.shape == (4, 5) and (visible[:, 0] == 0).all() and (visible.diff(dim=1) > 0).all()
    words, padding = (ids != 0).sum(dim=1), (flip.gather_tokens(ids.unsqueeze(-1), flip.text_masking(noise, ids, 0.5, "padding")) == 0).sum(dim=(1, 2))
    assert torch.equal(padding, (5 - words).clamp(min=0)) and words.min() < 5 < words.max()
    model, (images, ids, more) = small(text_mask_ratio=0.5), batch()
    seen = []
    model.text.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(images, ids, more), model.encode_text(ids)
    assert seen == [5, 10]
    visible = flip.text_masking(more[:, 16:], ids, 0.5, "padding")             # not the patches' noise
    assert torch.equal(model(images, ids, more)[2], model.encode_text(ids, visible))


def test_reconstruction_is_maes_loss():
    model, (images, ids, noise) = small(reconstruction=2.0), batch()
    loss, image, text = model(images, ids, noise)
    extra = loss - contrastive_loss(image, text, model.logit_scale.exp())
    _, _, maes = model.embed(images, ids, noise)
    assert extra.item() == pytest.approx(2 * maes.item(), rel=1e-4) and maes > 0.5
    twin = mae.MAE(16, 4, 16, 2, 2, 8, 1, 1, mask_ratio=0.5)
    own = model.state_dict()
    twin.load_state_dict({name: own[name] for name in twin.state_dict()})
    its_loss, _, _ = twin(images, noise[:, :16])
    assert maes.item() == pytest.approx(its_loss.item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.startswith(("decoder_", "mask")) and p.requires_grad)
    plain = {n for n in model.state_dict() if not n.startswith(model.pretrain_only)}
    assert {n.split(".")[0] for n in plain} == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"}


# --------------------------------------------------------------------------------------------------- text
def tokenizer(**changes):
    return Tokenizer(Config(**dict(text_length=8) | changes))


def test_bytes():
    assert tokenizer()("a  cat").tolist() == [257, 98, 33, 100, 98, 117, 0, 0]
    assert tokenizer(towers="clip")("a cat is there").tolist() == [257, 98, 33, 100, 98, 117, 33, 258]       # the end stays
    assert tokenizer(text_cls=False)("").tolist() == [0] * 8 and tokenizer()("é").tolist()[:3] == [257, 0xC3 + 1, 0xA9 + 1]


def test_word_pieces(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "una", "##ffa", "##ble", "cafe", ",", "25", "%", "off", "!", "a", "##a", "中", "文"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    vocabulary = flip.open_vocabulary(str(tmp_path / "vocab.txt"))
    split = lambda text: [pieces[i] for i in vocabulary(text)]
    assert split("Unaffable Café, 25% off!") == ["una", "##ffa", "##ble", "cafe", ",", "25", "%", "off", "!"]
    assert split("中文 aa\tdog\u200b" + "a" * 101) == ["中", "文", "a", "##a", "[UNK]"]
    cfg = Config(vocab=str(tmp_path / "vocab.txt"))
    assert (cfg.text_length, cfg.vocab_size, Tokenizer(cfg)("off a").tolist()[:4]) == (32, 17, [2, 11, 13, 0])
    assert Tokenizer(replace(cfg, text_cls=False))("off a").tolist()[:3] == [11, 13, 0]          # as released


MERGES = ["h e", "l l", "he ll", "o w", "hell o</w>", "w o", "wo r", "l d</w>", "wor ld</w>"]


def test_byte_pairs(tmp_path):
    """The ids that every file has in common are CLIP's: a is 320 at the end of a word."""
    with gzip.open(tmp_path / "m.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["a title", *MERGES, ""]))
    vocabulary = flip.open_vocabulary(str(tmp_path / "m.txt.gz"))
    number = {"".join(merge.split()): 512 + i for i, merge in enumerate(MERGES)}
    assert vocabulary("Hello  WORLD") == [number["hello</w>"], number["world</w>"]]
    assert vocabulary("a") == [320] and vocabulary("0 é &amp;amp;") == [256 + 15, 127, 256 + 102, 256 + 5]
    assert (vocabulary.start, vocabulary.end, vocabulary.size) == (521, 522, 523)
    ids = Tokenizer(Config(vocab=str(tmp_path / "m.txt.gz"), towers="clip", text_length=4))("hello hello hello").tolist()
    assert ids == [521, number["hello</w>"], number["hello</w>"], 522] and max(ids) == ids[-1]


def test_byte_pairs_against_a_naive_way():
    lines, chance = ["title", *MERGES], random.Random(0)
    vocabulary = BytePairs(lines)
    for _ in range(300):
        word = "".join(chance.choice("helowrd") for _ in range(chance.randint(1, 12)))
        parts = [*word[:-1], word[-1] + "</w>"]
        for a, b in map(str.split, MERGES):              # each merge in turn, wherever it fits
            text = "\0" + "\0".join(parts) + "\0"
            while f"\0{a}\0{b}\0" in text:
                text = text.replace(f"\0{a}\0{b}\0", f"\0{a}{b}\0", 1)
            parts = text.strip("\0").split("\0")
        assert [vocabulary.number[p] for p in parts] == vocabulary(word)


def test_words_of_byte_pairs():
    """On ASCII like the pattern that CLIP has; beyond it letters and numerals by their category."""
    pattern = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")
    chance, word = random.Random(0), BytePairs(["title"]).word
    for _ in range(2000):
        text = "".join(chance.choice("ab 'stredlmv09_.,!\t") for _ in range(chance.randint(0, 15)))
        assert word.findall(text) == pattern.findall(text)
    assert word.findall("it's ½ll２ 日本!?") == ["it", "'s", "½", "ll", "２", "日本", "!?"]


@pytest.mark.parametrize("name, content", [("missing.txt", None), ("vocab.txt", b"no special\n"), ("m.txt.gz", b"no gzip"), ("vocab.json", b"{}")])
def test_vocabularies_that_cannot_be_read(in_tmp, name, content):
    if content:
        Path(name).write_bytes(content)
    with pytest.raises(common.UserError, match=re.escape(name)):
        Config(vocab=name)


# -------------------------------------------------------------------------------------------- images with text
def jpeg(i):
    """Image i of the synthetic shapes as the bytes of a file, and its caption."""
    drawn = data.synthetic_shapes("train", np.array([i]))
    file = io.BytesIO()
    Image.fromarray(drawn["image"][0].transpose(1, 2, 0)).save(file, "JPEG")
    return file.getvalue(), str(drawn["caption"][0])


def write_tar(path, members):
    """members: (name, bytes or text)."""
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as tar:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            about = tarfile.TarInfo(name)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


@pytest.fixture
def shards(in_tmp):
    """shards/000.tar to 005.tar of ten pairs each; caption: the pair's number."""
    Path("shards").mkdir()
    for s in range(6):
        write_tar(f"shards/{s:03}.tar", [m for i in range(10 * s, 10 * s + 10) for m in ((f"{i:04}.jpg", jpeg(i)[0]), (f"{i:04}.txt", str(i)))])
    return in_tmp


TINY = dict(image_size=16, embed_dim=16, depth=1, num_heads=2, text_width=16, text_depth=1, text_heads=2, proj_dim=8,
            text_length=12, batch_size=10, epochs=2)


def tiny(**changes):
    return Config(**TINY | changes)


def numbers(ids):
    """The captions of batches of ids that are numbers."""
    return [int(bytes(i - 1 for i in row.tolist()[1:] if i)) for row in ids]


def epochs_of(cfg, world=1, workers=1, first=0, last=6):
    """The pairs that each of the streams of all processes gives in the steps first ... last - 1."""
    found = []
    for rank in range(world):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        dataset = Shards(flip.expand("shards"), replace(cfg, workers=workers), Tokenizer(cfg))
        dataset.transform = data.augment(16, 1.0)
        found.append([numbers(ids) for _, ids in dataset.batches(replace(cfg, workers=0), first, last)])
    return found


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, os.environ.get(name, "0" if name == "RANK" else "1"))
    monkeypatch.setattr(flip, "count_pairs", lambda files: 60)


def test_every_pair_once_an_epoch(shards, alone):
    cfg = tiny(data="shards", batch_size=12, shuffle=7)
    one, two = epochs_of(cfg, last=10), epochs_of(cfg, world=2, last=10)
    for found in (one, two):
        for epoch in (0, 5):
            assert sorted(n for process in found for batch in process[epoch:epoch + 5] for n in batch) == list(range(60))
        assert all(len(process) == 10 and process[:5] != process[5:] for process in found)
    assert not {n for b in two[0][:5] for n in b} & {n for b in two[1][:5] for n in b}
    assert epochs_of(cfg, last=10) == one and one[0][0] != list(range(12))      # the same again, and shuffled
    plain, = epochs_of(replace(cfg, shuffle=1), last=10)
    for epoch in (0, 1):                                 # the shards' own order
        order = dict.fromkeys(n // 10 for batch in plain[5 * epoch:5 * epoch + 5] for n in batch)
        assert list(order) == np.random.RandomState(seed_of(0, epoch)).permutation(6).tolist()
    few = Shards(flip.expand("shards/000.tar"), replace(cfg, shuffle=1), tokenizer())
    for stream in (3, 11):                               # of 12: more streams than pairs
        assert len([name for name, *_ in itertools.islice(few.stream(0, stream, 12), 5)]) == 5
    many = epochs_of(tiny(data="shards", batch_size=20, shuffle=3), world=10, last=3)             # more streams than shards
    assert sorted(n for process in many for batch in process for n in batch) == list(range(60))


def test_crops_and_captions_of_shards_change(in_tmp):
    """From epoch to epoch, and from pair to pair; the same seed gives the same ones."""
    same_image, _ = jpeg(0)
    files = [((f"{i}.jpg", same_image), (f"{i}.txt", f"{i}\n1{i}")) for i in range(4)]
    write_tar("one.tar", [file for pair in files for file in pair])
    cfg = tiny(data="one.tar", batch_size=4, shuffle=1)
    first, again, other = [], [], []
    for found, seed in ((first, 0), (again, 0), (other, 1)):
        dataset = Shards(["one.tar"], replace(cfg, seed=seed), Tokenizer(cfg))
        dataset.transform = data.augment(16, 0.2)
        for images, ids in dataset.batches(cfg, 0, 6):   # six epochs of one step
            found += [(image.numpy().tobytes(), n) for image, n in zip(images, numbers(ids))]
    assert first == again != other
    assert len({image for image, _ in first}) == 24
    assert {n for _, n in first} == {0, 1, 2, 3, 10, 11, 12, 13}


def test_loader_processes_share_the_shards_and_a_run_goes_on(shards):
    cfg = tiny(data="shards", workers=2, shuffle=4)
    dataset = Shards(flip.expand("shards/{000..005}.tar"), cfg, Tokenizer(cfg))
    dataset.transform = data.augment(16, 0.5)
    whole = [(images, numbers(ids)) for images, ids in dataset.batches(cfg, 0, 13)]
    assert dataset.pairs == 60 and sorted(n for _, batch in whole[:6] for n in batch) == list(range(60))
    for first in (1, 6, 9):                              # in the middle of shards, at an epoch's end, later
        rest = [(images, numbers(ids)) for images, ids in dataset.batches(cfg, first, 13)]
        assert [n for _, n in rest] == [n for _, n in whole[first:]]
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, whole[first:]))


def test_broken_shards(in_tmp, capfd):
    good, caption = jpeg(0)
    write_tar("a.tar", [("x/1.jpg", good), ("x/1.txt", "one\ntwo\n"), ("2.jpg", good), ("3.txt", "no image"), ("4.jpg", b"no image"),
                        ("4.txt", "four"), ("5.jpg", good), ("5.txt", b"\xff\xfe"), ("6.png", good), ("6.json", '{"caption": "six", "url": 1}'),
                        ("7.jpg", good), ("7.txt", "  "), ("8.jpg", good), ("8.json", "no json"), ("9.json", '{"caption": ["a", "", 3]}'), ("9.webp", good),
                        ("a.jpg", good), ("a.json", '{"caption": NaN}'), ("b.jpg", good), ("b.json", '{"caption": "half \\ud83d"}')])
    whole = Path("a.tar").read_bytes()
    write_tar("b.tar.gz", [(f"{i}.{e}", d) for i in range(40) for e, d in (("jpg", jpeg(i)[0]), ("txt", "ok"))])
    Path("b.tar.gz").write_bytes(Path("b.tar.gz").read_bytes()[:9000])
    Path("c.tar").write_bytes(b"no tar" * 200)
    dataset = Shards(["a.tar", "b.tar.gz", "c.tar"], tiny(data="a.tar", epoch_pairs=10), None)
    pairs = {name: captions for file in dataset.files for name, _, captions in dataset.read(file, 0)}
    assert {n: c for n, c in pairs.items() if n.startswith("a.tar")} == {
        "a.tar: x/1": ["one", "two"], "a.tar: /4": ["four"], "a.tar: /6": ["six"], "a.tar: /9": ["a"]}
    assert 5 < sum(name.startswith("b.tar") for name in pairs) < 40
    counts = dict(zip(dataset.KINDS, dataset.troubles[0].tolist()))
    assert counts["damaged shards"] == 2 and counts["images without caption"] == 3 and counts["captions without image"] == 1
    assert counts["unreadable texts"] == 3 and "damaged shards" in capfd.readouterr().err
    Path("a.tar").write_bytes(whole)
    dataset = Shards(["a.tar"], tiny(data="a.tar", epoch_pairs=10), tokenizer())
    dataset.transform = data.augment(16, 1.0)
    (images, ids), = dataset.batches(dataset.cfg, 0, 1)
    assert images.shape == (10, 3, 16, 16) and dataset.counts("cpu")[0] > 1       # the four came again and again
    assert flip.count_pairs(["a.tar"]) == 9              # by the headers alone: these have an image and a text


def test_names_of_shards(shards):
    names = [f"shards/{s:03}.tar" for s in range(6)]
    assert flip.expand("shards") == flip.expand("shards/*.tar") == flip.expand("shards/{000..003}.tar::shards/{004..005}.tar") == names
    assert flip.count_pairs(names) == 60
    Path("shards/sizes.json").write_text(json.dumps({Path(n).name: 7 for n in names}))
    assert flip.count_pairs(names) == 42
    assert flip.is_shards("shards") and flip.is_shards("shards::more") and flip.is_shards("a.tgz") and not flip.is_shards("my.targets/a.csv")
    Path("shards/train").mkdir()                         # ImageNet's folder, say
    assert not flip.is_shards("shards")


@pytest.fixture
def images(in_tmp):
    """images/0.jpg to 29.jpg and their captions."""
    Path("images").mkdir()
    captions = []
    for i in range(30):
        data, caption = jpeg(i)
        Path(f"images/{i}.jpg").write_bytes(data)
        captions.append(caption)
    return captions


def test_tables(images, capfd):
    rows = [(f"images/{i}.jpg", c) for i, c in enumerate(images)]
    Path("a.csv").write_text("\ufeffid,Image,caption\n" + "".join(f'{i},{p},"{c}, it is"\n' for i, (p, c) in enumerate(rows)), encoding="utf-8")
    Path("b.tsv").write_bytes(("filepath\ttitle\n" + "".join(f"{p}\t{c}\n" for p, c in rows)).encode() + b"images/0.jpg\tanother one\n"
                              b"images/x.jpg\t\n\tlost\nimages/1.jpg\t\xff\n")
    train, test = flip.listed("a.csv", "")
    assert train[3] == ("images/3.jpg", [images[3] + ", it is"]) and len(train) == 30 and test == []
    train, _ = flip.listed("b.tsv", "")
    assert train[0] == ("images/0.jpg", [images[0], "another one"]) and len(train) == 30
    said = capfd.readouterr().out.splitlines()[-1]
    assert "1 images without caption, 1 captions without image, 1 unreadable texts" in said
    source = flip.open_source(tiny(data="a.csv"), tokenizer())
    assert len(source.splits.pretrain) == 27 and len(source.retrieval) == 3       # every tenth is kept
    image, ids, index = source.splits.pretrain[0, 5]
    assert image.shape == (3, 32, 32) and index == 5
    captions = {tuple(Pairs[e, 0][1].tolist()) for Pairs in [flip.open_source(tiny(data="b.tsv"), tokenizer()).splits.pretrain] for e in range(20)}
    assert len(captions) == 2                            # now the one, now the other
    whole = flip.open_source(tiny(data="a.csv", zero_shot="x"), tokenizer())
    assert len(whole.retrieval) == 30 and whole.splits.pretrain is None


def test_json_of_coco_and_karpathy_and_texts_beside_images(images):
    Path("coco.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": "0.jpg"}, {"id": 8, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a"}, {"image_id": 8, "caption": "b"}, {"image_id": 7, "caption": "c"}, {"image_id": 1, "caption": "d"}]}))
    assert flip.listed("coco.json", "images") == ([("images/0.jpg", ["a", "c"]), ("images/1.jpg", ["b"])], [])
    Path("elsewhere").mkdir(), Path("images/2.jpg").rename("elsewhere/2.jpg")
    Path("val.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "2.jpg"}], "annotations": [{"image_id": 1, "caption": "e"}]}))
    source = flip.open_source(tiny(data="coco.json", image_root="images", test_data="val.json", test_root="elsewhere"), tokenizer())
    assert len(source.splits.pretrain) == 2 and source.retrieval.texts(0) == ["e"]          # as COCO's two folders are
    Path("elsewhere/2.jpg").rename("images/2.jpg")
    Path("k.json").write_text(json.dumps({"images": [
        {"filepath": "images", "filename": f"{i}.jpg", "split": split, "sentences": [{"raw": "x"}, {"raw": "y"}]}
        for i, split in enumerate(("train", "val", "restval", "test"))]}))
    train, test = flip.listed("k.json", "")
    assert [p for p, _ in train] == ["images/0.jpg", "images/2.jpg"] and test == [("images/3.jpg", ["x", "y"])]
    Path("test.json").write_text(Path("k.json").read_text().replace('"train"', '"val"').replace("restval", "val"))
    assert flip.listed("test.json", "")[0] == [] and len(flip.open_source(tiny(data="test.json", zero_shot="x"), tokenizer()).retrieval) == 1
    Path("images/0.txt").write_text("one"), Path("images/1.json").write_text('{"caption": "two"}'), Path("images/y.txt").write_text("three")
    assert flip.is_listed("images") and flip.listed("images", "")[0] == [("images/0.jpg", ["one"]), ("images/1.jpg", ["two"])]


def test_captions_of_classes(photos):
    Path("names.json").write_text('{"a": "small thing", "b": "big thing"}'), Path("t.txt").write_text("one {}\nsome {}\n")
    source = flip.open_source(tiny(data="photos", classnames="names.json", templates="t.txt"), tokenizer(text_length=30))
    assert source.prompts == [["one small thing", "some small thing"], ["one big thing", "some big thing"]]
    train = source.splits.pretrain
    for i in (0, 39):
        assert train.texts(i) == source.prompts[train.labels[i]]
    assert len(train) == 40 and len(source.labelled) == 10
    plain = flip.open_source(tiny(data="photos"), tokenizer())
    assert plain.prompts[1] == [t.format("b") for t in flip.TEMPLATES] and len(flip.TEMPLATES) == 7
    names = flip.class_names(tiny(), ["n01440764", *(f"n{i:08}" for i in range(2_000_000, 2_000_999))])
    assert len(names) == 1000 and names[0] == "tench"
    Path("words.txt").write_text("n00000001\tdog, hound\nn00000002\tcat\nn00000003\tcow\n")
    assert flip.class_names(tiny(classnames="words.txt"), ["n00000002", "n00000001"]) == ["cat", "dog"]
    flat = flip.open_source(tiny(data="photos/train", zero_shot="x"), tokenizer())
    assert len(flat.labelled) == 40 and len(flip.open_source(tiny(data="photos/train"), tokenizer()).labelled) == 4


def test_shapes_keep_pairs_out():
    source = flip.open_source(tiny(data="shapes"), tokenizer(text_length=40))
    assert source.held_out.sum() == 12 and len(source.prompts) == 64 and len(set(map(tuple, source.prompts))) == 64
    words = {tuple(w for w in caption.split() if w in data.COLORS or w in data.SHAPES) for i in range(len(source.splits.pretrain))
             for caption in source.splits.pretrain.texts(i)}
    pairs = {frozenset(pair) for pair in words}
    colors, shapes = list(data.COLORS), list(data.SHAPES)
    assert len(pairs) == 52 and not pairs & {frozenset((colors[c], shapes[s])) for c, s in data.HELD_OUT}
    assert len(source.retrieval) == 64 and all(len(source.retrieval.texts(i)) == 1 for i in range(64))
    i = int(np.argmax(source.labelled.labels == 8 * colors.index("blue") + shapes.index("ring")))
    assert "ring" in source.prompts[source.labelled.labels[i]][0] and "blue" in source.prompts[source.labelled.labels[i]][0]


# ------------------------------------------------------------------------------------- zero-shot accuracy, retrieval
def test_recall_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
    truth = torch.tensor([[False, True, False], [False, True, True]])
    assert flip.recall(similarity, truth, (1, 2, 3)) == [50.0, 50.0, 100.0]


@torch.no_grad()
def test_class_features():
    model, tokens = small(text_length=12), tokenizer(text_length=12)
    features = flip.class_features(model, [["a ring"], ["a bar", "the bar"]], tokens, "cpu")
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    one, two, three = model.encode_text(tokens.all(["a ring", "a bar", "the bar"]))
    torch.testing.assert_close(features, torch.stack([one, F.normalize(two + three, dim=0)]))


def test_score_by_hand():
    """Images 0, 1, 2 have the features e0, e1, e2; the texts those of the numbers in them."""
    tokens, eye = tokenizer(text_length=12), torch.eye(3)

    class Towers:
        def encode_image(self, images):
            gray = images[:, 0, 0, 0] * 0.229 + 0.485    # the images are black, gray and white
            return eye[(2 * gray).round().long()]

        def encode_text(self, ids):
            last = [max(row.nonzero()) for row in ids]
            return torch.stack([eye[row[i] - 1 - ord("0")][0] for row, i in zip(ids, last)])

    shades = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 16, 16)
    captions = [["a 1", "a 0"], ["a 2"], ["a 1"]]        # the second one alone is right
    retrieval = flip.Pairs(shades, captions, tokens, labels=np.arange(3))
    labelled = data.ImageDataset(shades[[0, 1, 2, 2, 1]], [0, 0, 2, 2, 0])     # three are right
    held_out = np.array([False, False, True])
    source = flip.Source(data.Splits(None, None, None, []), retrieval, labelled,
                         [["the 0", "a 0"], ["the 1"], ["the 2"]], held_out)
    found = flip.score(Towers(), source, tiny(), tokens, torch.device("cpu"))
    assert found == pytest.approx({
        "zero_shot": 60, "zero_shot_top5": 100,
        "zero_shot_seen": 100 / 3, "zero_shot_held_out": 100,
        "image_to_text_1": 100 / 3, "image_to_text_5": 100, "image_to_text_10": 100,
        "text_to_image_1": 25, "text_to_image_5": 100, "text_to_image_10": 100})


def test_untrained_is_about_chance():
    cfg = tiny(data="shapes", image_size=32, text_length=40)
    tokens = Tokenizer(cfg)
    found = flip.score(flip.build(cfg), flip.open_source(cfg, tokens), cfg, tokens, torch.device("cpu"))
    assert found["zero_shot"] < 6 and found["image_to_text_1"] < 10 and found["zero_shot_top5"] < 20


# ------------------------------------------------------------------------------------------------ whole runs
def test_short_run_learns(in_tmp):
    """A part of `python flip.py`: colors first. Then a little more with whole images."""
    found = flip.main(["--epochs=1", "--batch-size=32", "--base-lr=0.008", "--warmup-epochs=0.3"])
    assert found["zero_shot_seen"] > 8 and found["image_to_text_5"] > 30 and found["knn_pixels"] > 25
    losses = [json.loads(line).get("epoch_loss") for line in open("runs/flip-shapes/metrics.jsonl")]
    assert min(filter(None, losses)) < 2.5               # ln 32 = 3.47 at the start
    assert Image.open("runs/flip-shapes/similarity.png").size[0] > 8 * 64
    checkpoint = "runs/flip-shapes/checkpoint.pt"
    again = flip.main([f"--zero-shot={checkpoint}"])
    assert again == pytest.approx({name: found[name] for name in again}, abs=1e-3)
    tuned = flip.train(Config(init=checkpoint, max_steps=1, batch_size=64, mask_ratio=0, text_length=36))
    assert tuned["step"] == 1 and Path("runs/flip-shapes-tuned/checkpoint.pt").exists()          # from the first step of a new schedule


@pytest.mark.parametrize("towers", ["flip", "clip"])
def test_evaluate_takes_the_image_tower(photos, towers):
    flip.train(tiny(data="photos", output="run", towers=towers, max_steps=1))
    encoder, *_ = evaluate.load_encoder(evaluate.Config(protocol="knn", checkpoint="run/checkpoint.pt"))
    names = {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"} | ({"norm_pre"} if towers == "clip" else set())
    assert {n.split(".")[0] for n in encoder.state_dict()} == names
    model, images = flip.build(tiny(towers=towers)), torch.randn(2, 3, 16, 16)
    model.load_state_dict(weights("run"))
    assert torch.equal(encoder.encode(images), model.encode(images))


@pytest.mark.parametrize("changes", [{}, dict(data="shards", workers=2, shuffle=4, test_data="shards/000.tar")])
def test_resumed_run_equals_an_undisturbed_one(images, shards, changes):
    Path("a.csv").write_text("image,caption\n" + "".join(f"images/{i}.jpg,{c}\n" for i, c in enumerate(images)))
    changes = dict(data="a.csv") | changes
    whole = flip.train(tiny(output="whole", **changes))
    for steps in (1, 3, 0):
        parts = flip.train(tiny(output="parts", max_steps=steps, **changes))
    assert same(weights("whole"), weights("parts")) and whole == parts and "text_to_image_10" in whole


@pytest.mark.parametrize("towers", ["flip", "clip"])
def test_recipe(photos, towers):
    """Five steps of a loop written out from table 10 of the paper end with the same weights."""
    masks = dict(text_mask_ratio=0.4, text_mask="random", reconstruction=0.5)
    masks = masks if towers == "flip" else {}
    flip.train(tiny(data="photos", output="run", max_steps=5, towers=towers, text_length=30,
                    crop_scale=0.5, weight_decay=2.0, base_lr=0.4, warmup_epochs=0.5, **masks))
    torch.manual_seed(0)
    size = SIZE | dict(depth=1, text_depth=1, text_width=16, text_length=30)
    model = FLIP(**size, mask_ratio=0.5, towers=towers, **masks)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    learned = {"text.pos_embed"} | ({"pos_embed"} if towers == "clip" else set())
    assert {n for n, _ in trained if "pos_embed" in n} == learned
    decayed = [p for n, p in trained if p.ndim > 1 and n not in learned]
    others = [p for n, p in trained if p.ndim < 2 or n in learned]
    groups = [{"params": decayed, "weight_decay": 2.0}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    train = data.open_data("photos", "").train
    dataset = train.with_transform(data.augment(16, 0.5))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    scales = []
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    for step in range(5):
        epoch, position = divmod(step, 4)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(epoch)).tolist()
        order = order[10 * position:10 * position + 10]
        images = torch.stack([dataset[epoch, i][0] for i in order])
        ids = torch.zeros(10, 30, dtype=torch.int64)
        for row, i in zip(ids, order):                   # one of the seven captions of its class
            caption = flip.TEMPLATES[seed_of(0, epoch, i, 1) % 7].format("ab"[train.labels[i]])
            numbers = [1 + byte for byte in caption.encode()]
            numbers = [257, *numbers[:29]] if towers == "flip" else [257, *numbers[:28], 258]
            row[:len(numbers)] = torch.tensor(numbers)
        noise = torch.rand(10, 16 + 30, generator=torch.Generator().manual_seed(seed_of(0, step)))
        lr = 0.4 * 10 / 256                              # warm-up: half an epoch, two steps
        lr = lr * step / 2 if step < 2 else lr / 2 * (1 + math.cos(math.pi * (step - 2) / (8 - 2)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, _, _ = model((images / 255 - mean) / std, ids, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scales.append(model.logit_scale.item())
    assert 0 < min(scales) < math.log(1 / 0.07) - 0.01 and max(scales) < math.log(100)
    close(model.state_dict(), weights("run"))
    expected = {str(i): optimizer.state[p]["exp_avg"] for i, p in enumerate([*decayed, *others])}
    close(expected, moments("run"))


def test_accumulation_is_one_large_batch(photos):
    """Two pairs a micro-batch, into the second epoch."""
    for accumulate in (1, 5):
        flip.train(tiny(data="photos", output=f"a{accumulate}", accumulate=accumulate, max_steps=5,
                        crop_scale=0.5, text_mask_ratio=0.5, text_length=30))
    close(weights("a1"), weights("a5"))
    close(moments("a1"), moments("a5"))
    first, second = (checkpoint(run)["epoch_losses"] for run in ("a1", "a5"))
    assert first == pytest.approx(second, rel=1e-5) and len(first) == 1


RUNS = """
import sys
sys.path.insert(0, {root!r})
import common, flip
common.LOG_EVERY = 1
with common.command_line():
    for settings in {runs!r}:
        flip.train(flip.Config(**settings))
"""


def test_two_processes_equal_one_and_shards_too(photos, shards):
    """Several pairs a process and micro-batch, into the second epoch: losses and weights of one."""
    write_tar("shards/005.tar", [("1.jpg", jpeg(1)[0]), ("1.txt", "one"), ("2.txt", "lost"), ("3.jpg", b"broken"), ("3.txt", "three")])
    one = TINY | dict(data="photos", batch_size=12, max_steps=5, crop_scale=0.5,
                      text_mask_ratio=0.5, text_length=30)       # 3 steps an epoch
    pairs = [one | dict(output="plain"), one | dict(output="accumulated", accumulate=2)]
    runs = [*pairs, TINY | dict(data="shards", workers=2, output="shards-run")]
    Path("runs.py").write_text(RUNS.format(root=str(ROOT), runs=runs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, "runs.py"], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no --test-data" in done.stdout
    assert re.search(r"\b[1-9]\d* unreadable", done.stdout), done.stderr[-2000:]
    for settings in pairs:
        two = settings["output"]
        result = flip.train(Config(**settings | dict(output=f"{two}1")))
        close(weights(f"{two}1"), weights(two))
        close(moments(f"{two}1"), moments(two))
        first, second = (checkpoint(run)["epoch_losses"] for run in (f"{two}1", two))
        assert first == pytest.approx(second, rel=1e-5) and len(first) == 2
        last = json.loads(open(f"{two}/metrics.jsonl").readlines()[-1])
        assert last == pytest.approx(result, rel=1e-4)   # the zero-shot accuracies, too


def test_the_scale_stays_below_100(photos, monkeypatch):
    monkeypatch.setattr(flip, "build", lambda cfg, build=flip.build: (model := build(cfg), model.logit_scale.data.fill_(9.0))[0])
    flip.train(tiny(data="photos", output="run", max_steps=1))
    assert weights("run")["logit_scale"].item() == pytest.approx(math.log(100))


def test_options_run(photos):
    flip.train(tiny(data="photos", output="run", max_steps=1, reconstruction=0.1, text_mask_ratio=0.5))
    state = weights("run")
    flip.train(tiny(data="photos", init="run/checkpoint.pt", output="tuned", mask_ratio=0.0, max_steps=1))
    assert {n for n in state if n not in weights("tuned")} == {n for n in state if n.startswith(("decoder", "mask_token"))}
    wide = dict(embed_dim=64, num_heads=1, text_width=64, text_heads=1)
    flip.train(tiny(data="photos", output="clip", towers="clip", max_steps=1, **wide))
    read, told = flip.read_weights("clip/clip.pt")
    assert same(read | {"patch_embed.proj.bias": torch.zeros(64)}, read) and told["text_length"] == 12
    with pytest.raises(common.UserError, match="clip/clip.pt has CLIP's towers: --towers clip"):
        flip.train(tiny(data="photos", init="clip/clip.pt", max_steps=1, **wide))
    with pytest.raises(common.UserError, match="run/checkpoint.pt is of --towers flip"):
        flip.train(tiny(data="photos", init="run/checkpoint.pt", towers="clip", max_steps=1))
    with pytest.raises(common.UserError, match="--towers clip"):
        flip.train(tiny(zero_shot="clip/clip.pt", data="photos"))
    found = flip.train(tiny(zero_shot="clip/clip.pt", data="photos", towers="clip"))
    assert set(found) == {"zero_shot", "zero_shot_top5"}
    flip.train(tiny(data="photos", output="narrow", towers="clip", max_steps=1))
    assert not Path("narrow/clip.pt").exists()           # its heads are not 64 wide
    flip.train(tiny(data="photos", output="huge", towers="clip", max_steps=1, **wide | dict(embed_dim=1280, num_heads=16)))
    assert flip.read_weights("huge/clip.pt")[1]["num_heads"] == 16               # 80 wide, as in every CLIP of this width


def check_released_file(path, model):
    """Names, values and settings of a file that holds the golden CLIP in OpenAI's names."""
    read, told = flip.read_weights(path)
    own = model.state_dict()
    assert read.keys() == own.keys() and all(torch.equal(read[n], own[n]) for n in own)
    assert (told["embed_dim"], told["depth"], told["text_depth"], told["image_size"], told["text_length"]) == (128, 2, 2, 32, 12)


def test_released_torchscript(clip, in_tmp, monkeypatch):
    """TorchScript is run only if its SHA-256 is known."""
    model, images, ids, state = clip
    class Holder(torch.nn.Module):
        pass
    holder = Holder()
    for name, value in state.items():
        at = holder
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, Holder())
            at = getattr(at, part)
        at.register_buffer(last, value)
    torch.jit.save(torch.jit.script(holder), "clip.pt")
    with pytest.raises(common.UserError, match="clip.pt is TorchScript, a program; .* SHA-256"):
        flip.read_weights("clip.pt")
    digest = hashlib.sha256(Path("clip.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(flip, "CLIP_DIGESTS", (*flip.CLIP_DIGESTS, digest))
    check_released_file("clip.pt", model)


def write_safetensors(path, state):
    """Eight bytes that say how long the JSON header is, the header, the numbers."""
    header, at = {}, 0
    for name, value in state.items():
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, at := at + 4 * value.numel()]}
    header = json.dumps(header).encode()
    numbers = b"".join(v.numpy().tobytes() for v in state.values())
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + numbers)


def test_released_safetensors(clip, in_tmp):
    pytest.importorskip("safetensors")
    model, images, ids, state = clip
    write_safetensors("clip.safetensors", state)
    check_released_file("clip.safetensors", model)


def test_safetensors_without_the_package_is_one_line(in_tmp, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)          # as if it were not installed
    write_safetensors("clip.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(common.UserError, match="^clip.safetensors needs a package: pip install safetensors$"):
        flip.read_weights("clip.safetensors")


@pytest.mark.parametrize("argv, words", [
    (["--data=nowhere.csv"], "nowhere.csv"), (["--data=bad.csv"], "one of"), (["--data=empty.csv"], "no pair"), (["--data=bad.json"], "bad.json"),
    (["--data=none.tar"], "none.tar"), (["--data=lost.csv"], "--image-root"), (["--data=empty.tar"], "no pair"),
    (["--data=wordnet"], "--classnames"), (["--zero-shot=ids.pt", "--towers=clip"], "--vocab"), (["--data=flat"], "neither captions nor class folders"), (["--vocab=v.json"], "--vocab"),
    (["--towers=clip", "--text-mask-ratio=0.5"], "towers of CLIP"), (["--mask-ratio=1"], "nothing to see"), (["--mask-ratio=-0.001"], "it must be from 0 to 1"),
    (["--zero-shot=none.pt"], "no file none.pt"), (["--init=bad.csv"], "no file of weights"), (["--text-heads=5"], "text_heads 5 does not divide"),
    (["--reconstruction=1", "--accumulate=2"], "--accumulate 1"), (["--reconstruction=1", "--embed-dim=56", "--num-heads=7"], "half the num_heads"), (["--templates=bad.csv", "--data=photos"], "--templates"),
    (["--classnames=empty.csv", "--data=photos"], "--classnames"), (["--epoch-pairs=9", "--data=empty.tar"], "make no batch")])
def test_a_users_mistake_is_one_line(photos, capfd, argv, words):
    Path("bad.csv").write_text("a,b\n1,2\n"), Path("empty.csv").write_text("image,caption\n"), Path("bad.json").write_text("{")
    Path("lost.csv").write_text("image,caption\na.jpg,a\nb.jpg,b\n")
    torch.save(flip.to_clip(FLIP(**SIZE | dict(vocab_size=300, text_width=64, embed_dim=64), towers="clip")), "ids.pt")
    for number in (1, 2):
        Path(f"wordnet/n0000000{number}").mkdir(parents=True)
        for i in range(10):
            Path(f"wordnet/n0000000{number}/{i}.jpg").write_bytes(jpeg(0)[0])
    Path("flat").mkdir(), Path("flat/a.jpg").write_bytes(jpeg(0)[0]), write_tar("empty.tar", [])
    with pytest.raises(SystemExit) as stop:
        flip.main([*argv, "--preset=shapes"])
    error = capfd.readouterr().err.strip()
    assert stop.value.code == 2 and words in error and error.startswith("error: ") and "\n" not in error
