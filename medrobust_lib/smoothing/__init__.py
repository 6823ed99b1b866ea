"""Randomized smoothing of classifiers: addressed noise, exact bounds, certificates.

Start in `certify`. Noise: noise. Mathematics: bounds, sequential, certificate. A data set at once: table, methods.
Prompts: prompts. Denoising: denoisers. Models that write have a package of their own,
`medrobust_lib.generative`.
"""
