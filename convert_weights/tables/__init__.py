"""Which published tensor is which parameter, as rows: diffusers' names, the adapter's, and the single-file layout's."""
