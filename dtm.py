"""Morphing Tokens Draw Strong Masked Image Models (Kim, Heo, Han, arXiv 2401.00254): Dynamic Token
Morphing.

As in maskdistill.py, a student that sees an image with masked patches predicts a frozen teacher's
features. But the teacher's features of neighbouring patches often disagree. So similar tokens of
the teacher are grouped, and the student has to match the groups' means. How many groups there are,
and in how many rounds of matching they form, is drawn anew in every step.

    loss = mean over L morphings, all tokens and channels of
           smooth_l1(group mean of linear(student(masked image)) - group mean of teacher(image))

    images (B, C, H, W) -------------------------------- teacher, frozen
      | patchify                                           |
    patches (B, N, P*P*C)                                target (B, N, E)
      | visible: patch_embed; masked: mask_token           | match: rounds of bipartite matching
      | cls_token, blocks with relative positions, norm  labels (B, N): the group of each token
    tokens (B, 1+N, D)                                     |
      | distill_head                                       |
    prediction (B, N, E) -------------------------------- loss, between the groups' means

B batch, N patches, M masked, K = N - M visible, T = 1 + N, D width, d = D / heads, E the teacher's
width, P patch side, C channels, n groups. A morphing is one grouping of an image's tokens. It is
made in rounds, each of which merges some groups into others: a schedule such as [40, 40, 39] says
how many.

Differences from maskdistill.py: `draw_schedule`, `match` and `morph_loss`; all tokens are scored,
not only the masked ones; the target is not normalised; beta is 2; CLIP's features are those after
its projection. Morphing adds no parameters.

    python dtm.py                                     # synthetic shapes, no download:
        linear probe, 8 classes, mean of seeds 0 to 4: trained 62.4 % (57.5 to 67.8), its teacher
        68.0 % (63.4 to 74.8), untrained 16.4 %, pixels 21.6 %
    python dtm.py --morphs 0                          # the control: token by token
        62.9 % (58.5 to 65.5): in so short a run morphing brings nothing
    torchrun --nproc_per_node=8 dtm.py --data imagenet --data-root /where/imagenet/is

The first command needs no CLIP: its teacher is a small ViT that first learns the labels of the
shapes (--teacher self). Labels enter there and nowhere else.

The loss between means is never above the loss token by token of the same prediction, whatever the
groups (Jensen's inequality): a lower pre-training loss says nothing about the encoder.

Of the paper only the abstract, algorithm 1 and a caption could be read; the rest is from the
released code. Algorithm 1 splits the tokens at random and takes means of means; the release, and
we, split them by turns and take the means of all tokens. That the number of groups is drawn
uniformly is the paper's; the bounds are the release's; how the merges are spread over the rounds is
ours. Four things in the release look like mistakes, and we do otherwise: it draws the number of
tokens that merge, rounded up; it never merges the first patch, as if that were the class token; it
gives CLIP images that are normalised for the student; it compares tokens in half precision, which
changes the groups. The published figures may have been obtained with them. The release's encoder
has a table of relative positions in each block besides the shared one; ours has the shared one.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import common
import data


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of the encoder, see SIZES
    image_size: int = 32          # side of the square input in pixels
    patch_size: int = 8           # side of a patch in pixels
    layer_scale: float = 1.0      # initial gain of each block's two branches, learned per channel

    teacher: str = "self"         # clip, clip-large, a file of weights, or self: learns labels first
    morphs: int = 2               # morphings L in a step, each with groups of its own; 0: token by token
    most_rounds: int = 4          # largest number of rounds of matching in a morphing, more only for few groups
    mask_ratio: float = 0.383     # fraction of the patches that is masked
    min_block: int = 2            # smallest area of a masked rectangle, in patches

    crop_scale: float = 1.0       # smallest fraction of the area that the random crop keeps; 1: no crop
    color_jitter: float = 0.0     # strength of the random changes of brightness, contrast, saturation
    batch_size: int = 32          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 4               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.012        # peak learning rate = base_lr * batch_size / 256
    weight_decay: float = 0.05    # AdamW's, on matrices and the mask token only
    clip_grad: float = 3.0        # largest norm of the gradient

    def __post_init__(self):
        self.output = self.output or common.default_output("dtm", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]         # derived: no flags
        common.check(self)
        patches = (self.image_size // self.patch_size) ** 2
        masked = int(patches * self.mask_ratio)
        if masked == patches:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see of "
                                   f"{patches} patches")
        if 0 < masked < self.min_block:
            raise common.UserError(f"min_block {self.min_block} is more than the {masked} masked "
                                   f"patches")


SIZES = {                                                # width, depth, heads
    "micro": (64, 4, 2),                                 # ours
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
SELF_TEACHER = dict(embed_dim=64, depth=2, num_heads=4)  # the ViT of --teacher self
BETA = 2.0                                               # smooth-L1: quadratic below, linear above
MIN_LR = 1e-5                                            # at the end of the schedule
# From the release; but AdamW's beta2, batch_size, warmup_epochs, crop_scale and no drop path are
# those of BEiT v2, its parent (the release's defaults: beta2 open, 64 images a GPU, 5, 0.08, and a
# drop path of 0.1), and the rate grows linearly with the batch (in the release with its root).
RECIPE = dict(image_size=224, patch_size=16, layer_scale=0.1, teacher="clip", morphs=2,
             most_rounds=14, mask_ratio=0.383, min_block=16, crop_scale=0.2, color_jitter=0.4,
             batch_size=2048, epochs=300, warmup_epochs=10, base_lr=1.5e-3 / 8, weight_decay=0.05,
             clip_grad=3.0, workers=12)
SMALL = RECIPE | dict(model="tiny", most_rounds=8, min_block=4, batch_size=1024, workers=8)  # ours
PRESETS = {
    "shapes": {},                                                        # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                  # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                    # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                             # ours
    "imagenet": RECIPE | dict(model="base"),
    "imagenet-large": RECIPE | dict(model="large", layer_scale=1e-5),    # the teacher stays CLIP B
    "folder": RECIPE | dict(model="small", batch_size=256, epochs=100, warmup_epochs=5),     # ours
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


# ---------------- BEiT v2's encoder, or a plain ViT for teachers (the same text in maskdistill.py)
def relative_index(grid: tuple[int, int]):
    """Which row of the bias table each pair of tokens (query, key) uses: int64 (1 + N, 1 + N).

    There is a row for each offset (rows, columns) between two patches, (2h - 1)(2w - 1) in all;
    then one for class token to patch, one for patch to class token, one for class token to itself
    (BEiT)."""
    h, w = grid
    row, column = np.indices(grid).reshape(2, -1)                              # (N,) each
    row_offset = row[:, None] - row + h - 1                                    # (N, N), from 0
    column_offset = column[:, None] - column + w - 1                           # (N, N), from 0
    index = row_offset * (2 * w - 1) + column_offset                           # (N, N)
    index = np.pad(index, ((1, 0), (1, 0)))                                    # (1 + N, 1 + N)
    offsets = (2 * h - 1) * (2 * w - 1)
    index[0, :] = offsets
    index[:, 0] = offsets + 1
    index[0, 0] = offsets + 2
    return torch.from_numpy(index)


class RelativePositions(nn.Module):
    """A learned number for each offset between two tokens, added to the attention logits of all
    blocks and images; zero at the start (BEiT)."""

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        index = relative_index(grid)                                           # (1 + N, 1 + N)
        self.register_buffer("index", index, persistent=False)
        rows = int(index.max()) + 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def forward(self):
        table = self.relative_position_bias_table                              # (rows, heads)
        device = table.device.type
        if torch.is_autocast_enabled(device):            # once, and not in each block
            table = table.to(torch.get_autocast_dtype(device))
        bias = F.embedding(self.index, table)                                  # (T, T, heads)
        bias = bias.permute(2, 0, 1).unsqueeze(0)                              # (1, heads, T, T)
        # the fast attention kernels of GPUs want rows whose length in memory is a multiple of 8
        T = bias.shape[-1]
        return F.pad(bias, (0, -T % 8))[..., :T]


class Attention(nn.Module):
    """key_bias=False: biases of queries and values only, as BEiT has it. One of the keys would add
    the same number to all logits of a query, which the softmax takes out again."""

    def __init__(self, dim, num_heads, key_bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, logit_bias=None):                                     # (B, T, D)
        """logit_bias (1, heads, T, T): added to the attention logits."""
        B, T, D = x.shape
        qkv_bias = self.qkv.bias
        if qkv_bias is None:
            qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, qkv_bias)                           # (B, T, 3*D)
        qkv = qkv.view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=logit_bias)      # (B, heads, T, d)
        x = x.transpose(1, 2).reshape(B, T, D)
        return self.proj(x)


def quick_gelu(x):
    """OpenAI CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Module):
    def __init__(self, dim, activation):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """layer_scale: initial value of the two branches' gains, gamma_1 and gamma_2; 0: no gains."""

    def __init__(self, dim, num_heads, key_bias, layer_scale, activation, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, activation)
        self.gamma_1 = None
        self.gamma_2 = None
        if layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x, logit_bias=None):
        attn = self.attn(self.norm1(x), logit_bias)
        if self.gamma_1 is not None:
            attn = self.gamma_1 * attn
        x = x + attn
        mlp = self.mlp(self.norm2(x))
        if self.gamma_2 is not None:
            mlp = self.gamma_2 * mlp
        return x + mlp


