"""Are there known vulnerabilities in the pinned packages? Asks pip-audit.

pip-audit itself says "no known vulnerabilities" when the service knows nothing of any package, as behind
a mirror without PyPI's JSON API. Here that is no all-clear: it is said, and it fails with --require.

Exit status: 0 none known, or not audited; 1 some known; 2 not audited, with --require.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("constraints", help="a file of NAME==VERSION lines")
    parser.add_argument("--require", action="store_true", help="fail where the service cannot be asked")
    options, more = parser.parse_known_args()
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", options.constraints, "--no-deps", "--disable-pip",
        "--format", "json", "--progress-spinner", "off", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        report, cause = [], (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    else:
        cause = "it knows none of the packages"
    lines, status = verdict(report, cause, options.require)
    print("\n".join(lines), flush=True)
    return status


def verdict(report: list[dict[str, Any]], cause: str, require: bool) -> tuple[list[str], int]:
    """What to say, and the exit status, for pip-audit's `dependencies`."""
    audited = [package for package in report if "vulns" in package]
    skipped = [package["name"] for package in report if "vulns" not in package]
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    if found:
        return [*found, f"pip-audit: {len(found)} known vulnerabilities; raise the versions above"], 1
    if not audited:
        said = f"pip-audit: NOT AUDITED. The vulnerability service cannot be asked: {cause}"
        return [said], 2 if require else 0
    lines = [f"pip-audit: no known vulnerabilities in {len(audited)} packages"]
    if skipped:
        lines.append(f"pip-audit: NOT AUDITED, unknown to the service: {', '.join(skipped)}")
    return lines, 2 if skipped and require else 0


if __name__ == "__main__":
    sys.exit(main())
