"""Lightning is imported without all of torchmetrics, whose names are there all the same."""

import subprocess
import sys

import pytest

LIGHT = """
import sys, txtrain
from importlib.util import find_spec
assert find_spec("torchmetrics") and find_spec("torchmetrics"), "as transformers looks for what is installed"
import lightning.pytorch
assert "torchmetrics.functional" not in sys.modules and "scipy" not in sys.modules and "transformers" not in sys.modules
import torchmetrics
assert torchmetrics.Metric is lightning.pytorch.core.module.Metric
assert isinstance(torchmetrics.Accuracy(task="binary"), torchmetrics.Metric)
assert "torchmetrics.functional" in sys.modules
"""
WHOLE = """
import txtrain
from torchmetrics import *
assert isinstance(MeanMetric(), Metric)
"""
FIRST = """
import torchmetrics, sys, txtrain
assert "torchmetrics.functional" in sys.modules and torchmetrics.MeanMetric
"""
SUBMODULE = """
import txtrain
import torchmetrics.classification
from torchmetrics.text import Perplexity
assert issubclass(Perplexity, torchmetrics.Metric)
"""


@pytest.mark.parametrize("code", [LIGHT, *(pytest.param(code, marks=pytest.mark.slow) for code in (WHOLE, FIRST, SUBMODULE))])
def test_what_is_asked_for_is_there(code):
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
