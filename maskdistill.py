"""A Unified View of Masked Image Modeling (Peng et al., arXiv 2210.10615): MaskDistill.

A frozen teacher (CLIP) looks at the whole image. The student sees the image with 40 % of its
patches replaced by a mask token, and predicts the teacher's normalised features of just those
patches with one linear layer. The paper's point: many methods are this one with another teacher,
another normalisation or another loss.

    loss = mean over masked patches and channels of
           smooth_l1(linear(student(masked image)) - normalize(teacher(whole image)))  (equation 1)

    images (B, C, H, W) -------------------------------- teacher, frozen
      | patchify                                           |
    patches (B, N, P*P*C)                                features (B, N, E)
      | visible: patch_embed; masked: mask_token           | of the masked patches
      | cls_token, blocks with relative positions, norm    | normalize
    tokens (B, 1+N, D)                                   target (B, M, E)
      | of the masked patches                              |
      | distill_head                                      loss
    prediction (B, M, E) ----------------------------------+

B batch, N patches, M masked, K = N - M visible, T = 1 + N, D width, d = D / heads, E the teacher's
width, P patch side, C channels.

Differences from mae.py: mask tokens go through the encoder in place of the masked patches, so
there is no decoder; rectangles of patches are masked; the encoder is BEiT v2's (relative positions,
layer scale, no bias of the keys). The parts of equation 1 are settings, and these come close to

    MAE, but for its decoder    --teacher pixels --loss l2 --masking random --mask-ratio 0.75
    MaskFeat                    --teacher hog --normalize none --loss l2
    data2vec                    --teacher momentum --beta 2 --mask-ratio 0.6
    feature distillation        --teacher clip --mask-ratio 0 --beta 2      (predicts all patches)

    python maskdistill.py                             # synthetic shapes, no download:
        linear probe, 8 classes, mean of seeds 0 to 4: trained 63.2 % (58.2 to 70.0), its teacher
        68.0 % (63.4 to 74.8), untrained 16.4 %, pixels 21.6 %
    python maskdistill.py --teacher pixels            # the same without a teacher:
        38.1 % (33.5 to 43.1)
    python maskdistill.py --data FOLDER --teacher ViT-B-16.pt
    torchrun --nproc_per_node=8 maskdistill.py --data imagenet --data-root /where/imagenet/is
    torchrun --nproc_per_node=8 maskdistill.py --data imagenet --preset imagenet-large

The first command needs no CLIP: its teacher is a small ViT that first learns the labels of the
shapes (--teacher self). Labels enter there and nowhere else.

No code was released, and of the paper only the abstract, part of the introduction and what is very
probably its figure 1 could be read. The recipe is put together from

    figure 1                    CLIP, layer normalisation, linear layer, smooth-L1, block masks
    two public reproductions    40 % masked; beta 1 (drkostas/MaskDistill-PyTorch; 2 in
                                bwconrad/masked-distillation)
    BEiT v2, the parent         encoder, optimisation, augmentation
    ours                        CLIP's features after its last norm, without its projection
"""

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

    teacher: str = "self"         # clip, clip-large, hog, pixels, momentum, a file, or self: learns labels first
    normalize: Literal["ln", "l2", "none"] = "ln"  # each target token; ln: mean 0, variance 1; l2: norm sqrt(E)
    loss: Literal["smooth_l1", "l2", "cosine"] = "smooth_l1"  # between prediction and target
    beta: float = 1.0             # smooth_l1: quadratic below, linear above
    momentum: float = 0.999       # momentum: what the average of the student keeps of itself in a step
    masking: Literal["block", "random"] = "block"  # mask rectangles, or patches one by one
    mask_ratio: float = 0.3       # fraction of the patches that is masked
    min_block: int = 2            # block: smallest area of a rectangle, in patches

    crop_scale: float = 1.0       # smallest fraction of the area that the random crop keeps; 1: no crop
    color_jitter: float = 0.0     # strength of the random changes of brightness, contrast, saturation
    batch_size: int = 64          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 7               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.01         # peak learning rate = base_lr * batch_size / 256
    weight_decay: float = 0.05    # AdamW's, on matrices and the mask token only
    clip_grad: float = 3.0        # largest norm of the gradient

    def __post_init__(self):
        self.output = self.output or common.default_output("maskdistill", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]         # derived: no flags
        common.check(self)
        patches = (self.image_size // self.patch_size) ** 2
        masked = int(patches * self.mask_ratio)
        if masked == patches:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see of "
                                   f"{patches} patches")
        if self.masking == "block" and 0 < masked < self.min_block:
            raise common.UserError(f"min_block {self.min_block} is more than the {masked} masked "
                                   f"patches")
        if self.teacher == "hog" and self.patch_size % 2:
            raise common.UserError(f"hog has 2 x 2 cells in a patch: patch_size "
                                   f"{self.patch_size} must be even")


