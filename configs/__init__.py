"""Profiles, policies and taxonomies that ship with Winnow: data, no code."""
