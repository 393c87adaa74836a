"""Block pruning of the linears of transformers encoders: which blocks stay, and how the weights that stay are refitted."""
