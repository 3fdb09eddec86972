"""Recipes, the user's own folder of options, and the user's own code."""

import pytest
import yaml

from txtrain.cli.main import main
from txtrain.errors import ConfigError
from txtrain.registry import resolve

MINE = """
import txtrain

@txtrain.component("ffn", "mine")
class Mine:
    def __init__(self, dim: int, width: int = 3, bias: bool = False):
        pass
"""


@pytest.fixture
def user(clean_room, forget):
    """A folder of the user's own: a part, a recipe, a data set, a family."""
    folder = clean_room / "mine"
    for group in ("recipes/deep", "data", "model/ffn"):
        (folder / group).mkdir(parents=True)
    (folder / "own_ffn.py").write_text(MINE)
    (folder / "recipes/r.yaml").write_text(
        "# @package _global_\ndefaults: [override /model: own, override /model/ffn: mine, override /data: corpus]\n"
        "imports: [own_ffn.py]\nmodel: {ffn: {width: 9}}\n"
    )
    (folder / "recipes/deep/r.yaml").write_text("# @package _global_\nseed: 5\n")
    (folder / "data/corpus.yaml").write_text("type: text\npath: x\n")
    (folder / "model/own.yaml").write_text("defaults: [llama2, _self_]\nfamily: own\nffn: {bias: true}\n")
    return folder


def test_recipe_and_its_other_names_are_one(user, job):
    assert job("recipe=r", config_dir=user).config == job("experiment=r", config_dir=user).config == job("recipes=r", config_dir=user).config


def test_a_recipe_in_the_users_folder_brings_its_code_and_choices(user, job):
    made = job("recipe=r", "model.dim=128", config_dir=user)
    model = made.config.model
    assert (model.family, model.ffn.width, model.ffn.bias, model.dim, made.config.data.path) == ("own", 9, True, 128, "x")
    assert made.config.imports == (str(user / "own_ffn.py"),)
    assert made.grafts["ffn"] == {"from": "swiglu", "to": "mine", "kept": {"bias": True}, "dropped": {}}
    assert job("recipe=deep/r", config_dir=user).config.seed == 5


def test_the_users_folder_is_searched_for_near_names(user, job):
    with pytest.raises(ConfigError, match="Did you mean data=corpus"):
        job("data=corpu", config_dir=user)


def test_the_users_folder_adds_and_cannot_shadow(user, job):
    (user / "data/wikitext.yaml").write_text("type: text\npath: y\n")
    assert job("data=wikitext", config_dir=user).config.data.type == "wikitext"


