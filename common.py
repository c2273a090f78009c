"""What the method scripts share and none of them is about: the command line, processes, the
learning rate, files of weights, a run's folder with its checkpoints and its log.

Models, masks, losses and training loops are in the scripts; images are in data.py.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import sys
import time
import types
import typing
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.ops import stochastic_depth
from tqdm import tqdm

LOG_EVERY = 50                                           # steps between lines of metrics.jsonl


# -------------------------------------------------------------------------------- errors and log
class UserError(Exception):
    """An error that the user can fix: `command_line` prints it as one line, without a traceback."""


def first_line(error: BaseException) -> str:
    """An exception's message cut to one line; its type where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def rank() -> int:
    return int(os.environ.get("RANK", 0))                # set by torchrun


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))          # set by torchrun


def log(*words):
    """Print on the first process, above the progress bar if there is one."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


@contextlib.contextmanager
def writing_to(path):
    """Around the writing of a file that the user named: a full disk is one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"cannot write to {path} ({reason}); --output says where") from error


@contextlib.contextmanager
def command_line():
    """Around a script's `main`: turns what the user can fix into one line and an exit status.

    UserError and a lack of memory: 2. Ctrl-C: 130. Any other exception is a fault of the code and
    keeps its traceback."""
    message = None
    try:
        yield
    except UserError as error:
        # one that a loader process raised comes with its traceback; the message is the last line
        message = str(error).strip().split("\n")[-1].removeprefix("common.UserError: ")
    except (MemoryError, RuntimeError) as error:
        no_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        no_memory = no_memory or "can't allocate memory" in str(error)         # torch on a CPU
        if no_memory:
            message = (f"out of memory ({first_line(error)}); a smaller --batch-size, a larger "
                       "--accumulate or fewer --workers need less")
        elif type(error).__name__ in ("InductorError", "BackendCompilerFailed"):
            message = (f"the model cannot be compiled ({first_line(error)}); --no-compile does "
                       "without")
        else:
            raise
    except KeyboardInterrupt:
        if rank() == 0:
            print("\nstopped; the same command (without --no-resume) goes on from the last "
                  "checkpoint", file=sys.stderr)
        sys.exit(130)
    if message is not None:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:
            time.sleep(5)                                # torchrun ends this process meanwhile if
        tqdm.write(f"error: {message}", file=sys.stderr)         # the first one met the error, too
        sys.exit(2)
    if dist.is_initialized():
        dist.barrier()                                   # without it gloo's destructor can wait
        dist.destroy_process_group()                     # for gloo's thread for ever (torch 2.6)


# ----------------------------------------------------------------------- processes and randomness
def init_distributed(cfg) -> torch.device:
    """Join torchrun's processes (nccl on GPUs, else gloo), seed torch, return the device.

    Raises UserError if there is no such device."""
    kind = cfg.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda" and processes > torch.cuda.device_count():
        raise UserError(f"{processes} processes need a GPU each, torch sees "
                        f"{torch.cuda.device_count()}; --nproc_per_node or --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine or this torch has no Metal")
    if kind == "mps":
        log("--device mps has not been tried by its authors; --device cpu has")
    device = torch.device(kind, local_rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
        if cfg.precision != "fp32":                      # TF32 for the products that stay fp32
            torch.set_float32_matmul_precision("high")
    if kind == "cpu":
        keep_freed_memory()
    if world_size() > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(hours=2)            # the first process may be downloading
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(restart, store)         # restarts share torchrun's store
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank(),
                                world_size=world_size(), timeout=timeout)
    torch.manual_seed(cfg.seed)
    return device


def keep_freed_memory():
    """On Linux, let malloc keep what a step frees, since the next step needs as much: asking the
    system for it anew costs twice the page faults (tests/measure/benchmark.md)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:                                  # not glibc
        return
    mallopt(-1, 2 ** 31 - 1)                             # M_TRIM_THRESHOLD: give nothing back
    mallopt(-2, 2 ** 28)                                 # M_TOP_PAD: grow in large steps
    mallopt(-3, 2 ** 25)                                 # M_MMAP_THRESHOLD: keep large blocks too


@contextlib.contextmanager
def rank_zero_first():
    """The body runs on the first process, then on the others, which find what it downloaded."""
    if world_size() > 1 and rank() > 0:
        dist.barrier()
    yield
    if world_size() > 1 and rank() == 0:
        dist.barrier()


def derive_seed(*numbers: int) -> int:
    """Several non-negative integers -> one 32-bit seed.

    Trailing zeros are ignored, derive_seed(1, 2) == derive_seed(1, 2, 0): a second use of the same
    numbers needs a last one that is not 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def mask_noise(cfg, step: int, width: int, device) -> torch.Tensor:
    """Uniform noise in [0, 1) for one step: (accumulate, images of a micro-batch, width).

    All processes draw the noise of the whole global batch and take their share of it, in the order
    in which data.BatchSampler deals out images: the same image meets the same noise whatever the
    number of processes."""
    seed = derive_seed(cfg.seed, step)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.rand(cfg.batch_size, width, generator=generator, device=device)
    noise = noise.view(cfg.accumulate, -1, world_size(), width)
    return noise[:, :, rank()]


