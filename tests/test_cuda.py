"""Training steps on fake CUDA tensors: no GPU is needed.

FakeTensorMode gives each tensor a device, a type and a shape, but no contents. On such tensors the
real main() of each script trains for two epochs of one step: forward under bf16 autocast, backward,
clipping, fused AdamW, averages, new maps; then images and scores. Within a step an error is raised
by
    tensors of two devices in one operation, or of two types       (FakeTensorMode)
    .item(), bool(tensor), boolean indices: there are no contents  (FakeTensorMode)
    copies between host and GPU, except from pinned memory         (Watch: the host would wait)
    a parameter whose gradient is missing or is not fp32           (check_gradients)
"""

import contextlib
import ctypes
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.data import DistributedSampler

import common
import data

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="fake CUDA tensors without a GPU need Linux and a newer torch")
aten = torch.ops.aten
CUDA = torch.device("cuda", 0)

PAPER = ["--preset", "imagenet"]                         # ViT-B; all models have two blocks
CASES = {                                                # script, arguments
    "mae": ("mae", []),
    "mae, paper": ("mae", [*PAPER, "--decoder-depth", "2"]),
    "maskdistill": ("maskdistill", []),
    "maskdistill, paper": ("maskdistill", PAPER),
    "maskdistill, momentum": ("maskdistill", ["--teacher", "momentum"]),
    "maskdistill, hog": ("maskdistill", ["--teacher", "hog"]),
    "dtm": ("dtm", []),
    "dtm, paper": ("dtm", PAPER),
    "flip": ("flip", []),
    "flip, paper": ("flip", PAPER),
    "flip, accumulation": ("flip", ["--accumulate", "2"]),
    "amt": ("amt", ["--attention-from", "1"]),
    "amt, paper": ("amt", [*PAPER, "--decoder-depth", "2", "--attention-from", "1"]),
    "amt, simmim": ("amt", ["--preset", "imagenet-simmim", "--attention-from", "1"]),
    "supmim": ("supmim", ["--shots", "0"]),
    "supmim, paper": ("supmim", PAPER),
    "knn": ("evaluate", ["knn"]),
    "features": ("evaluate", ["features"]),
    "linear": ("evaluate", ["linear"]),
    "linear, paper": ("evaluate", ["linear", *PAPER]),
    "finetune": ("evaluate", ["finetune"]),
    "finetune, paper": ("evaluate", ["finetune", *PAPER]),
    "finetune, average": ("evaluate", ["finetune", "--preset", "imagenet-scratch"]),
    "finetune, distilled": ("evaluate", ["finetune", "--preset", "imagenet-distilled",
                                         "--method", "maskdistill"]),
    "segment": ("evaluate", ["segment"]),
}
# Functions of the scripts that make data sets; that run once an epoch or less; that are left out.
REAL = {"flip": ["open_source"], "evaluate": ["open_masked_images"]}
MAY_WAIT = {"amt": ["refresh_maps", "log_refresh"], "supmim": ["write_losses"]}
LEFT_OUT = {"evaluate": ["digest"]}


class HostWaits(Exception):
    """The host would wait for the GPU."""


def kind_of(tensor) -> str:
    """"cpu" or "cuda"."""
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type


def tensors_in(tree) -> list:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Sees each operation before FakeTensorMode does. Within a step it raises HostWaits; otherwise,
    and on the CPU, it answers what needs contents as if all of them were 1."""

    def __init__(self):
        super().__init__()
        self.in_step = False
        self.steps = 0
        self.dtypes = set()                              # of all results

    def paused(self, function):
        """The function, called in a step, as if it were not."""
        def call(*args):
            self.in_step = False
            result = function(*args)
            self.in_step = True
            return result
        return call

    def bar(self, batches, *args, **kwargs):
        """In place of tqdm: what is done with each batch is a step."""
        for batch in batches:
            self.in_step = True
            yield batch
            self.in_step = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:    # tensor.device, asked for very often
            return function(*args)
        inputs = tensors_in((args, kwargs))
        on_gpu = any(kind_of(x) == "cuda" for x in inputs)
        is_fake = any(isinstance(x, FakeTensor) for x in inputs)
        if is_fake and not (self.in_step and on_gpu):
            answer = as_if_ones(function, args)
            if answer is not None:
                return answer
        result = function(*args, **kwargs)
        self.dtypes.add(getattr(result, "dtype", None))
        if self.in_step:
            self.check(function, args, kwargs, inputs, {kind_of(x) for x in tensors_in(result)})
        return result

    def check(self, function, args, kwargs, inputs, devices):
        """Raises HostWaits. devices: those of the operation's results."""
        for x in inputs:
            if kind_of(x) == "cuda" and devices == {"cpu"}:
                raise HostWaits(f"{function}: a copy to the CPU")
            is_argument = x.ndim == 0 and function is not aten._to_copy.default        # of a kernel
            if kind_of(x) == "cpu" and devices == {"cuda"} and not is_argument:
                if not (getattr(x, "is_in_pinned_memory", False) and kwargs.get("non_blocking")):
                    raise HostWaits(f"{function}: a copy of {list(x.shape)} from unpinned memory")
        if devices == {"cuda"} and kwargs.get("generator"):
            raise HostWaits(f"{function}: the CPU's generator")
        if function in (aten.index_put.default, aten.index_put_.default) and args[2].numel() > 1:
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                raise HostWaits(f"{function}: a boolean index")


