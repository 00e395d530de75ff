"""Everything the scheduler has ordered so far, as one value; commands only ever add to it."""

from dataclasses import dataclass, replace

from sl_queue.protocol.control import Align, Command, Finish, Open, Start, Stop


@dataclass(frozen=True, slots=True)
class Orders:
    """The newest command of each type that was meant for this incarnation of the worker."""

    start: Start | None = None
    open: Open | None = None
    finish: Finish | None = None
    stop: Stop | None = None
    asked: Open | None = None  # the newest of all, also one that opens less: it says what the scheduler lacks

    def after(self, command: Command) -> "Orders":
        """Return these orders with one more command; commands that came out of order never undo a later one."""
        match command:
            case Start():
                if self.start is not None and command.generation <= self.start.generation:
                    return self
                return replace(self, start=command, open=None, finish=None, asked=None)  # of the older generation
            case Open():
                if self.open is not None and command.through < self.open.through:
                    return replace(self, asked=command)
                return replace(self, open=command, asked=command)
            case Finish():
                return replace(self, finish=command)
            case Stop():
                if self.stop is not None and command.error is None and (self.stop.error or command.after_step is None):
                    return self
                return replace(self, stop=command)
            case Align():
                return self  # left over: the rows are aligned before a worker joins


class Restarted(Exception):
    """The scheduler began a new generation; unwind to the worker's outer loop and start from `start`."""

    def __init__(self, start: Start) -> None:
        super().__init__(f"generation {start.generation} begins after step {start.rollback_steps[-1]}")
        self.start = start
