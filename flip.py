"""Scaling Language-Image Pre-training via Masking (Li et al., arXiv 2212.00794): FLIP.

CLIP, but a random half of each image's patches is left out before the image tower, and nothing is put in its place.
The two towers learn features whose cosine is high for an image and its own caption, and low for the other captions of
the batch. Half the patches cost about half as much: the same time buys more pairs, in larger batches. What is scored
are whole images, if wanted after a little more training with them ("unmasked tuning": shapes-tune, laion-tune).

    loss = 1/2 mean over the G pairs of the batch of [CE(s Z W^T, i) + CE(s W Z^T, i)],   CE: cross-entropy with class i
           Z, W (G, E): the features of images and captions, of length 1;  s <= 100: learned

    images (B, 3, H, W)                                    ids (B, T) of the captions
      | patchify                                             | token_embedding, + pos_embed
    patches (B, N, P*P*3)                                  x (B, T, text width)
      | visible                                              | text.blocks, text.norm
      | patch_embed, + pos_embed, cls_token, blocks, norm    |
    latent (B, 1+K, D)                                     x (B, T, text width)
      | mean, image_proj, L2-normalised                      | the first one, text.proj, L2-normalised
    image (B, E)                                           text (B, E)
      +--------------------- gathered ---------------------+
               image (G, E), text (G, E): loss

B pairs of this process, G of all processes, N patches, K visible, D width, P patch side, T ids of a caption, E
shared width.
Differences from mae.py: no decoder; a text tower; images with captions; negatives from all processes.

    python flip.py                                    # synthetic shapes, no download, 40 s on 2 CPU cores:
        zero-shot, 64 classes, 2000 images, chance 1.6 %: top-1 55.5 %, seen 61.7 %, held out 28.2 %, top-5 97.9 %
    python flip.py --preset shapes-tune --init runs/flip-shapes/checkpoint.pt       # a little more, with whole images
    python flip.py --zero-shot runs/flip-shapes/checkpoint.pt
    python flip.py --zero-shot ViT-B-16.pt --towers clip --vocab bpe_simple_vocab_16e6.txt.gz --data imagenet
    torchrun --nproc_per_node=8 flip.py --preset laion --data 'tars/{00000..41407}.tar' --vocab vocab.txt --accumulate 8

As in the released code, though the paper does not say so: positions of the image tower are fixed sines and cosines, the
mean includes the class token, the text tower reads padding, images are flipped. Unlike the released code: a caption's
feature is read off a [CLS] token in front (--no-text-cls: off its first word piece, as released); GELU is exact, not by
tanh; the scale is clamped after each step (inside the loss a clamped scale has no gradient) and not decayed. Found
nowhere, so ours: the decoder of --reconstruction (MAE's, of one block), and that the first token is never masked.
"""

import contextlib
import csv
import functools
import glob
import gzip
import html
import itertools
import json
import lzma
import math
import os
import random
import re
import sys
import tarfile
import unicodedata
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.models import ResNet50_Weights
from tqdm import tqdm

import common
import data


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    data: str = "shapes"          # shapes; a .csv, .tsv or .json of pairs; tar shards; a folder; cifar10, imagenet, ...
    image_root: str = ""          # what relative paths in a .csv, .tsv or .json start from; empty: its folder
    test_data: str = ""           # pairs, as in --data, for retrieval at the end; empty: part of --data, of shards none
    test_root: str = ""           # what relative paths in --test-data start from; empty: its folder
    init: str = ""                # weights to start from: a checkpoint of ours, CLIP's or open_clip's
    zero_shot: str = ""           # weights, as for --init, to score on --data; nothing is trained
    vocab: str = ""               # vocab.txt: BERT's word pieces; .gz: CLIP's byte pairs; empty: bytes
    templates: str = ""           # file of prompts with {} for the class, one a line; empty: the paper's seven
    classnames: str = ""          # file with a name for each class folder: lines in their order, or JSON {folder: name}
    towers: Literal["flip", "clip", "open_clip"] = "flip"  # the paper's; OpenAI's; OpenAI's with exact GELU
    mask_ratio: float = 0.5       # share of the patches that is left out
    text_mask_ratio: float = 0.0  # share of the ids that is left out
    text_mask: Literal["padding", "random"] = "padding"  # padding: it is left out first; random: any id is as likely
    reconstruction: float = 0.0   # weight of MAE's loss, added to the contrastive one (decoder of one block); 0: none
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of both towers
    embed_dim: int | None = None  # width D of the image tower; None: the model's
    depth: int | None = None      # blocks of the image tower; None: the model's
    num_heads: int | None = None  # attention heads of the image tower; None: the model's
    text_width: int | None = None  # width of the text tower; None: the model's
    text_depth: int | None = None  # blocks of the text tower; None: the model's
    text_heads: int | None = None  # attention heads of the text tower; None: the model's
    proj_dim: int | None = None   # width E of the features that are compared; None: the model's
    mlp_ratio: float = 4.0        # image tower: hidden width of an MLP / D (the text tower's is always 4)
    text_length: int | None = None  # ids of a caption T; None: 32 word pieces, 77 others
    text_cls: bool = True         # captions begin with a token of their own; no: as released (towers flip)
    vocab_size: int | None = None  # different ids; None: the vocabulary's
    image_size: int = 32          # side of the square input in pixels
    patch_size: int = 4           # side of a patch in pixels
    crop_scale: float = 1.0       # smallest area of the random crop; 1: no crop
    batch_size: int = 64          # pairs in a step, all processes and passes together
    accumulate: int = 1           # passes that make up a step, to save memory: each pair is embedded twice
    epochs: int = 9               # passes over the data
    epoch_pairs: int = 0          # tar shards: pairs that are called an epoch; 0: all
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.004        # learning rate for 256 pairs a step
    weight_decay: float = 0.2     # AdamW's, on matrices and tokens only
    shuffle: int = 5000           # tar shards: pairs among which the next is drawn, for each loader process

    def __post_init__(self):
        name = re.sub(r"[^\w.-]+", "-", Path(self.data.split("::")[0]).resolve().name).strip("-")
        self.output = self.output or f"runs/flip-{name}{'-tuned' * bool(self.init)}"
        for field, size in zip(SIZE_FIELDS, SIZES[self.model]):
            if getattr(self, field) is None:
                setattr(self, field, size)
        if self.text_length is None:
            self.text_length = 32 if self.vocab.endswith(".txt") else 77
        if self.vocab_size is None:
            self.vocab_size = open_vocabulary(self.vocab).size
        common.check(self)
        if self.reconstruction and self.embed_dim % math.lcm(8, 2 * max(1, self.num_heads // 2)):
            raise common.UserError("the decoder of --reconstruction has half the embed_dim and half the num_heads, "
                                   "which must divide it, and so must 4")
        patches = (self.image_size // self.patch_size) ** 2
        if int(patches * (1 - self.mask_ratio)) < 1:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see of "
                                   f"{patches} patches")
        if int(self.text_length * (1 - self.text_mask_ratio)) < 1:
            raise common.UserError(f"text_mask_ratio {self.text_mask_ratio} leaves nothing of "
                                   f"{self.text_length} ids")
        if self.towers != "flip" and (self.text_mask_ratio or not self.text_cls or self.vocab.endswith(".txt")):
            raise common.UserError("the towers of CLIP read a caption off its end token: no --text-mask-ratio, no "
                                   "--no-text-cls, and a vocabulary whose end token is the largest id "
                                   "(bytes, byte pairs)")
        if self.reconstruction and (self.accumulate > 1 or not self.mask_ratio):
            raise common.UserError("reconstruction needs masked patches, and --accumulate 1")


SIZE_FIELDS = ("embed_dim", "depth", "num_heads", "text_width", "text_depth", "text_heads", "proj_dim")
SIZES = {"micro": (64, 2, 4, 64, 2, 2, 64), "tiny": (192, 12, 3, 192, 6, 3, 192),                    # ours
         "small": (384, 12, 6, 384, 12, 6, 384),                                                     # open_clip's ViT-S
         "base": (768, 12, 12, 512, 12, 8, 512), "large": (1024, 24, 16, 768, 12, 12, 768),
         "huge": (1280, 32, 16, 1024, 24, 16, 1024)}                                                 # table 9

PAPER = dict(image_size=224, patch_size=16, crop_scale=0.5, mask_ratio=0.5, weight_decay=0.2,     # table 10; crop: code
             workers=12)
SMALL = PAPER | dict(model="tiny", batch_size=1024, epochs=100, warmup_epochs=5, base_lr=2.5e-4, workers=8)  # ours
PRESETS = {
    "shapes": dict(text_length=36),                                       # the defaults above; ours
    "shapes-tune": dict(text_length=36, mask_ratio=0.0, epochs=1, warmup_epochs=0.2, base_lr=8e-4),        # ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                    # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                     # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                              # ours
    "imagenet": PAPER | dict(model="base", batch_size=4096, epochs=30, warmup_epochs=2, base_lr=6.25e-5),   # ours
    # table 10: 12.8 billion pairs, 51.2 million of warm-up; 128 and 25.6 million; in epochs of four million
    "laion": PAPER | dict(model="base", batch_size=65536, epoch_pairs=4_194_304, epochs=3052, warmup_epochs=12.2,
                          base_lr=4e-6),
    "laion-tune": PAPER | dict(model="base", mask_ratio=0.0, batch_size=65536, epoch_pairs=4_000_000, epochs=32,
                               warmup_epochs=6.4, base_lr=4e-8),
    "folder": PAPER | dict(model="small", batch_size=1024, epochs=30, warmup_epochs=2, base_lr=2.5e-4),     # ours
}
TEMPLATES = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
             "a {} in a video game.", "art of the {}.", "a photo of the small {}.")     # section 4.2, CLIP's best seven


# ---------------------- Vision Transformer (mae.py's, with what CLIP's towers need besides)
def patchify(images, patch_size: int):
    """(B, C, H, W) -> (B, N, P*P*C): patches row by row; within one: row, column, channel."""
    B, C, H, W = images.shape
    h, w = H // patch_size, W // patch_size
    x = images.reshape(B, C, h, patch_size, w, patch_size)                     # (B, C, h, P, w, P)
    x = x.permute(0, 2, 4, 3, 5, 1)                                            # (B, h, w, P, P, C)
    return x.reshape(B, h * w, patch_size * patch_size * C)


def gather_tokens(tokens, index):
    """tokens (B, N, D), indices (B, K) of some of them -> these (B, K, D)."""
    index = index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])               # (B, K, D)
    return tokens.gather(1, index)


