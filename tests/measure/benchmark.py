"""How fast is it? Run by hand: `python tests/measure/benchmark.py train`, or `... batch`, `... data`, `... morph`, `... hours`, `... features`.

train   one optimiser step of MAE (ViT-B/16, 224 pixels, 75 % masked, decoder 8 x 512), or with --method
        maskdistill or dtm of a ViT-B/16 student and a teacher like CLIP's ViT-B/16, with --method flip of both of CLIP's
        towers at three mask ratios, with amt of AMT, plain MAE, AMT with data-dependent shapes, and the making of maps
        (forward only), with supmim of ViT-B/14 with and without the masked pass, or with all of all six, ours and the
        peers', each in a process of its own, taking turns on the same images; fused AdamW for all. Printed: images/s,
        the ratio to the first (median over the rounds), FLOP/s counted for each as a share of what a large
        matrix product reaches just before and after the step, and peak memory. Ours begins as its scripts do,
        with `common.keep_freed_memory`.
batch   the largest batch with which a step of FLIP fits into --memory GiB, at three mask ratios.
data    images/s on one core: decoding, cropping, and both on JPEGs of 256 pixels on the shorter
        side, beside the usual Pillow loader. --folder: real images; else it draws 500 x 375 ones.
morph   DTM's matching and its loss with gradient, alone, beside the dense formulation: matrices (B, n, N) that
        say which group a token is in, and multiply.
hours   computed, not measured: how long the papers' recipes take on eight GPUs that reach --tflops each, and how many
        cores must decode for them at the rates that `data` measures (--decode).
features  images/s of `evaluate.py`'s features of the test set of --folder by --checkpoint, reading
        included, and its share of what the encoder's forward pass reaches on images at hand.

Peers, none needed by the project itself: pip install transformers timm vit-pytorch open_clip_torch
"""

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import amt
import common
import data
import dtm
import evaluate
import flip
import mae
import maskdistill
import supmim

PEERS = ("timm", "transformers", "vit-pytorch", "open_clip")                   # how the names of contestants begin
DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)


def ours(size):
    return mae.MAE(224, 16, *mae.SIZES[size], **DECODER), lambda model, images: model(images)[0]


def timm_blocks(size):
    """Our MAE with timm's transformer blocks in place of ours."""
    from timm.models.vision_transformer import Block
    model, step = ours(size)
    width, _, heads = mae.SIZES[size]
    model.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in model.blocks)
    model.decoder_blocks = nn.ModuleList(Block(512, 16, qkv_bias=True) for _ in model.decoder_blocks)
    return model, step


def transformers(size):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    width, depth, heads = mae.SIZES[size]
    config = ViTMAEConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                          intermediate_size=4 * width, norm_pix_loss=True)
    return ViTMAEForPreTraining(config), lambda model, images: model(pixel_values=images).loss


def vit_pytorch(size):
    """No class token, raw pixels and learned positions: a little less work than the others."""
    from vit_pytorch import MAE, ViT
    width, depth, heads = mae.SIZES[size]
    vit = ViT(image_size=224, patch_size=16, num_classes=1, dim=width, depth=depth, heads=heads,
              mlp_dim=4 * width, pool="mean")
    model = MAE(encoder=vit, masking_ratio=0.75, decoder_dim=512, decoder_depth=8, decoder_heads=16,
                decoder_dim_head=32)
    return model, lambda model, images: model(images)


def our_student(size):
    """MaskDistill's student, and CLIP's architecture as its teacher, untrained; the teacher is counted, too."""
    width, depth, heads = mae.SIZES[size]
    vit = maskdistill.VisionTransformer(224, 16, width, depth, heads, clip=True)
    teacher = maskdistill.Teacher(vit, maskdistill.CLIP_MEAN, maskdistill.CLIP_STD)
    model = maskdistill.MaskDistill(224, 16, width, depth, heads, width)
    model.add_module("a teacher of its own", teacher)    # to travel with it; frozen

    def loss(model, images):
        with torch.no_grad():
            features = teacher(images)
        return model(images, features)[0]
    return model, loss


