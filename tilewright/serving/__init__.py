"""An HTTP server for artifacts: `create_app` makes it, `tilewright serve` runs it. Needs the extra `tilewright[serve]`."""
