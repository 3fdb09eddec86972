#!/usr/bin/env bash
# DeepSeek-R1 (2501.12948, section 2.3) at a laptop's size.   bash recipes/r1.sh [FOLDER [KEY=VALUE ...]]
# kept: cold start, GRPO, the base tuned anew on the right ones of GRPO's samples, GRPO. scaled: as recipes/r1_zero.sh; the cold
# start has 512 demonstrations, all of which write the running values
# shellcheck source-path=SCRIPTDIR source=r1_stages.sh
. "$(dirname "$0")/r1_stages.sh"
train base "${MODEL[@]}" "${TASK[@]}" "${SFT[@]}" data.worked=0.35 trainer.max_steps=800
train cold "init_from=$FOLDER/base" "${TASK[@]}" "${SFT[@]}" data.n_train=512 optimizer.lr=5e-4 scheduler.warmup_steps=0 trainer.max_steps=16
train grpo "init_from=$FOLDER/cold" "${TASK[@]}" "${GRPO[@]}" "${ANSWER[@]}"
sample right "$FOLDER/grpo"
train sft "init_from=$FOLDER/base" "${SFT[@]}" "${RIGHT[@]}" "data.path=$FOLDER/right.jsonl" optimizer.lr=1e-3 scheduler.warmup_steps=10 trainer.max_steps=240
train grpo_2 "init_from=$FOLDER/sft" "${TASK[@]}" "${GRPO[@]}" "${ANSWER[@]}"
