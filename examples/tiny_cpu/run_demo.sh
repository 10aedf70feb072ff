#!/usr/bin/env bash
# The whole demo, afresh: HF models -> Megatron -> CaMOPD training on 2 CPU processes -> HF -> scores.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$root/.venv/bin/python"
output="${OUTPUT:-$here/output}"
export OMP_NUM_THREADS=1

# A folder that the demo did not make keeps what it has: somebody's "run" may be more than a demo's.
made=(megatron prompts general specialist run recovered scores.json)
if [ ! -e "$output/.made-by-the-demo" ]; then
    for name in "${made[@]}"; do
        [ ! -e "$output/$name" ] && continue
        echo "OUTPUT $output: holds $name, which this demo did not make; name a new folder" >&2
        exit 2
    done
fi
mkdir -p "$output" && touch "$output/.made-by-the-demo"
for name in "${made[@]}"; do rm -rf "${output:?}/$name"; done

echo "1/5 converting the general model and the specialist to Megatron checkpoints"
bash "$here/prepare.sh"
echo "2/5 CaMOPD: three general recovery steps, one domain preservation step, and again"
bash "$here/train.sh" --gradient-diagnostics-interval 5 --gradient-diagnostics-samples 16
echo "3/5 exporting the recovered model to Hugging Face format"
"$python" "$root/checkpoints_convert/megatron_to_hf.py" --load "$output/run" --save "$output/recovered"
echo "4/5 scoring held-out prompts by plain transformers generation"
OMP_NUM_THREADS="$(nproc)" "$python" "$here/evaluate.py" \
    --eval-general "$output/prompts/eval_general.jsonl" --eval-domain "$output/prompts/eval_domain.jsonl" \
    --model general_teacher="$output/general" --model specialist="$output/specialist" \
    --model recovered="$output/recovered" --output "$output/scores.json"
echo "5/5 drawing the run"
"$python" "$root/tools/report.py" "$output/run" --title "The demo"
echo "metrics: $output/run/metrics.jsonl   scores: $output/scores.json   models: $output/{general,specialist,recovered}"
