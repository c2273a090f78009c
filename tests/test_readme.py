"""Every command in the sh blocks of README.md and tests/measure/results.md runs: with its own flags, then a tiny run's, with tiny
models, on small images and weights made here. Those of benchmark.py and study.py, within sentences, too, run one part of their work."""

import argparse
import gzip
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import amt
import common
import data
import dtm
import evaluate
import flip
import mae
import maskdistill
import supmim
from conftest import ROOT
from test_flip import MERGES, jpeg, write_tar

sys.path.insert(0, str(ROOT / "tests/measure"))
import benchmark
import study

VIT = "--image-size 16 --patch-size 4 --workers 0 --no-compile --accumulate 1 --epochs 2 --max-steps 1"
DECODER = "--decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2"
TINY = {                                                 # what is put behind a command's own flags
    "mae": f"{VIT} {DECODER} --batch-size 10", "amt": f"{VIT} {DECODER} --batch-size 10 --attention-from 0",
    "supmim": f"{VIT} {DECODER} --batch-size 10 --shots 10 --codes 8",
    "maskdistill": f"{VIT} --batch-size 10 --teacher-epochs 1 --min-block 2", "dtm": f"{VIT} --batch-size 10 --teacher-epochs 1 --min-block 2",
    "flip": f"{VIT} --embed-dim 16 --depth 2 --num-heads 2 --batch-size 4 --text-width 16 --text-depth 1 --text-heads 2 --proj-dim 8 --text-length 12 --epoch-pairs 8 --shuffle 10",
    "evaluate": "--workers 0 --batch-size 8 --epochs 1 --max-steps 1 --accumulate 1"}
RELEASED = "--image-size 16 --patch-size 4"              # with evaluate.py --model base
CLIP = "--embed-dim 64 --num-heads 1 --text-width 64 --text-heads 1 --towers clip --vocab bpe_simple_vocab_16e6.txt.gz"
NAMED = {"FOLDER": "photos", "WHERE": ".", "shards/{00000..41407}.tar": "shards/00000.tar"}
DATA = {"cifar10", "cifar10-jpg", "imagenet", "tiny-imagenet", "stl10"}


