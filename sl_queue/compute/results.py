"""Modules that a run in this process was given to train, and those it leaves."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torch import nn

from sl_queue.compute.building import build_module, final_module, part_of
from sl_queue.compute.final_weights import settled
from sl_queue.compute.modules.handover import Loan
from sl_queue.compute.spec import ComputeSpec, Part
from sl_queue.errors import JobError


def trained_module(spec: ComputeSpec, path: Path, loan: Loan) -> nn.Module:
    """Load as `final_module`, from the module trained in this process, if it was: with all that it has become."""
    part = part_of(path)
    given = given_module(spec, part)
    make = None if given is not None else lambda: build_module(spec, part, None)
    module = loan.trained(spec.party, part, make)
    return final_module(spec, path) if module is None else settled(module, spec.party, path)


def given_module(spec: ComputeSpec, part: Part) -> nn.Module | None:
    """Return the module that a party brings or names, None if it names what makes one, or nothing that is there."""
    table = spec.part(part)
    model = None if table is None else table.model
    if isinstance(model, str):
        with suppress(JobError):
            model = spec.code.load(model)
    return model if isinstance(model, nn.Module) else None


def lend_given(parties: Iterable[ComputeSpec], loan: Loan) -> None:
    """Lend the modules that are given in code. Raises JobError for any that two models share."""
    parts: tuple[Part, Part] = ("base", "fuse")
    for spec in parties:
        for part in parts:
            module = given_module(spec, part)
            if module is not None:
                loan(spec.party, part, module, made=False)
