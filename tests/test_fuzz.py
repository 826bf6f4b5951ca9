"""Damaged files of every kind, through the library and the commands: whatever is in them, one of two things happens.

Either the file is refused with one line, or the result is that of the sound file, unless the change legitimately
changes it (a weight, a temperature, a record). No traceback, no crash, no hang, no memory beyond twice that of the
sound file plus 64 MiB. Files are read in another process, which is replaced when it dies or hangs.
"""

import gzip
import json
import os
import random
import select
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz_mutations import (
    header_of,
    mutated_bytes,
    mutated_json,
    mutated_lines,
    mutated_safetensors,
    mutated_yaml,
    whole_file,
)
from fuzz_originals import write_originals

SECONDS = 20
MEBIBYTE = 1 << 20
SPARE = 64 * MEBIBYTE  # beyond twice what the sound file takes
DEFAULT, SLOW = 8, 360  # inputs for each of the kinds


Change = Callable[[bytes, bytes], bool]  # whether the result may differ, given the sound and the damaged file


def anything(sound: bytes, damaged: bytes) -> bool:
    return True


def nothing(sound: bytes, damaged: bytes) -> bool:
    return False


def only(*free: str) -> Change:
    """A JSON file whose result depends on these places, such as `a` or `a.b`, and must not change with others alone."""

    def may_differ(sound: bytes, damaged: bytes) -> bool:
        try:
            changed = differences(json.loads(sound), json.loads(damaged))
        except (ValueError, RecursionError):
            return False
        return any(place == name or place.startswith(f"{name}.") for place in changed for name in free)

    return may_differ


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, such as `a.b`; a key that is unknown to the sound one is a difference too."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        missing = object()
        pairs = [(key, one.get(key, missing), other.get(key, missing)) for key in keys]
        return [found for key, a, b in pairs for found in differences(a, b, f"{place}.{key}".lstrip("."))]
    return [] if type(one) is type(other) and one == other else [place]


def unpacks(sound: bytes, damaged: bytes) -> bool:
    """Another program unpacks it without complaint: two files in a row, say, or nothing from nothing."""
    import zstandard

    if sound.startswith(b"\x1f\x8b"):
        try:
            gzip.decompress(damaged)
        except (OSError, EOFError, zlib.error):
            return False
        return True
    while damaged:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            frame.decompress(damaged)
        except zstandard.ZstdError:
            return False
        if not frame.eof:
            return False
        damaged = frame.unused_data
    return True


def tensors(sound: bytes, damaged: bytes) -> bool:
    """Values of tensors may differ, and which of two tensors of one shape and type has which of two spans of bytes."""
    try:
        (before, values), (after, now) = header_of(sound), header_of(damaged)
        for header in (before, after):
            header.pop("__metadata__", None)
        spans = [sorted(entry["data_offsets"] for entry in header.values()) for header in (before, after)]
        shapes = [{name: entry["shape"] for name, entry in header.items()} for header in (before, after)]
    except Exception:
        return False
    return spans[0] == spans[1] and shapes[0] == shapes[1] and len(values) == len(now)


def cached(sound: bytes, damaged: bytes) -> bool:
    """A prompt cache may have other values, or other tokens that are ids."""
    try:
        (before, _), (after, _) = header_of(sound), header_of(damaged)
        tokens = json.loads(after["__metadata__"]["tokens"])
        fine = all(type(token) is int and 0 <= token < 400 for token in tokens)
        after["__metadata__"]["tokens"] = before["__metadata__"]["tokens"]
    except Exception:
        return False
    return fine and before["__metadata__"] == after["__metadata__"] and tensors(sound, damaged)


@dataclass(frozen=True)
class Kind:
    """A file, who reads it, how it is damaged, and when the result may differ."""

    file: str  # below the folder of all sound files
    reader: str  # of fuzz_worker.py
    mutated: Callable[[bytes, random.Random], bytes]
    may_differ: Change = nothing
    commands: tuple[str, ...] = ()  # `@` is the folder of all files
    keeps: str = ""  # "lines" or "items" of which the undamaged ones must be in the result
    reads_file: bool = False  # whether the reader gets the file, not its folder


