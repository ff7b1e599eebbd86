"""Sampling weights of corpora: by temperature, or learned from many small trainings.

    python -m baichuan_jax.data.mixture temperature --config FILE --temperature 2 python -m
    baichuan_jax.data.mixture learn --config FILE --output DIR [--runs 16] [--steps 100] [--SETTING
    VALUE ...]

`learn` starts this project's trainer once for each of the drawn mixtures of the corpora in
data.train, fits the final validation loss as a law of the mixture, and trains once more with the
mixture that the law calls best: RegMix (arXiv:2407.01492) with the law loss = c + sum of a_i w_i -
b_i log w_i, b_i >= 0: a corpus may hurt in proportion to its share w_i, and helps by as much for
every doubling of it. It is convex, so it has one best mixture. Weights fixed by hand are data.train
itself. Started again, it goes on where it was, whatever was killed.
"""

import argparse
import fcntl
import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.optimize import lsq_linear, minimize
from tqdm import tqdm

from baichuan_jax.config.files import load_config
from baichuan_jax.config.schema import Config, ConfigError, require
from baichuan_jax.data.rows import MANIFEST, Rows
from baichuan_jax.documents.files import Slice, find_files
from baichuan_jax.documents.reader import read_texts
from baichuan_jax.resilience.causes import Cause
from baichuan_jax.resilience.exits import run_command, signals
from baichuan_jax.runs.files import write_atomically
from baichuan_jax.runs.folder import Run

PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
LEAST_SHARE = 0.01  # of a corpus in a drawn mixture: a weight of 0 is refused by the trainer, and the law has a pole there


def temperature_weights(sizes: np.ndarray, temperature: float) -> np.ndarray:
    """Weights [K] that are proportional to sizes^(1/temperature): 1 keeps proportions, large ones even them out (mT5's, 1/alpha)."""
    require(temperature > 0, f"temperature={temperature} must be greater than 0")
    logits = np.log(np.asarray(sizes, float)) / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def draw_mixtures(prior: np.ndarray, count: int, concentration: float, seed: int) -> np.ndarray:
    """Weights [count, K]: the prior first, then draws from a Dirichlet distribution around it; none below LEAST_SHARE."""
    require(concentration > 0, f"concentration={concentration} must be greater than 0")
    rng = np.random.default_rng(seed)
    drawn = np.vstack([prior, rng.dirichlet(concentration * len(prior) * prior, size=count - 1)])
    drawn = np.maximum(drawn, LEAST_SHARE)
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
        """The mixture [K] of least loss, none of its weights below the floor [K]."""
        found = minimize(
            self.predict,
            np.full(len(floor), 1 / len(floor)),
            jac=lambda w: self.slopes - self.gains / w,
            method="SLSQP",
            bounds=[(low, 1.0) for low in floor],
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-12},
        )
        return found.x / found.x.sum()


