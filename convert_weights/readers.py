"""Finds the published files and says what is in them: SDXL folders, single files, InstantID folders, ControlNets.

Nothing is loaded here: a `Part` is a network's configuration, its tensors where they lie in mapped files, and the plan
that takes each to its parameter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from convert_weights import recognise
from convert_weights.rules import Account, Assignment, MappingError, Shape, Table, account, plan
from convert_weights.safetensors_file import MAX_HEADER, open_safetensors
from convert_weights.source import SourceError, TensorFile
from convert_weights.tables import diffusers, instantid, single_file
from convert_weights.torch_pickle import HEAD, open_torch, what_it_is
from instantid_jax.config import (
    AutoencoderConfig,
    CLIPTextConfig,
    ComputeConfig,
    ConfigError,
    IdentityNetConfig,
    ModelConfig,
    ResamplerConfig,
    SchedulerConfig,
    UNetConfig,
    from_json,
)
from instantid_jax.models import Network, build_networks
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.text import Tokenizer, TokenizerError

BASE = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_CONTROLNETS = ("ControlNetModel", "controlnet", "checkpoints/ControlNetModel")
_ADAPTERS = ("ip-adapter.safetensors", "ip-adapter.bin", "checkpoints/ip-adapter.bin", "pytorch_model.bin")
RESAMPLER_KEY = "instantid_jax.resampler"
C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Part:
    """One network to be converted."""

    name: str
    file: TensorFile
    account: Account

    @property
    def assignments(self) -> Sequence[Assignment]:
        """Where each parameter comes from."""
        return self.account.assignments


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Everything that an import takes over."""

    config: ModelConfig | IdentityNetConfig
    parts: Sequence[Part]
    published: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Files kept as they are, for export: relative name -> file."""
    tokenizers: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Both tokenizers' files likewise; none where the snapshot has no tokenizers, and the packaged ones are written."""
    notes: Sequence[str] = ()
    sources: Sequence[Path] = ()
    """The files and folders that were named; nothing is written there."""


def require_there(path: Path) -> None:
    """Raises `SourceError` where there is neither a file nor a folder of that name."""
    if not path.exists():
        raise SourceError(f"{path}: there is no such file or folder")


