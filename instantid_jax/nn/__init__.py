"""Layers: shapes in, shapes out. Nothing here knows of diffusion.

Axis letters, used one way everywhere: b batch, h height, w width, c channels, n tokens, m context tokens, k heads, d head width, l layers.
"""
