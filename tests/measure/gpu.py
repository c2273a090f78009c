"""The three parts of gpu.sh, which says what they are: checks, speed, cifar10."""

import argparse
import importlib
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import benchmark
import common
import data

METHODS = ("mae", "maskdistill", "dtm", "flip", "amt", "supmim")
SECOND_EPOCH = {                                         # the 20 steps reach maps, thrown patches
    "amt": ["--batch-size", "2000", "--base-lr", "1e-3", "--attention-from", "1",
            "--refresh-every", "1"]}
TOGETHER = (("ours (MAE)", "ours (AMT)", "ours (FLIP)"),
            ("ours (MaskDistill)", "ours (SupMIM)"),
            ("ours (DTM)",))                             # compile at the same time, in 80 GB


# ----------------------------------------------------------------------------------------- checks
def losses_of(method: str, folder: Path, name: str, steps: int, *flags) -> list[float]:
    """The losses of the steps that one run takes, on synthetic shapes."""
    losses = []
    end_step = common.Run.end_step

    def kept(run, step, loss, *details):
        losses.append(loss)
        return end_step(run, step, loss, *details)

    argv = ["--output", f"{folder}/{name}", "--max-steps", str(steps), *flags]
    teacher = folder / "cpu" / "teacher.pt"              # of --teacher self: one for all runs
    if teacher.is_file():
        argv += ["--teacher", str(teacher)]
    common.Run.end_step = kept
    importlib.import_module(method).main(argv)
    common.Run.end_step = end_step
    return torch.stack(losses).tolist()


def check(method: str, folder: Path, device: str, quick: bool):
    """Print how far the losses of two runs are apart at most, relative to their size; of bf16 and
    fp32 the means over the steps. All runs draw the masks on the CPU, so that they are the same."""
    sys.stdout = open(folder.with_suffix(".log"), "w")   # the runs' own lines
    mask_noise = common.mask_noise
    common.mask_noise = lambda cfg, step, width, on: mask_noise(cfg, step, width, "cpu").to(on)
    data.score_encoders = lambda *args: {}
    few = 2 if quick else 20
    many = 4 if quick else 50
    flags = [] if quick else SECOND_EPOCH.get(method, [])
    fp32 = [*flags, "--precision", "fp32", "--device", device]
    bf16 = [*flags, "--precision", "bf16", "--device", device, "--no-compile"]
    cpu = losses_of(method, folder, "cpu", few, *fp32, "--device", "cpu")
    eager = losses_of(method, folder, "eager", many, *fp32, "--no-compile")
    bf16 = losses_of(method, folder, "bf16", many, *bf16)
    first = losses_of(method, folder, "resumed", few // 2, *fp32, "--no-compile")
    resumed = first + losses_of(method, folder, "resumed", few, *fp32, "--no-compile")
    results = [("CPU and GPU", cpu, eager, 1e-3), ("resumed", resumed, eager, 1e-3)]
    means = [statistics.mean(losses[:many]) for losses in (bf16, eager)]
    results.append((f"bf16 and fp32, {many} steps", means[:1], means[1:], 1e-2))
    if not quick:
        compiled = losses_of(method, folder, "compiled", few, *fp32, "--compile")
        results.append(("compiled and eager", compiled, eager, 1e-3))
    wrong = 0
    for what, ours, theirs, most in results:
        pairs = list(zip(ours, theirs))
        gap = max(abs(a - b) / abs(b) for a, b in pairs)
        verdict = "ok" if gap <= most else "WRONG"
        wrong += gap > most
        print(f"{method:12} {what:24} {gap:.1e} of at most {most:.0e}  {verdict}",
              file=sys.__stdout__, flush=True)
    sys.exit(wrong)


def checks(args) -> int:
    """All methods at once, on a CPU one by one, each in a process. Returns how many failed."""
    processes = []
    for method in METHODS:
        folder = args.output / "runs" / method
        folder.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("spawn").Process(
            target=check, args=(method, folder, args.device, args.quick))
        process.start()
        processes.append(process)
        if args.quick:
            process.join()
    for process in processes:
        process.join(max(1, args.until - time.time()))
    for method, process in zip(METHODS, processes):
        if process.exitcode != 0:
            ended = "had no time" if process.is_alive() else f"failed, {process.exitcode}"
            print(f"{method:12} {ended}; see {args.output}/runs/{method}.log and checks.log")
            process.kill()
    return sum(process.exitcode != 0 for process in processes)


# ------------------------------------------------------------------------------------------ speed
def serve(name: str, settings, pipe):
    """The process of one contestant. It answers (batch, compile?, 0) when it has taken two steps,
    and (batch, compile?, n) with the seconds of a step and GiB; an error with its first line."""
    contestant = benchmark.Contestant(name, settings)
    pipe.send(contestant.flops(torch.randn(2, 3, 224, 224, device=settings.device)))
    while True:
        batch, compiled, steps = pipe.recv()
        try:
            if not steps:
                if compiled:
                    torch._dynamo.reset()
                    contestant.model.compile(dynamic=False)
                images = torch.randn(batch, 3, 224, 224, device=settings.device)
                steps = 2
            seconds = benchmark.clock(lambda: [contestant.step(images) for _ in range(steps)],
                                      settings.device)
            peak = 0.0
            if settings.device == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2 ** 30
            pipe.send((seconds / steps, peak))
        except Exception as error:                       # out of memory, the compiler's: a line
            pipe.send(common.first_line(error))
        if settings.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def start(name: str, settings):
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(name, settings, theirs), daemon=True)
    process.start()
    theirs.close()
    return pipe


