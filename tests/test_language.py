"""The language of the code, checked in the sources of aptvit without importing them.

Names are the field's nouns: no pronouns and no participles without their noun. An image is an image. What is public
says what it takes, returns and raises.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "aptvit"

RIDDLES = frozenset(
    (
        # Pronouns and determiners: a name says of what.
        *("one", "ones", "its", "their", "theirs", "mine", "ours", "yours", "own", "both", "some", "others", "rest"),
        *("who", "whom", "whose", "what", "which", "each", "every", "everything", "something", "nothing"),
        # Participles without a noun.
        *(
            "said",
            "told",
            "asked",
            "known",
            "given",
            "found",
            "wanted",
            "wished",
            "taught",
            "seen",
            "shown",
            "answered",
        ),
        *("foreseen", "gone", "listed", "attended_to"),
        # Adverbs and questions.
        *("here", "there", "again", "still", "aside", "alike", "together", "alone", "around", "everywhere", "besides"),
        *("beside", "how", "why", "when", "where", "way", "ways"),
        # Words of people for options, targets, handlers and results.
        *("wish", "wishes", "Wish", "Known", "Beside", "Answerer", "Chooser", "Taught", "Told", "Wanted", "Found"),
        *("Seen", "Shown", "Again", "Look", "Attended"),
    )
)

WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
PICTURES = {"picture", "pictures"}
PHOTOS = {"photo", "photos"}

# Files about photographs as such: those that scikit-image and scikit-learn install, a public function with the name,
# and the page that people show their own to.
PHOTOGRAPHS = frozenset(("files/sample_photos.py", "datasets/sources.py", "demo/page.py"))

# Fields whose names are keys of JSON, which do not change.
KEYS_OF_JSON = {
    "benchmark/record.py": ("max_photos", "photos"),
    "evaluation/record.py": ("photos",),
    "export/check.py": ("photos",),
}

# What users import, beside `aptvit` itself.
PUBLIC_PACKAGES = ("data", "dense", "merging", "vlm", "training", "bulk", "export")

# Methods whose meaning libraries define.
OF_LIBRARIES = frozenset(("train", "extra_repr"))

Definition = ast.FunctionDef | ast.ClassDef


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = sorted(ROOT.rglob("*.py"))


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of variables, parameters, attributes, functions and classes where they are bound."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of docstrings and comments."""
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def exported(tree: ast.Module) -> set[str]:
    """The names in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def definitions(path: Path, names: set[str]) -> list[Definition]:
    body = parse(path).body
    return [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names]


@cache
def classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for path in FILES for node in parse(path).body if isinstance(node, ast.ClassDef)}


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Public methods, without properties."""
    public = [child for child in node.body if isinstance(child, ast.FunctionDef) and not child.name.startswith("_")]
    properties = ("property", "setter", "overload")
    return [m for m in public if not any(ast.unparse(d).endswith(properties) for d in m.decorator_list)]


def inherited(node: ast.ClassDef, method: str) -> str:
    """The docstring of a method in a base class, or in a protocol that the docstring of the class names."""
    names = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    names += [
        name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", (ast.get_docstring(node) or "").split("Args:")[0])
    ]
    for base in (classes()[name] for name in names if name in classes() and name != node.name):
        for child in base.body:
            if isinstance(child, ast.FunctionDef) and child.name == method and ast.get_docstring(child):
                return ast.get_docstring(child) or ""
        if text := inherited(base, method):
            return text
    return ""


def documented(path: Path, names: set[str]) -> Iterator[tuple[str, Definition, str]]:
    """Place, definition and docstring of functions, classes and the public methods of classes."""
    for node in definitions(path, names):
        yield f"{name_of(path)}:{node.lineno} {node.name}", node, ast.get_docstring(node) or ""
        for method in methods(node) if isinstance(node, ast.ClassDef) else []:
            if method.name in OF_LIBRARIES:
                continue
            text = ast.get_docstring(method) or inherited(node, method.name)
            yield f"{name_of(path)}:{method.lineno} {node.name}.{method.name}", method, text


def public_api() -> dict[Path, set[str]]:
    """The public names of the library, by the file that defines them."""
    api: dict[Path, set[str]] = defaultdict(set)
    for package in ("", *PUBLIC_PACKAGES):
        path = ROOT / package / "__init__.py" if (ROOT / package).is_dir() else ROOT / f"{package}.py"
        names = exported(parse(path))
        api[path] |= names
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aptvit."):
                source = ROOT.parent / Path(*(node.module or "").split(".")).with_suffix(".py")
                api[source] |= names & {alias.name for alias in node.names}
    return {path: names for path, names in api.items() if names}


API = [item for path, names in sorted(public_api().items()) for item in documented(path, names)]


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = node.args
    nodes = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    names = [argument.arg for argument in nodes if argument is not None]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def initializer(node: Definition) -> ast.FunctionDef | None:
    """The function itself, or the initializer of a class, whose arguments the docstring of the class describes."""
    if isinstance(node, ast.FunctionDef):
        return node
    return next((child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"), None)


def raises_value_error(node: ast.FunctionDef) -> bool:
    errors = (child.exc for child in ast.walk(node) if isinstance(child, ast.Raise) and child.exc is not None)
    return any(ast.unparse(error).startswith("ValueError") for error in errors)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_are_nouns(path: Path) -> None:
    assert [f"{line}: {name}" for line, name in bindings(parse(path)) if name.strip("_") in RIDDLES] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_images_are_called_images(path: Path) -> None:
    words = PICTURES if name_of(path) in PHOTOGRAPHS else PICTURES | PHOTOS
    keys = re.compile("|".join(KEYS_OF_JSON.get(name_of(path), ())) or "(?!)")
    texts = [(line, keys.sub("", text)) for line, text in (*bindings(parse(path)), *prose(path))]
    assert [(line, text) for line, text in texts if words & set(map(str.lower, WORD.findall(text)))] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    assert [place for place, _, text in documented(path, exported(parse(path))) if not text] == []


def test_a_class_name_means_one_thing() -> None:
    places = defaultdict(set)
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(path)
    assert {name: sorted(map(name_of, paths)) for name, paths in places.items() if len(paths) > 1} == {}


def test_public_arguments_are_described() -> None:
    described = re.compile(
        r"^\s*(Args|Attributes):|->|\b[Aa]rguments\b|\b[Aa]s (for|in|of|`|transformers)", re.MULTILINE
    )
    missing = []
    for place, node, text in API:
        function = initializer(node)
        if function is not None and parameters(function) and not described.search(text):
            missing.append(place)
    assert missing == []


def test_public_tensors_have_shapes() -> None:
    shape = re.compile(r"\((\.\.\.|\w[\w ./*+'-]*), ?[^()]*(\([^()]*\)[^()]*)*\)|\(\)")
    missing = []
    for place, node, text in API:
        returns = ast.unparse(node.returns) if isinstance(node, ast.FunctionDef) and node.returns is not None else ""
        if re.search(r"\bTensor\b", returns) and not shape.search(text):
            missing.append(place)
    assert missing == []


def test_public_errors_are_described() -> None:
    missing = []
    for place, node, text in API:
        function = initializer(node)
        if function is not None and raises_value_error(function) and not re.search(r"Raises:|[Ee]rrors as", text):
            missing.append(place)
    assert missing == []
