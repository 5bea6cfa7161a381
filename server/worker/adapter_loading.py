"""From an adapter's file to what requests are served with: checked, loaded, its encoder at hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from models.checkpoints.adapters import AdapterOptions, open_adapter, parse_adapter_argument, parse_options
from models.config import ModelConfig
from models.errors import AdapterMismatch, CheckpointError, ModelError
from models.prompts import template_names
from models.registry import AdapterRegistry
from models.sampling_defaults import SamplingDefaults
from models.vision.encoder import VisionEncoder, check_features, load_encoder
from server.errors import InvalidRequest
from server.worker.frontend import ServedModel
from server.worker.messages import ModelInfo
from server.worker.sight import LoadedAdapter


class AdapterLoader:
    """Loads adapters for one base. Visual encoders are shared by the adapters that name them.

    An encoder stays as long as an adapter that is loaded, or a request that runs, has it: the loader keeps
    none, so that neither an adapter that was refused nor one that was unloaded leaves its own behind.
    """

    def __init__(
        self,
        base_id: str,
        config: ModelConfig,
        fingerprint: str,
        *,
        device: torch.device,
        max_model_len: int,
        adapter_root: Path | None,
        max_encoders: int,
        sampling: SamplingDefaults | None = None,
    ) -> None:
        """With `max_encoders` in memory run-time loading brings no further one.

        sampling  what the base's makers recommend; adapters may bring their own. None: nobody's is heard.
        """
        self._base_id = base_id
        self._config = config
        self._fingerprint = fingerprint
        self._device = device
        self._max_model_len = max_model_len
        self._registry = AdapterRegistry(adapter_root)
        self._max_encoders = max_encoders
        self._sampling = sampling
        self._encoders: WeakValueDictionary[str, VisionEncoder] = WeakValueDictionary()
        self._named_at_start: set[str] = set()
        self._lock = threading.Lock()

    def load(self, argument: str) -> ServedModel:
        """An adapter of the command line, `id=path[,option=value …]`. Raises `ModelError`."""
        id, path, options = parse_adapter_argument(argument)
        return self._load(id, path.expanduser(), options)

    def load_at_run_time(
        self,
        id: str,
        path: str,
        options: Mapping[str, str],
        version: int = 1,
        pause: Callable[[], None] = lambda: None,
    ) -> ServedModel:
        """An adapter below the configured root, at least as `version`. Raises `InvalidRequest`.

        `pause` is called between parts of the work.
        """
        try:
            known = parse_options(id, options)
        except ModelError as error:
            raise InvalidRequest(str(error), param="options", code="invalid_adapter") from error
        try:
            return self._load(id, self._registry.resolve(path), known, version, pause, at_run_time=True)
        except AdapterMismatch as error:
            raise InvalidRequest(str(error), param="path", code="adapter_mismatch") from error
        except ModelError as error:
            raise InvalidRequest(str(error), param="path", code="invalid_adapter") from error

    def _load(
        self,
        id: str,
        path: Path,
        options: AdapterOptions,
        version: int = 1,
        pause: Callable[[], None] = lambda: None,
        *,
        at_run_time: bool = False,
    ) -> ServedModel:
        if id == self._base_id:
            raise CheckpointError(f"adapter id {id!r} is the base's own; choose another id")
        adapter = open_adapter(path, self._config, options, self._fingerprint, pause)
        config = adapter.config
        if config.template not in template_names():
            raise CheckpointError(
                f"{path}: template {config.template!r} is unknown; use one of {', '.join(template_names())}"
            )
        encoder = None
        if config.vision is not None:
            encoder = self._encoder(config.vision.encoder, at_run_time)
            try:
                check_features(config.vision, encoder)
            except ModelError as error:
                raise AdapterMismatch(f"{path}: {error}") from error
        adapter = adapter.requires_grad_(False).to(self._device)
        with self._lock:
            version = self._registry.next_version(id, version)
        info = ModelInfo(
            id=id,
            kind="adapter",
            root=path.name,
            parent=self._base_id,
            created=int(time.time()),
            max_model_len=self._max_model_len,
            reads_images=encoder is not None,
            version=version,
            variant=config.variant,
            sampling=self._defaults(config.sampling),
        )
        return ServedModel(info, LoadedAdapter((id, version), adapter, encoder))

    def base_model(self, path: Path) -> ServedModel:
        """The base itself, as a model that requests may name."""
        info = ModelInfo(
            id=self._base_id,
            kind="base",
            root=path.name,
            parent=None,
            created=int(time.time()),
            max_model_len=self._max_model_len,
            sampling=self._defaults(None),
        )
        return ServedModel(info)

    def _defaults(self, own: SamplingDefaults | None) -> dict[str, int | float]:
        if self._sampling is None:
            return {}
        return (own.over(self._sampling) if own else self._sampling).given

    def _encoder(self, name: str, at_run_time: bool) -> VisionEncoder:
        with self._lock:
            encoder = self._encoders.get(name)
            if encoder is None:
                if at_run_time:
                    self._check_may_come(name)
                encoder = self._encoders[name] = load_encoder(name, self._device)
            if not at_run_time:
                self._named_at_start.add(name)
            return encoder

    def _check_may_come(self, name: str) -> None:
        """Raises `ModelError` for an encoder that run-time loading may not bring."""
        is_file = "/" in name or any(Path(pretrained).is_file() for pretrained in name.split(":", 2)[2:])
        if is_file and name not in self._named_at_start:
            raise CheckpointError(
                f"encoder {name!r} is a file, which run-time loading does not open; start the "
                "server with an adapter that names it, or name one of open_clip's tags"
            )
        if len(self._encoders) >= self._max_encoders:
            raise ModelError(
                f"encoder {name!r} would be one more than max_encoders, {self._max_encoders}; unload an "
                "adapter that alone has another one, or raise it"
            )
