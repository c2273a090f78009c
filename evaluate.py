"""What a pre-trained encoder is worth, and its features of your own images.

    python evaluate.py knn --checkpoint runs/mae-shapes/checkpoint.pt
    python evaluate.py features --checkpoint runs/mae-shapes/checkpoint.pt --data FOLDER

    protocol    trained                                 on
    knn         nothing: the nearest images vote        features
    linear      linear layers, by SGD                   features, made once
      --no-cached: batch norm and linear, by LARS       crops and flips (MAE's linear probe)
    finetune    encoder, norm and linear layer          crops, RandAugment, MixUp ...
    segment     batch norm and 1x1 convolution          crops and flips, with a class a pixel
    features    nothing: they are written to a file

Scores are those of the last weights and, with --ema, of the averaged ones. Nothing is ever chosen
on the test images: `linear` chooses its learning rate on a tenth of the training images, `knn`
shows all k.

--checkpoint is a checkpoint of any script here, which says how to build its encoder; or a released
file in timm's names (MAE, DINO, DeiT, timm's ViTs), whose shapes say it; or `none`: the untrained
encoder, which finetune trains from scratch. `finetune --eval` trains nothing and scores fine-tuned
weights or a classifier of supmim.py. --data chooses the preset, as in the other scripts;
--preset chooses another, such as `finetune --data imagenet --preset imagenet-large`.

--pooling says which feature of an image is used: cls, the class token, or mean, the mean of the
patch tokens; cls-raw, mean-raw: the same before the last norm. `knn` shows all four. `finetune`
averages before the last norm and trains a new one behind it (a classifier of supmim.py has its own
before the mean, and keeps it).

`features` writes OUTPUT/features.npz. To read it:

    saved = np.load("runs/features-mae-shapes-FOLDER/features.npz")
    saved["features"]      # float32 (n, D), a row for each image that could be read
    saved["files"]         # n file names; of a data set without files "train/0", "test/17"
    saved["labels"]        # int64 (n,), numbers of ...
    saved["classes"]       # ... these names: both only if the images are in class folders

Images are normalised with ImageNet's mean and standard deviation; weights that were trained with
others (timm's augreg: 0.5) score too low.

B batch, N patches, D width, C classes, H x W pixels, h x w patches.
"""

import copy
import hashlib
import importlib
import os
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
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import common
import data

POOLINGS = ("cls", "mean", "cls-raw", "mean-raw")
NEIGHBORS = (1, 10, 20, 100, 200)                        # k of k-NN; 20 makes the figure
RATES = [10 ** (i / 2 - 2) for i in range(10)]           # linear: 0.01 to 316, times the run's rate
IGNORE = 255                                             # segment: the class of unlabelled pixels
ADE_CLASSES = 150                                        # segment: ADE20K's


# ----------------------------------------------------------------------------------------- Config
@dataclass
class Config(common.RunConfig):
    protocol: Literal["knn", "linear", "finetune", "segment", "features"] = "knn"  # the first word
    checkpoint: str = "none"      # weights: a checkpoint of ours, a released file, or none
    data: str = "shapes"          # shapes, cifar10, ..., imagenet, a folder; segment: shapes, ade20k
    output: str = ""              # folder of the run; empty: runs/PROTOCOL-CHECKPOINT-DATA
    method: str = ""              # script that builds the encoder; empty: the checkpoint's, else mae
    model: Literal["", "micro", "tiny", "small", "base", "large", "huge"] = ""  # size; empty: the checkpoint's
    image_size: int | None = None  # side of the input in pixels; None: the checkpoint's
    patch_size: int | None = None  # side of a patch in pixels; None: the checkpoint's

    pooling: Literal["cls", "mean", "cls-raw", "mean-raw"] = "mean"  # the feature of an image; finetune: cls or mean
    shots: int = 0                # labelled training images of each class; 0: all
    percent: float = 100.0        # share of the labelled training images of each class
    cached: bool = True           # linear: on features made once; no: MAE's probe (its settings: --preset imagenet)
    eval: bool = False            # finetune: only score the classifier in the checkpoint

    batch_size: int = 256         # images in an optimizer step, of all processes and micro-batches
    accumulate: int = 1           # micro-batches in a step: gradient accumulation, to save memory
    epochs: int = 50              # passes over the training images
    warmup_epochs: float = 0.0    # epochs of linear warm-up from 0
    base_lr: float = 0.1          # peak learning rate = base_lr * batch_size / 256
    min_lr: float = 0.0           # learning rate at the end
    weight_decay: float = 0.0     # on matrices only
    beta2: float = 0.999          # finetune, segment: AdamW's
    layer_decay: float = 1.0      # finetune: factor on the learning rate from a block to the one below
    drop_path: float = 0.0        # finetune: probability to drop a branch of the last block; first block: 0
    ema: float = 0.0              # finetune: decay of averaged weights, scored beside the last ones; 0: none
    eval_every: int = 1           # finetune, MAE's linear: epochs between scores of the test images

    crop_scale: float = 1.0       # smallest fraction of the area that the random crop keeps; 1: the center crop
    randaugment: int = 0          # finetune: magnitude, 0 (none) to 10
    erasing: float = 0.0          # finetune: probability to erase a rectangle
    mixup: float = 0.0            # finetune: alpha; 0: none
    cutmix: float = 0.0           # finetune: alpha; 0: none
    smoothing: float = 0.0        # finetune: of the labels

    def __post_init__(self):
        self.output = self.output or default_output(self)
        common.check(self)
        if self.shots and self.percent < 100:
            raise common.UserError("--shots and --percent exclude each other")
        few_labels = self.shots or self.percent < 100
        if few_labels and self.protocol in ("segment", "features"):
            raise common.UserError("--shots and --percent are for knn, linear and finetune")
        if self.protocol == "finetune" and self.pooling.endswith("raw"):
            raise common.UserError("finetune trains a norm: --pooling is cls or mean")


def default_output(cfg: Config) -> str:
    """runs/PROTOCOL-NAME-DATA, where NAME is that of the run which wrote the file, else the
    file's."""
    file = Path(cfg.checkpoint).resolve()
    data_name = Path(cfg.data).resolve().name
    name = file.stem
    of_runs = {"checkpoint": "", "checkpoint.previous": "", "encoder": "", "classifier": "",
               "finetuned": "", "finetuned-ema": "-ema", "teacher": "-teacher"}
    if name in of_runs:
        name = file.parent.name.removesuffix(f"-{data_name}") + of_runs[name]
    protocol = cfg.protocol
    if cfg.eval:
        protocol = "score"
    if protocol == "linear" and not cfg.cached:
        protocol = "linear-augmented"
    return f"runs/{protocol}-{name}-{data_name}"


