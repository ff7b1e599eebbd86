"""The supervisors' common memory: files in a run's `attempts/` folder, which all hosts share.

`hosts/NAME.json` is the heartbeat of a host's supervisor. `N/` is the N-th launch of the run:
`plan.json` says on which hosts, `coordinator.json` where process 0 listens, `ended-NAME.json` how a
host's processes ended, `verdict.json` what came of it all. Plan and verdict are written by whoever
is first, and never again: so all hosts agree.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from baichuan_jax.runs.files import write_atomically


class Attempts:
    """One host's view of `attempts/`. `seconds` without a heartbeat make a host's supervisor dead."""

    def __init__(self, path: Path, host: str, seconds: float) -> None:
        self.path, self._host, self._seconds = path, host, seconds
        self._beat, self._beaten = 0, time.monotonic()
        self._began = time.monotonic()
        # host -> its newest beat, when that was first seen, whether it is another than the first:
        # an old file is no sign of life
        self._seen: dict[str, tuple[Any, float, bool]] = {}

    def beat(self, address: str) -> None:
        """Publish this host's heartbeat and look at the others'."""
        self._beat += 1
        self._replace(
            self.path / "hosts" / f"{self._host}.json",
            {"address": address, "pid": os.getpid(), "beat": self._beat},
        )
        now = time.monotonic()
        late = (
            now - self._beaten - 2.0
        )  # time in which this process was kept from running says nothing about the others
        if late > 0:
            self._seen = {
                host: (beat, since + late, moved)
                for host, (beat, since, moved) in self._seen.items()
            }
        self._beaten = now
        for file in (self.path / "hosts").glob("*.json"):
            beat = read(file)
            if beat is not None and (
                file.stem not in self._seen or self._seen[file.stem][0] != beat
            ):
                self._seen[file.stem] = (
                    beat,
                    now,
                    file.stem in self._seen or file.stem == self._host,
                )

    def alive(self) -> set[str]:
        """Hosts whose supervisors' hearts beat."""
        now = time.monotonic()
        return {
            host
            for host, (_, since, moved) in self._seen.items()
            if moved and now - since < self._seconds
        }

    def heard_since(self, host: str, moment: float) -> bool:
        """Whether a host's heart has beaten after a moment of time.monotonic()."""
        return host in self._seen and self._seen[host][1] > moment

    def lost(self, host: str) -> bool:
        """Whether a host's heart has not beaten for so long, as far as this host has been able to see."""
        _, since, _ = self._seen.get(host, (None, self._began, False))
        return time.monotonic() - since >= self._seconds

    def latest(self) -> int:
        """The number of the newest launch; 0 where there is none."""
        return max(
            (int(path.name) for path in self.path.glob("[0-9]*") if path.name.isdigit()), default=0
        )

    def file(self, number: int, name: str) -> Path:
        """A file of a launch, without .json."""
        return self.path / str(number) / f"{name}.json"

    def read(self, number: int, name: str) -> Any:
        """Its content, or None."""
        return read(self.file(number, name))

    def write(self, number: int, name: str, content: Any) -> None:
        """A file that this host alone writes."""
        self._replace(self.file(number, name), content)

    def claim(self, number: int, name: str, content: Any) -> bool:
        """Write a file that only one host may write; whether it was this one. A hard link is made once, on any file system."""
        file = self.file(number, name)
        draft = file.with_name(f".{name}-{self._host}-{os.getpid()}.json")
        write_atomically(draft, json.dumps(content).encode())
        try:
            os.link(draft, file)
            return True
        except FileExistsError:
            return False
        finally:
            draft.unlink()

    def _replace(self, file: Path, content: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        draft.write_text(json.dumps(content), encoding="utf-8")
        os.replace(draft, file)


def read(file: Path) -> Any:
    """A JSON file's content, or None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