def sincos_positions(dim: int, grid: tuple[int, int]):
    """Fixed sine-cosine table (1, 1 + N, dim); the class token's row 0 is zero.

    The first half of the width encodes the column, the second the row: [sin | cos] of coordinate
    times 10000^(-i / (dim/4)). (The names in the released code suggest the opposite order.)"""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))                     # (dim/4,)
    row, column = np.indices(grid).reshape(2, -1, 1)                           # (N, 1) each
    column_angle = column * omega                                              # (N, dim/4)
    row_angle = row * omega
    quarters = [np.sin(column_angle), np.cos(column_angle), np.sin(row_angle), np.cos(row_angle)]
    table = np.concatenate(quarters, axis=1)                                   # (N, dim)
    table = np.pad(table, ((1, 0), (0, 0)))                                    # (1 + N, dim)
    return torch.from_numpy(table).float().unsqueeze(0)


class PatchEmbed(nn.Module):
    """A linear layer on patches. Its parameters have a convolution's shapes, as in timm and in the
    released checkpoints; used as a matrix, they can embed the visible patches alone."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, patches):                                                # (B, K, P*P*C)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)               # (D, P*P*C)
        return F.linear(patches, weight, self.proj.bias)                       # (B, K, D)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, causal=False):
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                       # (B, T, D)
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)      # (B, heads, T, d)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


def quick_gelu(x):
    """OpenAI CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim, act=F.gelu):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, act=F.gelu, eps=1e-6, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT encoder whose parameters are named as in the released MAE, DINO and timm checkpoints.

    image_size: side in pixels, or (height, width); CLIP's has a norm before the blocks (pre_norm),
    learned positions, QuickGELU and eps 1e-5."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0, pre_norm=False,
                 learned=False, act=F.gelu, eps=1e-6):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch_size, self.grid = patch_size, (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=learned)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, act, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)

    def init_weights(self):
        """Xavier-uniform matrices, zero biases, tokens N(0, 0.02) (as MAE and FLIP, released code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))         # (D, C*P*P)
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward_features(self, patches, visible=None):
        """patches (B, N, P*P*C) -> tokens after the last norm (B, 1 + K, D), the class token first.

        visible (B, K): the patches to look at; the others are not touched. None: all."""
        pos = self.pos_embed[:, 1:]                                            # (1, N, D)
        if visible is not None:
            patches = gather_tokens(patches, visible)                          # (B, K, P*P*C)
            pos = pos[0, visible]                                              # (B, K, D)
        x = self.patch_embed(patches) + pos                                    # (B, K, D)
        cls = self.cls_token + self.pos_embed[:, :1]                           # (1, 1, D)
        cls = cls.expand(x.shape[0], -1, -1)                                   # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, 1 + K, D)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextTower(nn.Module):
    """ids (B, T) -> features (B, E), not yet normalised, read off the first token or, if causal, off the end token,
    whose id is the largest; padding is attended to (FLIP, released code; CLIP)."""

    def __init__(self, vocab_size, length, width, depth, num_heads, proj_dim, causal=False, act=F.gelu, eps=1e-6):
        super().__init__()
        self.causal = causal
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, 4.0, act, eps, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.proj = nn.Linear(width, proj_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, ids, visible=None):
        """visible (B, K): the places to look at, the first among them in front; None: all."""
        x = self.token_embedding(ids) + self.pos_embed                          # (B, T, width)
        x = x if visible is None else gather_tokens(x, visible)
        for block in self.blocks:
            x = block(x)
        place = ids.argmax(dim=1) if self.causal else torch.zeros_like(ids[:, 0])
        return self.proj(self.norm(gather_tokens(x, place.unsqueeze(1)))[:, 0])


# ---------------------------------------------------------------------------------------- masking
def random_masking(noise, mask_ratio: float):
    """noise (B, N) -> indices of the visible patches (B, K), those of least noise, and of the
    masked ones (B, M).

    K = floor(N * (1 - mask_ratio)) in floating point, as released: 0.9 leaves 9 of 100 patches."""
    K = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)                                               # (B, N)
    return order[:, :K], order[:, K:]


def text_masking(noise, ids, mask_ratio: float, kind: str):
    """noise, ids (B, T) -> visible places of a caption (B, K), in order. "padding": padding (id 0) is
    left out first; "random": any place is as likely (section 4.1, "text masking"). The first place is
    always visible."""
    noise = noise + (ids == 0) if kind == "padding" else noise.clone()
    noise[:, 0] = -1
    visible, _ = random_masking(noise, mask_ratio)
    return visible.sort(dim=1).values


# -------------------------------------------------------------------------------- target and loss
def pixel_target(patches, norm_pix: bool):
    """patches (B, M, P*P*C) -> what to predict: pixels, or pixels normalised within each patch, by
    its mean and its unbiased variance + 1e-6 (MAE, section 3, "reconstruction target")."""
    if not norm_pix:
        return patches
    mean = patches.mean(dim=-1, keepdim=True)                                  # (B, M, 1)
    var = patches.var(dim=-1, keepdim=True)                                    # (B, M, 1)
    return (patches - mean) / (var + 1e-6).sqrt()


def reconstruction_loss(prediction, target):
    """Mean squared error on the masked patches (MAE, section 3). All images have equally many, so
    the plain mean is MAE's: per patch first, then over the masked patches of the batch."""
    return (prediction.float() - target).square().mean()


class Gather(torch.autograd.Function):
    """Features (B, E) of this process -> those of all processes (G, E), in the order of their ranks.

    The gradient is the sum of what all processes have for this one's features. Each process's loss is a
    mean over its own pairs, and DistributedDataParallel averages the gradients of all processes: so that
    what comes out is the gradient of the mean over all pairs, with no factor anywhere."""

    @staticmethod
    def forward(ctx, x):
        everyone = x.new_empty(common.world_size() * len(x), x.shape[1])
        dist.all_gather_into_tensor(everyone, x.contiguous())
        return everyone

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(common.world_size())[common.rank()]


def contrastive_loss(image, text, scale):
    """InfoNCE in both directions (section 3; CLIP): features image and text (B, E) of this process's
    pairs, of length 1, scale () -> its mean over them; all pairs of all processes are the classes."""
    both = torch.cat([image, text], dim=1)                                      # (B, 2E)
    if common.world_size() > 1:
        both = Gather.apply(both)                                               # (G, 2E)
    images, texts = both.chunk(2, dim=1)                                        # (G, E)
    place = torch.arange(len(image), device=image.device) + common.rank() * len(image)
    return (F.cross_entropy(scale * image @ texts.T, place) + F.cross_entropy(scale * text @ images.T, place)) / 2


