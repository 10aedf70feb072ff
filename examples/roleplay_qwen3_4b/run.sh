#!/usr/bin/env bash
# Role-play recipe, step by step; README.md beside it says what each step does.
#   bash examples/roleplay_qwen3_4b/run.sh {download|data|convert|sft|export-specialist|distill|export}
# WORK: where everything goes (default: output/ here). Later arguments are flags of pretrain_camopd.py and win.
set -euo pipefail
trap : TERM # Slurm sends SIGTERM to this shell too; it waits for the training, which saves and ends
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$root/.venv/bin/python"
WORK="${WORK:-$here/output}"
step="${1:?a step: download, data, convert, sft, export-specialist, distill or export}"
shift
common=(--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --sequence-parallel
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1)

case "$step" in
download)
    "$root/.venv/bin/hf" download Qwen/Qwen3-4B-Instruct-2507 --local-dir "$WORK/hf/general"
    "$root/.venv/bin/hf" download Neph0s/CoSER train/sft_conversations_sharegpt.json --repo-type dataset \
        --local-dir "$WORK/coser"
    bash "$root/examples/general_prompts.sh" download "$WORK/data"
    ;;
data)
    bash "$root/examples/general_prompts.sh" prepare "$WORK/data"
    "$python" "$root/tools/prepare_prompts.py" coser --output "$WORK/data/roleplay" \
        --source "$WORK/coser/train/sft_conversations_sharegpt.json"
    ;;
convert)
    "$python" "$root/checkpoints_convert/hf_to_megatron.py" --hf-path "$WORK/hf/general" \
        --save "$WORK/megatron/general" --verify
    ;;
sft) # 32 GPUs: TP 2, DP 16; 64 rows of 16,384 tokens a step
    bash "$root/examples/launch.sh" --stage sft --load "$WORK/megatron/general" --save "$WORK/sft" \
        --conversations "$WORK/data/roleplay/sft.jsonl" --seq-length 16384 \
        --tensor-model-parallel-size 2 "${common[@]}" --global-batch-size 64 \
        --train-iters 900 --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 30 \
        --weight-decay 0.01 --clip-grad 1.0 --adam-beta2 0.95 --save-interval 100 --save-retain-interval 300 "$@"
    ;;
export-specialist)
    "$python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$WORK/sft" --save "$WORK/hf/specialist"
    ;;
distill) # 32 GPUs: TP 2, DP 16; the paper's settings are the defaults of the flags that are not here
    bash "$root/examples/launch.sh" --load "$WORK/sft" --general-teacher-load "$WORK/megatron/general" \
        --save "$WORK/camopd" --general-prompts "$WORK/data/general/prompts.jsonl" \
        --domain-prompts "$WORK/data/roleplay/heldout_prompts.jsonl" \
        --tensor-model-parallel-size 2 "${common[@]}" --global-batch-size 512 \
        --train-iters 120 --lr 2e-6 --weight-decay 0.01 --clip-grad 1.0 \
        --max-prompt-length 4096 --max-response-length 32768 --rollout-engine vllm \
        --recovery-steps 3 --preservation-steps 1 --general-mass-target 0.8 --domain-mass-target 0.8 \
        --general-feedback-scale 2 --domain-feedback-scale 1 \
        --save-interval 10 --save-retain-interval 40 "$@"
    ;;
export)
    "$python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$WORK/camopd" --save "$WORK/hf/recovered"
    ;;
*)
    echo "run.sh: no step is called $step: download, data, convert, sft, export-specialist, distill, export" >&2
    exit 2
    ;;
esac
