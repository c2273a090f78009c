"""What a pre-trained encoder is worth.

    python evaluate.py knn       --checkpoint runs/mae-shapes/checkpoint.pt    # nearest neighbours vote
    python evaluate.py retrieval --checkpoint ...      # are a picture's neighbours of its class?
    python evaluate.py linear    --checkpoint ...      # one linear layer on frozen features
    python evaluate.py attentive --checkpoint ...      # one learned query on frozen patch tokens
    python evaluate.py finetune  --checkpoint ...      # all weights, end to end
    python evaluate.py segment   --checkpoint ...      # a class for every pixel

--checkpoint is a checkpoint of any script here, or a released file in timm's names (MAE: encoder, full or
fine-tuned; DINO; DeiT and timm without the distillation token), of which --model base (and --method mae) say
what it is. `--checkpoint none` is the untrained encoder; `finetune` then trains from scratch. `finetune --eval`
trains nothing and scores fine-tuned weights or a classifier of supmim.py. --data chooses the settings, as in the
other scripts: those of `--data imagenet` are the papers'.

    protocol    trained                          input            chosen on
    knn         nothing                          centres          nothing: k is 20, all k and taps are shown
    linear      a sweep of linear layers         cached features  a tenth of the training set
      --no-cached: batch norm and linear, LARS   augmented        nothing (MAE, appendix A.1, table 10)
    attentive   query, keys, values, linear      augmented        nothing
    finetune    encoder, norm, linear            augmented        nothing (MAE, table 9)
    segment     batch norm, 1x1 convolution      crops            nothing

The figure of a run is that of its last epoch, with the last weights: no choice is ever made on the
test set. Pictures are normalised with ImageNet's mean and deviation; weights that were trained with
others (timm's augreg: 0.5) score too low. B batch, N patches, D width, C classes, h x w grid of patches.
"""

import contextlib
import copy
import hashlib
import importlib
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

import common
import data

IGNORE = 255                                             # the class of pixels that do not count
NEIGHBOURS = (1, 10, 20, 100, 200)
RATES = np.logspace(-2, 2.5, 10).tolist()                 # of the linear sweep, times --base-lr


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    protocol: Literal["knn", "retrieval", "linear", "attentive", "finetune", "segment"] = "knn"  # the first word
    checkpoint: str = "none"      # weights: a checkpoint of ours, a released file, or none
    data: str = "shapes"          # shapes, cifar10, ..., imagenet, a folder; segment: shapes, ade20k, a folder
    output: str = ""              # folder of the run; empty: runs/PROTOCOL-CHECKPOINT-DATA
    method: str = ""              # script that builds the encoder; empty: the checkpoint's, else mae
    model: Literal["", "micro", "tiny", "small", "base", "large", "huge"] = ""  # empty: the checkpoint's
    image_size: int | None = None  # side of the input in pixels; None: the checkpoint's
    patch_size: int | None = None  # side of a patch in pixels; None: the checkpoint's
    features: Literal["cls", "mean", "cls-raw", "mean-raw"] = "mean"  # class token or mean patch; raw: no last norm
    shots: int = 0                # labelled training pictures per class; 0: all
    percent: float = 100.0        # share of each class's training pictures
    cached: bool = True           # linear: on features computed once; no: MAE's, on augmented pictures
    frozen: bool = True           # segment: leave the encoder as it is
    eval: bool = False            # finetune: only score a fine-tuned checkpoint
    pool: Literal["mean", "cls"] = "mean"  # finetune: patch tokens' mean and a new norm, or class token
    num_classes: int = 0          # segment, a folder: classes; 0: as many as the masks hold
    stride: int = 0               # segment: step of the sliding window in pixels; 0: two thirds of it
    batch_size: int = 256         # global batch: pictures in an optimiser step, all processes and passes together
    accumulate: int = 1           # gradient accumulation: forward-backward passes in a step, to save memory
    epochs: int = 50              # passes over the training pictures
    warmup_epochs: float = 0.0    # epochs of linear warm-up from 0
    schedule: Literal["cosine", "linear"] = "cosine"  # of the learning rate after the warm-up
    base_lr: float = 0.1          # learning rate for 256 pictures a step
    min_lr: float = 0.0           # learning rate at the end
    weight_decay: float = 0.0     # on matrices only
    beta2: float = 0.999          # AdamW's
    layer_decay: float = 1.0      # finetune, segment: factor on the learning rate from a block to the one below
    drop_path: float = 0.0        # finetune, segment: chance to drop the last block's branches; 0 at the first block
    crop_scale: float = 1.0       # smallest area of the random crop; 1: no crop
    randaugment: int = 0          # magnitude, 0 (none) to 10
    erasing: float = 0.0          # chance to erase a rectangle
    mixup: float = 0.0            # alpha; 0: none
    cutmix: float = 0.0           # alpha; 0: none
    smoothing: float = 0.0        # of the labels
    ema: float = 0.0              # finetune: decay of averaged weights, scored beside the last; 0: none
    eval_every: int = 1           # attentive, finetune: epochs between scores of the test pictures; also at the end

    def __post_init__(self):
        source = Path(self.checkpoint).resolve()
        data_name = Path(self.data).resolve().name
        stems = ("checkpoint", "checkpoint.previous", "encoder", "finetuned", "classifier")
        runs = dict.fromkeys(stems, source.parent.name) | {"finetuned-ema": f"{source.parent.name}-ema"}
        name = runs.get(source.stem, source.stem).removesuffix(f"-{data_name}")
        self.output = self.output or f"runs/{self.protocol}-{name}-{data_name}"
        common.check(self)
        if self.shots and self.percent < 100:
            raise common.UserError("--shots and --percent exclude each other")
        if (self.shots or self.percent < 100) and self.protocol in ("retrieval", "segment"):
            raise common.UserError(f"--shots and --percent choose labelled training pictures; {self.protocol} has none")


LOADED = dict(workers=8)
CACHED = dict(epochs=50, batch_size=256, base_lr=0.1)                                # ours
ATTENTIVE = dict(epochs=20, batch_size=256, base_lr=1e-3, weight_decay=0.05, warmup_epochs=1,
                 beta2=0.95, crop_scale=0.35)                                        # ours
