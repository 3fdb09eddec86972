"""Classes on two ranks: losses, auxiliary loss and the scores of the whole set are those of one process, under every strategy."""

import pytest

import txtrain
from tests.distributed.group import Case, train
from tests.distributed.runs import COMMON, largest_differences
from tests.training import write_labels

ALLOWED = 1e-5  # relative, float32: the order of summation
LABELS = (
    *COMMON, "data=labels", "data.tokenizer=bytes", "data.seq_len=32", "model.vocab_size=360", "model.max_seq_len=32", "data.val_fraction=0.3",
    "optimizer.layer_decay=0.7", "trainer.limit_val_batches=9",
)
MODELS = {
    "bert": (("model=bert",), ("loss", "val_loss", "grad_norm", "accuracy", "f1_macro")),
    "gpt1": (
        ("model=gpt1", "model.head.lm=true", "data.kind=regression"), ("loss", "val_loss", "grad_norm", "lm_loss", "val_lm_loss", "pearson", "spearman"),
    ),
    "t5": (("model=t5", "optimizer=adamw", "model.output_dropout=0", "model.ffn.dropout=0", "model.head.dropout=0"), ("loss", "val_loss", "grad_norm", "accuracy")),
}
WAYS = {
    "ddp": ("strategy=ddp", "data.micro_batch_size=2"),
    "fsdp": ("strategy=fsdp",),
    "tp": ("strategy=tp",),
    "stage 2": ("strategy=deepspeed_stage_2",),
    "stage 3": ("strategy=deepspeed_stage_3",),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_are_one_process(model, tmp_path):
    given, columns = MODELS[model]

    def overrides(name, *more):
        data = f"data.path={write_labels(tmp_path / 'labels.csv')}", f"data.cache_dir={tmp_path / 'cache'}"
        return [*given, *LABELS, *data, f"run_dir={tmp_path / name}", *more]

    alone = txtrain.train(txtrain.compose(overrides("alone"))).run_dir
    train({way: Case(overrides(way, "trainer.devices=2", *how)) for way, how in WAYS.items()}, 2, tmp_path / "group", 600)
    for way in WAYS:
        for column, difference in largest_differences(alone, tmp_path / way, columns).items():
            assert difference < ALLOWED, f"{way}: {column} {difference:.1e}, allowed {ALLOWED:.0e}"
