"""A cache and fitted methods in, scores, metrics and results out."""