# MAE, table 9 and the released code's settings for weights trained on normalised pixels (FINETUNE.md)
FINETUNE = dict(batch_size=1024, epochs=100, warmup_epochs=5, base_lr=5e-4, min_lr=1e-6, weight_decay=0.05,
                layer_decay=0.65, drop_path=0.1, crop_scale=0.08, randaugment=9, erasing=0.25, mixup=0.8,
                cutmix=1.0, smoothing=0.1, workers=12)
# MaskDistill (its section on fine-tuning, after BEiT v2), DTM (its table of settings): 5e-4 for a batch of 1024
DISTILLED = FINETUNE | dict(base_lr=1.25e-4, warmup_epochs=20)
DENSE = dict(epochs=20, batch_size=16, base_lr=16e-3, weight_decay=1e-4, schedule="linear", warmup_epochs=1,
             crop_scale=0.25)                            # DINOv2's rate, 1e-3 for a batch of 16; length ours
PRESETS = {
    "knn": {"shapes": {}, "folder": dict(workers=4), "imagenet": LOADED},
    "retrieval": {"shapes": {}, "folder": dict(workers=4), "imagenet": LOADED},
    "linear": {"shapes": CACHED, "folder": CACHED | dict(workers=4),
               "imagenet": dict(cached=False, features="cls", batch_size=16384, epochs=90, warmup_epochs=10,
                                base_lr=0.1, crop_scale=0.08, workers=12)},                 # MAE, table 10
    "attentive": {"shapes": ATTENTIVE | dict(epochs=8, base_lr=0.04, crop_scale=1.0),
                  "folder": ATTENTIVE | dict(workers=4), "imagenet": ATTENTIVE | dict(batch_size=1024, workers=12)},
    "finetune": {"shapes": dict(batch_size=64, epochs=5, warmup_epochs=1, base_lr=8e-3, weight_decay=0.05,
                                layer_decay=0.75),                                            # ours
                 "folder": FINETUNE | dict(batch_size=256, layer_decay=0.75, crop_scale=0.35, workers=4),     # ours
                 "imagenet": FINETUNE,                                                        # MAE, ViT-B
                 "imagenet-large": FINETUNE | dict(base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.2),
                 "imagenet-huge": FINETUNE | dict(base_lr=1e-3, epochs=50, layer_decay=0.75, drop_path=0.3),
                 "imagenet-scratch": FINETUNE | dict(batch_size=4096, epochs=300, warmup_epochs=20, base_lr=1e-4,
                                                     min_lr=0.0, weight_decay=0.3, beta2=0.95, layer_decay=1.0,
                                                     erasing=0.0, ema=0.9999),                # MAE, table 11
                 "imagenet-amt": FINETUNE | dict(base_lr=1e-3, layer_decay=0.75),             # its release
                 "imagenet-flip": FINETUNE | dict(base_lr=5e-5, epochs=50, layer_decay=0.75,
                                                  drop_path=0.2),                             # FLIP, table 12, L
                 "imagenet-maskdistill": DISTILLED, "imagenet-dtm": DISTILLED,
                 "imagenet-maskdistill-large": DISTILLED | dict(epochs=50, warmup_epochs=5, layer_decay=0.8,
                                                                drop_path=0.2)},
    "segment": {"shapes": DENSE | dict(epochs=6, batch_size=64, base_lr=8e-3, crop_scale=1.0),               # ours
                "folder": DENSE | dict(workers=4),
                "ade20k": DENSE | dict(image_size=512, epochs=32, warmup_epochs=1.2, workers=8),   # 40,000 steps
                # MAE's settings for UperNet, 1e-4 for a batch of 16, on a linear head
                "ade20k-trained": DENSE | dict(image_size=512, epochs=127, warmup_epochs=1.2, workers=8, frozen=False,
                                               base_lr=16e-4, weight_decay=0.05, layer_decay=0.65, drop_path=0.1)},
}


