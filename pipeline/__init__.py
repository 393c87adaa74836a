"""Float checkpoint to compressed checkpoint: calibration and quantisation."""
