"""Scaling Language-Image Pre-training via Masking (Li et al., arXiv 2212.00794): FLIP.

CLIP, but a random half of each image's patches is left out before the image tower, and nothing is
put in its place. The two towers learn features whose cosine is high for an image and its own
caption, and low for the other captions of the batch. Half the patches cost about half as much: the
same time buys more pairs, in larger batches. Scores are of whole images; a little more training
with whole images ("unmasked tuning": presets shapes-tune, laion-tune) prepares for that.

    loss = mean over the G pairs of a batch of [CE(s Z W^T, i) + CE(s W Z^T, i)] / 2     (section 3)
           CE: cross-entropy of row i, whose class is i;  s <= 100: learned
           Z, W (G, E): features of the images and of the captions, of unit norm

    images (B, 3, H, W)                         ids (B, T) of the captions
      | patchify                                  | token_embedding, + pos_embed
    patches (B, N, P*P*3)                       x (B, T, text width)
      | visible                                   | text.blocks
      | patch_embed, + pos_embed,                 |
      | cls_token, blocks, norm                   |
    latent (B, 1+K, D)                          x (B, T, text width)
      | mean over tokens, image_proj,             | first token, text.norm, text.proj,
      | unit norm                                 | unit norm
    image (B, E)                                text (B, E)
      +------------------ gathered ---------------+
             image (G, E), text (G, E): loss

B pairs of this process, G of all processes, N patches, K visible, D width, P patch side, T ids of a
caption, E shared width. Differences from mae.py: no decoder; a text tower; images with captions;
negatives from all processes.

    python flip.py                                    # synthetic shapes, no download:
        zero-shot, 64 classes, 2000 images, chance 1.6 %: top-1 51.0 %, top-5 99.3 %,
        seen 57.0 %, held out 24.7 %      (seeds 0 to 4: seen 57.0 to 63.6, held out 18.2 to 27.6)
    python flip.py --preset shapes-tune --init runs/flip-shapes/checkpoint.pt   # with whole images
    python flip.py --zero-shot runs/flip-shapes/checkpoint.pt
    python flip.py --data pairs.csv --model small     # your own images and captions
    torchrun --nproc_per_node=8 flip.py --preset laion --data 'shards/{00000..41407}.tar' \\
        --tokenizer tokenizer.json --accumulate 8     # pip install webdataset tokenizers

As in the released code, though the paper does not say so: positions of the image tower are fixed
sines and cosines, the mean includes the class token, the text tower attends to padding, images are
flipped. Unlike the released code: a caption's feature is read off the start token (released: off
its first word piece); GELU is exact, not by tanh; the scale is clamped after each step (inside the
loss a clamped scale has no gradient) and not decayed.
"""

import csv
import io
import itertools
import json
import math
import os
import random
import re
import sys
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
    data: str = "shapes"          # shapes; .csv, .tsv; COCO's .json; tar shards; imagenet; class folders
    image_root: str = ""          # what relative paths in a table start from; empty: the table's folder
    test_data: str = ""           # table of pairs for retrieval at the end; empty: a tenth of --data's table
    test_root: str = ""           # what relative paths in --test-data start from; empty: its folder
    zero_shot: str = ""           # checkpoint to score on --data; nothing is trained
    templates: str = ""           # file of prompts with {} for the class, one a line; empty: the paper's seven
    classnames: str = ""          # file of class names, in the order of the folders, or "folder<tab>name"

    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of both towers, see SIZES
    init: str = ""                # checkpoint of this script whose weights to start from
    image_size: int = 30          # side of the square input in pixels
    patch_size: int = 5           # side of a patch in pixels
    tokenizer: str = ""           # tokenizer.json in Hugging Face's format; empty: UTF-8 bytes
    text_length: int = 21         # ids of a caption T; longer captions are cut

    mask_ratio: float = 0.5       # fraction of the patches that is left out

    crop_scale: float = 1.0       # smallest fraction of the area that the random crop keeps; 1: no crop
    batch_size: int = 64          # pairs in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step, to save memory: each pair is embedded twice
    epochs: int = 9               # passes over the data
    epoch_pairs: int = 0          # tar shards: how many pairs are called an epoch
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.004        # peak learning rate = base_lr * batch_size / 256
    weight_decay: float = 0.2     # AdamW's, on matrices and tokens only

    def __post_init__(self):
        name = re.sub(r"[^\w.-]+", "-", Path(self.data).resolve().name).strip("-.")
        self.output = self.output or f"runs/flip-{name}{'-tuned' if self.init else ''}"
        for field, number in zip(SIZE_FIELDS, SIZES[self.model]):              # derived: no flags
            setattr(self, field, number)
        common.check(self)
        if self.preset.startswith("laion") and not (self.tokenizer or self.zero_shot):
            raise common.UserError(f"--preset {self.preset} needs --tokenizer tokenizer.json; the "
                                   "paper's is that of bert-base-uncased")
        self.vocab_size = 0 if self.tokenizer else BYTES         # 0: train opens the tokenizer
        patches = (self.image_size // self.patch_size) ** 2
        if int(patches * (1 - self.mask_ratio)) < 1:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see of "
                                   f"{patches} patches")


SIZE_FIELDS = ("embed_dim", "depth", "num_heads", "text_width", "text_depth", "text_heads",
               "proj_dim")
SIZES = {      # image tower: width, depth, heads; text tower: width, depth, heads; shared width E
    "micro": (64, 4, 2, 32, 2, 2, 64),                                                      # ours
    "tiny": (192, 12, 3, 192, 6, 3, 192),                                                   # ours
    "small": (384, 12, 6, 384, 12, 6, 384),                                    # open_clip's ViT-S
    "base": (768, 12, 12, 512, 12, 8, 512),                                             # table 9
    "large": (1024, 24, 16, 768, 12, 12, 768),                                          # table 9
    "huge": (1280, 32, 16, 1024, 24, 16, 1024),                                         # table 9
}
PAPER = dict(image_size=224, patch_size=16, mask_ratio=0.5, weight_decay=0.2,          # table 10
             crop_scale=0.5, text_length=77, workers=12)              # code; CLIP's 77, here bytes
