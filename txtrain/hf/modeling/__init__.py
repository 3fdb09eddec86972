"""A modeling file for a model that no class of transformers equals."""