def open_tensors(path: Path) -> TensorFile:
    """A safetensors or torch file, known by its content. Raises `SourceError` for anything else."""
    require_there(path)
    with path.open("rb") as file:
        head = file.read(HEAD)
    # A safetensors file begins with the length of its header, which can look like any text unless it is too long to be one.
    kind = what_it_is(head) if int.from_bytes(head[:8], "little") > MAX_HEADER else None
    if kind:
        raise SourceError(f"{path}: {kind}")
    torch = head[:4] == b"PK\x03\x04" or (path.suffix != ".safetensors" and head[8:9] != b"{")
    return open_torch(path) if torch else open_safetensors(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `SourceError` where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing; is the download complete?") from None
    except OSError as problem:
        raise SourceError(f"{path} cannot be read ({problem.strerror})") from problem
    except (ValueError, RecursionError) as problem:
        raise SourceError(f"{path} is not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object")
    return content


@contextlib.contextmanager
def _reading(where: object) -> Iterator[None]:
    """A `ConfigError` raised within gets the name of what is read before its message."""
    try:
        yield
    except ConfigError as problem:
        raise ConfigError(f"{where}: {problem}") from problem


def _published_config(path: Path, read: Callable[[dict[str, Any]], C], class_name: str | None = None) -> C:
    """A published ``config.json`` through `read`. Raises `SourceError` where it is another class's than `class_name`."""
    content = read_json(path)
    found = content.get("_class_name", class_name)
    if class_name is not None and found != class_name:
        raise SourceError(f"{path} describes a {found} where a {class_name} is wanted; name the folder that holds one")
    with _reading(path):
        return read(content)


def open_component(folder: Path, variant: str | None = None) -> TensorFile:
    """The weights of one diffusers folder: one file or several shards; `variant` is the tag in the file name.

    Without `variant` the plain files are taken, or the only variant that there is.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is missing; is the download complete?")
    found: dict[str | None, Path] = {}
    for suffix in (".safetensors", ".bin"):
        for stem in _STEMS:
            for path in sorted(folder.glob(f"{stem}*{suffix}*")):
                middle = path.name.removeprefix(stem)
                tag = middle.removesuffix(".json").replace(suffix, "", 1).replace(".index", "", 1).removeprefix(".")
                if middle.startswith(".") and "-of-" not in middle and middle.endswith((suffix, ".json")) and "." not in tag:
                    found.setdefault(tag or None, path)
    choice = variant if variant or len(found) != 1 else next(iter(found))
    if choice not in found:
        there = ", ".join(sorted(str(tag or "plain") for tag in found)) or "none"
        wanted = f"weights of the variant {variant!r}" if variant else "plain weights"
        raise SourceError(f"{folder} has no {wanted}; variants that are there: {there} (choose one with --variant)")
    path = found[choice]
    return _open_shards(path) if path.suffix == ".json" else open_tensors(path)


def _open_shards(index: Path) -> TensorFile:
    """The files that an index names; only plain names beside the index are followed."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise SourceError(f"{index} has no weight_map of tensor names to file names")
    files: dict[str, TensorFile] = {}
    for name in sorted(set(names.values())):
        if not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
            raise SourceError(f"{index} names the part {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise SourceError(f"{index} names the part {name!r}, which is missing; is the download complete?")
        files[name] = open_tensors(index.parent / name)
    for name, file in files.items():
        for tensor in file.tensors:
            if names.get(tensor) != name:
                how = "places elsewhere" if tensor in names else "does not name"
                raise SourceError(f"{index.parent / name} holds {tensor!r}, which the index {how}")
    for tensor, name in names.items():
        if tensor not in files[name].tensors:
            raise SourceError(f"{index} says that {name} holds {tensor!r}, which it does not")
    return TensorFile(tuple(f.files[0] for f in files.values()), {t: files[name].tensors[t] for t, name in names.items()})


def read_model(
    base: Path,
    instant: Path,
    variant: str | None = None,
    fallback: Path | None = None,
    tokens: int = 16,
    *,
    unet: Path | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> Snapshot:
    """SDXL and InstantID together.

    `fallback` is an SDXL folder for what a single file lacks, `unet` a UNet in the place of the base's, and `scheduler` holds fields
    of `SchedulerConfig` that count more than what the files say.
    Raises `SourceError`, `MappingError` or `ConfigError` for anything that is missing, damaged or of another kind.
    """
    sources = [path for path in (base, instant, fallback, unet) if path is not None]
    for path in sources:
        require_there(path)
    if base.is_file():
        configs, files, published, folder, notes = _single_file_base(base, fallback, variant)
    else:
        configs, published, notes = _base_configs(base), _published(base), []
        files, folder = _Files((name, (open_component(base / name, variant), None)) for name in BASE), base
    if unet is not None:
        files["unet"] = _other_unet(unet, configs["unet"], variant)
        notes.append(f"the UNet is {unet.name}'s, everything else of the base is {base.name}'s")
    if scheduler:
        configs["scheduler"] = dataclasses.replace(configs["scheduler"], **scheduler)
        if configs["scheduler"].rescale_betas_zero_snr and configs["scheduler"].prediction_type == "epsilon":
            raise SourceError("--zero-snr goes with --prediction v_prediction: epsilon says nothing about a picture that is pure noise")
        said = ", ".join(f"{name} {value}" for name, value in scheduler.items())
        notes.append(f"the scheduler is set as asked: {said}; `export --base` writes the base's own file")
    control = _first(instant, _CONTROLNETS, "the folder of the IdentityNet")
    adapter = open_tensors(_first(instant, _ADAPTERS, "the adapter file"))
    image_proj, ip_adapter = _adapter(adapter, configs["unet"].cross_attention_dim, tokens)
    configs["identitynet"] = _controlnet_config(control)
    configs["resampler"] = _resampler_config(image_proj)
    face = {512: "antelopev2", 128: "opencv"}.get(configs["resampler"].embedding_dim, "antelopev2")
    with _reading(f"{base} and {instant}"):
        config = ModelConfig(**configs, face_analyzer=face)
    files |= {
        "identitynet": (open_component(control, None), None),
        "resampler": (image_proj, None),
        "adapter": (ip_adapter, None),
    }
    recognise.refuse_foreign_base(files["unet"][0], config.unet)
    published = {**published, "ControlNetModel/config.json": control / "config.json"}
    networks = build_networks(config)
    parts, problems = [], []
    for name, network in networks.items():
        try:
            parts.append(_part(name, *files[name], network.disk_shapes(), config))
        except MappingError as problem:
            problems.append(str(problem))
    if problems:
        raise MappingError("\n".join(problems))
    return Snapshot(config, parts, published, {} if folder is None else _tokenizers(folder, config), notes, sources)


def _other_unet(path: Path, config: UNetConfig, variant: str | None) -> tuple[TensorFile, Table | None]:
    """A UNet of the base's shape: a folder of diffusers, or a file with diffusers' names or the original release's."""
    if path.is_dir():
        found = _published_config(path / "config.json", UNetConfig.from_published, "UNet2DConditionModel")
        if found != config:
            raise SourceError(f"{path / 'config.json'}: this UNet is not built as the base's; only one of the same shape can take its place")
        return open_component(path, variant), None
    file = open_tensors(path)
    recognise.refuse_foreign_unet(file)
    if any(name.startswith("input_blocks.") for name in file.tensors):
        file = dataclasses.replace(file, tensors={single_file.UNET + name: tensor for name, tensor in file.tensors.items()})
    return file, single_file.unet(config) if any(name.startswith(single_file.UNET) for name in file.tensors) else None


def read_controlnet(folder: Path, variant: str | None = None) -> Snapshot:
    """An ordinary ControlNet for SDXL in diffusers' layout."""
    require_there(folder)
    if folder.is_file():
        raise SourceError(f"{folder} is a file; --controlnet takes a folder in diffusers' layout, with config.json beside the weights")
    config = _controlnet_config(folder)
    network = Network(IdentityNet, config, ComputeConfig())
    file = open_component(folder, variant)
    fulfilled = account("controlnet", plan(diffusers.DIFFUSERS, network.disk_shapes()), file.tensors, diffusers.DIFFUSERS)
    return Snapshot(config, [Part("controlnet", file, fulfilled)], {"config.json": folder / "config.json"}, sources=[folder])


def _controlnet_config(folder: Path) -> IdentityNetConfig:
    return _published_config(folder / "config.json", IdentityNetConfig.from_published, "ControlNetModel")


def table_of(network: str, config: ModelConfig | IdentityNetConfig) -> Table:
    """The table from a network's published names to its parameters."""
    if network == "resampler":
        return instantid.RESAMPLER
    if network == "adapter":
        assert isinstance(config, ModelConfig)
        return instantid.adapter(config.unet)
    return diffusers.CLIP if network.startswith("text_encoder") else diffusers.DIFFUSERS


def _part(name: str, file: TensorFile, renames: Table | None, shapes: Mapping[str, Shape], config: ModelConfig) -> Part:
    table = table_of(name, config)
    try:
        return Part(name, file, account(f"{name} ({file.where})", plan(table, shapes, renames), file.tensors, renames or table))
    except MappingError:
        recognise.refuse_foreign_network(name, file)
        raise


def _first(folder: Path, names: Sequence[str], what: str) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise SourceError(f"{folder} has no {names[0]}: {what} is looked for as {', '.join(names)}")


def _base_configs(base: Path) -> dict[str, Any]:
    """The configurations that an SDXL folder holds."""
    index = read_json(base / "model_index.json")
    name = index.get("_class_name")
    if not str(name).startswith("StableDiffusionXL"):
        raise SourceError(f"{base}: model_index.json describes a {name}, not Stable Diffusion XL")
    recognise.refuse_foreign_config(base, read_json(base / "unet/config.json"))
    towers = {
        tower: _published_config(
            base / tower / "config.json",
            functools.partial(CLIPTextConfig.from_published, with_projection="WithProjection" in str(index.get(tower))),
        )
        for tower in ("text_encoder", "text_encoder_2")
    }
    return {
        "unet": _published_config(base / "unet/config.json", UNetConfig.from_published, "UNet2DConditionModel"),
        "vae": _published_config(base / "vae/config.json", AutoencoderConfig.from_published, "AutoencoderKL"),
        "scheduler": _published_config(base / "scheduler/scheduler_config.json", SchedulerConfig.from_published),
        "force_zeros_for_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", True)),
        **towers,
    }


def _published(base: Path) -> dict[str, Path]:
    names = ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in BASE))
    return {f"base/{name}": base / name for name in names}


