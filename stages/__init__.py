"""The steps of a run: each takes a source with its clips and gives it back."""