def commands(by_hand=False):
    """The lines of the sh blocks that start Python, as words: variables put in, comments left out.

    by_hand: those that start tests/benchmark.py and tests/study.py, the ones within sentences besides; else the others."""
    text = (ROOT / "README.md").read_text() + (ROOT / "tests/measure/results.md").read_text()
    blocks, found, variables = re.findall(r"```sh\n(.*?)```", text, re.DOTALL), [], {}
    if by_hand:
        blocks += [command.replace("\n", " ") for command in re.findall(r"`(python tests/measure/[^`]+)`", text)]
    for block in blocks:
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
            if assigned := re.fullmatch(r'([A-Z])="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            words = shlex.split(line, comments=True)
            if words and words[0] in ("python", "torchrun") and by_hand == words[1].startswith("tests/"):
                found.append(words)
    return found


def tiny(words: list) -> tuple[str, list]:
    """Script and flags of a command, made small: known names are those of `prepared`, and data sets keep their presets."""
    script, *flags = words[next(i for i, word in enumerate(words) if word.endswith(".py")):]
    script = script.removesuffix(".py")
    made = []
    for before, word in zip([""] + flags, flags):
        if before == "--data" and word in DATA:
            made += ["photos"] + ["--preset", "folder" if word == "cifar10-jpg" else word] * ("--preset" not in flags)
        elif word == "..." or word.endswith((".pt", ".pth")):
            flips = "flip" in word
            made.append("clip.pt" if word == "ViT-B-16.pt" else "finetuned.pt" if "finetuned" in word else "flip.pt" if flips else "mae.pt")
        else:
            made.append(NAMED.get(word, word))
    made += ["--data", "photos"] * ("--data" not in flags) + ["--preset", "shapes"] * (not {"--data", "--preset"} & set(flags))
    made += TINY[script].split() + ["--output", "run"]
    if "ViT-B-16.pt" in flags and script == "flip":
        made += CLIP.split()
    if script == "maskdistill" and "--teacher" not in flags:
        made += ["--teacher", "clip.pt"]                 # what it would download
    if script == "evaluate" and ("--model" in flags or "none" in flags):
        made += RELEASED.split()
    return script, made


def shrink_models(patch):
    """Every row of SIZES is a tiny one (flip.py's has flags for that)."""
    for script in (mae, amt, supmim, maskdistill, dtm):
        for row in script.SIZES:
            patch.setitem(script.SIZES, row, (16, 2, 2))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with images, pairs, vocabularies and weights, all small."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shrink_models(patch)
        drawn = data.synthetic_shapes("train", np.arange(50))
        for i in range(50):
            path = Path("photos", "train" if i < 40 else "val", "ab"[i % 2], f"{i:02}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn["image"][i].transpose(1, 2, 0)[:20, :24]).save(path)
        for split in ("training", "validation"):
            for i in range(10):
                for kind, picture in (("images", drawn["image"][i].transpose(1, 2, 0)), ("annotations", drawn["mask"][i].astype(np.uint8) + 1)):
                    path = Path("ADEChallengeData2016", kind, split, f"{i}.{'jpg' if kind == 'images' else 'png'}")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(path)
        pairs = [jpeg(i) for i in range(12)]
        for part in ("train2017", "val2017"):
            Path(part).mkdir()
            for i, (packed, _) in enumerate(pairs):
                Path(part, f"{i}.jpg").write_bytes(packed)
            Path(f"captions_{part}.json").write_text(json.dumps({
                "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(12)],
                "annotations": [{"image_id": i, "caption": caption} for i, (_, caption) in enumerate(pairs)]}))
        Path("pairs.csv").write_text("image,caption\n" + "".join(f"train2017/{i}.jpg,{caption}\n" for i, (_, caption) in enumerate(pairs)))
        Path("shards").mkdir()
        write_tar("shards/00000.tar", [m for i, (packed, caption) in enumerate(pairs) for m in ((f"{i}.jpg", packed), (f"{i}.txt", caption))])
        letters = "abcdefghijklmnopqrstuvwxyz"
        Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]))
        with gzip.open("bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(["a title", *MERGES, ""]))
        mae.main([*TINY["mae"].split(), "--data", "photos", "--preset", "shapes", "--output", "made"])
        shutil.copy("made/checkpoint.pt", "mae.pt")
        evaluate.main(["finetune", "--checkpoint", "mae.pt", "--data", "photos", "--output", "tuned", *TINY["evaluate"].split()])
        shutil.copy("tuned/finetuned.pt", "finetuned.pt")
        flip.main([*TINY["flip"].split(), "--data", "photos", "--preset", "shapes", "--output", "flip"])
        shutil.copy("flip/checkpoint.pt", "flip.pt")
        flip.main([*TINY["flip"].split(), *CLIP.split(), "--data", "photos", "--preset", "shapes", "--output", "clip"])
        shutil.copy("clip/clip.pt", "clip.pt")
    return folder


def test_commands_are_found():
    words = commands()
    assert len(words) >= 25 and {word for line in words for word in line if word.endswith(".py")} >= {f"{name}.py" for name in TINY}
    assert not [word for line in words for word in line if "$" in word]


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60].replace("/", "_"))
def test_command(prepared, monkeypatch, words):
    monkeypatch.chdir(prepared)
    shrink_models(monkeypatch)
    shutil.rmtree("run", ignore_errors=True)
    script, flags = tiny(words)
    found = importlib.import_module(script).main(flags)
    if "--zero-shot" in flags or script == "evaluate":
        assert all(0 <= value <= 100 for name, value in found.items() if name.startswith(("top1", "zero_shot")))
    else:
        assert found["step"] == 1 and np.isfinite(found["loss"]) and Path("run/checkpoint.pt").exists()


