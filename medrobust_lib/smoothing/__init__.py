"""Randomized smoothing: noise streams today, bounds and certificates on top of them."""
