"""Commands on this device: import of a published checkpoint, evaluation and generation.

Logits of the golden model (tests/golden/tiny, which the original's code computed in float32 on a
CPU) have to agree within the rounding of each type. The model of the stage `training` answers
questions on the device and on this machine's CPU; both have to choose the same answers. Tokens/s of
its generation leave out compilation.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from stage import REPOSITORY, Stage

GOLDEN = REPOSITORY / "tests" / "golden"
# Largest difference of logits, relative to the largest logit. bfloat16 keeps 8 bits, and a logit is
# a sum of terms that cancel.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
QUESTIONS, SUBJECTS = 3, ["logic", "law"]
# Of float32 logits here beside those of the CPU, relative to the largest of a question.
LOGITS = 1e-3


def run(stage: Stage) -> None:
    """Import, logits, evaluation, generation."""
    folder = stage.work / "commands"
    folder.mkdir()
    # This process and a command beside it share the memory.
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.4"
    imported = folder / "imported"
    seconds = command(stage, "hf", "import", str(GOLDEN / "tiny"), str(imported))
    stage.say(f"`hf import` of the golden checkpoint took {seconds:.1f} s, mostly to start jax.")
    logits(stage, imported)
    run_path = trained(stage)
    if run_path is None:
        why = "no run was found: the stage `training` has not finished its first one"
        stage.leave_out("evaluation and generation", why, needed=True)
        return
    generation(stage, run_path)
    evaluation(stage, run_path, folder)


def command(stage: Stage, name: str, *argv: str, **variables: str) -> float:
    """Run a command of the package; its seconds. Raises RuntimeError where it fails."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"baichuan_jax.{name}", *argv],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=max(stage.seconds_left - 5, 1),
    )
    print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        ended = f"baichuan_jax.{name} ended with {done.returncode}: {last[:200]}"
        raise RuntimeError(f"{ended}\n{done.stderr[-2000:]}")
    return time.monotonic() - began


def trained(stage: Stage) -> Path | None:
    """The folder of the undisturbed run of the stage `training`."""
    found = stage.values_of("training").get("run")
    return Path(found) if found else None


def logits(stage: Stage, imported: Path) -> None:
    """The golden model's logits in both types, from published files and an imported checkpoint."""
    import jax

    from baichuan_jax import load_pretrained
    from baichuan_jax.kernels.attention.api import choose_attention

    golden = dict(np.load(GOLDEN / "tiny" / "parity.npz"))
    wanted, rows = golden["A_logits"], []
    for dtype in ("float32", "bfloat16"):
        for source, path in (("published", GOLDEN / "tiny"), ("imported", imported)):
            model = load_pretrained(path, dtype=dtype)
            got = np.asarray(model(golden["A_ids"]), np.float32)
            error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            shape = {"head_dim": model.config.head_dim, "length": wanted.shape[1]}
            where = {"device": jax.devices()[0], "masked": False, "context": 1}
            kernel, _ = choose_attention("auto", dtype=dtype, **shape, **where)
            allowed = f"{TOLERANCE[dtype]:.0e}"
            rows.append([f"{source}, {dtype}", kernel, f"{error:.1e}", allowed])
            if not error <= TOLERANCE[dtype]:
                off = f"{error:.1e} of the largest ({allowed} allowed)"
                stage.wrong(f"golden logits in {dtype} differ by {off}")
    columns = ["", "attention", "largest difference", "allowed"]
    stage.table("Logits of the golden model", columns, rows)
    stage.headline(f"golden logits within {rows[0][2]} (float32) and {rows[2][2]} (bfloat16)")


def evaluation(stage: Stage, run_path: Path, folder: Path) -> None:
    """Answer the same questions on the device and on this machine's CPU."""
    # This is tests/exam.py.
    from exam import make_ceval

    data = make_ceval(folder / "ceval", SUBJECTS, QUESTIONS)
    found, seconds = {}, {}
    for place in ("device", "CPU"):
        variables = {"JAX_PLATFORMS": "cpu"} if place == "CPU" else {}
        output = folder / f"evaluation-{place}"
        options = {"checkpoint": run_path, "data": data, "output": output, "limit": QUESTIONS}
        options |= {"subjects": ",".join(SUBJECTS), "shots": 1 if stage.sizes.small else 3}
        argv = [f"--{name}={value}" for name, value in options.items()]
        try:
            seconds[place] = command(stage, "evaluate", "ceval", *argv, **variables)
        except subprocess.TimeoutExpired:
            stage.leave_out(f"evaluation on the {place}", "no time was left", needed=True)
            return
        lines = (output / "records.jsonl").read_text(encoding="utf-8").splitlines()
        found[place] = {(line["subject"], line["index"]): line for line in map(json.loads, lines)}
    differences, changed = [], []
    for key, here in found["device"].items():
        there = found["CPU"][key]
        largest = max(map(abs, there["logits"]))
        off = max(abs(a - b) for a, b in zip(here["logits"], there["logits"], strict=True))
        differences.append(off / largest)
        if here["prediction"] != there["prediction"]:
            changed.append(key)
    off = f"{max(differences):.1e} ({LOGITS:.0e} allowed)"
    rows = [
        ["questions", str(len(differences))],
        ["largest difference of logits from the CPU's, of the largest logit", off],
        ["other choices", str(len(changed))],
        *[[f"seconds on the {place}", f"{s:.1f}"] for place, s in seconds.items()],
    ]
    stage.table("C-Eval's protocol on bundled text", ["", ""], rows)
    if not max(differences) <= LOGITS:
        stage.wrong(f"logits of questions differ from the CPU's, of the largest, by {off}")


def generation(stage: Stage, run_path: Path) -> None:
    """Tokens a second without compilation, and a generated text."""
    from baichuan_jax import Generator, load_pretrained
    from baichuan_jax.hf.source import find_tokenizer, read_source

    tokenizer, rows = find_tokenizer(read_source(run_path)), []
    for dtype in ("bfloat16", "float32"):
        generator = Generator(load_pretrained(run_path, dtype=dtype))
        for prompts in (1, 16) if dtype == "bfloat16" else (1,):
            sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 0}
            texts = generator.generate(tokenizer, ["It was a truth"] * prompts, 64, **sampling)
            speed = generator.speed
            assert speed is not None
            prompt = f"{speed.prompt_tokens / speed.prefill_seconds:,.0f}"
            new = f"{speed.new_tokens / speed.decode_seconds:,.0f}"
            rows.append([dtype, str(prompts), prompt, new])
            if dtype == "bfloat16" and prompts == 1:
                stage.say(f"It writes: {' '.join(texts[0].split())[:200]}")
            columns = ["dtype", "texts at once", "prompt tokens/s", "new tokens/s"]
            stage.table("Generation", columns, rows)
            if stage.seconds_left < 15:
                stage.leave_out("the rest of generation", "no time was left")
                return
    if shutil.disk_usage(stage.work).free < 1 << 30:
        stage.say("Less than 1 GiB of disk is left.")
