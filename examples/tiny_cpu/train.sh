#!/usr/bin/env bash
# The demo's training run alone: bash examples/tiny_cpu/train.sh [any pretrain_camopd.py flags; later ones win]
# NPROC processes (default 2; as data parallel unless the flags say otherwise). Running it again resumes.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
output="${OUTPUT:-$here/output}"
bash "$here/prepare.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$root/.venv/bin/torchrun" --standalone --nproc-per-node "${NPROC:-2}" "$root/pretrain_camopd.py" \
    --load "$output/megatron/specialist" \
    --general-teacher-load "$output/megatron/general" \
    --save "$output/run" \
    --general-prompts "$output/prompts/general_prompts.jsonl" \
    --domain-prompts "$output/prompts/domain_prompts.jsonl" \
    --max-prompt-length 32 --max-response-length 16 \
    --global-batch-size 64 --max-tokens-per-microbatch 256 \
    --train-iters 80 --lr 3e-4 --lr-warmup-iters 5 --weight-decay 0 --clip-grad 1.0 \
    --save-interval 40 \
    "$@"