class VisionTransformer(nn.Module):
    """relative: BEiT v2's encoder, the student's. Otherwise a ViT with a table of positions, as
    teachers are; clip: with a norm before the blocks, QuickGELU and eps 1e-5, as CLIP is.

    Parameters are named as in the released BEiT, MAE, DINO and timm checkpoints.
    image_size: side in pixels, or (height, width)."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, relative=False,
                 layer_scale=0.0, clip=False):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.rel_pos_bias = None
        self.pos_embed = None
        if relative:
            self.rel_pos_bias = RelativePositions(self.grid, num_heads)
        else:
            positions = sincos_positions(embed_dim, self.grid)
            self.pos_embed = nn.Parameter(positions, requires_grad=False)
        activation = quick_gelu if clip else F.gelu
        eps = 1e-5 if clip else 1e-6
        self.norm_pre = nn.LayerNorm(embed_dim, eps=eps) if clip else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, not relative, layer_scale, activation, eps)
            for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)

    def init_weights(self):
        """Normal matrices and tokens, cut at one std; zero biases; what the branches of block
        l = 1, 2, ... add is divided by sqrt(2 l) (BEiT v2).

        BEiT's std of 0.02 belongs to its width of 768. Narrower encoders learn too slowly from it:
        ours is 0.02 sqrt(768 / width) there."""
        std = 0.02 * max(1.0, 768 / self.cls_token.shape[-1]) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim > 1 and not name.startswith("rel_pos_bias"):
                nn.init.trunc_normal_(p, std=std, a=-std, b=std)
        for layer, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data.div_((2 * layer) ** 0.5)
            block.mlp.fc2.weight.data.div_((2 * layer) ** 0.5)

    def forward_features(self, x):
        """Embedded patches (B, N, D) -> tokens after the last norm (B, 1 + N, D), class first."""
        cls = self.cls_token.expand(x.shape[0], -1, -1)                        # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, 1 + N, D)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        x = self.norm_pre(x)
        logit_bias = None
        if self.rel_pos_bias is not None:
            logit_bias = self.rel_pos_bias()                                   # (1, heads, T, T)
        for block in self.blocks:
            x = block(x, logit_bias)
        return self.norm(x)

    def encode(self, images):
        """Normalised images (B, 3, H, W) -> all tokens (B, 1 + N, D); nothing is ever masked."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*C)
        return self.forward_features(self.patch_embed(patches))