# ------------------------------------------------------------------------------------------ flags
@dataclass(kw_only=True)
class RunConfig:
    """The settings of every run; each script's Config adds those of its method."""
    data: str = "shapes"          # a name among the presets, or a folder of images
    data_root: str = "data"       # where the named data sets are, or are downloaded to
    preset: str = ""              # settings to start from; empty: those of --data, else "folder"
    output: str = ""              # folder of the run; empty: runs/SCRIPT-DATA
    seed: int = 0                 # decides weights, order, crops and masks
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda if there is a GPU, else cpu
    workers: int = 0              # loader processes for each training process; 0: none
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it, CPUs with AMX from width 192
    compile: bool | None = None   # compile the model: slow start, faster steps; neither: on GPUs, but not for shapes
    resume: bool = True           # go on from the folder's checkpoint; no: keep the folder as OUTPUT.1
    max_steps: int = 0            # stop after this many steps of the schedule; 0: at its end
    save_every: int = 0           # steps between checkpoints, besides one after each epoch; 0: none


LIMITS = {                                               # (least, most) of each number
    "seed": (0, 2 ** 32 - 1), "workers": (0, 1024), "max_steps": (0, 10 ** 9),
    "save_every": (0, 10 ** 9), "eval_every": (1, 10 ** 6),
    "batch_size": (1, 10 ** 7), "accumulate": (1, 10 ** 6), "epochs": (1, 10 ** 6),
    "warmup_epochs": (0, 10 ** 6), "base_lr": (0, 1000), "min_lr": (0, 1000),
    "weight_decay": (0, 100), "beta2": (0, 0.99999), "clip_grad": (1e-6, 10 ** 9),
    "ema": (0, 0.9999999), "layer_decay": (0.01, 1), "drop_path": (0, 0.99),
    "image_size": (1, 8192), "patch_size": (1, 1024), "layer_scale": (0, 100),
    "embed_dim": (1, 16384), "depth": (1, 1000), "num_heads": (1, 1024),
    "decoder_embed_dim": (4, 16384), "decoder_depth": (1, 1000), "decoder_num_heads": (1, 1024),
    "mask_ratio": (0, 1), "throw_ratio": (0, 1), "mask_unit": (1, 8192), "min_block": (1, 65536),
    "crop_scale": (0.001, 1), "color_jitter": (0, 1), "randaugment": (0, 10), "mixup": (0, 100),
    "cutmix": (0, 100), "smoothing": (0, 0.99), "erasing": (0, 1),
    "beta": (1e-6, 1000), "momentum": (0, 1), "morphs": (0, 100), "most_rounds": (1, 1000),
    "attention_from": (0, 10 ** 6), "refresh_every": (1, 10 ** 6),
    "shots": (0, 10 ** 9), "percent": (1e-6, 100), "mim_weight": (0, 10 ** 6), "codes": (2, 65536),
    "text_width": (1, 16384), "text_depth": (1, 1000), "text_heads": (1, 1024),
    "proj_dim": (1, 65536), "text_length": (3, 4096), "vocab_size": (1, 2 ** 24),
    "epoch_pairs": (0, 10 ** 12),
}
DIVISORS = (("patch_size", "image_size"), ("num_heads", "embed_dim"),
            ("decoder_num_heads", "decoder_embed_dim"), ("text_heads", "text_width"))


