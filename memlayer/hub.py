"""Ask the Hugging Face Hub once, before libraries that would try six times over half a minute."""

from __future__ import annotations

from typing import Literal

TIMEOUT = 10.0
"""Seconds to wait for the Hub."""


def reason_unreachable(kind: Literal["model", "dataset"], name: str) -> str | None:
    """Say in a few words why the Hub does not give a model or data set; None where it does."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        if kind == "model":
            HfApi().model_info(name, timeout=TIMEOUT)
        else:
            HfApi().dataset_info(name, timeout=TIMEOUT)
    except GatedRepoError:
        return "it is gated: accept its terms on huggingface.co and log in with `hf auth login`"
    except RepositoryNotFoundError:
        return f"there is no such {kind}, or it is private"
    except HFValidationError:
        return "that is not a name that the Hub can have"
    except Exception as error:  # the HTTP library's own classes, which differ between its versions
        return (
            f"offline? {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
    return None
