"""Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv 2111.06377).

Mask three quarters of an image's patches, encode the visible quarter with a Vision Transformer, and
let a small decoder reconstruct the rest. The encoder never meets a mask token, so it runs on a
quarter of the tokens; after pre-training the decoder is dropped.

    loss = mean over masked patches and their pixels of (prediction - target)^2     (section 3)

    images (B, C, H, W)
      | patchify
    patches (B, N, P*P*C) ------ masked ------> pixel_target -> target (B, M, P*P*C)
      | visible                                                    |
      | patch_embed, + pos_embed, cls_token, blocks, norm          |
    latent (B, 1+K, D)                                            loss
      | decoder_embed, mask_token for the masked, + positions      |
      | decoder_blocks                                             |
    decoded (B, 1+N, E)                                            |
      | decoder_norm, decoder_pred, of the masked only             |
    prediction (B, M, P*P*C) --------------------------------------+

B batch, N patches, K visible, M = N - K masked, D width, E decoder width, P patch side, C channels.

    python mae.py                                     # synthetic shapes, no download:
        linear probe, 8 classes, mean of seeds 0 to 4: trained 60.2 % (57.0 to 62.1), untrained
        28.9 %, pixels 19.9 % (tests/measure/results.md)
    python mae.py --data FOLDER                       # your own images
    torchrun --nproc_per_node=8 mae.py --data imagenet --data-root /where/imagenet/is

Difference from the released code: the decoder keeps visible tokens first and masked ones last, each
with its own position (no un-shuffling), and predicts masked patches only. Loss, predictions and
gradients are the release's.
"""

from dataclasses import dataclass
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
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of the encoder, see SIZES
    init: str = ""                # MAE weights to start from: a released file or a checkpoint of ours
    image_size: int = 28          # side of the square input in pixels
    patch_size: int = 4           # side of a patch in pixels
    decoder_embed_dim: int = 32   # width E of the decoder
    decoder_depth: int = 1        # blocks of the decoder
    decoder_num_heads: int = 2    # attention heads of the decoder

    mask_ratio: float = 0.6       # fraction of the patches that is masked
    norm_pix: bool = True         # target: pixels normalised within their patch; no: raw pixels

    crop_scale: float = 1.0       # smallest fraction of the area that the random crop keeps; 1: no crop
    batch_size: int = 32          # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 6               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.016        # peak learning rate = base_lr * batch_size / 256
    weight_decay: float = 0.05    # AdamW's, on matrices and tokens only

    def __post_init__(self):
        self.output = self.output or common.default_output("mae", self.data)
        self.embed_dim, self.depth, self.num_heads = SIZES[self.model]         # derived: no flags
        common.check(self)
        patches = (self.image_size // self.patch_size) ** 2
        visible = int(patches * (1 - self.mask_ratio))
        if not 0 < visible < patches:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see or nothing "
                                   f"to predict of {patches} patches")


SIZES = {                                                # width, depth, heads
    "micro": (64, 4, 2),                                 # ours
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
PAPER = dict(image_size=224, patch_size=16, crop_scale=0.2, mask_ratio=0.75,   # sections 3, 4.1
             decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,     # table 1, code
             batch_size=4096, epochs=800, warmup_epochs=40, base_lr=1.5e-4,    # table 8
             weight_decay=0.05, workers=12,
             norm_pix=True)                                            # as the models were released
SMALL = PAPER | dict(model="tiny", decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4,
                     batch_size=1024, epochs=400, warmup_epochs=20, workers=8)         # ours
PRESETS = {
    "shapes": {},                                                        # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                  # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                    # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                             # ours
    "imagenet": PAPER | dict(model="base"),     # also: --model large; --model huge --patch-size 14
    "folder": PAPER | dict(model="small", decoder_depth=4, batch_size=256, epochs=100,
                           warmup_epochs=5),                                                # ours
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


# -------------------------------------------------------------------------------------------- MAE
class MAE(VisionTransformer):
    pretrain_only = ("decoder", "mask_token")            # prefixes of what pre-training alone needs

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim,
                 decoder_depth, decoder_num_heads, mask_ratio=0.75, norm_pix=True):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads)
        self.mask_ratio = mask_ratio
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

    def decode(self, latent, visible, masked):
        """latent (B, 1 + K, D) -> decoder tokens (B, 1 + N, E): class, visible, masked."""
        x = self.decoder_embed(latent)                                         # (B, 1 + K, E)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], masked.shape[1], -1)
        x = torch.cat([x, mask_tokens], dim=1)                                 # (B, 1 + N, E)
        position_ids = torch.cat([visible, masked], dim=1) + 1                 # 0: class token
        position_ids = F.pad(position_ids, (1, 0))                             # (B, 1 + N)
        x = x + self.decoder_pos_embed[0, position_ids]                        # (B, 1 + N, E)
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def forward(self, images, noise=None):
        """images (B, 3, H, W), normalised; noise (B, N) in [0, 1) decides the masks.

        Returns the loss, the prediction (B, M, P*P*C), and the indices of its patches (B, M)."""
        patches = patchify(images, self.patch_size)                            # (B, N, P*P*C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        visible, masked = random_masking(noise, self.mask_ratio)               # (B, K), (B, M)
        latent = self.forward_features(patches, visible)                       # (B, 1 + K, D)
        decoded = self.decode(latent, visible, masked)                         # (B, 1 + N, E)
        decoded = decoded[:, 1 + visible.shape[1]:]                            # (B, M, E)
        prediction = self.decoder_pred(self.decoder_norm(decoded))             # (B, M, P*P*C)
        target = pixel_target(gather_tokens(patches, masked), self.norm_pix)   # (B, M, P*P*C)
        return reconstruction_loss(prediction, target), prediction, masked