# ---------------------------------------------------------------------------------------- masking
def block_masking(noise, grid: tuple[int, int], num_masked: int, min_block: int):
    """Mask rectangles of patches (BEiT's algorithm, for all images at once).

    noise (B, 4 * tries + N) in [0, 1) -> indices of the visible patches (B, N - num_masked) and of
    the masked ones (B, num_masked).

    A try is a rectangle of random shape and place, its area between min_block and what is still
    missing. It is accepted if it masks at least one patch more, but not too many. When ten tries in
    a row have failed or all have been made, single random patches make up the number."""
    h, w = grid
    N = h * w
    B = noise.shape[0]
    tries = noise[:, :-N].view(B, -1, 4, 1)                                    # (B, tries, 4, 1)
    row = torch.arange(h, device=noise.device)
    column = torch.arange(w, device=noise.device)
    is_masked = torch.zeros(B, h, w, dtype=torch.bool, device=noise.device)
    failures = torch.zeros(B, 1, device=noise.device)    # in a row
    missing = torch.full_like(failures, num_masked)                            # (B, 1)
    for t in range(tries.shape[1]):
        u_area, u_shape, u_top, u_left = tries[:, t].unbind(1)                 # (B, 1) each
        area = min_block + u_area * (missing - min_block)
        side = area.sqrt()                               # of a square of that area
        stretch = 0.3 ** (u_shape - 0.5)                 # height / width is from 0.3 to 1 / 0.3
        height = (side * stretch).round()
        width = (side / stretch).round()
        top = (u_top * (h - height + 1)).floor()
        left = (u_left * (w - width + 1)).floor()
        in_rows = (row >= top) & (row < top + height)                          # (B, h)
        in_columns = (column >= left) & (column < left + width)                # (B, w)
        rectangle = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)             # (B, h, w)
        new = rectangle & ~is_masked
        gain = new.sum(dim=(1, 2)).unsqueeze(1)                                # (B, 1)
        fits = (height < h) & (width < w)                # BEiT: smaller than the image both ways
        accepted = fits & (gain >= 1) & (gain <= missing) & (failures < 10)    # (B, 1)
        is_masked = is_masked | (new & accepted.unsqueeze(2))
        missing = missing - gain * accepted
        failures = torch.where(accepted, 0.0, failures + 1)
    fill = noise[:, -N:] - is_masked.flatten(1).float()                        # (B, N)
    order = fill.argsort(dim=1)                          # masked patches first, then random ones
    return order[:, num_masked:], order[:, :num_masked]


