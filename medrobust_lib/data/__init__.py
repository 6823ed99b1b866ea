"""Data sets: phantoms, readers of public layouts, and the registry that names them all."""
