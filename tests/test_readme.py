"""Every command in the sh blocks of README.md and tests/measure/results.md runs: with its own
flags, then a tiny run's, with tiny models, on small images and weights made here. Those of
benchmark.py and study.py, within sentences, too, run one part of their work."""

import argparse
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
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

sys.path.insert(0, str(ROOT / "tests/measure"))
import benchmark
import defaults
import study

VIT = ("--image-size 16 --patch-size 4 --workers 0 --no-compile --accumulate 1 --epochs 2 "
       "--max-steps 1")
DECODER = "--decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2"
TINY = {                                                 # what is put behind a command's own flags
    "mae": f"{VIT} {DECODER} --batch-size 10",
    "amt": f"{VIT} {DECODER} --batch-size 10 --attention-from 0",
    "supmim": f"{VIT} {DECODER} --batch-size 10 --shots 10 --codes 8",
    "maskdistill": f"{VIT} --batch-size 10 --min-block 2",
    "dtm": f"{VIT} --batch-size 10 --min-block 2",
    "flip": f"{VIT} --batch-size 4 --text-length 12 --epoch-pairs 8",
    "evaluate": "--workers 0 --batch-size 8 --epochs 1 --max-steps 1 --accumulate 1"}
RELEASED = "--image-size 16"                             # of the presets for released files
NAMED = {"FOLDER": "photos", "WHERE": ".", "shards/{00000..41407}.tar": "shards/00000.tar"}
METHODS = ("mae", "maskdistill", "flip", "dtm", "amt", "supmim")
DATA = {"cifar10", "cifar10-jpg", "imagenet", "tiny-imagenet", "stl10"}


