"""Float checkpoint to compressed checkpoint: calibration and quantisation."""

from tilewright.pipeline.quantize import quantize

__all__ = ["quantize"]
