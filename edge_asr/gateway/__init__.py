"""The gateway: any browser, headset or phone on the plant network becomes a source of the pipeline.

A session (``session``) belongs to a station, which a token names (``tokens``). What the station says between pressing
and letting go of a button is one talk (``talk``), a source that the pipeline hears like any other; what the outbox has
committed of it flows back as numbered events. The rooms of this package are optional at run time (extra ``gateway``).
"""


class GatewayError(Exception):
    """The gateway cannot be opened, or its files not be used; one line with the remedy."""