GENERATE = "generate -m @/{} -p Once -n 3"
CONFIG_FREE = ("rope_freq_constant", "eos_token_id", "bos_token_id", "activation_fn_name")
TUNE_DATA = "tune -m @/model --data @/data/{} --steps 1 --dry-run -o @/out"
KINDS = {
    "config.json": Kind(
        "model/config.json", "model", mutated_json, only(*CONFIG_FREE),
        ("info @/model", GENERATE.format("model"), "convert @/model -o @/out", "average @/model @/model -o @/out"),
    ),
    "quantization": Kind(
        "quantized/config.json", "model", mutated_json, only(*CONFIG_FREE),
        ("convert @/quantized --dequantize -o @/out", "info @/quantized", "merge -m @/quantized -a @/lora -o @/out"),
    ),
    "generation_config.json": Kind(
        "model/generation_config.json", "model", mutated_json, only("eos_token_id", "bos_token_id"),
        (GENERATE.format("model"), "convert @/model -o @/out"),
    ),
    "model.safetensors": Kind(
        "model/model.safetensors", "model", mutated_safetensors, tensors,
        ("convert @/model -q 4 --group-size 32 -o @/out", "info @/model", "average @/model @/raw -o @/out"),
    ),
    "quantized tensors": Kind(
        "quantized/model.safetensors", "model", mutated_safetensors, tensors,
        ("convert @/quantized --dequantize -o @/out", "merge -m @/quantized -a @/lora -o @/out"),
    ),
    "index": Kind(
        "sharded/model.safetensors.index.json", "model", mutated_json, nothing,
        ("convert @/sharded -o @/out", "info @/sharded"),
    ),
    "shard": Kind(
        "sharded/model-1.safetensors", "model", mutated_safetensors, tensors, ("convert @/sharded -o @/out",)
    ),
    "tokenizer.model": Kind(
        "model/tokenizer.model", "tokenizer", mutated_bytes, anything,
        (GENERATE.format("model"), "convert @/model -o @/out"), reads_file=True,
    ),
    "tokenizer.json": Kind(
        "fast/tokenizer.json", "tokenizer", mutated_json, anything,
        (GENERATE.format("fast"), "convert @/fast -o @/out"), reads_file=True,
    ),
    "tokenizer_config.json": Kind(
        "fast/tokenizer_config.json", "model", mutated_json, anything,
        (GENERATE.format("fast"), "convert @/fast -o @/out"),
    ),
    "chat_template.jinja": Kind(
        "chat/chat_template.jinja", "model", mutated_bytes, anything,
        ("chat -m @/chat", GENERATE.format("chat"), "convert @/chat -o @/out"),
    ),
    "adapter_config.json": Kind(
        "lora/adapter_config.json", "adapted", mutated_json,
        only("lora_parameters.scale", "lora_parameters.dropout", "alpha", "rank_stabilised", "rank_stabilized"),
        (GENERATE.format("model -a @/lora"), "merge -m @/model -a @/lora -o @/out", "convert -a @/lora -o @/out"),
    ),
    "adapters.safetensors": Kind(
        "lora/adapters.safetensors", "adapted", mutated_safetensors, tensors,
        ("merge -m @/model -a @/lora -o @/out", "convert -a @/lora --to mlx-lm -o @/out", "info @/model -a @/lora"),
    ),
    "PEFT configuration": Kind(
        "peft/adapter_config.json", "adapted", mutated_json,
        only("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "r"),
        ("convert -a @/peft -o @/out", "generate -m @/model -a @/peft -p Once -n 3"),
    ),
    "PEFT tensors": Kind(
        "peft/adapter_model.safetensors", "adapted", mutated_safetensors, tensors, ("convert -a @/peft -o @/out",)
    ),
    "CoreNet checkpoint": Kind(
        "corenet/corenet_checkpoint.pt", "corenet", mutated_bytes, nothing,
        ("convert @/corenet/corenet_checkpoint.pt --config @/corenet/config.json --tokenizer none -o @/out",
         "info @/corenet/corenet_checkpoint.pt --config @/corenet/config.json"),
    ),
    "CoreNet YAML": Kind(
        "corenet/train.yaml", "yaml", mutated_yaml, anything,
        ("info @/corenet/corenet_checkpoint.pt --config @/corenet/train.yaml",), reads_file=True,
    ),
    "recipe for tune": Kind(
        "data/tune.yaml", "recipe", mutated_yaml, anything,
        ("tune --config @/data/tune.yaml --dry-run -o @/out",), reads_file=True,
    ),
    "recipe for pretrain": Kind("data/pretrain.yaml", "recipe", mutated_yaml, anything, (), reads_file=True),
    "jsonl": Kind(
        "data/records.jsonl", "examples", mutated_lines, anything, (TUNE_DATA.format("records.jsonl"),), "lines", True
    ),
    "json": Kind(
        "data/records.json", "examples", mutated_json, anything, (TUNE_DATA.format("records.json"),), "items", True
    ),
    "csv": Kind(
        "data/records.csv", "examples", mutated_bytes, anything, (TUNE_DATA.format("records.csv"),), reads_file=True
    ),
    "parquet": Kind(
        "data/records.parquet", "examples", mutated_bytes, anything, (TUNE_DATA.format("records.parquet"),),
        reads_file=True,
    ),
    "gz of records": Kind("data/records.jsonl.gz", "examples", mutated_bytes, unpacks, (), reads_file=True),
    "gz of texts": Kind("data/texts.jsonl.gz", "documents", mutated_bytes, unpacks, (), reads_file=True),
    "zst of texts": Kind("data/texts.jsonl.zst", "documents", mutated_bytes, unpacks, (), reads_file=True),
    "txt": Kind(
        "data/corpus.txt", "documents", mutated_bytes, anything,
        ("pretrain --config @/data/pretrain.yaml --steps 1 -o @/out",), reads_file=True,
    ),
    "prompt cache": Kind(
        "cache/prompt.safetensors", "cache", mutated_safetensors, cached,
        ("generate -m @/model -p Once -n 3 --prompt-cache @/cache/prompt.safetensors",),
    ),
    "prompts": Kind(
        "data/prompts.jsonl", "prompts", mutated_lines, anything,
        ("generate -m @/model --input @/data/prompts.jsonl -n 2 -o @/answers.jsonl",), "lines", True,
    ),
    "metrics.jsonl": Kind(
        "run/metrics.jsonl", "metrics", mutated_lines, anything, ("tune --config @/run.yaml --resume -o @/run",)
    ),
    "state.json": Kind(
        "run/checkpoints/step-00000002/state.json", "checkpoint", mutated_json, nothing,
        ("tune --config @/run.yaml --resume -o @/run",),
    ),
    "optimizer state": Kind(
        "run/checkpoints/step-00000002/optimizer.safetensors", "checkpoint", mutated_safetensors, tensors,
        ("tune --config @/run.yaml --resume -o @/run",),
    ),
    "checkpoint": Kind(
        "run/checkpoints/step-00000002/adapters.safetensors", "checkpoint", mutated_safetensors, tensors,
        ("tune --config @/run.yaml --resume -o @/run",),
    ),
    "task": Kind("tasks/task.yaml", "tasks", mutated_yaml, anything),
    "records of a task": Kind("tasks/test.jsonl", "tasks", mutated_lines, anything),
    "examples of a task": Kind("tasks/train.parquet", "tasks", mutated_bytes, anything),
    "token file": Kind("pretraining/{tokens}.tokens", "corpus", mutated_bytes, anything),
    "offsets": Kind("pretraining/{tokens}.offsets.npy", "corpus", mutated_bytes, anything),
    "manifest": Kind(
        "written/.openelm-mlx.json", "model", mutated_json, nothing,
        ("convert @/raw --force -o @/written", "merge -m @/model -a @/lora --force -o @/written"),
    ),
}  # fmt: skip


class Worker:
    """A process that answers jobs, replaced when it dies or hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, **job: Any) -> dict[str, Any]:
        if self._process is None:
            environment = {
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "NO_COLOR": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            words = [sys.executable, str(Path(__file__).with_name("fuzz_worker.py"))]
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
            self.ask()  # wait for its imports, which do not count
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], SECONDS if job else 120)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            status = self.stop()
            how = "hangs" if not ready else f"died with status {status}"
            return {"ended": how, "result": None, "error": None, "bytes": 0}
        return dict(json.loads(line))

    def stop(self) -> int:
        if self._process is None:
            return 0
        status = self._process.poll()
        self._process.kill()
        status = self._process.wait() if status is None else status
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        return status


@pytest.fixture(scope="module")
def worker():
    running = Worker()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tokenizer, worker):
    """The folder of all sound files."""
    root = write_originals(tmp_path_factory.mktemp("sound"), tokenizer)
    made = worker.ask(reader="corpus", path=str(root / "pretraining"))
    assert made["ended"] == "done", made
    return root


class Bench:
    """One kind: its sound result, and what a damaged file does."""

    def __init__(self, name: str, sound: Path, worker: Worker):
        self.name, self.kind, self._worker = name, KINDS[name], worker
        tokens = next(sound.glob("pretraining/tokens/*/0-train.tokens")).relative_to(sound / "pretraining")
        self._file = self.kind.file.format(tokens=tokens.with_suffix(""))
        self.path = sound / self._file
        self._sound = sound
        self.content = self.path.read_bytes()
        job = self._job(sound)
        worker.ask(**job)  # once for what is imported or computed only the first time
        self.expected = worker.ask(**job)
        assert self.expected["ended"] == "done", self.expected
        self._grown: dict[str, int] = {}

    def _job(self, root: Path) -> dict[str, Any]:
        file = root / self._file
        place = file if self.kind.reads_file else root / self._file.split("/")[0]
        return {"reader": self.kind.reader, "path": str(place)}

    def try_out(self, damaged: bytes, root: Path, command: str | None = None) -> str | None:
        """What is wrong with how a damaged file ends; `None` if nothing is."""
        answer = self._ended(damaged, root, command)
        allowed = 2 * (self._sound_bytes(command) if command else self.expected["bytes"]) + SPARE
        if answer["ended"] not in ("done", "refused"):
            return f"{answer['ended']}: {answer['error']}"
        if answer["bytes"] > allowed:
            return f"{answer['bytes'] / MEBIBYTE:.0f} MiB, allowed are {allowed / MEBIBYTE:.0f}"
        if answer["ended"] == "refused":
            return self._bad_message(answer["error"])
        return None if command else self._changed(damaged, answer["result"])

    def _ended(self, damaged: bytes, root: Path, command: str | None) -> dict[str, Any]:
        with copied(self._sound, root, self._file, damaged):
            job = {"words": command.replace("@", str(root)).split()} if command else self._job(root)
            answer = self._worker.ask(**job)
            if not (root / "written" / "precious.txt").exists():
                answer["ended"] = "deleted a file that this package did not write"
            return answer

    def _sound_bytes(self, command: str) -> int:
        """Memory that a command takes with the sound file; measured the second time, when all is imported."""
        if command not in self._grown:
            root = self._sound.with_name("warm")
            for _ in range(2):
                answer = self._ended(self.content, root, command)
            assert answer["ended"] in ("done", "refused"), answer
            self._grown[command] = answer["bytes"]
        return self._grown[command]

    def _bad_message(self, message: str) -> str | None:
        if "\n" in message or len(message) > 1500:
            return f"the message has {len(message)} characters: {message[:300]!r}"
        return None

    def _changed(self, damaged: bytes, result: Any) -> str | None:
        if result == self.expected["result"]:
            return None
        if not self.kind.may_differ(self.content, damaged):
            return f"silently changed: {str(result)[:200]}"
        if self.kind.keeps:
            missing = [item for item in self._undamaged(damaged) if item not in result]
            return f"silently lost: {missing[:3]}" if missing else None
        if self.kind.reader == "recipe":
            return self._not_as_written(damaged, result)
        return None

    def _undamaged(self, damaged: bytes) -> list[Any]:
        """Results of the records that are still in the file, as they were."""
        if self.kind.keeps == "lines":
            now = set(damaged.split(b"\n"))
            lines = self.content.strip(b"\n").split(b"\n")
            return [value for line, value in zip(lines, self.expected["result"], strict=True) if line in now]
        try:
            items = json.loads(damaged)
        except (ValueError, RecursionError):
            return []
        records = json.loads(self.content)
        pairs = zip(records, self.expected["result"], strict=True)
        return [value for record, value in pairs if isinstance(items, list) and record in items]

    def _not_as_written(self, damaged: bytes, result: Any) -> str | None:
        """A recipe's settings are those of the file, numbers as numbers."""
        before, after = yaml.safe_load(self.content), yaml.safe_load(damaged)
        for name, value in after.items():
            was = self.expected["result"].get(name)
            found = result.get(name, was)
            if found != (was if before.get(name) == value else value) and not _same_number(found, value):
                if name in ("model", "data", "tokenizer", "validation"):  # read further, or placed in a folder
                    continue
                return f"{name} is {value!r} in the file, but {found!r} in the result"
        return None


def _same_number(found: Any, written: Any) -> bool:
    try:
        return float(found) == float(written) and not isinstance(written, bool)
    except (TypeError, ValueError):
        return str(found) == str(written)


class copied:
    """A copy of all sound files (links to them) with a damaged one among them."""

    def __init__(self, sound: Path, root: Path, file: str, damaged: bytes):
        self._root = root
        top = file.split("/")[0]
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        for path in sound.iterdir():
            if path.name == top or path.name == "written":
                shutil.copytree(path, root / path.name, copy_function=os.link)
            elif path.is_dir():
                (root / path.name).symlink_to(path)
            else:
                (root / path.name).write_text(path.read_text().replace(str(sound), str(root)))
        (root / file).unlink()
        (root / file).write_bytes(damaged)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def fuzz(name: str, sound: Path, worker: Worker, root: Path, count: int, seed: int) -> list[str]:
    """Damages of one kind of file that end badly, with where the damaged file is kept."""
    rng = random.Random(f"{name} {seed}")
    bench = Bench(name, sound, worker)
    failures = []
    for number in range(count):
        mutate = whole_file if rng.random() < 0.1 else bench.kind.mutated
        damaged = mutate(bench.content, rng)
        command = rng.choice(bench.kind.commands) if bench.kind.commands and rng.random() < 0.25 else None
        wrong = bench.try_out(damaged, root / "all", command)
        if wrong:
            kept = root / f"{number}-{bench.path.name}"
            kept.write_bytes(damaged)
            failures.append(f"{name}, {command or bench.kind.reader}: {wrong} (the file is {kept})")
    return failures


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_or_changes_nothing(name, sound, worker, tmp_path):
    failures = fuzz(name, sound, worker, tmp_path, DEFAULT, seed=0)
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_refused_or_change_nothing(name, sound, worker, tmp_path):
    seed = int(os.environ.get("FUZZ_SEED", "1"))
    count = int(os.environ.get("FUZZ_COUNT", SLOW))
    failures = fuzz(name, sound, worker, tmp_path, count, seed)
    assert not failures, "\n".join(failures)
