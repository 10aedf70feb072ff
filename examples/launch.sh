#!/usr/bin/env bash
# Starts pretrain_camopd.py with the flags given: on this node, on several, or as a dry run.
#   NPROC      processes of a node (default: its GPUs, else 1)
#   NNODES     nodes (default 1); on several also NODE_RANK and MASTER_ADDR, as examples/slurm.sbatch sets them
#   DRY_RUN=N  check everything, print the plan for N processes, start nothing; needs no GPU
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[ -x "$root/.venv/bin/python" ] || { echo "no environment: run 'make setup' in $root first" >&2; exit 2; }
if [ -n "${DRY_RUN:-}" ]; then
    exec "$root/.venv/bin/python" "$root/pretrain_camopd.py" "$@" --dry-run "$DRY_RUN"
fi
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
processes="${NPROC:-$((gpus > 0 ? gpus : 1))}"
if [ "${NNODES:-1}" = 1 ]; then
    where=(--standalone)
else
    where=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}"
        --master-port "${MASTER_PORT:-29500}")
fi
exec "$root/.venv/bin/torchrun" "${where[@]}" --nproc-per-node "$processes" "$root/pretrain_camopd.py" "$@"
