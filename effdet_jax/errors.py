"""The error types that a command shows to its user as a single line."""


class UserError(Exception):
    """Something the user can mend: the message says what, where, and what to do, in one line."""


class UnreadableError(UserError):
    """A file that cannot be used as it is. Of an image: training takes another in its place and goes on."""

    def __init__(self, file: object, reason: str, advice: str = 'replace or remove the file') -> None:
        super().__init__(f'{file}: {reason}: {advice}')
        self.reason = reason