def commands(by_hand=False):
    """The lines of the sh blocks that start Python, as words: variables put in, comments left out.

    by_hand: those that start tests/measure/benchmark.py and study.py, the ones within sentences
    besides; else the others."""
    text = (ROOT / "README.md").read_text() + (ROOT / "tests/measure/results.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    found = []
    variables = {}
    if by_hand:
        sentences = re.findall(r"`(python tests/measure/[^`]+)`", text)
        blocks += [command.replace("\n", " ") for command in sentences]
    for block in blocks:
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            for name, value in variables.items():
                line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
            if assigned := re.fullmatch(r'([A-Z])="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            words = shlex.split(line, comments=True)
            starts = words and words[0] in ("python", "torchrun")
            if starts and by_hand == words[1].startswith("tests/"):
                found.append(words)
    return found


def weights_for(word: str) -> str:
    """The file among those of `prepared` that stands for a file of weights in a command."""
    if "finetuned" in word:
        return "finetuned.pt"
    return "flip.pt" if "flip" in word else "mae.pt"


def tiny(words: list) -> tuple[str, list]:
    """Script and flags of a command, made small: known names are those of `prepared`, and data
    sets keep their presets."""
    first = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[first].removesuffix(".py")
    flags = words[first + 1:]
    made = []
    for before, word in zip([""] + flags, flags):
        if before == "--data" and word in DATA:
            made.append("photos")
            if "--preset" not in flags:
                made += ["--preset", "folder" if word == "cifar10-jpg" else word]
        elif word == "..." or word.endswith((".pt", ".pth")):
            made.append(weights_for(word))
        else:
            made.append(NAMED.get(word, word))
    if "--data" not in flags:
        made += ["--data", "photos"]
        if "--preset" not in flags:
            made += ["--preset", "shapes"]
    made += [*TINY[script].split(), "--output", "run"]
    if script in ("maskdistill", "dtm") and "--teacher" not in flags:
        made += ["--teacher", "mae.pt"]                  # for what it would download
    if script == "evaluate" and any(flag.endswith(".pth") for flag in flags):
        made += RELEASED.split()
    return script, made


def shrink_models(patch):
    """Every row of SIZES is a tiny one."""
    for script in (mae, amt, supmim, maskdistill, dtm):
        for row in script.SIZES:
            patch.setitem(script.SIZES, row, (16, 2, 2))
    for row in flip.SIZES:
        patch.setitem(flip.SIZES, row, (16, 2, 2, 16, 1, 2, 8))


def save_image(path, pixels):
    """pixels: (3, H, W), or (H, W) of numbers of classes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels).save(path)


def save_pairs(shapes):
    """COCO's captions, a table, and tar shards."""
    captions = [str(caption) for caption in shapes["caption"][:12]]
    for part in ("train2017", "val2017"):
        for i in range(12):
            save_image(f"{part}/{i}.jpg", shapes["image"][i])
        images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(12)]
        annotations = [{"image_id": i, "caption": text} for i, text in enumerate(captions)]
        coco = {"images": images, "annotations": annotations}
        Path(f"captions_{part}.json").write_text(json.dumps(coco))
    rows = [f"train2017/{i}.jpg,{caption}\n" for i, caption in enumerate(captions)]
    Path("pairs.csv").write_text("image,caption\n" + "".join(rows))
    Path("shards").mkdir()
    with tarfile.open("shards/00000.tar", "w") as tar:
        for i, caption in enumerate(captions):
            tar.add(f"train2017/{i}.jpg", f"{i}.jpg")
            about = tarfile.TarInfo(f"{i}.txt")
            about.size = len(caption.encode())
            tar.addfile(about, io.BytesIO(caption.encode()))


def save_tokenizer():
    """tokenizer.json of one number for each letter, if the package is there."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    except ImportError:
        return
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.add_special_tokens(words[:4])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save("tokenizer.json")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with images, pairs, a tokenizer and weights, all small."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shrink_models(patch)
        shapes = data.synthetic_shapes("train", np.arange(50))
        for i in range(50):
            split = "train" if i < 40 else "val"
            save_image(f"photos/{split}/{'ab'[i % 2]}/{i:02}.png", shapes["image"][i][:, :20, :24])
        for split in ("training", "validation"):
            for i in range(10):
                mask = shapes["mask"][i].astype(np.uint8) + 1
                save_image(f"ADEChallengeData2016/images/{split}/{i}.jpg", shapes["image"][i])
                save_image(f"ADEChallengeData2016/annotations/{split}/{i}.png", mask)
        save_pairs(shapes)
        save_tokenizer()
        here = ["--data", "photos", "--preset", "shapes"]
        mae.main([*TINY["mae"].split(), *here, "--output", "made"])
        shutil.copy("made/checkpoint.pt", "mae.pt")
        evaluate.main(["finetune", "--checkpoint", "mae.pt", "--data", "photos",
                       "--output", "tuned", *TINY["evaluate"].split()])
        shutil.copy("tuned/finetuned.pt", "finetuned.pt")
        flip.main([*TINY["flip"].split(), *here, "--output", "flip"])
        shutil.copy("flip/checkpoint.pt", "flip.pt")
    return folder


def test_commands_are_found():
    words = commands()
    scripts = {word for line in words for word in line if word.endswith(".py")}
    assert len(words) >= 20 and scripts >= {f"{name}.py" for name in TINY}
    assert not [word for line in words for word in line if "$" in word]


def short_name(words):
    return " ".join(words)[:60].replace("/", "_")


@pytest.mark.parametrize("words", commands(), ids=short_name)
def test_command(prepared, monkeypatch, words):
    if any(".tar" in word for word in words):
        pytest.importorskip("webdataset")
    if "--tokenizer" in words:
        pytest.importorskip("tokenizers")
    monkeypatch.chdir(prepared)
    shrink_models(monkeypatch)
    shutil.rmtree("run", ignore_errors=True)
    script, flags = tiny(words)
    metrics = importlib.import_module(script).main(flags)
    if "--zero-shot" in flags or script == "evaluate":
        scores = {name: value for name, value in metrics.items()
                  if name.startswith(("top1", "zero_shot"))}
        assert all(0 <= value <= 100 for value in scores.values())
    else:
        assert metrics["step"] == 1 and np.isfinite(metrics["loss"])
        assert Path("run/checkpoint.pt").exists()


def test_lines():
    """The lines of each script that the README's table gives, and the counts for `diff A B`, lines
    that begin with < or >."""
    readme = (ROOT / "README.md").read_text()
    shown = re.findall(r"^\| `(\w+\.py)` \|.*\| ([\d,]+) \|", readme, re.M)
    assert [name for name, _ in shown] == [f"{name}.py" for name in METHODS]
    for name, count in shown:
        assert int(count.replace(",", "")) == len((ROOT / name).read_text().splitlines()), name
    shown = re.findall(r"`diff (\w+\.py) (\w+\.py)`: (\d+) lines", readme)
    assert {second for _, second, _ in shown} == {"amt.py", "supmim.py", "dtm.py"}
    for first, second, count in shown:
        done = subprocess.run(["diff", first, second], cwd=ROOT, capture_output=True, text=True)
        assert int(count) == sum(line[0] in "<>" for line in done.stdout.splitlines()), second


def test_benchmark_commands(in_tmp, monkeypatch, capsys):
    """Each that benchmark.md shows: its own flags, then a tiny model's and one round. Of `train`, a
    step of ours of all methods, and one run in a process."""
    text = (ROOT / "tests/measure/benchmark.md").read_text()
    shown = re.findall(r"`python tests/measure/benchmark.py ([^`]+)`", text)
    honest = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, **options:       # a product of 512, not 4096
                        honest(*(min(side, 512) for side in shape), **options))
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    monkeypatch.setattr(benchmark, "DECODER", decoder)
    monkeypatch.setattr(benchmark, "JPEGS", 4)
    small = ["--model", "micro", "--rounds", "1", "--batch", "2", "--results", "shown.jsonl"]
    threads = torch.get_num_threads()
    methods = set()
    for command in shown:
        flags = shlex.split(command) + small
        args = benchmark.arguments(flags)
        if args.what == "train":
            methods.add(args.method)
        else:
            benchmark.main(flags)
            assert re.search(r"[1-9]", capsys.readouterr().out.splitlines()[-1])
    torch.set_num_threads(threads)
    assert {command.split()[0] for command in shown} >= {"train", "morph", "hours"}
    assert "all" in methods

    args = benchmark.arguments(["train", "--method", "all", *small])
    for name in benchmark.CONTESTANTS["all"]:
        if name.startswith("ours"):
            benchmark.Contestant(name, args).step(torch.randn(2, 3, 224, 224))

    monkeypatch.setattr(benchmark, "installed_contestants", lambda method: ["ours"])
    benchmark.main(["train", *small, "--one-at-a-time", "--results", "speed.jsonl"])
    line = json.loads(Path("speed.jsonl").read_text())
    printed = re.search(r"\nours +([0-9.]+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(line["images_per_s"], rel=1e-3, abs=0.01)

    benchmark.main(["data", "--rounds", "1", "--results", "data.jsonl"])
    torch.set_num_threads(threads)
    assert re.search(r"\nours +[1-9]", capsys.readouterr().out)
    assert len(open("data.jsonl").readlines()) == 6


def test_benchmark_leaves_out_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PEERS", {"timm": "json", "transformers": "no_such_package"})
    assert benchmark.installed_contestants("mae") == ["ours", "timm blocks", "vit-pytorch"]
    assert capsys.readouterr().out == "no_such_package is not installed, left out: transformers\n"


SCRIPT = """import json, sys
flags = sys.argv[1:]
print("started with", *flags)
with open(flags[flags.index("--output") + 1] + "/metrics.jsonl", "a") as file:
    file.write("{}" + chr(10) + json.dumps({"flags": flags}) + chr(10))
sys.exit("--fail" in flags)
"""


def test_study_starts_a_script(in_tmp, monkeypatch):
    """Its flags, its log, the last line of its metrics; a failure names the log."""
    monkeypatch.setattr(study, "ROOT", in_tmp)
    Path("script.py").write_text(SCRIPT)
    found = study.call("script.py", "--data 'my images'", Path("run/one"))
    assert found == {"flags": ["--data", "my images", "--output", "run/one"]}
    assert Path("run/one/log.txt").read_text() == "started with --data my images --output run/one\n"
    with pytest.raises(SystemExit, match="failed, see run/two/log.txt"):
        study.call("script.py", "--fail", Path("run/two"))


def call_here(script, flags, output):
    """study.call without a process of its own, which would import torch each time."""
    output.mkdir(parents=True, exist_ok=True)
    main = importlib.import_module(script.removesuffix(".py")).main
    main([*shlex.split(flags), "--output", str(output)])
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


def test_study_jpegs(in_tmp, monkeypatch):
    class Pictures(list):
        classes = ["cat", "dog"]
    drawn = [(Image.new("RGB", (32, 32), color), i) for i, color in enumerate(("red", "blue"))]
    monkeypatch.setattr(study.torchvision.datasets, "CIFAR10",
                        lambda root, train, download: Pictures(drawn))
    study.main(["jpegs", "--data", "made"])
    assert sorted(map(str, Path("made").rglob("*.jpg"))) == [
        f"made/{part}/{name}/0000{label}.jpg" for part in ("test", "train")
        for label, name in enumerate(Pictures.classes)]
    assert Image.open("made/train/dog/00001.jpg").size == (32, 32)


def test_study_scores(in_tmp, monkeypatch):
    """evaluate.py is given the study's data, seed and shape, and the epochs of each protocol."""
    configs = []

    def parse(script, flags, output):
        words = ["--protocol", *shlex.split(flags)]
        configs.append(common.parse_config(evaluate.Config, evaluate.PRESETS[words[1]], words))
        return {"top1": 50.0}

    monkeypatch.setattr(study, "call", parse)
    args = argparse.Namespace(data="photos", workers=3, epochs=30, quick=False, runs=Path("study"),
                              precision="bf16", results=Path("study.jsonl"))
    study.score("untrained", 1, args)
    assert [cfg.protocol for cfg in configs] == ["knn", "linear"] + ["finetune"] * 3
    assert {(cfg.data, cfg.workers, cfg.seed, cfg.model, cfg.checkpoint, cfg.precision)
            for cfg in configs} == {("photos", 3, 1, "micro", "none", "bf16")}
    assert [cfg.percent for cfg in configs] == [100, 100, 100, 10, 1]
    assert [cfg.epochs for cfg in configs[1:]] == [50, 2, 5, 50]
    study.score("mae", 1, args)
    assert configs[5].checkpoint == "study/mae-s1/checkpoint.pt"
    study.score("mae", 1, args)                          # all known
    assert len(configs) == 10


def test_study(prepared, monkeypatch):
    """All flags are read; two arms and a score of --quick; what is known is not run again; the
    table and the picture from their lines."""
    monkeypatch.chdir(prepared)
    by_hand = commands(by_hand=True)
    shown = {words[2] for words in by_hand if words[1] == "tests/measure/study.py"}
    assert shown == {"run", "table", "jpegs"}
    args = argparse.Namespace(data="photos", workers=0, epochs=30, quick=False, runs=Path("study"),
                              precision="bf16", compile=True, results=Path("known.jsonl"))
    known = {"method": "supervised", "seed": 1, "protocol": "probe", "epoch": 30}
    args.results.write_text(json.dumps(known) + "\n")
    for method in study.METHODS:
        name, flags = study.command(method, 1, args)
        script = importlib.import_module(name.removesuffix(".py"))
        cfg = common.parse_config(script.Config, script.PRESETS, shlex.split(flags))
        found = (cfg.embed_dim, cfg.epochs, cfg.warmup_epochs, cfg.batch_size, cfg.crop_scale,
                 cfg.precision, cfg.compile)
        assert found == (64, 30, 3, 128, 0.5, "bf16", True)
        if method.startswith("amt"):
            assert (cfg.attention_from, cfg.refresh_every) == (3, 6)
        if method.startswith(("maskdistill", "dtm")):
            assert cfg.teacher == "study/supervised-s1/checkpoint.pt"
    with pytest.raises(SystemExit, match="dtm needs its teacher"):
        study.command("dtm", 0, args)
    monkeypatch.setattr(study, "PROTOCOLS", {"finetune": study.PROTOCOLS["finetune"]})
    monkeypatch.setattr(study, "CURVE", (1,))
    monkeypatch.setattr(study, "call", call_here)
    flags = ["run", "--quick", "--runs", "study", "--results", "study.jsonl", "--seeds", "0",
             "--methods", "untrained", "mae"]
    study.main(flags)
    lines = [json.loads(line) for line in open("study.jsonl")]
    known = [(line["method"], line["protocol"], line["epoch"]) for line in lines]
    assert known == [("untrained", "finetune", 2), ("mae", "probe", 1), ("mae", "probe", 2),
                     ("mae", "finetune", 2)]
    steps = [json.loads(line)["step"] for line in open("study/mae-s0/metrics.jsonl")]
    assert max(steps) == 10 and steps.count(5) > 1       # stopped after an epoch, and went on
    study.main(flags)
    assert len(open("study.jsonl").readlines()) == 4
    with pytest.raises(SystemExit, match="other --data or --epochs"):
        study.main([word for word in flags if word != "--quick"])
    for path in (Path("README.md"), Path("tests/measure/results.md")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    monkeypatch.setattr(study, "ROOT", prepared)
    study.main(["table", "--results", "study.jsonl", "--image", "study.png"])
    untrained, early, late, trained = (f"{line['top1']:.1f}" for line in lines)
    start = f"{lines[2]['linear_untrained']:.1f}"
    for path in ("README.md", "tests/measure/results.md"):
        text = Path(path).read_text()
        assert text.startswith("before\n<!-- study -->\n") and "old" not in text
        assert text.endswith("<!-- /study -->\nafter\n")
        assert f"| untrained | {untrained} |" in text
        assert f"| `mae.py` | {trained} |" in text
    assert f"| `mae.py` | {trained} | {start} | {early} | {late} |\n" in text
    assert Image.open("study.png").width > 500
    with open("study.jsonl", "a") as file:
        file.write(json.dumps(lines[3] | {"seed": 1, "top1": lines[3]["top1"] + 3}) + "\n")
    study.main(["table", "--results", "study.jsonl", "--image", "study.png"])
    text = Path("README.md").read_text()
    assert f"| `mae.py` | {lines[3]['top1'] + 1.5:.1f} ± 1.5 |" in text
    assert f"| untrained | {untrained} |" in text
    assert "\n\nTop-1 in %; seeds 0, 1: mean ± half the range.\n" in text


def test_defaults(in_tmp, monkeypatch, capsys):
    """A run of --results that is known is not started again; the table has a row for each script,
    its control, machine and number of threads, with mean, least and greatest of the seeds."""
    started = []

    def fake_run(command, env, check, stdout):
        folder = Path(command[-2].removeprefix("--output="))
        folder.mkdir(parents=True)
        seed = int(command[-3].removeprefix("--seed="))
        started.append((Path(command[1]).name, command[2:-3], seed, env["OMP_NUM_THREADS"]))
        lines = [{"step": 1, "map_lift": 2.5}, {"step": 2, "linear_trained": 50.0 + 10 * seed}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)

    monkeypatch.setattr(defaults.subprocess, "run", fake_run)
    monkeypatch.setattr(defaults, "commit", lambda: "abc")
    monkeypatch.setattr(defaults, "HERE", in_tmp)
    flags = ["run", "--scripts", "amt", "--seeds", "0", "1", "--threads", "3", "--controls",
             "--runs", "runs", "--results", "defaults.jsonl"]
    defaults.main(flags)
    uniform = ["--sampling", "uniform"]
    assert started == [("amt.py", [], 0, "3"), ("amt.py", uniform, 0, "3"),
                       ("amt.py", [], 1, "3"), ("amt.py", uniform, 1, "3")]
    defaults.main(flags)
    assert len(started) == 4
    lines = [json.loads(line) for line in open("defaults.jsonl")]
    assert lines[0]["map_lift"] == 2.5
    Path("results.md").write_text("before\n<!-- defaults -->\nold\n<!-- /defaults -->\nafter\n")
    defaults.main(["table", "--results", "defaults.jsonl"])
    text = Path("results.md").read_text()
    machine = lines[0]["machine"]
    assert f"| `amt.py` | {machine} | 3 | 2 | 55.0 (50.0 to 60.0) |" in text
    assert f"| `amt.py --sampling uniform` | {machine} | 3 | 2 | 55.0 (50.0 to 60.0) |" in text
    assert text.startswith("before\n") and text.endswith("<!-- /defaults -->\nafter\n")