SWEEP = dict(epochs=50, batch_size=256, base_lr=0.1)                                        # ours
# MAE's released settings for a ViT-B that was trained on normalised pixels (FINETUNE.md). Those of
# the paper, table 9, are for raw pixels: base_lr 1e-3, layer_decay 0.75
FINETUNE = dict(batch_size=1024, epochs=100, warmup_epochs=5, base_lr=5e-4, min_lr=1e-6,
                weight_decay=0.05, layer_decay=0.65, drop_path=0.1, crop_scale=0.08, randaugment=9,
                erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1, workers=12)
# For MaskDistill, whose own are not known, and DTM: BEiT v2's after 300 epochs of pre-training,
# 5e-4 for a batch of 1024; warm-up 20 is a reproduction's
DISTILLED = FINETUNE | dict(base_lr=1.25e-4, warmup_epochs=20)
# DINOv2's linear head: 1e-3 for a batch of 16, weight decay 1e-4, a straight line; the rest is ours
SEGMENT = dict(epochs=20, batch_size=16, base_lr=16e-3, weight_decay=1e-4, warmup_epochs=1,
               crop_scale=0.25)
PRESETS = {
    "knn": {"shapes": {}, "folder": dict(workers=8)},
    "features": {"shapes": {}, "folder": dict(workers=8)},
    "linear": {
        "shapes": SWEEP,
        "folder": SWEEP | dict(workers=8),
        "imagenet": dict(cached=False, pooling="cls", batch_size=16384, epochs=90, warmup_epochs=10,
                         base_lr=0.1, crop_scale=0.08, workers=12),               # MAE, table 10
    },
    "finetune": {
        "shapes": dict(batch_size=64, epochs=5, warmup_epochs=1, base_lr=8e-3, weight_decay=0.05,
                       layer_decay=0.75),                                                   # ours
        "folder": FINETUNE | dict(batch_size=256, layer_decay=0.75, crop_scale=0.35,
                                  workers=4),                                               # ours
        "imagenet": FINETUNE,
        "imagenet-large": FINETUNE | dict(epochs=50, base_lr=1e-3, layer_decay=0.75,
                                          drop_path=0.2),                    # MAE, FINETUNE.md
        "imagenet-huge": FINETUNE | dict(epochs=50, base_lr=1e-3, layer_decay=0.75,
                                         drop_path=0.3),                     # MAE, FINETUNE.md
        "imagenet-scratch": FINETUNE | dict(batch_size=4096, epochs=300, warmup_epochs=20,
                                            base_lr=1e-4, min_lr=0.0, weight_decay=0.3, beta2=0.95,
                                            layer_decay=1.0, erasing=0.0,
                                            ema=0.9999),                     # MAE, table 11
        "imagenet-amt": FINETUNE | dict(base_lr=1e-3, layer_decay=0.75),     # AMT's released code
        "imagenet-flip": FINETUNE | dict(epochs=50, base_lr=5e-5, layer_decay=0.75,
                                         drop_path=0.2),                     # FLIP, table 12, ViT-L
        "imagenet-distilled": DISTILLED,
        "imagenet-distilled-large": DISTILLED | dict(epochs=50, warmup_epochs=5, layer_decay=0.8,
                                                     drop_path=0.2),         # BEiT v2, ViT-L
    },
    "segment": {
        "shapes": SEGMENT | dict(epochs=6, batch_size=64, base_lr=8e-3, crop_scale=1.0),    # ours
        "folder": SEGMENT,               # for an open_masked_images of your own
        # DINOv2's length, 40,000 steps, 1,500 of them warm-up
        "ade20k": SEGMENT | dict(image_size=512, epochs=32, warmup_epochs=1.2, workers=8),
    },
}


# ---------------------------------------------------------------------------------------- encoder
def load_encoder(cfg: Config):
    """The encoder of --checkpoint: (module, {name: tensor} of what else is in the file, about).

    The module is that of the script which trained it, less the decoder and what else only
    pre-training needs, so its parameters have timm's names and `encode(images)` gives tokens
    (B, 1 + N, D), the class token first. about: method and config, to build it again, and the
    pooling of the file's classifier. Raises UserError unless the file has exactly the encoder's
    names and, besides, only such parts or a classifier."""
    saved = {}
    weights = {}
    if cfg.checkpoint != "none":
        saved, weights = common.read_weights(cfg.checkpoint)
    is_ours = isinstance(saved.get("method"), str) and isinstance(saved.get("config"), dict)
    method = cfg.method or (saved["method"] if is_ours else "mae")
    script = import_script(method, cfg.checkpoint)
    changes = {"model": cfg.model, "image_size": cfg.image_size, "patch_size": cfg.patch_size}
    changes = {name: value for name, value in changes.items() if value}
    if hasattr(script.Config, "drop_path"):
        changes["drop_path"] = 0.0                       # fine-tuning adds its own
    if is_ours:
        config = config_from(script.Config, saved["config"], **changes)
    elif weights:
        settings = released_settings(cfg, script, saved, weights)
        config = config_from(script.Config, settings, **changes)
    else:
        preset = script.PRESETS.get(cfg.data, script.PRESETS["folder"])
        config = script.Config(**preset | {"seed": cfg.seed} | changes)

    model = script.build(config)
    not_encoder = [name for name in model.state_dict() if name.startswith(model.pretrain_only)]
    for part in {name.split(".")[0] for name in not_encoder}:
        delattr(model, part)
    if "fc_norm.weight" in weights and "norm.weight" not in weights:
        model.norm = nn.Identity()                       # fine-tuned: the last norm is the head's
    if any(name.startswith("blocks.0.rel_pos_bias") for name in weights):
        copy_relative_positions(model)                   # fine-tuned: a table for each block
    left_out = {}
    if weights:
        optional = ("head.", "fc_norm.", *model.pretrain_only)
        left_out = common.load_weights(model, cfg.checkpoint, optional, weights)
    else:
        common.log("checkpoint none: the encoder is untrained")
    about = {"method": method, "config": dict(vars(config)),
             "pooling": classifier_pooling(saved, weights, method)}
    return model, left_out, about


