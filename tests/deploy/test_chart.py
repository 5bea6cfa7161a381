"""What the Helm chart makes of its values: valid, confined, and in step with the code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings
from torch.distributed import run as torchrun

from server.processes import _EXPERT_DRAIN_SECONDS
from server.serving import _CLOSING_SECONDS
from server.settings import ExpertSettings, GatewaySettings, WorkerSettings
from tests.deploy.deployment import CHART, ROOT, VALUES, Object, Render, memory_held, run
from tests.deploy.test_containers import last, stages

SETTINGS: dict[str, type[BaseSettings]] = {
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
    "follower": WorkerSettings,
    "expert": ExpertSettings,
}
# Of operators, not of Kubernetes.
WITHOUT_SCHEMA = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "LeaderWorkerSet"}
MANIFESTS = ROOT / "deploy" / "kubernetes"


@pytest.fixture(scope="session", params=VALUES)
def objects(request: pytest.FixtureRequest, render: Render) -> list[Object]:
    return render(VALUES[request.param])


def component(thing: Object) -> str:
    return str(thing["metadata"]["labels"]["app.kubernetes.io/component"])


def templates(objects: list[Object]) -> dict[str, Object]:
    """The pod templates by component; of a worker of several pods, those but its leader are `follower`."""
    found = {
        component(thing): thing["spec"]["template"]
        for thing in objects
        if "template" in thing.get("spec", {})
    }
    for group in of_kind(objects, "LeaderWorkerSet").values():
        made = group["spec"]["leaderWorkerTemplate"]
        found |= {"worker": made["leaderTemplate"], "follower": made["workerTemplate"]}
    return found


def pods(objects: list[Object]) -> dict[str, Object]:
    """The pod template's spec by component."""
    return {name: template["spec"] for name, template in templates(objects).items()}


def of_groups(objects: list[Object]) -> list[Object]:
    """The StatefulSets that the controller makes of LeaderWorkerSets, one of leaders and one of a group."""
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": f"{name}-{kind}"},
            "spec": {
                "serviceName": name,
                "selector": {"matchLabels": template["metadata"]["labels"]},
                "template": template,
            },
        }
        for name in of_kind(objects, "LeaderWorkerSet")
        for kind, template in templates(objects).items()
        if kind in ("worker", "follower")
    ]


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {thing["metadata"]["name"]: thing for thing in objects if thing["kind"] == kind}


def environment(container: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", ())}


@pytest.mark.deploy
@pytest.mark.parametrize("version", ["1.29", "1.33", "1.37"])
def test_kubernetes_takes_it(render: Render, version: str, tools: Path, tmp_path: Path) -> None:
    made = {yaml.safe_dump(thing): thing for values in VALUES.values() for thing in render(values)}
    known = [text for text, thing in made.items() if thing["kind"] not in WITHOUT_SCHEMA]
    groups = of_groups(list(made.values()))
    assert len(groups) == 2
    known += map(yaml.safe_dump, groups)
    assert len(known) > 30
    file = tmp_path / "objects.yaml"
    file.write_text("---\n".join(known))
    run(tools / "kubernetes-validate", "--strict", "--kubernetes-version", version, file)


@pytest.mark.deploy
def test_names_are_unique(objects: list[Object]) -> None:
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in objects]
    assert len(names) == len(set(names))
    kinds = {kind for kind, _ in names}
    assert kinds >= {"Deployment", "Service", "NetworkPolicy"}
    assert len(kinds & {"StatefulSet", "LeaderWorkerSet"}) == 1


@pytest.mark.deploy
def test_pods_are_restricted(objects: list[Object]) -> None:
    """Kubernetes' Pod Security Standard `restricted`, a root file system that is read only, and limits."""
    assert {"gateway", "worker"} <= set(pods(objects))
    for pod in pods(objects).values():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert {kind for volume in pod["volumes"] for kind in volume} <= {
            "name", "emptyDir", "persistentVolumeClaim", "secret",
        }  # fmt: skip
        for container in [*pod["containers"], *pod.get("initContainers", ())]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][bound])
            assert "hostPort" not in json.dumps(container)
            assert re.search(r"(:[\w.-]*\d|@sha256:[0-9a-f]{64})$", container["image"])


