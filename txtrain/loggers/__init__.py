"""Keeps `txtrain.loggers.wandb.WandbLogger` importable, which saved configurations hold as `_target_`.

The loggers themselves are monitor/loggers/.
"""
