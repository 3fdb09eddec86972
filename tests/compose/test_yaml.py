"""Every YAML file of the package, found by glob: composed, checked, and the models built without memory."""

import dataclasses as dc
import re

import pytest
import torch

import txtrain
from txtrain.config.paths import CONF, DATA

FILES = sorted(file.relative_to(DATA).with_suffix("").as_posix() for part in ("conf", "recipes") for file in (DATA / part).rglob("*.yaml"))
MODELS = [name.removeprefix("conf/model/") for name in FILES if re.fullmatch(r"conf/model/\w+", name)]
RECIPES = [name.removeprefix("recipes/") for name in FILES if name.startswith("recipes/")]
IMAGES, PAIRS = "model=vit objective=image_classification data=digits", "model=transformer objective=seq2seq data=reverse"
FAMILIES = {"bert": "objective=masked_lm", "t5": "objective=span_corruption", "transformer": PAIRS, "vit": IMAGES}  # what is no decoder goes with
NEEDED = {  # what the other files go with
    "conf/data/text": "data.path=x",
    "conf/data/chat": "data.path=x",
    "conf/data/hf": "data.path=x",
    "conf/data/labels": "model=bert data.path=x",
    "conf/data/mixture": "data.sources.a={type:text,path:x}",
    "conf/data/memmap": "data.path=x",
    "conf/data/digits": IMAGES,
    "conf/data/images": f"{IMAGES} data.path=x",
    "conf/data/reverse": PAIRS,
    "conf/data/arithmetic": "objective=sft",
    "conf/data/countdown": "objective=grpo",
    "conf/data/problems": "objective=grpo data.path=x",
    "conf/objective/grpo": "data=arithmetic",
    "conf/data/translation": f"{PAIRS} data.path=x",
    "conf/objective/classification": "data=labels data.path=x",
    "conf/objective/image_classification": IMAGES,
    "conf/objective/masked_lm": "model=bert",
    "conf/objective/seq2seq": PAIRS,
    "conf/data/preferences": "objective=dpo data.path=x",
    "conf/objective/distill": "objective.teacher=x",
    "conf/objective/dpo": "data=preferences data.path=x",
    "conf/objective/sft": "data=chat data.path=x",
    "conf/objective/span_corruption": "model=t5",
    "conf/model/embedding/patch": IMAGES,
    "conf/model/head/class": IMAGES,
    "recipes/vit_fashion_mnist": "data.path=x",
    "recipes/transformer_translation": "data.path=x",
    "conf/model/head/mlm": "model=bert objective=masked_lm",
    "recipes/tune_chat": "model=llama2 data.path=x",
    "recipes/tune_distill": "objective.teacher=x data.path=x",
    "recipes/tune_dpo": "model=llama2 data.path=x",
    "recipes/tune_labels": "model=bert data.path=x",
    "recipes/tune_lora": "model=llama2 data.path=x",
    "recipes/tune_vit": "model=vit model.embedding.patch_size=7 data.path=x",
}
EVALUATED = tuple(f"conf/data/{name}" for name in ("multiple_choice", "cloze", "questions"))  # no objective trains on them
SEEN = r"\d\.\d\d nats/token(, \d\.\d\d bits/byte)?(, BLEU \d+\.\d, chrF \d+\.\d)?|(reward )?accuracy \d\d\.\d %|\d\.\d\d nats/target(, masked accuracy \d\d\.\d %)?|top-1 \d\d\.\d %"
ROOTS = {
    "base": "train",
    "train": "train",
    "generate": "generate checkpoint=x prompt=x",
    "export": "export checkpoint=x out=y",
    "plan": "plan",
    "prepare": "prepare out=x",
    "preview": "preview",
}
HEADER = re.compile(
    r"# @package _global_\n"  # Hydra reads it on the first lines only
    r"# (?P<what>.+?) {3}txtrain recipe=(?P<name>\S+)( [a-z_.]+=\S+)*\n"
    rf"# (?P<hardware>.+?): (?P<time>.+?), validation (?P<seen>{SEEN}) \((?P<date>\d{{4}}-\d\d-\d\d), seeds? \d+.*\)\n"
    r"(#.*\n)+# scaled: (.+\n)+# kept: (.+\n)+"
)


def line_of(file: str) -> list[str]:
    """The verb and the overrides that make use of a file."""
    folder, _, option = file.rpartition("/")
    if folder == "conf":
        return ROOTS[option].split()
    if folder == "conf/training":
        return ["train", next(f"model={m}" for m in MODELS if f"/training@_global_: {option}," in (CONF / "model" / f"{m}.yaml").read_text())]
    chosen = f"recipe={file.removeprefix('recipes/')}" if file.startswith("recipes/") else f"{folder.removeprefix('conf/')}={option}"
    group = chosen.partition("=")[0]
    if file in EVALUATED:
        return ["evaluate", "data.path=x", chosen]
    beside = NEEDED.get(file) or (FAMILIES.get(option.partition("_")[0], "") if folder == "conf/model" else "")
    verb = "plan" if file in ("conf/adapter/lora", "recipes/tune_lora") else "train"  # a run needs weights to adapt
    return [verb, *(word for word in beside.split() if not word.startswith(f"{group}=")), chosen]


# Models, and what a paper trained one with, are composed below.
@pytest.mark.parametrize("file", [file for file in FILES if not re.fullmatch(r"conf/(model/\w+|training/.+)", file)])
def test_every_file_composes_to_a_legal_config(file, job):
    verb, *overrides = line_of(file)
    assert job(*overrides, verb=verb).config


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_built_without_memory_and_has_the_parameters_that_the_closed_form_counts(name, job):
    config = job(*line_of(f"conf/model/{name}")[1:]).config.model
    with torch.device("meta"):
        model = txtrain.build_model(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == config.n_params
    without_mtp = dc.replace(config, mtp_depth=0).n_params  # as DeepSeek's is published
    assert config.published.get(name, without_mtp) == without_mtp


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_its_command_and_what_was_seen(name):
    text = (DATA / "recipes" / f"{name}.yaml").read_text()
    header = HEADER.match(text)
    assert header, f"{name}: not like tests/compose/test_yaml.py, HEADER:\n{text[:400]}"
    assert header["name"] == name


@pytest.mark.parametrize("file", FILES)
def test_no_file_names_code(file):
    if not file.startswith(("conf/logger", "conf/callbacks")):
        assert "_target_" not in (DATA / f"{file}.yaml").read_text()


def test_the_glob_finds_the_files():
    assert CONF.is_dir()
    assert {"gpt2", "mistral_7b"} <= set(MODELS)
    assert "gpt2_python_docs" in RECIPES
