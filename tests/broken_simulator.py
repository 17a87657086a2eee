"""A simulator that fails for one description, in a module that Ray actors can import."""

from introspect_ray.pocket.reader import ExactReader
from introspect_ray.training.rewriting_sources import LoadSimulator, open_simulator


class Broken:
    """The exact reader, which cannot bear one description."""

    def __init__(self, reader: ExactReader, broken: str):
        self.reader, self.broken = reader, broken

    def simulate(self, descriptions, windows):
        if self.broken in descriptions:
            raise ValueError("cannot read this")
        return self.reader.simulate(descriptions, windows)


def broken_opener(broken: str):
    def opener(config, simulator, progress):
        opened = open_simulator(config, simulator, progress)
        return LoadSimulator(lambda: Broken(opened.load(), broken), f"{opened.digest}-broken")

    return opener