def check(cfg):
    """Raises UserError where settings cannot be: outside LIMITS, or do not fit together."""
    settings = {name: value for name, value in vars(cfg).items() if value is not None}
    if not cfg.data:
        raise UserError("--data is empty; it is a name or a folder")
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            least, most = LIMITS.get(name, (-sys.float_info.max, sys.float_info.max))
            if not least <= value <= most:               # true for nan, too
                raise UserError(f"{name} is {value}, it must be from {least} to {most}")
    for divisor, whole in DIVISORS:
        if {divisor, whole} <= settings.keys() and settings[whole] % settings[divisor]:
            raise UserError(f"{divisor} {settings[divisor]} does not divide "
                            f"{whole} {settings[whole]}")
    for name in ("embed_dim", "decoder_embed_dim"):      # sine and cosine of a row and of a column
        if settings.get(name, 0) % 4:
            raise UserError(f"{name} is {settings[name]}, it must be a multiple of 4")
    if settings.get("warmup_epochs", 0) >= settings.get("epochs", math.inf):
        raise UserError(f"warmup_epochs is {cfg.warmup_epochs:g}, it must be less than epochs, "
                        f"{cfg.epochs}")


def default_output(script: str, data: str) -> str:
    return f"runs/{script}-{Path(data).resolve().name}"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def parse_config(config_class, presets: dict, argv=None, description: str = ""):
    """An instance of `config_class` from the command line: flag over preset over default.

    Each field is a flag (`base_lr`: --base-lr; a bool: also --no-...) and the comment behind it is
    the flag's help. The preset is --preset, else --data, else "folder". Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]

    preset_parser = Parser(add_help=False, allow_abbrev=False)  # first: --help shows its values
    preset_parser.add_argument("--data", default=config_class.data)
    preset_parser.add_argument("--preset")
    chosen, _ = preset_parser.parse_known_args(argv)
    name = chosen.preset or (chosen.data if chosen.data in presets else "folder")
    if name not in presets:
        raise UserError(f"no preset {name}; there are {', '.join(presets)}")

    parser = Parser(description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, config_class, presets[name])
    explicit = parser.parse_args(argv)
    settings = {**presets[name], **vars(explicit), "preset": name}
    if hasattr(config_class, "warmup_epochs") and "warmup_epochs" not in explicit:
        epochs = settings.get("epochs", config_class.epochs)
        warmup = settings.get("warmup_epochs", config_class.warmup_epochs)
        if warmup >= epochs > 0:
            settings["warmup_epochs"] = epochs / 10
            log(f"warmup_epochs {warmup:g} does not fit {epochs} epochs: {epochs / 10:g} instead")
    return config_class(**settings)


def add_flags(parser, config_class, preset: dict):
    """One flag for each field of the dataclass: the method's own first, then RunConfig's."""
    kinds = typing.get_type_hints(config_class)
    source = inspect.getsource(RunConfig) + inspect.getsource(config_class)
    helps = dict(re.findall(r"^    (\w+):.*?# *(.+)$", source, re.M))
    method_flags = parser.add_argument_group("the method")
    run_flags = parser.add_argument_group("the run")
    for field in dataclasses.fields(config_class):
        kind = kinds[field.name]
        default = preset.get(field.name, field.default)
        if isinstance(kind, types.UnionType):            # int | None: an int
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        text = f"{helps.get(field.name, '')} (default: {default!r})".replace("%", "%%")
        group = run_flags if hasattr(RunConfig, field.name) else method_flags
        group.add_argument("--" + field.name.replace("_", "-"), help=text, **options)


# --------------------------------------------------------------------------------------- schedule
def plan_steps(cfg, images: int) -> int:
    """Optimizer steps in an epoch of `images`; the last, incomplete batch is dropped.

    Logs batch size, steps and peak learning rate. Raises UserError on sizes that do not fit."""
    micro_batches = world_size() * cfg.accumulate
    if cfg.batch_size % micro_batches:
        fitting = math.ceil(cfg.batch_size / micro_batches) * micro_batches
        raise UserError(f"--batch-size {cfg.batch_size} (of all processes) does not divide by "
                        f"{world_size()} processes x --accumulate {cfg.accumulate}; "
                        f"try --batch-size {fitting}")
    if images < cfg.batch_size:
        raise UserError(f"{images} images make no batch of {cfg.batch_size}; use a smaller "
                        "--batch-size")
    steps = images // cfg.batch_size
    log(f"global batch {cfg.batch_size} = {cfg.batch_size // micro_batches} per process x "
        f"{cfg.accumulate} accumulation x {world_size()} processes; "
        f"{cfg.epochs} epochs x {steps} steps")
    log(f"peak learning rate {cfg.base_lr * cfg.batch_size / 256:g} = {cfg.base_lr:g} x "
        f"{cfg.batch_size} / 256")
    return steps


def learning_rate(step: float, warmup: float, total: float, peak: float, minimum: float = 0.0,
                  shape: str = "cosine") -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine (or a straight line) to `minimum`.

    step, warmup and total are in one unit: steps, or epochs. shape: "cosine" or "linear"."""
    if step < warmup:
        return peak * step / warmup
    if shape == "linear":
        return minimum + (peak - minimum) * (total - step) / (total - warmup)
    cosine = math.cos(math.pi * (step - warmup) / (total - warmup))
    return minimum + (peak - minimum) * 0.5 * (1 + cosine)