# -------------------------------------------------------------------------------------- morphing
def draw_schedule(tokens: int, most_rounds: int, rng: random.Random) -> list[int]:
    """How many groups each round of one morphing merges into others.

    How many groups remain is drawn uniformly from 1 ... tokens (as in the paper), the number of
    rounds from 1 ... most_rounds, raised if too few: a round at best halves the number of groups.
    Each round merges about equally many (ours)."""
    groups = rng.randint(1, tokens)
    num_rounds = rng.randint(1, most_rounds)
    num_rounds = max(num_rounds, math.ceil(math.log2(tokens / groups)))
    n = tokens
    rounds = []
    for rounds_after in reversed(range(num_rounds)):
        equal_share = math.ceil((n - groups) / (rounds_after + 1))
        least = n - groups * 2 ** rounds_after           # the later rounds can halve the rest
        rounds.append(max(equal_share, least))
        n -= rounds[-1]
    return rounds


def sum_groups(x, labels, n: int):
    """Sums of x (B, N, C) over groups: labels (B, N) in 0 ... n - 1 -> (B, n, C)."""
    B, N, C = x.shape
    image = torch.arange(B, device=x.device).unsqueeze(1)                      # (B, 1)
    rows = (n * image + labels).flatten()                                      # (B*N,)
    sums = x.new_zeros(B * n, C).index_add_(0, rows, x.reshape(B * N, C))
    return sums.view(B, n, C)


