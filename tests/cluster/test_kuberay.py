"""KubeRay's manifests: against its published fields where they are at hand, and what they must say in any case."""

import copy
import gzip
import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml

from rayrl import __version__
from rayrl.config import load_config

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "cluster" / "kuberay"
FIELDS = ROOT.parent / "shared" / "data" / "kuberay_v1_fields.json.gz"


def documents(name):
    return list(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()))


def cluster_spec(manifest):
    return manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]


def groups(manifest):
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.fixture(params=["raycluster", "rayjob"])
def manifest(request):
    (one,) = documents(request.param)
    return one


def closed(schema):
    """The schema with every object that lists its fields allowing no others."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        schema["additionalProperties"] = False
    return schema


def refused_fields(manifest):
    """What KubeRay's field definitions do not allow, as paths."""
    if not FIELDS.exists():
        pytest.skip("KubeRay's field definitions (../shared/data/kuberay_v1_fields.json.gz) are not here")
    schema = closed(json.loads(gzip.decompress(FIELDS.read_bytes()))[manifest["kind"]])
    errors = jsonschema.Draft7Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def test_every_field_is_one_that_kuberay_has(manifest):
    assert refused_fields(manifest) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["spec"].update(entryPoint="x"), "'entryPoint' was unexpected"),
        (lambda m: groups(m)[1].update(minReplica=1), "'minReplica' was unexpected"),
        (lambda m: groups(m)[1].update(maxReplicas="4"), "is not of type 'integer'"),
        (lambda m: groups(m)[0]["template"]["spec"]["containers"][0].pop("name"), "'name' is a required property"),
        (lambda m: cluster_spec(m)["authOptions"].update(mode="password"), "is not one of"),
    ],
)
def test_a_wrong_field_is_noticed(manifest, change, message):
    broken = copy.deepcopy(manifest)
    change(broken)
    assert any(message in found for found in refused_fields(broken))


def test_job_and_cluster_describe_one_cluster():
    (job,), (cluster,) = documents("rayjob"), documents("raycluster")
    assert cluster_spec(job) == cluster_spec(cluster)


def test_the_head_has_no_work(manifest):
    assert groups(manifest)[0]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in json.dumps(groups(manifest)[0])


def test_workers_scale_between_bounds(manifest):
    workers = {group["groupName"]: group for group in groups(manifest)[1:]}
    assert set(workers) == {"cpu", "gpu"}
    for group in workers.values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["maxReplicas"] > 0
    assert cluster_spec(manifest)["enableInTreeAutoscaling"]
    limits = {name: containers(group)[0]["resources"]["limits"] for name, group in workers.items()}
    assert "nvidia.com/gpu" in limits["gpu"] and "nvidia.com/gpu" not in limits["cpu"]


def containers(group):
    return group["template"]["spec"]["containers"]


def test_every_pod_is_bounded_probed_and_unprivileged(manifest):
    for group in groups(manifest):
        pod, (container,) = group["template"]["spec"], containers(group)
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= set(limits) and limits == requests  # what Ray counts is what there is
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert pod["serviceAccountName"].startswith("rayrl-")
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_probes_ask_what_ray_answers_without_a_token():
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    assert "/api/healthz" in PUBLIC_EXACT_PATHS
    assert DEFAULT_DASHBOARD_AGENT_LISTEN_PORT == 52365


def test_every_node_has_rays_version_and_an_image_of_this_version(manifest):
    import importlib.metadata

    assert cluster_spec(manifest)["rayVersion"] == importlib.metadata.version("ray")
    for group in groups(manifest):
        target = "gpu" if group.get("groupName") == "gpu" else "cpu"
        assert containers(group)[0]["image"] == f"rayrl:{__version__}-{target}"


def test_the_shared_disk_and_the_key_are_mounted_on_every_pod(manifest):
    for group in groups(manifest):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in containers(group)[0]["volumeMounts"]}
        claims = [d["metadata"]["name"] for d in documents("namespace") if d["kind"] == "PersistentVolumeClaim"]
        assert [mounts["/mnt/rayrl"]["persistentVolumeClaim"]["claimName"]] == claims
        secret = mounts["/var/run/secrets/rayrl"]["secret"]
        assert secret["secretName"] == "rayrl-oracle" and secret["defaultMode"] & 0o007 == 0


def secrets_in(tree):
    """Environment variables with a literal value that look like a key, and Secrets with their content."""
    if isinstance(tree, list):
        return [found for item in tree for found in secrets_in(item)]
    if not isinstance(tree, dict):
        return []
    found = [f"Secret {tree['metadata']['name']}"] if tree.get("kind") == "Secret" else []
    if "value" in tree and re.search(r"KEY|TOKEN|SECRET|PASSWORD", str(tree.get("name")), re.IGNORECASE):
        found.append(tree["name"])
    return found + [nested for value in tree.values() for nested in secrets_in(value)]


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "namespace"])
def test_no_secret_is_written_down(name):
    assert secrets_in(documents(name)) == []
    assert "env_vars" not in json.dumps(documents(name))


def test_a_written_secret_is_noticed():
    assert secrets_in([{"env": [{"name": "OPENAI_API_KEY", "value": "sk-1"}]}]) == ["OPENAI_API_KEY"]
    assert secrets_in({"kind": "Secret", "metadata": {"name": "s"}}) == ["Secret s"]


def test_only_tokens_and_this_namespace_reach_the_cluster(manifest):
    assert cluster_spec(manifest)["authOptions"]["mode"] == "token"
    assert groups(manifest)[0]["serviceType"] == "ClusterIP"
    (policy,) = [d for d in documents("namespace") if d["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {} and policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(peer.get("podSelector") is not None for rule in policy["spec"]["ingress"] for peer in rule["from"])


def test_the_namespace_holds_what_the_pods_name(manifest):
    base = documents("namespace")
    names = {kind: {d["metadata"]["name"] for d in base if d["kind"] == kind} for kind in {d["kind"] for d in base}}
    assert manifest["metadata"]["namespace"] in names["Namespace"]
    assert {d["metadata"]["namespace"] for d in base if d["kind"] != "Namespace"} == names["Namespace"]
    assert {g["template"]["spec"]["serviceAccountName"] for g in groups(manifest)} <= names["ServiceAccount"]
    (claim,) = [d for d in base if d["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def job_config(entrypoint):
    """The resolved config of an entry point, as the job itself would read it from the repository."""
    python, job, config, *overrides = shlex.split(entrypoint)
    assert python == "python" and (ROOT / job).is_file() and (ROOT / config).is_file()
    resolved = load_config(ROOT / config, overrides)
    assert job == f"jobs/{resolved.pipeline}.py"
    return resolved


def test_the_job_runs_a_config_that_exists_on_the_shared_disk():
    (job,) = documents("rayjob")
    assert job_config(job["spec"]["entrypoint"]).run_dir.startswith("/mnt/rayrl/")
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": "/opt/rayrl"}  # the Dockerfile's WORKDIR
    assert not re.search(r"[;&|$`<>]", job["spec"]["entrypoint"])  # KubeRay puts it into a shell command as it is


@pytest.mark.parametrize(
    "entrypoint", ["python jobs/ppo.py jobs/configs/quickstart.toml", "python jobs/rlp.py jobs/configs/quickstart.toml"]
)
def test_an_entry_point_that_is_no_job_is_noticed(entrypoint):
    with pytest.raises(AssertionError):
        job_config(entrypoint)


def test_a_job_that_gets_no_nodes_ends():
    spec = documents("rayjob")[0]["spec"]
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] is True