def fit_law(weights: np.ndarray, losses: np.ndarray) -> tuple[Law, np.ndarray]:
    """The law of mixtures [N, K] and their losses [N], and what it predicts for each where that one is left out [N].

    Least squares with a penalty on standardised coefficients; the penalty is that of the least
    leave-one-out error.
    """
    features = np.hstack([weights, -np.log(weights)])
    low = np.repeat([-np.inf, 0.0], weights.shape[1])

    def solve(features: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-12
        rows = np.vstack(
            [(features - mean) / scale, np.sqrt(penalty * len(targets)) * np.eye(len(mean))]
        )
        found = lsq_linear(
            rows, np.append(targets - targets.mean(), np.zeros(len(mean))), bounds=(low, np.inf)
        )
        coefficients = found.x / scale
        return np.append(coefficients, targets.mean() - mean @ coefficients)

    tried = []
    for penalty in PENALTIES:
        left_out = np.zeros(len(losses))
        for i in range(len(losses)):
            left_out[i] = np.append(features[i], 1) @ solve(
                np.delete(features, i, axis=0), np.delete(losses, i), penalty
            )
        tried.append((float(np.square(left_out - losses).mean()), penalty, left_out))
    _, penalty, left_out = min(tried, key=lambda entry: entry[0])
    *coefficients, constant = solve(features, losses, penalty)
    slopes, gains = np.split(np.array(coefficients), 2)
    return Law(float(constant), slopes, gains), left_out


# the trainings


class Trainings:
    """Small trainings in a folder, one a mixture, each a process of its own; what is finished there is not done again."""

    def __init__(
        self,
        config_path: str,
        overrides: list[str],
        folder: Path,
        steps: int,
        lock: int,
        total: int,
    ) -> None:
        self.config_path, self.overrides, self.folder, self.steps, self._lock = (
            config_path,
            overrides,
            folder,
            steps,
            lock,
        )
        self._child: subprocess.Popen | None = None
        self._stopped = False
        self._bar = tqdm(
            total=total * steps, unit="step", desc="trainings", disable=not sys.stderr.isatty()
        )

    def stop(self, name: str) -> None:
        """Ask the running training to save and end; no other is started."""
        self._stopped = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def loss(self, name: str, weights: dict[str, float]) -> float | None:
        """Final validation loss of a training with these weights; None where it was asked to stop. Raises what it died of."""
        run = Run(self.folder / name)
        if self.steps not in run.curve("eval_loss") or run.status != "completed":
            if self._stopped or not self._train(name, weights):
                return None
            run = Run(self.folder / name)
        self._bar.update(self.steps)
        return run.curve("eval_loss")[self.steps]

    def _train(self, name: str, weights: dict[str, float]) -> bool:
        log = self.folder / f"{name}.log"
        command = [
            sys.executable,
            "-m",
            "baichuan_jax.train",
            "--config",
            self.config_path,
            *self.overrides,
            "--run_dir",
            str(self.folder / name),
            "--data.train",
            json.dumps(weights),
        ]
        with log.open("ab") as output:
            # In a session of its own, so that Ctrl-C reaches it once, through stop(). It keeps the
            # folder's lock where this process is killed, and a later start waits for it instead of
            # training beside it.
            self._child = subprocess.Popen(
                command, stdout=output, stderr=output, pass_fds=[self._lock], start_new_session=True
            )
            while self._child.poll() is None:
                time.sleep(0.5)
                done = len(Run(self.folder / name).curve("loss"))
                self._bar.set_postfix_str(f"{name}, step {done}", refresh=True)
        code = self._child.returncode
        if code == 0:
            return True
        if self._stopped and code == Cause.PREEMPTED.exit_code:
            return False
        reason = log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]
        error = ConfigError if code == Cause.CONFIGURATION.exit_code else RuntimeError
        raise error(f"training {name} ended with code {code}: {reason} (see {log})")

    def close(self) -> None:
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
    """Draw, train, fit, train the best. Returns the figures that mixture.json holds; None where it was asked to stop before.

    `overrides` are words such as "--train.context_length", "64". Raises ConfigError where the
    folder holds another search.
    """
    settings = {
        "train.num_steps": steps,
        "evaluate.every": steps,
        "checkpoint.every": steps,
        "metrics.tensorboard": "false",
        "optimizer.warmup_steps": max(1, steps // 10),
        "sample.prompts": "[]",
    }
    for name in ("train.num_steps", "evaluate.every", "checkpoint.every", "data.train", "run_dir"):
        require(
            f"--{name}" not in overrides[::2],
            f"--{name} is set by the search itself (--steps, --output, the drawn mixtures)",
        )
    words = [
        word for name, value in settings.items() for word in (f"--{name}", str(value))
    ] + overrides
    config = load_config(
        config_path,
        [f"{a.removeprefix('--')}={b}" for a, b in zip(words[::2], words[1::2], strict=True)],
    )
    corpora = list(config.data.train)
    require(len(corpora) > 1, f"data.train has {len(corpora)} corpora: there is nothing to mix")
    require(
        bool(config.data.validation),
        "data.validation names no corpus, whose loss tells mixtures apart",
    )
    require(
        runs >= 2 * len(corpora) + 2,
        f"--runs {runs} is too few to tell {len(corpora)} corpora apart; give {2 * len(corpora) + 2} or more",
    )
    prior = np.array(list(config.data.train.values()))
    mixtures = draw_mixtures(prior / prior.sum(), runs, concentration, seed)
    plan = {
        "config": Path(config_path).read_text(encoding="utf-8"),
        "overrides": words,
        "corpora": corpora,
        "steps": steps,
        "mixtures": mixtures.tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock") as lock:
        path = folder / "plan.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != plan:
            raise ConfigError(
                f"{folder} holds a search with other settings; choose another --output, or delete it"
            )
        write_atomically(path, json.dumps(plan, indent=1, ensure_ascii=False).encode())
        trainings = Trainings(config_path, words, folder, steps, lock.fileno(), runs + 1)
        try:
            with signals(trainings.stop, lambda: None):
                return _search(trainings, corpora, mixtures)
        finally:
            trainings.close()


def _search(
    trainings: Trainings, corpora: list[str], mixtures: np.ndarray
) -> dict[str, Any] | None:
    losses = []
    for number, weights in enumerate(mixtures):
        loss = trainings.loss(
            f"run-{number:03d}", dict(zip(corpora, weights.tolist(), strict=True))
        )
        if loss is None:
            return None
        losses.append(loss)
    law, left_out = fit_law(mixtures, np.array(losses))
    best = np.round(law.best(mixtures.min(axis=0)), 4)
    chosen = dict(zip(corpora, best.tolist(), strict=True))
    name = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[
        :8
    ]  # so that no other law's best is taken for it
    measured = trainings.loss(f"best-{name}", chosen)
    if measured is None:
        return None
    error = float(np.sqrt(np.square(left_out - losses).mean()))
    figures = {
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
        "given": {
            "weights": mixtures[0].tolist(),
            "predicted": float(law.predict(mixtures[0])),
            "measured": losses[0],
        },
        "best_drawn": {
            "weights": mixtures[int(np.argmin(losses))].tolist(),
            "measured": min(losses),
        },
        "best": {
            "weights": best.tolist(),
            "predicted": float(law.predict(best)),
            "measured": measured,
        },
    }
    write_atomically(
        trainings.folder / "mixture.json",
        json.dumps(figures, indent=1, ensure_ascii=False).encode(),
    )
    return figures


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


class _lock:
    """A file that one search, or what is left of it, holds at a time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")

    def __enter__(self) -> Any:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"another search, or a training of one that was killed, holds {self._file.name}; waiting for its end",
                file=sys.stderr,
            )
            fcntl.flock(self._file, fcntl.LOCK_EX)
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


# the command


def _sizes(config: Config) -> np.ndarray:
    """Tokens of packed rows, bytes of text otherwise: not to be mixed."""
    packed = [(Path(path) / MANIFEST).exists() for path in config.data.train]
    require(
        all(packed) or not any(packed),
        "data.train mixes packed rows and text, whose sizes do not compare; pack the text first",
    )
    if all(packed):
        return np.array([Rows(path).manifest["tokens"] for path in config.data.train])
    sizes = []
    for path in config.data.train:
        texts = read_texts(map(Slice, find_files([path])), config.data.text_field)
        sizes.append(sum(len(text.encode()) for text in texts))
        require(sizes[-1] > 0, f"{path} holds no text")
    return np.array(sizes)


def _show(figures: dict[str, Any], console: Console) -> None:
    table = Table(
        "mixture", *(Path(path).name for path in figures["corpora"]), "predicted", "measured"
    )
    for number, run in enumerate(figures["runs"]):
        table.add_row(
            f"run {number}" + (" (given)" if number == 0 else ""),
            *_cells(run["weights"]),
            f"{run['left_out']:.4f}",
            f"{run['loss']:.4f}",
        )
    table.add_section()
    for name in ("given", "best_drawn", "best"):
        entry = figures[name]
        predicted = f"{entry['predicted']:.4f}" if "predicted" in entry else "-"
        table.add_row(
            name.replace("_", " "), *_cells(entry["weights"]), predicted, f"{entry['measured']:.4f}"
        )
    console.print(table)
    left_out = figures["leave_one_out"]
    rmse, correlation = left_out["rmse"], left_out["correlation"]
    console.print(
        f"a run's loss predicted from the others: root mean square error {rmse:.4f}, correlation {correlation:.3f}"
    )
    gain = figures["given"]["measured"] - figures["best"]["measured"]
    console.print(f"the best mixture's loss is {gain:.4f} below that of the given one")


def _cells(weights: list[float]) -> list[str]:
    return [f"{weight:.4f}" for weight in weights]


def _plot(figures: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    predicted, measured = ([run[name] for run in figures["runs"]] for name in ("left_out", "loss"))
    ends = [min(*predicted, *measured, figures["best"]["measured"]), max(*predicted, *measured)]
    left.plot(ends, ends, color="0.7", linewidth=1)
    left.scatter(predicted, measured, label="drawn, predicted from the others")
    left.scatter(predicted[:1], measured[:1], marker="s", label="given weights")
    left.scatter(
        [figures["best"]["predicted"]],
        [figures["best"]["measured"]],
        marker="*",
        s=140,
        label="best of the law",
    )
    left.set(
        xlabel="predicted validation loss",
        ylabel="measured",
        title=f"{len(measured)} trainings of {figures['steps']} steps",
    )
    left.legend()
    places = np.arange(len(figures["corpora"]))
    for offset, name in ((-0.2, "given"), (0.2, "best")):
        right.barh(
            places + offset,
            figures[name]["weights"],
            height=0.4,
            label=f"{name}: {figures[name]['measured']:.4f}",
        )
    right.set(
        yticks=places, yticklabels=[Path(path).name for path in figures["corpora"]], xlabel="weight"
    )
    right.legend()
    figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m baichuan_jax.data.mixture",
        description="Sampling weights of the corpora in data.train: by temperature or learned.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    even = commands.add_parser("temperature", help="weights proportional to size^(1/temperature)")
    even.add_argument(
        "--temperature", type=float, required=True, help="1: by size; large: all alike"
    )
    learning = commands.add_parser(
        "learn",
        help="draw mixtures, train a small model with each, fit the validation loss, train with the best",
        epilog="Other options are the trainer's: --train.context_length 128 --model.hidden_size 128 ...",
    )
    learning.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="for the runs, mixture.json, mixture.png",
    )
    learning.add_argument(
        "--runs",
        type=int,
        default=16,
        help="trainings with drawn mixtures, the given one among them (default: 16)",
    )
    learning.add_argument("--steps", type=int, default=100, help="of each (default: 100)")
    learning.add_argument(
        "--concentration",
        type=float,
        default=1.0,
        help="of the Dirichlet distribution; small: extreme (default: 1)",
    )
    learning.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    for command in (even, learning):
        command.add_argument(
            "--config",
            required=True,
            metavar="FILE",
            help="the trainer's settings; data.train has the corpora",
        )
        command.add_argument("--json", metavar="FILE", help="save the figures")
    return parser


def main(words: list[str]) -> int:
    """The command. Returns its exit code."""
    options, overrides = _parser().parse_known_args(words)
    console = Console(highlight=False, soft_wrap=True)
    overrides = [
        part
        for word in overrides
        for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    require(
        len(overrides) % 2 == 0 and all(word.startswith("--") for word in overrides[::2]),
        f"expected pairs of --SETTING VALUE for the trainer and was given {overrides}",
    )
    if options.command == "temperature":
        config = load_config(
            options.config,
            [f"{a[2:]}={b}" for a, b in zip(overrides[::2], overrides[1::2], strict=True)],
        )
        require(bool(config.data.train), "data.train names no corpus")
        sizes = _sizes(config)
        weights = temperature_weights(sizes, options.temperature)
        figures: dict[str, Any] = {
            "corpora": list(config.data.train),
            "sizes": sizes.tolist(),
            "temperature": options.temperature,
            "weights": weights.tolist(),
        }
        table = Table("corpus", "size", "share", "weight")
        for path, size, weight in zip(config.data.train, sizes, weights, strict=True):
            table.add_row(path, f"{size:,}", f"{size / sizes.sum():.4f}", f"{weight:.4f}")
        console.print(table)
    else:
        settings = {
            name: getattr(options, name) for name in ("runs", "steps", "concentration", "seed")
        }
        found = learn(options.config, overrides, options.output, **settings)
        if found is None:
            console.print(f"stopped; the same command goes on from what {options.output} holds")
            return Cause.PREEMPTED.exit_code
        figures = found
        weights = figures["best"]["weights"]
        _show(figures, console)
        _plot(figures, options.output / "mixture.png")
    fragment = json.dumps(
        dict(zip(figures["corpora"], np.round(weights, 4).tolist(), strict=True)),
        ensure_ascii=False,
    )
    console.print(f"--data.train '{fragment}'", markup=False)
    if options.json:
        Path(options.json).write_text(
            json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
