"""What the method scripts share is the same text in each, and what they import is little."""

import ast
import re
import sys

import pytest

from conftest import ROOT

METHODS = [name for name in ("mae", "maskdistill", "flip", "dtm", "amt", "supmim") if (ROOT / f"{name}.py").exists()]
SHARED = {                                               # text that no method changes, where it is there
    "patchify", "unpatchify", "take", "sincos_positions", "resize_positions", "PatchEmbed", "pixel_target",
    "reconstruction_loss", "main"}
DISTILLED = {"RelativePositions", "relative_rows", "relative_index", "Attention", "quick_gelu", "Mlp", "Block", "scaled",
             "VisionTransformer", "block_masking", "random_masking", "hog", "Teacher", "download",
             "clip_to_timm", "load_teacher", "resize_relative", "Classifier", "train_teacher", "open_teacher"}


def parts(name):
    """{function or class: its text} of a script."""
    text = (ROOT / f"{name}.py").read_text()
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name", METHODS)
def test_shared_text(name):
    ours, model = parts(name), parts("mae")
    assert {"Config", "build", "train", "main"} <= ours.keys()
    differ = {part for part in SHARED & ours.keys() & model.keys() if ours[part].replace(name, "mae") != model[part]}
    assert not differ
    if name == "amt":                                    # an MAE with another choice of patches
        same = {"Attention", "Mlp", "Block", "VisionTransformer", "load_weights"}
        assert not {part for part in same if ours[part].replace("AMT", "MAE") != model[part]}
    if name == "supmim":                                 # an MAE that classifies, too
        same = {"Attention", "Mlp", "Block", "VisionTransformer", "random_masking"}
        assert not {part for part in same if ours[part] != model[part]}
    if name == "flip":                                   # maskdistill.py's random_masking is another
        assert ours["random_masking"] == model["random_masking"] and ours["quick_gelu"] == parts("maskdistill")["quick_gelu"]
    if name == "dtm":
        other = parts("maskdistill")
        assert not {part for part in DISTILLED if ours[part].replace(name, "maskdistill") != other[part]}


@pytest.mark.parametrize("name", METHODS)
def test_a_script_imports_no_other(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & {"evaluate", *METHODS}
    assert imported - set(sys.stdlib_module_names) <= {"common", "torch", "torchvision", "numpy", "tqdm"}


def test_lines_fit_a_screen():
    """At most 120 characters, but for a flag's help, which is the comment of its one line."""
    lines = [(path.name, i, line.rstrip("\n")) for path in ROOT.glob("*.py") for i, line in enumerate(open(path), 1)]
    assert not [f"{name}:{i}" for name, i, line in lines if len(line) > 120 and not re.match(r"    \w+: .*  # ", line)]
