"""The default run of each script with five seeds: `python tests/measure/defaults.py run`, then
`table`.

run     python mae.py, maskdistill.py, ... on the synthetic shapes, one after the other, and a line
        of --results for each. What --results holds already for this commit is not run again.
table   writes the table between the marks in tests/measure/results.md: mean, least and greatest.

Run it on a machine that does nothing else: the seconds are a column of the table.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from study import commit, machine

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPTS = ("mae", "maskdistill", "flip", "dtm", "amt", "supmim")
CONTROLS = {                                             # what the method's idea is compared with
    "maskdistill": "--teacher pixels",
    "dtm": "--morphs 0",
    "amt": "--sampling uniform",
    "supmim": "--mim-weight 0",
}
COLUMNS = {                                              # of the table: a score of the lines
    "linear": "linear_trained",
    "linear, untrained": "linear_untrained",
    "linear, teacher": "linear_teacher",
    "k-NN": "knn_trained",
    "k-NN, untrained": "knn_untrained",
    "top-1": "top1",
    "zero-shot": "zero_shot",
    "seconds": "seconds",
}
ALSO_KEPT = ("zero_shot_seen", "zero_shot_held_out", "map_lift", "objects_masked")
START, END = "<!-- defaults -->\n", "<!-- /defaults -->"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in open(path)] if path.exists() else []


def run(args):
    about = {"commit": commit(), "machine": machine(), "torch": torch.__version__,
             "threads": args.threads, "date": datetime.date.today().isoformat()}
    for seed in args.seeds:
        for script in args.scripts:
            for flags in ("", CONTROLS.get(script, "")) if args.controls else ("",):
                job = {"script": script, "flags": flags, "seed": seed}
                wanted = job | {"commit": about["commit"], "threads": args.threads}
                if any(wanted.items() <= line.items() for line in read(args.results)):
                    continue
                metrics, seconds = start(job, args)
                with open(args.results, "a") as file:
                    file.write(json.dumps(job | metrics | {"seconds": seconds} | about) + "\n")
                print(script, flags, seed, metrics, f"{seconds:.0f} s", flush=True)


def start(job: dict, args) -> tuple[dict, float]:
    """Run a script as a newcomer does; the scores of its last line, and the seconds it took."""
    output = args.runs / f"{job['script']}{job['flags'].replace(' ', '')}-s{job['seed']}"
    command = [sys.executable, f"{ROOT}/{job['script']}.py", *job["flags"].split(),
               f"--seed={job['seed']}", f"--output={output}", "--no-resume"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    started = time.time()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds = time.time() - started
    lines = (output / "metrics.jsonl").read_text().splitlines()
    metrics = {}
    for line in lines:                                   # the last value of each name
        metrics |= json.loads(line)
    scores = {name: value for name, value in metrics.items()
              if name.startswith(("knn", "linear")) or name in (*COLUMNS.values(), *ALSO_KEPT)}
    return scores, round(seconds, 1)


def table(args):
    """A row for each script, machine and number of threads: mean (least to greatest)."""
    groups = {}
    for line in read(args.results):
        key = line["script"], line["flags"], line["machine"], line["threads"]
        groups.setdefault(key, []).append(line)
    rows = [["", "machine", "threads", "seeds", *COLUMNS], ["---"] * (len(COLUMNS) + 4)]
    for key in sorted(groups, key=lambda key: (SCRIPTS.index(key[0]), *key[1:])):
        script, flags, machine, threads = key
        row = [f"`{script}.py {flags}`".replace(" `", "`"), machine, str(threads)]
        row.append(str(len(groups[key])))
        for name in COLUMNS.values():
            values = [line[name] for line in groups[key] if name in line]
            text = ""
            if values:
                text = f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            row.append(text)
        rows.append(row)
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    stamp = ", ".join(", ".join(sorted({line[key] for line in read(args.results)}))
                      for key in ("torch", "commit", "date"))
    path = HERE / "results.md"
    before, mark, rest = path.read_text().partition(START)
    if not mark:
        raise SystemExit(f"{path} has no {START.strip()} ... {END}")
    path.write_text(f"{before}{mark}{text}\n\n{stamp}.\n{END}{rest.partition(END)[2]}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--scripts", nargs="*", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=range(5))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--controls", action="store_true", help="also the controls, see CONTROLS")
    parser.add_argument("--runs", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--results", type=Path, default=HERE / "defaults.jsonl")
    args = parser.parse_args(argv)
    {"run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