def test_lines_that_differ():
    """The counts that the README gives for `diff A B`, lines that begin with < or >."""
    shown = re.findall(r"`diff (\w+\.py) (\w+\.py)`: (\d+) lines", (ROOT / "README.md").read_text())
    assert {second for _, second, _ in shown} == {f"{name}.py" for name in ("maskdistill", "flip", "dtm", "amt", "supmim")}
    for first, second, count in shown:
        lines = subprocess.run(["diff", first, second], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        assert int(count) == sum(line[0] in "<>" for line in lines), (first, second)


def test_benchmark_commands(prepared, monkeypatch, capsys):
    """Each that the README shows: its own flags, then a tiny model's and one round. Of `train`, a step of ours of all methods,
    and one run in a process."""
    monkeypatch.chdir(prepared)
    shown = [words[2:] for words in commands(by_hand=True) if words[1] == "tests/measure/benchmark.py"]
    assert {flags[0] for flags in shown} == {"train", "data", "hours", "features"}
    for flags in shown:
        small = ["--model", "micro", "--rounds", "1", "--batch", "2"]
        if flags[0] == "train":
            args = benchmark.arguments(flags + small)
            for name in benchmark.CONTESTANTS[args.method] if args.method == "all" else ():
                if not name.startswith(benchmark.PEERS):
                    benchmark.Contestant(name, args).step(torch.randn(2, 3, 224, 224))
        elif flags[0] != "data":
            benchmark.main([{"cifar10-jpg": "photos", "...": "mae.pt"}.get(flag, flag) for flag in flags] + small)
            assert re.search(r"[1-9]", capsys.readouterr().out.splitlines()[-1])
    benchmark.main(["train", *small, "--contestants", "ours", "--one-at-a-time", "--results", "speed.jsonl"])
    line = json.loads(Path("speed.jsonl").read_text())
    assert float(re.search(r"\nours +([0-9.]+)", capsys.readouterr().out)[1]) == pytest.approx(line["images_per_s"], rel=1e-3, abs=0.01)
    threads = torch.get_num_threads()
    benchmark.main(["data", "--folder", "train2017", "--rounds", "1", "--results", "data.jsonl"])
    torch.set_num_threads(threads)
    assert re.search(r"\nours +[1-9]", capsys.readouterr().out) and len(open("data.jsonl").readlines()) == 4


def test_study_jpegs(in_tmp, monkeypatch):
    class Pictures(list):
        classes = ["cat", "dog"]
    drawn = [(Image.new("RGB", (32, 32), colour), label) for label, colour in enumerate(("red", "blue"))]
    monkeypatch.setattr(study.torchvision.datasets, "CIFAR10", lambda root, train, download: Pictures(drawn))
    study.main(["jpegs", "--data", "made"])
    assert sorted(map(str, Path("made").rglob("*.jpg"))) == [
        f"made/{part}/{name}/0000{label}.jpg" for part in ("test", "train") for label, name in enumerate(Pictures.classes)]
    assert Image.open("made/train/dog/00001.jpg").size == (32, 32)


def test_study(prepared, monkeypatch):
    """All flags are read; two arms and a score of --quick; what is known is not run again; the table and the picture from
    their lines."""
    monkeypatch.chdir(prepared)
    assert {words[2] for words in commands(by_hand=True) if words[1] == "tests/measure/study.py"} == {"run", "table", "jpegs"}
    train, score, numbers = study.settings(argparse.Namespace(data="photos", workers=0, epochs=4, quick=False))
    for line in study.METHODS.values():
        name, flags = line.format(mae="mae.pt", **numbers).split(" ", 1)
        script = importlib.import_module(name.removesuffix(".py"))
        cfg = common.parse_config(script.Config, script.PRESETS, shlex.split(f"{train} {study.SHAPE} {flags}"))
        assert (cfg.embed_dim, cfg.epochs, cfg.batch_size, cfg.crop_scale) == (64, 4, 128, 0.5)
    monkeypatch.setattr(study, "PROTOCOLS", {"finetune": study.PROTOCOLS["finetune"]})
    flags = ["run", "--quick", "--runs", "study", "--results", "study.jsonl", "--methods", "none", "mae"]
    study.main(flags)
    lines = [json.loads(line) for line in open("study.jsonl")]
    assert [(line["method"], line["protocol"]) for line in lines] == [("none", "finetune"), ("mae", "finetune")]
    study.main(flags)
    assert len(open("study.jsonl").readlines()) == 2
    with pytest.raises(SystemExit, match="other --data or --epochs"):
        study.main([word for word in flags if word != "--quick"])
    Path("README.md").write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    monkeypatch.setattr(study, "ROOT", prepared)
    study.main(["table", "--results", "study.jsonl", "--picture", "study.png"])
    text = Path("README.md").read_text()
    assert text.startswith("before\n<!-- study -->\n") and text.endswith("<!-- /study -->\nafter\n") and "old" not in text
    assert f"| untrained | {lines[0]['top1']:.1f} |  |\n| `mae.py` | {lines[1]['top1']:.1f} |  |" in text and Image.open("study.png").width > 500