SMALL = PAPER | dict(model="tiny", batch_size=1024, epochs=100, warmup_epochs=5, base_lr=2.5e-4,
                     workers=8)                                                             # ours
PRESETS = {
    "shapes": {},                                                        # the defaults above; ours
    "shapes-tune": dict(mask_ratio=0.0, epochs=1, warmup_epochs=0.2, base_lr=8e-4),         # ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                  # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                    # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                             # ours
    "imagenet": PAPER | dict(model="base", batch_size=4096, epochs=30, warmup_epochs=2,
                             base_lr=6.25e-5),                                              # ours
    # table 10: 12.8 billion pairs, of which 51.2 million of warm-up, in epochs of four million;
    # tuning: 128 million, of which 25.6 million
    "laion": PAPER | dict(model="base", text_length=32, batch_size=65536, epoch_pairs=4_194_304,
                          epochs=3052, warmup_epochs=12.2, base_lr=4e-6),
    "laion-tune": PAPER | dict(model="base", text_length=32, mask_ratio=0.0, batch_size=65536,
                               epoch_pairs=4_000_000, epochs=32, warmup_epochs=6.4, base_lr=4e-8),
    "folder": PAPER | dict(model="small", batch_size=1024, epochs=30, warmup_epochs=2,
                           base_lr=2.5e-4),                                                 # ours
}
TEMPLATES = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
             "a {} in a video game.", "art of the {}.", "a photo of the small {}.")    # section 4.2
BYTES = 258                                    # ids without a tokenizer: padding, bytes, start
IMAGE_COLUMNS = ("filepath", "image", "path", "file_name", "filename", "image_path", "file")
TEXT_COLUMNS = ("title", "caption", "text", "captions")
SHUFFLE = dict(bufsize=5000, initial=1000)     # pairs among which a loader process draws the next


# ----------------------------------------- Vision Transformer (an identical copy in every script)
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
    times 10000^(-i / (dim/4)). (The names in MAE's code suggest the opposite order.)"""
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
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                      # (B, T, D)
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v)                            # (B, heads, T, d)
        x = x.transpose(1, 2).reshape(B, T, D)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT encoder whose parameters are named as in the released MAE, DINO and timm checkpoints.

    image_size: side in pixels, or (height, width)."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = sincos_positions(embed_dim, self.grid)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def init_weights(self):
        """Xavier-uniform matrices, linear layers' biases 0, tokens N(0, 0.02) (MAE's code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))       # (D, C*P*P), a view
        nn.init.normal_(self.cls_token, std=0.02)

    def forward_features(self, patches, visible=None):
        """patches (B, N, P*P*C) -> tokens after the last norm (B, 1 + K, D), the class token first.

        visible (B, K): indices of the patches to encode. None: all."""
        pos = self.pos_embed[:, 1:]                                            # (1, N, D)
        if visible is not None:
            patches = gather_tokens(patches, visible)                          # (B, K, P*P*C)
            pos = pos[0, visible]                                              # (B, K, D)
        x = self.patch_embed(patches) + pos                                    # (B, K, D)
        cls = self.cls_token + self.pos_embed[:, :1]                           # (1, 1, D)
        cls = cls.expand(x.shape[0], -1, -1)                                   # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, 1 + K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, images):
        """Normalised images (B, 3, H, W) -> all tokens (B, 1 + N, D); nothing is ever masked."""
        return self.forward_features(patchify(images, self.patch_size))


# ------------------------------------------------------------------------------------- text tower
class TextTower(nn.Module):
    """Ids (B, T) -> features (B, E), read off the first token; not causal, and padding is attended
    to as if it were text (released code)."""

    def __init__(self, vocab_size, text_length, text_width, text_depth, text_heads, proj_dim):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.pos_embed = nn.Parameter(torch.zeros(1, text_length, text_width))
        self.blocks = nn.ModuleList(Block(text_width, text_heads) for _ in range(text_depth))
        self.norm = nn.LayerNorm(text_width, eps=1e-6)
        self.proj = nn.Linear(text_width, proj_dim, bias=False)

    def init_weights(self):
        """Xavier-uniform matrices, biases 0, embeddings N(0, 0.02) (released code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)

    def forward(self, ids):                                                    # (B, T)
        x = self.token_embedding(ids) + self.pos_embed                         # (B, T, text width)
        for block in self.blocks:
            x = block(x)
        first = self.norm(x[:, 0])                                             # (B, text width)
        return self.proj(first)                                                # (B, E)


# ---------------------------------------------------------------------------------------- masking
def random_masking(noise, mask_ratio: float):
    """noise (B, N) -> indices of the visible patches (B, K), those of least noise, and of the
    masked ones (B, M).

    K = floor(N * (1 - mask_ratio)) in floating point, as released: 0.9 leaves 9 of 100 patches."""
    K = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)                                               # (B, N)
    return order[:, :K], order[:, K:]


# -------------------------------------------------------------------------------- target and loss
class Gather(torch.autograd.Function):
    """Features (B, E) of this process -> those of all processes (G, E), in order of their ranks.

    The gradient is the sum of what all processes have for this one's features. Each process's loss
    is a mean over its own pairs, and DistributedDataParallel averages the gradients of all
    processes: the result is the gradient of the mean over all pairs, with no factor anywhere."""

    @staticmethod
    def forward(ctx, features):
        gathered = features.new_empty(common.world_size() * len(features), features.shape[1])
        dist.all_gather_into_tensor(gathered, features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):                                               # (G, E)
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(common.world_size())[common.rank()]              # (B, E)


