"""How fast is it? Ours beside the libraries of the field, on one device.

    python tests/measure/benchmark.py train --method all --one-at-a-time --rounds 3 --batch 8
    python tests/measure/benchmark.py data
    python tests/measure/benchmark.py morph
    python tests/measure/benchmark.py hours

train   One optimizer step, fused AdamW for all, with ViT-B/16 on images of 224 pixels (--model for
        other sizes). Each contestant of CONTESTANTS has a process of its own, and they take turns.
        Printed: images/s; the ratio to the first contestant's, the median over the rounds; the
        FLOPs of an image; FLOP/s as a share of what a large matrix product reaches just before and
        after the step; peak memory. Ours begin as the scripts do, with `common.keep_freed_memory`.
data    Images/s of one core that decodes, crops and changes JPEGs, beside the usual Pillow loader.
morph   DTM's matching, and its loss with gradient, beside the same written with dense matrices
        (B, n, N), which say which group a token is in.
hours   Computed, not measured: how long the papers' recipes take on eight GPUs of --tflops each,
        and how many cores have to decode for them, by the rates of CORE.

The peers, which nothing else needs, are left out where they are not installed:
pip install transformers timm vit-pytorch open_clip_torch
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import amt
import common
import data
import dtm
import flip
import mae
import maskdistill
import supmim

PEERS = {                                                # how contestants' names start: package
    "timm": "timm",
    "transformers": "transformers",
    "vit-pytorch": "vit_pytorch",
    "open_clip": "open_clip",
}
DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
JPEGS = 128                                              # images of `data`
IMAGENET = 1_281_167                                     # images of an epoch
CORE = {                                                 # images/s that `data` gave for one core
    "decode": 461,                                       # and crop
    "decode shrunk": 799,
    "color_jitter": 1443,                                # alone
    "randaugment": 600,
}


# ------------------------------------------------------------------------------------ contestants
# Each function takes the name of a size in SIZES and returns a model, with all parameters that are
# moved to the device and trained, and its loss, a function of normalised images (B, 3, 224, 224).
def our_mae(size: str):
    model = mae.MAE(224, 16, *mae.SIZES[size], **DECODER)

    def loss(images):
        return model(images)[0]

    return model, loss


def timm_blocks(size: str):
    """Our MAE with timm's transformer blocks in place of ours."""
    from timm.models.vision_transformer import Block
    model, loss = our_mae(size)
    width, _, heads = mae.SIZES[size]
    decoder_width = DECODER["decoder_embed_dim"]
    decoder_heads = DECODER["decoder_num_heads"]
    model.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in model.blocks)
    model.decoder_blocks = nn.ModuleList(Block(decoder_width, decoder_heads, qkv_bias=True)
                                         for _ in model.decoder_blocks)
    return model, loss


def transformers_mae(size: str):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    width, depth, heads = mae.SIZES[size]
    config = ViTMAEConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                          intermediate_size=4 * width, norm_pix_loss=True)
    model = ViTMAEForPreTraining(config)

    def loss(images):
        return model(pixel_values=images).loss

    return model, loss


def vit_pytorch_mae(size: str):
    """No class token, raw pixels and learned positions: a little less work than the others."""
    from vit_pytorch import MAE, ViT
    width, depth, heads = mae.SIZES[size]
    vit = ViT(image_size=224, patch_size=16, num_classes=1, dim=width, depth=depth, heads=heads,
              mlp_dim=4 * width, pool="mean")
    model = MAE(encoder=vit, masking_ratio=0.75, decoder_dim=512, decoder_depth=8,
                decoder_heads=16, decoder_dim_head=32)
    return model, model


def our_student(size: str):
    """MaskDistill, with an untrained teacher of the size and architecture of CLIP's."""
    width, depth, heads = mae.SIZES[size]
    vit = maskdistill.VisionTransformer(224, 16, width, depth, heads, clip=True)
    teacher = maskdistill.Teacher(vit, maskdistill.CLIP_MEAN, maskdistill.CLIP_STD)
    model = maskdistill.MaskDistill(224, 16, width, depth, heads, width)
    model.teacher = teacher                              # a part, to be moved to the device with it

    def loss(images):
        with torch.no_grad():
            features = teacher(images)                                         # (B, N, D)
        return model(images, features)[0]

    return model, loss


