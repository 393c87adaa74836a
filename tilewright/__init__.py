"""Tilewright: compressed transformer encoders to deployable x86 modules."""
