"""Hugging Face folders in and out.

    load.py save.py         load_pretrained, save_pretrained
    trainer.py              build_model, for transformers.Trainer too
    registry.py             the classes of transformers that are known; which of them a model equals
    families/               one class each: its config.json and its tensor names, as tables that read both ways
    hf_class.py fields.py rope_fields.py name_map.py        what those tables are made of
    pieces.py               weights as they lie in files; what a rank holds of a tensor is read by itself
    strict_json.py folder.py tensor_names.py weights.py tensor_file.py      files that a stranger wrote

Nothing here imports transformers, and only load, save, trainer, tensor_layout, pieces and the weights import torch.
"""
