"""InstantID on SDXL as the paper trains it: 96 pictures a step, no dropout, the plain noise loss; IdentityNet, adapter and resampler learn.

The paper does not give learning rate, optimizer, precision or crops (its section 4.1 is all there is): those here are the usual
ones of public trainers. Spread the batch and the weights with --mesh, e.g. --mesh.data 3 --mesh.fsdp 16 for the paper's 48 devices (fsdp
should divide 320, the narrowest width); --optimizer.accumulate needs less memory.
"""

from instantid_jax.config import ComputeConfig, sdxl
from instantid_jax.data.loader import LoaderConfig
from instantid_jax.training.config import CheckpointConfig, InitConfig, OptimizerConfig, TrainConfig, ValidationConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=sdxl(),
        steps=100_000,
        data=("data",),
        out="runs/instantid",
        loader=LoaderConfig(global_batch=96, resolution=1024),
        init=InitConfig(weights="weights"),
        optimizer=OptimizerConfig(learning_rate=1e-5, warmup=1000, weight_decay=0.01),
        compute=ComputeConfig(dtype="bfloat16"),
        frozen_dtype="bfloat16",
        checkpoint=CheckpointConfig(every=1000, keep=3),
        validation=ValidationConfig(every=1000, samples_every=5000, guidance_scale=5.0, sample_steps=30),
    )
