"""The study: six methods on the same images, with one encoder and one number of epochs.

    python tests/measure/study.py jpegs --data cifar10-jpg    # CIFAR-10 as JPEGs in class folders
    python tests/measure/study.py run --data cifar10-jpg      # goes on where it stopped
    python tests/measure/study.py table                       # tables, and the figure

run     trains each method, the supervised baseline and three controls. Training pauses after the
        epochs of CURVE for a linear probe, and at the end evaluate.py scores the encoder: k-NN,
        linear, fine-tuning on all, 10 % and 1 % of the labels. Each score is a line of --results;
        what is there is not run again, and a training that was cut short resumes. Two at once may
        share --runs and --results if their --methods differ (those of the teacher's students wait
        for it: run `supervised` first). --quick: a few synthetic images, to see that all works.
table   writes the tables into README.md and tests/measure/results.md, and assets/study.png.

What is given to whom: MAE and AMT get images alone. MaskDistill and DTM have the supervised
baseline of the same seed as their teacher, in the place of CLIP: something that knows more than
the pixels say. FLIP reads the names of the classes in captions; the baseline and SupMIM learn the
labels. So all but MAE and AMT owe something to the labels of the training images.
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
STUDENT = "--layer-scale 1 --base-lr 3e-3 --color-jitter 0 --teacher {teacher}"
MASK_MORE = f"--base-lr 4e-3 {DECODER} --attention-from {{tenth}} --refresh-every {{fifth}}"
LABELS = ("--base-lr 2e-3 --mixup 0 --cutmix 0 --randaugment 0 --drop-path 0 --smoothing 0 "
          f"--eval-every 1000 {DECODER}")
METHODS = {                                              # script, and flags besides SHAPE
    "supervised": f"supmim.py --mim-weight 0 {LABELS}",
    "mae": f"mae.py --base-lr 4e-3 {DECODER}",
    "maskdistill": f"maskdistill.py {STUDENT}",
    "flip": "flip.py --base-lr 4e-3",
    "dtm": f"dtm.py {STUDENT}",
    "amt": f"amt.py {MASK_MORE}",
    "supmim": f"supmim.py --mim-weight 5 {LABELS}",
    "dtm-control": f"dtm.py --morphs 0 {STUDENT}",
    "amt-control": f"amt.py --sampling uniform {MASK_MORE}",
    "flip-control": "flip.py --mask-ratio 0 --base-lr 4e-3",
}
NAMES = {                                                # of the rows, in the order of the tables
    "untrained": "untrained",
    "mae": "`mae.py`",
    "amt": "`amt.py`",
    "amt-control": "`amt.py --sampling uniform`",
    "maskdistill": "`maskdistill.py` (teacher: labels)",
    "dtm": "`dtm.py` (teacher: labels)",
    "dtm-control": "`dtm.py --morphs 0` (teacher: labels)",
    "flip": "`flip.py` (labels)",
    "flip-control": "`flip.py --mask-ratio 0` (labels)",
    "supmim": "`supmim.py` (labels)",
    "supervised": "supervised, `supmim.py --mim-weight 0` (labels)",
}
CONTROLS = ("amt-control", "dtm-control", "flip-control")     # not in the README's table
TUNE = ("--batch-size 64 --base-lr 8e-3 --mixup 0 --cutmix 0 --randaugment 0 --erasing 0 "
        "--drop-path 0 --eval-every 1000")
PROTOCOLS = {                                            # flags of evaluate.py, and epochs
    "k-NN": ("knn", None),
    "linear": ("linear", None),
    "finetune": (f"finetune {TUNE}", 2),
    "finetune 10 %": (f"finetune --percent 10 {TUNE}", 5),
    "finetune 1 %": (f"finetune --percent 1 {TUNE}", 50),
}
CURVE = (5, 10, 20)                                      # epochs, besides the last
COLORS = {"mae": "#1f77b4", "amt": "#17becf", "maskdistill": "#d62728", "dtm": "#ff7f0e",
          "flip": "#2ca02c", "supmim": "#9467bd", "supervised": "#555555"}


# ------------------------------------------------------------------------------------------- run
def run(args):
    """Fill --results: {method, seed, protocol, epoch, top1 in percent, how it was come by}."""
    if args.quick:
        args.data = draw_images(args.runs / "images")
        args.epochs = 2
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for line in read(args.results):
        if (line["data"], line["epochs"]) != (Path(args.data).name, args.epochs):
            raise SystemExit(f"{args.results} holds scores of other --data or --epochs; give "
                             "another --results and --runs")
    images = len(data.open_data(str(args.data), "data").pretrain)
    for seed in args.seeds:
        for method in args.methods:
            if method != "untrained":
                train(method, seed, images, args)
            score(method, seed, args)


def train(method: str, seed: int, images: int, args):
    """Train to each epoch of the curve, and to the end; a line for the probe of each."""
    script, flags = command(method, seed, args)
    output = args.runs / f"{method}-s{seed}"
    batch_size = 32 if args.quick else 128
    for epoch in sorted({epoch for epoch in CURVE if epoch < args.epochs} | {args.epochs}):
        if is_known(args, method=method, seed=seed, protocol="probe", epoch=epoch):
            continue
        steps = epoch * (images // batch_size)
        metrics = call(script, f"{flags} --max-steps {steps}", output)
        kept = ("linear_untrained", "linear_teacher", "knn_trained")
        details = {name: metrics[name] for name in kept if name in metrics}
        own = metrics.get("top1", metrics.get("zero_shot"))
        if own is not None:                              # what the method itself classifies with
            details["own"] = own
        write(args, method, seed, "probe", epoch, metrics["linear_trained"], **details)


def command(method: str, seed: int, args) -> tuple[str, str]:
    """The script of a method and all its flags but --max-steps and --output."""
    teacher = args.runs / f"supervised-s{seed}"
    line = METHODS[method].format(teacher=shlex.quote(str(teacher / "checkpoint.pt")),
                                  tenth=max(1, args.epochs // 10), fifth=max(1, args.epochs // 5))
    script, flags = line.split(" ", 1)
    if "--teacher" in flags and not args.quick:
        if not is_known(args, method="supervised", seed=seed, protocol="probe", epoch=args.epochs):
            raise SystemExit(f"{method} needs its teacher: run --methods supervised to its end")
    batch_size = 32 if args.quick else 128
    budget = (f"--data {shlex.quote(str(args.data))} --workers {args.workers} --preset cifar10 "
              f"--epochs {args.epochs} --warmup-epochs {args.epochs / 10} --crop-scale 0.5 "
              f"--batch-size {batch_size} --seed {seed} --precision {args.precision}")
    if args.compile:
        budget += " --compile"
    return script, f"{budget} {SHAPE} {flags}"


def score(method: str, seed: int, args):
    """A line for each protocol of evaluate.py."""
    for protocol, (flags, epochs) in PROTOCOLS.items():
        if is_known(args, method=method, seed=seed, protocol=protocol):
            continue
        if epochs:
            epochs = 1 if args.quick else epochs
            flags += f" --epochs {epochs} --warmup-epochs {epochs / 10}"
        flags += (f" --data {shlex.quote(str(args.data))} --workers {args.workers} --seed {seed}"
                  f" --precision {args.precision}")
        if args.quick:
            flags += " --batch-size 8"
        if method == "untrained":
            flags += f" --checkpoint none --method mae {SHAPE}"
            if protocol.startswith("finetune"):
                flags += " --layer-decay 1"              # nothing has been learned to be kept
        else:
            checkpoint = args.runs / f"{method}-s{seed}" / "checkpoint.pt"
            flags += f" --checkpoint {shlex.quote(str(checkpoint))}"
        name = protocol.removesuffix(" %").replace(" ", "-")
        metrics = call("evaluate.py", flags, args.runs / f"{name}-{method}-s{seed}")
        write(args, method, seed, protocol, args.epochs, metrics["top1"])


def call(script: str, flags: str, output: Path) -> dict:
    """Run a script to its end; the last line of its metrics.jsonl."""
    words = [sys.executable, str(ROOT / script), *shlex.split(flags), "--output", str(output)]
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "log.txt", "a") as log:
        status = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        raise SystemExit(f"{' '.join(words)} failed, see {output}/log.txt")
    return json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path)] if path.exists() else []


def is_known(args, **wanted) -> bool:
    return any(wanted.items() <= line.items() for line in read(args.results))


def write(args, method, seed, protocol, epoch, top1, **details):
    line = {"method": method, "seed": seed, "protocol": protocol, "epoch": epoch, "top1": top1}
    how = {"data": Path(args.data).name, "epochs": args.epochs, "commit": commit(),
           "machine": machine(), "torch": torch.__version__, "precision": args.precision,
           "date": datetime.date.today().isoformat()}
    with open(args.results, "a") as file:
        file.write(json.dumps(line | details | how) + "\n")
    print(f"{method:12} seed {seed}  {protocol:14} epoch {epoch:3} {top1:6.2f} %", flush=True)


def commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return "unknown"                                 # no git


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cores = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = cores or [platform.machine()]
    return f"{len(cores)} x {cores[0]}"


# ---------------------------------------------------------------------------------------- images
def jpegs(args):
    """CIFAR-10, downloaded, as JPEGs of Pillow's default quality in class folders."""
    for part in ("train", "test"):
        images = torchvision.datasets.CIFAR10("data", train=part == "train", download=True)
        for i, (image, label) in enumerate(images):
            path = Path(args.data, part, images.classes[label], f"{i:05}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def draw_images(folder: Path) -> Path:
    """160 synthetic images to train on and 40 to test on, as class folders."""
    for part, split, count in (("train", "train", 160), ("val", "test", 40)):
        drawn = data.synthetic_shapes(split, np.arange(count))
        for i, (image, shape) in enumerate(zip(drawn["image"], drawn["shape"])):
            path = folder / part / str(shape) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return folder


# ----------------------------------------------------------------------------------------- table
def table(args):
    """Between the marks of README.md and results.md: a row for each method; in results.md also the
    controls and the curve."""
    lines = read(args.results)
    scores = {}                                          # (method, column) -> one of each seed
    for line in lines:
        column = line["protocol"]
        if column == "probe":
            column = f"epoch {line['epoch']}"
            if line["epoch"] == line["epochs"]:          # each run says it of its own start
                before = line["linear_untrained"]
                scores.setdefault((line["method"], "epoch 0"), []).append(before)
        scores.setdefault((line["method"], column), []).append(line["top1"])
    epochs = lines[0]["epochs"]
    measured = [0, *(epoch for epoch in CURVE if epoch < epochs), epochs]
    curve = [f"epoch {epoch}" for epoch in measured]

    methods = [name for name in NAMES if any(method == name for method, _ in scores)]
    short = markdown(scores, [name for name in methods if name not in CONTROLS], [*PROTOCOLS])
    between_marks(ROOT / "README.md", f"{short}\n\nTop-1 in %; {describe_seeds(lines)}.")
    whole = markdown(scores, methods, [*PROTOCOLS, *curve])
    between_marks(ROOT / "tests/measure/results.md", f"{whole}\n\n{describe(lines)}")
    draw_curves(scores, measured, args.image)


def markdown(scores: dict, methods: list, columns: list) -> str:
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    for method in methods:
        row = [NAMES[method]]
        for column in columns:
            values = scores.get((method, column), [])
            text = f"{statistics.mean(values):.1f}" if values else ""
            if len(values) > 1:
                text += f" ± {(max(values) - min(values)) / 2:.1f}"
            row.append(text)
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe(lines: list) -> str:
    """How the scores were come by, in one line."""
    def all_of(key):
        return ", ".join(sorted({str(line[key]) for line in lines}))

    return (f"Top-1 in %; {describe_seeds(lines)}; {all_of('data')}, {all_of('epochs')} epochs; "
            f"{all_of('machine')}, {all_of('precision')}, torch {all_of('torch')}, commit "
            f"{all_of('commit')}, {all_of('date')}.")


def describe_seeds(lines: list) -> str:
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    return f"seeds {seeds}: mean ± half the range"


def between_marks(path: Path, text: str):
    start, end = "<!-- study -->\n", "<!-- /study -->"
    before, mark, rest = path.read_text().partition(start)
    if not mark or end not in rest:
        raise SystemExit(f"{path} has no {start.strip()} ... {end}")
    path.write_text(f"{before}{mark}{text}\n{end}{rest.partition(end)[2]}")


def draw_curves(scores: dict, epochs: list, path: Path):
    """Linear probe against epochs: a line for each method, a bar from the least to the greatest of
    its seeds."""
    width, height, left, right, top, bottom = 1920, 1200, 140, 380, 80, 120
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(40)
    drawn = [value for (method, column), values in scores.items() for value in values
             if column.startswith("epoch") and method in COLORS]
    least = 10 * int(min(drawn) / 10)
    most = 10 * int(max(drawn) / 10 + 1)

    def point(epoch, percent):
        x = left + (width - left - right) * epoch / epochs[-1]
        y = height - bottom - (height - top - bottom) * (percent - least) / (most - least)
        return x, y

    for percent in range(least, most + 1, 10):
        x, y = point(0, percent)
        pen.line((x, y, width - right, y), "#dddddd", 2)
        pen.text((left - 20, y), str(percent), "black", font, anchor="rm")
    for epoch in epochs:
        x, y = point(epoch, least)
        pen.text((x, y + 16), str(epoch), "black", font, anchor="ma")
    pen.text((left, 16), "linear probe, top-1 in %", "black", font)
    pen.text((width - right, height - 16), "epochs", "black", font, anchor="rs")
    names = []
    for method, color in COLORS.items():
        points = []
        for epoch in epochs:
            values = scores.get((method, f"epoch {epoch}"), [])
            if values:
                points.append(point(epoch, statistics.mean(values)))
                pen.line((*point(epoch, min(values)), *point(epoch, max(values))), color, 4)
        pen.line(points, color, 6)
        for x, y in points:
            pen.circle((x, y), 8, color)
        if points:
            names.append([points[-1][1], method, color])
    lowest = -font.size
    for y, method, color in sorted(names):               # names that would overlap move down
        lowest = max(y, lowest + font.size + 4)
        pen.text((width - right + 20, lowest), method, color, font, anchor="lm")
    image.reduce(2).save(path)                           # smooths the lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table", "jpegs"])
    parser.add_argument("--data", default="cifar10",
                        help="cifar10, or a folder with class folders in train/ and test/")
    parser.add_argument("--epochs", type=int, default=30, help="of the pre-training")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--methods", nargs="*", default=["untrained", *METHODS],
                        choices=["untrained", *METHODS])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="auto",
                        help="of the scripts; bf16 is worth it on CPUs with avx512_bf16, too")
    parser.add_argument("--compile", action="store_true", help="compile what is pre-trained")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--results", type=Path,
                        help="empty: tests/measure/study.jsonl; with --quick: RUNS/quick.jsonl")
    parser.add_argument("--image", type=Path, default=ROOT / "assets/study.png")
    args = parser.parse_args(argv)
    standard = args.runs / "quick.jsonl" if args.quick else ROOT / "tests/measure/study.jsonl"
    args.results = args.results or standard
    {"run": run, "table": table, "jpegs": jpegs}[args.what](args)


if __name__ == "__main__":
    main()
