#!/usr/bin/env bash
# Memorize a book, leave, come back in another process, go on from a prompt, and see where in the
# book that was looked up.
#
#   examples/novel/novel.sh BOOK.txt PROMPT [DIRECTORY]
#
# MODEL names the model; with nothing trained at hand it is SmolLM2-135M, whose layer 20 can be read
# before any training (docs/results.md). With a trained one:
#   MODEL="--checkpoint runs/smollm" examples/novel/novel.sh BOOK.txt PROMPT
set -euo pipefail

book="$1"
prompt="$2"
directory="${3:-runs/novel}"
read -ra model <<< "${MODEL:---backbone smollm2-135m}"
new=()
if [[ "${model[0]}" == --backbone ]]; then
    new=(--memory-layer 20)
fi
mkdir -p "$directory"
bank="$directory/novel.bank"

# Each command is a process of its own: what the next one knows of the book is on the disk. The
# second time, the book is held already and nothing is read again.
memlayer memorize "${model[@]}" ${new[@]+"${new[@]}"} --memory-size 131072 --bank "$bank" "$book"
memlayer bank verify "$bank"

pick=(--max-new-tokens 70 --temperature 0.7 --top-p 0.9 --seed 1)
memlayer generate "${model[@]}" --bank "$bank" --prompt "$prompt" "${pick[@]}" --show-sources

# The same text again, since the seed is the same, and every token of it looked into.
memlayer inspect "${model[@]}" --bank "$bank" --prompt "$prompt" "${pick[@]}" \
    --html "$directory/novel.html"
