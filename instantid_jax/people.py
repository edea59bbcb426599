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
from instantid_jax.people_file import MOST
from instantid_jax.request import PipelineError, Request, check_picture, check_strength, check_whole

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
    identitynet_scale: Any = 1.0
    """Times the call's `controlnet_conditioning_scale`: a number, or a schedule over steps and layers as there (`strengths`)."""
    ip_adapter_scale: Any = 1.0
    """Times the call's `ip_adapter_scale`, likewise."""


class People(NamedTuple):
    """What the networks take, with free places up to the bound, whose strengths and masks are zero."""

    embeddings: np.ndarray
    """[people, d] float32."""
    images: np.ndarray
    """[people, H, W, 3] float32 in [0, 1]."""
    masks: np.ndarray
    """[H, W, people] float32 in [0, 1], their sum nowhere above 1."""
    control_scales: np.ndarray
    """[calls, people, 1 or residuals] float32: strengths of IdentityNet, beside the call's."""
    adapter_scales: np.ndarray
    """[calls, people, 1 or layers] float32: strengths of the image adapter, beside the call's."""


def check_people(people: Any, most: Any, request: Request, size: tuple[int, int], width: int) -> People:
    """Checks people for pictures of ``size = (height, width)`` and embeddings of `width` values. Raises `PipelineError`, naming the person."""
    places = check_whole("max_people", most, 1, MOST)
    if not isinstance(people, Sequence) or not people or not all(isinstance(person, Person) for person in people):
        raise PipelineError("people must be a list of instantid_jax.Person, at least one")
    if len(people) > places:
        raise PipelineError(f"people has {len(people)} people, max_people is {places}; raise it, which compiles anew")
    found = People(
        np.zeros((places, width), np.float32),
        np.zeros((places, *size, 3), np.float32),
        np.zeros((*size, places), np.float32),
        *(np.zeros((request.whole.num_calls, places, 1), np.float32) for _ in range(2)),
    )
    tables: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i, person in enumerate(people):
        try:
            found.embeddings[i] = request.embeddings(person.image_embeds, width)
            found.images[i] = prepare_control_image(check_picture("image", person.image), size[1], size[0])
            mask = request.mask(person.region, size)
            if mask is None or not mask.any():
                raise PipelineError("region is empty; give a mask or a box")
            found.masks[..., i] = mask
            for j, name in enumerate(("identitynet_scale", "ip_adapter_scale")):
                strength = check_strength(name, getattr(person, name), request.plan.steps, request.places[j])
                if strength.outside:
                    raise PipelineError(f"{name} says something of the outside; each of several people acts in the own region")
                tables[j].append(request.filled(strength.table(request.plan.steps, request.places[j])[:, 0]))
        except (PipelineError, FaceError) as error:
            raise PipelineError(f"person {i} (counted from 0): {error}") from error
    if any(strength and strength.outside for strength in (*request.scales, request.ip_adapter_scale)):
        raise PipelineError("a strength outside has no meaning with people, each of whom acts in the own region; give strengths without")
    total = np.maximum(found.masks.sum(axis=-1, keepdims=True), 1.0)
    control, adapter = (_in_places(table, places) for table in tables)
    return found._replace(masks=found.masks / total, control_scales=control, adapter_scales=adapter)


def _in_places(tables: list[np.ndarray], places: int) -> np.ndarray:
    """[calls, places, 1 or layers] of each person's [calls, 1 or layers]; free places are zero."""
    given = np.stack(np.broadcast_arrays(*tables), axis=1)
    return np.pad(given, ((0, 0), (0, places - len(tables)), (0, 0)))


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
    control = conditions.control_scales
    own, rest = control[:, :1] * people.control_scales[:, None], control[:, 1:]
    return conditions._replace(
        images=(jnp.asarray(people.images)[None], *conditions.images[1:]),
        control_scales=jnp.concatenate([own, jnp.broadcast_to(rest, (*rest.shape[:2], *own.shape[2:]))], axis=1),
        adapter_scale=conditions.adapter_scale * people.adapter_scales,
        control_mask=jnp.asarray(people.masks)[None],
    )