class BeitStudent(nn.Module):
    """MaskDistill of transformers' parts: BEiT with mask tokens and one table of relative
    positions, CLIP as its frozen teacher; masks and loss are ours."""

    def __init__(self, width, depth, heads):
        from transformers import BeitConfig, BeitModel, CLIPVisionConfig, CLIPVisionModel
        super().__init__()
        shape = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                     intermediate_size=4 * width, image_size=224, patch_size=16)
        beit = BeitConfig(**shape, use_mask_token=True, use_shared_relative_position_bias=True,
                          drop_path_rate=0.0)
        self.beit = BeitModel(beit, add_pooling_layer=False)
        self.clip = CLIPVisionModel(CLIPVisionConfig(**shape)).requires_grad_(False)
        self.head = nn.Linear(width, width)

    def forward(self, images):
        B = images.shape[0]
        noise = torch.rand(B, 4 * 20 + 196, device=images.device)
        _, masked = maskdistill.block_masking(noise, (14, 14), 78, 16)         # (B, M)
        is_masked = torch.zeros(B, 196, dtype=torch.bool, device=images.device)
        is_masked.scatter_(1, masked, True)
        tokens = self.beit(images, bool_masked_pos=is_masked).last_hidden_state[:, 1:]
        with torch.no_grad():
            features = self.clip(images).last_hidden_state[:, 1:]              # (B, N, D)
            features = maskdistill.gather_tokens(features, masked).float()     # (B, M, D)
            target = F.layer_norm(features, features.shape[-1:])
        prediction = self.head(maskdistill.gather_tokens(tokens, masked))      # (B, M, D)
        return F.smooth_l1_loss(prediction.float(), target)


def transformers_student(size: str):
    model = BeitStudent(*mae.SIZES[size])
    return model, model


def our_morphing(size: str, morphs=2):
    """DTM with that teacher and other schedules in each step. morphs=0: token by token."""
    width, depth, heads = mae.SIZES[size]
    vit = dtm.VisionTransformer(224, 16, width, depth, heads, clip=True)
    teacher = dtm.Teacher(vit, dtm.CLIP_MEAN, dtm.CLIP_STD)
    model = dtm.DTM(224, 16, width, depth, heads, width)
    model.teacher = teacher
    cfg = dtm.Config(morphs=morphs, most_rounds=14)
    steps = itertools.count()

    def loss(images):
        with torch.no_grad():
            features = teacher(images)                                         # (B, N, D)
        schedules = dtm.draw_schedules(cfg, 196, next(steps))
        return model(images, features, schedules=schedules)[0]

    return model, loss


def captions(images, length=77):
    """A caption of 12 words for each image, as ids (B, length) of CLIP's vocabulary: the start,
    the words, the end, zeros."""
    ids = torch.randint(1, 49406, (images.shape[0], length), device=images.device)
    ids[:, 0] = 49406
    ids[:, 13] = 49407
    ids[:, 14:] = 0
    return ids


def our_pairs(size: str, mask_ratio: float, length=77):
    """FLIP, both towers, with CLIP's 49,408 ids."""
    model = flip.FLIP(224, 16, *flip.SIZES[size], 49408, length, mask_ratio=mask_ratio)

    def loss(images):
        return model(images, captions(images, length))[0]

    return model, loss


def open_clip_pairs(size: str, mask_ratio: float):
    """CLIP with patch dropout. Sizes small to huge: open_clip has no tiny ViT."""
    import open_clip
    model = open_clip.create_model(f"ViT-{size[0].upper()}-16", force_patch_dropout=mask_ratio)
    contrastive_loss = open_clip.ClipLoss()

    def loss(images):
        image, text, scale = model(images, captions(images))
        return contrastive_loss(image, text, scale)

    return model, loss


def our_attention(size: str):
    """AMT on MAE, 45 % masked and 40 % thrown, by other maps and crops in each step."""
    model = amt.AMT(224, 16, *mae.SIZES[size], **DECODER)

    def loss(images):
        B = images.shape[0]
        boxes = torch.tensor([0.1, 0.2, 0.6, 0.7, 1.0], device=images.device).expand(B, -1)
        maps = torch.rand(B, 196, device=images.device)
        return model(images, amt.crop_maps(maps, boxes, (14, 14)))[0]

    return model, loss


