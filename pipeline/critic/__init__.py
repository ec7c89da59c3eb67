"""The critic on files and data sets: evaluated, compared, probed."""
