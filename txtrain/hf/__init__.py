"""Hugging Face folders in and out.

    load.py save.py         load_pretrained, save_pretrained
    trainer.py              build_model, for transformers.Trainer too
    registry.py             the known classes of transformers; which of them a model equals
    families/               one class each: its config.json and tensor names, as tables that read both ways
    hf_class.py fields.py rope_fields.py name_map.py        the parts of those tables
    graft.py modeling/      a model that equals none: its config.json, and a modeling file made from our sources
    renumbering.py          sinusoids by halves, for Marian
    gguf.py push.py         a file for llama.cpp; a folder to the hub
    hub.py                  a model by its name on the hub
    pieces.py               weights in files, of which a rank reads only what it holds
    folder.py tensor_names.py weights.py tensor_file.py     reading files that a stranger wrote

Nothing here imports transformers, and only load, save, trainer, tensor_layout, pieces and the weights import torch.
"""