def _tokenizers(base: Path, config: ModelConfig) -> dict[str, Path]:
    """Both tokenizers' files, which are opened once, so that what is missing or odd shows now and not at the first picture."""
    files: dict[str, Path] = {}
    for name, tower in zip(TOKENIZERS, (config.text_encoder, config.text_encoder_2), strict=True):
        if not (base / name).is_dir():
            raise SourceError(f"{base / name} is missing; is the download complete?")
        try:
            tokenizer = Tokenizer.from_directory(base / name)
        except TokenizerError as problem:
            raise SourceError(f"{problem}; is the download complete?") from problem
        largest = max(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        if largest >= tower.vocab_size:
            raise SourceError(f"{base / name}: the tokenizer gives ids up to {largest}, the text encoder knows {tower.vocab_size}")
        files |= {f"{name}/{path.name}": path for path in sorted((base / name).iterdir()) if path.is_file()}
    return files


_Files = dict[str, tuple[TensorFile, Table | None]]


def _single_file_base(
    path: Path, fallback: Path | None, variant: str | None
) -> tuple[dict[str, Any], _Files, dict[str, Path], Path | None, list[str]]:
    """The networks of a single-file checkpoint; what it lacks, and the tokenizers, come from the `fallback` folder.

    Without one the configuration is SDXL base's, and the tokenizers are the packaged ones: every SDXL model has the same.
    """
    whole = open_tensors(path)
    recognise.refuse_foreign_single_file(whole)
    has_configs = fallback is not None and (fallback / "model_index.json").is_file()
    configs = _base_configs(fallback) if fallback is not None and has_configs else _default_configs()
    notes = [] if fallback else [f"{path.name} has no tokenizers: CLIP's, which every SDXL model uses, were written from the packaged vocabulary"]
    if not has_configs:
        notes.append("no model_index.json: the configuration is SDXL base 1.0's; `export --base` needs an import with --base-fallback")
    if "v_pred" in whole.tensors or "ztsnr" in whole.tensors:
        prediction = "v_prediction" if "v_pred" in whole.tensors else configs["scheduler"].prediction_type
        configs["scheduler"] = dataclasses.replace(configs["scheduler"], prediction_type=prediction, rescale_betas_zero_snr="ztsnr" in whole.tensors)
        notes.append(f"the file marks itself as trained with {prediction}; the scheduler is set so")
    tables = {
        "unet": single_file.unet(configs["unet"]),
        "vae": single_file.vae(configs["vae"]),
        "text_encoder": single_file.TEXT_ENCODER,
        "text_encoder_2": single_file.TEXT_ENCODER_2,
    }
    prefixes = dict(zip(BASE, ((single_file.UNET,), (single_file.VAE, "vae."), (single_file.TEXT_1,), (single_file.TEXT_2,)), strict=True))
    files: _Files = {}
    left = dict(whole.tensors)
    for name in BASE:
        own = {tensor: where for tensor, where in whole.tensors.items() if tensor.startswith(prefixes[name])}
        left = {tensor: where for tensor, where in left.items() if tensor not in own}
        if any(tables[name].reason_to_ignore(tensor) is None for tensor in own):
            files[name] = (dataclasses.replace(whole, tensors=own), tables[name])
        elif fallback is not None and (fallback / name).is_dir():
            files[name] = (open_component(fallback / name, variant), None)
            notes.append(f"the file has no {name}; it is taken from {fallback.name}")
        else:
            raise SourceError(f"{path} has no {name}; name an SDXL folder that has it with --base-fallback DIR")
    unknown = sorted(name for name in left if tables["unet"].reason_to_ignore(name) is None)
    if unknown:
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        raise SourceError(f"{path}: unused ({len(unknown)}): {'; '.join(unknown[:20])}{more}")
    if left:
        notes.append(f"{len(left)} tensors beside the networks are left out, the first {min(left)} ({tables['unet'].reason_to_ignore(min(left))})")
    return configs, files, _published(fallback) if fallback is not None and has_configs else {}, fallback, notes


def _default_configs() -> dict[str, Any]:
    """SDXL base 1.0's configurations."""
    default = ModelConfig()
    return {name: getattr(default, name) for name in (*BASE, "scheduler")}


def _adapter(file: TensorFile, width: int, tokens: int) -> tuple[TensorFile, TensorFile]:
    """The two halves of an adapter file, after a look at whether it is InstantID's."""
    recognise.refuse_foreign_adapter(file, width, tokens)
    image_proj, ip_adapter = file.under("image_proj."), file.under("ip_adapter.")
    unused = sorted(set(file.tensors) - {f"image_proj.{n}" for n in image_proj.tensors} - {f"ip_adapter.{n}" for n in ip_adapter.tensors})
    if unused:
        raise SourceError(f"{file.where}: unused ({len(unused)}): {'; '.join(unused[:20])}; an adapter has image_proj and ip_adapter alone")
    return image_proj, ip_adapter


def _resampler_config(file: TensorFile) -> ResamplerConfig:
    """The resampler's sizes as its tensors show them; heads of 64, as published, unless the file's metadata says more."""

    def size(name: str, axis: int) -> int:
        tensor = file.tensors.get(name)
        if tensor is None or axis >= len(tensor.shape):
            raise SourceError(f"{file.where}: the resampler's {name!r} is missing or mis-shaped")
        return tensor.shape[axis]

    dim, inner = size("latents", 2), size("layers.0.0.to_q.weight", 0)
    depth = len({name.split(".")[1] for name in file.tensors if name.startswith("layers.")})
    with _reading(file.where):
        shown = ResamplerConfig(
            dim=dim,
            depth=depth,
            dim_head=64,
            heads=max(inner // 64, 1),
            num_queries=size("latents", 1),
            embedding_dim=size("proj_in.weight", 1),
            output_dim=size("proj_out.weight", 0),
            ff_mult=size("layers.0.1.1.weight", 0) // max(dim, 1),
        )
    said = None
    if RESAMPLER_KEY in file.metadata:
        try:
            said = from_json(ResamplerConfig, file.metadata[RESAMPLER_KEY])
        except ValueError as problem:
            raise SourceError(f"{file.where}: its metadata {RESAMPLER_KEY} is damaged ({problem}); export or copy the file again") from problem
    heads = (said.dim_head, said.heads) if said else (64, shown.heads)
    if heads[0] * heads[1] != inner:
        raise SourceError(f"{file.where}: the resampler's attention is {inner} wide, which is not a number of heads of {heads[0]}")
    with _reading(file.where):
        return dataclasses.replace(shown, dim_head=heads[0], heads=heads[1])
