"""A run's model for others: a folder that udonlib, timm or onnxruntime alone can use."""
