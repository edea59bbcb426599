"""The compiler's account of a small program has not drifted from what docs/scale.json holds. Needs libtpu, no TPU."""

import dataclasses
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import jax
import pytest

from instantid_jax.parallel import aot
from instantid_jax.parallel.aot_programs import fsdp_bound
from instantid_jax.parallel.chips import TopologyError, parse_topology, topology_devices
from instantid_jax.parallel.mesh import make_mesh
from instantid_jax.training.program import Program
from instantid_jax.training.recipes import load_recipe

BOUND = 19.938
"""GiB."""
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
scale = importlib.import_module("scale")
RECORDED = json.loads((ROOT / "docs/scale.json").read_text(encoding="utf-8"))


def test_every_recorded_case_has_the_figures_that_are_promised() -> None:
    wanted = {"hbm_peak_bytes", "hbm_limit_bytes", "flops", "flops_minimum", "compile_seconds", "estimated_cycles", "collective_bytes"}
    assert set(scale.CASES) >= RECORDED.keys() >= {name for name in scale.CASES if name.startswith("small_")}
    recorded = {(scale.CASES[name].program, scale.CASES[name].topology) for name in RECORDED if RECORDED[name]["fits"]}
    assert {("sample", "v5e:1x1"), ("sample", "v5e:4x4")} <= recorded
    assert {("train", topology) for topology in ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:2x2x2", "2*v5e:4x4")} <= recorded
    for name, result in RECORDED.items():
        assert wanted <= result.keys(), name
        assert result["fits"] == (result["hbm_peak_bytes"] <= result["hbm_limit_bytes"]), name
        assert result["flops"] is None or result["flops"] >= result["flops_minimum"], name


def test_full_size_training_leaves_nothing_large_whole_and_knows_its_bound() -> None:
    """InstantID on SDXL over 16 devices: the least that must be gathered and summed, and the largest array that is not split."""
    mesh = jax.sharding.AbstractMesh((1, 16, 1), ("data", "fsdp", "tensor"))
    config = load_recipe(str(ROOT / "configs/instantid.py"))
    config = dataclasses.replace(config, loader=dataclasses.replace(config.loader, global_batch=16))
    program = Program(config, mesh)
    bound, whole = fsdp_bound(program.abstract_state, program.abstract_frozen, "bfloat16", mesh)
    assert bound / 2**30 == pytest.approx(BOUND, rel=1e-3)
    assert whole <= 4 * 2**20
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in (program.abstract_state.parameters | program.abstract_frozen).items()}
    way = sum(sizes[name] for name in ("unet", "identitynet", "adapter", "resampler"))
    trained = sum(sizes[name] for name in ("identitynet", "adapter", "resampler"))
    assert 0.96 < bound / (2 * (sum(sizes.values()) + way + trained)) < 1  # small ones stay whole, the text is projected once
    assert fsdp_bound(program.abstract_state, program.abstract_frozen, "float32", mesh)[0] == 2 * bound
    halves = jax.sharding.AbstractMesh((1, 8, 2), ("data", "fsdp", "tensor"))
    split = Program(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=8, tensor=2)), halves)
    part, _ = fsdp_bound(split.abstract_state, split.abstract_frozen, "bfloat16", halves)
    assert 0.5 < part / bound < 0.75  # of a kernel that is split over `tensor` too, a device gathers its half
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state))
    assert state / 2**30 == pytest.approx(18.7, abs=0.05)  # more than one v5e chip has


