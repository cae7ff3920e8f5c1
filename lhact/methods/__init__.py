"""Names and calibration activations in, fitted methods (activations to scores) out."""
