"""JSON and YAML files with settings: what is read, typed fields, and one line for everything else."""

import json
import os
import tracemalloc

import pytest

from mlx_openelm.errors import AdapterError, ConfigError
from mlx_openelm.files.json_file import parse_json, parse_json_object, read_json_lines, read_json_object
from mlx_openelm.files.yaml_file import parse_yaml, read_yaml_object


def refusal(action, *arguments):
    """The message of the error that an action raises, which is one short line."""
    with pytest.raises(ConfigError) as raised:
        action(*arguments, ConfigError)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


class TestJson:
    def test_an_object_is_read_with_its_types(self, tmp_path):
        (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"rank": 8, "scale": 2, "name": "x", "base": {"size": 3}}')
        values = read_json_object(tmp_path / "a.json", ConfigError)
        assert values == {"rank": 8, "scale": 2, "name": "x", "base": {"size": 3}}
        assert (values.whole("rank", at_most=8), values.number("scale"), values.text("name")) == (8, 2.0, "x")
        assert values.table("base").whole("size") == 3
        assert (values.table("nothing"), values.flag("no", False), values.number("no", None)) == ({}, False, None)

    def test_a_file_that_may_be_missing(self, tmp_path):
        assert read_json_object(tmp_path / "a.json", ConfigError, optional=True) == {}
        assert "No such file" in refusal(read_json_object, tmp_path / "a.json")

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[" * 100_000, "nested too deeply"),
            ("[" * 70 + "]" * 70, "more than 64 levels"),
            ('{"a": [1, {"b": NaN}]}', "a[1].b must be a finite number"),
            ('{"a": 1e999}', "a must be a finite number"),
            ('{"a": -1e39}', "a must be a finite number"),
            ('{"a": 1' + "0" * 400 + "}", "a must be a finite number"),
            ('{"a": 1' + "0" * 5000 + "}", "thousands of digits"),
            ('{"a": 1, "a": 2}', "'a' occurs twice with different values"),
            ('{"a": "\\ud800"}', "a contains a lone surrogate"),
            ('{"\\ud800": 1}', "a name that is not text"),
            ('{"a": }', "not valid JSON: Expecting value (column 7)"),
            ("", "not valid JSON"),
            ('{"' + "a" * 100_000 + '": NaN}', "aaa...aaa"),
        ],
    )
    def test_what_is_no_sound_json_is_one_line(self, tmp_path, text, problem):
        (tmp_path / "a.json").write_text(text)
        message = refusal(read_json_object, tmp_path / "a.json")
        assert message.startswith(f"{tmp_path / 'a.json'}")
        assert problem in message

    @pytest.mark.parametrize("text", ["[]", "3", "null", '"a"'])
    def test_other_values_are_no_object(self, text):
        assert refusal(parse_json_object, text, "a.json") == "a.json must contain a JSON object"

    def test_numbers_that_other_tools_write_are_read(self):
        text = '{"model_max_length": 1000000000000000019884624838656, "eps": 1e-45, "a": 1, "a": 1}'
        assert parse_json(text, "a", ConfigError)["model_max_length"] == 1000000000000000019884624838656

    def test_names_of_files_are_kept_whatever_their_bytes(self):
        name = os.fsdecode(b"model-\xff")
        assert parse_json(json.dumps({"model": name}), "a", ConfigError) == {"model": name}

    def test_a_file_that_is_too_large_or_not_text_is_refused(self, tmp_path):
        (tmp_path / "a.json").write_text('{"a": "' + "x" * 1000 + '"}')
        with pytest.raises(AdapterError, match="larger than 1,000 bytes"):
            read_json_object(tmp_path / "a.json", AdapterError, max_bytes=1000)
        (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
        assert "not UTF-8" in refusal(read_json_object, tmp_path / "a.json")

    def test_lines_are_read_one_by_one_and_named(self, tmp_path):
        (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n[3]\n')
        lines = read_json_lines(tmp_path / "m.jsonl", ConfigError)
        assert [next(lines)["step"], next(lines)["step"]] == [1, 2]
        with pytest.raises(ConfigError, match="line 3 must contain a JSON object"):
            next(lines)
        (tmp_path / "m.jsonl").write_text('{"a": "' + "x" * (1 << 20) + '"}')
        with pytest.raises(ConfigError, match="line 1 is longer than"):
            next(read_json_lines(tmp_path / "m.jsonl", ConfigError))

    @pytest.mark.parametrize(
        ("values", "read", "problem"),
        [
            ({}, lambda v: v.whole("a"), "a.json: a is missing"),
            ({"a": True}, lambda v: v.whole("a"), "a must be a whole number; got True"),
            ({"a": True}, lambda v: v.number("a"), "a must be a number; got True"),
            ({"a": 4.0}, lambda v: v.whole("a"), "a must be a whole number; got 4.0"),
            ({"a": 2**64}, lambda v: v.whole("a"), "a must be a number from 0 to"),
            ({"a": 0}, lambda v: v.whole("a", at_least=1, at_most=9), "a must be a number from 1 to 9; got 0"),
            ({"a": -1}, lambda v: v.number("a", at_least=0), "a must be a number from 0 to"),
            ({"a": 1}, lambda v: v.text("a"), "a must be text; got 1"),
            ({"a": "c"}, lambda v: v.text("a", choices=("x", "y")), "unknown a 'c' (choose from x, y)"),
            ({"a": 1}, lambda v: v.flag("a"), "a must be true or false; got 1"),
            ({"a": []}, lambda v: v.table("a"), "a must be an object; got []"),
            ({"a": {"b": 1}}, lambda v: v.table("a").text("b"), "a.json: a: b must be text; got 1"),
            ({"a": [1, "x"]}, lambda v: v.list_of("a", int), "a must be a list of int; got [1, 'x']"),
            ({"a": "x" * 10**6}, lambda v: v.whole("a"), "a must be a whole number; got 'xxx"),
        ],
    )
    def test_a_field_of_another_type_or_range_is_named(self, values, read, problem):
        fields = parse_json_object(json.dumps(values), "a.json", ConfigError)
        with pytest.raises(ConfigError) as raised:
            read(fields)
        assert problem in str(raised.value)
        assert len(str(raised.value)) < 200


class TestYaml:
    def test_plain_types_are_read_and_dates_stay_text(self):
        text = "{a: 1, b: [1.5, true, null, x], c: 2024-01-01, d: 1e-6}"
        expected = {"a": 1, "b": [1.5, True, None, "x"], "c": "2024-01-01", "d": "1e-6"}
        assert parse_yaml(text, "r.yaml", ConfigError) == expected

    def test_anchors_and_merge_keys_are_read(self):
        text = "base: &base {rank: 8, alpha: 16}\nown:\n  <<: *base\n  rank: 4\n"
        assert parse_yaml(text, "r.yaml", ConfigError)["own"] == {"rank": 4, "alpha": 16}

    @pytest.mark.parametrize(
        "text",
        [
            *('a: !!int ""', 'a: !!float ""', "a: !!bool foo", "a: !!timestamp foo", "a: !!binary x", "a: !!set {x}"),
            *('a: !!int "0x"', 'a: !!float "1:x"', "!!map [1]", "!!str [1]", "a: !!python/name:os.system"),
            *("{1: 2, foo: 3}", "yes: 1", "null: 1", "? [1, 2]\n: 3", "? {a: b}\n: 3", "a: 1\na: 2"),
            *("<<: 3", "<<: [1]", "a: &x [*x]", "<<: &a {<<: *a}", "a: *nothing", "a: *" + "x" * 10**5),
            *("a: " + "[" * 3000, "a: " + "[" * 70 + "]" * 70, "a: .nan", "a: .inf", "a: " + "1" * 400),
            *("a: " + "1" * 5000, 'a: "\\ud800"', "a: \0", "a: b: c", "--- 1\n--- 2", "%YAML 9.9\n--- a", "a: [", "\t"),
        ],
    )
    def test_what_pyyaml_stumbles_over_is_one_line(self, text):
        assert refusal(parse_yaml, text, "r.yaml").startswith("r.yaml")

    def test_aliases_that_stand_for_a_billion_values_are_refused_at_once(self):
        rows = [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 12)]
        text = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(rows)
        tracemalloc.start()
        assert "more than 50,000 values" in refusal(parse_yaml, text, "r.yaml")
        merged = "b0: &b0 {x: 1}\n" + "\n".join(
            f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}'] * 9)}]}}" for n in range(1, 12)
        )
        assert "more than 50,000 values" in refusal(parse_yaml, merged, "r.yaml")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6

    def test_a_file_must_be_a_mapping_of_limited_size(self, tmp_path):
        (tmp_path / "r.yaml").write_text("- 1")
        assert "must contain a mapping" in refusal(read_yaml_object, tmp_path / "r.yaml")
        (tmp_path / "r.yaml").write_text("a: " + "x" * (1 << 18))
        assert "larger than" in refusal(read_yaml_object, tmp_path / "r.yaml")
        os.mkfifo(tmp_path / "f.yaml")
        assert "a FIFO, not a regular file" in refusal(read_yaml_object, tmp_path / "f.yaml")
