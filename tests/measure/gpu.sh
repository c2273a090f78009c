#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes, on one GPU and without any download:
#     tests/measure/gpu.sh [--quick] OUTPUT [CIFAR10]
# OUTPUT/checks.txt    each script's losses: CPU and GPU, fp32 and bf16, eager and compiled, resumed
# OUTPUT/speed.txt     images/s of all six and their peers with ViT-B/16, share of a matrix product,
#                      peak memory; also in OUTPUT/speed.jsonl
# OUTPUT/cifar10.txt   MAE with ViT-Ti in the time that is left: k-NN and linear probe
# Each file grows line by line, so that a run that is cut short leaves what it has measured.
# CIFAR10: its images in train/CLASS/ and test/CLASS/ ("study.py jpegs"); without: synthetic shapes.
# --quick: a little of everything, on the CPU, to see that it works. PYTHON: python3 if not set.
set -euo pipefail
quick=()
if [ "${1:-}" = --quick ]; then
  quick=(--quick)
  shift
fi
output=$(realpath -m "${1:?usage: tests/measure/gpu.sh [--quick] OUTPUT [CIFAR10]}")
images=shapes
if [ -n "${2:-}" ]; then
  images=$(realpath "$2")
fi
cd "$(dirname "$0")/../.."
mkdir -p "$output"
failed=0

part() {                                                 # name, second at which it has to end
  echo "== $1, from second $SECONDS to $2"
  timeout "$(($2 - SECONDS + 15))" "${PYTHON:-python3}" -u tests/measure/gpu.py "$1" \
    --seconds "$(($2 - SECONDS))" --output "$output" --data "$images" "${quick[@]}" \
    2>"$output/$1.log" | tee "$output/$1.txt" || failed=1
}

part checks 130
part speed 330
part cifar10 460
echo "== $SECONDS seconds; $output/*.txt"
exit $failed
