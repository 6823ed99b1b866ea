"""Adaptation of a model to degraded images by training some of its weights."""
