"""MUSIC-AVQA: questions about what is seen and heard in a performance."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .config import MediaConfig
from .dataset import MediaDataset, MediaFiles, generator, read_text
from .sample import Frames, Sample

WORDS = 14
PLACES = 60  # of a video, from which frames of other clips are drawn
_FIELDS = ("video_id", "question_id", "question_content", "templ_values", "anser", "type")  # sic, "anser"


class AVQADataset(MediaDataset):
    """A split of MUSIC-AVQA.

    Below the root, or below ``json`` in it, is ``avqa-{split}.json``, and always ``avqa-train.json``, from which words and
    answers are numbered. Clips are ``frames/{id}`` with ``audio_wav/{id}.wav``, or ``{id}.mp4`` in ``videos`` or in
    ``MUSIC-AVQA-videos-*``.

    Each frame has a negative beside it, in tests too: the frame at one of 60 places of another video of the split, drawn
    from all of them.

    Args:
        root, split, config, train, seed, problems: see `MediaDataset`. ``train`` changes nothing.
        negatives: whether frames have them. Answers do not depend on them, and reading them takes as long as all the rest.

    Attributes:
        vocabulary: words of the train questions in the order of their first appearance, behind "<pad>".
        answers: of the train questions, likewise; also called ``classes``.
        questions: int64 ``[items, 14]``, padded on the right.
        labels: int64 ``[items]``.
        videos: of the split, each once.
    """

    task = "avqa"

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        config: MediaConfig,
        *,
        train: bool = False,
        seed: int = 0,
        negatives: bool = True,
        problems: list[tuple[str, str]] | None = None,
    ) -> None:
        super().__init__(root, split, config, train=train, seed=seed, problems=problems)
        self.negatives = negatives
        train_path, path = (self._find(f"avqa-{name}.json", f"json/avqa-{name}.json") for name in ("train", split))
        train_items = list(self._read(train_path))
        self.vocabulary = tuple(dict.fromkeys(["<pad>", *(word for _, words in train_items for word in words)]))
        self.answers = self.classes = tuple(dict.fromkeys(item["anser"] for item, _ in train_items))
        self._items, questions, labels = [], [], []
        word_numbers = {word: number for number, word in enumerate(self.vocabulary)}
        answer_numbers = {answer: number for number, answer in enumerate(self.answers)}
        for item, words in train_items if path == train_path else self._read(path):
            where = f"{path}, question {item['question_id']}"
            unknown = [word for word in words if word not in word_numbers]
            if len(words) > WORDS:
                self._complain(where, f"got {len(words)} words, expected {WORDS} at most: {' '.join(words)!r}")
            elif unknown:
                self._complain(where, f"got the word {unknown[0]!r}, expected one of {train_path}")
            elif item["anser"] not in answer_numbers:
                self._complain(where, f"got the answer {item['anser']!r}, expected one of {train_path}")
            else:
                questions.append([word_numbers[word] for word in words] + [0] * (WORDS - len(words)))
                labels.append(answer_numbers[item["anser"]])
                self._items.append((item["video_id"], str(item["question_id"]), str(item["type"])))
        self.ids = [video for video, _, _ in self._items]
        if not self.ids:
            raise ValueError(f"{path}: got no question, expected one or more")
        self.videos = tuple(dict.fromkeys(self.ids))
        if negatives and len(self.videos) == 1:
            raise ValueError(f"{path}: got questions about one video, {self.videos[0]}, expected more: negatives are others")
        self._video_numbers = {video: number for number, video in enumerate(self.videos)}
        self.places = (config.video.frames, PLACES) if negatives else (config.video.frames,)
        self.questions, self.labels = torch.tensor(questions), torch.tensor(labels)
        bases = sorted(self.root.glob("MUSIC-AVQA-videos-*"))
        self._media = MediaFiles([self.root / "frames"], [self.root / "audio_wav"], [self.root / "videos", *bases])

    @property
    def names(self) -> list[str]:
        return [question for _, question, _ in self._items]

    def sample(self, index: int, epoch: int = 0) -> Sample:
        """An item: "question" is int64 ``[14]``, "label" int64 ``[]``; "question_id" and "type" are in ``meta``."""
        clip, question, kind = self._items[index]
        count, own = self.config.video.frames, self._video_numbers[clip]
        numbers = torch.empty(0, dtype=torch.long)
        if self.negatives:
            # Numbers of places of all other videos, with a gap where those of the own video are.
            draws = generator(self.seed, epoch, index)
            numbers = torch.randint(PLACES * (len(self.videos) - 1), (count,), generator=draws)
            numbers += PLACES * (numbers >= PLACES * own)
        return Sample(
            clip,
            Frames(self._media.frames(clip), tuple(range(count)), count),
            self._media.audio(clip),
            {"question": self.questions[index], "label": self.labels[index]},
            {"question_id": question, "type": kind},
            negatives=tuple(
                Frames(self._media.frames(self.videos[number // PLACES]), (number % PLACES,), PLACES)
                for number in numbers.tolist()
            ),
        )

    def files(self, index: int) -> list[tuple[str, Path | tuple[Path, ...]]]:
        clip = self.ids[index]
        return [("video", self._media.video(clip)), ("audio", self._media.audio(clip))]

    def _read(self, path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Questions of a file, each with its words."""
        try:
            items = json.loads(read_text(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: got no JSON ({error}), expected a list of questions") from error
        if not isinstance(items, list):
            raise ValueError(f"{path}: got JSON of the type {type(items).__name__}, expected a list of questions")
        for number, item in enumerate(items):
            missing = [name for name in _FIELDS if name not in item] if isinstance(item, dict) else _FIELDS
            if missing:
                question = item.get("question_id") if isinstance(item, dict) else None
                self._complain(f"{path}, entry {number} (question {question})", f"expected {', '.join(missing)}, got none")
                continue
            try:
                yield item, _words(item)
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                self._complain(f"{path}, question {item['question_id']}", str(error))


def _words(item: dict[str, Any]) -> list[str]:
    """Words of a question: the last without its question mark, templates replaced by their values."""
    content, given = item["question_content"], item["templ_values"]
    for name in ("video_id", "question_content", "templ_values", "anser"):
        if not isinstance(item[name], str):
            raise ValueError(f"got {name} {item[name]!r}, expected a string")
    values = ast.literal_eval(given)
    words = content.rstrip().split(" ")
    words[-1] = words[-1][:-1]
    templates = [place for place, word in enumerate(words) if "<" in word]
    if not isinstance(values, list) or len(templates) > len(values) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"got templ_values {given!r} for {content!r}, expected a list of {len(templates)} words")
    for place, value in zip(templates, values, strict=False):
        words[place] = value
    return words
