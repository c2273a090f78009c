"""Morphing Tokens Draw Strong Masked Image Models (Kim et al., arXiv 2401.00254): Dynamic Token Morphing.

As in maskdistill.py a student, for which patches are masked, predicts a frozen teacher's features. But a
teacher's features of neighbouring patches disagree; so similar tokens are grouped, and the groups' means
are compared. How many groups, and by how many rounds of matching, is drawn anew for every step.

    loss = mean over L morphings, all tokens and channels of l((G H(S(masked)))_i - (G T(whole))_i),
           G the matrix that gives each token its group's mean; l: smooth-L1

    images (B, 3, H, W)
      | patchify                                           | teacher, whole image
    patches (B, N, P*P*3)                                target (B, N, E)
      | visible: patch_embed, masked: mask_token           | match: rounds of bipartite matching
      | cls_token, blocks with relative positions        labels (B, N), the group of each token
    tokens (B, N, D)                                       |
      | norm, distill_head                                 |
    online (B, N, E) ------------------------------------ loss of the groups' means

B batch, N patches, K visible, S scored (N; K if the student is sparse), D width, E the teacher's
width, P patch side, n groups.
Against maskdistill.py: all tokens are scored, not only the masked; `draw_schedule`, `match` and `morph_loss`.
Nothing is added to the network, and nothing is learned by the matching.

    python dtm.py                                     # synthetic shapes, no download, 35 s on 2 CPU cores:
        k-NN accuracy, 8 classes, 2000 test images: pixels 28.2 %, trained 65.5 %, untrained 18.4 %, teacher 93.6 %
        (with one thread 68 %, seed 1 65 %; token by token, --morphs 0, 75 and 72 %: no gain from morphing on such data)
    torchrun --nproc_per_node=8 dtm.py --data imagenet --data-root /where/imagenet/is
    torchrun --nproc_per_node=8 dtm.py --data imagenet --preset official

With means and groups weighted by size, and any loss but cosine, the morphed loss is never above the token-wise
loss of the same output (Jensen), by construction: a lower pre-training loss proves nothing. Both are logged.

Algorithm 1 of the paper splits tokens at random, takes means of means, and merges the best of all pairs. The released
code, our default, splits them by turns, takes means of tokens, and merges a token with its best partner (--split
random --average uniform: as algorithm 1, but for its pairs). How many groups remain is drawn as in the paper; how that
is spread over the rounds is ours, since equation 1 could not be read. Only `--preset official` does what look like
mistakes of the released code: it draws how many tokens are merged, never merges the first patch (taken for the class
token), and gives CLIP pixels normalised for the student. Not done even there: similarities in half precision (rounding
changes the groups), other draws in each process, steps by the last pass's gradient alone, a learning rate that grows
with the square root of the batch, 1e-6 in the means, relative positions of each block's own besides the shared ones.
"""