SIZES = {                                                # width, depth, heads
    "micro": (64, 4, 2),                                 # ours
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
SELF_TEACHER = dict(embed_dim=64, depth=2, num_heads=4)  # the ViT of --teacher self
MIN_LR = 1e-5                                            # at the end of the schedule (BEiT v2)
RECIPE = dict(teacher="clip", normalize="ln", loss="smooth_l1", masking="block",        # figure 1
              beta=1.0, mask_ratio=0.4,                                          # reproductions
              image_size=224, patch_size=16, layer_scale=0.1, min_block=16,             # BEiT v2
              crop_scale=0.2, color_jitter=0.4, batch_size=2048, epochs=300, warmup_epochs=10,
              base_lr=1.5e-3 / 8, weight_decay=0.05, clip_grad=3.0, workers=12)
SMALL = RECIPE | dict(model="tiny", min_block=4, batch_size=1024, workers=8)             # ours
PRESETS = {
    "shapes": {},                                                        # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                  # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                    # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                             # ours
    "imagenet": RECIPE | dict(model="base"),
    "imagenet-large": RECIPE | dict(model="large", layer_scale=1e-5, teacher="clip-large"),
    "imagenet-huge": RECIPE | dict(model="huge", patch_size=14, layer_scale=1e-5,
                                  teacher="clip-large"),              # teacher of both: our choice
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


# ------------------------ BEiT v2's encoder, or a plain ViT for teachers (the same text in dtm.py)
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


def random_masking(noise, num_masked: int):
    """Mask single patches: noise (B, N) -> indices of the visible patches (B, N - num_masked),
    those of least noise, and of the masked ones (B, num_masked)."""
    num_visible = noise.shape[1] - num_masked
    order = noise.argsort(dim=1)                                               # (B, N)
    return order[:, :num_visible], order[:, num_visible:]


# ------------------------------------------------------------ target and loss, the parts of eq. 1
def normalize_target(features, kind: str):
    """Teacher features (B, M, E) -> target (B, M, E), each token by itself.

    ln: mean 0 and variance 1 over its channels; l2: norm sqrt(E), which is ln's, too; none."""
    E = features.shape[-1]
    if kind == "ln":
        return F.layer_norm(features, (E,), eps=1e-6)
    if kind == "l2":
        return F.normalize(features, dim=-1) * E ** 0.5
    return features


def distillation_loss(prediction, target, kind: str, beta: float):
    """prediction, target (B, M, E) -> the mean over tokens and channels; cosine: the mean over
    tokens of 1 - cosine."""
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target, beta=beta)
    if kind == "l2":
        return F.mse_loss(prediction, target)
    return 1 - F.cosine_similarity(prediction, target, dim=-1).mean()


# ------------------------------------------------------------------------------------ MaskDistill
class MaskDistill(VisionTransformer):
    pretrain_only = ("distill_head", "mask_token", "momentum")   # prefixes of what only it needs

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, target_dim,
                 mask_ratio=0.4, masking="block", min_block=16, normalize="ln", loss="smooth_l1",
                 beta=1.0, layer_scale=0.1):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads, relative=True,
                         layer_scale=layer_scale)
        self.masking = masking
        self.min_block = min_block
        self.normalize = normalize
        self.loss = loss
        self.beta = beta
        h, w = self.grid
        self.num_masked = int(h * w * mask_ratio)                              # M
        # four numbers for each of 6 + h tries, which nearly always do, and one for each patch
        self.noise_width = 4 * (6 + h) + h * w
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.distill_head = nn.Linear(embed_dim, target_dim)
        self.init_weights()

    def masks(self, noise):
        """noise (B, noise_width) -> indices of visible (B, K) and of masked patches (B, M)."""
        if self.masking == "random":
            patches = self.grid[0] * self.grid[1]
            return random_masking(noise[:, -patches:], self.num_masked)
        return block_masking(noise, self.grid, self.num_masked, self.min_block)

    def forward(self, images, features, noise=None):
        """images (B, 3, H, W), normalised; features (B, N, E): the teacher's, of the whole images;
        noise (B, noise_width) in [0, 1) decides the masks.

        Returns the loss, the prediction (B, M, E), its target (B, M, E) and the indices of the
        predicted patches (B, M): the masked ones; all if none is masked."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*C)
        B, N, _ = patches.shape
        if noise is None:
            noise = torch.rand(B, self.noise_width, device=images.device)
        visible, masked = self.masks(noise)                                    # (B, K), (B, M)
        embedded = self.patch_embed(gather_tokens(patches, visible))           # (B, K, D)
        x = self.mask_token.expand(B, N, -1)                                   # (B, N, D)
        index = visible.unsqueeze(-1).expand_as(embedded)                      # (B, K, D)
        x = x.scatter(1, index, embedded.to(x.dtype))                          # (B, N, D)
        tokens = self.forward_features(x)[:, 1:]                               # (B, N, D)
        predicted = masked if self.num_masked else visible                     # (B, M)
        tokens = gather_tokens(tokens, predicted)                              # (B, M, D)
        prediction = self.distill_head(tokens).float()                         # (B, M, E)
        features = gather_tokens(features, predicted).float()                  # (B, M, E)
        target = normalize_target(features, self.normalize)                    # (B, M, E)
        loss = distillation_loss(prediction, target, self.loss, self.beta)
        return loss, prediction, target, predicted


def build(cfg: Config, target_dim: int = 1) -> MaskDistill:
    """The untrained model of a configuration; the seed decides its weights.

    target_dim: the teacher's width E. (1 where weights are loaded and the head is not used.)"""
    torch.manual_seed(cfg.seed)
    model = MaskDistill(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                        target_dim, cfg.mask_ratio, cfg.masking, cfg.min_block, cfg.normalize,
                        cfg.loss, cfg.beta, cfg.layer_scale)
    if cfg.teacher == "momentum":
        vit = VisionTransformer(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth,
                                cfg.num_heads, relative=True, layer_scale=cfg.layer_scale)
        model.momentum = MomentumTeacher(vit)            # is saved with the student
        model.momentum.update(model, 0.0)
    return model