def product(device: str) -> float:
    """FLOP/s of a large matrix product in bf16."""
    n, times = (8192, 20) if device == "cuda" else (1024, 2)
    matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    seconds = benchmark.clock(lambda: [matrix @ matrix for _ in range(times)], device)
    return 2 * n ** 3 * times / seconds


def answer_of(pipe):
    """What a contestant answers: (seconds, GiB), or why there is none."""
    try:
        return pipe.recv()
    except EOFError:
        return "its process has ended"


def speed(args) -> int:
    assert set().union(*TOGETHER) <= benchmark.CONTESTANTS["all"].keys()
    names = benchmark.installed_contestants("all")
    settings = argparse.Namespace(method="all", precision="bf16", device=args.device,
                                  model="micro" if args.quick else "base", compile=False)
    pipes = {name: start(name, settings) for name in names}
    flops = {}
    for name, pipe in pipes.items():
        try:
            flops[name] = pipe.recv()
        except EOFError:
            print(f"{name} does not start; see speed.log")
    print(f"{benchmark.device_name(args.device)}, torch {torch.__version__}, {settings.model}/16, "
          "bf16, fused AdamW, synthetic images on the device")
    print(f"{'':24}{'batch':>6}{'':10}images/s  share of {product(args.device) / 1e12:.3g} TFLOP/s"
          "  peak GiB")
    batches = (4,) if args.quick else (256, 64)
    for compiled in (False,) if args.quick else (False, True):
        for batch in batches:
            for together in TOGETHER if compiled else [(name,) for name in names]:
                started = [name for name in together if name in flops]
                if started:
                    measure(args, pipes, flops, started, batch, compiled)
    return 0


def measure(args, pipes, flops, names, batch: int, compiled: bool):
    """Let contestants take, and compile, their first steps together, then time one by one."""
    kind = "compiled" if compiled else "eager"
    if time.time() > args.until - (50 if compiled else 0):
        print(f"no time for batch {batch}, {kind}: {', '.join(names)}")
        return
    for name in names:                                   # all begin before the first has ended
        pipes[name].send((batch, compiled, 0))
    first = {name: answer_of(pipes[name]) for name in names}
    for name in names:
        answer = first[name]
        if not isinstance(answer, str):
            pipes[name].send((batch, compiled, 2 if args.quick else 10))
            answer = answer_of(pipes[name])
        if isinstance(answer, str):
            print(f"{name:24}{batch:6} {kind:9} {answer}")
            continue
        seconds, peak = answer
        share = batch * flops[name] / seconds / product(args.device)
        print(f"{name:24}{batch:6} {kind:9}{batch / seconds:9.1f}{100 * share:10.0f} %{peak:18.2f}")
        with open(args.output / "speed.jsonl", "a") as file:
            file.write(json.dumps({"contestant": name, "batch": batch, "compiled": compiled,
                                   "images_per_s": batch / seconds, "share_of_product": share,
                                   "peak_gib": peak, "first_steps_s": 2 * first[name][0],
                                   "machine": benchmark.device_name(args.device),
                                   "torch": torch.__version__}) + "\n")


# ---------------------------------------------------------------------------------------- cifar10
def cifar10(args) -> int:
    """MAE with ViT-Ti for as many epochs as there is time for, by the speed of its first steps."""
    import mae
    flags = ["--data", args.data, "--preset", "cifar10", "--device", args.device, "--no-resume",
             "--no-compile", "--workers", str(min(12, data.usable_cores()))]
    if args.quick:
        flags += ["--model", "micro", "--batch-size", "64"]
    images = len(data.open_data(args.data, "").pretrain)
    score_encoders = data.score_encoders
    data.score_encoders = lambda *_: {}
    folder = args.output / "runs" / "cifar10"
    mae.main([*flags, "--output", f"{folder}-first", "--max-steps", "2" if args.quick else "100"])
    data.score_encoders = score_encoders
    lines = Path(f"{folder}-first", "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    images_per_s = [line["images_per_s"] for line in metrics if "images_per_s" in line][-1]
    left = args.until - time.time() - 25                 # for the scores
    epochs = 1 if args.quick else max(1, int(left * images_per_s / images))
    print(f"{images_per_s:,.0f} images/s, {left:.0f} s: {epochs} epochs of {images} images")
    result = mae.main([*flags, "--output", str(folder), "--epochs", str(epochs),
                       "--warmup-epochs", str(epochs / 10),
                       "--max-steps", "4" if args.quick else "0"])
    print(json.dumps(result))
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["checks", "speed", "cifar10"])
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.until = time.time() + args.seconds
    args.device = "cpu" if args.quick else "cuda"
    sys.exit({"checks": checks, "speed": speed, "cifar10": cifar10}[args.part](args))


if __name__ == "__main__":
    main()
