"""The loop: saving, resuming, stopping, guarding, telling."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import small

from instantid_jax.data.record import DataError
from instantid_jax.data.sources import MemorySource
from instantid_jax.running import EXIT_INTERRUPTED, LeaseError, lease, noted_signals
from instantid_jax.training.checkpoints import CheckpointError
from instantid_jax.training.config import TrainConfig
from instantid_jax.training.loop import BadSteps, Run, train


def bits(tree):
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def log(run, kind=None):
    rows = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if kind is None or row["kind"] == kind]


def followed(run):
    """The records of every batch that the run trains on, in a list that fills."""
    seen, plain = [], run.global_batch

    def noting(batch):
        seen.append(batch["index"].tolist())
        return plain(batch)

    run.global_batch = noting
    return seen


def stopped_after(run, steps):
    """Trains until so many steps are done, then as if SIGTERM had come."""
    stopping, plain, count = [], run.global_batch, [0]

    def counting(batch):
        count[0] += 1
        if count[0] == steps:
            stopping.append(int(signal.SIGTERM))
        return plain(batch)

    run.global_batch = counting
    return train(run, stopping=stopping)


@pytest.fixture
def whole(make_run):
    """A run of six steps that nothing disturbed: (run, its batches)."""
    run = make_run("whole", steps=6)
    seen = followed(run)
    assert train(run) == 0
    return run, seen


def test_stopping_and_going_on_changes_no_bit(make_run, whole):
    reference, order = whole
    seen = []
    for steps in (1, 1, 3):  # a checkpoint of step 1, of step 2, of step 5
        run = make_run("stopped", steps=6)
        part = followed(run)
        assert stopped_after(run, steps) == EXIT_INTERRUPTED == 75
        seen += part
    last = make_run("stopped", steps=6)
    part = followed(last)
    assert train(last) == 0
    assert seen + part == order
    assert bits(last.state) == bits(reference.state)
    assert sorted(int(p.name) for p in (last.out / "checkpoints").iterdir()) == [5, 6]


def test_the_first_save_is_at_step_one_and_harms_nothing(make_run):
    run = make_run(steps=2, checkpoint__every=1)
    assert train(run) == 0
    again = make_run(steps=2, checkpoint__every=1)
    shutil.rmtree(again.out / "checkpoints" / "2")
    assert train(again) == 0
    assert bits(again.state) == bits(run.state)


def test_the_whole_state_is_restored_and_not_the_start(make_run, whole):
    reference, _ = whole
    run = make_run("whole", steps=6)
    start = bits(make_run("other").state)
    assert train(run) == 0  # nothing is left to do
    assert bits(run.state) == bits(reference.state)
    unchanged = [name for name, value in bits(run.state).items() if value == start[name]]
    assert unchanged == []
    assert bits(run.frozen) == bits(reference.frozen)


def test_frozen_weights_keep_every_bit(make_run):
    run = make_run()
    before = bits(run.frozen)
    train(run)
    assert bits(run.frozen) == before and len(before) > 20


def test_threads_that_read_ahead_change_nothing(make_run, whole):
    reference, order = whole
    run = make_run("threads", steps=6, loader__num_threads=2)
    seen = followed(run)
    train(run)
    assert seen == order and bits(run.state) == bits(reference.state)


def test_sigterm_is_noted_and_a_second_one_harms_nothing():
    with noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_changed_setting_is_told_when_going_on(make_run, capsys):
    assert stopped_after(make_run(), 2) == EXIT_INTERRUPTED
    train(make_run(guard__limit=3))
    said = capsys.readouterr().out
    assert "stopped by signal 15 at step 2; the same command goes on" in said
    assert "changed since the checkpoint: guard/limit: 10 is now 3" in said and "training from step 2 to 4" in said


def test_another_order_is_refused_when_going_on(make_run):
    assert stopped_after(make_run(), 2) == EXIT_INTERRUPTED
    with pytest.raises(ValueError, match="the saved data position belongs to seed=0, but this loader has seed=5"):
        train(make_run(seed=5))


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_stops_the_run_until_told_otherwise(make_run, whole):
    reference, _ = whole
    newest = reference.out / "checkpoints" / "6"
    for file in newest.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"checkpoints/6 is damaged .*--resume-damaged previous goes on from step 4"):
        train(make_run("whole", steps=6))
    run = make_run("whole", steps=6)
    assert train(run, damaged="previous") == 0
    assert bits(run.state) == bits(reference.state)


def test_a_checkpoint_of_another_network_gives_a_diff(make_run):
    train(make_run(steps=2))
    wider = dataclasses.replace(small.recipe("x", "y").recognizer, widths=(32,))
    with pytest.raises(CheckpointError, match=r"(?s)another model.*conv_in/kernel: \(3, 3, 4, 16\) .* \(3, 3, 4, 32\)"):
        train(make_run(steps=4, fresh=True, recognizer=wider))


def poisoned(*bad):
    """The usual records; these have an embedding that is not finite."""
    records = [small.record(i) for i in range(24)]
    for i in bad:
        records[i] = dataclasses.replace(records[i], embeddings=np.full((1, 16), np.inf, np.float32))
    return MemorySource(records)


@pytest.fixture
def poison(make_run):
    """(records of which one is bad, its number, the step that meets it): the first epoch has three batches of eight."""
    run = make_run("order")
    batches = [next(run.loader)["index"].tolist() for _ in range(3)]
    run.loader.close()
    return poisoned(batches[1][4]), batches[1][4], 2


def test_skipping_a_bad_step(make_run, poison, capsys):
    records, sample, step = poison
    run = make_run(records=records, steps=3)
    assert train(run) == 0
    said = capsys.readouterr().out
    assert f"step {step} (recognize): bad loss (loss nan" in said and f"samples {sample} ({records[sample].key}); policy skip" in said
    (row,) = log(run, "bad_step")
    assert row["step"] == step and row["what"] == "loss" and row["samples"] == [sample] and row["loss"] == "nan"
    assert int(run.state.step) == 3 and int(run.state.updates) == 2
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(run.state))
    assert [row["bad_steps"] for row in log(run, "train")] == [0, 1, 0]


def test_a_skipped_step_is_skipped_again_after_resuming(make_run, poison):
    records, _, _ = poison
    one = make_run("one", records=records, steps=5)
    train(one)
    assert stopped_after(make_run("two", records=records, steps=5), 2) == EXIT_INTERRUPTED
    two = make_run("two", records=records, steps=5)
    train(two)
    assert bits(two.state) == bits(one.state)


def test_stopping_at_a_bad_step(make_run, poison):
    records, sample, step = poison
    with pytest.raises(
        BadSteps, match=rf"step {step} \(recognize\): bad loss .*samples {sample} \({records[sample].key}\); 1 in a row, so the run ends"
    ):
        train(make_run(records=records, guard__policy="stop"))


def test_rewinding_past_a_bad_batch(make_run, poison, capsys):
    records, _, step = poison
    run = make_run(records=records, steps=5, guard__policy="rewind", checkpoint__every=1)
    seen = followed(run)
    assert train(run) == 0
    assert f"back to the weights of step {step - 1}" in capsys.readouterr().out
    assert len(seen) == 5 and int(run.state.step) == 5 and int(run.state.updates) < 5
    assert all(np.all(np.isfinite(np.asarray(x))) for x in jax.tree.leaves(run.state))


def test_rewinding_before_any_checkpoint_goes_back_to_the_start(make_run, poison, capsys):
    records, _, _ = poison
    run = make_run(records=records, steps=4, guard__policy="rewind", checkpoint__every=4)
    assert train(run) == 0
    assert "back to the weights of step 0" in capsys.readouterr().out


def test_stopped_at_a_rewound_step_and_gone_on_is_never_stopped(make_run, poison):
    records, _, step = poison
    settings = {"records": records, "steps": 5, "guard__policy": "rewind", "checkpoint__every": 1}
    one = make_run("one", **settings)
    train(one)
    assert stopped_after(make_run("two", **settings), step) == EXIT_INTERRUPTED
    two = make_run("two", **settings)
    train(two)
    assert bits(two.state) == bits(one.state)


def test_what_is_validated_is_what_is_saved(make_run, poison):
    """At a step that is rewound, validation sees the weights that the run goes on with, not those of the bad step."""
    records, _, step = poison
    run = make_run(records=records, steps=3, guard__policy="rewind", checkpoint__every=1, validation__every=1)
    seen, validate = {}, run.validate
    run.validate = lambda: seen.update({int(run.state.step): bits(run.state.parameters)}) or validate()
    train(run)
    assert seen[step] == seen[step - 1] and seen[step + 1] != seen[step]
    assert [row["step"] for row in log(run) if row["kind"] in ("train", "validation")] == [1, 1, 2, 2, 3, 3]


def test_too_many_bad_steps_end_the_run_whatever_the_policy(make_run):
    run = make_run(records=poisoned(*range(24)), guard__limit=3, steps=9)
    with pytest.raises(BadSteps, match="3 in a row, so the run ends; the last checkpoint is untouched"):
        train(run)


def test_a_spike_names_its_samples(make_run, capsys):
    """Nothing is learned, so about every second loss lies above the mean of those before."""
    run = make_run(steps=8, guard__spike=1.0001, fresh=True, optimizer__learning_rate=0.0)
    train(run)
    rows = log(run, "bad_step")
    assert rows and all(row["what"] == "loss spike" and len(row["samples"]) == 8 for row in rows)
    assert "bad loss spike (loss" in capsys.readouterr().out
    assert int(run.state.updates) == 8 - len(rows)


def test_what_is_told(make_run):
    run = make_run(steps=3, log__bucket_count=4, validation__every=1, checkpoint__every=1, checkpoint__keep_best=1)
    train(run)
    rows = log(run, "train")
    assert [row["step"] for row in rows] == [1, 2, 3]
    names = {"loss", "plain_loss", "gradient_norm", "learning_rate", "bad_steps", "images_per_second", "data_wait_share", "memory_gib"}
    assert names | {"loss_by_noise", "tflops_per_device", "mfu"} <= rows[0].keys()
    assert len(rows[0]["loss_by_noise"]) == 4 and rows[0]["images_per_second"] > 0 and 0 <= rows[0]["data_wait_share"] <= 1
    assert rows[0]["mfu"] is None and rows[0]["tflops_per_device"] > 0  # nobody knows a CPU's peak
    values = {row["step"]: row["loss"] for row in log(run, "validation")}
    assert values.keys() == {1, 2, 3}
    best = min(values, key=lambda step: values[step])
    assert {best, 2, 3} == {int(p.name) for p in (run.out / "checkpoints").iterdir()}


def test_of_a_gap_the_largest_is_the_best(make_run, monkeypatch):
    monkeypatch.setattr(TrainConfig, "measures", ("validation/wrong_pose_gap",))
    ranked = {"checkpoint__keep": 1, "checkpoint__keep_best": 1, "checkpoint__metric": "validation/wrong_pose_gap"}
    run = make_run(steps=4, validation__every=1, checkpoint__every=1, **ranked)
    gaps = iter([0.1, 0.3, 0.2, 0.0])
    run.validate = lambda: {"loss": 1.0, "wrong_pose_gap": next(gaps)}
    train(run)
    assert {2, 4} == {int(p.name) for p in (run.out / "checkpoints").iterdir()}


def test_nothing_is_told_between_the_lines(make_run, capsys):
    run = make_run(steps=5, log__every=2)
    train(run)
    assert [row["step"] for row in log(run, "train")] == [2, 4, 5]
    assert capsys.readouterr().out.count("train ") == 3


def test_validation_is_the_same_after_resuming(make_run):
    one = make_run("one", validation__every=2)
    train(one)
    two = make_run("two", validation__every=2)
    assert stopped_after(two, 3) == EXIT_INTERRUPTED
    train(make_run("two", validation__every=2))
    assert log(one, "validation") == log(two, "validation")


def test_a_split_that_is_not_there_is_refused_before_training(tmp_path, weights, source, program, monkeypatch):
    def missing(folders, split):
        raise DataError(f"{folders[0]}: has no split {split!r}, only train")

    monkeypatch.setattr("instantid_jax.training.run.open_source", missing)
    config = small.quick(tmp_path / "run", weights, validation__split="validaton")
    Run(config, source=source, program=program)  # never asked for
    for due in ({"validation__every": 2}, {"validation__every": 4}):
        with pytest.raises(DataError, match="data: has no split 'validaton', only train"):
            Run(small.changed(config, **due), source=source, program=program)


def test_fewer_steps_than_are_done_is_no_success(make_run, capsys):
    done = make_run(steps=4)
    train(done)
    wanted = bits(done.state)
    with pytest.raises(CheckpointError, match=r"checkpoints is at step 4 already, beyond the 3 steps .* ask for 4 or more, --resume-step 2, or"):
        train(make_run(steps=3))
    with pytest.raises(CheckpointError, match=r"at step 2 already, beyond the 1 steps asked for: ask for 2 or more, or give"):
        train(make_run(steps=1), resume_step=2)
    shutil.rmtree(done.out / "weights")
    capsys.readouterr()
    same = make_run(steps=4)
    assert train(same) == 0 and bits(same.state) == wanted and (same.out / "weights" / "recognizer").is_dir()
    assert "the run is at step 4 already, its last: nothing is left to train" in capsys.readouterr().out
    assert train(make_run(steps=3), resume_step=2) == 0


def test_tensorboard_on_request(make_run):
    run = make_run(steps=2, log__tensorboard=True)
    train(run)
    (file,) = (run.out / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"train/loss" in content and b"train/loss_by_noise/0" in content
    assert not (make_run("other").out / "tensorboard").exists()


def test_the_weights_of_a_finished_run_are_a_start_for_others(make_run, weights):
    run = make_run()
    train(run)
    folder = run.out / "weights"
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"recognizer", "vae", "tokenizer", "tokenizer_2"}
    again = make_run("again", init=dataclasses.replace(run.config.init, weights=str(folder), random=()))
    average = run.state.ema["recognizer"]
    assert bits(again.state.parameters["recognizer"]) == bits(average)


def test_two_runs_of_one_folder_exclude_each_other(make_run):
    run = make_run()
    with lease(run.out), pytest.raises(LeaseError, match="another process is training in"):
        train(run)
