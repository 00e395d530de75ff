"""What a run in this process was given to train, and what it leaves."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from torch import nn

from sl_queue.compute.building import Part, build_module, final_module, part_of
from sl_queue.compute.final_weights import settled
from sl_queue.compute.modules.handover import Loan
from sl_queue.config.job import Job, PartyFile, imported
from sl_queue.errors import JobError


def trained_module(job: Job, party_file: PartyFile, path: Path, loan: Loan) -> nn.Module:
    """As `final_module`, from the module that was trained in this process, if it was: with all that it has become."""
    part = part_of(path)
    given = given_module(party_file, part)
    make = None if given is not None else lambda: build_module(job, party_file, part, None)
    module = loan.trained(party_file.party, part, make)
    return final_module(job, party_file, path) if module is None else settled(module, party_file.party, path)


def given_module(party_file: PartyFile, part: Part) -> nn.Module | None:
    """The module that a party file brings or names, None if it names what makes one, or nothing that is there."""
    table = party_file.base if part == "base" else party_file.fuse
    model = None if table is None else table.model
    if isinstance(model, str):
        with suppress(JobError):
            model = imported(model, party_file.folder)
    return model if isinstance(model, nn.Module) else None


def lend_given(parties: Iterable[PartyFile], loan: Loan) -> None:
    """Lend the modules that are given in code. Raises JobError for any that two models share."""
    parts: tuple[Part, Part] = ("base", "fuse")
    for party_file in parties:
        for part in parts:
            module = given_module(party_file, part)
            if module is not None:
                loan(party_file.party, part, module, made=False)
