"""InstantID's adapter file: the resampler (`image_proj`) and the projections of every cross-attention (`ip_adapter`)."""

from convert_weights.rules import LINEAR, Row, Table
from instantid_jax.config import UNetConfig
from instantid_jax.models.adapter import site_numbers

# The resampler's layers are numbered sequences in the file: 0 is the attention, 1 the feed-forward.
RESAMPLER = Table(
    (
        Row("latents", "latents"),
        Row("layers.{i}.1.0.weight", "layers/{i}/ff/norm/scale"),
        Row("layers.{i}.1.0.bias", "layers/{i}/ff/norm/bias"),
        Row("layers.{i}.1.1.weight", "layers/{i}/ff/proj_in/kernel", LINEAR),
        Row("layers.{i}.1.3.weight", "layers/{i}/ff/proj_out/kernel", LINEAR),
        Row("layers.{i}.0.{name}.weight", "layers/{i}/attn/{name}/scale", rank=1),
        Row("layers.{i}.0.{name}.bias", "layers/{i}/attn/{name}/bias"),
        Row("layers.{i}.0.{name}.weight", "layers/{i}/attn/{name}/kernel", LINEAR, rank=2),
        Row("{name}.weight", "{name}/kernel", LINEAR, rank=2),
        Row("{name}.weight", "{name}/scale", rank=1),
        Row("{name}.bias", "{name}/bias", rank=1),
    )
)


def adapter(unet: UNetConfig) -> Table:
    """The projections of a UNet's sites, which the file numbers by their place among all its attention layers."""
    return Table(
        tuple(
            Row(f"{number}.{projection}.weight", f"{path}/{projection}/kernel", LINEAR)
            for number, path in site_numbers(unet).items()
            for projection in ("to_k_ip", "to_v_ip")
        )
    )