def import_script(method: str, checkpoint: str):
    """The module of a method. Raises UserError if there is none."""
    if method.startswith("evaluate"):
        raise common.UserError(f"{checkpoint} is for resuming a run of evaluate.py; what finetune "
                               "trains is finetuned.pt")
    file = Path(__file__).parent / f"{method}.py"
    if method in ("common", "data") or not file.is_file():
        raise common.UserError(f"no script {method}.py, which --method or the checkpoint asks for")
    return importlib.import_module(method)


def classifier_pooling(saved: dict, weights: dict, method: str) -> str:
    """What the classifier in a file pools, "cls" or "mean". Our finetuned.pt says it. Of others,
    those with a norm of their own (fc_norm) and those of supmim.py average the patch tokens."""
    if saved.get("pooling") in ("cls", "mean"):
        return saved["pooling"]
    averages = "fc_norm.weight" in weights or method == "supmim"
    return "mean" if averages else "cls"


def config_from(config_class, settings: dict, **changes):
    """A checkpoint's settings -> the Config they were, with some of them changed.

    An edited row of SIZES does not change an old run: width, depth and number of heads are the
    checkpoint's, unless `model` is among the changes. Raises UserError on the settings of another
    version."""
    names = {field.name for field in fields(config_class)}
    sizes = vars(config_class()).keys() - names          # derived from `model`: no flags
    unknown = sorted(settings.keys() - names - sizes)
    if unknown:
        raise common.UserError("the checkpoint is of another version of this code: it has the "
                               f"settings {', '.join(unknown)}")
    try:
        known = {name: value for name, value in settings.items() if name in names - sizes}
        cfg = config_class(**known | changes)
        if "model" not in changes:
            for name in sizes:
                setattr(cfg, name, settings[name])
            common.check(cfg)
    except (KeyError, TypeError, ValueError) as error:
        raise common.UserError("the checkpoint is of another version of this code "
                               f"({type(error).__name__}: {common.first_line(error)})") from error
    return cfg


def released_settings(cfg: Config, script, saved: dict, weights: dict) -> dict:
    """Settings for the encoder whose weights a released file holds, read off their shapes.

    Shapes do not tell the number of heads: it is "num_heads" in the file (teacher.pt), else that of
    the row of the script's SIZES with this width. Raises UserError on other files."""
    kernel = weights.get("patch_embed.proj.weight")                            # (D, 3, P, P)
    side = grid_side(weights)
    if kernel is None or kernel.ndim != 4 or not side:
        raise common.UserError(f"{cfg.checkpoint} holds no Vision Transformer in timm's names, but "
                               f"{sorted(weights)[:3]}")
    width, _, _, patch_size = kernel.shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    heads_of_width = {row[0]: row[2] for row in script.SIZES.values()}
    heads = saved.get("num_heads", heads_of_width.get(width))
    if heads is None and not cfg.model:
        raise common.UserError(f"{cfg.checkpoint} does not tell how many heads it has at width "
                               f"{width}; give {script.__name__}.py a row of this width in SIZES")
    return script.PRESETS["imagenet"] | {
        "patch_size": patch_size, "image_size": patch_size * side,
        "embed_dim": width, "depth": depth, "num_heads": heads}


def grid_side(weights: dict) -> int:
    """Side n of the square grid of patches that the position tables are for; 0: there are none."""
    side = 0.0
    for name, table in weights.items():
        if name == "pos_embed" and table.ndim == 3:                            # (1, 1 + n*n, D)
            side = max(table.shape[1] - 1, 0) ** 0.5
        if name.endswith("relative_position_bias_table") and table.ndim == 2:
            offsets = max(len(table) - 3, 1)                                   # (2n - 1)^2
            side = (offsets ** 0.5 + 1) / 2
    return round(side)


def copy_relative_positions(encoder):
    """BEiT's way to fine-tune: each block gets a copy of the table of relative positions, which all
    shared so far, as its own. Encoders without one stay as they are."""
    if getattr(encoder, "rel_pos_bias", None) is None:
        return

    def own_bias(block, args):                           # (x, None, ...) -> (x, bias, ...)
        return args[0], block.rel_pos_bias(), *args[2:]

    for block in encoder.blocks:
        block.rel_pos_bias = copy.deepcopy(encoder.rel_pos_bias)
        block.register_forward_pre_hook(own_bias)
    encoder.rel_pos_bias = None


def digest(model) -> str:
    """Eight letters that tell weights apart: a resumed run must meet the encoder it began with."""
    sha = hashlib.sha256()
    for value in model.state_dict().values():
        sha.update(value.cpu().contiguous().numpy().data)
    return sha.hexdigest()[:8]


# --------------------------------------------------------------------------------------- features
def pool_tokens(tokens, pooling: str):
    """Tokens (B, 1 + N, D) -> the class token, or the mean of the patch tokens (B, D)."""
    if pooling.startswith("cls"):
        return tokens[:, 0]
    return tokens[:, 1:].mean(dim=1)


def autocast(cfg: Config, encoder, device):
    """The precision of --precision; "auto" depends on the encoder's width, too."""
    return common.autocast(device, cfg.precision, width=encoder.cls_token.shape[-1])


def all_features(cfg: Config, encoder, dataset, device, poolings=POOLINGS):
    """({pooling: features fp32 (n, D)}, labels (n,)) of the images' centers, on the device."""
    norm = encoder.norm
    encoder.norm = nn.Identity()                         # one pass serves both sides of the norm
    started_at = time.time()

    def encode(images):
        with autocast(cfg, encoder, device):
            raw = encoder.encode(images)                                       # (B, 1 + N, D)
            normed = norm(raw)
        pooled = [pool_tokens(raw if pooling.endswith("raw") else normed, pooling)
                  for pooling in poolings]
        return torch.cat(pooled, dim=1)                                        # (B, poolings * D)

    table, labels = data.features(encode, dataset, cfg.image_size, device, workers=cfg.workers)
    encoder.norm = norm
    speed = len(table) / (time.time() - started_at)
    common.log(f"{len(table)} images encoded, {speed:,.0f} images/s")
    return dict(zip(poolings, table.chunk(len(poolings), dim=1))), labels


