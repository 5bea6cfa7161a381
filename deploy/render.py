"""Renders the Helm chart: `render.py [VALUES]` prints it, `render.py --manifests` writes deploy/kubernetes.

Runs in the environment of `make manifests`, whose helm_python is Helm's own library.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

HERE = Path(__file__).resolve().parent
CHART = HERE / "helm" / "llama-adapter"
MANIFESTS = HERE / "kubernetes"
NAME = NAMESPACE = "llama-adapter"


def lint(values: dict[str, Any]) -> list[str]:
    """What `helm lint --strict` has to say, but for the advice to add an icon."""
    report = helm.lint(str(CHART), values, strict=True, namespace=NAMESPACE)
    told = [str(message["error"]) for message in report["messages"] if message["severity"] > 1]
    return [*told, *map(str, report["errors"])]


def render(values: dict[str, Any]) -> dict[str, str]:
    """File name → YAML of each template that gives any."""
    with helm.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values, name=NAME, namespace=NAMESPACE)
    files = {Path(path).name: text.strip() + "\n" for path, text in sorted(rendered.items())}
    return {
        name: text for name, text in files.items() if name.endswith(".yaml") and any(yaml.safe_load_all(text))
    }


def write_manifests() -> None:
    """The chart with its default values, for `kubectl apply -k deploy/kubernetes`."""
    files = render({})
    for old in set(MANIFESTS.glob("*.yaml")) - {
        MANIFESTS / "kustomization.yaml",
        MANIFESTS / "namespace.yaml",
    }:
        old.unlink()
    for name, text in files.items():
        (MANIFESTS / name).write_text(f"# Made from deploy/helm by `make manifests`.\n{text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("values", nargs="?", type=Path, help="a file of values")
    parser.add_argument("--manifests", action="store_true", help="write deploy/kubernetes")
    options = parser.parse_args()
    if options.manifests:
        write_manifests()
        return 0
    values = yaml.safe_load(options.values.read_text()) if options.values else {}
    complaints = lint(values)
    print("\n".join(complaints), file=sys.stderr, end="\n" if complaints else "")
    for name, text in render(values).items():
        print(f"---\n# {name}\n{text}", end="")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
