"""Readers of base-model files, one module per format. `base.open_base` tells the formats apart."""
