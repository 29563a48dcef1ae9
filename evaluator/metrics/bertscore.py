"""BERTScore: how well the tokens of an answer match those of its reference, by the cosine of a BERT-like encoder's vectors of them.

F1 of greedy matching, without idf weights and without baseline rescaling (Zhang et al., "BERTScore: Evaluating Text Generation with BERT",
2020). Values are those of the authors' package bert-score 0.3.13, to which tests hold them, but for two things: matches are sought among
the other text's own tokens alone, never in padding; and RoBERTa's first word is a word in mid-sentence, as the package means it and with
transformers 5 no longer has it.

Why not a library: bert-score was last released in 2023, wants matplotlib and pandas, and with transformers 5 breaks off at an empty answer.
torchmetrics 1.9 compares answers with other rows' references as soon as their lengths differ (its issue 2728).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics.metric import Answered, Metric, mean
from shared.artifacts import canonical, read_jsonl, sha256_bytes, sha256_file, write_jsonl
from shared.commands import install
from shared.contracts import Contract, Prediction
from shared.errors import DataError, EngineError, SettingsError, StageOrder
from shared.settings import BertScoreSettings

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
NO_END = 2**20
"""Tokens of a text, where nothing else bounds them."""
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")


class BertScoreRow(Contract):
    """The score of one system's answer to one row, stored so that a report can be made without the encoder."""

    system: str
    example_id: str
    f1: float
    cut: bool
    """Whether the answer or the reference was too long for the encoder, and was cut at the end."""
    pair: str
    """SHA-256 of the answer and the reference: a score is of these two texts and of no others."""
    scorer: str
    """The encoder's folder name, the layer, and the SHA-256 of its files."""


def bertscore_rows(
    texts: Sequence[str], references: Sequence[str], model: Path, *, layer: int | None = None, batch_size: int = 32
) -> tuple[Floats, NDArray[np.bool_]]:
    """F1 of every text against its reference, (rows,), at most 1; and whether one of the two was too long and was cut at its end, (rows,).

    Empty text scores 0. Raises SettingsError for a folder or a layer that cannot be used and where torch or transformers are missing,
    EngineError for a model that cannot be loaded.
    """
    rows = [i for i, (text, reference) in enumerate(zip(texts, references, strict=True)) if text.strip() and reference.strip()]
    f1, cut = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.bool_)
    if not rows:
        return f1, cut
    encoder = _Encoder(model, layer)
    # answers to one reference side by side: a batch encodes it once
    rows.sort(key=lambda i: (len(references[i]), references[i], len(texts[i])))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        wanted = sorted({text.strip() for i in batch for text in (texts[i], references[i])})
        encoded, too_long = encoder.encode(wanted)
        for i in batch:
            text, reference = texts[i].strip(), references[i].strip()
            f1[i] = _f1(*encoded[text], *encoded[reference])
            cut[i] = text in too_long or reference in too_long
    return f1, cut


def _f1(ours: Tensor, our_words: Tensor, theirs: Tensor, their_words: Tensor) -> float:
    """F1 of two texts: (tokens, width) unit vectors, and which of the tokens (tokens,) are of the text.

    What the tokenizer put around a text may be matched, but counts for nothing: as in the authors' package.
    """
    if not our_words.any() or not their_words.any():
        return 0.0
    cosines = ours @ theirs.T
    precision = float(cosines.max(dim=1).values[our_words].mean())
    recall = float(cosines.max(dim=0).values[their_words].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class _Encoder:
    def __init__(self, folder: Path, layer: int | None) -> None:
        check(folder)
        try:
            import torch
            from transformers import AutoConfig, AutoModel, AutoTokenizer
            from transformers.utils import logging
        except ImportError as exc:
            raise SettingsError(f"evaluate.bertscore: {exc.name} is missing: {install('train')}") from exc
        logging.set_verbosity_error()  # else it reports every weight of a head that nobody asked for
        logging.disable_progress_bar()
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            if config.is_encoder_decoder:
                raise SettingsError(f"evaluate.bertscore.model: {folder} is an encoder-decoder; give a BERT-like encoder")
            # the authors' package reads RoBERTa's first word as one in mid-sentence
            prefix = {"add_prefix_space": True} if config.model_type == "roberta" else {}
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, **prefix)
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as exc:
            raise EngineError(f"evaluate.bertscore.model: cannot load {folder}: {exc}") from exc
        if self._tokenizer.pad_token is None:
            raise SettingsError(f"evaluate.bertscore.model: the tokenizer of {folder} has no padding; give a BERT-like encoder")
        if layer is not None and layer > config.num_hidden_layers:
            raise SettingsError(f"evaluate.bertscore.layer: {layer}, but {folder} has {config.num_hidden_layers}")
        self._layer = -1 if layer is None else layer
        # relative positions have no end; RoBERTa counts its own from the padding's id on
        positions = getattr(config, "max_position_embeddings", NO_END) - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)
        self._longest = min(self._tokenizer.model_max_length, positions)
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def encode(self, texts: list[str]) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
        """The vectors of each text as `_f1` takes them, and the texts that were cut."""
        import torch

        lengths = [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]]
        batch = self._tokenizer(
            texts, truncation=True, max_length=self._longest, padding=True, return_special_tokens_mask=True, return_tensors="pt"
        )
        words = batch.pop("special_tokens_mask") == 0
        with torch.inference_mode():
            hidden = self._model(**batch.to(self._model.device), output_hidden_states=True).hidden_states[self._layer]
            hidden = torch.nn.functional.normalize(hidden, dim=-1).cpu()
        there = batch["attention_mask"].bool().cpu()
        encoded = {text: (hidden[i][there[i]], words[i][there[i]]) for i, text in enumerate(texts)}
        return encoded, {text for text, length in zip(texts, lengths, strict=True) if length > self._longest}


