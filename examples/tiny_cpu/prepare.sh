#!/usr/bin/env bash
# What a run of the demo needs, made once: prompt files, the two HF models, both as Megatron checkpoints.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="$root/.venv/bin/python"
output="${OUTPUT:-$here/output}"
[ -x "$python" ] || { echo "no environment: run 'make setup' in $root first" >&2; exit 2; }

mkdir -p "$output"
[ -f "$output/prompts/eval_domain.jsonl" ] || "$python" "$here/world.py" --output "$output/prompts"
for name in general specialist; do
    [ -d "$output/$name" ] || cp -r "$here/models/$name" "$output/$name"
    [ -d "$output/megatron/$name" ] ||
        "$python" "$root/checkpoints_convert/hf_to_megatron.py" --hf-path "$output/$name" --save "$output/megatron/$name"
done
