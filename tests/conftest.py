import json
import os
import sys
import zlib
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # the promises, bit for bit, are a CPU's
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")      # threads that wait spin otherwise: ten
                                                         # times as slow beside another job

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data

torch.set_num_threads(min(2, os.cpu_count()))


def pytest_configure(config):
    """torchvision announces, for each JPEG, that its decoder is to move to another package; until
    when it is ours, requirements.txt says."""
    config.addinivalue_line("filterwarnings",
                            "ignore:The image decoding and encoding:DeprecationWarning")


def golden(name):
    """Figures that the published implementation gave."""
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())


def draw(name, *shape, uniform=False):
    """The tensor that a golden figure calls `name`."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.random_sample(shape) if uniform else random.standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))


def fill(model, skip=()):
    """Give a model the golden weights: drawn by name, normalisation gains around one."""
    state = {}
    for name, value in model.state_dict().items():
        state[name] = value if name in skip else 0.15 * draw(name, *value.shape)
        if value.ndim == 1 and name.endswith("weight"):
            state[name] += 1
    model.load_state_dict(state)
    return model


@pytest.fixture(autouse=True)
def attention_kernels():
    """What common.autocast switches for bf16 on a CPU is switched back."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty folder, so that a run's output lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fewer_shapes(monkeypatch):
    """4000 synthetic shapes to train on and 1000 to test on, in place of 10,000 and 2000."""
    honest = data.synthetic_shapes

    def some(split, index):
        return honest(split, index[:{"train": 4000, "test": 1000}[split]])

    monkeypatch.setattr(data, "synthetic_shapes", some)