def dense_attention(size: str):
    """The same with boolean masks, as one would write it at first: all patches are embedded, then
    some dropped, and all decoder tokens predicted; the loss of those not masked counts zero."""
    model = amt.AMT(224, 16, *mae.SIZES[size], **DECODER)
    masked, thrown = amt.count_units(196, *model.ratios, "mae")

    def loss(images):
        B = images.shape[0]
        patches = amt.patchify(images, 16)                                     # (B, N, P*P*C)
        order = torch.multinomial(torch.rand(B, 196, device=images.device), 196)
        kind = torch.zeros(B, 196, device=images.device)         # 0 visible, 1 masked, 2 thrown
        kind.scatter_(1, order[:, :masked], 1.0)
        kind.scatter_(1, order[:, masked:masked + thrown], 2.0)
        stays = kind < 2

        x = model.patch_embed(patches) + model.pos_embed[:, 1:]                # (B, N, D)
        x = x[kind == 0].view(B, -1, x.shape[2])                               # (B, K, D)
        cls = (model.cls_token + model.pos_embed[:, :1]).expand(B, -1, -1)     # (B, 1, D)
        x = torch.cat([cls, x], dim=1)                                         # (B, 1 + K, D)
        for block in model.blocks:
            x = block(x)
        latent = model.decoder_embed(model.norm(x))                            # (B, 1 + K, E)

        tokens = model.mask_token.repeat(B, 196, 1)                            # (B, N, E)
        tokens[kind == 0] = latent[:, 1:].flatten(0, 1)
        tokens = tokens + model.decoder_pos_embed[:, 1:]
        tokens = tokens[stays].view(B, 196 - thrown, -1)                       # (B, K + M, E)
        cls = latent[:, :1] + model.decoder_pos_embed[:, :1]                   # (B, 1, E)
        x = torch.cat([cls, tokens], dim=1)                                    # (B, 1 + K + M, E)
        for block in model.decoder_blocks:
            x = block(x)
        prediction = model.decoder_pred(model.decoder_norm(x[:, 1:]))          # (B, K + M, P*P*C)

        target = patches[stays].view(B, 196 - thrown, -1)                      # (B, K + M, P*P*C)
        weight = kind[stays].view(B, -1)                                       # (B, K + M)
        error = (prediction.float() - target).square().mean(dim=2)             # (B, K + M)
        return (error * weight).sum() / weight.sum()

    return model, loss


def our_maps(size: str):
    """A refresh of AMT's maps: one forward pass, no gradient."""
    model = amt.AMT(224, 16, *mae.SIZES[size], **DECODER)

    @torch.no_grad()
    def loss(images):
        return amt.attention_map(model, images).sum()

    return model, loss


def our_classifier(size: str, patch=14, mim_weight=1.0):
    """SupMIM, half of the patches masked, a decoder of 2 blocks of half ViT-B's width.
    mim_weight=0: without the masked pass."""
    model = supmim.SupMIM(224, patch, *mae.SIZES[size], 384, 2, 6, mim_weight=mim_weight)

    def loss(images):
        labels = torch.arange(images.shape[0], device=images.device)
        return model(images, labels)[0]

    return model, loss