@torch.no_grad()
def match(tokens, rounds: list[int], protect_first=False):
    """Group similar tokens (B, N, C) by rounds of bipartite matching, as ToMe does.

    At first each token is a group. In a round, each even-numbered group finds the odd-numbered one
    with the most similar mean, and the r most similar of these pairs merge; r is at most half of
    the groups. Several even groups may join the same odd one.
    protect_first: token 0 joins no other, as in the released code (for comparison with it).
    Returns labels (B, N), the group of each token, and the number of groups n. Similarities are in
    the precision of the tokens whatever autocast says, since half precision changes the groups
    (fp32 products are TF32 on GPUs, unless --precision fp32)."""
    B, N, C = tokens.shape
    labels = torch.arange(N, device=tokens.device).repeat(B, 1)                # (B, N)
    n = N
    sums = tokens                                                              # (B, n, C)
    for r in rounds:
        r = min(r, (n - int(protect_first)) // 2)
        if r == 0:
            continue
        with torch.autocast(sums.device.type, enabled=False):
            unit = F.normalize(sums, dim=-1)             # sum and mean have the same direction
            even = unit[:, ::2]                                                # (B, a, C)
            odd = unit[:, 1::2]                                                # (B, n - a, C)
            similarity = even @ odd.transpose(1, 2)                            # (B, a, n - a)
        if protect_first:
            similarity[:, 0] = -torch.inf
        best, partner = similarity.max(dim=2)                                  # (B, a) each
        joins = torch.zeros_like(best, dtype=torch.bool)                       # (B, a)
        joins.scatter_(1, best.topk(r).indices, True)

        # groups are numbered anew: first the a - r even ones that stay, in order, then the odd ones
        a = even.shape[1]
        number_if_it_stays = (~joins).cumsum(dim=1) - 1                        # (B, a)
        number_of_partner = a - r + partner                                    # (B, a)
        number = torch.empty(B, n, dtype=torch.long, device=sums.device)       # (B, n)
        number[:, ::2] = torch.where(joins, number_of_partner, number_if_it_stays)
        number[:, 1::2] = torch.arange(a - r, n - r, device=sums.device)
        labels = number.gather(1, labels)
        n = n - r
        sums = sum_groups(sums, number, n)
    return labels, n


def group_means(x, labels, n: int):
    """Each token of x (B, N, C) replaced by the mean of its group; labels (B, N) in 0 ... n - 1."""
    size = sum_groups(torch.ones_like(x[..., :1]), labels, n)                  # (B, n, 1)
    means = sum_groups(x, labels, n) / size                                    # (B, n, C)
    return gather_tokens(means, labels)                                        # (B, N, C)


def morph_loss(prediction, target, labels, n: int):
    """Compare prediction and target (B, N, C), fp32, after both were averaged over the groups of
    labels (B, N)."""
    prediction = group_means(prediction, labels, n)                            # (B, N, C)
    target = group_means(target, labels, n)                                    # (B, N, C)
    return F.smooth_l1_loss(prediction, target, beta=BETA)


# -------------------------------------------------------------------------------------------- DTM
class DTM(VisionTransformer):
    pretrain_only = ("distill_head", "mask_token")       # prefixes of what pre-training alone needs

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, target_dim,
                 mask_ratio=0.383, min_block=16, layer_scale=0.1):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads, relative=True,
                         layer_scale=layer_scale)
        self.min_block = min_block
        h, w = self.grid
        self.num_masked = int(h * w * mask_ratio)                              # M
        # four numbers for each of 6 + h tries, which nearly always do, and one for each patch
        self.noise_width = 4 * (6 + h) + h * w
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.distill_head = nn.Linear(embed_dim, target_dim)
        self.init_weights()

    def masks(self, noise):
        """noise (B, noise_width) -> indices of visible (B, K) and of masked patches (B, M)."""
        return block_masking(noise, self.grid, self.num_masked, self.min_block)

    def predict(self, images, noise):
        """images (B, 3, H, W), noise (B, noise_width) -> prediction for all patches (B, N, E).

        By itself, to be compiled: `match` cannot be, since its shapes change with the step."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*C)
        B, N, _ = patches.shape
        visible, _ = self.masks(noise)                                         # (B, K)
        embedded = self.patch_embed(gather_tokens(patches, visible))           # (B, K, D)
        x = self.mask_token.expand(B, N, -1)                                   # (B, N, D)
        index = visible.unsqueeze(-1).expand_as(embedded)                      # (B, K, D)
        x = x.scatter(1, index, embedded.to(x.dtype))                          # (B, N, D)
        tokens = self.forward_features(x)[:, 1:]                               # (B, N, D)
        return self.distill_head(tokens).float()

    def forward(self, images, features, noise=None, schedules=((),)):
        """images (B, 3, H, W), normalised; features (B, N, E): the teacher's, of the whole images;
        noise (B, noise_width) in [0, 1) decides the masks; schedules: one for each morphing, [] is
        token by token.

        Returns the loss, the prediction and the target (B, N, E)."""
        if noise is None:
            noise = torch.rand(images.shape[0], self.noise_width, device=images.device)
        prediction = self.predict(images, noise)                               # (B, N, E)
        target = features.float()                                              # (B, N, E)
        loss = 0.0
        for rounds in schedules:
            labels, n = match(target, rounds)                                  # (B, N)
            loss = loss + morph_loss(prediction, target, labels, n) / len(schedules)
        return loss, prediction, target


def build(cfg: Config, target_dim: int = 1) -> DTM:
    """The untrained model of a configuration; the seed decides its weights.

    target_dim: the teacher's width E. (1 where weights are loaded and the head is not used.)"""
    torch.manual_seed(cfg.seed)
    return DTM(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads, target_dim,
               cfg.mask_ratio, cfg.min_block, cfg.layer_scale)


def draw_schedules(cfg: Config, tokens: int, step: int) -> list[list[int]]:
    """The schedules of a step's morphings: the same in all processes, so that none waits for
    another's rounds. No morphings: one without rounds, which compares token by token."""
    schedules = []
    for i in range(cfg.morphs):
        rng = random.Random(common.derive_seed(cfg.seed, step, i, 1))    # 1: not the masks' seed
        schedules.append(draw_schedule(tokens, cfg.most_rounds, rng))
    return schedules or [[]]


