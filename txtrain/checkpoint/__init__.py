"""Checkpoints and the folder of a run: written, found, kept, read back. Folders of Hugging Face are hf/."""
