"""Sampling weights of corpora: by temperature, or learned from many small trainings.

    python -m baichuan_jax.data.mixture temperature --config FILE --temperature 2
    python -m baichuan_jax.data.mixture learn --config FILE --output DIR [--runs 16] [--steps 100]
    [--SETTING VALUE ...]

`learn` is RegMix (Liu et al. 2024, https://arxiv.org/abs/2407.01492): it draws mixtures of the
corpora in data.train, trains a small model with each, fits the final validation loss as a law of
the mixture, and trains once more with the mixture that the law calls best. RegMix fits a tree; this
law is loss = c + sum of a_i w_i - b_i log w_i, b_i >= 0: a corpus may hurt in proportion to its
share w_i, and helps by the same amount for every doubling of it. It is convex, so it has one best
mixture. Weights fixed by hand are data.train itself. Started again, it continues where it was,
whatever was killed.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import lsq_linear, minimize
from tqdm import tqdm

from baichuan_jax.config.files import find_config, load_config
from baichuan_jax.config.parsing import read_json, read_text, require_keys
from baichuan_jax.config.schema import (
    MOST_SEED,
    Config,
    ConfigError,
    DataConfig,
    at_least,
    between,
    require,
)
from baichuan_jax.data.rows import MANIFEST, Rows
from baichuan_jax.documents.files import (
    Slice,
    State,
    find_files,
    require_unchanged,
    say_unread,
    states,
)
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.resilience.causes import Cause, PeerFailed, SaveFailed
from baichuan_jax.resilience.exits import run_command, signals
from baichuan_jax.resilience.ownership import CACHE_SECONDS, owned_output
from baichuan_jax.resilience.waits import wait_until
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.files import (
    refuse_inputs,
    remove_leftovers,
    save_figure,
    writable_file,
    write_atomically,
)
from baichuan_jax.runs.folder import Run
from baichuan_jax.runs.private import without_links
from baichuan_jax.tokenizer import Tokenizer

# Strengths that are tried for the law's coefficients; the least leave-one-out error decides.
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
# Of a corpus in a drawn mixture: the trainer refuses a weight of 0, and the law has a pole there.
LEAST_SHARE = 0.01
# What the search itself sets for each training.
OWN = ("train.num_steps", "evaluate.every", "checkpoint.every", "data.train", "run_dir")


def temperature_weights(sizes: np.ndarray, temperature: float) -> np.ndarray:
    """Weights [K] proportional to sizes^(1/temperature) (mT5's, Xue et al. 2020, with 1/alpha).

    1 keeps the proportions, large temperatures even them out. Raises ConfigError for one that is
    not positive.
    """
    require(temperature > 0, f"temperature={temperature} must be greater than 0")
    # The largest becomes exp(0): no temperature overflows.
    logits = np.log(np.asarray(sizes, float)) / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draw_mixtures(prior: np.ndarray, count: int, concentration: float, seed: int) -> np.ndarray:
    """Weights [count, K]: the prior first, then draws from a Dirichlet distribution around it.

    Shares below LEAST_SHARE are raised to it, then each mixture is scaled to sum to 1. Raises
    ConfigError for a concentration that is not positive.
    """
    require(concentration > 0, f"concentration={concentration} must be greater than 0")
    rng = np.random.default_rng(seed)
    # Times K: with equal weights a concentration of 1 makes every mixture equally likely.
    # The prior itself comes first: the best mixture is compared with it.
    drawn = np.vstack([prior, rng.dirichlet(concentration * len(prior) * prior, size=count - 1)])
    drawn = np.maximum(drawn, LEAST_SHARE)
    # Four digits: the weights that a person would copy are exactly those that were trained.
    return np.round(drawn / drawn.sum(axis=1, keepdims=True), 4)


@dataclass(frozen=True)
class Law:
    """loss(w) = constant + slopes * w - gains * log(w), of weights [K] that sum to 1."""

    constant: float
    slopes: np.ndarray
    gains: np.ndarray

    def predict(self, weights: np.ndarray) -> np.ndarray:
        """Losses [...] of mixtures [..., K]."""
        return self.constant + weights @ self.slopes - np.log(weights) @ self.gains

    def best(self, floor: np.ndarray) -> np.ndarray:
        """The mixture [K] of least loss, none of its weights below the floor [K].

        The law says nothing about shares smaller than those it was fitted on.
        """
        found = minimize(
            self.predict,
            np.full(len(floor), 1 / len(floor)),
            jac=lambda w: self.slopes - self.gains / w,
            method="SLSQP",
            bounds=[(low, 1.0) for low in floor],
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            # The law is flat around its minimum: with the default of 1e-6, weights may be off
            # by almost one in the fourth digit, the last that is kept.
            options={"ftol": 1e-12},
        )
        return found.x / found.x.sum()


def fit_law(weights: np.ndarray, losses: np.ndarray) -> tuple[Law, np.ndarray]:
    """The law of mixtures [N, K] and their losses [N]; and each loss predicted from the others [N].

    Least squares with a penalty on standardised coefficients; the penalty is the one of least
    leave-one-out error.
    """
    # The law is linear in its coefficients, so least squares fit it.
    features = np.hstack([weights, -np.log(weights)])
    # Gains must not be negative: that keeps the law convex.
    low = np.repeat([-np.inf, 0.0], weights.shape[1])

    def solve(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
        # One penalty for shares and logarithms, so both are scaled alike. 1e-12: a share that is
        # the same in all runs would divide by zero.
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-12
        # A penalty as more rows, whose targets are 0: the solver takes bounds but no penalty. Times
        # the number of runs, so that it weighs the same where one is left out.
        rows = np.vstack(
            [(features - mean) / scale, np.sqrt(penalty * len(targets)) * np.eye(len(mean))]
        )
        aims = np.append(targets - targets.mean(), np.zeros(len(mean)))
        coefficients = lsq_linear(rows, aims, bounds=(low, np.inf)).x / scale
        return np.append(coefficients, targets.mean() - mean @ coefficients)

    tried = []
    for penalty in PENALTIES:
        left_out = np.zeros(len(losses))
        for i in range(len(losses)):
            others = solve(np.delete(features, i, axis=0), np.delete(losses, i), penalty)
            left_out[i] = np.append(features[i], 1) @ others
        tried.append((float(np.square(left_out - losses).mean()), penalty, left_out))
    _, penalty, left_out = min(tried, key=lambda entry: entry[0])
    *coefficients, constant = solve(features, losses, penalty)
    slopes, gains = np.split(np.array(coefficients), 2)
    return Law(float(constant), slopes, gains), left_out


# The trainings


class Trainings:
    """Small trainings in a folder, one a mixture, each a process; finished ones are kept."""

    def __init__(
        self, config: str, overrides: list[str], folder: Path, steps: int, lock: int, total: int
    ) -> None:
        self.folder, self.steps = folder, steps
        self._command = [sys.executable, "-m", "baichuan_jax.train", "--config", config, *overrides]
        self._lock = lock
        self._child: subprocess.Popen | None = None
        self._stopped = False
        quiet = not sys.stderr.isatty()
        self._bar = tqdm(total=total * steps, unit="step", desc="trainings", disable=quiet)

    def stop(self, name: str) -> None:
        """Ask the running training to save and exit; no other is started."""
        self._stopped = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def loss(self, name: str, weights: dict[str, float]) -> float | None:
        """Final validation loss of a training with these weights; None where it was asked to stop.

        Raises ConfigError or RuntimeError with the training's last message where it failed.
        """
        run = Run(self.folder / name)
        # A training that was killed continues from its own checkpoints.
        if self.steps not in run.curve("eval_loss") or run.status != "completed":
            if self._stopped or not self._train(name, weights):
                return None
            run = Run(self.folder / name)
        else:
            # Of one that was killed as it ended: no training of this folder starts again.
            remove_leftovers(run.path)
        self._bar.update(self.steps)
        return run.curve("eval_loss")[self.steps]

    def _train(self, name: str, weights: dict[str, float]) -> bool:
        log = self.folder / f"{name}.log"
        own = ["--run_dir", str(self.folder / name), "--data.train", json.dumps(weights)]
        with open(log, "ab", opener=without_links) as output:
            # In a session of its own, so that Ctrl-C reaches it once, through stop(). It inherits
            # the folder's lock: where this process is killed, a later start waits for the training
            # instead of training beside it.
            self._child = subprocess.Popen(
                [*self._command, *own],
                stdout=output,
                stderr=output,
                pass_fds=[self._lock],
                start_new_session=True,
            )
            # Its own limits end a training that hangs.
            wait_until(lambda: self._ended(name), f"the training {name}; {log}", math.inf, 0.5)
        code = self._child.returncode
        if code == 0:
            return True
        if self._stopped and code == Cause.PREEMPTED.exit_code:
            return False
        # The trainer's last line says what was wrong.
        reason = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
        ended = f"training {name} ended with code {code}: {reason} (see {log})"
        if code == Cause.CONFIGURATION.exit_code:
            raise ConfigError(ended)
        if code == Cause.STORAGE.exit_code:
            raise SaveFailed(ended)
        if code < 0 or any(code == cause.exit_code and cause.restart for cause in Cause):
            raise PeerFailed(f"{ended}; start the same command again: finished trainings are kept")
        raise RuntimeError(ended)

    def _ended(self, name: str) -> bool:
        done = len(Run(self.folder / name).curve("loss"))
        self._bar.set_postfix_str(f"{name}, step {done}", refresh=True)
        assert self._child is not None
        return self._child.poll() is not None

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()


def learn(
    config_path: str,
    overrides: list[str],
    folder: Path,
    *,
    runs: int,
    steps: int,
    concentration: float,
    seed: int,
) -> dict | None:
    """Draw, train, fit, train the best. Returns what mixture.json holds; None where it was stopped.

    `overrides` are options such as "--train.context_length", "64". Raises ConfigError where the
    folder holds another search.
    """
    argv = _training_options(steps, overrides)
    config = load_config(config_path, _settings(argv))
    corpora = list(config.data.train)
    require(len(corpora) > 1, f"data.train has {len(corpora)} corpora: there is nothing to mix")
    require(
        bool(config.data.validation),
        "data.validation names no corpus, and its loss is what mixtures are compared by",
    )
    # The law has 2 K + 1 coefficients, and is also fitted with one run left out.
    least = 2 * len(corpora) + 2
    require(runs >= least, f"--runs {runs} is too few for {len(corpora)} corpora; give {least}")
    # The given weights need not sum to 1.
    prior = np.array(list(config.data.train.values()))
    mixtures = draw_mixtures(prior / prior.sum(), runs, concentration, seed)
    files = _files_read(config)
    plan = {
        "config": read_text(find_config(config_path)),
        "overrides": argv,
        "corpora": corpora,
        "steps": steps,
        "mixtures": mixtures.tolist(),
        "files": {Slice(path).shown: list(state) for path, state in files.items()},
    }
    # The training of a killed search has inherited its lock, and may take long to end.
    with owned_output(folder, seconds=CACHE_SECONDS) as lock:
        _keep_plan(folder, plan)
        trainings = Trainings(config_path, argv, folder, steps, lock.fileno(), runs + 1)
        try:
            with signals(trainings.stop, lambda: None):
                return _search(trainings, corpora, mixtures, files)
        finally:
            trainings.close()


def _files_read(config: Config) -> dict[str, State]:
    """All files that the trainings read, as they are now: of packed rows the manifests."""
    read = []
    if config.tokenizer.path is not None:
        # Loaded, so that one that is none is refused now and not by the first training.
        read.append(str(Tokenizer(config.tokenizer.path).path))
    for path in (*config.data.train, *config.data.validation):
        manifest = Path(path) / MANIFEST
        if manifest.exists():
            read.append(str(manifest))
        else:
            say_unread([path])
            read += find_files([path])
    return states(sorted({os.path.abspath(path) for path in read}))


def _refuse_inputs(options: argparse.Namespace, config: Config) -> None:
    """Raise ConfigError where --json would replace what the command reads or keeps."""
    outputs: dict[str, list[Path | str | None]] = {"--json": [options.json]}
    read: dict[str, list[Path | str]] = {"--config": [find_config(options.config)]}
    for name, corpora in (("train", config.data.train), ("validation", config.data.validation)):
        for path in corpora:
            # Of packed rows all that lies in the folder.
            files = [path] if (Path(path) / MANIFEST).exists() else find_files([path])
            read.setdefault(f"data.{name}", []).extend(files)
    if config.tokenizer.path is not None:
        read["tokenizer.path"] = [config.tokenizer.path]
    if options.command == "learn":
        folder = options.output
        names = ("plan.json", "mixture.json", "mixture.png")
        outputs = {"--output": [folder / name for name in names], **outputs}
        read["--output"] = [*folder.glob("run-*"), *folder.glob("best-*")]
    refuse_inputs(outputs, read)


def _keep_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write a search's plan.json. Raises ConfigError where the folder holds another search."""
    path = folder / "plan.json"
    advice = "choose another --output, or delete it"
    # Runs of other mixtures under the same names would be taken for this search's.
    if path.exists():
        # Earlier versions did not record the files.
        before = {"files": plan["files"], **require_keys(read_json(path), {}, str(path))}
        if before != plan:
            what = _difference(require_keys(before, {"files": dict}, str(path)), plan)
            raise ConfigError(f"{folder} holds a search with other {what}; {advice}")
    elif found := next((p for name in ("run-*", "mixture.*") for p in folder.glob(name)), None):
        raise ConfigError(f"{folder} holds {found.name} of no search (no plan.json); {advice}")
    write_atomically(path, json.dumps(plan, indent=1, ensure_ascii=False).encode())


def _difference(before: dict[str, Any], plan: dict[str, Any]) -> str:
    """What of a plan is another one, with the first file that is."""
    names = {**plan, **before}.keys() - {"files"}
    settings = sorted(name for name in names if before.get(name) != plan.get(name))
    if settings:
        return f"settings ({', '.join(settings)})"
    files = {**before["files"], **plan["files"]}
    changed = [path for path in files if before["files"].get(path) != plan["files"].get(path)]
    return f"text: {changed[0]} has changed, was added or was removed"


def _training_options(steps: int, overrides: list[str]) -> list[str]:
    """The options of every training: those of the search, then the user's."""
    for name in OWN:
        require(
            f"--{name}" not in overrides[::2],
            f"--{name} is set by the search itself (--steps, --output, the drawn mixtures)",
        )
    # As little as possible beside the training itself: one evaluation, one checkpoint, no samples.
    settings = {
        "train.num_steps": steps,
        "evaluate.every": steps,
        "checkpoint.every": steps,
        "metrics.tensorboard": "false",
        # By default the rate rises over 2,000 steps, longer than such a training.
        "optimizer.warmup_steps": max(1, steps // 10),
        "sample.prompts": "[]",
    }
    own = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    # The user's last: of an option that is given twice, the later one counts.
    return own + overrides


def _settings(argv: list[str]) -> list[str]:
    """Pairs of --SETTING VALUE as load_config takes them."""
    pairs = zip(argv[::2], argv[1::2], strict=True)
    return [f"{name.removeprefix('--')}={value}" for name, value in pairs]


def _search(
    trainings: Trainings, corpora: list[str], mixtures: np.ndarray, files: Mapping[str, State]
) -> dict[str, Any] | None:
    losses = []
    for number, weights in enumerate(mixtures):
        named = dict(zip(corpora, weights.tolist(), strict=True))
        loss = trainings.loss(f"run-{number:03d}", named)
        # A law of two texts would be one of neither.
        require_unchanged(files)
        if loss is None:
            return None
        losses.append(loss)
    law, left_out = fit_law(mixtures, np.array(losses))
    # No share below the least that was drawn.
    best = np.round(law.best(mixtures.min(axis=0)), 4)
    chosen = dict(zip(corpora, best.tolist(), strict=True))
    # A name of its weights, so that no other law's best mixture is taken for it.
    name = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]
    measured = trainings.loss(f"best-{name}", chosen)
    require_unchanged(files)
    if measured is None:
        return None
    error = float(np.sqrt(np.square(left_out - losses).mean()))
    first = {"weights": mixtures[0].tolist(), "predicted": float(law.predict(mixtures[0]))}
    found = {"weights": best.tolist(), "predicted": float(law.predict(best))}
    results = {
        "corpora": corpora,
        "steps": trainings.steps,
        "runs": [
            {"weights": weights.tolist(), "loss": loss, "left_out": float(predicted)}
            for weights, loss, predicted in zip(mixtures, losses, left_out, strict=True)
        ],
        "law": {
            "constant": law.constant,
            "slopes": law.slopes.tolist(),
            "gains": law.gains.tolist(),
        },
        "leave_one_out": {"rmse": error, "correlation": _correlation(left_out, np.array(losses))},
        "given": {**first, "measured": losses[0]},
        "best_drawn": {
            "weights": mixtures[int(np.argmin(losses))].tolist(),
            "measured": min(losses),
        },
        "best": {**found, "measured": measured},
    }
    content = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomically(trainings.folder / "mixture.json", content.encode())
    return results


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    # Without spread numpy gives NaN, for which JSON has no word.
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


# The command


def _sizes(config: Config) -> np.ndarray:
    """Tokens of packed rows, bytes of text otherwise. Raises ConfigError where both are named."""
    packed = [(Path(path) / MANIFEST).exists() for path in config.data.train]
    # Tokens and bytes differ by a factor that depends on the language.
    require(
        all(packed) or not any(packed),
        "data.train mixes packed rows and text, whose sizes do not compare; pack the text first",
    )
    if all(packed):
        return np.array([Rows(path).manifest["tokens"] for path in config.data.train])
    sizes = []
    for path in config.data.train:
        say_unread([path])
        texts = read_texts(map(Slice, find_files([path])), config.data.text_field)
        sizes.append(sum(len(text.encode()) for text in texts))
        require(sizes[-1] > 0, f"{path} holds no text")
    return np.array(sizes)


def _show(results: dict[str, Any], display: Display) -> None:
    names = (Path(path).name for path in results["corpora"])
    rows = []
    for number, run in enumerate(results["runs"]):
        name = f"run {number}" + (" (given)" if number == 0 else "")
        losses = (f"{run[key]:.4f}" for key in ("left_out", "loss"))
        rows.append([name, *_cells(run["weights"]), *losses])
    for name in ("given", "best_drawn", "best"):
        entry = results[name]
        predicted = f"{entry['predicted']:.4f}" if "predicted" in entry else "-"
        measured = f"{entry['measured']:.4f}"
        rows.append([name.replace("_", " "), *_cells(entry["weights"]), predicted, measured])
    display.table(None, ["mixture", *names, "predicted", "measured"], rows)
    left_out = results["leave_one_out"]
    display.say(
        "a run's loss predicted from the others: root mean square error "
        f"{left_out['rmse']:.4f}, correlation {left_out['correlation']:.3f}"
    )
    gain = results["given"]["measured"] - results["best"]["measured"]
    display.say(f"the best mixture's loss is {gain:.4f} below that of the given one")


def _cells(weights: list[float]) -> list[str]:
    return [f"{weight:.4f}" for weight in weights]


def _plot(results: dict[str, Any], path: Path) -> None:
    """Predicted and measured losses, and the weights of the given and the best mixture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    predicted, measured = ([run[name] for run in results["runs"]] for name in ("left_out", "loss"))
    best = results["best"]
    ends = [min(*predicted, *measured, best["measured"]), max(*predicted, *measured)]
    left.plot(ends, ends, color="0.7", linewidth=1)
    left.scatter(predicted, measured, label="drawn, predicted from the others")
    left.scatter(predicted[:1], measured[:1], marker="s", label="given weights")
    best_point = ([best["predicted"]], [best["measured"]])
    left.scatter(*best_point, marker="*", s=140, label="best of the law")
    left.set(
        xlabel="predicted validation loss",
        ylabel="measured",
        title=f"{len(measured)} trainings of {results['steps']} steps",
    )
    left.legend()
    places = np.arange(len(results["corpora"]))
    for offset, name in ((-0.2, "given"), (0.2, "best")):
        label = f"{name}: {results[name]['measured']:.4f}"
        right.barh(places + offset, results[name]["weights"], height=0.4, label=label)
    names = [Path(path).name for path in results["corpora"]]
    right.set(yticks=places, yticklabels=names, xlabel="weight")
    right.legend()
    save_figure(figure, path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.mixture",
        description="Sampling weights of the corpora in data.train: by temperature or learned.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    even = commands.add_parser("temperature", help="weights proportional to size^(1/temperature)")
    what = "1: by size; large: all alike"
    even.add_argument("--temperature", type=between(), required=True, help=what)
    learning = commands.add_parser(
        "learn",
        help="draw mixtures, train a small model with each, fit the validation loss, train with "
        "the best",
        epilog="Other options are the trainer's: --train.context_length 128 "
        "--model.hidden_size 128 ...",
    )
    add = learning.add_argument
    where = "for the runs, mixture.json, mixture.png"
    add("--output", type=Path, required=True, metavar="DIR", help=where)
    runs = "trainings with drawn mixtures, the given one among them (default: 16)"
    add("--runs", type=at_least(1), default=16, help=runs)
    add("--steps", type=at_least(1), default=100, help="of each (default: 100)")
    spread = "of the Dirichlet distribution; small: extreme (default: 1)"
    add("--concentration", type=between(), default=1.0, help=spread)
    add("--seed", type=at_least(0, MOST_SEED), default=0, help="of the draws (default: 0)")
    for command in (even, learning):
        corpora = "the trainer's settings; data.train has the corpora"
        command.add_argument("--config", required=True, metavar="FILE", help=corpora)
        command.add_argument("--json", type=writable_file, metavar="FILE", help="save the results")
    return parser


def _overrides(argv: list[str]) -> list[str]:
    """Options for the trainer as pairs, --NAME=VALUE in two. Raises ConfigError at others."""
    overrides = [
        part
        for option in argv
        for part in (option.split("=", 1) if option.startswith("--") else [option])
    ]
    require(
        len(overrides) % 2 == 0 and all(name.startswith("--") for name in overrides[::2]),
        f"expected pairs of --SETTING VALUE for the trainer and was given {overrides}",
    )
    return overrides


def _by_temperature(
    options: argparse.Namespace, overrides: list[str], display: Display
) -> dict[str, Any]:
    config = load_config(options.config, _settings(overrides))
    require(bool(config.data.train), "data.train names no corpus")
    _refuse_inputs(options, config)
    sizes = _sizes(config)
    weights = temperature_weights(sizes, options.temperature)
    try:
        DataConfig(train=_as_setting(config.data.train, weights))
    except ConfigError as error:
        raise ConfigError(
            f"--temperature {options.temperature:g} makes weights that training refuses: {error}; "
            "give a larger temperature, or leave the smallest corpus out"
        ) from None
    rows = [
        [path, f"{size:,}", f"{size / sizes.sum():.4f}", f"{weight:.4f}"]
        for path, size, weight in zip(config.data.train, sizes, weights, strict=True)
    ]
    display.table(None, ["corpus", "size", "share", "weight"], rows)
    return {
        "corpora": list(config.data.train),
        "sizes": sizes.tolist(),
        "temperature": options.temperature,
        "weights": weights.tolist(),
    }


def _as_setting(corpora: Iterable[str], weights: Iterable[float]) -> dict[str, float]:
    """data.train with four digits of each weight that count: 0 would be refused."""
    return {path: float(f"{weight:.4g}") for path, weight in zip(corpora, weights, strict=True)}


def main(argv: list[str]) -> int:
    """The command. Returns its exit code."""
    options, others = _parser().parse_known_args(argv)
    overrides = _overrides(others)
    display = Display()
    if options.command == "temperature":
        results = _by_temperature(options, overrides, display)
        weights = results["weights"]
    else:
        names = ("runs", "steps", "concentration", "seed")
        settings = {name: getattr(options, name) for name in names}
        argv = _training_options(options.steps, overrides)
        _refuse_inputs(options, load_config(options.config, _settings(argv)))
        found = learn(options.config, overrides, options.output, **settings)
        if found is None:
            display.say(f"stopped; the same command continues from what {options.output} holds")
            return Cause.PREEMPTED.exit_code
        results = found
        weights = results["best"]["weights"]
    if options.json:
        content = json.dumps(results, indent=1, ensure_ascii=False)
        write_atomically(Path(options.json), content.encode())
    if options.command == "learn":
        _show(results, display)
        _plot(results, options.output / "mixture.png")
    setting = json.dumps(_as_setting(results["corpora"], weights), ensure_ascii=False)
    display.say(f"--data.train {shlex.quote(setting)}")
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]), result_is_shown=True)
