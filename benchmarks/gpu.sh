#!/usr/bin/env bash
# Everything there is to measure on a CUDA machine, in parts that stay below ten minutes each:
#
#     benchmarks/gpu.sh tests|inference|compile|train|scoring|growth|llava|dense|all [PHOTOS...]
#
# Results go to benchmarks/results/gpu/. A part that was interrupted goes on where it stopped when it is called again.
# PYTHON names the interpreter; photos are scikit-image's and scikit-learn's unless some are given.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
RESULTS=benchmarks/results/gpu
PART=${1:-}
PHOTOS=("${@:2}")

measure() {  # measure NAME OPTIONS...
    "$PYTHON" -m aptvit benchmark ${PHOTOS[@]+"${PHOTOS[@]}"} --device cuda --out "$RESULTS" --name "$@"
}

tests() {
    # What is special about CUDA first: kernels against the same function in plain PyTorch.
    "$PYTHON" -m pytest --quiet -rs tests/kernels tests/test_attention.py tests/test_scoring.py tests/test_measure.py
    "$PYTHON" -m pytest --quiet
}

inference() {
    local options=(--dtype bfloat16 --batch "1,8,64,256" --keep "1.0,0.75,0.55,0.45,0.30")
    measure inference --models vit_base_patch16_384,vit_large_patch14_clip_336,vit_huge_patch14_clip_336 "${options[@]}"
    measure inference --models vit_large_patch14_clip_224 --sizes 448 "${options[@]}"
}

compile() {
    # Compiling takes longer than measuring, so only where it may change the picture.
    measure compile --models vit_base_patch16_384,vit_large_patch14_clip_336 --dtype bfloat16 --batch 1,64 \
        --keep 1.0,0.55 --compile
}

train() {
    measure train --models vit_base_patch16_384,vit_large_patch14_clip_336 --dtype bfloat16 --batch 8,64 \
        --keep 1.0,0.75,0.55,0.45 --train
}

scoring() {
    "$PYTHON" benchmarks/scoring.py cuda "$RESULTS"
}

growth() {
    measure growth --models vit_base_patch16_224,vit_large_patch16_224 --sizes 224,384,512,768,1024,1536,2048 \
        --dtype bfloat16 --batch 4 --keep 0.55 --thresholds-from-size 384 --max-photos 8
}

llava() {
    "$PYTHON" benchmarks/llava.py ${PHOTOS[@]+"${PHOTOS[@]}"} --device cuda --dtype float16 --layers 32 --batch 16 \
        --prompts 8 --rounds 10 --out "$RESULTS"
}

dense() {
    # EVA-02's layouts: windows at 1536 pixels for detection, global attention at 512 and 640 for segmentation.
    local common=(${PHOTOS[@]+"${PHOTOS[@]}"} --device cuda --dtype bfloat16 --rounds 10 --memory --out "$RESULTS")
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" --model eva02_large_patch14_448 --size 1536 --window 32 \
        --global-blocks 2 5 8 11 14 17 20 23 --part backbone detector --name dense-detection
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" --model eva02_large_patch14_448 --size 512 640 --batch 8 \
        --channels 1024 --part backbone segmenter --name dense-segmentation
}

case "$PART" in
    tests|inference|compile|train|scoring|growth|llava|dense) "$PART" ;;
    all) for part in tests inference compile train scoring growth llava dense; do "$part"; done ;;
    *) echo "usage: benchmarks/gpu.sh tests|inference|compile|train|scoring|growth|llava|dense|all [PHOTOS...]" >&2
        exit 2 ;;
esac
