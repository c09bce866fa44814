"""Whether the hub of Hugging Face answers: asked at most twice, before its clients ask for minutes.

A file that is not here they ask for twelve times, with 46 s of pauses between, and every time as
long as it takes to find out that nothing answers.
"""

import time
from functools import cache
from typing import Any, Final

from srft_prep.errors import in_one_line

CONNECT_SECONDS: Final = 3.0
"""How long a connection to an address of the hub may take: one packet may get lost."""
PAUSE_SECONDS: Final = 1.0
"""Before a hub that refused at once is asked a second time."""


def hub_problem() -> str | None:
    """Return why the hub cannot be asked; None where it answers, whatever it says.

    A slow hub is given as long as its clients give it, HF_HUB_ETAG_TIMEOUT (10 s).
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to ask the hub"
    return _problem_at(constants.ENDPOINT)


@cache
def _problem_at(endpoint: str) -> str | None:
    from huggingface_hub import get_session

    session = get_session()  # before the clock starts: that its client is slow to load is no answer
    started = time.monotonic()
    reason = _reason_at(endpoint, session)
    if reason and time.monotonic() - started < CONNECT_SECONDS:  # refused: maybe for a moment only
        time.sleep(PAUSE_SECONDS)
        reason = _reason_at(endpoint, session)
    return reason and f"the hub does not answer ({endpoint}: {reason})"


def _reason_at(endpoint: str, session: Any) -> str | None:
    from huggingface_hub import constants

    seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
    try:
        session.head(
            endpoint, timeout=(CONNECT_SECONDS, seconds, seconds, seconds), follow_redirects=False
        )
    except Exception as error:  # noqa: BLE001 - whatever the transport of the hub's client raises
        return in_one_line(error, limit=200)
    return None
