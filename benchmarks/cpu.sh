#!/usr/bin/env bash
# Makes benchmarks/results/cpu.{json,md} and the plots: half an hour on two cores. Interrupted, it goes on where it
# stopped when it is called again; `benchmarks/cpu.sh --fresh` measures everything anew.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=benchmarks/results

case "${1:-}" in
    "") ;;
    --fresh) rm -f "$RESULTS"/cpu.{json,md} "$RESULTS"/cpu-{eta,growth}.svg ;;
    *) echo "usage: benchmarks/cpu.sh [--fresh]" >&2; exit 2 ;;
esac

measure() {
    "$PYTHON" -m aptvit benchmark --device cpu --out "$RESULTS" --name cpu "$@"
}

# Inference of full batches, and what it costs when nothing merges.
measure --models vit_base_patch16_384 --dtype float32,bfloat16 --batch 8 --keep 1.0,0.65,0.55,0.45 --rounds 3
measure --models vit_large_patch14_clip_336 --dtype float32 --batch 8 --keep 1.0,0.65,0.55,0.45 --rounds 2
# Training steps, and their memory.
measure --models vit_base_patch16_384 --batch 8 --keep 0.55 --train --rounds 3
# One image at a time.
measure --models vit_base_patch16_384,vit_small_patch16_224 --batch 1 --keep 1.0,0.9,0.75,0.5 --rounds 3
# Growth with resolution at the thresholds of 384 pixels; at 1536 pixels one photo takes half a minute.
measure --models vit_base_patch16_224 --sizes 224,384,512,768,1024,1536 --batch 1 --keep 0.55 \
    --thresholds-from-size 384 --max-photos 2 --rounds 2
# Half precision without the instructions for it takes a minute for each batch.
measure --models vit_large_patch14_clip_336 --dtype bfloat16 --batch 8 --keep 0.65,0.55,0.45 --rounds 2
