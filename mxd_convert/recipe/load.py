"""Reading of recipes: YAML with the numbers of YAML 1.2, `--set` overrides, paths and environment variables.

Every error is an InputError of one line that names the key, the value and the fix.
"""

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import ValidationError

from mxd_convert.errors import InputError, first_line
from mxd_convert.files import kind_of
from mxd_convert.recipe.presets import is_warm
from mxd_convert.recipe.schema import GGUF, MASKED, PRESET_KEYS, RENAMED, Recipe
from mxd_convert.recipe.section import Section


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the numbers and booleans of YAML 1.2, where PyYAML reads 2e-3 as a string and `no` as false."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a recipe can't contain aliases (*name). Write the value out.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain string", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf)|\.(?:nan|NaN))$"
    ),
    list("-+0123456789."),
)


def shipped_folder() -> Path:
    """Return the folder of the shipped recipes: in the installed package, or at the top of a git checkout."""
    package = Path(__file__).parent.parent
    packaged = package / "shipped" / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe and apply overrides.

    Paths in a recipe file are relative to that file. Paths in mappings and overrides are relative to the working directory.

    Args:
        recipe: path of a recipe file, name of a shipped recipe, nested mapping, or Recipe.
        overrides: values by full key, as in {"train.lr": 1e-3}.

    Returns:
        The recipe, with absolute paths and ${VAR} expanded.

    Raises:
        InputError: if the recipe can't be read or is invalid. The message names the key, the value and the fix.
    """
    content: dict[str, Any]
    references: dict[str, str] = {}
    if isinstance(recipe, Recipe):
        references |= recipe.references
        content, folder, name = recipe.model_dump(), Path.cwd(), "recipe"
    elif isinstance(recipe, Mapping):
        content, folder, name = json.loads(json.dumps(recipe)), Path.cwd(), "recipe"
    else:
        path, by_name = _find(recipe)
        name, folder = path.name, path.resolve().parent
        content = read_recipe_yaml(path)
        if by_name:  # the recipe's own folder is in the installed package, where no results should go
            output = content.setdefault("output", {})
            if isinstance(output, dict):
                output["dir"] = str(Path.cwd() / "runs" / path.stem)
    if not (isinstance(recipe, Recipe) and recipe.is_resolved):  # expanded strings may contain a literal ${...}
        references |= _expand(content, name)
        _resolve_paths(content, folder)
    given = dict(overrides or {})
    changes: dict[str, Any] = {}
    for key, value in given.items():
        _set(changes, key, value)
    references = {key: text for key, text in references.items() if not _is_set(changes, key)} | _expand(changes, "--set")
    _resolve_paths(changes, Path.cwd())
    # A preset in the overrides takes precedence over the keys that the file sets for its own preset.
    if "train.preset" in given:
        for section, keys in PRESET_KEYS.items():
            for key in keys:
                if isinstance(content.get(section), dict):
                    content[section].pop(key, None)
    _drop_replaced_texts(content, changes)
    content = _merge(content, changes)
    try:
        loaded = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{name}: {_explain(error)}") from None
    loaded.mark_resolved(references)
    return loaded


def parse_overrides(settings: list[str], option: str = "--set") -> dict[str, Any]:
    """Parse KEY=VALUE settings into overrides: `["train.lr=1e-3"]` gives `{"train.lr": 0.001}`.

    Values are read as YAML. Raises InputError that names the option.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not all(key.strip().split(".")):
            raise InputError(f"{option} {_short(setting)}: not of the form KEY=VALUE. Write it as in {option} train.lr=1e-3.")
        try:
            overrides[key.strip()] = parse_yaml(value)
        except yaml.YAMLError:
            raise InputError(
                f"{option} {_short(setting)}: the value is not valid YAML. Put text with special characters in quotes."
            ) from None
        except RecursionError:
            raise InputError(
                f"{option} {_short(setting)}: the value is nested too deeply. Give a plain value or a list."
            ) from None
        except ValueError as error:  # Python's limit on the digits of an integer
            raise InputError(f"{option} {_short(setting)}: the value can't be read ({first_line(error, 80)})") from None
    return overrides


