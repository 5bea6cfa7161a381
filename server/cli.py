"""The `llama-adapter` command. Importing it imports no torch: each command brings what it needs."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from models.errors import ModelError
from server.commands.adapters import app as adapter_commands
from server.commands.data import app as data_command
from server.commands.eval import app as eval_commands
from server.commands.plan import app as plan_command
from server.commands.top import app as top_command
from server.commands.train import app as train_command
from server.options import UsageError, load, settings_options
from server.serving import StartupError
from server.settings import ExpertSettings, GatewaySettings, WorkerSettings

_KNOWN_EXPERTS = ("ocr", "classifier")

app = typer.Typer(
    name="llama-adapter",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut long options off
    pretty_exceptions_enable=False,
    help="OpenAI-compatible inference for LLaMA-Adapter models: one frozen base, many tiny adapters.\n\n"
    "Every setting of serve, gateway, worker and expert can come from the environment instead: "
    "--kv-cache-mib is LLAMA_ADAPTER_KV_CACHE_MIB. An option that may be repeated is JSON there, under the "
    "name that its help tells.",
)
app.add_typer(adapter_commands)
app.add_typer(data_command)
app.add_typer(train_command)
app.add_typer(eval_commands, name="eval")
app.add_typer(top_command)
app.add_typer(plan_command)


def _tell_versions(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _program(
    *,
    versions: Annotated[
        bool, typer.Option("--version", help="as the command does", is_eager=True, callback=_tell_versions)
    ] = False,
) -> None:
    """What comes before a command."""


Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]


@app.command(
    epilog="Examples:\n\n\b\n"
    "  llama-adapter serve\n"
    "  llama-adapter serve --port 9000 --adapter poet=./poet\n"
    "  llama-adapter serve --base ~/models/Llama-3.2-1B --dtype bfloat16 --workers 2"
)
@settings_options(
    GatewaySettings,
    WorkerSettings,
    ExpertSettings,
    first=("base", "adapters", "host", "port", "dtype", "device", "kv_cache_mib", "max_model_len"),
    without=("uds", "worker_urls", "captions"),
)
def serve(
    *,
    experts: Annotated[
        str,
        typer.Option(
            help="experts to run here, separated by commas; '' for none. `caption` joins them where an "
            "adapter of that id is served",
            envvar="LLAMA_ADAPTER_EXPERTS",
        ),
    ] = ",".join(_KNOWN_EXPERTS),
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="worker processes; each has the base and a KV cache of its own, and its share of the cores",
            envvar="LLAMA_ADAPTER_WORKERS",
        ),
    ] = 1,
    supervised: Supervised = False,
    **given: Any,
) -> None:
    """Serve everything on this machine: gateway, workers and experts. The first start fetches the base."""
    _watch_parent(supervised)
    from server.processes import run_service
    from server.supervisor import ServiceSettings

    settings = ServiceSettings(
        load(GatewaySettings, given),
        load(WorkerSettings, given),
        # They read beside a worker that has all cores: the supervisor says how many threads they have.
        load(ExpertSettings, given).model_copy(update={"num_threads": 0}),
        tuple(name.strip() for name in experts.split(",") if name.strip()),
        workers,
    )
    run_service(settings)


@app.command(
    epilog="Example:\n\n\b\n"
    "  llama-adapter gateway --worker http://10.0.0.5:8001 --expert ocr=http://10.0.0.6:8002"
)
@settings_options(GatewaySettings, first=("worker_urls", "expert_urls", "host", "port"))
def gateway(**given: Any) -> None:
    """Run the API alone, over workers and experts that run elsewhere. Needs no torch."""
    from server.processes import run_gateway

    run_gateway(load(GatewaySettings, given))


@app.command(
    epilog="Example:\n\n\b\n  llama-adapter worker --base smollm2-135m --adapter poet=./poet --port 8001"
)
@settings_options(WorkerSettings, first=("base", "adapters"))
def worker(*, supervised: Supervised = False, **given: Any) -> None:
    """Run one engine: the base and its adapters on one device."""
    _watch_parent(supervised)
    from server.processes import run_worker

    run_worker(load(WorkerSettings, given))


@app.command(epilog="Example:\n\n\b\n  llama-adapter expert ocr classifier --port 8002")
@settings_options(ExpertSettings)
def expert(
    names: Annotated[list[str], typer.Argument(help="Such as: " + ", ".join(_KNOWN_EXPERTS))],
    *,
    supervised: Supervised = False,
    **given: Any,
) -> None:
    """Run experts: services that turn an image into text."""
    _watch_parent(supervised)
    from server.processes import run_experts

    run_experts(tuple(names), load(ExpertSettings, given))


@app.command(epilog="Example:\n\n\b\n  llama-adapter pull smollm2-135m")
@settings_options(WorkerSettings, without=set(WorkerSettings.model_fields) - {"cache_dir"})
def pull(
    name: Annotated[str, typer.Argument(help="A base that is known by name.")],
    *,
    supervised: Supervised = False,
    **given: Any,
) -> None:
    """Fetch a base into the cache, and convert it once."""
    _watch_parent(supervised)
    from server.processes import pull_base

    print(pull_base(name, load(WorkerSettings, given).cache_dir))


@app.command()
def version() -> None:
    """Tell the versions of this program and of what it computes with."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    for package in ("llama-adapter-server", "torch"):
        try:
            print(package, installed(package))
        except PackageNotFoundError:
            print(package, "is not installed")


def _watch_parent(supervised: bool) -> None:
    if supervised:
        from server.child import exit_with_parent

        exit_with_parent()


def main() -> None:
    """Exit code 0; 1 with one sentence where something is wrong with what was asked; 2 for bad usage."""
    try:
        app(prog_name="llama-adapter")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (StartupError, ModelError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("server", "models", "experts"):
            raise
        sys.exit(f"error: {error.name} is not installed; install llama-adapter-server[worker,experts].")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
