"""Where the figures of a run go beside metrics.csv: Weights & Biases, TensorBoard, any Lightning logger."""
