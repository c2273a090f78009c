"""Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv 2111.06377).

Hide three quarters of a picture's patches, encode the visible quarter with a Vision Transformer,
and let a small decoder paint in the rest. The encoder never meets a mask token, so it runs on a
quarter of the tokens; after training the decoder is thrown away.

    loss = mean over hidden patches and their pixels of (prediction - target)^2     (section 3)

    images (B, C, H, W)
      | patchify
    patches (B, N, P*P*C) ------ hidden ------> pixel_target -> target (B, M, P*P*C)
      | kept                                                       |
      | patch_embed, + pos_embed, cls_token, blocks, norm          |
    latent (B, 1+K, D)                                            loss
      | decoder_embed, mask_token for the hidden, + positions      |
      | decoder_blocks                                             |
    decoded (B, 1+N, E)                                            |
      | decoder_norm, decoder_pred, of the hidden only             |
    prediction (B, M, P*P*C) --------------------------------------+

B batch, N patches, K kept, M = N - K hidden, D width, E decoder width, P patch side, C channels.

    python mae.py                                     # drawn shapes, no download, 40 s on 2 CPU cores:
        k-NN accuracy, 8 classes, 2000 test pictures: pixels 28.2 %, trained 37.2 %, untrained 19.6 %
    python mae.py --data FOLDER --model small         # your own pictures
    torchrun --nproc_per_node=8 mae.py --data imagenet --data-root /where/imagenet/is

Against the released code: the decoder keeps visible tokens first and hidden ones last, each with
its own position (no un-shuffling), and paints hidden patches only. Loss, predictions and gradients are the release's.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import common


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config:
    data: str = "shapes"          # shapes, cifar10, cifar100, stl10, tiny-imagenet, imagenet, or a folder
    data_root: str = "data"       # where the named data sets are, or are downloaded to
    preset: str = ""              # settings to start from; empty: those of --data, "folder" for a folder
    output: str = ""              # folder of the run; empty: runs/mae-DATA
    init: str = ""                # MAE weights to start from: a released file or a checkpoint of ours
    model: Literal["micro", "tiny", "small", "base", "large", "huge"] = "micro"  # size of the encoder
    embed_dim: int = 0            # width D; 0: the model's
    depth: int = 0                # blocks; 0: the model's
    num_heads: int = 0            # attention heads; 0: the model's
    mlp_ratio: float = 4.0        # hidden width of an MLP / D
    image_size: int = 32          # side of the square input in pixels
    patch_size: int = 4           # side of a patch in pixels
    decoder_embed_dim: int = 32   # width E of the decoder
    decoder_depth: int = 1        # blocks of the decoder
    decoder_num_heads: int = 2    # attention heads of the decoder
    mask_ratio: float = 0.6       # share of the patches that is hidden
    norm_pix: bool = True         # target: pixels normalised within their patch; no: plain pixels
    crop_scale: float = 1.0       # smallest area of the random crop; 1: no crop
    batch_size: int = 32          # global batch: pictures in an optimiser step, all processes and passes together
    accumulate: int = 1           # gradient accumulation: forward-backward passes in a step, to save memory
    epochs: int = 7               # passes over the data
    warmup_epochs: float = 1.0    # epochs of linear warm-up from 0
    base_lr: float = 0.016        # learning rate for 256 pictures a step
    weight_decay: float = 0.05    # AdamW's, on matrices and tokens only
    seed: int = 0                 # decides weights, order, crops and masks
    workers: int = 0              # loader processes for each training process; 0: none
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the matrix products; auto: bf16 on a GPU
    compile: bool = False         # compile the model: a slow first step, faster ones after it
    resume: bool = True           # go on from the run folder's checkpoint; no: start afresh
    max_steps: int = 0            # stop after so many steps of the schedule; 0: at its end
    save_every: int = 0           # steps between checkpoints, besides one after each epoch; 0: none
    log_every: int = 50           # steps between lines of metrics.jsonl
    knn_pictures: int = 500       # training pictures that vote in the final k-NN; 0: all

    def __post_init__(self):
        self.output = self.output or f"runs/mae-{Path(self.data).resolve().name}"
        for name, size in zip(("embed_dim", "depth", "num_heads"), SIZES[self.model]):
            setattr(self, name, getattr(self, name) or size)
        common.check(self, ("decoder_num_heads", "decoder_embed_dim"), decoder_embed_dim=1, decoder_num_heads=1)
        if self.embed_dim % 4 or self.decoder_embed_dim % 4:
            raise common.UserError("embed_dim and decoder_embed_dim must be multiples of 4")
        patches = (self.image_size // self.patch_size) ** 2
        if not 0 < int(patches * (1 - self.mask_ratio)) < patches:
            raise common.UserError(f"mask_ratio {self.mask_ratio} leaves nothing to see or nothing "
                                   f"to paint of {patches} patches")


SIZES = {"micro": (64, 4, 2), "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
         "large": (1024, 24, 16), "huge": (1280, 32, 16)}        # width, depth, heads; micro is ours

PAPER = dict(image_size=224, patch_size=16, crop_scale=0.2, mask_ratio=0.75,  # sections 3, 4.1
             decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,     # table 1
             batch_size=4096, epochs=800, warmup_epochs=40, base_lr=1.5e-4,    # table 8
             weight_decay=0.05, workers=12, knn_pictures=20000)
SMALL = PAPER | dict(model="tiny", decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4,
                     batch_size=1024, epochs=400, warmup_epochs=20, workers=8)  # ours
PRESETS = {
    "shapes": {},                                                         # the defaults above; ours
    "cifar10": SMALL | dict(image_size=32, patch_size=4),                                    # ours
    "cifar100": SMALL | dict(image_size=32, patch_size=4),                                   # ours
    "stl10": SMALL | dict(image_size=96, patch_size=12),                                     # ours
    "tiny-imagenet": SMALL | dict(image_size=64, patch_size=8),                              # ours
    "imagenet": PAPER | dict(model="base"),     # also: --model large; --model huge --patch-size 14
    "folder": PAPER | dict(model="small", decoder_depth=4, batch_size=256, epochs=100,
                           warmup_epochs=5),                                                 # ours
}


# ---------------------------------------------- Vision Transformer (the same text in every script)
def patchify(images, patch_size: int):
    """(B, C, H, W) -> (B, N, P*P*C): patches row by row; within one: row, column, channel."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches, patch_size: int, grid: tuple[int, int]):
    """The inverse of `patchify`, on a grid of (rows, columns) patches."""
    x = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)               # (B, C, H, W)


