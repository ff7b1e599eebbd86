"""Real faults in real processes: three supervised "hosts" on this machine.

Is the right host named, does the run go on, are the losses those of an undisturbed run? The
machinery is that of benchmarks/chaos.py. Limits have slack, since a busy machine may pause for
seconds.
"""

import json
import os
import signal
import sys

import pytest
from launches import REPOSITORY, SHARED, lines, run_module

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import chaos

from baichuan_jax.resilience.goodput import CATEGORIES, account
from baichuan_jax.resilience.waiting import EXIT_SECONDS
from baichuan_jax.resilience.watch import GRACE, LISTEN, PUBLISH
from baichuan_jax.runs.events import (
    CheckpointCorrupt,
    CheckpointSaved,
    Corruption,
    PortTaken,
    Started,
    WindowSkipped,
    latest,
    of_kind,
)

HANG = SILENCE = 8.0
# A busy machine may pause for this long.
SLACK = 12.0
NO_COPIES = ("--checkpoint.local_dir", "null", "--checkpoint.local_every", "null")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs lie: they share what they compiled, without optimisations."""
    variables = chaos.Supervised.variables.fget
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        changed = property(lambda supervised: {**variables(supervised), **quick})
        patch.setattr(chaos.Supervised, "variables", changed)
        yield tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def argv(folder):
    """Settings of a small run with copies on every host's disk.

    Its text and the cache of its rows are those of the other tests.
    """
    settings = {
        "resilience.hang_seconds": HANG,
        "resilience.silence_seconds": SILENCE,
        "resilience.check_every": 0,
        # A peak that is measured takes 0.3 s of every launch.
        "metrics.peak_tflops": 0.1,
        "data.train": f"{{{SHARED}/train-en.jsonl: 1.0}}",
        "data.cache_dir": f"{SHARED}/cache",
        "checkpoint.local_dir": f"{folder}/disk-of-$BAICHUAN_JAX_HOST",
        "checkpoint.local_every": 4,
    }
    return [*chaos.argv_of(folder), *(f"--{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def disturbed(argv, folder):
    """One run with a kill of process 0 in a save, a live hang, and NaN in a copy of a parameter."""
    outcomes = []
    with chaos.Cluster(folder / "run", argv) as cluster:
        for kind, process in (("kill in a save", 0), ("hang", 1), ("nan", 2)):
            cluster.steps(12, after=cluster.launch - 1)
            outcomes.append(chaos.suffer(cluster, kind, process))
        last, _ = cluster.steps(3, after=cluster.launch - 1)
        codes = cluster.stop()
    return cluster, outcomes, codes, last


def test_the_culprit_and_the_cause_are_named_in_time(disturbed):
    cluster, outcomes, codes, _ = disturbed
    found = [(outcome.kind, outcome.cause, outcome.rule, outcome.named) for outcome in outcomes]
    assert found == [
        ("kill in a save", "killed", "ended by a signal", "a"),
        ("hang", "hang", "not in the collective", "b"),
        ("nan", "numerics", "not finite or a spike", None),
    ]
    assert outcomes[1].detect_seconds < HANG + SLACK
    limit = LISTEN + GRACE + PUBLISH + EXIT_SECONDS + SLACK
    assert all(outcome.localise_seconds < limit for outcome in outcomes)
    assert codes == [75, 75, 75]
    exit_report = cluster.file("process-1", 2)
    assert (exit_report["cause"], exit_report["phase"]) == ("hang", "data")
    assert "sitecustomize.py:suffer" in exit_report["stack"]
    stacks = (cluster.run_dir / "attempts" / "2" / "stacks-1.txt").read_text()
    assert "in suffer" in stacks
    assert "in _watchdog" in stacks  # all threads


def test_no_loss_differs_from_the_undisturbed_run(disturbed, argv, folder):
    cluster, outcomes, _, last = disturbed
    straight = chaos.undisturbed(folder / "straight", argv, last, 3)
    curve = cluster.run.curve("loss")
    assert {step: curve[step] for step in range(1, last + 1)} == {
        step: straight[step] for step in range(1, last + 1)
    }
    saved = [
        event["step"] for event in lines(cluster.run_dir, "events") if event["kind"] == "checkpoint"
    ]
    for outcome in outcomes:  # saves are 10 steps apart, and one may have been under way
        assert outcome.lost_steps <= 20, outcome
    assert saved


def test_the_accounting_covers_every_second_and_every_fault(disturbed):
    cluster, outcomes, _, _ = disturbed
    found = account(cluster.run_dir)
    assert [(fault.cause, fault.host) for fault in found.faults] == [
        (outcome.cause, outcome.named) for outcome in outcomes
    ]
    assert found.launches == 4
    assert sum(found.seconds.values()) == pytest.approx(found.total, rel=1e-6)
    assert set(found.seconds) == set(CATEGORIES)
    assert found.seconds["hang"] > HANG - 1
    assert found.lost_steps >= 3
    attempts = cluster.run_dir / "attempts"
    began, ended = (
        (attempts / name).stat().st_mtime for name in ("1/coordinator.json", "4/process-0.json")
    )
    assert found.total == pytest.approx(ended - began, abs=4)
    assert all((fault.recover or 0) > 0 for fault in found.faults)


def test_the_table_of_a_run(disturbed, tmp_path):
    cluster, *_ = disturbed
    file = tmp_path / "accounting.json"
    done = run_module("baichuan_jax.resilience", str(cluster.run_dir), "--json", str(file))
    assert done.returncode == 0, done.stderr
    for text in (
        "killed",
        "a: 0",
        "not in the collective",
        "goodput",
        "lost steps",
        "1 x hang on b",
    ):
        assert text in done.stdout, done.stdout
    assert json.loads(file.read_text())["launches"] == 4


def has_saved(cluster: chaos.Cluster) -> bool:
    """Whether the newest launch has saved a checkpoint."""
    events = cluster.run.events
    begun, saved = latest(events, Started), latest(events, CheckpointSaved)
    return begun is not None and saved is not None and saved.time > begun.time


@pytest.mark.chaos
def test_every_kind_of_fault_once(argv, folder):
    """SIGSTOP twice: of process 0, whose coordination service stops too, and of another.

    A full disk too where this is root.
    """
    # Without local copies, or they would be read in a bad checkpoint's place.
    argv = [*argv, "--resilience.check_every", "5", *NO_COPIES]
    root = os.geteuid() == 0
    with chaos.Cluster(folder / "every", argv, small_disk=root) as cluster:
        for number, kind in enumerate([*chaos.KINDS, "stop", *([chaos.FULL_DISK] if root else [])]):
            cluster.steps(12, after=cluster.launch - 1)
            # Or the supervisors give up: on a busy machine a save may outlast these steps.
            cluster.wait(lambda: has_saved(cluster), "no checkpoint in this launch")
            outcome = chaos.suffer(cluster, kind, (number + 1) % 3)
            print(outcome)
            assert outcome.right, outcome
            assert outcome.recovered, outcome
        events = cluster.run.events
        assert of_kind(events, CheckpointCorrupt)
        assert of_kind(events, Corruption)
        assert {event.host for event in of_kind(events, PortTaken)} == {"a"}
        last, _ = cluster.steps(3, after=cluster.launch - 1)
        cluster.stop()
    straight = chaos.undisturbed(folder / "every-straight", argv, last, 3)
    curve = cluster.run.curve("loss")
    assert all(curve[step] == straight[step] for step in range(1, last + 1))


@pytest.mark.chaos
def test_data_that_give_no_number_are_left_out_as_if_from_the_start(argv, folder):
    faults = folder / "poisoned-faults"
    faults.mkdir()
    (faults / "poison").write_text("24 27")
    with chaos.Cluster(folder / "poisoned", argv) as cluster:
        last, _ = cluster.steps(30, after=2)
        cluster.stop()
    assert [cluster.file("verdict", launch)["verdict"]["cause"] for launch in (1, 2)] == [
        "numerics",
        "numerics",
    ]
    skipped = of_kind(cluster.run.events, WindowSkipped)
    assert [(event.begin, event.end) for event in skipped] == [(24, 27)]
    straight = chaos.undisturbed(
        folder / "poisoned-straight", [*argv, "--data.skip", "[[24, 27]]"], last, 3
    )
    curve = cluster.run.curve("loss")
    assert last > 27
    assert all(curve[step] == straight[step] for step in range(1, last + 1))


@pytest.mark.chaos
def test_a_spare_takes_the_place_of_a_host_that_is_gone_and_fewer_hosts_keep_the_batch(
    argv, folder
):
    """Hosts die with their supervisors: 4 and a spare, 4, 2, 1, back to 4; losses to rounding.

    Three are never used, since they do not divide the batch.
    Other sums of the same numbers differ in their last bits, and steps enlarge that: so these are
    tiny. Other rows would differ by a thousandth.
    """
    batch = ["--train.global_batch_size", "8", "--optimizer.learning_rate", "1e-5"]
    with chaos.Cluster(
        folder / "elastic", [*argv, *batch], hosts=4, spares=1, options=("--min_hosts", "1")
    ) as cluster:

        def lose(*hosts: str) -> None:
            launch = cluster.launch
            for host in hosts:
                child = cluster.pid(cluster.file("plan")["hosts"].index(host))
                cluster.supervisors[host].kill()
                cluster.supervisors[host].wait()
                os.kill(child, signal.SIGKILL)
            cluster.steps(12, after=launch)

        cluster.steps(12)
        lose("b")
        assert sorted(cluster.file("plan")["hosts"]) == ["a", "c", "d", "e"]
        lose("d")
        two = cluster.file("plan")["hosts"]
        assert len(two) == 2
        lose(*two)  # of three: one had stood ready
        assert len(cluster.file("plan")["hosts"]) == 1
        launch = cluster.launch
        for host in ("b", "d", *two):
            cluster.supervisors[host] = cluster.start(host)
        cluster.steps(12, after=launch)
        cluster.wait(lambda: len(cluster.file("plan")["hosts"]) == 4, "it did not grow")
        last, _ = cluster.steps(12, after=cluster.launch - 1)
        cluster.stop()
    straight = chaos.undisturbed(folder / "elastic-straight", [*argv, *batch], last, 4)
    curve = cluster.run.curve("loss")
    assert all(
        curve[step] == pytest.approx(straight[step], rel=1e-5) for step in range(1, last + 1)
    )
