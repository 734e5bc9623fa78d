"""llama.cpp's files: blocks, names and hyperparameters by family, writing and reading."""