def take(tokens, index):
    """tokens (B, N, D), index (B, K) -> the rows that index names, (B, K, D)."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(dim: int, grid: tuple[int, int]):
    """Fixed sine-cosine table (1, 1 + N, dim); the cls token's row 0 is zero.

    The first half of the width tells the column, the second the row: [sin | cos] of the coordinate
    times 10000^(-i / (dim/4)). (The released code names the halves the other way round.)"""
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.indices(grid).reshape(2, -1, 1)                            # (N, 1) each
    table = [f(t * omega) for t in (column, row) for f in (np.sin, np.cos)]      # 4 x (N, dim/4)
    table = np.pad(np.concatenate(table, axis=1), ((1, 0), (0, 0)))
    return torch.from_numpy(table).float().unsqueeze(0)


class PatchEmbed(nn.Module):
    """A convolution's parameters used as a matrix, so that hidden patches are never embedded."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, patches):                                                 # (B, K, P*P*C)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)                # (D, P*P*C)
        return F.linear(patches, weight, self.proj.bias)                        # (B, K, D)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):                                                       # (B, T, D)
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # (B, heads, T, d)
        x = F.scaled_dot_product_attention(q, k, v)                             # (B, heads, T, d)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT encoder whose parameters are named as in the released MAE, DINO and timm checkpoints.

    image_size: side in pixels, or (height, width)."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.patch_size, self.grid = patch_size, (height // patch_size, width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def init_weights(self):
        """Xavier-uniform matrices, zero biases, tokens N(0, 0.02) (MAE, released code)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))         # (D, C*P*P)
        nn.init.normal_(self.cls_token, std=0.02)

    def tokens(self, patches, kept=None):
        """patches (B, N, P*P*C) -> tokens after the last norm (B, 1 + K, D), the cls token first.

        kept (B, K): the patches to look at; the others are not touched. None: all."""
        pos = self.pos_embed[:, 1:]                                             # (1, N, D)
        if kept is not None:
            patches, pos = take(patches, kept), pos[0, kept]                    # (B, K, ...)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        x = self.patch_embed(patches) + pos                                     # (B, K, D)
        x = torch.cat([cls, x], dim=1)                                          # (B, 1 + K, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def encode(self, images):
        """Normalised images (B, 3, H, W) -> all tokens (B, 1 + N, D); nothing is ever masked."""
        return self.tokens(patchify(images, self.patch_size))


# ---------------------------------------------------------------------------------------- masking
def random_masking(noise, mask_ratio: float):
    """noise (B, N) -> kept (B, K) and hidden (B, N - K) patch numbers, those of least noise kept.

    K = floor(N * (1 - mask_ratio)) in floating point, as released: 100 patches at 0.9 keep 9."""
    K = int(noise.shape[1] * (1 - mask_ratio))
    order = noise.argsort(dim=1)
    return order[:, :K], order[:, K:]


# -------------------------------------------------------------------------------- target and loss
def pixel_target(patches, norm_pix: bool):
    """patches (B, M, P*P*C) -> what to predict: pixels, or pixels normalised within each patch with
    the unbiased variance + 1e-6 (section 4.2, "reconstruction target")."""
    if not norm_pix:
        return patches
    mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def reconstruction_loss(prediction, target):
    """Mean squared error of the hidden patches (section 3). Every picture hides as many, so the
    plain mean is the paper's: per patch first, then over the hidden patches of the batch."""
    return (prediction.float() - target).square().mean()