def test_wrong_arguments_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--topology", "v9:1x1", "--program", "unet"], "no topology known here"),
        (["--topology", "v5e:1x1", "--program", "unet", "--config", "nowhere.py"], "no recipe nowhere.py"),
        (["--topology", "v5e:1x1", "--program", "unet", "--remat", "some"], "remat"),
        (["--topology", "v5e:1x1", "--program", "unet", "--batch", "0"], "--batch must be at least 1, not 0"),
        (["--topology", "v5e:1x1", "--program", "unet", "--tensor", "-1"], "--tensor must be at least 1, not -1"),
        (["--topology", "v5e:1x1", "--program", "train", "--size", "64"], "--size takes no part in the program train"),
        (["--topology", "v5e:1x1", "--program", "unet", "--steps", "3"], "--steps takes no part in the program unet"),
        (["--topology", "v5e:1x1", "--program", "unet", "--json", "docs"], "docs: it is a folder"),
        (["--topology", "v5e:1x1", "--program", "sample", "--size", "1020"], "height and width must be multiples of 8, not 1020 and 1020"),
        (
            ["--topology", "v5e:1x1", "--program", "unet", "--json", "nowhere/x.json"],
            "no figures can be written to nowhere/x.json: there is no folder",
        ),
    ):
        assert aot.main(arguments) != 0
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_a_shape_that_no_pod_has_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    assert aot.main(["--topology", "v5e:3x5", "--program", "unet"]) == 2
    error = capsys.readouterr().err
    assert "is no topology of a v5e, says its compiler" in error and error.count("\n") == 1, error