def build(cfg: Config) -> MAE:
    """The untrained model of a configuration; the seed decides its weights."""
    torch.manual_seed(cfg.seed)
    return MAE(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
               cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads,
               cfg.mask_ratio, cfg.norm_pix)


def encoder_flops(model: MAE, patches: int) -> int:
    """Multiplications in the encoder's blocks for an image of so many patches: 12 D^2 for each
    token and 2 D for each pair of tokens."""
    tokens = 1 + patches
    D = model.cls_token.shape[-1]
    return len(model.blocks) * (12 * D ** 2 * tokens + 2 * D * tokens ** 2)


@torch.no_grad()
def save_visualization(model: MAE, images, noise, path):
    """Write what the model sees and predicts: normalised images (B, 3, H, W), noise (B, N)."""
    _, prediction, masked = model.forward(images, noise)         # .forward: not the compiled one
    patches = patchify(images, model.patch_size)                               # (B, N, P*P*C)
    prediction = prediction.float()                                            # (B, M, P*P*C)
    title = "prediction"
    if model.norm_pix:
        prediction = undo_norm_pix(prediction, gather_tokens(patches, masked))
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


# --------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Pre-train and evaluate the encoder; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    splits.pretrain.transform = data.augment(cfg.image_size, cfg.crop_scale)
    model = build(cfg).to(device)
    if cfg.init:
        common.load_weights(model, cfg.init, optional=model.pretrain_only)
    groups = common.parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)                # table 8
    steps_per_epoch = common.plan_steps(cfg, len(splits.pretrain))
    run = common.Run("mae", cfg, model, optimizer, steps_per_epoch)
    patches = model.grid[0] * model.grid[1]
    visible = int(patches * (1 - cfg.mask_ratio))
    common.log(f"{common.count_parameters(model):,} parameters, {visible} of {patches} patches "
               "visible")
    if common.wants_compile(cfg, device):
        model.compile()                                  # in place: parameter names stay
    network = model
    if common.world_size() > 1:
        # averages gradients over processes
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)
    amp = common.autocast(device, cfg.precision, cfg.embed_dim)
    samples = data.sample_images(splits.test or splits.pretrain, cfg.image_size, 8, device)
    sample_noise = torch.rand(8, patches, generator=torch.Generator().manual_seed(0)).to(device)
    batches = data.batches(splits.pretrain, cfg, run.first_step, run.last_step)

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch)
        noise = common.mask_noise(cfg, step, patches, device)                  # (accumulate, B, N)
        step_loss = 0.0
        for i, (images, _, _) in enumerate(micro_batches):
            images = data.to_device(images, device)
            with common.sync_on_last(network, i, cfg.accumulate):              # once a step
                with amp:
                    loss, *_ = network(images, noise[i])
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if run.end_step(step, step_loss, lr) and common.rank() == 0:
            save_visualization(model, samples, sample_noise, run.folder / "reconstruction.png")

    run.save_encoder(model)
    encoders = {"pixels": data.small_pixels,
                "trained": data.mean_patch_token(model),
                "untrained": data.mean_patch_token(build(cfg).to(device))}
    metrics = run.finish(data.score_encoders(encoders, splits, cfg, device))
    share = encoder_flops(model, visible) / encoder_flops(model, patches)
    common.log(f"the encoder saw {visible} of {patches} patches: {100 * share:.0f} % of the "
               "multiplications that all of them take")
    common.log(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt "
               f"--data {cfg.data}")
    return metrics


def main(argv=None) -> dict:
    with common.command_line():
        return train(common.parse_config(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
