"""Small real tokenizers, trained on the spot, in each format."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789 times, it's said; we'll see!",
    "def main():\n    print('Hello, world')\n\n\nif __name__ == '__main__':\n    main()\n",
    "Straße, café, naïve, Übermut. 你好，世界。 こんにちは。 Привет, мир! 😀👍",
    "The total is 49.30 EUR. ### Instruction: ### Response: user assistant system end start im",
] * 20
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_backend() -> Tokenizer:
    """GPT-2's kind, with SmolLM's split of digits."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def write_byte_level(folder: Path, chat_template: str | None = CHATML) -> None:
    """A Hugging Face folder's tokenizer."""
    byte_level_backend().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_sentencepiece(file: Path) -> sentencepiece.SentencePieceProcessor:
    """A `tokenizer.model` like LLaMA's: BPE, byte fallback, split digits, no normalisation."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(CORPUS).split("\n")),
        model_prefix=str(file.with_suffix("")),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


def write_gguf_byte_level(file: Path) -> None:
    """A file with no weights."""
    writer = GGUFWriter(file, "llama")
    add_gguf_byte_level(writer)
    _close(writer)


def add_gguf_byte_level(writer: GGUFWriter) -> None:
    """The same vocabulary as `write_byte_level`, as llama.cpp's converter writes it."""
    spec = json.loads(byte_level_backend().to_str())
    vocabulary = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([3 if text in SPECIALS else 1 for text, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)


def write_gguf_sentencepiece(file: Path, processor: sentencepiece.SentencePieceProcessor) -> None:
    ids = range(processor.vocab_size())
    kinds = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in ids
    ]
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(i) for i in ids])
    writer.add_token_scores([processor.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    _close(writer)


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
