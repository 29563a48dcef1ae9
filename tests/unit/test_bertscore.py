"""BERTScore: hand-made matchings, the values of the authors' package, and what a stored score may be used for."""

from __future__ import annotations

import string
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from evaluator.metrics.bertscore import (  # noqa: E402
    BertScoreRow,
    _f1,
    bertscore_rows,
    stored_metric,
    write_scores,
)
from evaluator.metrics.metric import Answered  # noqa: E402
from shared.artifacts import read_jsonl, write_jsonl  # noqa: E402
from shared.contracts import Prediction  # noqa: E402
from shared.errors import DataError, EngineError, SettingsError, StageOrder  # noqa: E402
from shared.settings import BertScoreSettings  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(60)), *string.ascii_lowercase]
LONGEST = 24
TEXTS = ["w1 w2 w3", "w9", "w4 w5 w6 w7 w8 w9 w10", "w2 w1", "w30 w31 w32 w33 w34", "w1 w2 w3"]
REFERENCES = ["w1 w2 w4", "w9 w10 w11 w12 w13", "w4 w8 w6", "w1 w2", "w40 w41", "w1 w2 w3"]
PACKAGE = {
    1: [0.950686, 0.899749, 0.869576, 0.749696, 0.66968, 1.0],
    2: [0.980368, 0.962302, 0.947455, 0.888886, 0.84813, 1.0],
    3: [0.976591, 0.949489, 0.953462, 0.793496, 0.84913, 1.0],
}
"""By layer, what bert-score 0.3.13 says of TEXTS and REFERENCES with the model of `folder`."""


