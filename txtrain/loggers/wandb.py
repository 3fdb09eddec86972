"""The class that `_target_: txtrain.loggers.wandb.WandbLogger` names, here and in saved configurations."""

from __future__ import annotations

from txtrain.monitor.loggers.wandb import WandbLogger as WandbLogger
