"""Good helper is around you: Attention-driven Masked Image Modeling
(Liu, Gui, Luo, arXiv 2211.15362 v2): AMT, attention-driven masking and throwing.

The patches of each image are put in a random order in which those that the encoder itself attends
to most are likely to come first. The first 45 % of this order are masked and predicted; the next
40 % are thrown away, neither seen nor predicted, which makes a step cheaper; the encoder sees the
last 15 %, mostly the least attended. The attention maps of all training images are stored and
recomputed every few dozen epochs.

    a_i   = attention of the class token to patch i in the last block, stretched to 0 ... 1 in each
            head, averaged over heads
    order = argsort of (log a_i + g_i), largest first, g_i standard Gumbel noise: draws without
            replacement, with probabilities in proportion to a
    loss  = mean over masked patches and their pixels of (prediction - target)^2          (MAE's)

    whole images, every few epochs      images (B, C, H, W), crops
      | attention_map: last block,        | patchify
      | class token to patches          patches (B, N, P*P*C) -- masked --> pixel_target
    maps (n, N), stored                   |          | thrown: nothing           |
      | crop_maps: crop and flip          | visible                            target (B, M, P*P*C)
    attention (B, N) --- split ---------> |                                      |
                                          | encoder                             loss
                                        latent (B, 1+K, D)                       |
                                          | decoder: visible and masked only     |
                                        prediction (B, M, P*P*C) ----------------+

B batch, N patches = M masked + T thrown + K visible, D width, E decoder width, P patch side,
C channels, n training images; U squares of patches (SimMIM).

Differences from mae.py: `attention_map`, `crop_maps`, `attention_order`; thrown patches; the maps,
which are saved with the checkpoint. --base simmim applies the same to SimMIM: mask tokens pass
through the encoder, squares of patches are masked, a linear layer predicts, the loss is the
absolute error.

    python amt.py                                     # synthetic shapes, no download; 20 % thrown:
        linear probe, 8 classes, mean of seeds 0 to 4: trained 53.0 % (50.8 to 56.6), untrained
        28.9 %, pixels 19.9 %; attention on the objects is 1.2 to 3.5 times the mean and masks 64 to
        87 % of them, chance 45 %
    python amt.py --sampling uniform                  # the control: as many, chosen at random:
        55.3 % (52.6 to 60.9), ahead with every seed (tests/measure/results.md)
    python amt.py --throw-ratio 0 --mask-ratio 0.75   # attention, but nothing is thrown
    python amt.py --base simmim                       # on ImageNet: --preset imagenet-simmim
    torchrun --nproc_per_node=8 amt.py --data imagenet --data-root /where/imagenet/is

Of the paper only the abstract, a paragraph of the introduction and a figure's caption could be
read; the rest is from the released code, and ours where that is at fault: maps follow crop and flip
(released: a corner of the map, enlarged); the first maps are made when the masking begins
(released: up to an interval later); maps are saved; the SimMIM branch trains (released: a shape
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
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of the encoder, see SIZES
    init: str = ""                # MAE weights to start from: released or of ours; simmim: an encoder.pt
    image_size: int = 28          # side of the square input in pixels
    patch_size: int = 4           # side of a patch in pixels
    decoder_embed_dim: int = 32   # mae: width E of the decoder
    decoder_depth: int = 1        # mae: blocks of the decoder
    decoder_num_heads: int = 2    # mae: attention heads of the decoder

    base: Literal["mae", "simmim"] = "mae"  # the method whose masks the attention chooses
    sampling: Literal["attention", "uniform"] = "attention"  # of masked and thrown patches; uniform: the control
    attention_from: int = 4       # epochs with plain random masks, nothing thrown, before sampling and ratios apply
    refresh_every: int = 3        # epochs from then on until the maps are recomputed
    mask_ratio: float | None = None  # fraction of the patches that is masked; None: the base's
    throw_ratio: float | None = None  # fraction of the patches that is thrown; None: the base's
    mask_unit: int = 4            # simmim: side in pixels of the squares that are masked
    norm_pix: bool = True         # mae: target: pixels normalised within their patch; no: raw pixels

    crop_scale: float = 1.0       # smallest fraction of the area that the random crop keeps; 1: no crop
    batch_size: int = 32          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 6               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.016        # peak learning rate = base_lr * batch_size / 256
    weight_decay: float = 0.05    # AdamW's, on matrices and tokens only

    def __post_init__(self):
        self.output = self.output or common.default_output("amt", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]         # derived: no flags
        common.check(self)
        mask_ratio, throw_ratio = RATIOS[self.base]
        if self.mask_ratio is None:
            self.mask_ratio = mask_ratio
        if self.throw_ratio is None:
            self.throw_ratio = throw_ratio
        if self.attention_from >= self.epochs:
            raise common.UserError(f"attention_from {self.attention_from} is never reached in "
                                   f"{self.epochs} epochs; a tenth of them is the release's")
        side = self.patch_size
        if self.base == "simmim":
            side = self.mask_unit
            if self.mask_unit % self.patch_size or self.image_size % self.mask_unit:
                raise common.UserError(f"mask_unit {self.mask_unit} must be a multiple of "
                                       f"patch_size {self.patch_size} and divide image_size "
                                       f"{self.image_size}")
        units = (self.image_size // side) ** 2
        masked, thrown = count_units(units, self.mask_ratio, self.throw_ratio, self.base)
        if masked < 1 or masked + thrown >= units:
            raise common.UserError(f"mask_ratio {self.mask_ratio} and throw_ratio "
                                   f"{self.throw_ratio} leave nothing to see or nothing to predict "
                                   f"of {units} patches or squares")


SIZES = {                                                # width, depth, heads
    "micro": (64, 4, 2),                                 # ours
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
RATIOS = {"mae": (0.45, 0.4), "simmim": (0.44, 0.26)}    # masked, thrown (released code)
RANDOM_MASK_RATIO = {"mae": 0.75, "simmim": 0.44}        # before attention_from (released code)
CODE = dict(image_size=224, patch_size=16, crop_scale=0.2, norm_pix=False,     # released code
            decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,
            batch_size=4096, epochs=400, warmup_epochs=40, base_lr=1.5e-4, weight_decay=0.05,
            attention_from=41, refresh_every=40, mask_unit=32, workers=12)
SMALL = CODE | dict(model="tiny", decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4,
                    batch_size=512, workers=8)                                             # ours
PRESETS = {
    "shapes": dict(throw_ratio=0.2),           # ours, for so short a run; else the defaults above
    "cifar10": SMALL | dict(image_size=32, patch_size=4, mask_unit=8),                      # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4, mask_unit=8),                     # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12, mask_unit=24),                      # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8, mask_unit=16),               # ours
    "imagenet": CODE | dict(model="base"),
    # released code, without its clipping, drop path, layer scale, and first and last learning rate;
    # batch: SimMIM's README
    "imagenet-simmim": CODE | dict(model="base", base="simmim", crop_scale=0.67, batch_size=2048,
                                   epochs=200, warmup_epochs=10, base_lr=5e-5),
    "folder": CODE | dict(model="small", decoder_depth=4, batch_size=256, epochs=100,
                          warmup_epochs=5, attention_from=10, refresh_every=10),            # ours
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


# ---------------------------------------------------------------------------------------- masking
def attention_order(noise, attention=None):
    """noise (B, N) in [0, 1) -> indices (B, N), drawn without replacement, each with a probability
    in proportion to its attention (B, N) >= 0; None: uniform.

    Sorting by log attention + Gumbel noise gives just such draws (the Gumbel top-k trick)."""
    scores = -(-noise.log()).log()                                             # Gumbel noise (B, N)
    if attention is not None:
        scores = scores + attention.clamp(min=1e-6).log()
    return scores.argsort(dim=1, descending=True)


def count_units(units: int, mask_ratio: float, throw_ratio: float, base: str) -> tuple[int, int]:
    """How many of the units (mae: patches, simmim: squares of patches) are masked, and how many
    thrown (released code, which rounds down for MAE and up for SimMIM)."""
    if base == "simmim":
        masked = math.ceil(units * mask_ratio - 1e-6)
        thrown = math.ceil(units * throw_ratio - 1e-6)
    else:
        masked = int(units * mask_ratio + 1e-6)          # + 1e-6: 0.7 + 0.1 is less than 0.8
        thrown = int(units * (mask_ratio + throw_ratio) + 1e-6) - masked
    return masked, thrown


def cut_order(order, masked: int, thrown: int):
    """order (B, U) -> its first `masked` columns, the next `thrown` ones, and the rest."""
    return order[:, :masked], order[:, masked:masked + thrown], order[:, masked + thrown:]


def masking_of(cfg: Config, epoch: int) -> tuple[bool, tuple[float, float]]:
    """Whether attention chooses in this epoch, and the ratios of masked and thrown patches."""
    if epoch < cfg.attention_from:
        return False, (RANDOM_MASK_RATIO[cfg.base], 0.0)
    return cfg.sampling == "attention", (cfg.mask_ratio, cfg.throw_ratio)


# -------------------------------------------------------------------------------- target and loss
def pixel_target(patches, norm_pix: bool):
    """patches (B, M, P*P*C) -> what to predict: pixels, or pixels normalised within each patch, by
    its mean and its unbiased variance + 1e-6 (MAE, section 3, "reconstruction target")."""
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
    """Mean squared error on the masked patches (MAE, section 3). All images have equally many, so
    the plain mean is MAE's: per patch first, then over the masked patches of the batch."""
    return (prediction.float() - target).square().mean()


