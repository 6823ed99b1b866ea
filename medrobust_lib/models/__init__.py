"""Models by name. The table is models.toml, read by catalogue; loading finds a row and loads it; weights are files.

Dual encoders: dual_encoder and geometry (the interface), then the back ends open_clip, transformers_clip and
medclip. Generative models: vision_language, and decoding. Low-rank adapters: adapters, on the layers that
adapter_layers opens.
"""
