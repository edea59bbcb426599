"""One prediction of the denoising loop: IdentityNet, the UNet and guidance, and what of them may be left out.

Nothing is left out unless asked for, but for nets outside their window: their strength is zero there, so they are not run and
the picture stays what it is. The rest changes the picture:

    guidance window     outside it only the conditional branch of the batch is computed     arXiv 2404.07724
    cache_interval      between every so many calls the UNet runs only its outermost layers and takes what lies within from
                        the call before (DeepCache, arXiv 2312.00858); IdentityNet then gives only the residuals that
                        those layers need, exactly as the whole net would
    control_interval    IdentityNet and other ControlNets run every so many calls; in between their residuals stay

Several people are drawn by one UNet and as many runs of IdentityNet, whose residuals are put together by their masks.

What is left out is a branch of `lax.cond` that does not run. Which calls are whole is traced; only whether something is
carried from call to call, and from where (`Shortcuts`), is static.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from instantid_jax.diffusion.guidance import by_branch, classifier_free, rescale
from instantid_jax.models.encoder import IdentityContext, SiteKeysValues, TextContext
from instantid_jax.models.identitynet import IdentityNet
from instantid_jax.models.unet import Residuals, UNet

__all__ = ["Call", "Fixed", "MaskOfSize", "Memory", "Pace", "Predictor", "Shortcuts", "guide", "plan_calls"]

MaskOfSize = dict[tuple[int, int], Array]
"""The control mask [1 or B, h, w, 1 or people or places] by the height and width (h, w) of the residuals it is for."""
_KEEP, _OUTER, _WHOLE = 0, 1, 2


class Shortcuts(NamedTuple):
    """Which shortcuts a program has; static."""

    cache_branch: int | None = None
    """Number of the skip within which the UNet is taken from an earlier call, 0 being the outermost; None computes it all."""
    keep_control: bool = False
    """Whether residuals may be those of an earlier call."""
    guidance_window: bool = False
    """Whether there may be calls without guidance."""


class Pace(NamedTuple):
    """How the shortcuts are taken; traced."""

    cache_interval: Array
    """Every so many calls the UNet is computed whole; a whole number."""
    control_interval: Array
    """Every so many calls, counted from a net's first, it is run, and whole in the next call that is; a whole number."""
    guidance: Array
    """[calls] bool: which calls are guided."""


class Call(NamedTuple):
    """One call of the networks, as an item that the loop runs over."""

    times: tuple[Array, ...]
    """Embeddings [B, t] of time, pooled text and sizes: the UNet's, then every net's."""
    control_scales: Array
    """[nets, 1 or people or places, 1 or residuals]: strengths, the middle's last. Of nets beside IdentityNet the first person's count."""
    adapter_scale: Array
    """[1 or people or places, 1 or layers]: strengths, layers in the published order (`models.adapter.site_numbers`)."""
    control: Array
    """[nets, 1 or people or places]: whether a net stays as it is, gives its outer residuals, or all (0, 1, 2)."""
    whole: Array
    """Whether the UNet is computed whole."""
    guided: Array
    """Whether all branches of guidance are computed, not the conditional one alone."""


class Fixed(NamedTuple):
    """What stays the same over the calls."""

    text: TextContext
    identity: SiteKeysValues
    contexts: tuple[TextContext, ...]
    """What each net's cross-attention reads; of several people IdentityNet's has their axis after the batch's."""
    features: tuple[Array, ...]
    """Features [B, h, w, c] of each net's picture; of several people IdentityNet's are [B, people, h, w, c]."""
    mask: Array | None
    """The control mask [1 or B, H, W], of several people or places [1 or B, H, W, people or places]."""
    masks: MaskOfSize | None


class Memory(NamedTuple):
    """What is carried from call to call; empty without shortcuts."""

    deep: Array | None
    residuals: tuple[list[Array], ...] | None
    """Of each net, before any strength; the middle last. Of several people IdentityNet's are [B, people, h, w, c]."""


