#!/usr/bin/env bash
# Everything there is to measure on a CUDA machine, in parts that are meant to stay below ten minutes each:
#
#     benchmarks/gpu.sh PART [PHOTOS...]
#     benchmarks/gpu.sh all
#
#     tests           the test suite; first what only a GPU shows
#     inference       speed at 336 pixels and more; inference224 at 224
#     latency         one image at a time, with CUDA graphs and without
#     compile         with torch.compile
#     rivals          the same models beside ToMe, EViT, DTEM, random choice and smaller pictures
#     accuracy        accuracy against time, the real checkpoint (needs its data)
#     train           training steps and their memory
#     scoring         scoring beside a copy of the same bytes
#     growth          from 224 to 2048 pixels
#     llava           tower and prefill of LLaVA-1.5-7B
#     dense           EVA-02 with windows at 1536 pixels, and at 512 and 640
#     labels, heal    real trainings without and with a teacher, all methods (need the data)
#     segmentation    a real segmenter (needs the data)
#
# Results go to benchmarks/results/gpu/, or to the folder that RESULTS names. A part that was interrupted goes on where
# it stopped when it is called again with the files that it wrote. PYTHON names the interpreter; photos are
# scikit-image's and scikit-learn's unless some are given; APTVIT_DATA is the folder of the checkpoint and its photos.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
RESULTS=${RESULTS:-benchmarks/results/gpu}
PART=${1:-}
PHOTOS=("${@:2}")

measure() {  # measure NAME OPTIONS...
    "$PYTHON" -m aptvit benchmark ${PHOTOS[@]+"${PHOTOS[@]}"} --device cuda --out "$RESULTS" --name "$@"
}

tests() {
    # What is special about CUDA first: kernels against the same function in plain PyTorch.
    "$PYTHON" -m pytest --quiet -rs tests/test_gpu.py tests/patching/kernels tests/layers tests/patching/test_scoring.py \
        tests/measuring tests/test_data.py
    "$PYTHON" -m pytest --quiet --numprocesses 8 --dist loadfile
}

inference() {
    local options=(--dtypes bfloat16 --batch-sizes "1,8,64,256" --keeps "1.0,0.75,0.55,0.45,0.30")
    measure inference --models vit_base_patch16_384,vit_large_patch14_clip_336,vit_huge_patch14_clip_336 "${options[@]}"
    measure inference --models vit_large_patch14_clip_224 --sizes 448 "${options[@]}"
}

inference224() {
    measure inference224 --models vit_base_patch16_224,vit_large_patch16_224,vit_huge_patch14_224 --dtypes bfloat16 \
        --batch-sizes "1,8,64,256" --keeps "1.0,0.75,0.55,0.45,0.30"
}

latency() {
    local options=(--models vit_base_patch16_384,vit_large_patch14_clip_336 --dtypes bfloat16 --batch-sizes 1 --rounds 20)
    measure latency "${options[@]}" --keeps 1.0,0.75,0.55,0.45
    measure latency "${options[@]}" --keeps 1.0,0.75,0.55,0.45 --graphs
}

rivals() {
    local folder=${PHOTOS[0]:-build/photos} model
    [[ -n "${PHOTOS[0]:-}" ]] || "$PYTHON" examples/sample_photos.py "$folder"
    for model in vit_base_patch16_384 vit_large_patch14_clip_336; do
        "$PYTHON" -m aptvit evaluate "$folder" --model "$model" --device cuda --dtype bfloat16 --batch-size 64 \
            --keeps 0.75,0.55,0.45 --timed-images 256 --rounds 20 --out "$RESULTS" --name "rivals-$model" --methods \
            apt-entropy,apt-entropy-global,random,downscale,tome,tome-flash,evit,dtem,dtem-flash
    done
}

accuracy() {
    "$PYTHON" benchmarks/pareto.py --device cuda --dtype float16 --batch-size 64 --timed-photos 500 --rounds 10 \
        --out "$RESULTS"
}