def test_an_option_brings_code_only_if_the_command_line_names_it(user, job):
    (user / "data/corpus.yaml").write_text("type: text\npath: x\nimports: [own_ffn.py]\n")
    (user / "recipes/indirect.yaml").write_text("# @package _global_\ndefaults: [override /data: corpus]\n")
    assert job("data=corpus", "model/ffn=mine", config_dir=user).config.model.ffn.type == "mine"
    with pytest.raises(ConfigError, match="give data=corpus, or imports="):
        job("recipe=indirect", config_dir=user)
    assert job("recipe=indirect", "data=corpus", config_dir=user).config.data.path == "x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1\n", "bad.yaml, line"),
        ("# @package _global_\ndefaults: [override /modle: gpt2]\n", "modle"),
        ("# @package _global_\noptimizer: {lrr: 1}\n", "Did you mean optimizer.lr?"),
        ("seed: 3\n", "@package _global_"),
    ],
)
def test_mistakes_in_a_users_recipe_are_told(text, says, user, capsys):
    (user / "recipes/bad.yaml").write_text(text)
    assert main(["recipe=bad", "--config-dir", str(user)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_a_family_without_axes_is_told_what_it_lacks(user, capsys):
    (user / "model/bare.yaml").write_text("family: bare\n")
    assert main(["model=bare", "--config-dir", str(user)]) == 2
    assert "`model.attention` must be given" in capsys.readouterr().err


def test_a_family_may_name_its_ancestor_by_absolute_path(user, job):
    (user / "model/abs.yaml").write_text("defaults: [/model/llama2@_here_, _self_]\nattention: {window: 5, n_kv_heads: 2}\n")
    made = job("model=abs", "model/attention=mqa", config_dir=user)
    assert (made.config.model.attention.window, made.grafts["attention"]["dropped"]) == (5, {"n_kv_heads": 2})


# ------------------------------------------------------------------------------------------------------------------- imports


def test_a_component_by_imports_needs_no_yaml(user, job):
    made = job("imports=[mine/own_ffn.py]", "model/ffn=mine", "model.ffn.width=5").config
    assert (made.model.ffn.type, made.model.ffn.width, made.model.ffn.bias) == ("mine", 5, True)  # bias: of gpt2
    assert resolve("ffn", "mine").__name__ == "Mine"
    with pytest.raises(ConfigError, match=r"Did you mean model\.ffn\.width\?"):
        job("imports=[mine/own_ffn.py]", "model/ffn=mine", "model.ffn.widht=5")
    with pytest.raises(ConfigError, match="Did you mean model/ffn=mine"):
        job("imports=[mine/own_ffn.py]", "model/ffn=mind")


def test_a_yaml_beside_a_component_sets_other_defaults_and_warns_of_nothing(user, job, recwarn):
    (user / "model/ffn/mine.yaml").write_text("type: mine\nwidth: 7\n")
    assert job("imports=[mine/own_ffn.py]", "model/ffn=mine", config_dir=user).config.model.ffn.width == 7
    assert not [str(w.message) for w in recwarn]


def test_a_component_with_a_config_of_its_own(clean_room, job, forget):
    (clean_room / "own_attention.py").write_text(
        "import dataclasses as dc, txtrain\nfrom txtrain.model.options import Component\n"
        "@txtrain.component('attention', 'mine')\nclass Mine:\n"
        "    @dc.dataclass(frozen=True, kw_only=True)\n    class Config(Component):\n        rank: int = 8\n"
        "        bias: bool = txtrain.registry.knob(False, carry=True)\n"
    )
    made = job("imports=[own_attention.py]", "model=gpt2", "model/attention=mine", "model.attention.rank=4")
    assert (made.config.model.attention.rank, made.config.model.attention.bias) == (4, True)
    assert made.grafts["attention"]["kept"] == {"bias": True}


def test_a_norm_position_of_ones_own_is_chosen_by_value(clean_room, job, forget):
    (clean_room / "own_norm.py").write_text("import txtrain\n@txtrain.component('norm_position', 'twice')\nclass Twice:\n    pass\n")
    made = job("imports=[own_norm.py]", "model.norm_position=twice")
    assert made.grafts["norm_position"]["to"] == made.config.model.norm_position == "twice"


@pytest.mark.parametrize("axis", ["data", "optimizer", "scheduler", "objective"])
def test_a_part_of_ones_own_on_the_other_axes(axis, clean_room, job, forget):
    code = f"import txtrain\n@txtrain.component('{axis}', 'own')\nclass Own:\n    def __init__(self, n: int = 2): pass\n"
    (clean_room / "own_part.py").write_text(code)
    config = getattr(job("imports=[own_part.py]", f"{axis}=own", f"{axis}.n=3").config, axis)
    assert (config.type, config.n) == ("own", 3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n\ny = nope\n", "own_bad.py, line 3: NameError: name 'nope' is not defined"),
        ("def f(:\n", "own_bad.py, line 1: SyntaxError"),
        ("import nonesuch\n", "own_bad.py, line 1: ModuleNotFoundError: No module named 'nonesuch'"),
        ("import txtrain\n\ntxtrain.component('fnn', 'mine')\n", "own_bad.py, line 3: `txtrain.component('fnn', 'mine')`: the axis must be one of"),
    ],
)
def test_an_error_in_the_users_file_is_told_with_its_line(text, says, clean_room, capsys):
    (clean_room / "own_bad.py").write_text(text)
    assert main(["imports=[own_bad.py]"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("nope.py", "'nope.py' is not one (looked in"),
        ("no.such.module", "there is no module no"),
        ("json.py", "a module json exists already"),
        ("a-b.py", "must be named like a Python module"),
    ],
)
def test_imports_that_cannot_be(what, says, clean_room, capsys):
    for name in ("json.py", "a-b.py"):
        (clean_room / name).write_text("")
    assert main([f"imports=[{what}]"]) == 2
    assert says in capsys.readouterr().err


def test_a_logger_of_ones_own_passes_if_its_module_is_imported(clean_room, job, forget):
    (clean_room / "own_logger.py").write_text("class Logger:\n    pass\n")
    given = "logger.mine._target_=own_logger.Logger"
    assert job("imports=[own_logger.py]", given).config.logger == {"mine": {"_target_": "own_logger.Logger"}}
    with pytest.raises(ConfigError, match="must be a class in"):
        job(given)


def test_loggers_come_one_many_or_none(job):
    assert set(job("logger=[wandb,tensorboard]").config.logger) == {"wandb", "tensorboard"}
    assert job("logger=none").config.logger == {}
    assert job("logger=wandb", "logger.wandb.project=mine").config.logger["wandb"]["project"] == "mine"


def test_config_is_frozen_and_round_trips_through_yaml_and_json(job):
    import json

    from txtrain.config.schema import Train
    from txtrain.ground.convert import build, plain

    for family in ("transformer", "bert", "t5", "vit", "mistral_7b", "deepseek_r1_671b"):
        config = job(f"model={family}", "optimizer.lr=1e-5").config
        assert build(Train, yaml.safe_load(yaml.safe_dump(plain(config)))) == config == build(Train, json.loads(json.dumps(plain(config))))
    with pytest.raises(AttributeError):
        config.model.attention.window = 3
