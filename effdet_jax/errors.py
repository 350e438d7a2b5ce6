"""The errors that a command shows to its user as a single line."""


class UserError(Exception):
    """Something the user can mend: the message says what, where, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableError(UserError):
    """A file that cannot be used as it is. Of an image: training takes another in its place and goes on."""

    def __init__(self, file: object, reason: str, advice: str = 'replace or remove the file') -> None:
        super().__init__(f'{file}: {reason}: {advice}')
        self.reason, self.advice = reason, advice


def printable(text: str) -> str:
    """Fit for a line of a terminal: what comes from a file may hold line breaks and control sequences."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
