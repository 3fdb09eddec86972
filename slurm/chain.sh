#!/usr/bin/env bash
# Prepare, pretrain, train on other data, export: four jobs, each after the one before.   bash slurm/chain.sh [--partition=...]    slurm/README.md
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --time=24:00:00
#SBATCH --signal=USR1@300 --requeue --open-mode=append
set -euo pipefail
# ---- This chain: its folder, the model, the text to prepare, and what is particular to each training
RUN=runs/chain MODEL=(model=llama2) TOKENS=(data=python_docs)
PRETRAIN=(trainer.max_steps=600) TUNE=(data=python_docs trainer.max_steps=100 optimizer.lr=1e-4)
# ---- This site. GPUS: of a training, one a task; 0: on the CPU. Also `#SBATCH --partition=...` and `--account=...`, if they must be said.
GPUS=1 GPU=H100 MEMORY=80GB # of one GPU, for the plan; MEMORY empty: no check
SETUP=                      # a file to source, such as /shared/txtrain/bin/activate; empty: the environment of the shell that submits
CONTAINER=()                # e.g. (apptainer exec --nv /shared/txtrain.sif), or srun's options: (--container-image=/shared/txtrain.sqsh)
# ----
# shellcheck source=/dev/null
[[ -z $SETUP ]] || { set +u; source "$SETUP"; set -u; }
here=("${CONTAINER[@]}") on=(trainer.accelerator=cpu) id='' code=0
[[ ${here[0]:-} != --* ]] || here=() # without srun
if (( GPUS )); then on=("trainer.devices=$GPUS"); fi
case ${1:-} in
  prepare) work=(prepare "${MODEL[@]}" "${TOKENS[@]}" "out=$RUN/tokens") ;;
  pretrain) work=(train "${MODEL[@]}" data=memmap "data.path=$RUN/tokens" "${PRETRAIN[@]}" "${on[@]}" "run_dir=$RUN/pretrain") ;;
  tune) work=(train "init_from=$RUN/pretrain" "${TUNE[@]}" "${on[@]}" "run_dir=$RUN/tune") ;;
  export) work=(export "checkpoint=$RUN/tune" "out=$RUN/export") && [[ ! -f $RUN/export/config.json ]] || exit 0; rm -rf "${RUN:?}/export" ;;
  *) for what in "data=memmap data.path=$RUN/tokens ${PRETRAIN[*]}" "${TUNE[*]}"; do # what cannot compose or fit ends here, before it waits in a queue
      read -ra words <<< "$what"
      "${here[@]}" txtrain train "${MODEL[@]}" "${words[@]}" "${on[@]}" --cfg job > /dev/null
      "${here[@]}" txtrain plan "${MODEL[@]}" "${words[@]}" "${on[@]}" "plan.device=$GPU" ${MEMORY:+"plan.memory=$MEMORY"}
    done
    for stage in prepare pretrain tune export; do
      gpus=() && if (( GPUS )) && [[ $stage == pretrain || $stage == tune ]]; then gpus=("--ntasks-per-node=$GPUS" "--gpus-per-node=$GPUS"); fi
      id=$(sbatch --parsable "--job-name=$stage" ${id:+"--dependency=afterok:$id" --kill-on-invalid-dep=yes} "${gpus[@]}" "$@" "$0" "$stage")
      echo "$stage: job $id"
    done && exit ;;
esac
SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK srun --wait=900 "${CONTAINER[@]}" txtrain "${work[@]}" || code=$?
# 75: stopped after a checkpoint; above 128: killed. Requeued here where neither txtrain nor SLURM has done so, unless it is not wanted.
(( code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < 50) )) && [[ "${work[*]}" != *auto_requeue=false* ]] || exit "$code"
[[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
