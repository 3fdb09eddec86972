"""From overrides to one checked, typed configuration: Hydra, grafts, compatibility, units, hardware. No torch.

The configs of model, data, objectives, optim and parallel are in those folders."""
