"""Single-file SDXL checkpoints (the original release's names, also A1111's and ComfyUI's) in terms of diffusers' names.

These tables only rename: their targets are the names that `tables.diffusers` takes further. Which module is which
follows from the configuration, as the original code numbers its blocks in one row:

    input i  -> down block (i - 1) // 3, layer (i - 1) % 3      (SDXL: two layers and a halving a block)
    output i -> up block i // 3, layer i % 3
"""

from collections.abc import Iterator

from convert_weights.rules import KEEP, LINEAR, POINTWISE, Row, Table, thirds
from instantid_jax.config import AutoencoderConfig, UNetConfig

UNET, VAE, TEXT_1, TEXT_2 = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

_IGNORED = (
    (r"^model_ema\.", "a moving average of the UNet, which the file has beside it"),
    (r"^denoiser\.sigmas$", "the noise schedule's buffer"),
    (r"^(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)$", "the noise schedule's buffer"),
    (r"(^|\.)logit_scale$", "used only in CLIP's own training"),
    (r"(^|\.)attn_mask$", "a constant mask"),
    (r"(^|\.)position_ids$", "a buffer that counts positions, not a weight"),
    (r"^conditioner\.embedders\.0\.(transformer\.)?text_projection(\.weight)?$", "SDXL does not use the first tower's projection"),
    (r"^(v_pred|ztsnr|edm_mean|edm_std)$", "a mark that says how the model was trained"),
    (r"^(loss|first_stage_model\.loss|optimizer\w*|lr_schedulers?)\.|^(global_step|epoch)$", "left over from training"),
)


def _rename(names: dict[str, str]) -> Iterator[Row]:
    for old, new in names.items():
        yield Row(f"{old}.weight", f"{new}.weight")
        yield Row(f"{old}.bias", f"{new}.bias")


def _resnet(old: str, new: str) -> Iterator[Row]:
    yield from _rename({f"{old}.{a}": f"{new}.{b}" for a, b in _RESNET.items()})


def unet(config: UNetConfig) -> Table:
    """The UNet's names."""
    rows = list(_rename(_UNET_ENDS))
    blocks, index = len(config.block_out_channels), 1
    for i, kind in enumerate(config.down_block_types):
        for j in range(config.layers_per_block):
            rows += _resnet(f"input_blocks.{index}.0", f"down_blocks.{i}.resnets.{j}")
            if kind.startswith("CrossAttn"):
                rows.append(Row(f"input_blocks.{index}.1.{{path}}", f"down_blocks.{i}.attentions.{j}.{{path}}"))
            index += 1
        if i < blocks - 1:
            rows += _rename({f"input_blocks.{index}.0.op": f"down_blocks.{i}.downsamplers.0.conv"})
            index += 1
    rows += _resnet("middle_block.0", "mid_block.resnets.0")
    rows += _resnet("middle_block.2", "mid_block.resnets.1")
    rows.append(Row("middle_block.1.{path}", "mid_block.attentions.0.{path}"))
    layers = config.layers_per_block + 1
    for i, kind in enumerate(config.up_block_types):
        cross = kind.startswith("CrossAttn")
        for j in range(layers):
            old = f"output_blocks.{i * layers + j}"
            rows += _resnet(f"{old}.0", f"up_blocks.{i}.resnets.{j}")
            if cross:
                rows.append(Row(f"{old}.1.{{path}}", f"up_blocks.{i}.attentions.{j}.{{path}}"))
            if j == layers - 1 and i < blocks - 1:
                rows += _rename({f"{old}.{2 if cross else 1}.conv": f"up_blocks.{i}.upsamplers.0.conv"})
    return Table([Row(UNET + row.source, row.target, row.layout) for row in rows], separator=".", ignored=_IGNORED)


def vae(config: AutoencoderConfig) -> Table:
    """The autoencoder's names; its decoder counts the blocks from the picture inwards."""
    last = len(config.block_out_channels) - 1
    rows: list[Row] = []
    for side, ours, resize, resizer in (("encoder", "down", "downsample", "downsamplers"), ("decoder", "up", "upsample", "upsamplers")):
        rows += _rename({f"{side}.norm_out": f"{side}.conv_norm_out"})
        for k in (1, 2):
            rows.append(Row(f"{side}.mid.block_{k}.{{path}}", f"{side}.mid_block.resnets.{k - 1}.{{path}}"))
        old, new = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        rows += _rename({f"{old}.norm": f"{new}.group_norm"})
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            rows.append(Row(f"{old}.{a}.weight", f"{new}.{b}.weight", POINTWISE))
            rows.append(Row(f"{old}.{a}.bias", f"{new}.{b}.bias"))
        for i in range(last + 1):
            level = i if side == "encoder" else last - i
            old, new = f"{side}.{ours}.{level}", f"{side}.{ours}_blocks.{i}"
            rows += _rename({f"{old}.block.{{i}}.nin_shortcut": f"{new}.resnets.{{i}}.conv_shortcut"})
            rows.append(Row(f"{old}.block.{{i}}.{{path}}", f"{new}.resnets.{{i}}.{{path}}"))
            rows += _rename({f"{old}.{resize}.conv": f"{new}.{resizer}.0.conv"})
    rows.append(Row("{path}", "{path}"))
    return Table([Row(VAE + row.source, row.target, row.layout) for row in rows], separator=".", aliases=((r"^vae\.", VAE),), ignored=_IGNORED)


TEXT_ENCODER = Table([Row(TEXT_1 + "{path}", "{path}")], separator=".", ignored=_IGNORED)

_LAYER, _RESBLOCK = "text_model.encoder.layers.{i}", TEXT_2 + "transformer.resblocks.{i}"
_LAYER_NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}

TEXT_ENCODER_2 = Table(
    (
        Row(TEXT_2 + "positional_embedding", "text_model.embeddings.position_embedding.weight", KEEP),
        Row(TEXT_2 + "token_embedding.weight", "text_model.embeddings.token_embedding.weight", KEEP),
        Row(TEXT_2 + "text_projection", "text_projection.weight", LINEAR),
        *_rename({TEXT_2 + "ln_final": "text_model.final_layer_norm"}),
        *(Row(f"{_RESBLOCK}.attn.in_proj_weight", f"{_LAYER}.self_attn.{p}_proj.weight", thirds(k)) for k, p in enumerate("qkv")),
        *(Row(f"{_RESBLOCK}.attn.in_proj_bias", f"{_LAYER}.self_attn.{p}_proj.bias", thirds(k)) for k, p in enumerate("qkv")),
        *_rename({f"{_RESBLOCK}.{old}": f"{_LAYER}.{new}" for old, new in _LAYER_NAMES.items()}),
    ),
    separator=".",
    ignored=_IGNORED,
)
