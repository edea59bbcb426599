"""What a training run is, as one frozen dataclass: a recipe in ``configs/`` is a short function that returns it.

Every default is the paper's where the paper says it (arXiv 2401.07519, section 4.1), otherwise the plainest choice. An
ablation changes one field with `dataclasses.replace` or one option on the command line.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from instantid_jax.config import ComputeConfig, ConfigError, ModelConfig
from instantid_jax.data.loader import LoaderConfig
from instantid_jax.models.recognizer import RecognizerConfig
from instantid_jax.published import did_you_mean
from instantid_jax.training.checks import check_choices, check_patterns, check_ranges, prepared_folder

__all__ = [
    "CheckpointConfig",
    "GuardConfig",
    "InitConfig",
    "LogConfig",
    "LossConfig",
    "MeshConfig",
    "OptimizerConfig",
    "StageConfig",
    "TrainConfig",
    "ValidationConfig",
]

INSTANTID = (r"^identitynet/", r"^adapter/", r"^resampler/")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """What is learned, and through which parts of the model."""

    objective: Literal["denoise", "reconstruct", "recognize"] = "denoise"
    """denoise: the diffusion loss. reconstruct: the autoencoder's. recognize: embeddings from latents, for the identity loss."""
    trainable: tuple[str, ...] = INSTANTID
    """Regular expressions over "network/path"; what matches none is frozen. To train the UNet's cross-attention queries too,
    add r"^unet/.*/attn2/to_q/"."""
    identitynet: bool = True
    """Whether IdentityNet takes part."""
    adapter: bool = True
    """Whether the image adapter takes part."""
    identitynet_context: Literal["identity", "text"] = "identity"
    """What IdentityNet's cross-attention reads."""

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that this stage runs."""
        if self.objective == "reconstruct":
            return ("vae",)
        if self.objective == "recognize":
            return ("vae", "recognizer")
        found = ["vae", "text_encoder", "text_encoder_2", "unet"]
        if self.identitynet:
            found.append("identitynet")
        if self.adapter:
            found.append("adapter")
        if self.adapter or (self.identitynet and self.identitynet_context == "identity"):
            found.append("resampler")
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights come from. Nothing is initialised silently: every network is named in one of the three ways."""

    weights: str | None = None
    """Folder of converted or trained weights; whatever is not listed below is read from it."""
    from_base: tuple[str, ...] = ("identitynet", "adapter")
    """identitynet: the UNet's encoder (with `add_embedding`) and zero convolutions; adapter: `to_k_ip`, `to_v_ip` from `to_k`, `to_v`."""
    random: tuple[str, ...] = ("resampler",)
    """Networks that start from random weights."""
    condition_gain: float | None = None
    """Variance gain of IdentityNet's keypoint convolutions. None is the published start (framework default, last layer zero), which
    on a small budget hardly begins to learn; 2.5 keeps the signal's size through the six SiLU layers, and the last layer starts at half size."""
    latent_logvar: float | None = None
    """Log-variance at which the latents of a random autoencoder start. None starts near 0, where the noise drowns the picture and takes
    thousands of steps to shrink; -8 starts almost deterministic."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective's shape. The defaults are the paper's plain noise-prediction loss (its equation 4)."""

    weighting: Literal["none", "min_snr", "clipped_v"] = "none"
    """Weight over noise levels (`diffusion.loss`)."""
    min_snr_gamma: float = 5.0
    clipped_v_limit: float = 8.0
    noise_offset: float = 0.0
    """Strength of noise that is constant over a picture, one number a channel; 0.05 is usual."""
    input_perturbation: float = 0.0
    """Strength of extra noise in the network's input that the target does not contain (arXiv 2301.11706); 0.1 is usual."""
    timesteps: Literal["uniform", "stratified"] = "uniform"
    """stratified spreads a batch's times evenly: the same distribution, less variance."""
    timestep_bias: Literal["none", "earlier", "later", "range"] = "none"
    """Draw some times more often: low noise (earlier), high noise (later), or those in `timestep_bias_range`."""
    timestep_bias_portion: float = 0.25
    """How large the preferred part is, for earlier and later."""
    timestep_bias_range: tuple[int, int] = (0, 1000)
    timestep_bias_factor: float = 1.0
    """How many times likelier a preferred time is."""
    face_weight: float = 0.0
    """Extra weight of the loss inside the face box; 0 is none."""
    identity_weight: float = 0.0
    """Beyond the paper: weight of 1 - cos between the embedding that a small frozen recogniser reads in the predicted clean latent and the
    reference's, times alpha_t^`identity_power` (a prediction from pure noise shows no face). Needs trained "recognizer" weights."""
    identity_power: float = 2.0
    """How fast the identity loss fades with noise: 2 counts by the picture's share of the variance, 1 by its share of the amplitude,
    which asks more of the high noise levels, where the shape of a face is decided."""
    kl_weight: float = 1e-9
    """Autoencoder: weight of the KL divergence, summed over a picture's latents, beside errors that are means over its pixels."""
    gradient_weight: float = 0.5
    """Autoencoder: weight of the L1 error of horizontal and vertical differences, which keeps edges sharp."""
    crop: int | None = None
    """Autoencoder: train on random crops of this many pixels; None is whole pictures."""
    shift: int = 0
    """Recogniser of latents: move every picture at random by up to so many latent pixels each way, so that it learns faces, not pictures."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule."""

    name: Literal["adamw", "adafactor", "lion", "prodigy"] = "adamw"
    learning_rate: float = 1e-5
    """Peak; for Prodigy leave it at 1."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    """Steps of linear warm-up."""
    hold: float = 0.0
    """Part of the steps after the warm-up before cosine or linear decay begins."""
    final: float = 0.0
    """Learning rate at the end of a decay, as a part of the peak."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Not applied to biases, norms and embeddings."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """(pattern, factor): learning rate of matching parameters relative to the others; the first match counts."""
    ema: float | None = None
    """Decay of the moving average of the trained weights, e.g. 0.9999; None keeps none. It is min(ema, (1 + n) / (10 + n)) after n steps."""
    accumulate: int = 1
    """A batch is split into so many parts whose gradients are added: the same result in less memory."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; the product of all four is the number of devices."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = 1
    """Slices that a slower network joins, or processes where the devices know no slices: each holds data x fsdp x tensor devices and
    its part of the batch; only gradients cross."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved and what is kept. The newest is always kept until a newer one is complete."""

    every: int = 1000
    keep: int = 2
    """How many of the latest are kept."""
    keep_best: int = 0
    """How many of the best by `metric` are kept besides."""
    metric: str = "validation/loss"
    """What ranks them: the smaller the better, but of a `_gap` the larger."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What happens when a step goes wrong: loss or gradient not finite, or a loss beyond `spike` times its recent mean."""

    policy: Literal["skip", "rewind", "stop"] = "skip"
    """skip: the update is not applied. rewind: back to the last checkpoint, and past the bad batch. stop: exit with an error."""
    spike: float | None = None
    """None ignores spikes."""
    limit: int = 10
    """So many bad steps in a row end the run whatever the policy."""


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is told while it runs."""

    every: int = 50
    """Steps between console lines and JSONL records."""
    tensorboard: bool = False
    bucket_count: int = 4
    """Noise-level ranges that the loss is told for."""


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Held-out loss with fixed noise, and its change with the wrong person and the wrong pose; pictures of fixed people."""

    every: int | None = None
    """Steps between validations; None is never."""
    batches: int = 4
    split: str = "validation"
    samples_every: int | None = None
    """Steps between grids of pictures; None is never."""
    samples: int = 8
    """People in the grid."""
    sample_steps: int = 20
    guidance_scale: float = 3.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    model: ModelConfig
    steps: int = 10_000
    seed: int = 0
    """Decides everything random: order, dropout, times, noise, random weights. `loader.seed` is added to it for order and dropout."""
    data: tuple[str, ...] = ("data",)
    """Folders of prepared data sets (``python -m instantid_jax.data.prepare``); several are one data set made in parts."""
    prepare: tuple[str, ...] = ()
    """What makes the data: arguments of ``python -m instantid_jax.data.prepare``, one line a command. train.py runs, in order, those
    that make what `data` names and is not there, and what they need."""
    data_split: str = "train"
    out: str = "runs/instantid"
    """Folder of the run: checkpoints, log, samples, exported weights."""
    loader: LoaderConfig = dataclasses.field(default_factory=LoaderConfig)
    stage: StageConfig = StageConfig()
    init: InitConfig = InitConfig()
    loss: LossConfig = LossConfig()
    recognizer: RecognizerConfig = dataclasses.field(default_factory=RecognizerConfig)
    """The network of the "recognize" objective and of the identity loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """How frozen weights are stored; trained ones, and the autoencoder's, are always float32."""
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    validation: ValidationConfig = ValidationConfig()

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that the run needs."""
        critic = self.loss.identity_weight > 0 and "recognizer" not in self.stage.networks
        return (*self.stage.networks, "recognizer") if critic else self.stage.networks

    @property
    def measures(self) -> tuple[str, ...]:
        """What validation measures in this stage (`step.make_evaluation`)."""
        found = ["loss"]
        if "resampler" in self.stage.networks:
            found.append("wrong_person_gap")
        if "identitynet" in self.stage.networks and self.loader.keypoint_style != "none":
            found.append("wrong_pose_gap")
        return tuple(f"validation/{name}" for name in found)

    @property
    def data_loader(self) -> LoaderConfig:
        """The loader's settings with the run's seed, and keypoints drawn as the model wants them."""
        return dataclasses.replace(self.loader, seed=self.seed + self.loader.seed, keypoint_scale=self.model.keypoint_scale)

    def __post_init__(self) -> None:
        check_choices(self, "TrainConfig")
        check_ranges(self, "TrainConfig")
        check_patterns("TrainConfig: stage.trainable", self.stage.trainable)
        check_patterns("TrainConfig: optimizer.multipliers", (pattern for pattern, _ in self.optimizer.multipliers))
        for line in self.prepare:
            prepared_folder(line)
        self._check_init()
        self._check_parts()
        self._check_validation()

    def _check_init(self) -> None:
        init = self.init
        known = ("vae", "text_encoder", "text_encoder_2", "unet", "identitynet", "adapter", "resampler", "recognizer")
        for field, names, allowed in (("from_base", init.from_base, ("identitynet", "adapter")), ("random", init.random, known)):
            for name in names:
                if name not in allowed:
                    raise ConfigError(f"TrainConfig: init.{field} knows {', '.join(allowed)}, not {name!r}{did_you_mean(name, allowed)}")
        if twice := sorted(set(init.from_base) & set(init.random)):
            raise ConfigError(f"TrainConfig: init names {twice[0]!r} twice: from_base and random")

    def _check_parts(self) -> None:
        batch, parts, loss, optimizer = self.loader.global_batch, self.optimizer.accumulate, self.loss, self.optimizer
        shards = self.mesh.dcn_data * self.mesh.data * self.mesh.fsdp
        if batch % (parts * shards):
            raise ConfigError(f"TrainConfig: loader.global_batch {batch} must be divisible by accumulate x dcn_data x data x fsdp = {parts * shards}")
        if optimizer.warmup > self.steps:
            raise ConfigError(f"TrainConfig: optimizer.warmup {optimizer.warmup} is longer than the run of {self.steps} steps")
        if optimizer.name == "prodigy" and optimizer.learning_rate < 0.01:
            found = f"1 is usual, got {optimizer.learning_rate}"
            raise ConfigError(f"TrainConfig: prodigy finds the step size itself; optimizer.learning_rate is a factor, {found}")
        low, high = loss.timestep_bias_range
        total = self.model.scheduler.num_train_timesteps
        if loss.timestep_bias == "range" and not 0 <= low < high <= total:
            raise ConfigError(f"TrainConfig: loss.timestep_bias_range must lie in 0 to {total}, got {low} to {high}")
        if self.stage.objective == "reconstruct" and self.loader.cached_latents:
            raise ConfigError("TrainConfig: stage.objective reconstruct needs pictures; set loader.cached_latents to False")
        if self.loader.keypoint_scale not in (LoaderConfig.keypoint_scale, self.model.keypoint_scale):
            raise ConfigError(
                f"TrainConfig: keypoints are drawn at model.keypoint_scale, which is {self.model.keypoint_scale:g}; set that one, "
                f"not loader.keypoint_scale, got {self.loader.keypoint_scale:g}"
            )
        if loss.crop is not None and loss.crop % self.model.vae.downscale:
            raise ConfigError(f"TrainConfig: loss.crop must be a multiple of the autoencoder's {self.model.vae.downscale} pixels, got {loss.crop}")
        pure = self.model.scheduler.rescale_betas_zero_snr and self.model.scheduler.prediction_type == "epsilon"
        if loss.identity_weight and pure:
            raise ConfigError("TrainConfig: loss.identity_weight needs a clean latent at every time; noise prediction at zero SNR gives none")
        if loss.weighting == "clipped_v" and self.model.scheduler.prediction_type != "epsilon":
            raise ConfigError("TrainConfig: loss.weighting clipped_v is for networks that predict noise; this model predicts v")

    def _check_validation(self) -> None:
        check = self.checkpoint
        if check.keep_best and (self.validation.every is None or check.every % self.validation.every):
            raise ConfigError(
                f"TrainConfig: checkpoint.keep_best ranks checkpoints by {check.metric}, so checkpoint.every ({check.every}) must be a multiple of "
                f"validation.every ({self.validation.every})"
            )
        known = ("validation/loss", "validation/wrong_person_gap", "validation/wrong_pose_gap")
        if check.metric not in known:
            raise ConfigError(f"TrainConfig: checkpoint.metric {check.metric!r} is none of {', '.join(known)}{did_you_mean(check.metric, known)}")
        if check.keep_best and check.metric not in self.measures:
            raise ConfigError(f"TrainConfig: checkpoint.metric {check.metric} is not measured in this stage; it has {', '.join(self.measures)}")
        smallest = min(min(size) for size in self.loader.sizes)
        if self.stage.objective == "denoise" and self.validation.samples_every is not None and smallest < 64:
            raise ConfigError(f"TrainConfig: validation.samples_every needs pictures of 64 pixels or more; the loader gives {smallest}")
        if self.stage.objective == "recognize" and self.validation.samples_every is not None:
            raise ConfigError("TrainConfig: the recognize objective makes no pictures; set validation.samples_every to None")
