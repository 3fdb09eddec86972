"""From a source to samples in the order in which a run reads them: sources/ -> tokenizer/ -> store/ -> samples/.

`prepare.py` has one way through them for each kind of data. Loaders and their batches are training/data_module.py."""
