"""Images and a network in, cached penultimate activations out."""