def contrastive_loss(image, text, scale):
    """InfoNCE in both directions (section 3; CLIP): features image and text (B, E) of this
    process's pairs, of unit norm, scale () -> the mean of its loss over them. The pairs of all
    processes are the classes."""
    images = image                                                             # (G, E)
    texts = text
    if common.world_size() > 1:
        images = Gather.apply(image)
        texts = Gather.apply(text)
    first = common.rank() * len(image)                   # where this process's pairs stand
    labels = torch.arange(first, first + len(image), device=image.device)      # (B,)
    image_logits = scale * image @ texts.T                                     # (B, G)
    text_logits = scale * text @ images.T                                      # (B, G)
    image_loss = F.cross_entropy(image_logits, labels)
    text_loss = F.cross_entropy(text_logits, labels)
    return (image_loss + text_loss) / 2


# ------------------------------------------------------------------------------------------- FLIP
class FLIP(VisionTransformer):
    """The image tower (this module) and the text tower (`text`)."""

    pretrain_only = ("text", "image_proj", "logit_scale")        # prefixes of what is no encoder

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, text_width, text_depth,
                 text_heads, proj_dim, vocab_size, text_length, mask_ratio=0.5):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads)
        self.mask_ratio = mask_ratio
        self.init_weights()
        nn.init.zeros_(self.patch_embed.proj.bias)
        self.image_proj = nn.Linear(embed_dim, proj_dim, bias=False)
        nn.init.xavier_uniform_(self.image_proj.weight)
        self.text = TextTower(vocab_size, text_length, text_width, text_depth, text_heads, proj_dim)
        self.text.init_weights()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))      # log s, as in CLIP

    def pooled(self, tokens):
        """Tokens (B, 1 + K, D) -> features (B, E) fp32 of unit norm."""
        mean = tokens.mean(dim=1)                        # with the class token (released code)
        return F.normalize(self.image_proj(mean).float(), dim=-1)

    def encode_image(self, images):
        """Normalised images (B, 3, H, W) -> features (B, E) fp32 of unit norm, of whole images."""
        return self.pooled(self.encode(images))

    def encode_text(self, ids):
        """ids (B, T) -> features (B, E) fp32 of unit norm."""
        return F.normalize(self.text(ids).float(), dim=-1)

    def embed(self, images, ids, noise):
        """Features (B, E) of the images, masked by the noise (B, N), and of the captions."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*3)
        visible = None
        if self.mask_ratio:
            visible, _ = random_masking(noise, self.mask_ratio)                # (B, K)
        latent = self.forward_features(patches, visible)                       # (B, 1 + K, D)
        return self.pooled(latent), self.encode_text(ids)

    def forward(self, images, ids, noise=None, features_only=False):
        """images (B, 3, H, W), normalised; ids (B, T); noise (B, N) in [0, 1) decides the masks.

        Returns the loss, and the features of images and captions (B, E). features_only: both
        features and the scale (), from which the loss is computed elsewhere."""
        if noise is None:
            patches = self.grid[0] * self.grid[1]
            noise = torch.rand(len(images), patches, device=images.device)
        image, text = self.embed(images, ids, noise)                           # (B, E) each
        scale = self.logit_scale.exp()
        if features_only:
            return image, text, scale
        with torch.autocast(images.device.type, enabled=False):                # fp32
            return contrastive_loss(image, text, scale), image, text


def build(cfg: Config) -> FLIP:
    """The untrained model of a configuration; the seed decides its weights."""
    torch.manual_seed(cfg.seed)
    sizes = [getattr(cfg, field) for field in SIZE_FIELDS]
    return FLIP(cfg.image_size, cfg.patch_size, *sizes, cfg.vocab_size, cfg.text_length,
                cfg.mask_ratio)


def multiplications(cfg: Config, mask_ratio: float) -> int:
    """How many a forward pass of both towers does for one pair: in the projection of the patches,
    in the blocks' matrices and in attention."""
    def blocks(tokens, width, depth):
        return depth * (12 * tokens * width ** 2 + 2 * tokens ** 2 * width)

    visible = int((cfg.image_size // cfg.patch_size) ** 2 * (1 - mask_ratio))
    projection = visible * 3 * cfg.patch_size ** 2 * cfg.embed_dim
    image = blocks(1 + visible, cfg.embed_dim, cfg.depth)
    text = blocks(cfg.text_length, cfg.text_width, cfg.text_depth)
    return projection + image + text


# --------------------------------------------------------------------------------------- training
def backward_in_parts(model: FLIP, network, parts: list, amp):
    """One step's loss and gradients, a micro-batch at a time; returns the loss.

    All pairs of a step are negatives of each other, so its loss is not a mean of the micro-batches'
    losses. First the features of all pairs are computed, without gradient; the step's loss gives
    the gradients with respect to these features and to the scale; then each micro-batch is embedded
    once more, with the same masks, and passes its share of these gradients on to the weights
    (GradCache, arXiv 2101.06983). parts: (uint8 images, ids, noise) of each micro-batch."""
    device = model.logit_scale.device
    with torch.no_grad(), amp:
        cached = [model.embed(data.to_device(images, device), ids, noise)
                  for images, ids, noise in parts]
    image = torch.cat([of_images for of_images, _ in cached]).requires_grad_()
    text = torch.cat([of_texts for _, of_texts in cached]).requires_grad_()
    scale = model.logit_scale.detach().exp().requires_grad_()
    loss = contrastive_loss(image, text, scale)
    loss.backward()
    image_gradients = image.grad.chunk(len(parts))                             # (B, E) each
    text_gradients = text.grad.chunk(len(parts))
    scale_gradient = scale.grad / len(parts)
    for i, (images, ids, noise) in enumerate(parts):
        gradients = (image_gradients[i], text_gradients[i], scale_gradient)
        with common.sync_on_last(network, i, len(parts)):                      # once a step
            with amp:
                outputs = network(data.to_device(images, device), ids, noise, features_only=True)
            torch.autograd.backward(outputs, gradients)
    return loss


def train(cfg: Config) -> dict:
    """Train and score both towers; returns the last line of metrics.jsonl. With --zero-shot only
    the scores of a checkpoint."""
    if cfg.zero_shot:
        return score_checkpoint(cfg)
    device = common.init_distributed(cfg)
    tokenizer = Tokenizer(cfg.tokenizer, cfg.text_length)
    cfg.vocab_size = tokenizer.vocab_size
    source = open_source(cfg, tokenizer)
    training = source.splits.pretrain
    training.transform = data.augment(cfg.image_size, cfg.crop_scale)
    model = build(cfg).to(device)
    if cfg.init:
        common.load_weights(model, cfg.init)
    groups = common.parameter_groups(model, cfg.weight_decay, ("text.pos_embed",))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)               # table 10
    steps_per_epoch = common.plan_steps(cfg, len(training))
    run = common.Run("flip", cfg, model, optimizer, steps_per_epoch)
    patches = model.grid[0] * model.grid[1]
    share = multiplications(cfg, cfg.mask_ratio) / multiplications(cfg, 0)
    common.log(f"{common.count_parameters(model):,} parameters, "
               f"{int(patches * (1 - cfg.mask_ratio))} of {patches} patches visible: "
               f"{share:.2f} of the multiplications")
    if common.wants_compile(cfg, device):
        model.embed = torch.compile(model.embed)         # both towers, but not the gathering
    network = model
    if common.world_size() > 1:
        # averages gradients over processes
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    amp = common.autocast(device, cfg.precision, cfg.embed_dim)
    samples = sample_pairs(source, cfg, tokenizer, device)
    batches = training.batches(cfg, run.first_step, run.last_step)

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        noise = common.mask_noise(cfg, step, patches, device)                  # (accumulate, B, N)
        parts = []                                       # uint8: a quarter of the memory
        for i, (images, ids, *_) in enumerate(micro_batches):
            images = images.to(device, non_blocking=True)
            ids = ids.to(device, non_blocking=True)
            parts.append((images, ids, noise[i]))
        if cfg.accumulate == 1:
            images, ids, _ = parts[0]
            with amp:
                loss, *_ = network(data.to_device(images, device), ids, noise[0])
            loss.backward()
        else:
            loss = backward_in_parts(model, network, parts, amp)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if run.end_step(step, loss.detach(), lr) and samples and common.rank() == 0:
            save_visualization(model, *samples, run.folder / "similarity.png")

    run.save_encoder(model)
    scores = score(model, source, cfg, tokenizer, device)
    if isinstance(training, Shards):
        scores |= training.count_skipped(device)
    elif source.splits.test is None:                     # a table
        scores["unreadable"] = data.count_unreadable((training, source.retrieval), device)
    else:
        encoders = {"pixels": data.small_pixels,
                    "trained": data.mean_patch_token(model),
                    "untrained": data.mean_patch_token(build(cfg).to(device))}
        scores |= data.score_encoders(encoders, source.splits, cfg, device)
    metrics = run.finish(scores)
    path = f"{run.folder}/checkpoint.pt"
    hint = f"--zero-shot {path} --data FOLDER_OF_CLASSES"
    if cfg.data == "shapes":
        hint = f"--preset shapes-tune --model {cfg.model} --init {path}"
    common.log(f"try next: python flip.py {hint}")
    return metrics


# ----------------------------------------------------------------------------------- tokenization
class Tokenizer:
    """text -> int64 ids (T,): cut to T, padded with 0. `vocab_size`: one more than the largest id.

    path: a tokenizer.json in Hugging Face's format, which also says what the start and end tokens
    are, if any. Empty: UTF-8 bytes, byte b as 1 + b, behind a start token, 257."""

    def __init__(self, path: str, text_length: int):
        self.text_length = text_length
        self.from_file = open_tokenizer(path, text_length) if path else None
        self.vocab_size = BYTES
        if self.from_file:
            self.vocab_size = 1 + max(self.from_file.get_vocab().values())

    def __call__(self, text: str):
        if self.from_file:
            ids = self.from_file.encode(text).ids
        else:
            ids = [BYTES - 1] + [1 + byte for byte in text.encode()]
        ids = torch.tensor(ids[:self.text_length], dtype=torch.int64)
        return F.pad(ids, (0, self.text_length - len(ids)))

    def encode_batch(self, texts):
        """n texts -> (n, T)."""
        return torch.stack([self(text) for text in texts])


def open_tokenizer(path: str, text_length: int):
    """A tokenizer.json, set to cut texts such that their end token stays. Raises UserError."""
    try:
        import tokenizers
    except ImportError as error:
        raise common.UserError("--tokenizer needs a package: pip install tokenizers") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:                           # the package raises nothing more special
        raise common.UserError(f"--tokenizer {path} is no tokenizer.json in Hugging Face's format: "
                               f"{common.first_line(error)}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(text_length)
    return tokenizer


# ---------------------------------------------------------------------------- images and captions
class Texts:
    """Lists of strings, kept in two arrays: millions of them need little memory, which loader
    processes share. The strings have no line ends."""

    def __init__(self, lists):
        packed = ["\n".join(texts).encode() for texts in lists]
        self.bytes = np.frombuffer(b"".join(packed), np.uint8)
        self.ends = np.cumsum([0] + [len(texts) for texts in packed])

    def __getitem__(self, i: int) -> list[str]:
        packed = self.bytes[self.ends[i]:self.ends[i + 1]].tobytes()
        return packed.decode().split("\n")


class Pairs(data.ImageDataset):
    """Images with captions: an item is (image uint8 (3, H, W), ids (T,), index).

    Of an image's captions an epoch shows one, by (seed, epoch, index). captions: a list of strings
    for each image, or for each label if by_label."""

    def __init__(self, source, captions, tokenizer: Tokenizer, seed=0, labels=None, by_label=False):
        super().__init__(source, labels, seed)
        self.captions = Texts(captions)
        self.tokenizer = tokenizer
        self.by_label = by_label

    def texts(self, index: int) -> list[str]:
        return self.captions[self.labels[index] if self.by_label else index]

    def __getitem__(self, key):
        image, _, index = super().__getitem__(key)
        texts = self.texts(index)
        chosen = common.derive_seed(self.seed, *key, 1) % len(texts)
        return image, self.tokenizer(texts[chosen]), index

    def batches(self, cfg: Config, first_step: int, last_step: int):
        """Micro-batches (images uint8 (b, 3, S, S), ids (b, T), indices (b,)) of these steps."""
        return data.batches(self, cfg, first_step, last_step)


class Source(NamedTuple):
    """What there is to train on, and to score with."""
    splits: data.Splits                        # pretrain: Pairs or Shards; train, test: for k-NN
    retrieval: Pairs | None = None             # labels: the images' numbers
    labelled: data.ImageDataset | None = None  # for the zero-shot accuracy; labels: classes
    prompts: list | None = None                # of each class: its texts
    held_out: np.ndarray | None = None         # (classes,) bool: those of shapes not trained on


def open_source(cfg: Config, tokenizer: Tokenizer) -> Source:
    """What --data names, to train on and to score with, or only to score with (--zero-shot).

    Retrieval is scored on --test-data; without it, in training, on every tenth image of a table, at
    most 1,000, which are not trained on; with --zero-shot on all of it. Raises UserError."""
    test = read_pairs(cfg.test_data, cfg.test_root) if cfg.test_data else []
    if cfg.data == "shapes":
        source = open_shapes(cfg, tokenizer)
    elif is_shards(cfg.data):
        if cfg.zero_shot:
            raise common.UserError("--zero-shot scores a table or class folders, not shards")
        source = Source(data.Splits(Shards(cfg, tokenizer), None, None, []))
    elif Path(cfg.data).suffix in (".csv", ".tsv", ".json"):
        pairs = read_pairs(cfg.data, cfg.image_root)
        every = max(10, math.ceil(len(pairs) / 1000))
        if cfg.zero_shot:
            test = test or pairs
        elif not test:
            common.log(f"no --test-data: every {every}th image is kept for testing")
            test = pairs[every - 1::every]
            pairs = [pair for i, pair in enumerate(pairs) if i % every < every - 1]
        training = Pairs(*zip(*pairs), tokenizer, cfg.seed)
        source = Source(data.Splits(training, None, None, []))
    else:
        source = open_classes(cfg, tokenizer)
    if test:
        paths, captions = zip(*test)
        retrieval = Pairs(paths, captions, tokenizer, labels=np.arange(len(test)))
        source = source._replace(retrieval=retrieval)
    if source.retrieval is None and source.labelled is None:
        common.log("no --test-data: nothing is scored at the end")
    return source


# ----------------------------------------------------------------------------------------- shards
class Shards(IterableDataset):
    """Pairs of tar shards, without end, in micro-batches: (images uint8 (b, 3, S, S), ids (b, T)).

    The files of a pair stand together and have the same name up to its first dot: an image, and a
    .txt (one caption a line) or a .json (its "caption"). webdataset opens the shards, also through
    a pipe, groups their files and shuffles the pairs. Each loader process of each training process
    draws shards with replacement, by (seed, first step of this run, process, loader process), and
    reads them whole: so all pairs come equally often on average, whatever the sizes. What cannot be
    read is skipped and counted. Raises UserError."""

    def __init__(self, cfg: Config, tokenizer: Tokenizer):
        if not cfg.epoch_pairs:
            raise common.UserError("shards need --epoch-pairs, how many pairs are called an epoch; "
                                   "the learning rate follows from it")
        self.names = shard_names(cfg.data)
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.transform = None
        self.pairs_found = 0
        self.skipped = torch.zeros(max(1, cfg.workers), dtype=torch.int64).share_memory_()

    def __len__(self):
        return self.cfg.epoch_pairs

    def batches(self, cfg: Config, first_step: int, last_step: int):
        """The micro-batches of these steps."""
        self.first_step = first_step
        self.micro_batches = (last_step - first_step) * cfg.accumulate
        self.size = cfg.batch_size // (common.world_size() * cfg.accumulate)
        if first_step:
            common.log(f"shards: other pairs from step {first_step} on than in an undisturbed run, "
                       "since a stream is not read again to where it stopped")
        return data.loader(self, None, cfg.workers)

    def __iter__(self):
        info = get_worker_info()
        self.worker = info.id if info else 0
        workers = info.num_workers if info else 1
        stream = self.stream()
        for i in range(self.worker, self.micro_batches, workers):              # dealt out in turn
            seed = common.derive_seed(self.cfg.seed, self.first_step, common.rank(), i, 3)
            with torch.random.fork_rng(devices=[]):      # may be the trainer's own generator
                torch.default_generator.manual_seed(seed)                      # of the crops
                images, ids = zip(*itertools.islice(stream, self.size))
            yield torch.stack(images), torch.stack(ids)

    def stream(self):
        """The pairs (image uint8 (3, S, S), ids (T,)) of this loader process."""
        webdataset = import_webdataset()
        seed = common.derive_seed(self.cfg.seed, self.first_step, common.rank(), self.worker, 2)
        rng = random.Random(seed)
        shards = self.draw_shards(rng)
        samples = (sample for shard in shards            # no pair is made of two shards' files
                   for sample in webdataset.tariterators.tarfile_samples([shard], self.skip))
        pairs = webdataset.shuffle(**SHUFFLE, rng=rng)(self.read_captions(samples))
        unreadable = 0                                   # in a row
        for name, content, texts in pairs:
            try:
                image = data.decode(content)
            except OSError as error:
                self.skip(f"{name}: {error}")
                unreadable += 1
                if unreadable == 1000:
                    raise common.UserError(f"{unreadable} images in a row cannot be read, the last "
                                           f"is {name}: {error}") from error
                continue
            unreadable = 0
            yield self.transform(image), self.tokenizer(rng.choice(texts))

    def draw_shards(self, rng):
        """Shards as webdataset takes them. Raises UserError after 100 that hold no pair."""
        empty_in_a_row = 0
        while empty_in_a_row < 100:
            before = self.pairs_found
            yield {"url": rng.choice(self.names)}
            empty_in_a_row = empty_in_a_row + 1 if self.pairs_found == before else 0
        raise common.UserError(f"{empty_in_a_row} shards in a row hold no image with a caption")

    def read_captions(self, samples):
        """Pairs (name, image's bytes, captions) of webdataset's samples, {ending: bytes}."""
        for sample in samples:
            name = f"{sample['__url__']}: {sample['__key__']}"
            image = next((sample[e[1:]] for e in data.ENDINGS if e[1:] in sample), None)
            try:
                texts = captions_of(sample)
            except (ValueError, RecursionError) as error:        # no UTF-8, no JSON
                self.skip(f"{name}: {error}")
                continue
            if image and texts:
                self.pairs_found += 1
                yield name, image, texts
            else:
                self.skip(f"{name}: no image or no caption")

    def skip(self, reason) -> bool:
        """Count what is left out, and name the first ten. webdataset calls it, too, with an
        exception, when it cannot read a shard; True: go on."""
        self.skipped[self.worker] += 1
        if self.skipped[self.worker] <= 10:
            tqdm.write(f"skipped (each loader process names its first ten): {ascii(str(reason))}",
                       file=sys.stderr)
        return True

    def count_skipped(self, device) -> dict:
        """How much all processes have skipped."""
        count = self.skipped.sum().to(device)
        if common.world_size() > 1:
            dist.all_reduce(count)
        common.log(f"skipped in this run, shards and what is in them: {count}")
        return {"unreadable": count.item()}


TAR = re.compile(r"\.(tar|tgz|tar\.\w+)$")


def import_webdataset():
    try:
        import webdataset
    except ImportError as error:
        raise common.UserError("tar shards need a package: pip install webdataset") from error
    return webdataset


def is_shards(where: str) -> bool:
    """Whether it is a name or a pattern of tar files, a command, or an address."""
    return bool(TAR.search(where)) or where.startswith("pipe:") or "://" in where


def shard_names(where: str) -> list[str]:
    """The shards of a pattern such as 'a/{000..123}.tar', several joined by "::".
    Raises UserError."""
    webdataset = import_webdataset()
    try:
        names = webdataset.SimpleShardList(where).urls
    except (AssertionError, ValueError) as error:        # a brace left open, ${UNSET}
        raise common.UserError(f"--data {where}: {common.first_line(error)}") from error
    lost = [name for name in names
            if not name.startswith("pipe:") and "://" not in name and not Path(name).is_file()]
    if lost:
        raise common.UserError(f"{len(lost)} of {len(names)} shards are not there: "
                               f"{', '.join(lost[:3])}")
    common.log(f"{where}: {len(names)} shards")
    return names


def plain(text) -> str:
    """A string without halves of surrogate pairs, which are no Unicode; "" if it is no string."""
    return text.encode(errors="replace").decode() if isinstance(text, str) else ""


def one_line(text) -> str:
    return " ".join(plain(text).split())


def captions_of(sample: dict) -> list[str]:
    """{ending: bytes} of one sample -> its captions: the lines of txt, else caption in json.
    Raises ValueError."""
    if "txt" in sample:
        texts = sample["txt"].decode().split("\n")
    else:
        about = json.loads(sample.get("json", b"{}"))
        texts = [about.get("caption") if isinstance(about, dict) else None]
    texts = [one_line(text) for text in texts]
    return [text for text in texts if text]


# ----------------------------------------------------------------------------------------- tables
def read_pairs(where: str, root: str) -> list[tuple[str, list[str]]]:
    """(path of an image, its captions) of a table (.csv, .tsv) or of COCO's captions (.json). An
    image may have several rows; rows without image or caption are left out. Raises UserError."""
    rows = coco_rows(where) if where.endswith(".json") else table_rows(where)
    folder = Path(root) if root else Path(where).parent
    captions = {}
    for image, caption in rows:
        image = plain(image).strip()
        caption = one_line(caption)
        if image and caption:
            captions.setdefault(str(folder / image), []).append(caption)
    pairs = list(captions.items())
    count = sum(len(texts) for texts in captions.values())
    common.log(f"{where}: {len(rows)} rows gave {count} pairs of {len(pairs)} images")
    if not pairs:
        raise common.UserError(f"no pair of image and caption in {where}")
    first = [path for path, _ in pairs[:100]]
    if not any(os.path.isfile(path) for path in first):    # Path's raises on too long names
        raise common.UserError(f"none of the first {len(first)} images of {where} is there, e.g. "
                               f"{first[0]}; --image-root says what its paths start from")
    return pairs


def read_text(path: str) -> str:
    """A file's text. Raises UserError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise common.UserError(f"{path} cannot be read: {common.first_line(error)}") from error


def table_rows(where: str) -> list[tuple]:
    """(image, caption) of the rows of a table with a header, by commas, or by tabs, where quotes
    are plain characters. Raises UserError."""
    csv.field_size_limit(2 ** 31 - 1)                    # other columns may be long
    text = read_text(where)
    options = {"strict": True}                           # a quote left open is an error
    if "\t" in text.partition("\n")[0]:
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    table = csv.DictReader(io.StringIO(text, newline=""), **options)
    try:
        names = [name.strip().lower() for name in table.fieldnames or []]
        image = next((name for name in IMAGE_COLUMNS if name in names), None)
        caption = next((name for name in TEXT_COLUMNS if name in names), None)
        if not image or not caption:
            raise common.UserError(f"{where} has the columns {names}; one of {IMAGE_COLUMNS} and "
                                   f"one of {TEXT_COLUMNS} are needed")
        table.fieldnames = names
        return [(row[image], row[caption]) for row in table]
    except csv.Error as error:                           # line_num: of the last good row
        raise common.UserError(f"{where}: the row that begins in line {table.line_num + 1}: "
                               f"{error}") from error


def coco_rows(where: str) -> list[tuple]:
    """(image, caption) of COCO's captions, {"images": [{id, file_name}], "annotations": [{image_id,
    caption}]}. Raises UserError."""
    text = read_text(where)
    try:
        coco = json.loads(text)
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        return [(names.get(each["image_id"]), each["caption"]) for each in coco["annotations"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise common.UserError(f"{where} does not hold COCO's captions: "
                               f"{common.first_line(error)}") from error


# ------------------------------------------------------------------------------ classes and shapes
def open_classes(cfg: Config, tokenizer: Tokenizer) -> Source:
    """Images with classes, of which captions and prompts are made. Raises UserError."""
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    if splits.train is None:
        raise common.UserError(f"{cfg.data} has neither captions nor class folders to train on and "
                               "to test on")
    names = class_names(cfg, splits.classes)
    templates = TEMPLATES
    if cfg.templates:
        templates = [line for line in read_text(cfg.templates).splitlines() if line.strip()]
        if not templates or not all("{}" in line for line in templates):
            raise common.UserError(f"--templates {cfg.templates}: one prompt a line, each with "
                                   "{} for the class")
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    least = math.log(1 + (cfg.batch_size - 1) / len(names))
    common.log(f"captions: {len(templates)} templates x {len(names)} classes, e.g. "
               f"{prompts[0][0]!r}. Images of one class are each other's negatives in a batch: the "
               f"loss stays above about {least:.2f}")
    train = splits.train
    training = Pairs(train.source, prompts, tokenizer, cfg.seed, train.labels, by_label=True)
    return Source(splits._replace(pretrain=training), None, splits.test, prompts)


def class_names(cfg: Config, folders: list[str]) -> list[str]:
    """Names of classes: by --classnames; ImageNet's by torchvision; else as their folders."""
    if cfg.classnames:
        lines = [line.strip() for line in read_text(cfg.classnames).splitlines() if line.strip()]
        if all("\t" in line for line in lines):          # "n00004475<tab>organism, being"
            rows = [line.split("\t") for line in lines]
            name_of = {row[0].strip(): row[1].split(",")[0].strip() for row in rows}
        else:
            name_of = dict(zip(folders, lines)) if len(lines) == len(folders) else {}
        lost = [folder for folder in folders if not name_of.get(folder)]
        if lost:
            raise common.UserError(f"--classnames {cfg.classnames} has no name for {lost[:3]}; it "
                                   f"needs one for each of the {len(folders)} class folders: lines "
                                   "in their order, or folder, tab, name")
        return [name_of[folder] for folder in folders]
    if len(folders) == 1000 and folders[0] == "n01440764":
        return ResNet50_Weights.DEFAULT.meta["categories"]       # in the order of the folders
    if all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        raise common.UserError(f"the classes are WordNet's numbers ({folders[0]}, ...): "
                               "--classnames says what they are called (Tiny ImageNet's words.txt "
                               "will do)")
    return [folder.replace("_", " ") for folder in folders]


