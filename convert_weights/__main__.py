"""python -m convert_weights import | export | extract-lora | inspect | diff | verify; each explains itself with --help."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from convert_weights import inspection
from convert_weights.exporting import export_weights
from convert_weights.importing import import_snapshot
from convert_weights.readers import read_controlnet, read_model
from convert_weights.source import ConversionError
from instantid_jax.checkpoint import WeightsError
from instantid_jax.config import ConfigError
from instantid_jax.options import OptionError, check_command, status_of, while_read


@dataclasses.dataclass(frozen=True)
class Import:
    """Published PyTorch weights to this package's format. Give --base and --instantid, or --controlnet alone."""

    out: Path
    """Folder to write; not one that is read."""
    base: Path | None = None
    """SDXL in diffusers' layout (a folder), or a single-file SDXL checkpoint."""
    instantid: Path | None = None
    """InstantID's folder: ControlNetModel/ and ip-adapter.bin or ip-adapter.safetensors."""
    controlnet: Path | None = None
    """An ordinary SDXL ControlNet (a folder), to be used beside IdentityNet."""
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    """Type to store; "keep" stores every tensor as it is, so that export gives the original bytes."""
    variant: str | None = None
    """Which of several weight files to take, such as fp16; by default the plain ones, or the only ones there."""
    base_fallback: Path | None = None
    """With a single-file --base: an SDXL folder for its configuration and tokenizers, and for what the file lacks (VAE, text encoders)."""
    unet: Path | None = None
    """A UNet in the place of the base's, such as SDXL-Lightning's: a safetensors file, or a folder in diffusers' layout."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts, where the files do not say it (single files mark it with a tensor named v_pred)."""
    zero_snr: bool = False
    """The UNet was trained down to pure noise (zero terminal SNR; single files mark it with a tensor named ztsnr)."""
    tokens: int = 16
    """Identity tokens that the adapter must make."""
    overwrite: bool = False
    """Replace --out where it is a folder that this program wrote; any other is left alone."""

    def run(self) -> int:
        """Converts and prints what became of each network."""
        start = time.monotonic()
        if self.controlnet is not None:
            if self.base is not None or self.instantid is not None or self.unet is not None:
                raise OptionError("give either --controlnet, or --base and --instantid")
            snapshot = read_controlnet(self.controlnet, self.variant)
        elif self.base is None or self.instantid is None:
            raise OptionError("give --base and --instantid, or --controlnet alone")
        else:
            said = {"prediction_type": self.prediction, "rescale_betas_zero_snr": self.zero_snr or None}
            scheduler = {name: value for name, value in said.items() if value is not None}
            snapshot = read_model(self.base, self.instantid, self.variant, self.base_fallback, self.tokens, unet=self.unet, scheduler=scheduler)
        manifest = import_snapshot(snapshot, self.out, self.dtype, self.overwrite)
        _print([*inspection.summary(manifest), f"written to {self.out} in {time.monotonic() - start:.1f} s"])
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """This package's weights back to ControlNetModel/, ip-adapter.safetensors and ip-adapter.bin."""

    weights: Path
    """Folder that import wrote."""
    out: Path
    """Folder to write; not one that is read."""
    base: bool = False
    """Write the SDXL folder too, as base/."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Cast all tensors; needed where import changed their type."""
    overwrite: bool = False
    """Replace --out where it is a folder that this program wrote; any other is left alone."""

    def run(self) -> int:
        """Exports and prints what was written."""
        _print(export_weights(self.weights, self.out, self.base, self.dtype, self.overwrite))
        return 0


@dataclasses.dataclass(frozen=True)
class ExtractLora:
    """The difference between two sets of weights of one model, written as a LoRA: by truncated singular value decomposition."""

    base: Path
    """Folder of the weights that the LoRA is to be added to."""
    tuned: Path
    """Folder of the same model's weights after training or another change."""
    out: Path
    """File to write, .safetensors, under diffusers' names."""
    rank: int = 8
    """Largest rank of a kernel: more keeps more of the difference, in a larger file."""
    networks: tuple[Literal["unet", "text_encoder", "text_encoder_2"], ...] = ("unet", "text_encoder", "text_encoder_2")
    """Networks whose difference is taken."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type to write."""
    overwrite: bool = False
    """Replace --out where it is a file."""

    def run(self) -> int:
        """Writes the file and prints how much of the difference is in it."""
        from convert_weights.lora_extraction import extract_lora, told  # builds the networks, which no other command needs

        if self.rank < 1 or not self.networks:
            raise OptionError(f"--rank must be at least 1, not {self.rank}" if self.rank < 1 else "--networks names none; leave it out for all")
        start = time.monotonic()
        found = extract_lora(self.base, self.tuned, self.out, rank=self.rank, networks=self.networks, dtype=self.dtype, overwrite=self.overwrite)
        _print([*told(found), f"written to {self.out} ({self.out.stat().st_size / 1e6:,.1f} MB) in {time.monotonic() - start:.1f} s"])
        return 0


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Lists the tensors of a weights folder, a safetensors file or a torch file (which is read, never run)."""

    path: tyro.conf.Positional[Path]
    """Folder or file."""

    def run(self) -> int:
        """Prints the table."""
        _print(inspection.inspect_path(self.path))
        return 0


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compares two weights folders or two tensor files; the exit code is 1 where they differ."""

    a: tyro.conf.Positional[Path]
    """One."""
    b: tyro.conf.Positional[Path]
    """The other."""

    def run(self) -> int:
        """Prints the differences."""
        equal, lines = inspection.diff_paths(self.a, self.b)
        _print(lines)
        return 0 if equal else 1


@dataclasses.dataclass(frozen=True)
class Verify:
    """Re-hashes a weights folder and holds every tensor and file against its manifest."""

    folder: tyro.conf.Positional[Path]
    """Folder that import wrote."""

    def run(self) -> int:
        """Prints one line where all is well."""
        _print(inspection.verify_folder(self.folder))
        return 0


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[ExtractLora, tyro.conf.subcommand("extract-lora")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


@while_read
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; 0 where it succeeded. An error is one message on stderr and 1 (of an option 2), never a traceback."""
    check_command("convert_weights", arguments, ("import", "export", "extract-lora", "inspect", "diff", "verify"))
    command = tyro.cli(Command, prog="python -m convert_weights", description=__doc__, args=arguments)  # type: ignore[call-overload]
    try:
        return command.run()
    except BrokenPipeError:  # an OSError, but no fault: `while_read` has it
        raise
    except (ConversionError, ConfigError, WeightsError, OptionError, OSError) as problem:
        print(f"convert_weights: {problem}", file=sys.stderr)
        return status_of(problem)


if __name__ == "__main__":
    sys.exit(main())