CONTESTANTS = {
    "mae": {
        "ours": our_mae,
        "timm blocks": timm_blocks,
        "transformers": transformers_mae,
        "vit-pytorch": vit_pytorch_mae,
    },
    "maskdistill": {
        "ours": our_student,
        "transformers": transformers_student,
    },
    "dtm": {
        "ours": our_morphing,
        "no morphing": partial(our_morphing, morphs=0),
    },
    "flip": {
        "ours, 0% masked": partial(our_pairs, mask_ratio=0.0),
        "open_clip, 0% masked": partial(open_clip_pairs, mask_ratio=0.0),
        "ours, 50% masked": partial(our_pairs, mask_ratio=0.5),
        "open_clip, 50% masked": partial(open_clip_pairs, mask_ratio=0.5),
        "ours, 75% masked": partial(our_pairs, mask_ratio=0.75),
        "open_clip, 75% masked": partial(open_clip_pairs, mask_ratio=0.75),
    },
    "amt": {
        "ours": our_attention,
        "plain MAE": our_mae,
        "dense AMT": dense_attention,
        "maps": our_maps,
    },
    "supmim": {
        "ours": our_classifier,
        "no masked pass": partial(our_classifier, mim_weight=0.0),
    },
    "all": {                                             # SupMIM's patches are of 16 pixels, too
        "ours (MAE)": our_mae,
        "timm blocks (MAE)": timm_blocks,
        "transformers (MAE)": transformers_mae,
        "vit-pytorch (MAE)": vit_pytorch_mae,
        "ours (MaskDistill)": our_student,
        "transformers (MaskDistill)": transformers_student,
        "ours (DTM)": our_morphing,
        "ours (FLIP)": partial(our_pairs, mask_ratio=0.5),
        "open_clip (FLIP)": partial(open_clip_pairs, mask_ratio=0.5),
        "ours (AMT)": our_attention,
        "ours (SupMIM)": partial(our_classifier, patch=16),
        "ours (supervised)": partial(our_classifier, patch=16, mim_weight=0.0),
    },
}


def installed_contestants(method: str) -> list[str]:
    """The names of a method's contestants; a line says which peers are left out, not installed."""
    names = list(CONTESTANTS[method])
    for peer, package in PEERS.items():
        concerned = [name for name in names if name.startswith(peer)]
        if concerned and importlib.util.find_spec(package) is None:
            print(f"{package} is not installed, left out: {', '.join(concerned)}")
            names = [name for name in names if name not in concerned]
    return names


class Contestant:
    """A model with its optimizer. args: method, model, precision, compile, device."""

    def __init__(self, name: str, args):
        self.device = args.device
        self.amp = torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16")
        if name.startswith("ours"):                      # also chooses the attention
            self.amp = common.autocast(torch.device(args.device), args.precision)
        self.model, self.loss = CONTESTANTS[args.method][name](args.model)
        self.model.to(args.device).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)
        if args.compile:
            self.model.compile()

    def step(self, images):
        with self.amp:
            loss = self.loss(images)
        if loss.requires_grad:                           # all but `our_maps`
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def flops(self, images) -> float:
        """FLOPs of a step for one image, without the optimizer's. Call it before anything is
        compiled."""
        total = count_flops(self.loss, images)
        self.optimizer.zero_grad()
        return total / len(images)


# ------------------------------------------------------------------------------------------ train
def count_flops(loss, images) -> int:
    """FLOPs of the loss and of its gradient: the model's, not what a fused kernel computes twice.

    Attention is written out for it, since torch's counter knows the fused kernels only of some
    devices and versions."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = loss(images)
        if result.requires_grad:
            result.backward()
    return counter.get_total_flops()


def clock(function, device: str, times=1) -> float:
    """Seconds of a call of the function, the mean over as many calls in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def serve(name: str, args, pipe):
    """The process of one contestant. It sends its FLOPs and the seconds of its first steps, then,
    for each number of steps that it receives, the seconds of one; for 0 its peak GiB, and ends."""
    if not name.startswith(tuple(PEERS)):
        common.keep_freed_memory()
    plain = vars(args) | {"compile": False, "precision": "fp32", "device": "cpu"}
    plain = argparse.Namespace(**plain)
    pipe.send(Contestant(name, plain).flops(torch.randn(2, 3, 224, 224)))
    contestant = Contestant(name, args)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    step = partial(contestant.step, images)
    pipe.send(clock(step, args.device, 2))
    while steps := pipe.recv():
        pipe.send(clock(step, args.device, steps))
    if args.device == "cuda":
        pipe.send(torch.cuda.max_memory_allocated() / 2 ** 30)
    else:
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)


class Worker:
    """A contestant's process, seen from outside. flops: of a step, for one image."""

    def __init__(self, name: str, args):
        self.pipe, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(name, args, theirs), daemon=True)
        process.start()
        theirs.close()                                   # so that `ask` fails if the process dies
        self.flops = self.pipe.recv()
        seconds = self.pipe.recv()
        print(f"{name}: first two steps {2 * seconds:.1f} s", flush=True)

    def ask(self, steps: int) -> float:
        """Seconds of one of so many steps. 0: its peak GiB, and the process ends."""
        self.pipe.send(steps)
        return self.pipe.recv()


