"""The errors that a command shows as a single line."""


class UserError(Exception):
    """An error the user can fix. The message is one line that says what, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableError(UserError):
    """A file that cannot be used. Training replaces an unreadable image by another one and goes on."""

    def __init__(self, file: object, reason: str, advice: str = 'replace or remove the file') -> None:
        super().__init__(f'{file}: {reason}: {advice}')
        self.reason, self.advice = reason, advice


def printable(text: str) -> str:
    """Escapes line breaks and control sequences, which text from a file may contain, for a line in a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
