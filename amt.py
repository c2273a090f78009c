"""Good helper is around you: Attention-driven Masked Image Modeling (Liu, Gui, Luo, arXiv 2211.15362 v2): AMT.

The encoder's own attention says what in an image matters. Patches it attends to are masked the more often; of the
rest many are thrown away: neither seen nor predicted, so that a step costs less. The maps are kept for each image
and made anew every few dozen epochs.

    order = argsort(log w_i + g_i), descending, g_i from the standard Gumbel distribution: draws without replacement
            with chances that follow the weights w; the first are masked, the next thrown, the rest visible
    loss  = mean over masked patches and their pixels of (prediction - target)^2              (MAE's)

    images, whole, from time to time           images (B, C, H, W), a crop
      | attention_map: last block,               | patchify
      | class token to patches                 patches (B, N, P*P*C) --- masked --> pixel_target -> target (B, M, P*P*C)
    maps (images, N)                             |        |  thrown: nothing                              |
      | aligned with the crop and its flip       | visible                                                |
    weights (B, N) --- attention_order --------> |                                                        |
                                                 | patch_embed, + pos_embed, cls_token, blocks, norm      |
                                               latent (B, 1+K, D)                                       loss
                                                 | decoder_embed, mask_token for the masked, + positions  |
                                                 | decoder_blocks, decoder_norm, decoder_pred             |
                                               prediction (B, M, P*P*C) ----------------------------------+

B batch, N patches, M masked, K visible, D width, P patch side, C channels.
Against mae.py: `attention_map`, `aligned`, `attention_order`; thrown patches; the maps, saved with the checkpoint.
--host simmim: mask tokens go through the encoder, squares of patches are masked, a linear layer predicts, loss l1;
positions are learned.

    python amt.py                                     # synthetic shapes, no download, 35 s on 2 CPU cores:
        k-NN accuracy, 8 classes, 2000 test images: pixels 25.5 %, trained 15.0 %, untrained 17.4 %
        linear probe: pixels 22.1 %, trained 40.4 %, untrained 29.2 %
        (no gain in k-NN, see tests/measure/results.md)
    python amt.py --weights uniform                   # the control: as many masked and thrown, at random
    python amt.py --throw-ratio 0 --mask-ratio 0.75   # attention, nothing thrown;  --weights uniform: MAE
    python amt.py --host simmim                       # on ImageNet: --preset imagenet-simmim
    torchrun --nproc_per_node=8 amt.py --data imagenet --data-root /where/imagenet/is

Of the paper only abstract, introduction and figure could be read; the rest is from the released code, and ours where
that is at fault: maps follow crop and flip (released: a corner of the map, enlarged); the first refresh comes when
the masking begins (released: up to an interval later); maps are saved; the SimMIM branch trains (released: a shape
error from epoch 40 on). Published figures may stem from the released behaviour.
"""

import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

