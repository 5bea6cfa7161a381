"""What goes wrong with files. Every message names the file, the key and what to do."""


class ModelError(ValueError):
    """A model, adapter or tokenizer file cannot be used."""


class CheckpointError(ModelError):
    """A file is corrupt, truncated, of an unknown format, or lacks or exceeds the keys it should have."""


class AdapterMismatch(ModelError):
    """An adapter does not fit the base model it is to run on."""


class PromptError(ModelError):
    """A conversation cannot be rendered by the model's template."""


def is_rusts(error: BaseException) -> bool:
    """Whether a library in Rust complains: by a bare Exception, or a panic, whose class no module names."""
    return type(error) is Exception or type(error).__name__ == "PanicException"
