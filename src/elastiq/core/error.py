"""The one exception a user meets."""


class ElastiqError(Exception):
    """Input, file or request that cannot be handled; the message is one sentence that names the remedy."""
