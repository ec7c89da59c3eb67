"""Benchmarks. `python -m bench` runs them all and writes a table and JSON to bench/out."""
