#!/usr/bin/env bash
# The main job in a few minutes on two CPU cores: give SmolLM2-135M a memory, adapt it on the source
# of Python's standard library, and compare perplexities on modules that it was not adapted on.
#
#   examples/demo.sh [DIRECTORY]     where the result goes; by default a new one under runs/
#
# Needs what `make demo` installs first, and no network. A run this short shows the direction, not
# the size of the effect; docs/training.md has settings for more.
set -euo pipefail

output="${1:-runs/demo-$(date +%Y%m%d-%H%M%S)}"

# Layer 20 of 30 is the one that SmolLM2 reads well from before any training (docs/results.md).
exec memlayer train \
    --backbone smollm2-135m \
    --data python-stdlib \
    --output "$output" \
    --backend torch \
    --segment-length 512 \
    --memory-size 16384 \
    --memory-layer 20 \
    --steps 28 \
    --eval-tokens 6144
