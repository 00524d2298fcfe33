"""``compaware study``: accuracy against compression, for this method and for its rivals."""


class Stopped(RuntimeError):
    """Some trainings of a study failed, the others are done; or another process does them."""
