"""`llama-adapter eval`: measures of a trained adapter, one subcommand each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from experts.caption import PROMPT
from server.commands.eval_common import (
    FIRST,
    BadRows,
    Columns,
    Data,
    Holdout,
    Images,
    MaxTokens,
    NoExperts,
    Split,
    cache_dir,
    learnt_rows,
    report,
    settings_of,
    source_of,
    tell,
    wanted_rows,
)
from server.commands.installed import installed
from server.options import settings_options
from server.serving import StartupError
from server.settings import EvaluationSettings

if TYPE_CHECKING:
    from train.evaluation.captions import Captioner
    from train.evaluation.endpoint import Endpoint
    from train.evaluation.results import Result
    from train.evaluation.samples import Wanted
    from train.recipe import SourceRecipe

_EXTRAS = "worker,train,eval"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Evaluate an adapter, a base or any OpenAI-compatible API. Answers are greedy.\n\n"
    "Scores go to the terminal as a table and to --output as JSON, every answer to --predictions.",
)


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter eval captions rows.jsonl --images . --adapter ./mine --split held-out --holdout 0.1\n"
    "  llama-adapter eval captions captions_val2014.json --format coco --images val2014 \\\n"
    "    --url http://127.0.0.1:8000/v1 --model caption\n"
    "  llama-adapter eval captions val.jsonl --images . --nearest train.jsonl"
)
@settings_options(EvaluationSettings, first=FIRST)
def captions(
    data: Data,
    *,
    images: Images = None,
    format: Annotated[
        Literal["captions", "coco"], typer.Option(help="JSON lines or TSV; COCO's annotations")
    ] = "captions",
    columns: Columns = None,
    split: Split = "all",
    holdout: Holdout = 0.0,
    bad_rows: BadRows = "stop",
    question: Annotated[str, typer.Option(help="what is asked of each picture")] = PROMPT,
    max_tokens: MaxTokens = 64,
    shuffle_images: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="control: show another picture than the one that is scored"),
    ] = None,
    classifier: Annotated[
        bool, typer.Option("--classifier", help="baseline: EfficientNet's ImageNet name, no model asked")
    ] = False,
    nearest: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TRAIN_DATA",
            help="baseline: the caption of the likest picture in these files, in the same format and "
            "folder, held-out rows left out; no model asked; may be repeated",
        ),
    ] = None,
    encoder: Annotated[str, typer.Option(help="what --nearest compares pictures by")] = "efficientnet-lite0",
    no_experts: NoExperts = False,
    **given: Any,
) -> None:
    """COCO's caption metrics: BLEU-1 to 4, ROUGE-L, CIDEr, and word F1.

    A picture's captions in the chosen rows are its references.
    """
    settings = settings_of(given)
    if classifier and nearest:
        raise StartupError("--classifier and --nearest are two captioners; give one of them.")
    with installed(_EXTRAS), ExitStack() as stack:
        from train.evaluation.captions import asked, evaluate_captions, read_pictures, shuffled

        source = source_of(data, columns, format=format, images=images, bad_rows=bad_rows)
        faults: list[str] = []
        pictures = read_pictures(source, wanted_rows(split, holdout), faults, settings.limit)
        if classifier or nearest:
            known = learnt_rows(split, holdout)
            captioner, name = _baseline(source, nearest, known, faults, encoder)
        else:
            from server.commands.evaluated import evaluated

            endpoint, name = stack.enter_context(evaluated(settings, no_experts))
            captioner = asked(endpoint, question, max_tokens)
        tell(faults)
        if shuffle_images is not None:
            captioner = shuffled(captioner, shuffle_images)
        result = evaluate_captions(pictures, captioner)
    about = {"model": name, "data": _paths(data), "split": split, "holdout": holdout}
    report(result.told(**about, bad_rows=len(faults), shuffle_images=shuffle_images), settings)


def _baseline(
    source: SourceRecipe, nearest: list[Path] | None, known: Wanted, faults: list[str], encoder: str
) -> tuple[Captioner, str]:
    """Who describes pictures without a language model, and its name; by the `nearest` files, if given."""
    from train.evaluation.baselines import imagenet_captioner, nearest_captioner
    from train.evaluation.captions import read_pictures

    if not nearest:
        return imagenet_captioner(), "ImageNet name"
    source = source.model_copy(update={"path": tuple(nearest)})
    return nearest_captioner(read_pictures(source, known, faults), encoder, cache_dir()), "nearest picture"


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter eval loss alpaca.json --split held-out --holdout 0.01 --adapter ./mine\n"
    "  llama-adapter eval loss rows.jsonl --format captions --images . --adapter ./captioner\n"
    "  llama-adapter eval loss alpaca.json --template alpaca --base ~/models/7B \\\n"
    "    --url http://127.0.0.1:8000/v1 --model alpaca"
)
@settings_options(EvaluationSettings, first=FIRST, without=("predictions",))
def loss(
    data: Data,
    *,
    format: Annotated[
        Literal["alpaca", "sharegpt", "messages", "captions", "coco", "llava", "scienceqa"],
        typer.Option(help="the recipe's `format`"),
    ] = "alpaca",
    images: Images = None,
    columns: Columns = None,
    question: Annotated[str, typer.Option(help="the recipe's `question`, put before captions")] = "",
    split: Split = "all",
    holdout: Holdout = 0.0,
    bad_rows: BadRows = "stop",
    template: Annotated[
        str | None, typer.Option(help="that renders the rows; default: the adapter's own, else chat")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="longer rows are cut, as in training")] = 512,
    device: Annotated[str, typer.Option(help="of torch, for --adapter and --base")] = "cpu",
    **given: Any,
) -> None:
    """Mean -log p of the tokens of held-out answers.

    Of --adapter or --base it is computed here, as a training computes its own. An API has to score
    prompts (/v1/completions with echo and logprobs) and to serve a base with --base's tokenizer.
    """
    settings = settings_of(given)
    with installed(_EXTRAS):
        from server.commands.evaluated import DEFAULT_BASE, check_choice, evaluated
        from train.evaluation.loss import LossData, endpoint_loss, folder_loss

        check_choice(settings)
        base = settings.base or DEFAULT_BASE
        source = source_of(data, columns, format=format, images=images, question=question, bad_rows=bad_rows)
        rows = LossData(source, wanted_rows(split, holdout), max_tokens, settings.limit)
        if settings.url is None:
            name = settings.adapter or base
            result = folder_loss(rows, base, settings.adapter, template, device, cache_dir())
        else:
            with evaluated(settings) as (endpoint, name):
                result = endpoint_loss(rows, endpoint, base, template or "chat", cache_dir())
    report(result.told(model=name, data=_paths(data), split=split, holdout=holdout), settings)


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter eval scienceqa data/scienceqa/problems.json --images data/scienceqa/images \\\n"
    "    --adapter ./scienceqa --base ~/models/llama-7b\n"
    "  llama-adapter eval scienceqa problems.json --text-only --url http://127.0.0.1:8000/v1 --model qa"
)
@settings_options(EvaluationSettings, first=FIRST)
def scienceqa(
    data: Data,
    *,
    images: Annotated[Path | None, typer.Option(help="folder of SPLIT/ID/image.png")] = None,
    split: Annotated[str, typer.Option(help="train, val or test; '' for every problem")] = "test",
    text_only: Annotated[
        bool, typer.Option("--text-only", help="show no images, as to V1's text-only model")
    ] = False,
    max_tokens: MaxTokens = 32,
    no_experts: NoExperts = False,
    **given: Any,
) -> None:
    """Accuracy on ScienceQA: all, by subject, context and grade, in per cent.

    Problems are asked in the words that a training on `format: scienceqa` uses. An answer that names
    no choice is wrong; `unread` counts those.
    """
    settings = settings_of(given)
    with installed(_EXTRAS):
        from train.evaluation.scienceqa import evaluate_scienceqa, read_problems

        source = source_of(data, format="scienceqa", images=images, split=split or None)
        problems = read_problems(source, settings.limit, images=not text_only)
        _ask(settings, no_experts, data, lambda it: evaluate_scienceqa(problems, it, max_tokens))


@app.command(
    epilog="Example:\n\n\b\n"
    "  llama-adapter eval pope coco_pope_random.jsonl coco_pope_adversarial.jsonl --images val2014 \\\n"
    "    --adapter ./mine"
)
@settings_options(EvaluationSettings, first=FIRST)
def pope(
    data: Data,
    *,
    images: Annotated[Path, typer.Option(help="folder of the images")],
    max_tokens: MaxTokens = 32,
    no_experts: NoExperts = False,
    **given: Any,
) -> None:
    """POPE: accuracy, precision, recall, F1 and share of yes, in per cent, of each file and on average.

    Files are JSON lines of question_id, image, text, label; the published ones are so too, whatever
    their names end with: name them .jsonl. An answer that says neither yes nor no counts as yes, as in
    POPE's own evaluation; `unread` counts those.
    """
    settings = settings_of(given)
    with installed(_EXTRAS):
        from train.evaluation.pope import evaluate_pope, read_questions

        questions = read_questions(data, images, settings.limit)
        _ask(settings, no_experts, data, lambda it: evaluate_pope(questions, it, max_tokens))


@app.command(
    epilog="Example:\n\n\b\n"
    "  llama-adapter eval mme MME/eval_tool/Your_Results --images MME/MME_Benchmark --adapter ./mine"
)
@settings_options(EvaluationSettings, first=FIRST)
def mme(
    folder: Annotated[Path, typer.Argument(help="Folder of SUBTASK.txt files.", metavar="FOLDER")],
    *,
    images: Annotated[Path, typer.Option(help="folder of SUBTASK/ or SUBTASK/images/ with the images")],
    max_tokens: MaxTokens = 32,
    no_experts: NoExperts = False,
    **given: Any,
) -> None:
    """MME: each subtask's acc, acc+ and score, and the sums for perception and cognition.

    A file's lines are `image TAB question TAB answer`, two for each image. --limit counts the images
    of each subtask. An answer that says neither yes nor no is wrong; `unread` counts those.
    """
    settings = settings_of(given)
    with installed(_EXTRAS):
        from train.evaluation.mme import evaluate_mme, read_subtasks

        questions = read_subtasks(folder, images, settings.limit)
        _ask(settings, no_experts, [folder], lambda it: evaluate_mme(questions, it, max_tokens))


def _ask(
    settings: EvaluationSettings,
    no_experts: bool,
    data: Sequence[Path],
    evaluate: Callable[[Endpoint], Result],
) -> None:
    from server.commands.evaluated import evaluated

    with evaluated(settings, no_experts) as (endpoint, name):
        result = evaluate(endpoint)
    report(result.told(model=name, data=_paths(data)), settings)


def _paths(data: Sequence[Path]) -> list[str]:
    return [str(file) for file in data]