# ---------------------------------------------------------------------------------------- encoder
def config_from(config_class, settings: dict, **changes):
    """A checkpoint's settings -> the Config they were, with some of them changed.

    An edited row of SIZES does not change an old run: width, depth and number of heads are the
    checkpoint's, unless --model is among the changes. Raises UserError on the settings of another
    version."""
    names = {field.name for field in fields(config_class)}
    sizes = {"embed_dim", "depth", "num_heads"}
    unknown = sorted(settings.keys() - names - sizes)
    if unknown:
        raise common.UserError("the checkpoint is of another version of this code: it has the "
                               f"settings {', '.join(unknown)}")
    try:
        kept = {name: value for name, value in settings.items() if name in names - sizes}
        cfg = config_class(**kept | changes)
        if "model" not in changes:
            for name in sizes:
                setattr(cfg, name, settings[name])
            common.check(cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise common.UserError("the checkpoint is of another version of this code "
                               f"({type(error).__name__}: {common.first_line(error)})") from error
    return cfg


def load_encoder(cfg: Config):
    """The encoder of --checkpoint: (module, the {name: tensor} that are not the encoder's, about).

    The module is that of the script which trained it, less all that its `encode` does not need, so
    its parameters have timm's names. about: method and config, to build it again. The last norm of
    a classifier that averages tokens is its head's, so it is Identity here. Raises UserError unless
    the file has exactly the encoder's names and, besides, only a decoder or a classifier."""
    saved, state = {}, {}
    if cfg.checkpoint != "none":
        saved, state = common.read_weights(cfg.checkpoint)
    ours = isinstance(saved.get("method"), str) and isinstance(saved.get("config"), dict)
    method = cfg.method or (saved["method"] if ours else "mae")
    if method.startswith("evaluate"):
        raise common.UserError(f"{cfg.checkpoint} is for resuming a run; what it trained is finetuned.pt beside it")
    if method in ("common", "data") or not (Path(__file__).parent / f"{method}.py").is_file():
        raise common.UserError(f"no script {method}.py, which --method or the checkpoint asks for")
    script = importlib.import_module(method)
    changes = {name: getattr(cfg, name) for name in ("model", "image_size", "patch_size")
               if getattr(cfg, name)}
    if ours:
        if "drop_path" in saved["config"]:
            changes["drop_path"] = 0.0                   # fine-tuning adds its own
        config = config_from(script.Config, saved["config"], **changes)
    elif state:
        config = script.Config(**released_settings(script, state, cfg.checkpoint) | changes)
    else:
        preset = script.PRESETS.get(cfg.data, script.PRESETS["folder"])
        config = script.Config(**preset | {"seed": cfg.seed} | changes)
    model = script.build(config)
    for name in {name.split(".")[0] for name in model.state_dict() if name.startswith(model.pretrain_only)}:
        delattr(model, name)                             # the decoder, or what else a method has
    if "fc_norm.weight" in state and "norm.weight" not in state:
        model.norm = nn.Identity()
    if any(name.startswith("blocks.0.rel_pos_bias") for name in state):
        own_tables(model)
    extra = {}
    if state:
        optional = ("head.", "fc_norm.", *model.pretrain_only)
        extra = common.load_weights(model, cfg.checkpoint, optional, weights=state)
    else:
        common.log("checkpoint none: the encoder is untrained")
    return model, extra, {"method": method, "config": dict(vars(config))}


def released_settings(script, state: dict, path) -> dict:
    """Settings for the encoder whose weights a released file holds, as far as shapes tell them.

    Raises UserError if it is no Vision Transformer in timm's names."""
    side = grid_side(state)
    weight = state.get("patch_embed.proj.weight")                              # (D, 3, P, P)
    if weight is None or weight.ndim != 4 or not side:
        raise common.UserError(f"{path} holds no Vision Transformer in timm's names, but "
                               f"{sorted(state)[:3]}")
    patch_size = weight.shape[-1]
    settings = script.PRESETS["imagenet"] | {"patch_size": patch_size, "image_size": patch_size * side}
    names = {field.name for field in fields(script.Config)}
    if "student" in names:                               # maskdistill.py's and dtm.py's
        settings["student"] = "sparse" if "pos_embed" in state else "dense"
    if "layer_scale" in names:
        settings["layer_scale"] = float("blocks.0.gamma_1" in state)
    return settings


def grid_side(state: dict) -> int:
    """Side of the square grid of patches that a file's position tables are for; 0: it has none."""
    side = 0.0
    for name, table in state.items():
        if name == "pos_embed" and table.ndim == 3:      # (1, n^2 + 1, D)
            side = max(side, max(table.shape[1] - 1, 0) ** 0.5)
        if name.endswith("relative_position_bias_table") and table.ndim == 2:  # ((2n - 1)^2 + 3, heads)
            side = max(side, (max(len(table) - 3, 1) ** 0.5 + 1) / 2)
    return round(side)


def own_tables(encoder):
    """BEiT's way to fine-tune: the one table of relative positions becomes a table for each block."""
    if getattr(encoder, "rel_pos_bias", None) is None:
        return
    for block in encoder.blocks:
        block.rel_pos_bias = copy.deepcopy(encoder.rel_pos_bias)
        block.register_forward_pre_hook(lambda block, args: (args[0], block.rel_pos_bias(), *args[2:]))
    encoder.rel_pos_bias = None


def digest(model) -> str:
    """Eight letters that tell weights apart: a resumed run must meet the encoder it began with."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.cpu().contiguous().numpy().data)
    return found.hexdigest()[:8]


def taps(tokens, norm) -> dict:
    """Tokens before the last norm (B, 1 + N, D) -> {name: features (B, D)}, the choices of --features.

    Which one is compared decides the figure: MAE's class token is worth more before the norm."""
    normed = norm(tokens)
    return {"cls": normed[:, 0], "mean": normed[:, 1:].mean(dim=1),
            "cls-raw": tokens[:, 0], "mean-raw": tokens[:, 1:].mean(dim=1)}


def all_features(cfg: Config, encoder, pictures, device, names=("cls", "mean", "cls-raw", "mean-raw")):
    """({tap: features (n, D) fp32}, labels (n,)) of the centres of the pictures, on the device."""
    norm, encoder.norm, began = encoder.norm, nn.Identity(), time.time()

    def encode(images):
        with common.autocast(device, cfg.precision):
            found = taps(encoder.encode(images), norm)
        return torch.cat([found[name] for name in names], dim=1)                # (B, taps * D)

    table, labels = data.features(encode, pictures, cfg.image_size, device, workers=cfg.workers)
    encoder.norm = norm
    common.log(f"{len(table)} pictures encoded, {len(table) / (time.time() - began):,.0f} images/s")
    return dict(zip(names, table.chunk(len(names), dim=1))), labels


# ----------------------------------------------------------------------------------------- scores
def ranking(features, labels):
    """Recall@1, Recall@5 and mean average precision in percent; features (n, D), labels (n,).

    Every picture is a query, all others are ranked by cosine; a picture without another one of its
    class is no query. Average precision: mean of the precision at each hit's rank."""
    features, found = F.normalize(features.float(), dim=1), []
    for rows in torch.arange(len(features), device=features.device).split(500):
        similarity = features[rows] @ features.T                                # (b, n)
        similarity[torch.arange(len(rows)), rows] = -torch.inf                  # itself: last, then cut
        order = similarity.argsort(dim=1, descending=True)[:, :-1]
        hits = (labels[order] == labels[rows, None]).float()                    # (b, n - 1)
        precision = hits.cumsum(dim=1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
        total = hits.sum(dim=1)
        scores = [hits[:, :1].sum(dim=1), hits[:, :5].sum(dim=1).clamp(max=1),
                  (precision * hits).sum(dim=1) / total.clamp(min=1)]
        found.append(torch.stack(scores, dim=1)[total > 0])
    if not len(torch.cat(found)):
        raise common.UserError("no two test pictures are of one class: nothing can be retrieved")
    return tuple((100 * torch.cat(found).mean(dim=0)).tolist())


@torch.no_grad()
def accuracy(cfg: Config, model, pictures, device) -> dict:
    """Top-1 and top-5 in percent of model: images -> logits (B, C), on the pictures' centres."""
    ready(model)

    def logits(images):
        with common.autocast(device, cfg.precision):
            return model(images)

    table, labels = data.features(logits, pictures, cfg.image_size, device, workers=cfg.workers)
    return data.topk_accuracy(table, labels)


def ready(model):
    """For scoring: no drops, batch statistics as learned, and the first process's for all of them."""
    model.eval()
    for buffer in model.buffers() if common.world_size() > 1 else ():
        dist.broadcast(buffer, 0)


def confusion(truth, prediction, classes: int):
    """Pixels by (true class, predicted class), int64 (C, C); those of truth IGNORE do not count."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def mean_iou(counts) -> float:
    """Mean intersection over union, in percent, over the classes that occur at all in (C, C)."""
    hits, union = counts.diag(), counts.sum(dim=0) + counts.sum(dim=1) - counts.diag()
    return 100 * (hits[union > 0] / union[union > 0]).mean().item()


# ------------------------------------------------------------------------------------------ heads
class Frozen(nn.Module):
    """Head on an encoder that stays as it is, images -> head(tokens after the last norm)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder.requires_grad_(False), head

    def forward(self, images):
        with torch.no_grad():
            tokens = self.encoder.encode(images)                                # (B, 1 + N, D)
        return self.head(tokens)


class LinearHead(nn.Module):
    """MAE's probe: batch normalisation without weights, then a linear layer (appendix A.1).

    The normalisation makes the probe's learning rate independent of the features' scale, and can be
    folded into the linear layer afterwards. Each process normalises its own batch, as released."""

    def __init__(self, width: int, classes: int, features: str):
        super().__init__()
        self.features = features
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.fc = nn.Linear(width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, tokens):                                                  # (B, 1 + N, D)
        x = tokens[:, 0] if self.features.startswith("cls") else tokens[:, 1:].mean(dim=1)
        return self.fc(self.norm(x.float()))                                    # (B, C)


class SweepHeads(nn.Module):
    """Linear layers from zero on the same features (B, D), two for each learning rate: (B, 2, rates, C)."""

    def __init__(self, width: int, classes: int, rates: int):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(width, 2 * classes) for _ in range(rates))
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x):
        return torch.stack([fc(x).unflatten(1, (2, -1)) for fc in self.fcs], dim=2)