def l1_loss(prediction, target):
    """Mean absolute error on the masked patches (SimMIM, less its 1e-5 in the denominator)."""
    return (prediction.float() - target).abs().mean()


# -------------------------------------------------------------------------------------------- AMT
class AMT(VisionTransformer):
    """MAE whose masked and thrown patches are chosen by attention."""

    pretrain_only = ("decoder", "mask_token")            # prefixes of what pre-training alone needs

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim,
                 decoder_depth, decoder_num_heads, mask_ratio=0.45, throw_ratio=0.4,
                 norm_pix=False):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads)
        self.ratios = (mask_ratio, throw_ratio)
        self.norm_pix = norm_pix
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

    def split(self, noise, attention=None, ratios=None, order=None):
        """Indices of the masked (B, M), thrown (B, T) and visible (B, K) patches; see `forward`."""
        if order is None:
            order = attention_order(noise, attention)                          # (B, N)
        masked, thrown = count_units(order.shape[1], *(ratios or self.ratios), "mae")
        return cut_order(order, masked, thrown)

    def decode(self, latent, visible, masked):
        """latent (B, 1 + K, D) -> decoder tokens (B, 1 + K + M, E): class, visible, masked."""
        x = self.decoder_embed(latent)                                         # (B, 1 + K, E)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1)                                 # (B, 1 + K + M, E)
        position_ids = torch.cat([visible, masked], dim=1) + 1                 # 0: class token
        position_ids = F.pad(position_ids, (1, 0))                             # (B, 1 + K + M)
        x = x + self.decoder_pos_embed[0, position_ids]                        # (B, 1 + K + M, E)
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def forward(self, images, attention=None, noise=None, ratios=None, order=None):
        """images (B, 3, H, W), normalised; attention (B, N) to their patches, None: all alike;
        noise (B, N) in [0, 1); ratios: (masked, thrown), None: the model's; order (B, N): the
        order of the patches itself, in place of a draw.

        Returns the loss, the prediction (B, M, P*P*C), and the indices of its patches (B, M)."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        masked, _, visible = self.split(noise, attention, ratios, order)       # (B, M), _, (B, K)
        latent = self.forward_features(patches, visible)                       # (B, 1 + K, D)
        decoded = self.decode(latent, visible, masked)                         # (B, 1 + K + M, E)
        decoded = decoded[:, 1 + visible.shape[1]:]                            # (B, M, E)
        prediction = self.decoder_pred(self.decoder_norm(decoded))             # (B, M, P*P*C)
        target = pixel_target(gather_tokens(patches, masked), self.norm_pix)   # (B, M, P*P*C)
        return reconstruction_loss(prediction, target), prediction, masked


class AMTSimMIM(VisionTransformer):
    """SimMIM (Xie et al., arXiv 2111.09886) whose masked and thrown squares of patches are chosen
    by attention. Positions are learned, beginning with the fixed table."""

    pretrain_only = ("decoder", "mask_token")            # prefixes of what pre-training alone needs

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, mask_ratio=0.44,
                 throw_ratio=0.26, mask_unit=32):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads)
        self.ratios = (mask_ratio, throw_ratio)
        self.norm_pix = False
        self.unit = mask_unit // patch_size              # patches along the side of a square
        self.pos_embed.requires_grad_(True)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.decoder_pred = nn.Linear(embed_dim, 3 * patch_size ** 2)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def split(self, noise, attention=None, ratios=None, order=None):
        """Indices of the masked (B, M), thrown (B, T) and visible (B, K) patches, whole squares of
        them; order (B, U) is one of the U squares."""
        h, w = self.grid
        u = self.unit
        patch_ids = torch.arange(h * w, device=self.pos_embed.device)
        patch_ids = patch_ids.view(h // u, u, w // u, u).transpose(1, 2)       # (h/u, w/u, u, u)
        patch_ids = patch_ids.reshape(-1, u * u)                               # (U, u*u)
        squares = patch_ids.shape[0]
        if order is None:
            if attention is not None:                    # of a square: the mean of its patches
                attention = F.avg_pool2d(attention.view(-1, 1, h, w), u).flatten(1)    # (B, U)
            order = attention_order(noise[:, :squares], attention)             # (B, U)
        masked, thrown = count_units(squares, *(ratios or self.ratios), "simmim")
        return [patch_ids[part].flatten(1) for part in cut_order(order, masked, thrown)]

    def encode_masked(self, patches, visible, masked):
        """Tokens of the masked patches after the last norm (B, M, D), from mask tokens."""
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

    def forward(self, images, attention=None, noise=None, ratios=None, order=None):
        """As AMT's; the prediction is of raw pixels."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        masked, _, visible = self.split(noise, attention, ratios, order)       # (B, M), _, (B, K)
        tokens = self.encode_masked(patches, visible, masked)                  # (B, M, D)
        prediction = self.decoder_pred(tokens)                                 # (B, M, P*P*C)
        target = gather_tokens(patches, masked)                                # (B, M, P*P*C)
        return l1_loss(prediction, target), prediction, masked


