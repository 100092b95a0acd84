#!/usr/bin/env bash
# The reference run: train the side network, the same without memory, and LoRA of as many weights, on
# the same 8.2M tokens; then score all of them on the test documents.
#
#     examples/reference/reference.sh DATA RUN
#
# DATA has books/, technical/ and code/, each with NAME_train, NAME_validation and NAME_test.jsonl.gz.
# RUN gets checkpoints, logs and scores. What is there already is not made again.
set -euo pipefail

data="${1:?the folder of data sets}" run="${2:?the folder for the run}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python benchmarks/reference.py --data "$data" --output "$run"
report() { python benchmarks/reference_report.py --data "$data" --run "$run" "$@"; }
report --split validation
report --split test --domains books --documents 10 --tokens 16385 --memory-sizes 1024 4096 16384
report --split test --domains technical code --documents 8 --tokens 8193
# Windows every 256 tokens beside dense context: what there is to win, and how much of it is won.
report --split test --documents 4 --tokens 8193 --stride 256 --dense-context 2048 \
    --conditions memory control