def transformers_student(size):
    """transformers' BEiT with mask tokens and one table of relative positions, its CLIP as the teacher."""
    from transformers import BeitConfig, BeitModel, CLIPVisionConfig, CLIPVisionModel
    width, depth, heads = mae.SIZES[size]
    same = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
                image_size=224, patch_size=16)
    beit = BeitModel(BeitConfig(**same, use_mask_token=True, use_shared_relative_position_bias=True, drop_path_rate=0.0),
                     add_pooling_layer=False)
    clip = CLIPVisionModel(CLIPVisionConfig(**same)).requires_grad_(False)
    model = nn.ModuleDict({"beit": beit, "clip": clip, "head": nn.Linear(width, width)})

    def loss(images):
        noise = torch.rand(len(images), 4 * 20 + 196, device=images.device)
        _, masked = maskdistill.block_masking(noise, (14, 14), 78, 16)
        mask = torch.zeros(len(images), 196, dtype=torch.bool, device=images.device).scatter_(1, masked, True)
        tokens = beit(images, bool_masked_pos=mask).last_hidden_state[:, 1:]
        with torch.no_grad():
            target = clip(images).last_hidden_state[:, 1:]
            target = F.layer_norm(maskdistill.gather_tokens(target, masked).float(), (width,))
        return F.smooth_l1_loss(model["head"](maskdistill.gather_tokens(tokens, masked)).float(), target)
    model.forward = loss
    return model, lambda model, images: model(images)


def our_morphing(size, morphs=2):
    """DTM with that teacher, a new schedule for each step; morphs 0: token by token."""
    width, depth, heads = mae.SIZES[size]
    vit = dtm.VisionTransformer(224, 16, width, depth, heads, clip=True)
    teacher = dtm.Teacher(vit, dtm.CLIP_MEAN, dtm.CLIP_STD)
    cfg = dtm.Config(morphs=morphs, most_rounds=14)
    steps = itertools.count()
    model = dtm.DTM(224, 16, width, depth, heads, width)
    model.add_module("a teacher of its own", teacher)

    def loss(model, images):
        with torch.no_grad():
            features = teacher(images)
        schedules = dtm.draw_schedules(cfg, 196, next(steps))
        return model(images, features, schedules=schedules)[0]
    return model, loss


def our_pairs(size, mask_ratio, length=77):
    """FLIP with 77 ids of 49,408, as open_clip has; captions are drawn anew for each step."""
    model = flip.FLIP(224, 16, *flip.SIZES[size], 49408, length, mask_ratio=mask_ratio)
    return model, lambda model, images: model(images, captions(images, length))[0]


def open_clip_pairs(size, mask_ratio):
    import open_clip
    model = open_clip.create_model(f"ViT-{size[0].upper()}-16", force_patch_dropout=mask_ratio)
    loss = open_clip.ClipLoss()
    return model, lambda model, images: loss(*model(images, captions(images)))


def our_attention(size):
    """AMT on MAE, 45 % masked and 40 % thrown, with maps and crops drawn anew for each step."""
    model = amt.AMT(224, 16, *mae.SIZES[size], **DECODER)

    def loss(model, images):
        B = len(images)
        boxes = torch.tensor([0.1, 0.2, 0.6, 0.7, 1.0], device=images.device).expand(B, -1)
        return model(images, amt.crop_maps(torch.rand(B, 196, device=images.device), boxes, (14, 14)))[0]
    return model, loss


