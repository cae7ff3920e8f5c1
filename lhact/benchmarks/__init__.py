"""The name of a benchmark in, its image sets and where they lie out."""