def save_features(cfg: Config, encoder, device, splits) -> dict:
    """The protocol `features`: write OUTPUT/features.npz, training images first, then test ones."""
    parts = {"train": splits.train, "test": splits.test}
    if splits.test is None:                              # no labels, or one class
        parts = {"train": splits.pretrain}
    features = []
    files = []
    labels = []
    for part, dataset in parts.items():
        # numbers in place of labels tell which images could be read
        numbered = data.ImageDataset(dataset.source, np.arange(len(dataset)), dataset.seed)
        of_part, rows = all_features(cfg, encoder, numbered, device, (cfg.pooling,))
        rows = rows.tolist()
        features.append(of_part[cfg.pooling].cpu().numpy())
        labels.append(dataset.labels[rows])
        if torch.is_tensor(dataset.source):
            files += [f"{part}/{row}" for row in rows]
        else:
            files += [os.fsdecode(dataset.source[row]) for row in rows]
    contents = {"features": np.concatenate(features), "files": np.array(files)}
    if splits.classes:
        contents["labels"] = np.concatenate(labels)
        contents["classes"] = np.array(splits.classes)
    path = Path(cfg.output, "features.npz")
    if common.rank() == 0:
        with common.writing_to(path):
            new = path.with_name(path.name + ".new")     # a kill leaves one file or the other
            with open(new, "wb") as file:
                np.savez(file, **contents)
            os.replace(new, path)
    images, width = contents["features"].shape
    unreadable = sum(map(len, parts.values())) - images
    common.log(f"wrote {path}: {', '.join(contents)}; {images} images, width {width}, "
               f"{unreadable} images could not be read")
    return {"images": images, "width": width, "unreadable": unreadable}


def knn(cfg: Config, encoder, device, splits) -> dict:
    """Weighted k-NN with each feature and each k; the figure is that of --pooling and k = 20.

    Every image votes for its class with exp(cosine / 0.07), as in DINO's evaluation."""
    train, train_labels = all_features(cfg, encoder, splits.train, device)
    test, test_labels = all_features(cfg, encoder, splits.test, device)
    scores = {}
    common.log("top-1 %    " + "".join(f"k {k:<6}" for k in NEIGHBORS))
    for pooling in POOLINGS:
        similarity, rows = data.nearest_neighbors(test[pooling], train[pooling], max(NEIGHBORS))
        line = f"{pooling:10} "
        for k in NEIGHBORS:
            neighbor_labels = train_labels[rows[:, :k]]                        # (n, k)
            top1, top5 = data.knn_vote(similarity[:, :k], neighbor_labels, test_labels,
                                       len(splits.classes))
            scores[f"{pooling}_{k}"] = top1
            if pooling == cfg.pooling and k == 20:
                scores |= {"top1": top1, "top5": top5}
            line += f"{top1:<8.1f}"
        common.log(line)
    return scores


# ----------------------------------------------------------------------------------------- linear
class SweepHeads(nn.Module):
    """Linear layers from zero on the same features, two for each learning rate of the sweep:
    (B, D) -> logits (B, 2, rates, C)."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(width, 2 * classes) for _ in RATES)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x):
        logits = [fc(x).unflatten(1, (2, -1)) for fc in self.fcs]              # (B, 2, C) each
        return torch.stack(logits, dim=2)


def every_tenth(labels, classes: int):
    """Mark every tenth image of each class, or its last one where it has fewer; of a class of one
    image none. labels (n,) -> bool (n,)."""
    marked = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in range(classes):
        of_class = (labels == label).nonzero()[:, 0]
        step = min(10, len(of_class))
        if step > 1:
            marked[of_class[step - 1::step]] = True
    return marked


@torch.no_grad()
def choose_rate(heads: SweepHeads, x, labels) -> int:
    """Number of the learning rate whose first layer, which never saw them, classifies most of the
    held-out features x (n, D) rightly; the middle one if there are none."""
    if len(x) == 0:
        common.log("one image a class: none is held out, the middle learning rate is taken")
        return len(RATES) // 2
    correct = torch.zeros(len(RATES), device=x.device)
    for rows, truth in zip(x.split(1000), labels.split(1000)):
        prediction = heads(rows)[:, 0].argmax(dim=-1)                          # (b, rates)
        correct += (prediction == truth[:, None]).sum(dim=0)
    best = int(correct.argmax())
    common.log(f"rate {best + 1} of {len(RATES)} was chosen: {100 * correct[best] / len(x):.1f} % "
               f"of {len(x)} held-out training images")
    return best


def linear(cfg: Config, encoder, device, splits) -> dict:
    """Linear layers on standardised features that are made once, by SGD at ten learning rates.

    At each rate two layers are trained side by side: one without the held-out tenth of the training
    images, whose accuracy there chooses the rate, and one with all of them, which is scored."""
    classes = len(splits.classes)
    train, y = all_features(cfg, encoder, splits.train, device, (cfg.pooling,))
    test, test_y = all_features(cfg, encoder, splits.test, device, (cfg.pooling,))
    mean = train[cfg.pooling].mean(dim=0)                                      # (D,)
    std = train[cfg.pooling].std(dim=0) + 1e-6
    x = (train[cfg.pooling] - mean) / std                                      # (n, D)
    test_x = (test[cfg.pooling] - mean) / std
    held_out = every_tenth(y, classes)                                         # (n,)
    heads = SweepHeads(x.shape[1], classes).to(device)
    groups = []
    for fc, rate in zip(heads.fcs, RATES):
        groups.append({"params": [fc.weight], "lr_scale": rate, "weight_decay": cfg.weight_decay})
        groups.append({"params": [fc.bias], "lr_scale": rate, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    micro_batches = common.world_size() * cfg.accumulate
    most = len(x) // micro_batches * micro_batches       # few shots: no larger a batch than images
    cfg = replace(cfg, batch_size=min(cfg.batch_size, most))
    steps_per_epoch = common.plan_steps(cfg, len(x))
    name = f"evaluate, encoder {digest(encoder)}"
    run = common.Run(name, cfg, heads, optimizer, steps_per_epoch)
    common.log(f"{len(RATES)} learning rates at once: the loss is their mean (the largest may "
               "diverge); the best is chosen on held-out training images")
    network = distributed(heads)
    batches = data.BatchSampler(cfg, len(x), run.first_step, run.last_step)    # of rows of x

    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch, cfg.min_lr)
        step_loss = 0.0
        for i, keys in enumerate(micro_batches):
            rows = torch.tensor([row for _, row in keys])                      # (B,)
            if device.type == "cuda":
                rows = rows.pin_memory()                 # the host does not wait for the copy
            rows = rows.to(device, non_blocking=True)
            is_used = torch.ones(len(rows), 2, 1, device=device)
            is_used[held_out[rows], 0] = 0.0             # not for the layers that choose
            with common.sync_on_last(network, i, cfg.accumulate):
                logits = network(x[rows])                                      # (B, 2, rates, C)
                truth = y[rows].view(-1, 1, 1).expand(logits.shape[:3])        # (B, 2, rates)
                losses = F.cross_entropy(logits.flatten(0, 2), truth.flatten(), reduction="none")
                losses = losses.view(truth.shape) * is_used
                loss = losses.sum(dim=(1, 2)).mean()     # a sum: each layer learns as if alone
                (loss / cfg.accumulate).backward()
            step_loss += losses.detach().mean() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(step, step_loss, lr)

    best = choose_rate(heads, x[held_out], y[held_out])
    with torch.no_grad():
        logits = torch.cat([heads(rows)[:, 1, best] for rows in test_x.split(1000)])   # (n, C)
    peak_lr = cfg.base_lr * cfg.batch_size / 256
    return data.topk_accuracy(logits, test_y) | {"chosen_lr": peak_lr * RATES[best]}


class LinearHead(nn.Module):
    """MAE's probe: batch normalisation without weights, then a linear layer (appendix A.1).

    The normalisation makes the learning rate independent of the features' scale, and can be folded
    into the linear layer afterwards. Each process normalises its own batch, as released."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.fc = nn.Linear(width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):                                                      # (B, D)
        return self.fc(self.norm(x))                                           # (B, C)