@torch.no_grad()
def save_visualization(model: MaskDistill, images, features, noise, path):
    """Write what the student sees, and where it predicts well: normalised images (B, 3, H, W),
    features (B, N, E) of a teacher, noise (B, noise_width)."""
    _, prediction, target, predicted = model.forward(images, features, noise)    # not compiled
    _, masked = model.masks(noise)                                             # (B, M)
    patches = patchify(images, model.patch_size)                               # (B, N, P*P*C)
    cosine = F.cosine_similarity(prediction, target, dim=-1)                   # (B, M)
    heat = data.heat_patches(cosine.clamp(0, 1), model.patch_size)             # (B, M, P*P*C)
    masked_index = masked.unsqueeze(-1).expand(-1, -1, patches.shape[-1])      # (B, M, P*P*C)
    rows = {
        "original": patches,
        "masked": patches.scatter(1, masked_index, 0.0),
        "cosine of prediction and target: blue 0, yellow 1":
            patches.scatter(1, predicted.unsqueeze(-1).expand_as(heat), heat),
    }
    rows = {name: unpatchify(row, model.patch_size, model.grid) for name, row in rows.items()}
    data.save_image_grid(path, rows)


# --------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Pre-train and evaluate the encoder; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    splits.pretrain.transform = data.augment(cfg.image_size, cfg.crop_scale, cfg.color_jitter)
    teacher, target_dim = open_teacher(cfg, device)
    model = build(cfg, target_dim).to(device)
    if cfg.teacher == "momentum":
        teacher = model.momentum
    groups = common.parameter_groups(model, cfg.weight_decay, undecayed=("cls_token",))
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)              # BEiT v2
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    run = common.Run("maskdistill", cfg, model, optimizer, steps_per_epoch)
    if cfg.teacher == "self":
        learn_labels(teacher.vit, cfg, splits, run, device)
    patches = model.grid[0] * model.grid[1]
    common.log(f"{common.count_parameters(model):,} parameters, {model.num_masked} of {patches} "
               f"patches masked, targets of width {target_dim}")
    if common.wants_compile(cfg, device):
        model.compile()                                  # in place: parameter names stay
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
        step_loss = 0.0
        for i, (images, _, _) in enumerate(micro_batches):
            images = data.to_device(images, device)
            with torch.no_grad(), amp:
                features = teacher(images)                                     # (B, N, E)
            with common.sync_on_last(network, i, cfg.accumulate):              # once a step
                with amp:
                    loss, *_ = network(images, features, noise[i])
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if cfg.teacher == "momentum":
            model.momentum.update(model, cfg.momentum)
        if run.end_step(step, step_loss, lr) and common.rank() == 0:
            save_visualization(model, samples, teacher(samples), sample_noise,
                               run.folder / "similarity.png")

    run.save_encoder(model)
    encoders = {"pixels": data.small_pixels,
                "trained": data.mean_patch_token(model),
                "untrained": data.mean_patch_token(build(cfg, target_dim).to(device))}
    if cfg.teacher not in ("pixels", "hog", "momentum"):
        encoders["teacher"] = lambda images: teacher(images).mean(dim=1)
    metrics = run.finish(data.score_encoders(encoders, splits, cfg, device))
    common.log(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt "
               f"--data {cfg.data}")
    return metrics


