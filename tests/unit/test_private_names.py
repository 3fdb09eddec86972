"""Names of libraries that may go without a word, one list: every one is in the installed versions, and none is missing.

Of DeepSpeed it is every name that txtrain reads, of other libraries those that begin with an underscore or lie in a
module of that kind. Torch is asked itself; other libraries are read as text, since importing them takes seconds and DeepSpeed
changes torch.distributed.
"""

import ast
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tests.unit.test_rooms import TREES

# Module, class or function -> what it has, or sets on its own or on others' objects.
PRIVATE = {
    "datasets.Dataset": "_fingerprint",
    "datasets.packaged_modules": "_PACKAGED_DATASETS_MODULES",
    "deepspeed": "init_distributed initialize",
    "deepspeed.comm.comm": "cdb",
    "deepspeed.ops": "__compatible_ops__",
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": (
        "_lazy_init_hp_params_optimizer_state bf16_groups clip_grad fp32_groups_flat_partition get_grads_for_norm"
    ),
    "deepspeed.runtime.engine.DeepSpeedEngine": "backward destroy optimizer set_gradient_accumulation_boundary step",
    "deepspeed.runtime.utils": "get_global_norm_of_tensors",
    "deepspeed.runtime.zero.partition_parameters.Init._convert_to_deepspeed_param": (
        "ds_numel ds_shape ds_tensor ds_zero_partition_rank"
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "_get_norm_groups clip_grad fp16_groups fp32_partitioned_groups_flat get_param_id grad_position"
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "_lazy_init_hp_params_optimizer_state bit16_groups clip_grad scaled_global_norm single_partition_of_fp32_groups"
    ),
    "deepspeed.utils": "set_z3_leaf_module",
    "deepspeed.utils.groups": "_release_process_group_references",
    "deepspeed.utils.mixed_precision_linkage.link_hp_params": "_hp_mapping",
    "deepspeed.utils.tensor_fragment.fragment_address": "numel start",
    "deepspeed.utils.tensor_fragment.tensor_fragment": "hp_fragment_address lp_fragment_address",
    "deepspeed.zero": "Init register_external_parameter",
    "hydra._internal.callbacks": "Callbacks",
    "hydra._internal.config_loader_impl.ConfigLoaderImpl": (
        "_compose_config_from_defaults_list _parse_overrides_and_create_caching_repo _process_config_searchpath "
        "get_sources load_configuration repository"
    ),
    "hydra._internal.config_repository": "CachingConfigRepository ConfigRepository",
    "hydra._internal.config_repository.ConfigRepository": "_find_object_source load_config",
    "hydra._internal.config_search_path_impl": "ConfigSearchPathImpl",
    "hydra._internal": "defaults_list",
    "hydra._internal.defaults_list": "_create_interpolation_map",
    "hydra._internal.hydra.Hydra": "compose_config",
    "lightning.fabric.loggers.logger": "_DummyExperiment",
    "lightning.pytorch.core.optimizer.LightningOptimizer": "_optimizer",
    "lightning.pytorch.loggers.WandbLogger": "_experiment _offline _wandb_init",
    "lightning.pytorch.loops.training_epoch_loop._TrainingEpochLoop": "_batches_that_stepped",
    "submitit.core.job_environment.JobEnvironment": "_usr_sig",
    "sacrebleu.metrics.base.Metric": "_compute_score_from_stats _extract_corpus_statistics",
    "torch": "_foreach_mul_ _foreach_norm",
    "torch._C._autograd": "_get_current_graph_task_keep_graph",
    "torch._C._dynamo.eval_frame": "_set_lru_cache",
    "torch._dynamo.config": "skip_fwd_side_effects_in_bwd_under_checkpoint",
    "torch._dynamo.utils": "counters",
    "torch._higher_order_ops": "wrap",
    "torch._ops.OpOverload": "_schema",
    "torch._subclasses.fake_tensor": "FakeTensorMode",
    "torch._utils": "_rebuild_parameter _rebuild_parameter_with_state _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3",
    "torch.distributed._tools.fake_collectives": "collective_ops sync_ops",
    "torch.distributed._tools.fake_collectives.CollectiveOp": "get_comm_tensor_size",
    "torch.distributed._tools.fsdp2_mem_tracker": "FSDPMemTracker",
    "torch.distributed._tools.mem_tracker": "MemTracker",
    "torch.distributed._tools.mem_tracker.MemTracker": "_param_to_grad_hook_handles _track_module_params_and_buffers",
    "torch.distributed.checkpoint._hf_utils": (
        "CUSTOM_METADATA_KEY DATA_OFFSETS_KEY DCP_VERSION_KEY DEFAULT_EXTRA_METADATA_KEY DTYPE_KEY DTYPE_MAP "
        "FORMAT_KEY FORMAT_VALUE HF_DCP_VERSION SAVED_OFFSETS_KEY SHAPE_KEY _gen_file_name"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.state_dict_saver": "_save_state_dict",
    "torch.distributed.device_mesh.DeviceMesh": "_flatten",
    "torch.distributed.distributed_c10d": "_get_default_store _set_pg_timeout",
    "torch.distributed.tensor.DTensor": "_local_tensor",
    "torch.nn.Module": "_apply _buffers _parameters",
    "torch.ops.aten": (
        "_grouped_mm _local_scalar_dense _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention "
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention_for_cpu_backward"
    ),
    "torch.ops.c10d": "_reduce_scatter_base_",
    "torch.testing._internal.distributed.fake_pg": "FakeStore",
    "torch.utils._python_dispatch": "TorchDispatchMode",
    "torch.utils._python_dispatch.TorchDispatchMode": "ignore_compile_internals",
    "torch.utils._pytree": "register_dataclass",
    "torchmetrics": "_logger",
    "wandb.sdk.wandb_settings.Settings": "_offline",
    "wandb.proto": "wandb_internal_pb2",
}
PUBLIC = {"os._exit", "_asdict", "_replace"}  # private by their look alone: documented
LIBRARIES = {owner.partition(".")[0] for owner in PRIVATE}
ROWS = {f"{owner}.{name}" for owner, names in PRIVATE.items() for name in names.split()}


