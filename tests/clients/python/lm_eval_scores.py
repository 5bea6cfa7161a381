"""Score and continue texts as lm-eval's `local-completions` model does: JSON in, JSON out."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def main() -> None:
    logging.disable(logging.INFO)
    asked = json.load(sys.stdin)
    model = LocalCompletionsAPI(**asked["model"])
    answers = {
        "loglikelihood": model.loglikelihood(instances("loglikelihood", asked["pairs"])),
        "rolling": model.loglikelihood_rolling(
            instances("loglikelihood_rolling", [[text] for text in asked["texts"]])
        ),
        "generated": model.generate_until(
            instances("generate_until", [[text, asked["generation"]] for text in asked["texts"]])
        ),
    }
    print(json.dumps(answers))


def instances(kind: Any, arguments: list[list[Any]]) -> list[Instance]:
    return [Instance(kind, {}, tuple(given), number) for number, given in enumerate(arguments)]


main()
