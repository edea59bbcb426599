"""Spreading arrays over devices: meshes, and rules from parameter paths to partition specs."""
