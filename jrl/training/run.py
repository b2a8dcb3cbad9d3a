"""A trained run opened again: its system, tokenizer and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from jrl.data.images import ImageError, ImageTransform, load_image
from jrl.data.readers.common import IMAGE_SUFFIXES
from jrl.data.sample import ImageSource, SkipReport
from jrl.data.tokenizer import load_tokenizer, save_tokenizer
from jrl.systems import System, load_system
from jrl.training.data import PREPROCESSING
from jrl.training.files import write_atomically


@dataclass
class Run:
    """What a run exported, ready to embed pictures and texts.

    Attributes:
        system: in evaluation mode.
        tokenizer: of its captions.
        transform: picture to tensor.
        max_length: tokens after which a text is cut.
        padding: of texts, to the "longest" of a batch or always to "max_length", as in training.
    """

    system: System
    tokenizer: PreTrainedTokenizerBase
    transform: ImageTransform
    max_length: int
    padding: str = "longest"

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", allow_pickle: bool = False
    ) -> Run:
        """Open a run's folder, or the `model` folder in it.

        Args:
            folder: what `jrl fit --run` wrote.
            device: where the system goes.
            allow_pickle: take pickled weights where there are no safetensors.

        Raises:
            FileNotFoundError: the folder or a file of it is missing.
            ValueError: a file is unreadable or does not fit, or there is no such device.
        """
        device = usable_device(device)
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such run")
        model = folder / "model" if (folder / "model").is_dir() else folder
        if not (model / "config.json").is_file():
            expected = f"{folder}: holds no exported system; expected {folder / 'model' / 'config.json'}"
            if (folder / "checkpoints").is_dir():
                again = f"jrl fit --config {folder / 'config.yaml'} --run {folder} --resume true"
                expected = f"{folder}: its training has not come to its end, which exports the system; to go on: {again}"
            raise FileNotFoundError(expected)
        path = model / PREPROCESSING
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            transform = ImageTransform(values["image_size"], values["mean"], values["std"])
            max_length = int(values["max_length"])
            padding = str(values.get("padding", "longest"))
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; expected a folder that `jrl fit` wrote") from None
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: unreadable preprocessing: {error!r}") from error
        system = load_system(model, map_location=device, allow_pickle=allow_pickle)
        return cls(system, load_tokenizer(model / "tokenizer"), transform, max_length, padding)

    def save(self, folder: str | Path) -> None:
        """Write what `load` opens: `folder`/model with the system, its tokenizer and its preprocessing.

        Raises:
            OSError: it cannot be written.
        """
        model = Path(folder) / "model"
        self.system.save_pretrained(model)
        save_tokenizer(self.tokenizer, model / "tokenizer")
        values = {
            "image_size": self.transform.size,
            "mean": self.transform.mean.ravel().tolist(),
            "std": self.transform.std.ravel().tolist(),
            "max_length": self.max_length,
            "padding": self.padding,
        }
        write_atomically(model / PREPROCESSING, json.dumps(values, indent=2).encode())

    @property
    def device(self) -> torch.device:
        """Where the system is."""
        return next(self.system.parameters()).device

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed texts.

        Returns:
            [len(texts), D] on the CPU.

        Raises:
            ValueError: no text, or a blank one.
        """
        if not texts:
            raise ValueError("texts: expected at least one")
        for text in texts:
            if not text.strip():
                raise ValueError("texts: expected words, got a blank text")
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=self.padding,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
            encoded = self.system.encode_text(
                tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
            )
            rows.append(encoded.global_.float().cpu())
        return torch.cat(rows)

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[tuple[str, ImageSource]], batch_size: int = 256
    ) -> tuple[Tensor, list[int], SkipReport]:
        """Embed pictures; those that cannot be read are counted and left out.

        Args:
            images: (name, source) of each.
            batch_size: pictures encoded together.

        Returns:
            [K, D] on the CPU, the positions in `images` of the K rows, and the account of the others.

        Raises:
            ValueError: no picture could be read.
        """
        skips = SkipReport()
        kept: list[int] = []
        rows: list[Tensor] = []
        waiting: list[Tensor] = []
        for position, (name, source) in enumerate(images):
            try:
                waiting.append(self.transform(load_image(source, name=name)))
                kept.append(position)
            except ImageError as error:
                skips.add(error.reason, str(error))
            if waiting and (len(waiting) == batch_size or position == len(images) - 1):
                rows.append(
                    self.system.encode_image(torch.stack(waiting).to(self.device)).global_.float().cpu()
                )
                waiting = []
        skips.raise_if_empty(len(kept), "images")
        return torch.cat(rows), kept, skips


def image_files(folder: str | Path) -> list[Path]:
    """All pictures under a folder by their suffix, sorted; hidden ones are left alone.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: it holds no picture.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"images: no folder {folder}")
    if not folder.is_dir():
        raise NotADirectoryError(f"images: {folder} is a file, expected a folder")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not files:
        raise ValueError(f"images: {folder} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
    return files


def usable_device(device: str | torch.device) -> torch.device:
    """A device by name, such as "cpu" or "cuda:1".

    Raises:
        ValueError: there is none.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:1, got {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: PyTorch sees {torch.cuda.device_count()} GPUs, got {str(device)!r}; cpu is one that works"
        )
    return found


def write_embeddings(path: str | Path, embeddings: Tensor, files: Sequence[str]) -> None:
    """Write `embeddings` [N, D] as safetensors, with the N names as JSON in the metadata under "files".

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    metadata = {"files": json.dumps(list(files))}
    write_atomically(path, safetensors.torch.save({"embeddings": embeddings.contiguous()}, metadata=metadata))


def picture_grid(
    pictures: Sequence[PIL.Image.Image], columns: int = 5, side: int = 128, gap: int = 8
) -> PIL.Image.Image:
    """Pictures side by side on white, each fitted into a square.

    Raises:
        ValueError: there is no picture.
    """
    if not pictures:
        raise ValueError("pictures: expected at least one")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    step = side + gap
    grid = PIL.Image.new("RGB", (columns * step + gap, rows * step + gap), "white")
    for position, picture in enumerate(pictures):
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        fitted = picture.resize(size, PIL.Image.Resampling.BICUBIC)
        left = gap + position % columns * step + (side - size[0]) // 2
        top = gap + position // columns * step + (side - size[1]) // 2
        grid.paste(fitted, (left, top))
    return grid