def open_shapes(cfg: Config, tokenizer: Tokenizer) -> Source:
    """The synthetic shapes, less the pairs HELD_OUT of color and shape, to train on; all 64 pairs
    as the classes; a test image of each for retrieval."""
    train = data.synthetic_shapes("train", np.arange(10_000))
    test = data.synthetic_shapes("test", np.arange(2_000))
    train_images = torch.from_numpy(train["image"])
    test_images = torch.from_numpy(test["image"])
    train_classes = 8 * train["color"] + train["shape"]
    test_classes = 8 * test["color"] + test["shape"]
    held_out = np.isin(np.arange(64), [8 * color + shape for color, shape in data.HELD_OUT])

    trained = ~held_out[train_classes]                                         # (10000,)
    captions = [[str(text)] for text in train["caption"][trained]]
    training = Pairs(train_images[trained], captions, tokenizer, cfg.seed)
    _, one_each = np.unique(test_classes, return_index=True)                   # (64,)
    captions = [[str(text)] for text in test["caption"][one_each]]
    retrieval = Pairs(test_images[one_each], captions, tokenizer, labels=np.arange(64))
    labelled = data.ImageDataset(test_images, test_classes)
    knn_train = data.ImageDataset(train_images, train["shape"])
    knn_test = data.ImageDataset(test_images, test["shape"])
    splits = data.Splits(training, knn_train, knn_test, list(data.SHAPES))
    templates = range(len(data.CAPTIONS))
    prompts = []
    for color in range(len(data.COLORS)):
        for shape in range(len(data.SHAPES)):
            prompts.append(data.captions_of(templates, [color] * 4, [shape] * 4).tolist())
    return Source(splits, retrieval, labelled, prompts, held_out)


