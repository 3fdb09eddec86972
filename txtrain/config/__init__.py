"""From overrides to one checked, typed configuration: Hydra, grafts, what goes together, units and hardware. No torch.

The configs of parts (model, data, objectives, optim, parallel) stand beside the parts."""
