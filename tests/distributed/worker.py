"""One process of a test's group: trains each of the cases in the file that it is given, one after the other. See group.py."""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    import torch
    import torch.distributed as dist

    import txtrain
    from tests.device import BACKEND, DEVICE
    from tests.distributed.callbacks import named

    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if size > 1:
        dist.init_process_group(BACKEND, init_method=f"file://{os.environ['TXTRAIN_STORE']}", rank=rank, world_size=size)
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"--- {name}", flush=True)
        txtrain.train(txtrain.compose(case["overrides"]), callbacks=[named(what) for what in case["callbacks"]])


if __name__ == "__main__":
    main()
