"""The data folder of a configuration, generated when the config says so, and its tokenizer."""

import sys
from pathlib import Path

import tqdm
from ml_collections import ConfigDict

from dynfocus_jax.config import UserError
from dynfocus_jax.data import synthetic
from dynfocus_jax.data.tokenizer import WordTokenizer


def prepare(data: ConfigDict) -> Path:
    """The folder that holds annotations and media (`data` is the section `config.data`).

    Raises:
      UserError: the folder is missing.
    """
    root = Path(data.root).expanduser()
    if data.generate == "needles":
        root = _generate(root, data)
    if not root.is_dir():
        raise UserError(f"config.data.root is {data.root!r}, which is not a folder; put the data there.")
    return root


def make_tokenizer(config: ConfigDict, vocabulary: Path, *, strict: bool = True) -> WordTokenizer:
    """The tokenizer of a configuration (`strict`: unknown words are errors).

    Raises:
      UserError: the vocabulary is missing or larger than the model's.
    """
    tokenizer = WordTokenizer.from_file(vocabulary, strict=strict)
    for section in ("language", "text_encoder"):
        size = config.model[section].vocab_size
        if size < tokenizer.vocab_size:
            raise UserError(
                f"config.model.{section}.vocab_size is {size}, but {vocabulary} has "
                f"{tokenizer.vocab_size} words; raise it."
            )
    return tokenizer


def _generate(root: Path, data: ConfigDict) -> Path:
    """Makes the needles benchmark unless it is there, with a progress bar on a terminal."""
    with tqdm.tqdm(desc="generating needles", unit="file", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return synthetic.generate(root, workers=data.workers, progress=progress, **data.needles)
