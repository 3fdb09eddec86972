"""From a source to ordered samples: sources/ -> tokenizer/ -> store/ -> samples/.

`prepare.py` goes through these for each kind of data. Loaders and their batches are in training/data_module.py."""