@torch.no_grad()
def save_visualization(model: DTM, images, features, noise, path):
    """Write what the student sees, where it predicts well, and a morphing into half as many groups
    as there are tokens, each in a color: normalised images (B, 3, H, W), features (B, N, E) of a
    teacher, noise (B, noise_width)."""
    _, prediction, target = model(images, features, noise)
    _, masked = model.masks(noise)                                             # (B, M)
    patches = patchify(images, model.patch_size)                               # (B, N, P*P*C)
    N = patches.shape[1]
    cosine = F.cosine_similarity(prediction, target, dim=-1)                   # (B, N)
    labels, n = match(target, 4 * [N // 8])              # 4 rounds merge N / 2 in all
    palette = torch.randint(0, 256, (n, 3), generator=torch.Generator().manual_seed(0))
    tint = data.solid_patches(palette.to(images.device)[labels], model.patch_size)
    masked_index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])      # (B, M, P*P*C)
    rows = {
        "original": patches,
        "masked": patches.scatter(1, masked_index, 0.0),
        "cosine of prediction and target: blue 0, yellow 1":
            data.heat_patches(cosine.clamp(0, 1), model.patch_size),
        f"{n} groups of the teacher's tokens": 0.4 * patches + 0.6 * tint,
    }
    rows = {name: unpatchify(row, model.patch_size, model.grid) for name, row in rows.items()}
    data.save_image_grid(path, rows)


# --------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Pre-train and evaluate the encoder; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    splits.pretrain.transform = data.augment(cfg.image_size, cfg.crop_scale, cfg.color_jitter)
    teacher = open_teacher(cfg).to(device)
    model = build(cfg, teacher.width).to(device)
    parameters = common.parameter_groups(model, cfg.weight_decay, undecayed=("cls_token",))
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), fused=True)              # BEiT v2
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    run = common.Run("dtm", cfg, model, optimizer, steps_per_epoch)
    if cfg.teacher == "self":
        learn_labels(teacher.vit, cfg, splits, run, device)
    patches = model.grid[0] * model.grid[1]
    common.log(f"{common.count_parameters(model):,} parameters, {model.num_masked} of {patches} "
               f"patches masked, targets of width {teacher.width}")
    if common.wants_compile(cfg, device):
        model.predict = torch.compile(model.predict)
        teacher = torch.compile(teacher)
    network = model
    if common.world_size() > 1:
        # averages gradients over processes
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    amp = common.autocast(device, cfg.precision, cfg.embed_dim)
    samples = data.sample_images(splits.test or splits.pretrain, cfg.image_size, 8, device)
    sample_noise = torch.rand(8, model.noise_width, generator=torch.Generator().manual_seed(0))
    sample_noise = sample_noise.to(device)
    batches = data.batches(splits.pretrain, cfg, run.first_step, run.last_step)

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch, MIN_LR)
        noise = common.mask_noise(cfg, step, model.noise_width, device)
        schedules = draw_schedules(cfg, patches, step)
        step_loss = 0.0
        for i, (images, _, _) in enumerate(micro_batches):
            images = data.to_device(images, device)
            with torch.no_grad(), amp:
                features = teacher(images)                                     # (B, N, E)
            with common.sync_on_last(network, i, cfg.accumulate):              # once a step
                with amp:
                    loss, *_ = network(images, features, noise[i], schedules)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if run.end_step(step, step_loss, lr) and common.rank() == 0:
            save_visualization(model, samples, teacher(samples), sample_noise,
                               run.folder / "similarity.png")

    run.save_encoder(model)
    encoders = {"pixels": data.small_pixels,
                "trained": data.mean_patch_token(model),
                "untrained": data.mean_patch_token(build(cfg, teacher.width).to(device)),
                "teacher": lambda images: teacher(images).mean(dim=1)}
    metrics = run.finish(data.score_encoders(encoders, splits, cfg, device))
    common.log(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt "
               f"--data {cfg.data}")
    return metrics


def open_teacher(cfg: Config):
    """The module that --teacher names: normalised images (B, 3, H, W) -> features (B, N, E).

    Of CLIP, the features after its projection, as in the released code. Raises UserError."""
    if cfg.teacher != "self":
        side = cfg.image_size // cfg.patch_size
        return load_teacher(cfg.teacher, (side, side), projected=True)
    torch.manual_seed(cfg.seed)                          # untrained; `train` teaches it the labels
    vit = VisionTransformer(cfg.image_size, cfg.patch_size, **SELF_TEACHER)
    return Teacher(vit)


