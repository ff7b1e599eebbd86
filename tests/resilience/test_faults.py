"""Real processes, real faults: three supervised "hosts" on this machine. Who is named, does the run go on, are the losses the same?

The machinery is that of benchmarks/chaos.py. Its limits are the protocol's with slack, since a busy
machine may pause for seconds.
"""

import os
import signal
import sys
import time

import pytest
from launches import REPOSITORY, environment, lines

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import chaos

from baichuan_jax.config.schema import ResilienceConfig
from baichuan_jax.resilience.clock import Clock
from baichuan_jax.resilience.exits import SaveFailed
from baichuan_jax.resilience.goodput import CAUSES, read_ledger
from baichuan_jax.resilience.watch import BEAT, Watch, _cause

HANG = SILENCE = 8.0
LISTEN_AND_WORDS = (
    2.5 + 3.0 + 2.0
)  # standing still before others are listened to, last words, keeping them
SLACK = 12.0  # of a busy machine
NO_COPIES = ("--checkpoint.local_dir", "null", "--checkpoint.local_every", "null")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs lie: they share what they packed and compiled."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def words(folder):
    """Settings of a small run with copies on every host's disk; its tokens are packed once."""
    limits = (
        "--resilience.hang_seconds",
        str(HANG),
        "--resilience.silence_seconds",
        str(SILENCE),
        "--resilience.check_every",
        "0",
        "--checkpoint.local_dir",
        f"{folder}/disk-of-$BAICHUAN_JAX_HOST",
        "--checkpoint.local_every",
        "4",
    )
    return [*chaos.words_of(folder), *limits]


@pytest.fixture(scope="module")
def disturbed(words, folder):
    """One run through a kill of process 0 in a save, a live hang and NaN in one copy of a parameter."""
    outcomes = []
    with chaos.Cluster(folder / "run", words) as cluster:
        for kind, process in (("kill in a save", 0), ("hang", 1), ("nan", 2)):
            cluster.steps(12, after=cluster.attempt - 1)
            outcomes.append(chaos.suffer(cluster, kind, process))
        last, _ = cluster.steps(3, after=cluster.attempt - 1)
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
    assert all(outcome.localise_seconds < LISTEN_AND_WORDS + 10 + SLACK for outcome in outcomes)
    assert codes == [75, 75, 75]
    words = cluster.file("process-1", 2)
    assert (words["cause"], words["phase"]) == ("hang", "data")
    assert "sitecustomize.py:suffer" in words["stack"]
    stacks = (cluster.run_dir / "attempts" / "2" / "stacks-1.txt").read_text()
    assert "in suffer" in stacks
    assert "in _watchdog" in stacks  # all threads


def test_no_loss_differs_from_the_undisturbed_run(disturbed, words, folder):
    cluster, outcomes, _, last = disturbed
    straight = chaos.undisturbed(folder / "straight", words, last, 3)
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


def test_the_ledger_accounts_for_every_second_and_every_fault(disturbed):
    cluster, outcomes, _, _ = disturbed
    ledger = read_ledger(cluster.run_dir)
    assert [(fault.cause, fault.host) for fault in ledger.faults] == [
        (outcome.cause, outcome.named) for outcome in outcomes
    ]
    assert ledger.launches == 4
    assert sum(ledger.seconds.values()) == pytest.approx(ledger.total, rel=1e-6)
    assert set(ledger.seconds) == set(CAUSES)
    assert ledger.seconds["hang"] > HANG - 1
    assert ledger.lost_steps >= 3
    attempts = cluster.run_dir / "attempts"
    began, ended = (
        (attempts / name).stat().st_mtime for name in ("1/coordinator.json", "4/process-0.json")
    )
    assert ledger.total == pytest.approx(ended - began, abs=4)
    assert all(fault.recover > 0 for fault in ledger.faults)


