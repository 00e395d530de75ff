"""The walk of a thing through the code, as a profiler sees it: the files that give it on, from where it is made.

A file gives it on if one of its functions returns it, in any form, or has it in a variable while what it called reaches
the end of a leg. Functions that only look at it (its shape, whether it is finite) do not.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal

import sl_queue

PACKAGE = Path(sl_queue.__file__).parent

Arguments = Mapping[str, Any]
Does = Literal["begin", "resume", "pause", "pause after", "end"]


def always(_: Arguments) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Mark:
    """A function at which a leg begins, rests or ends, if its arguments are such."""

    function: str  # as in `code.co_qualname`
    does: Does
    leg: str
    on: Callable[[Arguments], bool] = always
    called: str = ""  # what the leg is called that ends there; without it, as it began


@dataclass(slots=True)
class Call:
    """A function of ours that runs. Mutable: a delivery may come in the middle of it."""

    code: CodeType
    frame: FrameType
    interrupted: tuple[str | None, list[CodeType]] | None = None
    pauses: bool = False


@dataclass(slots=True)
class Here:
    """One thread's place on the walk. Mutable."""

    stack: list[Call] = field(default_factory=list)
    leg: str | None = None
    found: list[CodeType] = field(default_factory=list)


class Walk:
    """Files by leg; mutable: threads add to them while a run is traced. `carries` tells what has the thing."""

    def __init__(self, carries: Callable[[Any], bool], marks: Sequence[Mark]) -> None:
        self._carries, self._local = carries, threading.local()
        self._marks: dict[str, list[Mark]] = {}
        for mark in marks:
            self._marks.setdefault(mark.function, []).append(mark)
        self.legs: dict[str, set[str]] = {mark.called or mark.leg: set() for mark in marks}

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Trace the threads that begin in the body.

        Nothing is collected meanwhile: in CPython before 3.11.3, which Debian has, a collection in one thread reads
        what another has freed that enters a function under a profiler (gh-101975), and the process dies of it.
        """
        collecting = gc.isenabled()
        gc.disable()
        threading.setprofile(self._saw)
        try:
            yield
        finally:
            threading.setprofile(None)
            if collecting:
                gc.enable()

    def _saw(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(PACKAGE)):
            return
        if not hasattr(self._local, "here"):
            self._local.here = Here()
        if event == "call":
            self._called(self._local.here, code, frame)
        else:
            self._returned(self._local.here, code, value)

    def _called(self, here: Here, code: CodeType, frame: FrameType) -> None:
        here.stack.append(Call(code, frame))
        for mark in self._marks.get(code.co_qualname, ()):
            if not mark.on(frame.f_locals):
                continue
            match mark.does:
                case "begin":
                    here.stack[-1].interrupted = (here.leg, here.found) if mark.leg == "arrives" else None
                    here.leg, here.found = mark.leg, []
                case "resume":
                    here.leg = mark.leg
                case "pause":
                    here.leg = None
                case "pause after":
                    here.stack[-1].pauses = True
                case "end":
                    self._end(here, mark)

    def _returned(self, here: Here, code: CodeType, value: Any) -> None:
        while here.stack:  # one that was there before the trace began is not on it
            call = here.stack.pop()
            if call.code is code:
                break
        else:
            return
        if here.leg is not None and self._carries(value):
            here.found.append(code)
        if call.interrupted is not None:
            here.leg, here.found = call.interrupted
        if call.pauses:
            here.leg = None

    def _end(self, here: Here, mark: Mark) -> None:
        if here.leg != mark.leg:
            return
        began = max((n for n, call in enumerate(here.stack) if call.interrupted is not None), default=1)
        waiting = here.stack[began - 1 :]  # of a link, no more than what hands a delivery over
        holding = [call.code for call in waiting if any(map(self._carries, list(call.frame.f_locals.values())))]
        for code in (*here.found, *holding):
            self.legs[mark.called or mark.leg].add(str(Path(code.co_filename).relative_to(PACKAGE)))
        here.leg = None
