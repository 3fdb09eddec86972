"""slurm/chain.sh from a text to a tuned export, on a SLURM that the test starts."""

import json
import re

import pytest

import txtrain
from tests.compose.conftest import ROOT
from tests.slurm.jobs import facts, said, submit
from tests.training import write_chats, write_labels

SMALL = "model.n_layers=2 model.dim=32 model.n_heads=2 model.vocab_size=400 model.max_seq_len=64"
STEPS = "trainer.max_steps=4 trainer.val_check_interval=4 trainer.limit_val_batches=1 sample.n=0 data.global_batch_size=4"


def chats(folder):
    _, *keys = write_chats(folder)
    return " ".join(key for key in ["data=chat objective=sft", *keys] if not key.startswith("data.tokenizer"))


CHAINS = {  # the model, and what it is tuned on
    "bert": ("model=bert", lambda folder: f"data=labels data.path={write_labels(folder / 'labels.csv')} data.seq_len=32"),
    "llama2": ("model=llama2", chats),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CHAINS)
def test_a_chain_prepares_pretrains_tunes_and_exports(family, cluster, tmp_path):
    """The script as someone edits it: the lines at its top, nothing else."""
    model, tune = CHAINS[family]
    for i in range(20):  # BERT's second segments are of other documents
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / f"texts/{i}.txt").write_text("".join(f"Line {k} of text {i} says {k * i % 7}.\n" for k in range(20)))
    text = (ROOT / "slurm/chain.sh").read_text()
    edits = {
        r"^RUN=.*$": f"RUN=runs/chain MODEL=({model} {SMALL}) TOKENS=(data=text data.path=texts data.tokenizer=train)",
        r"^PRETRAIN=.*$": f"PRETRAIN=({STEPS}) TUNE=({tune(tmp_path)} {STEPS})",
        r"^GPUS=1 GPU=H100 MEMORY=80GB": "GPUS=0 GPU=H100 MEMORY=80GB",
    }
    for pattern, line in edits.items():
        text, n = re.subn(pattern, lambda _, line=line: line, text, flags=re.MULTILINE)
        assert n == 1, pattern
    script = tmp_path / "chain.sh"
    script.write_text(text)
    last = int(submit(cluster, tmp_path, str(script), "--cpus-per-task=1", "--time=20"))
    for number in map(str, range(last - 3, last + 1)):
        assert cluster.until(number, "ended")["JobState"] == "COMPLETED", said(tmp_path, number)
    runs = tmp_path / "runs/chain"
    assert [facts(runs / name)["status"] for name in ("pretrain", "tune")] == ["complete"] * 2
    begun = facts(runs / "tune")["init_from"]
    assert (begun["checkpoint"], begun["step"]) == ("step_00000004", 4)
    exported = json.loads((runs / "export/config.json").read_text())
    kind = "ForSequenceClassification" if family == "bert" else "ForCausalLM"
    assert exported["architectures"][0].endswith(kind)
    assert txtrain.load_pretrained(runs / "export").config.dim == 32
