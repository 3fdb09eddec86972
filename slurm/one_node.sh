#!/usr/bin/env bash
# One node.   bash slurm/one_node.sh [--OPTION-OF-SBATCH=...] KEY=VALUE...        slurm/README.md has examples
#SBATCH --job-name=txtrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
# ---- This site. One task a GPU above; also `#SBATCH --partition=...` and `--account=...`, if they must be said.
GPU=H100 MEMORY=80GB # of one GPU, for the plan; MEMORY empty: no check
SETUP=               # a file to source, such as /shared/txtrain/bin/activate; empty: the environment of the shell that submits
CONTAINER=()         # e.g. (apptainer exec --nv /shared/txtrain.sif), or srun's options: (--container-image=/shared/txtrain.sqsh)
# ----
# shellcheck source=/dev/null
[[ -z $SETUP ]] || { set +u; source "$SETUP"; set -u; }
options=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
asked() { { sed -n 's/^#SBATCH //p' "$0"; printf '%s\n' "${options[@]}"; } | sed -n "s/^--$1=//p" | tail -n 1; }
layout=("trainer.num_nodes=${SLURM_NNODES:-$(asked nodes)}" "trainer.devices=${SLURM_NTASKS_PER_NODE:-$(asked ntasks-per-node)}")
here=("${CONTAINER[@]}") # without srun: none of its options
[[ ${here[0]:-} != --* ]] || here=()

# What cannot compose or fit ends here, before it waits in a queue.
"${here[@]}" txtrain train "${layout[@]}" "$@" --cfg job > /dev/null
"${here[@]}" txtrain plan "${layout[@]}" "$@" "plan.device=$GPU" ${MEMORY:+"plan.memory=$MEMORY"}
[[ -n ${SLURM_JOB_ID:-} ]] || exec sbatch "${options[@]}" "$0" "$@"

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
code=0
srun --wait=900 "${CONTAINER[@]}" txtrain train "${layout[@]}" "$@" || code=$?
# 75: stopped after a checkpoint; above 128: killed. Requeued here where neither txtrain nor SLURM has done so, unless it is not wanted.
(( code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < 50) )) && [[ "$*" != *auto_requeue=false* ]] || exit "$code"
[[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