# --------------------------------------------------------------- teachers of the unified view
def open_teacher(cfg: Config, device):
    """What --teacher names, and its width E. A teacher is any function of normalised images
    (B, 3, H, W) that returns features (B, N, E): one of your own can be returned here.

    momentum: (None, E), because the model holds its own average. Raises UserError."""
    patch_size = cfg.patch_size
    side = cfg.image_size // patch_size
    if cfg.teacher == "pixels":
        return lambda images: patchify(images, patch_size), 3 * patch_size ** 2
    if cfg.teacher == "hog":
        return lambda images: hog(images, patch_size), 2 * 2 * 3 * 9
    if cfg.teacher == "momentum":
        return None, cfg.embed_dim
    if cfg.teacher == "self":                            # untrained; `train` teaches it the labels
        torch.manual_seed(cfg.seed)
        teacher = Teacher(VisionTransformer(cfg.image_size, patch_size, **SELF_TEACHER))
    else:
        teacher = load_teacher(cfg.teacher, (side, side))
    return teacher.to(device), teacher.width


def hog(images, patch_size: int, bins: int = 9):
    """MaskFeat's target, histograms of oriented gradients: (B, C, H, W) -> (B, N, 2*2*C*bins).

    Each patch is 2 x 2 cells. In each cell and color, every pixel votes for the direction of its
    gradient (half a turn, in `bins` bins) with the gradient's length, and the votes get unit norm.
    Unlike MaskFeat's: plain differences of neighbours, no Gaussian window."""
    B, C, H, W = images.shape
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")                            # (B, C, H+2, W+2)
    dx = x[..., 1:-1, 2:] - x[..., 1:-1, :-2]                                  # (B, C, H, W)
    dy = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]                                  # (B, C, H, W)
    direction = torch.atan2(dy, dx) / torch.pi % 1                             # in half turns
    bin_index = (direction * bins).long().clamp(max=bins - 1)                  # (B, C, H, W)
    length = (dx.square() + dy.square()).sqrt()                                # (B, C, H, W)
    votes = images.new_zeros(B, C, bins, H, W)
    votes.scatter_(2, bin_index.unsqueeze(2), length.unsqueeze(2))
    cells = F.avg_pool2d(votes.flatten(1, 2), patch_size // 2)                 # (B, C*bins, 2h, 2w)
    cells = F.normalize(cells.unflatten(1, (C, bins)), dim=2)
    return patchify(cells.flatten(1, 2), 2)                                    # (B, N, 2*2*C*bins)


class MomentumTeacher(nn.Module):
    """The running average of the student, as in data2vec: images (B, 3, H, W) -> features
    (B, N, D), the mean of what the upper half of its blocks put out, before the last norm."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit.requires_grad_(False)

    def forward(self, images):
        vit = self.vit
        x = vit.patch_embed(patchify(images, vit.patch_size))                  # (B, N, D)
        x = torch.cat([vit.cls_token.expand(x.shape[0], -1, -1), x], dim=1)    # (B, 1 + N, D)
        logit_bias = vit.rel_pos_bias()                                        # (1, heads, T, T)
        outputs = []
        for block in vit.blocks:
            x = block(x, logit_bias)
            outputs.append(x)
        upper_half = outputs[len(outputs) // 2:]
        return torch.stack(upper_half).mean(dim=0)[:, 1:]                      # (B, N, D)

    @torch.no_grad()
    def update(self, student: VisionTransformer, decay: float):
        """average <- decay * average + (1 - decay) * student, parameter by parameter."""
        parameters = dict(student.named_parameters())
        for name, average in self.vit.named_parameters():
            average.lerp_(parameters[name], 1 - decay)


# --------------------------------------------------------- teachers (the same text in dtm.py)
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