def dense_attention(size):
    """The same by multinomial draws and boolean masks, as one would write it down first: every patch is embedded and then
    dropped, every decoder token predicted, and the loss weighted with zeros."""
    model = amt.AMT(224, 16, *mae.SIZES[size], **DECODER)
    masked, thrown = amt.count_units(196, *model.ratios, "mae")

    def loss(model, images):
        B, patches = len(images), amt.patchify(images, 16)
        order = torch.multinomial(torch.rand(B, 196, device=images.device), 196)
        kind = torch.zeros(B, 196, device=images.device)                        # 0 visible, 1 masked, 2 thrown
        kind.scatter_(1, order[:, :masked], 1.0).scatter_(1, order[:, masked:masked + thrown], 2.0)
        x = model.patch_embed(patches) + model.pos_embed[:, 1:]
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(B, -1, -1), x[kind == 0].view(B, -1, x.shape[2])], dim=1)
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))
        full = model.mask_token.repeat(B, 196, 1)
        full[kind == 0] = x[:, 1:].flatten(0, 1)
        full = full + model.decoder_pos_embed[:, 1:]
        x = torch.cat([x[:, :1] + model.decoder_pos_embed[:, :1], full[kind < 2].view(B, 196 - thrown, -1)], dim=1)
        for block in model.decoder_blocks:
            x = block(x)
        prediction, weight = model.decoder_pred(model.decoder_norm(x[:, 1:])), kind[kind < 2].view(B, -1)
        error = (prediction.float() - patches[kind < 2].view(B, 196 - thrown, -1)).square().mean(dim=2)
        return (error * weight).sum() / weight.sum()
    return model, loss


def our_maps(size):
    model = amt.AMT(224, 16, *mae.SIZES[size], **DECODER)
    return model, lambda model, images: torch.no_grad()(amt.attention_map)(model, images).sum()


def our_classifier(size, patch=14, **changes):
    """SupMIM with ViT-B/14: 16 x 16 patches, half of them masked, a decoder of 2 blocks of half the width."""
    model = supmim.SupMIM(224, patch, *mae.SIZES[size], 384, 2, 6, **changes)
    return model, lambda model, images: model(images, torch.arange(len(images), device=images.device))[0]


def captions(images, length=77):
    """As many captions of 12 words: start 49406, words, end 49407, padding."""
    ids = torch.randint(1, 49406, (len(images), length), device=images.device)
    ids[:, 0], ids[:, 13], ids[:, 14:] = 49406, 49407, 0
    return ids


FLIPS = {f"{name}, {ratio:.0%} masked": functools.partial(make, mask_ratio=ratio) for ratio in (0.0, 0.5, 0.75)
         for name, make in (("ours", our_pairs), ("open_clip", open_clip_pairs))}
CONTESTANTS = {"flip": FLIPS, "amt": {"ours": our_attention, "plain MAE": ours, "dense AMT": dense_attention, "maps": our_maps},
               "supmim": {"ours": our_classifier, "no masked pass": functools.partial(our_classifier, mim_weight=0.0)},
               "mae": {"ours": ours, "timm blocks": timm_blocks, "transformers": transformers, "vit-pytorch": vit_pytorch},
               "maskdistill": {"ours": our_student, "transformers": transformers_student},
               "dtm": {"ours": our_morphing, "no morphing": functools.partial(our_morphing, morphs=0)}}
CONTESTANTS["all"] = {                                   # of patch 16, and FLIP with half of the patches
    **{f"{name} (MAE)": make for name, make in CONTESTANTS["mae"].items()},
    **{f"{name} (MaskDistill)": make for name, make in CONTESTANTS["maskdistill"].items()}, "ours (DTM)": our_morphing,
    **{f"{name} (FLIP)": FLIPS[f"{name}, 50% masked"] for name in ("ours", "open_clip")}, "ours (AMT)": our_attention,
    "ours (SupMIM)": functools.partial(our_classifier, patch=16), "ours (supervised)": functools.partial(our_classifier, patch=16, mim_weight=0.0)}


