"""Loggers that a run must survive."""

import time

from lightning.pytorch.loggers import Logger


class Raises(Logger):
    """In every method that others call."""

    name, version = "raises", ""

    def __init__(self, start=True):
        super().__init__()
        self.start = start

    def fail(self, *_, **__):
        raise OSError("the server is gone")

    log_metrics = save = finalize = log_graph = after_save_checkpoint = fail

    def log_hyperparams(self, *_, **__):
        if not self.start:
            self.fail()


class Sleeps(Logger):
    """At each row, for longer than anybody waits."""

    name, version = "sleeps", ""

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        time.sleep(600)


class Remembers(Logger):
    """What it is told, by its path."""

    name, version = "remembers", ""
    told: dict = {}

    def __init__(self, save_dir, name):
        super().__init__()
        self.events = self.told.setdefault(save_dir, [("named", name)])

    def log_hyperparams(self, params):
        self.events.append(("config", params["seed"], params["run"].get("data", {}).get("source"), params.get("plan", {})))

    def log_metrics(self, metrics, step=None):
        self.events.append((step, metrics))

    def save(self):
        self.events.append("save")

    def finalize(self, status):
        self.events.append(status)


class Unreachable(Logger):
    """Its server is asked for when it is used first: by Lightning, in the training's own thread."""

    name, version = "unreachable", ""

    def __init__(self, seconds=0):
        super().__init__()
        self.seconds = seconds

    @property
    def experiment(self):
        time.sleep(self.seconds)
        raise OSError("no route to host")

    def log_metrics(self, metrics, step=None):
        self.experiment.log(metrics)

    log_hyperparams = log_metrics
