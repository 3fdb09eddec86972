"""Throughput of the data path on this machine: tokenising, packed batches, the loader, streams.

    python -m tests.benchmarks.data [TEXT_FILE]        by default: the docstrings of the standard library

Prints one line a row; best of the repeats, because other processes only ever slow it down. Tokenising by CPU seconds, the rest by the clock.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from tests.benchmarks import sides
from txtrain.data.config import HFConfig
from txtrain.data.samples.order import GlobalOrder, OrderHash, ShareSampler
from txtrain.data.samples.packed import PackedSamples
from txtrain.data.samples.rows import OrderedSamples
from txtrain.data.sources.hub_text import HubStream
from txtrain.data.sources.python_docs import PythonDocs
from txtrain.data.sources.text import TextFiles
from txtrain.data.store.cache import TokenFile
from txtrain.data.store.split import Corpus
from txtrain.data.store.stream import StreamOrder, StreamTokens
from txtrain.data.store.tokenize import _pieces as cut_up
from txtrain.data.store.tokenize import tokenise
from txtrain.data.tokenizer.cuts import byte_level_places
from txtrain.data.tokenizer.tokenizer import Tokenizer, allow_threads, train_tokenizer

SEQ_LEN, BATCH, REPEATS = 256, 64, 3


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of REPEATS."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def computed(work: Callable[[], object]) -> float:
    """The same in CPU seconds of all threads, in which other work on the machine hardly counts."""
    return sides.best(REPEATS, work)[0]


def tokenising(source: TextFiles | PythonDocs, tokenizer: Tokenizer, folder: Path) -> tuple[float, float]:
    """CPU seconds of `encode_batch_fast` alone, and from text to cache."""
    allow_threads(True)
    pieces = [piece.text for piece in cut_up((("train", text) for text in source.documents("train")), byte_level_places)]
    bare = computed(lambda: tokenizer.backend.encode_batch_fast(pieces, add_special_tokens=False))
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        return bare, computed(lambda: tokenise(Corpus(source, 0.05), tokenizer, folder))


def tokenising_share() -> float:
    """The rate from text to cache as a share of `encode_batch_fast` alone, on the standard library's docstrings."""
    source = PythonDocs()
    with tempfile.TemporaryDirectory() as folder:
        bare, ours = tokenising(source, train_tokenizer(list(source.documents("train")), 8192), Path(folder))
    return bare / ours


def prepared_peak(megabytes: int) -> float:
    """MB of memory that preparing a text of that size takes, by bytes: what does not depend on a trained tokenizer."""
    line = "A text of some words, and a number: %d.\n"
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/text.txt", "w") as file:
            file.writelines(line % i for i in range(megabytes * 10**6 // len(line)))
        words = ["prepare", "data=text", f"data.path={folder}/text.txt", "data.tokenizer=bytes", f"data.cache_dir={folder}/cache", f"out={folder}/out"]
        child = subprocess.Popen([sys.executable, "-m", "txtrain", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        assert status == 0
    return used.ru_maxrss / 1e3


def streamed(by_files: bool, processes: int, steps: int = 300) -> list[tuple[int, float]]:
    """Of each process of a run that streams 60,000 rows of 3,000 bytes from 16 `.parquet` files or one `.jsonl`: the documents that it tokenises
    and its CPU seconds, opening included, for `steps` steps of 16 x 256 tokens by the default readers and blocks. One process after the other.
    """
    import datasets.config
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    texts = "\n\n".join(PythonDocs().documents("train"))
    rows = [f"{i} " + texts[at : at + 3000] for i, at in zip(range(60_000), itertools.cycle(range(0, len(texts) - 3000, 977)), strict=False)]
    tokenizer, readers, buffer = train_tokenizer(rows[:1000], 8192), HFConfig.stream_readers, HFConfig.shuffle_buffer
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        data = Path(folder) / ("files" if by_files else "rows.jsonl")
        if by_files:
            data.mkdir()
            for i in range(16):
                pq.write_table(pa.table({"text": rows[i::16]}), data / f"{i}.parquet", row_group_size=1000)
        else:
            data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        for rank in range(processes):
            counts: list[int] = []

            def counting(texts: Sequence[str], counts: list[int] = counts) -> list[list[int]]:
                counts.append(len(texts))
                return tokenizer.encode_batch(texts)

            begin = time.process_time()
            source = HubStream(str(data), None, "train", None, None, "text", 0.05, readers)
            encoder: Any = SimpleNamespace(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, encode_batch=counting)
            stream, order = StreamTokens(source, encoder, 0, readers, buffer), StreamOrder(1 << 40, 16, 0, n_readers=readers, buffer=buffer)
            share = slice(rank * 16 // processes, (rank + 1) * 16 // processes)
            for step in range(steps):
                stream.windows(stream.begins(order.indices(step)[share], SEQ_LEN), SEQ_LEN + 1)
            found.append((sum(counts), time.process_time() - begin))
    return found


def main() -> None:
    source = TextFiles(sys.argv[1]) if len(sys.argv) > 1 else PythonDocs()
    texts = list(source.documents("train"))
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    tokenizer = train_tokenizer(texts, 8192)
    print(f"{megabytes:.1f} MB, {len(texts)} documents, {os.cpu_count()} cores")

    with tempfile.TemporaryDirectory() as folder:
        bare, ours = tokenising(source, tokenizer, Path(folder))
        print(f"encode_batch_fast alone            {megabytes / bare:8.1f} MB/s")
        print(f"text to cache                      {megabytes / ours:8.1f} MB/s   {bare / ours:.2f} of it")

        samples = PackedSamples(TokenFile(Path(folder), "train"), SEQ_LEN)
        order = GlobalOrder(len(samples), BATCH, seed=0)
        steps = [order.rows(order.indices(step)) for step in range(400)]
        seconds = best(lambda: [samples.batch(rows) for rows in steps])
        print(f"packed batches                     {len(steps) * BATCH * SEQ_LEN / seconds / 1e6:8.1f} M tokens/s")
        for workers in (0, 2):
            allow_threads(False)
            loader = DataLoader(OrderedSamples(samples, 0, order), batch_sampler=ShareSampler(order), num_workers=workers, collate_fn=lambda b: b)
            iterator = iter(loader)
            seconds = best(lambda iterator=iterator: list(itertools.islice(iterator, 400)))
            print(f"loader, {workers} workers                  {400 * BATCH * SEQ_LEN / seconds / 1e6:8.1f} M tokens/s")
    few, many = prepared_peak(4), prepared_peak(40)
    print(f"memory of preparing 4 and 40 MB    {few:8.0f} and {many:.0f} MB, {many / few:.2f} times")
    for by_files, what in ((True, "16 files"), (False, "one file")):
        for n in (1, 2, 4):
            each = ", ".join(f"{documents} in {seconds:.1f} s" for documents, seconds in streamed(by_files, n))
            print(f"streaming {what}, {n} processes     documents of each: {each}")
    seconds = best(lambda: OrderHash(order)(10_000))
    print(f"order hash                         {10_000 * BATCH / seconds / 1e6:8.1f} M samples/s")
    rows = np.arange(1_000_000)
    print(f"permutation                        {1 / best(lambda: order.rows(rows)):8.1f} M samples/s")


if __name__ == "__main__":
    main()