# ----------------------------------------------------------- scores: zero-shot accuracy, retrieval
@torch.no_grad()
def text_features(model: FLIP, texts, tokenizer: Tokenizer, device):
    """n texts -> (n, E)."""
    parts = [texts[i:i + 500] for i in range(0, len(texts), 500)]
    return torch.cat([model.encode_text(tokenizer.encode_batch(part).to(device)) for part in parts])


def class_features(model: FLIP, prompts, tokenizer: Tokenizer, device):
    """The texts of each class -> (classes, E): the mean of their features, of unit norm (CLIP)."""
    texts = [text for of_class in prompts for text in of_class]
    features = text_features(model, texts, tokenizer, device)                  # (n, E)
    of_classes = features.split([len(of_class) for of_class in prompts])
    means = torch.stack([part.mean(dim=0) for part in of_classes])             # (classes, E)
    return F.normalize(means, dim=-1)


def recall(hits) -> list[float]:
    """hits (n, 10) bool: whether each of the ten nearest, nearest first, is right -> in percent,
    how many rows have a right one among the nearest 1, 5 and 10."""
    return [100 * hits[:, :k].any(dim=1).float().mean().item() for k in (1, 5, 10)]


def score_zero_shot(model: FLIP, source: Source, tokenizer, options: dict) -> dict:
    """In percent, how many images are most similar to the prompts of their class."""
    device = options["device"]
    images, labels = data.features(model.encode_image, source.labelled, **options)     # (n, E)
    classes = class_features(model, source.prompts, tokenizer, device)                 # (C, E)
    logits = images @ classes.T                                                        # (n, C)
    accuracy = data.topk_accuracy(logits, labels)
    scores = {"zero_shot": accuracy["top1"], "zero_shot_top5": accuracy["top5"]}
    figures = f"top-1 {accuracy['top1']:.1f} %, top-5 {accuracy['top5']:.1f} %"
    if source.held_out is not None:
        held_out = torch.from_numpy(source.held_out).to(device)[labels]                # (n,)
        for name, rows in (("seen", ~held_out), ("held_out", held_out)):
            top1 = data.topk_accuracy(logits[rows], labels[rows])["top1"]
            scores[f"zero_shot_{name}"] = top1
            figures += f", {name.replace('_', ' ')} {top1:.1f} %"
    common.log(f"zero-shot, {len(classes)} classes, {len(labels)} images, chance "
               f"{100 / len(classes):.1f} %: {figures}")
    return scores


