"""Checkpoints and the folder of a run: writing, finding, rotating, reading. Hugging Face folders are in hf/."""
