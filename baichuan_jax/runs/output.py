"""Where a launch writes: the files of its run and the screen of its user."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from baichuan_jax.config.messages import hide_secrets
from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Event, LeftOut
from baichuan_jax.runs.metrics import Writer


@dataclass(frozen=True)
class Output:
    """The run's files and its user's screen; silent on all processes but 0."""

    writer: Writer
    display: Display

    def event(self, event: Event) -> None:
        """A line of events.jsonl."""
        self.writer.event(event)

    def say(self, text: str, style: str | None = None) -> None:
        """A message to the user, above the progress bar."""
        self.display.say(text, style=style)

    @contextlib.contextmanager
    def leaving_out(self, what: str) -> Iterator[None]:
        """Leave out what fails inside, say so and record it: it is no reason to end the launch."""
        try:
            yield
        except Exception as error:
            self._left_out(what, f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            self._left_out(what, "interrupted")

    def _left_out(self, what: str, error: str) -> None:
        # Before they are cut: of half an address nobody sees where its password ends.
        error = hide_secrets(error)
        self.event(LeftOut(what=what, error=error[:2000]))
        first = error.splitlines()[0][:300]
        self.say(f"{what}: left out, the run goes on without it: {first}", style="yellow")
