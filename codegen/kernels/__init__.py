"""Unscheduled TIR kernels. Each function returns a PrimFunc of named blocks that schedule rules find by name."""
