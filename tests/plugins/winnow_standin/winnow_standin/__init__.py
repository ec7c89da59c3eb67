"""Stand-in for a perceptual-quality model, as a Winnow plug-in."""
