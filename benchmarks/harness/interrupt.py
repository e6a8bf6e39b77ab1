"""Runs that are cut short: whoever ends one, by any signal, has a record of its rows."""

import signal


def interruptible() -> None:
    """Let SIGTERM and SIGINT raise `KeyboardInterrupt`, after which a record is written."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # which shells switch off for what they do not wait for