import math
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import data


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    teacher: str = "self"         # clip, clip-large, dino, self, hog, pixels, momentum, random, or a file of weights
    teacher_feature: Literal["", "post", "raw", "proj"] = ""  # after its last norm, before it, CLIP's projection; empty: proj for clip, else post
    teacher_norm: Literal["own", "student"] = "own"  # its pixels normalised as it was trained, or as the student's (released code)
    teacher_epochs: int = 6       # self: passes over the labelled images, before the student begins
    teacher_lr: float = 0.016     # self: learning rate for 256 images a step
    normalize: Literal["ln", "l2", "none"] = "none"  # the target's tokens, before matching (the release: after morphing): to variance 1, or length sqrt(E)
    loss: Literal["smooth_l1", "l2", "l1", "cosine"] = "smooth_l1"  # between the means of groups
    beta: float = 2.0             # smooth_l1: quadratic below, linear above
    morphs: int = 2               # morphings L in a step, each of its own groups; 0: compare token by token
    most_rounds: int = 4          # a morphing has from 1 to this many rounds of matching
    schedule: Literal["exact", "official"] = "exact"  # draw how many groups remain, or how many tokens are merged
    split: Literal["alternating", "random"] = "alternating"  # the two halves that are matched
    average: Literal["size", "uniform"] = "size"  # a group's mean: over its tokens, or a mean of means (algorithm 1)
    group_weight: Literal["size", "uniform"] = "size"  # a group counts as often as it has tokens, or once
    protect_first: bool = False   # never merge the first patch
    token_weight: float = 0.0     # weight of a second loss, that of maskdistill.py: masked tokens one by one
    masking: Literal["block", "random"] = "block"  # mask rectangles or single patches
    mask_ratio: float = 0.383     # share of the patches that is masked
    min_block: int = 2            # smallest area of a masked rectangle, in patches
    student: Literal["dense", "sparse"] = "dense"  # sparse: masked patches dropped, visible ones scored
    momentum: float = 0.999       # momentum: decay of the average of the student
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of the encoder
    layer_scale: float = 1.0      # first value of the gains of the branches
    drop_path: float = 0.0        # chance to drop the last block's branches; 0 at the first block
    image_size: int = 32          # side of the square input in pixels
    patch_size: int = 8           # side of a patch in pixels
    crop_scale: float = 1.0       # smallest area of the random crop; 1: no crop
    color_jitter: float = 0.0     # strength of random brightness, contrast, saturation
    batch_size: int = 64          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 8               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.005        # learning rate for 256 images a step
    min_lr: float = 1e-5          # learning rate at the end
    weight_decay: float = 0.05    # AdamW's, on matrices and the mask token only
    clip_grad: float = 3.0        # largest norm of the gradient

    def __post_init__(self):
        self.teacher_feature = self.teacher_feature or ("proj" if self.teacher in ("clip", "clip-large") else "post")
        self.output = self.output or common.default_output("dtm", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]
        common.check(self)
        patches = (self.image_size // self.patch_size) ** 2
        if not 0 <= int(patches * self.mask_ratio) < patches:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see of {patches} patches")
        if self.teacher in ("pixels", "hog", "momentum", "random") and self.teacher_feature != "post":
            raise common.UserError(f"--teacher {self.teacher} has no choice of --teacher-feature")
        if self.teacher == "hog" and self.patch_size % 2:
            raise common.UserError(f"hog needs an even patch_size, not {self.patch_size}: 2 x 2 cells a patch")


SIZES = {"micro": (64, 2, 4), "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
         "large": (1024, 24, 16), "huge": (1280, 32, 16)}        # width, depth, heads; micro is ours

# the released code's, but BEiT v2's for batch and drop path (left open), warm-up and crop (released: 5 epochs, 0.08)
PAPER = dict(teacher="clip", normalize="none", loss="smooth_l1", beta=2.0, morphs=2, most_rounds=14,
             masking="block", mask_ratio=0.383, min_block=16, layer_scale=0.1, drop_path=0.0, image_size=224,
             patch_size=16, crop_scale=0.2, color_jitter=0.4, batch_size=2048, epochs=300, warmup_epochs=10,
             base_lr=1.5e-3 / 8, min_lr=1e-5, weight_decay=0.05, clip_grad=3.0, workers=12)
SMALL = PAPER | dict(teacher="self", most_rounds=8, teacher_epochs=100, teacher_lr=1e-3, model="tiny", min_block=4,
                     batch_size=1024, workers=8)                                             # ours
PRESETS = {
    "shapes": {},                                                         # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                    # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                     # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                              # ours
    "imagenet": PAPER | dict(model="base"),
    "imagenet-large": PAPER | dict(model="large", layer_scale=1e-5),
    "official": PAPER | dict(model="base", schedule="official", protect_first=True, teacher_norm="student"),
    "folder": PAPER | dict(model="small", batch_size=256, epochs=100, warmup_epochs=5),      # ours
}


# ----------------------------------------- Vision Transformer (an identical copy in every script)
def patchify(images, patch_size: int):
    """(B, C, H, W) -> (B, N, P*P*C): patches row by row; within one: row, column, channel."""
    B, C, H, W = images.shape
    h, w = H // patch_size, W // patch_size
    x = images.reshape(B, C, h, patch_size, w, patch_size)                     # (B, C, h, P, w, P)
    x = x.permute(0, 2, 4, 3, 5, 1)                                            # (B, h, w, P, P, C)
    return x.reshape(B, h * w, patch_size * patch_size * C)


def unpatchify(patches, patch_size: int, grid: tuple[int, int]):
    """The inverse of `patchify`, on a grid of (rows, columns) patches."""
    B = patches.shape[0]
    h, w = grid
    x = patches.reshape(B, h, w, patch_size, patch_size, -1)                   # (B, h, w, P, P, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                                            # (B, C, h, P, w, P)
    return x.reshape(B, -1, h * patch_size, w * patch_size)                    # (B, C, H, W)


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


# ------------------------------ with relative positions and layer scale (the same text in maskdistill.py)
class RelativePositions(nn.Module):
    """A bias on each pair of tokens by their offset, for all blocks: a table, zero at the start (BEiT).

    Its (2h - 1)(2w - 1) + 3 rows: one for each (row, column) offset between patches of an h x w grid;
    then class token to patch, patch to class token, class token to itself."""

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        self.register_buffer("index", relative_index(grid), persistent=False)   # (1 + N, 1 + N)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_rows(grid), num_heads))

    def forward(self):
        bias = F.embedding(self.index, self.relative_position_bias_table)       # (T, T, heads)
        return bias.permute(2, 0, 1).unsqueeze(0).contiguous()                  # (1, heads, T, T)


def relative_rows(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_index(grid: tuple[int, int]):
    """Which row of the table a pair of tokens (query, key) uses, int64 (1 + N, 1 + N)."""
    h, w = grid
    row, column = np.indices(grid).reshape(2, -1)
    offset = (row[:, None] - row + h - 1) * (2 * w - 1) + column[:, None] - column + w - 1      # (N, N)
    index = np.pad(offset, ((1, 0), (1, 0)))
    last = relative_rows(grid) - 3
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return torch.from_numpy(index)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, key_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:                                 # BEiT's: queries and values only
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, bias=None):                                            # (B, T, D), (1, heads, T, T)
        B, T, D = x.shape
        qkv_bias = self.qkv.bias
        if qkv_bias is None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)             # (B, heads, T, d)
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
    """layer_scale: what the branches' gains gamma_1 and gamma_2 start with; 0: there are none."""

    def __init__(self, dim, num_heads, mlp_ratio, key_bias=True, layer_scale=0.0, act=F.gelu, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
                                      for _ in range(2))

    def forward(self, x, bias=None, stay=(None, None)):
        """stay: for each branch (B, 1, 1), 0 where it is dropped, else 1 / (its chance to stay)."""
        x = x + scaled(self.attn(self.norm1(x), bias), self.gamma_1, stay[0])
        return x + scaled(self.mlp(self.norm2(x)), self.gamma_2, stay[1])


def scaled(branch, *factors):
    """branch times those of the factors that are there."""
    for factor in factors:
        branch = branch if factor is None else branch * factor
    return branch


