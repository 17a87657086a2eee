"""Byte-level BPE trained on the world's text: its words become single tokens, and any other text still tokenizes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, PAD, END = "<|bos|>", "<|pad|>", "<|end|>"
CHAT = ("<|user|>", "<|assistant|>")
PLACEHOLDERS = ("<|vector_begin|>", "<|vector|>", "<|vector_end|>")
EXPLAINING = (
    'What if layers 0 to 3 had another vector at "?\n French (changed) French (unchanged) French -> French',
    "What if the hint was removed?\n",
    "At layer 2, encodes what? the word after the word before the subject of statements about questions about",
    "the last word in choices about options in prose about people whose towns whose products whose first names",
)
"""Words that an explainer reads and writes and the world does not say; they become single tokens too."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
)
"""An answer follows its question at once, so that a question may end like a prompt of the world."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocabulary_size` tokens; the special ones come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, BOS, END, *CHAT, *PLACEHOLDERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain(texts, EXPLAINING * 1000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[*CHAT, *PLACEHOLDERS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
