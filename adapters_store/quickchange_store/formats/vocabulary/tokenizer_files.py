"""The tokenizer and the chat template that lie in an adapter's folder, beside its weights.

They are compared with the base's: added tokens, marks, ends and a template are kept with the
adapter. A tokenizer that cuts or names text in another way is refused. Only JSON and text are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quickchange_store.canonical.canonical_adapter import BaseTokenizer
from quickchange_store.canonical.tokenizer_part import MARKS, AddedToken, TokenizerChanges
from quickchange_store.errors import BaseMismatchError, InvalidAdapterError
from quickchange_store.formats.config_file import read_config
from quickchange_store.json_files import UnreadableFileError, read_file, read_object

TOKENIZER_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_GENERATION = "generation_config.json"
_TEMPLATE = "chat_template.jinja"
_MOST_BYTES = 1 << 28  # of a tokenizer.json: Gemma's has 33 MB
_MOST_TEMPLATE = 1 << 20
_REMEDY = (
    "save the tokenizer that the adapter was trained with, made from this base's by adding tokens "
    "(tokenizer.save_pretrained), or take the tokenizer's files out of the folder"
)
# Texts that tokenizers cut in their own ways: spaces, digits, lines, marks, scripts, code.
_PROBES = (
    "Hello world, it's 12345 o'clock.  Two spaces",
    " leading space\ttab\n\n\nlines\r\n  indented",
    "naïve façade Ünïcödé ﬁ ½ İstanbul",
    "中文字符与日本語のテキスト 한국어 العربية हिन्दी",
    "def f(x):\n    return {'a': [x**2, 0x1F, 3.14e-5]}  # 🙂👍🏽",
    "HTTPServer camelCase snake_case don't DON'T 1,000,000",
)


def folder_tokenizer(
    directory: Path, base: BaseTokenizer | None, rows: int, own_rows: int
) -> TokenizerChanges | None:
    """What the tokenizer in `directory` changes of the base's; None: nothing, or there is none.

    rows: token ids of the adapter's model; own_rows: of the base's. Raises StoreError.
    """
    if base is None or base.backend is None:
        if rows != own_rows:
            raise _unnamed(
                rows, own_rows, "the base has no tokenizer that tokens could be added to"
            )
        return None
    config = _config(directory)
    tokens, ids = _tokens(directory, base, rows, _mark(config.get("pad_token")))
    if rows != own_rows and not (directory / TOKENIZER_FILE).is_file():
        raise _unnamed(rows, own_rows, f"the folder has no {TOKENIZER_FILE}")
    if rows > own_rows and not any(token.id >= own_rows for token in tokens):
        raise _unnamed(rows, own_rows, f"its {TOKENIZER_FILE} names none that the base's lacks")
    marks = {name: mark for name in MARKS if (mark := _mark(config.get(name))) is not None}
    marks = {name: mark for name, mark in marks.items() if mark != base.mark(name) and mark in ids}
    ends = {ids[mark] for name, mark in marks.items() if name == "eos_token"}
    ends |= _generation_ends(directory)
    ends = {end for end in ends - base.ends if end < rows}
    template = _template(directory, config)
    if template == _text_of(base.template):
        template = None
    if not (tokens or marks or ends or template) and rows == own_rows:
        return None
    return TokenizerChanges(rows, tokens, marks, tuple(sorted(ends)), template)


def _unnamed(rows: int, own_rows: int, why: str) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"the adapter's model has {rows} tokens, the base {own_rows}, and {why}",
        file=TOKENIZER_FILE,
        remedy="save the tokenizer into the adapter's folder: tokenizer.save_pretrained(FOLDER)",
    )


def _config(directory: Path) -> Mapping[str, Any]:
    return read_config(directory, _CONFIG) if (directory / _CONFIG).is_file() else {}


def _tokens(
    directory: Path, base: BaseTokenizer, rows: int, padding: str | None
) -> tuple[tuple[AddedToken, ...], Mapping[str, int]]:
    """Added tokens that the base's tokenizer lacks, and every added token's id.

    padding: a token that fills batches in training, of which no text has any.
    """
    path = directory / TOKENIZER_FILE
    known = {
        id_: _added(id_, vars_of)
        for id_, vars_of in base.backend.get_added_tokens_decoder().items()
    }
    if not path.is_file():
        return (), {token.content: token.id for token in known.values()}
    tree = _tree(path)
    _check_alike(tree, base)
    found = [_read_token(entry) for entry in tree.get("added_tokens") or ()]
    new = sorted(
        (token for token in found if known.get(token.id) != token), key=lambda token: token.id
    )
    vocabulary = base.backend.get_vocab(with_added_tokens=True)
    for token in new:
        there = vocabulary.get(token.content)
        if there is not None and there != token.id:
            raise _differs(f"{token.content!r} is token {token.id}, the base's is {there}")
    served = tuple(token for token in new if token.id < rows and token.content != padding)
    if left := [t.content for t in new if t.id >= rows and t.content != padding]:
        raise InvalidAdapterError(
            f"the folder's tokenizer adds {', '.join(map(repr, left[:5]))}, and the adapter has "
            f"{rows} tokens, without rows for them",
            file=TOKENIZER_FILE,
            key="added_tokens",
            remedy="save it with save_pretrained(FOLDER, save_embedding_layers=True), or with the "
            "base's own tokenizer if these tokens were not trained",
        )
    return served, {token.content: token.id for token in (*known.values(), *served)}


def _tree(path: Path) -> dict[str, Any]:
    """A tokenizer.json, in whose form the rest may trust."""
    try:
        tree = read_object(read_file(path, _MOST_BYTES))
    except UnreadableFileError as error:
        raise _broken(error.problem, error.key) from error
    added, model = tree.get("added_tokens"), tree.get("model")
    if added is not None and not _all(added, dict):
        raise _broken("it is no list of tokens", "added_tokens")
    if not isinstance(model, dict):
        raise _broken("it is no object", "model")
    pieces: Any = model.get("vocab")
    merges = model.get("merges")
    if not isinstance(pieces, dict) and not (_all(pieces, list) and all(map(_is_piece, pieces))):
        raise _broken("it is no vocabulary", "model.vocab")
    if merges is not None and not _all(merges, str) and not _all(merges, list):
        raise _broken("it is no list of merges", "model.merges")
    return tree


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _is_piece(entry: list[Any]) -> bool:
    """True for a piece of a Unigram model and its score."""
    return len(entry) == 2 and isinstance(entry[0], str)


def _broken(problem: str, key: str | None) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"not a tokenizer ({problem})", file=TOKENIZER_FILE, key=key, remedy=_REMEDY
    )


def _read_token(entry: Mapping[str, Any]) -> AddedToken:
    fields = ("special", "lstrip", "rstrip", "single_word", "normalized")
    flags = {name: entry.get(name, False) for name in fields}
    return AddedToken(entry.get("id", -1), entry.get("content", ""), **flags)


def _added(id_: int, token: Any) -> AddedToken:
    return AddedToken(
        id_,
        token.content,
        token.special,
        token.lstrip,
        token.rstrip,
        token.single_word,
        token.normalized,
    )


def _check_alike(tree: Mapping[str, Any], base: BaseTokenizer) -> None:
    """Raise BaseMismatchError unless both tokenizers cut a text without added tokens alike."""
    own = json.loads(base.backend.to_str())
    added = _contents(own) | _contents(tree)
    ours, theirs = _pieces(own, added), _pieces(tree, added)
    if ours.keys() != theirs.keys():
        strange = min(ours.keys() ^ theirs.keys())
        raise _differs(f"one of the two lacks {strange!r}, or {len(theirs)} pieces are {len(ours)}")
    moved = [piece for piece, value in ours.items() if theirs[piece] != value]
    if moved:
        raise _differs(f"{moved[0]!r} is {theirs[moved[0]]}, the base's is {ours[moved[0]]}")
    if _merges(own) != _merges(tree):
        raise _differs("its merges are others")
    if any(own.get(part) != tree.get(part) for part in ("normalizer", "pre_tokenizer")):
        _check_probes(tree, base)


def _check_probes(tree: Mapping[str, Any], base: BaseTokenizer) -> None:
    """Raise BaseMismatchError where probing texts have other tokens. Rules may be written in more
    than one way: libraries of other versions do."""
    from tokenizers import Tokenizer

    with _panics_refused():
        other = Tokenizer.from_str(json.dumps({**tree, "added_tokens": [], "post_processor": None}))
        for text in _PROBES:
            ours = base.backend.encode(text, add_special_tokens=False).ids
            if other.encode(text, add_special_tokens=False).ids != ours:
                raise _differs(f"it has other tokens for {text!r}")


@contextmanager
def _panics_refused() -> Iterator[None]:
    """Raise the library's errors, and its panics, which are no Exception, as the file's fault."""
    try:
        yield
    except BaseMismatchError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InvalidAdapterError(
            f"not a tokenizer ({error})", file=TOKENIZER_FILE, remedy=_REMEDY
        ) from error


def _contents(tree: Mapping[str, Any]) -> set[str]:
    contents = (entry.get("content") for entry in tree.get("added_tokens") or ())
    return {content for content in contents if isinstance(content, str)}


def _pieces(tree: Mapping[str, Any], added: set[str]) -> dict[str, Any]:
    """Pieces of a tokenizer's model with their numbers, without added tokens."""
    pieces = tree["model"]["vocab"]
    found = pieces if isinstance(pieces, dict) else {p: (at, x) for at, (p, x) in enumerate(pieces)}
    return {piece: value for piece, value in found.items() if piece not in added}