def plan_calls(shortcuts: Shortcuts, pace: Pace | None, times: tuple[Array, ...], control_scales: Array, adapter_scale: Array) -> Call:
    """All calls, each array with a leading axis for them. A call that is the first with guidance, or a net's first, renews all that is carried.

    Strengths may lack their last axes: [calls, nets] and [calls] are the same for all residuals, layers and people.
    """
    control_scales = control_scales.reshape(*control_scales.shape, *(1,) * (4 - control_scales.ndim))
    adapter_scale = adapter_scale.reshape(*adapter_scale.shape, *(1,) * (3 - adapter_scale.ndim))
    index = jnp.arange(adapter_scale.shape[0])
    acting = (control_scales != 0).any(axis=-1)
    if pace is None:
        pace = Pace(jnp.int32(1), jnp.int32(1), jnp.ones_like(index, bool))
    begins = pace.guidance & ~jnp.roll(pace.guidance, 1) & (index > 0)
    first = acting & (jnp.cumsum(acting, axis=0) == 1)
    whole = (index % pace.cache_interval == 0) | begins | first.any(axis=(1, 2))
    turn = (index[:, None, None] - jnp.argmax(acting, axis=0)) % pace.control_interval == 0
    due = acting & _any_since(turn | begins[:, None, None], acting)
    if shortcuts.cache_branch is None:
        control = jnp.where(due, _WHOLE, _KEEP)
    else:  # the inner residuals are for whole calls alone: a net whose turn came since the last one runs whole in the next
        deep = whole[:, None, None] & acting
        control = jnp.where(deep, jnp.where(_any_since(due, deep), _WHOLE, _KEEP), jnp.where(due, _OUTER, _KEEP))
    return Call(times, control_scales, adapter_scale, control, whole, pace.guidance)


def _any_since(marks: Array, calls: Array) -> Array:
    """For every call whether it is marked, or one since the last of `calls` before it is; along the first axis."""
    count = jnp.cumsum(marks, axis=0)
    seen = jax.lax.cummax(jnp.where(calls, count, 0), axis=0)
    return count > jnp.concatenate([jnp.zeros_like(seen[:1]), seen[:-1]])


def conditional_branch(branches: int, call: Call, fixed: Fixed) -> tuple[Call, Fixed]:
    """A call and what is fixed for the last branch of the batch, the conditional one, alone."""

    def last(tree: Any, axis: int = 0) -> Any:
        return _last_branch(branches, tree, axis)

    def of_context(context: TextContext) -> TextContext:
        return TextContext(last(context.keys_values, 1), last(context.mask))

    named = fixed._replace(text=of_context(fixed.text), contexts=tuple(map(of_context, fixed.contexts)))
    named = named._replace(identity=last(fixed.identity, 1), features=last(fixed.features), mask=last(fixed.mask), masks=last(fixed.masks))
    return call._replace(times=last(call.times)), named


