"""Rules and secret that a run was begun with, kept from its first checkpoint to its end."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sl_queue.config.job import Job
from sl_queue.errors import CheckpointError
from sl_queue.protocol.fingerprints import BY_POSITION, RULES, SEED, rules_of
from sl_queue.storage.secret_file import NAME, read_secret, secret_in

log = logging.getLogger("sl_queue")


def rules_to_keep(job: Job, party: str, begun_with: Mapping[str, Any] | None) -> int:
    """Return the rules of the run whose fingerprint is `begun_with`; for a new one the job's, or the newest.

    Raises CheckpointError if the job asks for others than the run has.
    """
    if begun_with is None:
        return job.rules or RULES
    rules = rules_of(begun_with)
    if rules > RULES:
        raise CheckpointError(
            f"party {party!r}: the run in its state folder was begun under rules {rules} of a later version of "
            f"sl_queue, this one knows rules up to {RULES}; install it, or start from scratch with another folder"
        )
    if job.rules not in (None, rules):
        raise CheckpointError(
            f"party {party!r}: the run in its state folder was begun under rules {rules}, and the job asks for rules "
            f"{job.rules}: remove `rules` from the job, or start from scratch with another state folder"
        )
    if rules != RULES:
        log.info("%s: the run was begun under rules %d, of an earlier version; it keeps them to its end", party, rules)
    return rules


def secret_to_keep(
    party: str,
    chosen: Path | str | None,
    rules: int,
    begun_with: Mapping[str, Any] | None,
    state: Path,
    *,
    private: bool,
) -> bytes:
    """Return what keys the party's draws besides the seed, empty for nothing: as `chosen` in its file, else as begun.

    A new run has a secret if it is `private`; it is made here. Raises JobError for a file that cannot be used, or
    CheckpointError if the run's secret is lost.
    """
    if rules == BY_POSITION:
        if isinstance(chosen, Path):
            raise CheckpointError(
                f"party {party!r}: rules = {rules} key all draws by the job's seed, and [privacy] secret = "
                f"{str(chosen)!r} asks for a secret; remove it, or start afresh under newer rules in a new folder"
            )
        return b""
    if isinstance(chosen, Path):
        return read_secret(chosen)
    begun = (begun_with or {}).get("secret")
    if chosen == SEED or begun == SEED or (begun is None and not private):
        return b""
    if begun is not None and not (state / NAME).exists():
        raise CheckpointError(
            f"party {party!r}: {state / NAME} is missing; a secret keys the draws of the run in this folder: restore "
            "the file, set [privacy] secret to where it is, or start from scratch with another state folder"
        )
    return secret_in(state)


def warn_of_common_draws(party: str, chosen: Path | str | None, rules: int) -> None:
    """Warn that a party which would rather draw privately has no secret."""
    log.warning(
        "%s: the job's seed alone keys what its models draw at random, so every party can compute the noise and "
        "dropout that they add; %s",
        party,
        _why(chosen, rules),
    )


def _why(chosen: Path | str | None, rules: int) -> str:
    if rules == BY_POSITION:
        return f"rules = {rules} ask for that; a new run under newer rules draws with a secret"
    if chosen == SEED:
        return '[privacy] secret = "seed" asks for that; remove it, and a new run draws with a secret'
    return "the run was begun so; a new one, with another state folder, draws with a secret"
