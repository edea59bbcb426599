"""The options of sample.py, and what they mean for the pipeline's call."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from instantid_jax import editing, face_refine
from instantid_jax.control_maps import check_preprocessors
from instantid_jax.diffusion import PRESETS
from instantid_jax.face import read_view
from instantid_jax.parallel.environment import check_joining
from instantid_jax.published import did_you_mean
from instantid_jax.request import read_sampler_options
from instantid_jax.strengths import StrengthError, number_or_text

__all__ = ["NOT_FOR_JOBS", "RUN_OPTIONS", "PresetName", "SampleOptions", "SamplerName", "gathered"]

SamplerName = Literal["euler", "euler_a", "heun", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc", "lcm", "tcd"]
PresetName = Literal["turbo", "lightning-2", "lightning-4", "lightning-8", "hyper-1", "hyper-8", "lcm"]

_PUBLISHED: dict[str, Any] = {
    "prompt": "analog film photo of a person, highly detailed",
    "steps": 30,
    "sampler": "euler",
    "guidance_scale": 5.0,
    "identitynet_scale": 0.8,
    "ip_adapter_scale": 0.8,
}
_SMALL: dict[str, Any] = {
    "prompt": "photo of a person with short brown hair, smiling, blue background",
    "steps": 20,
    "sampler": "euler",
    "guidance_scale": 2.0,
    "identitynet_scale": 1.0,
    "ip_adapter_scale": 1.0,
}


RUN_OPTIONS = ("out", "jobs", "replay", "allow_changed_files", "aot", "aot_json", "distributed", "coordinator", "processes", "process")
"""Options that say where and how, and decide nothing of a picture."""
_EDITING = ("init_image", "strength", "mask_image", "mask_blur", "keep_unmasked", "sample_mode")
_REFINING = ("refine_face", "refine_strength", "refine_margin", "refine_feather")
NOT_FOR_JOBS = ("people", "view", "blend", "blend_steps", "blend_how", "compare", "keep_face_vector", *_EDITING, *_REFINING)
"""Options of a single run: it shows more than one person in one pose, or one in several ways, or changes a picture."""
COMPARED = ("identitynet_scale", "ip_adapter_scale", "control_start", "control_end", "guidance_scale", "identity_guidance_scale")
COMPARED += ("guidance_rescale", "negative_identity_noise", "negative_identity_seed")
"""Options of which `compare` gives other values."""


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """Pictures of a person from one photo and a prompt."""

    weights: Path | None = None  # Folder that `python -m convert_weights import` or train.py wrote; without it the small model that comes along.
    face: tuple[Path, ...] = ()  # One photo of the person or several (averaged), or one .npz/.npy with a face vector and keypoints.
    face_weight: tuple[float, ...] = ()  # How much each of several --face photos counts; all alike by default.
    face_combine: Literal["mean", "normalised", "trimmed"] = "mean"  # How photos become one face: raw mean, unit vectors' mean, or without outliers.
    people: Path | None = None  # Several people in one picture: a TOML or JSON file of faces and places (docs/composing.md), instead of --face.
    pose: Path | None = None  # Photo (or .npz, .json) whose keypoints give the pose; the first face photo's by default.
    view: tuple[str, ...] = ()  # Poses that nobody photographed, as yaw=30,pitch=-10,roll=5,scale=1.2,x=0.5,y=0.4; several make a sheet.
    blend: tuple[Path, ...] = ()  # Photos of other people, one each: a strip of pictures from the --face person to them.
    blend_steps: int = 5  # How many pictures the strip has.
    blend_how: Literal["linear", "spherical"] = "spherical"  # Straight between the faces' embeddings, or along the arc between them.
    compare: tuple[str, ...] = ()  # Another value of a strength each, as "ip_adapter_scale=linear(1, 0)"; several make a sheet (docs/strengths.md).
    prompt: str | None = None  # What to make; by default a film photo. {red|blond} draws both: every combination is a picture (docs/pictures.md).
    negative_prompt: str | None = None  # What to avoid. Leaving it out is not the same as an empty text.
    prompt_weighting: bool = False  # Read (word:1.2), [word] and BREAK in prompts, and prompts of any length.
    style: tuple[str, ...] = ()  # Templates around the prompt, by name: those of the published demo or of --style-file; each a picture.
    style_file: tuple[Path, ...] = ()  # JSON files of more styles, as Fooocus has them: name, prompt with {prompt}, negative_prompt.
    wildcards: Path | None = None  # Folder of text files: __hair__ in a prompt draws every line of hair.txt.
    prompt_file: Path | None = None  # CSV file of prompts instead of --prompt: columns prompt, negative_prompt, seed, style, strengths.
    num_images: int = 1  # How many pictures; picture i has seed + i.
    seed: int = 0  # Seed of the first picture.
    preset: PresetName | None = None  # Steps, sampler and guidance that a few-step model or LoRA is made for; what is given beside it counts first.
    steps: int | None = None  # Denoising steps; by default 30 (20 with the small model).
    sampler: SamplerName | None = None  # How to go from noise to a picture; by default euler.
    sampler_option: tuple[str, ...] = ()  # The sampler's own options as key=value: karras=true, eta=0.5, timestep_spacing=trailing.
    guidance_scale: float | None = None  # Classifier-free guidance, by default 5 (2 with the small model); 1 or less switches it off.
    guidance_rescale: float = 0.0  # Against over-saturation, 0 to 1.
    guidance_start: float = 0.0  # Fraction of the steps at which guidance begins; before it a step costs half.
    guidance_end: float = 1.0  # Fraction of the steps at which it ends, likewise.
    identity_guidance_scale: float | None = None  # Guides the identity apart from the text (--guidance-scale); a step costs half as much again.
    negative_identity_noise: float = 0.0  # What the unconditional half gets as identity: noise this strong instead of zeros; try 0.35.
    negative_identity_seed: int = 0  # Seed of that noise.
    clip_skip: int = 0  # Text layers to leave out, counted from the last but one.
    # Strength of IdentityNet: keypoints and likeness. By default 0.8 (1 with the small model). A number or a schedule over steps, layers and
    # places, as "linear(1, 0.3)", "1 until 0.5 then 0.2", "down=0.8, mid=1" (docs/strengths.md).
    identitynet_scale: float | str | None = None
    # Strength of the image adapter: facial detail; 0.8 (small model: 1), or a schedule likewise. Lower it first when colours burn.
    ip_adapter_scale: float | str | None = None
    control_start: float = 0.0  # Fraction of the steps at which IdentityNet (and other ControlNets) begin to act.
    control_end: float = 1.0  # Fraction of the steps at which they stop acting.
    control_interval: int = 1  # Run IdentityNet (and other ControlNets) at every so many steps, and keep what they gave in between.
    cache_interval: int = 1  # Run the whole UNet at every so many steps, in between its outermost layers alone (DeepCache). 1 is exact.
    cache_branch_id: int = 0  # How many skip connections, less one, those layers have: more is nearer to exact, and slower.
    control_mask: Path | None = None  # Picture that is white where IdentityNet and the image adapter act, black where they do not.
    enhance_non_face_region: bool = False  # Let them act in the pose's face box alone, so that the prompt has the rest.
    init_image: Path | None = None  # A picture to change (image to image). It gives the size, and without --pose the pose of the face in it.
    strength: float | None = None  # How much of it is changed, above 0 to 1; by default 0.8. With --refine-face also 0: only the face is redrawn.
    mask_image: Path | None = None  # Picture that is white where the --init-image is redrawn; where it is black the pixels stay exactly (inpainting).
    mask_blur: float = 0.0  # Radius in pixels of a Gaussian blur of that mask, for a soft edge.
    keep_unmasked: bool = True  # Paste the picture outside the mask back; without it is what the autoencoder makes of it.
    sample_mode: Literal["sample", "argmax"] = "sample"  # Draw the picture's latents from the autoencoder's distribution, or take its mean.
    refine_face: bool = False  # Redraw the face in a second pass at the model's own size and paste it back: for faces that are small in the picture.
    refine_strength: float = face_refine.STRENGTH  # How much of the face is redrawn, above 0 to 1.
    refine_margin: float = face_refine.MARGIN  # Border around the face's box, in parts of its longer side.
    refine_feather: float = face_refine.FEATHER  # Soft part of the pasted square's sides, in parts of them, 0 to 0.5.
    lora: tuple[Path, ...] = ()  # LoRA files (kohya, diffusers, PEFT, LoCon, DoRA) for the UNet and the text towers, merged while loading.
    lora_scale: tuple[float, ...] = ()  # One strength for each --lora; 1 by default.
    allow_unknown_lora_keys: bool = False  # Leave out what is not understood in a LoRA file, with a list, instead of refusing it.
    controlnet: tuple[Path, ...] = ()  # Other ControlNets, folders that `python -m convert_weights import --controlnet` wrote.
    control_image: tuple[Path, ...] = ()  # One picture (depth, edges, ...) for each --controlnet.
    # What makes a map of each: none (it is one; default), canny, canny:LOW,HIGH, depth, image or pose by an ONNX model (docs/composing.md).
    control_preprocess: tuple[str, ...] = ()
    control_model: tuple[Path, ...] = ()  # The ONNX file of each depth, image or pose among them, in order.
    control_scale: tuple[float | str, ...] = ()  # One strength or schedule for each --controlnet; 1 by default.
    height: int | None = None  # Pixels, a multiple of 8; by default from the pose photo, its long side 1280 (64 with the small model).
    width: int | None = None  # Width, likewise; of one alone the other follows from the photo's proportions.
    face_index: int | None = None  # Which face to take, counted from 0 from the left, where a --face photo shows several.
    pose_face_index: int | None = None  # The same for the pose photo.
    analyzer: Literal["antelopev2", "opencv"] | None = None  # Face backend; by default the one that the weights were trained with.
    analyzer_root: Path | None = None  # Folder of the antelopev2 model files.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # Type of weights and arithmetic.
    weights_dtype: Literal["int8"] | None = None  # Hold the kernels of UNet, IdentityNet and ControlNets in 8 bits: half the memory of bfloat16.
    vae_tiling: Literal["even", "diffusers"] | None = None  # Decode large pictures in tiles, against running out of memory: "even" is nearer to none.
    vae_tile_size: int | None = None  # Side of a tile in pixels, a multiple of 32; by default 1024.
    out: Path = Path("outputs")  # Folder for the pictures and the contact sheet. Pictures with other settings stay: new ones get a number.
    format: Literal["png", "jpeg", "webp"] = "png"  # Kind of picture files; the contact sheet is a PNG.
    watermark: bool = True  # Mark the files invisibly as generated; `python -m instantid_jax.watermark FILE` finds the mark.
    keep_face_vector: bool = False  # Store the face's vector and keypoints in the files, which are biometric data; without it hashes alone.

    replay: Path | None = None  # Make the picture of this file again, from the settings that it holds; options beside it count first.
    allow_changed_files: bool = False  # With --replay: draw also where photos or weights are not those that the picture was made with.
    jobs: Path | None = None  # Many pictures: a JSONL file of faces, prompts, seeds and settings (docs/jobs.md). The other options are its defaults.
    aot: str | None = None  # Draw nothing: compile SDXL (or the model of --weights) for TPUs that are not at hand, as v5e:1x1: memory, FLOPs.
    aot_json: Path | None = None  # File for the figures of --aot.
    distributed: bool = False  # With --jobs: share it with other processes, found as train.py finds them, or by the three below.
    coordinator: str | None = None  # Address "host:port" of process 0.
    processes: int | None = None  # How many processes there are.
    process: int | None = None  # Which one this is, from 0.

    @property
    def is_demo(self) -> bool:
        """Whether nothing says whom to draw: then it is the people who come along, and several prompts where none is given."""
        return self.weights is None and not self.face and self.people is None

    def filled(self) -> SampleOptions:
        """With the defaults of the model that is used, where nothing was given."""
        defaults, options = _SMALL if self.weights is None else _PUBLISHED, self.sampler_option
        if self.preset:
            preset = PRESETS[self.preset]
            defaults = defaults | {"steps": preset["num_inference_steps"]} | {name: preset[name] for name in ("sampler", "guidance_scale")}
            if self.sampler in (None, preset["sampler"]):
                own = (f"{name}={value}" for name, value in preset["sampler_options"].items())
                options = (*(option for option in own if option not in options), *options)
        defaults = defaults | ({"strength": editing.STRENGTH} if self.init_image is not None else {})
        given = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.prompt_file is not None:
            given.pop("prompt")
        return dataclasses.replace(self, **given, sampler_option=options)

    @property
    def only_refined(self) -> bool:
        """Whether the picture to begin with stays, but for its face."""
        return self.init_image is not None and self.refine_face and self.strength == 0

    def check(self) -> None:
        """Raises ValueError for options that do not go together."""
        self._check_editing()
        if self.jobs is None:
            if self.distributed:
                raise ValueError("--distributed goes with --jobs, whose pictures the processes share")
            check_joining(False, self.coordinator, self.processes, self.process)
        if len(self.control_image) != len(self.controlnet) or len(self.control_scale) not in (0, len(self.controlnet)):
            raise ValueError("--control-image and --control-scale go with --controlnet: one of each for every ControlNet")
        check_preprocessors(self.control_preprocess, len(self.control_model), len(self.controlnet))
        if self.enhance_non_face_region and self.control_mask is not None:
            raise ValueError("--enhance-non-face-region is a mask of its own; leave out --control-mask")
        if self.enhance_non_face_region and self.is_demo and self.jobs is None:
            raise ValueError("--enhance-non-face-region needs a face to enhance around; name a photo with --face")
        if len(self.face_weight) not in (0, len(self.face)):
            raise ValueError(f"--face-weight has {len(self.face_weight)} weights for {len(self.face)} --face photos; give one for each, or none")
        if not all(0 < weight < math.inf for weight in self.face_weight):
            raise ValueError("--face-weight must be above 0; leave out a photo that is not to count")
        if (self.face_weight or self.face_combine != "mean") and any(path.suffix in (".npz", ".npy") for path in self.face):
            raise ValueError("--face-weight and --face-combine are for photos; a stored face is one already")
        if self.view and (self.pose or self.blend or self.enhance_non_face_region):
            raise ValueError("--view is a pose of its own, and goes with one person; leave out --pose, --blend and --enhance-non-face-region")
        if (self.view or self.blend) and not self.face:
            raise ValueError(f"--{'view' if self.view else 'blend'} needs a person to draw; name a photo with --face")
        if self.compare and (self.view or self.blend or not self.face):
            raise ValueError("--compare shows one person in one pose: name a photo with --face, and leave out --view and --blend")
        self.compared()
        if self.blend and not 2 <= self.blend_steps <= 1000:
            raise ValueError(f"--blend-steps must be between 2 and 1000, not {self.blend_steps}")
        if self.blend_steps != SampleOptions.blend_steps and not self.blend:
            raise ValueError("--blend-steps goes with --blend")
        if self.guidance_rescale and self.guidance_scale is not None and self.guidance_scale <= 1 and not self.compare:
            raise ValueError(f"--guidance-rescale has no meaning without guidance, which --guidance-scale {self.guidance_scale:g} switches off")
        for i, text in enumerate(self.view):
            read_view(text)
            if text in self.view[:i]:
                raise ValueError(f"--view {text} is asked for twice")
        if self.keep_face_vector and (self.people or self.is_demo or self.blend or self.enhance_non_face_region):
            raise ValueError("--keep-face-vector is for one person named by --face; leave out --people, --blend and --enhance-non-face-region")
        if self.replay is not None and self.jobs is not None:
            raise ValueError("--replay makes one picture again; leave out --jobs")
        if self.allow_changed_files and self.replay is None:
            raise ValueError("--allow-changed-files has no meaning without --replay")
        if self.prompt_file is not None and self.prompt is not None:
            raise ValueError("--prompt-file has the prompts; leave out --prompt")
        if self.style_file and not self.style and self.prompt_file is None:
            raise ValueError("--style-file holds styles to choose from; name one with --style")
        if len(self.lora_scale) not in (0, len(self.lora)):
            raise ValueError(f"--lora-scale has {len(self.lora_scale)} strengths for {len(self.lora)} --lora files; give one for each, or none")
        if self.weights is None and self.controlnet:
            raise ValueError("--controlnet needs --weights: the small model has no other ControlNets")
        if self.people is not None:
            beside = ("face", "pose", "view", "blend", "compare", "control_mask", "enhance_non_face_region", "face_index", "pose_face_index")
            if given := next((name for name in beside if getattr(self, name) not in (None, (), False)), None):
                raise ValueError(f"--people names faces and places in its file; leave out --{given.replace('_', '-')}")
        elif not self.face and self.weights is not None:
            raise ValueError("no --face given: name a photo of the person")

    def compared(self) -> list[tuple[str, SampleOptions]]:
        """The option that each text of `compare` names, and the options with its value. Raises ValueError for what is not compared, or no value."""
        found = []
        for text in self.compare:
            name, equals, value = (part.strip() for part in text.partition("="))
            name = name.removeprefix("--").replace("-", "_")
            if not equals or name not in COMPARED:
                raise ValueError(f"--compare takes name=value of {', '.join(COMPARED)}, not {text!r}{did_you_mean(name, COMPARED)}")
            kinds = {"negative_identity_seed": int, "identitynet_scale": number_or_text, "ip_adapter_scale": number_or_text}
            try:
                given = kinds.get(name, float)(value)
            except ValueError as error:
                what = error if isinstance(error, StrengthError) else f"{value!r} is no number"
                raise ValueError(f"--compare {text!r}: {what}") from None
            found.append((name, dataclasses.replace(self, **{name: given}, compare=())))
        return found

    def _check_editing(self) -> None:
        if self.init_image is None:
            beside = [name for name in _EDITING if getattr(self, name) != getattr(SampleOptions, name)]
            if beside:
                raise ValueError(f"--{beside[0].replace('_', '-')} goes with --init-image, the picture that it changes")
        if (self.mask_blur or not self.keep_unmasked) and self.mask_image is None:
            raise ValueError(f"--{'mask-blur' if self.mask_blur else 'no-keep-unmasked'} goes with --mask-image")
        if not self.mask_blur >= 0:
            raise ValueError(f"--mask-blur must be at least 0, got {self.mask_blur}")
        beside = [name for name in _REFINING[1:] if getattr(self, name) != getattr(SampleOptions, name)]
        if beside and not self.refine_face:
            raise ValueError(f"--{beside[0].replace('_', '-')} goes with --refine-face")
        named = "--init-image" if self.init_image is not None else "--refine-face" if self.refine_face else None
        if named is None:
            return
        if self.jobs is not None:
            raise ValueError(f"{named} is not for --jobs; run sample.py once for each picture")
        if self.is_demo:
            raise ValueError(f"{named} needs a person to draw; name a photo with --face")
        if self.only_refined and (self.mask_image is not None or self.view or self.blend):
            given = "mask-image" if self.mask_image is not None else "view" if self.view else "blend"
            raise ValueError(f"--{given} has no meaning at --strength 0, where nothing but the face is redrawn")
        for name, high in (("refine_margin", 4.0), ("refine_feather", 0.5), ("refine_strength", 1.0)):
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must be between 0 and {high:g}, not {getattr(self, name):g}")

    def call(self) -> dict[str, Any]:
        """Arguments of `InstantIDPipeline.__call__`, of options that `filled` gave; pictures and embedding are missing."""
        same = ("prompt", "negative_prompt", "prompt_weighting", "seed", "sampler", "clip_skip", "guidance_scale", "guidance_rescale")
        same += ("guidance_start", "guidance_end", "identity_guidance_scale", "negative_identity_noise", "negative_identity_seed")
        same += ("control_interval", "cache_interval", "cache_branch_id", "vae_tiling", "vae_tile_size")
        return {name: getattr(self, name) for name in (*same, "ip_adapter_scale", "height", "width")} | {
            "num_images_per_prompt": self.num_images,
            "num_inference_steps": self.steps,
            "strength": None if self.only_refined else self.strength,
            "sampler_options": read_sampler_options(self.sampler_option),
            "control_guidance_start": self.control_start,
            "control_guidance_end": self.control_end,
            "controlnet_conditioning_scale": [self.identitynet_scale, *(self.control_scale or (1.0,) * len(self.controlnet))],
        }


def gathered(arguments: Sequence[str] | None = None) -> list[str]:
    """A command line (by default the process's) in which an option of several values that is given again adds to them."""
    several = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(SampleOptions) if str(field.type).startswith("tuple")}
    groups: list[list[str]] = [[]]
    first: dict[str, list[str]] = {}
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        if name in first:
            groups.append(first[name])
            groups[-1] += [value] if equals else []
        elif argument.startswith("--"):
            groups.append([name, value] if name in several and equals else [argument])
            first |= {name: groups[-1]} if name in several else {}
        else:
            groups[-1].append(argument)
    return [argument for group in {id(group): group for group in groups}.values() for argument in group]