@pytest.mark.deploy
def test_volumes_and_mounts_match(objects: list[Object]) -> None:
    claims = [set["spec"].get("volumeClaimTemplates", ()) for set in of_kind(objects, "StatefulSet").values()]
    claimed = [claim["metadata"]["name"] for one in claims for claim in one]
    for name, pod in pods(objects).items():
        volumes = [volume["name"] for volume in pod["volumes"]] + (claimed if name == "worker" else [])
        containers = [*pod["containers"], *pod.get("initContainers", ())]
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert len(volumes) == len(set(volumes))
        assert set(volumes) == mounted


@pytest.mark.deploy
def test_settings_load(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, pod in pods(objects).items():
        [container] = pod["containers"]
        given = {k: v for k, v in environment(container).items() if k.startswith("LLAMA_ADAPTER_")}
        if name == "train":
            assert given == {}
            continue
        settings = SETTINGS[name]
        names = {k.removeprefix("LLAMA_ADAPTER_").lower() for k in given}
        assert names <= set(settings.model_fields)
        with monkeypatch.context() as patch:
            for key, value in given.items():
                patch.setenv(key, value or "memory://")
            settings()
        if name != "follower":
            assert container["ports"][0]["containerPort"] == settings.model_fields["port"].default


@pytest.mark.deploy
def test_threads_are_those_that_the_limit_allows(objects: list[Object]) -> None:
    for name in {"worker", "expert"} & set(pods(objects)):
        [container] = pods(objects)[name]["containers"]
        threads = environment(container)["LLAMA_ADAPTER_NUM_THREADS"]
        assert threads == container["resources"]["limits"]["cpu"]


@pytest.mark.deploy
def test_probes_and_grace_periods_match_the_servers(objects: list[Object]) -> None:
    for name, pod in pods(objects).items():
        [container] = pod["containers"]
        if name in ("train", "follower"):
            assert not [key for key in container if key.endswith("Probe")], "nothing listens"
            continue
        probes = {
            kind: container[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("startup", "readiness", "liveness")
        }
        assert probes == {"startup": "/health/live", "readiness": "/health/ready", "liveness": "/health/live"}
        drain = float(environment(container).get("LLAMA_ADAPTER_DRAIN_SECONDS", _EXPERT_DRAIN_SECONDS))
        hook = (
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        )
        assert hook[0] == "sleep"
        assert (hook[1] == "0") == (name == "worker"), "the worker alone is behind no Service that balances"
        assert pod["terminationGracePeriodSeconds"] > int(hook[1]) + drain + _CLOSING_SECONDS


@pytest.mark.deploy
def test_services_lead_to_pods_and_the_gateway_to_services(objects: list[Object]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in templates(objects).items()}
    services = of_kind(objects, "Service")
    if of_kind(objects, "LeaderWorkerSet"):  # its controller's own
        labels["worker"] |= {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    for service in services.values():
        assert service["spec"]["selector"].items() <= labels[component(service)].items()
    [gateway] = pods(objects)["gateway"]["containers"]
    workers = json.loads(environment(gateway)["LLAMA_ADAPTER_WORKER_URLS"])
    groups = of_kind(objects, "LeaderWorkerSet")
    [worker] = [*of_kind(objects, "StatefulSet").values(), *groups.values()]
    scalers = [
        *of_kind(objects, "HorizontalPodAutoscaler").values(),
        *of_kind(objects, "ScaledObject").values(),
    ]
    bounds = [s["spec"] for s in scalers if s["spec"]["scaleTargetRef"]["name"] == worker["metadata"]["name"]]
    assert all(one["scaleTargetRef"]["kind"] == worker["kind"] for one in bounds)
    most = (
        bounds[0].get("maxReplicas") or bounds[0]["maxReplicaCount"] if bounds else worker["spec"]["replicas"]
    )
    name = worker["metadata"]["name"]
    domain = name if groups else worker["spec"]["serviceName"]
    assert workers == [f"http://{name}-{i}.{domain}:8001" for i in range(most)]
    if groups:
        assert domain not in services, "the controller makes it"
    else:
        assert services[domain]["spec"]["clusterIP"] == "None"
    for url in json.loads(environment(gateway).get("LLAMA_ADAPTER_EXPERT_URLS", "{}")).values():
        assert re.fullmatch(r"http://(.*):8002", url)[1] in services  # type: ignore[index]


@pytest.mark.deploy
def test_nobody_but_the_gateway_reaches_workers_and_experts(objects: list[Object]) -> None:
    policies = {component(p): p["spec"] for p in of_kind(objects, "NetworkPolicy").values()}
    assert set(policies) == set(pods(objects)) - {"follower"}
    groups = of_kind(objects, "LeaderWorkerSet")
    for name, policy in policies.items():
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == name
        if name == "train":
            assert "ingress" not in policy
        elif name != "gateway":
            rule, *others = policy["ingress"]
            out = policy["egress"]
            if name == "worker" and groups:
                [among], (to, *out) = others, out
                assert among == {"from": to["to"]}, "pods of a group talk at ports that they agree on"
                [peer] = to["to"]
                labels = templates(objects)["follower"]["metadata"]["labels"]
                assert peer["podSelector"]["matchLabels"].items() <= labels.items()
            else:
                assert others == []
            peers = [p["podSelector"]["matchLabels"] for p in rule["from"] if "podSelector" in p]
            assert [peer["app.kubernetes.io/component"] for peer in peers] == ["gateway"]
            assert all("namespaceSelector" in p for p in rule["from"] if "podSelector" not in p)
            assert all("to" not in one for one in out), "names, and what extraEgress says"


@pytest.mark.deploy
def test_gpu_workers(render: Render) -> None:
    for values in ("a100", "everything"):
        pod = pods(render(VALUES[values]))["worker"]
        [container] = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert environment(container)["LLAMA_ADAPTER_DEVICE"] == "cuda:0"
        assert "llama-adapter-worker-cuda" in container["image"]
        assert pod["tolerations"]
    assert "tolerations" not in pods(render({}))["worker"]


@pytest.mark.deploy
def test_pods_of_one_worker_share_its_model(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field by field, for the controller's schema is not Kubernetes' own."""
    objects = render(VALUES["multinode"])
    [group] = of_kind(objects, "LeaderWorkerSet").values()
    made = group["spec"]["leaderWorkerTemplate"]
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(group["spec"]) == {"replicas", "startupPolicy", "leaderWorkerTemplate"}
    assert set(made) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert (group["spec"]["startupPolicy"], made["restartPolicy"]) == (
        "LeaderCreated",
        "RecreateGroupOnPodRestart",
    )
    [leader], [follower] = (pods(objects)[name]["containers"] for name in ("worker", "follower"))
    both = environment(leader), environment(follower)
    assert both[0] == both[1] | {
        name: both[0][name] for name in both[0] if "ADAPTER_DIR" in name or "ROOT" in name
    }
    assert leader["args"] == follower["args"]
    assert leader["args"] == [
        "worker",
        "--node-rank=$(LWS_WORKER_INDEX)",
        "--master-addr=$(LWS_LEADER_ADDRESS)",
    ]
    assert int(both[0]["LLAMA_ADAPTER_NNODES"]) == made["size"] == 2
    gpus = [container["resources"]["limits"]["nvidia.com/gpu"] for container in (leader, follower)]
    assert int(both[0]["LLAMA_ADAPTER_TENSOR_PARALLEL"]) == sum(gpus) == 4
    assert leader["image"] == follower["image"]
    assert "llama-adapter-worker-vllm" in leader["image"]
    for name in ("worker", "follower"):
        volumes = {volume["name"]: volume for volume in pods(objects)[name]["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert volumes["models"]["persistentVolumeClaim"]["readOnly"]
        assert ("adapters" in volumes) == (name == "worker"), "the leader hands them round"


@pytest.mark.deploy
def test_vllm_on_the_cpu(render: Render) -> None:
    for nodes in (1, 2):
        values = {"worker": {"vllm": {"enabled": True, "gpus": 0, "nodes": nodes}}}
        [container] = pods(render(values))["worker"]["containers"]
        assert int(environment(container)["LLAMA_ADAPTER_TENSOR_PARALLEL"]) == nodes
        assert "nvidia.com/gpu" not in container["resources"]["limits"]


@pytest.mark.deploy
def test_unhealthy_pods_do_not_hold_up_a_drain(render: Render) -> None:
    budgets = of_kind(render({}), "PodDisruptionBudget").values()
    assert {component(one) for one in budgets} == {"gateway", "worker", "expert"}
    assert {one["spec"].get("unhealthyPodEvictionPolicy") for one in budgets} == {"AlwaysAllow"}


@pytest.mark.deploy
def test_the_next_worker_is_replaced_when_the_new_address_is_known(render: Render) -> None:
    [workers] = of_kind(render({}), "StatefulSet").values()
    assert workers["spec"]["minReadySeconds"] >= 30, "for so long a cluster's DNS may keep an address"


@pytest.mark.deploy
def test_the_gateway_holds_what_it_admits(objects: list[Object], monkeypatch: pytest.MonkeyPatch) -> None:
    [container] = pods(objects)["gateway"]["containers"]
    given = environment(container)
    with monkeypatch.context() as patch:
        for name in ("LLAMA_ADAPTER_MAX_CONCURRENT_REQUESTS", "LLAMA_ADAPTER_MAX_BODY_BYTES"):
            patch.setenv(name, given[name])
        held = memory_held(GatewaySettings())
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", container["resources"]["limits"]["memory"]).groups()  # type: ignore[union-attr]
    assert held <= int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


LOOKUP = "lookup .apiVersion .kind .root.Release.Namespace .name"


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("values", "worker"), [("everything", "StatefulSet"), ("groups that scale", "LeaderWorkerSet")]
)
def test_scaling_begins_with_the_pods_that_run(
    render: Render, tools: Path, tmp_path: Path, values: str, worker: str
) -> None:
    """A cluster's answers stand in for `lookup`, which has none where nothing but rendering is done."""
    given = VALUES[values]
    asked: Object = yaml.safe_load(given.read_text()) if isinstance(given, Path) else dict(given)
    asked["gateway"] = asked.get("gateway", {}) | {"autoscaling": {"enabled": True}}
    scaled = {"Deployment": "gateway", worker: "worker"}

    def replicas(made: list[Object]) -> dict[str, Any]:
        found = [thing for thing in made if thing["kind"] in scaled and component(thing) != "expert"]
        return {thing["kind"]: thing["spec"].get("replicas") for thing in found}

    assert replicas(render(asked)) == dict.fromkeys(scaled)
    copy = tmp_path / "deploy"
    shutil.copytree(ROOT / "deploy", copy)
    helpers = copy / "helm" / "llama-adapter" / "templates" / "_helpers.tpl"
    groups = {"LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1"}
    running = '(dict "spec" (dict "replicas" 3))'
    live = " ".join(
        f'"{groups.get(kind, "apps/v1")} {kind} llama-adapter llama-adapter-{part}" {running}'
        for kind, part in scaled.items()
    )
    key = 'printf "%s %s %s %s" .apiVersion .kind .root.Release.Namespace .name'
    assert LOOKUP in helpers.read_text()
    helpers.write_text(helpers.read_text().replace(LOOKUP, f"get (dict {live}) ({key})"))
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(asked))
    text = run(tools / "python", copy / "render.py", tmp_path / "values.yaml")
    assert replicas([thing for thing in yaml.safe_load_all(text) if thing]) == dict.fromkeys(scaled, 3)


@pytest.mark.deploy
def test_secrets_are_named_and_never_held(render: Render) -> None:
    objects = render(VALUES["everything"])
    assert of_kind(objects, "Secret") == {}
    gateway = pods(objects)["gateway"]
    assert [v["secret"]["secretName"] for v in gateway["volumes"] if "secret" in v] == ["keys"]
    [store] = [e for e in gateway["containers"][0]["env"] if e["name"] == "LLAMA_ADAPTER_LIMITS_STORE"]
    assert store["valueFrom"] == {"secretKeyRef": {"name": "redis", "key": "url"}}
    [copy] = pods(objects)["worker"]["initContainers"]
    assert copy["envFrom"] == [{"secretRef": {"name": "storage"}}]


@pytest.mark.deploy
def test_run_time_adapters_are_remembered_where_there_is_a_volume(render: Render) -> None:
    for values, size in ((VALUES["everything"], "64Mi"), ({}, None)):
        [workers] = of_kind(render(values), "StatefulSet").values()
        claims = workers["spec"].get("volumeClaimTemplates", ())
        assert [claim["spec"]["resources"]["requests"]["storage"] for claim in claims] == [size] * bool(size)
        [container] = workers["spec"]["template"]["spec"]["containers"]
        assert environment(container).get("LLAMA_ADAPTER_ADAPTER_STATE") == (
            "/state/adapters.json" if size else None
        )


@pytest.mark.deploy
def test_another_training_is_another_job(render: Render) -> None:
    def job(recipe: str, tag: str = "") -> Object:
        train = {"enabled": True, "recipe": recipe, "runsClaim": "runs"}
        [made] = of_kind(render({"train": train, "image": {"tag": tag}}), "Job").values()
        return made

    one = job("smollm2-text")
    others = [job("smollm2-caption"), job("smollm2-text", tag="next")]  # an upgrade could not change the Job
    assert one["metadata"]["name"] not in {other["metadata"]["name"] for other in others}
    assert pods([one])["train"]["containers"][0]["args"] == ["train", "smollm2-text", "resume=true"]


@pytest.mark.deploy
def test_training_uses_every_gpu_that_it_reserves(render: Render) -> None:
    def container(gpu: Object) -> Object:
        objects = render({"train": {"enabled": True, "runsClaim": "runs", "gpu": gpu, "saveSeconds": 90}})
        [only] = pods(objects)["train"]["containers"]
        return dict(only)

    assert "command" not in container({"enabled": True})
    assert "command" not in container({"enabled": False, "count": 2})
    made = container({"enabled": True, "count": 2})
    *entry, program = json.loads(last(stages()["train"], "ENTRYPOINT"))
    command = made["command"]
    assert command[: len(entry)] == entry
    assert command[len(entry)] == "torchrun"
    told = torchrun.get_args_parser().parse_args([*command[len(entry) + 1 :], *made["args"]])
    assert told.standalone
    assert told.no_python
    assert int(told.nproc_per_node) == made["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert told.shutdown_timeout == 80, "before the grace period ends"
    assert [told.training_script, *told.training_script_args] == [program, *made["args"]]


@pytest.mark.deploy
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train": {"enabled": True}}, "train.runsClaim"),
        ({"gateway": {"ingress": {"enabled": True}}}, "gateway.ingress.host"),
        ({"worker": {"autoscaling": {"kind": "magic"}}}, "neither hpa nor keda"),
        ({"adapters": {"claim": "a", "objectStorage": {"source": "b:c"}}}, "not both"),
        ({"worker": {"vllm": {"nodes": 2}}}, "needs worker.vllm.enabled"),
        (
            {"worker": {"vllm": {"enabled": True, "nodes": 2}, "state": {"size": "1Mi"}}},
            "no volume of its own",
        ),
        ({"monitoring": {"enabled": True}}, "networkPolicy.monitoringFrom"),
        (
            {
                "monitoring": {"enabled": True},
                "networkPolicy": {"enabled": False},
                "gateway": {"keysSecret": "a"},
            },
            "monitoring.keySecret",
        ),
        ({"tracing": {"endpoint": "http://jaeger:4318"}}, "networkPolicy.extraEgress"),
        ({"gateway": {"limitsStoreSecret": "redis"}}, "networkPolicy.extraEgress"),
        ({"gateway": {"settings": {"port": 80}}}, "leave out gateway.settings.port: the chart says it"),
        ({"expert": {"settings": {"uds": "/tmp/x"}}}, "leave out expert.settings.uds: the chart says it"),
    ],
)
def test_values_that_cannot_be_are_refused(render: Render, values: Object, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        render(values)


@pytest.mark.deploy
def test_monitoring_uses_the_one_set_of_rules(render: Render) -> None:
    objects = render(VALUES["everything"])
    [rule] = of_kind(objects, "PrometheusRule").values()
    kept = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    for group in kept["groups"]:  # there may be releases in other namespaces
        for alert in group["rules"]:
            alert["expr"] = alert["expr"].replace('job="', 'namespace="llama-adapter", job="')
            alert["labels"]["namespace"] = "llama-adapter"
    assert rule["spec"] == kept
    [dashboard] = of_kind(objects, "ConfigMap").values()
    assert json.loads(dashboard["data"]["llama-adapter.json"])["uid"] == "llama-adapter"
    for monitor in of_kind(objects, "ServiceMonitor").values():
        [endpoint] = monitor["spec"]["endpoints"]
        assert endpoint["relabelings"] == [
            {"targetLabel": "job", "replacement": f"llama-adapter-{component(monitor)}"}
        ]


@pytest.mark.deploy
def test_prometheus_is_let_in(objects: list[Object]) -> None:
    monitors = {
        component(monitor): monitor["spec"] for monitor in of_kind(objects, "ServiceMonitor").values()
    }
    if not monitors:
        return
    keys = "LLAMA_ADAPTER_KEYS_FILE" in environment(pods(objects)["gateway"]["containers"][0])
    for name, spec in monitors.items():
        [endpoint] = spec["endpoints"]
        assert ("authorization" in endpoint) == (keys and name == "gateway")
    policies = {component(policy): policy["spec"] for policy in of_kind(objects, "NetworkPolicy").values()}
    for name in {"worker", "expert"} & set(policies):
        assert [peer for peer in policies[name]["ingress"][0]["from"] if "namespaceSelector" in peer]


@pytest.mark.deploy
def test_manifests_are_current(tools: Path, tmp_path: Path) -> None:
    copy = tmp_path / "deploy"
    shutil.copytree(ROOT / "deploy", copy)
    run(tools / "python", copy / "render.py", "--manifests")
    made = {path.name: path.read_text() for path in (copy / "kubernetes").iterdir()}
    kept = {path.name: path.read_text() for path in MANIFESTS.iterdir()}
    assert made == kept, "`make manifests` makes deploy/kubernetes anew"


def kustomization() -> Any:
    return yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())


def test_kustomization_names_every_manifest() -> None:
    files = {path.name for path in MANIFESTS.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization()["resources"]) == files


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds() -> None:
    built = [thing for thing in yaml.safe_load_all(run("kubectl", "kustomize", MANIFESTS)) if thing]
    namespaced = [thing for thing in built if thing["kind"] != "Namespace"]
    assert len(namespaced) >= 10
    assert {thing["metadata"]["namespace"] for thing in namespaced} == {kustomization()["namespace"]}


@pytest.mark.deploy
@pytest.mark.parametrize("part", ["gateway", "worker", "expert"])
def test_a_setting_that_a_value_says_is_refused_among_the_settings(render: Render, part: str) -> None:
    """Were it there twice, the last one would hold without a word."""
    values = {
        "gateway": {"keysSecret": "keys", "limitsStoreSecret": "redis"},
        "worker": {"gpu": {"enabled": True}, "state": {"size": "1Mi"}},
        "adapters": {"claim": "adapters"},
        "networkPolicy": {"extraEgress": [{"ports": [{"port": 6379}]}]},
    }
    [made] = pods(render(values))[part]["containers"]
    settings = yaml.safe_load((CHART / "values.yaml").read_text())[part]["settings"]
    names = {e["name"].removeprefix("LLAMA_ADAPTER_").lower() for e in made["env"]} - settings.keys()
    for name in names & {*SETTINGS[part].model_fields}:
        with pytest.raises(AssertionError, match=rf"leave out {part}.settings.{name}: \S+"):
            render({**values, part: {**values.get(part, {}), "settings": {name: "1"}}})
