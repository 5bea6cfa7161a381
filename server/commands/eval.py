"""`llama-adapter eval`: measures of a trained adapter, one subcommand each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from models.prompts import CAPTION_PROMPT
from server.options import load, settings_options
from server.serving import StartupError
from server.settings import EvaluationSettings, WorkerSettings

if TYPE_CHECKING:
    from train.evaluation.captions import Captioner, Picture
    from train.evaluation.results import Result
    from train.evaluation.samples import Wanted
    from train.recipe import SourceRecipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Evaluate an adapter, a base or any OpenAI-compatible API. Answers are greedy.\n\n"
    "Scores go to the terminal as a table, to --output as JSON, every answer to --predictions.",
)

Data = Annotated[list[Path], typer.Argument(help="Data files, as a recipe's `path`.", metavar="DATA...")]
Images = Annotated[Path | None, typer.Option(help="folder that the data's image paths are relative to")]
Columns = Annotated[
    str | None, typer.Option(help="names of the columns of a TSV file without a header, by commas")
]
Split = Annotated[
    Literal["all", "held-out"], typer.Option(help="held-out: the rows that a training keeps apart")
]
Holdout = Annotated[float, typer.Option(min=0, max=0.5, help="the recipe's `holdout`, for --split held-out")]
BadRows = Annotated[Literal["stop", "skip"], typer.Option(help="at a row that cannot be used")]
NoExperts = Annotated[
    bool, typer.Option("--no-experts", help="tell a llama-adapter --url to leave its experts out")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="greatest length of an answer")]


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter eval captions rows.jsonl --images . --adapter ./mine --split held-out --holdout 0.1\n"
    "  llama-adapter eval captions captions_val2014.json --format coco --images val2014 \\\n"
    "    --url http://127.0.0.1:8000/v1 --model caption\n"
    "  llama-adapter eval captions val.jsonl --images . --nearest train.jsonl"
)
@settings_options(EvaluationSettings, first=("adapter", "base", "url", "model"))
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
    question: Annotated[str, typer.Option(help="what is asked of each picture")] = CAPTION_PROMPT,
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
    settings = _settings(given)
    if classifier and nearest:
        raise StartupError("--classifier and --nearest are two captioners; give one of them.")
    with _installed():
        from train.evaluation import captions as measure

        source = _source(
            data, format=format, images=images, columns=_names(columns), holdout=holdout, bad_rows=bad_rows
        )
        faults: list[str] = []
        pictures = measure.read_pictures(source, _wanted(split, holdout), faults, settings.limit)
        _tell(faults)
        about = {"data": [str(file) for file in data], "split": split, "holdout": holdout}
        with _captioner(
            settings, source, classifier, nearest, encoder, question, max_tokens, split, no_experts
        ) as (captioner, name):
            if shuffle_images is not None:
                captioner, name = measure.shuffled(captioner, shuffle_images), f"{name}, images shuffled"
            result = measure.evaluate_captions(pictures, captioner, {"model": name, **about})
    _report(result, settings)


@contextmanager
def _captioner(
    settings: EvaluationSettings,
    source: SourceRecipe,
    classifier: bool,
    nearest: list[Path] | None,
    encoder: str,
    question: str,
    max_tokens: int,
    split: str,
    no_experts: bool,
) -> Iterator[tuple[Captioner, str]]:
    """Who describes the pictures, and a name for them."""
    if classifier:
        from train.evaluation.baselines import imagenet_captioner

        yield imagenet_captioner(), "ImageNet name"
    elif nearest:
        from train.evaluation.baselines import nearest_captioner

        known = _trained_pictures(source.model_copy(update={"path": tuple(nearest)}), split)
        yield nearest_captioner(known, encoder, _cache_dir()), f"nearest of {len(known)} pictures"
    else:
        from server.commands.evaluated import evaluated
        from train.evaluation.captions import asked

        with evaluated(settings, no_experts) as (endpoint, name):
            yield asked(endpoint, question, max_tokens), name


def _trained_pictures(source: SourceRecipe, split: str) -> list[Picture]:
    from train.evaluation.captions import read_pictures
    from train.evaluation.samples import all_rows, trained_rows

    faults: list[str] = []
    wanted = trained_rows(source.holdout) if split == "held-out" else all_rows
    known = read_pictures(source, wanted, faults)
    _tell(faults)
    return known


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter eval loss alpaca.json --split held-out --holdout 0.01 --adapter ./mine\n"
    "  llama-adapter eval loss captions.jsonl --format captions --images . --adapter ./captioner\n"
    "  llama-adapter eval loss alpaca.json --template alpaca --base ~/models/7B \\\n"
    "    --url http://127.0.0.1:8000/v1 --model alpaca"
)
@settings_options(EvaluationSettings, first=("adapter", "base", "url", "model"), without=("predictions",))
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
    settings = _settings(given)
    with _installed():
        from server.commands.evaluated import DEFAULT_BASE, check_choice, evaluated
        from train.evaluation import loss as measure

        check_choice(settings)
        base = settings.base or DEFAULT_BASE
        source = _source(
            data,
            format=format,
            images=images,
            columns=_names(columns),
            question=question,
            holdout=0.0,
            bad_rows=bad_rows,
        )
        rows = measure.LossData(source, _wanted(split, holdout), max_tokens, settings.limit)
        if settings.url is None:
            name = settings.adapter or base
            result = measure.folder_loss(rows, base, settings.adapter, template, device, _cache_dir())
        else:
            with evaluated(settings) as (endpoint, name):
                result = measure.endpoint_loss(rows, endpoint, base, template or "chat", _cache_dir())
    about = {"data": [str(file) for file in data], "split": split, "holdout": holdout}
    _report(result.told(model=name, **about), settings)


def _settings(given: dict[str, Any]) -> EvaluationSettings:
    with _installed():
        from train.evaluation.results import check_place

        settings = load(EvaluationSettings, given)
        check_place(settings.output)
        check_place(settings.predictions)
    return settings


@contextmanager
def _installed() -> Iterator[None]:
    """Say what to install where a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("train", "models", "server"):
            raise
        raise StartupError(
            f"{error.name} is not installed; install llama-adapter-server[worker,eval]."
        ) from error


def _source(data: list[Path], **fields: Any) -> SourceRecipe:
    from train.recipe import SourceRecipe

    return SourceRecipe(path=tuple(data), **fields)


def _names(columns: str | None) -> tuple[str, ...] | None:
    return tuple(columns.split(",")) if columns else None


def _wanted(split: str, holdout: float) -> Wanted:
    from train.evaluation.samples import all_rows, held_out_rows

    return held_out_rows(holdout) if split == "held-out" else all_rows


def _cache_dir() -> Path:
    return load(WorkerSettings, {}).cache_dir


def _tell(faults: list[str]) -> None:
    for fault in faults[:3]:
        typer.echo(fault, err=True)
    if faults:
        typer.echo(f"{len(faults)} rows cannot be used and are left out.", err=True)


def _report(result: Result, settings: EvaluationSettings) -> None:
    from train.evaluation.results import save

    print(result.table())
    save(settings.output, result.as_json())
    save(settings.predictions, "\n".join(json.dumps(row, ensure_ascii=False) for row in result.predictions))