class VisionTransformer(nn.Module):
    """The student's encoder (relative, layer_scale), or a teacher: with a table of positions, and for
    CLIP with a norm before the blocks (pre_norm), QuickGELU and eps 1e-5.

    Parameters are named as in the released BEiT, MAE, DINO and timm checkpoints; image_size: side in
    pixels, or (height, width)."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0, relative=False,
                 layer_scale=0.0, drop_path=0.0, pre_norm=False, act=F.gelu, eps=1e-6):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch_size, self.grid = patch_size, (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.rel_pos_bias = RelativePositions(self.grid, num_heads) if relative else None
        self.pos_embed = None if relative else nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.norm_pre = nn.LayerNorm(embed_dim, eps=eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, not relative, layer_scale, act, eps)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.drop_rates = np.linspace(0, drop_path, depth).tolist()

    def init_weights(self):
        """Normal matrices and tokens, std 0.02, cut at one std; zero biases; what the branches of block
        l = 1, 2, ... add is divided by sqrt(2 l) (BEiT v2)."""
        for name, p in self.named_parameters():
            if p.ndim > 1 and not name.startswith(("pos_embed", "rel_pos_bias")):
                nn.init.trunc_normal_(p, std=0.02, a=-0.02, b=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for layer, block in enumerate(self.blocks, 1):
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data.div_((2 * layer) ** 0.5)

    def layers(self, x, visible=None, noise=None, top=1):
        """Embedded patches (B, K, D) -> what the last `top` blocks put out, a list of (B, 1 + K, D).

        visible (B, K): which patches these are (only with a table of positions); None: all.
        noise (B, depth, 2) in [0, 1) decides which branches are dropped; None: none."""
        cls, outputs = self.cls_token.expand(len(x), -1, -1), []
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()       # (1, heads, 1 + N, 1 + N)
        if self.pos_embed is not None:
            pos = self.pos_embed[:, 1:] if visible is None else self.pos_embed[0, 1:][visible]
            cls, x = cls + self.pos_embed[:, :1], x + pos
        x = self.norm_pre(torch.cat([cls, x], dim=1))                           # (B, 1 + K, D)
        for i, (block, rate) in enumerate(zip(self.blocks, self.drop_rates)):
            stay = (None, None)
            if noise is not None and rate:
                stay = ((noise[:, i] >= rate) / (1 - rate)).T[..., None, None]  # (2, B, 1, 1)
            x = block(x, bias, stay)
            outputs = [*outputs, x][-top:]
        return outputs

    def encode(self, images):
        """Normalised images (B, 3, H, W) -> all tokens (B, 1 + N, D); nothing is ever masked."""
        return self.norm(self.layers(self.patch_embed(patchify(images, self.patch_size)))[-1])


# ---------------------------------------------------------------------------------------- masking
def block_masking(noise, grid: tuple[int, int], count: int, least: int):
    """noise (B, 4 * tries + N) in [0, 1) -> numbers of the visible patches (B, N - count) and of
    the masked ones (B, count).

    Rectangles (area from `least` to what is missing, log aspect from log 0.3 to -log 0.3) are tried
    and kept if they mask one to all of the missing patches more; when ten in a row fail, or the
    tries are over, random patches fill up (BEiT's algorithm, here for all images at once)."""
    (h, w), N, B = grid, grid[0] * grid[1], len(noise)
    u = noise[:, :-N].view(B, -1, 4, 1).permute(1, 2, 0, 3)                     # (tries, 4, B, 1)
    stretch = 0.3 ** (u[:, 1] - 0.5)                                            # height / side, side / width
    row, column = torch.arange(h, device=noise.device), torch.arange(w, device=noise.device)
    masked = torch.zeros(B, h, w, dtype=torch.bool, device=noise.device)
    failures = torch.zeros(B, 1, device=noise.device)
    missing = failures + count                                                  # (B, 1)
    for t in range(len(u)):
        side = (least + u[t, 0] * (missing - least)).clamp(min=0).sqrt()
        height, width = (side * stretch[t]).round(), (side / stretch[t]).round()
        top, left = (u[t, 2] * (h - height + 1)).floor(), (u[t, 3] * (w - width + 1)).floor()
        rows, columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
        new = rows.unsqueeze(2) & columns.unsqueeze(1) & ~masked                # (B, h, w)
        gain = new.sum(dim=(1, 2)).unsqueeze(1)
        fits = (height < h) & (width < w) & (gain >= 1) & (gain <= missing) & (failures < 10)
        masked = masked | (new & fits.unsqueeze(2))
        missing, failures = missing - gain * fits, torch.where(fits, 0.0, failures + 1)
    order = (noise[:, -N:] - masked.flatten(1).float()).argsort(dim=1)          # masked ones first
    return order[:, count:], order[:, :count]


def random_masking(noise, grid: tuple[int, int], count: int, least: int):
    """Noise as above, of which the last N count -> visible, those of least noise, and masked."""
    N = grid[0] * grid[1]
    order = noise[:, -N:].argsort(dim=1)
    return order[:, :N - count], order[:, N - count:]


# -------------------------------------------------------------------------------- target and loss
MASKING = {"block": block_masking, "random": random_masking}
NORMALIZE = {"ln": lambda t: F.layer_norm(t, t.shape[-1:], eps=1e-6),
             "l2": lambda t: F.normalize(t, dim=-1) * t.shape[-1] ** 0.5,        # as long as by ln
             "none": lambda t: t}
ERRORS = {"smooth_l1": lambda d, beta: F.smooth_l1_loss(d, torch.zeros_like(d), reduction="none", beta=beta),
          "l2": lambda d, _: d.square(), "l1": lambda d, _: d.abs()}


def draw_schedule(tokens: int, most_rounds: int, rng, kind: str = "exact") -> list[int]:
    """How many tokens each round merges, for one morphing: a list of k numbers; rng: random.Random.

    exact: how many groups remain is uniform in 1 ... tokens (as in the paper), the number of rounds in
    1 ... most_rounds (or more, where halving each time is too slow); each round merges about equally many (this rule
    is ours). official: how many are merged is uniform in 0 ... tokens, divided by the rounds and rounded up: usually
    more merge."""
    if kind == "official":
        merged, k = rng.randint(0, tokens), rng.randint(1, most_rounds)
        r = -(-merged // k)
        return [r if r * k <= tokens else merged // k] * k
    remain, k = rng.randint(1, tokens), rng.randint(1, most_rounds)
    k = max(k, math.ceil(math.log2(tokens / remain)))
    n, rounds = tokens, []
    for left in range(k - 1, -1, -1):                    # rounds after this one, each at best a halving
        rounds.append(max(-(-(n - remain) // (left + 1)), n - remain * 2 ** left))     # never below 0 or above n // 2
        n -= rounds[-1]
    return rounds


@torch.no_grad()
def match(tokens, rounds: list[int], protect_first=False, average="size", split="alternating", generator=None):
    """Group similar tokens (B, N, C) by rounds of bipartite matching, as ToMe does.

    In a round every token of one half names the most similar of the other half, and the r pairs most
    alike merge (r: at most all of the half). A merged token is the mean of all that it is made of
    (average "size"), or of the tokens merged in that round ("uniform": the paper's product of
    averaging matrices).
    Returns labels (B, N), the number of each token's group; how many groups n there are; and the
    tokens' weights in their group's mean (B, N), None where they are equal. Similarities are always in fp32 (in half
    precision they form other groups); the tokens are as exact as the teacher's own precision, bf16 in training on a
    GPU."""
    B, N, C = tokens.shape
    labels, n = torch.arange(N, device=tokens.device).repeat(B, 1), N
    x = tokens if tokens.dtype == torch.float64 else tokens.float()             # sums: a cosine has no scale
    weights = torch.ones(B, N, device=x.device, dtype=x.dtype) if average == "uniform" else None
    for r in rounds:
        r = min(r, (n - protect_first) // 2)
        if r == 0:
            continue
        if split == "random":
            order = torch.randperm(n - protect_first, generator=generator, device=tokens.device) + protect_first
            order = torch.cat([order.new_zeros(int(protect_first)), order])     # the first stays the first
            x, labels = x[:, order], order.argsort()[labels]
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(x, dim=-1)
            similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)            # (B, a, n - a)
        if protect_first:
            similarity[:, 0] = -torch.inf
        best, partner = similarity.max(dim=2)                                   # (B, a) each
        a = best.shape[1]
        merged = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(r).indices, True)
        place = torch.empty(B, n, dtype=torch.long, device=x.device)             # of each group, after this round:
        place[:, ::2] = torch.where(merged, a - r + partner, (~merged).cumsum(dim=1) - 1)    # first the unmerged
        place[:, 1::2] = torch.arange(a - r, n - r, device=x.device)             # of one half, then the other half
        labels, n = place.gather(1, labels), n - r
        x = gathered(x, place, n)                                               # (B, n, C)
        if average == "uniform":
            size = gathered(torch.ones_like(place, dtype=x.dtype).unsqueeze(2), place, n)
            x, weights = x / size, weights / size.squeeze(2).gather(1, labels)
    return labels, n, weights


def gathered(x, place, n: int):
    """Sums of x (B, N, C) by group: place (B, N) in 0 ... n - 1 -> (B, n, C)."""
    B, N, C = x.shape
    rows = place + n * torch.arange(B, device=x.device).unsqueeze(1)             # (B, N)
    return x.new_zeros(B * n, C).index_add_(0, rows.flatten(), x.reshape(B * N, C)).view(B, n, C)


def morph(x, labels, n: int, weights=None):
    """Give each token of (B, N, C) the mean of its group; labels and weights from `match`."""
    if weights is None:
        weights = gather_tokens(1 / gathered(torch.ones_like(x[..., :1]), labels, n), labels).squeeze(2)
    return gather_tokens(gathered(x * weights.unsqueeze(2), labels, n), labels)


def morph_loss(online, target, labels, n=None, weights=None, loss="smooth_l1", beta=2.0, group_weight="size"):
    """Compare the groups' means of online and target (B, N, C), fp32; labels and weights from `match`.

    group_weight: a group counts as often as it has tokens ("size"; then this is the mean over all
    tokens, each replaced by its group's mean), or once ("uniform"). n: number of groups; None: N
    places, of which some stay empty, so that the shapes are the same at every step."""
    n = n or online.shape[1]
    size = gathered(torch.ones_like(online[..., :1]), labels, n)                # (B, n, 1)
    if weights is None:
        weights = gather_tokens(1 / size, labels).squeeze(2)                    # (B, N)
    mean = lambda x: gathered(x * weights.unsqueeze(2), labels, n)              # (B, n, C)
    if loss == "cosine":
        error = 1 - F.cosine_similarity(mean(online), mean(target), dim=-1)     # (B, n)
    else:                                                # the difference of means is the mean difference
        error = ERRORS[loss](mean(online - target), beta).mean(dim=2)
    count = size.squeeze(2) if group_weight == "size" else (size.squeeze(2) > 0).float()
    return (error * count).sum() / count.sum()


def token_loss(online, target, **scoring):
    """The same, each token (B, N, C) a group of its own."""
    return morph_loss(online, target, match(target, [])[0], **scoring)


# -------------------------------------------------------------------------------------------- DTM
class DTM(VisionTransformer):
    pretrain_only = ("distill_head", "mask_token", "momentum")     # after pre-training: how these names begin

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, target_dim,
                 mask_ratio=0.383, masking="block", min_block=16, student="dense", normalize="none",
                 loss="smooth_l1", beta=2.0, split="alternating", average="size",
                 group_weight="size", protect_first=False, token_weight=0.0, layer_scale=0.1,
                 drop_path=0.0):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads,
                         relative=student == "dense", layer_scale=layer_scale, drop_path=drop_path)
        self.dense, self.masking, self.min_block = student == "dense", masking, min_block
        self.normalize, self.token_weight = normalize, token_weight
        self.matching = dict(protect_first=protect_first, average=average, split=split)
        self.scoring = dict(loss=loss, beta=beta, group_weight=group_weight)
        patches = self.grid[0] * self.grid[1]
        self.count = int(patches * mask_ratio)                                  # how many are masked
        self.scored = patches if self.dense else patches - self.count           # S, how many are compared
        self.mask_noise = 4 * (6 + self.grid[0]) + patches                      # so many tries are enough at 0.4
        self.noise_width = self.mask_noise + 2 * depth                          # random numbers for an image
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if self.dense else None
        self.distill_head = nn.Linear(embed_dim, target_dim)
        self.init_weights()

    def masks(self, noise):
        """Noise (B, mask_noise or more) -> visible (B, K) and masked (B, N - K) patch numbers."""
        return MASKING[self.masking](noise[:, :self.mask_noise], self.grid, self.count, self.min_block)

    def features(self, images, teacher, noise):
        """Prediction and target (B, S, E), fp32: of all patches in order, or of the visible by a
        sparse student; and which patches are masked (B, N - K)."""
        patches = patchify(images, self.patch_size)                             # (B, N, P*P*3)
        visible, masked = self.masks(noise)
        drops = noise[:, self.mask_noise:].unflatten(1, (-1, 2)) if noise.shape[1] > self.mask_noise else None
        embedded = self.patch_embed(gather_tokens(patches, visible))            # (B, K, D)
        if self.dense:
            x = self.mask_token.expand(*patches.shape[:2], -1)                  # (B, N, D)
            x = x.scatter(1, visible.unsqueeze(-1).expand_as(embedded), embedded.to(x.dtype))
            scored = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)
            tokens = self.layers(x, None, drops)[-1][:, 1:]                     # (B, S, D)
        else:
            scored, tokens = visible, self.layers(embedded, visible, drops)[-1][:, 1:]
        online = self.distill_head(self.norm(tokens)).float()                   # (B, S, E)
        with torch.no_grad():
            return online, NORMALIZE[self.normalize](teacher(images, scored).float()), masked

    def forward(self, images, teacher, noise=None, drawn=((),), generator=None):
        """images (B, 3, H, W), normalised; teacher: (images, patch numbers (B, S)) -> features (B, S, E);
        noise (B, noise_width) in [0, 1) decides masks and drops; (B, mask_noise): nothing is dropped;
        drawn: for each morphing its schedule, how many tokens each round merges; generator: for random splits.

        Returns the loss, the prediction and the target (B, S, E)."""
        if noise is None:
            noise = torch.rand(len(images), self.noise_width, device=images.device)
        online, target, masked = self.features(images, teacher, noise)
        loss = 0.0
        for rounds in drawn:
            labels, _, weights = match(target, rounds, **self.matching, generator=generator)
            loss = loss + morph_loss(online, target, labels, None, weights, **self.scoring) / len(drawn)
        if self.token_weight:
            pair = (online, target)
            if self.dense and self.count:                # as maskdistill.py: of the masked only
                pair = (gather_tokens(x, masked) for x in pair)
            loss = loss + self.token_weight * token_loss(*pair, **self.scoring)
        return loss, online, target


def build(cfg: Config, target_dim: int = 1) -> DTM:
    """The untrained model of a configuration; the seed decides its weights.

    target_dim: the teacher's width E; who wants the encoder alone need not know it."""
    torch.manual_seed(cfg.seed)
    model = DTM(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads, target_dim,
                cfg.mask_ratio, cfg.masking, cfg.min_block, cfg.student, cfg.normalize, cfg.loss,
                cfg.beta, cfg.split, cfg.average, cfg.group_weight, cfg.protect_first,
                cfg.token_weight, cfg.layer_scale, cfg.drop_path)
    if cfg.teacher == "momentum":                        # the student's average; in its checkpoint
        average = VisionTransformer(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                                    relative=cfg.student == "dense", layer_scale=cfg.layer_scale)
        average.load_state_dict({name: model.state_dict()[name] for name in average.state_dict()})
        model.momentum = Teacher(average, feature="blocks")
    return model


@torch.no_grad()
def follow(model: DTM, decay: float):
    """Momentum: move the average of the student, average <- decay average + (1 - decay) student."""
    ours = dict(model.named_parameters())
    for name, average in model.momentum.vit.named_parameters():
        average.lerp_(ours[name], 1 - decay)


def schedules(cfg: Config, tokens: int, step: int, morphs: int) -> list[list[int]]:
    """The schedules of a step's morphings: the same on all processes, so that none waits for another's
    rounds (released: each draws its own). No morphing: one of no rounds, which compares token by token."""
    generators = (random.Random(common.derive_seed(cfg.seed, step, i)) for i in range(morphs))
    return [draw_schedule(tokens, cfg.most_rounds, rng, cfg.schedule) for rng in generators] or [[]]


@torch.no_grad()
def save_visualization(model: DTM, teacher, images, noise, rounds, path):
    """Write images (B, 3, H, W), normalised, what the student sees of them, how well it does, and the
    groups that one schedule makes, each in a color; single tokens stay as they are."""
    online, target, _ = DTM.features(model, images, teacher, noise)             # never compiled: it runs seldom
    labels, n, _ = match(target, rounds, **model.matching, generator=torch.Generator(images.device).manual_seed(0))
    cosine = F.cosine_similarity(online, target, dim=-1).clamp(0, 1)            # (B, S)
    heat = data.heat_patches(cosine, model.patch_size)                          # (B, S, P*P*3)
    patches, (visible, masked) = patchify(images, model.patch_size), model.masks(noise)
    rows = lambda index: index.unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    scored = visible
    if model.dense:
        scored = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)
    palette = torch.randint(0, 256, (n, 3), generator=torch.Generator().manual_seed(0)).to(images.device)
    sizes = gathered(torch.ones_like(target[..., :1]), labels, n)               # (B, n, 1)
    alone = gather_tokens(sizes, labels) == 1                                   # (B, S, 1)
    seen = gather_tokens(patches, scored)                                       # (B, S, P*P*3)
    tint = data.solid_patches(palette[labels], model.patch_size)
    groups = torch.where(alone, seen, 0.4 * seen + 0.6 * tint)
    show = lambda x: unpatchify(x, model.patch_size, model.grid)
    data.save_image_grid(path, {
        "original": images, "masked": show(patches.scatter(1, rows(masked), 0.0)),
        "cosine of prediction and target: blue 0, yellow 1":
            show(patches.scatter(1, rows(scored), heat)),
        f"{n} groups of the teacher's tokens": show(patches.scatter(1, rows(scored), groups))})


@torch.no_grad()
def measure(model: DTM, teacher, images, noise, drawn) -> dict:
    """What morphing does to the tokens of images: both losses of the same output, how many groups remain,
    and the cosine of the teacher's tokens side by side, before and after (of all patches)."""
    online, target, _ = DTM.features(model, images, teacher, noise)
    result = dict(morphed_loss=0.0, token_loss=token_loss(online, target, **model.scoring).item(), groups=0.0)
    tokens, after = target, 0.0
    if not model.dense:
        everything = torch.arange(model.grid[0] * model.grid[1], device=images.device).expand(len(images), -1)
        tokens = NORMALIZE[model.normalize](teacher(images, everything).float())
    generator = torch.Generator(images.device).manual_seed(0)
    for rounds in drawn:
        labels, n, weights = match(target, rounds, **model.matching, generator=generator)
        result["morphed_loss"] += morph_loss(online, target, labels, n, weights, **model.scoring).item() / len(drawn)
        result["groups"] += n / len(drawn)
        if not model.dense:
            labels, n, weights = match(tokens, rounds, **model.matching, generator=generator)
        after += neighbour_cosine(morph(tokens, labels, n, weights), model.grid) / len(drawn)
    return result | dict(neighbour_cosine=neighbour_cosine(tokens, model.grid), neighbour_cosine_morphed=after)


def neighbour_cosine(tokens, grid: tuple[int, int]) -> float:
    """Mean cosine of tokens (B, N, C) side by side, or one above the other, on their grid."""
    x = F.normalize(tokens, dim=-1).unflatten(1, grid)                          # (B, h, w, C)
    pairs = (x[:, 1:] * x[:, :-1]), (x[:, :, 1:] * x[:, :, :-1])
    return torch.cat([pair.sum(dim=-1).flatten() for pair in pairs]).mean().item()


# ---------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Pre-train and measure the encoder; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    count = int((cfg.image_size // cfg.patch_size) ** 2 * cfg.mask_ratio)
    if cfg.masking == "block" and 0 < count < cfg.min_block:
        raise common.UserError(f"min_block {cfg.min_block} is more than the {count} masked patches")
    if cfg.protect_first and cfg.student == "sparse":
        raise common.UserError("protect_first is about the first patch, which a sparse student may not see")
    teacher, target_dim = open_teacher(cfg, splits, device)
    if cfg.teacher_norm == "student" and isinstance(teacher, Teacher):
        teacher.scale.fill_(1.0), teacher.shift.zero_()
    splits.pretrain.transform = data.augment(cfg.image_size, cfg.crop_scale, cfg.color_jitter)
    model = build(cfg, target_dim).to(device)
    teacher = model.momentum if cfg.teacher == "momentum" else teacher
    groups = common.parameter_groups(model, cfg.weight_decay, ("cls_token",))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    run = common.Run("dtm", cfg, model, optimizer, steps_per_epoch)
    patches = model.grid[0] * model.grid[1]
    common.log(f"{common.count_parameters(model):,} parameters, "
               f"{model.count} of {patches} patches masked, targets of width {target_dim}")
    if cfg.compile:                                      # not `match`: its shapes differ from step to step
        model.features = torch.compile(model.features)
    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(model)         # averages gradients over processes
    amp = common.autocast(device, cfg.precision)
    samples = data.sample_images(splits.test or splits.pretrain, cfg.image_size, 64, device)
    sample_noise = torch.rand(64, model.mask_noise, generator=torch.Generator().manual_seed(0)).to(device)
    sample_schedules = schedules(cfg, model.scored, 0, 16)
    halving = min(sample_schedules, key=lambda rounds: abs(2 * sum(rounds) - model.scored))
    score = lambda: measure(model, teacher, samples, sample_noise, sample_schedules)
    batches = data.batches(splits.pretrain, cfg, run.first_step, run.last_step)

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch, cfg.min_lr)
        noise = common.mask_noise(cfg, step, model.noise_width, device)         # (accumulate, B, W)
        drawn = schedules(cfg, model.scored, step, cfg.morphs)
        split_seed = common.derive_seed(cfg.seed, step, cfg.morphs)
        step_loss = 0.0
        for i, (images, _, _) in enumerate(micro_batches):
            images = data.to_device(images, device)
            split = torch.Generator(device).manual_seed(split_seed)             # in each the same
            with common.sync_on_last(network, i, cfg.accumulate):              # once a step
                with amp:
                    loss, *_ = network(images, teacher, noise[i], drawn, split)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.teacher == "momentum":
            follow(model, cfg.momentum)
        if run.end_step(step, step_loss, lr, score) and common.rank() == 0:
            save_visualization(model, teacher, samples[:8], sample_noise[:8], halving,
                               run.folder / "similarity.png")

    run.save_encoder(model)
    if common.rank() == 0:                               # again: a kill may have left an older one
        save_visualization(model, teacher, samples[:8], sample_noise[:8], halving,
                           run.folder / "similarity.png")
    encoders = {"pixels": data.small_pixels,
                "trained": data.mean_patch_token(model),
                "untrained": data.mean_patch_token(build(cfg, target_dim).to(device))}
    if isinstance(teacher, Teacher):
        everything = torch.arange(patches, device=device)
        encoders["teacher"] = lambda images: teacher(images, everything.expand(len(images), -1)).mean(dim=1)
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in (run.scores or score()).items())
    common.log(f"on 64 images: {shown}")
    metrics = run.finish(data.score_encoders(encoders, splits, cfg, device))
    common.log(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt "
               f"--data {cfg.data}")
    return metrics


