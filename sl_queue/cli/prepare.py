"""The commands that come before a run: check, plan, cuts, privacy, key and provision."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sl_queue.cli.options import Broker, JobPath, PartyPaths
from sl_queue.errors import JobError


def check(
    job: JobPath,
    parties: Annotated[list[Path] | None, typer.Argument(metavar="[PARTY...]", help="The party files at hand.")] = None,
    broker: Broker = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Also the names of exchanges and queues.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Keep what was found as OUT/check.txt too, for `sl-queue report`.")
    ] = None,
) -> None:
    """Find everything that can be wrong before anything is started, and report on the tables at hand."""
    from sl_queue.checking.check import check_job
    from sl_queue.checking.findings import Finding, Level
    from sl_queue.observe.console import show_finding, stdout

    console, lines = stdout(), list[str]()

    def say(found: Finding) -> None:
        if verbose or found.level is not Level.DETAIL:
            show_finding(console, found.level, found.text)
            lines.append(f"{found.level:8}{found.text}\n")

    code = check_job(job, parties or [], broker, say)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "check.txt").write_text("".join(lines), encoding="utf-8")
    raise typer.Exit(code)


def plan(
    job: JobPath,
    parties: PartyPaths,
    rtt: Annotated[float, typer.Option(min=0, help="Milliseconds from a feature party to the broker and back.")] = 0.0,
    bandwidth: Annotated[float | None, typer.Option(min=0.001, help="Mbit/s of that link; default: no limit.")] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores that all parties share, if on one machine.")] = None,
    link: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MS[,MBIT]", help="A feature party whose link is another: --link bank=80,100."),
    ] = None,
) -> None:
    """Measure a few steps here, and rank the pipelines: which [pipeline] and [wire] are fastest over that link."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.planning.measuring import Link
    from sl_queue.planning.plan import lines, links_named, plan_job

    agreed = Job.load(job)
    links = Link(rtt, bandwidth, cores, links_named(link or [], agreed))
    found = plan_job(agreed, [PartyFile.load(path) for path in parties], links)
    print("\n".join(lines(found)))


def cuts(
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="The whole model, as module:callable, found from this folder.")
    ],
    rows: Annotated[
        str, typer.Option(help="A shape to draw rows of, 8,3,32,32, or module:callable that gives rows of your own.")
    ],
    party: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMNS", help="Columns or layers of a party; default: one party with everything."),
    ] = None,
) -> None:
    """Rank the layers at which a module can be cut: bytes per row, compute on each side, what is given away."""
    from sl_queue.planning import cuts as ranking

    here = Path.cwd()
    parties = ranking.parties_named(party or ["party=*"])
    found = ranking.ranked(ranking.module_named(module, here), parties, ranking.rows_named(rows, here))
    print("\n".join(ranking.lines(*found)))


def privacy(
    job: JobPath,
    parties: PartyPaths,
    picture: Annotated[Path | None, typer.Option(help="Write utility against attacks into this SVG file.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Keep the table as OUT/privacy.txt too, for `sl-queue report`.")
    ] = None,
) -> None:
    """Train briefly here with each defence, and print what it costs and what it keeps: a table to choose from."""
    from sl_queue.config.job import Job, PartyFile
    from sl_queue.planning import privacy as trials

    trial = trials.trial_of(Job.load(job), [PartyFile.load(path) for path in parties])
    print(trials.HEADER, flush=True)
    found = []
    for outcome in trials.outcomes(trial):
        found.append(outcome)
        print(trials.line(outcome, trial), flush=True)
    print("", *trials.explanation(trial), *trials.pasted(found, trial), sep="\n")
    if out is not None:
        lines = (trials.HEADER, *(trials.line(outcome, trial) for outcome in found), "", *trials.explanation(trial))
        out.mkdir(parents=True, exist_ok=True)
        (out / "privacy.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    if picture is not None:
        picture.write_text(trials.picture(found, trial))
        print(f"\n{picture}: utility against the worst attack")


def key(
    out: Annotated[Path, typer.Option(help="The file for the private key; it must not exist yet.")],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A party of the job, scheduler or operator.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a secret for a party's random draws instead; it has no NAME.")
    ] = False,
) -> None:
    """Make a key for sealing messages; prints the public part, for the job."""
    if private == (name is not None):
        told = "a secret has no NAME: leave it out" if private else "whose key? give the NAME of a party, or --private"
        raise JobError(told)
    if private:
        _make_secret(out)
    else:
        _make_key(str(name), out)


def _make_secret(out: Path) -> None:
    from sl_queue.storage.secret_file import write_secret

    write_secret(out)
    print(f"# {out} stays with its party, beside its file; a run that was begun with it goes on only with it")
    print(f"[privacy]\nsecret = {json.dumps(str(out))}")


def _make_key(name: str, out: Path) -> None:
    from sl_queue.protocol.messages import SCHEDULER
    from sl_queue.security.keys import PrivateKey, write_key

    made = PrivateKey.generate(signs=name == SCHEDULER)
    write_key(out, made)
    print(f"[security.keys.{name}]")
    for field, text in made.public.texts().items():
        print(f'{field} = "{text}"')


def provision(
    job: JobPath,
    broker_host: Annotated[
        list[str], typer.Option(help="Name or address of the broker; repeat it for each further node, tried in turn.")
    ],
    out: Annotated[Path, typer.Option(help="Parent of all folders; existing files are kept.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where the broker listens.")] = 5671,
    at: Annotated[str, typer.Option(help="Where a role's folder will lie; '.' if its worker is started in it.")] = ".",
    broker_at: Annotated[str, typer.Option(help="Where the broker's folder will lie.")] = "/etc/sl_queue",
    client_certificates: Annotated[
        bool, typer.Option("--client-certificates", help="Log in with certificates instead of passwords.")
    ] = False,
    rotate: Annotated[
        list[str] | None, typer.Option(help="logins, certificates, authority or keys: replace these.")
    ] = None,
    hands: Annotated[
        list[str] | None, typer.Option(metavar="PARTY", help="A party whose hands meet it here; may be repeated.")
    ] = None,
) -> None:
    """Write everything a deployment needs: one folder for each party, one for the broker."""
    from datetime import UTC, datetime

    from sl_queue.config.job import Job
    from sl_queue.deployment.provision import Place, Secret, provision

    secrets = _known(rotate or [], "--rotate", [kind.value for kind in Secret])
    agreed = Job.load(job)
    place = Place(tuple(broker_host), port, at, broker_at, client_certificates, tuple(hands or ()))
    keys = provision(agreed, place, out, frozenset(map(Secret, secrets)), datetime.now(UTC))
    print(f"{out / 'broker'}: for {broker_at} on the machine of the broker")
    for role in keys:
        print(f"{out / role}: for {role}")
    for party in place.hands:
        print(f"{out / f'{party}-hand'}: for the hands of {party}")
    print(f"{out / 'authority'}: keep ca.key away from all of them")
    listed = {name: public.model_dump(exclude_none=True) for name, public in agreed.security.keys.items()}
    if listed != {name: public.texts() for name, public in keys.items()}:
        print(f"{out / 'security.toml'}: put this into {job}, at every party, and messages are sealed")


def _known(names: list[str], option: str, possible: list[str]) -> list[str]:
    """Return the names that an option was given. Raises JobError for one that means nothing."""
    unknown = [name for name in names if name not in possible]
    if unknown:
        raise JobError(f"{option} {unknown[0]}: it must be {', '.join(possible)}")
    return names
