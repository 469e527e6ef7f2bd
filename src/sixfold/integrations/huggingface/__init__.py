"""Sixfold in Hugging Face: its scores in their models, and its models among theirs."""


def register() -> None:
    """Register every score of points as ``sixfold_<score>``, and Sixfold's own models.

    Raises ModuleNotFoundError naming the extra where transformers is missing.

    >>> register()
    >>> from transformers import AttentionInterface
    >>> "sixfold_cosine" in AttentionInterface().valid_keys()
    True
    """
    from sixfold.integrations.huggingface import attention

    attention.register()