class LARS(torch.optim.Optimizer):
    """SGD with momentum; a matrix's step is scaled to trust * |weight| / |gradient| (You et al.,
    arXiv 1708.03888). As MAE uses it: vectors take the plain step and are not decayed."""

    def __init__(self, params, lr=0.1, weight_decay=0.0, momentum=0.9, trust=0.001):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                change = p.grad
                if p.ndim > 1:
                    change = change + group["weight_decay"] * p
                    weight_norm = p.norm()
                    change_norm = change.norm()
                    scale = group["trust"] * weight_norm / change_norm
                    is_scaled = (weight_norm > 0) & (change_norm > 0)
                    change = change * torch.where(is_scaled, scale, 1.0)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(change)
                p.sub_(group["lr"] * momentum)


def linear_augmented(cfg: Config, encoder, device, splits) -> dict:
    """MAE's linear probe (--no-cached): each epoch encodes new crops with the frozen encoder."""
    if cfg.batch_size // (common.world_size() * cfg.accumulate) < 2:
        raise common.UserError("batch normalisation needs two images or more in a micro-batch; "
                               "raise --batch-size")
    splits.train.transform = data.augment(cfg.image_size, cfg.crop_scale)
    name = f"evaluate, encoder {digest(encoder)}"
    encoder.requires_grad_(False)
    if cfg.pooling.endswith("raw"):
        encoder.norm = nn.Identity()
    head = LinearHead(encoder.cls_token.shape[-1], len(splits.classes)).to(device)
    optimizer = LARS(head.parameters(), weight_decay=cfg.weight_decay)
    steps_per_epoch = common.plan_steps(cfg, len(splits.train))
    run = common.Run(name, cfg, head, optimizer, steps_per_epoch)
    common.log(f"{common.count_parameters(head):,} parameters are trained")
    if common.wants_compile(cfg, device):
        encoder.encode = torch.compile(encoder.encode)
    network = distributed(head)
    batches = data.batches(splits.train, cfg, run.first_step, run.last_step)

    def frozen_features(images):                                               # (B, 3, H, W)
        with torch.no_grad(), autocast(cfg, encoder, device):
            tokens = encoder.encode(images)                                    # (B, 1 + N, D)
        return pool_tokens(tokens, cfg.pooling).float()                        # (B, D)

    def classify(images):
        return head(frozen_features(images))

    def score():
        eval_mode(head)
        scores = accuracy(cfg, encoder, classify, splits.test, device)
        head.train()
        common.log(f"top-1 {scores['top1']:.2f} %")
        return scores

    head.train()
    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch, cfg.min_lr)
        step_loss = 0.0
        for i, (images, labels, _) in enumerate(micro_batches):
            x = frozen_features(data.to_device(images, device))                # (B, D)
            labels = labels.to(device, non_blocking=True)
            with common.sync_on_last(network, i, cfg.accumulate):
                loss = F.cross_entropy(network(x), labels)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(step, step_loss, lr, score)

    return run.scores or score()                         # score: cut short, or ended before


# -------------------------------------------------------------------------------------- fine-tune
class Classifier(nn.Module):
    """Encoder and classifier to be fine-tuned: images (B, 3, H, W) -> logits (B, C).

    pooling "mean": the mean of the patch tokens, then a new norm (fc_norm) in place of the
    encoder's; without new_norm, of the tokens after the encoder's norm. "cls": the class token
    after the encoder's norm. The first logits are all but zero (std 2e-5)."""

    def __init__(self, encoder, classes: int, pooling: str, new_norm: bool = True):
        super().__init__()
        self.encoder = encoder
        self.pooling = pooling
        width = encoder.cls_token.shape[-1]
        copy_relative_positions(encoder)
        if getattr(encoder, "pos_embed", None) is not None:
            encoder.pos_embed.requires_grad_(True)
        self.fc_norm = nn.Identity()
        if pooling == "mean" and new_norm:
            encoder.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        tokens = self.encoder.encode(images)                                   # (B, 1 + N, D)
        x = pool_tokens(tokens, self.pooling)                                  # (B, D)
        return self.head(self.fc_norm(x))                                      # (B, C)

    def save(self, path: Path, about: dict):
        """Write the weights, in the names of the released files, and how to build the encoder."""
        if common.rank() == 0:
            weights = {name.removeprefix("encoder."): value.cpu()
                       for name, value in self.state_dict().items()}
            common.save_atomic(about | {"pooling": self.pooling, "model": weights}, path)


def layer_decay_groups(model, weight_decay: float, decay: float) -> list[dict]:
    """Parameter groups with "lr_scale", the factor on their learning rate: 1 for the head and norms
    after the blocks, `decay` for the last block, ... decay^(depth + 1) for what is below the first.

    Vectors, positions and the class token are not decayed (MAE, released code)."""
    depth = len(model.encoder.blocks)
    below = ("cls_token", "pos_embed", "patch_embed")
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, *rest = name.removeprefix("encoder.").split(".")
        layer = depth + 1
        if part in below:
            layer = 0
        elif part == "blocks":
            layer = int(rest[0]) + 1
        is_decayed = parameter.ndim > 1 and part not in ("cls_token", "pos_embed")
        group = {"params": [], "weight_decay": weight_decay if is_decayed else 0.0,
                 "lr_scale": decay ** (depth + 1 - layer)}
        groups.setdefault((layer, is_decayed), group)["params"].append(parameter)
    return list(groups.values())


