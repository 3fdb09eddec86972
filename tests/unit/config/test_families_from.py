"""Every family starts from its weights with no more keys than its data, and nothing but training changes a tensor."""

import json
from functools import partial

import pytest
from safetensors import safe_open

from tests.training import write_text
from txtrain import compose
from txtrain.checkpoint import format as checkpoint
from txtrain.checkpoint import save as saving
from txtrain.checkpoint.load import open_weights
from txtrain.checkpoint.run_folder import RunFolder
from txtrain.checkpoint.state import RunState
from txtrain.cli.main import main
from txtrain.config.paths import families
from txtrain.hf.registry import class_of
from txtrain.parallel.build import make_parallel
from txtrain.training.data_module import DataModule
from txtrain.training.module import LitModule
from txtrain.training.run import train

SMALL = ("model.n_layers=2", "model.dim=32", "model.n_heads=4")
TEXT = ("model.vocab_size=700", "model.max_seq_len=48")
OWN = {  # of the run that the weights come from
    "transformer": (*SMALL, *TEXT, "model.position.layout=halves"),  # as transformers has them
    "deepseek_r1": (*SMALL, *TEXT, "model.mtp_depth=1"),
    "vit": SMALL,
}
FAMILIES = ("gpt1", "gpt2", "llama2", "mistral", "gemma", "gemma2", "deepseek_r1", "bert", "t5", "t5_v1_1", "transformer", "vit")
BY_DEFAULT = ("t5", "vit")
SHORT = ("trainer.accelerator=cpu", "trainer.max_steps=1", "sample.n=0", "trainer.limit_val_batches=1")


def data_of(family, folder):
    """The data alone, and a length that is not the model's; of an image it is."""
    if family == "vit":
        return ("data=digits",), ()
    if family == "transformer":
        pairs = "".join(f"the {i}th line\tla ligne {i} et {i * i}\n" for i in range(300))
        (folder / "pairs.tsv").write_text(pairs)
        return ("data=translation", f"data.path={folder / 'pairs.tsv'}"), ("data.seq_len=24",)
    lines = write_text(folder / "all.txt").read_text().splitlines()
    (folder / "texts").mkdir(exist_ok=True)
    for i in range(20):  # BERT's second segments are of other documents
        (folder / "texts" / f"{i}.txt").write_text("\n".join(lines[20 * i : 20 * i + 20]))
    return ("data=text", f"data.path={folder / 'texts'}"), ("data.seq_len=40" if family == "gpt2" else "data.seq_len=24",)


def tensors(folder, prefix=""):
    """Name -> dtype, shape and values of the weights in a folder's files; not of the optimizer."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys() if name.startswith(prefix)}  # noqa: SIM118
    return found


def write_config(config, into):
    RunFolder(into).write_config(config, into)


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert wanted
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].equal(tensor), name


@pytest.mark.parametrize("family", [f if f in BY_DEFAULT else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_saved_before_the_first_step_every_tensor_is_that_of_the_folder_and_of_the_run(family, tmp_path, monkeypatch):
    monkeypatch.setenv("TXTRAIN_CACHE", str(tmp_path / "cache"))
    data, length = data_of(family, tmp_path)
    run, folder = tmp_path / "run", tmp_path / "folder"
    train(compose([f"model={family}", *OWN.get(family, (*SMALL, *TEXT)), *data, *SHORT, f"run_dir={run}"]))
    assert main(["export", f"checkpoint={run}", f"out={folder}"]) == 0
    made = compose([f"model={family}", *data]).objective.type
    for number, where in enumerate((folder, run)):
        config = compose([f"init_from={where}", *data, *length])
        assert (config.objective.type, config.model.dim) == (made, 32)
        assert config.seq_len == (24 if length and family != "gpt2" else 40 if length else 17)
        DataModule(config).prepare()
        parallel = make_parallel(config)
        module = LitModule(config, None, parallel, None, open_weights(where, "init_from"))
        module.configure_model()
        again = tmp_path / f"again-{number}"
        saved = {f"model.{name}": tensor for name, tensor in module.model.state_dict().items()}
        path = checkpoint.path_of(again, 1)
        saving.save(path, saved, RunState(step=1), partial(write_config, config), None)
        if where == run:
            assert_equal(tensors(path), tensors(checkpoint.locate(run), "model."))
        assert main(["export", f"checkpoint={path}", f"out={again / 'exported'}"]) == 0
        assert_equal(tensors(again / "exported"), tensors(folder))


BESIDE = {
    "vit": ("data=images", "data.path=x"),
    "transformer": ("data=translation", "data.path=x", "data.tokenizer=bytes", "model.position.layout=halves"),
}
DATA = ("data=text", "data.path=x", "data.tokenizer=bytes")


def published():
    sizes = [name for name in families() if name not in FAMILIES]
    return [name if name in ("bert_base", "t5_3b") else pytest.param(name, marks=pytest.mark.slow) for name in sizes]


@pytest.mark.parametrize("name", published())
def test_a_published_size_agrees_with_what_its_family_exports(name, tmp_path):
    """By resolved values: a config.json has no null for a width that follows from others."""
    beside = BESIDE.get(name.partition("_")[0], DATA)
    own = compose([f"model={name}", *beside]).model
    hf = class_of(own)
    (tmp_path / "config.json").write_text(json.dumps(hf.write(own)))
    # Names of tensors by which classes are told from each other: the Transformer has no bias on its logits.
    names = [*(f"{hf.base}layer.{i}" for i in range(200)), *filter(None, [hf.marker]), *([] if own.tie_word_embeddings else ["lm_head.weight"])]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "x")}))
    config = compose([f"model={name}", f"init_from={tmp_path}", *beside])
    assert (config.model.size, config.model.preset) == (own.size, name)