def _merges(tree: Mapping[str, Any]) -> list[list[Any]]:
    """Merges in order: written as pairs, or with a space between by older versions."""
    merges = tree["model"].get("merges") or []
    return [each.split(" ") if isinstance(each, str) else each for each in merges]


def _mark(value: Any) -> str | None:
    """A marking token as tokenizer_config.json has it: its text, or an object with it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _generation_ends(directory: Path) -> set[int]:
    if not (directory / _GENERATION).is_file():
        return set()
    ids = read_config(directory, _GENERATION).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    return {each for each in listed if type(each) is int and each >= 0}


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The folder's chat template: in a file of its own, or in the configuration."""
    path = directory / _TEMPLATE
    if path.is_file():
        try:
            return read_file(path, _MOST_TEMPLATE).decode() or None
        except (UnreadableFileError, UnicodeDecodeError) as error:
            raise InvalidAdapterError(
                f"not a chat template ({error})", file=_TEMPLATE, remedy=_REMEDY
            ) from error
    return _text_of(config.get("chat_template"))


def _text_of(template: Any) -> str | None:
    """A template's text: of several, the default one's."""
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict))
        template = {str(entry.get("name")): entry.get("template") for entry in named}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def _differs(how: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"the folder's tokenizer is another than the base's, by more than added tokens: {how}",
        file=TOKENIZER_FILE,
        remedy=_REMEDY,
    )
