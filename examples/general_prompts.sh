#!/usr/bin/env bash
# The general prompts of both recipes: a sample of Nemotron-Post-Training-Dataset-v1.
#   bash examples/general_prompts.sh download DIR             # the data sets that its code questions come from: DIR/questions
#   bash examples/general_prompts.sh prepare DIR [flags]      # DIR/general/prompts.jsonl
# Later arguments are flags of tools/prepare_prompts.py nemotron and win.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
step="${1:?download or prepare}" folder="${2:?a folder}"
shift 2

case "$step" in
download) # of each the files of questions alone; some 6 GB
    fetch() { "$root/.venv/bin/hf" download "$1" --repo-type dataset --local-dir "$folder/questions/$2" "${@:3}"; }
    fetch BAAI/TACO taco --include 'ALL/*.parquet'
    fetch codeparrot/apps apps --include '*.jsonl'
    fetch deepmind/code_contests code_contests --include 'data/*.parquet'
    fetch open-r1/codeforces codeforces --include 'data/*.parquet'
    ;;
prepare)
    "$root/.venv/bin/python" "$root/tools/prepare_prompts.py" nemotron --output "$folder/general" \
        --code-questions "taco=$folder/questions/taco" "apps=$folder/questions/apps" \
        "code_contests=$folder/questions/code_contests" "codeforces=$folder/questions/codeforces" "$@"
    ;;
*)
    echo "general_prompts.sh: no step is called $step: download, prepare" >&2
    exit 2
    ;;
esac
