"""Contrastive image-text models behind one interface: ``dual_encoder``, ``registry`` and the back ends."""