@torch.no_grad()
def update_average(average, model, decay: float):
    """average = decay * average + (1 - decay) * model, for all parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers()):
        ours.copy_(theirs)


class Erase:
    """Random erasing of "pixel" kind: with a probability, a rectangle becomes normal noise.

    The noise is that of the normalised image; as images stay uint8 until they are on the device,
    it is cut where black and white are, about two standard deviations from the mean."""

    def __init__(self, probability: float):
        self.probability = probability
        self.erase = v2.RandomErasing(p=1.0, value="random")

    def __call__(self, image):
        if torch.rand(()) >= self.probability:
            return image
        mean, std = data.mean_std("cpu")
        erased = self.erase((image / 255 - mean) / std) * std + mean
        return (255 * erased).round().clamp(0, 255).byte()


def eval_mode(model):
    """For scoring: nothing is dropped, and batch normalisation has the first process's averages."""
    model.eval()
    if common.world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    return model


def accuracy(cfg: Config, encoder, classify, dataset, device) -> dict:
    """Top-1 and top-5 in percent of classify: images (B, 3, H, W) -> logits (B, C), on centers."""
    def logits(images):
        with autocast(cfg, encoder, device):
            return classify(images)

    table, labels = data.features(logits, dataset, cfg.image_size, device, workers=cfg.workers)
    return data.topk_accuracy(table, labels)


def distributed(model):
    """The model, or with several processes the wrapper that averages gradients over them."""
    if common.world_size() > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def finetune(cfg: Config, encoder, device, splits, about: dict) -> dict:
    """Train encoder and classifier end to end; write finetuned.pt, with --ema finetuned-ema.pt.

    MAE's way is a new norm after the mean. A classifier of supmim.py has learned with the encoder's
    norm before the mean, and keeps it."""
    has_norm = not isinstance(encoder.norm, nn.Identity)
    if cfg.pooling == "cls" and not has_norm:
        raise common.UserError(f"{cfg.checkpoint} averages tokens and has no norm for the class "
                               "token: --pooling mean")
    transform = [data.augment(cfg.image_size, cfg.crop_scale, randaugment=cfg.randaugment)]
    if cfg.erasing:
        transform.append(Erase(cfg.erasing))
    splits.train.transform = v2.Compose(transform)
    name = f"evaluate, encoder {digest(encoder)}"
    new_norm = about["method"] != "supmim" or not has_norm
    model = Classifier(encoder, len(splits.classes), cfg.pooling, new_norm)
    common.add_drop_path(encoder.blocks, cfg.drop_path)
    model.to(device)
    trained = nn.ModuleList([model])
    if cfg.ema:
        average = copy.deepcopy(model).requires_grad_(False)
        trained.append(average)
    groups = layer_decay_groups(model, cfg.weight_decay, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(splits.train))
    run = common.Run(name, cfg, trained, optimizer, steps_per_epoch)
    common.log(f"{common.count_parameters(model):,} parameters are trained")
    if common.wants_compile(cfg, device):
        model.compile()
    network = distributed(model)
    mix = data.mixing(cfg.mixup, cfg.cutmix, len(splits.classes))
    batches = data.batches(splits.train, cfg, run.first_step, run.last_step)

    def score():
        scores = accuracy(cfg, encoder, eval_mode(model), splits.test, device)
        model.train()
        if cfg.ema:
            of_average = accuracy(cfg, encoder, eval_mode(average), splits.test, device)
            scores |= {f"ema_{name}": value for name, value in of_average.items()}
        common.log(", ".join(f"{name} {value:.2f} %" for name, value in scores.items()))
        return scores

    model.train()
    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch, cfg.min_lr)
        step_loss = 0.0
        for i, (images, labels, _) in enumerate(micro_batches):
            # of mixing and drop path; each process draws its own
            torch.manual_seed(common.derive_seed(cfg.seed, step, i, common.rank()))
            images = data.to_device(images, device)
            images, labels = mix(images, labels.to(device, non_blocking=True))
            with common.sync_on_last(network, i, cfg.accumulate):
                with autocast(cfg, encoder, device):
                    logits = network(images)                                   # (B, C)
                loss = F.cross_entropy(logits.float(), labels, label_smoothing=cfg.smoothing)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        if cfg.ema:
            update_average(average, model, cfg.ema)
        run.end_step(step, step_loss, lr, score)

    scores = run.scores or score()                       # score: cut short, or ended before
    model.save(run.folder / "finetuned.pt", about)
    if cfg.ema:
        average.save(run.folder / "finetuned-ema.pt", about)
    return scores


def score_classifier(cfg: Config, encoder, device, splits, left_out: dict, about: dict) -> dict:
    """`finetune --eval`: score the classifier in the checkpoint, as it was trained. left_out: what
    is in the file besides the encoder."""
    classes = len(splits.classes)
    weights = {name: value for name, value in left_out.items()
               if name.startswith(("head.", "fc_norm."))}
    model = Classifier(encoder, classes, about["pooling"], new_norm="fc_norm.weight" in weights)
    wanted = {name: value.shape for name, value in model.state_dict().items()
              if not name.startswith("encoder.")}
    if wanted != {name: value.shape for name, value in weights.items()}:
        raise common.UserError(f"{cfg.checkpoint} has no classifier of {classes} classes")
    model.load_state_dict(weights, strict=False)
    return accuracy(cfg, encoder, eval_mode(model.to(device)), splits.test, device)


