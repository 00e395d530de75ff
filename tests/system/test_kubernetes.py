"""Rendering of ops/kubernetes: valid for the API, restricted, and with no secret of a party at its hands.

No cluster is here: the schemas of the API are those that the package kubernetes-validate brings.
"""

import shutil
import subprocess
from base64 import b64decode
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sl_queue.config.job import Job
from sl_queue.deployment.provision import Place, provision
from tests.support.credit import EXAMPLE

yaml = pytest.importorskip("yaml")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[2]
OVERLAYS = ("bank", "insurer", "scheduler", "broker")
OPERATORS = "rabbitmq.com/v1beta1"  # of an operator, whose schema is not the API's

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders, and is not here")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Objects by overlay, made as docs/kubernetes.md says."""
    folder = tmp_path_factory.mktemp("kubernetes")
    shutil.copytree(ROOT / "ops" / "kubernetes", folder / "kubernetes")
    place = Place(("broker.sl-queue-broker.svc",), hands=("bank", "insurer"))
    provision(Job.load(EXAMPLE / "job.toml"), place, folder / "out", frozenset(), datetime.now(UTC))
    overlays = folder / "kubernetes" / "overlays"
    for name in OVERLAYS:
        if name == "broker":
            for path in (folder / "out" / "broker").iterdir():
                shutil.copy(path, overlays / name)
            (overlays / name / "cookie").write_text("a cookie")
            continue
        shutil.copytree(folder / "out" / name, overlays / name / "lead")
        shutil.copy(EXAMPLE / "job.toml", overlays / name)
        if name != "scheduler":
            shutil.copytree(folder / "out" / f"{name}-hand", overlays / name / "hand")
            shutil.copy(EXAMPLE / f"{name}.toml", overlays / name / "party.toml")
            shutil.copy(EXAMPLE / f"{name}.py", overlays / name / "models.py")
    return {name: render(overlays / name) for name in OVERLAYS}


def render(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def of(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_for_the_api(rendered: dict[str, list[dict[str, Any]]], overlay: str) -> None:
    assert rendered[overlay]
    for each in rendered[overlay]:
        kubernetes_validate.validate(each, "1.30", strict=True)


def test_an_object_that_is_not_valid_is_noticed(rendered: dict[str, list[dict[str, Any]]]) -> None:
    wrong = of(rendered["bank"], "Deployment")[0] | {"spec": {"replicaz": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_restricted_and_every_namespace_enforces_it(
    rendered: dict[str, list[dict[str, Any]]], overlay: str
) -> None:
    (namespace,) = of(rendered[overlay], "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    owners = [*of(rendered[overlay], "StatefulSet"), *of(rendered[overlay], "Deployment")]
    assert owners
    for pod in (owner["spec"]["template"]["spec"] for owner in owners):
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "memory" in container["resources"]["limits"]
    assert of(rendered[overlay], "NetworkPolicy")


@pytest.mark.parametrize("party", ["bank", "insurer"])
def test_a_hand_has_neither_the_partys_login_nor_its_key_nor_a_state(
    rendered: dict[str, list[dict[str, Any]]], party: str
) -> None:
    objects = rendered[party]
    (hands,), secrets = of(objects, "Deployment"), {each["metadata"]["name"]: each for each in of(objects, "Secret")}
    pod = hands["spec"]["template"]["spec"]
    given = next(volume for volume in pod["volumes"] if volume["name"] == "given")["projected"]["sources"]
    names = [source["secret"]["name"] for source in given if "secret" in source]
    assert len(names) == 1 and names[0].startswith("hand-")
    assert sorted(secrets[names[0]]["data"]) == ["broker.url", "ca.crt"]
    url = b64decode(secrets[names[0]]["data"]["broker.url"]).decode()
    assert url.startswith(f"amqps://credit.{party}.hand:") and f"/credit.{party}.hands?" in url
    assert not any("persistentVolumeClaim" in v and not v["persistentVolumeClaim"]["readOnly"] for v in pod["volumes"])
    (scaler,) = of(objects, "HorizontalPodAutoscaler")
    metric = scaler["spec"]["metrics"][0]["external"]["metric"]
    assert metric["selector"]["matchLabels"] == {"queue": f"credit.{party}.tasks"}


def test_the_workers_are_those_of_the_roles(rendered: dict[str, list[dict[str, Any]]]) -> None:
    started = {
        name: of(rendered[name], "StatefulSet")[0]["spec"]["template"]["spec"]["containers"][0]["args"][0]
        for name in ("bank", "insurer", "scheduler")
    }
    assert started == {
        "bank": "workers.feature_party",
        "insurer": "workers.label_holder",
        "scheduler": "workers.scheduler",
    }


def test_the_cluster_operators_broker_is_what_its_own_reference_says() -> None:
    (cluster,) = yaml.safe_load_all((ROOT / "ops" / "kubernetes" / "base" / "broker" / "cluster.yaml").read_text())
    assert (cluster["apiVersion"], cluster["kind"]) == (OPERATORS, "RabbitmqCluster")
    assert cluster["spec"]["replicas"] == 3 and cluster["spec"]["tls"]["disableNonTLSListeners"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
@pytest.mark.parametrize("unit", ["sl-queue@.service", "sl-queue-standby@.service", "sl-queue-hand@.service"])
def test_a_unit_of_systemd_has_no_fault(unit: str, tmp_path: Path) -> None:
    text = (ROOT / "ops" / "systemd" / unit).read_text().replace("/opt/sl_queue/bin/python", shutil.which("true") or "")
    instance = tmp_path / unit.replace("@", "@1")
    instance.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", instance], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