# -------------------------------------------------------------------------------------------- MAE
class MAE(VisionTransformer):
    thrown_away = ("decoder", "mask_token")              # after pre-training: how these names begin

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads, decoder_embed_dim,
                 decoder_depth, decoder_num_heads, mlp_ratio=4.0, mask_ratio=0.75, norm_pix=True):
        super().__init__(image_size, patch_size, embed_dim, depth, num_heads, mlp_ratio)
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid),
                                              requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_embed_dim, decoder_num_heads, mlp_ratio)
                                            for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * patch_size ** 2)
        self.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, latent, kept, hidden):
        """latent (B, 1 + K, D) -> decoder tokens (B, 1 + N, E): cls, the kept, then the hidden."""
        x = self.decoder_embed(latent)                                          # (B, 1 + K, E)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), hidden.shape[1], -1)], dim=1)
        place = F.pad(torch.cat([kept, hidden], dim=1) + 1, (1, 0))             # (B, 1 + N), cls: 0
        x = x + self.decoder_pos_embed[0, place]
        for block in self.decoder_blocks:
            x = block(x)
        return x

    def forward(self, images, noise=None):
        """images (B, 3, H, W), normalised; noise (B, N) in [0, 1) decides the masks.

        Returns the loss, the prediction (B, M, P*P*C), and which patches it is of (B, M)."""
        patches = patchify(images, self.patch_size)                             # (B, N, P*P*C)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        kept, hidden = random_masking(noise, self.mask_ratio)                   # (B, K), (B, M)
        latent = self.tokens(patches, kept)                                     # (B, 1 + K, D)
        decoded = self.decode(latent, kept, hidden)[:, 1 + kept.shape[1]:]       # (B, M, E)
        prediction = self.decoder_pred(self.decoder_norm(decoded))              # (B, M, P*P*C)
        target = pixel_target(take(patches, hidden), self.norm_pix)             # (B, M, P*P*C)
        return reconstruction_loss(prediction, target), prediction, hidden


def build(cfg: Config) -> MAE:
    """The untrained model of a configuration; the seed decides its weights."""
    torch.manual_seed(cfg.seed)
    return MAE(cfg.image_size, cfg.patch_size, cfg.embed_dim, cfg.depth, cfg.num_heads,
               cfg.decoder_embed_dim, cfg.decoder_depth, cfg.decoder_num_heads, cfg.mlp_ratio,
               cfg.mask_ratio, cfg.norm_pix)


def load_weights(model: MAE, path: str):
    """Start from MAE weights: a released file, encoder alone or with decoder, or a checkpoint of ours.

    Position tables of another grid are resized (bicubic, the cls row kept). Raises UserError unless
    the parameters are exactly the model's, or exactly the model's without the decoder."""
    state = common.read_file(path)
    state = {name.removeprefix("module."): value for name, value in state.get("model", state).items()}
    for name in {"pos_embed", "decoder_pos_embed"} & state.keys():
        state[name] = resize_positions(state[name], model.grid)
    own = model.state_dict()
    decoder = {name for name in own if name.startswith(model.thrown_away)}
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    misfits = {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape}
    if unexpected or misfits or (missing and missing != decoder):
        raise common.UserError(f"{path} does not fit: missing {sorted(missing)[:3]}, unexpected "
                               f"{sorted(unexpected)[:3]}, of another size {sorted(misfits)[:3]}; "
                               "check --model, --patch-size and the decoder's flags")
    model.load_state_dict(state, strict=False)
    common.say(f"{path}: {len(state)} tensors loaded" + (", the decoder starts afresh" if missing else ""))


