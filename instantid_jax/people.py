"""Several people in one picture: for each an identity, a region and keypoints.

The regions are weights from 0 to 1 for every pixel. Each person's identity reaches the picture through them alone: the adapter's
attention to the identity and IdentityNet's residuals are multiplied by them and summed. Where regions overlap, and their sum would
be above 1, they are divided by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from instantid_jax.denoise import Conditions
from instantid_jax.face import FaceError, prepare_control_image
from instantid_jax.request import PipelineError, Request, check_number, check_picture, check_whole

__all__ = ["MOST_PEOPLE", "People", "Person", "check_people", "control_pictures", "with_people"]

MOST_PEOPLE = 4
"""For how many people a picture is compiled, where no other bound is given."""


@dataclasses.dataclass(frozen=True, eq=False)
class Person:
    """One of several people in a picture."""

    image_embeds: Any
    """Raw face embedding [d], or [k, d] photos of the person, which are averaged."""
    image: Any
    """The person's own keypoints on a canvas of the whole picture, as `image` of the pipeline."""
    region: Any
    """Where the person is: a mask or a box, as `control_mask` of the pipeline."""
    identitynet_scale: float = 1.0
    """Times the call's `controlnet_conditioning_scale`."""
    ip_adapter_scale: float = 1.0
    """Times the call's `ip_adapter_scale`."""


class People(NamedTuple):
    """What the networks take, with free places up to the bound, whose strengths and masks are zero."""

    embeddings: np.ndarray
    """[people, d] float32."""
    images: np.ndarray
    """[people, H, W, 3] float32 in [0, 1]."""
    masks: np.ndarray
    """[H, W, people] float32 in [0, 1], their sum nowhere above 1."""
    scales: np.ndarray
    """[people, 2] float32: strengths of IdentityNet and of the adapter, beside the call's."""


def check_people(people: Any, most: Any, request: Request, size: tuple[int, int], width: int) -> People:
    """Checks people for pictures of ``size = (height, width)`` and embeddings of `width` values. Raises `PipelineError`, naming the person."""
    places = check_whole("max_people", most, 1, 64)
    if not isinstance(people, Sequence) or not people or not all(isinstance(person, Person) for person in people):
        raise PipelineError("people must be a list of instantid_jax.Person, at least one")
    if len(people) > places:
        raise PipelineError(f"people has {len(people)} people, max_people is {places}; raise it, which compiles anew")
    found = People(
        np.zeros((places, width), np.float32),
        np.zeros((places, *size, 3), np.float32),
        np.zeros((*size, places), np.float32),
        np.zeros((places, 2), np.float32),
    )
    for i, person in enumerate(people):
        try:
            found.embeddings[i] = request.embeddings(person.image_embeds, width)
            found.images[i] = prepare_control_image(check_picture("image", person.image), size[1], size[0])
            mask = request.mask(person.region, size)
            if mask is None or not mask.any():
                raise PipelineError("region is empty; give a mask or a box")
            found.masks[..., i] = mask
            for j, name in enumerate(("identitynet_scale", "ip_adapter_scale")):
                found.scales[i, j] = check_number(name, getattr(person, name), -10, 10)
        except (PipelineError, FaceError) as error:
            raise PipelineError(f"person {i} (counted from 0): {error}") from error
    total = np.maximum(found.masks.sum(axis=-1, keepdims=True), 1.0)
    return found._replace(masks=found.masks / total)


def control_pictures(people: Any, image: Any, image_embeds: Any, control_mask: Any) -> Any:
    """The control pictures of a call with several people; the first person's stands for everybody's. Raises `PipelineError`."""
    if image_embeds is not None or control_mask is not None:
        raise PipelineError("people have image_embeds and regions of their own; leave out image_embeds and control_mask")
    first = next((person.image for person in people if isinstance(person, Person)), None) if isinstance(people, Sequence) else None
    if first is None:
        raise PipelineError("people must be a list of instantid_jax.Person, at least one")
    return [first, *(image if isinstance(image, list | tuple) else [] if image is None else [image])]


def with_people(conditions: Conditions, people: People) -> Conditions:
    """Conditions, whose identity tokens are the people's, with everybody's keypoints, regions and strengths."""
    control, adapter = conditions.control_scales[:, :, None, None], conditions.adapter_scale[:, None, None]
    own, rest = control[:, :1] * people.scales[None, None, :, :1], control[:, 1:]
    return conditions._replace(
        images=(jnp.asarray(people.images)[None], *conditions.images[1:]),
        control_scales=jnp.concatenate([own, jnp.broadcast_to(rest, (*rest.shape[:2], *own.shape[2:]))], axis=1),
        adapter_scale=adapter * people.scales[None, :, 1:],
        control_mask=jnp.asarray(people.masks)[None],
    )
