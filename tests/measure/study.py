"""All six methods on the same images with the same budget. Run by hand: `python tests/measure/study.py run --data cifar10-jpg`.

run     trains each method, the supervised baseline and nothing (the untrained encoder), one encoder, one number of epochs,
        one augmentation, and scores each with evaluate.py: k-NN, linear, fine-tuning on all labels and on 10 and
        1 %. It goes on where it stopped: what --results holds already is not run again, and a run that was cut short resumes.
        Several at once may share --runs and --results if their --methods differ and MAE, the teacher, is done.
        --quick: 200 synthetic images and a few steps, to see that everything works, with --results of its own.
table   writes --results as a Markdown table and as an image, between the study's marks in README.md.
jpegs   makes the folder --data: CIFAR-10, downloaded, as JPEGs of Pillow's default quality in class folders.

What is given to whom: MAE and AMT get images alone; MaskDistill and DTM are taught by the study's own MAE, and their encoders
have relative positions and layer scale besides; FLIP reads the names of the classes in captions, the baseline and SupMIM
learn the labels: these three have seen the labels. "own": top-1 of what the pre-training itself classifies with.
"""

import argparse
import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
import data

SHAPE = "--model micro --patch-size 4 --image-size 32"     # of every encoder
DECODER = "--decoder-embed-dim 32 --decoder-depth 1 --decoder-num-heads 2"
TAUGHT = "--layer-scale 1 --base-lr 3e-3 --color-jitter 0 --teacher {mae}"
LABELS = f"--base-lr 2e-3 --mixup 0 --cutmix 0 --randaugment 0 --drop-path 0 --eval-every 100 {DECODER}"
METHODS = {                                              # script and what it needs besides SHAPE and the budget
    "mae": f"mae.py --base-lr 4e-3 {DECODER}",
    "amt": f"amt.py --base-lr 4e-3 --norm-pix {DECODER} --attention-from {{start}} --refresh-every {{refresh}}",
    "maskdistill": f"maskdistill.py {TAUGHT}",
    "dtm": f"dtm.py {TAUGHT}",
    "flip": "flip.py --base-lr 4e-3",
    "supervised": f"supmim.py --mim-weight 0 {LABELS}",
    "supmim": f"supmim.py --mim-weight 5 {LABELS}"}
TUNE = "--batch-size 64 --base-lr 8e-3 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0 --drop-path 0 --eval-every 100"
PROTOCOLS = {                                            # and the epochs of each, a tenth of them warm-up
    "knn": ("knn", None), "linear": ("linear", None),
    "finetune": (f"finetune {TUNE}", 2), "finetune 10 %": (f"finetune --percent 10 {TUNE}", 5),
    "finetune 1 %": (f"finetune --percent 1 {TUNE}", 50)}
LABELLED = {"supervised", "supmim", "flip"}


def settings(args) -> tuple[str, str, dict]:
    """The budget: flags of the pre-training, flags of the scores, and numbers for the braces above."""
    source = f"--data {shlex.quote(str(args.data))} --workers {args.workers}"
    train = f"{source} --preset cifar10 --epochs {args.epochs} --warmup-epochs {args.epochs / 10} --crop-scale 0.5"
    if args.quick:
        return f"{train} --batch-size 32", f"{source} --batch-size 8", dict(start=1, refresh=1)
    start = max(1, args.epochs // 10)
    return f"{train} --batch-size 128", source, dict(start=start, refresh=max(start, args.epochs // 2))


def draw_images(folder: Path) -> Path:
    """160 synthetic images to train on and 40 to test on, as class folders."""
    for part, count in (("train", 160), ("val", 40)):
        drawn = data.synthetic_shapes("train" if part == "train" else "test", np.arange(count))
        for i, (picture, shape) in enumerate(zip(drawn["image"], drawn["shape"])):
            path = folder / part / str(shape) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.transpose(1, 2, 0)).save(path)
    return folder


def jpegs(args):
    for part in ("train", "test"):
        images = torchvision.datasets.CIFAR10("data", train=part == "train", download=True)
        for i, (picture, label) in enumerate(images):
            path = Path(args.data, part, images.classes[label], f"{i:05}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


def call(script: str, flags: str, output: Path) -> dict:
    """Run a script to its end; the last line of its metrics.jsonl."""
    command = [sys.executable, str(ROOT / script), *shlex.split(flags), "--output", str(output)]
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "log.txt", "a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} failed, see {output}/log.txt")
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path)] if path.exists() else []


