#!/usr/bin/env bash
# DeepSeek-R1-Zero (2501.12948, section 2.2) at a laptop's size: GRPO on a base model.   bash recipes/r1_zero.sh [FOLDER [KEY=VALUE ...]]
# kept: GRPO with a rule reward, no demonstrations after the base. scaled: chains of five digits' operations; the base has seen
# demonstrations of which 35 % write the running values, as a stand-in for pretraining; no KL term; 60 updates of 32 problems x 8
# shellcheck source-path=SCRIPTDIR source=r1_stages.sh
. "$(dirname "$0")/r1_stages.sh"
train base "${MODEL[@]}" "${TASK[@]}" "${SFT[@]}" data.worked=0.35 trainer.max_steps=800
train grpo "init_from=$FOLDER/base" "${TASK[@]}" "${GRPO[@]}" "${ANSWER[@]}"