@dataclass
class Measured:
    """Of one contestant: FLOPs of an image, peak GiB, and, a number each round, seconds of a step
    and its FLOP/s as a share of the matrix product's."""
    flops: float = 0.0
    peak: float = 0.0
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


def train(args):
    """Let the contestants take turns, and print a row for each."""
    n = 8192 if args.device == "cuda" else 4096
    steps = 20 if args.device == "cuda" else 1           # of a turn
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    matrix = torch.randn(n, n, device=args.device, dtype=dtype)

    def product() -> float:
        """FLOP/s of the matrix product."""
        return 2 * n ** 3 / clock(lambda: matrix @ matrix, args.device, steps)

    names = installed_contestants(args.method)
    workers = {}
    if not args.one_at_a_time:
        workers = {name: Worker(name, args) for name in names}
    results = {name: Measured() for name in names}
    rates = [product()]
    for turn in range(args.rounds):
        first = turn % len(names)                        # another one in each round
        for name in names[first:] + names[:first]:
            worker = workers.get(name) or Worker(name, args)
            result = results[name]
            before = product()                           # the machine's speed moves
            seconds = worker.ask(steps)
            after = product()
            rates += [before, after]
            result.flops = worker.flops
            result.seconds.append(seconds)
            result.shares.append(args.batch * worker.flops / seconds / ((before + after) / 2))
            if args.one_at_a_time or turn == args.rounds - 1:
                result.peak = worker.ask(0)

    mode = "compiled" if args.compile else "eager"
    rates = [rate / 1e9 for rate in rates]
    print(f"\n{args.method}, {args.model}, batch {args.batch}, {args.precision}, {mode}, "
          f"{args.rounds} rounds, {device_name(args.device)}, torch {torch.__version__}")
    print(f"{n}^3 matrix product: {statistics.median(rates):.0f} GFLOP/s "
          f"(median; {min(rates):.0f} to {max(rates):.0f})")
    print(f"{'':26}images/s  x first   GFLOP/image   share of the matrix product   peak GiB")
    for name, result in results.items():
        speed = args.batch / statistics.median(result.seconds)
        pairs = zip(results[names[0]].seconds, result.seconds)
        ratio = statistics.median(first / seconds for first, seconds in pairs)
        gflop = result.flops / 1e9
        share = 100 * statistics.median(result.shares)
        print(f"{name:26}{speed:8.2f}{ratio:9.2f}{gflop:14.2f}{share:14.0f} %{result.peak:26.2f}")
        write(args, method=args.method, contestant=name, images_per_s=speed, ratio=ratio,
              gflop_per_image=gflop, share_of_product=share, peak_gib=result.peak,
              product_gflops=statistics.median(rates), seconds=result.seconds, model=args.model,
              batch=args.batch, precision=args.precision, compile=args.compile)


def write(args, **line):
    """Add a line to --results, single numbers to four digits, with machine, torch and date."""
    if not args.results:
        return
    for key, value in line.items():
        if isinstance(value, float):
            line[key] = float(f"{value:.4g}")
    line["machine"] = device_name(args.device)
    line["torch"] = torch.__version__
    line["date"] = datetime.date.today().isoformat()
    with open(args.results, "a") as file:
        file.write(json.dumps(line) + "\n")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(": ")[1]
    return f"{name}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------- data