def build(cfg: Config) -> AMT | AMTSimMIM:
    """The untrained model of a configuration; the seed decides its weights."""
    torch.manual_seed(cfg.seed)
    size = (cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads)
    if cfg.base == "simmim":
        return AMTSimMIM(*size, cfg.mask_ratio, cfg.throw_ratio, cfg.mask_unit)
    return AMT(*size, cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads,
               cfg.mask_ratio, cfg.throw_ratio, cfg.norm_pix)


# -------------------------------------------------------------------------------------------- maps
def attention_map(vit, images):
    """Normalised whole images (B, 3, H, W) -> the last block's attention of the class token to each
    patch (B, N): each head's is stretched to 0 ... 1, so that a sharp head does not outweigh the
    others, then the heads are averaged (released code).

    Written by hand: scaled_dot_product_attention returns no attention, and of the last block only
    the class token's query is needed."""
    x = vit.patch_embed(patchify(images, vit.patch_size)) + vit.pos_embed[:, 1:]
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    x = torch.cat([cls, x], dim=1)                                             # (B, 1 + N, D)
    for block in vit.blocks[:-1]:
        x = block(x)
    last = vit.blocks[-1]
    x = last.norm1(x)
    D = x.shape[2]
    heads = last.attn.num_heads
    q_weight, k_weight, _ = last.attn.qkv.weight.split(D)                      # (D, D) each
    q_bias, k_bias, _ = last.attn.qkv.bias.split(D)
    q = F.linear(x[:, 0], q_weight, q_bias).unflatten(1, (1, heads, -1))       # (B, 1, heads, d)
    k = F.linear(x, k_weight, k_bias).unflatten(2, (heads, -1))            # (B, 1 + N, heads, d)
    # a product and a sum, since @ would be computed in bf16 under autocast
    logits = (q.float() * k.float()).sum(dim=3) * q.shape[3] ** -0.5           # (B, 1 + N, heads)
    attention = logits.transpose(1, 2).softmax(dim=2)[:, :, 1:]                # (B, heads, N)
    attention = attention - attention.amin(dim=2, keepdim=True)                # 0 ...
    attention = attention / attention.amax(dim=2, keepdim=True).clamp(min=1e-12)       # ... 1
    return attention.mean(dim=1)                                               # (B, N)