labels() {
    "$PYTHON" benchmarks/training.py --only labels --out "$RESULTS"
}

heal() {
    "$PYTHON" benchmarks/training.py --only heal --minutes 1 --out "$RESULTS"
}

segmentation() {
    "$PYTHON" benchmarks/dense.py --only segmentation --seeds 1 --size 576 --precision bfloat16 --workers 4 \
        --methods start chosen tuned tuned-uniform downscaled --name dense-960-cuda --out "$RESULTS"
}

compile() {
    # Compiling takes longer than measuring, so only where it may change the picture.
    measure compile --models vit_base_patch16_384,vit_large_patch14_clip_336 --dtypes bfloat16 --batch-sizes 1,64 \
        --keeps 1.0,0.55 --compile
}

train() {
    local options=(--dtypes bfloat16 --batch-sizes 8,64 --keeps "1.0,0.75,0.55,0.45" --train)
    measure train --models vit_base_patch16_384,vit_large_patch14_clip_336 "${options[@]}"
    measure train --models vit_large_patch14_clip_224 --sizes 448 "${options[@]}"
}

scoring() {
    "$PYTHON" benchmarks/scoring.py cuda "$RESULTS"
}

growth() {
    measure growth --models vit_base_patch16_224,vit_large_patch16_224 --sizes 224,384,512,768,1024,1536,2048 \
        --dtypes bfloat16 --batch-sizes 4 --keeps 0.55 --thresholds-from-size 384 --first 8
}

llava() {
    "$PYTHON" benchmarks/llava.py ${PHOTOS[@]+"${PHOTOS[@]}"} --device cuda --dtype float16 --layers 32 --batch 16 \
        --prompts 8 --rounds 10 --out "$RESULTS"
}

dense() {
    # EVA-02's layouts: windows at 1536 pixels for detection, global attention at 640 for segmentation. Compiled, since
    # the width of its MLP is no multiple of 8, which a compiler pads.
    local common=(${PHOTOS[@]+"${PHOTOS[@]}"} --model eva02_large_patch14_448 --device cuda --dtype bfloat16 --rounds 8
        --out "$RESULTS") by
    local windows=(--size 1536 --window 32 --global-blocks 2 5 8 11 14 17 20 23)
    for by in keep thresholds; do
        "$PYTHON" benchmarks/dense_speed.py "${common[@]}" "${windows[@]}" --batch 4 --part backbone detector --by $by \
            --compile --stream 4 --name "dense-speed-1536-eva02-$by"
    done
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" "${windows[@]}" --batch 4 --part backbone --by thresholds \
        --compile --stream 4 --area-bias 0.5 --name dense-speed-1536-eva02-bias
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" --size 640 --batch 16 --channels 1024 --part backbone segmenter \
        --by keep --compile --stream 4 --name dense-speed-640-eva02-keep
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" "${windows[@]}" --batch 1 --part backbone --graphs \
        --name dense-speed-1536-eva02-graphs
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" --size 640 --batch 16 --channels 1024 --part backbone segmenter \
        --by keep --compile --scorer preview --name dense-speed-640-eva02-two-passes
    "$PYTHON" benchmarks/dense_speed.py "${common[@]}" --size 640 --batch 1 --part backbone --graphs --scorer preview \
        --name dense-speed-640-eva02-two-passes-graphs
}

PARTS=(tests inference inference224 latency compile rivals accuracy train scoring growth llava dense labels heal
    segmentation)
case " ${PARTS[*]} all " in
    *" $PART "*) ;;
    *) echo "usage: benchmarks/gpu.sh $(IFS="|"; echo "${PARTS[*]}")|all [PHOTOS...]" >&2; exit 2 ;;
esac
if [[ "$PART" == all ]]; then
    for part in "${PARTS[@]}"; do "$part"; done
else
    "$PART"
fi