def check(folder: Path) -> None:
    """Whether `folder` can hold a model at all: asked before hours are spent on answers. Raises SettingsError."""
    if not (folder / "config.json").is_file():
        raise SettingsError(f"evaluate.bertscore.model: {folder} is no folder in Hugging Face format (it has no config.json)")


def scorer(settings: BertScoreSettings) -> str:
    """What tells this encoder and layer from all others. Raises SettingsError."""
    folder = settings.model
    check(folder)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files = [*weights, *sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))]
    content = sha256_bytes(canonical([[path.name, sha256_file(path)] for path in files]))
    return f"{_named(settings)}, sha256:{content[:16]}"


def write_scores(
    file: Path, settings: BertScoreSettings, predictions: Sequence[Prediction], references: Mapping[str, str]
) -> dict[str, int | str]:
    """Score the predictions to rows with a reference into `file`, and return what a manifest should say of it.

    What `file` holds of the same texts and encoder is not computed again. Raises as `bertscore_rows` does, DataError, StorageError.
    """
    name = scorer(settings)
    stored = read_jsonl(file, BertScoreRow) if file.exists() else []
    known = {row.pair: (row.f1, row.cut) for row in stored if row.scorer == name}
    scored = [p for p in predictions if p.example_id in references]
    texts = {_pair(p.text, references[p.example_id]): (p.text, references[p.example_id]) for p in scored}
    missing = [pair for pair in texts if pair not in known]
    answers, expected = [texts[pair][0] for pair in missing], [texts[pair][1] for pair in missing]
    f1, cut = bertscore_rows(answers, expected, settings.model, layer=settings.layer, batch_size=settings.batch_size)
    # six digits: the last ones of a float32 depend on what shared a batch
    known |= {pair: (round(float(value), 6), bool(short)) for pair, value, short in zip(missing, f1, cut, strict=True)}
    rows = []
    for p in scored:
        pair = _pair(p.text, references[p.example_id])
        value, short = known[pair]
        rows.append(BertScoreRow(system=p.system, example_id=p.example_id, f1=value, cut=short, pair=pair, scorer=name))
    write_jsonl(file, rows)
    return {"scorer": name, "rows": len(rows), "computed": len(missing), "cut": sum(row.cut for row in rows)}


def stored_metric(file: Path, settings: BertScoreSettings) -> Metric:
    """The metric `bertscore` with the values in `file`, without any model.

    Its `statistics` raise DataError for an answer that has none there. Raises StageOrder without the file, DataError for one that holds
    scores of several encoders or of another one than the settings name.
    """
    if not file.exists():
        raise StageOrder(f"{file} is missing: run `distill evaluate` first, without --score-only")
    rows = read_jsonl(file, BertScoreRow)
    scorers = sorted({row.scorer for row in rows})
    if len(scorers) != 1:
        raise DataError(f"{file}: scores of {len(scorers)} encoders ({'; '.join(scorers)}) are no metric; run `distill evaluate` again")
    if not scorers[0].startswith(f"{_named(settings)}, sha256:"):
        raise DataError(f"{file} holds scores of {scorers[0]}, the settings say {_named(settings)}; run `distill evaluate` again")
    known = {row.pair: row.f1 for row in rows}

    def statistics(answered: Sequence[Answered]) -> Floats:
        pairs = [_pair(row.text, row.reference) for row in answered]
        if missing := sum(pair not in known for pair in pairs):
            raise DataError(f"{file} has no score of {missing} of {len(pairs)} present answers; run `distill evaluate` again")
        return np.array([[known[pair]] for pair in pairs])

    about = f"BERTScore F1 (Zhang et al., 2020), {scorers[0]}; no idf weights, no baseline rescaling; mean over rows"
    return Metric("bertscore", "BERTScore", about, statistics, mean, by_row=True)


def _named(settings: BertScoreSettings) -> str:
    """What a person calls the scorer."""
    return f"{settings.model.resolve().name}, {'last layer' if settings.layer is None else f'layer {settings.layer}'}"


def _pair(text: str, reference: str) -> str:
    return sha256_bytes(canonical([text, reference]))