class Crop:
    """Crops and flips like data.augment, and returns where: image -> (crop (3, size, size), box
    (5,): top, left, height and width as fractions of the image, and 1 if the crop is flipped)."""

    def __init__(self, size: int, crop_scale: float):
        self.center = data.CenterCrop(size)
        self.random = None
        if crop_scale < 1:
            self.random = v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=data.BICUBIC)

    def __call__(self, image):
        H, W = image.shape[-2:]
        if self.random:
            box = self.random.make_params([image])
            top, left, height, width = (box[side] for side in ("top", "left", "height", "width"))
            image = self.random.transform(image, box)
        else:
            scale = self.center.resized(min(H, W)) / min(H, W)
            height = width = self.center.size / scale    # in pixels of the image
            top = (H - height) / 2
            left = (W - width) / 2
            image = self.center(image)
        flipped = torch.rand(1).item() < 0.5
        box = torch.tensor([top / H, left / W, height / H, width / W, float(flipped)])
        if flipped:
            image = v2.functional.horizontal_flip(image)
        return image, box


def crop_maps(maps, boxes, grid: tuple[int, int]):
    """Maps (B, N) of whole images -> maps (B, N) of their crops: at the center of each patch of the
    crop the whole map's value, interpolated between its patches. boxes (B, 5): see `Crop`."""
    h, w = grid
    top, left, height, width, flipped = boxes.unsqueeze(2).unbind(1)           # (B, 1) each
    row = (torch.arange(h, device=maps.device) + 0.5) / h                      # of the crop, 0 to 1
    column = (torch.arange(w, device=maps.device) + 0.5) / w
    column = torch.where(flipped > 0, 1 - column, column)                      # (B, w)
    y = top + row * height                                                     # of the image (B, h)
    x = left + column * width                                                  # (B, w)
    x, y = torch.broadcast_tensors(x.unsqueeze(1), y.unsqueeze(2))             # (B, h, w) each
    places = 2 * torch.stack([x, y], dim=3) - 1          # -1 to 1               (B, h, w, 2)
    maps = maps.reshape(-1, 1, h, w)
    cropped = F.grid_sample(maps, places, padding_mode="border", align_corners=False)
    return cropped.flatten(1)                                                  # (B, N)


