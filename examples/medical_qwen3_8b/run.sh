#!/usr/bin/env bash
# Medical recipe, step by step; README.md beside it says what each step does.
#   bash examples/medical_qwen3_8b/run.sh {download|data|convert|distill|export}
# WORK: where everything goes (default: output/ here). Later arguments are flags of pretrain_camopd.py and win.
set -euo pipefail
trap : TERM # Slurm sends SIGTERM to this shell too; it waits for the training, which saves and ends
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$root/.venv/bin/python"
WORK="${WORK:-$here/output}"
step="${1:?a step: download, data, convert, distill or export}"
shift

case "$step" in
download)
    "$root/.venv/bin/hf" download Qwen/Qwen3-8B --local-dir "$WORK/hf/general"
    "$root/.venv/bin/hf" download Intelligent-Internet/II-Medical-8B --local-dir "$WORK/hf/specialist"
    bash "$root/examples/general_prompts.sh" download "$WORK/data"
    ;;
data)
    bash "$root/examples/general_prompts.sh" prepare "$WORK/data"
    "$python" "$root/tools/prepare_prompts.py" medical --output "$WORK/data/medical"
    ;;
convert)
    for name in general specialist; do
        "$python" "$root/checkpoints_convert/hf_to_megatron.py" --hf-path "$WORK/hf/$name" \
            --save "$WORK/megatron/$name" --verify
    done
    ;;
distill) # 32 GPUs: TP 4, DP 8; the specialist is student and domain teacher
    bash "$root/examples/launch.sh" --load "$WORK/megatron/specialist" \
        --general-teacher-load "$WORK/megatron/general" --save "$WORK/camopd" \
        --general-prompts "$WORK/data/general/prompts.jsonl" --domain-prompts "$WORK/data/medical/prompts.jsonl" \
        --tensor-model-parallel-size 4 --sequence-parallel --bf16 --use-distributed-optimizer \
        --overlap-grad-reduce --overlap-param-gather \
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
        --global-batch-size 512 --train-iters 120 --lr 2e-6 --weight-decay 0.01 --clip-grad 1.0 \
        --max-prompt-length 4096 --max-response-length 32768 --rollout-engine vllm --rollout-tensor-parallel-size 2 \
        --recovery-steps 3 --preservation-steps 1 --general-mass-target 0.8 --domain-mass-target 0.8 \
        --general-feedback-scale 2 --domain-feedback-scale 1 \
        --save-interval 10 --save-retain-interval 40 "$@"
    ;;
export)
    "$python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$WORK/camopd" --save "$WORK/hf/recovered"
    ;;
*)
    echo "run.sh: no step is called $step: download, data, convert, distill, export" >&2
    exit 2
    ;;
esac
