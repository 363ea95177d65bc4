"""The writing process of `kit.writer`. Run isolated under Debian's Python: ``writer_child.py URI SIZE DEPTH SEED
PAUSE LOG``.

Keeps ``DEPTH`` writes in flight on random blocks, never two on one block, with ``PAUSE`` seconds between two turns, until
its standard input is closed; then it waits for all, flushes, and writes ``LOG``: one JSON list ``[block, content, issued,
acknowledged]`` a write, times from CLOCK_MONOTONIC in nanoseconds, which all processes of a machine share. In between it
reads blocks back and compares.

A block's content is its number and the write's number, repeated; content 0 is a block of zeroes (a write-zeroes request).
"""

# mypy: ignore-errors
import json
import random
import select
import struct
import sys
import time

import nbd

BLOCK = 4096
CONTENT = struct.Struct("<QQ")


def content_of(block, number):
    return bytes(BLOCK) if number == 0 else CONTENT.pack(block, number) * (BLOCK // CONTENT.size)


class Writer:
    def __init__(self, uri, size, depth, seed, pause):
        self.random = random.Random(seed)
        self.handle = nbd.NBD()
        self.handle.connect_uri(uri)
        self.blocks = size // BLOCK
        self.depth = depth
        self.pause = pause
        self.busy = set()
        self.last = {}
        self.history = []
        self.in_flight = 0
        self.failure = None

    def submit(self):
        block = self.random.randrange(self.blocks)
        while block in self.busy:
            block = self.random.randrange(self.blocks)
        self.busy.add(block)
        self.in_flight += 1
        choice = self.random.random()
        if choice < 0.1 and block in self.last:
            self.read(block)
        else:
            self.write(block, 0 if choice < 0.15 else len(self.history) + 1)

    def write(self, block, number):
        record = [block, number, time.monotonic_ns(), None]
        self.history.append(record)

        def done(error):
            record[3] = time.monotonic_ns()
            self.last[block] = number
            self.finish(block, error)
            return 1

        if number == 0:
            self.handle.aio_zero(BLOCK, block * BLOCK, done)
        else:
            data = nbd.Buffer.from_bytearray(bytearray(content_of(block, number)))
            self.handle.aio_pwrite(data, block * BLOCK, done)

    def read(self, block):
        data = nbd.Buffer(BLOCK)
        expected = content_of(block, self.last[block])

        def done(error):
            if not error.value and data.to_bytearray() != expected:
                self.failure = f"block {block} does not read back as write {self.last[block]} left it"
            self.finish(block, error)
            return 1

        self.handle.aio_pread(data, block * BLOCK, done)

    def finish(self, block, error):
        if error.value:
            self.failure = f"request on block {block} failed with errno {error.value}"
        self.busy.discard(block)
        self.in_flight -= 1

    def run(self):
        while self.failure is None and not select.select([sys.stdin], [], [], 0)[0]:
            while self.in_flight < self.depth:
                self.submit()
            self.handle.poll(-1)
            time.sleep(self.pause)
        while self.in_flight and self.failure is None:
            self.handle.poll(-1)
        if self.failure is not None:
            sys.exit(self.failure)
        self.handle.flush()
        self.handle.shutdown()


def main():
    uri, size, depth, seed, pause, log = sys.argv[1:]
    writer = Writer(uri, int(size), int(depth), int(seed), float(pause))
    print("writing", flush=True)
    writer.run()
    with open(log, "w", encoding="ascii") as out:
        json.dump(writer.history, out)


if __name__ == "__main__":
    main()
