#!/usr/bin/env bash
# A minute on two nodes without a GPU: do the layout, training, gradient exchange and saving work here?   bash slurm/cpu_smoke.sh   slurm/README.md
#SBATCH --job-name=txtrain-smoke
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --time=00:10:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# ---- This site; also `#SBATCH --partition=...` and `--account=...`, if they must be said.
SETUP=       # a file to source, such as /shared/txtrain/bin/activate; empty: the environment of the shell that submits
CONTAINER=() # e.g. (apptainer exec /shared/txtrain.sif), or srun's options: (--container-image=/shared/txtrain.sqsh)
# ----
# shellcheck source=/dev/null
[[ -z $SETUP ]] || { set +u; source "$SETUP"; set -u; }
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
asked() { { sed -n 's/^#SBATCH //p' "$0"; printf '%s\n' "${options[@]}"; } | sed -n "s/^--$1=//p" | tail -n 1; }
layout=("trainer.num_nodes=${SLURM_NNODES:-$(asked nodes)}" "trainer.devices=${SLURM_NTASKS_PER_NODE:-$(asked ntasks-per-node)}")
small=(model=llama2 model.n_layers=2 model.dim=32 model.n_heads=2 model.vocab_size=257 model.max_seq_len=64 data=python_docs data.tokenizer=bytes
  data.global_batch_size=8 trainer.accelerator=cpu trainer.max_steps=20 trainer.val_check_interval=10 trainer.limit_val_batches=2 name=smoke)
here=("${CONTAINER[@]}") # without srun: none of its options
[[ ${here[0]:-} != --* ]] || here=()

"${here[@]}" txtrain train "${layout[@]}" "${small[@]}" "$@" --cfg job > /dev/null
"${here[@]}" txtrain plan "${layout[@]}" "${small[@]}" "$@"
[[ -n ${SLURM_JOB_ID:-} ]] || exec sbatch "${options[@]}" "$0" "$@"

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
code=0
srun --wait=900 "${CONTAINER[@]}" txtrain train "${layout[@]}" "${small[@]}" "$@" || code=$?
# 75: stopped after a checkpoint; above 128: killed. Requeued here where neither txtrain nor SLURM has done so, unless it is not wanted.
(( code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < 50) )) && [[ "$*" != *auto_requeue=false* ]] || exit "$code"
[[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
