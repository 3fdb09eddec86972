"""Hugging Face folders in and out.

    loading.py saving.py    load_pretrained, save_pretrained
    classes.py              the classes of transformers that are known; which of them a model equals
    gpt1.py ... marian.py   one class each: its config.json and its tensor names, as tables that read both ways
    table.py parts.py rope.py names.py      what those tables are made of
    strict_json.py folder.py listing.py weights.py tensor_file.py   files that a stranger wrote

Nothing here imports transformers, and only loading, saving, layout and the weights import torch.
"""