class Contestant:
    def __init__(self, name, args):
        self.name, self.bf16, self.device = name, args.precision == "bf16", args.device
        self.model, self.loss = CONTESTANTS[args.method][name](args.model)
        self.model.to(self.device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad],
                                           lr=1e-4, betas=(0.9, 0.95), fused=True)
        if args.compile:
            self.model.compile()

    def step(self, images):
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(self.model, images)
        if loss.requires_grad:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def flops(self, images):
        """Of one step for one image, the optimiser's left out; counted before anything is compiled."""
        total = counted(lambda: self.loss(self.model, images))
        self.optimizer.zero_grad()
        return total / len(images)


def counted(loss) -> int:
    """FLOPs of loss() and, if it has one, of its gradient: of the model, not of what a fused kernel computes twice. Attention is
    written out for the count, since torch's counter knows the fused kernels of some devices and versions only."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = loss()
        if result.requires_grad:
            result.backward()
    return counter.get_total_flops()


def clock(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def serve(name, args, pipe):
    """The process of one contestant: a step each time it is asked for one."""
    if not name.startswith(PEERS):
        common.keep_freed_memory()
    plain = argparse.Namespace(**vars(args) | {"compile": False, "precision": "fp32", "device": "cpu"})
    pipe.send(Contestant(name, plain).flops(torch.randn(2, 3, 224, 224)))      # not of compiled code
    team, images = Contestant(name, args), torch.randn(args.batch, 3, 224, 224, device=args.device)
    pipe.send(clock(lambda: [team.step(images) for _ in range(2)], args.device))
    while repeat := pipe.recv():
        pipe.send(clock(lambda: [team.step(images) for _ in range(repeat)], args.device) / repeat)
    pipe.send(torch.cuda.max_memory_allocated() / 2 ** 30 if args.device == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)


def begin(name, args):
    """Start a contestant's process; its pipe and the FLOPs of a image."""
    pipe, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(name, args, theirs), daemon=True).start()
    theirs.close()                                       # so that a contestant's death is heard of here
    flops, first = pipe.recv(), pipe.recv()
    print(f"{name}: first two steps {first:.1f} s", flush=True)
    return pipe, flops


def train(args):
    names = args.contestants or list(CONTESTANTS[args.method])
    held = {} if args.one_at_a_time else {name: begin(name, args) for name in names}
    n, repeat = (8192, 20) if args.device == "cuda" else (4096, 1)
    matrix = torch.randn(n, n, device=args.device, dtype=torch.bfloat16 if args.precision == "bf16" else None)
    product = lambda: 2 * n ** 3 * repeat / clock(lambda: [matrix @ matrix for _ in range(repeat)], args.device)
    times, shares, rates, flops, peaks = {name: [] for name in names}, {name: [] for name in names}, [product()], {}, {}
    for turn in range(args.rounds):
        for i in range(len(names)):                      # another one is first in each round
            name = names[(i + turn) % len(names)]
            pipe, flops[name] = held.get(name) or begin(name, args)
            before = product()
            pipe.send(repeat)
            times[name].append(pipe.recv())
            rates += [before, product()]                 # around the step: the machine's speed moves
            shares[name].append(100 * args.batch * flops[name] / times[name][-1] / statistics.mean(rates[-2:]))
            if not held or turn == args.rounds - 1:
                pipe.send(0)                             # it answers with its peak and ends
                peaks[name] = pipe.recv()
    print(f"\n{args.method}, {args.model}, batch {args.batch}, {args.precision}, {'compiled' if args.compile else 'eager'}, "
          f"{args.rounds} rounds, {device_name(args.device)}, torch {torch.__version__}\n"
          f"{n}^3 matrix product: {statistics.median(rates) / 1e9:.0f} GFLOP/s (median; {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f})\n"
          f"{'':24}images/s  x first   GFLOP/image   share of the matrix product   peak GiB")
    for name in names:
        speed = args.batch / statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[names[0]], times[name]))     # to ours, of FLIP's with whole images
        share = statistics.median(shares[name])
        print(f"{name:24}{speed:8.2f}{ratio:9.2f}{flops[name] / 1e9:14.2f}{share:14.0f} %{peaks[name]:26.2f}")
        note(args, method=args.method, contestant=name, images_per_s=speed, ratio=ratio, gflop_per_image=flops[name] / 1e9,
             share_of_product=share, peak_gib=peaks[name], product_gflops=statistics.median(rates) / 1e9, seconds=times[name],
             model=args.model, batch=args.batch, precision=args.precision, compile=args.compile)


