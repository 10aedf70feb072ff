#!/usr/bin/env bash
# Three branches with two teachers on the demo's models, on the CPU: numbers, letters, persona; scored at the end.
#   bash examples/three_branches/run.sh [any pretrain_camopd.py flags; later ones win]
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
demo="$root/examples/tiny_cpu"
python="$root/.venv/bin/python"
OUTPUT="${OUTPUT:-$here/output}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

OUTPUT="$OUTPUT/inputs" bash "$demo/prepare.sh"
[ -f "$OUTPUT/common.jsonl" ] ||
    "$python" "$here/name_branches.py" "$OUTPUT/inputs/prompts/general_prompts.jsonl" "$OUTPUT/common.jsonl"
cp "$here/branches.yaml" "$OUTPUT/branches.yaml"

"$root/.venv/bin/torchrun" --standalone --nproc-per-node "${NPROC:-2}" "$root/pretrain_camopd.py" \
    --load "$OUTPUT/inputs/megatron/specialist" --save "$OUTPUT/run" --branches "$OUTPUT/branches.yaml" \
    --max-prompt-length 32 --max-response-length 16 --global-batch-size 64 --max-tokens-per-microbatch 768 \
    --train-iters 80 --lr 3e-4 --lr-warmup-iters 5 --weight-decay 0 --clip-grad 1.0 --save-interval 40 \
    --log-samples 8 --gradient-diagnostics-interval 10 --gradient-diagnostics-samples 16 "$@"
[ -d "$OUTPUT/recovered" ] ||
    "$python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$OUTPUT/run" --save "$OUTPUT/recovered"
"$python" "$demo/evaluate.py" \
    --eval-general "$OUTPUT/inputs/prompts/eval_general.jsonl" --eval-domain "$OUTPUT/inputs/prompts/eval_domain.jsonl" \
    --model specialist="$OUTPUT/inputs/specialist" --model recovered="$OUTPUT/recovered" --output "$OUTPUT/scores.json"
"$python" "$root/tools/report.py" "$OUTPUT/run" --title "Three branches, two teachers"
