"""Checkpoints of every supported format to `EncoderModel`."""

from tilewright.frontend.loader import load
from tilewright.frontend.report import LinearReport, ModelReport, report

__all__ = ["LinearReport", "ModelReport", "load", "report"]
