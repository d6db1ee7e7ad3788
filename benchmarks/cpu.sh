#!/usr/bin/env bash
# Makes benchmarks/results/cpu.{json,md} and the plots: an hour on two cores. Interrupted, it goes on where it stopped
# when it is called again.
#
#     benchmarks/cpu.sh                             # everything
#     benchmarks/cpu.sh --fresh                     # everything anew
#     NAME=mine benchmarks/cpu.sh nothing one       # some parts, to benchmarks/results/mine.*
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=benchmarks/results
NAME=${NAME:-cpu}

measure() {
    "$PYTHON" -m aptvit benchmark --device cpu --out "$RESULTS" --name "$NAME" "$@"
}

# What scoring costs when nothing merges: a per cent in a machine's noise takes many rounds.
nothing() {
    measure --models vit_base_patch16_384 --batch-sizes 8 --keeps 1.0 --rounds 9
    measure --models vit_large_patch14_clip_336 --batch-sizes 8 --keeps 1.0 --rounds 5
}

# Full batches.
batch() {
    measure --models vit_base_patch16_384 --batch-sizes 8 --keeps 0.65,0.55,0.45 --rounds 3
    measure --models vit_large_patch14_clip_336 --batch-sizes 8 --keeps 0.65,0.55,0.45 --rounds 2
}

# One image at a time.
one() {
    measure --models vit_base_patch16_384,vit_small_patch16_224 --batch-sizes 1 --keeps 1.0 --rounds 9
    measure --models vit_base_patch16_384,vit_small_patch16_224 --batch-sizes 1 --keeps 0.9,0.75,0.5 --rounds 3
}

# Training steps, and their memory.
train() {
    measure --models vit_base_patch16_384 --batch-sizes 8 --keeps 0.55 --train --rounds 3
}

# Growth with resolution at the thresholds of 384 pixels; at 1536 pixels one photo takes half a minute.
growth() {
    measure --models vit_base_patch16_224 --sizes 224,384,512,768,1024,1536 --batch-sizes 1 --keeps 0.55 \
        --thresholds-from-size 384 --first 2 --rounds 2
}

# Half precision; without the instructions for it a batch takes a minute.
half() {
    measure --models vit_base_patch16_384 --dtypes bfloat16 --batch-sizes 8 --keeps 1.0 --rounds 5
    measure --models vit_base_patch16_384 --dtypes bfloat16 --batch-sizes 8 --keeps 0.65,0.55,0.45 --rounds 3
    measure --models vit_large_patch14_clip_336 --dtypes bfloat16 --batch-sizes 8 --keeps 0.65,0.55,0.45 --rounds 2
}

if [ "${1:-}" = --fresh ]; then
    rm -f "$RESULTS/$NAME".{json,md} "$RESULTS/$NAME"-{eta,growth}.svg
    shift
fi
[ $# -gt 0 ] || set -- nothing batch one train growth half
for part in "$@"; do
    case "$part" in
        nothing | batch | one | train | growth | half) "$part" ;;
        *) echo "usage: benchmarks/cpu.sh [--fresh] [nothing|batch|one|train|growth|half ...]" >&2; exit 2 ;;
    esac
done