def score_retrieval(model: FLIP, pairs: Pairs, tokenizer, options: dict) -> dict:
    """Recall at 1, 5 and 10 in percent: of an image any of its captions counts."""
    device = options["device"]
    images, numbers = data.features(model.encode_image, pairs, **options)              # (n, E)
    captions = [pairs.texts(number) for number in numbers.tolist()]
    texts = [text for of_image in captions for text in of_image]
    image_of = [i for i, of_image in enumerate(captions) for _ in of_image]
    image_of = torch.tensor(image_of, device=device).unsqueeze(1)                      # (m, 1)
    features = text_features(model, texts, tokenizer, device)                          # (m, E)
    _, nearest = data.nearest_neighbors(images, features, 10)                          # (n, 10)
    is_own = image_of[nearest, 0] == torch.arange(len(images), device=device).unsqueeze(1)
    _, nearest = data.nearest_neighbors(features, images, 10)                          # (m, 10)
    recalls = {"image_to_text": recall(is_own), "text_to_image": recall(nearest == image_of)}
    scores = {}
    figures = []
    for name, values in recalls.items():
        scores |= {f"{name}_{k}": value for k, value in zip((1, 5, 10), values)}
        percent = "/".join(f"{value:.1f}" for value in values)
        figures.append(f"{name.replace('_', ' ')} {percent} %")
    common.log(f"retrieval, {len(images)} images, {len(texts)} captions, recall@1/5/10: "
               f"{', '.join(figures)}")
    return scores