import common
import data


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    host: Literal["mae", "simmim"] = "mae"  # the method that masking and throwing are added to
    weights: Literal["attention", "uniform"] = "attention"  # what the choice of patches follows; uniform: the control
    start_epoch: int = 2          # the first epoch (from 0) of this masking; before it: at random, nothing thrown
    refresh_every: int = 3        # epochs between refreshes of the maps, the first at start_epoch
    refresh: Literal["periodic", "rolling"] = "periodic"  # all maps at once, or an equal share in each epoch
    map_decay: float = 0.0        # of a map's moving average over refreshes; 0: the newest alone; at most 0.9
    init: str = ""                # MAE weights to start from: a released file or a checkpoint of ours
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # row of SIZES: the encoder
    image_size: int = 32          # side of the square input in pixels
    patch_size: int = 4           # side of a patch in pixels
    decoder_embed_dim: int = 32   # width E of the decoder
    decoder_depth: int = 1        # blocks of the decoder
    decoder_num_heads: int = 2    # attention heads of the decoder
    mask_ratio: float | None = None  # fraction of the patches that is masked and predicted; None: the host's
    throw_ratio: float | None = None  # fraction of the patches neither seen nor predicted; None: the host's
    first_mask_ratio: float | None = None  # fraction that is masked before start_epoch; None: the host's
    mask_unit: int = 8            # simmim: side in pixels of the squares that are masked
    norm_pix: bool = True         # mae: target: pixels normalised within their patch; no: plain pixels
    crop_scale: float = 1.0       # smallest area of the random crop; 1: no crop
    batch_size: int = 32          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 7               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.016        # learning rate for 256 images a step
    weight_decay: float = 0.05    # AdamW's, on matrices and tokens only

    def __post_init__(self):
        self.output = self.output or common.default_output("amt", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]
        common.check(self)
        for name, ratio in zip(("mask_ratio", "throw_ratio", "first_mask_ratio"), HOSTS[self.host]):
            if getattr(self, name) is None:
                setattr(self, name, ratio)
        if self.start_epoch >= self.epochs and self.weights == "attention":
            raise common.UserError(f"start_epoch {self.start_epoch} is never reached in {self.epochs} epochs; "
                                   "a tenth of them is usual")
        if self.host == "simmim" and (self.mask_unit % self.patch_size or self.image_size % self.mask_unit):
            raise common.UserError(f"mask_unit {self.mask_unit} must be a multiple of patch_size {self.patch_size} "
                                   f"and divide image_size {self.image_size}")
        units = (self.image_size // (self.mask_unit if self.host == "simmim" else self.patch_size)) ** 2
        for mask, throw in ((self.first_mask_ratio, 0.0), (self.mask_ratio, self.throw_ratio)):
            masked, thrown = counts(units, mask, throw, self.host)
            if masked < 1 or masked + thrown >= units:
                raise common.UserError(f"mask_ratio {mask} and throw_ratio {throw} leave nothing to see or nothing to "
                                       f"predict of {units} {'squares' if self.host == 'simmim' else 'patches'}")


SIZES = {                                                # width, depth, heads
    "micro": (64, 4, 2),                                 # ours
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

HOSTS = {"mae": (0.45, 0.4, 0.75), "simmim": (0.44, 0.26, 0.44)}      # masked, thrown, masked before; released code
CODE = dict(image_size=224, patch_size=16, crop_scale=0.2, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,
            norm_pix=False, batch_size=4096, epochs=400, warmup_epochs=40, base_lr=1.5e-4, weight_decay=0.05,
            start_epoch=41, refresh_every=40, mask_unit=32, workers=12)           # released code
SMALL = CODE | dict(model="tiny", decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4,
                    batch_size=512, workers=8)                                               # ours
PRESETS = {
    "shapes": {},                                                         # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4, mask_unit=8),                       # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4, mask_unit=8),                      # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12, mask_unit=24),                       # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8, mask_unit=16),                # ours
    "imagenet": CODE | dict(model="base"),
    # code, without its clipping, drop path and least learning rate; the batch is of SimMIM's README
    "imagenet-simmim": CODE | dict(model="base", host="simmim", crop_scale=0.67, batch_size=2048, epochs=200,
                                   warmup_epochs=10, base_lr=5e-5),
    "folder": CODE | dict(model="small", decoder_depth=4, batch_size=256, epochs=100, warmup_epochs=5,
                          start_epoch=10, refresh_every=10),                                 # ours
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
        """Xavier-uniform matrices, linear layers' biases 0, tokens N(0, 0.02) (released code)."""
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


# ---------------------------------------------------------------------------------------- masking
def attention_order(noise, weights=None):
    """noise (B, N) in (0, 1), weights (B, N) >= 0 or None (all alike) -> patch numbers (B, N), a draw without
    replacement with chances by weight: the order of log w + Gumbel noise (Plackett-Luce)."""
    score = -(-noise.log()).log()
    if weights is not None:
        score = score + weights.clamp(min=1e-6).log()
    return score.argsort(dim=1, descending=True)


def counts(units: int, mask_ratio: float, throw_ratio: float, host: str) -> tuple[int, int]:
    """How many of the units (mae: patches, simmim: squares of patches) are masked, and thrown (released code)."""
    if host == "simmim":
        return math.ceil(units * mask_ratio - 1e-6), math.ceil(units * throw_ratio - 1e-6)
    masked = int(units * mask_ratio + 1e-6)              # 0.7 + 0.1 is a little less than 0.8
    return masked, int(units * (mask_ratio + throw_ratio) + 1e-6) - masked


def aligned(maps, boxes, grid: tuple[int, int]):
    """Maps (B, N) of whole images -> weights (B, N) of the patches of their crops: the map's value, between its
    patches, at the centre of each. boxes (B, 5): see `Crop`."""
    top, left, height, width, flipped = boxes.unsqueeze(2).unbind(1)            # (B, 1) each
    row, column = ((torch.arange(n, device=maps.device) + 0.5) / n for n in grid)
    v, u = top + row * height, left + torch.where(flipped > 0, 1 - column, column) * width     # (B, h), (B, w)
    place = torch.stack(torch.broadcast_tensors(u.unsqueeze(1), v.unsqueeze(2)), dim=3)        # (B, h, w, 2), x first
    maps = maps.reshape(-1, 1, *grid)
    return F.grid_sample(maps, 2 * place - 1, padding_mode="border", align_corners=False).flatten(1)


# -------------------------------------------------------------------------------- target and loss
def pixel_target(patches, norm_pix: bool):
    """patches (B, M, P*P*C) -> what to predict: pixels, or pixels normalised within each patch, by
    its mean and its unbiased variance + 1e-6 (section 3, "reconstruction target")."""
    if not norm_pix:
        return patches
    mean = patches.mean(dim=-1, keepdim=True)                                  # (B, M, 1)
    var = patches.var(dim=-1, keepdim=True)                                    # (B, M, 1)
    return (patches - mean) / (var + 1e-6).sqrt()


def undo_norm_pix(prediction, patches):
    """Predicted normalised pixels -> pixels (B, M, P*P*C), by the mean and variance of the patches
    themselves. This uses the answer: it is for looking at, not for measuring."""
    mean = patches.mean(dim=-1, keepdim=True)                                  # (B, M, 1)
    var = patches.var(dim=-1, keepdim=True)                                    # (B, M, 1)
    return prediction * (var + 1e-6).sqrt() + mean


def reconstruction_loss(prediction, target):
    """Mean squared error on the masked patches (section 3). All images have equally many, so the
    plain mean is the paper's: per patch first, then over the masked patches of the batch."""
    return (prediction.float() - target).square().mean()


def l1_loss(prediction, target):
    """Mean absolute error of the masked patches (SimMIM, less its 1e-5 in the denominator)."""
    return (prediction.float() - target).abs().mean()


# -------------------------------------------------------------------------------------------- AMT
class AMT(VisionTransformer):
    pretrain_only = ("decoder", "mask_token")            # what the names of the dropped parts begin with

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim=512,
                 decoder_depth=8, decoder_num_heads=16, mask_ratio=0.45, throw_ratio=0.4,
                 norm_pix=False, host="mae", mask_unit=32):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads)
        self.ratios, self.norm_pix, self.host = (mask_ratio, throw_ratio), norm_pix, host
        self.unit = mask_unit // patch_size if host == "simmim" else 1           # side of what is masked, in patches
        if host == "simmim":
            self.pos_embed.requires_grad_(True)          # learned, from the fixed table on
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.decoder_pred = nn.Linear(embed_dim, 3 * patch_size ** 2)
        else:
            self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
            positions = sincos_positions(decoder_embed_dim, self.grid)
            self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
            self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads)
                                                for _ in range(decoder_depth))
            self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
            self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * patch_size ** 2)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, latent, visible, masked):
        """latent (B, 1 + K, D) -> decoder tokens (B, 1 + K + M, E): class token, visible, then masked."""
        x = self.decoder_embed(latent)                                         # (B, 1 + K, E)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1)                                 # (B, 1 + K + M, E)
        position_ids = torch.cat([visible, masked], dim=1) + 1                 # (B, K + M)
        position_ids = F.pad(position_ids, (1, 0))                             # (B, 1 + K + M), class: 0
        x = x + self.decoder_pos_embed[0, position_ids]
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def encode_masked(self, patches, visible, masked):
        """SimMIM: tokens of the masked patches (B, M, D) after the last norm, with mask tokens in
        their place."""
        x = self.patch_embed(gather_tokens(patches, visible))                  # (B, K, D)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1)                                 # (B, K + M, D)
        x = x + self.pos_embed[0, torch.cat([visible, masked], dim=1) + 1]
        cls = self.cls_token + self.pos_embed[:, :1]                           # (1, 1, D)
        cls = cls.expand(x.shape[0], -1, -1)                                   # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, 1 + K + M, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1 + visible.shape[1]:])

    def split(self, noise, weights=None, ratios=None, order=None):
        """Which patches (B, n) are masked, thrown and visible, n the same for all images. order: see `forward`."""
        (h, w), u = self.grid, self.unit
        units = torch.arange(h * w, device=(noise if order is None else order).device)
        units = units.view(h // u, u, w // u, u).transpose(1, 2).reshape(-1, u * u)            # (U, u*u) patches
        if order is None:
            if weights is not None:                      # of a square: the mean of its patches
                weights = F.avg_pool2d(weights.view(-1, 1, h, w), u).flatten(1)
            order = attention_order(noise[:, :len(units)], weights)             # (B, U)
        masked, thrown = counts(len(units), *(ratios or self.ratios), self.host)
        order = units[order].flatten(1)                                         # (B, N)
        return order.split([n * u * u for n in (masked, thrown, len(units) - masked - thrown)], dim=1)

    def forward(self, images, weights=None, noise=None, ratios=None, order=None):
        """images (B, 3, H, W), normalised; weights (B, N) of their patches, None: all alike; noise (B, N) in
        (0, 1); ratios: (masked, thrown), None: the model's; order (B, U) of the units instead of a draw.

        Returns the loss, the prediction (B, M, P*P*C), and which patches it is of (B, M)."""
        patches = patchify(images, self.patch_size)                             # (B, N, P*P*C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        masked, _, visible = self.split(noise, weights, ratios, order)          # (B, M), thrown, (B, K)
        if self.host == "simmim":
            prediction = self.decoder_pred(self.encode_masked(patches, visible, masked))       # (B, M, P*P*C)
            return l1_loss(prediction, gather_tokens(patches, masked)), prediction, masked
        latent = self.forward_features(patches, visible)                       # (B, 1 + K, D)
        decoded = self.decode(latent, visible, masked)                         # (B, 1 + K + M, E)
        decoded = decoded[:, 1 + visible.shape[1]:]                            # (B, M, E)
        prediction = self.decoder_pred(self.decoder_norm(decoded))             # (B, M, P*P*C)
        target = pixel_target(gather_tokens(patches, masked), self.norm_pix)   # (B, M, P*P*C)
        return reconstruction_loss(prediction, target), prediction, masked

    def attention_map(self, images):
        """Normalised images (B, 3, H, W), whole -> how much the last block's class token attends to each patch
        (B, N): each head's attention stretched to 0 ... 1, then their mean (released code)."""
        x = self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed[:, 1:]
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]                           # of it only the class token's query and all keys
        x, heads, D = last.norm1(x), last.attn.num_heads, x.shape[2]
        weight, bias = last.attn.qkv.weight, last.attn.qkv.bias
        q = F.linear(x[:, 0], weight[:D], bias[:D]).unflatten(1, (1, heads, -1))        # (B, 1, heads, d)
        k = F.linear(x, weight[D:2 * D], bias[D:2 * D]).unflatten(2, (heads, -1))       # (B, 1 + N, heads, d)
        logits = (q.float() * k.float()).sum(dim=3).transpose(1, 2) * q.shape[3] ** -0.5       # (B, heads, 1 + N)
        attention = logits.softmax(dim=2)[:, :, 1:]
        attention = attention - attention.amin(dim=2, keepdim=True)             # (B, heads, N)
        return (attention / attention.amax(dim=2, keepdim=True).clamp(min=1e-12)).mean(dim=1)


