"""data=digits: 1,797 handwritten digits of 8 x 8 pixels (UCI, Alpaydin and Kaynak 1998) in scikit-learn."""

from __future__ import annotations

import numpy as np

from txtrain.data.sources.images import ArrayImages
from txtrain.data.sources.source import Split


class Digits:
    def images(self, split: Split) -> ArrayImages:
        from sklearn.datasets import load_digits

        found = load_digits()
        return ArrayImages((found.images / 16).astype(np.float32), found.target)

    def identity(self) -> str:
        return "sklearn digits"

    def describe(self) -> str:
        return "1,797 handwritten digits of 8 x 8 pixels"