def set_lr(optimizer, cfg, step: int, steps_per_epoch: int, minimum: float = 0.0,
           shape: str = "cosine") -> float:
    """Give the optimizer the learning rate of this step, and return it.

    Its peak is base_lr * batch_size / 256. A parameter group may have an "lr_scale" of its own."""
    peak = cfg.base_lr * cfg.batch_size / 256
    warmup = cfg.warmup_epochs * steps_per_epoch
    total = cfg.epochs * steps_per_epoch
    lr = learning_rate(step, warmup, total, peak, minimum, shape)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def parameter_groups(model, weight_decay: float, undecayed: tuple = ()) -> list[dict]:
    """Two groups for AdamW: vectors (biases, normalisation) and the `undecayed` names are not
    decayed, everything else is."""
    decayed = {"params": [], "weight_decay": weight_decay}
    others = {"params": [], "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and name not in undecayed
            group = decayed if is_decayed else others
            group["params"].append(parameter)
    return [decayed, others]


def count_parameters(model) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def add_drop_path(blocks, rate: float):
    """Stochastic depth: block i leaves out a branch for an image with a probability that rises
    linearly from 0 to `rate`, and scales up what it keeps. Parameter names do not change."""
    for block, probability in zip(blocks, np.linspace(0, rate, len(blocks)).tolist()):
        def drop(module, _, output, probability=probability):
            return stochastic_depth(output, probability, "row", module.training)
        block.attn.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)


