"""Improve Supervised Representation Learning with Masked Image Modeling (Chen et al., arXiv 2312.00950): SupMIM.

An ordinary classifier learns, beside its labels, to predict the masked patches of the same images: a second pass
of the same encoder over the visible patches, and a shallow decoder. The decoder is thrown away; what remains is the
classifier, not a parameter larger.

    loss = cross_entropy(logits, labels) + mim_weight * masked_loss
    masked_loss = mean over masked patches of (prediction - target)^2, or cross_entropy(prediction, code)

    images (B, C, H, W) ------------------- MixUp, CutMix: mixed (B, C, H, W)
      | patchify                                | encode: all patches
    patches (B, N, P*P*C) -- masked --+       tokens (B, 1+N, D)
      | visible                       |         | mean of the patches, head
      | the same encoder              |       logits (B, classes) ----------> class_loss
    latent (B, 1+K, D)                |
      | decoder_embed, mask_token     | pixel_target, or codes of a tokenizer
      | decoder_blocks                v
    prediction (B, M, ...) -------> target (B, M, ...) ---------------------> masked_loss

B batch, N patches, K visible, M = N - K masked, D width, P patch side, C channels.
Against mae.py: `classify`, the classifier's pass; `kmeans`, `open_tokenizer`; labels, RandAugment, MixUp, drop path.
--mim-weight 0 is plain supervised training, bit for bit; with the same other flags it draws the same random numbers.

    python supmim.py                                  # synthetic shapes, 320 labels, no download, 51 s on 2 CPU cores:
        top-1 41.3 %, top-5 94.7 %, k-NN 40.9 %
    python supmim.py --mim-weight 0                   # the baseline: 29.2 %
    python supmim.py --target kmeans                  # codes of patches, not pixels; or a FILE, see open_tokenizer
    torchrun --nproc_per_node=8 supmim.py --data imagenet --data-root /where/imagenet/is

No code was released, and of the paper only the abstract could be read: a shallow decoder on the encoder predicts image
tokens from a masked image, beside the classifier, and is dropped. Ours are the two passes, which patches each pass
sees, the targets (the paper's tokenizer is not known), the weight of the loss, averaging the tokens, and all settings.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common
import data


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    data: str = "shapes"          # shapes, cifar10, cifar100, tiny-imagenet, imagenet, or a folder with class folders
    shots: int = 40               # labelled training images per class; 0: all
    mim_weight: float = 20.0      # of the masked loss; 0: supervised training alone
    target: str = "pixels"        # of the masked patches: pixels, kmeans (codes of patches), or a tokenizer's FILE
    codes: int = 128              # kmeans: how many
    passes: Literal["two", "one"] = "two"  # one: classify what is visible of the masked image, no pass over all of it
    mask_tokens: Literal["decoder", "encoder"] = "decoder"  # where they stand for the masked patches
    pool: Literal["mean", "cls"] = "mean"  # what is classified: the mean patch token or the class token
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # row of SIZES: the encoder
    image_size: int = 32          # side of the square input in pixels
    patch_size: int = 4           # side of a patch in pixels
    decoder_embed_dim: int = 32   # width E of the decoder
    decoder_depth: int = 1        # blocks of the decoder
    decoder_num_heads: int = 2    # attention heads of the decoder
    mask_ratio: float = 0.5       # fraction of the patches that is masked
    norm_pix: bool = True         # pixels, kmeans: pixels normalised within their patch; no: plain pixels
    drop_path: float = 0.0        # chance to drop the last block's branches; 0 at the first block
    crop_scale: float = 1.0       # smallest area of the random crop; 1: no crop
    randaugment: int = 0          # magnitude, 0 (none) to 10
    mixup: float = 0.0            # alpha; 0: none
    cutmix: float = 0.0           # alpha; 0: none
    smoothing: float = 0.0        # of the labels
    batch_size: int = 50          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 100             # passes over the data
    warmup_epochs: float = 4.0    # epochs of linear warm-up from 0
    base_lr: float = 0.01         # learning rate for 256 images a step
    weight_decay: float = 0.05    # AdamW's, on matrices and tokens only
    eval_every: int = 25          # epochs between scores of the test images, besides one at the end

    def __post_init__(self):
        self.output = self.output or common.default_output("supmim", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]
        common.check(self)
        patches = (self.image_size // self.patch_size) ** 2
        visible = int(patches * (1 - self.mask_ratio))
        if not 0 < visible < patches:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see or nothing "
                                   f"to predict of {patches} patches")
        if self.passes == "one" and not self.mim_weight:
            raise common.UserError("--passes one has no pass left with --mim-weight 0")


SIZES = {                                                # width, depth, heads
    "micro": (64, 4, 2),                                 # ours
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}

# ours, for the paper's ViT-B/14 at 224 pixels: 16 x 16 patches, and a decoder of half the width. On few labels of small
# images a larger weight serves better (tests/measure/results.md, "Labels and masks")
RECIPE = dict(image_size=224, patch_size=14, shots=0, mim_weight=1.0, codes=1024, decoder_embed_dim=384,
              decoder_depth=2, decoder_num_heads=6, drop_path=0.1, crop_scale=0.08, randaugment=9, mixup=0.8,
              cutmix=1.0, smoothing=0.1, batch_size=1024, epochs=300, warmup_epochs=10, base_lr=2.5e-4,
              weight_decay=0.1, eval_every=1, workers=12)
SMALL = RECIPE | dict(model="tiny", codes=256, decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3,
                      crop_scale=0.35, batch_size=256, epochs=200, base_lr=5e-4, weight_decay=0.05, workers=8)  # ours
PRESETS = {
    "shapes": {},                                                         # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                    # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                              # ours
    "imagenet": RECIPE | dict(model="base"),
    "folder": SMALL | dict(model="small", image_size=224, patch_size=16, decoder_embed_dim=192, epochs=100),      # ours
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
def random_masking(noise, mask_ratio: float):
    """noise (B, N) -> indices of the visible patches (B, K), those of least noise, and of the
    masked ones (B, M).

    K = floor(N * (1 - mask_ratio)) in floating point, as released: 0.9 leaves 9 of 100 patches."""
    K = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)                                               # (B, N)
    return order[:, :K], order[:, K:]


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


def nearest_code(x, centres):
    """x (..., d), centres (codes, d) -> number of the centre (...) at the least Euclidean distance."""
    return (x @ centres.T - centres.square().sum(dim=1) / 2).argmax(dim=-1)


def kmeans(x, codes: int, seed: int, rounds: int = 20):
    """Lloyd's algorithm: x (n, d) -> centres (codes, d). It starts at rows of x; a centre with no row nearest stays."""
    if len(x) < codes:
        raise common.UserError(f"{len(x)} patches cannot make {codes} codes; lower --codes")
    start = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:codes]
    centres = x[start.to(x.device)]
    for _ in range(rounds):
        near = torch.cat([nearest_code(rows, centres) for rows in x.split(20_000)])
        count = torch.bincount(near, minlength=codes).unsqueeze(1)                            # (codes, 1)
        mean = torch.zeros_like(centres).index_add_(0, near, x) / count.clamp(min=1)
        centres = torch.where(count > 0, mean, centres)
    return centres


