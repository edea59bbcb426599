"""How commands are started on many machines: TPU pods, GKE with xpk or a plain JobSet, Slurm. ``python -m instantid_jax.launch --help``."""
