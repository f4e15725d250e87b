"""Settings of a judge, and their checks."""

import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ml_collections.config_dict import ConfigDict

from dynfocus_jax.errors import UserError
from dynfocus_jax.sections import Field, check_value

JUDGE: dict[str, Field] = {
    "model": Field(str, "name of the model at the endpoint; None: no judge"),
    "base_url": Field("https://api.openai.com/v1", "URL of any OpenAI-compatible endpoint"),
    "key_variable": Field("OPENAI_API_KEY", 'environment variable with the API key; "": no key is sent'),
    "concurrency": Field(8, "requests in flight", at_least=1),
    "attempts": Field(16, "attempts per question", at_least=1),
    "timeout": Field(60.0, "seconds without data after which an attempt is aborted", above=0),
    "patience": Field(600.0, "seconds per question, over all attempts", above=0),
    "give_up_after": Field(16, "consecutive questions without a reply that stop the judge", at_least=1),
    "parameters": Field(ConfigDict({"temperature": 0.0, "max_tokens": 1024}), "parameters of each request"),
}


class JudgeSettings(NamedTuple):
    """Endpoint, model and limits of a judge: the fields of JUDGE, and the file of its replies."""

    model: str
    base_url: str = JUDGE["base_url"].default
    key_variable: str = JUDGE["key_variable"].default
    cache: Path | None = None  # file of the replies so far, one JSON value per line; kept between runs
    # Not JUDGE's: 0 and 0.0 are different requests to the cache of replies
    parameters: dict[str, Any] = {"temperature": 0, "max_tokens": 1024}  # noqa: RUF012
    concurrency: int = JUDGE["concurrency"].default
    attempts: int = JUDGE["attempts"].default  # the client waits 0.5 s after the first, at most 8 s later
    timeout: float = JUDGE["timeout"].default  # to connect, and between two reads of the reply
    patience: float = JUDGE["patience"].default  # with the waits between attempts
    give_up_after: int = JUDGE["give_up_after"].default

    @property
    def url(self) -> str:
        """The base URL, without `/chat/completions`."""
        return self.base_url.strip().rstrip("/").removesuffix("/chat/completions")


def check_settings(settings: JudgeSettings) -> None:
    """Check a judge's settings; raise UserError if one of them cannot be used."""
    if not settings.model.strip():
        raise UserError("the judge's model is not set; set it to the model's name at the endpoint.")
    if not _is_web_address(settings.url):
        raise UserError(
            f"the judge's base_url is {settings.base_url!r}, expected a URL such as https://host/v1."
        )
    for name in ("concurrency", "attempts", "timeout", "patience", "give_up_after"):
        check_value(getattr(settings, name), JUDGE[name], f"the judge's {name}")


def read_key(settings: JudgeSettings) -> str:
    """Return the key from the environment, or "" for an endpoint that needs none.

    Raises:
      UserError: the variable is not set, or does not hold a key.
    """
    if not settings.key_variable:
        return ""
    key = os.environ.get(settings.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        found = "contains characters that a key cannot have" if key else "is not set"
        raise UserError(
            f"the environment variable {settings.key_variable} {found}, expected the judge's key; set it, or "
            'set key_variable to "" if the endpoint needs no key.'
        )
    return key


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unclosed bracket
        return False