# ------------------------------------------------------------ teachers (the same text in maskdistill.py)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIP_B = "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
CLIP_L = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
RELEASED = {                                             # address and SHA-256; none is published for DINO
    "clip": (f"{OPENAI}/{CLIP_B}/ViT-B-16.pt", CLIP_B), "clip-large": (f"{OPENAI}/{CLIP_L}/ViT-L-14.pt", CLIP_L),
    "dino": ("https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", None)}
CLIP_NAMES = {                                           # OpenAI's vision tower -> timm's names
    "visual.class_embedding": "cls_token", "visual.positional_embedding": "pos_embed", "visual.proj": "proj",
    "visual.conv1.": "patch_embed.proj.", "visual.ln_pre.": "norm_pre.", "visual.ln_post.": "norm.",
    "visual.transformer.resblocks.": "blocks.", ".ln_1.": ".norm1.", ".ln_2.": ".norm2.",
    ".attn.in_proj_": ".attn.qkv.", ".attn.out_proj.": ".attn.proj.", ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2."}


def hog(images, patch_size: int, bins: int = 9):
    """Histograms of oriented gradients: images (B, 3, H, W) -> (B, N, 2 * 2 * 3 * bins).

    Each patch is 2 x 2 cells. In a cell and colour, every pixel votes for the direction of its gradient
    (of half a turn) with its length; the bins of a cell and colour together have length 1. As MaskFeat's,
    but with plain differences of neighbours and no Gaussian window."""
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
    turn = torch.atan2(dy, dx) / torch.pi % 1                                   # (B, 3, H, W)
    which = (turn * bins).long().clamp(max=bins - 1).unsqueeze(2)
    length = (dx.square() + dy.square()).sqrt().unsqueeze(2)
    votes = images.new_zeros(*images.shape[:2], bins, *images.shape[2:]).scatter_(2, which, length)
    cells = F.avg_pool2d(votes.flatten(1, 2), patch_size // 2)                   # (B, 3 * bins, 2h, 2w)
    return patchify(F.normalize(cells.unflatten(1, (3, bins)), dim=2).flatten(1, 2), 2)


class Teacher(nn.Module):
    """Patch features of a frozen ViT: (normalised images (B, 3, H, W), patch numbers (B, M)) -> (B, M, E).

    It gets the images normalised with its own mean and deviation, and of the size that makes its
    grid of patches the student's. feature: "post" after its last norm, "raw" before it, "proj" with
    CLIP's projection (D, E) after it, "blocks" the mean of what the upper half of the blocks put out."""

    def __init__(self, vit, mean=data.MEAN, std=data.STD, feature="post", proj=None):
        super().__init__()
        self.vit, self.feature = vit.requires_grad_(False), feature
        self.width = proj.shape[1] if feature == "proj" else vit.cls_token.shape[-1]
        m, s, mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD, mean, std))
        for name, value in (("scale", s / std), ("shift", (m - mean) / std), ("proj", proj)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, images, where):
        size = [side * self.vit.patch_size for side in self.vit.grid]
        if list(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        patches = patchify(images * self.scale + self.shift, self.vit.patch_size)
        upper = (len(self.vit.blocks) + 1) // 2 if self.feature == "blocks" else 1
        outputs = self.vit.layers(self.vit.patch_embed(patches), top=upper)
        x = sum(gather_tokens(x[:, 1:], where) for x in outputs) / upper                 # (B, M, D)
        x = x if self.feature in ("raw", "blocks") else self.vit.norm(x)
        return x @ self.proj if self.feature == "proj" else x


def download(name: str) -> Path:
    """A released teacher's file, fetched into torch.hub's folder the first time. Raises UserError."""
    address, digest = RELEASED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name}-{address.split('/')[-1]}")
    try:
        with common.rank_zero_first():
            if not path.exists():
                common.log(f"{address} -> {path}")
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(address, str(path), digest, progress=common.rank() == 0)
    except (OSError, RuntimeError) as error:             # no network; another hash
        raise common.UserError(f"{name} cannot be downloaded ({common.first_line(error)}); fetch "
                               f"{address} yourself and put it at {path}, or say with "
                               "--teacher FILE where it is") from error
    return path