def draw_jpegs(folder: str) -> tuple[list[str], list[str]]:
    """Write JPEGs of 500 x 375 pixels, of smooth colors and fine grain so that they are as large
    as photographs, and the same shrunk to 256 pixels on the shorter side; the paths of both."""
    random = np.random.RandomState(0)
    whole = []
    shrunk = []
    for i in range(JPEGS):
        colors = random.randint(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(colors).resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + random.normal(0, 14, (375, 500, 3))
        whole.append(f"{folder}/{i}.jpg")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(whole[i], quality=90)
        small = Image.open(whole[i]).resize((341, 256), Image.Resampling.BICUBIC)
        shrunk.append(f"{folder}/small-{i}.jpg")
        small.save(shrunk[i], quality=90)
    return whole, shrunk


def time_loading(args, folder: str):
    whole, shrunk = draw_jpegs(folder)
    usual = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.MEAN, data.STD)])
    ours = data.ImageDataset(whole, transform=data.augment(224, 0.2))
    ours_shrunk = data.ImageDataset(shrunk, transform=data.augment(224, 0.2))
    crops = [ours[0, i][0] for i in range(JPEGS)]                              # uint8 (3, 224, 224)
    color_jitter = v2.ColorJitter(0.4, 0.4, 0.4)
    randaugment = data.augment(224, 1.0, randaugment=9).transforms[-1]
    jobs = {                                             # what is done with image i
        "Pillow, usual transforms": lambda i: usual(Image.open(whole[i]).convert("RGB")),
        "ours": lambda i: ours[args.rounds, i],
        "ours, shrunk once to 256": lambda i: ours_shrunk[args.rounds, i],
        "ours, decoding only": ours.read,
        "ColorJitter alone": lambda i: color_jitter(crops[i]),
        "RandAugment alone": lambda i: randaugment(crops[i]),
    }
    times = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            times[name].append(clock(lambda: [job(i) for i in range(JPEGS)], "cpu"))

    kilobytes = statistics.mean(Path(path).stat().st_size for path in whole) / 1e3
    kilobytes_shrunk = statistics.mean(Path(path).stat().st_size for path in shrunk) / 1e3
    print(f"{JPEGS} JPEGs, {kilobytes:.0f} kB on average, {kilobytes_shrunk:.0f} shrunk; "
          f"images/s on one core of {device_name('cpu')}")
    for name, seconds in times.items():
        speed = JPEGS / statistics.median(seconds)
        print(f"{name:26}{speed:8.0f}")
        write(args, method="data", contestant=name, images_per_s=speed, seconds=seconds,
              kilobytes=kilobytes_shrunk if "shrunk" in name else kilobytes)


def loading(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        time_loading(args, folder)


# ------------------------------------------------------------------------------------------ morph
def rows_of(x, index):
    """x (B, a, C), index (B, k) -> index (B, k, C), for gather and scatter_add along dim 1."""
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


def merge(x, stay, join, partner):
    """Rows x (B, n, C) -> (B, n - r, C): the even rows `stay` (B, a - r), then the odd ones, each
    with the even rows `join` (B, r) added whose `partner` (B, r) it is."""
    even = x[:, ::2]                                                           # (B, a, C)
    odd = x[:, 1::2]                                                           # (B, n - a, C)
    joining = even.gather(1, rows_of(x, join))                                 # (B, r, C)
    odd = odd.scatter_add(1, rows_of(x, partner), joining)
    return torch.cat([even.gather(1, rows_of(x, stay)), odd], dim=1)


def dense_match(tokens, rounds: list[int]):
    """The groups of `dtm.match` as matrices (B, n, N): tokens and matrices are merged alike."""
    B, N, _ = tokens.shape
    x = tokens                                                                 # (B, n, C)
    groups = torch.eye(N).expand(B, N, N)                                      # (B, n, N)
    for r in rounds:
        unit = x / x.norm(dim=-1, keepdim=True)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)              # (B, a, n - a)
        best, partner = similarity.max(dim=2)                                  # (B, a) each
        order = best.argsort(dim=1, descending=True)                           # (B, a)
        join = order[:, :r]                                                    # (B, r)
        stay = order[:, r:].sort(dim=1).values                                 # (B, a - r)
        partner = partner.gather(1, join)                                      # (B, r)
        x = merge(x, stay, join, partner)
        groups = merge(groups, stay, join, partner)
    return groups


def dense_loss(online, target, groups):
    """`dtm.morph_loss` with groups (B, n, N): one product takes the groups' means of tokens
    (B, N, C), another gives each token its group's."""
    mean = groups / groups.sum(dim=2, keepdim=True)                            # (B, n, N)
    back = groups.transpose(1, 2)                                              # (B, N, n)
    return F.smooth_l1_loss(back @ (mean @ online), back @ (mean @ target), beta=2.0)


