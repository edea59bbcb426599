"""What all samplers share: the table that a denoising loop runs over, and the interface of one step.

A sampler is a hashable value, so it can be a static argument of `jax.jit`. `Sampler.plan` does everything that depends on
the number of steps on the host, in float64, and puts it into a `Plan`: a table with one row for each call of the network.
`Sampler.step` reads its numbers from a row and from nowhere else, so a whole run is one `lax.scan`:

    plan = sampler.plan(30)
    state = sampler.init(plan.init_noise_sigma * noise)

    def body(state, row):
        output = network(sampler.model_input(state, row), row["timestep"])
        return sampler.step(state, output, row, None), None

    state, _ = jax.lax.scan(body, state, plan.rows)      # state.sample is the result

Every row holds "timestep" and the coefficients "alpha" and "sigma" of the network's input (see `schedule`).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from instantid_jax.config import SchedulerConfig
from instantid_jax.diffusion import parameterization
from instantid_jax.diffusion.schedule import SamplerError

__all__ = ["Plan", "Row", "Rows", "Sampler", "State"]

State = Any
"""A NamedTuple of arrays with a field `sample`; which others there are is the sampler's own matter."""

Row = dict[str, Any]
"""One row of `Plan.rows`: float32 scalars, of jax inside a loop, of numpy outside."""
Rows = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""Columns of a table on the host, in float64."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The numbers of one run; a pytree. Two plans with equally many calls have the same structure, so neither compiles anew."""

    rows: dict[str, Any]
    """float32 arrays [num_calls]; what `lax.scan` runs over."""
    init_noise_sigma: Any
    """float32 scalar: standard deviation of the noise that a run from pure noise starts with."""
    steps: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """For each call of the network, the step it belongs to, counted from 0 at the first step that is kept."""
    needs_noise: bool = dataclasses.field(metadata={"static": True})
    """Whether `Sampler.step` wants fresh noise at every call."""

    @property
    def num_calls(self) -> int:
        """How often the network runs."""
        return len(self.steps)

    @property
    def num_steps(self) -> int:
        """How many steps the user asked for, less those skipped at the start."""
        return self.steps[-1] + 1


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A way from noise to a sample. Subclasses give the table (`_table`) and the step in terms of the clean sample (`_update`)."""

    config: SchedulerConfig
    calls_per_step: ClassVar[int] = 1

    @property
    def needs_noise(self) -> bool:
        """Whether every step draws fresh noise."""
        return False

    def plan(self, num_inference_steps: int, start: int = 0) -> Plan:
        """The table of a run of `num_inference_steps`, without its first `start` steps (image to image).

        Raises:
            SamplerError: a number of steps that the schedule does not have, or `start` outside 0..num_inference_steps - 1.
        """
        if num_inference_steps < 1:
            raise SamplerError(f"num_inference_steps={num_inference_steps}: at least 1 is needed")
        if not 0 <= start < num_inference_steps:
            raise SamplerError(f"start={start} must be in 0..{num_inference_steps - 1}, so that at least one of the steps is left")
        rows = self._table(num_inference_steps, start)
        if self.config.prediction_type == "epsilon" and not np.all(rows["alpha"]):
            raise SamplerError(
                f"{type(self).__name__}: the first time is pure noise (rescale_betas_zero_snr), where epsilon says nothing about the picture; use a "
                "v_prediction model, or a timestep_spacing that leaves that time out"
            )
        first = start * self.calls_per_step
        return Plan(
            rows={name: np.asarray(column[first:], np.float32) for name, column in rows.items()},
            init_noise_sigma=np.float32(self._init_noise_sigma(rows)),
            steps=tuple(call // self.calls_per_step for call in range(len(rows["timestep"]) - first)),
            needs_noise=self.needs_noise,
        )

    def model_input(self, state: State, row: Row) -> jax.Array:
        """What the network sees at this row: the state's sample with unit variance, in the sample's dtype."""
        return self._scaled(state.sample, row).astype(state.sample.dtype)

    def step(self, state: State, model_output: jax.Array, row: Row, noise: jax.Array | None) -> State:
        """One call's worth of progress.

        Args:
            state: from `init` or from the step before.
            model_output: the network's prediction for `model_input(state, row)`, shaped like the sample, any float dtype.
            row: one row of `Plan.rows`.
            noise: unit normal, shaped like the sample; None unless `plan.needs_noise`.

        Returns:
            the next state. Computed in float32; the sample keeps its dtype.

        Raises:
            SamplerError: noise is needed and not given.
        """
        if self.needs_noise and noise is None:
            raise SamplerError(f"{type(self).__name__}: this sampler needs noise at every step (plan.needs_noise is True) and got None")
        dtype = state.sample.dtype
        state = state._replace(sample=state.sample.astype(jnp.float32))
        clean = parameterization.x0(self.config.prediction_type, self._scaled(state.sample, row), model_output, row["alpha"], row["sigma"])
        state = self._update(state, clean, row, jnp.float32(0) if noise is None else noise.astype(jnp.float32))
        return state._replace(sample=state.sample.astype(dtype))

    def add_noise(self, sample: jax.Array, noise: jax.Array, plan: Plan) -> jax.Array:
        """A clean `sample` with unit normal `noise` at the level where `plan` starts; `init` takes it as it is."""
        return self.noised(sample, noise, {name: column[0] for name, column in plan.rows.items()})

    def noised(self, sample: jax.Array, noise: jax.Array, row: Row) -> jax.Array:
        """The same at the level of a row: what a state's sample is there if the network sees nothing but `sample`."""
        noisy = parameterization.add_noise(sample, noise, row["alpha"], row["sigma"])
        return self._unscaled(noisy, row).astype(sample.dtype)

    @abc.abstractmethod
    def init(self, sample: jax.Array) -> State:
        """The first state. `sample` is already at the first noise level: init_noise_sigma times noise, or from `add_noise`."""

    @abc.abstractmethod
    def _table(self, steps: int, start: int) -> Rows:
        """One row a call for the whole run; `start` is only where the sampler's memory begins."""

    @abc.abstractmethod
    def _update(self, state: State, clean: jax.Array, row: Row, noise: jax.Array) -> State:
        """The next state from the network's opinion of the clean sample; all float32. `noise` is a plain 0 where none is drawn."""

    # Samplers work on the variance preserving sample unless they say otherwise.

    def _init_noise_sigma(self, rows: Rows) -> float:
        return 1.0

    def _scaled(self, sample: jax.Array, row: Row) -> jax.Array:
        return sample

    def _unscaled(self, noisy: jax.Array, row: Row) -> jax.Array:
        return noisy
