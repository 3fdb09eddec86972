"""Optimizers, their parameter groups, the learning rate schedule, and the moving average of the weights.

`config.py` and `schedules.py` are without torch; the optimizers are imported when one is built.
"""
