"""Writes the built-in example as a deployment: for each role of `compose.yaml` a folder with what is its own.

It runs once, in a container without a network. What is there is left as it is, so that an interrupted run goes on.
"""

import datetime
import os
import re
import shutil
import tempfile
from pathlib import Path

from sl_queue.config.job import Job
from sl_queue.deployment.provision import Place, provision
from sl_queue.local.demo import FILES, write_demo
from sl_queue.protocol.messages import OPERATOR, SCHEDULER

OUT = Path("/out")  # a volume for each role is mounted below it
WORKER = 10001  # the user of the image
TABLES = {**FILES, "labels": "labels.csv"}
SERVE = """
[predict]
path = "{table}"

[serve]
deadline = 10.0
"""  # docker compose --profile serve up
LISTEN = 'listen = "0.0.0.0:8080"\n'  # within its network; compose.yaml lets this machine in
HANDS = "\n[hands]\n"  # every party may have hands: docker compose up --detach --scale left-hand=4


def main() -> None:
    """Write the demo's files."""
    if (OUT / OPERATOR / "job.toml").exists():  # the last to be written
        print("prepared already")
        return
    with tempfile.TemporaryDirectory() as temporary:
        demo, secrets = Path(temporary) / "demo", Path(temporary) / "secrets"
        write_demo(demo)
        _set_epochs(demo / "job.toml")
        for party in TABLES:
            with (demo / f"{party}.toml").open("a") as file:
                file.write(HANDS + SERVE.format(table=TABLES[party]) + (LISTEN if party == "labels" else ""))
        place = Place(("broker",), hands=tuple(TABLES))
        provision(Job.load(demo / "job.toml"), place, secrets, frozenset(), datetime.datetime.now(datetime.UTC))
        job = f"{(demo / 'job.toml').read_text()}\n{(secrets / 'security.toml').read_text()}"
        _give("broker", list((secrets / "broker").iterdir()))
        for role in (*TABLES, SCHEDULER, OPERATOR):
            own = [*(secrets / role).iterdir()]
            if role in TABLES:
                own += [demo / TABLES[role], demo / "models.py", demo / f"{role}.toml"]
            (Path(temporary) / "job.toml").write_text(job)
            _give(role, [*own, Path(temporary) / "job.toml"])
            if role in TABLES:  # a hand has a login of its own, and no key
                alike = [path for path in own if path.parent == demo]
                _give(f"{role}-hand", [*(secrets / f"{role}-hand").iterdir(), *alike, Path(temporary) / "job.toml"])
    print(f"prepared {', '.join(sorted(path.name for path in OUT.iterdir()))}")


def _set_epochs(job: Path) -> None:
    """As many as SL_QUEUE_EPOCHS says."""
    if epochs := os.environ.get("SL_QUEUE_EPOCHS"):
        job.write_text(re.sub(r"^epochs = .*$", f"epochs = {int(epochs)}", job.read_text(), flags=re.MULTILINE))


def _give(role: str, files: list[Path]) -> None:
    """Copy files into a role's folder. A worker's belong to its user; the broker's image has a user of its own."""
    folder = OUT / role
    for path in files:
        shutil.copy(path, folder)
        if role == "broker":
            (folder / path.name).chmod(0o644)
        else:
            os.chown(folder / path.name, WORKER, WORKER)
    if role != "broker":
        os.chown(folder, WORKER, WORKER)


if __name__ == "__main__":
    main()
