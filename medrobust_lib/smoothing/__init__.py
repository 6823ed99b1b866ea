"""Randomized smoothing of classifiers: addressed noise, exact bounds, certificates.

Start in `certify`. Noise: noise, batching. Mathematics: bounds, sequential, votes, certificate. A data set at once:
study, methods. Prompts: prompts, prompt_frames, adaptive. Denoising: denoisers, denoiser_networks, denoiser_training.
Models that write have a package of their own, `medrobust_lib.generative`.
"""