def from_bytes(maps):
    """Stored maps, uint8 -> attention in (0, 1): never 0, so that every patch can be drawn."""
    return (maps.float() + 0.5) / 256


def is_refresh(cfg: Config, epoch: int) -> bool:
    """Whether the maps are recomputed before this epoch."""
    since = epoch - cfg.attention_from
    return cfg.sampling == "attention" and since >= 0 and since % cfg.refresh_every == 0


@torch.no_grad()
def refresh_maps(encode, dataset: data.ImageDataset, maps, cfg: Config, device):
    """Recompute the maps (n, N), uint8, of all images, in place; each process does its share.

    encode: whole images, squeezed to the input's size, -> attention (B, N). An image that cannot be
    read keeps its map."""
    numbered = copy.copy(dataset)
    numbered.labels = np.arange(len(dataset))            # so that `features` says which were read
    squeeze = v2.Resize((cfg.image_size, cfg.image_size))
    new, read = data.features(encode, numbered, cfg.image_size, device, workers=cfg.workers,
                              transform=squeeze)                               # (read, N), (read,)
    maps[read] = new.mul_(255).round_().to(torch.uint8)          # in place: ImageNet's are 1 GB


def object_coverage(count: int, grid: tuple[int, int], device):
    """Of the first n synthetic shapes, how much of each patch the object covers (n, N)."""
    masks = data.synthetic_shapes("train", np.arange(count))["mask"]
    masks = torch.from_numpy(masks).float().unsqueeze(1)                       # (n, 1, H, W)
    return F.adaptive_avg_pool2d(masks, grid).flatten(1).to(device)


