"""Published PyTorch weights to this package's checkpoints, and back, without PyTorch.

    python -m convert_weights import --base SDXL --instantid INSTANTID --out weights

`tables` say which published tensor is which parameter, as data; `rules` applies them in either direction; the readers
map files into memory and trust nothing in them.
"""