def open_tokenizer(path: str, image_size: int, patches: int, device):
    """A tokenizer of one's own -> (normalised images (B, 3, H, W) -> codes (B, patches), how many codes there are).

    The file is Python (it is executed) and defines `tokenizer(device)`, which returns two things: what turns images
    (B, 3, H, W) of 0 to 1, fp32, into int64 codes (B, patches), row by row; and how many codes there are.
    Raises UserError."""
    if not Path(path).is_file():
        raise common.UserError(f"no file {path}; --target is pixels, kmeans or a tokenizer's file")
    try:
        spec = importlib.util.spec_from_file_location("tokenizer", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tokenize, count = module.tokenizer(device)
        with torch.no_grad():
            found = tokenize(torch.rand(2, 3, image_size, image_size, device=device))
        fits = found.dtype == torch.int64 and found.shape == (2, patches) and 0 <= found.min() <= found.max() < count
    except Exception as error:                           # whatever that program raises
        raise common.UserError(f"{path} is no Python file with tokenizer(device) -> (codes, count): "
                               f"{common.first_line(error)}") from error
    if not fits:
        raise common.UserError(f"{path} makes {found.dtype} codes {list(found.shape)} of 2 images; "
                               f"int64 [2, {patches}] from 0 to below {count} are needed")
    mean, std = data.mean_std(device)
    return torch.no_grad()(lambda images: tokenize(images * std + mean)), count


# ----------------------------------------------------------------------------------------- SupMIM
class SupMIM(VisionTransformer):
    pretrain_only = ("decoder", "mask_token", "head.")   # what the names begin with that are not the encoder's

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim,
                 decoder_depth, decoder_num_heads, mask_ratio=0.5, norm_pix=True, classes=1000,
                 mim_weight=1.0, codes=0, passes="two", mask_tokens="decoder", pool="mean", drop_path=0.0,
                 smoothing=0.0):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads)
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.mim_weight, self.codes, self.smoothing = mim_weight, codes, smoothing
        self.passes, self.mask_tokens, self.pool = passes, mask_tokens, pool
        self.head = nn.Linear(embed_dim, classes)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim if mask_tokens == "decoder" else embed_dim))
        positions = sincos_positions(decoder_embed_dim, self.grid)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads)
                                            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, codes or 3 * patch_size ** 2)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        common.add_drop_path(self.blocks, drop_path)
        if not mim_weight:                               # built all the same: the random numbers stay the same
            for name, p in self.named_parameters():
                p.requires_grad_(p.requires_grad and not name.startswith(("decoder", "mask_token")))

    def pooled(self, tokens):
        """Tokens after the last norm (B, 1 + K, D) -> the one that is classified (B, D)."""
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def classify(self, images):
        """Normalised images (B, 3, H, W) -> logits (B, classes): all that is left after training."""
        return self.head(self.pooled(self.encode(images)))

    def encode_masked(self, patches, visible, masked):
        """Tokens after the last norm (B, 1 + N, D): class token, visible, masked, with mask tokens for
        the masked patches."""
        x = self.patch_embed(gather_tokens(patches, visible))                  # (B, K, D)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1)                                 # (B, N, D)
        x = x + self.pos_embed[0, torch.cat([visible, masked], dim=1) + 1]
        cls = self.cls_token + self.pos_embed[:, :1]                           # (1, 1, D)
        cls = cls.expand(x.shape[0], -1, -1)                                   # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, 1 + N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, visible, masked):
        """latent (B, 1 + K or 1 + N, D) -> decoder tokens (B, 1 + N, E): class token, visible, then
        masked."""
        x = self.decoder_embed(latent)                                         # (B, 1 + K or 1 + N, E)
        if self.mask_tokens == "decoder":
            mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
            x = torch.cat([x, mask_tokens], dim=1)                             # (B, 1 + N, E)
        position_ids = torch.cat([visible, masked], dim=1) + 1                 # (B, N)
        position_ids = F.pad(position_ids, (1, 0))                             # (B, 1 + N), class: 0
        x = x + self.decoder_pos_embed[0, position_ids]
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def predict_masked(self, patches, noise):
        """The masked pass -> tokens of the visible patches (B, 1 + K, D), the prediction (B, M, P*P*C
        or codes), and which patches it is of (B, M)."""
        visible, masked = random_masking(noise, self.mask_ratio)               # (B, K), (B, M)
        if self.mask_tokens == "decoder":
            latent = self.forward_features(patches, visible)                   # (B, 1 + K, D)
        else:
            latent = self.encode_masked(patches, visible, masked)              # (B, 1 + N, D)
        decoded = self.decode(latent, visible, masked)                         # (B, 1 + N, E)
        decoded = decoded[:, 1 + visible.shape[1]:]                            # (B, M, E)
        prediction = self.decoder_pred(self.decoder_norm(decoded))             # (B, M, P*P*C or codes)
        return latent[:, :1 + visible.shape[1]], prediction, masked

    def forward(self, images, labels, noise=None, mixed=None, target_codes=None):
        """images (B, 3, H, W), normalised; labels (B,) or their mixtures (B, classes); noise (B, N) in [0, 1) decides
        the masks; mixed (B, 3, H, W): what is classified, and in one pass masked, too, None: images; target_codes
        (B, N).

        Returns the loss, the class loss, the masked loss (0 without it), and the logits."""
        mixed, masked_loss = images if mixed is None else mixed, torch.zeros((), device=images.device)
        if self.passes == "two":
            logits = self.classify(mixed)                                       # (B, classes)
        if self.mim_weight:
            patches = patchify(images if self.passes == "two" else mixed, self.patch_size)     # (B, N, P*P*C)
            if noise is None:
                noise = torch.rand(patches.shape[:2], device=images.device)
            visible_tokens, prediction, masked = self.predict_masked(patches, noise)
            if self.passes == "one":
                logits = self.head(self.pooled(visible_tokens))                # (B, classes)
            if self.codes:
                target = target_codes.gather(1, masked)                        # (B, M)
                masked_loss = F.cross_entropy(prediction.float().flatten(0, 1), target.flatten())
            else:
                target = pixel_target(gather_tokens(patches, masked), self.norm_pix)       # (B, M, P*P*C)
                masked_loss = reconstruction_loss(prediction, target)
        class_loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.smoothing)
        return class_loss + self.mim_weight * masked_loss, class_loss, masked_loss, logits