def resize_positions(table, grid: tuple[int, int]):
    """Position table (1, 1 + n*n, D) of a square grid -> (1, 1 + h*w, D), bicubic. Same grid: untouched."""
    side = round((table.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return table
    patches = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


@torch.no_grad()
def picture(model: MAE, images, noise, path):
    """Write what the model sees and paints: normalised images (B, 3, H, W), noise (B, N)."""
    _, prediction, hidden = model.forward(images, noise)         # never compiled: it runs seldom
    patches = patchify(images, model.patch_size)
    truth, prediction = take(patches, hidden), prediction.float()
    caption = "prediction"
    if model.norm_pix:                                   # back to pixels; this uses the answer
        mean, var = truth.mean(-1, keepdim=True), truth.var(-1, keepdim=True)
        prediction = prediction * (var + 1e-6).sqrt() + mean
        caption += " (each patch with its true mean and variance)"
    where = hidden.unsqueeze(-1).expand_as(prediction)
    show = lambda x: unpatchify(x, model.patch_size, model.grid)
    common.save_rows(path, {"original": images, "masked": show(patches.scatter(1, where, 0.0)),
                            caption: show(torch.zeros_like(patches).scatter(1, where, prediction)),
                            "prediction over the visible patches": show(patches.scatter(1, where, prediction))})


# ---------------------------------------------------------------------------------------- training
def train(cfg: Config) -> dict:
    """Pre-train and measure the encoder; returns the last line of metrics.jsonl."""
    device = common.start(cfg.seed)
    data = common.open_data(cfg.data, cfg.data_root, cfg.seed)
    data.pretrain.transform = common.augment(cfg.image_size, cfg.crop_scale)
    model = build(cfg).to(device)
    if cfg.init:
        load_weights(model, cfg.init)
    optimizer = torch.optim.AdamW(common.parameter_groups(model, cfg.weight_decay),
                                  betas=(0.9, 0.95), fused=True)                    # table 8
    steps_per_epoch, peak_lr = common.plan(cfg, len(data.pretrain))
    run = common.Run("mae", cfg, model, optimizer, steps_per_epoch)
    patches = model.grid[0] * model.grid[1]
    common.say(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters, "
               f"{int(patches * (1 - cfg.mask_ratio))} of {patches} patches kept")
    if cfg.compile:
        model.compile()                                  # in place: parameter names stay
    network = DistributedDataParallel(model) if common.world() > 1 else model
    amp = common.autocast(device, cfg.precision)
    sample = common.sample(data.test or data.pretrain, cfg.image_size, 8, device)
    sample_noise = torch.rand(8, patches, generator=torch.Generator().manual_seed(0)).to(device)
    order = common.Batches(cfg, len(data.pretrain), run.first, run.last)
    batches = iter(common.loader(data.pretrain, order, cfg.workers))

    for step in run.steps():
        lr = common.learning_rate(step, cfg.warmup_epochs * steps_per_epoch, run.total, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        step_loss = 0.0
        for part, noise in enumerate(common.uniform(cfg, step, patches, device)):
            images = common.to_device(next(batches)[0], device)
            waits = common.world() > 1 and part < cfg.accumulate - 1    # gradients travel once a step
            with network.no_sync() if waits else contextlib.nullcontext():
                with amp:
                    loss, *_ = network(images, noise)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if run.end_step(step, step_loss, lr) and common.rank() == 0:
            picture(model, sample, sample_noise, run.folder / "reconstruction.png")

    encoder = {name: value for name, value in model.state_dict().items()
               if not name.startswith(model.thrown_away)}
    metrics = run.finish(encoder, {"pixels": common.shrunk_pixels, "trained": common.mean_token(model),
                                   "untrained": common.mean_token(build(cfg).to(device))}, data)
    common.say(f"try next: python evaluate.py linear --checkpoint {run.folder}/checkpoint.pt --data {cfg.data}")
    return metrics


def main(argv=None) -> dict:
    with common.launched():
        return train(common.parse(Config, PRESETS, argv, __doc__))


if __name__ == "__main__":
    main()