def score(model: FLIP, source: Source, cfg: Config, tokenizer: Tokenizer, device) -> dict:
    """Zero-shot accuracy and retrieval, where there is something to score, of whole images."""
    crop = data.CenterCrop(cfg.image_size, margin=False)         # CLIP's: the whole shorter side
    options = {"size": cfg.image_size, "device": device, "workers": cfg.workers, "transform": crop}
    scores = {}
    if source.labelled is not None:
        scores |= score_zero_shot(model, source, tokenizer, options)
    if source.retrieval is not None:
        scores |= score_retrieval(model, source.retrieval, tokenizer, options)
    return scores


def score_checkpoint(cfg: Config) -> dict:
    """--zero-shot: the scores of a checkpoint of ours on --data. Raises UserError."""
    device = common.init_distributed(cfg)
    saved, weights = common.read_weights(cfg.zero_shot)
    trained = saved.get("config", {})
    fields = ("tokenizer", "text_length", "image_size", "patch_size", *SIZE_FIELDS, "vocab_size")
    if saved.get("method") != "flip" or not set(fields) <= trained.keys():
        raise common.UserError(f"{cfg.zero_shot} is no checkpoint of this flip.py")
    cfg = replace(cfg, tokenizer=cfg.tokenizer or trained["tokenizer"])
    for field in fields[1:]:                             # the model is the file's
        setattr(cfg, field, trained[field])
    tokenizer = Tokenizer(cfg.tokenizer, cfg.text_length)
    if tokenizer.vocab_size != cfg.vocab_size:
        raise common.UserError(f"{cfg.zero_shot} was trained with {cfg.vocab_size} ids, and "
                               f"--tokenizer {cfg.tokenizer} has {tokenizer.vocab_size}")
    model = build(cfg).to(device)
    common.load_weights(model, cfg.zero_shot, weights=weights)
    source = open_source(cfg, tokenizer)
    return score(model, source, cfg, tokenizer, device)