def as_if_ones(function, args):
    """The result of an operation that needs contents, if these are 1 or True; None: of others."""
    x = args[0]
    if function is aten._local_scalar_dense.default:     # item, bool, float, int, tolist
        return 1.0 if x.is_floating_point() else 1
    if function is aten.nonzero.default:
        return x.new_empty(x.numel(), x.ndim, dtype=torch.int64)
    if function is aten.index.Tensor and args[1][0] is not None:
        if args[1][0].dtype == torch.bool:
            return x.clone()
    return None


@contextlib.contextmanager
def backward_without_gpu():
    """Lets autograd run on CUDA tensors although there is no GPU.

    Its engine asks torch's CUDA library whether each GPU is in use, and where there is none the
    question is an error. Here the answer is no: by a copy of the library's table of virtual
    functions, in which one is exchanged."""
    root = Path(torch.__file__).parent
    header = (root / "include/ATen/detail/AcceleratorHooksInterface.h").read_text()
    names = re.findall(r"^  virtual [^;{]*?(~?\w+)\(", header, re.MULTILINE)
    place = 2 + 1 + names.index("hasPrimaryContext")     # two words go before; destructors are two
    get_hooks = ctypes.CDLL(str(root / "lib/libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = get_hooks()
    original = hooks[0]
    before = 2 * ctypes.sizeof(ctypes.c_void_p)
    table = (ctypes.c_void_p * 100)()
    ctypes.memmove(table, original - before, ctypes.sizeof(table))
    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)
    say_no = kind(lambda hooks, gpu: False)
    table[place] = ctypes.cast(say_no, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table) + before
    try:
        yield
    finally:
        hooks[0] = original


class Generator(torch.Generator):
    """torch.Generator; one for CUDA, which cannot be made here, becomes None when it is seeded."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.on_gpu = torch.device(device).type == "cuda"
        return generator

    def manual_seed(self, seed):
        return None if self.on_gpu else super().manual_seed(seed)


def move(module, device):
    """In place of Module.to, which cannot exchange fake parameters."""
    for part in module.modules():
        own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, value in own:
            moved = value.detach().to(device)
            if isinstance(value, torch.nn.Parameter):
                moved = torch.nn.Parameter(moved, value.requires_grad)
            setattr(part, name, moved)
    return module


def pin(tensor):
    """In place of Tensor.pin_memory."""
    tensor.is_in_pinned_memory = True
    return tensor


def real(function):
    """The function, called without FakeTensorMode; results without torchvision's subclasses."""
    def call(*args, **kwargs):
        with unset_fake_temporarily():
            result = function(*args, **kwargs)
            return tree_map_only(torch.Tensor, lambda x: x.as_subclass(torch.Tensor), result)
    return call


def load_fake(dataset, batches, workers):
    """In place of data.loader: pinned batches with the shapes of the data set's first item."""
    for keys in batches:
        def batch_of(value, size=len(keys)):
            value = torch.as_tensor(value)
            return pin(torch.empty(size, *value.shape, dtype=value.dtype))
        yield tree_map(batch_of, real(dataset.__getitem__)(keys[0]))


def untrained_clip(script):
    """In place of load_teacher: CLIP's ViT-B/16 with two blocks."""
    def load(teacher, grid, projected=False):
        size = (16 * grid[0], 16 * grid[1])
        vit = script.VisionTransformer(size, 16, 768, 2, 12, clip=True)
        proj = torch.zeros(768, 512) if projected else None
        return script.Teacher(vit, script.CLIP_MEAN, script.CLIP_STD, proj)
    return load


def nothing(*args, **kwargs):
    pass


def check_gradients(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert parameter.grad is not None, f"{list(parameter.shape)}: no gradient"
            assert kind_of(parameter.grad) == "cuda"
            assert parameter.grad.dtype == torch.float32


@pytest.fixture
def watch(monkeypatch, in_tmp):
    """A machine with a fake GPU and 256 synthetic shapes, watched in the steps."""
    watch = Watch()
    steps = common.Run.steps
    end_step = common.Run.end_step
    open_data = real(data.open_data)
    shapes = data.synthetic_shapes

    def watched_steps(run, batches):
        for step, micro_batches in steps(run, batches):
            watch.in_step = True
            yield step, micro_batches

    def watched_end_step(run, step, loss, *details):
        watch.in_step = False
        watch.steps += 1
        assert loss.device == CUDA
        assert loss.ndim == 0
        return end_step(run, step, loss, *details)

    patches = {
        common: {"init_distributed": lambda cfg: CUDA, "save_atomic": nothing},
        common.Run: {"steps": watched_steps, "end_step": watched_end_step},
        data: {"synthetic_shapes": lambda split, index: shapes(split, index[:256]),
               "open_data": lambda *args: open_data("shapes", ""),
               "loader": load_fake,
               "save_image_grid": nothing},
        data.ImageDataset: {"__init__": real(data.ImageDataset.__init__),
                            "__getitem__": real(data.ImageDataset.__getitem__)},
        DistributedSampler: {"__iter__": real(DistributedSampler.__iter__)},
        torch: {"Generator": Generator},
        torch.Tensor: {"pin_memory": pin, "__format__": lambda x, spec: format(x.item(), spec)},
        FakeTensor: {"numpy": lambda x: np.ones(x.shape)},
        torch.nn.Module: {"to": move},
        torch.nn.init: {"trunc_normal_": nothing},       # draws until all are inside: here for ever
        torch.cuda: {"is_bf16_supported": lambda **options: True},
        torch.cuda.amp.common: {"amp_definitely_not_available": lambda: False},
    }
    for owner, replacements in patches.items():
        for name, replacement in replacements.items():
            monkeypatch.setattr(owner, name, replacement, raising=owner is not FakeTensor)
    data.mean_std.cache_clear()
    hook = register_optimizer_step_pre_hook(check_gradients)
    with backward_without_gpu(), FakeTensorMode(allow_non_fake_inputs=True), watch, \
            torch.autograd.set_multithreading_enabled(False):
        data.mean_std(CUDA)                              # cached: no step copies them
        yield watch
    hook.remove()
    data.mean_std.cache_clear()


def train(name, watch, monkeypatch):
    """Two steps of a case; each is an epoch."""
    method, argv = CASES[name]
    script = importlib.import_module(method)
    for wrap, table in ((real, REAL), (watch.paused, MAY_WAIT), (lambda _: nothing, LEFT_OUT)):
        for function in table.get(method, []):
            monkeypatch.setattr(script, function, wrap(getattr(script, function)))
    if hasattr(script, "load_teacher"):
        monkeypatch.setattr(script, "load_teacher", untrained_clip(script))
        monkeypatch.setattr(script, "tqdm", watch.bar)   # of the loop that trains a teacher
    builder = importlib.import_module("mae") if method == "evaluate" else script
    for size, row in list(builder.SIZES.items()):
        row = [*row]
        for depth in range(1, len(row), 3):              # of flip.py's two towers
            row[depth] = 2
        monkeypatch.setitem(builder.SIZES, size, row)
    script.main([*argv, "--batch-size", "192", "--max-steps", "2", "--workers", "0"])


@pytest.mark.parametrize("name", CASES)
def test_training(name, watch, monkeypatch):
    train(name, watch, monkeypatch)
    assert watch.steps == (0 if name in ("knn", "features") else 2)
    assert torch.bfloat16 in watch.dtypes


FAULTS = {                                               # functions of a tensor on the GPU
    "item": lambda x: x.mean().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x[0, 0].tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "boolean index": lambda x: x[x > 0],
    "boolean index, assigned": lambda x: x.detach().clone().index_put_((x > 0,), x.flatten()),
    "bincount": lambda x: x.flatten().long().bincount(minlength=3),
    "unique": lambda x: x.unique(),
    "cpu": lambda x: x.cpu(),
    "torch.tensor": lambda x: x * torch.tensor([1.0], device=x.device),
    "unpinned copy": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
    "blocking copy": lambda x: torch.zeros(3).pin_memory().to(x.device),
    "unpinned copy in place": lambda x: torch.zeros_like(x).copy_(torch.zeros(x.shape)),
    "index on the CPU": lambda x: x[torch.arange(2)],
    "numpy index": lambda x: x[np.arange(2)],
    "list index": lambda x: x[[0, 1]],
    "two devices": lambda x: x + torch.zeros(x.shape),
    "gather by the CPU": lambda x: x.gather(0, torch.zeros(x.shape, dtype=torch.int64)),
    "generator of the CPU": lambda x: torch.rand(3, generator=torch.Generator().manual_seed(0),
                                                 device=x.device),
    "scatter of another type": lambda x: x.scatter(0, torch.zeros_like(x).long(), x.double()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_the_loss(fault, watch, monkeypatch):
    script = importlib.import_module("mae")
    sound = script.reconstruction_loss
    met = []

    def faulty(prediction, target):
        if watch.in_step:
            met.append(fault)
            FAULTS[fault](prediction.float())
        return sound(prediction, target)

    monkeypatch.setattr(script, "reconstruction_loss", faulty)
    with pytest.raises((HostWaits, RuntimeError)):
        train("mae", watch, monkeypatch)
    assert met and watch.in_step                         # the step was not left


def test_parameter_without_gradient(watch, monkeypatch):
    script = importlib.import_module("mae")
    sound = script.build

    def faulty(cfg):
        model = sound(cfg)
        model.extra = torch.nn.Parameter(torch.zeros(2, 2))
        return model

    monkeypatch.setattr(script, "build", faulty)
    with pytest.raises(AssertionError, match="no gradient"):
        train("mae", watch, monkeypatch)


def test_bf16_is_seen(watch, monkeypatch):
    monkeypatch.setitem(CASES, "fp32", ("mae", ["--precision", "fp32"]))
    train("fp32", watch, monkeypatch)
    assert torch.bfloat16 not in watch.dtypes
