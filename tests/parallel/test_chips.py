"""Names of topologies; what needs the TPU's compiler is in test_aot.py."""

import pytest

from instantid_jax.parallel import aot
from instantid_jax.parallel.chips import CHIPS, TopologyError, parse_topology


def test_names() -> None:
    assert parse_topology("v5e:4x4") == ("v5e", (4, 4), 1)
    assert parse_topology("2*v5p:2x2x4") == ("v5p", (2, 2, 4), 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:2x2", "no topology known here"),
        ("v5e", "no topology known here"),
        ("v5e:2x2x2", "has 2 axes"),
        ("v5p:4x4", "has 3 axes"),
        ("v5e:0x4", "must be at least 1"),
        ("0*v5e:4x4", "must be at least 1"),
        ("v5e:1000x1000", "has 1,000,000 chips; the largest slice of a v5e has 256"),
    ],
)
def test_what_is_no_topology_is_refused_with_examples(name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse_topology(name)


@pytest.mark.parametrize("name", CHIPS)
def test_peaks_are_whole_multipliers(name: str) -> None:
    """Operations a cycle are two for each multiplier of 128 x 128 or 256 x 256 units."""
    assert CHIPS[name].flops_per_cycle / 2 / 128**2 == pytest.approx(round(CHIPS[name].flops_per_cycle / 2 / 128**2), rel=0.02)


def test_a_wrong_topology_is_a_wrong_option(capsys):
    assert aot.main(["--topology", "v9x:4x4", "--program", "unet"]) == 2
    assert capsys.readouterr().err.startswith("aot: 'v9x:4x4' is no topology known here; known are ")
