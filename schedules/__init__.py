"""ISA levels, tensor intrinsics and schedule rules: unscheduled kernels to fast ones."""
