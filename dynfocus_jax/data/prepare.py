"""Inputs of a configuration: the data folder, which may be generated, tokenizers and media readers."""

import sys
from pathlib import Path

import tqdm
from ml_collections import ConfigDict

from dynfocus_jax.data import synthetic
from dynfocus_jax.data.media_reader import MediaReader
from dynfocus_jax.errors import UserError
from dynfocus_jax.features.store import blank_frame, open_features
from dynfocus_jax.media.frame_sampling import Sampling
from dynfocus_jax.text.conversation import check_template
from dynfocus_jax.text.tokenizer_files import read_query_tokenizer, read_tokenizer
from dynfocus_jax.text.tokenizers import TextAndQueryTokenizer, Tokenizer, WordTokenizer


def prepare_data_root(data: ConfigDict) -> Path:
    """Return the folder of annotations and media, after generating it if the configuration asks for it.

    Args:
      data: the section `config.data`.

    Raises:
      UserError: if the folder does not exist.
    """
    root = Path(data.root).expanduser()
    if data.generate == "needles":
        root = _generate_needles(root, data)
    if not root.is_dir():
        raise UserError(
            f"config.data.root is {data.root!r}, which is not a folder; set it to the folder of the data."
        )
    return root


def check_initial_checkpoint(config: ConfigDict) -> None:
    """Check that a configuration with published weights (`config.weights`) names an initial checkpoint.

    Raises:
      UserError: if `config.initial` is not set.
    """
    published = [path for part, path in config.weights.items() if part != "skip" and path]
    if published and config.initial is None:
        raise UserError(
            f"config.initial is not set, but stage {config.stages[0].name!r} starts from published weights. "
            f"Convert {', '.join(published)} (the paths in config.weights) with `python -m "
            "dynfocus_jax.convert --config=FILE --output=DIR`, where FILE is this config, and set "
            "--config.initial=DIR, or set it to a checkpoint that was trained from these weights."
        )


def make_tokenizer(config: ConfigDict, vocabulary: Path, *, strict: bool = True) -> Tokenizer:
    """Return the tokenizer of a configuration, with the text encoder's own for queries if it names one.

    Args:
      config: the configuration.
      vocabulary: word list, read if `config.data.tokenizer` is None.
      strict: raise UserError for a word outside that list, see `WordTokenizer`.

    Raises:
      UserError: if a file cannot be read, a vocabulary is larger than the model's, or the tokenizer lacks a
        special token of `config.data.template`.
    """
    data, remedy = config.data, "raise vocab_size"
    if data.tokenizer is None:
        tokenizer: Tokenizer = WordTokenizer.from_file(vocabulary, strict=strict)
        found = f"{vocabulary} has {tokenizer.vocab_size} words"
    else:
        tokenizer = read_tokenizer(data.tokenizer)
        found = f"{data.tokenizer} has {tokenizer.vocab_size} tokens"
    _check_vocab_size(config, "language", tokenizer.vocab_size, f"{found}; {remedy}")
    check_template(tokenizer, data.template)
    if data.query_tokenizer is None:
        remedy += ", or set config.data.query_tokenizer to the text encoder's own vocabulary"
        _check_vocab_size(config, "text_encoder", tokenizer.vocab_size, f"{found}; {remedy}")
        return tokenizer
    if data.max_query < 3:
        raise UserError(
            f"config.data.max_query is {data.max_query}, expected at least 3, because "
            "config.data.query_tokenizer adds the tokens [CLS] and [SEP]."
        )
    query_tokenizer = read_query_tokenizer(data.query_tokenizer)
    found = f"{data.query_tokenizer} has {query_tokenizer.vocab_size} tokens"
    _check_vocab_size(config, "text_encoder", query_tokenizer.vocab_size, f"{found}; {remedy}")
    return TextAndQueryTokenizer(tokenizer, query_tokenizer)


def make_media_reader(config: ConfigDict, data_root: Path | None = None) -> MediaReader:
    """Return the reader of a configuration's media files.

    Worker processes divide the size of its cache, `config.data.cache_gib`, among themselves.

    Args:
      config: the configuration.
      data_root: folder of annotations and media, needed for reading stored features if `config.data.features`
        names them. None reads pixels.

    Raises:
      UserError: if the stored features do not fit the configuration, see `FeatureStore`.
    """
    data, vision = config.data, config.model.vision
    features = None if data_root is None else open_features(config, data_root)
    return MediaReader(
        vision.image_size,
        sampling=Sampling.from_config(data.sampling),
        layout=data.image_layout,
        mean=vision.mean,
        timeout=data.timeout,
        cache_bytes=int(data.cache_gib * 2**30) // max(1, data.processes),
        features=features,
        blank=None if features is None else blank_frame(config),
    )


def _check_vocab_size(config: ConfigDict, section: str, tokens: int, clause: str) -> None:
    size = config.model[section].vocab_size
    if size < tokens:
        raise UserError(f"config.model.{section}.vocab_size is {size}, but {clause}.")


def _generate_needles(root: Path, data: ConfigDict) -> Path:
    """Generate the needles benchmark unless it exists, with a progress bar on a terminal."""
    with tqdm.tqdm(desc="generating needles", unit="file", disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return synthetic.generate_needles(root, workers=data.workers, progress=progress, **data.needles)
