"""Checkpoints of every supported format to `EncoderModel`."""
