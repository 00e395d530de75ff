"""docs/deploy.md is true: its commands run in the order in which they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sl_queue.testing.private_broker import PrivateBroker, find_server, free_ports

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text()

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_server() is None, reason="needs a rabbitmq-server on this machine"),
]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SL_QUEUE_")}
    environ = {**kept, "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-e", "-c", script]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_its_commands_take_two_organisations_from_nothing_to_final_weights(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("state*", "over-*"))
    run("python examples/credit/make_data.py 600", tmp_path)
    prepare, keys, job, provision, check, start = blocks("sh")
    for block in (prepare, keys, job):
        run(block, tmp_path)
    (port,) = free_ports(1)
    here = f"--broker-host localhost --port {port} --broker-at {tmp_path}/deployment/broker"
    run(provision.replace("--broker-host broker.example", here), tmp_path)
    lines = (tmp_path / "deployment" / "broker" / "rabbitmq.conf").read_text().splitlines()
    settings = tuple(line for line in lines if not line.startswith(("listeners.tcp", "disk_free_limit")))
    with PrivateBroker(settings=settings) as broker:
        told = run(check, tmp_path)
        assert "login accepted, tried as bank" in told and "can do more" not in told
        run(start, tmp_path)
        (watch,) = blocks("sh operator")
        assert "finished" in run(watch.replace("sl-queue stop job.toml", ""), tmp_path)
        (clean,) = blocks("sh administrator")
        broker.add_user("administrator", "pw", "credit", ".*", ".*", ".*")
        url = re.sub("//.*@", "//administrator:pw@", (tmp_path / "operator" / "broker.url").read_text().strip())
        clean = clean.replace("cleanup job.toml", "cleanup job.toml --yes")
        told = run(f"cd operator; export SL_QUEUE_BROKER='{url}'\n{clean}", tmp_path)
        assert "bank: 0 dead letters in q.bank.dead" in told and "removed 12 queues" in told
    for weights in ("bank/state/final/base", "insurer/state/final/base", "insurer/state/final/fuse"):
        assert (tmp_path / f"{weights}.safetensors").exists()


def test_its_commands_for_containers_name_what_compose_has() -> None:
    compose = (ROOT / "compose.yaml").read_text()
    for block in blocks("sh docker"):
        for profile, service in re.findall(r"--profile (\w+) up -d (\w+)", block):
            assert re.search(rf"^  {service}:\n(?:    .*\n)*?    profiles: \[{profile}\]$", compose, re.MULTILINE)
        for variable in re.findall(r"(SL_QUEUE_\w+)=", block):
            assert f"${{{variable}:-" in compose


def test_the_service_of_the_example_is_for_this_machine_and_serves_what_was_trained() -> None:
    compose = (ROOT / "compose.yaml").read_text()
    listed = compose.split("\nservices:\n")[1].split("\nvolumes:\n")[0]
    services = dict(re.findall(r"^  ([\w-]+):\n((?:    .*\n)+)", listed, re.MULTILINE))
    for party in ("left", "right", "labels"):
        trained, served = services[party], services[f"{party}-serve"]
        (volumes,) = re.findall(r"volumes: .*", trained)
        assert volumes in served and "<<: *serve" in served
        (command,) = re.findall(r"command: \[(.*)\]", trained)
        assert f"command: [{command}, --serve]" in served
    assert 'ports: ["127.0.0.1:${SL_QUEUE_SERVE_PORT:-8080}:8080"]' in services["labels-serve"]
    assert "ports:" not in services["left-serve"] + services["right-serve"]
    assert "  profiles: [serve]\n" in compose.split("\nx-serve: &serve\n")[1].split("\n\n")[0]
    prepared = (ROOT / "ops" / "demo" / "prepare.py").read_text()
    assert 'listen = "0.0.0.0:8080"' in prepared


def test_its_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if not link.startswith("http")]
    assert links
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_every_container_has_a_bounded_log_and_no_worker_shows_its_numbers_beyond_itself() -> None:
    compose = (ROOT / "compose.yaml").read_text()
    bounded = [f"<<: *{name}" for name in ("worker", "broker")]
    for anchor in ("x-worker: &worker", "x-broker: &broker"):
        assert "\n  logging: *logging\n" in compose.split(f"\n{anchor}\n")[1].split("\n\n")[0]
    assert "max-size" in compose and "max-file" in compose
    listed = compose.split("\nservices:\n")[1].split("\nvolumes:\n")[0]
    services = re.findall(r"^  (\w+):\n((?:    .*\n)+)", listed, re.MULTILINE)
    assert len(services) >= 11
    for name, body in services:
        assert "logging: *logging" in body or any(anchor in body for anchor in bounded), name
    image = (ROOT / "workers" / "Dockerfile").read_text()
    assert "SL_QUEUE_METRICS_PORT=9108\n" in image and "${SL_QUEUE_METRICS_PORT:-9108}" in compose
