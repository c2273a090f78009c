"""What the method scripts share and none of them is about: processes, flags, pictures, the learning
rate, checkpoints, the log, k-NN. Models, masks, losses and the training loop are in the scripts.

    python common.py shrink FOLDER SMALL_FOLDER --size 256        # a small, fast copy of a data set
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw                                      # comes with torchvision
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's, for every data set


# -------------------------------------------------------------------------------------- processes
class UserError(Exception):
    """Something the user can mend; `launched` prints it as one line, without a traceback."""


def why(error: Exception) -> str:
    """An error as one line; some have no text of their own."""
    return (str(error) or type(error).__name__).splitlines()[0]


def read_file(path, trust: bool = False, known=()) -> dict:
    """All that a file of weights holds, on the CPU. Raises UserError.

    Nothing in it is executed, except TorchScript, which is a program (OpenAI's CLIPs are published as such): that runs
    if `trust`, or if its SHA-256 is one of `known`."""
    try:
        if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            if not trust and hashlib.sha256(Path(path).read_bytes()).hexdigest() not in known:
                raise UserError(f"{path} is TorchScript, a program (OpenAI's files are); where there is that flag, "
                                "--trust runs it")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)           # TorchScript is deprecated
                return torch.jit.load(str(path), map_location="cpu").state_dict()
        with torch.serialization.safe_globals([argparse.Namespace]):     # in official checkpoints
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except UserError:
        raise
    except Exception as error:                           # zip, pickle or torch, according to the file
        raise UserError(f"{path} is no file of weights: {why(error)}") from error


def rank() -> int:
    return int(os.environ.get("RANK", 0))               # RANK, LOCAL_RANK, WORLD_SIZE: torchrun's


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*words):
    """Print on the first process, above the progress bar where there is one."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


@contextlib.contextmanager
def launched():
    """Around a command: a user's mistake ends in one line and exit status 2, Ctrl-C in 130."""
    try:
        yield
    except (UserError, OSError) as error:                # OSError: a disk that is full, a shard without pairs
        if isinstance(error, OSError) or int(os.environ.get("LOCAL_RANK", 0)) == 0:      # maybe this process's alone
            text = str(error).strip() or type(error).__name__
            tqdm.write(f"error: {text.splitlines()[-1]}", file=sys.stderr)      # before it a loader process's traceback
        sys.exit(2)
    except KeyboardInterrupt:
        if rank() == 0:
            print("\nstopped; the same command (without --no-resume) goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.barrier()                                   # meanwhile gloo's thread lets go of its last tensor; else it
        dist.destroy_process_group()                     # and the destructor may wait for each other (torch 2.6)


def start(seed: int) -> torch.device:
    """Join torchrun's processes (nccl on GPUs, gloo on CPUs), seed, return this one's device."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"{local + 1} processes or more, but {torch.cuda.device_count()} GPUs: --nproc_per_node")
    if cuda:
        torch.cuda.set_device(device)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not cuda:                             # glibc: keep freed memory for the next step,
        for option, value in ((-1, 2 ** 31 - 1), (-2, 2 ** 28), (-3, 2 ** 25)):      # which needs as
            mallopt(option, value)                       # much: half the page faults (benchmark.md)
    if world() > 1 and not dist.is_initialized():
        patience = datetime.timedelta(hours=2)           # the first process may be downloading
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world(),
                                timeout=patience)        # the prefix: restarts share torchrun's store
    torch.manual_seed(seed)
    return device


@contextlib.contextmanager
def first_process_first():
    """The body runs on the first process, then on the others, which find what it downloaded."""
    if world() > 1 and rank() > 0:
        dist.barrier()
    yield
    if world() > 1 and rank() == 0:
        dist.barrier()


def mix(*numbers: int) -> int:
    """Several numbers -> one 32-bit seed (torch's CPU generator drops the high half of a seed).

    Zeros at the end do not count, mix(1, 2) == mix(1, 2, 0): a second use of the same numbers needs a last one
    that is not 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def uniform(cfg, step: int, width: int, device) -> torch.Tensor:
    """Noise in [0, 1) for one step: (accumulate, pictures per process and pass, width).

    It is cut from one draw for the global batch, in the order in which DistributedSampler deals
    the pictures out, so a picture meets the same noise whatever the number of processes."""
    generator = torch.Generator(device).manual_seed(mix(cfg.seed, step))
    noise = torch.rand(cfg.batch_size, width, generator=generator, device=device)
    return noise.view(cfg.accumulate, -1, world(), width)[:, :, rank()]


# ------------------------------------------------------------------------------------------ flags
def parse(config, presets: dict, argv=None, description: str = ""):
    """An instance of the dataclass `config` from the command line: flag over preset over default.

    Each field is a flag (`base_lr`: --base-lr; a bool: also --no-...) and the comment behind it is
    the flag's help. The preset is --preset, else --data, else "folder". Raises UserError."""
    helps = dict(re.findall(r"^    (\w+):.*?# *(.+)$", inspect.getsource(config), re.M))
    kinds = typing.get_type_hints(config)
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (--help lists the flags)")

    chosen = Parser(add_help=False, allow_abbrev=False)  # first the preset: --help shows its values
    chosen.add_argument("--data", default=config.data)
    chosen.add_argument("--preset")
    chosen, _ = chosen.parse_known_args(argv)
    name = chosen.preset or (chosen.data if chosen.data in presets else "folder")
    if name not in presets:
        raise UserError(f"no preset {name}; there are {', '.join(presets)}")
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config):
        kind, default = kinds[field.name], presets[name].get(field.name, field.default)
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            how = {"choices": typing.get_args(kind)}
        else:
            how = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + field.name.replace("_", "-"), **how,
                            help=f"{helps[field.name]} (default: {default!r})".replace("%", "%%"))
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = parser._option_string_actions
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    return config(**{**presets[name], **vars(given), "preset": name})


def check(cfg, *divides: tuple[str, str], **least):
    """Raises UserError where a setting is below its least value, or the first of a pair does not divide the second.

    least and divides: what a script has besides the settings of every script."""
    least |= dict(embed_dim=1, depth=1, num_heads=1, patch_size=1, batch_size=1, accumulate=1, epochs=1, log_every=1,
                  seed=0, workers=0, max_steps=0, save_every=0, knn_pictures=0)
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise UserError(f"{name} is {getattr(cfg, name)}, at least {value} is needed")
    for part, whole in (("patch_size", "image_size"), ("num_heads", "embed_dim"), *divides):
        if getattr(cfg, whole) % getattr(cfg, part):
            raise UserError(f"{part} {getattr(cfg, part)} does not divide {whole} {getattr(cfg, whole)}")


def plan(cfg, pictures: int) -> tuple[int, float]:
    """(steps per epoch, peak learning rate = base * global batch / 256), checked and printed.

    An epoch's last, incomplete batch is dropped. Raises UserError on sizes that do not fit."""
    parts = world() * cfg.accumulate
    if cfg.batch_size % parts:
        raise UserError(f"--batch-size {cfg.batch_size} (of all processes) does not divide by {world()} processes x "
                        f"--accumulate {cfg.accumulate}; try --batch-size {-(-cfg.batch_size // parts) * parts}")
    if pictures < cfg.batch_size:
        raise UserError(f"{pictures} pictures make no batch of {cfg.batch_size}; use --batch-size {pictures} or less")
    steps, peak = pictures // cfg.batch_size, cfg.base_lr * cfg.batch_size / 256
    say(f"global batch {cfg.batch_size} = {cfg.batch_size // parts} per process x {cfg.accumulate} "
        f"accumulation x {world()} processes; {cfg.epochs} epochs x {steps} steps")
    say(f"peak learning rate {peak:g} = {cfg.base_lr:g} x {cfg.batch_size} / 256")
    return steps, peak


def learning_rate(step: float, warmup: float, total: float, peak: float, minimum: float = 0.0, shape="cosine"):
    """Linear warm-up from 0 to `peak`, then half a cosine (shape "linear": a straight line) down to `minimum`.

    step, warmup and total are in one unit: steps, or epochs."""
    if step < warmup:
        return peak * step / warmup
    if shape == "linear":
        return minimum + (peak - minimum) * (total - step) / (total - warmup)
    cosine = float(np.cos(np.pi * (step - warmup) / (total - warmup)))
    return minimum + (peak - minimum) * 0.5 * (1 + cosine)


def parameter_groups(model, weight_decay: float, undecayed: tuple = ()) -> list[dict]:
    """Two groups for AdamW: vectors (biases, normalisation) and the `undecayed` names are not decayed,
    all else is."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim <= 1 or name in undecayed]["params"].append(p)
    return groups


def add_drop_path(blocks, rate: float):
    """Stochastic depth: a branch of block i is left out of a picture's pass with a chance that rises
    linearly from 0 to `rate`; what stays is scaled up. Parameter names do not change."""
    for block, chance in zip(blocks, np.linspace(0, rate, len(blocks)).tolist()):
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(lambda module, _, output, p=chance: stochastic_depth(
                output, p, "row", module.training))


# --------------------------------------------------------------------------------------- pictures
class Pictures(Dataset):
    """Pictures with labels, held in memory or decoded from files when asked for.

    source: uint8 tensor (n, 3, H, W) or list of paths; labels: n ints or None; transform: picture -> picture,
    random numbers from torch's generator. pictures[epoch, index] -> (picture uint8 (3, H, W), label or -1, index),
    the same for the same (seed, epoch, index). If a picture cannot be read, the next readable one is given in its
    place, with its own label and index, and `broken` (n,) marks it."""

    def __init__(self, source, labels=None, seed: int = 0, transform=None):
        # an array of paths: workers share its memory
        self.source = source if torch.is_tensor(source) else np.array([os.fsencode(path) for path in source])
        self.labels = np.full(len(source), -1) if labels is None else np.asarray(labels, np.int64)
        self.seed, self.transform = seed, transform
        self.broken = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.source)

    def read(self, index: int) -> torch.Tensor:
        """Picture `index` as uint8 (3, H, W). Raises OSError if it cannot be read."""
        if torch.is_tensor(self.source):
            return self.source[index]
        return decode(Path(os.fsdecode(self.source[index])).read_bytes())

    def readable(self, index: int) -> bool:
        with contextlib.suppress(OSError):
            return self.read(index) is not None
        return False

    def __getitem__(self, key):
        epoch, index = key
        while True:
            try:
                picture = self.read(index)
                break
            except OSError as error:
                if not self.broken[index]:
                    tqdm.write(f"skipped, cannot be read: {os.fsdecode(self.source[index])} ({error})", file=sys.stderr)
                self.broken[index] = True
                if self.broken.all():
                    raise
                index = (index + 1) % len(self)
        if self.transform:
            with torch.random.fork_rng(devices=[]):      # without workers it is the trainer's own
                torch.default_generator.manual_seed(mix(self.seed, epoch, index))
                picture = self.transform(picture)
        return picture, int(self.labels[index]), index

    def through(self, transform):
        """The same pictures with another transform."""
        pictures = copy.copy(self)
        pictures.transform = transform
        return pictures


def decode(data: bytes) -> torch.Tensor:
    """The bytes of a picture file -> uint8 (3, H, W). Raises OSError if they are no picture.

    JPEG by torchvision, faster than Pillow; every other format by Pillow."""
    try:
        if data[:2] == b"\xff\xd8":
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(data, mode=ImageReadMode.RGB)
        with Image.open(io.BytesIO(data)) as image:
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:                           # a damaged file can raise nearly anything
        raise OSError(why(error).split(", ")[-1]) from error


def augment(size: int, scale: float, jitter: float = 0.0, randaugment: int = 0):
    """Random crop of `scale` to 1 of the area (1: the centre instead), resized to size x size; random flip (both
    MAE's); brightness, contrast and saturation changed by up to `jitter` (BEiT's); RandAugment of magnitude 0 (none)
    to 10.

    The magnitude counts 11 bins, so that 9 is 9 tenths of the strongest (27 degrees of rotation), as the
    papers mean it; torchvision's own 31 bins would make it 30 percent."""
    crop = v2.RandomResizedCrop(size, (scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    steps = [crop if scale < 1 else Centre(size), v2.RandomHorizontalFlip()]
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    if randaugment:
        fill = [round(255 * value) for value in MEAN]
        steps.append(v2.RandAugment(2, randaugment, 11, v2.InterpolationMode.BILINEAR, fill=fill))
    return v2.Compose(steps)


def mixing(mixup: float, cutmix: float, classes: int):
    """A function (images, labels) -> (mixed images, soft labels (B, classes)): MixUp or CutMix with these alphas, each
    half of the time; an alpha of 0 turns one off. Both 0: nothing is changed."""
    both = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in both if alpha]
    return v2.RandomChoice(kinds) if kinds else lambda images, labels: (images, labels)


class Centre:
    """For evaluation: the centre, size x size; large pictures are first shrunk to size / 0.875, or, for
    sizes above 224 or without margin, until their shorter side fits."""

    def __init__(self, size: int, margin: bool = True):
        self.size, self.margin = size, margin

    def __call__(self, picture):
        if picture.shape[-2:] == (self.size, self.size):
            return picture
        short = self.resized(min(picture.shape[-2:]))
        picture = v2.functional.resize(picture, [short], v2.InterpolationMode.BICUBIC)
        return v2.functional.center_crop(picture, [self.size])

    def resized(self, short: int) -> int:
        """What the shorter side of a picture is made before the crop."""
        wanted = round(self.size / 0.875) if self.size <= 224 and self.margin else self.size
        return max(self.size, min(short, wanted))


@functools.cache
def mean_std(device) -> list[torch.Tensor]:
    """MEAN and STD as (3, 1, 1) tensors on the device; made once, so that no step copies them."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]


def to_device(pictures: torch.Tensor, device) -> torch.Tensor:
    """uint8 (B, 3, H, W) -> normalised float32 there: a quarter of the bytes travel."""
    mean, std = mean_std(device)
    return (pictures.to(device, non_blocking=True) - 255 * mean) / (255 * std)


def subset(pictures, shots: int, percent: float, seed: int):
    """`shots` pictures of each class, or `percent` of them (at least one), drawn by the seed."""
    random, rows = np.random.RandomState(seed), []
    for label in np.unique(pictures.labels):
        mine = random.permutation(np.flatnonzero(pictures.labels == label))
        rows.append(mine[:shots or max(1, round(len(mine) * percent / 100))])
    rows = np.sort(np.concatenate(rows))
    return Pictures(pictures.source[rows], pictures.labels[rows], pictures.seed)


class Batches(Sampler):
    """This process's share of the global batches of steps first ... last - 1: lists of (epoch, index).

    The order is DistributedSampler's: a function of (seed, epoch), dealt out in turn."""

    def __init__(self, cfg, pictures: int, first: int, last: int):
        self.cfg, self.first, self.last = cfg, first, last
        self.steps_per_epoch = pictures // cfg.batch_size
        self.dealer = DistributedSampler(range(pictures), world(), rank(), seed=cfg.seed, drop_last=True)

    def __len__(self):
        return (self.last - self.first) * self.cfg.accumulate

    def __iter__(self):
        size = self.cfg.batch_size // (world() * self.cfg.accumulate)
        for i in range(self.first * self.cfg.accumulate, self.last * self.cfg.accumulate):
            epoch, position = divmod(i, self.steps_per_epoch * self.cfg.accumulate)
            if position == 0 or i == self.first * self.cfg.accumulate:
                self.dealer.set_epoch(epoch)
                order = list(self.dealer)
            yield [(epoch, index) for index in order[position * size:(position + 1) * size]]


def loader(pictures: Pictures, batches, workers: int) -> DataLoader:
    """Batches (pictures uint8 (B, 3, H, W), labels (B), indices (B)) from lists of (epoch, index).

    batches: None for an IterableDataset whose items are batches."""
    workers = min(workers, max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    how = {"batch_size": None} if batches is None else {"batch_sampler": batches}       # None: they come in batches
    return DataLoader(pictures, **how, num_workers=workers,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=leave_ctrl_c_to_the_parent,
                      prefetch_factor=4 if workers else None)


def leave_ctrl_c_to_the_parent(worker: int = 0):
    """In a loader's process: only the trainer answers Ctrl-C, and its hanging up amid a hand-over is no error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hook = sys.excepthook                                # the thread that hands tensors over ends there
    sys.excepthook = lambda kind, *rest: issubclass(kind, (EOFError, ConnectionError)) or hook(kind, *rest)


def autocast(device, precision: str):
    """bf16 matrix products on a GPU that has them, fp32 elsewhere and on request; never fp16."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda"
                                   and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# -------------------------------------------------------------------------------------- data sets
class Data(typing.NamedTuple):
    """pretrain: all there is to train on; train, test: labelled, or None; classes: their names."""
    pretrain: Pictures
    train: Pictures | None
    test: Pictures | None
    classes: list


def open_data(name: str, root: str, seed: int = 0) -> Data:
    """shapes, cifar10, cifar100, stl10, tiny-imagenet, imagenet (under `root`), or a folder.

    A folder holds train/ and val/ (or test/), each with class folders; or class folders, of which
    every tenth picture is kept for testing; or just pictures. Raises UserError."""
    if name == "shapes":
        drawn = [shapes("train", np.arange(10_000)), shapes("test", np.arange(2_000))]
        train, test = (Pictures(torch.from_numpy(s["picture"]), s["shape"], seed) for s in drawn)
        return Data(train, train, test, list(SHAPES))
    if name in ("cifar10", "cifar100", "stl10"):
        return open_torchvision(name, root, seed)
    places = {"imagenet": ("imagenet", "ILSVRC/Data/CLS-LOC", ""),
              "tiny-imagenet": ("tiny-imagenet-200", "tiny-imagenet", "")}
    if name not in places:
        return open_folder(Path(name), seed)
    for folder in (Path(root, place) for place in places[name]):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return open_folder(folder, seed)
    raise UserError(f"no train/ and val/ in {Path(root, places[name][0])}; put the data there, or say with "
                    "--data-root where it is")


def open_torchvision(name: str, root: str, seed: int) -> Data:
    """CIFAR-10, CIFAR-100 or STL-10, downloaded if need be. Raises UserError if that fails."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    parts = ("train+unlabeled", "train", "test") if name == "stl10" else (True, False)
    try:
        with first_process_first():
            sets = [kind(root, part, download=True) for part in parts]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{name} is not in {root} and cannot be downloaded ({error}); fetch "
                        f"{kind.url} yourself, put it there, and start again") from error
    if name == "stl10":                                  # pre-training sees labelled and unlabelled
        return Data(Pictures(torch.from_numpy(sets[0].data), None, seed),
                    *(Pictures(torch.from_numpy(s.data), s.labels, seed) for s in sets[1:]), sets[1].classes)
    train, test = (Pictures(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), s.targets, seed) for s in sets)
    return Data(train, train, test, sets[0].classes)


def open_folder(folder: Path, seed: int) -> Data:
    """The folders of `open_data`. Raises UserError if there is no folder or no readable picture."""
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; --data is a folder of pictures or one of shapes, cifar10, "
                        "cifar100, stl10, tiny-imagenet, imagenet")
    top = folder / "train" if (folder / "train").is_dir() else folder
    classes = sorted(p.name for p in top.iterdir() if p.is_dir() and p.name[0] != ".")
    files, labels = _listed(top, classes)
    everything = Pictures(files, labels, seed)
    if not any(everything.readable(i) for i in range(len(files))):
        raise UserError(f"no readable picture in {top} or in its folders ({len(files)} files tried)")
    say(f"{top}: {len(files)} pictures, " + (f"{len(classes)} classes" if classes else "no class folders"))
    if not classes:
        return Data(everything, None, None, [])
    val = next((folder / v for v in ("val", "test") if top != folder and (folder / v).is_dir()), None)
    if val:
        train, test = everything, Pictures(*_listed(val, classes), seed)
    else:
        say(f"{top} has no val/ beside it: every tenth picture is kept for testing")
        kept = np.arange(len(files)) % 10 == 9
        train, test = (Pictures(files[k], labels[k], seed) for k in (~kept, kept))
    if not any(test.readable(i) for i in range(len(test))):
        say(f"no readable picture to test on in {val or top}: no k-NN at the end")
        train = test = None
    return Data(everything, train, test, classes)


def _listed(folder: Path, classes: list) -> tuple[np.ndarray, np.ndarray | None]:
    """Paths and labels of the pictures in `folder`: in class folders, in Tiny ImageNet's or Kaggle's
    flat val/ with a list beside it, or, without classes, directly and unlabelled."""
    endings, number = datasets.folder.IMG_EXTENSIONS, {c: i for i, c in enumerate(classes)}
    tiny = folder / "val_annotations.txt"
    lists = (parent / "LOC_val_solution.csv" for parent in folder.resolve().parents)
    kaggle = next((path for path in lists if path.is_file()), None)
    below = [p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."]
    if tiny.is_file():                                   # "val_0.JPEG<tab>n03444034<tab>0<tab>32..."
        rows = [line.split("\t")[:2] for line in tiny.read_text().splitlines()]
        pairs = [(str(folder / "images" / file), number[wnid]) for file, wnid in rows if wnid in number]
    elif not classes:
        pairs = [(str(p), -1) for p in sorted(folder.iterdir()) if p.suffix.lower() in endings]
    elif kaggle and not below:                           # "ILSVRC2012_val_00048981,n03995372 85 1..."
        rows = [re.split("[, ]", line)[:2] for line in kaggle.read_text().splitlines()[1:]]
        pairs = [(str(folder / f"{file}.JPEG"), number[wnid]) for file, wnid in rows if wnid in number]
    elif sorted(below) != classes:
        raise UserError(f"{folder} has other classes than the training pictures: "
                        f"{sorted(set(below) ^ set(classes))[:5]}")
    else:
        pairs = datasets.folder.make_dataset(str(folder), number, endings, allow_empty=True)
    return np.array([os.fsencode(p) for p, _ in pairs]), np.array([c for _, c in pairs])


# ------------------------------------------------------------------------ shapes, the embedded data
COLOURS = {"red": (220, 40, 40), "orange": (240, 140, 30), "yellow": (235, 220, 50), "green": (50, 170, 60),
           "cyan": (60, 200, 210), "blue": (50, 80, 220), "purple": (140, 60, 180), "pink": (245, 140, 190)}
SHAPES = {                                               # signed distances; the picture's y points down
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.7) - 0.22,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.78,
    "triangle": lambda x, y: np.maximum(0.866 * np.abs(x) - 0.5 * y, y) - 0.5,
    "cross": lambda x, y: np.minimum(np.maximum(np.abs(x) - 0.3, np.abs(y) - 0.95),
                                     np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.3)),
    "star": lambda x, y: 0.6 * (np.hypot(x, y) - 0.42 - 0.58 * np.abs(1 - 2 * (np.arctan2(x, y) / 1.2566 % 1))),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.5, y)),
    "bar": lambda x, y: np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.36)}
BACKGROUNDS = {                                          # (x, y, frequency, phase) -> brightness from -1 to 1
    "plain": lambda x, y, wave, phase: 0 * x,
    "ramp": lambda x, y, wave, phase: x / 16,
    "stripes": lambda x, y, wave, phase: np.sin(1.5 * wave * x + phase),
    "blobs": lambda x, y, wave, phase: np.sin(wave * x + phase) * np.sin(wave * y + 2 * phase)}
CAPTIONS = ("{a} {colour} {shape}", "a picture of {a} {colour} {shape}", "this {shape} is {colour}",
            "here is {a} {colour} {shape}", "a {shape} drawn in {colour}", "the {shape} has the colour {colour}")
# Colour-shape pairs that a caption task never trains on. Each of these colours is kept out with two
# shapes and each shape with at most two colours, so knowing the colour does not tell the pair.
HELD_OUT = [(colour, (colour + step) % 8) for colour in range(6) for step in (0, 4)]


def hashed(stream: int, index: np.ndarray, count: int) -> np.ndarray:
    """uint64 (len(index), count) of random bits that depend on (stream, index) alone: splitmix64."""
    x = np.asarray(index, np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    x = (x + (np.uint64(stream) << np.uint64(56)) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def shapes(split: str, index: np.ndarray) -> dict:
    """32 x 32 pictures of one object on a textured ground; number i of a split is always the same.

    picture uint8 (n, 3, 32, 32); mask bool (n, 32, 32), True on the object; shape (the class),
    colour, background int (n,); x, y, radius in pixels, angle in radians (n,); caption: n strings
    that name colour and shape and nothing else."""
    if len(index) > 256:                                                        # what fits the caches
        parts = [shapes(split, part) for part in np.array_split(index, len(index) // 256 + 1)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    stream, grid = ("train", "test").index(split), np.arange(32, dtype=np.float32)
    u = (hashed(stream, index, 18) >> np.uint64(40)).astype(np.float32)[..., None, None] / 2 ** 24      # [0, 1)
    kinds = np.array([8, 8, 4, len(CAPTIONS)], np.float32)
    shape, colour, background, text = (kinds * u[:, [0, 1, 2, 15], 0, 0]).astype(int).T
    radius, x, y, angle = 10 + u[:, 3], 6.5 + 18 * u[:, 4], 6.5 + 18 * u[:, 5], 0.2 * u[:, 6] - 0.1

    def turned(cx, cy, angle):                           # coordinates of the pixels, (n, 32, 32) each
        dx, dy = grid - cx, grid[:, None] - cy
        return np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx

    px, py = (p / radius for p in turned(x, y, angle))
    gx, gy = turned(np.float32(15.5), np.float32(15.5), 2 * np.pi * u[:, 7])
    wave, phase = 0.15 + 0.6 * u[:, 8], 2 * np.pi * u[:, 9]
    distance, ground = np.empty_like(px), np.empty_like(gx)
    for number, signed_distance in enumerate(SHAPES.values()):
        of = shape == number
        distance[of] = signed_distance(px[of], py[of]) * radius[of]
    for number, texture in enumerate(BACKGROUNDS.values()):
        of = background == number
        ground[of] = texture(gx[of], gy[of], wave[of], phase[of])
    ground = 0.25 + 0.5 * u[:, 10] + 0.3 * (u[:, 11] - 0.5) * ground
    paint = np.array(list(COLOURS.values()), np.float32)[colour, :, None, None] / 255 + 0.2 * (u[:, 12:15] - 0.5)
    cover = np.clip(0.5 - distance, 0, 1)[:, None]                              # a smooth edge
    noise = hashed(2 + stream, index, 384).view(np.uint8).reshape(-1, 3, 32, 32)
    picture = 255 * (ground[:, None] * (1 - cover) + paint * cover) + noise * 0.07 - 9
    names, colours = list(SHAPES), list(COLOURS)
    caption = [CAPTIONS[t].format(a="an" if colours[c] == "orange" else "a", colour=colours[c], shape=names[s])
               for t, c, s in zip(text, colour, shape)]
    return {"picture": np.clip(picture, 0, 255).astype(np.uint8), "mask": cover[:, 0] > 0.5, "shape": shape,
            "colour": colour, "background": background, "x": x.ravel(), "y": y.ravel(), "radius": radius.ravel(),
            "angle": angle.ravel(), "caption": np.array(caption)}


# -------------------------------------------------------------------------------------------- run
FREE = {"output", "data_root", "preset", "workers", "accumulate", "compile", "resume", "trust", "max_steps",
        "save_every", "log_every", "knn_pictures", "eval_every"}       # what may differ when a run goes on


def write_metrics(folder: Path, **values):
    """Append one line to the folder's metrics.jsonl, floats to six digits."""
    if rank() == 0:
        values = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")


def save_whole(state, path: Path, previous: Path | None = None):
    """torch.save, safe against a kill: `path` is absent or complete. The old file, if any, becomes `previous`."""
    packed, new = io.BytesIO(), path.with_name(path.name + ".new")
    torch.save(state, packed)                            # in memory first: a full disk is an OSError
    with open(new, "wb") as file:
        file.write(packed.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    if previous and path.exists():
        os.replace(path, previous)
    os.replace(new, path)


class Run:
    """A run's folder (config.json, metrics.jsonl, checkpoint.pt, pictures), progress bar and end.

    Where the folder holds a checkpoint, it is loaded; `first` is the step to go on from, `last`
    the one to stop before; tensors: {name: tensor} of the script's own, saved and filled again with
    the weights. Raises UserError if the checkpoint is another configuration's."""

    def __init__(self, method: str, cfg, model, optimizer, steps_per_epoch: int, tensors: dict | None = None):
        self.method, self.cfg, self.model, self.optimizer = method, cfg, model, optimizer
        self.folder, self.device = Path(cfg.output), next(model.parameters()).device
        self.steps_per_epoch, self.total = steps_per_epoch, cfg.epochs * steps_per_epoch
        self.first, self.last, self.began = 0, min(cfg.max_steps or self.total, self.total), None
        self.window, self.rates, self.epoch_losses, self.loss, self.damaged = [], [], [], None, []
        self.scores, self.tensors = None, tensors or {}
        say("configuration: " + ", ".join(f"{k} {v}" for k, v in dataclasses.asdict(cfg).items()))
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"     # torchrun started us anew
        state = self.load() if cfg.resume or again else None
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            for name, tensor in self.tensors.items():
                if state["tensors"][name].shape != tensor.shape:
                    raise UserError(f"{self.folder}/checkpoint.pt has {name} {list(state['tensors'][name].shape)}, not "
                                    f"{list(tensor.shape)}: other data; --no-resume starts afresh")
                tensor.copy_(state["tensors"][name])
            self.first, self.loss, self.epoch_losses = state["step"], state["loss"], state["epoch_losses"]
            say(f"going on from step {self.first} of {self.total} (--no-resume starts afresh)")
        if world() > 1:
            firsts = [None] * world()
            dist.all_gather_object(firsts, self.first)
            if len(set(firsts)) > 1:
                raise UserError(f"the processes see different checkpoints, of steps {sorted(set(firsts))}; "
                                "--output must be on a file system that all machines share")
        if rank() == 0:
            self.begin_files(state)

    def begin_files(self, state: dict | None):
        """Write config.json, and cut metrics.jsonl where the checkpoint was taken."""
        about = {"method": self.method, "config": dataclasses.asdict(self.cfg), "processes": world(),
                 "torch": torch.__version__, "device": str(self.device)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in () if state else self.folder.glob("checkpoint.*"):
                old.unlink()                             # afresh: no later run may go on from these
            (self.folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.truncate(min(file.tell(), state["log_bytes"] if state else 0))
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}); --output says where") from error

    def load(self) -> dict | None:
        """The newest checkpoint that can be read, None if there is none."""
        found = [self.folder / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
        found = [path for path in found if path.exists()]
        for path in found:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                there = state["config"] | {key: state[key] for key in ("method", "steps_per_epoch")}
            except Exception as error:                   # zip, pickle or torch: it depends on the damage
                say(f"{path} is damaged ({why(error)}); trying the one before it")
                self.damaged.append(path)
                continue
            here = dataclasses.asdict(self.cfg) | {"method": self.method, "steps_per_epoch": self.steps_per_epoch}
            differ = [f"{name}: {there.get(name)!r} there, {value!r} here" for name, value in here.items()
                      if name not in FREE and there.get(name) != value]
            if differ:
                raise UserError(f"{path} is of another configuration ({'; '.join(differ)}); "
                                "--no-resume starts afresh, --output NEW_FOLDER keeps both")
            return state
        if found:
            raise UserError(f"no checkpoint in {self.folder} can be read; --no-resume starts afresh")
        return None

    def save(self, step: int):
        """Write checkpoint.pt and keep the one before it: if the run is killed here, one of them is complete."""
        path = self.folder / "checkpoint.pt"
        state = {"method": self.method, "config": dataclasses.asdict(self.cfg), "step": step,
                 "steps_per_epoch": self.steps_per_epoch, "loss": self.loss, "epoch_losses": self.epoch_losses,
                 "log_bytes": (self.folder / "metrics.jsonl").stat().st_size,
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "tensors": self.tensors}
        # a damaged one must not push out a good one
        save_whole(state, path, None if path in self.damaged else self.folder / "checkpoint.previous.pt")
        self.damaged = []

    def steps(self):
        """The steps first ... last - 1, with a progress bar if the first process has a terminal."""
        self.bar = tqdm(range(self.first, self.last), initial=self.first, total=self.last, unit="step",
                        leave=False, disable=None if rank() == 0 else True)
        for step in self.bar:
            self.began = self.began or time.time()
            yield step

    def end_step(self, step: int, loss: torch.Tensor, lr: float, score=None) -> bool:
        """Log and save if it is time. Returns whether an epoch ended.

        loss: a scalar on the device; it is read only when something is logged or saved, so the host seldom waits.
        score: () -> {name: figure}, called and logged after every --eval-every epochs (without that flag: after each)
            and after the last; the result is in `scores` until the next step ends.
        Raises UserError if a loss or a weight is not finite."""
        done, self.scores = step + 1, None
        self.window.append(loss), self.rates.append(lr)
        end_of_epoch = done % self.steps_per_epoch == 0
        save = end_of_epoch or done == self.last or (self.cfg.save_every and done % self.cfg.save_every == 0)
        if not save and done % self.cfg.log_every:
            return False
        losses = torch.stack(self.window)
        if world() > 1:
            dist.all_reduce(losses)
        losses = (losses / world()).tolist()             # the one place where the host waits
        advice = (f"; the last good checkpoint stays in {self.folder}. Try a lower --base-lr, a longer "
                  "--warmup-epochs or --precision fp32, with another --output")
        for i, value in enumerate(losses):
            if not np.isfinite(value):
                raise UserError(f"the loss is {value} at step {done - len(losses) + i}, learning rate "
                                f"{self.rates[i]:.3g}{advice}")
        if save and not all(p.isfinite().all() for p in self.model.parameters()):
            raise UserError(f"a weight is not finite after step {step}, learning rate {lr:.3g}{advice}")
        speed = self.cfg.batch_size * len(losses) / (time.time() - self.began)
        self.loss, self.window, self.rates = float(np.mean(losses)), [], []
        self.epoch_losses += losses
        self.write(step=done, loss=self.loss, lr=lr, images_per_s=speed)
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, lr {lr:.1e}, {speed:,.0f} images/s")
        if end_of_epoch:
            epoch, mean, self.epoch_losses = done // self.steps_per_epoch, float(np.mean(self.epoch_losses)), []
            self.write(step=done, epoch=epoch, epoch_loss=mean)
            say(f"epoch {epoch}/{self.cfg.epochs}: loss {mean:.4f}, lr {lr:.2e}, {speed:,.0f} images/s")
            if score and (epoch % getattr(self.cfg, "eval_every", 1) == 0 or epoch == self.cfg.epochs):
                self.scores = score()
                self.write(step=done, **self.scores)
        if save and rank() == 0:
            self.save(done)
        self.began = None                                # a picture may follow: not training time
        return end_of_epoch

    def write(self, **values):
        write_metrics(self.folder, **values)

    def finish(self, encoder: dict, encoders: dict, data: Data, scores: dict | None = None) -> dict:
        """Write encoder.pt ({timm's name: tensor}) and the last line of metrics.jsonl, and return it.

        encoders: {name: images -> features (B, D)}, to be compared by k-NN where there are labels;
        scores: {name: figure}, what else belongs in that line."""
        broken = data.pretrain.broken.to(self.device, torch.int32)
        if world() > 1:
            dist.all_reduce(broken, dist.ReduceOp.MAX)   # each process met its own
        result = {"step": max(self.first, self.last), "loss": self.loss, "unreadable": int(broken.sum())}
        result |= scores or {}
        if data.test is not None:
            for name, encode in encoders.items():
                result[f"knn_{name}"], result[f"recall1_{name}"] = knn_score(encode, data, self.cfg, self.device)
            say(f"k-NN accuracy, {len(data.classes)} classes, {len(data.test)} test pictures: "
                + ", ".join(f"{name} {result[f'knn_{name}']:.1f} %" for name in encoders))
        if rank() == 0:
            save_whole({name: value.cpu() for name, value in encoder.items()}, self.folder / "encoder.pt")
        self.write(**result)
        say(f"{result['unreadable']} unreadable pictures; wrote {self.folder}/: checkpoint.pt, encoder.pt "
            "(timm's names), metrics.jsonl, config.json, *.png")
        return result


# ------------------------------------------------------------------------------------------- k-NN
@torch.no_grad()
def features(encode, pictures: Pictures, size: int, device, batch_size: int = 500, workers: int = 0,
             limit: int = 0, view=None, rows=None):
    """Features of pictures, without augmentation: encode(images (B, 3, size, size)) -> (B, D).

    view: picture -> picture, in place of the centre crop. rows: which pictures (numbers); else at most `limit` of them,
    evenly spread (0: all). Each process encodes a share and all get everything: features fp32 (n, D) and labels (n,)
    on the device, in the order of the pictures. Unreadable pictures are left out."""
    count = min(limit or len(pictures), len(pictures))
    rows = np.linspace(0, len(pictures) - 1, count).round().astype(int) if rows is None else rows
    mine = np.arange(rank(), max(len(rows), rank() + 1), world()) % len(rows)        # at least one
    parts = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    batches = loader(pictures.through(view or Centre(size)), [[(0, i) for i in rows[part]] for part in parts], workers)
    batches = tqdm(batches, "features", disable=None if rank() == 0 else True, leave=False)
    table, read = None, torch.zeros(len(rows), device=device)
    for part, (images, _, index) in zip(parts, batches):
        encoded = encode(to_device(images, device)).float()
        table = encoded.new_zeros(len(rows), encoded.shape[1]) if table is None else table
        table[part], read[part] = encoded, (index == torch.from_numpy(rows[part])).float().to(device)
    if world() > 1:
        dist.all_reduce(table), dist.all_reduce(read)
        table /= read.clamp(min=1)[:, None]              # of fewer rows than processes several encode the same
    labels = torch.from_numpy(pictures.labels[rows]).to(device)
    return table[read > 0], labels[read > 0]


def nearest(test, train, k: int):
    """For each feature of test (n, D) the k of train (m, D) with the largest cosine, best first:
    similarity (n, k) and row numbers (n, k). k may exceed m."""
    test, train = F.normalize(test.float(), dim=1), F.normalize(train.float(), dim=1)
    found = [(query @ train.T).topk(min(k, len(train))) for query in test.split(1000)]
    return torch.cat([similarity for similarity, _ in found]), torch.cat([rows for _, rows in found])


def vote(similarity, voters, labels, classes: int, temperature: float = 0.07):
    """Neighbours' similarity (n, k) and labels (n, k), true labels (n,) -> (top-1, top-5) in percent.

    Weighted k-NN (DINO): each votes with exp(similarity / temperature); the largest possible weight
    is taken out, so nothing overflows. Top-5 counts min(5, k) classes."""
    votes = torch.zeros(len(labels), classes, device=labels.device)
    votes.scatter_add_(1, voters, ((similarity - 1) / temperature).exp())                  # (n, classes)
    hits = votes.sort(descending=True).indices[:, :min(5, voters.shape[1])] == labels[:, None]
    return 100 * hits[:, 0].float().mean().item(), 100 * hits.any(dim=1).float().mean().item()


def knn(train, train_labels, test, test_labels, classes: int, k: int = 20, temperature: float = 0.07):
    """Weighted k-NN: (top-1, top-5) accuracy in percent; features (n, D), labels (n,)."""
    similarity, rows = nearest(test, train, k)
    return vote(similarity, train_labels[rows], test_labels, classes, temperature)


def top1_top5(logits, labels) -> dict:
    """Percent of logits (n, C) whose largest, or five largest, hold the label (n,)."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return {"top1": 100 * hits[:, 0].float().mean().item(), "top5": 100 * hits.any(dim=1).float().mean().item()}


def mean_token(model):
    """The feature that k-NN compares: the mean of a picture's patch tokens, images -> (B, D)."""
    return lambda images: model.encode(images)[:, 1:].mean(dim=1)


def shrunk_pixels(images: torch.Tensor) -> torch.Tensor:
    """A baseline for k-NN without any network: images (B, 3, H, W) -> 32 x 32 pixels (B, 3072)."""
    return F.adaptive_avg_pool2d(images, 32).flatten(1)


def knn_score(encode, data: Data, cfg, device) -> tuple[float, float]:
    """Percent of the test set that `knn` (k = 20) gets right, and whose nearest neighbour alone is of its class
    (recall@1); the neighbours are at most --knn-pictures of the training set."""
    size = {"size": cfg.image_size, "device": device, "workers": cfg.workers}
    train, labels = features(encode, data.train, limit=cfg.knn_pictures, **size)
    test, truth = features(encode, data.test, **size)
    similarity, rows = nearest(test, train, 20)
    return tuple(vote(similarity[:, :k], labels[rows[:, :k]], truth, len(data.classes))[0] for k in (20, 1))


# ---------------------------------------------------------------------------- pictures for people
def sample(pictures: Pictures, size: int, count: int, device) -> torch.Tensor:
    """The centres of `count` pictures spread over a data set, normalised (count, 3, size, size)."""
    pictures = pictures.through(Centre(size))
    chosen = np.linspace(0, len(pictures) - 1, count).astype(int)
    return to_device(torch.stack([pictures[0, i][0] for i in chosen]), device)


def flat(colours, patch_size: int):
    """Colours (..., 3) of 0 to 255 -> normalised patches of one colour (..., P*P*3)."""
    mean, std = (v.flatten() for v in mean_std(colours.device))
    return ((colours / 255 - mean) / std).tile((patch_size ** 2,))


def save_rows(path: Path, rows: dict):
    """Write a PNG: for each {title: normalised images (n, 3, H, W)} a line of text, then a row."""
    mean, std = mean_std("cpu")
    strips = []
    for title, images in rows.items():
        images = (images.float().cpu() * std + mean).clamp(0, 1)
        images = F.interpolate(images, scale_factor=max(1, 96 // images.shape[-1]), mode="nearest")
        row = make_grid(images, nrow=len(images), padding=2, pad_value=1.0).mul(255).byte()
        strip = Image.new("RGB", (row.shape[2], row.shape[1] + 14), "white")
        ImageDraw.Draw(strip).text((3, 1), title, fill="black")
        strip.paste(v2.functional.to_pil_image(row), (0, 14))
        strips.append(np.asarray(strip))
    Image.fromarray(np.concatenate(strips)).save(path)


# ----------------------------------------------------------------------------------------- shrink
def shrink(source: str, target: str, size: int = 256, workers: int = 0):
    """Copy a folder of pictures as JPEGs of `size` pixels on the shorter side (never enlarged).

    The layout stays (x.png becomes x.png.jpg, what is no picture is copied); what is there already
    is left alone, so an interrupted run goes on. Returns how many were written and unreadable."""
    files = [path for path in sorted(Path(source).rglob("*")) if path.is_file()]
    if not files:
        raise UserError(f"no folder {source}, or nothing in it")
    one = functools.partial(_shrink_one, source, target, size)
    with multiprocessing.Pool(workers or os.cpu_count(), leave_ctrl_c_to_the_parent) as pool:
        done = list(tqdm(pool.imap_unordered(one, files, 16), total=len(files), disable=None))
    unreadable = [outcome for outcome in done if isinstance(outcome, str)]
    print("".join(f"skipped, cannot be read: {outcome}\n" for outcome in unreadable), end="", file=sys.stderr)
    return done.count(True), len(unreadable)


def _shrink_one(source: str, target: str, size: int, path: Path) -> bool | str:
    new = Path(target, path.relative_to(source))
    picture = path.suffix.lower() in datasets.folder.IMG_EXTENSIONS
    if picture and path.suffix.lower() not in (".jpg", ".jpeg"):
        new = new.with_name(new.name + ".jpg")
    if new.exists():
        return False
    torch.set_num_threads(1)
    try:
        data = path.read_bytes()
        if picture:
            image = decode(data)
            if min(image.shape[-2:]) > size:
                image = v2.functional.resize(image, [size], v2.InterpolationMode.BICUBIC)
            data = encode_jpeg(image, 90).numpy().tobytes()
    except OSError as error:
        return f"{path} ({error})"
    new.parent.mkdir(parents=True, exist_ok=True)
    part = new.with_name(new.name + ".part")             # whole or absent: a kill leaves no half file
    part.write_bytes(data)
    os.replace(part, new)
    return True


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tools for data sets.")
    command = parser.add_subparsers(required=True).add_parser("shrink", help=shrink.__doc__.splitlines()[0])
    command.add_argument("source", metavar="FOLDER")
    command.add_argument("target", metavar="SMALL_FOLDER")
    command.add_argument("--size", type=int, default=256, help="pixels of the shorter side (default: 256)")
    command.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")
    with launched():
        given = parser.parse_args(argv)
        written, unreadable = shrink(**vars(given))
        print(f"wrote {written} files to {given.target}, {unreadable} unreadable")


if __name__ == "__main__":
    main()
