"""Any dataset by name, as a LightningDataModule."""

from __future__ import annotations

import inspect
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import PreTrainedTokenizerBase

from jrl.data.images import CLIP_MEAN, CLIP_STD, Augment, ImageTransform
from jrl.data.nouns import PromptOptions
from jrl.data.readers.parts import read_files
from jrl.data.sample import Sample, SampleSet, SkipReport
from jrl.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from jrl.training.captions import CaptionMix, Captions, with_captions
from jrl.training.files import write_atomically
from jrl.training.loader import EpochLoader, PartLoader
from jrl.training.sources import FileSource, MemorySource, decode_all
from jrl.training.text_cache import KEY, TextCache, key_of, write

PREPROCESSING = "preprocessing.json"
PADDINGS = ("longest", "max_length")


class CaptionDataModule(lightning.LightningDataModule):
    """Pictures with captions: colour emoji, generated scenes, or files in any format that `jrl.data` reads.

    Training takes one random caption of each picture, evaluation all of them. The order of the pictures and
    every augmentation depend on (`seed`, epoch, step, rank) alone.

    Args:
        dataset: "emoji", "scenes", or the name of a format: "coco", "folder", "webdataset", …
        options: arguments of that reader, such as `{path: pictures}`, or by parts (`jrl.data.readers.read`).
        image_size: side of the pictures in pixels.
        batch_size: pairs in a batch of one rank.
        eval_batch_size: pictures in a batch of evaluation.
        train_split: name of the training part.
        val_splits, test_splits: names of the parts to evaluate on.
        val_fraction: share of the training part that becomes "val" when the dataset has no part of
            `val_splits`.
        languages: caption languages in training; all when None.
        eval_languages: caption languages in evaluation; those of training when None.
        caption_mix: how training mixes captions and keywords; one random caption when None.
        prompts: in training, prompts made of the nouns of each drawn caption (`prompt_ids`, `prompt_mask` of the
            batch), for systems that learn from several texts a picture; none when None.
        tokenizer: folder of a saved one; trained on the training captions (and the prompts' templates) when None.
        vocab_size: of the tokenizer to train.
        max_length: tokens after which a caption is cut.
        padding: of the captions, to the "longest" of a batch or always to "max_length", which a system needs whose sentences
            count padding: XMCGAN with `sentence_pooling` "code".
        augment: random changes in training; None for none.
        mean, std: of the normalisation, on the scale 0 to 1.
        text_cache: folder for the embeddings of the training captions by the system's frozen text encoder: written when
            it holds none, and refused when they are another encoder's, tokenizer's or captions'. Batches then hold
            `word_features` and `text_features`, and a system that knows them, XMCGAN, does not run the encoder. None for none.
        in_memory: decode every picture once into memory, or open it when its batch is due.
        workers: processes that prepare batches.
        seed: of order and augmentation.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        dataset: str,
        options: dict[str, Any] | None = None,
        image_size: int = 64,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        train_split: str = "train",
        val_splits: Sequence[str] = ("val",),
        test_splits: Sequence[str] = ("test",),
        val_fraction: float = 0.0,
        languages: Sequence[str] | None = None,
        eval_languages: Sequence[str] | None = None,
        caption_mix: CaptionMix | None = None,
        prompts: PromptOptions | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        max_length: int = 32,
        padding: str = "longest",
        augment: Augment | None = None,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        text_cache: str | None = None,
        in_memory: bool = True,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share in [0, 1), got {val_fraction}")
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if max_length < 3:
            raise ValueError(f"max_length: expected at least 3, got {max_length}")
        if padding not in PADDINGS:
            raise ValueError(f"padding: expected one of {', '.join(PADDINGS)}, got {padding!r}")
        if workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {workers}")
        self.dataset, self.options = dataset, dict(options or {})
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.train_split, self.val_splits, self.test_splits = (
            train_split,
            tuple(val_splits),
            tuple(test_splits),
        )
        if text_cache is not None and caption_mix is not None:
            raise ValueError("text_cache: captions that caption_mix draws cannot be embedded before")
        self.val_fraction, self.caption_mix, self.prompts = val_fraction, caption_mix, prompts
        self.text_cache = text_cache
        self.languages = languages
        self.eval_languages = languages if eval_languages is None else eval_languages
        self.tokenizer_path, self.vocab_size, self.max_length = tokenizer, vocab_size, max_length
        self.padding = padding
        self.augment, self.in_memory, self.workers, self.seed = augment, in_memory, workers, seed
        self.transform = ImageTransform(image_size, mean, std)
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.skips = SkipReport()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._parts: dict[str, list[Sample]] = {}
        self._loaders: list[EpochLoader | PartLoader] = []
        self._train_loader: EpochLoader | None = None
        self._resumed: dict[str, int] = {}

    def setup(self, stage: str) -> None:
        """Read the dataset and get the tokenizer; the second call of a run finds them done."""
        if not self._parts:
            self._parts = self.read_parts()
            self.tokenizer = self._tokenizer()
            self._say(
                f"{self.dataset}: " + ", ".join(f"{len(part)} {name}" for name, part in self._parts.items())
            )
            if self.skips.skipped or self.skips.notes:
                self._say(self.skips.summary())
        self._check_system()

    def train_dataloader(self) -> EpochLoader:
        """Shuffled batches of the training part."""
        trainer = self.trainer

        def position() -> tuple[int, int]:
            assert trainer is not None
            loop: Any = trainer.fit_loop
            return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready

        source = self._source(self.train_split, train=True)
        if self.text_cache is not None:
            source.captions.cache = self._text_cache(source.captions, Path(self.text_cache))
        loader = EpochLoader(
            source,
            self.batch_size,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            workers=self.workers,
            position=None if trainer is None else position,
        )
        if self._resumed:
            loader.load_state_dict(self._resumed)
            if self._resumed.get("vocabulary") != self._vocabulary():
                raise ValueError(
                    "resume: the tokenizer trained on the captions of today has another vocabulary than the run that "
                    "stopped; give that run's as `tokenizer`, or start over"
                )
        self._train_loader = loader
        self._loaders.append(loader)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """What the order of the training batches depends on, for the checkpoint."""
        if self._train_loader is None:
            return {}
        return {**self._train_loader.state_dict(), "vocabulary": self._vocabulary()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says of the order; `train_dataloader` compares it with this run's."""
        self._resumed = state_dict

    def val_dataloader(self) -> list[PartLoader]:
        """One loader for each validation part."""
        return [self._part_loader(name) for name in self.val_splits if name in self._parts]

    def test_dataloader(self) -> list[PartLoader]:
        """One loader for each test part.

        Raises:
            ValueError: the dataset has none of `test_splits`.
        """
        parts = [name for name in self.test_splits if name in self._parts]
        if not parts:
            raise ValueError(
                f"test_splits: {self.dataset} has none of {self.test_splits}, only {tuple(self._parts)}"
            )
        return [self._part_loader(name) for name in parts]

    def teardown(self, stage: str) -> None:
        """Say which pictures could not be read on the way."""
        for loader in self._loaders:
            if loader.skips.skipped:
                self._say(f"{stage}: {loader.skips.summary()}")
        self._loaders.clear()

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the dataset, once `setup` has read it."""
        return tuple(self._parts)

    def read_parts(self) -> dict[str, list[Sample]]:
        """The samples of every part by its name, read anew and without a tokenizer."""
        samples = self._read()
        self.skips.merge(samples.skips)
        return self._split(samples)

    def samples(self, part: str) -> list[Sample]:
        """The samples of one part.

        Raises:
            ValueError: there is no such part.
        """
        if part not in self._parts:
            raise ValueError(f"part: expected one of {', '.join(self._parts)}, got {part!r}")
        return self._parts[part]

    def save_preprocessing(self, folder: str | Path) -> None:
        """Write the tokenizer and the image preprocessing into the folder of an exported system."""
        assert self.tokenizer is not None
        save_tokenizer(self.tokenizer, Path(folder) / "tokenizer")
        values = {
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            "max_length": self.max_length,
            "padding": self.padding,
        }
        write_atomically(Path(folder) / PREPROCESSING, json.dumps(values, indent=2).encode())

    def _vocabulary(self) -> int:
        """A digest of the tokens and their ids."""
        assert self.tokenizer is not None
        return zlib.crc32(json.dumps(sorted(self.tokenizer.get_vocab().items())).encode())

    def _read(self) -> SampleSet:
        reader = _reader(self.dataset)
        known = inspect.signature(reader).parameters
        unknown = [name for name in self.options if name not in known]
        missing = [
            name for name, one in known.items() if one.default is one.empty and name not in self.options
        ]
        if unknown or missing:
            problem = f"does not know {', '.join(unknown)}" if unknown else f"needs {', '.join(missing)}"
            raise ValueError(
                f"options: the reader of {self.dataset!r} {problem}; its options are {', '.join(known)}, such as "
                f"--data.options.{(missing or list(known))[0]} VALUE"
            )
        try:
            return read_files(reader, **self.options)
        except TypeError as error:
            raise ValueError(f"options: they do not fit the reader of {self.dataset!r}: {error}") from error

    def _split(self, samples: SampleSet) -> dict[str, list[Sample]]:
        parts: dict[str, list[Sample]] = {}
        for sample in samples:
            parts.setdefault(sample.split or self.train_split, []).append(sample)
        if self.train_split not in parts:
            raise ValueError(
                f"train_split: {self.dataset} has no part {self.train_split!r}, only {samples.splits}"
            )
        missing = [name for name in self.val_splits if name not in parts]
        if self.val_fraction and len(missing) == len(self.val_splits) and self.val_splits:
            # by a hash of the key: adding pictures later never moves one from training to validation
            cut = int(self.val_fraction * 2**32)
            train = parts[self.train_split]
            parts[self.val_splits[0]] = [s for s in train if zlib.crc32(s.key.encode()) < cut]
            parts[self.train_split] = [s for s in train if zlib.crc32(s.key.encode()) >= cut]
            for name in (self.train_split, self.val_splits[0]):
                if not parts[name]:
                    raise ValueError(
                        f"val_fraction: {self.val_fraction} of {len(train)} pictures leaves {name!r} empty"
                    )
        elif missing:
            self.skips.note("no such validation part", ", ".join(missing))
        return parts

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer_path is not None:
            return load_tokenizer(self.tokenizer_path)
        samples, captions = with_captions(self._parts[self.train_split], self.languages, SkipReport())
        texts = [caption for several in captions for caption in several]
        if self.caption_mix is not None:
            texts += [tag for sample in samples for tag in sample.tags]
        if self.prompts is not None:
            # twice, as a merge must occur twice
            texts += [template.replace("{}", " ") for template in self.prompts.templates] * 2
        return train_tokenizer(texts, vocabulary_size=self.vocab_size, max_length=self.max_length)

    def _source(self, part: str, *, train: bool) -> MemorySource | FileSource:
        assert self.tokenizer is not None
        skips = SkipReport()
        samples: Sequence[Sample] = self._parts[part]
        languages = self.languages if train else self.eval_languages
        mix = self.caption_mix if train else None
        augment = self.augment if train else None
        pixels = None
        if self.in_memory:
            captioned, _ = with_captions(samples, languages, skips)
            pixels, samples = decode_all(captioned, self.image_size, skips)
        samples, captions = with_captions(samples, languages, skips)
        skips.raise_if_empty(len(samples), f"{self.dataset}/{part}")
        if skips.skipped:
            self._say(f"{part}: {skips.summary()}")
        prompts = self.prompts.build() if train and self.prompts is not None else None
        tags = [sample.tags for sample in samples]
        tokens = Captions(captions, self.tokenizer, self.max_length, mix, tags, prompts, self.padding)
        if pixels is not None:
            return MemorySource(
                pixels, tokens, torch.tensor(self.mean), torch.tensor(self.std), augment, train=train
            )
        transform = ImageTransform(self.image_size, self.mean, self.std, augment)
        return FileSource(samples, tokens, transform, train=train)

    def _text_cache(self, captions: Captions, folder: Path) -> TextCache:
        trainer: Any = self.trainer
        encoder = getattr(getattr(trainer, "lightning_module", None), "system", None)
        encoder = getattr(encoder, "text_encoder", None)
        if encoder is None:
            raise ValueError("text_cache: there is no system with a text_encoder to embed the captions with")
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ValueError("text_cache: the text encoder is trained, so its embeddings change; freeze it")
        assert self.tokenizer is not None
        texts = captions.input_ids, captions.attention_mask
        key = key_of(encoder, self.tokenizer, captions.flat, *texts)
        failed: str | None = None
        if trainer.is_global_zero and not (folder / KEY).exists():
            self._say(f"text_cache: embedding {len(texts[0])} captions into {folder}")
            try:
                write(folder, encoder, key, *texts)
            except (OSError, RuntimeError) as error:
                failed = str(error) or repr(error)
        # the other ranks wait here, and would for ever if the first one simply raised
        failed = trainer.strategy.broadcast(failed)
        if failed is not None:
            raise OSError(f"text_cache: {folder} could not be written: {failed}")
        return TextCache(folder, key)

    def _part_loader(self, name: str) -> PartLoader:
        loader = PartLoader(
            self._source(name, train=False), self.eval_batch_size, name=name, workers=self.workers
        )
        self._loaders.append(loader)
        return loader

    def _check_system(self) -> None:
        """Refuse what the system would take, and learn nothing right from."""
        system = getattr(getattr(self.trainer, "lightning_module", None), "system", None)
        embedded = getattr(getattr(system, "text_encoder", None), "vocab_size", None)
        assert self.tokenizer is not None
        if embedded is not None and len(self.tokenizer) > embedded:
            raise ValueError(
                f"vocab_size: the tokenizer has {len(self.tokenizer)} ids, the text encoder embeds {embedded}"
            )
        expected = getattr(system, "normalization", None)
        if expected is not None and (self.mean, self.std) != expected:
            raise ValueError(
                f"mean, std: {type(system).__name__} expects {expected[0]} and {expected[1]}, got {self.mean} and {self.std}"
            )
        if getattr(system, "counts_padding", False) and self.padding != "max_length":
            raise ValueError(
                f"padding: expected 'max_length' for a {type(system).__name__} whose sentences count padding, as it generates "
                f"from texts of that length, got {self.padding!r}"
            )

    def _say(self, text: str) -> None:
        if self.trainer is None or self.trainer.is_global_zero:
            print(text, file=sys.stderr)


def _reader(dataset: str) -> Callable[..., SampleSet]:
    # each needs packages of its own, which a run on another dataset does without
    if dataset == "emoji":
        from jrl.data.emoji import read_emoji

        return read_emoji
    if dataset == "scenes":
        from jrl.data.scenes import read_scenes

        return read_scenes
    from jrl.data.readers import FORMATS

    if dataset not in FORMATS:
        known = ", ".join(sorted({"emoji", "scenes", *FORMATS}))
        raise ValueError(f"dataset: expected one of {known}, got {dataset!r}")
    return FORMATS[dataset]
