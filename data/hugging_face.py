"""Datasets of huggingface.co, or of its local cache where there is no network."""

import os
import ssl
import urllib.error
import urllib.request

from nanomla.core.configurator import UserError


def use_cache_without_network() -> None:
    """
    Let Hugging Face's libraries look only into their cache when the hub does not answer.

    Without this they would try for half a minute. Call it before they are imported.
    """
    if not answers(os.environ.get('HF_ENDPOINT', 'https://huggingface.co')):
        os.environ['HF_HUB_OFFLINE'] = '1'


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        # A certificate may be known to Hugging Face's own client alone.
        return isinstance(getattr(error, 'reason', None), ssl.SSLError)
    return True


def import_datasets():
    """Return the package `datasets`, which takes seconds to import."""
    try:
        import datasets
    except ImportError:
        raise UserError('this needs Hugging Face datasets: pip install datasets') from None
    return datasets
