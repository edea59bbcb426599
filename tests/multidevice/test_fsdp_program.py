"""What the training step moves and computes when eight devices share the weights, read from the compiled program."""

import json
from pathlib import Path

import launched
import pytest

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_weights_are_gathered_gradients_scattered_and_nothing_else_moves(remat: str) -> None:
    (out,) = launched.finish(launched.start(WORKER, remat, 8))
    told = json.loads(out.splitlines()[-1])
    moved = told["collectives"]
    # Weights forward and backward, gradients once. Text towers and autoencoder are not differentiated.
    bound = told["trained"] + told["frozen"] + told["trained"] + told["unet"] + told["trained"]
    assert sum(moved.values()) <= 1.3 * bound, (moved, bound)
    assert moved["all-gather"] >= 1.2 * (told["trained"] + told["frozen"]), "the backward pass keeps gathered weights"
    assert moved.get("all-to-all", 0) + moved.get("collective-permute", 0) <= 0.01 * bound, moved
    # Weight gradients of the frozen UNet would be half as much again.
    assert told["flops"] <= {"none": 1.1, "blocks": 1.5}[remat] * told["minimum"]
