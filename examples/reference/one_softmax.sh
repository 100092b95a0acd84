#!/usr/bin/env bash
# LoRA that reads memory in one softmax, LoRA of as many weights, and a side network without memory, on
# the same 133,120 tokens; then all of them on the test documents. Some three hours on one CPU core.
#
#     examples/reference/one_softmax.sh DATA RUN
#
# DATA and RUN are as reference.sh has them; on a GPU, more --steps and --batch-size are affordable.
set -euo pipefail

data="${1:?the folder of data sets}" run="${2:?the folder for the run}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
conditions=(lora control lora_memory)
python benchmarks/reference.py --data "$data" --output "$run" --conditions "${conditions[@]}" \
    --fusion softmax --lora-memory-layers 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 \
    --steps 260 --batch-size 1 --excerpt-tokens 6144 --lead-tokens 16384 --memory-dropout 0.25 \
    --recency-bias \
    --lora-learning-rate 3e-4 --gate-learning-rate 1e-1 --eval-tokens 2048
report() {
    python benchmarks/reference_report.py --data "$data" --run "$run" --split test --dtype bf16 \
        --conditions "${conditions[@]}" "$@"
}
report --documents 6 --dense-context 2048
report --documents 4 --tokens 16385 --domains books --memory-sizes 1024 4096 16384
