"""Norms (`norms.py`), and where they stand around a sublayer (`placement.py`)."""