def clip_to_timm(state: dict) -> dict:
    """The vision tower of an OpenAI CLIP state dict in timm's names and shapes, and its `proj` (D, E)."""
    found = {}
    for name, value in state.items():
        if name.startswith("visual."):
            for old, new in CLIP_NAMES.items():
                name = name.replace(old, new)
            found[name] = value.float()                  # published in half precision
    found["cls_token"], found["pos_embed"] = found["cls_token"].view(1, 1, -1), found["pos_embed"].unsqueeze(0)
    found["patch_embed.proj.bias"] = torch.zeros(len(found["patch_embed.proj.weight"]))
    return found


def load_teacher(path: Path, grid: tuple[int, int], feature="post") -> Teacher:
    """OpenAI CLIP, a ViT in timm's names (DINO, MAE), or a checkpoint of ours, as a teacher whose
    grid of patches is `grid`: its position table is resized. Raises UserError unless it fits.

    Other CLIPs have OpenAI's names, too, but often GELU or other heads: they load and are wrong."""
    digests = tuple(digest for _, digest in RELEASED.values() if digest)
    saved, state = common.read_weights(path, torchscript=digests)
    clip = "visual.proj" in state
    if clip:
        state = clip_to_timm(state)
    if "patch_embed.proj.weight" not in state:
        raise common.UserError(f"{path} holds neither CLIP's vision tower nor a ViT in timm's names, "
                               f"but {sorted(state)[:3]}")
    state = {name.replace("fc_norm.", "norm."): value for name, value in state.items()}
    proj = state.pop("proj", None)
    if feature == "proj" and proj is None:
        raise common.UserError(f"{path} has no projection, which --teacher-feature proj asks for")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    try:
        width, _, _, patch_size = state["patch_embed.proj.weight"].shape
        if clip:
            heads = width // 64
        elif "method" in saved:                          # ours: it says so
            heads = saved["config"]["num_heads"]
        else:
            heads = {size[0]: size[2] for name, size in SIZES.items() if name != "micro"}.get(width)
        if not heads:
            raise common.UserError(f"{path} does not tell how many heads it has at width {width}; "
                                   "checkpoint.pt of a run does")
        vit = VisionTransformer(
            tuple(side * patch_size for side in grid), patch_size, width, depth, heads,
            mlp_ratio=len(state["blocks.0.mlp.fc1.bias"]) / width, relative="pos_embed" not in state,
            layer_scale=float("blocks.0.gamma_1" in state), pre_norm=clip,
            act=quick_gelu if clip else F.gelu, eps=1e-5 if clip else 1e-6)
    except (KeyError, ValueError, RuntimeError) as error:        # a name or a shape that is not a ViT's
        raise common.UserError(f"{path} does not fit: {common.first_line(error)}") from error
    other_parts = ("decoder", "mask_token", "head.", "distill_head", "momentum", "text", "image_proj",
                   "logit_scale")                        # no encoder's: they are left out
    common.load_weights(vit, path, optional=other_parts, weights=state)
    kind = "OpenAI's CLIP (QuickGELU)" if clip else "ViT"
    common.log(f"{path}: teacher read as {kind}, feature {feature}, width {width}, {depth} blocks, {heads} heads, "
               f"patch {patch_size}")
    return Teacher(vit, *((CLIP_MEAN, CLIP_STD) if clip else (data.MEAN, data.STD)), feature, proj)


