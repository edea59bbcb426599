"""Makes a picture again from the settings that it holds.

The settings are somebody's text (`metadata`): they choose options, and never a file. Files are those that the user names, or
people who come along, found by the hash of their photo; each is held against the recorded hash before anything is drawn.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instantid_jax import __version__
from instantid_jax.defaults import DEFAULT_WEIGHTS, people
from instantid_jax.metadata import read_recorded
from instantid_jax.options import OptionError
from instantid_jax.output import file_digest, free_path, made_with, save_picture, suffix_of, weights_digest
from instantid_jax.references import check_files
from instantid_jax.sample_options import RUN_OPTIONS, SampleOptions
from instantid_jax.sampling import inputs_of, read_people
from instantid_jax.text import literal

__all__ = ["Replay", "ReplayError", "recorded_options"]

_FILES = {
    "people": "people",
    "face": "face",
    "blend": "blend",
    "pose": "pose",
    "control_image": "control",
    "control_model": "preprocessor",
    "control_mask": "mask",
    "init_image": "init",
    "mask_image": "redrawn",
    "lora": "lora",
    "controlnet": "controlnet",
}
"""Kind of hash that the settings hold, of each option that names files."""
_SEVERAL = ("num_images", "view", "blend_steps", "blend_how", "compare", "prompt_file")
"""Options that ask for other pictures than the one that is there."""
_WHERE = ("version", "made_with", "size")


class ReplayError(ValueError):
    """A picture that cannot be made again as it is asked; the message says which file or setting differs."""


def recorded_options(recorded: Mapping[str, Any]) -> SampleOptions:
    """The options that settings of `read_recorded` tell: all but files and folders."""
    hints = typing.get_type_hints(SampleOptions)
    kept = {name for name in hints if name in recorded and name not in ("weights", "lora", "controlnet", "analyzer_root", "style", "face")}
    values: dict[str, Any] = {name: tuple(recorded[name]) if isinstance(recorded[name], list) else recorded[name] for name in kept}
    texts: dict[str, Any] = {name: literal(values[name]) for name in ("prompt", "negative_prompt") if values.get(name) is not None}
    values |= texts
    if recorded.get("face_vector") is None:
        values.pop("keep_face_vector", None)  # somebody else's text asks for no vector that is not there already
    return SampleOptions(**values)


class Replay:
    """One picture that is made again."""

    def __init__(self, path: Path) -> None:
        """Reads the settings. Raises `MetadataError` for what is wrong with them, `ReplayError` for a contact sheet."""
        check_files([path])
        self.path, self.recorded = path, read_recorded(path)
        if self.recorded.get("sheet"):
            raise ReplayError(f"{path}: is a contact sheet; name one of its pictures")
        known = [person.name for person in people()]
        if self.recorded.get("face") not in (None, *known):
            raise ReplayError(f"{path}: shows {_shown(self.recorded['face'])}, who is none of the people who come along ({', '.join(known)})")
        self.base = recorded_options(self.recorded)
        self.changed: set[str] = set()
        self.told: list[str] = []

    def options(self, given: SampleOptions, scratch: Path) -> SampleOptions:
        """What to draw with: `given` are `base` with the command line's options in place. `told` says then what is not as recorded.

        `scratch` is an empty folder for this run. Raises `ReplayError` where a file is missing or another one.
        """
        beside = (*_FILES, *RUN_OPTIONS, "weights", "analyzer_root")
        for field in dataclasses.fields(given):
            old, new = getattr(self.base, field.name), getattr(given, field.name)
            if old != new and field.name not in beside:
                self._change(field.name, f"{_shown(new)} in place of {_shown(old)}")
        if "preset" in self.changed:  # its own values count, not the recorded ones
            own = {name: None for name in ("steps", "sampler", "guidance_scale") if name not in self.changed}
            given = dataclasses.replace(given, **own, sampler_option=given.sampler_option if "sampler_option" in self.changed else ())
            self.changed |= {*own, "sampler_option"}
        if "style" in self.changed and self.recorded.get("style") and "prompt" not in self.changed:
            raise OptionError("the recorded prompt has its style in it; give --prompt beside --style")
        if self.changed & {"prompt", "negative_prompt", "style"}:
            self.changed |= {"prompt", "negative_prompt", "style"}
        given = self._with_files(given, scratch)
        if given.keep_face_vector and self.base.keep_face_vector and "face_sha256" in self.changed:
            given = dataclasses.replace(given, keep_face_vector=False)
            self.changed.add("keep_face_vector")
            self.told.append("the face is another one, so its vector is not stored, as the recorded one was")
        if not given.watermark and "watermark" not in self.changed:
            self.told.append("without a mark, as recorded; --watermark makes one")
        self._check_weights(given)
        for name, now in (("made_with", made_with()), ("version", f"instantid_jax {__version__}")):
            if self.recorded.get(name, now) != now:
                self.told.append(f"made with {self.recorded[name]}, now {now}: pixels may differ in rounding")
        return given

    @property
    def single(self) -> bool:
        """Whether just the recorded picture is drawn, of those that were drawn with it."""
        return not self.changed.intersection(_SEVERAL)

    @property
    def person(self) -> str | None:
        """Which of the people who come along it shows, where nothing else said whom to draw."""
        name = self.recorded.get("face")
        return name if name is not None and "face" not in self.changed and "people" not in self.changed else None

    @property
    def variant(self) -> str | None:
        """Which of several views or blends it is."""
        return self.recorded.get("variant") if self.single else None

    @property
    def index(self) -> int:
        """Its place among the pictures that were drawn at once."""
        return self.recorded["batch"]["index"] if "batch" in self.recorded else 0

    def batch(self, s: SampleOptions) -> SampleOptions:
        """The options by which all pictures are drawn that were drawn at once with this one."""
        batch = self.recorded.get("batch")
        if batch is None or not self.single or ("prompts" in batch and self.person is None):
            return s
        return dataclasses.replace(s, num_images=batch["count"] // len(batch.get("prompts", [0])), seed=(s.seed - batch["index"]) % 2**32)

    def prompts(self, s: SampleOptions) -> list[tuple[str, dict[str, Any]]]:
        """`demo.demo_prompts` of a picture of the people who come along."""
        own = {"prompt": s.prompt, "negative_prompt": s.negative_prompt, "style": s.style}
        batch = self.recorded.get("batch", {})
        texts = list(zip(batch.get("prompts", [s.prompt]), batch.get("negative_prompts", [s.negative_prompt]), strict=True))
        listed = [("", {"prompt": prompt, "negative_prompt": negative, "style": ()}) for prompt, negative in texts]
        listed[self.index * len(texts) // batch.get("count", 1)] = ("", own)
        if len({told["negative_prompt"] is None for _, told in listed}) > 1:
            raise ReplayError(f"{self.path}: was drawn at once with others, whose negative prompts are {_shown(texts[0][1])}; leave that as it is")
        return listed

    def save(self, out: Path, picture: Image.Image, settings: Mapping[str, Any]) -> list[Path]:
        """Writes the picture into the folder under its old name, with the recorded settings where nothing changed. Returns its path."""
        kept = {name: value for name, value in self.recorded.items() if name not in self.changed and name not in _WHERE}
        settings = {**settings, **kept}
        path = free_path(out / f"{self.path.stem}{suffix_of(settings)}", settings)
        save_picture(picture, path, settings)
        return [path]

    def _change(self, name: str, told: str) -> None:
        self.changed.add(name)
        self.told.append(f"--{name.replace('_', '-')} {told}")

    def _with_files(self, given: SampleOptions, scratch: Path) -> SampleOptions:
        """The options with the files of people who come along, or the recorded face vector, where none are named; all files checked."""
        packaged = {file_digest(person.photo): person.photo for person in people()}
        group = "people_sha256" in self.recorded
        for option, kind in _FILES.items():
            wanted, paths = self.recorded.get(f"{kind}_sha256", []), _paths(getattr(given, option))
            if kind == "preprocessor" and "control_preprocess" in self.changed:
                self.changed.add("preprocessor_sha256")  # another map is asked for, of whatever model it needs
                continue
            if paths or not wanted or (group and kind not in ("people", "control", "preprocessor", "init", "redrawn", "lora", "controlnet")):
                continue
            if kind == "face" and self.recorded.get("face_vector") is not None:
                paths = (self._stored_face(scratch),)
                given = dataclasses.replace(given, face_weight=(), face_combine="mean")
            elif all(digest in packaged for digest in wanted):
                paths = tuple(packaged[digest] for digest in wanted)
            else:
                hashes = ", ".join(f"{digest[:12]}..." for digest in wanted)
                raise ReplayError(f"{self.path}: was made with {len(wanted)} file(s) of --{option.replace('_', '-')}; name them (SHA-256 {hashes})")
            given = dataclasses.replace(given, **{option: paths if isinstance(getattr(given, option), tuple) else paths[0]})
        listed = read_people(given)
        check_files([*given.lora])
        found: dict[str, Any] = {**inputs_of(given, listed), "lora": given.lora, "controlnet": given.controlnet}
        for option, kind in _FILES.items():
            if f"{kind}_sha256" not in self.changed and scratch not in {path.parent for path in found.get(kind, ())}:
                self._check(option, kind, found.get(kind, ()), self.recorded.get(f"{kind}_sha256", []), given.allow_changed_files)
        return given

    def _check(self, option: str, kind: str, paths: Sequence[Path], wanted: list[str], allowed: bool) -> None:
        digests = [weights_digest(path) if kind == "controlnet" else file_digest(path) for path in paths]
        if digests == wanted:
            return
        name = f"--{option.replace('_', '-')}"
        self.changed |= {option, f"{kind}_sha256"} | ({"face_vector", "face_keypoints", "face_size"} if kind == "face" else set())
        if not wanted:
            self.told.append(f"{name} {', '.join(path.name for path in paths)}, where none was recorded")
            return
        if len(digests) != len(wanted):
            problem = f"{name} has {len(digests)} file(s), {self.path.name} was made with {len(wanted)}"
        else:
            at = next(i for i, (one, other) in enumerate(zip(digests, wanted, strict=True)) if one != other)
            problem = f"{paths[at]} is not the {name} of {self.path.name}: SHA-256 {digests[at][:12]}..., recorded {wanted[at][:12]}..."
        if not allowed:
            raise ReplayError(f"{problem}; name the same files, or draw with these with --allow-changed-files")
        self.told.append(problem)

    def _check_weights(self, given: SampleOptions) -> None:
        if self.recorded.get("weights") is not None and given.weights is None:
            raise ReplayError(f"{self.path}: was made with weights called {self.recorded['weights']!r}; name their folder with --weights")
        pairs = [("weights", given.weights or DEFAULT_WEIGHTS)] + ([("analyzer", given.analyzer_root)] if given.analyzer_root else [])
        for kind, folder in pairs:
            wanted = self.recorded.get(f"{kind}_sha256")
            digest = weights_digest(folder) if folder.is_dir() else None
            if digest == wanted or digest is None:  # a folder that is not there is told where it is opened
                continue
            what = "the weights" if kind == "weights" else "the face models"
            recorded = f"recorded {wanted[:12]}..." if wanted else "none recorded"
            problem = f"{folder} holds not {what} that {self.path.name} was made with: SHA-256 {digest[:12]}..., {recorded}"
            if not given.allow_changed_files:
                raise ReplayError(f"{problem}; name the same, or draw with these with --allow-changed-files")
            self.told.append(problem)
            self.changed |= {f"{kind}_sha256", "model", "weights"} if kind == "weights" else {"analyzer_sha256", "analyzer_root"}

    def _stored_face(self, scratch: Path) -> Path:
        about: dict[str, Any] = {"embedding": np.asarray(self.recorded["face_vector"], np.float32)}
        if self.recorded.get("face_keypoints") is not None:
            about |= {"kps": np.asarray(self.recorded["face_keypoints"], np.float32), "size": np.asarray(self.recorded["face_size"])}
        np.savez(scratch / "recorded.npz", **about)
        return scratch / "recorded.npz"


def _paths(value: Any) -> tuple[Path, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
    text = "".join(character if character.isprintable() else "?" for character in text)  # a terminal obeys some that are not
    return text if len(text) <= 60 else text[:57] + "..."