class AttentiveHead(nn.Module):
    """One learned query looks at the patch tokens, not the class token, through keys and values.

    A linear layer follows. No projection after the attention. Which token stands where does not matter."""

    def __init__(self, width: int, classes: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.kv = nn.Linear(width, 2 * width)
        self.fc = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, tokens):                                                  # (B, 1 + N, D)
        split = lambda x: x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, d)
        k, v = self.kv(tokens[:, 1:]).chunk(2, dim=2)                           # (B, N, D) each
        q = self.query.to(k.dtype).expand(len(k), -1, -1)                       # (B, 1, D)
        x = F.scaled_dot_product_attention(split(q), split(k), split(v))        # (B, heads, 1, d)
        return self.fc(x.flatten(1))                                            # (B, C)


class Classifier(nn.Module):
    """Encoder and classifier to be fine-tuned, and its released parameter names.

    pool "mean": the patch tokens' mean, a new norm (fc_norm) in place of the encoder's; "cls": the
    class token after the encoder's norm. The first logits are all but zero (std 2e-5)."""

    def __init__(self, encoder, classes: int, pool: str):
        super().__init__()
        self.encoder, self.pool = encoder, pool
        width = encoder.cls_token.shape[-1]
        own_tables(encoder)
        if getattr(encoder, "pos_embed", None) is not None:
            encoder.pos_embed.requires_grad_(True)
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if pool == "mean" else nn.Identity()
        if pool == "mean":
            encoder.norm = nn.Identity()
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        tokens = self.encoder.encode(images)                                    # (B, 1 + N, D)
        x = tokens[:, 0] if self.pool == "cls" else self.fc_norm(tokens[:, 1:].mean(dim=1))
        return self.head(x)                                                     # (B, C)

    def weights(self) -> dict:
        return {name.removeprefix("encoder."): value for name, value in self.state_dict().items()}


class Segmenter(nn.Module):
    """Batch normalisation and a 1x1 convolution on the map of patch tokens, enlarged to the input."""

    def __init__(self, encoder, classes: int):
        super().__init__()
        self.encoder, width = encoder, encoder.cls_token.shape[-1]
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))

    def forward(self, images):                                                  # (B, 3, H, W)
        tokens = self.encoder.encode(images)[:, 1:]                             # (B, N, D)
        maps = tokens.transpose(1, 2).unflatten(2, self.encoder.grid)           # (B, D, h, w)
        return F.interpolate(self.head(maps.float()), images.shape[-2:], mode="bilinear")  # (B, C, H, W)