def build(cfg: Config) -> AMT:
    """The untrained model of a configuration; the seed decides its weights."""
    torch.manual_seed(cfg.seed)
    return AMT(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
               cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads,
               cfg.mask_ratio, cfg.throw_ratio, cfg.norm_pix, cfg.host, cfg.mask_unit)


# -------------------------------------------------------------------------------------------- maps
class Crop:
    """data.augment, that tells what it did: image -> (crop (3, S, S), box (5,): top, left, height and width as
    shares of the image, and 1 if the crop is flipped)."""

    def __init__(self, size: int, scale: float):
        self.center, self.random = data.CenterCrop(size), None
        if scale < 1:
            self.random = v2.RandomResizedCrop(size, (scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)

    def __call__(self, image):
        H, W = image.shape[-2:]
        if self.random:
            box = self.random.make_params([image])
            top, left, height, width = (box[side] for side in ("top", "left", "height", "width"))
            image = self.random.transform(image, box)
        else:
            height = width = self.center.size * min(H, W) / self.center.resized(min(H, W))    # in pixels of the image
            top, left, image = (H - height) / 2, (W - width) / 2, self.center(image)
        flipped = torch.rand(1).item() < 0.5
        box = torch.tensor([top / H, left / W, height / H, width / W, float(flipped)])
        return v2.functional.horizontal_flip(image) if flipped else image, box


def due(cfg: Config, epoch: int, images: int):
    """The numbers of the images whose maps are to be made anew before an epoch."""
    since, none = epoch - cfg.start_epoch, np.arange(0)
    if cfg.weights == "uniform" or since < 0:
        return none
    if since == 0 or (cfg.refresh == "periodic" and since % cfg.refresh_every == 0):
        return np.arange(images)
    return np.arange(since % cfg.refresh_every, images, cfg.refresh_every) if cfg.refresh == "rolling" else none


@torch.no_grad()
def refresh(encode, dataset: data.ImageDataset, rows, maps, decay: float, cfg: Config, device):
    """Make maps (n, N), uint8, of the images `rows` anew, in place; each process makes a share, all get all.

    encode: whole images, squeezed to the input's size, -> maps (B, N) of 0 to 1. Unreadable images keep theirs."""
    resize = v2.Resize((cfg.image_size, cfg.image_size))
    numbered = copy.copy(dataset)
    numbered.labels = np.arange(len(dataset))            # features come with labels, and without what cannot be read
    for chunk in np.array_split(rows, math.ceil(len(rows) / 2 ** 18)):          # fp32 maps of so many on the device
        new, chunk = data.features(encode, numbered, cfg.image_size, device, workers=cfg.workers,
                                   transform=resize, rows=chunk)
        maps[chunk] = (255 * (decay * shown(maps[chunk]) + (1 - decay) * new)).round().to(torch.uint8)


def shown(maps):
    """Stored maps, uint8 -> weights in (0, 1)."""
    return (maps.float() + 0.5) / 256


def map_figures(maps, objects=None) -> dict:
    """How maps (n, N) are spread: the mean of their entropies, 1 for flat ones; and with objects (n, N), the share
    of each patch that an object covers, the lift: the mean of a map on the object over its mean anywhere."""
    share = F.normalize(shown(maps), p=1, dim=1)                                # (n, N)
    found = {"map_entropy": (-(share * share.log()).sum(dim=1).mean() / math.log(maps.shape[1])).item()}
    if objects is not None:
        on = (share * objects).sum(dim=1) / objects.sum(dim=1).clamp(min=1e-6)
        found["map_lift"] = (on * maps.shape[1]).mean().item()
    return found


@torch.no_grad()
def save_visualization(model: AMT, images, noise, ratios, attention: bool, path):
    """Write images (B, 3, H, W), normalised, their attention maps, what is masked and thrown by them (or, without
    attention, at random), and the predictions."""
    maps = model.attention_map(images)
    weights = maps if attention else None
    _, prediction, masked = model.forward(images, weights, noise, ratios)       # never compiled: it runs seldom
    _, thrown, _ = model.split(noise, weights, ratios)
    patches = patchify(images, model.patch_size)                               # (B, N, P*P*C)
    prediction = prediction.float()                                            # (B, M, P*P*C)
    title = "prediction"
    if model.norm_pix and model.host == "mae":
        prediction = undo_norm_pix(prediction, gather_tokens(patches, masked))
        title = "prediction (each patch with its true mean and variance)"
    gray = data.solid_patches(torch.full((*thrown.shape, 3), 128.0, device=images.device), model.patch_size)
    black = data.solid_patches(torch.zeros(*masked.shape, 3, device=images.device), model.patch_size)
    thrown_index = thrown.unsqueeze(-1).expand_as(gray)                        # (B, T, P*P*C)
    masked_index = masked.unsqueeze(-1).expand_as(prediction)                  # (B, M, P*P*C)
    seen = patches.scatter(1, thrown_index, gray)
    rows = {
        "original": patches,
        "attention: blue 0, yellow 1": data.heat_patches(maps, model.patch_size),
        "masked (black), thrown (gray), visible": seen.scatter(1, masked_index, black),
        title: seen.scatter(1, masked_index, prediction),
    }
    rows = {name: unpatchify(row, model.patch_size, model.grid) for name, row in rows.items()}
    data.save_image_grid(path, rows)


# ---------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Pre-train and measure the encoder; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    splits.pretrain.transform = Crop(cfg.image_size, cfg.crop_scale)
    model = build(cfg).to(device)
    if cfg.init:
        common.load_weights(model, cfg.init, optional=model.pretrain_only)
    mae = cfg.host == "mae"                              # SimMIM decays neither positions nor class token
    groups = common.parameter_groups(model, cfg.weight_decay, () if mae else ("pos_embed", "cls_token"))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95 if mae else 0.999), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    patches = model.grid[0] * model.grid[1]
    maps = torch.full((len(splits.pretrain), patches), 255, dtype=torch.uint8, device=device)  # of the whole images
    run = common.Run("amt", cfg, model, optimizer, steps_per_epoch, {"maps": maps})
    (first, _), (masked, thrown) = (counts(patches // model.unit ** 2, *ratios, cfg.host)
                                    for ratios in ((cfg.first_mask_ratio, 0.0), model.ratios))
    common.log(f"{common.count_parameters(model):,} parameters; of "
               f"{patches // model.unit ** 2} patches (or squares) {first} masked at first, "
               f"from epoch {cfg.start_epoch} on {masked} masked and {thrown} thrown")
    objects = None
    if cfg.data == "shapes":
        objects = torch.from_numpy(data.synthetic_shapes("train", np.arange(len(splits.pretrain)))["mask"]).float()
        objects = F.adaptive_avg_pool2d(objects.unsqueeze(1), model.grid).flatten(1).to(device)        # (n, N)
    if cfg.compile:
        model.compile(dynamic=False)                     # in place; one for each pair of ratios, of fixed shapes
    network = model                                      # network: the model as all processes share it
    if common.world_size() > 1:
        network = DistributedDataParallel(model)
    amp = common.autocast(device, cfg.precision)
    samples = data.sample_images(splits.test or splits.pretrain, cfg.image_size, 8, device)
    sample_noise = torch.rand(8, patches, generator=torch.Generator().manual_seed(0)).to(device)
    batches = data.batches(splits.pretrain, cfg, run.first_step, run.last_step)

    def encode(images):
        with amp:
            return model.attention_map(images)

    def visualize(epoch):
        begun = epoch >= cfg.start_epoch
        ratios = model.ratios if begun else (cfg.first_mask_ratio, 0.0)
        attention = begun and cfg.weights == "attention"
        path = run.folder / "reconstruction.png"
        save_visualization(model, samples, sample_noise, ratios, attention, path)

    for step, micro_batches in run.steps(batches):
        epoch, place = divmod(step, steps_per_epoch)
        rows = due(cfg, epoch, len(splits.pretrain)) if place == 0 else ()
        if len(rows):
            began = time.time()
            decay = cfg.map_decay if epoch > cfg.start_epoch else 0.0          # there is nothing to average with before
            refresh(encode, splits.pretrain, rows, maps, decay, cfg, device)
            some = rows[:10_000]                         # enough for a figure
            figures = map_figures(maps[some], None if objects is None else objects[some])
            run.write(step=step, refresh_s=time.time() - began, **figures)
            common.log(f"epoch {epoch}: {len(rows)} maps made anew in {time.time() - began:.1f} s, "
                       + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in figures.items()))
            run.interval_start = time.time()             # images/s are those of the training
        begun = epoch >= cfg.start_epoch
        ratios = model.ratios if begun else (cfg.first_mask_ratio, 0.0)
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        noise = common.mask_noise(cfg, step, patches, device)                  # (accumulate, B, N)
        step_loss = 0.0
        for i, ((images, boxes), _, index) in enumerate(micro_batches):
            images = data.to_device(images, device)
            weights = None
            if begun and cfg.weights == "attention":
                index = index.to(device, non_blocking=True)
                boxes = boxes.to(device, non_blocking=True)
                weights = aligned(shown(maps[index]), boxes, model.grid)       # (B, N)
            with common.sync_on_last(network, i, cfg.accumulate):              # all-reduce once a step
                with amp:
                    loss, *_ = network(images, weights, noise[i], ratios)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if run.end_step(step, step_loss, lr) and common.rank() == 0:
            visualize(epoch)

    run.save_encoder(model)
    if common.rank() == 0:                               # again: a kill may have left an older one
        trained_steps = max(run.first_step, run.last_step)
        visualize((trained_steps - 1) // steps_per_epoch)
    encoders = {"pixels": data.small_pixels,
                "trained": data.mean_patch_token(model),
                "untrained": data.mean_patch_token(build(cfg).to(device))}
    metrics = run.finish(data.score_encoders(encoders, splits, cfg, device))
    common.log(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt "
               f"--data {cfg.data}")
    return metrics


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