# ------------------------------------------------------------------------------------ images out
def sample_pairs(source: Source, cfg: Config, tokenizer: Tokenizer, device):
    """For save_visualization: up to eight of the images that are scored, normalised
    (n, 3, H, W), a text of each, and its ids (n, T). None if nothing is scored."""
    shown = source.retrieval or source.labelled
    if shown is None:
        return None
    shown = shown.with_transform(data.CenterCrop(cfg.image_size))
    chosen = np.linspace(0, len(shown) - 1, min(8, len(shown))).astype(int)
    images = []
    texts = []
    for i in chosen:
        image, _, row = shown[0, i]                      # row: another one, if i is unreadable
        images.append(image)
        of_image = shown.texts(row) if source.retrieval else source.prompts[shown.labels[row]]
        texts.append(of_image[0])
    images = data.to_device(torch.stack(images), device)
    return images, texts, tokenizer.encode_batch(texts).to(device)


@torch.no_grad()
def save_visualization(model: FLIP, images, texts: list[str], ids, path):
    """Write the images (n, 3, H, W), normalised, and below them, for each text, of ids (n, T), its
    cosine with each of them as a color."""
    cosine = model.encode_text(ids) @ model.encode_image(images).T             # (texts, images)
    low = cosine.min()
    high = cosine.max()
    share = (cosine - low) / (high - low).clamp(min=1e-6)                      # 0 to 1
    tiles = data.heat_patches(share, 1)                                        # (texts, images, 3)
    tiles = tiles[..., None, None].expand(-1, -1, -1, images.shape[-2] // 4, images.shape[-1])
    rows = {f"images 1 to {len(images)}; cosines: blue {low:.2f}, yellow {high:.2f}": images}
    for i, (text, row) in enumerate(zip(texts, tiles), 1):
        plain = text.encode("ascii", "replace").decode()
        rows[f"{i}. {plain}"] = row
    data.save_image_grid(path, rows)


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
