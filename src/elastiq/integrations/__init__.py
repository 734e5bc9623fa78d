"""Programs that read nested checkpoints: transformers, vLLM, and the hub they travel by."""
