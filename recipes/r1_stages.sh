# shellcheck shell=bash disable=SC2034
# What the recipes r1_zero.sh, r1.sh and r1_distill.sh have in common; they source it.   docs/r1.md
#   bash recipes/r1.sh [FOLDER [KEY=VALUE ...]]      KEY=VALUE: for every run. ASKED=N: problems that are sampled from
# Each stage is a run of its own in FOLDER. Killed at any moment, the same command goes on; what is complete is not made again.
set -euo pipefail
FOLDER=${1:-runs/$(basename "$0" .sh)} MORE=("${@:2}")
MODEL=(model=llama2 model.n_layers=3 model.dim=96 model.n_heads=4 model.vocab_size=257 model.max_seq_len=25 model.init.std=0.06 model.position.theta=100)
TASK=(data=arithmetic data.difficulty=5 data.n_train=16384 data.n_val=256 data.seq_len=25)
SFT=(objective=sft optimizer.lr=1.5e-3 data.global_batch_size=64 scheduler.warmup_steps=50)
ANSWER=('reward.answer.pattern="\d$"') # a completion's last digit
GRPO=(objective=grpo objective.beta=0 objective.max_new_tokens=12 objective.val_samples=8 data.global_batch_size=256
  optimizer.lr=2e-4 scheduler=constant scheduler.warmup_steps=0 trainer.max_steps=60 trainer.val_check_interval=20)

train() { # STAGE KEY=VALUE ...
  echo "== $1"
  txtrain train "${@:2}" "${MORE[@]}" "run_dir=$FOLDER/$1"
}

sample() { # NAME RUN: eight answers to each of some problems with their rewards, NAME.jsonl
  echo "== $1"
  [[ -e $FOLDER/$1.jsonl ]] || txtrain predict "checkpoint=$2" "${TASK[@]}" "data.n_train=${ASKED:-1920}" n=8 temperature=1 max_new_tokens=12 \
    data.micro_batch_size=256 data.global_batch_size=256 "${ANSWER[@]}" "out=$FOLDER/$1.jsonl"
}

RIGHT=(data=problems data.answer_column=text data.min_reward=1 data.val_fraction=0.05 data.tokenizer=bytes data.seq_len=25) # of its rows the right ones