def library(dotted: str) -> str:
    return dotted.partition(".")[0]


def is_private(dotted: str) -> bool:
    return any(re.match("_(?!_)", part) or "_internal_" in part for part in dotted.split("."))


# ------------------------------------------------------------------------------------------------------ each one exists


@functools.cache
def module(dotted: str) -> tuple[ast.Module, str] | None:
    """A module's text, and the package that its relative imports begin at; nothing is imported."""
    found = importlib.util.find_spec(library(dotted))
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent.joinpath(*dotted.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    package = dotted if path.is_dir() else dotted.rpartition(".")[0]
    return (ast.parse(file.read_text(encoding="utf-8")), package) if file.is_file() else None


@functools.cache
def defined(node: ast.AST) -> dict[str, ast.AST]:
    """What a piece of code defines, declares, imports, or sets on any object."""
    found: dict[str, ast.AST] = {}
    for n in ast.walk(node):
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.setdefault(n.name, n)
        elif isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store):
            found.setdefault(n.id if isinstance(n, ast.Name) else n.attr, n)
        elif isinstance(n, ast.ImportFrom):
            for alias in n.names:
                found.setdefault(alias.asname or alias.name, n)
    return found


@functools.cache
def contents(dotted: str) -> frozenset[str]:
    """What a module, class or function of a library has, by its text; a class also what its bases have."""
    parts = dotted.split(".")
    if parts[0] not in LIBRARIES:
        return frozenset()
    depth, (tree, package) = next((n, m) for n in range(len(parts), 0, -1) if (m := module(".".join(parts[:n]))))
    name = ".".join(parts[:depth])
    if depth == len(parts):  # of a module also what its __getattr__ knows, and its modules
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        return frozenset(defined(tree)) | words | {n for n in PRIVATE.get(name, "").split() if module(f"{name}.{n}")}
    there = defined(tree)
    node = there.get(parts[depth]) or there["*"]
    if isinstance(node, ast.ImportFrom):  # a name that comes from elsewhere
        level = "." * node.level
        source = importlib.util.resolve_name(f"{level}{node.module or ''}", package)
        real = next((a.name for a in node.names if (a.asname or a.name) == parts[depth]), parts[depth])
        return contents(".".join([source, real, *parts[depth + 1 :]]))
    for part in parts[depth + 1 :]:
        node = defined(node)[part]
    names = frozenset(defined(node))
    for base in node.bases if isinstance(node, ast.ClassDef) else ():
        if isinstance(base, ast.Name) and base.id in there:
            names |= contents(f"{name}.{base.id}")
    return names


