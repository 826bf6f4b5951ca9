"""The one reader of YAML: recipes, CoreNet's configurations, and values on the command line.

    values = read_yaml_object(path, ConfigError)

`values` is a dict with readers for typed fields; see `Fields`. Only tables, lists, text, numbers, true, false and null
are read: no dates, no tags for other types. Size, depth, aliases and numbers are limited, and every error is one line.
PyYAML is imported on first use.
"""

from functools import cache
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, one_line, quoted
from .fields import DEEPEST, Fields, check_values
from .paths import read_text

_LARGEST_BYTES = 1 << 18  # PyYAML reads about 100 kB a second
_MOST_VALUES = 50_000  # after aliases are replaced by what they stand for
_PLAIN_TYPES = ("null", "bool", "int", "float", "str", "seq", "map", "merge")


def read_yaml_object(path: Path, error: type[OpenELMError]) -> Fields:
    """The mapping in a YAML file.

    Args:
        error: class of the errors that are raised.
    Raises:
        OpenELMError: as `error`, if the file cannot be read, is too large, or contains something else.
    """
    values = parse_yaml(read_text(path, error, _LARGEST_BYTES), str(path), error)
    if not isinstance(values, dict):
        raise error(f"{path} must contain a mapping of settings")
    return Fields(values, str(path), error)


def parse_yaml(text: str, where: str, error: type[OpenELMError]) -> Any:
    """The value in a YAML text; `where` is what messages begin with."""
    import yaml

    try:
        loader = _loader_class()(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, 0, {})
        values = loader.construct_document(node)
    except RecursionError as reason:
        raise error(f"{where} is nested too deeply") from reason
    except yaml.MarkedYAMLError as reason:
        line = f" (line {reason.problem_mark.line + 1})" if reason.problem_mark else ""
        problem = str(reason.problem or reason.context).replace("could not determine a constructor for", "unsupported")
        raise error(f"{where} is not valid YAML: {problem[:200]}{line}") from reason
    except yaml.YAMLError as reason:  # characters that YAML does not allow
        raise error(f"{where} is not valid YAML: {one_line(reason)}") from reason
    return check_values(values, where, error)


def _count(node: Any, depth: int, counted: dict[int, int]) -> int:
    """The number of values that a node stands for, with aliases replaced; limited like the depth."""
    import yaml

    known = counted.get(id(node))
    if known is not None:
        if known == 0:
            raise yaml.constructor.ConstructorError(None, None, "an alias within its own value", node.start_mark)
        return known
    counted[id(node)] = 0  # until its own values have been counted
    total = 1
    if isinstance(node, yaml.CollectionNode):
        if depth == DEEPEST:
            problem = f"more than {DEEPEST} levels of nesting"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        for entry in node.value:
            for part in entry if isinstance(entry, tuple) else (entry,):
                total += _count(part, depth + 1, counted)
                if total > _MOST_VALUES:
                    problem = f"more than {_MOST_VALUES:,} values, with aliases replaced"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    counted[id(node)] = total
    return total


@cache
def _loader_class() -> Any:
    """PyYAML's safe loader for plain types, whose constructors raise nothing but YAML errors."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain types only, and refuses a name that occurs twice."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=True)
            except (yaml.YAMLError, RecursionError):
                raise
            except Exception as error:  # PyYAML's constructors raise errors of many kinds
                shown = quoted(node.value) if isinstance(node.value, str) else "a list or mapping"
                problem = f"{shown} is not of type {node.tag.rpartition(':')[2][:60]}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                problem = f"{quoted(twice)} occurs twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep=True)

    tags = {f"tag:yaml.org,2002:{name}" for name in _PLAIN_TYPES}
    Loader.yaml_constructors = {
        tag: constructor for tag, constructor in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in tags
    }
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in tags]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return Loader