def run(args):
    """Fill --results: one line a figure, {method, seed, protocol, top1 in percent, how it was come by}."""
    if args.quick:
        args.data, args.epochs = draw_images(args.runs / "images"), 2
    args.results.parent.mkdir(parents=True, exist_ok=True)
    about = {"epochs": args.epochs, "data": Path(args.data).name, "commit": commit(), "date": datetime.date.today().isoformat(),
             "machine": machine(), "torch": torch.__version__}
    train, score, numbers = settings(args)

    def missing(method, seed, protocols):
        lines = read(args.results)
        if any((line["data"], line["epochs"]) != (about["data"], about["epochs"]) for line in lines):
            raise SystemExit(f"{args.results} holds figures of other --data or --epochs; give another --results and --runs")
        known = {(line["method"], line["seed"], line["protocol"]) for line in lines}
        return [protocol for protocol in protocols if (method, seed, protocol) not in known]

    def write(method, seed, protocol, top1):
        with open(args.results, "a") as file:
            file.write(json.dumps({"method": method, "seed": seed, "protocol": protocol, "top1": top1} | about) + "\n")
        print(f"{method:12} seed {seed}  {protocol:14} {top1:6.2f} %", flush=True)

    for seed in range(args.seeds):
        folder = lambda name: args.runs / f"{name}-s{seed}"
        for method in args.methods or ["none", *METHODS]:
            if not missing(method, seed, PROTOCOLS):
                continue
            if method != "none":
                script, flags = METHODS[method].format(mae=folder("mae") / "checkpoint.pt", **numbers).split(" ", 1)
                if "--teacher" in flags and not (folder("mae") / "encoder.pt").exists():        # written at the end
                    raise SystemExit(f"{method} is taught by MAE: run --methods mae first, to its end")
                found = call(script, f"{train} {SHAPE} {flags} --seed {seed}", folder(method))
                own = found.get("top1", found.get("zero_shot"))
                if own is not None and missing(method, seed, ["own"]):
                    write(method, seed, "own", own)
            for protocol in missing(method, seed, PROTOCOLS):
                words, epochs = PROTOCOLS[protocol]
                if epochs:
                    epochs = 1 if args.quick else epochs
                    words += f" --epochs {epochs} --warmup-epochs {epochs / 10}"
                checkpoint = f"--checkpoint {folder(method)}/checkpoint.pt" if method != "none" else \
                    f"--checkpoint none --method mae {SHAPE}" + " --layer-decay 1" * words.startswith("finetune")
                found = call("evaluate.py", f"{words} {score} {checkpoint} --seed {seed}",
                             args.runs / f"{protocol.removesuffix(' %').replace(' ', '-')}-{method}-s{seed}")
                write(method, seed, protocol, found["top1"])


def commit() -> str:
    try:
        return subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return "unknown"                                 # no git


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in cpus if line.startswith("model name")] or [platform.machine()]
    return f"{len(names)} x {names[0]}"


def figures(path: Path) -> dict:
    """{(method, protocol): [figure of each seed]}."""
    found = {}
    for line in read(path):
        found.setdefault((line["method"], line["protocol"]), {})[line["seed"]] = line["top1"]
    return {key: list(values.values()) for key, values in found.items()}


def table(args):
    """Between the marks in README.md: a row for each method, mean and half the range over the seeds; and the image."""
    found, lines, columns = figures(args.results), read(args.results), [*PROTOCOLS, "own"]
    shown = lambda values: f"{statistics.mean(values):.1f}" + (f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else "")
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for method in ["none", *METHODS]:
        if any(key[0] == method for key in found):
            name = {"none": "untrained", "supervised": "`supmim.py --mim-weight 0`"}.get(method, f"`{method}.py`") + " (labels)" * (method in LABELLED)
            rows.append([name] + [shown(found[method, p]) if (method, p) in found else "" for p in columns])
    several = max(len(values) for values in found.values()) > 1
    stamp = {key: ", ".join(sorted({str(line[key]) for line in lines})) for key in ("data", "epochs", "machine", "torch", "commit", "date", "seed")}
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    text += (f"\n\nTop-1 in %; {stamp['data']}, {stamp['epochs']} epochs, seed {stamp['seed']}{' (mean ± half the range)' * several}; "
             f"{stamp['machine']}, torch {stamp['torch']}, commit {stamp['commit']}, {stamp['date']}.\n\n"
             f"![The same as bars](assets/{args.picture.name})")
    readme = (ROOT / "README.md").read_text()
    before, mark, rest = readme.partition("<!-- study -->\n")
    if not mark:
        raise SystemExit("README.md has no <!-- study --> ... <!-- /study -->")
    (ROOT / "README.md").write_text(f"{before}{mark}{text}\n<!-- /study -->{rest.partition('<!-- /study -->')[2]}")
    draw(found, args.picture)


def draw(found: dict, path: Path):
    """Bars of every method's figures, a panel for each protocol, as a PNG; a line from the least to the largest of the seeds."""
    methods = [m for m in ["none", *METHODS] if any(key[0] == m for key in found)]
    bar, names, wide = 30, 190, 640
    high = (len(methods) + 2) * bar
    image = Image.new("RGB", (wide * 3, high * 2 + bar), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(20)
    colours = {True: "#c98b3d", False: "#3d7fc9"}
    length = lambda percent: (wide - names - 90) * percent / 100
    for i, protocol in enumerate(PROTOCOLS):
        x, y = wide * (i % 3) + 20, high * (i // 3) + 8
        pen.text((x, y), f"{protocol}, top-1 in %", "black", font)
        for k, method in enumerate(methods):
            values, left, top = found.get((method, protocol), []), x + names, y + (k + 1) * bar
            pen.text((x, top), "untrained" if method == "none" else method, "black", font)
            if values:
                mean = statistics.mean(values)
                pen.rectangle((left, top, left + length(mean), top + bar - 6), colours[method in LABELLED])
                pen.text((left + length(max(values)) + 8, top), f"{mean:.1f}", "black", font)
            if len(values) > 1:
                pen.line((left + length(min(values)), top + bar // 2 - 3, left + length(max(values)), top + bar // 2 - 3), "black", 2)
    pen.text((20, high * 2), "brown: has seen the labels of all training images", colours[True], font)
    image.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "jpegs"])
    parser.add_argument("--data", default="cifar10", help="cifar10, or a folder of class folders under train/ and val/ or test/")
    parser.add_argument("--epochs", type=int, default=4, help="of the pre-training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=["none", *METHODS])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path, help="empty: tests/measure/study.jsonl, of --quick runs/study/quick.jsonl")
    parser.add_argument("--picture", type=Path, default=ROOT / "assets/study.png")
    args = parser.parse_args(argv)
    args.results = args.results or (args.runs / "quick.jsonl" if args.quick else ROOT / "tests/measure/study.jsonl")
    {"run": run, "table": table, "jpegs": jpegs}[args.what](args)


if __name__ == "__main__":
    main()
