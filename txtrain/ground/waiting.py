"""Process groups in which a rank waits for another however long that one works: it prepares data, or was suspended.

Who is dead or stands still the launcher sees, or the heartbeat. Torch would end all ranks after 30 minutes.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

_LIMIT = timedelta(days=7)


def agreement_group() -> dist.ProcessGroup:
    """A group of all ranks, on CPUs, for what they tell each other between steps."""
    made: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_LIMIT)
    return made


def wait_in(group: dist.ProcessGroup | None) -> None:
    """Take the limit off a group on CPUs; None: off that of all ranks. On GPUs it stays: an exchange that hangs there
    is not seen otherwise."""
    if dist.get_backend(group) == "gloo":
        _set_pg_timeout(_LIMIT, group)
