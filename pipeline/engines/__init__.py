"""Engines: how a plan is carried out. Both give the same sources back, in listing order."""
