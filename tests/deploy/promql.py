"""Reads PromQL expressions as a JSON list and prints of each the labels that it asks of which metrics.

Runs in the environment of the tools; an expression that is no PromQL ends it with an error.
"""

from __future__ import annotations

import json
import sys

import promql_parser


def asked(expression: str) -> dict[str, list[str]]:
    """Metric → labels that are matched; those of groupings are under ``""``."""
    found: dict[str, list[str]] = {"": []}

    def see(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            labels = [matcher.name for matcher in node.matchers.matchers]
            found.setdefault(node.name, []).extend(labels)
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            found[""] += node.modifier.labels

    promql_parser.walk(promql_parser.parse(expression), see)
    return found


print(json.dumps([asked(expression) for expression in json.load(sys.stdin)]))