def morph(args):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    online = torch.randn(args.batch, 196, 512, generator=generator).requires_grad_()
    target = torch.randn(args.batch, 196, 512, generator=generator)
    rounds = [14] * 7
    labels, n = dtm.match(target, rounds)
    groups = dense_match(target, rounds)
    ours = dtm.morph_loss(online, target, labels, n)
    dense = dense_loss(online, target, groups)
    assert abs(ours - dense) < 1e-5 * dense, (ours, dense)

    jobs = {
        "match": lambda: dtm.match(target, rounds),
        "match, dense": lambda: dense_match(target, rounds),
        "loss": lambda: dtm.morph_loss(online, target, labels, n).backward(),
        "loss, dense": lambda: dense_loss(online, target, groups).backward(),
    }
    times = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            times[name].append(clock(job, "cpu"))
    print(f"batch {args.batch}, 196 tokens of width 512, 7 rounds of 14; one thread of "
          f"{device_name('cpu')}; ms, median of {args.rounds}")
    for name, seconds in times.items():
        pairs = zip(seconds, times[name.removesuffix(", dense")])
        ratio = statistics.median(own / ours for own, ours in pairs)
        print(f"{name:14}{1e3 * statistics.median(seconds):8.1f}{ratio:8.2f} x ours")


# ------------------------------------------------------------------------------------------ hours
def count_gflop(make, size: str) -> float:
    """GFLOP of a step for one image."""
    _, loss = make(size)
    return count_flops(loss, torch.randn(2, 3, 224, 224)) / 2e9


def hours(args):
    """A row for each paper's recipe: its script's preset, and the FLOPs of a step of ours."""
    laion_pairs = partial(our_pairs, mask_ratio=0.5, length=32)
    recipes = {
        "mae.py": (mae.PRESETS["imagenet"], our_mae),
        "maskdistill.py": (maskdistill.PRESETS["imagenet"], our_student),
        "dtm.py": (dtm.PRESETS["imagenet"], our_morphing),
        "amt.py": (amt.PRESETS["imagenet"], our_attention),
        "supmim.py": (supmim.PRESETS["imagenet"], our_classifier),
        "flip.py --preset laion": (flip.PRESETS["laion"], laion_pairs),
    }
    print(f"eight GPUs at {args.tflops:.0f} TFLOP/s each; images/s of a core: {CORE['decode']} "
          f"decoded and cropped, {CORE['decode shrunk']} from shrunk JPEGs, "
          f"{CORE['color_jitter']} through ColorJitter, {CORE['randaugment']} through RandAugment")
    print(f"{'':24}images, millions   GFLOP/image   hours   images/s   cores   shrunk")
    gflops = 8e3 * args.tflops                           # GFLOP/s of the eight
    for name, (preset, make) in recipes.items():
        images = preset["epochs"] * preset.get("epoch_pairs", IMAGENET)
        work = count_gflop(make, args.model)
        total = images * work
        if name == "amt.py":                             # starts as MAE, and refreshes its maps
            plain_epochs = preset["attention_from"]
            refreshes = len(range(plain_epochs, preset["epochs"], preset["refresh_every"]))
            more = count_gflop(our_mae, args.model) - work
            total += IMAGENET * plain_epochs * more
            total += IMAGENET * refreshes * count_gflop(our_maps, args.model)
        speed = gflops / work
        colors = 0.0                                     # seconds of a core for an image
        for augmentation in ("color_jitter", "randaugment"):
            if preset.get(augmentation):
                colors += 1 / CORE[augmentation]
        cores = speed * (1 / CORE["decode"] + colors)
        cores_shrunk = speed * (1 / CORE["decode shrunk"] + colors)
        print(f"{name:24}{images / 1e6:18.0f}{work:16.1f}{total / gflops / 3600:8.1f}"
              f"{speed:11.0f}{cores:8.0f}{cores_shrunk:9.0f}")


# ------------------------------------------------------------------------------------------- main
def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "data", "morph", "hours"])
    parser.add_argument("--method", default="mae", choices=list(CONTESTANTS))
    parser.add_argument("--model", default="base", choices=list(mae.SIZES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--one-at-a-time", action="store_true",
                        help="a new process for every turn: memory for one contestant is enough")
    parser.add_argument("--tflops", type=float, default=400, help="that a GPU reaches, for `hours`")
    parser.add_argument("--results", help="file to which `train` and `data` add a JSON line each")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv=None):
    args = arguments(argv)
    parts = {"train": train, "data": loading, "morph": morph, "hours": hours}
    parts[args.what](args)


if __name__ == "__main__":
    main()
