"""Models by name. Contrastive ones: dual_encoder (the interface), catalogue and registry (the table), the back ends.

Generative ones: vision_language (the interface), vlm_catalogue and vlm_registry (the table), generative (their loader).
Adapters: low_rank, lora_layers, adapter_layout, qkv. Files: weights, checkpoints, tensor_files, settings.
"""