def _last_branch(branches: int, tree: Any, axis: int = 0) -> Any:
    """The last of equally long parts along an axis; what is there once for all stays."""

    def cut(x: Array) -> Array:
        size = x.shape[axis]
        return x if size == 1 else jax.lax.slice_in_dim(x, size - size // branches, None, axis=axis)

    return jax.tree.map(cut, tree)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """The networks with their weights, and what stays the same; for use inside a traced function."""

    unet: UNet
    nets: tuple[IdentityNet, ...]
    """IdentityNet, then any other ControlNets."""
    fixed: Fixed
    shortcuts: Shortcuts

    def empty(self, x: Array, call: Call) -> Memory:
        """The memory before the first call, which renews all of it."""
        deep = residuals = None
        if self.shortcuts.keep_control:
            residuals = tuple(_zeros_of(self._shapes(i, x, call)) for i in range(len(self.nets)))
        if self.shortcuts.cache_branch is not None:
            nothing = [_zeros_of(self._shapes(i, x, call)) for i in range(len(self.nets))]
            deep = _zeros_of(jax.eval_shape(lambda x, call: self._whole(x, call, nothing)[1], x, call))
        return Memory(deep, residuals)

    def __call__(self, memory: Memory, x: Array, call: Call) -> tuple[Memory, Array]:
        """The UNet's output [B, h, w, c] for its input `x`, and the memory for the next call."""
        residuals = [self._control(i, None if memory.residuals is None else memory.residuals[i], x, call) for i in range(len(self.nets))]
        kept = tuple(residuals) if self.shortcuts.keep_control else None
        if self.shortcuts.cache_branch is None:
            total = self._total(residuals, call)
            given = {"identity": self._identity(call), "residuals": Residuals(total[:-1], total[-1])}
            output = self.unet.predict(x, call.times[0], self.fixed.text, **given)
            return Memory(None, kept), output
        output, deep = jax.lax.cond(call.whole, self._whole, self._outer, x, call, residuals, memory.deep)
        return Memory(deep, kept), output

    def _whole(self, x: Array, call: Call, residuals: list[list[Array]], _: Array | None = None) -> tuple[Array, Array]:
        assert self.shortcuts.cache_branch is not None
        total = self._total(residuals, call)
        given = {"identity": self._identity(call), "residuals": Residuals(total[:-1], total[-1])}
        return self.unet.predict_whole(x, call.times[0], self.fixed.text, self.shortcuts.cache_branch, **given)

    def _outer(self, x: Array, call: Call, residuals: list[list[Array]], deep: Array) -> tuple[Array, Array]:
        branch = self.shortcuts.cache_branch
        assert branch is not None
        given = {"identity": self._identity(call), "residuals": self._total([r[: branch + 1] for r in residuals], call)}
        return self.unet.predict_outer(x, call.times[0], self.fixed.text, branch, deep, **given), deep

    def _identity(self, call: Call) -> IdentityContext:
        """What the UNet attends to as identity in a call: with strengths by site, [l, people or places], else [l], or one for all layers."""
        several = self._several(0) or call.adapter_scale.shape[0] > 1
        scales, count, start = {}, call.adapter_scale.shape[-1], 0
        for site in self.unet.sites():
            depth = self.fixed.identity[site].k.shape[0]
            own = call.adapter_scale[:, start : start + depth] if count > 1 else call.adapter_scale
            if several:
                scales[site] = jnp.broadcast_to(own.T, (depth, own.shape[0]))
            else:
                scales[site] = own[0] if count > 1 else own[0, 0]
            start += depth
        return IdentityContext(self.fixed.identity, scales, self.fixed.mask)

    def _several(self, i: int) -> bool:
        """Whether net i is run for several people, one after the other."""
        return self.fixed.features[i].ndim == 5

    def _control(self, i: int, kept: list[Array] | None, x: Array, call: Call) -> list[Array]:
        """Residuals of one net before any strength: new ones where they are due, else those that are kept, else zeros.

        For people whose strengths are zero nothing is computed, so that places kept free for more people cost nothing.
        """
        if not self._several(i):
            return self._new_or_kept(i, None, kept, x, call)
        people = jnp.arange(self.fixed.features[i].shape[1])
        before = None if kept is None else [jnp.moveaxis(r, 1, 0) for r in kept]
        new = jax.lax.map(lambda item: self._new_or_kept(i, item[0], item[1], x, call), (people, before))
        return [jnp.moveaxis(r, 0, 1) for r in new]

    def _new_or_kept(self, i: int, person: Array | None, kept: list[Array] | None, x: Array, call: Call) -> list[Array]:
        shapes = jax.eval_shape(lambda x: self._residuals(i, person, x, call), x) if kept is None else kept
        context, feature = self._of(i, person)
        due = jnp.max(call.control[i]) if person is None else call.control[i, person]

        def keep(x: Array) -> list[Array]:
            return [jnp.zeros(s.shape, s.dtype) for s in shapes] if kept is None else kept

        def outer(x: Array) -> list[Array]:
            assert branch is not None
            new = self.nets[i].outer_residuals(x, call.times[1 + i], context, feature, branch + 1)
            return new + keep(x)[branch + 1 :]

        def whole(x: Array) -> list[Array]:
            return self._residuals(i, person, x, call)

        branch = self.shortcuts.cache_branch
        if branch is None:
            return jax.lax.cond(due == _WHOLE, whole, keep, x)
        return jax.lax.switch(due, [keep, outer, whole], x)

    def _residuals(self, i: int, person: Array | None, x: Array, call: Call) -> list[Array]:
        down, mid = self.nets[i].residuals(x, call.times[1 + i], *self._of(i, person))
        return [*down, mid]

    def _of(self, i: int, person: Array | None) -> tuple[TextContext, Array]:
        """Context and features of a net, of one person where there are several."""
        context, features = self.fixed.contexts[i], self.fixed.features[i]
        if person is None:
            return context, features
        return context._replace(keys_values=jax.tree.map(lambda x: x[:, :, person], context.keys_values)), features[:, person]

    def _shapes(self, i: int, x: Array, call: Call) -> list[jax.ShapeDtypeStruct]:
        """Of the residuals of a net, of all people."""
        person, people = (jnp.int32(0), self.fixed.features[i].shape[1:2]) if self._several(i) else (None, ())
        one = jax.eval_shape(lambda x: self._residuals(i, person, x, call), x)
        return [jax.ShapeDtypeStruct((r.shape[0], *people, *r.shape[1:]), r.dtype) for r in one]

    def _total(self, residuals: list[list[Array]], call: Call) -> list[Array]:
        """Residuals of all nets times their strengths and, for IdentityNet, the mask; of several people their sum."""
        total: list[Array] = []
        for i, arrays in enumerate(residuals):
            scales = [call.control_scales[i, :, j if call.control_scales.shape[-1] > 1 else 0] for j in range(len(arrays))]
            scaled = [self._scaled(i, r, scale) for r, scale in zip(arrays, scales, strict=True)]
            total = [a + b for a, b in zip(total, scaled, strict=True)] if total else scaled
        return total

    def _scaled(self, i: int, residual: Array, scale: Array) -> Array:
        """One residual of net i times its strengths [1 or people or places] where they count."""
        if self._several(i):
            return _composed(residual, scale, self.fixed.masks)
        if i == 0 and self.fixed.masks is not None:
            mask = self.fixed.masks[residual.shape[1], residual.shape[2]]
            if mask.shape[-1] > 1:
                return residual * jnp.sum(scale * mask, axis=-1, keepdims=True).astype(residual.dtype)
            residual = residual * mask.astype(residual.dtype)
        return residual * scale[0].astype(residual.dtype)


def guide(predictor: Predictor, branches: int, memory: Memory, x: Array, call: Call, scale: Array, factor: Array) -> tuple[Memory, Array]:
    """The prediction for latents `x` [b, h, w, c] in float32, and the memory for the next call.

    The `branches` of the batch are 1 (no guidance), 2 (unconditional, conditional; `scale` is a scalar) or 3 (between them the text
    alone; `scale` [2] is of text and identity).
    """

    def every(memory: Memory, x: Array) -> tuple[Memory, Array]:
        memory, output = predictor(memory, jnp.concatenate([x] * branches), call)
        unconditional, *text, conditional = jnp.split(output.astype(jnp.float32), branches)
        guided = by_branch(unconditional, text[0], conditional, scale[0], scale[1]) if text else classifier_free(unconditional, conditional, scale)
        return memory, rescale(guided, conditional, factor)

    def alone(memory: Memory, x: Array) -> tuple[Memory, Array]:
        own, fixed = conditional_branch(branches, call, predictor.fixed)
        new, output = dataclasses.replace(predictor, fixed=fixed)(_last_branch(branches, memory), x, own)
        whole = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, old.shape[0] - new.shape[0], 0), memory, new)
        return whole, output.astype(jnp.float32)

    if branches == 1:
        memory, output = predictor(memory, x, call)
        return memory, output.astype(jnp.float32)
    if not predictor.shortcuts.guidance_window:
        return every(memory, x)
    return jax.lax.cond(call.guided, every, alone, memory, x)


def _composed(residual: Array, scale: Array, masks: MaskOfSize | None) -> Array:
    """[B, h, w, c] of everybody's residuals [B, people, h, w, c] and strengths [people]: each where that person's mask is."""
    assert masks is not None, "several people need masks"
    weights = jnp.moveaxis(scale * masks[residual.shape[2], residual.shape[3]], -1, 1)[..., None]
    return jnp.sum(residual * weights.astype(residual.dtype), axis=1)


def _zeros_of(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
