"""diffusers' and transformers' files: names mirror our paths, so that rows speak of kinds of layers.

UNet2DConditionModel, ControlNetModel, AutoencoderKL          DIFFUSERS
CLIPTextModel, CLIPTextModelWithProjection                    CLIP
"""

from convert_weights.rules import CONV, LINEAR, Row, Table

_LAYERS = (
    Row("{path}.to_out.{i}.weight", "{path}/to_out_{i}/kernel", LINEAR),
    Row("{path}.to_out.{i}.bias", "{path}/to_out_{i}/bias"),
    Row("{path}.net.{i}.proj.weight", "{path}/net_{i}/proj/kernel", LINEAR),
    Row("{path}.net.{i}.proj.bias", "{path}/net_{i}/proj/bias"),
    Row("{path}.net.{i}.weight", "{path}/net_{i}/kernel", LINEAR),
    Row("{path}.net.{i}.bias", "{path}/net_{i}/bias"),
    Row("{path}.weight", "{path}/kernel", CONV, rank=4),
    Row("{path}.weight", "{path}/kernel", LINEAR, rank=2),
    Row("{path}.weight", "{path}/scale", rank=1),
    Row("{path}.bias", "{path}/bias", rank=1),
)

# The autoencoder's attention had names of its own before diffusers 0.17.
_OLD_ATTENTION = tuple(
    (rf"(mid_block\.attentions\.\d+)\.{old}\.", rf"\1.{new}.")
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
)

DIFFUSERS = Table(_LAYERS, aliases=_OLD_ATTENTION)

POSITION_IDS = (r"(^|\.)embeddings\.position_ids$", "a buffer that counts positions, not a weight")

CLIP = Table(
    rows=(
        Row("text_model.embeddings.{name}.weight", "embeddings/{name}/embedding"),
        Row("text_projection.weight", "text_projection/kernel", LINEAR),
        Row("text_model.{path}.weight", "{path}/kernel", LINEAR, rank=2),
        Row("text_model.{path}.weight", "{path}/scale", rank=1),
        Row("text_model.{path}.bias", "{path}/bias", rank=1),
    ),
    # transformers 5 leaves the outer level out.
    aliases=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
    ignored=(POSITION_IDS,),
)
