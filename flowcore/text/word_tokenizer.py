"""A tokenizer of whole words with Gemma's special tokens, for small encoders of a closed vocabulary."""

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from .tokens import SPECIAL_TOKENS, tokenizer_from_json


def build_word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a word, lower case, punctuation apart; other words become `<unk>`.

    Ids: pad 0, eos 1, bos 2, unk 3, then the distinct words in alphabetical order.
    """
    distinct = sorted({word.lower() for word in words})
    special = SPECIAL_TOKENS["Gemma"]
    vocabulary = {token: index for index, token in enumerate([*special.values(), *distinct])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.normalizer = Lowercase()
    backend.pre_tokenizer = Whitespace()
    backend.add_special_tokens(list(special.values()))
    return tokenizer_from_json(backend.to_str(), source="this word list")
