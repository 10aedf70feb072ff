#!/usr/bin/env bash
# Off-policy distillation: both teachers answer their prompts, the student is fine-tuned on the answers.
#   bash examples/off_policy_kd/run.sh        the demo's models and prompts, on the CPU; scored at the end
# Larger runs set the variables below to Megatron checkpoints and prompt files, and FLAGS to what all three commands get.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
demo="$root/examples/tiny_cpu"
OUTPUT="${OUTPUT:-$here/output}"
if [ -z "${STUDENT:-}" ]; then
    OUTPUT="$OUTPUT/inputs" bash "$demo/prepare.sh"
    STUDENT="$OUTPUT/inputs/megatron/specialist" GENERAL_TEACHER="$OUTPUT/inputs/megatron/general"
    GENERAL_PROMPTS="$OUTPUT/inputs/prompts/general_prompts.jsonl"
    DOMAIN_PROMPTS="$OUTPUT/inputs/prompts/domain_prompts.jsonl"
    GENERATE="--max-prompt-length 32 --max-response-length 16 --global-batch-size 512 --rollout-batch-size 256"
    TRAIN="--seq-length 128 --global-batch-size 12 --max-tokens-per-microbatch 768 --train-iters 80 --lr 3e-4 --lr-warmup-iters 5
        --weight-decay 0 --clip-grad 1.0"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    score=yes
fi
DOMAIN_TEACHER="${DOMAIN_TEACHER:-$STUDENT}"

# Word splitting of FLAGS, GENERATE and TRAIN is wanted: they hold several flags.
# shellcheck disable=SC2086
{
    bash "$root/examples/launch.sh" --stage generate --load "$GENERAL_TEACHER" --prompts $GENERAL_PROMPTS \
        --responses "$OUTPUT/general_responses.jsonl" ${GENERATE:-} ${FLAGS:-}
    bash "$root/examples/launch.sh" --stage generate --load "$DOMAIN_TEACHER" --prompts $DOMAIN_PROMPTS \
        --responses "$OUTPUT/domain_responses.jsonl" ${GENERATE:-} ${FLAGS:-}
    bash "$root/examples/launch.sh" --stage sft --load "$STUDENT" --save "$OUTPUT/run" \
        --conversations "$OUTPUT/general_responses.jsonl" "$OUTPUT/domain_responses.jsonl" ${TRAIN:-} ${FLAGS:-}
}
[ -d "$OUTPUT/hf" ] ||
    "$root/.venv/bin/python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$OUTPUT/run" --save "$OUTPUT/hf"
if [ -n "${score:-}" ]; then
    "$root/.venv/bin/python" "$demo/evaluate.py" --eval-general "$OUTPUT/inputs/prompts/eval_general.jsonl" \
        --eval-domain "$OUTPUT/inputs/prompts/eval_domain.jsonl" --model off_policy_kd="$OUTPUT/hf" \
        --output "$OUTPUT/scores.json"
fi
