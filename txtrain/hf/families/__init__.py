"""Classes of transformers, one file each: the fields of config.json and the names of tensors, both ways."""