def test_the_table_of_a_run(disturbed, tmp_path):
    import json
    import subprocess

    cluster, *_ = disturbed
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "baichuan_jax.resilience",
            str(cluster.run_dir),
            "--json",
            str(tmp_path / "ledger.json"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    for text in (
        "killed",
        "a: 0",
        "not in the collective",
        "goodput",
        "lost steps",
        "1 x hang on b",
    ):
        assert text in done.stdout, done.stdout
    assert json.loads((tmp_path / "ledger.json").read_text())["launches"] == 4


def test_heartbeats_cost_less_than_a_thousandth(tmp_path):
    watch = Watch(ResilienceConfig(), Clock(), tmp_path / "attempts")
    with watch:
        watch.join()
        began = time.thread_time()
        for _ in range(200):
            watch._publish(watch._folder, watch.report())
        assert (time.thread_time() - began) / 200 < 0.001 * BEAT
    assert not watch.report().cause


def test_who_has_compiled_first_waits_for_the_others(tmp_path):
    clock = Clock()
    watch = Watch(ResilienceConfig(hang_seconds=5, start_seconds=50), clock, tmp_path / "attempts")
    for phase in ("data", "dispatch"):
        with clock(phase):
            pass
    assert watch._limit("dispatch") == 50
    with clock("wait"):
        pass
    assert (watch._limit("dispatch"), watch._limit("wait"), watch._limit("evaluate")) == (5, 5, 50)


def test_a_peer_s_failure_is_told_from_one_s_own():
    """As fetching an array raises it: seen where another process had left between two steps."""
    lost = "UNKNOWN: Gloo all-reduce failed: [external/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:22762"
    assert _cause(ValueError(lost)) == "peer"
    assert _cause(ValueError("the Gloo of our own")) == "exception"
    assert (
        _cause(SaveFailed("checkpoint 5 could not be written: No space left on device"))
        == "storage"
    )
    failed = SaveFailed("checkpoint 5 could not be written")
    failed.__cause__ = ValueError(lost)
    assert _cause(failed) == "peer"


def test_alone_a_standstill_is_told_and_nothing_is_ended(tmp_path, capfd):
    clock = Clock()
    with (
        Watch(ResilienceConfig(hang_seconds=0.5, start_seconds=0.5), clock, tmp_path / "attempts"),
        clock("data"),
    ):
        time.sleep(2.5)
    said = capfd.readouterr().err
    assert said.count("nothing has happened for") == 1
    assert "in test_alone_a_standstill" in said


@pytest.mark.chaos
def test_every_kind_of_fault_once(words, folder):
    """SIGSTOP twice: of process 0, whose coordination service stops with it, and of another; a full disk where this is root."""
    words = [
        *words,
        "--resilience.check_every",
        "5",
        *NO_COPIES,
    ]  # or they would be read in a bad checkpoint's place
    root = os.geteuid() == 0
    with chaos.Cluster(folder / "every", words, small_disk=root) as cluster:
        for number, kind in enumerate([*chaos.KINDS, "stop", *([chaos.FULL_DISK] if root else [])]):
            cluster.steps(12, after=cluster.attempt - 1)
            outcome = chaos.suffer(cluster, kind, (number + 1) % 3)
            print(outcome)
            assert outcome.right, outcome
            assert outcome.recovered, outcome
        kinds = [event["kind"] for event in cluster.run.events]
        assert "checkpoint_corrupt" in kinds
        assert "corruption" in kinds
        assert {event["host"] for event in cluster.run.events if event["kind"] == "port_taken"} == {
            "a"
        }
        last, _ = cluster.steps(3, after=cluster.attempt - 1)
        cluster.stop()
    straight = chaos.undisturbed(folder / "every-straight", words, last, 3)
    curve = cluster.run.curve("loss")
    assert all(curve[step] == straight[step] for step in range(1, last + 1))


@pytest.mark.chaos
def test_data_that_give_no_number_are_left_out_as_if_from_the_start(words, folder):
    faults = folder / "poisoned-faults"
    faults.mkdir()
    (faults / "poison").write_text("24 27")
    with chaos.Cluster(folder / "poisoned", words) as cluster:
        last, _ = cluster.steps(30, after=2)
        cluster.stop()
    assert [cluster.file("verdict", attempt)["verdict"]["cause"] for attempt in (1, 2)] == [
        "numerics",
        "numerics",
    ]
    found = [
        (event["begin"], event["end"])
        for event in cluster.run.events
        if event["kind"] == "window_skipped"
    ]
    assert found == [(24, 27)]
    straight = chaos.undisturbed(
        folder / "poisoned-straight", [*words, "--data.skip", "[[24, 27]]"], last, 3
    )
    curve = cluster.run.curve("loss")
    assert last > 27
    assert all(curve[step] == straight[step] for step in range(1, last + 1))


@pytest.mark.chaos
def test_a_spare_takes_the_place_of_a_host_that_is_gone_and_fewer_hosts_keep_the_batch(
    words, folder
):
    """Hosts die with their supervisors: 4 and a spare, 4, then 2 (three do not divide the batch), 1, back to 4; losses to rounding.

    Other sums of the same numbers differ in their last bits, and steps enlarge that: so these are
    tiny. Other rows would differ by a thousandth.
    """
    batch = ["--train.global_batch_size", "8", "--optimizer.learning_rate", "1e-5"]
    with chaos.Cluster(
        folder / "elastic", [*words, *batch], hosts=4, spares=1, options=("--min_hosts", "1")
    ) as cluster:

        def lose(*hosts: str) -> None:
            attempt = cluster.attempt
            for host in hosts:
                child = cluster.pid(cluster.file("plan")["hosts"].index(host))
                cluster.supervisors[host].kill()
                cluster.supervisors[host].wait()
                os.kill(child, signal.SIGKILL)
            cluster.steps(12, after=attempt)

        cluster.steps(12)
        lose("b")
        assert sorted(cluster.file("plan")["hosts"]) == ["a", "c", "d", "e"]
        lose("d")
        two = cluster.file("plan")["hosts"]
        assert len(two) == 2
        lose(*two)  # of three: one had stood ready
        assert len(cluster.file("plan")["hosts"]) == 1
        attempt = cluster.attempt
        for host in ("b", "d", *two):
            cluster.supervisors[host] = cluster.start(host)
        cluster.steps(12, after=attempt)
        cluster.wait(lambda: len(cluster.file("plan")["hosts"]) == 4, "it did not grow")
        last, _ = cluster.steps(12, after=cluster.attempt - 1)
        cluster.stop()
    straight = chaos.undisturbed(folder / "elastic-straight", [*words, *batch], last, 4)
    curve = cluster.run.curve("loss")
    assert all(
        curve[step] == pytest.approx(straight[step], rel=1e-5) for step in range(1, last + 1)
    )
