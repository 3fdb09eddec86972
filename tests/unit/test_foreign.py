"""What an object of ours has, its class says: whether it is there is asked of foreign objects alone. An option is told
apart by what it says of itself, never by its name."""

import ast

import pytest

from tests.unit.test_rooms import TREES

# Module -> the names that it asks for by hasattr, or by getattr with a default.
FOREIGN = {
    # Python's modules, functions, signal handlers and typing; PyYAML
    "cli.help": "__file__",
    "config.targets": "name __module__",
    "config.user_code": "__file__ origin",
    "training.code_versions": "__file__",
    "training.signals": "__self__",
    "ground.convert": "__name__",
    "ground.plain_files": "CSafeLoader anchor tag",
    "parallel.launch": "sched_getaffinity",
    "monitor.console": "rich_proxied_file",
    "monitor.monitor": "sched_getaffinity",
    # errors of Hydra and of the hub, a stream of datasets, types of Arrow, pictures of Pillow, parts of a tokenizer of the tokenizers library
    "data.tokenizer.limits": "name",
    "config.overrides": "full_key msg",
    "data.sources.hub": "reason",
    "data.sources.documents": "extension_name",
    "data.sources.hub_text": "reshard",
    "data.sources.labels": "feature names",
    "data.sources.images": "mode",
    # what a user gives: sources and images, a model, numbers of torch or numpy, modules of a model's axes
    "data.sources.source": "method has_validation n_bytes skipped validation_sets describe identity unavailable chat_template in_pairs",
    "data.samples.images": "files",
    "model.generation": "decode",
    "model.ffn.balancing": "loss_scale",
    "objectives.questions": "prefix_prompts position by_length",
    "model.decoding": "item config",
    "training.module": "config datamodule",
    "model.stack": "window softcap dropout",
    "model.init": "reset_parameters residual_projections name",
    # Lightning's trainer and loggers
    "training.data_module": "lightning_module parallel",
    "monitor.loggers.build": "name",
    "monitor.loggers.sinks": "experiment",
    # tensors, placements and collectives of torch; DeepSpeed's optimizers
    "optim.sharded": "dim",
    "parallel.dtensor_parts": "dim",
    "parallel.fsdp": "dim placements _local_tensor",
    "parallel.gradient_buckets": "_local_tensor",
    "parallel.one_process": "full_tensor",
    "parallel.collective_timing": "name",
    "parallel.tensor_collectives": "all_gather_single reduce_scatter_single",
    "training.simulate": "value",
    "parallel.deepspeed_layout": "fp32_partitioned_groups_flat single_partition_of_fp32_groups",
}
CHOICES = ("type", "norm_position", "family", "size", "preset")  # attributes that hold the name of an option
# mha and mqa are gqa under names that promise a number of key-value heads: the promise is checked.
BY_NAME = {"model.attention.multi_head_config": {"self.type == 'mha'", "self.type == 'mqa'"}}


def probes(tree: ast.AST) -> set[str]:
    """Names that are asked for; where the name is a variable, that."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    asked = (c.args[1] for c in calls if c.func.id == "hasattr" or (c.func.id == "getattr" and len(c.args) > 2))
    return {str(arg.value) if isinstance(arg, ast.Constant) else ast.unparse(arg) for arg in asked}


def by_name(tree: ast.AST) -> set[str]:
    """Comparisons of an option's name with a literal; the type of a device is not ours."""

    def literal(node: ast.expr) -> bool:
        parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else [node]
        return all(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts)

    def choice(node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and node.attr in CHOICES and "device" not in ast.unparse(node)

    sides = ((n, [n.left, *n.comparators]) for n in ast.walk(tree) if isinstance(n, ast.Compare))
    return {ast.unparse(node) for node, parts in sides if any(map(choice, parts)) and any(map(literal, parts))}


def test_only_foreign_objects_are_asked_what_they_have():
    assert {name: found for name, tree in TREES.items() if (found := probes(tree))} == {
        name: set(names.split()) for name, names in FOREIGN.items()
    }


def test_nothing_depends_on_the_name_of_an_option():
    assert {name: found for name, tree in TREES.items() if (found := by_name(tree))} == BY_NAME


@pytest.mark.parametrize(
    ("code", "probe", "name"),
    [
        ("hasattr(config, 'run_dir')", {"run_dir"}, set()),
        ("getattr(config, key, None)", {"key"}, set()),
        ("getattr(config, key)", set(), set()),
        ("config.objective.type == 'causal_lm'", set(), {"config.objective.type == 'causal_lm'"}),
        ("'post' != model.norm_position", set(), {"'post' != model.norm_position"}),
        ("self.type in ('pre', 'post')", set(), {"self.type in ('pre', 'post')"}),
        ("model.size == other.size or device.type == 'cpu'", set(), set()),
    ],
)
def test_what_is_forbidden_is_found(code, probe, name):
    assert (probes(ast.parse(code)), by_name(ast.parse(code))) == (probe, name)