def parse_list(setting: str) -> tuple[str, list[Any]]:
    """Parse one setting with several values: `"layer.k=8,16"` gives ("layer.k", [8, 16]). A list in brackets is one value."""
    key, _, value = setting.partition("=")
    [(key, values)] = parse_overrides([f"{key}=[{value}]"]).items()
    if not values:
        raise InputError(f"--set {_short(setting)}: no value. Give at least one value, as in --set layer.k=8,16.")
    return key, values


def _find(recipe: str | Path) -> tuple[Path, bool]:
    text = str(recipe)
    if "/" not in text and os.sep not in text and not text.endswith((".yaml", ".yml")):
        path = shipped_folder() / f"{text}.yaml"
        if path.is_file():
            return path, True
        known = shipped_recipes()
        raise InputError(f"{text}: no shipped recipe has this name. Choose one of {', '.join(known)}{_suggest(text, known)}.")
    path = Path(text).expanduser()
    if not path.is_file():
        folder = " (it is a folder)" if path.is_dir() else ""
        raise InputError(f"{path}: no such recipe file{folder}. `mxd-convert init BASE_MODEL` writes one.")
    return path, False


def read_recipe_yaml(path: Path) -> dict[str, Any]:
    """Read an untrusted YAML file of sections. Raises InputError, which names the file and the line."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: {_explain_yaml(error)}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: holds {kind_of(content)}; expected a mapping of sections (base, data, layers, layer, train, output)"
        )
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML with YAML 1.2's numbers and booleans, without aliases. Raises yaml.YAMLError, RecursionError or ValueError."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)


def _explain_yaml(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply to be a recipe"
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}{getattr(error, 'problem', None) or 'not valid YAML'}"


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand(content: Any, name: str, prefix: str = "") -> dict[str, str]:
    """Expand ${VAR} and ${VAR:-default} in every string, in place. Return the originals by key ("data.train.path")."""
    found: dict[str, str] = {}

    def replaced(match: re.Match[str]) -> str:
        value = os.environ.get(match[1]) or match[2]
        if value is None:
            raise InputError(
                f"{name}: the environment variable {match[1]} is not set. Set it, or write ${{{match[1]}:-default}}."
            )
        return value

    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        if isinstance(value, str):
            content[key] = _VARIABLE.sub(replaced, value)
            if "\0" in content[key]:
                raise InputError(f"{name}: {prefix}{key}: contains a null character. Remove it.")
            if content[key] != value:
                found[f"{prefix}{key}"] = value
        elif isinstance(value, (dict, list)):
            found |= _expand(value, name, f"{prefix}{key}.")
    return found


def _is_set(content: dict[str, Any], key: str) -> bool:
    """Return whether `content` sets a dotted key, either itself or by a value that replaces one of its sections."""
    node: Any = content
    for part in key.split("."):
        if not isinstance(node, dict):
            return True
        if part not in node:
            return False
        node = node[part]
    return True


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make local paths absolute, in place. A name like a Hub id only counts as a path if a file or folder has that name."""

    def resolve(section: Any, key: str, always: bool = False) -> None:
        if not isinstance(section, dict) or not isinstance(section.get(key), str) or not section[key]:
            return
        path = Path(section[key]).expanduser()
        file_like = path.suffix in (".txt", ".jsonl", ".parquet", ".gz") or "*" in section[key]
        file_like |= path.suffix == GGUF and section[key].count("/") != 2  # owner/name/model.gguf is on the Hub
        if always or file_like or section[key].startswith((".", "~", "/")) or (folder / path).exists():
            section[key] = os.path.normpath(folder / path)
        elif path.exists():  # the Hub's clients would read this path in the working directory instead of the Hub
            raise InputError(
                f"{section[key]}: names something on the Hub, and {path.absolute()} in the working directory too."
                " Give the absolute path of the latter, or run from another directory."
            )

    data = content.get("data")
    resolve(content.get("base"), "model")
    resolve(content.get("output"), "dir", always=True)
    train = content.get("train")
    if isinstance(train, dict) and isinstance(train.get("init"), str) and is_warm(train["init"]):
        resolve(train, "init", always=True)
    if isinstance(data, dict):
        for split in ("train", "eval"):
            if isinstance(data.get(split), list):  # the short form of several sources
                data[split] = {"sources": data[split]}
            text = data.get(split)
            resolve(text, "path")
            sources = text.get("sources") if isinstance(text, dict) else None
            for source in sources if isinstance(sources, list) else ():
                resolve(source, "path")


