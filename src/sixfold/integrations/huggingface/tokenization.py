"""Our tokenizers as the ones Hugging Face's pipelines and collators take."""

from __future__ import annotations

from sixfold.data._kinds import Tokenizer
from sixfold.data.tokenizer.bpe import BytePairs
from sixfold.data.tokenizer.characters import Characters
from sixfold.errors import DataError

PAD = "<pad>"
INPUTS = ["input_ids", "attention_mask"]


def fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:  # noqa: F821
    """A `PreTrainedTokenizerFast` that gives the same ids, and one more for padding: the last.

    Batches are padded on the left, as generation needs. A model for it has ``len(tokenizer)`` ids.

    Args:
        tokenizer: characters, which refuse a text outside their alphabet, or byte pairs.

    Raises:
        DataError: for any other tokenizer.
        ModuleNotFoundError: naming the extra.

    >>> from sixfold.data.tokenizer import characters
    >>> fast = fast_tokenizer(characters.build("hello"))
    >>> fast("hole")["input_ids"], fast.pad_token_id
    ([1, 3, 2, 0], 4)
    """
    try:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend
        from transformers import PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fast_tokenizer needs transformers: pip install 'sixfold[huggingface]'"
        ) from error
    if isinstance(tokenizer, BytePairs):
        backend = Backend.from_str(tokenizer.to_json())
    elif isinstance(tokenizer, Characters):
        vocabulary = {character: i for i, character in enumerate(tokenizer.alphabet)}
        backend = Backend(models.WordLevel(vocabulary, unk_token=""))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    else:
        raise DataError(f"{type(tokenizer).__name__} is neither characters nor byte pairs")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        padding_side="left",
        model_input_names=INPUTS,
        clean_up_tokenization_spaces=False,
    )