# ------------------------------------------------------------------------------------- optimisers
class LARS(torch.optim.Optimizer):
    """SGD with momentum; a matrix's step is scaled to trust * |weight| / |gradient| (You et al. 2017).

    As MAE's linear probe uses it: vectors take the plain step and are not decayed."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                step = p.grad
                if p.ndim > 1:
                    step = step + group["weight_decay"] * p
                    norm, length = p.norm(), step.norm()
                    scale = group["trust"] * norm / length
                    step = step * torch.where((norm > 0) & (length > 0), scale, torch.ones_like(scale))
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * momentum)


def layer_decay_groups(model, weight_decay: float, decay: float) -> list[dict]:
    """Parameter groups with "lr_scale", the factor on their learning rate: 1 for the head and norms
    after the blocks, `decay` for the last block, ... decay^(depth + 1) for what is below the first.

    Vectors, positions and the class token are not decayed (MAE, released code)."""
    depth, groups = len(model.encoder.blocks), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        part = name.removeprefix("encoder.").split(".")
        layer = 0 if part[0] in ("cls_token", "pos_embed", "patch_embed", "rel_pos_bias") else depth + 1
        layer = int(part[1]) + 1 if part[0] == "blocks" else layer
        decayed = p.ndim > 1 and part[0] not in ("cls_token", "pos_embed")
        group = {"params": [], "weight_decay": weight_decay * decayed,
                 "lr_scale": decay ** (depth + 1 - layer)}
        groups.setdefault((layer, decayed), group)["params"].append(p)
    return list(groups.values())


# --------------------------------------------------------------------------------------- pictures
class Erase:
    """Random erasing of "pixel" kind: with a chance, a rectangle becomes normal noise.

    The noise is that of the normalised picture; as pictures stay uint8 until they are on the device,
    it is cut where black and white are, about two deviations from the mean."""

    def __init__(self, chance: float):
        self.chance, self.erase = chance, v2.RandomErasing(p=1.0, value="random")

    def __call__(self, picture):
        if torch.rand(()) >= self.chance:
            return picture
        mean, std = data.mean_std("cpu")
        erased = self.erase((picture / 255 - mean) / std) * std + mean
        return (255 * erased).round().clamp(0, 255).byte()


def augment(cfg: Config):
    """Crop and flip, RandAugment, random erasing, as far as the configuration asks for them."""
    steps = [data.augment(cfg.image_size, cfg.crop_scale, randaugment=cfg.randaugment)]
    return v2.Compose(steps + [Erase(cfg.erasing)] * (cfg.erasing > 0))


class Masked(data.ImageDataset):
    """Pictures with a mask each; an item is ((picture (3, H, W), classes (H, W)), -1, index), both uint8.

    masks: uint8 tensor (n, H, W), or files of one number a pixel, less than `classes` or IGNORE;
    where `shift`, 0 is IGNORE and the classes count from 1 (ADE20K)."""

    def __init__(self, source, masks, classes: int, seed=0, shift=False):
        super().__init__(source, None, seed)
        self.masks, self.classes, self.shift = masks, classes, shift

    def mask(self, index: int) -> torch.Tensor:
        """Mask `index`, uint8 (H, W). Raises OSError if it cannot be read or holds something else."""
        if torch.is_tensor(self.masks):
            return self.masks[index]
        try:
            with Image.open(self.masks[index]) as image:
                mask = torch.from_numpy(np.array(image))
        except Exception as error:                       # a damaged file can raise nearly anything
            raise OSError(f"mask: {common.first_line(error)}") from error
        if mask.ndim != 2 or mask.dtype != torch.uint8:
            raise OSError(f"mask is {mask.dtype} {tuple(mask.shape)}, not one byte a pixel")
        mask = mask - 1 if self.shift else mask
        highest = int(mask[mask != IGNORE].max()) if (mask != IGNORE).any() else 0
        if highest >= self.classes:
            raise OSError(f"mask holds class {highest}, classes are 0 to {self.classes - 1}")
        return mask

    def read(self, index):
        picture, mask = super().read(index), self.mask(index)
        if mask.shape != picture.shape[1:]:
            raise OSError(f"mask has {tuple(mask.shape)} pixels")
        return tv_tensors.Image(picture), tv_tensors.Mask(mask)


def open_masked(cfg: Config) -> tuple[Masked, Masked, list]:
    """Training and test set of shapes, ade20k, or a folder; the names of the classes.

    A folder holds images/ and masks/ (or annotations/) with files of the same names, flat (every
    tenth is kept for testing) or in training/ and validation/ (or train/ and val/). Raises UserError."""
    if cfg.data == "shapes":
        drawn = [data.synthetic_shapes(split, np.arange(count))
                 for split, count in (("train", 10_000), ("test", 2_000))]
        masks = [torch.from_numpy(d["mask"] * (d["shape"] + 1)[:, None, None]).byte() for d in drawn]
        train, test = (Masked(torch.from_numpy(d["image"]), mask, 9, cfg.seed) for d, mask in zip(drawn, masks))
        return train, test, ["ground", *data.SHAPES]
    ade = cfg.data == "ade20k"
    top = Path(cfg.data_root, "ADEChallengeData2016") if ade else Path(cfg.data)
    masks = next((top / name for name in ("masks", "annotations") if (top / name).is_dir()), None)
    if masks is None or not (top / "images").is_dir():
        raise common.UserError(f"no images/ and masks/ (or annotations/) in {top}; --data is a folder of these or "
                               "one of shapes, ade20k")

    def pairs(*parts):
        part = next((p for p in parts if (masks / p).is_dir()), None)
        if part is None:
            return [], []
        files = {p.stem: p for p in sorted((masks / part).glob("*")) if p.suffix.lower() in IMG_EXTENSIONS}
        images = [p for p in sorted((top / "images" / part).glob("*"))
                  if p.stem in files and p.suffix.lower() in IMG_EXTENSIONS]
        if not images:
            raise common.UserError(f"no picture in {top / 'images' / part} has a mask of its name in {masks / part}")
        return images, [files[p.stem] for p in images]

    (x, y), (u, z) = pairs("training", "train", "."), pairs("validation", "val")
    if not u:
        common.log(f"{top} has no validation/: every tenth picture is kept for testing")
        u, z = x[9::10], y[9::10]
        del x[9::10], y[9::10]
    if not u:
        raise common.UserError(f"{top}: {len(x)} pictures with masks are too few to keep a tenth for testing")
    classes = 150 if ade else cfg.num_classes or IGNORE
    train, test = Masked(x, y, classes, cfg.seed, ade), Masked(u, z, classes, cfg.seed, ade)
    if not ade and not cfg.num_classes:
        highest, both = 0, [(part, i) for part in (train, test) for i in range(len(part))]
        for part, i in tqdm(both, "classes", leave=False, disable=None if common.rank() == 0 else True):
            with contextlib.suppress(OSError):           # it will be named when it is needed
                highest = max([highest, *(c for c in part.mask(i).unique().tolist() if c != IGNORE)])
        train.classes = test.classes = highest + 1
    if train.classes < 2:
        raise common.UserError(f"the masks in {masks} hold one class besides {IGNORE}, which is ignored; "
                               "a mask's pixels are 0, 1, ... for the classes")
    common.log(f"{top}: {len(x)} pictures to train on, {len(u)} to test on, {train.classes} classes")
    return train, test, [str(i) for i in range(train.classes)]


def windows(size: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin along `size`: every `stride`, the last one flush with the end."""
    return [min(start, size - crop) for start in range(0, size - crop + stride, stride)]