class Classifier(VisionTransformer):
    """--teacher self: a ViT with a linear layer on the mean of its patch tokens."""

    def __init__(self, *size, classes: int):
        super().__init__(*size)
        self.head = nn.Linear(self.cls_token.shape[-1], classes)
        self.init_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear):            # BEiT's small values learn slowly when narrow
                nn.init.xavier_uniform_(module.weight)

    def forward(self, images, labels):
        """Cross-entropy of images (B, 3, H, W), normalised, and labels (B,)."""
        return F.cross_entropy(self.head(self.encode(images)[:, 1:].mean(dim=1)), labels)


def train_teacher(cfg: Config, splits, device) -> Path:
    """Train the teacher of --teacher self, a ViT of the student's size with a table of positions,
    on the labels; a run of its own in OUTPUT-teacher, of which the checkpoint is returned."""
    if splits.train is None:
        raise common.UserError("--teacher self learns labels, and there are none: class folders, or another --teacher")
    cfg = replace(cfg, output=f"{cfg.output}-teacher", epochs=cfg.teacher_epochs,
                  warmup_epochs=0.1 * cfg.teacher_epochs, base_lr=cfg.teacher_lr, max_steps=0,
                  student="sparse", layer_scale=0.0)     # so that evaluate.py builds a plain ViT for it
    common.log("first the teacher, on labels; "
               f"--teacher {cfg.output}/checkpoint.pt takes it for other runs")
    torch.manual_seed(cfg.seed)
    model = Classifier(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                       classes=len(splits.classes)).to(device)
    splits.train.transform = data.augment(cfg.image_size, cfg.crop_scale, cfg.color_jitter)
    groups = common.parameter_groups(model, cfg.weight_decay, ("cls_token",))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(splits.train))
    run = common.Run("dtm", cfg, model, optimizer, steps_per_epoch)
    if cfg.compile:
        model.compile()
    network = model
    if common.world_size() > 1:
        network = DistributedDataParallel(model)         # averages gradients over processes
    amp = common.autocast(device, cfg.precision)
    batches = data.batches(splits.train, cfg, run.first_step, run.last_step)
    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        step_loss = 0.0
        for i, (images, labels, _) in enumerate(micro_batches):
            images = data.to_device(images, device)
            labels = labels.to(device, non_blocking=True)
            with common.sync_on_last(network, i, cfg.accumulate):
                with amp:
                    loss = network(images, labels)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(step, step_loss, lr)
    if common.world_size() > 1:
        torch.distributed.barrier()                      # the first process has written it now
    return run.folder / "checkpoint.pt"


