"""Damaged copies of files: changes of bytes, of JSON and YAML values, of safetensors headers, of lines."""

import copy
import json
import math
import random
import struct

DEEP = "@deep@"
WEIRD = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 2**31, -(2**31), 2**63, 10**30, 1e308, 1e39, 1e-40, -1e39,
    math.nan, math.inf, -math.inf, "", "1", "nan", "x" * 100_000, "\x1b[2J\x07", "\ud800", "[red]", "../../etc/passwd",
    "/etc/passwd", "(a+)+$", "{{ 1/0 }}", "%s{0}", [], {}, [[]], [0], {"": ""}, [1] * 5000, DEEP,
]  # fmt: skip


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flipped, replaced, removed, doubled or moved bytes; or the end is missing."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(data) or 1)
        length = min(rng.choice([1, 1, 2, 4, 8, 64]), len(data) - place)
        match rng.randrange(8):
            case 0 | 1 if length:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place : place + length] = rng.randbytes(length)
            case 3:
                data[place : place + length] = rng.choice([b"\xff", b"\0"]) * length
            case 4:
                del data[place : place + length]
            case 5:
                data[place:place] = rng.choice([rng.randbytes(length), b"\0", b"\n", b'"', b"{", b"\xef\xbb\xbf"])
            case 6:
                other = rng.randrange(len(data) or 1)
                data[place:place] = data[other : other + rng.choice([length, len(data) // 3])]
            case 7 if rng.random() < 0.3:
                del data[place:]
    return bytes(data)


def whole_file(data: bytes, rng: random.Random) -> bytes:
    """Changes of a file as a whole, which happen to files of every kind."""
    others = [b"", b"{}", b"[]", b"null", b"1", b"\n", b"[" * 200_000, b'{"a":' * 100_000, b"<html>not found</html>"]
    others += [b"\0" * len(data), rng.randbytes(100), b"PK\x03\x04" + data, b"\x1f\x8b\x08" + data]
    others += [data[: len(data) // 2], data + data, data[::-1], data.rstrip() + b"\n\n\n", data.replace(b"\n", b"\r\n")]
    return rng.choice([*others, b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16")])


def places(value, path=()):
    """The paths of all values within a JSON value, itself included."""
    found = [path]
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            found += places(child, (*path, key))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


def mutated_value(value, rng: random.Random):
    """A JSON value with one or two changes of its structure."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2])):
        paths = [path for path in places(value) if path]
        if not paths:
            return copy.deepcopy(rng.choice(WEIRD))
        # A few places near the top rather than one of a thousand pieces of a vocabulary.
        *above, key = rng.choice(paths if rng.random() < 0.3 else [path for path in paths if len(path) < 3])
        parent = at(value, above)
        match rng.randrange(9):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice([key + "_", key.upper(), "", "__class__", "\x1b[31m" + key])] = parent.pop(key)
            case 2:
                other = at(value, rng.choice(paths)) if rng.random() < 0.5 else str(parent[key])
                parent[key] = json.loads(json.dumps(other))  # a copy, not a cycle
            case 3 if isinstance(parent[key], int | float):
                number = parent[key]
                parent[key] = rng.choice([-number, number + 1, number * 1000, number / 2, float(number), str(number)])
            case 4 if isinstance(parent[key], str):
                text = parent[key]
                parent[key] = rng.choice([text * 2, text[:-1], text[::-1], text + "\0", text.upper(), " " + text])
            case 5 if isinstance(parent[key], list):
                parent[key] = rng.choice([parent[key][:-1], parent[key] * 2, parent[key][::-1], [parent[key]]])
            case 6 if isinstance(parent, list):
                parent.insert(key, copy.deepcopy(rng.choice(WEIRD)))
            case _:
                parent[key] = copy.deepcopy(rng.choice(WEIRD))
    return value


def dumped(value, rng: random.Random) -> bytes:
    """A value as JSON, sometimes in a layout that no program writes."""
    text = json.dumps(value, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
    text = text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)
    if rng.random() < 0.1:
        text = text.replace("}", ",}", 1)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # every key twice
    return text.encode("utf-8", "surrogatepass")


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return mutated_bytes(data, rng)
    return dumped(mutated_value(json.loads(data), rng), rng)


def mutated_yaml(data: bytes, rng: random.Random) -> bytes:
    import yaml

    if rng.random() < 0.4:
        bomb = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
            b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (n, n, *[n - 1] * 9) for n in range(98, 106)
        )
        extra = [bomb, b"!!python/object/apply:os.system [id]\n", b"? [a]\n: b\n", b"%YAML 9.9\n", b"- a\n", b"\t\n"]
        return mutated_bytes(data, rng) if rng.random() < 0.6 else data + rng.choice(extra)
    value = mutated_value(yaml.safe_load(data), rng)
    text = yaml.safe_dump(value, allow_unicode=True) if value == value else str(value)
    return text.replace(DEEP, "[" * 2000 + "]" * 2000).encode("utf-8", "replace")


def header_of(data: bytes):
    """The header of a safetensors file and the bytes after it."""
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: bytes, values: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + values


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    header, values = header_of(data)
    match rng.randrange(8):
        case 0:
            return mutated_bytes(data, rng)
        case 1:
            return with_header(json.dumps(header).encode(), mutated_bytes(values, rng))
        case 2:
            return with_header(mutated_bytes(data[8 : len(data) - len(values)], rng), values)
        case 3:
            size = rng.choice([0, 1, 2**63, 2**64 - 1, len(data), len(data) - 8, 100_000_000, rng.randrange(1 << 20)])
            return struct.pack("<Q", size) + data[8:]
        case 4:
            names = [name for name in header if name != "__metadata__"]
            one, other = rng.choice(names), rng.choice(names)
            part = rng.choice(["data_offsets", "shape", "dtype"])
            header[one][part] = header[other][part]
        case 5:
            entry = header[rng.choice([name for name in header if name != "__metadata__"])]
            entry["dtype"] = rng.choice(
                ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "U32", "F8_E4M3", "C64", "f32"]
            )
        case _:
            header = mutated_value(header, rng)
    return with_header(dumped(header, rng), values)


def mutated_lines(data: bytes, rng: random.Random) -> bytes:
    """A file of one record per line: one line is damaged, missing, doubled or in another place."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines) - 1)
    match rng.randrange(6):
        case 0:
            return mutated_bytes(data, rng)
        case 1:
            lines[number] = mutated_bytes(lines[number], rng)
        case 2:
            lines.insert(number, rng.choice([b"", b"null", b"[", b"{}", b"\xff\xfe", b'"\\ud800"', b"[1,2]", b"// x"]))
        case 3:
            lines[number] = lines[number] + rng.choice([b"\r", b",", b" ", b"\x00", lines[number]])
        case _:
            lines[number] = mutated_json(lines[number], rng)
    return b"\n".join(lines)