def of_torch(dotted: str) -> object:
    found: object = torch
    for i, part in enumerate(names := dotted.split(".")):
        if i:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(names[: i + 1]))
    return found


def has(owner: str, name: str) -> bool:
    return (library(owner) == "torch" and hasattr(of_torch(owner), name)) or name in contents(owner)


@pytest.mark.parametrize("of", sorted(LIBRARIES))
def test_every_name_exists(of):
    if importlib.util.find_spec(of) is None:
        pytest.skip("not installed here: DeepSpeed is a dependency on Linux alone")
    owners = [owner for owner in PRIVATE if library(owner) == of]
    assert [f"{owner}.{name}" for owner in owners for name in PRIVATE[owner].split() if not has(owner, name)] == []


@pytest.mark.parametrize(
    "owner",
    ["torch", "torch.nn.Module", "torch.ops.aten", "lightning.pytorch.loggers.WandbLogger", "hydra._internal.hydra"],
)
def test_a_name_that_is_gone_is_missed(owner):
    name = "_renamed_in_the_next_version"
    assert not (hasattr(of_torch(owner), name) if owner in ("torch", "torch.ops.aten") else has(owner, name))


# ------------------------------------------------------------------------------------------------ the list is complete


class Uses:
    """One of txtrain's modules: what its names stand for, and what it reads."""

    def __init__(self, name: str, tree: ast.AST) -> None:
        self.name, self.nodes = name, [*ast.walk(tree)]
        self.stands_for: dict[str, str] = {}
        self.imported: set[str] = set()
        self.classes = {node.name: node for node in self.nodes if isinstance(node, ast.ClassDef)}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                self.imported |= {a.name for a in node.names}
                whole = {a.asname: a.name for a in node.names if a.asname}
                self.stands_for |= {library(a.name): library(a.name) for a in node.names} | whole
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {f"{node.module}.{a.name}" for a in node.names}
                self.stands_for |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def dotted(self, node: ast.expr) -> str | None:
        """`nn.Module` as torch.nn.Module; None if it does not begin with an imported name."""
        if isinstance(node, ast.Name):
            return self.stands_for.get(node.id)
        above = self.dotted(node.value) if isinstance(node, ast.Attribute) else None
        return above and f"{above}.{node.attr}"

    def origin(self, node: ast.expr) -> str | None:
        """The imported name that an expression begins with, as in `logging.getLogger(name).setLevel`."""
        while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
            node = node.func if isinstance(node, ast.Call) else node.value
        return self.dotted(node)

    def read(self) -> Iterator[str]:
        """Every attribute, dotted where it is of an imported name, else its name alone; also what a string names."""
        for node in self.nodes:
            if isinstance(node, ast.Attribute):
                yield self.dotted(node) or node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if "." in node.value and re.fullmatch(r"[a-z]\w*(\.\w+)+", node.value):
                    yield node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
                yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant))

    def bases(self, node: ast.ClassDef) -> Iterator[str]:
        """What a class derives from, dotted, by way of its module's own classes."""
        for base in node.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                yield from self.bases(self.classes[base.id])
            elif dotted := self.dotted(base):
                yield dotted

    def of_deepspeed(self) -> Iterator[str]:
        """Attributes that may be DeepSpeed's: of no imported name, and not torch's or Python's."""
        others = (torch.Tensor, DTensor, nn.Module, torch.optim.Optimizer, dist, dict, list, str)
        known = {name for other in others for name in dir(other)}
        for node in self.nodes:
            if isinstance(node, ast.Attribute) and not self.origin(node) and node.attr not in known:
                yield node.attr


