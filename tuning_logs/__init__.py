"""Tuning records per CPU model, shipped as package data."""
