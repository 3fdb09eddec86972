#!/usr/bin/env bash
# A sweep: one run for each line of a file.   bash slurm/array.sh [--time=...] members.txt model=gpt2 data=memmap data.path=DIR    slurm/README.md
#SBATCH --nodes=1 --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300 --requeue --open-mode=append
set -euo pipefail
# ---- This site; also `#SBATCH --partition=...` and `--account=...`, if they must be said.
GPU=H100 MEMORY=80GB # of one GPU, for the plan; MEMORY empty: no check
SETUP=               # a file to source, such as /shared/txtrain/bin/activate; empty: the environment of the shell that submits
CONTAINER=()         # e.g. (apptainer exec --nv /shared/txtrain.sif), or srun's options: (--container-image=/shared/txtrain.sqsh)
# ----
# shellcheck source=/dev/null
[[ -z $SETUP ]] || { set +u; source "$SETUP"; set -u; }
options=() todo=() here=("${CONTAINER[@]}") # here: without srun
[[ ${here[0]:-} != --* ]] || here=()
while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
file=$1 name=$(basename "${1%.*}")
shift
mapfile -t members < <(grep -v '^ *\(#\|$\)' "$file") # the first line is member 0
member() { read -ra words <<< "${members[$1]}"; words+=("run_dir=runs/$name/$1"); }
if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
  [[ -z $(squeue -h --me -n "$name") ]] || { echo "runs of $name are in the queue: squeue --me -n $name" >&2; exit 1; }
  for i in "${!members[@]}"; do # only what is not complete; what cannot compose or fit ends here, before it waits in a queue
    if grep -qs '"status": "complete"' "runs/$name/$i/run.json"; then continue; else todo+=("$i"); member "$i"; fi
    "${here[@]}" txtrain train "$@" "${words[@]}" --cfg job > /dev/null
    "${here[@]}" txtrain plan "$@" "${words[@]}" "plan.device=$GPU" ${MEMORY:+"plan.memory=$MEMORY"} > /dev/null
  done
  (( ${#todo[@]} )) || { echo "all of runs/$name are complete"; exit 0; }
  exec sbatch "--job-name=$name" "--array=$(IFS=,; echo "${todo[*]}")" "${options[@]}" "$0" "$file" "$@"
fi
member "$SLURM_ARRAY_TASK_ID" && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
code=0 job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # of one member SLURM_JOB_ID is the number of all
srun --wait=900 "${CONTAINER[@]}" txtrain train "$@" "${words[@]}" || code=$?
# 75: stopped after a checkpoint; above 128: killed. Requeued here where neither txtrain nor SLURM has done so, unless it is not wanted.
(( code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < 50) )) && [[ "$* ${words[*]}" != *auto_requeue=false* ]] || exit "$code"
[[ $(squeue -h -j "$job" -o %T) != RUNNING ]] || scontrol requeue "$job"
exit "$code"
