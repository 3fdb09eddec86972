"""The families of `pairs` and DeepSeek, whose class of transformers is handled apart."""

from tests.parity import test_deepseek as deepseek
from tests.parity.pairs import FAMILIES, Pair
from tests.parity.pairs import pair as of_pairs

EVERY = (*FAMILIES, deepseek.NAME)


def pair(family: str, seed: int) -> Pair:
    return deepseek.pair(seed) if family == deepseek.NAME else of_pairs(family, seed)