# ------------------------------------------------------- teachers (the same text in maskdistill.py)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_NAMES = {                                           # OpenAI's vision tower -> timm's names
    "visual.class_embedding": "cls_token",
    "visual.positional_embedding": "pos_embed",
    "visual.conv1.": "patch_embed.proj.",
    "visual.ln_pre.": "norm_pre.",
    "visual.transformer.resblocks.": "blocks.",
    ".ln_1.": ".norm1.",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj.": ".attn.proj.",
    ".ln_2.": ".norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    "visual.ln_post.": "norm.",
    "visual.proj": "proj",
}
CLIP_ADDRESS = "https://openaipublic.azureedge.net/clip/models"
RELEASED = {                                             # name, SHA-256, which the address contains
    "clip": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip-large": ("ViT-L-14.pt",
                   "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
}


class Teacher(nn.Module):
    """Patch features of a frozen ViT: normalised images (B, 3, H, W) -> (B, N, E).

    The images are resized so that its grid of patches is the student's, and normalised with the
    mean and std that it was trained with. proj (D, E): CLIP's projection, None: E = D."""

    def __init__(self, vit: VisionTransformer, mean=data.MEAN, std=data.STD, proj=None):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.width = vit.cls_token.shape[-1] if proj is None else proj.shape[1]
        self.register_buffer("proj", proj, persistent=False)
        scale = torch.tensor(data.STD) / torch.tensor(std)
        shift = (torch.tensor(data.MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, images):
        h, w = self.vit.grid
        size = (h * self.vit.patch_size, w * self.vit.patch_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = images * self.scale + self.shift        # from the student's normalisation to its
        tokens = self.vit.encode(images)[:, 1:]                                # (B, N, D)
        return tokens if self.proj is None else tokens @ self.proj             # (B, N, E)


def download(name: str) -> Path:
    """OpenAI's CLIP of that name, fetched into torch.hub's folder the first time.

    Raises UserError."""
    file, digest = RELEASED[name]
    address = f"{CLIP_ADDRESS}/{digest}/{file}"
    path = Path(torch.hub.get_dir(), "checkpoints", f"clip-{file}")
    try:
        with common.rank_zero_first():
            if not path.exists():
                common.log(f"{address} -> {path}")
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(address, str(path), digest,
                                               progress=common.rank() == 0)
    except (OSError, RuntimeError) as error:             # no network; another hash
        raise common.UserError(f"{name} cannot be downloaded ({common.first_line(error)}); fetch "
                               f"{address} yourself and put it at {path}, or say with "
                               "--teacher FILE where it is") from error
    return path


def clip_to_timm(weights: dict) -> dict:
    """OpenAI's CLIP {name: tensor} -> its vision tower in timm's names and shapes, and `proj`."""
    tower = {}
    for name, value in weights.items():
        if name.startswith("visual."):
            for old, new in CLIP_NAMES.items():
                name = name.replace(old, new)
            tower[name] = value.float()                  # published in half precision
    tower["cls_token"] = tower["cls_token"].view(1, 1, -1)
    tower["pos_embed"] = tower["pos_embed"].unsqueeze(0)
    width = tower["patch_embed.proj.weight"].shape[0]
    tower["patch_embed.proj.bias"] = torch.zeros(width)  # CLIP's has none
    return tower


def load_teacher(teacher: str, grid: tuple[int, int], projected=False) -> Teacher:
    """OpenAI's CLIP by name or file, a ViT in timm's names (DINO, MAE), or a checkpoint of ours, as
    a teacher whose position table is resized to `grid` (rows, columns of patches).

    projected: CLIP's features through its projection, not straight from its last norm. Other
    CLIPs may have OpenAI's names but another activation: they would load and be wrong. Other ViTs
    have to be trained on images that were normalised with ImageNet's mean and std (data.MEAN).
    Raises UserError."""
    path = download(teacher) if teacher in RELEASED else Path(teacher)
    if not path.is_file():
        raise common.UserError(f"no file {path}; --teacher is one of the names that --help lists, "
                               "or a file of weights")
    digests = tuple(digest for _, digest in RELEASED.values())
    saved, weights = common.read_weights(path, torchscript=digests)
    is_clip = "visual.proj" in weights
    if is_clip:
        weights = clip_to_timm(weights)
    proj = weights.pop("proj", None)                                           # (D, E)
    # timm's models that average the patch tokens call their last norm fc_norm
    weights = {name.replace("fc_norm.", "norm."): value for name, value in weights.items()}
    embedding = weights.get("patch_embed.proj.weight")                         # (D, C, P, P)
    if embedding is None or embedding.ndim != 4:
        raise common.UserError(f"{path} holds neither OpenAI's CLIP nor a ViT in timm's names, but "
                               f"{sorted(weights)[:3]}")
    embed_dim, _, _, patch_size = embedding.shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    num_heads = count_heads(saved, embed_dim, path)
    layer_scale = 1.0 if "blocks.0.gamma_1" in weights else 0.0      # the file's gains replace it
    vit = VisionTransformer((grid[0] * patch_size, grid[1] * patch_size), patch_size, embed_dim,
                            depth, num_heads, relative="pos_embed" not in weights,
                            layer_scale=layer_scale, clip=is_clip)
    pretrain_parts = ("decoder", "mask_token", "head.", "distill_head", "momentum", "text",
                      "image_proj", "logit_scale")
    common.load_weights(vit, path, optional=pretrain_parts, weights=weights)
    kind = "OpenAI's CLIP" if is_clip else "a ViT"
    common.log(f"{path}: the teacher is {kind}, width {embed_dim}, {depth} blocks, {num_heads} "
               f"heads, patch {patch_size}")
    if is_clip:
        return Teacher(vit, CLIP_MEAN, CLIP_STD, proj if projected else None)
    return Teacher(vit)


def count_heads(saved: dict, embed_dim: int, path) -> int:
    """A checkpoint of ours says it; else it is what timm, DINO and CLIP have at that width."""
    usual = {width: heads for name, (width, _, heads) in SIZES.items() if name != "micro"}
    config = saved.get("config") or {}
    num_heads = saved.get("num_heads") or config.get("num_heads") or usual.get(embed_dim)
    if not num_heads:
        raise common.UserError(f"{path} does not tell how many heads it has at width {embed_dim}; "
                               "checkpoint.pt of a run does")
    return num_heads


def learn_labels(vit: VisionTransformer, cfg: Config, splits, run, device):
    """Train the teacher of --teacher self: the first process does, the others receive its weights.

    They are kept as teacher.pt in the run's folder, where a resumed run finds them, and others by
    --teacher. Raises UserError if the images have no labels."""
    if splits.train is None:
        raise common.UserError("--teacher self learns labels, and there are none: class folders, "
                               "or another --teacher")
    path = run.folder / "teacher.pt"
    if common.rank() == 0 and run.first_step > 0 and path.is_file():
        common.load_weights(vit, path)
    elif common.rank() == 0:
        common.log(f"first the teacher, on labels; then {path} serves other runs as --teacher")
        dataset = splits.train.with_transform(data.augment(cfg.image_size, cfg.crop_scale))
        train_classifier(vit, dataset, len(splits.classes), cfg, device)
        saved = {"model": vit.state_dict(), "num_heads": SELF_TEACHER["num_heads"]}
        common.save_atomic(saved, path)
    if common.world_size() > 1:
        for tensor in vit.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)


def train_classifier(vit, dataset, classes: int, cfg: Config, device,
                     epochs=3, batch_size=64, peak_lr=0.004):
    """Cross-entropy of a linear layer on the mean of the patch tokens; the layer is thrown away."""
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(cfg.seed + epoch)
        order = torch.randperm(len(dataset), generator=generator)
        batches += [[(epoch, i) for i in part.tolist()] for part in order.split(batch_size)]
    torch.manual_seed(cfg.seed)
    head = nn.Linear(SELF_TEACHER["embed_dim"], classes).to(device)
    parameters = [p for name, p in vit.named_parameters() if name != "pos_embed"]
    for p in parameters:
        p.requires_grad_(True)
    parameters = [*parameters, *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, len(batches),
                                                   pct_start=0.1, cycle_momentum=False)
    loaded = data.loader(dataset, batches, cfg.workers)
    for images, labels, _ in tqdm(loaded, "teacher", len(batches), leave=False, disable=None):
        tokens = vit.encode(data.to_device(images, device))                    # (B, 1 + N, D)
        logits = head(tokens[:, 1:].mean(dim=1))                               # (B, classes)
        loss = F.cross_entropy(logits, labels.to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    vit.requires_grad_(False)


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