# ---------------------------------------------------------------------------------------- segment
class MaskedImages(data.ImageDataset):
    """Images with a class for each pixel; an item is ((image uint8 (3, H, W), classes uint8
    (H, W)), -1, index).

    masks: uint8 tensor (n, H, W) of classes from 0; or files of one byte a pixel, where 0 is
    unlabelled and the classes count from 1, as ADE20K's."""

    def __init__(self, source, masks, classes: int, seed=0):
        super().__init__(source, None, seed)
        self.masks = masks
        self.classes = classes

    def read_mask(self, index: int) -> torch.Tensor:
        """Classes uint8 (H, W). Raises OSError if they cannot be read or are something else."""
        if torch.is_tensor(self.masks):
            return self.masks[index]
        if not Path(self.masks[index]).is_file():        # a named pipe would never end
            raise OSError("mask: no such file, or not a regular one")
        try:
            with Image.open(self.masks[index], formats=data.FORMATS) as image:
                mask = torch.from_numpy(np.array(image))
        except Exception as error:                       # a damaged file can raise nearly anything
            raise OSError(f"mask: {common.first_line(error)}") from error
        if mask.ndim != 2 or mask.dtype != torch.uint8:
            raise OSError(f"mask is {mask.dtype} {tuple(mask.shape)}, not one byte a pixel")
        mask = mask - 1                                  # 0 becomes IGNORE: bytes wrap around
        if ((mask >= self.classes) & (mask != IGNORE)).any():
            raise OSError(f"mask holds more than {self.classes} classes")
        return mask

    def read(self, index):
        image = super().read(index)
        mask = self.read_mask(index)
        if mask.shape != image.shape[1:]:
            raise OSError(f"mask has {tuple(mask.shape)} pixels")
        return tv_tensors.Image(image), tv_tensors.Mask(mask)    # transformed together


def open_masked_images(cfg: Config) -> tuple[MaskedImages, MaskedImages]:
    """Training and test images of shapes or ade20k. Raises UserError if there are none."""
    if cfg.data == "shapes":
        return masked_shapes("train", 10_000, cfg.seed), masked_shapes("test", 2_000, cfg.seed)
    if cfg.data != "ade20k":
        raise common.UserError("segment is for --data shapes and ade20k; for other masks edit "
                               "open_masked_images")
    folder = Path(cfg.data_root, "ADEChallengeData2016")
    splits = []
    for part in ("training", "validation"):
        masks = sorted((folder / "annotations" / part).glob("*.png"))
        if not masks:
            raise common.UserError(f"no masks in {folder}/annotations/{part}; --data-root says "
                                   "where ADEChallengeData2016 is")
        images = [folder / "images" / part / f"{mask.stem}.jpg" for mask in masks]
        splits.append(MaskedImages(images, masks, ADE_CLASSES, cfg.seed))
    train, test = splits
    common.log(f"{folder}: {len(train)} images to train on, {len(test)} to test on")
    return train, test


def masked_shapes(split: str, count: int, seed: int) -> MaskedImages:
    """The synthetic shapes with a class for each pixel: 0 the ground, 1 to 8 the shapes."""
    shapes = data.synthetic_shapes(split, np.arange(count))
    masks = shapes["mask"] * (shapes["shape"] + 1)[:, None, None]              # (count, 32, 32)
    images = torch.from_numpy(shapes["image"])
    return MaskedImages(images, torch.from_numpy(masks).byte(), 1 + len(data.SHAPES), seed)


class Segmenter(nn.Module):
    """Batch normalisation and a 1x1 convolution on the map of patch tokens, enlarged to the input:
    images (B, 3, H, W) -> logits (B, C, H, W). DINOv2's linear head."""

    def __init__(self, encoder, classes: int):
        super().__init__()
        self.encoder = encoder
        width = encoder.cls_token.shape[-1]
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1))

    def forward(self, images):
        tokens = self.encoder.encode(images)[:, 1:]                            # (B, N, D)
        maps = tokens.transpose(1, 2).unflatten(2, self.encoder.grid)          # (B, D, h, w)
        logits = self.head(maps.float())                                       # (B, C, h, w)
        return F.interpolate(logits, images.shape[-2:], mode="bilinear")       # (B, C, H, W)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along `size` pixels: every `stride`, the last one flush with the end."""
    return [min(start, size - window) for start in range(0, size - window + stride, stride)]


