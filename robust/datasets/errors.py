"""The one error that every data set problem becomes."""


class DatasetError(ValueError):
    """Data that can't be used: names the source, what was expected and what was found."""

    def __init__(self, source: str, *, expected: str, found: str) -> None:
        super().__init__(f"{source}: expected {expected}, found {found}")
        self.source = source
        self.expected = expected
        self.found = found
