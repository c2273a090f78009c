"""What the method scripts share is the same text in each, and what they import is little."""

import ast
import re
import sys

import pytest

from conftest import ROOT

METHODS = ("mae", "maskdistill", "flip", "dtm", "amt", "supmim")
TOP = ("common", "data", "evaluate", *METHODS)
SHARED = {                                               # wherever they are, they are mae.py's
    "patchify", "unpatchify", "gather_tokens", "sincos_positions", "PatchEmbed", "pixel_target",
    "undo_norm_pix", "reconstruction_loss", "main"}
ENCODER = {"Attention", "Mlp", "Block", "VisionTransformer"}     # of mae, amt, supmim and flip
DISTILLED = {                                            # of maskdistill.py and dtm.py
    "RelativePositions", "relative_index", "Attention", "quick_gelu", "Mlp", "Block",
    "VisionTransformer", "block_masking", "Teacher", "download", "clip_to_timm", "load_teacher",
    "count_heads", "learn_labels", "train_classifier"}


def parts(name):
    """{function or class: its text} of a script."""
    text = (ROOT / f"{name}.py").read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name", METHODS)
def test_shared_text(name):
    script = parts(name)
    model = parts("mae")
    assert {"Config", "build", "train", "main"} <= script.keys()
    same = SHARED & script.keys() & model.keys()
    if name in ("amt", "supmim", "flip"):
        same |= ENCODER
    if name in ("supmim", "flip"):                       # amt.py and the distillers mask otherwise
        same.add("random_masking")
    assert not {part for part in same if script[part].replace("AMT", "MAE") != model[part]}
    if name == "dtm":
        model = parts("maskdistill")
        assert not {part for part in DISTILLED if script[part] != model[part]}


@pytest.mark.parametrize("name", METHODS)
def test_a_script_imports_no_other(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {"evaluate", *METHODS}
    allowed = {"common", "data", "torch", "torchvision", "numpy", "PIL", "tqdm"}
    if name == "flip":                                   # where they are needed, and nowhere else
        allowed |= {"webdataset", "tokenizers"}
    assert imported - set(sys.stdlib_module_names) <= allowed


def test_rooms():
    """common.py knows nothing of images, data.py nothing of training."""
    common = (ROOT / "common.py").read_text()
    data = (ROOT / "data.py").read_text()
    assert "import data\n" not in common
    assert "nn.Module" not in common
    assert "nn.Module" not in data
    assert "optimizer" not in data
    assert "backward(" not in common + data


def test_lines_fit_a_screen():
    """At most 100 characters; a flag with its help, which is the comment of its one line: 120."""
    long = []
    for name in TOP:
        for i, line in enumerate((ROOT / f"{name}.py").read_text().splitlines(), 1):
            is_flag = re.match(r"    \w+: .*  # ", line)
            if len(line) > (120 if is_flag else 100):
                long.append(f"{name}.py:{i}")
    assert not long


@pytest.mark.parametrize("name", TOP)
def test_functions_fit_a_screen(name):
    nodes = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert not [node.name for node in functions if node.end_lineno - node.lineno >= 80]
