"""torchmetrics without what Lightning does not use of it.

Lightning imports torchmetrics for two classes. torchmetrics imports with them all metrics, and through those scipy and,
where it is installed, transformers: 2.5 of the 5.7 seconds that a process takes to import torch and Lightning. After
`install` the package is executed once another of its names is asked for. Imported with txtrain, hence light.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing's, without importing it
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import Any

NAME = "torchmetrics"
USED = {"Metric": f"{NAME}.metric", "MetricCollection": f"{NAME}.collections"}


def install() -> None:
    """Change how torchmetrics is imported, unless it has been."""
    if NAME not in sys.modules and not any(isinstance(finder, _OnDemand) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnDemand())


class _OnDemand:
    """An importlib.abc.MetaPathFinder and Loader, in force until the whole package has been executed."""

    def __init__(self) -> None:
        self.package: Any = None
        self.loader: Any = None  # the package's own
        self.searching = False
        self.enough = False  # while modules are imported that are enough for `USED`

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname == NAME and self.package is None and not self.searching:  # a search need not end in an import
            from importlib.util import find_spec

            self.searching = True
            try:
                spec = find_spec(fullname)
            finally:
                self.searching = False
            if spec is not None:
                self.loader, spec.loader = spec.loader, self  # type: ignore[assignment]
            return spec
        if fullname.startswith(f"{NAME}.") and not self.enough:
            self.execute()
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        import logging
        from importlib import metadata

        self.package = module
        module.__version__, module._logger = metadata.version(NAME), logging.getLogger(NAME)
        module.__getattr__ = self.find

    def find(self, name: str) -> Any:
        """A name that the package lacks so far."""
        if name.startswith("__") and name != "__all__":  # what the import system asks of any module
            raise AttributeError(name)
        if name in USED:
            from importlib import import_module

            self.enough = True
            try:
                import_module(f"{NAME}.utilities")  # first: this and the module of Metric import each other
                return getattr(import_module(USED[name]), name)
            except ImportError:
                pass  # a version with other modules: as a whole
            finally:
                self.enough = False
        self.execute()
        return getattr(self.package, name)

    def execute(self) -> None:
        """Execute the package."""
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
        if vars(self.package).pop("__getattr__", None) is not None:
            self.loader.exec_module(self.package)
