"""Optimizers, the groups of their parameters, the learning rate as a function of the step, and the average of the weights.

`config.py` is without torch, and so is `schedules.py`; the optimizers are imported when one is built.
"""