def build(cfg: Config, classes: int = 1, codes: int = 0) -> SupMIM:
    """The untrained model of a configuration; the seed decides its weights. codes: of the target; 0: pixels.

    classes: evaluate.py, which takes the encoder alone, leaves it out."""
    torch.manual_seed(cfg.seed)
    return SupMIM(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
                  cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads,
                  cfg.mask_ratio, cfg.norm_pix, classes, cfg.mim_weight, codes, cfg.passes, cfg.mask_tokens,
                  cfg.pool, cfg.drop_path, cfg.smoothing)


def feature(model: SupMIM):
    """What k-NN compares: the token that is classified, images -> (B, D)."""
    return lambda images: model.pooled(model.encode(images))


@torch.no_grad()
def save_visualization(model: SupMIM, images, noise, target_codes, centres, path):
    """Write what the masked pass sees and predicts: normalised images (B, 3, H, W), noise (B, N). Of codes, the
    centres (codes, P*P*C) that were predicted; without centres, white where the code is that of target_codes (B, N)."""
    model.eval()
    patches = patchify(images, model.patch_size)                               # (B, N, P*P*C)
    _, prediction, masked = model.predict_masked(patches, noise)
    prediction = prediction.float()                                            # (B, M, P*P*C or codes)
    truth = gather_tokens(patches, masked)                                     # (B, M, P*P*C)
    title = "prediction"
    if model.codes and centres is None:
        title = "white: the right code"
        right = prediction.argmax(dim=-1) == target_codes.gather(1, masked)    # (B, M)
        prediction = torch.where(right.unsqueeze(-1), truth.amax(), truth.amin()).expand_as(truth)
    else:
        if model.codes:
            prediction = centres[prediction.argmax(dim=-1)]                    # (B, M, P*P*C)
        if model.norm_pix:
            prediction = undo_norm_pix(prediction, truth)
            title = "prediction (each patch with its true mean and variance)"
    index = masked.unsqueeze(-1).expand_as(prediction)                         # (B, M, P*P*C)
    rows = {
        "original": patches,
        "masked": patches.scatter(1, index, 0.0),
        title: torch.zeros_like(patches).scatter(1, index, prediction),
        "prediction over the visible patches": patches.scatter(1, index, prediction),
    }
    rows = {name: unpatchify(row, model.patch_size, model.grid) for name, row in rows.items()}
    data.save_image_grid(path, rows)
    model.train()


