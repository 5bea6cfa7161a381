"""Every setting of every process: typed, loaded once, passed inward.

A value comes from the command line, else from `LLAMA_ADAPTER_<NAME>` in the environment (nested
names with `__`), else from the default here. A bad value stops start-up with a sentence.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

KIB = 1024
MIB = 1024 * 1024
ENV_PREFIX = "LLAMA_ADAPTER_"
RATE = r"^[1-9][0-9]{0,8}/(second|minute|hour|day)$"  # such as 60/minute

Secret = Annotated[SecretStr, Field(min_length=1)]


def _check_address(url: str) -> str:
    try:
        parts = urlsplit(url)
        tcp = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an address that is none
        tcp = False
    if not tcp and not url.startswith("unix:/"):
        raise PydanticCustomError("address", "should be http://host:port or unix:/path")
    return url


Address = Annotated[str, AfterValidator(_check_address)]  # of a worker or an expert


def _check_origin(origin: str) -> str:
    # Browsers send it so, and it is compared as text: any other spelling would never match.
    if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+", origin):
        raise PydanticCustomError("origin", "should be like https://app.example, in small letters, or *")
    return origin


Origin = Annotated[str, AfterValidator(_check_origin)]  # of a browser's page


def default_cache_dir() -> Path:
    """`llama-adapter` in the user's folder for caches, where converted bases live.

    Its `~` is looked up when settings are loaded: the help is for those without a home, too.
    """
    users = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (users if users.is_absolute() else Path("~/.cache")) / "llama-adapter"


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="ignore", frozen=True
    )

    @field_validator("*")
    @classmethod
    def _at_home(cls, value: Any) -> Any:
        """`~` is the home also where no shell saw it: in a file of variables, after `--option=`."""
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            raise PydanticCustomError("home", "should begin with the home of somebody who has one") from None


class ImageLimits(_Settings):
    """What an image may cost. Every refusal is a 400 that says which limit."""

    max_images: int = Field(8, ge=0, description="images in one request")
    max_image_bytes: int = Field(20 * MIB, gt=0, description="bytes of one encoded image")
    max_image_pixels: int = Field(40_000_000, gt=0, description="pixels, checked before decoding")
    image_connect_seconds: float = Field(3.0, gt=0, description="to connect to an image's host")
    image_read_seconds: float = Field(5.0, gt=0, description="between two pieces of an image's body")
    image_total_seconds: float = Field(15.0, gt=0, description="for one image, redirects included")
    image_max_redirects: int = Field(3, ge=0, le=10, description="each target is checked again")
    image_allowed_hosts: tuple[str, ...] = Field(
        (), description="host names to fetch from; empty: any public one"
    )
    image_allow_private: bool = Field(
        False, description="also fetch from private addresses; for closed networks only"
    )


class GatewaySettings(ImageLimits):
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="0: any free one")
    worker_urls: tuple[Address, ...] = Field((), description="http://host:port or unix:/path of each worker")
    expert_urls: dict[str, Address] = Field(
        {}, description="name → http://host:port or unix:/path of its service"
    )
    expert_seconds: float = Field(20.0, gt=0, description="an expert that takes longer is left out")
    expert_concurrency: int = Field(
        8, gt=0, description="readings of one expert at once; more wait, within expert_seconds"
    )
    expert_failures: int = Field(
        5, gt=0, description="failures in a row after which an expert is left alone for a while"
    )
    expert_pause_seconds: float = Field(10.0, gt=0, description="of that while; then one request tries it")
    expert_cache_entries: int = Field(1024, ge=0, description="readings kept by (expert, version, image)")
    captions: bool = Field(
        False, description="the workers' adapter `caption` is an expert, too; `serve` sees to that by itself"
    )
    caption_min_confidence: float = Field(
        0.4, ge=0, le=1, description="below it, as the mean of a token, the adapter's caption is dropped"
    )
    api_keys: tuple[Secret, ...] = Field((), description="without any, and without a keys file: all may call")
    admin_keys: tuple[Secret, ...] = Field(
        (), description="for /v1/adapters; without any those routes are closed"
    )
    keys_file: Path | None = Field(
        None, description="TOML file of named keys and their limits; read again when it changes"
    )
    key_requests: str | None = Field(
        None, pattern=RATE, description="requests of one key, such as 60/minute; default: any number"
    )
    key_tokens: str | None = Field(
        None, pattern=RATE, description="prompt and completion tokens of one key, such as 100000/hour"
    )
    key_concurrency: int | None = Field(None, gt=0, description="requests of one key at once")
    limits_store: SecretStr = Field(
        SecretStr("memory://"),
        description="where requests and tokens are counted: memory:// is this process, "
        "redis://host:6379/0 is shared",
    )
    max_body_bytes: int = Field(64 * MIB, gt=0, description="of one request")
    max_body_values: int = Field(
        256 * KIB, gt=0, description="JSON values in it, reckoned by its commas and brackets"
    )
    body_seconds: float = Field(60.0, gt=0, description="for a request's body to arrive")
    max_concurrent_requests: int = Field(256, gt=0, description="over it: 429 with Retry-After")
    request_seconds: float = Field(600.0, gt=0, description="deadline of one request")
    stream_ping_seconds: float = Field(
        15.0,
        ge=0,
        description="of silence in a stream, until a comment keeps it from being closed; 0: none",
    )
    max_n: int = Field(8, ge=1, description="choices in one request")
    max_prompts: int = Field(128, ge=1, description="prompts in one plain completion")
    page: bool = Field(True, description="serve a page at / to try the service on")
    cors_origins: tuple[Origin, ...] = Field(
        (), description="origins whose pages may call, such as https://app.example, or *; empty: none"
    )
    drain_seconds: float = Field(30.0, ge=0, description="what runs may take this long after SIGTERM")
    worker_poll_seconds: float = Field(1.0, gt=0, description="between two looks at a worker's readiness")
    worker_connect_seconds: float = Field(3.0, gt=0, description="to connect to a worker")
    worker_read_seconds: float = Field(120.0, gt=0, description="between two lines of a worker")
    worker_lost_seconds: float = Field(
        10.0, gt=0, description="of silence, until a worker that cannot be connected to is lost"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of this process")

    @property
    def asks_for_keys(self) -> bool:
        """Whether callers need a key; an empty keys file closes the service, it does not open it to all."""
        return bool(self.api_keys) or self.keys_file is not None


class WorkerSettings(_Settings):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8001, ge=0, le=65535, description="0: any free one")
    uds: Path | None = Field(None, description="a Unix socket instead of host and port")
    base: str = Field("smollm2-135m", description="an id that `llama-adapter pull` knows, or a path")
    base_id: str | None = Field(None, description="the base's model id; default: the name of `base`")
    adapters: tuple[str, ...] = Field((), description="id=path[,option=value …] of each adapter")
    adapter_dir: Path | None = Field(
        None,
        description="folder whose subfolders are adapters, ours or PEFT's, each served under its name",
    )
    shipped_adapters: bool = Field(
        True, description="with the default base also serve the adapters that come with this project"
    )
    adapter_root: Path | None = Field(None, description="folder that run-time loading may read from")
    adapter_state: Path | None = Field(
        None,
        description="file that remembers what was loaded and unloaded at run time; workers may share it; "
        "default: none, and with `serve` one that lasts as long as the service",
    )
    cache_dir: Path = Field(default_factory=default_cache_dir, description="where converted bases live")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: bfloat16, but float32 for vLLM on a processor that does not multiply in it",
    )
    sampling_defaults: Literal["model", "openai"] = Field(
        "model",
        description="for requests that leave them out: model: the base's generation_config.json, before it "
        "the adapter's own; openai: temperature 1 and no cuts, whatever these say",
    )
    quantization: Literal["none", "int8", "int4"] = Field(
        "none", description="the base's linears in 8 or 4 bits, in the native engine on a CPU"
    )
    engine: Literal["native", "vllm"] = Field(
        "native", description="vllm: vLLM with this project's plugin, where it is installed"
    )
    vllm_adapters: Literal["auto", "prompts", "all"] = Field(
        "auto",
        description="what vLLM makes room for: prompts alone; all: norms, biases, scales, low-rank terms and "
        "images too; auto: what the adapters given at the start need",
    )
    vllm_compile: bool = Field(
        True,
        description="let vLLM compile the model, as it does by itself: faster, but starts a minute later",
    )
    tensor_parallel: int = Field(1, gt=0, description="devices that share one model, under vLLM")
    data_parallel: int = Field(
        1,
        gt=0,
        description="copies of the model that share the requests, each on devices of its own, under vLLM",
    )
    nnodes: int = Field(1, gt=0, description="machines whose devices these are, equally many of each")
    node_rank: int = Field(0, ge=0, description="of this machine; 0 leads and is asked, the others follow it")
    master_addr: str | None = Field(None, description="of machine 0, as all of them reach it")
    master_port: int = Field(29501, gt=0, le=65535, description="of machine 0, where the others find it")
    device: str = Field("cpu", description="of torch, such as cpu or cuda:0; vLLM has its build's")
    attention: Literal["auto", "torch", "triton"] = Field(
        "auto",
        description="auto: the device's own kernels, on a GPU those in Triton; torch: none; "
        "triton: refuse to start without",
    )
    num_threads: int = Field(0, ge=0, description="of torch; 0: one per core")
    max_model_len: int | None = Field(None, gt=0, description="default: the base's own context")
    block_size: int = Field(16, gt=0, description="tokens per block of the KV cache")
    kv_cache_mib: int = Field(1024, gt=0, description="memory for the KV cache, in MiB")
    max_num_seqs: int = Field(64, gt=0, description="sequences in one step")
    max_num_batched_tokens: int = Field(
        512, gt=0, description="tokens in one step; longer prompts are chunked"
    )
    max_waiting: int = Field(256, ge=0, description="over it: 429 with Retry-After")
    max_prefill_chunk: int | None = Field(
        None,
        gt=0,
        description="prompt tokens in a step that also decodes; default: what doubles its time, by the clock",
    )
    prefix_caching: bool = Field(True, description="keep the blocks of prompts that may come again")
    max_hot_adapters: int = Field(64, gt=0, description="adapters in the bank at once")
    low_rank_mib: int = Field(
        8192, gt=0, description="memory for their low-rank terms in MiB; one that needs more is refused"
    )
    prompt_slots: int = Field(128, gt=0, description="(adapter, image) prompts kept as keys and values")
    prompt_cache_mib: int = Field(
        2048, gt=0, description="memory for them in MiB; an adapter whose prompts would need more is refused"
    )
    max_encoders: int = Field(
        4, ge=0, description="image encoders in memory, beyond which run-time loading brings no further one"
    )
    image_cache_mib: int = Field(
        256, gt=0, description="memory for features of images, as encoders give them, in MiB"
    )
    max_grammar_bytes: int = Field(
        64 * KIB, gt=0, description="JSON of one request's response_format and tools, schemas and all"
    )
    grammar_cache_entries: int = Field(128, gt=0, description="compiled response formats and tools kept")
    max_message_bytes: int = Field(256 * MIB, gt=0, description="of one request to a worker, with its images")
    max_image_bytes: int = Field(20 * MIB, gt=0, description="bytes of one encoded image")
    max_image_pixels: int = Field(40_000_000, gt=0, description="pixels, checked before decoding")
    drain_seconds: float = Field(30.0, ge=0, description="what runs may take this long after SIGTERM")
    liveness_seconds: float = Field(
        60.0, gt=0, description="`serve` starts the process again if it answers nothing for so long"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of this process")


class ExpertSettings(_Settings):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8002, ge=0, le=65535, description="0: any free one")
    uds: Path | None = Field(None, description="a Unix socket instead of host and port")
    max_image_bytes: int = Field(20 * MIB, gt=0, description="bytes of one encoded image")
    max_image_pixels: int = Field(40_000_000, gt=0, description="pixels, checked before decoding")
    classifier_min_confidence: float = Field(
        0.3, ge=0, le=1, description="below it the classifier says nothing"
    )
    ocr_min_confidence: float = Field(0.6, ge=0, le=1, description="lines below it are dropped")
    ocr_engine: Literal["rapidocr", "paddleocr"] = Field(
        "rapidocr", description="what the ocr expert runs on"
    )
    paddle_models: Path | None = Field(
        None, description="local models of paddleocr; default: it fetches its own"
    )
    blip_model: Path | None = Field(None, description="folder of a BLIP model, for the caption expert")
    num_threads: int = Field(0, ge=0, description="of each expert; 0: one per core")
    liveness_seconds: float = Field(
        60.0, gt=0, description="`serve` starts the process again if it answers nothing for so long"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of this process")


class EvaluationSettings(_Settings):
    """What `llama-adapter eval` evaluates, and where the findings go."""

    url: str | None = Field(
        None, description="an OpenAI-compatible API instead, such as http://127.0.0.1:8000/v1"
    )
    model: str | None = Field(None, description="what --url calls the model to evaluate")
    api_key: SecretStr | None = Field(None, description="of --url; or OPENAI_API_KEY in the environment")
    adapter: str | None = Field(
        None, description="what to evaluate, PATH[,option=value …]; it is served for as long as it takes"
    )
    base: str | None = Field(
        None, description="of --adapter, or to evaluate by itself: an id that `pull` knows, or a path"
    )
    concurrency: int = Field(8, gt=0, le=1024, description="requests at once")
    limit: int | None = Field(None, gt=0, description="the first so many only")
    output: Path | None = Field(None, description="file for the scores, as JSON")
    predictions: Path | None = Field(None, description="file for every answer, as JSON lines")