def slide(model, image, crop: int, stride: int, classes: int):
    """Logits (B, C, H, W) of images (B, 3, H, W), sides >= crop: the mean of overlapping windows."""
    H, W = image.shape[-2:]
    total, count = image.new_zeros(len(image), classes, H, W), image.new_zeros(1, 1, H, W)
    for top in windows(H, crop, stride):
        for left in windows(W, crop, stride):
            here = (..., slice(top, top + crop), slice(left, left + crop))
            total[here] += model(image[here]).float()
            count[here] += 1
    return total / count


@torch.no_grad()
def segmentation(cfg: Config, model, pictures: Masked, classes: int, device):
    """(C, C) pixel counts over the whole set. The shorter side is resized to --image-size, the logits
    back to the mask's own size. Each process takes its share; unreadable pictures are left out."""
    ready(model)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    mine = range(common.rank(), len(pictures), common.world_size())
    size = 100 if torch.is_tensor(pictures.source) else 1                       # files differ in size
    rows = [[(0, i) for i in mine[start:start + size]] for start in range(0, len(mine), size)]
    batches = data.loader(pictures, rows, cfg.workers)
    batches = tqdm(batches, "segmentation", disable=None if common.rank() == 0 else True, leave=False)
    for asked, ((images, masks), _, index) in zip(rows, batches):
        if index.tolist() == [i for _, i in asked]:
            prediction = segment_pictures(cfg, model, images, masks.shape[-2:], classes, device)
            counts += confusion(masks.to(device), prediction, classes)
    if common.world_size() > 1:
        dist.all_reduce(counts)
    return counts