def _drop_replaced_texts(content: dict[str, Any], changes: dict[str, Any]) -> None:
    """Remove the sources of a text for which the overrides give a path, and the path of one for which they give sources."""
    for split in ("train", "eval"):
        below, above = (
            part.get("data", {}).get(split) if isinstance(part.get("data", {}), dict) else None for part in (content, changes)
        )
        if isinstance(below, dict) and isinstance(above, dict):
            for given, replaced in (("path", "sources"), ("sources", "path")):
                if given in above:
                    below.pop(replaced, None)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InputError(f"--set {_short(key)}: {_short(section)} is not a section")
    content[last] = value


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


# --- error messages ------------------------------------------------------------------------------------------------------------


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _section_at(location: tuple[Any, ...]) -> type[Section] | None:
    section: Any = Recipe
    for part in location:
        if isinstance(part, int):  # an item of a list of sections
            continue
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, Section) else None
        kinds = (
            [] if field is None else [kind for kind in get_args(field.annotation) or [field.annotation] if kind is not type(None)]
        )
        kinds = [item for kind in kinds for item in (get_args(kind) or (kind,))]
        section = kinds[0] if len(kinds) == 1 else None  # a section, possibly optional or in a list
    return section if isinstance(section, type) and issubclass(section, Section) else None


def _everywhere(key: str) -> str:
    """Return a hint to the section that has `key`, for a key in the wrong section or one level too high."""
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section) and key in field.annotation.model_fields:
            return f" (it belongs under {name}:)"
    return ""


def _explain(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem = problems[0]
    # For a union, pydantic appends the name of the member type to the location. Only the key concerns the user.
    location = tuple(part for part in problem["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_0-9]+", str(part)))
    if problem["type"] == "extra_forbidden":  # the unknown key may contain any characters
        return _unknown_key(tuple(problem["loc"]), problems)
    while location and _section_at(location[:-1]) is None and not isinstance(location[-1], int) and len(location) > 1:
        location = location[:-1]
    key = ".".join(map(str, location))
    value = problem["input"]
    if problem["type"] == "missing":
        message = f"{key}: missing, and it has no default. Set it."
    elif problem["type"] == "value_error":
        message = str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
        message = f"{key}.{message}" if location[:1] == ("data",) else message
    elif problem["type"].startswith("literal_error"):
        choices = [part.strip().strip("'") for part in re.split(r", | or ", problem["ctx"]["expected"])]
        message = f"{key}: {value!r} is not one of {', '.join(choices)}{_suggest(str(value), choices)}"
    else:
        hint = (
            f" (write {int(value):_})"
            if isinstance(value, float) and value.is_integer() and problem["type"] == "int_type"
            else ""
        )
        message = f"{key}: {_short(value)} is not valid{hint}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
    return message + _and_more(location, problems)


def _unknown_key(location: tuple[Any, ...], problems: list[Any]) -> str:
    if (new := RENAMED.get(".".join(map(str, location)))) is not None:
        return f"{'.'.join(map(str, location))}: this key is now {new}. Rename it ({new}: {_accepted(new)})."
    section = _section_at(location[:-1])
    known = list(section.model_fields) if section else []
    lower = str(location[-1]).lower().replace("-", "_")
    hint = f" (did you mean {lower!r}?)" if lower in known else _suggest(lower, known) or _everywhere(lower)
    key = ".".join([*map(str, location[:-1]), _short(str(location[-1]))[1:-1]])
    hint = hint or f". Accepted keys: {', '.join(known)}"
    return f"{key}: unknown key{hint}" + _and_more(location, problems)


def _accepted(key: str) -> str:
    """Describe the accepted values of a renamed key of `train`."""
    return {"train.mask": ", ".join(MASKED), "train.init": "tokens or paper", "train.k_init": "a number of experts"}.get(
        key, "a share of the steps, from 0 to below 1"
    )


def _and_more(location: tuple[Any, ...], problems: list[Any]) -> str:
    same_key = {tuple(other["loc"][: len(location)]) for other in problems}
    return f" ({len(same_key) - 1} more {'errors' if len(same_key) > 2 else 'error'})" if len(same_key) > 1 else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