def map_lift(maps, objects) -> float:
    """The mean attention on the objects over the mean attention anywhere; maps, objects (n, N)."""
    share = F.normalize(from_bytes(maps), p=1, dim=1)                          # sums to 1 over N
    on_object = (share * objects).sum(dim=1) / objects.sum(dim=1).clamp(min=1e-6)
    return (on_object * maps.shape[1]).mean().item()


def masked_object_share(model, maps, objects) -> tuple[float, float]:
    """How much of the objects' area (n, N) attention masks, by maps (n, N), and how much random
    masks would."""
    noise = torch.rand(maps.shape, generator=torch.Generator().manual_seed(0)).to(maps.device)
    masked, _, _ = model.split(noise, from_bytes(maps))                        # (n, M)
    masked_area = objects.gather(1, masked).sum()
    return (masked_area / objects.sum()).item(), masked.shape[1] / maps.shape[1]


@torch.no_grad()
def save_visualization(model, images, noise, ratios, by_attention: bool, path):
    """Write images (B, 3, H, W), normalised, their attention maps, what is masked and thrown by
    them, or at random, and the predictions."""
    maps = attention_map(model, images)                                        # (B, N)
    attention = maps if by_attention else None
    # .forward: not the compiled one
    _, prediction, masked = model.forward(images, attention, noise, ratios)
    _, thrown, _ = model.split(noise, attention, ratios)
    patches = patchify(images, model.patch_size)                               # (B, N, P*P*C)
    prediction = prediction.float()                                            # (B, M, P*P*C)
    title = "prediction"
    if model.norm_pix:
        prediction = undo_norm_pix(prediction, gather_tokens(patches, masked))
        title = "prediction (each patch with its true mean and variance)"
    gray = torch.full((*thrown.shape, 3), 128.0, device=images.device)
    gray = data.solid_patches(gray, model.patch_size)                          # (B, T, P*P*C)
    black = torch.zeros(*masked.shape, 3, device=images.device)
    black = data.solid_patches(black, model.patch_size)                        # (B, M, P*P*C)
    masked_index = masked.unsqueeze(-1).expand_as(prediction)                  # (B, M, P*P*C)
    seen = patches.scatter(1, thrown.unsqueeze(-1).expand_as(gray), gray)      # (B, N, P*P*C)
    rows = {
        "original": patches,
        "attention: blue 0, yellow 1": data.heat_patches(maps, model.patch_size),
        "masked (black), thrown (gray), visible": seen.scatter(1, masked_index, black),
        title: seen.scatter(1, masked_index, prediction),
    }
    rows = {name: unpatchify(row, model.patch_size, model.grid) for name, row in rows.items()}
    data.save_image_grid(path, rows)