def slide(model, images, window: int, classes: int):
    """Logits (B, C, H, W) of images (B, 3, H, W), sides >= window: the mean of the overlapping
    windows, each two thirds of its side from the last (DINOv2: 341 of 512)."""
    B, _, H, W = images.shape
    stride = max(1, window * 2 // 3)
    total = images.new_zeros(B, classes, H, W)
    count = images.new_zeros(1, 1, H, W)
    for top in window_starts(H, window, stride):
        for left in window_starts(W, window, stride):
            place = (..., slice(top, top + window), slice(left, left + window))
            total[place] += model(images[place]).float()
            count[place] += 1
    return total / count


def predict_classes(cfg: Config, model, images, size, classes: int, device):
    """uint8 images (B, 3, H, W) -> predicted classes (B, *size). The shorter side is resized to the
    window of `slide`, and the logits to `size`."""
    images = v2.functional.resize(images, [cfg.image_size], data.BICUBIC)
    images = data.to_device(images, device)
    with autocast(cfg, model.encoder, device):
        logits = slide(model, images, cfg.image_size, classes)                 # (B, C, H', W')
    return F.interpolate(logits, size, mode="bilinear").argmax(dim=1)


def confusion(truth, prediction, classes: int):
    """Pixels by (true class, predicted class), int64 (C, C); those of truth IGNORE do not count."""
    counted = truth != IGNORE
    pairs = truth[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def mean_iou(counts) -> float:
    """Mean intersection over union, in percent, over the classes that occur at all in (C, C)."""
    intersection = counts.diag()                                               # (C,)
    union = counts.sum(dim=0) + counts.sum(dim=1) - intersection
    occurs = union > 0
    return 100 * (intersection[occurs] / union[occurs]).mean().item()


@torch.no_grad()
def count_pixels(cfg: Config, model, dataset: MaskedImages, device):
    """The confusion (C, C) of the whole data set, at the masks' own sizes. Each process takes its
    share; unreadable images are left out."""
    eval_mode(model)
    classes = dataset.classes
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    share = range(common.rank(), len(dataset), common.world_size())
    size = 100 if torch.is_tensor(dataset.source) else 1                       # files: any shape
    keys = [[(0, index) for index in share[i:i + size]] for i in range(0, len(share), size)]
    loaded = tqdm(data.loader(dataset, keys, cfg.workers), "segmentation", len(keys), leave=False,
                  disable=None if common.rank() == 0 else True)
    for wanted, ((images, masks), _, index) in zip(keys, loaded):
        if index.tolist() == [i for _, i in wanted]:     # else another image stands in
            prediction = predict_classes(cfg, model, images, masks.shape[-2:], classes, device)
            counts += confusion(masks.to(device), prediction, classes)
    if common.world_size() > 1:
        dist.all_reduce(counts)
    return counts


def segment(cfg: Config, encoder, device) -> dict:
    """Train a linear head on the map of patch tokens: mean intersection over union and accuracy of
    the pixels, in percent."""
    train, test = open_masked_images(cfg)
    classes = train.classes
    crop = [v2.Resize(cfg.image_size, data.BICUBIC), v2.CenterCrop(cfg.image_size)]
    if cfg.crop_scale < 1:
        crop = [v2.RandomResizedCrop(cfg.image_size, (cfg.crop_scale, 1.0),
                                     interpolation=data.BICUBIC)]
    train.transform = v2.Compose([*crop, v2.RandomHorizontalFlip()])
    name = f"evaluate, encoder {digest(encoder)}"
    model = Segmenter(encoder.requires_grad_(False), classes).to(device)
    groups = common.parameter_groups(model.head, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, cfg.beta2), fused=True)
    steps_per_epoch = common.plan_steps(cfg, len(train))
    run = common.Run(name, cfg, model.head, optimizer, steps_per_epoch)
    common.log(f"{common.count_parameters(model):,} parameters are trained")
    if common.wants_compile(cfg, device):
        model.compile()
    network = distributed(model)
    batches = data.batches(train, cfg, run.first_step, run.last_step)

    model.train()
    for step, micro_batches in run.steps(batches):
        lr = common.set_lr(optimizer, cfg, step, steps_per_epoch, cfg.min_lr, "linear")
        step_loss = 0.0
        for i, ((images, masks), _, _) in enumerate(micro_batches):
            images = data.to_device(images, device)
            masks = masks.to(device, non_blocking=True).long()                 # (B, H, W)
            with common.sync_on_last(network, i, cfg.accumulate):
                with autocast(cfg, encoder, device):
                    logits = network(images)                                   # (B, C, H, W)
                loss = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
                loss = loss / (masks != IGNORE).sum().clamp(min=1)
                (loss / cfg.accumulate).backward()
            step_loss += loss.detach() / cfg.accumulate
        optimizer.step()
        optimizer.zero_grad()
        run.end_step(step, step_loss, lr)

    counts = count_pixels(cfg, model, test, device)
    if common.rank() == 0:
        save_visualization(cfg, model, test, device, run.folder / "segmentation.png")
    correct = counts.diag().sum() / counts.sum()
    return {"miou": mean_iou(counts), "pixels": 100 * correct.item()}


@torch.no_grad()
def save_visualization(cfg: Config, model, dataset: MaskedImages, device, path: Path):
    """Write eight images, their true and their predicted classes in colors."""
    colors = torch.from_numpy(np.random.RandomState(1).randint(40, 256, (256, 3))) / 255
    colors[0] = 0.1
    colors[IGNORE] = 1.0
    crop = data.CenterCrop(cfg.image_size)
    mean, std = data.mean_std("cpu")
    rows = {"image": [], "truth": [], "prediction": []}
    for index in np.linspace(0, len(dataset) - 1, 8).astype(int):
        (image, mask), _, _ = dataset[0, index]
        prediction = predict_classes(cfg, model, image.unsqueeze(0), mask.shape, dataset.classes,
                                     device)
        rows["image"].append(data.to_device(crop(image), "cpu"))
        for name, labels in (("truth", mask), ("prediction", prediction[0].cpu())):
            colored = colors[labels.long()].permute(2, 0, 1)                   # (3, H, W)
            rows[name].append(crop((colored - mean) / std))
    data.save_image_grid(path, {name: torch.stack(images) for name, images in rows.items()})


# ------------------------------------------------------------------------------------------- main
def evaluate(cfg: Config) -> dict:
    """Run one protocol; returns the last line of metrics.jsonl."""
    device = common.init_distributed(cfg)
    encoder, left_out, about = load_encoder(cfg)
    cfg = replace(cfg, image_size=about["config"]["image_size"])
    splits = None
    if cfg.protocol != "segment":
        splits = data.open_data(cfg.data, cfg.data_root, cfg.seed)
    if cfg.protocol not in ("segment", "features"):
        if splits.test is None:
            raise common.UserError(f"{cfg.data} has no labelled images to train and test on")
        train = data.subset(splits.train, cfg.shots, cfg.percent, cfg.seed)
        splits = splits._replace(train=train)
    torch.manual_seed(cfg.seed)                          # building the encoder took another seed
    encoder.to(device).eval()
    common.log(f"encoder of {about['method']}.py: "
               f"{sum(p.numel() for p in encoder.parameters()):,} parameters, "
               f"{about['config']['num_heads']} heads, input {cfg.image_size} pixels, "
               f"{encoder.grid[0] * encoder.grid[1]} patches")
    if common.rank() == 0:
        with common.writing_to(cfg.output):
            Path(cfg.output).mkdir(parents=True, exist_ok=True)

    if cfg.protocol == "knn":
        result = knn(cfg, encoder, device, splits)
    elif cfg.protocol == "linear" and cfg.cached:
        result = linear(cfg, encoder, device, splits)
    elif cfg.protocol == "linear":
        result = linear_augmented(cfg, encoder, device, splits)
    elif cfg.protocol == "finetune" and cfg.eval:
        result = score_classifier(cfg, encoder, device, splits, left_out, about)
    elif cfg.protocol == "finetune":
        result = finetune(cfg, encoder, device, splits, about)
    elif cfg.protocol == "segment":
        result = segment(cfg, encoder, device)
    else:
        result = save_features(cfg, encoder, device, splits)

    result = {"protocol": cfg.protocol, "checkpoint": cfg.checkpoint, "data": cfg.data} | result
    common.append_metrics(Path(cfg.output), **result)
    shown = ("top1", "top5", "ema_top1", "miou", "pixels")
    figures = [f"{name} {result[name]:.1f} %" for name in shown if name in result]
    if figures:
        common.log(f"{cfg.protocol}, {cfg.checkpoint}, {cfg.data}: {', '.join(figures)}")
    return result


def main(argv=None) -> dict:
    with common.command_line():
        argv = list(sys.argv[1:] if argv is None else argv)
        if any(word.startswith("--protocol") for word in argv):
            raise common.UserError("the protocol is the first word: python evaluate.py linear ...")
        protocol = "knn"
        if argv and not argv[0].startswith("-"):
            protocol = argv.pop(0)
        if protocol not in PRESETS:
            raise common.UserError(f"no protocol {protocol}; there are {', '.join(PRESETS)}")
        argv = ["--protocol", protocol, *argv]
        return evaluate(common.parse_config(Config, PRESETS[protocol], argv, __doc__))


if __name__ == "__main__":
    main()