def autocast(device, precision: str, width: int = 0):
    """bf16 matrix products if asked for, or by "auto" where they are fast; never fp16.

    Fast: GPUs that do not only emulate them (as T4, V100, RTX 20 do), and CPUs with AMX if the
    model's width is known and at least 192."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()          # absent in old torch
        fast = device.type == "cpu" and width >= 192 and capabilities.get("amx_bf16", False)
    bf16 = precision == "bf16" or (precision == "auto" and fast)
    if bf16 and device.type == "cpu":                    # the fused attention is slow there in bf16
        torch.backends.cuda.enable_flash_sdp(False)      # despite its name it is the CPU's switch
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def wants_compile(cfg, device) -> bool:
    """--compile or --no-compile. Neither: on a GPU, but for `shapes`, whose run is too short."""
    if cfg.compile is None:
        return device.type == "cuda" and cfg.data != "shapes"
    return cfg.compile


def sync_on_last(network, i: int, accumulate: int):
    """Around micro-batch i of a step: DistributedDataParallel sums gradients in the last alone."""
    if world_size() > 1 and i < accumulate - 1:
        return network.no_sync()
    return contextlib.nullcontext()


# ------------------------------------------------------------------------------- files of weights
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")       # of wrapped modules


def check_archive(path) -> list[str]:
    """The names in a zip archive as torch.save writes it. Raises ValueError if a checksum, which
    torch.load does not verify, is wrong. Older files are no archives and have no names."""
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {ascii(damaged)} in it is wrong")
        return archive.namelist()


def read_file(path, torchscript: tuple = ()) -> dict:
    """Everything that a file of weights holds, on the CPU. Raises UserError.

    Nothing in the file is executed, except TorchScript, which is a program: OpenAI's CLIPs are
    published as such. It runs if its SHA-256 is in `torchscript`."""
    path = Path(path)
    if not path.is_file():                               # nor is a named pipe a file
        raise UserError(f"no file {path}")
    head = b""
    try:
        with open(path, "rb") as file:
            head = file.read(20)
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file      # an optional package
            return load_file(path)
        if any(name.endswith("/constants.pkl") for name in check_archive(path)):
            return read_torchscript(path, torchscript)
        with torch.serialization.safe_globals([argparse.Namespace]):           # of flags
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (UserError, MemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{path} needs a package: pip install safetensors") from error
    except Exception as error:                           # zip, pickle or torch, as the file is
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(f"{path} holds a {refused[1]}; only tensors and plain values are "
                            "loaded, since others could run a program") from error
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):    # it advises to load the file unsafely
            reason = f"it begins with {head!r}"
        raise UserError(f"{path} is no file of weights: {reason}") from error


def read_torchscript(path, known_digests: tuple) -> dict:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest not in known_digests:
        raise UserError(f"{path} is TorchScript, a program; of these only OpenAI's released CLIPs "
                        "are run, known by their SHA-256")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)   # TorchScript is deprecated
        return torch.jit.load(str(path), map_location="cpu").state_dict()


def read_weights(path, torchscript: tuple = ()) -> tuple[dict, dict]:
    """(everything in the file, its weights {name: tensor} without prefixes of wrapped modules).

    The weights may lie under "model" (MAE, ours), "state_dict" (timm) or "teacher" (DINO, whose
    student is the other one in the file). Raises UserError."""
    saved = read_file(path, torchscript)
    weights = saved
    for key in ("model", "state_dict", "teacher"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    if not weights or not all(isinstance(name, str) and torch.is_tensor(value)
                              for name, value in weights.items()):
        raise UserError(f"{path} holds no weights")
    stripped = {}
    for name, value in weights.items():
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise UserError(f"{path} holds {name} twice, under different prefixes: two models?")
        stripped[name] = value
    return saved, stripped


def load_weights(module, path, optional: tuple = (), weights: dict | None = None) -> dict:
    """Load a file of weights into a module with timm's names, and log exactly what was loaded.

    optional: prefixes of the names of parts such as the decoder. These parts may be absent, as a
    whole, from the file (the module then keeps its values) or from the module (the file's are then
    left out). weights: {name: tensor} of the file if they have been read already.
    Position tables of another grid than `module.grid` are resized (bicubic).
    Returns what was left out. Raises UserError unless all other names and all shapes are equal."""
    if weights is None:
        _, weights = read_weights(path)

    def is_optional(name):
        return name.startswith(tuple(optional))

    own = module.state_dict()
    missing = own.keys() - weights.keys()
    left_out = weights.keys() - own.keys()
    required = missing
    unexpected = left_out
    if not any(is_optional(name) for name in weights):   # the file has none of these parts
        required = {name for name in missing if not is_optional(name)}
    if not any(is_optional(name) for name in own):       # the module has none of them
        unexpected = {name for name in left_out if not is_optional(name)}
    advice = "check --model, --patch-size and the like"
    if required or unexpected:
        raise UserError(f"{path} does not fit: missing {listed(required)}, unexpected "
                        f"{listed(unexpected)}; {advice}")
    loaded = {}
    for name in own.keys() & weights.keys():
        value = weights[name]
        try:
            loaded[name] = resized(name, value, own[name], getattr(module, "grid", None))
        except ValueError as error:
            raise UserError(f"{path}: {name} {error}") from error
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{path}: not all of {name} is finite")
        if loaded[name] is not value:
            log(f"{name}: {list(value.shape)} resized to {list(loaded[name].shape)} (bicubic)")
    other_size = {name for name, value in loaded.items() if value.shape != own[name].shape}
    if other_size:
        raise UserError(f"{path} does not fit: of another size {listed(other_size)}; {advice}")
    module.load_state_dict(loaded, strict=False)
    log(f"{path}: {len(loaded)} tensors loaded, missing from it {listed(missing)}, left out "
        f"{listed(left_out)}")
    return {name: weights[name] for name in left_out}


def listed(names) -> str:
    """How many names, and which, those of equal blocks as one: "2 [blocks.*.norm1.bias]"."""
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    more = ", ..." if len(kinds) > 6 else ""
    return f"{len(names)} [{', '.join(kinds[:6])}{more}]"


def resized(name: str, value, own_value, grid: tuple[int, int] | None):
    """A tensor from a file, resized to `grid` if it is a position table."""
    if value.ndim != own_value.ndim or value.shape[-1:] != own_value.shape[-1:]:
        return value
    if name in ("pos_embed", "decoder_pos_embed"):
        return resize_positions(value, grid)
    if name.endswith("relative_position_bias_table"):
        return resize_relative_positions(value, grid)
    return value


def resize_positions(table, grid: tuple[int, int]):
    """Position table (1, 1 + n*n, D) of a square grid -> (1, 1 + h*w, D), bicubic; the class
    token's row stays. As many rows: untouched. Raises ValueError if the grid is no square."""
    rows = table.shape[1] - 1
    side = math.isqrt(max(rows, 0))
    if rows == grid[0] * grid[1]:
        return table
    if side * side != rows or rows < 1:
        raise ValueError(f"has {rows} rows besides the class token's, which are no square grid")
    patches = table[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))  # (1, D, n, n)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    patches = patches.flatten(2).transpose(1, 2)                               # (1, h*w, D)
    return torch.cat([table[:, :1].float(), patches], dim=1)


