"""Where a launch writes: the files of its run and the screen of its user."""

from dataclasses import dataclass

from baichuan_jax.runs.console import Display
from baichuan_jax.runs.events import Event
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
