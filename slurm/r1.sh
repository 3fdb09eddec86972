#!/usr/bin/env bash
# recipes/r1.sh on a base model of 7B and 64 GPUs: five jobs, each after the one before.   bash slurm/r1.sh [--partition=...]    slurm/README.md
#SBATCH --cpus-per-task=8 --time=24:00:00 --signal=USR1@300 --requeue --open-mode=append
set -euo pipefail
# ---- This chain: its folder, the base, problems whose answers write their steps, and where the result stands in an answer
RUN=runs/r1 BASE=/shared/Mistral-7B-v0.1 TASK=(data=problems data.path=gsm8k_train.jsonl data.seq_len=2048)
ANSWER=(reward.answer.match=numeric 'reward.answer.pattern="#### (.*)"' 'reward.answer.reference_pattern="#### (.*)"')
SFT=(objective=sft data.global_batch_size=256 data.micro_batch_size=4 optimizer.lr=1e-5 trainer.max_steps=60)
GRPO=(objective=grpo objective.{max_new_tokens=1024,beta=0.001,reference_reset=400} data.{global_batch_size=1024,micro_batch_size=16}
  optimizer.lr=1e-6 scheduler=constant trainer.max_steps=800) # 2501.12948: beta 0.001, and a reset after each 400 steps
SAMPLE=(n=8 temperature=1 max_new_tokens=1024 strategy=ddp trainer.precision=bf16-true data.micro_batch_size=8) RIGHT=(data.seq_len=2048)
LAID=(strategy=hsdp strategy.dp_replicate_size=8 trainer.precision=bf16-mixed trainer.activation_checkpointing=full)
# ---- This site: one task a GPU. Also `#SBATCH --partition=...` and `--account=...`, if they must be said.
NODES=8 GPUS=8 GPU=H100 MEMORY=80GB # of one GPU, for the plan; MEMORY empty: no check
SETUP=                              # a file to source, such as /shared/txtrain/bin/activate; empty: the environment of the shell that submits
CONTAINER=()                        # e.g. (apptainer exec --nv /shared/txtrain.sif), or srun's options: (--container-image=/shared/txtrain.sqsh)
# ----
# shellcheck source=/dev/null
[[ -z $SETUP ]] || { set +u; source "$SETUP"; set -u; }
here=() base=init_from=$BASE on=("trainer.num_nodes=$NODES" "trainer.devices=$GPUS"); [[ ${CONTAINER[0]:-} == --* ]] || here=("${CONTAINER[@]}") # without srun
grpo=("${TASK[@]}" "${ANSWER[@]}" "${GRPO[@]}" "${LAID[@]}" "${on[@]}") sft=("${SFT[@]}" "${LAID[@]}" "${on[@]}") next=() right=$RUN/right.jsonl code=0
check() { "${here[@]}" txtrain train "$@" --cfg job > /dev/null; "${here[@]}" txtrain plan "$@" "plan.device=$GPU" ${MEMORY:+"plan.memory=$MEMORY"}; }
case ${1:-} in # first: what cannot compose or fit ends before it waits in a queue
  cold) work=(train "$base" "${TASK[@]}" "${sft[@]}" "run_dir=$RUN/cold") ;;
  grpo) work=(train "init_from=$RUN/cold" "${grpo[@]}" "run_dir=$RUN/grpo") ;;
  right) [[ ! -f $right ]] || exit 0; work=(predict "checkpoint=$RUN/grpo" "${TASK[@]}" "${ANSWER[@]}" "${SAMPLE[@]}" "${on[@]}" "out=$right") ;;
  sft) work=(train "$base" data=problems data.{path="$right",answer_column=text,min_reward=1} "${RIGHT[@]}" "${sft[@]}" "run_dir=$RUN/sft") ;;
  grpo_2) work=(train "init_from=$RUN/sft" "${grpo[@]}" "run_dir=$RUN/grpo_2") ;;
  *) check "$base" "${TASK[@]}" "${sft[@]}"; check "$base" "${grpo[@]}"
    for stage in cold grpo right sft grpo_2; do
      id=$(sbatch --parsable "--job-name=$stage" "${next[@]}" "--nodes=$NODES" --{ntasks,gpus}-per-node="$GPUS" "$@" "$0" "$stage")
      next=("--dependency=afterok:$id" --kill-on-invalid-dep=yes) && echo "$stage: job $id"
    done && exit ;;
esac
SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK srun --wait=900 "${CONTAINER[@]}" txtrain "${work[@]}" || code=$?
# 75: stopped after a checkpoint; above 128: killed. Requeued here where neither txtrain nor SLURM has done so.
(( code == 75 || (code > 128 && ${SLURM_RESTART_COUNT:-0} < 50) )) || exit "$code"
[[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) != RUNNING ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
