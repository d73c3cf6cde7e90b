"""The manifests fit Kubernetes' schemas and match the service."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.application import create_app
from app.http.paths import PROBE_PATHS
from app.metrics import Metrics
from app.settings import Settings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "deploy.md"
VARIANTS = ["base", "cpu", "gpu", "cpu with keys", "gpu with keys and postgres"]
# The oldest that has all that is used (preStop.sleep without a feature gate), and the newest known.
VERSIONS = ["1.30", "1.32", kubernetes_validate.latest_version()]
CUSTOM = {"PodMonitor", "InferenceService"}

Manifest = dict[str, Any]


def load(path: Path) -> list[Manifest]:
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def patched(manifest: Manifest, patch: str) -> Manifest:
    """A copy with a JSON patch (RFC 6902) applied, as far as the overlays use it."""
    result = copy.deepcopy(manifest)
    for operation in yaml.safe_load(patch):
        *way, last = operation["path"].strip("/").replace("~1", "/").split("/")
        place: Any = result
        for name in way:
            place = place[int(name)] if isinstance(place, list) else place[name]
        match operation["op"]:
            case "test":
                assert place[last] == operation["value"]
            case "replace":
                assert last in place
                place[last] = operation["value"]
            case "add" if last == "-":
                place.append(operation["value"])
            case "add":
                assert last not in place
                place[last] = operation["value"]
            case "remove":
                del place[last]
            case other:
                raise AssertionError(f"teach this test {other}")
    return result


def build(folder: Path) -> list[Manifest]:
    """What `kubectl kustomize` makes of the folder."""
    (kustomization,) = load(folder / "kustomization.yaml")
    known = {"apiVersion", "kind", "resources", "patches"}
    assert set(kustomization) <= known, "teach this test what else it says"
    manifests = []
    for name in kustomization.get("resources", []):
        path = folder / name
        manifests += build(path) if path.is_dir() else load(path)
    return apply(manifests, kustomization)


def apply(manifests: list[Manifest], kustomization: Manifest) -> list[Manifest]:
    for patch in kustomization.get("patches", []):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        hits = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
        if not hits:
            assert kind in CUSTOM, f"the patch of {kind} {name} finds nothing"
            continue
        (hit,) = hits
        manifests = [patched(m, patch["patch"]) if m is hit else m for m in manifests]
    return manifests


def variant(name: str) -> list[Manifest]:
    folder, components = parts(name)
    manifests = build(FOLDER / folder)
    for component in components:
        manifests = apply(manifests, load(FOLDER / component / "kustomization.yaml")[0])
    return manifests


def parts(name: str) -> tuple[str, list[str]]:
    """The folder of a variant, and its components."""
    folder, _, components = name.partition(" with ")
    return folder, components.split(" and ") if components else []


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (item for item in manifests if item["kind"] == kind)
    return found


def pods() -> list[Any]:
    """The pod of every variant."""
    found = [
        pytest.param(only(variant(name), "Deployment")["spec"]["template"]["spec"], id=name)
        for name in VARIANTS
    ]
    (service,) = load(FOLDER / "kserve" / "inference-service.yaml")
    return [*found, pytest.param(service["spec"]["predictor"], id="kserve")]


# The schemas


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_manifest_fits_the_schemas(name: str, version: str) -> None:
    manifests = [item for item in variant(name) if item["kind"] not in CUSTOM]
    assert {item["kind"] for item in manifests} == {
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"
    }  # fmt: skip
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("wrong", ["kind", "misspelt", "type"])
def test_schemas_reject_invalid_manifests(wrong: str) -> None:
    manifest = copy.deepcopy(only(variant("base"), "Deployment"))
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    if wrong == "kind":
        del manifest["spec"]["selector"]
    elif wrong == "misspelt":
        container["readynessProbe"] = container.pop("readinessProbe")
    else:
        container["env"][0]["value"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_inference_service_pod_is_valid(version: str) -> None:
    (service,) = load(FOLDER / "kserve" / "inference-service.yaml")
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1",
        "InferenceService",
    )
    pod = dict(service["spec"]["predictor"])
    # What KServe adds to the fields of a pod.
    least, most = pod.pop("minReplicas"), pod.pop("maxReplicas")
    assert 1 < least < most
    assert (pod.pop("scaleMetric"), pod.pop("scaleTarget")) == ("cpu", 80)
    manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": pod}
    kubernetes_validate.validate(manifest, version, strict=True)
    (container,) = pod["containers"]
    assert container["name"] == "kserve-container"  # by which KServe knows it


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
@pytest.mark.parametrize("name", VARIANTS)
def test_kustomize_gives_the_same_result(name: str, tmp_path: Path) -> None:
    folder, components = parts(name)
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    own = {"resources": [f"../kubernetes/{folder}"]}
    if components:
        own["components"] = [f"../kubernetes/{component}" for component in components]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "kustomization.yaml").write_text(yaml.safe_dump(own))
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "own")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}
    assert made == {item["kind"]: item for item in variant(name)}


def test_every_file_is_used() -> None:
    names = {path.parent.name for path in FOLDER.rglob("*.yaml")}
    assert names == {"base", "cpu", "gpu", "keys", "kserve", "monitoring", "postgres"}
    for path in FOLDER.rglob("kustomization.yaml"):
        (kustomization,) = load(path)
        beside = {other.name for other in path.parent.glob("*.yaml")} - {path.name}
        assert beside - {"adapter-values.yaml"} <= set(kustomization.get("resources", []))


# What they name


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    app = create_app(Settings(checkpoint=tmp_path_factory.mktemp("none"), device="cpu"))
    return {path for path, methods in app.openapi()["paths"].items() if "get" in methods}


@pytest.mark.parametrize("pod", pods())
def test_probes_use_existing_routes(pod: Manifest, routes: set[str]) -> None:
    (container,) = pod["containers"]
    (port,) = container["ports"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[name]["httpGet"]
        assert asked["path"] in routes
        assert asked["port"] in (port["name"], port["containerPort"])
        alive = asked["path"] in ("/livez", "/v2/health/live")
        assert alive == (name == "livenessProbe")
    options = dict(zip(container["args"][1::2], container["args"][2::2], strict=True))
    assert container["args"][0] == "serve"
    assert options == {"--host": "0.0.0.0", "--port": str(port["containerPort"])}
    assert re.search(rf"^EXPOSE {port['containerPort']}$", (ROOT / "Dockerfile").read_text(), re.M)


@pytest.mark.parametrize("pod", pods())
def test_probes_need_neither_a_key_nor_a_known_host(pod: Manifest) -> None:
    (container,) = pod["containers"]
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["httpGet"]["path"] for probe in probes} <= PROBE_PATHS


@pytest.mark.parametrize("pod", pods())
def test_memory_limit_covers_the_services_peak(pod: Manifest) -> None:
    (container,) = pod["containers"]
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    settings, model = Settings(), int(1.4e9)  # as docs/configuration.md has it
    limits = [settings.max_held_bytes, settings.decode_memory * 3 // 2, settings.jobs_bytes, model]
    assert sum(limits) <= limit
    assert not {"ROBUST_MAX_HELD_BYTES", "ROBUST_DECODE_MEMORY", "ROBUST_JOBS_BYTES"} & {
        variable["name"] for variable in container["env"]
    }


@pytest.mark.parametrize("pod", pods())
def test_variables_are_valid_settings(pod: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pod["containers"]
    for variable in container["env"]:
        prefix, _, name = variable["name"].partition("_")
        assert prefix == "ROBUST"
        assert name.lower() in Settings.model_fields
        monkeypatch.setenv(variable["name"], variable.get("value", "a-key,another"))
    settings = Settings()
    # What it takes to end: the load balancer's moment, then at most the grace time.
    sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pod["terminationGracePeriodSeconds"] >= sleep + settings.grace_seconds + 5


@pytest.mark.parametrize("pod", pods())
def test_container_can_write_where_the_image_does(pod: Manifest) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}:" in dockerfile
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"tmp": "/tmp"}  # what `--read-only --tmpfs /tmp` gives
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    resources = container["resources"]
    assert set(resources["limits"]) == set(resources["requests"]) >= {"cpu", "memory"}


def test_gpu_variant_requests_and_uses_a_gpu() -> None:
    (container,) = only(variant("gpu"), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    device = {item["name"]: item.get("value") for item in container["env"]}["ROBUST_DEVICE"]
    assert device == "cuda"


@pytest.mark.parametrize("name", VARIANTS)
def test_clients_stick_to_their_replica_unless_state_is_shared(name: str) -> None:
    manifests = variant(name)
    service = only(manifests, "Service")["spec"]
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    shared = any(item["name"] == "ROBUST_DATABASE_URL" for item in container["env"])
    assert shared == ("postgres" in name)
    assert service["sessionAffinity"] == ("None" if shared else "ClientIP")
    assert ("sessionAffinityConfig" in service) == (not shared)


@pytest.mark.parametrize("name", VARIANTS)
def test_selectors_match_the_pods(name: str) -> None:
    manifests = variant(name)
    deployment = only(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    ports = deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert only(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    service = only(manifests, "Service")["spec"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] in [port["name"] for port in ports]
    target = only(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]
    if name != "base":
        monitor = only(manifests, "PodMonitor")["spec"]
        assert monitor["selector"]["matchLabels"] == labels
        (endpoint,) = monitor["podMetricsEndpoints"]
        assert endpoint["port"] in [port["name"] for port in ports]
        assert ("authorization" in endpoint) == ("keys" in name)


def test_autoscaler_metric_uses_the_services_metrics(routes: set[str]) -> None:
    (values,) = load(FOLDER / "monitoring" / "adapter-values.yaml")
    (rule,) = values["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    made = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("${1}", r"\1"), series)
    (metric,) = only(variant("base"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == made
    metrics = Metrics()
    samples = {  # of a service that has not yet been asked anything
        (sample.name, sample.labels.get("kind")): sample.value
        for item in metrics.registry.collect()
        for sample in item.samples
    }
    for name in {series, *re.findall(r"robust_\w+", rule["metricsQuery"])}:
        assert samples[name, "predict"] == 0
    assert 'kind="predict"' in rule["seriesQuery"]
    assert only(variant("cpu"), "PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"] in routes


# The page


def test_page_names_exactly_the_existing_variants() -> None:
    text = PAGE.read_text()
    for name in ("cpu", "gpu", "keys", "kserve", "monitoring", "postgres"):
        assert f"deploy/kubernetes/{name}" in text or f"kubernetes/{name}" in text, name
    for path in re.findall(r"deploy/kubernetes/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for variable in re.findall(r"ROBUST_(\w+)", text):
        assert variable.lower() in Settings.model_fields, variable


BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
KINDS = ["Deployment", "InferenceService"]  # what they set the image of


@pytest.mark.parametrize(("block", "kind"), list(zip(BLOCKS, KINDS, strict=True)), ids=KINDS)
def test_kustomizations_on_the_page_build(block: str, kind: str, tmp_path: Path) -> None:
    kustomization = yaml.safe_load(block)
    for name in [*kustomization["resources"], *kustomization.get("components", [])]:
        assert (FOLDER / Path(name).name / "kustomization.yaml").is_file()
    if shutil.which("kubectl"):
        shutil.copytree(FOLDER, tmp_path / "robust" / "deploy" / "kubernetes")
        (tmp_path / "kustomization.yaml").write_text(block)
        command = ["kubectl", "kustomize", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        spec = only(list(yaml.safe_load_all(done.stdout)), kind)["spec"]
        pod = spec["predictor"] if "predictor" in spec else spec["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/robust:1.0"