@functools.cache
def members(node: ast.ClassDef) -> set[str]:
    """Methods and fields that a class defines, and what it sets on `self`."""
    found = {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    names = (n for part in node.body if isinstance(part, ast.Assign | ast.AnnAssign) for n in ast.walk(part))
    found |= {n.id for n in names if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    inside = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return found | {n.attr for n in inside if isinstance(n.value, ast.Name) and n.value.id in ("self", "cls")}


def touched(node: ast.ClassDef) -> set[str]:
    """What a class defines, and reads of itself."""
    inside = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
    return members(node) | {n.attr for n in inside if ast.unparse(n.value) in ("self", "cls", "super()")}


def used(trees: Mapping[str, ast.Module]) -> set[str]:
    """The private names of libraries in these modules: dotted, or of an attribute of some object its name alone."""
    modules = [Uses(name, tree) for name, tree in trees.items()]
    ours = {name for m in modules for node in m.classes.values() for name in members(node)}
    named = (pair for tree in trees.values() for pair in defined(tree).items())
    anything = ours | {name for name, node in named if not isinstance(node, ast.Attribute)}
    found = {n for m in modules for n in (*m.imported, *m.read()) if is_private(n) and n not in ours}
    skipped = {*sys.stdlib_module_names, "txtrain"}
    for m in modules:
        for node in m.classes.values():
            of = [base for base in m.bases(node) if "." in base and library(base) not in skipped]
            there = {name: base for base in of for name in contents(base)}
            theirs = touched(node) & there.keys() if of else set()
            found |= {name for name in theirs if is_private(f"{there[name]}.{name}") and name[:2] != "__"}
        if m.name.startswith("parallel.deepspeed"):
            found |= {name for name in (*m.imported, *m.read()) if name.startswith("deepspeed.")}
            found |= set(m.of_deepspeed()) - anything
    return {name for name in found if name not in PUBLIC and not name.startswith("txtrain.")}


def is_listed(name: str) -> bool:
    if "." not in name:
        return any(row.endswith(f".{name}") for row in ROWS)
    return any(f"{name}.".startswith(f"{row}.") or row.startswith(f"{name}.") for row in ROWS)


def test_the_list_is_complete():
    assert sorted(name for name in used(TREES) if not is_listed(name)) == []


def test_every_row_is_used():
    modules = [Uses(name, tree) for name, tree in TREES.items()]
    names = {name.rpartition(".")[2] for m in modules for name in (*m.imported, *m.read())}
    names |= {name for m in modules for node in m.classes.values() for name in members(node)}
    assert [row for row in sorted(ROWS) if row.rpartition(".")[2] not in names] == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from hydra._internal import unlisted", "hydra._internal.unlisted"),
        ("import torch._unlisted", "torch._unlisted"),
        ("import torch\ntorch.fx._unlisted()", "torch.fx._unlisted"),
        ("def f(model): return model._unlisted", "_unlisted"),
        ("def f(model): return getattr(model, '_unlisted', None)", "_unlisted"),
        ("import sys\nsys.modules.get('torch._unlisted.utils')", "torch._unlisted.utils"),
        ("from torch import nn\nclass A(nn.Module):\n    def _call_impl(self): ...", "_call_impl"),
        ("from torch import nn\nclass A(nn.Module): ...\nclass B(A):\n    def f(self): self._modules = {}", "_modules"),
        ("def f(optimizer): return optimizer.unlisted", "unlisted"),
    ],
)
def test_a_name_that_is_not_listed_is_found(code, name):
    assert [n for n in used({"parallel.deepspeed_new": ast.parse(code)}) if not is_listed(n)] == [name]


def test_own_names_are_not_of_a_library():
    code = "class A:\n    def _own(self): self._set = 1\ndef f(a): return a._own, a._set, a._asdict(), a.__dict__"
    assert used({"new": ast.parse(code)}) == set()