def segment_pictures(cfg: Config, model, images, size, classes: int, device):
    """uint8 images (B, 3, H, W) -> predicted classes (B, *size)."""
    images = v2.functional.resize(images, [cfg.image_size], v2.InterpolationMode.BICUBIC)
    images = data.to_device(images, device)
    with common.autocast(device, cfg.precision):
        logits = slide(model, images, cfg.image_size, cfg.stride or max(1, cfg.image_size * 2 // 3), classes)
    return F.interpolate(logits, size, mode="bilinear").argmax(dim=1)


# ---------------------------------------------------------------------------------------- training
def fit(cfg: Config, run, network, optimizer, batches, loss_of, after_step=None, score=None):
    """The loop of every protocol that trains. loss_of: batch -> scalar loss; score() after
    --eval-every epochs.

    What is drawn in a step (drop path, mixing) depends on the seed, the step and the process."""
    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, run.steps_per_epoch, cfg.min_lr, cfg.schedule)
        network.train()
        step_loss = 0.0
        for i, batch in enumerate(micro_batches):
            torch.manual_seed(common.derive_seed(cfg.seed, step, i, common.rank()))
            with common.sync_on_last(network, i, cfg.accumulate):
                loss = loss_of(batch)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            after_step()
        run.end_step(step, step_loss, lr, score)


def distributed(model):
    return DistributedDataParallel(model) if common.world_size() > 1 else model


# --------------------------------------------------------------------------------------- protocols
def knn(cfg: Config, encoder, device, splits) -> dict:
    """Weighted k-NN of every tap and k; the figure is --features with k = 20."""
    train, y = all_features(cfg, encoder, splits.train, device)
    test, z = all_features(cfg, encoder, splits.test, device)
    result = {}
    common.log("top-1 %    " + "".join(f"k {k:<6}" for k in NEIGHBOURS))
    for tap in train:
        similarity, rows = data.nearest_neighbors(test[tap], train[tap], max(NEIGHBOURS))
        for k in NEIGHBOURS:
            voters = y[rows[:, :k]]
            result[f"{tap}_{k}"] = data.knn_vote(similarity[:, :k], voters, z, len(splits.classes))
        common.log(f"{tap:10} " + "".join(f"{result[f'{tap}_{k}'][0]:<8.1f}" for k in NEIGHBOURS))
    top1, top5 = result[f"{cfg.features}_20"]
    return {"top1": top1, "top5": top5} | {name: scores[0] for name, scores in result.items()}


def retrieval(cfg: Config, encoder, device, splits) -> dict:
    """Recall@1, Recall@5 and mAP among the test pictures, of every tap; the figures are --features'."""
    test, labels = all_features(cfg, encoder, splits.test, device)
    result = {tap: dict(zip(("recall1", "recall5", "map"), ranking(test[tap], labels))) for tap in test}
    for tap, scores in result.items():
        common.log(f"{tap:10} " + ", ".join(f"{name} {value:.1f} %" for name, value in scores.items()))
    return result[cfg.features] | {f"{tap}_{n}": v for tap, scores in result.items() for n, v in scores.items()}


def linear_sweep(cfg: Config, encoder, device, splits) -> dict:
    """Linear layers on cached, standardised features, one for each learning rate of the sweep.

    Each is trained twice side by side: without every tenth training picture of a class (the last
    one, where it has fewer), whose accuracy chooses the rate, and with all of them, for the figure."""
    taken, classes = (cfg.features,), len(splits.classes)
    train, y = all_features(cfg, encoder, splits.train, device, taken)
    test, z = all_features(cfg, encoder, splits.test, device, taken)
    x, u = train[cfg.features], test[cfg.features]
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, u = (x - mean) / std, (u - mean) / std
    held = torch.zeros(len(x), dtype=torch.bool, device=device)
    for label in range(classes):
        mine = (y == label).nonzero()[:, 0]
        every = min(10, len(mine))
        held[mine[every - 1::every] if every > 1 else mine[:0]] = True
    heads = SweepHeads(x.shape[1], classes, len(RATES)).to(device)
    cfg = replace(cfg, batch_size=min(cfg.batch_size, len(x) // common.world_size() * common.world_size()))
    count = 2 * len(RATES)                               # the loss is their mean, which divides each one's gradient
    groups = [{"params": [p], "lr_scale": count * rate,
               "weight_decay": cfg.weight_decay / count * (p.ndim > 1)}
              for fc, rate in zip(heads.fcs, RATES) for p in fc.parameters()]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    steps_per_epoch = common.plan_steps(cfg, len(x))
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    common.log(f"of {len(x)} training pictures, {held.sum()} choose among the rates "
               + ", ".join(f"{peak_lr * rate:.3g}" for rate in RATES))
    run = common.Run(f"evaluate, encoder {digest(encoder)}", cfg, heads, optimizer, steps_per_epoch)
    network = distributed(heads)

    def loss_of(batch):
        rows = torch.tensor([index for _, index in batch], device=device)
        labels = y[rows, None, None].expand(-1, 2, len(RATES))
        loss = F.cross_entropy(network(x[rows]).flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
        seen = torch.stack([~held[rows], torch.ones_like(held[rows])], dim=1).unsqueeze(2)     # (B, 2, 1)
        return (loss * seen).mean()

    batches = data.BatchSampler(cfg, len(x), run.first_step, run.last_step)    # of rows of x
    fit(cfg, run, network, optimizer, batches, loss_of)
    with torch.no_grad():
        right = [(heads(rows)[:, 0].argmax(dim=-1) == labels[:, None]).sum(dim=0)                      # (rates)
                 for rows, labels in zip(x[held].split(1000), y[held].split(1000))]
        best = int(sum(right).argmax()) if held.any() else len(RATES) // 2
        scores = data.topk_accuracy(torch.cat([heads(rows)[:, 1, best] for rows in u.split(1000)]), z)
    common.log(f"learning rate {peak_lr * RATES[best]:.3g} was chosen, "
               f"{100 * int(sum(right)[best]) / int(held.sum()):.1f} % of the held-out pictures"
               if held.any() else "one picture a class: the middle learning rate was taken")
    return scores | {"chosen_lr": peak_lr * RATES[best]}


def probe(cfg: Config, encoder, device, splits) -> dict:
    """MAE's linear probe (--no-cached) or the attentive one: a head trained on a frozen encoder."""
    width, classes = encoder.cls_token.shape[-1], len(splits.classes)
    if cfg.protocol == "attentive":
        heads = max(1, width // 64)
        model = Frozen(encoder, AttentiveHead(width, classes, heads if width % heads == 0 else 1)).to(device)
        groups = common.parameter_groups(model.head, cfg.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    else:
        if cfg.batch_size // (common.world_size() * cfg.accumulate) < 2:
            raise common.UserError("batch normalisation needs two pictures or more in a pass; raise --batch-size")
        encoder.norm = nn.Identity() if cfg.features.endswith("raw") else encoder.norm
        model = Frozen(encoder, LinearHead(width, classes, cfg.features)).to(device)
        optimizer = LARS(model.head.parameters(), weight_decay=cfg.weight_decay)
    return classify(cfg, model, model.head, optimizer, device, splits)


def classify(cfg: Config, model, trained, optimizer, device, splits, ema=None) -> dict:
    """Train model: images -> logits on augmented pictures; score it now and then, report the last.

    trained: the module whose weights the run's checkpoint keeps. ema: averages model's weights."""
    splits.train.transform = augment(cfg)
    steps_per_epoch = common.plan_steps(cfg, len(splits.train))
    run = common.Run(f"evaluate, encoder {digest(model.encoder)}", cfg, trained, optimizer, steps_per_epoch)
    common.log(f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters are trained")
    if cfg.compile:
        model.compile()
    network, mix = distributed(model), data.mixing(cfg.mixup, cfg.cutmix, len(splits.classes))

    def loss_of(batch):
        images, labels = data.to_device(batch[0], device), batch[1].to(device, non_blocking=True)
        images, labels = mix(images, labels)
        with common.autocast(device, cfg.precision):
            logits = network(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=cfg.smoothing)

    def score():
        scores = accuracy(cfg, model, splits.test, device)
        if ema:
            scores |= {f"ema_{name}": value for name, value in accuracy(cfg, ema, splits.test, device).items()}
        common.log(", ".join(f"{name} {value:.2f} %" for name, value in scores.items()))
        return scores

    batches = data.batches(splits.train, cfg, run.first_step, run.last_step)
    update_ema = (lambda: ema.update_parameters(model)) if ema else None
    fit(cfg, run, network, optimizer, batches, loss_of, update_ema, score)
    return run.scores or score()                         # score: it was cut short, or had ended before


def finetune(cfg: Config, encoder, device, splits, extra: dict, about: dict) -> dict:
    """All weights, end to end; or, with --eval, the score of a fine-tuned checkpoint.

    Writes finetuned.pt (and finetuned-ema.pt) with the released parameter names."""
    classes = len(splits.classes)
    if cfg.eval:
        if extra.get("head.weight", torch.empty(0)).shape[:1] != (classes,):
            raise common.UserError(f"{cfg.checkpoint} has no classifier of {classes} classes")
        cfg = replace(cfg, pool="mean" if "fc_norm.weight" in extra else "cls")
    elif cfg.pool == "cls" and isinstance(encoder.norm, nn.Identity):
        raise common.UserError(f"{cfg.checkpoint} averages tokens and has no norm for the class token: --pool mean")
    model = Classifier(encoder, classes, cfg.pool)
    if cfg.eval:
        if cfg.pool == "cls":                            # supmim.py's classifier averages after the encoder's norm
            model.pool = about["config"].get("pool", "cls")
        head = {name: value for name, value in extra.items() if name.startswith(("head.", "fc_norm."))}
        missing, unexpected = model.load_state_dict(head, strict=False)
        wrong = unexpected + [name for name in missing if not name.startswith("encoder.")]
        if wrong:
            raise common.UserError(f"{cfg.checkpoint} has another classifier: {wrong[:3]}")
        return accuracy(cfg, model.to(device), splits.test, device)
    if "pool" in about["config"]:                        # supmim.py's; from here on it is ours
        about["config"]["pool"] = cfg.pool
    common.add_drop_path(encoder.blocks, cfg.drop_path)
    model.to(device)
    groups = layer_decay_groups(model, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema)) if cfg.ema else None
    trained = nn.ModuleList([model, ema] if ema else [model])
    result = classify(cfg, model, trained, optimizer, device, splits, ema)
    for name, part in ({"finetuned": model} | ({"finetuned-ema": ema.module} if ema else {})).items():
        if common.rank() == 0:
            weights = {key: value.cpu() for key, value in part.weights().items()}
            common.save_atomic(about | {"model": weights}, Path(cfg.output, f"{name}.pt"))
    return result


def segment(cfg: Config, encoder, device) -> dict:
    """Mean intersection over union of a linear head on the patch map, the encoder frozen or trained."""
    train, test, classes = open_masked(cfg)
    bicubic, size = v2.InterpolationMode.BICUBIC, cfg.image_size
    crop = [v2.RandomResizedCrop(size, (cfg.crop_scale, 1.0), interpolation=bicubic)] if cfg.crop_scale < 1 else \
        [v2.Resize(size, bicubic), v2.CenterCrop(size)]
    train.transform = v2.Compose([*crop, v2.RandomHorizontalFlip()])
    model = Segmenter(encoder.requires_grad_(not cfg.frozen), len(classes)).to(device)
    if not cfg.frozen:
        common.add_drop_path(encoder.blocks, cfg.drop_path)
    trained = model.head if cfg.frozen else model
    groups = layer_decay_groups(model, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(train))
    run = common.Run(f"evaluate, encoder {digest(encoder)}", cfg, trained, optimizer, steps_per_epoch)
    if cfg.compile:
        model.compile()
    network = distributed(model)

    def loss_of(batch):
        (images, masks), _, _ = batch
        with common.autocast(device, cfg.precision):
            logits = network(data.to_device(images, device))
        truth = masks.to(device, non_blocking=True).long()
        loss = F.cross_entropy(logits.float(), truth, ignore_index=IGNORE, reduction="sum")
        return loss / (truth != IGNORE).sum().clamp(min=1)

    batches = data.batches(train, cfg, run.first_step, run.last_step)
    fit(cfg, run, network, optimizer, batches, loss_of)
    counts = segmentation(cfg, model, test, len(classes), device)
    if common.rank() == 0:
        show(cfg, model, test, len(classes), device, run.folder / "segmentation.png")
    return {"miou": mean_iou(counts), "pixels": 100 * (counts.diag().sum() / counts.sum()).item()}


@torch.no_grad()
def show(cfg: Config, model, pictures: Masked, classes: int, device, path):
    """Write eight pictures, their true and their predicted classes in colours."""
    crop = data.CenterCrop(cfg.image_size)
    palette = torch.from_numpy(np.random.RandomState(1).randint(40, 256, (256, 3))).float() / 255
    palette[0], palette[IGNORE] = 0.1, 1.0
    mean, std = data.mean_std("cpu")
    colours = lambda mask: (palette[mask.long().cpu()].permute(0, 3, 1, 2) - mean) / std
    rows = {"image": [], "truth": [], "prediction": []}
    for i in np.linspace(0, len(pictures) - 1, 8).astype(int):
        (image, mask), _, _ = pictures[0, i]
        prediction = segment_pictures(cfg, model, image[None], mask.shape, classes, device)
        rows["image"].append(data.to_device(crop(image)[None], "cpu"))
        for name, found in (("truth", mask[None]), ("prediction", prediction)):
            rows[name].append(crop(colours(found)[0])[None])
    data.save_image_grid(path, {name: torch.cat(images) for name, images in rows.items()})


def evaluate(cfg: Config) -> dict:
    """Run one protocol; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    splits = None
    if cfg.protocol != "segment":
        splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
        if splits.test is None:
            raise common.UserError(f"{cfg.data} has no labelled images to train and test on")
        train = data.subset(splits.train, cfg.shots, cfg.percent, cfg.seed)
        splits = splits._replace(train=train)
    encoder, extra, about = load_encoder(cfg)
    cfg = replace(cfg, image_size=about["config"]["image_size"])
    if cfg.stride > cfg.image_size:
        raise common.UserError(f"stride {cfg.stride} leaves gaps between windows of {cfg.image_size} pixels")
    torch.manual_seed(cfg.seed)                          # building the encoder took the checkpoint's seed
    encoder.to(device).eval()
    common.log(f"encoder of {about['method']}: {sum(p.numel() for p in encoder.parameters()):,} parameters, "
               f"{about['config']['num_heads']} heads, input {cfg.image_size} pixels, "
               f"{encoder.grid[0] * encoder.grid[1]} patches")
    if common.rank() == 0:
        with common.writing_to(cfg.output):
            Path(cfg.output).mkdir(parents=True, exist_ok=True)
    if cfg.protocol == "segment":
        result = segment(cfg, encoder, device)
    elif cfg.protocol == "finetune":
        result = finetune(cfg, encoder, device, splits, extra, about)
    elif cfg.protocol == "linear" and cfg.cached:
        result = linear_sweep(cfg, encoder, device, splits)
    elif cfg.protocol in ("linear", "attentive"):
        result = probe(cfg, encoder, device, splits)
    else:
        result = {"knn": knn, "retrieval": retrieval}[cfg.protocol](cfg, encoder, device, splits)
    result = {"protocol": cfg.protocol, "checkpoint": cfg.checkpoint, "data": cfg.data} | result
    common.append_metrics(Path(cfg.output), **result)
    figures = ("top1", "top5", "ema_top1", "recall1", "recall5", "map", "miou", "pixels")
    common.log(f"{cfg.protocol}, {cfg.checkpoint}, {cfg.data}: "
               + ", ".join(f"{name} {result[name]:.1f} %" for name in figures if name in result))
    return result


def main(argv=None) -> dict:
    with common.command_line():
        argv = list(sys.argv[1:] if argv is None else argv)
        if any(word.startswith("--protocol") for word in argv):
            raise common.UserError("the protocol is the first word: python evaluate.py linear ...")
        protocol = argv.pop(0) if argv and not argv[0].startswith("-") else "knn"
        if protocol not in PRESETS:
            raise common.UserError(f"no protocol {protocol}; there are {', '.join(PRESETS)}")
        return evaluate(common.parse_config(Config, PRESETS[protocol], ["--protocol", protocol, *argv], __doc__))


if __name__ == "__main__":
    main()