# ---------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Train and score the classifier; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    if splits.test is None:
        raise common.UserError(f"{cfg.data} has no labelled images to train and test on")
    labelled = data.subset(splits.train, cfg.shots, 100, cfg.seed)
    labelled.transform = data.augment(cfg.image_size, cfg.crop_scale, randaugment=cfg.randaugment)
    splits = splits._replace(pretrain=labelled, train=labelled)
    patches = (cfg.image_size // cfg.patch_size) ** 2
    codes = 0
    tokenize = None
    centres = None
    if cfg.target == "kmeans":
        codes = cfg.codes
        centres = torch.zeros(codes, 3 * cfg.patch_size ** 2, device=device)
        to_patches = lambda images: pixel_target(patchify(images, cfg.patch_size), cfg.norm_pix)
        tokenize = lambda images: nearest_code(to_patches(images), centres)
    elif cfg.target != "pixels":
        tokenize, codes = open_tokenizer(cfg.target, cfg.image_size, patches, device)
    model = build(cfg, len(splits.classes), codes).to(device)
    groups = common.parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(labelled))
    losses = torch.zeros(2, device=device)               # means of class and masked loss, as far as the epoch has come
    tensors = {"losses": losses}
    if centres is not None:
        tensors["centres"] = centres
    run = common.Run("supmim", cfg, model, optimizer, steps_per_epoch, tensors)
    if cfg.target == "kmeans" and cfg.mim_weight and not run.first_step:
        some, _ = data.features(lambda images: to_patches(images).flatten(1), labelled, cfg.image_size, device,
                                 workers=cfg.workers, limit=500)
        centres.copy_(kmeans(some.view(-1, centres.shape[1]), codes, cfg.seed))
        if common.world_size() > 1:
            dist.broadcast(centres, 0)                   # sums on a GPU differ in the last digit
    common.log(f"{common.count_parameters(model):,} parameters with decoder, "
               f"{len(labelled)} labelled images of {len(splits.classes)} classes, "
               f"{int(patches * (1 - cfg.mask_ratio))} of {patches} patches visible in the masked pass")
    if cfg.compile:
        model.compile()                                  # in place: parameter names stay
    network = model                                      # network: the model as all processes share it
    if common.world_size() > 1:
        network = DistributedDataParallel(model)
    amp = common.autocast(device, cfg.precision)
    mix = data.mixing(cfg.mixup, cfg.cutmix, len(splits.classes))
    samples = data.sample_images(splits.test, cfg.image_size, 8, device)
    sample_noise = torch.rand(8, patches, generator=torch.Generator().manual_seed(0)).to(device)
    sample_codes = tokenize(samples) if tokenize else None
    batches = data.batches(labelled, cfg, run.first_step, run.last_step)

    def logits(images):
        with amp:
            return model.classify(images)

    def score():
        model.eval()
        test_logits, labels = data.features(logits, splits.test, cfg.image_size, device, workers=cfg.workers)
        model.train()
        scores = data.topk_accuracy(test_logits, labels)
        common.log(", ".join(f"{name} {value:.2f} %" for name, value in scores.items()))
        return scores

    def visualize():
        if common.rank() == 0 and cfg.mim_weight:
            path = run.folder / "reconstruction.png"
            save_visualization(model, samples, sample_noise, sample_codes, centres, path)

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        noise = common.mask_noise(cfg, step, patches, device)                  # (accumulate, B, N)
        step_loss = 0.0
        for i, (images, labels, _) in enumerate(micro_batches):
            # of mixing and drop path, in each process its own: with these, N processes are no longer one
            torch.manual_seed(common.derive_seed(cfg.seed, step, i, common.rank(), 1))        # 1: not the masks' seed
            images = data.to_device(images, device)
            mixed, labels = mix(images, labels.to(device, non_blocking=True))
            seen = images if cfg.passes == "two" else mixed
            target_codes = tokenize(seen) if tokenize and cfg.mim_weight else None
            with common.sync_on_last(network, i, cfg.accumulate):              # all-reduce once a step
                with amp:
                    loss, class_loss, masked_loss, _ = network(images, labels, noise[i], mixed, target_codes)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
            losses += torch.stack([class_loss, masked_loss]).detach() / (cfg.accumulate * steps_per_epoch)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % steps_per_epoch == 0:
            run.write(step=step + 1, class_loss=losses[0].item(), masked_loss=losses[1].item())    # the first process's
            losses.zero_()
        if run.end_step(step, step_loss, lr, score):
            visualize()

    model.eval()
    run.save_encoder(model)
    if common.rank() == 0:
        weights = {name: value.cpu() for name, value in model.state_dict().items()
                   if not name.startswith(("decoder", "mask_token"))}
        classifier = {"method": "supmim", "config": dict(vars(cfg)), "model": weights}
        common.save_atomic(classifier, run.folder / "classifier.pt")
    visualize()                                          # again: a kill may have left an older one
    scores = run.scores or score()                       # score: it was cut short, or had ended before
    model.eval()
    untrained = build(cfg, len(splits.classes), codes).to(device).eval()
    encoders = {"pixels": data.small_pixels, "trained": feature(model), "untrained": feature(untrained)}
    metrics = run.finish(scores | data.score_encoders(encoders, splits, cfg, device))
    common.log(f"top-1 {metrics['top1']:.1f} %, top-5 {metrics['top5']:.1f} %, "
               f"k-NN {metrics['knn_trained']:.1f} %")
    after = {"shapes": "segment", "imagenet": "segment --data ade20k"}.get(cfg.data, f"knn --data {cfg.data}")
    common.log(f"try next: python evaluate.py {after} --checkpoint {run.folder}/classifier.pt")
    return metrics


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
