#!/usr/bin/env bash
# Makes the demo's specialist: supervised fine-tuning of the general model on domain conversations, on the CPU.
#   bash examples/tiny_cpu/make_specialist.sh [any pretrain_camopd.py flags; later ones win]
# The committed models/specialist is what it left in output/sft/specialist; the demo uses that as it is.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$root/.venv/bin/python"
output="${OUTPUT:-$here/output/sft}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$output"
"$python" "$here/world.py" --output "$output/prompts" --conversations
[ -d "$output/general" ] ||
    "$python" "$root/checkpoints_convert/hf_to_megatron.py" --hf-path "$here/models/general" --save "$output/general"
"$root/.venv/bin/torchrun" --standalone --nproc-per-node "${NPROC:-1}" "$root/pretrain_camopd.py" --stage sft \
    --load "$output/general" --save "$output/run" \
    --conversations "$output/prompts/domain_conversations.jsonl" \
    --validation-conversations "$output/prompts/validation_conversations.jsonl" --eval-interval 20 \
    --seq-length 128 --global-batch-size 12 --max-tokens-per-microbatch 768 \
    --train-iters 60 --lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 3 --adam-beta2 0.98 \
    --weight-decay 0 --clip-grad 1.0 --save-interval 60 \
    "$@"
rm -rf "$output/specialist"
"$python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$output/run" --save "$output/specialist"