TEACHERS = ("pixels", "hog", "momentum", "random", "self", *RELEASED)


def open_teacher(cfg: Config, splits, device):
    """The teacher that --teacher names, (images, patch numbers (B, M)) -> features (B, M, E), and E."""
    P, grid = cfg.patch_size, (cfg.image_size // cfg.patch_size,) * 2
    if cfg.teacher == "pixels":
        return lambda images, where: gather_tokens(patchify(images, P), where), 3 * P * P
    if cfg.teacher == "hog":
        return lambda images, where: gather_tokens(hog(images, P), where), 2 * 2 * 3 * 9
    if cfg.teacher == "momentum":
        return None, cfg.embed_dim                       # the model holds its own average
    if cfg.teacher == "random":
        torch.manual_seed(cfg.seed + 1)                  # not the student's weights
        vit = VisionTransformer(cfg.image_size, P, cfg.embed_dim, cfg.depth, cfg.num_heads)
        vit.init_weights()
        teacher = Teacher(vit)
        return teacher.to(device), teacher.width
    if cfg.teacher == "self":
        path = train_teacher(cfg, splits, device)
    else:
        path = download(cfg.teacher) if cfg.teacher in RELEASED else Path(cfg.teacher)
        if not path.is_file():
            raise common.UserError(f"no file {path}; --teacher is one of {', '.join(TEACHERS)}, or a file of weights")
    teacher = load_teacher(path, grid, cfg.teacher_feature)
    return teacher.to(device), teacher.width


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
