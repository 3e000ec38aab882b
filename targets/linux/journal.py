"""What a job leaves in its folder: ``results.jsonl``, ``state.json`` and a ballast for a full disk.

Standard library only, Python 3.7 or newer. A journal line is eight hex digits, the CRC-32 of the
JSON text that follows them after a space, and a newline; each is on the disk before the next.
"""

import json
import os
import zlib

JOURNAL, STATE, BALLAST = "results.jsonl", "state.json", "ballast"
# Room for a last state, an end line and a session's line: two seconds of samples of a quarter of a
# millisecond, 15 bytes each, are 120 kB.
BALLAST_BYTES = 1 << 18


def encode(record):
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text) & 0xFFFFFFFF, text)


def trusted(raw):
    """The records of the longest whole beginning -> (records, its length in bytes).

    The first line that is torn or altered ends it: what follows is not believed either.
    """
    records, length = [], 0
    for line in raw.split(b"\n")[:-1]:
        text = line[9:]
        if line[:9] != b"%08x " % (zlib.crc32(text) & 0xFFFFFFFF):
            break
        try:
            record = json.loads(text.decode())
        except ValueError:
            break
        records.append(record)
        length += len(line) + 1
    return records, length


def read_from(job_dir, offset, limit):
    """Whole trusted lines from ``offset`` on -> (where they begin, their text).

    At most ``limit`` bytes, but always a whole line. They begin at 0 where no line begins at
    ``offset`` (any more): the journal was cut because of damage.
    """
    try:
        with open(os.path.join(job_dir, JOURNAL), "rb") as stream:
            if not 0 < offset <= os.fstat(stream.fileno()).st_size:
                offset = 0
            stream.seek(max(0, offset - 1))
            if offset > 0 and stream.read(1) != b"\n":
                offset = 0
                stream.seek(0)
            raw = stream.read(limit)
            if b"\n" not in raw:
                raw += stream.readline()
    except OSError:
        return 0, ""
    return offset, raw[: trusted(raw)[1]].decode()


class Journal:
    """Append-only. Opening it cuts off what is torn or altered; ``records`` is what was kept."""

    def __init__(self, job_dir):
        self.stream = open(os.path.join(job_dir, JOURNAL), "a+b", buffering=0)
        self.stream.seek(0)
        self.records, self.length = trusted(self.stream.read())
        self.stream.truncate(self.length)

    def append(self, record):
        """Write one line through to the disk, or raise OSError and leave no part of it."""
        line = encode(record)
        try:
            done = 0
            while done < len(line):
                done += self.stream.write(line[done:])
            os.fsync(self.stream.fileno())
        except OSError:
            self.stream.truncate(self.length)
            raise
        self.length += len(line)
        self.records.append(record)


def read_state(job_dir):
    """The last state, or None where there is none."""
    try:
        with open(os.path.join(job_dir, STATE)) as stream:
            state = json.load(stream)
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def write_state(job_dir, state, sync):
    """Replace the state at once. ``sync``: it shall survive a loss of power, too."""
    path = os.path.join(job_dir, STATE)
    try:
        with open(path + ".part", "w") as stream:
            json.dump(state, stream, separators=(",", ":"))
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.rename(path + ".part", path)
    except OSError:
        try:
            os.unlink(path + ".part")
        except OSError:
            pass
        raise


def make_ballast(job_dir):
    path = os.path.join(job_dir, BALLAST)
    try:
        if os.path.getsize(path) == BALLAST_BYTES:
            return
    except OSError:
        pass
    try:
        with open(path, "wb") as stream:
            stream.write(b"\0" * BALLAST_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        free_ballast(job_dir)
        raise


def free_ballast(job_dir):
    try:
        os.unlink(os.path.join(job_dir, BALLAST))
    except OSError:
        pass
