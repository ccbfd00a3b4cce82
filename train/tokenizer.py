"""A byte-level BPE tokenizer made from the training text.

Knows which text of a sample a model will read. Knows nothing of models or of how ranks agree on one tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlm.errors import UsageError
from vlm.processing import ASSISTANT, EOS, IMAGE, MASK, PAD, USER
from vlm.samples import Sample, SampleError, conversations, pair_text
from vlm.shards import Shards

SPECIAL_TOKENS = [PAD, EOS, IMAGE, MASK, USER, ASSISTANT]
BYTES = 256
MOST_SAMPLES = 50_000


def train_bpe(texts: Iterator[str], vocab_size: int) -> str:
    """Learn a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) and return it as the JSON of `tokenizers`.

    The same texts in the same order give the same tokenizer. Raises UsageError if `vocab_size` does not hold the bytes.
    """
    least = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise UsageError(f"model.tokenizer.vocab_size is {vocab_size}; {least} are taken by bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def as_transformers(bpe: str, longest: int) -> PreTrainedTokenizerFast:
    """The JSON of `train_bpe` as a Hugging Face tokenizer for texts of up to `longest` tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe),
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        extra_special_tokens=[IMAGE, USER, ASSISTANT],
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def training_texts(sources: Sequence[str], caption_prompt: str) -> Iterator[str]:
    """Every text of the shards' samples, evenly chosen where there are more than `MOST_SAMPLES`.

    A sample that cannot be read is passed over here; the data loader reports it.
    """
    opened = [Shards.open(source) for source in sources]
    stride = -(-sum(len(shards) for shards in opened) // MOST_SAMPLES)
    for shards in opened:
        for index in range(0, len(shards), stride):
            try:
                sample = shards[index]
            except SampleError:
                continue
            yield from _texts(sample, caption_prompt)


def _texts(sample: Sample, caption_prompt: str) -> Iterator[str]:
    for messages, _ in conversations(sample, caption_prompt):
        for message in messages:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")
    yield from filter(None, (pair_text(sample), sample.text))