@pytest.mark.parametrize("name", ["small_unet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("small_sample", "small_train"))])
def test_small_programs_have_not_drifted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    recorded, case = RECORDED[name], scale.CASES[name]
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    if versions != {key: recorded[key] for key in versions}:
        pytest.skip(f"recorded with another compiler; make it anew: python benchmarks/scale.py --only {name} (now {versions})")
    monkeypatch.chdir(ROOT)
    file = tmp_path / "result.json"
    options = ["--config", case.config, *case.options, "--json", str(file)]
    assert aot.main(["--topology", case.topology, "--program", case.program, *options]) == 0
    now = json.loads(file.read_text())
    for figure in ("hbm_peak_bytes", "flops", "flops_minimum"):
        assert now[figure] == pytest.approx(recorded[figure], rel=0.02), figure
    assert sum(now["collective_bytes"].values()) == pytest.approx(sum(recorded["collective_bytes"].values()), rel=0.02)
    table = capsys.readouterr().out
    assert "HBM: peak" in table and "roofline" in table
    assert RECORDED[name]["bound_by"] in table


def test_texts_that_were_kept_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.chdir(ROOT)
    texts, (first, second) = tmp_path / "texts", (tmp_path / "1.json", tmp_path / "2.json")
    plan = ["--topology", "v5e:1x1", "--program", "unet", "--config", "configs/portraits_quick.py", "--size", "64", "--dump", str(texts)]
    assert aot.main([*plan, "--json", str(first)]) == 0
    made = first.read_text()
    stale = {**json.loads(made), "flops": 1.0}
    stale["programs"][0] |= {"flops": 1.0, "hbm_bytes_accessed": 1.0, "estimated_cycles": 1.0, "flops_minimum": 1.0}
    first.write_text(json.dumps(stale))
    assert aot.main([*plan, "--recount", str(first), "--json", str(second)]) == 0
    assert second.read_text() == made
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "2.json", "texts"]
    capsys.readouterr()
    assert aot.main([*plan[:-2], "--recount", str(first)]) == 2
    assert capsys.readouterr().err == "aot: --recount needs the folder of the texts: --dump DIR\n"
    for other in ({}, {"programs": []}, {"programs": [{"name": "unet"}]}):
        first.write_text(json.dumps(other))
        assert aot.main([*plan, "--recount", str(first)]) == 2
        assert "the figures that --json wrote for this plan, and the file has other ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot read"), ("{", "is no JSON"), ("[1]", "holds no such table")], ids=("missing", "broken", "a list")
)
def test_figures_that_are_none_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "figures.json"
    if text is not None:
        file.write_text(text)
    plan = ["--topology", "v5e:1x1", "--program", "unet", "--config", "configs/portraits_quick.py", "--dump", str(tmp_path)]
    assert aot.main([*plan, "--recount", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(file) in error and error.count("\n") == 1


def test_a_folder_for_texts_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    plan = ["--topology", "v5e:1x1", "--program", "unet", "--config", "configs/portraits_quick.py", "--dump", str(tmp_path / "file")]
    assert aot.main(plan) == 2
    assert capsys.readouterr().err == f"aot: no texts can be written to {tmp_path / 'file'}: File exists; name a folder that may be made\n"


def test_a_batch_that_does_not_divide_is_a_wrong_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.chdir(ROOT)
    assert aot.main(["--topology", "v5e:2x2", "--program", "train", "--config", "configs/portraits_quick.py", "--batch", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x2", "v4:2x2x1", "2*v5e:2x2"])
def test_devices_lie_in_a_plan_as_in_a_run(topology: str) -> None:
    pytest.importorskip("libtpu")
    recipe = load_recipe(str(ROOT / "configs/portraits_quick.py"))
    mesh = aot.make_plan_mesh(aot.Plan(topology, "train", recipe.model, recipe.compute, recipe))[1]
    slices = parse_topology(topology)[2]
    run = make_mesh(1, mesh.size // slices, 1, dcn_data=slices, devices=topology_devices(topology)[1])
    assert [device.id for device in mesh.devices.flat] == [device.id for device in run.devices.flat]
    assert slices == 1 or len({device.slice_index for device in mesh.devices[0].flat}) == 1


def test_slices_lie_along_data() -> None:
    pytest.importorskip("libtpu")
    recipe = load_recipe(str(ROOT / "configs/portraits_quick.py"))
    with pytest.raises(TopologyError, match=r"a mesh of 1 x 8 x 1 is not that of 2\*v5e:2x2, .* slices lie along data: a multiple of 2"):
        aot.make_plan_mesh(aot.Plan("2*v5e:2x2", "train", recipe.model, recipe.compute, recipe, data=1, fsdp=8))


def test_a_recipe_of_two_slices_is_planned_for_two_slices() -> None:
    recipe = load_recipe(str(ROOT / "configs/portraits_quick.py"))
    recipe = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, dcn_data=2, fsdp=4))
    plan = aot.recipe_plan("2*v5e:2x2", recipe)
    assert (plan.data, plan.fsdp, plan.tensor) == (2, 4, 1)
    with pytest.raises(TopologyError, match=r"mesh.dcn_data is 2, but v5e:2x4 is 1 slice; set one to the other"):
        aot.recipe_plan("v5e:2x4", recipe)


def test_a_chip_of_a_v4_is_one_device_as_in_a_run() -> None:
    pytest.importorskip("libtpu")
    recipe = load_recipe(str(ROOT / "configs/portraits_quick.py"))
    for program in ("sample", "train"):
        plan = aot.Plan("v4:2x2x1", program, recipe.model, recipe.compute, recipe)
        mesh = aot.make_plan_mesh(plan)[1]
        *_, last = aot.stages(plan, mesh)
        rows = jax.tree.leaves(last.arguments[2])[0]
        assert rows.shape[0] == mesh.size == 4
        assert rows.sharding.shard_shape(rows.shape)[0] == 1


@pytest.mark.parametrize("program", ["train.py --config configs/portraits_quick.py", "sample.py"])
def test_the_command_lines_name_a_wrong_topology(program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    name, *options = program.split()
    main = importlib.import_module(name.removesuffix(".py")).main
    assert main([*options, "--aot", "v9:1x1"]) == 2
    assert capsys.readouterr().err.startswith(f"{name}: 'v9:1x1' is no topology known here")


@pytest.mark.parametrize("program", ["train.py --config configs/portraits_quick.py", "sample.py"])
def test_the_command_lines_refuse_a_file_for_figures_without_a_plan(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    name, *options = program.split()
    main = importlib.import_module(name.removesuffix(".py")).main
    assert main([*options, "--aot-json", "figures.json"]) == 2
    assert capsys.readouterr().err == f"{name}: --aot-json goes with --aot\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--program", "unet", "--weights-dtype", "int8"], "--weights-dtype int8 is for the program sample, not for unet"),
        (["--program", "unet", "--batch", "3"], "a batch of 3 cannot be spread over data 4 x fsdp 1; ask for a multiple of 4"),
        (["--program", "train", "--tensor", "8"], "v5e:2x2 has 4 devices, which tensor 8 does not divide; set --data, --fsdp and --tensor to match"),
        (["--program", "sample", "--data", "3"], "v5e:2x2 has 4 devices, which data 3 x tensor 1 does not divide"),
    ],
)
def test_a_plan_that_does_not_suit_the_machine_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libtpu")
    assert aot.main(["--topology", "v5e:2x2", "--config", str(ROOT / "configs/portraits_quick.py"), *options]) == 2
    assert message in capsys.readouterr().err
