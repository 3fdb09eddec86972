#!/usr/bin/env bash
# Distillation of DeepSeek-R1 (2501.12948, section 2.4) at a laptop's size.   bash recipes/r1_distill.sh [FOLDER [KEY=VALUE ...]]
# A smaller model is tuned on the right ones of the larger one's samples (`distilled`); beside it the same one under GRPO
# alone (`small_grpo`). The larger one is that of recipes/r1.sh in TEACHER, by default FOLDER/teacher, where it is made if it is not there.
# shellcheck source-path=SCRIPTDIR source=r1_stages.sh
. "$(dirname "$0")/r1_stages.sh"
TEACHER=${TEACHER:-$FOLDER/teacher}
bash "$(dirname "$0")/r1.sh" "$TEACHER" "${MORE[@]}"
sample right "$TEACHER/grpo_2"
train small "${MODEL[@]}" model.n_layers=2 model.dim=64 "${TASK[@]}" "${SFT[@]}" data.worked=0.35 trainer.max_steps=800
train distilled "init_from=$FOLDER/small" "${SFT[@]}" "${RIGHT[@]}" "data.path=$FOLDER/right.jsonl" optimizer.lr=1e-3 scheduler.warmup_steps=10 trainer.max_steps=240
train small_grpo "init_from=$FOLDER/small" "${TASK[@]}" "${GRPO[@]}" "${ANSWER[@]}"
