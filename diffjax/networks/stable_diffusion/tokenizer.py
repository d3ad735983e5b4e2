"""CLIP's tokenizer, from the files of a model folder."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["read_tokenizer"]

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class _Tokenizer:
    """What `read_tokenizer` returns."""

    def __init__(self, words: Any, padding: str, length: int):
        self._words, self.length = words, length
        names = {"start": _START, "end": _END, "padding": padding}
        ids = {name: words.token_to_id(token) for name, token in names.items()}
        if missing := [names[name] for name, i in ids.items() if i is None]:
            raise ValueError(f"tokenizer: expected a vocabulary with {', '.join(missing)}")
        self._start, self._end, self._padding = ids["start"], ids["end"], ids["padding"]

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """The tokens of one text, or of several."""
        if not isinstance(texts, str):
            rows = [self(text) for text in texts]
            return np.array(rows, np.int32).reshape(-1, self.length)
        words = self._words.encode(texts, add_special_tokens=False).ids
        if len(words) > self.length - 2:
            kept = self._words.decode(words[: self.length - 2]).replace("</w>", " ").strip()
            raise ValueError(
                f"texts: expected at most {self.length - 2} tokens, got {len(words)}; the text up "
                f"to {kept[-30:]!r} would fit"
            )
        row = [self._start, *words, self._end]
        return np.array(row + [self._padding] * (self.length - len(row)), np.int32)


def read_tokenizer(folder: str | pathlib.Path) -> Callable[[str | Sequence[str]], np.ndarray]:
    r"""Reads the tokenizer of a model folder; needs the package `tokenizers`.

    Args:
        folder: the model's folder, or its `tokenizer` subfolder, with `tokenizer.json`, or with
            `vocab.json` and `merges.txt`.

    Returns:
        `tokenize(texts)`, for one text or a sequence of n: int32 tokens, (77,) or (n, 77). A text
        becomes its start, its words and its end, and is padded. A text of more than 75 tokens is a
        ValueError; nothing is cut.

    Raises:
        ImportError: if `tokenizers` is missing; `pip install 'diffjax[stable-diffusion]'`.
        FileNotFoundError: if the folder has neither.
        ValueError: if a file is malformed.

    Reference: Radford et al. 2021 (CLIP, arXiv 2103.00020), section 2.4.

    >>> import json, pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> words = ["a", "c", "t", "a</w>", "t</w>", "ca", "cat</w>"]
    >>> words += ["<|startoftext|>", "<|endoftext|>"]
    >>> vocabulary = {word: i for i, word in enumerate(words)}
    >>> _ = (folder / "vocab.json").write_text(json.dumps(vocabulary))
    >>> _ = (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>")
    >>> read_tokenizer(folder)("A cat")[:5]
    array([7, 3, 6, 8, 8], dtype=int32)
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "read_tokenizer needs tokenizers: pip install 'diffjax[stable-diffusion]'"
        ) from error
    folder = pathlib.Path(folder)
    folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    whole, vocabulary, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    settings = folder / "tokenizer_config.json"
    options = json.loads(settings.read_text()) if settings.is_file() else {}
    special = folder / "special_tokens_map.json"  # 2.x pads with "!", and says it here
    named = json.loads(special.read_text()) if special.is_file() else {}
    padding = named.get("pad_token") or options.get("pad_token") or _END
    padding = padding["content"] if isinstance(padding, dict) else padding
    try:
        if whole.is_file():
            words = tokenizers.Tokenizer.from_file(str(whole))
            words.no_truncation()
            words.no_padding()
        elif vocabulary.is_file() and merges.is_file():
            words = _from_merges(tokenizers, vocabulary, merges, padding)
        else:
            raise FileNotFoundError(
                f"folder: expected tokenizer.json, or vocab.json and merges.txt, in {folder}"
            )
    except OSError:
        raise
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"folder: the tokenizer in {folder} cannot be read: {error}") from error
    return _Tokenizer(words, padding, min(options.get("model_max_length", 77), 77))


def _from_merges(tokenizers, vocabulary: pathlib.Path, merges: pathlib.Path, padding: str):
    model = tokenizers.models.BPE.from_file(
        str(vocabulary), str(merges), unk_token=_END, end_of_word_suffix="</w>"
    )
    words = tokenizers.Tokenizer(model)
    normal, split = tokenizers.normalizers, tokenizers.pre_tokenizers
    words.normalizer = normal.Sequence(
        [normal.NFC(), normal.Replace(tokenizers.Regex(r"\s+"), " "), normal.Lowercase()]
    )
    words.pre_tokenizer = split.Sequence(
        [
            split.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words.decoder = tokenizers.decoders.ByteLevel()
    words.add_special_tokens([_START, _END, padding])
    return words