def resize_relative_positions(table, grid: tuple[int, int]):
    """Relative table ((2n - 1)^2 + 3, heads) of a square grid -> that of `grid`: offsets bicubic,
    the class token's three rows kept. As many rows: untouched. Raises ValueError if no square."""
    rows = table.shape[0] - 3
    side = math.isqrt(max(rows, 0))                                            # 2n - 1
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if rows == size[0] * size[1]:
        return table
    if side * side != rows or side % 2 == 0:
        raise ValueError(f"has {rows} rows for offsets, which are no square grid's")
    offsets = table[:-3].float().T.unflatten(1, (side, side))                  # (heads, side, side)
    offsets = offsets.unsqueeze(0)
    offsets = F.interpolate(offsets, size=size, mode="bicubic", align_corners=True)
    return torch.cat([offsets[0].flatten(1).T, table[-3:].float()])


# -------------------------------------------------------------------------------------------- run
MAY_DIFFER = {"output", "data_root", "preset", "workers", "accumulate", "compile", "resume",
              "max_steps", "save_every", "device", "eval_every"}     # when a run is resumed
ADVICE = "--output NEW_FOLDER starts another run, --no-resume sets this one aside"


def append_metrics(folder: Path, **values):
    """Append one line to the folder's metrics.jsonl, floats to six digits."""
    if rank() > 0:
        return
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value
               for name, value in values.items()}
    with writing_to(folder), open(Path(folder, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(rounded) + "\n")


def save_atomic(state, path: Path, previous: Path | None = None):
    """torch.save, safe against a kill: `path` is absent or complete. The old file, if there is
    one, becomes `previous`."""
    packed = io.BytesIO()
    torch.save(state, packed)                            # in memory: a full disk is an OSError
    new = path.with_name(path.name + ".new")
    with writing_to(path):
        try:
            with open(new, "wb") as file:
                file.write(packed.getbuffer())
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            new.unlink(missing_ok=True)                  # else it would keep the disk full
            raise
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(new, path)


def lock_folder(folder: Path):
    """Lock a run's folder for this process as long as the returned file is open.

    The lock goes with the process, however that ends, and loader processes do not inherit it.
    Where the system or the file system has no such locks, nothing is locked. Raises UserError."""
    file = open(folder / "run.lock", "a")
    try:
        import fcntl                                     # not on Windows
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"another run is writing to {folder}; --output says where else") from error
    except (ImportError, OSError):
        pass
    return file