# ------------------------------------------------------------------------------------------- FLIP
class FLIP(VisionTransformer):
    """The image tower (this module) and the text tower (`text`).

    towers "flip": mean of the tokens, text read off the first one; "clip" and "open_clip": class token, causal text
    read off the end token, a norm before the blocks."""

    pretrain_only = ("text", "image_proj", "logit_scale", "decoder", "mask_token")    # what is not the encoder

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, text_width, text_depth, text_heads,
                 proj_dim, vocab_size, text_length, mlp_ratio=4.0, mask_ratio=0.5, towers="flip", text_mask_ratio=0.0,
                 text_mask="padding", reconstruction=0.0):
        act, eps = {"flip": (F.gelu, 1e-6), "clip": (quick_gelu, 1e-5), "open_clip": (F.gelu, 1e-5)}[towers]
        clip = towers != "flip"
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, clip, clip, act, eps)
        self.clip, self.mask_ratio, self.text_mask_ratio, self.text_mask = clip, mask_ratio, text_mask_ratio, text_mask
        self.image_proj = nn.Linear(embed_dim, proj_dim, bias=False)
        self.text = TextTower(vocab_size, text_length, text_width, text_depth, text_heads, proj_dim, clip, act, eps)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))        # its logarithm, as in CLIP
        self.reconstruction = reconstruction
        if reconstruction:                               # MAE's decoder, of half the encoder's width
            width = embed_dim // 2
            self.decoder_embed = nn.Linear(embed_dim, width)
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.decoder_pos_embed = nn.Parameter(sincos_positions(width, self.grid), requires_grad=False)
            self.decoder_blocks = nn.ModuleList([Block(width, max(1, num_heads // 2), mlp_ratio)])
            self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
            self.decoder_pred = nn.Linear(width, 3 * patch_size ** 2)
        self.init_weights()

    def patches(self, images):
        """Images (B, 3, H, W), normalised by data.MEAN and STD -> patches (B, N, P*P*3), normalised as the
        tower wants them."""
        if self.clip:
            scale, shift = clip_scale(images.device)
            images = images * scale + shift
        return patchify(images, self.patch_size)

    def encode(self, images):
        """Normalised images (B, 3, H, W) -> all tokens (B, 1 + N, D); nothing is ever masked."""
        return self.forward_features(self.patches(images))

    def pooled(self, tokens):
        """Tokens (B, 1 + K, D) -> features (B, E) fp32 of length 1."""
        x = tokens[:, 0] if self.clip else tokens.mean(dim=1)            # the class token, too (released code)
        return F.normalize(self.image_proj(x).float(), dim=-1)

    def encode_image(self, images):
        """Normalised images (B, 3, H, W) -> features (B, E) fp32 of length 1, of the whole images."""
        return self.pooled(self.encode(images))

    def encode_text(self, ids, visible=None):
        """ids (B, T) -> features (B, E) fp32 of length 1."""
        return F.normalize(self.text(ids, visible).float(), dim=-1)

    def decode(self, latent, visible, masked):
        """latent (B, 1 + K, D) -> decoder tokens (B, 1 + N, D/2): class token, visible, then masked."""
        x = self.decoder_embed(latent)                                         # (B, 1 + K, D/2)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1)                                 # (B, 1 + N, D/2)
        position_ids = torch.cat([visible, masked], dim=1) + 1                 # (B, N)
        position_ids = F.pad(position_ids, (1, 0))                             # (B, 1 + N), class: 0
        x = x + self.decoder_pos_embed[0, position_ids]
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def embed(self, images, ids, noise):
        """Features (B, E) of images and of ids, masked by the noise, and MAE's loss (0. if not asked
        for)."""
        patches = self.patches(images)                                         # (B, N, P*P*3)
        visible = None
        text_visible = None
        extra = 0.0
        if self.mask_ratio:                                                    # (B, K), (B, M)
            visible, masked = random_masking(noise[:, :patches.shape[1]], self.mask_ratio)
        latent = self.forward_features(patches, visible)                       # (B, 1 + K, D)
        if self.reconstruction:
            decoded = self.decode(latent, visible, masked)                     # (B, 1 + N, D/2)
            decoded = decoded[:, 1 + visible.shape[1]:]                        # (B, M, D/2)
            prediction = self.decoder_pred(self.decoder_norm(decoded))         # (B, M, P*P*3)
            target = pixel_target(gather_tokens(patches, masked), norm_pix=True)
            extra = reconstruction_loss(prediction, target)
        if self.text_mask_ratio:
            text_noise = noise[:, patches.shape[1]:]                           # (B, T)
            text_visible = text_masking(text_noise, ids, self.text_mask_ratio, self.text_mask)
        return self.pooled(latent), self.encode_text(ids, text_visible), extra

    def forward(self, images, ids, noise=None, cached=None, part=0):
        """images (B, 3, H, W), normalised; ids (B, T); noise (B, N + T) in [0, 1) decides the masks.

        Returns the loss, and the features of images and texts (B, E). cached: features (parts, B, E) of the
        images and of the texts of a step that is done in parts; those of this part are replaced by ones with a
        gradient, and the loss is that of the whole step."""
        if noise is None:
            noise = torch.rand(len(images), self.grid[0] * self.grid[1] + ids.shape[1], device=images.device)
        image, text, extra = self.embed(images, ids, noise)
        scale, all_images, all_texts = self.logit_scale.exp(), image, text
        if cached is not None:
            both = zip(cached, (image, text))
            all_images, all_texts = (torch.cat([*old[:part], new, *old[part + 1:]]) for old, new in both)
            scale = scale if part == len(cached[0]) - 1 else scale.detach()     # its gradient counts once
        with torch.autocast(images.device.type, enabled=False):                 # fp32, whatever the towers are in
            loss = contrastive_loss(all_images, all_texts, scale)
        return loss + self.reconstruction * extra, image, text


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@functools.cache
def clip_scale(device):
    """(scale, shift), each (3, 1, 1): from our normalisation of images to CLIP's."""
    ours, theirs = data.mean_std(device), torch.tensor([CLIP_MEAN, CLIP_STD], device=device).view(2, 3, 1, 1)
    return ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]


def build(cfg: Config) -> FLIP:
    """The untrained model of a configuration; the seed decides its weights."""
    torch.manual_seed(cfg.seed)
    return FLIP(cfg.image_size, cfg.patch_size, *(getattr(cfg, field) for field in SIZE_FIELDS), cfg.vocab_size,
                cfg.text_length, cfg.mlp_ratio, cfg.mask_ratio, cfg.towers, cfg.text_mask_ratio, cfg.text_mask,
                cfg.reconstruction)


def multiplications(cfg: Config, mask_ratio: float) -> float:
    """Of the forward pass of both towers for one pair: of the projection of patches, of the blocks, of attention."""
    side = cfg.image_size // cfg.patch_size
    K, T = int(side ** 2 * (1 - mask_ratio)), int(cfg.text_length * (1 - cfg.text_mask_ratio))
    blocks = lambda n, D, depth, ratio: depth * ((4 + 2 * ratio) * n * D ** 2 + 2 * n ** 2 * D)
    return (3 * K * cfg.patch_size ** 2 * cfg.embed_dim + blocks(1 + K, cfg.embed_dim, cfg.depth, cfg.mlp_ratio)
            + blocks(T, cfg.text_width, cfg.text_depth, 4))


# ---------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Train and measure both towers; returns the last line of metrics.jsonl. With --zero-shot, only measure."""
    if cfg.zero_shot:
        return score_weights(cfg)
    device = common.init_distributed(cfg)
    tokenizer = Tokenizer(cfg)
    source = open_source(cfg, tokenizer)
    splits = source.splits
    splits.pretrain.transform = data.augment(cfg.image_size, cfg.crop_scale)
    model = build(cfg).to(device)
    if cfg.init:
        weights, told = read_weights(cfg.init)
        names = ("towers", "text_cls", "num_heads", "text_heads")
        differ = [f"--{name.replace('_', '-')} {told[name]}" for name in names
                  if told.get(name, getattr(cfg, name)) != getattr(cfg, name)]
        if differ:
            raise common.UserError(f"{cfg.init} is of {', '.join(differ)}")
        refuse_clip_towers(cfg.init, weights, cfg.towers)
        common.load_weights(model, cfg.init, optional=DECODER, weights=weights)
    groups = common.parameter_groups(model, cfg.weight_decay, ("pos_embed", "text.pos_embed"))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)                # table 10
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    run = common.Run("flip", cfg, model, optimizer, steps_per_epoch)
    patches = model.grid[0] * model.grid[1]
    share = multiplications(cfg, cfg.mask_ratio) / multiplications(cfg, 0)
    common.log(f"{common.count_parameters(model):,} parameters, "
               f"{int(patches * (1 - cfg.mask_ratio))} of {patches} patches visible: "
               f"{share:.2f} of the multiplications")
    if cfg.compile:
        model.embed = torch.compile(model.embed)
    network = model                                      # network: the model as all processes share it
    if common.world_size() > 1:
        network = DistributedDataParallel(model)
    amp = common.autocast(device, cfg.precision)
    shown, texts = examples(source)
    if shown is not None:
        sample_images = data.sample_images(shown, cfg.image_size, len(texts), device)
        sample = (sample_images, texts, tokenizer.all(texts).to(device))
    batches = splits.pretrain.batches(cfg, run.first_step, run.last_step)

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        width = patches + cfg.text_length                                      # N + T
        noise = common.mask_noise(cfg, step, width, device)                    # (accumulate, B, N + T)
        parts = []
        for i, (images, ids, *_) in enumerate(micro_batches):
            images = data.to_device(images, device)
            ids = ids.to(device, non_blocking=True)
            parts.append((images, ids, noise[i]))
        cached = None
        if cfg.accumulate > 1:
            # All pairs of a step are negatives of each other: so first the features of all, without
            # gradient, then each part once more, with gradient, against the stored ones of the others
            # (GradCache, arXiv 2101.06983).
            with torch.no_grad(), amp:
                features = [model.embed(*part)[:2] for part in parts]
            cached = [torch.stack(of_parts) for of_parts in zip(*features)]    # each (parts, B, E)
        for i, (images, ids, part_noise) in enumerate(parts):
            with common.sync_on_last(network, i, cfg.accumulate):              # all-reduce once a step
                with amp:
                    loss, *_ = network(images, ids, part_noise, cached, i)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if run.end_step(step, loss.detach(), lr) and common.rank() == 0 and texts:
            save_visualization(model, *sample, run.folder / "similarity.png")

    run.save_encoder(model)
    told = HEADS.get(cfg.embed_dim, cfg.embed_dim // 64), cfg.text_width // 64      # CLIP's names do not tell of heads
    if cfg.towers != "flip" and told == (cfg.num_heads, cfg.text_heads):
        if common.rank() == 0:
            common.save_atomic(to_clip(model), run.folder / "clip.pt")
        common.log(f"wrote {run.folder}/clip.pt, all weights in CLIP's names")
    if common.rank() == 0 and texts:                     # again: a kill may have left an older one
        save_visualization(model, *sample, run.folder / "similarity.png")
    scores = score(model, source, cfg, tokenizer, device)
    if isinstance(splits.pretrain, Shards):              # no labels, no files: it counts on its own
        common.log(f"met in all epochs of this run: {splits.pretrain.summary(device)}")
        scores["unreadable"] = splits.pretrain.counts(device)[0]
    else:
        encoders = {"pixels": data.small_pixels,
                    "trained": data.mean_patch_token(model),
                    "untrained": data.mean_patch_token(build(cfg).to(device))}
        scores |= data.score_encoders(encoders, splits, cfg, device)
    metrics = run.finish(scores)
    common.log(f"try next: python flip.py --zero-shot {run.folder}/checkpoint.pt --data {cfg.data}")
    return metrics


# ------------------------------------------------------------------------------------------- text
class Bytes:
    """Without a vocabulary: a text's UTF-8 bytes. 0 is padding, 1 + b byte b, then start and end."""
    start, end, size = 257, 258, 259

    def __call__(self, text: str) -> list[int]:
        return [1 + byte for byte in " ".join(text.split()).encode()]


class WordPieces:
    """BERT's uncased word pieces: the longest ones of the list first, ## where a word goes on."""

    def __init__(self, lines: list[str]):
        self.number = {piece: i for i, piece in enumerate(lines)}
        self.start, self.end, self.unknown = (self.number[name] for name in ("[CLS]", "[SEP]", "[UNK]"))
        self.size = len(lines)

    def __call__(self, text: str) -> list[int]:
        letters = [c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn"]
        text = "".join(f" {c} " if self.alone(c) else " " if c.isspace() else c for c in letters
                       if c.isspace() or unicodedata.category(c)[0] != "C" and c != "\ufffd")
        return [number for word in text.split() for number in self.pieces(word)]

    @staticmethod
    def alone(c: str) -> bool:
        """Whether a character is a word of its own: punctuation, symbols of ASCII, Chinese characters."""
        return (unicodedata.category(c)[0] == "P" or c.isascii() and c.isprintable() and not c.isalnum() and c != " "
                or any(first <= ord(c) <= last for first, last in CHINESE))

    def pieces(self, word: str) -> list[int]:
        if len(word) > 100:
            return [self.unknown]
        found, mark = [], ""
        while word:
            end = next((end for end in range(len(word), 0, -1) if mark + word[:end] in self.number), None)
            if end is None:
                return [self.unknown]
            found.append(self.number[mark + word[:end]])
            word, mark = word[end:], "##"
        return found


class BytePairs:
    """CLIP's lower-case byte pairs: the symbols of a word are joined, the pair highest up in the list first."""

    def __init__(self, lines: list[str]):
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]           # bytes that look like something
        others = [byte for byte in range(256) if byte not in plain]
        self.letter = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        merges = [tuple(line.split()) for line in lines[1:1 + 48894] if line]    # the first line is a title
        symbols = list(self.letter.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        self.number = {symbol: i for i, symbol in enumerate(symbols)}
        self.order = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end, self.size = len(symbols), len(symbols) + 1, len(symbols) + 2
        numeral = "".join(c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c)[0] == "N")
        # endings like 's, runs of letters, single numerals (re has no \p{N}), runs of anything else but spaces
        self.word = re.compile(rf"'(?:s|t|re|ve|m|ll|d)|[^\W{numeral}_]+|[{numeral}]|(?:[^\s\w]|_)+")

    def __call__(self, text: str) -> list[int]:
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        return [number for word in self.word.findall(text) for number in self.join(word)]

    @functools.lru_cache(2 ** 16)                        # the common words come back at once
    def join(self, word: str) -> list[int]:
        parts = [self.letter[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            first = min(zip(parts, parts[1:]), key=lambda pair: self.order.get(pair, math.inf))
            if first not in self.order:
                break
            joined, i = [], 0
            while i < len(parts):                        # wherever the pair stands, from left to right
                width = 2 if tuple(parts[i:i + 2]) == first else 1
                joined.append("".join(parts[i:i + width]))
                i += width
            parts = joined
        return [self.number[part] for part in parts]


CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
           (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))            # as BERT has them


@functools.cache
def open_vocabulary(path: str):
    """Bytes, WordPieces (.txt: a piece a line) or BytePairs (.gz: a pair a line). Raises UserError."""
    if not path:
        return Bytes()
    try:
        if path.endswith(".gz"):
            return BytePairs(gzip.decompress(Path(path).read_bytes()).decode().split("\n"))
        if path.endswith(".txt"):
            return WordPieces(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))
    except (OSError, EOFError, KeyError, ValueError) as error:
        raise common.UserError(f"no vocabulary can be read from {path}: {common.first_line(error)}") from error
    raise common.UserError(f"--vocab {path}: word pieces are in a .txt (BERT's vocab.txt), byte pairs in a .gz (CLIP's "
                           "bpe_simple_vocab_16e6.txt.gz)")


class Tokenizer:
    """text -> int64 ids (T,), 0 behind the end; what is too long is cut, the end token stays."""

    def __init__(self, cfg: Config):
        self.vocabulary, self.length = open_vocabulary(cfg.vocab), cfg.text_length
        self.front = [self.vocabulary.start] * cfg.text_cls
        self.back = [self.vocabulary.end] * (cfg.towers != "flip")              # the released FLIP has none
        if self.vocabulary.size != cfg.vocab_size:
            raise common.UserError(f"the model has {cfg.vocab_size} ids, --vocab {cfg.vocab or 'of bytes'} "
                                   f"{self.vocabulary.size}; CLIP's is bpe_simple_vocab_16e6.txt.gz")

    def __call__(self, text: str):
        room = self.length - len(self.front) - len(self.back)
        ids = torch.tensor(self.front + self.vocabulary(text)[:room] + self.back, dtype=torch.int64)
        return F.pad(ids, (0, self.length - len(ids)))

    def all(self, texts):
        """n texts -> (n, T)."""
        return torch.stack([self(text) for text in texts])


# ------------------------------------------------------------------------------ images with text
class Texts:
    """Lists of strings, kept in two arrays: millions of them need little memory, which workers share."""

    def __init__(self, lists):
        packed = ["\n".join(texts).encode() for texts in lists]                 # captions have no line ends
        self.bytes, self.ends = np.frombuffer(b"".join(packed), np.uint8), np.cumsum([0, *map(len, packed)])

    def __getitem__(self, i: int) -> list[str]:
        return self.bytes[self.ends[i]:self.ends[i + 1]].tobytes().decode().split("\n")


class Pairs(data.ImageDataset):
    """Images with captions: an item is (image uint8 (3, H, W), ids (T,), index).

    Of an image's captions an epoch shows one, by (seed, epoch, index). captions: a list of strings for
    each image, or for each label if by_label; tokenizer: string -> ids (T,)."""

    def __init__(self, source, captions, tokenizer, seed=0, labels=None, by_label=False):
        super().__init__(source, labels, seed)
        self.captions, self.tokenizer, self.by_label = Texts(captions), tokenizer, by_label

    def texts(self, index: int) -> list[str]:
        return self.captions[self.labels[index] if self.by_label else index]

    def __getitem__(self, key):
        image, _, index = super().__getitem__(key)
        texts = self.texts(index)
        return image, self.tokenizer(texts[common.derive_seed(self.seed, *key, 1) % len(texts)]), index

    def batches(self, cfg: Config, first: int, last: int):
        """Those of the steps first ... last - 1: (images uint8 (b, 3, S, S), ids (b, T), indices (b))."""
        return data.batches(self, cfg, first, last)


class Shards(IterableDataset):
    """Pairs out of tar shards (webdataset), in whole batches: (images uint8 (b, 3, S, S), ids (b, T)).

    The files of a sample stand together and have the same name up to its first dot: an image, and .txt (a caption a
    line) or .json (its "caption"). Each loader process of each training process is a stream: it reads shards of its
    own, in an order that (seed, epoch) decides (with fewer shards than streams: every n-th pair of all), through a
    buffer of --shuffle pairs. Streams give batches in turn, so a resumed run with as many streams skips undecoded what
    each has given. All pairs come once an epoch if the streams are equally long and --epoch-pairs is not set, else
    equally often on average. An unreadable image is replaced by another pair of the batch, then a negative of
    itself. `troubles` (streams, kinds) counts what was wrong; a shard cut off between two files looks whole."""

    KINDS = ("unreadable images", "images without caption", "captions without image", "unreadable texts",
             "damaged shards")

    def __init__(self, files: list[str], cfg: Config, tokenizer):
        self.files, self.cfg, self.tokenizer, self.transform = files, cfg, tokenizer, None
        lost = [file for file in files if not Path(file).is_file()]
        if lost or not files:
            raise common.UserError(f"{len(lost)} of {len(files)} shards are not there: {', '.join(lost[:3])}")
        self.batch = cfg.batch_size // (common.world_size() * cfg.accumulate)
        self.pairs = cfg.epoch_pairs or count_pairs(files)
        if not self.pairs:
            raise common.UserError(f"no pair of image and caption in {', '.join(files[:3])}")
        streams = common.world_size() * max(1, cfg.workers)
        self.troubles = torch.zeros(streams, len(self.KINDS), dtype=torch.int64).share_memory_()

    def counts(self, device) -> list[int]:
        """How often each of KINDS was met, by all processes and in all epochs since the start."""
        troubles = self.troubles.to(device)
        if common.world_size() > 1:
            dist.all_reduce(troubles, dist.ReduceOp.MAX)         # each has filled rows of its own
        return troubles.sum(dim=0).tolist()

    def summary(self, device) -> str:
        """What was wrong, in words."""
        return ", ".join(f"{count} {kind}" for kind, count in zip(self.KINDS, self.counts(device)))

    def trouble(self, stream: int, kind: str, name: str, error=""):
        counts = self.troubles[stream]
        counts[self.KINDS.index(kind)] += 1
        if counts.sum() <= 10:
            tqdm.write(f"skipped ({kind}; each loader process names its first ten): {name} {error}", file=sys.stderr)

    def __len__(self):
        return self.pairs

    def batches(self, cfg: Config, first: int, last: int):
        """Those of the steps first ... last - 1."""
        self.passes = self.pairs // cfg.batch_size * cfg.accumulate             # in an epoch
        self.first, self.last = first * cfg.accumulate, last * cfg.accumulate
        return data.loader(self, None, cfg.workers)

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        now, streams = None, common.world_size() * workers
        for i in range(self.first + worker, self.last, workers):
            epoch, place = divmod(i, self.passes)
            if epoch != now:
                stream, now, position = common.rank() * workers + i % workers, epoch, place // workers * self.batch
                pairs = itertools.islice(self.stream(epoch, stream, streams), position, None)
            images, ids = [], []
            for name, content, captions in itertools.islice(pairs, self.batch):
                seed = common.derive_seed(self.cfg.seed, epoch, stream, position)
                position += 1
                try:
                    with torch.random.fork_rng(devices=[]):
                        torch.default_generator.manual_seed(seed)
                        image = self.transform(data.decode(content))
                except OSError as error:
                    self.trouble(stream, "unreadable images", name, error)
                    continue
                images.append(image), ids.append(self.tokenizer(captions[seed % len(captions)]))
            if not images:
                raise common.UserError(f"none of {self.batch} images can be read; the last was {name}")
            chosen = torch.arange(self.batch) % len(images)                     # the good ones step in
            yield torch.stack(images)[chosen], torch.stack(ids)[chosen]

    def stream(self, epoch: int, stream: int, streams: int):
        """The pairs (name, image's bytes, captions) of one of several streams, without end."""
        order = np.random.RandomState(common.derive_seed(self.cfg.seed, epoch)).permutation(len(self.files))
        enough = len(self.files) >= streams
        mine = [self.files[i] for i in (order[stream::streams] if enough else order)]
        chance, buffer, met, last = random.Random(common.derive_seed(self.cfg.seed, epoch, stream)), [], 0, -1
        while met > last:                                # until a whole round finds nothing
            last = met
            for pair in itertools.chain.from_iterable(self.read(file, stream) for file in mine):
                met += 1
                if enough or met % streams == stream:
                    buffer.append(pair)
                if len(buffer) >= self.cfg.shuffle:
                    i = chance.randrange(len(buffer))
                    buffer[i], buffer[-1] = buffer[-1], buffer[i]
                    yield buffer.pop()
            chance.shuffle(buffer)
            yield from buffer
            buffer = []
        raise common.UserError(f"no pair of image and caption in {', '.join(mine[:3])}")

    def read(self, file: str, stream: int):
        """The pairs of one shard."""
        for name, sample in itertools.groupby(self.members(file, stream), key=lambda member: member[0]):
            parts = {ending: content for _, ending, content in sample}
            image = next((parts[ending] for ending in ENDINGS if ending in parts), None)
            try:
                texts = captions_of(parts)
            except ValueError as error:
                self.trouble(stream, "unreadable texts", f"{file}: {name}", error)
                continue
            if image and texts:
                yield f"{file}: {name}", image, texts
            elif image or texts:
                kind = "images without caption" if image else "captions without image"
                self.trouble(stream, kind, f"{file}: {name}")

    def members(self, file: str, stream: int):
        """(name up to the first dot, ending, bytes) of a shard's files, as far as it can be read."""
        try:
            with tarfile.open(file, "r|*") as tar:
                for name, ending, member in files_in(tar):
                    yield name, ending, tar.extractfile(member).read()
        except DAMAGE as error:
            self.trouble(stream, "damaged shards", file, error)


TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$")
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)      # what reading a tar can raise
ENDINGS = [ending[1:] for ending in data.ENDINGS]


def captions_of(parts: dict) -> list[str]:
    """{ending: bytes} of one sample -> its captions: the lines of txt, else caption in json; not empty
    ones. Raises ValueError."""
    if "txt" in parts:
        texts = parts["txt"].decode().splitlines()
    else:
        texts = json.loads(parts.get("json", b"{}"))
        texts = texts.get("caption") if isinstance(texts, dict) else None
    return cleaned(texts)


def cleaned(texts) -> list[str]:
    """A string, a list of strings, or something else -> strings that are not empty. Raises ValueError if
    they are not Unicode."""
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    texts = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    "".join(texts).encode()                              # half of a surrogate pair is not
    return texts


def expand(pattern: str) -> list[str]:
    """Tar files: of a folder, a file, a glob, or numbers like {000..123}; several with :: between."""
    found = []
    for part in pattern.split("::"):
        number = re.search(r"\{(\d+)\.\.(\d+)\}", part)
        if number:
            low, high = number.groups()
            before, after = part[:number.start()], part[number.end():]
            for i in range(int(low), int(high) + 1):
                found += expand(f"{before}{i:0{len(low)}}{after}")
        else:
            found += tars_in(Path(part)) or sorted(glob.glob(part)) or [part]
    return found


def count_pairs(files: list[str]) -> int:
    """How many pairs shards hold: by sizes.json beside them ({name: pairs}), or else by their headers.
    The first process counts for all. Raises UserError."""
    @functools.cache
    def sizes(folder: Path) -> dict:
        if not (folder / "sizes.json").is_file():
            common.log(f"counting the pairs in {folder}; --epoch-pairs, or a sizes.json, spares it")
            return {}
        try:
            return {name: int(count) for name, count in json.loads((folder / "sizes.json").read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise common.UserError(f"{folder}/sizes.json is not {{name: number of pairs}}: "
                                   f"{common.first_line(error)}") from error

    count = [0]
    for file in map(Path, tqdm(files, "counting", disable=None, leave=False) if common.rank() == 0 else ()):
        count[0] += sizes(file.parent).get(file.name) or count_in(file)
    if common.world_size() > 1:
        dist.broadcast_object_list(count)
    return count[0]


def count_in(file: Path) -> int:
    """The samples of a shard that have an image and a text, as far as it can be read."""
    count = 0
    with contextlib.suppress(*DAMAGE), tarfile.open(file) as tar:
        for _, sample in itertools.groupby(files_in(tar), key=lambda each: each[0]):
            endings = {ending for _, ending, _ in sample}
            count += bool(endings & set(ENDINGS)) and bool(endings & {"txt", "json"})
    return count


def files_in(tar):
    """(name up to the first dot, ending, header) of each file in an open tar."""
    while member := tar.next():
        tar.members.clear()                              # it would keep the headers of all
        if member.isfile():
            folder, _, name = member.name.rpartition("/")
            name, _, ending = name.partition(".")
            yield f"{folder}/{name}", ending.lower(), member


class Source(NamedTuple):
    """What there is to train on, and to score with."""
    splits: data.Splits                        # pretrain: Pairs or Shards; train, test: for k-NN
    retrieval: Pairs | None = None             # labels: the images' numbers
    labelled: data.ImageDataset | None = None  # for the zero-shot accuracy; labels: classes
    prompts: list = ()                         # of each class: its texts
    held_out: np.ndarray | None = None         # (classes,) bool: those of shapes that are not trained on


def is_shards(where: str) -> bool:
    """Tar files, or a folder of them; not one that has its images in train/, too, like ImageNet's."""
    part = where.split("::")[0]
    return bool(TAR.search(part)) or tars_in(Path(part)) != [] and not Path(part, "train").is_dir()


def tars_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if TAR.search(path.name)) if folder.is_dir() else []


def is_listed(where: str) -> bool:
    """Whether it is a list of pairs, or a folder of images with a .txt or .json of the same name."""
    first = itertools.islice(images_in(Path(where)), 100) if Path(where).is_dir() else ()
    return Path(where).suffix in (".csv", ".tsv", ".json") or any(text_beside(image) for image in first)


def images_in(folder: Path):
    return (path for path in folder.rglob("*") if path.suffix.lower() in data.ENDINGS)


def text_beside(image: Path) -> Path | None:
    return next((path for e in (".txt", ".json") if (path := image.with_suffix(e)).is_file()), None)


def listed(where: str, root: str) -> tuple[list, list]:
    """Pairs (path, captions) to train on and to test on (where the list tells them apart, else none): of a
    .csv or .tsv; a .json of COCO's captions or of Karpathy's splits; a folder with texts beside the
    images, or with such train/ and val/. What is incomplete is left out and counted. Raises UserError."""
    path, found = Path(where), []
    counts = dict.fromkeys(("images without caption", "captions without image", "unreadable texts"), 0)
    root = Path(root) if root or path.is_dir() else path.parent
    try:
        if path.is_dir():
            parts = [path / "train", path / "val"] if (path / "train").is_dir() and (path / "val").is_dir() else [path]
            parts = [folder_rows(part, counts) for part in parts]
        else:
            parts = json_rows(json.loads(path.read_bytes())) if path.suffix == ".json" else [table_rows(path)]
        for rows in parts:
            pairs = {}
            for image, texts in rows:                    # an image with several captions may have several rows
                try:
                    texts = cleaned(texts)
                except ValueError:
                    counts["unreadable texts"] += 1
                    texts = []
                if image:
                    pairs.setdefault(str(root / image), []).extend(texts)
                else:
                    counts["captions without image"] += len(texts)
            counts["images without caption"] += sum(not texts for texts in pairs.values())
            found.append([pair for pair in pairs.items() if pair[1]])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as error:
        raise common.UserError(f"{where} cannot be read as pairs of image and caption: {type(error).__name__} "
                               f"{common.first_line(error)}") from error
    if not any(found):
        raise common.UserError(f"no pair of image and caption in {where}")
    first = [path for path, _ in (found[0] or found[1])[:100]]
    if not any(map(os.path.isfile, first)):
        raise common.UserError(f"none of the first {len(first)} images of {where} is there, e.g. {first[0]}; "
                               "--image-root says what its paths start from")
    common.log(f"{where}: {' and '.join(f'{len(pairs)} images' for pairs in found)} with captions; left out: "
               + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return found[0], found[1] if len(found) > 1 else []


COLUMNS = (("filepath", "image", "path", "file_name", "filename", "image_path", "file"),
           ("title", "caption", "text", "captions"))


def table_rows(path: Path):
    """(image, caption) of a table with a title row, by tabs or commas. What is not UTF-8 is escaped."""
    csv.field_size_limit(2 ** 24)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        rows = csv.DictReader(file, delimiter=delimiter)
        names = rows.fieldnames or []
        image, text = (next((n for n in names if n.lower().strip() in known), None) for known in COLUMNS)
        if not image or not text:
            raise ValueError(f"it has the columns {names}; one of {COLUMNS[0]} and one of {COLUMNS[1]} are needed")
        yield from ((row[image], row[text]) for row in rows)


def json_rows(content) -> list:
    """[rows], or [rows to train on, rows to test on], of (image, caption)."""
    if "annotations" in content:                         # COCO: images {id, file_name}, annotations {image_id, caption}
        name = {image["id"]: image["file_name"] for image in content["images"]}
        captioned = ((name.get(a["image_id"]), a["caption"]) for a in content["annotations"])
        return [itertools.chain(((file, None) for file in name.values()), captioned)]
    parts = {"train": [], "test": [], "val": []}         # Karpathy: images {filepath, filename, split, sentences {raw}}
    parts["restval"] = parts["train"]
    for image in content["images"]:
        path = os.path.join(image.get("filepath", ""), image["filename"])
        parts[image["split"]].append((path, [sentence["raw"] for sentence in image["sentences"]]))
    return [parts["train"], parts["test"]]


def folder_rows(folder: Path, counts: dict):
    lonely = {path.with_suffix("") for path in folder.rglob("*") if path.suffix in (".txt", ".json")}
    for image in sorted(images_in(folder)):
        text = text_beside(image)
        lonely.discard(image.with_suffix(""))
        try:
            texts = captions_of({text.suffix[1:]: text.read_bytes()}) if text else []
        except ValueError:
            counts["unreadable texts"] += 1
            continue
        yield image, texts
    counts["captions without image"] += len(lonely)


def pairs_to_score(where: str, root: str, cfg: Config) -> list:
    """(path or image, captions): the test part of a list, or all of it; the first 5,000 pairs of shards."""
    if not is_shards(where):
        train, test = listed(where, root)
        return test or train
    shards, found = Shards(expand(where), replace(cfg, epoch_pairs=1), None), []
    crop = data.CenterCrop(cfg.image_size, margin=False)
    for file in shards.files:
        for name, content, captions in itertools.islice(shards.read(file, 0), 5000 - len(found)):
            try:
                found.append((crop(data.decode(content)), captions))
            except OSError as error:
                shards.trouble(0, "unreadable images", name, error)
    if not found:
        raise common.UserError(f"no pair of image and caption in {where}")
    return found


def open_source(cfg: Config, tokenizer: Tokenizer) -> Source:
    """What --data names, to train on and to score with, or only to score with (--zero-shot). Raises UserError.

    Retrieval: the pairs of --test-data; else those that a list keeps for testing; else, in training, every tenth
    image of the list, at most 1,000, which are then not trained on; with --zero-shot all pairs of a list, or the
    first 5,000 of shards."""
    pairs = functools.partial(Pairs, tokenizer=tokenizer, seed=cfg.seed)
    training, test, classes = None, [], cfg.data == "shapes" or not is_shards(cfg.data) and not is_listed(cfg.data)
    if cfg.test_data:
        test = pairs_to_score(cfg.test_data, cfg.test_root, cfg)
    elif cfg.zero_shot and not classes:
        test = pairs_to_score(cfg.data, cfg.image_root, cfg)
        common.log(f"{cfg.data}: if a run was trained on it, only what the list itself keeps for testing was not")
    if classes:
        source = open_shapes(pairs) if cfg.data == "shapes" else open_classes(cfg, pairs)
        return source._replace(retrieval=numbered(pairs, test)) if test else source
    if is_shards(cfg.data) and not cfg.zero_shot:
        training = Shards(expand(cfg.data), cfg, tokenizer)
    elif not cfg.zero_shot:
        train, kept = listed(cfg.data, cfg.image_root)
        if not train:
            raise common.UserError(f"{cfg.data} has pairs to test on only")
        if not kept and not test:
            every = max(10, math.ceil(len(train) / 1000))
            common.log(f"no --test-data: every {every}th image is kept for testing")
            train, kept = [p for i, p in enumerate(train) if i % every < every - 1], train[every - 1::every]
        training, test = pairs(*zip(*train)), test or kept
    if not test:
        common.log("no --test-data: nothing is scored at the end")
    return Source(data.Splits(training, None, None, []), numbered(pairs, test) if test else None)


def numbered(pairs, test: list) -> Pairs:
    """Pairs (image or path, captions) with their own numbers as labels."""
    images, texts = zip(*test)
    images = torch.stack(images) if torch.is_tensor(images[0]) else images
    return pairs(images, texts, labels=np.arange(len(test)))


def open_classes(cfg: Config, pairs) -> Source:
    """Images with classes, of which captions and prompts are made; tested on the test set's. Raises UserError."""
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    if splits.train is None:
        raise common.UserError(f"{cfg.data} has neither captions nor class folders to train on and to test on")
    names, templates = class_names(cfg, splits.classes), TEMPLATES
    if cfg.templates:
        templates = [line for line in read_text(cfg.templates).splitlines() if line.strip()]
        if not templates or not all("{}" in line for line in templates):
            raise common.UserError(f"--templates {cfg.templates}: one prompt a line, each with {{}} for the class")
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    least = math.log(1 + (cfg.batch_size - 1) / len(names))
    common.log(f"captions: {len(templates)} templates x {len(names)} classes, e.g. {prompts[0][0]!r}. Images of one "
               f"class are each other's negatives in a batch: the loss stays above about {least:.2f}")
    training = pairs(splits.train.source, prompts, labels=splits.train.labels, by_label=True)
    # no val/: part of train/ is the test set
    labelled = splits.test
    folder = Path(cfg.data)
    if cfg.zero_shot and folder.is_dir() and data.find_splits(folder)[1] is None:
        # nothing is trained, so all images of a folder without test images are scored
        files = np.concatenate([splits.train.source, splits.test.source])
        labels = np.concatenate([splits.train.labels, splits.test.labels])
        labelled = data.ImageDataset([os.fsdecode(file) for file in files], labels, cfg.seed)
    return Source(splits._replace(pretrain=training), None, labelled, prompts)


def class_names(cfg: Config, folders: list[str]) -> list[str]:
    """How the classes are called: by --classnames; ImageNet's by torchvision; else as their folders."""
    if not cfg.classnames:
        if len(folders) == 1000 and folders[0] == "n01440764":
            return ResNet50_Weights.DEFAULT.meta["categories"]   # in the order of the folders' numbers
        if all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
            raise common.UserError(f"the classes are WordNet's numbers ({folders[0]}, ...): --classnames says what "
                                   "they are called (Tiny ImageNet's words.txt will do)")
        return [folder.replace("_", " ") for folder in folders]
    text = read_text(cfg.classnames)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    try:
        if cfg.classnames.endswith(".json"):
            name = json.loads(text)
        elif all("\t" in line for line in lines):        # "n00004475<tab>organism, being"
            name = {folder: names.split(",")[0] for folder, names in (line.split("\t") for line in lines)}
        else:
            name = dict(zip(folders, lines, strict=True))
        return [name[folder].strip() for folder in folders]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise common.UserError(f"--classnames {cfg.classnames}: {common.first_line(error)}; it needs a name "
                               f"for each of the {len(folders)} class folders: lines in their order, or folder, tab, "
                               "name, or JSON {folder: name}") from error


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise common.UserError(f"{path} cannot be read: {common.first_line(error)}") from error


def open_shapes(pairs) -> Source:
    """The synthetic shapes, but for the pairs HELD_OUT, to train on; all 64 pairs of color and shape as the
    classes; a test image of each for retrieval."""
    train = data.synthetic_shapes("train", np.arange(10_000))
    test = data.synthetic_shapes("test", np.arange(2_000))
    train["pair"], test["pair"] = (8 * s["color"] + s["shape"] for s in (train, test))
    held_out = np.isin(np.arange(64), [8 * color + shape for color, shape in data.HELD_OUT])
    one_each = np.unique(test["pair"], return_index=True)[1]
    of = lambda s, rows: (torch.from_numpy(s["image"][rows]), [[str(text)] for text in s["caption"][rows]])
    knn = (data.ImageDataset(torch.from_numpy(s["image"]), s["shape"]) for s in (train, test))
    prompts = [[text.format(a="an" if color == "orange" else "a", color=color, shape=shape)
                for text in data.CAPTIONS] for color in data.COLORS for shape in data.SHAPES]
    return Source(data.Splits(pairs(*of(train, ~held_out[train["pair"]])), *knn, list(data.SHAPES)),
                  pairs(*of(test, one_each), labels=np.arange(64)),
                  data.ImageDataset(torch.from_numpy(test["image"]), test["pair"]), prompts, held_out)


# ---------------------------------------------------------------------------------- CLIP's weights
CLIP_NAMES = (                                           # how names begin: CLIP's, ours
    ("visual.class_embedding", "cls_token"), ("visual.positional_embedding", "pos_embed"),
    ("visual.conv1.", "patch_embed.proj."), ("visual.ln_pre.", "norm_pre."),
    ("visual.transformer.resblocks.", "blocks."), ("visual.ln_post.", "norm."), ("visual.proj", "image_proj.weight"),
    ("token_embedding.", "text.token_embedding."), ("positional_embedding", "text.pos_embed"),
    ("transformer.resblocks.", "text.blocks."), ("ln_final.", "text.norm."), ("text_projection", "text.proj.weight"),
    ("logit_scale", "logit_scale"))
CLIP_BLOCK = ((".ln_1.", ".norm1."), (".ln_2.", ".norm2."), (".attn.in_proj_", ".attn.qkv."),
              (".attn.out_proj.", ".attn.proj."), (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."))


def from_clip(state: dict) -> dict:
    """CLIP's {name: tensor} -> ours, in fp32; names that are not CLIP's stay."""
    found = {}
    for name, value in state.items():
        name = next((new + name.removeprefix(old) for old, new in CLIP_NAMES if name.startswith(old)), name)
        for old, new in CLIP_BLOCK:
            name = name.replace(old, new)
        found[name] = value.float()                      # published in half precision
        if name in ("image_proj.weight", "text.proj.weight"):
            found[name] = found[name].T
    for name, shape in (("cls_token", (1, 1, -1)), ("logit_scale", ())):
        if name in found:
            found[name] = found[name].reshape(shape)
    for name in {"pos_embed", "text.pos_embed"} & found.keys():
        found[name] = found[name].unsqueeze(0)
    if "patch_embed.proj.weight" in found:
        found["patch_embed.proj.bias"] = torch.zeros(len(found["patch_embed.proj.weight"]))
    return found


def to_clip(model: FLIP) -> dict:
    """Our weights in CLIP's names and shapes. It has no bias in its patches: ours goes into the positions."""
    found = {}
    for name, value in model.state_dict().items():
        if name == "patch_embed.proj.bias" or name.startswith(("decoder", "mask_token")):
            continue
        if name == "pos_embed":
            value = torch.cat([value[:, :1], value[:, 1:] + model.patch_embed.proj.bias], dim=1)
        if name in ("image_proj.weight", "text.proj.weight"):
            value = value.T
        if name in ("cls_token", "pos_embed", "text.pos_embed"):
            value = value.squeeze(0).squeeze(0)
        name = next(old + name.removeprefix(new) for old, new in CLIP_NAMES if name.startswith(new))
        for old, new in CLIP_BLOCK:
            name = name.replace(new, old)
        found[name] = value.detach().cpu().contiguous()
    return found


CLIP_DIGESTS = (                                         # SHA-256 of OpenAI's files, which are TorchScript
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",        # ViT-B-32.pt
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",        # ViT-B-16.pt
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",        # ViT-L-14.pt
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",        # ViT-L-14-336px.pt
)
DECODER = ("decoder", "mask_token")                      # how the names begin that a file may have or lack


def read_weights(path: str) -> tuple[dict, dict]:
    """({our name: tensor}, settings): a checkpoint of ours, with its configuration; or CLIP's names
    (OpenAI, open_clip, our clip.pt; also as .safetensors), with what their shapes tell. Raises
    UserError."""
    saved, weights = common.read_weights(path, CLIP_DIGESTS)
    if "method" in saved:
        if saved["method"] != "flip":
            raise common.UserError(f"{path} is of {saved['method']}.py, which has no text tower")
        return weights, saved["config"]
    weights = {name.removeprefix("text."): value for name, value in weights.items()}
    for name in ("input_resolution", "context_length", "vocab_size", "attn_mask"):           # no weights
        weights.pop(name, None)
    weights = from_clip(weights)
    return weights, described(weights, path)


def refuse_clip_towers(path: str, weights: dict, towers: str):
    """Raises UserError if a file holds CLIP's towers and the model has the paper's."""
    if "norm_pre.weight" in weights and towers == "flip":
        raise common.UserError(f"{path} has CLIP's towers: --towers clip (OpenAI's, QuickGELU) or "
                               "open_clip (most others)")


HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}         # by width: open_clip's H, g, G and e; else each is 64 wide


def described(state: dict, path: str) -> dict:
    """The settings that the shapes of CLIP's weights tell. Raises UserError."""
    depth = lambda prefix: len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})
    try:
        width, _, _, patch_size = state["patch_embed.proj.weight"].shape
        vocab_size, text_width = state["text.token_embedding.weight"].shape
        return dict(
            embed_dim=width, depth=depth("blocks."), num_heads=HEADS.get(width, width // 64),
            text_width=text_width, text_depth=depth("text.blocks."), text_heads=text_width // 64,
            vocab_size=vocab_size, proj_dim=len(state["image_proj.weight"]),
            text_length=state["text.pos_embed"].shape[1], text_cls=True, patch_size=patch_size,
            image_size=patch_size * round((state["pos_embed"].shape[1] - 1) ** 0.5),
            mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / width)
    except (KeyError, ValueError) as error:
        raise common.UserError(f"{path} is neither a checkpoint of flip.py nor a CLIP: no {error}") from error


# ------------------------------------------------------------------- zero-shot accuracy, retrieval
@torch.no_grad()
def text_features(model: FLIP, texts, tokenizer: Tokenizer, device):
    """n texts -> (n, E)."""
    return torch.cat([model.encode_text(tokenizer.all(texts[i:i + 500]).to(device)) for i in range(0, len(texts), 500)])


def class_features(model: FLIP, prompts, tokenizer: Tokenizer, device):
    """The texts of each class -> (classes, E): the mean of their features, of length 1 (CLIP)."""
    features = text_features(model, [text for texts in prompts for text in texts], tokenizer, device)
    means = [part.mean(dim=0) for part in features.split([len(texts) for texts in prompts])]
    return F.normalize(torch.stack(means), dim=-1)


def recall(similarity, truth, ks=(1, 5, 10)) -> list[float]:
    """similarity (n, m), truth (n, m) bool: in percent, how many rows have one that is true among the k largest."""
    order = similarity.topk(min(max(ks), similarity.shape[1]), dim=1).indices
    hits = truth.gather(1, order)                                               # (n, at most 10)
    return [100 * hits[:, :k].any(dim=1).float().mean().item() for k in ks]


def score(model: FLIP, source: Source, cfg: Config, tokenizer: Tokenizer, device) -> dict:
    """Zero-shot accuracy and retrieval, printed and returned, in percent; of whole images."""
    found = {}
    crop = data.CenterCrop(cfg.image_size, margin=False)                # CLIP's: the whole shorter side
    size = {"size": cfg.image_size, "device": device, "workers": cfg.workers, "transform": crop}
    if source.labelled is not None:
        images, labels = data.features(model.encode_image, source.labelled, **size)
        logits = images @ class_features(model, source.prompts, tokenizer, device).T           # (n, classes)
        top = data.topk_accuracy(logits, labels)
        found["zero_shot"] = top["top1"]
        if source.held_out is not None:
            held_out = torch.from_numpy(source.held_out).to(device)[labels]
            for name, of in (("seen", ~held_out), ("held_out", held_out)):
                found[f"zero_shot_{name}"] = data.topk_accuracy(logits[of], labels[of])["top1"]
        found["zero_shot_top5"] = top["top5"]
        titles = {"zero_shot": "top-1", "zero_shot_seen": "seen", "zero_shot_held_out": "held out",
                  "zero_shot_top5": "top-5"}
        common.log(f"zero-shot, {logits.shape[1]} classes, {len(labels)} images, chance "
                   f"{100 / logits.shape[1]:.1f} %: " + ", ".join(f"{titles[n]} {v:.1f} %" for n, v in found.items()))
    if source.retrieval is not None:
        images, rows = data.features(model.encode_image, source.retrieval, **size)
        captions = [source.retrieval.texts(row) for row in rows.tolist()]
        owner = torch.tensor([i for i, texts in enumerate(captions) for _ in texts], device=device)
        texts = text_features(model, [text for texts in captions for text in texts], tokenizer, device)
        truth = owner == torch.arange(len(images), device=device)[:, None]      # (images, captions)
        recalls = {"image_to_text": recall(images @ texts.T, truth), "text_to_image": recall(texts @ images.T, truth.T)}
        found |= {f"{name}_{k}": value for name, values in recalls.items() for k, value in zip((1, 5, 10), values)}
        common.log(f"retrieval, {len(images)} images, {len(texts)} captions, recall@1/5/10: " + ", ".join(
            f"{name.replace('_', ' ')} {'/'.join(f'{v:.1f}' for v in values)} %" for name, values in recalls.items()))
    return found


def examples(source: Source, count: int = 8) -> tuple[data.ImageDataset | None, list[str]]:
    """Up to `count` of the images that are scored, evenly spread, and a text of each; (None, []) if nothing is."""
    shown = source.retrieval or source.labelled
    if shown is None:
        return None, []
    rows = np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)
    texts = [source.retrieval.texts(i)[0] if source.retrieval else source.prompts[shown.labels[i]][0] for i in rows]
    return shown, texts


@torch.no_grad()
def save_visualization(model: FLIP, images, texts: list[str], ids, path):
    """Write the images (n, 3, H, W), normalised, and below them, for each text, of ids (n, T), its
    cosine with each of them as a color."""
    cosine = model.encode_text(ids) @ model.encode_image(images).T             # (texts, images)
    low = cosine.min()
    high = cosine.max()
    share = (cosine - low) / (high - low).clamp(min=1e-6)                      # 0 to 1
    tiles = data.heat_patches(share, 1)[..., None, None]                       # (texts, images, 3, 1, 1)
    tiles = tiles.expand(-1, -1, -1, images.shape[-2] // 4, images.shape[-1])
    rows = {f"images 1 to {len(images)}; cosines: blue {low:.2f}, yellow {high:.2f}": images}
    for i, (text, row) in enumerate(zip(texts, tiles), 1):
        plain = text.encode("ascii", "replace").decode()
        rows[f"{i}. {plain}"] = row
    data.save_image_grid(path, rows)


def score_weights(cfg: Config) -> dict:
    """--zero-shot: score weights on --data. The towers are those of the file."""
    device = common.init_distributed(cfg)
    weights, told = read_weights(cfg.zero_shot)
    refuse_clip_towers(cfg.zero_shot, weights, told.get("towers", cfg.towers))
    names = (*SIZE_FIELDS, "towers", "mlp_ratio", "text_length", "text_cls", "vocab_size", "image_size", "patch_size",
             *(() if cfg.vocab else ("vocab",)))
    cfg = replace(cfg, **{name: told[name] for name in names if name in told})
    tokenizer = Tokenizer(cfg)
    model = build(cfg)
    common.load_weights(model, cfg.zero_shot, optional=DECODER, weights=weights)
    source = open_source(cfg, tokenizer)
    return score(model.to(device), source, cfg, tokenizer, device)


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
