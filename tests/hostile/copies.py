"""What other users of a host planted where a command writes: folders of theirs, and links."""

import os
from collections.abc import Callable
from pathlib import Path

from harness import Hostile
from launches import write_config

NOBODY = 65534


def _give_away(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def _folder(folder: Path) -> None:
    (folder / "disk").mkdir(0o777)
    _give_away(folder / "disk")


def _linked_folder(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "disk").symlink_to("elsewhere")
    _give_away(folder / "disk")


def _folder_open_to_all(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "disk").chmod(0o777)


def _linked_record(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "victim").write_bytes(b"")
        link = folder / "run" / name
        link.parent.mkdir(parents=True)
        link.symlink_to(folder / "victim")

    return make


def _linked_output(folder: Path) -> None:
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    (folder / "tmp" / "page.html").symlink_to(folder / "victim")
    _give_away(folder / "tmp" / "page.html")


def _train(folder: Path) -> list[str]:
    config = write_config(folder)
    argv = ["baichuan_jax.train", "--config", str(config), "--run_dir", f"{folder}/run"]
    return [*argv, "--train.num_steps", "2", "--optimizer.warmup_steps", "1"]


def _copies(folder: Path) -> list[str]:
    copies = ["--checkpoint.local_dir", f"{folder}/disk", "--checkpoint.local_every", "2"]
    return [*_train(folder), *copies]


def _preflight(folder: Path) -> list[str]:
    return ["baichuan_jax.preflight", *_copies(folder)[1:]]


def _output(module: str, *argv: str) -> Callable[[Path], list[str]]:
    return lambda folder: [module, *argv, f"{folder}/tmp/page.html"]


_COPIES = {"train": _copies, "preflight": _preflight}
_OUTPUT = {
    "report": _output("baichuan_jax.report", "run", "--output"),
    "resilience": _output("baichuan_jax.resilience", "run", "--json"),
    "plan": _output("baichuan_jax.plan", "--json"),
    "kernels": _output("baichuan_jax.kernels", "--json"),
}
# Another user's files can be made by root alone.
_OF_OTHERS = [
    Hostile("foreign_copies", _folder, _COPIES, r"local_dir: .*/disk belongs to 'nobody'"),
    Hostile("linked_copies", _linked_folder, _COPIES, r"/disk belongs to 'nobody'"),
    Hostile("linked_output", _linked_output, _OUTPUT, r"/page\.html is a link that 'nobody' made"),
]
HOSTILE = [
    Hostile("open_copies", _folder_open_to_all, _COPIES, r"every user may write .*/disk"),
    *(
        Hostile(f"linked_{Path(name).stem}", _linked_record(name), {"train": _train}, name)
        for name in ("metrics.jsonl", "events.jsonl", "attempts/lock")
    ),
    *(_OF_OTHERS if os.geteuid() == 0 else []),
]