def draw(model, seed=0):
    """Weights that do not depend on torch's own random numbers, large enough for different words to have different vectors."""
    numbers = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weights in sorted(model.named_parameters()):
            drawn = torch.tensor(numbers.random(weights.numel()) - 0.5, dtype=torch.float32).reshape(weights.shape)
            weights.copy_(1 + 0.1 * drawn if "LayerNorm.weight" in name else drawn)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of three layers that knows the words w0 ... w59."""
    made = tmp_path_factory.mktemp("bert") / "tiny-bert"
    made.mkdir()
    (made / "vocab.txt").write_text("\n".join(WORDS))
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=LONGEST, **sizes)
    draw(transformers.BertModel(config)).save_pretrained(made)
    transformers.BertTokenizer(vocab=str(made / "vocab.txt"), model_max_length=LONGEST).save_pretrained(made)
    return made


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def test_each_token_is_matched_with_the_most_alike_of_the_other_text_and_f1_is_their_harmonic_mean():
    ours, theirs = unit([1, 0], [0, 1]), unit([1, 0], [3, 4], [-1, 0])
    # ours: 1 by the first, 4/5 by the second; theirs: 1, 4/5 and, by the token at a right angle, 0
    precision, recall = (1 + 0.8) / 2, (1 + 0.8 + 0) / 3
    every = torch.ones(3, dtype=torch.bool)
    assert _f1(ours, every[:2], theirs, every) == pytest.approx(2 * precision * recall / (precision + recall))


def test_what_the_tokenizer_put_around_a_text_may_be_matched_and_counts_for_nothing():
    ours, theirs = unit([0, 1], [1, 0]), unit([0, 1], [1, 0])
    of_ours, of_theirs = torch.tensor([False, True]), torch.tensor([True, False])
    assert _f1(ours, of_ours, theirs, of_theirs) == pytest.approx(1.0)
    assert _f1(ours, of_ours, theirs, torch.tensor([False, False])) == 0.0


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_scores_are_those_of_the_authors_package(folder, layer):
    found, _ = bertscore_rows(TEXTS, REFERENCES, folder, layer=layer)
    assert found == pytest.approx(PACKAGE[layer], abs=2e-5)


def test_a_text_scores_one_against_itself_and_the_same_either_way_round(folder):
    itself, _ = bertscore_rows(TEXTS, TEXTS, folder)
    assert itself == pytest.approx(1.0, abs=1e-6)
    there, back = bertscore_rows(TEXTS, REFERENCES, folder)[0], bertscore_rows(REFERENCES, TEXTS, folder)[0]
    assert there == pytest.approx(back, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_row_s_score_does_not_depend_on_the_rows_beside_it(folder, batch_size):
    whole, _ = bertscore_rows(TEXTS, REFERENCES, folder, batch_size=batch_size)
    alone = [bertscore_rows([t], [r], folder)[0][0] for t, r in zip(TEXTS, REFERENCES, strict=True)]
    assert whole == pytest.approx(alone, abs=1e-6)


def test_empty_text_scores_zero_and_blanks_around_a_text_change_nothing(folder):
    found, cut = bertscore_rows(["", " \n", "w1", "  w1 w2\n"], ["w1", "w1", " ", "w1 w2"], folder)
    assert found == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert not cut.any()


def test_texts_beyond_the_model_s_length_are_cut_at_the_end_and_counted(folder):
    long = " ".join(f"w{i}" for i in range(40))
    whole = " ".join(long.split()[: LONGEST - 2])
    found, cut = bertscore_rows([long, whole, whole, "w1"], [whole, long, whole, "w1"], folder)
    assert found == pytest.approx([1, 1, 1, 1], abs=1e-6)
    assert cut.tolist() == [True, True, False, False]


def test_roberta_s_positions_begin_after_the_padding_and_its_first_word_is_one_in_mid_sentence(tmp_path):
    from tokenizers import Tokenizer as Core
    from tokenizers import models, pre_tokenizers, trainers

    core = Core(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["what is it"] * 9, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    core.model.save(str(tmp_path))
    made = transformers.RobertaTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    made.save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=300, max_position_embeddings=12, pad_token_id=1, **sizes)
    model = draw(transformers.RobertaModel(config))
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()  # a word's embedding then is the same wherever it stands
    model.save_pretrained(tmp_path)
    found, cut = bertscore_rows(["is what", "it " * 30], ["what is", "it " * 30], tmp_path, layer=0)
    assert found == pytest.approx([1, 1], abs=1e-6)
    assert cut.tolist() == [False, True]


def test_a_folder_a_layer_or_a_model_that_cannot_be_used_is_named(folder, tmp_path):
    with pytest.raises(SettingsError, match=r"evaluate\.bertscore\.model: .*none is no folder"):
        bertscore_rows(["w1"], ["w1"], tmp_path / "none")
    with pytest.raises(SettingsError, match=r"evaluate\.bertscore\.layer: 4, but .* has 3"):
        bertscore_rows(["w1"], ["w1"], folder, layer=4)
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="encoder-decoder"):
        bertscore_rows(["w1"], ["w1"], tmp_path)
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="cannot load"):
        bertscore_rows(["w1"], ["w1"], tmp_path)


def test_without_transformers_the_extra_to_install_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingsError, match=r"transformers is missing: in the checkout, pip install -e '\.\[train\]'"):
        bertscore_rows(["w1"], ["w1"], folder)


IDS = [f"e{i}" for i in range(len(TEXTS))]


def predictions(texts, system="distilled"):
    return [Prediction(system=system, example_id=i, text=text) for i, text in zip(IDS, texts, strict=True)]


def answered(texts):
    return [Answered("?", reference, text) for text, reference in zip(texts, REFERENCES, strict=True)]


def test_stored_scores_make_the_metric_without_a_model(folder, tmp_path):
    file, settings = tmp_path / "bertscore.jsonl", BertScoreSettings(model=folder, layer=2)
    given = [*predictions(TEXTS), *predictions([""] * len(TEXTS), "constant")]
    counts = write_scores(file, settings, given, dict(zip(IDS, REFERENCES, strict=True)))
    assert (counts["rows"], counts["cut"]) == (12, 0)
    metric = stored_metric(file, settings)
    expected, _ = bertscore_rows(TEXTS, REFERENCES, folder, layer=2)
    assert metric.statistics(answered(TEXTS))[:, 0] == pytest.approx(expected, abs=1e-6)
    assert metric.score(metric.statistics(answered([""] * len(TEXTS)))) == 0.0
    assert "tiny-bert, layer 2, sha256:" in metric.definition


def test_rows_that_were_cut_are_counted_also_when_they_are_not_computed_again(folder, tmp_path):
    file, long = tmp_path / "bertscore.jsonl", predictions(["w1 " * 40, *TEXTS[1:]])
    for computed in (6, 0):
        counts = write_scores(file, BertScoreSettings(model=folder), long, dict(zip(IDS, REFERENCES, strict=True)))
        assert (counts["computed"], counts["cut"]) == (computed, 1)


def test_rows_without_a_reference_are_not_scored(folder, tmp_path):
    file = tmp_path / "bertscore.jsonl"
    assert write_scores(file, BertScoreSettings(model=folder), predictions(TEXTS), {"e0": "w1"})["rows"] == 1
    assert [row.example_id for row in read_jsonl(file, BertScoreRow)] == ["e0"]


def test_what_is_stored_is_not_computed_again_unless_the_text_or_the_encoder_is_another(folder, tmp_path):
    file, settings, references = tmp_path / "b.jsonl", BertScoreSettings(model=folder), dict(zip(IDS, REFERENCES, strict=True))
    assert write_scores(file, settings, predictions(TEXTS), references)["computed"] == 6
    before = file.read_bytes()
    assert write_scores(file, settings, predictions(TEXTS), references)["computed"] == 0
    assert file.read_bytes() == before
    changed = ["w50", *TEXTS[1:]]
    assert write_scores(file, settings, predictions(changed), references)["computed"] == 1
    other = BertScoreSettings(model=folder, layer=1)
    assert write_scores(file, other, predictions(changed), references)["computed"] == 6
    assert {row.scorer.partition(", sha256")[0] for row in read_jsonl(file, BertScoreRow)} == {"tiny-bert, layer 1"}


def test_scores_of_other_answers_or_another_encoder_are_not_taken_for_those_of_the_present_ones(folder, tmp_path):
    file, settings = tmp_path / "bertscore.jsonl", BertScoreSettings(model=folder)
    with pytest.raises(StageOrder, match="distill evaluate"):
        stored_metric(file, settings)
    write_scores(file, settings, predictions(TEXTS), dict(zip(IDS, REFERENCES, strict=True)))
    with pytest.raises(DataError, match="no score of 1 of 6 present answers"):
        stored_metric(file, settings).statistics(answered(["w50", *TEXTS[1:]]))
    with pytest.raises(DataError, match=r"tiny-bert, last layer.*the settings say tiny-bert, layer 2"):
        stored_metric(file, BertScoreSettings(model=folder, layer=2))
    rows = read_jsonl(file, BertScoreRow)
    write_jsonl(file, [rows[0].model_copy(update={"scorer": "another"}), *rows[1:]])
    with pytest.raises(DataError, match="scores of 2 encoders"):
        stored_metric(file, settings)