class Run:
    """A run's folder (config.json, metrics.jsonl, checkpoint.pt, images), progress bar and end.

    If the folder holds a checkpoint, it is loaded, and `first_step` is the step to go on from;
    `last_step` is the one to stop before. tensors: {name: tensor} of the script's own that are
    saved and restored with the weights. Raises UserError on another configuration's checkpoint."""

    def __init__(self, method: str, cfg, model, optimizer, steps_per_epoch: int,
                 tensors: dict | None = None):
        self.method = method
        self.cfg = cfg
        self.model = model
        self.optimizer = optimizer
        self.tensors = tensors or {}
        self.folder = Path(cfg.output)
        self.device = next(model.parameters()).device
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = cfg.epochs * steps_per_epoch
        self.first_step = 0
        self.log_bytes = 0                               # length of metrics.jsonl at that step
        self.last_step = min(cfg.max_steps or self.total_steps, self.total_steps)
        self.loss = None                                 # mean of the last logged interval
        self.epoch_losses = []                           # of the epoch's steps, as far as fetched
        self.unread_losses = []                          # of the steps since, still on the device
        self.scores = None                               # of the last step, if it was scored
        self.damaged = False                             # whether checkpoint.pt could not be read
        self.interval_start = None                       # of images_per_s; None: the next step
        log("configuration: " + ", ".join(f"{name} {value}" for name, value in vars(cfg).items()))
        resume = self.open_folder()
        if resume:
            self.load()
        if world_size() > 1:
            steps = [None] * world_size()
            dist.all_gather_object(steps, self.first_step)
            if len(set(steps)) > 1:
                raise UserError(f"the processes see checkpoints of steps {sorted(set(steps))}; "
                                "--output must be on a file system that all machines share")
        if rank() == 0:
            self.start_files()

    def open_folder(self) -> bool:
        """Create and lock the folder; with --no-resume set an old one aside. Whether to resume: a
        process that torchrun has restarted does so in any case."""
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        resume = self.cfg.resume or restarted
        if rank() == 0:
            with writing_to(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = lock_folder(self.folder)
                if not resume and any(p.name != "run.lock" for p in self.folder.iterdir()):
                    self.set_aside()
        return resume

    def set_aside(self):
        """Rename the folder to the first free one of FOLDER.1, FOLDER.2, ...; make a new one."""
        if not self.folder.name:
            raise UserError(f"--no-resume cannot rename {self.folder}; --output another folder")
        numbers = itertools.count(1)
        names = (self.folder.with_name(f"{self.folder.name}.{number}") for number in numbers)
        free = next(path for path in names if not path.exists())
        os.rename(self.folder, free)
        log(f"--no-resume: the old {self.folder} is now {free}")
        self.folder.mkdir()
        self.lock = lock_folder(self.folder)

    def load(self):
        """Restore the newest checkpoint that can be read, if there is one. Raises UserError."""
        paths = [self.folder / name for name in ("checkpoint.pt", "checkpoint.previous.pt")]
        paths = [path for path in paths if path.exists()]
        for path in paths:
            try:
                if not path.is_file() or not check_archive(path):
                    raise ValueError("it is no file that torch.save writes")
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.refuse_other_settings(path, state)
                self.restore(state)
                return
            except (UserError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:                   # zip, pickle or torch: as the damage is
                fault = " ".join(str(error).split())[:200]
                log(f"{path} is damaged or of other code ({fault}); trying the one before it")
                self.damaged = self.damaged or path.name == "checkpoint.pt"
        if paths:
            raise UserError(f"no checkpoint in {self.folder} can be read; {ADVICE}")

    def refuse_other_settings(self, path: Path, state: dict):
        """Raises UserError, with what differs, on a checkpoint of other settings or data."""
        extra = {"method": self.method, "steps_per_epoch": self.steps_per_epoch}
        here = vars(self.cfg) | extra
        there = state["config"] | {name: state[name] for name in extra}
        here |= {name: list(tensor.shape) for name, tensor in self.tensors.items()}
        there |= {name: list(tensor.shape) for name, tensor in state["tensors"].items()}
        differ = []
        for name in {**here, **there}:
            value, saved = here.get(name, "nothing"), there.get(name, "nothing")
            if name not in MAY_DIFFER and value != saved:
                differ.append(f"{name}: {saved!r} there, {value!r} here")
        if differ:
            raise UserError(f"{path} is of another configuration or version ({'; '.join(differ)}); "
                            f"{ADVICE}")

    def restore(self, state: dict):
        """Raises an exception of any kind if a checkpoint does not fit, be it of edited code."""
        groups = self.optimizer.state_dict()["param_groups"]     # ours: cfg decides, not the file
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for parameter, values in self.optimizer.state.items():
            for value in values.values():                # a fused optimizer would crash on others
                if value.ndim and value.shape != parameter.shape:
                    raise ValueError("a state of the optimizer has another shape")
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        self.first_step = state["step"]
        self.log_bytes = state["log_bytes"]
        self.loss = state["loss"]
        self.epoch_losses = state["epoch_losses"]
        log(f"going on from step {self.first_step} of {self.total_steps} (--no-resume starts anew)")
        if self.first_step >= self.last_step:
            log("these steps are done: no more training, only the scores again")

    def start_files(self):
        """Write config.json, and cut metrics.jsonl where the checkpoint was taken."""
        about = {"method": self.method, "config": vars(self.cfg), "processes": world_size(),
                 "torch": torch.__version__, "device": str(self.device)}
        with writing_to(self.folder):
            (self.folder / "config.json").write_text(json.dumps(about, indent=1) + "\n")
            with open(self.folder / "metrics.jsonl", "a") as file:
                size = file.tell()
                file.truncate(min(size, self.log_bytes))
        if size < self.log_bytes:
            log(f"{self.folder}/metrics.jsonl has lost lines since step {self.first_step}")
        try:                                             # an optional package
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(self.folder), purge_step=self.first_step)
        except ImportError:
            self.tensorboard = None

    def save(self, step: int):
        """Write checkpoint.pt and keep the one before: after a kill one of them is complete."""
        path = self.folder / "checkpoint.pt"
        previous = self.folder / "checkpoint.previous.pt"
        if self.damaged:                                 # it must not push out the good one
            previous = None
        log_bytes = (self.folder / "metrics.jsonl").stat().st_size
        state = {"method": self.method, "config": dict(vars(self.cfg)), "step": step,
                 "steps_per_epoch": self.steps_per_epoch, "log_bytes": log_bytes,
                 "loss": self.loss, "epoch_losses": self.epoch_losses,
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "tensors": self.tensors}
        save_atomic(state, path, previous)
        self.damaged = False

    def steps(self, batches):
        """Yields (step, its `accumulate` micro-batches) from first_step to last_step - 1, with a
        progress bar if the first process has a terminal."""
        batches = iter(batches)
        steps = range(self.first_step, self.last_step)
        self.bar = tqdm(steps, initial=self.first_step, total=self.last_step, unit="step",
                        leave=False, disable=None if rank() == 0 else True)
        for step in self.bar:
            self.interval_start = self.interval_start or time.time()
            yield step, itertools.islice(batches, self.cfg.accumulate)         # read when asked for
        next(batches, None)                              # at their end the loader processes go

    def end_step(self, step: int, loss: torch.Tensor, lr: float, score=None) -> bool:
        """Log and save if it is time. Returns whether an epoch or the run ended.

        loss: a scalar on the device; the host waits for it only to log or to save.
        score: () -> {name: number}, called and logged after every --eval-every epochs (without
            that flag: each) and after the last; the result is in `scores` until the next step.
        Raises UserError if a loss or a weight is not finite."""
        done = step + 1
        self.scores = None
        self.unread_losses.append(loss)
        end_of_epoch = done % self.steps_per_epoch == 0
        end = end_of_epoch or done == self.last_step
        save = end
        if self.cfg.save_every and done % self.cfg.save_every == 0:
            save = True
        if not save and done % LOG_EVERY:
            return False
        speed = self.fetch_losses(done, lr, check_weights=save)
        if end_of_epoch:
            epoch = done // self.steps_per_epoch
            mean_loss = float(np.mean(self.epoch_losses))
            self.epoch_losses = []
            self.write(step=done, epoch=epoch, epoch_loss=mean_loss)
            log(f"epoch {epoch}/{self.cfg.epochs}: loss {mean_loss:.4f}, lr {lr:.2e}, "
                f"{speed:,.0f} images/s")
            every = getattr(self.cfg, "eval_every", 1)
            if score and (epoch % every == 0 or epoch == self.cfg.epochs):
                self.scores = score()
                self.write(step=done, **self.scores)
        if save and rank() == 0:
            self.save(done)
        self.interval_start = None                       # what follows may be no training
        return end

    def fetch_losses(self, done: int, lr: float, check_weights: bool) -> float:
        """Fetch and log the losses since the last time; returns the images per second. All
        processes call it together."""
        losses = torch.stack(self.unread_losses)
        if world_size() > 1:
            dist.all_reduce(losses)
        losses = (losses / world_size()).tolist()        # here the host waits for the device
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self.not_finite(f"the loss is {loss} at step {done - len(losses) + i}", lr)
        if check_weights:
            finite = [parameter.isfinite().all() for parameter in self.model.parameters()]
            if not torch.stack(finite).all():
                raise self.not_finite(f"a weight is not finite after step {done - 1}", lr)
        speed = self.cfg.batch_size * len(losses) / (time.time() - self.interval_start)
        self.loss = float(np.mean(losses))
        self.epoch_losses += losses
        self.unread_losses = []
        self.write(step=done, loss=self.loss, lr=lr, images_per_s=speed)
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, lr {lr:.1e}, {speed:,.0f} images/s")
        return speed

    def not_finite(self, what: str, lr: float) -> UserError:
        return UserError(f"{what}, learning rate {lr:.3g}; the last checkpoint stays in "
                         f"{self.folder}. Try a lower --base-lr, a longer --warmup-epochs or "
                         "--precision fp32, with another --output")

    def write(self, **values):
        """Append a line to metrics.jsonl, and its numbers to TensorBoard's events, if any."""
        append_metrics(self.folder, **values)
        if rank() == 0 and self.tensorboard:
            for name, value in values.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, values["step"])

    def save_encoder(self, model):
        """Write encoder.pt, {timm's name: tensor}: the model without its `pretrain_only` parts."""
        if rank() == 0:
            encoder = {name: value.cpu() for name, value in model.state_dict().items()
                       if not name.startswith(model.pretrain_only)}
            save_atomic(encoder, self.folder / "encoder.pt")

    def finish(self, scores: dict) -> dict:
        """Write the last line of metrics.jsonl, with the scores, and return it."""
        result = {"step": max(self.first_step, self.last_step), "loss": self.loss} | scores
        self.write(**result)
        log(f"wrote {self.folder}/: checkpoint.pt, encoder.pt (timm's names), metrics.jsonl, "
            "config.json, *.png")
        if rank() == 0:
            self.lock.close()
            if self.tensorboard:
                self.tensorboard.close()
        return result
