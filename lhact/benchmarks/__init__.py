"""Image sets that make a benchmark in, as data; folders on disk and what is special about each out."""