# --------------------------------------------------------------------------------------- training
def build_optimizer(model, cfg: Config):
    """MAE's or SimMIM's AdamW; SimMIM decays neither its learned positions nor the class token."""
    undecayed = ("pos_embed", "cls_token") if cfg.base == "simmim" else ()
    betas = (0.9, 0.999) if cfg.base == "simmim" else (0.9, 0.95)
    groups = common.parameter_groups(model, cfg.weight_decay, undecayed)
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def train(cfg: Config) -> dict:
    """Pre-train and evaluate the encoder; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    splits.pretrain.transform = Crop(cfg.image_size, cfg.crop_scale)
    model = build(cfg).to(device)
    if cfg.init:
        common.load_weights(model, cfg.init, optional=model.pretrain_only)
    optimizer = build_optimizer(model, cfg)
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    patches = model.grid[0] * model.grid[1]
    maps = torch.full((len(splits.pretrain), patches), 255, dtype=torch.uint8, device=device)
    run = common.Run("amt", cfg, model, optimizer, steps_per_epoch, {"maps": maps})
    common.log(f"{common.count_parameters(model):,} parameters; after {cfg.attention_from} epochs "
               f"{100 * cfg.mask_ratio:.0f} % of the patches masked, "
               f"{100 * cfg.throw_ratio:.0f} % thrown")
    if common.wants_compile(cfg, device):
        model.compile(dynamic=False)                     # in place; once for each pair of ratios
    network = model
    if common.world_size() > 1:
        # averages gradients over processes
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    amp = common.autocast(device, cfg.precision, cfg.embed_dim)
    samples = data.sample_images(splits.test or splits.pretrain, cfg.image_size, 8, device)
    sample_noise = torch.rand(8, patches, generator=torch.Generator().manual_seed(0)).to(device)
    batches = data.batches(splits.pretrain, cfg, run.first_step, run.last_step)

    def encode(images):
        with amp:
            return attention_map(model, images)

    for step, micro_batches in run.steps(batches):
        epoch = step // steps_per_epoch
        if step % steps_per_epoch == 0 and is_refresh(cfg, epoch):
            started = time.time()
            refresh_maps(encode, splits.pretrain, maps, cfg, device)
            log_refresh(run, step, maps, time.time() - started)
        by_attention, ratios = masking_of(cfg, epoch)
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        noise = common.mask_noise(cfg, step, patches, device)                  # (accumulate, B, N)
        step_loss = 0.0
        for i, ((images, boxes), _, index) in enumerate(micro_batches):
            images = data.to_device(images, device)
            attention = None
            if by_attention:
                index = index.to(device, non_blocking=True)
                boxes = boxes.to(device, non_blocking=True)
                attention = crop_maps(from_bytes(maps[index]), boxes, model.grid)      # (B, N)
            with common.sync_on_last(network, i, cfg.accumulate):              # once a step
                with amp:
                    loss, *_ = network(images, attention, noise[i], ratios)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if run.end_step(step, step_loss, lr) and common.rank() == 0:
            save_visualization(model, samples, sample_noise, ratios, by_attention,
                               run.folder / "reconstruction.png")

    run.save_encoder(model)
    encoders = {"pixels": data.small_pixels,
                "trained": data.mean_patch_token(model),
                "untrained": data.mean_patch_token(build(cfg).to(device))}
    metrics = run.finish(data.score_encoders(encoders, splits, cfg, device))
    common.log(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt "
               f"--data {cfg.data}")
    return metrics


def log_refresh(run, step: int, maps, seconds: float):
    """Log how long the new maps took and, of synthetic shapes, how well they find the objects."""
    metrics = {"refresh_s": seconds}
    text = ""
    if run.cfg.data == "shapes":
        count = min(len(maps), 10_000)                   # enough for a mean
        objects = object_coverage(count, run.model.grid, maps.device)
        lift = map_lift(maps[:count], objects)
        share, at_random = masked_object_share(run.model, maps[:count], objects)
        metrics |= {"map_lift": lift, "objects_masked": share}
        text = (f"; attention on the objects is {lift:.1f} times the mean and masks "
                f"{100 * share:.0f} % of them (at random {100 * at_random:.0f} %)")
    run.write(step=step, **metrics)
    run.interval_start = time.time()                     # images/s are those of the training
    common.log(f"step {step}: {len(maps)} maps recomputed in {seconds:.1f} s{text}")


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