def note(args, **line):
    """Add a line to --results, numbers to four digits, with machine, torch and date."""
    if args.results:
        line |= dict(machine=device_name(args.device), torch=torch.__version__, date=datetime.date.today().isoformat())
        with open(args.results, "a") as file:
            file.write(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}) + "\n")


def peak(args, ratio, batch, pipe):
    common.keep_freed_memory()
    team = Contestant(f"ours, {ratio:.0%} masked", args)
    for _ in range(2):
        team.step(torch.randn(batch, 3, 224, 224, device=args.device))
    pipe.send(torch.cuda.max_memory_allocated() / 2 ** 30 if args.device == "cuda"
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20)


def batch(args):
    def measured(ratio, size):
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("spawn").Process(target=peak, args=(args, ratio, size, theirs))
        worker.start(), worker.join()
        return ours.recv()
    args.method = "flip"
    print(f"FLIP, {args.model}/16, {args.precision}, {device_name(args.device)}: the largest batch in {args.memory} GiB by the memory of two smaller ones, and its own peak")
    for ratio in (0.0, 0.5, 0.75):
        less, more = measured(ratio, 8), measured(ratio, 24)                    # it grows with the batch evenly
        size = int(8 + 16 * (args.memory - less) / (more - less))
        print(f"{ratio:4.0%} masked: {size:4} pairs, {measured(ratio, size):.2f} GiB", flush=True)


def loading(args):
    import torchvision
    from PIL import Image
    from torchvision.transforms import v2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as top:
        if not args.folder:                              # smooth colours and fine grain: about 110 kB
            random = np.random.RandomState(0)
            for i in range(128):
                smooth = Image.fromarray(random.randint(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
                grain = np.asarray(smooth) + random.normal(0, 14, (375, 500, 3))
                Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(f"{top}/{i}.jpg", quality=90)
        big = sorted(str(p) for p in Path(args.folder or top).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[:256]
        small = []
        for i, path in enumerate(big):
            with Image.open(path) as image:
                scale = 256 / min(image.size)
                size = [round(side * min(1, scale)) for side in image.size]
                small.append(f"{top}/small-{i}.jpg")
                image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(small[-1], quality=90)
        usual = v2.Compose([torchvision.transforms.RandomResizedCrop(224, (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC),
                            torchvision.transforms.RandomHorizontalFlip(), torchvision.transforms.ToTensor(),
                            torchvision.transforms.Normalize(data.MEAN, data.STD)])
        plain, ours_big, ours_small = (data.ImageDataset(p, transform=t) for p, t in
                                       ((big, None), (big, data.augment(224, 0.2)), (small, data.augment(224, 0.2))))
        decoded = [plain.with_transform(data.augment(224, 0.2))[0, i][0] for i in range(len(big))]
        jitter = v2.ColorJitter(0.4, 0.4, 0.4)
        randaugment = data.augment(224, 1.0, randaugment=9).transforms[-1]
        jobs = {"Pillow, usual transforms": lambda i: usual(Image.open(big[i]).convert("RGB")),
                "ours": lambda i: ours_big[args.rounds, i], "ours, shrunk once to 256": lambda i: ours_small[args.rounds, i],
                "ours, decoding only": lambda i: plain.read(i),
                "ColorJitter alone": lambda i: jitter(decoded[i]),
                "RandAugment alone": lambda i: randaugment(decoded[i])}
        kilobytes = [statistics.mean(Path(p).stat().st_size for p in paths) / 1e3 for paths in (big, small)]
        times = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, job in jobs.items():
                times[name].append(clock(lambda: [job(i) for i in range(len(big))], "cpu"))
        print(f"{len(big)} JPEGs, {kilobytes[0]:.0f} kB on average, {kilobytes[1]:.0f} shrunk; images/s on one core of {device_name('cpu')}")
        for name, seconds in times.items():
            speed = len(big) / statistics.median(seconds)
            print(f"{name:26}{speed:8.0f}")
            note(args, method="data", contestant=name, images_per_s=speed, seconds=seconds, kilobytes=kilobytes[1 if "shrunk" in name else 0])


def dense_match(tokens, rounds):
    """The groups of `dtm.match` as matrices (B, n, N): each round merges tokens and, with them, the rows."""
    B, N, C = tokens.shape
    x, groups = tokens, torch.eye(N).expand(B, N, N)
    for r in rounds:
        unit = x / x.norm(dim=-1, keepdim=True)
        similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        best, partner = similarity.max(dim=2)
        order = best.argsort(dim=1, descending=True)
        merged, rest = order[:, :r], order[:, r:].sort(dim=1).values
        to = partner.gather(1, merged)

        def join(v):
            rows = lambda index: index.unsqueeze(-1).expand(-1, -1, v.shape[-1])
            a, b = v[:, ::2], v[:, 1::2]
            return torch.cat([a.gather(1, rows(rest)), b.scatter_add(1, rows(to), a.gather(1, rows(merged)))], dim=1)
        x, groups = join(x), join(groups)
    return groups


def dense_loss(online, target, groups):
    mean = groups / groups.sum(dim=2, keepdim=True)
    morphed = (groups.transpose(1, 2) @ (mean @ x) for x in (online, target))   # merge, and give each token its group's mean
    return F.smooth_l1_loss(*morphed, beta=2.0)


def morph(args):
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    online, target = (torch.randn(args.batch, 196, 512, generator=random) for _ in range(2))
    rounds = [14] * 7
    online.requires_grad_()
    labels, n = dtm.match(target, rounds)
    groups = dense_match(target, rounds)
    ours, dense = dtm.morph_loss(online, target, labels, n), dense_loss(online, target, groups)
    assert abs(ours - dense) < 1e-5 * dense, (ours, dense)
    jobs = {"match": lambda: dtm.match(target, rounds), "match, dense": lambda: dense_match(target, rounds),
            "loss": lambda: dtm.morph_loss(online, target, labels, n).backward(),
            "loss, dense": lambda: dense_loss(online, target, groups).backward()}
    times = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            times[name].append(1e3 * clock(job, "cpu"))
    print(f"batch {args.batch}, 196 tokens of width 512, 7 rounds of 14; one thread of {device_name('cpu')}; ms, median of {args.rounds}")
    for name, values in times.items():
        other = times[name.split(",")[0]]
        print(f"{name:14}{statistics.median(values):8.1f}{statistics.median(a / b for a, b in zip(values, other)):8.2f} x ours")


def hours(args):
    """FLOPs are counted in a step of ours with the presets' models; AMT begins as plain MAE and makes maps from time to time.
    The cores decode and crop, and change colors where the preset does."""
    def count(make):
        model, loss = make(args.model)
        return counted(lambda: loss(model, torch.randn(2, 3, 224, 224))) / 2e9
    train = 1_281_167                                    # ImageNet-1k
    recipes = {"mae.py": (mae, ours), "maskdistill.py": (maskdistill, our_student), "dtm.py": (dtm, our_morphing), "amt.py": (amt, our_attention),
               "supmim.py": (supmim, our_classifier), "flip.py --preset laion": (flip, functools.partial(our_pairs, mask_ratio=0.5, length=32))}
    print(f"eight GPUs at {args.tflops:.0f} TFLOP/s each; images/s of a core: {args.decode[0]} decoded and cropped, {args.decode[1]} from shrunk "
          f"JPEGs, {args.color_jitter} through ColorJitter, {args.randaugment} through RandAugment\n"
          f"{'':24}images, millions   GFLOP/image   hours   images/s   cores   shrunk")
    for label, (script, make) in recipes.items():
        preset = script.PRESETS["laion" if script is flip else "imagenet"]
        work = count(make)
        seen = preset["epochs"] * preset.get("epoch_pairs", train)
        total = seen * work
        if script is amt:
            first = preset["attention_from"]
            refreshes = len(range(first, preset["epochs"], preset["refresh_every"]))
            total += train * (first * (count(ours) - work) + refreshes * count(our_maps))
        speed = 8e3 * args.tflops / work
        colors = 0.0                                     # seconds of a core for an image
        if preset.get("color_jitter"):
            colors += 1 / args.color_jitter
        if preset.get("randaugment"):
            colors += 1 / args.randaugment
        cores = [speed * (1 / rate + colors) for rate in args.decode]
        print(f"{label:24}{seen / 1e6:18.0f}{work:16.1f}{total / (8e3 * args.tflops) / 3600:8.1f}{speed:11.0f}"
              f"{cores[0]:8.0f}{cores[1]:9.0f}")


@torch.no_grad()
def features(args):
    cfg = evaluate.Config(protocol="knn", checkpoint=args.checkpoint, data=args.folder, workers=1)
    device = common.init_distributed(cfg)
    encoder, _, about = evaluate.load_encoder(cfg)
    encoder.to(device).eval()
    cfg.image_size = about["config"]["image_size"]
    images = data.open_data(cfg.data, "").test
    batch = data.to_device(torch.stack([images.with_transform(data.CenterCrop(cfg.image_size))[0, i][0] for i in range(min(500, len(images)))]), device)
    passes, times = len(images) // len(batch), {"extraction": [], "forward": []}
    for _ in range(args.rounds):
        times["extraction"].append(clock(lambda: evaluate.all_features(cfg, encoder, images, device), device.type) / len(images))
        times["forward"].append(clock(lambda: [encoder.encode(batch) for _ in range(passes)], device.type) / (len(batch) * passes))
    speed = {name: 1 / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{len(images)} images, {device_name(device.type)}: {speed['extraction']:.0f} images/s extracted, {speed['forward']:.0f} "
          f"forward alone: {100 * speed['extraction'] / speed['forward']:.0f} %")


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if "model name" in line), "CPU") + f", {torch.get_num_threads()} threads"


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "batch", "data", "morph", "hours", "features"])
    parser.add_argument("--method", default="mae", choices=list(CONTESTANTS))
    parser.add_argument("--model", default="base", choices=list(mae.SIZES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB, for `batch`")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--one-at-a-time", action="store_true", help="a new process for every turn: memory for one contestant only")
    parser.add_argument("--tflops", type=float, default=400, help="that a GPU reaches, for `hours`")
    parser.add_argument("--decode", type=int, nargs=2, default=[844, 1625], help="hours: images a core decodes and crops a second")
    parser.add_argument("--color-jitter", type=int, default=541, help="hours: images a core changes the colors of in a second")
    parser.add_argument("--randaugment", type=int, default=406, help="hours: images a core puts through RandAugment in a second")
    parser.add_argument("--folder", default="", help="images for `data` and `features`")
    parser.add_argument("--checkpoint", default="none", help="encoder for `features`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", help="file to which `train` and `data` add a JSON line for each contestant")
    parser.add_argument("--contestants", nargs="+", help="of the method's; ours, transformers, ...")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    {"train": train, "batch": batch, "data": loading, "morph": morph, "hours": hours, "features": features}[args.what](args)


if __name__ == "__main__":
    main()
